"""Train methods x seeds, measure them, and compare them in tables and figures. What is finished is skipped.

    python scripts/experiment.py digits
    python scripts/experiment.py cifar100 --rho 0.1 --jobs 2 --epochs 100

The first word names one of `PRESETS`, the options that an experiment begins with. Options that follow replace them, and
options that are not of this script go to main.py. Where --rho, --flat_ratio or --initial_epochs has several values, one
is chosen on validation: rho by the ensemble accuracy of SAM over all seeds, then k and T_d by that of SharpBalance
(released) on the first seeds. `ENVIRONMENT` lists the options that a variable of the same name sets as well.

Runs go to --runs, measurements to --measurements. --results gets plan.json and validation.md (choices and validation
accuracies), tables.md, figures, and copies of the result files that are small enough for git; with --results none the
table is printed. Re-run the same command to resume an interrupted experiment.
"""

import argparse
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tabulate import tabulate

from utils import InputError, RunError, cli, processes, table_cell
from utils.data import Data
from utils.datasets import CORRUPTED, DATASETS, find_corrupted, load_data
from utils.distributed import cores
from utils.files import load_json, read_json, write_array, write_atomically, write_json
from utils.kept import VERSIONS
from utils.places import PLACES, find
from utils.results import copy_results
from utils.run import environment, read_settings

ROOT = Path(__file__).resolve().parent.parent
SETS = ("sharpbalance", "sharpbalance_paper", "random", "same")  # the methods that k and T_d matter to
METHODS = ("deep_ensemble", "eoa", "sam", "deep_ensemble_sam", "asam", *SETS)
FOUR = ("deep_ensemble", "sam", "sharpbalance", "sharpbalance_paper")
TENS = ",".join(f"{ten}1 {ten}2 {ten}3" for ten in range(1, 11))
PAPER = f"--methods {','.join(FOUR)} --seeds '13 17 27,113 117 127,43 59 223' --model resnet18 --rho 0.2"
PAPER += " --flat_ratio 0.5 --initial_epochs 100 --variance --figures tradeoff benchmark ensemble_size severity"
PAPER += " --sharpness_flags '--mode APGD_worst,APGD_average,hessian_t,hessian_e,fisher,NTK'"
SMALL = f"--data fashion_mnist --seeds '{TENS}' --epochs 30 --validation 500 --batch_size 64 --augmentation flip"
SMALL += " --threads 1 --checkpoint last --jobs auto --sharpness_flags '--mode APGD_worst --norms l2 --batch_num 40'"
FASHION = f"{SMALL} --methods deep_ensemble,eoa,sam,sharpbalance,sharpbalance_paper,random"
FASHION += " --rho 0.05 0.1 0.2 --flat_ratio 0.3 0.5 0.7 --initial_epochs 7 15 22"
FASHION += " --measure_flags '--mode predict,disagreement,KL,ood --ood digits corrupted noise'"
FASHION += " --figures tradeoff benchmark severity ensemble_size ood reliability"
# By the name of an experiment, the words of its command line.
PRESETS = {
    "quickstart": "--data digits --methods deep_ensemble,deep_ensemble_sam,sharpbalance --rho 0.1 --flat_ratio 0.5 "
    "--seeds '13 17 27' --folder {method} --results none "
    "--sharpness_flags '--mode APGD_worst --norms l2 --batch_num 20'",
    "digits": f"--data digits --methods {','.join(FOUR)} --rho 0.1 --flat_ratio 0.5 --seeds '{TENS}' --ensembles 5 "
    "--corrupted 899 --checkpoint last --sharpness_flags '--mode APGD_worst --batch_num 20' "
    "--figures tradeoff benchmark",
    "cifar10": f"{PAPER} --data cifar10",
    "cifar100": f"{PAPER} --data cifar100",
    "tiny_imgnet": f"{PAPER} --data tiny_imgnet",
    "ablations": f"{PAPER} --methods sam,sharpbalance,sharpbalance_paper,random,same,asam,eoa --checkpoint last "
    "--runs runs/{data} --measurements measurements/{data}_ablations --results results/{data}_ablations",
    # As noisy_labels, by the rho, k and T_d that were chosen there.
    "members": f"{SMALL} --methods {','.join(FOUR)} --ensembles 5 --plain_members 9 --rho 0.1 --flat_ratio 0.7 "
    "--initial_epochs 22 --width 8 --label_noise 0.2 --images 2000 --figures tradeoff ensemble_size ood reliability "
    "--measure_flags '--mode predict,disagreement,ood --ood digits noise' --runs runs/{data}_members "
    "--measurements measurements/{data}_members --results results/{data}_members",
    "fashion_mnist/noisy_labels": f"{FASHION} --width 8 --label_noise 0.2 --images 2000 --ensembles 7 --corrupted 500",
    "fashion_mnist/clean_labels": f"{FASHION} --width 16 --images 750 --ensembles 5 --corrupted 200",
    "regime": "--data fashion_mnist --methods deep_ensemble,sam --rho 0.05 0.1 --seeds '11 12 13' --batch_size 64 "
    "--threads 1 --jobs auto --images 2000 --validation 2000 --skip_measuring",
}
SET_BY_METHOD = ("--sam", "--sam_adaptive", "--partition", "--match_size", "--average_from", "--seed", "--save_path")
ENVIRONMENT = ("data", "data_path", "methods", "seeds", "rho", "flat_ratio", "initial_epochs", "asam_rho", "checkpoint")
ENVIRONMENT += ("nproc", "measure_flags", "sharpness_flags", "runs", "measurements", "results")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `train` holds what goes to main.py."""
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    preset = PRESETS.get(words[0] if words else "", "")
    variables = [f"--{name}={os.environ[name.upper()]}" for name in ENVIRONMENT if os.environ.get(name.upper())]
    args, args.train = parser.parse_known_args([*words[:1], *shlex.split(preset), *variables, *words[1:]])
    own = next((word for word in args.train if word.split("=")[0] in SET_BY_METHOD), None)
    if own:
        parser.error(f"{own.split('=')[0]}: set by --methods and --seeds; choose among these, or call main.py")
    for name in ("runs", "measurements", "results"):
        place = (getattr(args, name) or f"{name}/{args.preset}").replace("{data}", args.data)
        try:
            setattr(args, name, None if place == "none" else cli.path(place))
        except argparse.ArgumentTypeError as error:
            parser.error(f"--{name}: {error}")
    args.seeds = [seeds.strip() for seeds in args.seeds.split(",")][: args.ensembles]
    args.jobs = cores() if args.jobs == "auto" else args.jobs
    if args.images and not args.validation:
        parser.error("--images: given without --validation; say how many images to validate on")
    return args


def build_parser() -> cli.Parser:
    """All options."""
    parser = cli.Parser(__doc__)
    parser.add_argument("preset", choices=PRESETS, help="the experiment")
    cli.add_choice(parser, "data", "data set", DATASETS, default="cifar100")
    cli.add_option(parser, "data_path", "folder of the data sets", cli.path, "DIR", default=Path("data"))
    parser.add_argument("--methods", action=cli.Choices, among=METHODS, help="what is compared")
    cli.add_option(parser, "seeds", "of each ensemble, separated by commas", str, "LIST")
    cli.add_option(parser, "ensembles", "the first N of these (default: all)", cli.COUNT, "N")
    text = "members of each deep ensemble, of seeds that follow on the last (default: as many as the others have)"
    cli.add_option(parser, "plain_members", text, cli.COUNT, "N")
    cli.add_option(parser, "rho", "of SAM", cli.POSITIVE, "R", nargs="+")
    cli.add_option(parser, "flat_ratio", "of SharpBalance", cli.SHARE, "K", nargs="+")
    cli.add_option(parser, "initial_epochs", "of SharpBalance", cli.NATURAL, "N", nargs="+", default=[None])
    cli.add_option(parser, "asam_rho", "rho of asam", cli.POSITIVE, "R", default=0.5)
    cli.add_option(parser, "images", "training images, drawn (default: all)", cli.number(int, 2), "N")
    cli.add_option(parser, "validation", "validation images, with --images", cli.COUNT, "N")
    cli.add_option(parser, "corrupted", "corrupt the first N test images (default: use what exists)", cli.COUNT, "N")
    cli.add_choice(parser, "checkpoint", "which one is measured", ("best", "last"), default="best")
    cli.add_flag(parser, "skip_measuring", "only train, and compare on validation")
    cli.add_flag(parser, "redraw", "only make tables and figures again, from the result files in --results")
    cli.add_flag(parser, "variance", "measure bias and variance, too")
    cli.add_option(parser, "measure_flags", "of measure_diversity*.py", str, "FLAGS", default="")
    cli.add_option(parser, "sharpness_flags", "of measure_sharpness.py", str, "FLAGS", default="")
    cli.add_option(parser, "figures", "of scripts/plot.py", str, "KIND", nargs="+", default=["tradeoff"])
    text = "commands side by side, of one thread; auto: one a core"
    cli.add_option(parser, "jobs", text, cli.job_count, "K", default=1)
    cli.add_option(parser, "nproc", "processes of a training", cli.COUNT, "K", default=1)
    cli.add_option(parser, "folder", "of a run, below --runs", str, "NAME", default="{method}_{seed}")
    for name in ("runs", "measurements", "results"):
        cli.add_option(parser, name, f"folder (default: {name}/<preset>)", str, "DIR")
    return parser


def main(args: argparse.Namespace) -> None:
    """Carry the experiment out, and compare what was measured."""
    experiment = Experiment(args)
    if args.redraw:
        if any(values and len(values) > 1 for values in experiment.grid.values()):
            experiment.chosen = read_json(args.results / "plan.json", "run the experiment first")["chosen"]
        experiment.compare()
        return
    experiment.prepare()
    plan = experiment.train()
    if args.results:
        rows = [[table_cell(name), *row.values()] for name, row in plan["runs"].items()]
        text = tabulate(rows, ["run", *next(iter(plan["runs"].values()))], "github", floatfmt=".4f")
        args.results.mkdir(parents=True, exist_ok=True)
        write_json(args.results / "plan.json", plan)
        write_atomically(args.results / "validation.md", (text + "\n").encode(errors="backslashreplace"))
    if not args.skip_measuring:
        experiment.measure()
        experiment.compare()


Words, Files = list[list[Any]], Callable[[], list[Path]]  # of commands; of a job that is done


@dataclass(frozen=True)
class Job:
    """A piece of work: its name, its cost (trainings of a deep ensemble), whether it is done, and how to do it."""

    name: str
    cost: float
    done: Callable[[], bool]
    work: Callable[[], None]


class Experiment:
    """The runs and measurements of an experiment.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.chosen, self.measured_on = args, {}, args.data_path
        self.flags: list[Any] = [*args.train, "--data", args.data, "--data_path", args.data_path]
        self.spent, self.started = 0.0, time.monotonic()
        self.grid = {"rho": args.rho, "k": args.flat_ratio, "T_d": args.initial_epochs}
        for name, values in self.grid.items():
            self.chosen[name] = values[len(values) // 2] if values else None
        self.average_from = self.chosen["T_d"]
        if "eoa" in args.methods and self.average_from is None:
            raise InputError("--initial_epochs: eoa averages from this epoch on; give one")

    def load(self, **how: Any) -> Data:
        """The data set, downloaded where main.py would do so."""
        return load_data(self.args.data, self.args.data_path, download="--download" in self.args.train, **how)

    def prepare(self) -> None:
        """Draw the images, and make the corrupted ones."""
        if self.args.images:
            self.flags += self.draw_images()
        if self.args.corrupted and not self.args.skip_measuring:
            self.corrupt()

    def draw_images(self) -> list[str]:
        """Draw validation and training images; the options that name them."""
        args, flags = self.args, []
        data = self.load()
        order = np.random.RandomState(0).permutation(len(data.train) + len(data.val))
        if args.validation + args.images > len(order):
            raise InputError(f"--images: expected at most {len(order) - args.validation}, got {args.images}")
        for name, start, count in (("val", 0, args.validation), ("train", args.validation, args.images)):
            args.runs.mkdir(parents=True, exist_ok=True)
            write_array(args.runs / f"{name}.npy", np.sort(order[start : start + count]))
            flags += [f"--{name}_idx_path", args.runs / f"{name}.npy"]
        return flags

    def corrupt(self) -> None:
        """Make the corrupted copies of the first test images, beside a link to the data."""
        args, folder = self.args, self.args.runs / f"corrupted_{self.args.corrupted}"
        folder.mkdir(parents=True, exist_ok=True)
        self.load()
        if args.data in PLACES and not (folder / PLACES[args.data][1]).exists():
            data = find(args.data, args.data_path).resolve()
            (folder / PLACES[args.data][1]).symlink_to(data, target_is_directory=True)
        flags = ["--data", args.data, "--data_path", args.data_path, "--to", folder, "--images", args.corrupted]
        command = ["scripts/make_corrupted.py", *flags, "--workers", args.jobs]
        name = f"{CORRUPTED[args.data]} of {args.corrupted} images"
        self.run_all([self.job(name, 0, folder, list, [command], [flags])])
        self.measured_on = folder

    def flags_of(self, method: str, values: dict[str, Any]) -> list[Any]:
        """The options of main.py for a method, by rho, k and T_d."""
        sam = ["--sam", "--rho", values["rho"]]
        sets = [*sam, "--flat_ratio", values["k"]]
        sets += ["--initial_epochs", values["T_d"]] if values["T_d"] is not None else []
        average = ["--average_from", self.average_from]
        return {
            "deep_ensemble": average if "eoa" in self.args.methods else [],
            "eoa": average,
            "sam": sam,
            "deep_ensemble_sam": sam,
            "asam": ["--sam", "--sam_adaptive", "--rho", self.args.asam_rho],
            "sharpbalance": sets,
            "sharpbalance_paper": [*sets, "--partition", "paper"],
            "random": [*sets, "--partition", "random", "--match_size"],
            "same": [*sets, "--partition", "same", "--match_size"],
        }[method]

    def run_name(self, method: str, values: dict[str, Any]) -> str:
        """The name of a run's folder without its seed; what has several values is part of it."""
        if method == "eoa" and "deep_ensemble" in self.args.methods:
            return "deep_ensemble"  # whose runs hold the averages
        several = [name for name in self.grid if self.grid[name] and len(self.grid[name]) > 1]
        parts = self.grid if method in SETS and several else ["rho"] if method == "sam" and "rho" in several else []
        return "_".join([method, *(f"{values[name]:g}" for name in parts)])

    def place(self, root: Path, name: str, seeds: str) -> Path:
        """The folder of a run or of its measurements."""
        return root / self.args.folder.format(method=name, seed=seeds.split()[0])

    def train(self) -> dict[str, Any]:
        """Train everything, and choose rho, k and T_d where there are several; the choices and how they came about."""
        args, tried = self.args, {}
        first = args.seeds[:1]
        for name, method, seeds in (("rho", "sam", args.seeds), ("k", SETS[0], first), ("T_d", SETS[0], first)):
            if not self.grid[name] or len(self.grid[name]) < 2 or method not in args.methods:
                continue
            points = {value: self.chosen | {name: value} for value in self.grid[name]}
            self.run_all(self.training(method, point, s) for point in points.values() for s in seeds)
            scores = {value: self.validation(method, point, seeds) for value, point in points.items()}
            tried[name] = {f"{value:g}": score for value, score in scores.items()}
            self.chosen[name] = max(scores, key=scores.__getitem__)
        self.run_all(self.training(method, self.chosen, seeds) for seeds in args.seeds for method in args.methods)
        if "deep_ensemble" in args.methods:
            tried["deep ensemble"] = self.validation("deep_ensemble", self.chosen, args.seeds)
        trained = sorted(folder.parent for folder in args.runs.glob("*/summary.json"))
        return {
            "command": shlex.join(["python", *sys.argv]),
            "claims": 2,  # those of report.py that were written down before: all
            "chosen": self.chosen,
            "validation": tried,
            "runs": {folder.name: _validation(folder) for folder in trained},
            "mislabelled": self.mislabelled(),
            "jobs": args.jobs,
            "environment": environment(torch.device("cpu")),
        }

    def validation(self, method: str, values: dict[str, Any], seeds: list[str]) -> float:
        """The ensemble accuracy on validation at the end of training, mean over ensembles."""
        folders = [self.place(self.args.runs, self.run_name(method, values), s) for s in seeds]
        return statistics.mean(_validation(folder)["ensemble accuracy"] for folder in folders)

    def training(self, method: str, values: dict[str, Any], seeds: str) -> Job:
        """A run of main.py."""
        folder = self.place(self.args.runs, self.run_name(method, values), seeds)
        if method == "deep_ensemble" and self.args.plain_members:
            first = list(map(int, seeds.split()))
            more = range(max(first) + 1, max(first) + 1 + self.args.plain_members)
            seeds = " ".join(map(str, [*first, *more][: self.args.plain_members]))
        flags = [*self.flags, *self.flags_of(method, values), "--seed", seeds]
        command = ["main.py", *flags, "--save_path", folder, *(["--jobs", 1] if self.args.jobs > 1 else [])]
        if self.args.nproc > 1:
            command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", self.args.nproc, *command]
        cost = 1.8 if method in SETS else 1.0 if method in ("deep_ensemble", "eoa") else 2.0
        return self.job(f"training {folder}", cost, folder, lambda: _weights(folder), [command], [flags])

    def measure(self) -> None:
        """Measure the chosen runs, and SAM's at every rho."""
        jobs, args, splits = [], self.args, "test,corrupted"
        if find_corrupted(args.data, self.measured_on) is None:
            splits = "test"
            print(f"no {CORRUPTED[args.data]} in {self.measured_on} or beside the data set: clean images only")
        for seeds in args.seeds:
            for name, method, values in self.measured():
                source = self.place(args.runs, self.run_name(method, values), seeds)
                jobs.append(self.measuring(method, source, self.place(args.measurements, name, seeds), splits))
        self.run_all(jobs)

    def measured(self) -> list[tuple[str, str, dict[str, Any]]]:
        """What is measured: its name, its method, and its rho, k and T_d. SAM at the chosen rho is the first SAM."""
        found = []
        for method in self.args.methods:
            rhos = [self.chosen["rho"]]
            if method == "sam":
                rhos += [rho for rho in self.args.rho if rho != rhos[0]]
            for rho in rhos:
                values = self.chosen | {"rho": rho}
                found.append((self.run_name(method, values) if method == "sam" else method, method, values))
        return found

    def measuring(self, method: str, source: Path, folder: Path, splits: str) -> Job:
        """The measurements of a run."""
        args = self.args
        common = ["--resume", source, "--save", folder, "--data_path", self.measured_on]
        common += ["--checkpoint", "averaged" if method == "eoa" else args.checkpoint]
        split = ["--split", splits, *shlex.split(args.measure_flags)]
        commands: list[list[Any]] = [["measure_diversity.py", *common, *split]]
        if args.variance:
            commands.append(["measure_diversity_variance.py", *common, *split])
        commands.append(["measure_sharpness.py", *common, *shlex.split(args.sharpness_flags)])
        written = [folder / f"{name}.json" for name in ("diversity", "sharpness", "variance")[: 2 + args.variance]]
        name = f"measuring {folder}"
        options = [*commands, [json.dumps(VERSIONS)]]  # other code measures again
        return self.job(name, 0.6, folder, lambda: [*_weights(source), *written], commands, options)

    def job(self, name: str, cost: float, folder: Path, files: Files, commands: Words, options: Words) -> Job:
        """A job that is done where its marker says that commands with these options left files of this content."""
        marker, asked = folder / "finished.json", [list(map(str, words)) for words in options]

        def state() -> dict:
            digests = {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files()}
            return {"commands": asked, "files": digests}

        def done() -> bool:
            try:
                return load_json(marker) == state()
            except (OSError, ValueError):
                return False

        def work() -> None:
            marker.unlink(missing_ok=True)
            for command in commands:
                # A training may be watched where it is alone; of the measurements the files are what counts.
                watched = self.args.jobs == 1 and "main.py" in command
                # Not beside the measurements: whoever compares those names all that lies there.
                log = self.args.runs / "logs" / f"{name.split()[0]}_{folder.name}.log"
                call(command, None if watched else log, self.args.jobs)
            write_json(marker, state())

        return Job(name, cost, done, work)

    def run_all(self, jobs: Iterable[Job]) -> None:
        """Do what is not done yet, several jobs side by side, and say how far it is."""
        waiting = list({job.name: job for job in jobs if not job.done()}.values())
        left, running = sum(job.cost for job in waiting), {}

        def finished(job: Job) -> None:
            nonlocal left
            left, self.spent = left - job.cost, self.spent + job.cost
            minutes = (time.monotonic() - self.started) / max(self.spent, 0.1) * left / 60
            text = f", about {minutes:.0f} min for the rest of these" if left > 0.1 else ""
            print(f"{time.strftime('%H:%M')}  {job.name}: done{text}", flush=True)

        if self.args.jobs == 1:  # in this thread, which may fork
            for job in waiting:
                job.work()
                finished(job)
            return
        with ThreadPoolExecutor(self.args.jobs) as pool:
            while waiting or running:
                while waiting and len(running) < self.args.jobs:
                    job = waiting.pop(0)
                    running[pool.submit(job.work)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()  # an error ends it here: no further job begins
                    finished(running.pop(future))

    def mislabelled(self) -> dict[str, float]:
        """Which share of a member's SAM set has wrong labels, and the size of the set; all: of the training images."""
        args, shares = self.args, {}
        methods = [method for method in args.methods if method in SETS]
        folders = {m: [self.place(args.runs, self.run_name(m, self.chosen), s) for s in args.seeds] for m in methods}
        settings = read_settings(next(iter(folders.values()))[0]) if folders else {"label_noise": 0}
        if not settings["label_noise"]:
            return {}
        index = {name: settings[name] for name in ("train_idx_path", "val_idx_path")}
        wrong = self.load(label_noise=settings["label_noise"], **index).mislabelled
        shares["all"] = float(wrong.mean())
        for method, places in folders.items():
            masks = [np.load(file) for place in places for file in sorted(place.glob("seed_*/sam_mask.npy"))]
            shares[method] = statistics.mean(float(wrong[mask].mean()) for mask in masks)
            shares[f"{method}_size"] = statistics.mean(float(mask.mean()) for mask in masks)
        return shares

    def compare(self) -> None:
        """Tables and figures of what is measured, also by earlier calls with other seeds or methods."""
        args, names = self.args, [name for name, _, _ in self.measured()]
        root = args.results / "measurements" if args.redraw else args.measurements
        folders = [self.place(root, name, seeds) for name in names for seeds in args.seeds]
        found = sorted(file.parent for file in root.glob("*/diversity.json"))
        folders += [folder for folder in found if folder not in folders]
        if args.results and not args.redraw:
            copies = [args.results / "measurements" / folder.name for folder in folders]
            for folder, copy in zip(folders, copies, strict=True):
                copy_results(folder, copy)
            folders = copies
        form = ["--format", "markdown", "--to", args.results / "tables.md"] if args.results else []
        call(["scripts/summarize.py", *folders, *form])
        measured = load_json(folders[0] / "diversity.json")["result"]
        parts = {"severity": "corrupted" in measured, "ood": "ood" in measured["test"]}
        # Of more than four curves, none could be told from the others.
        four = [name for name, method, values in self.measured() if method in FOUR and values == self.chosen]
        few = [self.place(folders[0].parent, name, seeds) for name in four for seeds in args.seeds]
        for kind in args.figures:
            if parts.get(kind, True):
                shown = few if kind not in ("tradeoff", "benchmark") and few else folders
                call(["scripts/plot.py", kind, "--from", *shown, "--to", (args.results or args.runs) / kind])


def call(words: list[Any], log: Path | None = None, jobs: int = 1) -> None:
    """Run a command of this repository; its output goes to a log file, or to the terminal.

    Raises:
        InputError: if it ended with status 2.
        RunError: if it ended with another status than 0.
    """
    script = next(str(word) for word in words if str(word).endswith(".py"))
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
    # As one would type it, since the name goes into result files.
    command = [sys.executable, *(os.path.relpath(ROOT / word) if word == script else str(word) for word in words)]
    if jobs == 1 and words[0] == script and processes.may_fork():
        status = processes.call(command[1:], log)  # without importing everything anew
    else:
        variables = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})
        with log.open("ab") if log else nullcontext() as file:
            status = subprocess.run(command, env=variables, stdout=file, stderr=file).returncode
    if status:
        kind = InputError if status == 2 else RunError
        raise kind(f"{script} ended with status {status}" + f"; see {log}" * bool(log))


def _weights(folder: Path) -> list[Path]:
    """The checkpoints of a run."""
    return sorted(folder.glob("seed_*/*.pth.tar"))


def _validation(folder: Path) -> dict[str, float]:
    """How a run did on validation at its end, and on its augmented training images in the last epoch."""
    last = load_json(folder / "summary.json")["last"]
    logs = [json.loads(file.read_text().splitlines()[-1]) for file in sorted(folder.glob("seed_*/log.jsonl"))]
    accuracies = [member["val_acc"] for member in last["members"]]
    return {
        "training accuracy": statistics.mean(line["train_acc"] for line in logs),
        "member accuracy": statistics.mean(accuracies),
        "standard deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "ensemble accuracy": last["ensemble"]["val_acc"],
        "ensemble NLL": last["ensemble"]["val_loss"],
        "disagreement": last["ensemble"].get("val_disagreement", 0.0),
    }


if __name__ == "__main__":
    cli.run(main, parse_args(), forks=True)
