"""Train methods x seeds, measure them, and compare them in tables and figures. What is finished is skipped.

    python scripts/experiment.py digits
    python scripts/experiment.py cifar100 --rho 0.1 --jobs 2 --epochs 100 --initial_epochs 50

The first word names one of `PRESETS`, the options that an experiment begins with. Options that follow replace them, and
options that this script does not have go to main.py. Where --rho, --flat_ratio or --initial_epochs has several values,
one is chosen on validation: rho by the ensemble accuracy of SAM over all seeds, then k and T_d by that of SharpBalance
(released) on the first seeds, or all of them over the first --choose_on ensembles; --choices takes those of another
experiment. `ENVIRONMENT` lists the options that a variable of the same name sets as well.

Runs go to --runs, measurements to --measurements. --results gets plan.json and validation.md (choices and validation
accuracies), tables.md, figures, and copies of the result files that are small enough for git, each as soon as it is
measured; with --results none the table is printed. Re-run the same command to resume an interrupted experiment. What
--results holds, of the same data, settings and versions of the code, is not made again, so that another machine goes on
from there without the checkpoints.
"""

import argparse
import functools
import hashlib
import json
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("GOMP_SPINCOUNT", "4000")  # before torch is loaded, whose threads otherwise wait at full speed

import numpy as np
from tabulate import tabulate

from utils import InputError, cli, table_cell
from utils.data import Data
from utils.datasets import NAMES, corrupted_name, find_corrupted, load_data
from utils.distributed import cores
from utils.files import load_json, read_bytes, read_json, write_array, write_atomically, write_json
from utils.kept import VERSIONS, up_to_date
from utils.places import PLACES, find
from utils.presets import CHOICES, FOUR, LATE, METHODS, NEXT, PASSES, PRESETS
from utils.processes import run_script
from utils.results import copy_results, validation_of

# --initial_method is that of plain_start and of LATE.
SET_BY_METHOD = ("--initial_method", "--sam", "--sam_adaptive", "--partition")
SET_BY_METHOD += ("--match_size", "--average_from", "--seed", "--save_path", "--train_idx_path", "--val_idx_path")
ENVIRONMENT = ("data", "data_path", "methods", "seeds", "rho", "flat_ratio", "initial_epochs", "asam_rho", "checkpoint")
ENVIRONMENT += ("nproc", "measure_flags", "sharpness_flags", "runs", "measurements", "results")
LISTS = ("methods", "rho", "flat_ratio", "initial_epochs")  # of these, whose variables may hold several
PARTS = ("asked", "runs", "sets")  # of plan.json, by the name of a run: what was asked for, validation, and SAM sets


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `train` holds what goes to main.py."""
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    preset = PRESETS.get(words[0] if words else "", "")
    given = shlex.split(preset)
    for name in ENVIRONMENT:
        if text := os.environ.get(name.upper()):
            given += [f"--{name}", *text.split()] if name in LISTS else [f"--{name}={text}"]
    args, args.train = parser.parse_known_args([*words[:1], *given, *words[1:]])
    own = next((word for word in args.train if word.split("=")[0] in SET_BY_METHOD), None)
    if own:
        way_out = "set by --methods, --seeds and --images; choose among these, or call main.py"
        parser.error(f"{own.split('=')[0]}: {way_out}")
    for name in ("runs", "measurements", "results"):
        place = (getattr(args, name) or f"{name}/{args.preset}").replace("{data}", args.data)
        try:
            setattr(args, name, None if place == "none" else cli.path(place))
        except argparse.ArgumentTypeError as error:
            parser.error(f"--{name}: {error}")
    args.seeds = [seeds.strip() for seeds in args.seeds.split(",")][: args.ensembles]
    if wrong := next((seeds for seeds in args.seeds if not re.fullmatch(r"\d+( +\d+)*", seeds)), None):
        parser.error(f"--seeds: expected whole numbers, ensembles separated by commas, got '{wrong}'")
    texts = {"folder": _filled, "measure_flags": shlex.split, "sharpness_flags": shlex.split}
    for flag, read in texts.items():
        try:
            read(getattr(args, flag))
        except (AttributeError, LookupError, ValueError) as error:
            parser.error(f"--{flag}: '{getattr(args, flag)}' cannot be read ({error}); see --help")
    args.jobs = cores() if args.jobs == "auto" else args.jobs
    if args.images and not args.validation:
        parser.error("--images: given without --validation; say how many images to validate on")
    if args.corrupted and args.data == "folder":
        parser.error("--corrupted: not for --data folder; make the copies by scripts/make_corrupted.py, they are found")
    return args


def build_parser() -> cli.Parser:
    """All options."""
    parser = cli.Parser(__doc__)
    parser.add_argument("preset", choices=PRESETS, help="the experiment")
    parser.add_argument("--data", "--dataset", choices=NAMES, default="cifar100", help="data set")
    cli.add_option(parser, "data_path", "folder of the data sets", cli.path, "DIR", default=Path("data"))
    parser.add_argument("--methods", action=cli.Choices, among=METHODS, help="what is compared")
    cli.add_option(parser, "seeds", "of the members of each ensemble; ensembles separated by commas", str, "LIST")
    cli.add_option(parser, "ensembles", "the first N of these (default: all)", cli.COUNT, "N")
    text = "members of each deep ensemble, of seeds that follow on the last (default: as many as the others have)"
    cli.add_option(parser, "plain_members", text, cli.COUNT, "N")
    cli.add_option(parser, "rho", "radius of SAM's perturbation", cli.POSITIVE, "R", nargs="+")
    cli.add_option(parser, "flat_ratio", "share of the samples that each member picks", cli.SHARE, "K", nargs="+")
    text = "T_d of SharpBalance (default: as main.py)"
    cli.add_option(parser, "initial_epochs", text, cli.NATURAL, "N", nargs="+", default=[None])
    cli.add_option(parser, "asam_rho", "rho of asam", cli.POSITIVE, "R", default=0.5)
    text = "ensembles that rho, k and T_d are chosen on; SAM is then measured at the rho that the methods have"
    cli.add_option(parser, "choose_on", text, cli.COUNT, "N")
    cli.add_option(parser, "choices", "folder of results whose rho, k and T_d are taken", cli.path, "DIR")
    cli.add_option(parser, "plan", "written before the results, which record its digest", cli.path, "FILE")
    text = "values that copies in --results keep by image besides what is right, as ensemble_nll (default: all)"
    cli.add_option(parser, "by_image", text, str, "NAME", nargs="+")
    text = "which claims scripts/report.py decides: on the paper, or on where SharpBalance helps"
    cli.add_choice(parser, "claims", text, ("paper", "study"), default="paper")
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
    text = "of a run, below --runs, of {method} and {seed}"
    cli.add_option(parser, "folder", text, str, "NAME", default="{method}_{seed}")
    for name in ("runs", "measurements", "results"):
        cli.add_option(parser, name, f"folder (default: {name}/<preset>)", str, "DIR")
    return parser


def main(args: argparse.Namespace) -> None:
    """Carry the experiment out, and compare what was measured."""
    experiment = Experiment(args)
    if args.redraw:
        if any(values and len(values) > 1 for values in experiment.grid.values()):
            experiment.read_choices(args.results, "--results")
        experiment.compare()
        return
    experiment.prepare()
    experiment.choose()
    experiment.make()
    if not args.skip_measuring:
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
        parser = cli.Parser(__doc__)  # what matters here of the options of main.py
        for name, kind in (("epochs", cli.COUNT), ("image_size", cli.COUNT), ("label_noise", cli.SHARE)):
            cli.add_option(parser, name, "", kind, "N")
        cli.add_flag(parser, "download", "")
        self.passed, self.recipe = parser.parse_known_args(args.train)
        self.places: list[Any] = [*args.train, "--data", args.data, "--data_path", args.data_path]
        self.split: dict[str, Path] = {}
        self.spent, self.started = 0.0, time.monotonic()
        self.grid = {"rho": args.rho, "k": args.flat_ratio, "T_d": args.initial_epochs}
        for name, values in self.grid.items():
            self.chosen[name] = values[len(values) // 2] if values else None
        self.average_from = self.chosen["T_d"]
        if "eoa" in args.methods and self.average_from is None:
            raise InputError("--initial_epochs: eoa averages from this epoch on; give one")
        above = next((method for method in args.methods if method in NEXT), None)
        if above and len(args.rho or []) < 2:
            raise InputError(f"--rho: {above} has the next of several values; give more than one")
        late = next((method for method in args.methods if method in LATE), None)
        if late and not self.passed.epochs:
            raise InputError(f"--epochs: {late} begins after 7/8 of them; say how many")
        self.steps = []
        for name, (flag, by, methods) in CHOICES.items():
            if len(self.grid[name] or []) > 1 and by in args.methods:
                self.steps.append((name, by))
            elif len(self.grid[name] or []) > 1 and not args.choices and set(args.methods) & set(methods):
                raise InputError(f"{flag}: {by} chooses among several values; add it to --methods, or give one")
        for flag, method in (("--seeds", "sam"), ("--plain_members", "deep_ensemble")):
            seeds = [seed for each in args.seeds for seed in self.seeds_of(method, each)]
            if twice := next((seed for seed in seeds if seeds.count(seed) > 1), None):
                raise InputError(f"{flag}: seed {twice} is in two ensembles, which would share a network; give others")
        self.plan, self.tried, self.all_chosen, self.splits = {}, {}, False, ""
        if args.plan:
            self.plan = {"file": args.plan.name, "sha256": hashlib.sha256(read_bytes(args.plan)).hexdigest()}
        # By the name of a run: what the command asks for; and what --results holds, of earlier calls too.
        self.asked: dict[str, str] = {}
        self.made: set[str] = set()  # the names of those that lie in --runs
        self.before: dict[str, Any] = {"asked": {}, "runs": {}, "sets": {}}
        if args.results and (args.results / "plan.json").exists():
            found = read_json(args.results / "plan.json", "remove it, and run the experiment again")
            self.before |= found if all(isinstance(found.get(part), dict) for part in PARTS) else {}

    def load(self, **how: Any) -> Data:
        """The data set, downloaded where main.py would do so."""
        args, passed = self.args, self.passed
        return load_data(args.data, args.data_path, download=passed.download, image_size=passed.image_size, **how)

    @functools.cached_property
    def data(self) -> Data:
        """The data set as the members see it."""
        return self.load(label_noise=self.passed.label_noise or 0, **self.split)

    def prepare(self) -> None:
        """Draw the images, and make the corrupted ones."""
        if self.args.images:
            self.draw_images()
        if self.args.corrupted and not self.args.skip_measuring:
            self.corrupt()

    def draw_images(self) -> None:
        """Draw validation and training images, and add the options that name them.

        Of a folder, whose parts may be the user's, all are taken where it has no more, or parts that stand.
        """
        args = self.args
        data = self.load()
        order = np.random.RandomState(0).permutation(len(data.train) + len(data.val))
        stand = not (args.data_path / "train").is_dir() or (args.data_path / "val").is_dir()
        if args.data == "folder" and (stand or args.validation + args.images > len(order)):
            print(f"all {len(data.train)} training images of {args.data_path}: --images {args.images} cannot be drawn")
            return
        if args.validation + args.images > len(order):
            raise InputError(f"--images: expected at most {len(order) - args.validation}, got {args.images}")
        for name, start, count in (("val", 0, args.validation), ("train", args.validation, args.images)):
            args.runs.mkdir(parents=True, exist_ok=True)
            self.split[f"{name}_idx_path"] = args.runs / f"{name}.npy"
            write_array(args.runs / f"{name}.npy", np.sort(order[start : start + count]))
            self.places += [f"--{name}_idx_path", args.runs / f"{name}.npy"]

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
        name = f"{corrupted_name(args.data, self.passed.image_size)} of {args.corrupted} images"
        self.run_all([self.job(name, 0, folder, list, [command], [flags])])
        self.measured_on = folder

    def flags_of(self, method: str, values: dict[str, Any]) -> list[Any]:
        """The options of main.py for a method, by rho, k and T_d."""
        sam = ["--sam", "--rho", values["rho"]]
        picked = [*sam, "--flat_ratio", values["k"]]
        sets = picked + (["--initial_epochs", values["T_d"]] if values["T_d"] is not None else [])
        late = ["--initial_method", "sgd", "--initial_epochs", 7 * (self.passed.epochs or 0) // 8]
        average = ["--average_from", self.average_from]
        return {
            "deep_ensemble": average if "eoa" in self.args.methods else [],
            "eoa": average,
            "sam": sam,
            "deep_ensemble_sam": sam,
            "late_sam": [*sam, *late],
            "late_sharpbalance": [*picked, *late],
            "asam": ["--sam", "--sam_adaptive", "--rho", self.args.asam_rho],
            "sharpbalance": sets,
            "sharpbalance_paper": [*sets, "--partition", "paper"],
            "plain_start": [*sets, "--initial_method", "sgd"],
            "random": [*sets, "--partition", "random", "--match_size"],
            "random_paper": [*sets, "--partition", "random", "--match_size", "paper"],
            "same": [*sets, "--partition", "same", "--match_size"],
        }[method.removesuffix("_next")]

    def seeds_of(self, method: str, seeds: str) -> list[int]:
        """The seeds of an ensemble's members; of plain ones there may be more, or fewer."""
        first, count = list(map(int, seeds.split())), self.args.plain_members
        if method != "deep_ensemble" or not count:
            return first
        return [*first, *range(max(first) + 1, max(first) + 1 + count)][:count]

    def run_name(self, method: str, values: dict[str, Any]) -> str:
        """The name of a run's folder without its seed; what has several values is part of it."""
        method, plain = method.removesuffix("_next"), self.args.plain_members
        if method == "deep_ensemble" or (method == "eoa" and "deep_ensemble" in self.args.methods):
            return f"deep_ensemble_of_{plain}" if plain else "deep_ensemble"  # whose runs hold the averages
        parts = [name for name, (_, _, methods) in CHOICES.items() if method in methods]
        if not any(len(self.grid[name] or []) > 1 for name in parts):
            return method
        return "_".join([method, *(f"{values[name]:g}" for name in parts if values[name] is not None)])

    def place(self, root: Path, name: str, seeds: str) -> Path:
        """The folder of a run or of its measurements."""
        return root / _filled(self.args.folder, name, seeds.split()[0])

    def choose(self) -> None:
        """Take rho, k and T_d of another experiment, or choose each of which there are several on validation."""
        args = self.args
        if args.choices:
            self.read_choices(args.choices, "--choices")
            return
        rho_on, sets_on = (args.seeds, args.seeds[:1]) if args.choose_on is None else [args.seeds[: args.choose_on]] * 2
        steps = [(name, method, rho_on if name == "rho" else sets_on) for name, method in self.steps]
        for i, (name, method, seeds) in enumerate(steps):
            later = [job for step in steps[i + 1 :] for job in self.tries(*step)] + self.cells()
            self.run_all(self.tries(name, method, seeds), sum(job.cost for job in later if not job.done()))
            points = {value: self.chosen | {name: value} for value in self.grid[name]}
            scores = {value: self.validation(method, point, seeds) for value, point in points.items()}
            self.tried[name] = {f"{value:g}": score for value, score in scores.items()}
            self.chosen[name] = max(scores, key=scores.__getitem__)

    def read_choices(self, results: Path, flag: str) -> None:
        """Take rho, k and T_d of an experiment that has chosen."""
        try:
            found = read_json(results / "plan.json", "run the experiment first")["chosen"]
            self.chosen = {name: found[name] for name in self.chosen}
        except (KeyError, TypeError) as error:
            raise InputError(f"{flag} {results}: its plan.json has no choices yet; run the experiment first") from error

    def tries(self, name: str, method: str, seeds: list[str]) -> list[Job]:
        """The trainings that choose a value; they are done where their validation is known."""
        points = [self.chosen | {name: value} for value in self.grid[name]]
        runs = [
            (self.training(method, point, s), self.run_of(method, point, s).name) for point in points for s in seeds
        ]
        return [replace(job, done=functools.partial(self.is_known, job, run)) for job, run in runs]

    def is_known(self, job: Job, run: str) -> bool:
        """Whether a run lies in --runs, or its validation in --results."""
        return job.done() or (run in self.asked and self.before["asked"].get(run) == self.asked[run])

    def run_of(self, method: str, values: dict[str, Any], seeds: str) -> Path:
        """The folder of a run."""
        return self.place(self.args.runs, self.run_name(method, values), seeds)

    def make(self) -> None:
        """Train and measure all that is compared."""
        self.all_chosen = True
        self.write_plan()
        cells, without = self.cells(), set(NEXT) & set(self.args.methods)
        if without and self.chosen["rho"] == max(self.args.rho):
            print(f"rho {self.chosen['rho']:g} is the largest: without {', '.join(sorted(without))}")
        if (known := sum(job.done() for job in cells)) and not any(self.args.runs.glob("*/summary.json")):
            print(
                f"{known} of {len(cells)} are in {self.args.results} and not made again; --results DIR makes all, there"
            )
        self.run_all(cells)
        if "deep_ensemble" in self.args.methods:
            self.tried["deep ensemble"] = self.validation("deep_ensemble", self.chosen, self.args.seeds)
        self.write_plan(finished=True)

    def validation(self, method: str, values: dict[str, Any], seeds: list[str]) -> float:
        """The ensemble accuracy on validation at the end of training, mean over ensembles."""
        runs = [self.run_of(method, values, s) for s in seeds]
        known = self.before["runs"]
        rows = [validation_of(run) if run.name in self.made else known[run.name] for run in runs]
        return statistics.mean(row["ensemble accuracy"] for row in rows)

    def training(self, method: str, values: dict[str, Any], seeds: str) -> Job:
        """A run of main.py."""
        folder = self.run_of(method, values, seeds)
        own = [*self.flags_of(method, values), "--seed", " ".join(map(str, self.seeds_of(method, seeds)))]
        flags = [*self.places, *own]
        if self.args.results:
            passed = {name: value for name, value in vars(self.passed).items() if name != "download"}
            self.asked[folder.name] = _digest(self.data.record["sha256_of_arrays_and_split"], passed, self.recipe, own)
        command = ["main.py", *flags, "--save_path", folder, *(["--jobs", 1] if self.args.jobs > 1 else [])]
        if self.args.nproc > 1:
            command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", self.args.nproc, *command]
        job = self.job(f"training {folder}", PASSES[method], folder, lambda: _weights(folder), [command], [flags])

        def done() -> bool:
            is_done = job.done()
            self.made |= {folder.name} if is_done else set()
            return is_done

        def work() -> None:
            job.work()
            self.made.add(folder.name)

        return replace(job, done=done, work=work)

    def cells(self) -> list[Job]:
        """The jobs of all that is compared: each trains a run, if need be, and measures it."""
        args, size = self.args, self.passed.image_size
        if not args.skip_measuring and not self.splits:
            self.splits = "test,corrupted"
            if find_corrupted(args.data, self.measured_on, image_size=size) is None:
                self.splits, where = "test", f"{self.measured_on} or beside the data set"
                print(f"measuring clean images; with {corrupted_name(args.data, size)} in {where}, corrupted ones, too")
        by_run: dict[Path, tuple[Job, list[Job]]] = {}
        for seeds in args.seeds:
            for name, method, values in self.measured():
                run = self.run_of(method, values, seeds)
                _, measurings = by_run.setdefault(run, (self.training(method, values, seeds), []))
                if not args.skip_measuring:
                    folder = self.place(args.measurements, name, seeds)
                    job = self.measuring(method, run, folder, self.splits)
                    measurings.append(self.copied(job, method, run, folder) if args.results else job)
        return [self.cell(run, *jobs) for run, jobs in by_run.items()]

    def cell(self, run: Path, training: Job, measurings: list[Job]) -> Job:
        """A training with its measurements, which need its checkpoints."""

        def done() -> bool:
            return self.is_known(training, run.name) and all(job.done() for job in measurings)

        def work() -> None:
            left = [job for job in measurings if not job.done()]
            if not training.done() and (left or not self.is_known(training, run.name)):
                training.work()
            for job in left:
                job.work()

        names = ", ".join(job.name for job in measurings) or training.name
        return Job(names, training.cost + sum(job.cost for job in measurings), done, work)

    def copied(self, job: Job, method: str, run: Path, folder: Path) -> Job:
        """A measuring job that copies what it measured to --results, and is done where these hold it."""
        args, copy = self.args, self.args.results / "measurements" / folder.name
        how = ["averaged" if method == "eoa" else args.checkpoint, self.splits, args.corrupted]
        asked = _digest(self.asked[run.name], how, args.measure_flags, args.sharpness_flags)
        about = {"name": args.preset, "asked": asked, "by_image": args.by_image, "plan": self.plan}

        def done() -> bool:
            try:
                found = [load_json(copy / f"{name}.json") for name in ("diversity", "sharpness")]
                same = {one["experiment"]["asked"] for one in found} == {asked} and up_to_date(found)
            except (KeyError, OSError, TypeError, ValueError):
                return False
            anew = any(one["experiment"].get("by_image", args.by_image) != args.by_image for one in found)
            if same and anew and job.done():  # copied anew, but measured under the plan that the copy names
                about["plan"] = found[0]["experiment"].get("plan", {})
                return False
            return same and (not args.variance or job.done())

        def work() -> None:
            if not job.done():
                job.work()
            copy_results(folder, copy, about, args.by_image)

        return replace(job, done=done, work=work)

    def measured(self) -> list[tuple[str, str, dict[str, Any]]]:
        """What is measured: its name, its method, and its rho, k and T_d. SAM at the chosen rho is the first SAM."""
        found, args, rho = [], self.args, self.chosen["rho"]
        above = min((value for value in args.rho or [] if value > rho), default=None)
        for method in args.methods:
            rhos = [above] if method in NEXT else [rho]
            if method == "sam" and args.choose_on is None:
                rhos += [other for other in args.rho if other != rho]
            elif method == "sam" and set(NEXT) & set(args.methods):
                rhos += [above]
            for one in rhos:
                if one is not None or rho is None:
                    values = self.chosen | {"rho": one}
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
                run_script(command, None if watched else log, self.args.jobs)
            write_json(marker, state())

        return Job(name, cost, done, work)

    def run_all(self, jobs: Iterable[Job], later: float = 0) -> None:
        """Do what is not done, several jobs side by side, and say how far it is; `later`: the cost of what follows."""
        waiting = list({job.name: job for job in jobs if not job.done()}.values())
        left, running = sum(job.cost for job in waiting), {}

        def finished(job: Job) -> None:
            nonlocal left
            left, self.spent = left - job.cost, self.spent + job.cost
            minutes = (time.monotonic() - self.started) / max(self.spent, 0.1) * (left + later) / 60
            text = f", about {max(minutes, 1):.0f} min to go" if left + later > 0.1 else ""
            print(f"{time.strftime('%H:%M')}  {job.name}: done{text}", flush=True)
            self.write_plan()

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

    def write_plan(self, finished: bool = False) -> None:
        """Write plan.json into --results: what is asked for, what was chosen, and what is known of the runs so far."""
        args, before = self.args, self.before
        if not args.results or not self.asked:  # so far, corrupted copies
            return
        for name in sorted(self.made):
            folder = args.runs / name
            before["runs"][name], before["asked"][name] = validation_of(folder), self.asked[name]
            if masks := [np.load(file) for file in sorted(folder.glob("seed_*/sam_mask.npy"))]:
                wrong = self.data.mislabelled
                shares = [(mask.mean(), wrong[mask].mean() if mask.any() else 0.0) for mask in masks]
                before["sets"][name] = dict(zip(("size", "mislabelled"), np.mean(shares, 0).tolist(), strict=True))
        # Of earlier calls, which asked for others; but not what this call asks for otherwise.
        asked = {name: one for name, one in before["asked"].items() if self.asked.get(name, one) == one}
        plan = {
            "command": shlex.join(["python", *sys.argv]),
            "claims": args.claims,
            "plan": self.plan,
            "finished": finished,
            "choose_on": args.choose_on,
            "choices_of": args.choices and args.choices.name,
            "validation": self.tried,
            **{part: {name: before[part][name] for name in sorted(asked.keys() & before[part])} for part in PARTS},
            "jobs": args.jobs,
        }
        if not self.spent:  # who only draws is not who made it
            plan |= {name: before[name] for name in ("command", "plan", "jobs") if name in before}
        if self.all_chosen:
            measured = [name for name, _, _ in self.measured()]
            plan |= {"chosen": self.chosen, "measured": measured, "mislabelled": self.mislabelled(plan["sets"])}
        args.results.mkdir(parents=True, exist_ok=True)
        write_json(args.results / "plan.json", plan)
        if finished:
            rows = [[table_cell(name), *row.values()] for name, row in plan["runs"].items()]
            text = tabulate(rows, ["run", *next(iter(plan["runs"].values()))], "github", floatfmt=".4f")
            write_atomically(args.results / "validation.md", (text + "\n").encode(errors="backslashreplace"))

    def mislabelled(self, sets: dict[str, dict[str, float]]) -> dict[str, float]:
        """The mean size of each method's SAM sets, and where labels are wrong their share in them; all: in training."""
        shares = {"all": float(self.data.mislabelled.mean())} if self.passed.label_noise else {}
        for method in [method for method in self.args.methods if method in CHOICES["k"][2] and method not in NEXT]:
            runs = [self.run_of(method, self.chosen, seeds).name for seeds in self.args.seeds]
            if found := [sets[run] for run in runs if run in sets]:
                shares |= {method: statistics.mean(one["mislabelled"] for one in found)} if "all" in shares else {}
                shares[f"{method}_size"] = statistics.mean(one["size"] for one in found)
        return shares

    def compare(self) -> None:
        """Tables and figures of what is measured, also by earlier calls with other seeds or methods."""
        args, names = self.args, [name for name, _, _ in self.measured()]
        root = args.results / "measurements" if args.results else args.measurements
        folders = [self.place(root, name, seeds) for name in names for seeds in args.seeds]
        found = sorted(file.parent for file in root.glob("*/diversity.json"))
        folders += [folder for folder in found if folder not in folders]
        form = ["--format", "markdown", "--to", args.results / "tables.md"] if args.results else []
        run_script(["scripts/summarize.py", *folders, *form])
        measured = load_json(folders[0] / "diversity.json")["result"]
        parts = {"severity": "corrupted" in measured, "ood": "ood" in measured["test"]}
        # Of more than four curves, none could be told from the others.
        four = [name for name, method, values in self.measured() if method in FOUR and values == self.chosen]
        few = [self.place(folders[0].parent, name, seeds) for name in four for seeds in args.seeds]
        for kind in args.figures:
            if parts.get(kind, True):
                shown = few if kind not in ("tradeoff", "benchmark") and few else folders
                run_script(["scripts/plot.py", kind, "--from", *shown, "--to", (args.results or args.runs) / kind])


def _filled(folder: str, method: str = "", seed: str = "") -> str:
    """The value of --folder for a run."""
    return folder.format(method=method, seed=seed)


def _digest(*asked: Any) -> str:
    """The SHA-256 of words and numbers."""
    return hashlib.sha256(json.dumps(asked, default=str, sort_keys=True).encode()).hexdigest()


def _weights(folder: Path) -> list[Path]:
    """The checkpoints of a run."""
    return sorted(folder.glob("seed_*/*.pth.tar"))


if __name__ == "__main__":
    cli.run(main, parse_args(), forks=True)
