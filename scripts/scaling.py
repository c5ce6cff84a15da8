"""How the cost of each part grows: times at three sizes and the fitted exponents, on synthetic data.

    python scripts/scaling.py

For each part and each of its sizes: the median of --repeats timings, and the exponent p of time ~ size^p by least
squares on logarithms. docs/SCALING.md says what to expect and why.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from sam import SAM
from scripts.benchmark import batch, figures_of, network, random_logits, synthetic
from utils.cli import Parser, number, run, start_device
from utils.fisher import per_sample_fisher
from utils.hessian import HessianOperator
from utils.metrics import bootstrap_weights
from utils.partition import sharpness_aware_masks
from utils.predictions import forward
from utils.sharpness import worst_case_sharpness
from utils.theory import simulate_sam
from utils.training import sharpbalance_step, train_epoch


def epochs_of(samples: int = 512, members: int = 1, epochs: int = 1) -> Callable[[], object]:
    """Plain epochs at width 8 of members in turn."""
    data, models = synthetic(samples), [network(8) for _ in range(members)]
    optimizers = [SAM(model.parameters(), rho=0.1, lr=1e-3) for model in models]
    mask = torch.zeros(samples, dtype=torch.bool)

    def train() -> None:
        for epoch in range(epochs):
            for model, optimizer in zip(models, optimizers, strict=True):
                train_epoch(model, optimizer, data, mask, 13, epoch, 128)

    return train


def step_of(width: int, share: float = 0.0) -> Callable[[], object]:
    """A step on 64 images."""
    model, (images, labels) = network(width), batch(64)
    optimizer = SAM(model.parameters(), rho=0.1, lr=1e-3)
    mask = torch.arange(64) < 64 * share
    return lambda: sharpbalance_step(model, optimizer, images, labels, mask)


def scores_of(width: int) -> Callable[[], object]:
    """The scores of 64 samples."""
    model, (images, labels) = network(width).eval(), batch(64)
    return lambda: per_sample_fisher(model, images, labels)


def predictions_of(samples: int) -> Callable[[], object]:
    """The logits of one member at width 16."""
    data, model = synthetic(samples), network(16).eval()
    return lambda: forward(model, data, features=False)


def sharpness_of(batches: int, iterations: int) -> Callable[[], object]:
    """Worst-case sharpness at width 16, batches of 5."""
    model, data = network(16).eval(), [batch(5) for _ in range(batches)]
    return lambda: worst_case_sharpness(model, data, 0.5, n_iters=iterations)


def hessian_of(samples: int) -> Callable[[], object]:
    """A product with the Hessian at width 16."""
    operator = HessianOperator(network(16).eval(), [batch(64) for _ in range(samples // 64)])
    vector = torch.randn(operator.size)
    return lambda: operator @ vector


def partition_of(members: int, samples: int) -> Callable[[], object]:
    """The sets of all members."""
    scores = np.random.default_rng(0).random((members, samples), dtype=np.float32)
    return lambda: sharpness_aware_masks(scores, 0.5)


def metrics_of(members: int, samples: int, classes: int) -> Callable[[], object]:
    """All figures of diversity of one part."""
    logits, labels = random_logits(members, samples, classes)
    weights = bootstrap_weights(samples, 1000)
    return lambda: figures_of(logits, labels, weights)


def theory_of(d: int) -> Callable[[], object]:
    """A point of the simulation, at the same ratio n / d."""
    return lambda: simulate_sam(20 * d, d, 0.01, 0.1, 3, 0.01, 0.1, 1.0)


# part: (what grows, sizes, how a size becomes something to time, expected exponent)
PARTS: dict[str, tuple[str, tuple[float, ...], Callable[[Any], Callable[[], object]], str]] = {
    "training by N": ("samples", (512, 1024, 2048), epochs_of, "1"),
    "training by M": ("members", (1, 2, 4), lambda m: epochs_of(members=m), "1"),
    "training by E": ("epochs", (1, 2, 4), lambda e: epochs_of(epochs=e), "1"),
    "step by 1 + s": ("passes", (1.25, 1.5, 2.0), lambda passes: step_of(16, passes - 1), "1"),
    "plain step": ("width", (16, 32, 64), step_of, "1 to 2"),
    "step, half SAM": ("width", (16, 32, 64), lambda width: step_of(width, 0.5), "1 to 2"),
    "scores": ("width", (16, 32, 64), scores_of, "1 to 2"),
    "predictions": ("samples", (512, 1024, 2048), predictions_of, "1"),
    "sharpness by n": ("batches", (2, 4, 8), lambda n: sharpness_of(n, 10), "1"),
    "sharpness by i": ("iterations", (5, 10, 20), lambda i: sharpness_of(2, i), "1"),
    "Hessian product": ("samples", (64, 128, 256), hessian_of, "1"),
    "partition by N": ("samples", (100_000, 300_000, 1_000_000), lambda n: partition_of(9, n), "1"),
    "partition by M": ("members", (10, 30, 100), lambda m: partition_of(m, 100_000), "1"),
    "diversity by N": ("samples", (2500, 5000, 10_000), lambda n: metrics_of(3, n, 10), "1"),
    "diversity by C": ("classes", (10, 30, 100), lambda c: metrics_of(3, 10_000, c), "0 to 1"),
    "diversity by M": ("members", (2, 4, 8), lambda m: metrics_of(m, 2000, 10), "up to 2^M, at most 200 a size"),
    "theory": ("dimension", (75, 150, 300), theory_of, "1 to 2"),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--only", choices=PARTS, nargs="+", help="parts to time (default: all)")
    parser.add_argument("--repeats", type=number(int, 1), default=5, metavar="N", help="timings of each size")
    parser.add_argument("--threads", type=number(int, 1), metavar="N", help="CPU threads (default: one for each core)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Print a line for each part."""
    start_device("cpu", args.threads)
    print(f"{'part':16} {'grows':10} {'sizes and ms':52} exponent  expected")
    for name in args.only or PARTS:
        what, sizes, made, expected = PARTS[name]
        medians = []
        for size in sizes:
            function = made(size)
            function()
            seconds = []
            for _ in range(args.repeats):
                started = time.perf_counter()
                function()
                seconds.append(time.perf_counter() - started)
            medians.append(statistics.median(seconds))
        exponent = np.polyfit(np.log(sizes), np.log(medians), 1)[0]
        cells = ", ".join(f"{size}: {1000 * t:.1f}" for size, t in zip(sizes, medians, strict=True))
        print(f"{name:16} {what:10} {cells:52} {exponent:8.2f}  {expected}", flush=True)
    print(f"n = {args.repeats}, {torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    run(main, parse_args())
