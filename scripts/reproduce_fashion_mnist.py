"""Test the paper's claims on Fashion-MNIST, with as many images and ensembles as the time allows.

    bash scripts/reproduce_fashion_mnist.sh --minutes 600

Chooses the largest of `PLANS` that fits into --minutes, by the speed that it measures first, and says what it will do.
Then, in each setting (a fifth of the training labels wrong; clean labels), trains a deep ensemble and SAM ensembles
over `RHOS`; takes rho by SAM's ensemble accuracy on validation, then k of `KS` and T_d of `SPLITS` by that of
SharpBalance (released) on the first seeds; trains SharpBalance by both readings and SAM on random sets of its size;
measures all on test images, clean and corrupted; compares the ensembles of the same seeds; and gives a verdict on each
of `CLAIMS`.

Runs go to runs/fashion_mnist, measurements to measurements/fashion_mnist, and what a reader needs, without weights, to
results/fashion_mnist, in the place of the setting's former results. The same command goes on where it was. --redraw
makes tables, figures and verdicts anew from the result files alone.
"""

import argparse
import io
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from models import create_model
from sam import SAM
from scripts import plot, summarize
from utils import InputError, RunError
from utils.checkpoint import load_json, write_array, write_atomically, write_json
from utils.cli import Parser, add_flag, cores, number, path, run, start_device
from utils.data import load_data
from utils.ensemble import environment
from utils.metrics import crossed_interval, t_interval
from utils.results import Ensemble, keep, read_ensemble
from utils.training import sharpbalance_step

ROOT = Path(__file__).resolve().parent.parent
SEEDS = tuple(f"{ten}1 {ten}2 {ten}3" for ten in range(1, 11))
# The grid: the middle of KS and of SPLITS, T_d as a share of the epochs, are the values of the paper for CIFAR-100.
RHOS = (0.05, 0.1, 0.2)
KS = (0.3, 0.5, 0.7)
SPLITS = (0.25, 0.5, 0.75)
VALIDATION, TEST, CLASSES = 500, 10_000, 10
BATCH = 64
# One forward pass costs a third of a forward and a backward pass, in which the costs are counted.
FORWARD = 1 / 3
GRID = {"rho": [*RHOS], "k": [*KS], "T_d": [*SPLITS]}
SHARPNESS_BATCHES = 40
SHARPNESS_PASSES = 20 * SHARPNESS_BATCHES * 5  # iterations, batches, images
RESULT_FILES = {"diversity.json", "sharpness.json"}
STARTUP = 7.0  # seconds of a command besides


@dataclass(frozen=True)
class Setting:
    """Training labels and a network, and how much is done with them."""

    name: str
    width: int
    label_noise: float  # share of the training labels that are wrong
    samples: int  # training images
    epochs: int
    corrupted: int  # test images of which the corrupted copies are made
    ensembles: int  # of 3 members, by each method


NAMES = ("noisy_labels", "clean_labels")


def noisy(samples: int, epochs: int, corrupted: int, ensembles: int) -> Setting:
    """A fifth of the labels are wrong."""
    return Setting(NAMES[0], 8, 0.2, samples, epochs, corrupted, ensembles)


def clean(samples: int, epochs: int, corrupted: int, ensembles: int) -> Setting:
    """The labels as they are."""
    return Setting(NAMES[1], 16, 0.0, samples, epochs, corrupted, ensembles)


# Largest first.
PLANS = (
    (noisy(6000, 40, 2000, 10), clean(6000, 40, 2000, 5)),
    (noisy(3000, 40, 1000, 10), clean(3000, 40, 1000, 5)),
    (noisy(3000, 40, 500, 8), clean(3000, 40, 500, 3)),
    (noisy(2000, 30, 500, 7), clean(2000, 30, 500, 5)),
    (noisy(2000, 30, 500, 5), clean(2000, 30, 500, 3)),
    (noisy(1000, 30, 200, 8), clean(1000, 30, 200, 5)),
    (noisy(1000, 30, 200, 5), clean(750, 30, 200, 5)),
    (noisy(1000, 30, 200, 5), clean(750, 30, 200, 3)),
    (noisy(1000, 30, 200, 5),),
    (noisy(1000, 30, 200, 3),),
    (noisy(500, 20, 100, 3),),
)

LABELS = {"sharpbalance": "released (flattest)", "sharpbalance_paper": "paper (sharpest)", "random": "random"}
FIGURES = {
    "tradeoff": "sharpness against diversity",
    "benchmark": "accuracy of members and ensembles, and the gain",
    "severity": "accuracy and calibration error against severity",
    "ensemble_size": "accuracy, likelihood and calibration error against the number of members",
}

Measured = dict[str, dict[str, Ensemble]]  # by method, by seeds


@dataclass(frozen=True)
class Claim:
    """A difference for each ensemble that is above 0 if the claim is right: a number, or one for each test image, [N].

    A share if it has a unit.
    """

    name: str
    text: str
    gap: Callable[[Measured, str], float | torch.Tensor]
    unit: str = "points"  # of 0.01


def difference(a: str, b: str, value: str) -> Callable[[Measured, str], float | torch.Tensor]:
    """Method a minus method b, image by image where the result files have that."""

    def gap(found: Measured, seeds: str) -> float | torch.Tensor:
        one, other = found[a][seeds], found[b][seeds]
        if value in one.by_sample and value in other.by_sample:
            return one.by_sample[value].double() - other.by_sample[value].double()
        return one.values[value] - other.values[value]

    return gap


def slope(found: Measured, seeds: str) -> float:
    """Least-squares slope of disagreement over the logarithm of sharpness, along rho (0 is the deep ensemble)."""
    methods = ["deep_ensemble", *(method for method in found if method.startswith("sam_0"))]
    values = [found[method][seeds].values for method in methods]
    return float(np.polyfit([np.log(v["sharpness"]) for v in values], [v["disagreement"] for v in values], 1)[0])


def comparisons(number: str, text: str, a: str, b: str, **values: str) -> list[Claim]:
    """Method a against b by several values, each by the name that the claim is to have."""
    long = {"ensemble": "clean images: ensemble accuracy", "corrupted_ensemble": "corrupted images: ensemble accuracy"}
    long["disagreement"] = "clean images: disagreement"
    return [
        Claim(f"{number}, {name}", f"{long[value]}, {text}", difference(a, b, value)) for name, value in values.items()
    ]


RELEASED, PAPER, RANDOM = "sharpbalance", "sharpbalance_paper", "random"
CLAIMS = (
    Claim(
        "i",
        "over rho, sharper members are more diverse: slope of disagreement over log sharpness",
        slope,
        unit="points per factor e",
    ),
    Claim(
        "i, diversity",
        "clean images: disagreement, deep ensemble - SAM with the largest rho",
        difference("deep_ensemble", "sam_largest", "disagreement"),
    ),
    Claim(
        "i, sharpness",
        "logarithm of sharpness, deep ensemble - SAM with the largest rho",
        lambda found, seeds: math.log(
            found["deep_ensemble"][seeds].values["sharpness"] / found["sam_largest"][seeds].values["sharpness"]
        ),
        unit="",
    ),
    Claim(
        "ii",
        "SAM lowers the gain of ensembling: EIR, deep ensemble - SAM",
        difference("deep_ensemble", "sam", "eir"),
        unit="",
    ),
    *comparisons("iii", "SharpBalance (released) - SAM", RELEASED, "sam", released="corrupted_ensemble"),
    *comparisons("iii", "SharpBalance (paper) - SAM", PAPER, "sam", paper="corrupted_ensemble"),
    *comparisons("iv", "SharpBalance (released) - SAM", RELEASED, "sam", released="ensemble"),
    *comparisons("iv", "SharpBalance (paper) - SAM", PAPER, "sam", paper="ensemble"),
    *comparisons(
        "v", "sharpest (paper) - flattest (released)", PAPER, RELEASED, corrupted="corrupted_ensemble", clean="ensemble"
    ),
    *comparisons(
        "vi",
        "SharpBalance (released) - random sets of its size",
        RELEASED,
        RANDOM,
        corrupted="corrupted_ensemble",
        clean="ensemble",
        diversity="disagreement",
    ),
    *comparisons("vii", "SharpBalance (released) - SAM", RELEASED, "sam", released="disagreement"),
    *comparisons("vii", "SharpBalance (paper) - SAM", PAPER, "sam", paper="disagreement"),
)


def first(seeds: str) -> str:
    """The seed that names an ensemble's folder."""
    return seeds.split()[0]


def verdict(gaps: list[float | torch.Tensor]) -> tuple[str, float, list[float]]:
    """supported, contradicted or undecided, by the 95 % interval of the mean; the mean, and that interval.

    Over ensembles and test images where all differences are given by image, else Student's over ensembles.
    """
    by_image = [gap for gap in gaps if isinstance(gap, torch.Tensor)]
    if len(by_image) == len(gaps):
        table = torch.stack(by_image)
        mean, interval = table.mean().item(), crossed_interval(table)
    else:
        values = [float(gap.mean()) if isinstance(gap, torch.Tensor) else gap for gap in gaps]
        mean, interval = statistics.mean(values), t_interval(values)
    if interval[0] > 0:
        return "supported", mean, interval
    return ("contradicted" if interval[1] < 0 else "undecided"), mean, interval


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--minutes", type=number(float, 0), default=600.0, metavar="N", help="how long it may take (default: a night)"
    )
    parser.add_argument("--data_path", type=path, default=Path("data"), metavar="DIR", help="folder of the data set")
    parser.add_argument("--only", choices=NAMES, help="one of the settings (default: both)")
    add_flag(parser, "download", "fetch a missing data set through torchvision")
    parser.add_argument(
        "--jobs",
        type=number(int, 1, 1024),
        default=cores(),
        metavar="K",
        help="commands side by side, each on one CPU thread (default: one for each core)",
    )
    for name in ("runs", "measurements", "results"):
        parser.add_argument(f"--{name}", type=path, default=Path(name) / "fashion_mnist", metavar="DIR", help=name)
    add_flag(parser, "redraw", "compute nothing: make tables, figures and verdicts from the result files")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Choose the plan, carry it out, and report."""
    if not args.redraw:
        args.results.mkdir(parents=True, exist_ok=True)
        abouts = choose(args)
        work = Work(args, {setting: about["speed"] for setting, about in abouts.items()})
        for setting, about in abouts.items():
            found = about | work.carry_out(setting)
            settings = {setting.name: found} | {
                k: v for k, v in kept_settings(args.results).items() if k != setting.name
            }
            write_json(args.results / "plan.json", {"settings": {k: settings[k] for k in NAMES if k in settings}})
            report(args.results)
    else:
        report(args.results)


def choose(args: argparse.Namespace) -> dict[Setting, dict]:
    """What is done in each setting: what was begun, or the largest plan that fits; with what is worth knowing of it."""
    data = load_data("fashion_mnist", args.data_path, download=args.download)
    if len(data.test) != TEST:
        print(f"note: {len(data.test)} test images instead of {TEST}", file=sys.stderr)
    names = [args.only] if args.only else list(NAMES)
    begun = dict(filter(None, (begun_plan(args.runs / name) for name in names)))
    names = [name for name in names if all(setting.name != name for setting in begun)]
    if begun:
        minutes = sum(about["estimated_seconds"] for about in begun.values()) / 60
        print(
            f"going on with {describe(begun)}: by the estimate of its beginning about {minutes:.0f} minutes in all, "
            "whatever --minutes says"
        )
    plans = [tuple(setting for setting in plan if setting.name in names) for plan in PLANS]
    if not any(plans):
        return begun
    plans = [plan for plan in plans if plan]
    speed = {width: throughput(width, args.jobs) for width in sorted({s.width for plan in plans for s in plan})}
    costs = [sum(estimate(setting, speed[setting.width], args.jobs) for setting in plan) for plan in plans]
    index = next((i for i, cost in enumerate(costs) if cost <= 60 * args.minutes), None)
    if index is None:
        raise InputError(
            f"--minutes {args.minutes:g}: the smallest plan takes about {costs[-1] / 60:.0f} minutes here; give more"
        )
    speeds = " and ".join(f"{images:.0f} images/s at width {width}" for width, images in speed.items())
    print(
        f"{args.jobs} jobs train {speeds}; the largest plan that fits into {args.minutes:g} "
        f"minutes takes about {costs[index] / 60:.0f}: {describe(plans[index])}",
        flush=True,
    )
    common = {"grid": GRID, "jobs": args.jobs, "environment": environment(torch.device("cpu"))}
    common |= {"validation_images": VALIDATION, "test_images": len(data.test)}
    for setting in plans[index]:
        images = speed[setting.width]
        about = {"setting": asdict(setting), "speed": images} | common
        about["estimated_seconds"] = round(estimate(setting, images, args.jobs))
        (args.runs / setting.name).mkdir(parents=True, exist_ok=True)
        write_json(args.runs / setting.name / "plan.json", about)
        begun[setting] = about
    return begun


def begun_plan(folder: Path) -> tuple[Setting, dict] | None:
    """What was begun in a folder of runs."""
    path = folder / "plan.json"
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder}: not empty, and without a plan; remove it, or give another --runs")
        return None
    try:
        about = load_json(path)
        setting = next(s for plan in PLANS for s in plan if [asdict(s), GRID] == [about["setting"], about["grid"]])
        return setting, about
    except (OSError, ValueError, LookupError, TypeError, StopIteration) as error:
        raise InputError(f"{path}: no plan of this script; remove {folder}, or give another --runs") from error


def describe(settings: Iterable[Setting]) -> str:
    """A plan in words."""
    return " and ".join(
        f"{s.ensembles} ensembles of 3 by each method, {s.epochs} epochs on {s.samples} images with "
        f"{s.name.replace('_', ' ')}, width {s.width}"
        for s in settings
    )


def throughput(width: int, jobs: int) -> float:
    """Images a second, forward and backward, of so many single-thread processes together."""
    with get_context("spawn").Pool(jobs) as pool:
        return sum(pool.map(_speed, [width] * jobs))


def _speed(width: int) -> float:
    device = start_device("cpu", 1)
    model = create_model("resnet18", CLASSES, width, 32, 1).to(device, memory_format=torch.channels_last)
    optimizer = SAM(model.parameters(), lr=0.01)
    images, labels = torch.randn(BATCH, 1, 32, 32), torch.randint(CLASSES, (BATCH,))
    steps, started = 0, None
    while started is None or time.monotonic() - started < 4:
        sharpbalance_step(model, optimizer, images, labels, torch.zeros(BATCH, dtype=torch.bool))
        steps += 1
        if started is None and steps == 5:  # the first ones are slower
            steps, started = 0, time.monotonic()
    return steps * BATCH / (time.monotonic() - started)


def training_passes(setting: Setting, kind: str) -> float:
    """Forward and backward passes of one image, for an ensemble of 3."""
    # Of a SharpBalance run the half after T_d (the others of SPLITS differ little) has SAM on two thirds of the images.
    passes = {"deep_ensemble": 1.0, "sam": 2.0, "sharpbalance": 0.5 * 2 + 0.5 * 1.67}[kind]
    return 3 * setting.epochs * (passes * setting.samples + FORWARD * VALIDATION) + 3 * 3 * FORWARD * TEST


def measuring_passes(setting: Setting) -> float:
    """The same for measuring an ensemble of 3."""
    return 3 * (FORWARD * (TEST + 75 * setting.corrupted) + SHARPNESS_PASSES)


def stages(setting: Setting) -> list[tuple[int, float]]:
    """What is done in a setting, one after another: how many commands side by side, and the passes of all of them."""
    deep, sam, balance = (training_passes(setting, kind) for kind in ("deep_ensemble", "sam", "sharpbalance"))
    measured = setting.ensembles * (len(RHOS) + 5)  # SAM; deep ensemble, EoA, SharpBalance twice, random sets
    return [
        (setting.ensembles * (1 + len(RHOS)), setting.ensembles * (deep + len(RHOS) * sam)),
        *((count, count * balance) for count in (len(KS), len(SPLITS) - 1, 3 * setting.ensembles - 1)),
        (measured, measured * measuring_passes(setting)),
    ]


def estimate(setting: Setting, speed: float, jobs: int) -> float:
    """Seconds that a setting takes; at the end of a stage there may be less to do than there are jobs."""
    seconds = 75 * setting.corrupted / 10_000
    for count, passes in stages(setting):
        rounds = math.ceil(count / jobs)
        seconds += rounds * (STARTUP + jobs * passes / max(count, 1) / speed)
    return seconds


class Work:
    """Commands, several side by side; what is finished is not done again."""

    def __init__(self, args: argparse.Namespace, speed: dict[Setting, float]):
        self.args, self.speed = args, speed
        # In seconds of one job after another: of all, of what is there, and of what was done since the start.
        self.total = sum(passes / speed[setting] for setting in speed for _, passes in stages(setting))
        self.done, self.finished, self.started = 0.0, 0.0, time.monotonic()
        self.counted: set[str] = set()  # a point of the grid may be asked for twice
        images = load_data("fashion_mnist", args.data_path)
        order = np.random.RandomState(0).permutation(len(images.train) + len(images.val))
        self.split = order[:VALIDATION], order[VALIDATION:]
        self.images_at = Path(images.record["files"][0]["path"]).parent

    def carry_out(self, setting: Setting) -> dict:
        """Everything in one setting; what was chosen, and which share of the sets has wrong labels."""
        args, runs = self.args, self.args.runs / setting.name
        seeds = SEEDS[: setting.ensembles]
        val, rest = self.split
        if setting.samples > len(rest):
            raise InputError(f"--data_path {args.data_path}: {len(rest)} training images, {setting.samples} are needed")
        for name, index in (("train", rest[: setting.samples]), ("val", val)):
            runs.mkdir(parents=True, exist_ok=True)
            write_array(runs / f"{name}.npy", np.sort(index))
        self.run_all([self.corrupted(setting)])

        sam = {f"sam_{rho:g}": ["--sam", "--rho", f"{rho:g}"] for rho in RHOS}
        deep = {"deep_ensemble": ["--average_from", str(setting.epochs // 2)]}
        self.run_all(self.training(setting, name, s, flags) for s in seeds for name, flags in (deep | sam).items())
        scores = {rho: statistics.mean(validation(runs / f"sam_{rho:g}_{first(s)}") for s in seeds) for rho in RHOS}
        rho = max(RHOS, key=lambda one: scores[one])

        def balance(k: float, t_d: int) -> list[str]:
            return ["--sam", "--rho", f"{rho:g}", "--flat_ratio", f"{k:g}", "--initial_epochs", str(t_d)]

        def search(grid: list[tuple[float, int]]) -> dict[tuple[float, int], float]:
            names = {point: f"sharpbalance_{rho:g}_{point[0]:g}_{point[1]}" for point in grid}
            self.run_all(self.training(setting, names[point], seeds[0], balance(*point)) for point in grid)
            return {point: validation(runs / f"{names[point]}_{first(seeds[0])}") for point in grid}

        by_k = search([(k, setting.epochs // 2) for k in KS])
        k = max(by_k, key=by_k.__getitem__)[0]
        by_split = search([(k, int(share * setting.epochs)) for share in SPLITS])
        t_d = max(by_split, key=by_split.__getitem__)[1]

        flags = balance(k, t_d)
        methods = {
            "sharpbalance": flags,
            "sharpbalance_paper": [*flags, "--partition", "paper"],
            "random": [*flags, "--select", "random", "--match_size"],
        }
        found = {method: f"{method}_{rho:g}_{k:g}_{t_d}" for method in methods}
        self.run_all(
            self.training(setting, found[method], s, flags) for s in seeds for method, flags in methods.items()
        )
        # EoA is measured on the averages of the deep ensemble's runs, and needs none of its own.
        names = {name: name for name in (*deep, *sam)} | {"eoa": "deep_ensemble"} | found
        self.run_all(self.measuring(setting, method, name, s) for s in seeds for method, name in names.items())
        clear(args.results / setting.name, {f"{method}_{first(s)}" for s in seeds for method in names})
        return {
            "chosen": {"rho": rho, "k": k, "T_d": t_d},
            "validation": {
                "deep ensemble": statistics.mean(validation(runs / f"deep_ensemble_{first(s)}") for s in seeds),
                "rho": {f"{r:g}": v for r, v in scores.items()},
                "k": {f"{r:g}": v for (r, _), v in by_k.items()},
                "T_d": {str(t): v for (_, t), v in by_split.items()},
            },
            "mislabelled": self.wrong_labels(setting, runs, found, seeds),
        }

    def corrupted(self, setting: Setting) -> tuple:
        """The command that makes the corrupted images, beside a link to the plain ones."""
        folder = self.args.runs / f"corrupted_{setting.corrupted}"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "fashion-mnist").exists():
            (folder / "fashion-mnist").symlink_to(self.images_at.resolve(), target_is_directory=True)
        done = folder / "Fashion-MNIST-C"
        command = ["scripts/make_corrupted.py", "--data", "fashion_mnist", "--data_path", self.args.data_path]
        command += ["--to", folder, "--images", setting.corrupted, "--workers", self.args.jobs]
        return (lambda: _has_images(done, setting.corrupted)), [command], folder.name, 0.0, self.args.runs

    def training(self, setting: Setting, name: str, seeds: str, flags: list[str]) -> tuple:
        """A command of main.py."""
        folder = self.args.runs / setting.name / f"{name}_{first(seeds)}"
        command = ["main.py", "--data", "fashion_mnist", "--data_path", self.args.data_path, "--width", setting.width]
        command += ["--train_idx_path", folder.parent / "train.npy", "--val_idx_path", folder.parent / "val.npy"]
        command += ["--epochs", setting.epochs, "--batch_size", BATCH, "--augmentation", "flip", "--threads", 1]
        command += ["--label_noise", setting.label_noise, "--seed", seeds, "--save_path", folder, *flags]
        kind = name.split("_")[0].replace("random", "sharpbalance").replace("deep", "deep_ensemble")
        cost = training_passes(setting, kind) / self.speed[setting]
        return (lambda: (folder / "summary.json").is_file()), [command], f"trained {folder}", cost, folder.parent

    def measuring(self, setting: Setting, method: str, name: str, seeds: str) -> tuple:
        """The commands of measure_diversity.py and measure_sharpness.py; smaller result files go to --results."""
        source = self.args.runs / setting.name / f"{name}_{first(seeds)}"
        folder = self.args.measurements / setting.name / f"{method}_{first(seeds)}"
        kept = self.args.results / setting.name / folder.name
        data = self.args.runs / f"corrupted_{setting.corrupted}"
        common = ["--resume", source, "--save", folder, "--data_path", data, "--threads", 1]
        common += ["--checkpoint", "averaged" if method == "eoa" else "last"]
        commands = [
            ["measure_diversity.py", *common, "--split", "test,corrupted"],
            [
                "measure_sharpness.py",
                *common,
                "--mode",
                "APGD_worst",
                "--norms",
                "l2",
                "--batch_num",
                SHARPNESS_BATCHES,
            ],
            [lambda: keep(folder, kept)],
        ]
        cost = measuring_passes(setting) / self.speed[setting]
        return (lambda: _is_of(kept / "sharpness.json", source)), commands, f"measured {folder}", cost, folder.parent

    def run_all(self, jobs: Iterable[tuple]) -> None:
        """Carry out commands side by side, and say how far it is."""
        with ThreadPoolExecutor(self.args.jobs) as pool:
            waiting = {}
            for done, commands, text, cost, folder in jobs:
                if text in self.counted:
                    continue
                self.counted.add(text)
                if done():
                    self.done += cost
                    continue
                log = folder / "logs" / (text.split("/")[-1].replace(" ", "_") + ".log")
                waiting[pool.submit(self.run_one, commands, log)] = text, cost
            try:
                for job in as_completed(waiting):
                    job.result()
                    self.tell(*waiting[job])
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def run_one(self, commands: list[list], log: Path) -> None:
        """The commands of one job, one after another."""
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        for command in commands:
            if callable(command[0]):
                command[0]()
                continue
            # The name goes into the result files: as one would type it.
            words = [sys.executable, os.path.relpath(ROOT / command[0]), *map(str, command[1:])]
            with log.open("ab") as file:
                done = subprocess.run(words, env=environment, stdout=file, stderr=subprocess.STDOUT)
            if done.returncode:
                raise RunError(f"{command[0]} ended with status {done.returncode}; see {log}")

    def tell(self, text: str, cost: float) -> None:
        """A line of progress."""
        self.done += cost
        self.finished += cost
        elapsed = time.monotonic() - self.started
        share = f"{min(self.done / self.total, 1.0):4.0%}"
        if self.finished:
            left = elapsed / self.finished * (self.total - self.done)
            share += f"  about {max(left, 0) / 60:.0f} min left"
        print(f"{time.strftime('%H:%M')}  {share}  {text}", flush=True)

    def wrong_labels(self, setting: Setting, runs: Path, names: dict[str, str], seeds: tuple[str, ...]) -> dict:
        """Which share of a SAM set has wrong labels, mean over members; all: of the training images."""
        if not setting.label_noise:
            return {}
        index = {f"{name}_idx_path": runs / f"{name}.npy" for name in ("train", "val")}
        wrong = load_data("fashion_mnist", self.args.data_path, label_noise=setting.label_noise, **index).mislabelled
        shares: dict[str, float] = {"all": float(wrong.mean())}
        for method, name in names.items():
            masks = [
                np.load(p) for s in seeds for p in sorted((runs / f"{name}_{first(s)}").glob("seed_*/sam_mask.npy"))
            ]
            shares[method] = statistics.mean(float(wrong[mask].mean()) for mask in masks)
            shares[f"{method}_size"] = statistics.mean(float(mask.mean()) for mask in masks)
        return shares


def _has_images(folder: Path, count: int) -> bool:
    """Whether the corrupted set is whole and of so many images."""
    try:
        return load_json(folder / "about.json")["images"] == count and len(list(folder.glob("*.npy"))) == 16
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _is_of(path: Path, source: Path) -> bool:
    """Whether a result file is of this run: those of a clone, or of another plan, may lie there as well."""
    try:
        newer = path.stat().st_mtime >= (source / "summary.json").stat().st_mtime
        return newer and load_json(path)["members"][0]["path"].startswith(f"{source}{os.sep}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def validation(folder: Path) -> float:
    """Accuracy of a run's ensemble on validation."""
    return load_json(folder / "summary.json")["last"]["ensemble"]["val_acc"]


def kept_settings(results: Path) -> dict[str, dict]:
    """What plan.json among the results says of each setting."""
    path = results / "plan.json"
    if not path.is_file():
        return {}
    needed = {"setting", "chosen", "validation", "mislabelled", "jobs", "environment", "estimated_seconds"}
    try:
        settings = load_json(path)["settings"]
        known = set(settings) <= set(NAMES) and all(
            needed <= set(one) and {"deep ensemble", "rho", "k", "T_d"} <= set(one["validation"])
            for one in settings.values()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        known = False
    if not known:
        raise InputError(f"{path}: not of this version; give another --results, and run the experiment again")
    return settings


def clear(folder: Path, wanted: set[str]) -> None:
    """Remove what an earlier plan left: folders that hold nothing but result files."""
    for place in folder.iterdir():
        if place.is_dir() and place.name not in wanted and {file.name for file in place.iterdir()} <= RESULT_FILES:
            shutil.rmtree(place)


def report(results: Path) -> None:
    """Tables, figures and README.md of the result files."""
    settings = kept_settings(results)
    if not settings:
        raise InputError(f"{results / 'plan.json'}: missing or empty; run the experiment first")
    parts = []
    for name, found in settings.items():
        sam = f"sam_{found['chosen']['rho']:g}"
        # The first SAM ensemble is what the table compares with.
        methods = [sam, *(f"sam_{rho}" for rho in found["validation"]["rho"] if f"sam_{rho}" != sam)]
        methods += ["deep_ensemble", "eoa", "sharpbalance", "sharpbalance_paper", "random"]
        firsts = [first(seeds) for seeds in SEEDS[: found["setting"]["ensembles"]]]
        folders = [results / name / f"{method}_{first}" for method in methods for first in firsts]
        ensembles = iter([read_ensemble(folder) for folder in folders])
        measured: Measured = {method: {first: next(ensembles) for first in firsts} for method in methods}
        measured |= {"sam": measured[sam], "sam_largest": measured[f"sam_{max(found['validation']['rho'], key=float)}"]}
        table = [*map(str, folders), "--format", "markdown", "--to", str(results / f"{name}.md")]
        summarize.main(summarize.parse_args(table))
        for kind in FIGURES:
            # Two lines for each method: of eight, none could be told from the others.
            few = ("deep_ensemble", sam, RELEASED, PAPER) if kind == "severity" else methods
            shown = [str(results / name / f"{method}_{first}") for method in few for first in firsts]
            words = [kind, "--from", *shown, "--to", str(results / f"{name}_{kind}")]
            with redirect_stdout(io.StringIO()):
                plot.main(plot.parse_args(words))
            (results / f"{name}_{kind}.pdf").unlink(missing_ok=True)
        parts.append(section(found, measured))
    write_atomically(results / "README.md", "\n".join([*opening(settings), *parts]).encode())
    print(f"wrote {results / 'README.md'}")


def opening(settings: dict[str, dict]) -> list[str]:
    """What the report begins with."""
    about = next(iter(settings.values()))
    return [
        "# The paper's claims on Fashion-MNIST",
        "",
        "`bash scripts/reproduce_fashion_mnist.sh --minutes 600` trains and measures; with `--redraw` it makes this "
        "page, the tables and the figures from the JSON files beside it.",
        "",
        f"Ensembles of 3 members; ResNet-18, batch {BATCH}, learning rate 0.1 in steps, no augmentation but mirroring; "
        f"{about['validation_images']} validation and {about['test_images']} test images, and Fashion-MNIST-C of the "
        "first of these (15 corruptions at 5 severities, by scripts/make_corrupted.py). Checkpoints: those of the end "
        "of training. rho was chosen by the ensemble accuracy of SAM on validation, k (the share of the images that "
        "each member picks by its scores) and the epoch T_d of the split by that of SharpBalance (released) on the "
        "first seeds, and used for all methods; nothing was chosen on test images.",
        "",
        "A claim is *supported* where the 95 % interval of the mean difference between ensembles of the same seeds "
        "lies above 0, *contradicted* where it lies below, else *undecided*. The intervals are over ensembles and test "
        "images alike, and of sharpness and of the slope over ensembles only; all hold for this one draw of training "
        "images and of wrong labels. Differences of accuracy and disagreement are in percentage points. "
        f"{len(CLAIMS)} intervals are looked at in a setting, without a correction for their number: were there no "
        f"difference anywhere, {len(CLAIMS) / 20:.2f} of them would exclude 0 on average.",
        "",
    ]


def section(found: dict, measured: Measured) -> str:
    """One setting of the report."""
    setting, chosen, tried, lines = found["setting"], found["chosen"], found["validation"], []
    name, machine = setting["name"], found["environment"]
    ball = next(iter(measured["sam"].values())).content["sharpness"]["protocol"]
    ensembles = [one for by_seeds in measured.values() for one in by_seeds.values()]
    known = all("disagreement" in one.by_sample for one in ensembles)
    commits = sorted({one.content["environment"]["commit"] or "no clone" for one in ensembles})
    if any(commit.endswith("-dirty") for commit in commits):
        commits[-1] += " (-dirty: with files changed)"

    def picked(name: str) -> str:
        ends = [float(value) for value in tried[name]]
        edge = " (an end of what was tried)" if chosen[name] in (min(ends), max(ends)) else ""
        return f"{name} {chosen[name]:g}{edge}"

    def listed(name: str) -> str:
        return ", ".join(f"{name} {at}: {100 * value:.2f} %" for at, value in tried[name].items())

    lines += [f"## {name.replace('_', ' ').capitalize()}", ""]
    lines += [
        f"{setting['ensembles']} ensembles by each method. Width {setting['width']}, {setting['epochs']} epochs on "
        f"{setting['samples']} training images, {100 * setting['label_noise']:g} % of them with a wrong label "
        f"(training only); corrupted copies of {setting['corrupted']} test images. {found['jobs']} single-thread "
        f"processes on {machine['cpus']} cores, torch {machine['torch']}; about {found['estimated_seconds'] / 60:.0f} "
        f"minutes by the estimate. Measured by the code of {' and '.join(commits)}.",
        "",
        f"Ensemble accuracy on validation: deep ensemble {100 * tried['deep ensemble']:.2f} %; SAM, {listed('rho')}; "
        f"SharpBalance (released), first seeds alone, {listed('k')}, {listed('T_d')}; chosen: "
        f"{', '.join(map(picked, ('rho', 'k', 'T_d')))}. One ensemble on {found['validation_images']} images has a "
        f"standard error of {100 * math.sqrt(0.15 * 0.85 / found['validation_images']):.1f} points, so that k and T_d "
        "are hardly told apart.",
        "",
        f"Sharpness: the rise of the loss in the worst case within {'an adaptive' if ball['adaptive'] else 'a'} l2 "
        f"ball of radius {ball['rho0']:g}, mean over {ball['batch_num']} batches of {ball['eval_batch_size']} training "
        f"images, by '{ball['maximiser']}' in {ball['n_iters']} iterations."
        + ("" if known else " Intervals of disagreement: over ensembles only (not known by image for all)."),
        "",
        "| claim | | mean | 95 % interval | n | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for claim in CLAIMS:
        factor, digits = (100, 2) if claim.unit else (1, 3)
        word, mean, edges = verdict([factor * claim.gap(measured, seeds) for seeds in sorted(measured["sam"])])
        low, high = (f"{edge:.{digits}f}" for edge in edges)
        lines.append(
            f"| {claim.name} | {claim.text} | {mean:+.{digits}f} {claim.unit} | [{low}, {high}] | "
            f"{len(measured['sam'])} | **{word}** |"
        )
    lines.append("")
    if found["mislabelled"]:
        shares = found["mislabelled"]
        lines += [
            f"Of the training images {100 * shares['all']:.1f} % have a wrong label. Of those that a member trains "
            "with SAM after the split: "
            + "; ".join(
                f"{LABELS[method]} {100 * shares[method]:.1f} % (sets of {100 * shares[method + '_size']:.0f} % of the "
                "images)"
                for method in LABELS
            )
            + ".",
            "",
        ]
    lines += [f"All methods: [{name}.md]({name}.md).", "", *by_corruption(measured)]
    for kind, text in FIGURES.items():
        lines += [f"![{text}]({name}_{kind}.png)", ""]
    return "\n".join(lines)


def by_corruption(measured: Measured) -> list[str]:
    """A table of accuracy under each corruption, mean over ensembles: of all severities, and of SAM at each."""
    methods = ("deep_ensemble", "sam", RELEASED, PAPER, RANDOM)
    parts = {
        method: [e.content["result"].get("corrupted", {}).get("parts", {}) for e in measured[method].values()]
        for method in methods
    }
    found = [part.rpartition("-") for one in parts["sam"] for part in one]
    names, severities = dict.fromkeys(name for name, _, _ in found), sorted({step for _, _, step in found})
    if not all(one for rows in parts.values() for one in rows):
        return []

    def mean(method: str, name: str, steps: list[str]) -> str:
        values = (one[f"{name}-{step}"]["rates"]["ensemble_accuracy"] for one in parts[method] for step in steps)
        return f"{100 * statistics.mean(values):.1f}"

    lines = [
        "Ensemble accuracy in % under each corruption, mean over the ensembles and all severities, and SAM's at each "
        "severity:",
        "",
        "| | deep ensemble | SAM | SharpBalance (released) | SharpBalance (paper) | random | "
        + " | ".join(f"SAM, {step}" for step in severities)
        + " |",
        "|---" * (1 + len(methods) + len(severities)) + "|",
    ]
    for name in names:
        cells = [mean(method, name, severities) for method in methods]
        cells += [mean("sam", name, [step]) for step in severities]
        lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return [*lines, ""]


if __name__ == "__main__":
    run(main, parse_args())
