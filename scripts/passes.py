"""Where the time of a training pass goes on a CPU, and what other forms of it take, by turns within one run.

    python scripts/passes.py --width 8 --threads 1

A pass is forward and backward of a batch through ResNet-18 on 32x32 grey images, as in training. Prints its arithmetic
beside that of a matrix product, the share of each operator, and the times of other forms: images in colour, the default
memory format, compiled by inductor (where there is a C++ compiler), evaluation in batches of several sizes, scores,
and, of several threads, with all of them on one core, as where other programs take the rest: how long threads wait for
one another at full speed, which GOMP_SPINCOUNT=TURNS says before the command, matters there.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from models import create_model
from utils import cli
from utils.distributed import start_device
from utils.fisher import per_sample_fisher
from utils.run import environment

# Functions that are timed by turns, by name; of a case of the benchmark the first is the case, the others what it is
# compared with.
Timed = dict[str, Callable[[], object]]
SIDE = 2048  # of the matrices of a product
EVALUATED = (128, 512, 2048)  # images at once


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__)
    cli.add_option(parser, "width", "of the network", cli.COUNT, "N", default=8)
    cli.add_option(parser, "batch_size", "images of a pass", cli.COUNT, "N", default=128)
    cli.add_option(parser, "threads", "CPU threads (default: one for each core)", cli.COUNT, "N")
    cli.add_option(parser, "repeats", "timed repeats of each form", cli.number(int, 3), "N", default=9)
    return parser.parse_args(argv)


def forward_backward(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One pass: the gradient of the mean loss in `.grad`."""
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()


def seconds_of(functions: Timed, repeats: int, device: torch.device) -> dict[str, list[float]]:
    """The seconds of every repeat of each function, by turns."""
    wait = (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize
    seconds: dict[str, list[float]] = {label: [] for label in functions}
    for repeat in range(repeats + 1):
        for label, function in functions.items():
            wait()
            started = time.perf_counter()
            function()
            wait()
            if repeat:  # the first round warms up
                seconds[label].append(time.perf_counter() - started)
    return seconds


def network(
    width: int, size: int, channels: int = 1, form: torch.memory_format = torch.channels_last
) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A network, images and labels, in a memory format."""
    torch.manual_seed(0)
    model = create_model("resnet18", 10, width, in_channels=channels).to(memory_format=form)
    return model, torch.randn(size, channels, 32, 32).to(memory_format=form), torch.randint(0, 10, (size,))


@torch.no_grad()
def evaluate(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """A forward pass in eval mode."""
    model.eval()(images)


def on_one_core(function: Callable[[], None]) -> None:
    """Call it with all threads of this process on one core."""

    def move(cores: set[int]) -> None:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), cores)

    cores = os.sched_getaffinity(0)
    move({min(cores)})
    try:
        function()
    finally:
        move(cores)


def shares(function: Callable[[], object]) -> None:
    """Print which share of its time each operator takes."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(9):
            function()
    operators = sorted(found.key_averages(), key=lambda one: -one.self_cpu_time_total)
    total = sum(one.self_cpu_time_total for one in operators)
    print("\noperator                            share")
    for one in operators[:6]:
        print(f"{one.key.removeprefix('aten::'):34} {100 * one.self_cpu_time_total / total:4.0f} %")
    print(f"{'all others':34} {100 * sum(one.self_cpu_time_total for one in operators[6:]) / total:4.0f} %")


def main(args: argparse.Namespace) -> None:
    """Time all forms by turns, and print the tables."""
    device = start_device("cpu", args.threads)
    width, size = args.width, args.batch_size
    own, matrix = network(width, size), torch.randn(SIDE, SIDE)

    def training(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
        return lambda: forward_backward(model.train(), images, labels)

    as_in_training = training(*own)
    forms: Timed = {
        "as in training": as_in_training,
        "matrix product": lambda: matrix @ matrix,
        "colour": training(*network(width, size, 3)),
        "default memory format": training(*network(width, size, form=torch.contiguous_format)),
        "scores": lambda: per_sample_fisher(own[0].eval(), *own[1:]),
        **{f"evaluation, {n} at once": partial(evaluate, *network(width, n)) for n in EVALUATED},
    }
    compiled = training(torch.compile(own[0]), *own[1:])
    started = time.perf_counter()
    try:
        compiled()
        forms["compiled"] = compiled
    except torch._dynamo.exc.TorchDynamoException as error:
        print(f"compiled: left out ({type(error).__name__})")
    first = time.perf_counter() - started
    with FlopCounterMode(display=False) as counter:
        as_in_training()
    times = seconds_of(forms, args.repeats, device)
    if torch.get_num_threads() > 1 and sys.platform == "linux":
        # After the others: threads that were moved together slow down what comes next.
        times |= seconds_of({"threads on one core": partial(on_one_core, as_in_training)}, args.repeats, device)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    product, whole = seconds.pop("matrix product"), seconds["as in training"]
    rates = 2 * SIDE**3 / product / 1e9, counter.get_total_flops() / whole / 1e9
    print(f"width {width}: {size / whole:.0f} images/s, {rates[1]:.0f} of {rates[0]:.0f} GFLOP/s of a matrix product")
    shares(as_in_training)
    print(f"\nform                     ms for {size} images   ratio")
    for name, found in seconds.items():
        if name.startswith("evaluation"):
            found *= size / int(name.split()[1])
        note = f"  (compiled in {first:.0f} s)" if name == "compiled" else ""
        print(f"{name:24} {1000 * found:17.1f} {found / whole:9.2f}{note}")
    print(f"n = {args.repeats}, threads: {environment(device)['threads']}, torch {torch.__version__}")


if __name__ == "__main__":
    cli.run(main, parse_args())
