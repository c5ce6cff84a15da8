"""How near each hot path comes to its floor: times as ratios within one run, on synthetic data.

    python scripts/benchmark.py
    python scripts/benchmark.py --only fisher64 --repeats 15

Each case runs in a process of its own. The case and what it is compared with take turns, so that a noisy machine hits
both; the ratio is that of the medians. Prints a table and writes benchmark.json under --save. With --check the exit
status is 1 if a ratio misses its target.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

from models import create_model
from sam import SAM
from utils.checkpoint import write_json
from utils.cli import Parser, add_flag, number, run, start_device
from utils.data import DATASETS, ImageSet
from utils.ensemble import environment
from utils.fisher import per_sample_fisher
from utils.training import sharpbalance_step

# A case returns its timed functions by name; the first is the case, the others are what it is compared with.
Timed = dict[str, Callable[[], object]]


def network(width: int) -> torch.nn.Module:
    """ResNet-18 for 32x32 colour images, in the memory format of training."""
    torch.manual_seed(0)
    return create_model("resnet18", 10, width).to(memory_format=torch.channels_last)


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and labels."""
    images = torch.randn(size, 3, 32, 32).to(memory_format=torch.channels_last)
    return images, torch.randint(0, 10, (size,))


def forward_backward(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One plain pass: the gradient of the mean loss in `.grad`."""
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()


def plain_vmap(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Per-sample squared gradient norms the plain way: vmap over one-sample gradients, 16 at a time."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(model, parameters, (image[None],))
        return F.cross_entropy(logits, label[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), chunk_size=16)
    return sum(g.flatten(1).square().sum(1) for g in gradients(parameters, images, labels).values())


def fisher(width: int) -> Timed:
    """Scores of one batch, against one forward and backward pass of it and against chunked vmap."""
    model, (images, labels) = network(width), batch(128)
    model.eval()

    def training_pass() -> None:
        model.train()
        forward_backward(model, images, labels)
        model.eval()

    return {
        "per_sample_fisher": lambda: per_sample_fisher(model, images, labels),
        "forward-backward": training_pass,
        "vmap": lambda: plain_vmap(model, images, labels),
    }


def step(share: float) -> Timed:
    """A SharpBalance step, against the plain passes that it cannot do without."""
    model, (images, labels) = network(16), batch(128)
    optimizer = SAM(model.parameters(), rho=0.1, lr=1e-3, momentum=0.9, weight_decay=5e-4)
    mask = torch.arange(128) < round(128 * share)
    parts = [part for part in (~mask, mask, mask) if part.any()]
    copies = [(images[part], labels[part]) for part in parts]

    def passes() -> None:
        for part_images, part_labels in copies:
            forward_backward(model, part_images, part_labels)

    return {
        "sharpbalance_step": lambda: sharpbalance_step(model, optimizer, images, labels, mask),
        "passes": passes,
    }


class PlainDataset(torch.utils.data.Dataset):
    """Images that are augmented one by one, with PIL."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        from torchvision import transforms

        info = DATASETS["cifar10"]
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(info.mean, info.std),
            ]
        )

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """One augmented image."""
        return self.transform(self.images[index]), self.labels[index]


def loading() -> Timed:
    """An epoch of augmented batches, against a torchvision DataLoader with 2 workers and a copy of the same bytes."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (10_000, 32, 32, 3), dtype=np.uint8)
    labels = random.integers(0, 10, len(images))
    data = ImageSet(images, labels, DATASETS["cifar10"])
    loader = torch.utils.data.DataLoader(
        PlainDataset(images, labels), 128, shuffle=True, num_workers=2, persistent_workers=True
    )
    source = [torch.randn(min(128, len(images) - i), 3, 32, 32) for i in range(0, len(images), 128)]
    epochs = iter(range(10**9))

    def ours() -> None:
        for _ in data.epoch(13, next(epochs), 128):
            pass

    def plain() -> None:
        for _ in loader:
            pass

    return {
        "ImageSet.epoch": ours,
        "DataLoader": plain,
        "copy": lambda: [tensor.clone() for tensor in source],
    }


# name: (case, {what it is compared with: target}). A target below 1 means: so many times faster.
CASES: dict[str, tuple[Callable[[], Timed], dict[str, float | None]]] = {
    "fisher64": (lambda: fisher(64), {"forward-backward": 1.05, "vmap": 1 / 5}),
    "fisher16": (lambda: fisher(16), {"forward-backward": 1.4, "vmap": 1 / 3.5}),
    "step0": (lambda: step(0.0), {"passes": 1.05}),
    "step30": (lambda: step(0.3), {"passes": 1.05}),
    "step60": (lambda: step(0.6), {"passes": 1.05}),
    "step100": (lambda: step(1.0), {"passes": 1.05}),
    "loading": (loading, {"DataLoader": 1 / 10, "copy": None}),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--only", choices=CASES, nargs="+", help="cases to run (default: all)")
    parser.add_argument("--repeats", type=number(int, 3), default=9, metavar="N", help="timed repeats of each function")
    parser.add_argument("--threads", type=number(int, 1), metavar="N", help="CPU threads (default: one for each core)")
    parser.add_argument("--save", type=Path, default=Path("runs/benchmark"), metavar="DIR", help="folder of the JSON")
    add_flag(parser, "check", "exit with status 1 if a ratio misses its target")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def measure(name: str, repeats: int, threads: int | None) -> dict:
    """Run one case in this process: seconds of every repeat, and the peak memory of the process."""
    device = start_device("cpu", threads)
    functions = CASES[name][0]()
    seconds: dict[str, list[float]] = {label: [] for label in functions}
    for repeat in range(repeats + 1):
        for label, function in functions.items():
            started = time.perf_counter()
            function()
            if repeat:  # the first round warms up
                seconds[label].append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak_memory_mib": peak, "environment": environment(device)}


def main(args: argparse.Namespace) -> None:
    """Run the cases and print their table."""
    if args.measure:
        write_json(args.to, measure(args.measure, args.repeats, args.threads))
        return
    print("case       compared with           case      floor   ratio   target  spread  verdict")
    results, missed = {}, []
    for name in args.only or CASES:
        with tempfile.TemporaryDirectory() as folder:
            options = {"--measure": name, "--to": f"{folder}/x", "--repeats": args.repeats, "--threads": args.threads}
            words = [str(word) for option, value in options.items() if value for word in (option, value)]
            subprocess.run([sys.executable, __file__, *words], check=True)
            results[name] = json.loads(Path(folder, "x").read_text())
        (_, mine), *others = results[name]["seconds"].items()
        for label, floor in others:
            target = CASES[name][1][label]
            case_ms, floor_ms = (1000 * statistics.median(values) for values in (mine, floor))
            ratio = case_ms / floor_ms
            quarters = statistics.quantiles([a / b for a, b in zip(mine, floor, strict=True)], n=4)
            verdict = "-" if target is None else "ok" if ratio <= target else "MISSED"
            missed += [name] if verdict == "MISSED" else []
            print(
                f"{name:10} {label:17} {case_ms:7.1f} ms {floor_ms:7.1f} ms  {ratio:6.3f}  "
                f"{'-' if target is None else f'{target:.3f}':>7}  {quarters[2] - quarters[0]:6.3f}  {verdict}",
                flush=True,
            )
    args.save.mkdir(parents=True, exist_ok=True)
    write_json(args.save / "benchmark.json", results)
    env = next(iter(results.values()))["environment"]
    print(f"n = {args.repeats}, {env['threads']} threads, torch {env['torch']}; wrote {args.save / 'benchmark.json'}")
    if missed and args.check:
        sys.exit(1)


if __name__ == "__main__":
    run(main, parse_args())
