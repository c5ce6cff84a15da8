"""How near each hot path comes to its floor: times as ratios within one run, on synthetic data.

    python scripts/benchmark.py
    python scripts/benchmark.py --quick
    python scripts/benchmark.py --only fisher64 --repeats 15

Each case runs in a process of its own. The case and what it is compared with take turns, so that a noisy machine hits
both; the ratio is that of the medians. Prints a table and writes benchmark.json under --save, where cases of an earlier
call that were not run again stay. With --check the exit
status is 1 if a ratio, or the peak memory where it has a limit, misses its target.
"""

import argparse
import io
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

import main as main_script
import measure_diversity
from models import create_model
from sam import SAM
from utils.checkpoint import load_json, pack_checkpoint, write_atomically, write_json
from utils.cli import Parser, add_flag, number, run, start_device
from utils.data import DATASETS, Data, ImageSet
from utils.ensemble import Signals, _open_member, _Progress, _train_one_epoch, environment
from utils.fisher import per_sample_fisher
from utils.hessian import HessianOperator
from utils.metrics import bootstrap_weights
from utils.partition import sharpness_aware_masks
from utils.predictions import forward
from utils.sharpness import worst_case_sharpness
from utils.theory import simulate_sam
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


def synthetic(images: int) -> ImageSet:
    """Random pictures in the form of CIFAR-10."""
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
    return ImageSet(pictures, random.integers(0, 10, images), DATASETS["cifar10"])


def epoch(width: int) -> Timed:
    """An epoch of main.py with data, sums, validation, line and checkpoint, against bare passes on fixed batches."""
    data = Data(
        "cifar10", DATASETS["cifar10"], synthetic(2560), synthetic(256), synthetic(2), np.zeros(2560, dtype=bool)
    )
    data.record = {"sha256_of_arrays_and_split": ""}
    folder, silence = tempfile.TemporaryDirectory(), redirect_stdout(io.StringIO())
    words = ["--data", "cifar10", "--width", str(width), "--epochs", "1000", "--lr", "0.001", "--seed", "13"]
    args = main_script.parse_args([*words, "--save_path", folder.name])
    member, signals = _open_member(args, data, 13), Signals()
    with silence:
        progress = _Progress([member], args, len(data.train))
    model, (images, labels), (others, _) = network(width), batch(128), batch(256)
    bare = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def ours() -> None:
        assert Path(folder.name).is_dir()  # which is removed with the object
        with silence:
            _train_one_epoch(args, data, member, progress, signals)

    def passes() -> None:
        model.train()
        for _ in range(len(data.train) // 128):
            forward_backward(model, images, labels)
            bare.step()
        with torch.inference_mode():
            model.eval()(others)

    return {"epoch of main.py": ours, "passes": passes}


def optimizer() -> Timed:
    """What SAM itself does at a step, against a copy of as many bytes as it cannot do without."""
    model = network(64)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    sam = SAM(model.parameters(), rho=0.1, lr=0.0)
    size = sum(p.numel() for p in model.parameters())
    a, b = torch.randn(size), torch.empty(size)

    def ours() -> None:
        sam.first_step()
        sam.restore()

    def copies() -> None:
        # Read g for the norm; read w, write its copy; read g and w, write w + eps; read the copy, write w: 8 arrays.
        for _ in range(4):
            b.copy_(a)

    return {"first_step, restore": ours, "copy": copies}


def worst_case(maximiser: str, norm: str, iterations: int = 10) -> Timed:
    """Worst-case sharpness of one batch of 5, against as many forward and backward passes."""
    model, (images, labels) = network(64).eval(), batch(5)
    images = images.contiguous(memory_format=torch.channels_last)
    rho = 0.5 if norm == "l2" else 0.01

    def passes() -> None:
        for _ in range(iterations + 1):
            loss = F.cross_entropy(model(images), labels)
            torch.autograd.grad(loss, list(model.parameters()))

    def ours() -> None:
        worst_case_sharpness(model, [(images, labels)], rho, norm, n_iters=iterations, maximiser=maximiser)

    return {"worst_case_sharpness": ours, "passes": passes}


def hessian() -> Timed:
    """A product of the Hessian with a vector, against one forward and backward pass of its images."""
    model, (images, labels) = network(16).eval(), batch(128)
    operator = HessianOperator(model, [(images, labels)])
    vector = torch.randn(operator.size)
    return {
        "HessianOperator": lambda: operator @ vector,
        "forward-backward": lambda: forward_backward(model, images, labels),
    }


def prediction() -> Timed:
    """The pass that all measures of diversity come from, against forward passes alone."""
    data, model = synthetic(2048), network(16).eval()
    images = data.normalise(torch.from_numpy(np.zeros((512, 32, 32, 3), dtype=np.uint8)))

    @torch.inference_mode()
    def passes() -> None:
        for _ in range(4):
            model(images)

    return {"forward": lambda: forward(model, data, features=False), "passes": passes}


def random_logits(members: int, samples: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of members that agree for the most part, and labels."""
    generator = torch.Generator().manual_seed(0)
    shared = 3 * torch.randn(samples, classes, generator=generator)
    logits = shared + torch.randn(members, samples, classes, generator=generator)
    return logits, shared.argmax(dim=1)


def figures_of(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> dict:
    """All default figures of measure_diversity.py for one part."""
    args = measure_diversity.parse_args(["--resume", "unused"])
    temperatures = {"members": [1.0] * len(logits), "ensemble": 1.0}
    return measure_diversity.figures(args, logits, labels, [], temperatures, weights)


def metrics() -> Timed:
    """The figures of one of 75 corrupted parts, 3 x 10,000 x 100, from logits; against reading the file of the logits.

    75 parts one after another are 3 x 750,000 x 100; no more than one is in memory.
    """
    logits, labels = random_logits(3, 10_000, 100)
    weights, file = bootstrap_weights(10_000, 1000), io.BytesIO()
    np.savez(file, logits=logits.numpy())

    def read() -> None:
        file.seek(0)
        np.load(file)["logits"].sum()

    return {"figures": lambda: figures_of(logits, labels, weights), "reading": read}


def diversity() -> Timed:
    """All of measure_diversity.py for 3 members on one part of 10,000 images, against the forward passes alone."""
    data, members = synthetic(10_000), [network(16).eval() for _ in range(3)]
    images = data.normalise(torch.from_numpy(np.zeros((512, 32, 32, 3), dtype=np.uint8)))
    weights = bootstrap_weights(len(data), 1000)

    def ours() -> None:
        logits = [torch.from_numpy(forward(model, data, features=False)["logits"]) for model in members]
        figures_of(torch.stack(logits), data.labels, weights)

    @torch.inference_mode()
    def passes() -> None:
        for model in members:
            for start in range(0, len(data), 512):
                model(images[: len(data) - start])

    return {"passes and figures": ours, "passes": passes}


def partition() -> Timed:
    """The sets of 9 members of 1,000,000 samples, against a partition of each member's scores."""
    scores = np.random.default_rng(0).random((9, 1_000_000)).astype(np.float32)
    return {
        "sharpness_aware_masks": lambda: sharpness_aware_masks(scores, 0.5),
        "np.partition": lambda: [np.partition(row, len(row) // 2) for row in scores],
    }


def plain_sam_point(
    n: int, d: int, eta: float, rho: float, k: int, rho0: float, sigma2: float, w_norm: float, n_data: int, n_init: int
) -> float:
    """A point of the simulation the plain way: explicit matrices, all steps, 50 steps of projected gradient ascent."""
    total = 0.0
    for child in np.random.SeedSequence(0).spawn(n_data):
        random = np.random.default_rng(child)
        data = random.standard_normal((n, d)) / math.sqrt(d)
        gram = data.T @ data
        teacher = random.standard_normal(d)
        teacher *= w_norm / np.linalg.norm(teacher)
        # Rows of errors: the mean iterate's, then those of the members.
        starts = math.sqrt(sigma2) * random.standard_normal((n_init, d))
        errors = np.concatenate([np.zeros((1, d)), starts]) - teacher
        for _ in range(k):
            errors = errors - eta * (errors + rho * errors @ gram) @ gram
        gradients = errors @ gram
        moved = random.standard_normal(errors.shape)
        moved *= rho0 / 2 / np.linalg.norm(moved, axis=1, keepdims=True)
        for _ in range(50):
            moved = moved + 0.01 * (moved @ gram + gradients)
            moved *= np.minimum(rho0 / np.linalg.norm(moved, axis=1, keepdims=True), 1)
        total += ((gradients * moved).sum(axis=1) + ((moved @ gram) * moved).sum(axis=1) / 2).mean()
    return total / n_data


def theory() -> Timed:
    """One point of the SAM simulation, against explicit matrices, steps and projected gradient ascent."""
    setting = {"n": 3000, "d": 150, "eta": 0.01, "rho": 0.1, "k": 3, "rho0": 0.01, "sigma2": 0.1, "w_norm": 3.9215}
    setting |= {"n_data": 10, "n_init": 100}
    return {"simulate_sam": lambda: simulate_sam(**setting), "plain": lambda: plain_sam_point(**setting)}


def checkpoint() -> Timed:
    """What an epoch saves at width 64: packed with its checksum, written as last and as best; against writing alone."""
    model = network(64)
    sam = SAM(model.parameters(), lr=0.0, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    sam.base_optimizer.step()
    state = {"state_dict": model.state_dict(), "optimizer": sam.state_dict()}
    content, folder = pack_checkpoint(state), tempfile.TemporaryDirectory()

    def write(content: bytes) -> None:
        for name in ("last", "best"):
            write_atomically(Path(folder.name, name), content)

    return {"pack_checkpoint, write": lambda: write(pack_checkpoint(state)), "writing": lambda: write(content)}


_member: list[Callable[[], None]] = []  # of this process


def ten_steps(threads: int) -> None:
    """Ten steps of a member of width 8 with so many threads."""
    if not _member:
        start_device("cpu", threads)
        model, (images, labels) = network(8), batch(128)
        optimizer = SAM(model.parameters(), lr=1e-3, momentum=0.9)
        mask = torch.zeros(len(images), dtype=torch.bool)
        _member.append(lambda: sharpbalance_step(model, optimizer, images, labels, mask))
    for _ in range(10):
        _member[0]()


def jobs() -> Timed:
    """Members of one thread side by side, one for each core, against as many in turn with all threads."""
    count = torch.get_num_threads()
    pools = [ProcessPoolExecutor(1, get_context("spawn")) for _ in range(count)]

    def side_by_side() -> None:
        for member in [pool.submit(ten_steps, 1) for pool in pools]:
            member.result()

    def in_turn() -> None:
        for _ in range(count):
            ten_steps(count)

    return {"side by side": side_by_side, "in turn": in_turn}


# name: (case, {what it is compared with: target}). A target below 1 means: so many times faster.
CASES: dict[str, tuple[Callable[[], Timed], dict[str, float | None]]] = {
    "fisher64": (lambda: fisher(64), {"forward-backward": 1.05, "vmap": 1 / 5}),
    "fisher16": (lambda: fisher(16), {"forward-backward": 1.4, "vmap": 1 / 3.5}),
    "step0": (lambda: step(0.0), {"passes": 1.05}),
    "step30": (lambda: step(0.3), {"passes": 1.05}),
    "step60": (lambda: step(0.6), {"passes": 1.05}),
    "step100": (lambda: step(1.0), {"passes": 1.05}),
    "epoch8": (lambda: epoch(8), {"passes": 1.05}),
    "epoch16": (lambda: epoch(16), {"passes": 1.05}),
    "jobs": (jobs, {"in turn": None}),
    "optimizer": (optimizer, {"copy": 1.5}),
    "checkpoint": (checkpoint, {"writing": None}),
    "loading": (loading, {"DataLoader": 1 / 15, "copy": 4}),
    "apgd-l2": (lambda: worst_case("apgd", "l2"), {"passes": 1.2}),
    "apgd-linf": (lambda: worst_case("apgd", "linf"), {"passes": 1.15}),
    "tight-l2": (lambda: worst_case("tight", "l2"), {"passes": 1.2}),
    "tight-linf": (lambda: worst_case("tight", "linf"), {"passes": 1.15}),
    "hessian": (hessian, {"forward-backward": 3.5}),
    "predict": (prediction, {"passes": 1.05}),
    "diversity": (diversity, {"passes": 1.1}),
    "metrics": (metrics, {"reading": 3}),
    "partition": (partition, {"np.partition": 2}),
    "theory": (theory, {"plain": 1 / 10}),
}
MOST_MEMORY = {"metrics": 1024}  # MiB
SLOW = ("fisher64", "apgd-l2", "apgd-linf", "tight-l2", "tight-linf")  # width 64, half a minute and more each


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--only", choices=CASES, nargs="+", help="cases to run (default: all)")
    parser.add_argument("--repeats", type=number(int, 3), default=9, metavar="N", help="timed repeats of each function")
    add_flag(parser, "quick", "3 repeats, without the slow cases of width 64: two minutes")
    parser.add_argument("--threads", type=number(int, 1), metavar="N", help="CPU threads (default: one for each core)")
    parser.add_argument("--save", type=Path, default=Path("runs/benchmark"), metavar="DIR", help="folder of the JSON")
    add_flag(parser, "check", "exit with status 1 if a ratio misses its target")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats = 3
        args.only = args.only or [name for name in CASES if name not in SLOW]
    return args


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
        if name in MOST_MEMORY:
            peak = results[name]["peak_memory_mib"]
            verdict = "ok" if peak <= MOST_MEMORY[name] else "MISSED"
            missed += [name] if verdict == "MISSED" else []
            print(
                f"{name:10} {'peak memory':17} {peak:6.0f} MiB{'':32}{MOST_MEMORY[name]:4} MiB  {verdict}", flush=True
            )
    args.save.mkdir(parents=True, exist_ok=True)
    path = args.save / "benchmark.json"
    write_json(path, (load_json(path) if path.is_file() else {}) | results)
    env = next(iter(results.values()))["environment"]
    print(f"n = {args.repeats}, {env['threads']} threads, torch {env['torch']}; wrote {path}")
    if missed and args.check:
        sys.exit(1)


if __name__ == "__main__":
    run(main, parse_args())
