"""Whole commands by turns, wall clock: what `scripts/benchmark.py --pipeline` times, and the plain program among them.

The plain program is what a competent first version of this project looks like: a process for each member, images that
are augmented one by one with PIL behind a DataLoader, a gradient for each sample by vmap, and an evaluation of the best
weights at the end.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models import create_model
from sam import SAM
from tests.reference import fisher_by_vmap
from utils import RunError, cli
from utils.data import Data, ImageSet
from utils.datasets import load_data
from utils.distributed import cores
from utils.files import load_json, write_array, write_json
from utils.partition import sharpness_aware_masks
from utils.predictions import load_members
from utils.run import environment, find_checkpoints

ROOT = Path(__file__).resolve().parent.parent
SHARPBALANCE = "--sam --rho 0.1 --flat_ratio 0.5"
NINE = "--seed " + " ".join(map(str, range(11, 20)))
# By name: training and validation images (None: those of the data set), epochs, and further options of main.py.
SETTINGS: dict[str, tuple[tuple[int, int] | None, int, str]] = {
    "width8": ((8100, 900), 12, "--data fashion_mnist --width 8 --initial_epochs 5 --batch_size 128"),
    "width8_third": ((2700, 300), 12, "--data fashion_mnist --width 8 --initial_epochs 5 --batch_size 128"),
    "width16": ((2700, 300), 4, "--data fashion_mnist --width 16 --initial_epochs 2 --batch_size 128"),
    "width64": ((900, 100), 2, "--data fashion_mnist --width 64 --initial_epochs 1 --batch_size 128"),
    "one_member": ((2700, 300), 4, "--data fashion_mnist --width 16 --batch_size 128 --seed 13"),
    "nine_members": ((900, 100), 4, f"--data fashion_mnist --width 16 --initial_epochs 2 --batch_size 128 {NINE}"),
    "digits": (None, 30, "--data digits --width 8 --initial_epochs 15 --batch_size 64"),
}
# By name: a script or a function of this file, and its options.
ARMS: dict[str, tuple[str, str]] = {
    "sharpbalance": ("main.py", SHARPBALANCE),
    "sam": ("main.py", "--sam --rho 0.1"),
    "late": ("main.py", f"{SHARPBALANCE} --initial_method sgd"),
    "one_process": ("main.py", f"--jobs 1 --threads {cores()}"),
    "first_version": ("first_version", ""),
    "first_version_shared": ("first_version", "shared"),
    **{
        f"jobs{j}_threads{t}": ("main.py", f"{SHARPBALANCE} --jobs {j} --threads {t}")
        for j in (1, 2, 3)
        for t in (1, 2)
    },
    **{f"sam_threads{t}": ("main.py", f"--sam --rho 0.1 --jobs 1 --threads {t}") for t in (1, 2)},
    "diversity": ("measure_diversity.py", ""),
    "passes": ("passes", ""),
}
BY_DEFAULT = ("sharpbalance", "sam", "late", "one_process", "first_version")
# What is compared with what, and the most that the ratio of their medians is to be.
TARGETS = {
    ("sharpbalance", "first_version"): 0.60,
    ("sharpbalance", "first_version_shared"): None,
    ("sharpbalance", "one_process"): 1.45,
    ("sharpbalance", "sam"): None,
    ("late", "one_process"): 0.85,
    **{("sharpbalance", name): 1.05 for name in ARMS if name.startswith("jobs")},
    **{("sam", name): 1.05 for name in ARMS if name.startswith("sam_")},
    ("diversity", "passes"): 0.75,
}
MAX_BUSY = 2.2  # of a machine with a busy core to an idle one
INTERVAL = 1.0  # seconds from one look at the memory to the next


class PilDataset(torch.utils.data.Dataset):
    """Images that are augmented one by one, with PIL."""

    def __init__(self, data: ImageSet, augment: bool = True):
        from torchvision import transforms as t

        self.images, self.labels, info = data.images.numpy(), data.labels.numpy(), data.preprocessing
        changes = [t.RandomCrop(data.height, padding=info.padding)] * bool(augment and info.padding)
        changes += [t.RandomHorizontalFlip()] * bool(augment and info.flip)
        self.transform = t.Compose([t.ToPILImage(), *changes, t.ToTensor(), t.Normalize(info.mean, info.std)])

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """One augmented image, its label and its index."""
        return self.transform(self.images[index]), self.labels[index], index


def loader(data: ImageSet, size: int, train: bool = False) -> torch.utils.data.DataLoader:
    """Batches by two workers."""
    return torch.utils.data.DataLoader(
        PilDataset(data, train), size, shuffle=train, num_workers=2, persistent_workers=True
    )


def accuracy(model: torch.nn.Module, batches: torch.utils.data.DataLoader) -> float:
    """Share of correct predictions."""
    model.eval()
    with torch.no_grad():
        hits = [(model(images).argmax(1) == labels).float() for images, labels, _ in batches]
    return torch.cat(hits).mean().item()


def plain_step(model: torch.nn.Module, optimizer: SAM, images: Tensor, labels: Tensor, mask: Tensor) -> None:
    """The SharpBalance step, pass by pass."""
    share = int(mask.sum()) / len(mask)
    optimizer.zero_grad()
    if share > 0:
        F.cross_entropy(model(images[mask]), labels[mask]).backward()
        optimizer.first_step(zero_grad=True)
        (F.cross_entropy(model(images[mask]), labels[mask]) * share).backward()
        optimizer.restore()
    if share < 1:
        (F.cross_entropy(model(images[~mask]), labels[~mask]) * (1 - share)).backward()
    optimizer.base_optimizer.step()


def first_member(args: argparse.Namespace) -> None:
    """One member of the plain program; the scores of all meet as files in a folder."""
    data, seed, folder = data_of(args), args.member, args.place
    torch.manual_seed(seed)
    model = create_model("resnet18", width=args.width, **data.info.network)
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, weight_decay=5e-4)
    steps = [args.epochs // 2, args.epochs * 3 // 4]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer.base_optimizer, steps)
    train, val, test = loader(data.train, args.batch_size, True), *(loader(p, 128) for p in (data.val, data.test))
    mask, best = torch.ones(len(data.train), dtype=torch.bool), -1.0
    for epoch in range(args.epochs):
        if epoch == args.initial_epochs:
            model.eval()
            scores = [fisher_by_vmap(model, images, labels) for images, labels, _ in loader(data.train, 128)]
            np.save(folder / f"part_{seed}.npy", torch.cat(scores).detach().numpy())
            (folder / f"part_{seed}.npy").rename(folder / f"{seed}.npy")
            while not all((folder / f"{other}.npy").exists() for other in args.seed):
                time.sleep(0.1)
            everyone = np.stack([np.load(folder / f"{other}.npy") for other in args.seed])
            mask = torch.from_numpy(sharpness_aware_masks(everyone, 0.5)[args.seed.index(seed)])
        model.train()
        for images, labels, index in train:
            plain_step(model, optimizer, images, labels, mask[index])
        schedule.step()
        found = accuracy(model, val)
        if found > best:
            best = found
            torch.save(model.state_dict(), folder / f"best_{seed}.pt")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / f"last_{seed}.pt")
    model.load_state_dict(torch.load(folder / f"best_{seed}.pt", weights_only=True))
    print(f"member {seed}: test accuracy {accuracy(model, test):.4f}")


def first_version(args: argparse.Namespace) -> None:
    """The plain program: a process for each member, with torch's own number of threads or a share of the cores."""
    args.place.mkdir()
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // len(args.seed)))} if args.what == "shared" else {}
    start = [sys.executable, "-W", "ignore", __file__, "member", str(args.place), *args.words, "--member"]
    members = [subprocess.Popen([*start, str(seed)], env=os.environ | threads) for seed in args.seed]
    statuses = [member.wait() for member in members]
    if any(statuses):
        sys.exit(1)


def passes(run: Path, args: argparse.Namespace) -> None:
    """The forward passes that measure_diversity.py needs, in one process with all threads."""
    torch.set_num_threads(cores())
    data = data_of(args)
    for saved in load_members(find_checkpoints([run], "best")):
        with torch.inference_mode():
            for part in (data.val, data.test):
                for images, _ in part.in_order(512):
                    saved.model(images)


def data_of(args: argparse.Namespace) -> Data:
    """The images of a setting."""
    return load_data(args.data, args.data_path, "cpu", args.train_idx_path, args.val_idx_path)


def words_of(setting: str, data_path: Path, folder: Path) -> list[str]:
    """The options of main.py that are common to a setting; `folder` gets the indices of its images."""
    sizes, epochs, more = SETTINGS[setting]
    words = [*more.split(), "--data_path", str(data_path), "--epochs", str(epochs)]
    if sizes:
        order = np.random.RandomState(0).permutation(sum(sizes))
        for name, index in (("train", order[: sizes[0]]), ("val", order[sizes[0] :])):
            write_array(folder / f"{name}.npy", index)
            words += [f"--{name}_idx_path", str(folder / f"{name}.npy")]
    return words


def command_of(arm: str, words: list[str], epochs: int, folder: Path) -> list[str]:
    """The command line of an arm, which writes to folder/new; folder/run holds a trained ensemble."""
    what, more = ARMS[arm]
    start, new = [sys.executable, "-W", "ignore"], folder / "new"
    if what == "main.py":
        late = ["--initial_epochs", str(epochs * 7 // 8)] if arm == "late" else []
        return [*start, str(ROOT / what), *words, *more.split(), *late, "--save_path", str(new)]
    if what == "measure_diversity.py":
        return [*start, str(ROOT / what), "--resume", str(folder / "run"), "--save", str(new)]
    return [*start, __file__, more or what, str(folder / "run" if what == "passes" else new), *words]


def memory_of(session: int) -> float:
    """MiB of all processes of a session, with what they share counted once."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int((process / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                lines = (process / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        except (OSError, ValueError, IndexError):  # it has ended
            continue
    return total / 1024


def timed(command: list[str], log: Path) -> tuple[float, float]:
    """Seconds and peak MiB of a command, as a shell without variables of threads starts it.

    Raises:
        RunError: with the end of what it printed, if it fails.
    """
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    peak, started = 0.0, time.perf_counter()
    with (
        log.open("wb") as file,
        subprocess.Popen(
            command, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        while process.poll() is None:
            try:
                process.wait(INTERVAL)
            except subprocess.TimeoutExpired:
                peak = max(peak, memory_of(process.pid))
        seconds = time.perf_counter() - started
    if process.returncode:
        raise RunError(f"{' '.join(command)}: ended with status {process.returncode}: {log.read_text()[-500:]}")
    return seconds, peak


@contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """Another program that takes one core all the time, or none."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        yield
    finally:
        if other:
            other.kill()
            other.wait()


def run(setting: str, arms: list[str], repeats: int, busy: bool, data_path: Path, save: Path) -> dict[str, Any]:
    """Time the arms of a setting by turns, and keep each round in pipeline.json when it ends.

    Rounds of the same commit and machine are added to; others are replaced.

    Returns:
        The rounds and the environment of the setting.
    """
    save.mkdir(parents=True, exist_ok=True)
    file, here = save / "pipeline.json", environment(torch.device("cpu"))
    kept = load_json(file) if file.is_file() else {}
    same = all(kept.get(setting, {}).get("environment", {}).get(n) == here[n] for n in ("commit", "cpu", "torch"))
    result = kept[setting] if same else {"environment": here, "rounds": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = words_of(setting, data_path, folder)
        if {"diversity", "passes"} & set(arms):
            timed(command_of("sharpbalance", words, SETTINGS[setting][1], folder), folder / "log")
            (folder / "new").rename(folder / "run")
        for number in range(repeats):
            found: dict[str, list[float]] = {}
            for arm in arms:
                for with_neighbour in (False, True) if busy else (False,):
                    command = command_of(arm, words, SETTINGS[setting][1], folder)
                    with neighbour(with_neighbour):
                        values = timed(command, folder / "log")
                    shutil.rmtree(folder / "new", ignore_errors=True)
                    label = arm + ", busy" * with_neighbour
                    found[label] = [round(value, 2) for value in values]
                    print(
                        f"{setting} {number + 1}/{repeats}  {label:28} {values[0]:8.1f} s {values[1]:8.0f} MiB",
                        flush=True,
                    )
            result["rounds"].append(found)
            write_json(file, kept | {setting: result})
    return result


def table(setting: str, rounds: list[dict[str, list[float]]]) -> list[str]:
    """Lines of medians, with quartiles, and of ratios in the rounds that have both, with their targets."""

    def quartiles(values: list[float]) -> tuple[float, float, float]:
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return low, middle, high

    lines = [f"{setting}: whole commands", f"{'':34} {'median':>9}  {'quartiles':19} {'peak':>9}   n"]
    labels = dict.fromkeys(label for found in rounds for label in found)
    for label in labels:
        values = [found[label] for found in rounds if label in found]
        low, middle, high = quartiles([seconds for seconds, _ in values])
        peak = statistics.median(mib for _, mib in values)
        lines.append(f"{label:34} {middle:7.1f} s  {low:7.1f} to {high:7.1f} {peak:7.0f} MiB {len(values):3}")
    ratios = TARGETS | {(f"{label}, busy", label): MAX_BUSY for label in ARMS}
    for (label, other), target in ratios.items():
        both = [found[label][0] / found[other][0] for found in rounds if label in found and other in found]
        if both:
            low, middle, high = quartiles(both)
            verdict = "-" if target is None else f"at most {target:.2f} {'ok' if middle <= target else 'MISSED'}"
            lines.append(f"{label + ' / ' + other:34} {middle:9.2f}  {low:7.2f} to {high:7.2f}  {verdict}")
    return lines


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line of a process that `command_of` starts; `words` are those of the setting."""
    parser = cli.Parser(__doc__)
    parser.add_argument("what", choices=("first_version", "shared", "member", "passes"), help="what to do")
    parser.add_argument("place", type=cli.path, help="folder that is written to; of passes, the run")
    parser.add_argument("--member", type=int, help="its seed")
    args, args.words = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    parser = cli.Parser("The options of main.py that a setting has")
    for name in ("data", "data_path", "train_idx_path", "val_idx_path"):
        parser.add_argument(f"--{name}")
    for name in ("width", "epochs", "initial_epochs", "batch_size"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--seed", type=int, nargs="+", default=[13, 17, 27])  # main.py's own
    parser.parse_args(args.words, args)
    if args.epochs and args.initial_epochs is None:
        args.initial_epochs = args.epochs // 2  # as main.py
    return args


def main(args: argparse.Namespace) -> None:
    """Carry it out."""
    if args.what == "member":
        first_member(args)
    elif args.what == "passes":
        passes(args.place, args)
    else:
        first_version(args)


if __name__ == "__main__":
    cli.run(main, parse_args())
