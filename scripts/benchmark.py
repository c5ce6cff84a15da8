"""How close each hot path comes to its floor, and how its cost grows: times within one run, on synthetic data.

    python scripts/benchmark.py
    python scripts/benchmark.py --quick
    python scripts/benchmark.py --only fisher64 --repeats 15
    python scripts/benchmark.py --scaling --threads 1
    python scripts/benchmark.py --networks torchvision:resnet18 timm:vit_tiny_patch16_224 --threads 1 --repeats 3

Each case runs in its own process. A case and what it is compared with take turns, so that a noisy machine affects
both; the ratio is that of the medians. Prints a table and writes benchmark.json under --save, where cases of an earlier
call that were not run again stay. With --check the exit status is 1 if a ratio, or a peak memory that has a limit,
misses its target.

--scaling times each part at three sizes instead, and fits the exponent p of time ~ size^p; docs/SPEED.md says what to
expect and why.

--networks prints a table of what the sharpness scores of any networks cost, at batches of 16 colour images of 64x64
pixels and 10 classes, against training passes of the same images, and their largest deviation from one pass a sample.

--pipeline times whole commands by turns, as a user gives them: main.py for SharpBalance, SAM and late SharpBalance
against three plain trainings in one process and against the plain program of scripts/pipeline.py. Each round is kept in
pipeline.json under --save, and rounds of another call on the same commit and machine are added to it.

    python scripts/benchmark.py --pipeline width8 --repeats 5
    python scripts/benchmark.py --pipeline width8 --arms diversity passes
"""

import argparse
import io
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import main as main_script
import measure_diversity
from models import create_model
from sam import SAM
from scripts import pipeline
from scripts.passes import Timed, forward_backward, seconds_of
from scripts.pipeline import PilDataset
from tests.reference import fisher_by_samples, fisher_by_vmap, simulate_sam_step_by_step
from utils import cli
from utils.checkpoint import pack_checkpoint
from utils.data import Data, ImageSet
from utils.datasets import DATASETS
from utils.distributed import cores, start_device
from utils.files import load_array, load_json, write_atomically, write_json
from utils.fisher import per_sample_fisher
from utils.folder import read_images
from utils.hessian import HessianOperator
from utils.member import Member
from utils.partition import sharpness_aware_masks
from utils.run import Run, environment
from utils.sharpness import worst_case_sharpness
from utils.theory import simulate_sam
from utils.training import predict, sharpbalance_step, train_epoch


def network(width: int) -> torch.nn.Module:
    """ResNet-18 for 32x32 colour images, in the memory format of training."""
    torch.manual_seed(0)
    return create_model("resnet18", 10, width).to(memory_format=torch.channels_last)


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and labels."""
    images = torch.randn(size, 3, 32, 32).to(memory_format=torch.channels_last)
    return images, torch.randint(0, 10, (size,))


def training_pass(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """One pass in train mode of a network that is in eval mode before and afterwards."""
    model.train()
    forward_backward(model, images, labels)
    model.eval()


def fisher(width: int, size: int = 128) -> Timed:
    """Scores of one batch, against one forward-backward pass of it and against chunked vmap."""
    model, (images, labels) = network(width), batch(size)
    model.eval()
    return {
        "per_sample_fisher": lambda: per_sample_fisher(model, images, labels),
        "forward-backward": lambda: training_pass(model, images, labels),
        "vmap": lambda: fisher_by_vmap(model, images, labels),
    }


def scores_of(name: str, size: int = 16) -> Timed:
    """Scores of one batch of images of 64x64 for a network of any kind, against a training pass and one by one."""
    torch.manual_seed(0)
    model = create_model(name, 10, image_size=64).to(memory_format=torch.channels_last).eval()
    images = torch.randn(size, 3, 64, 64).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (size,))

    def one_by_one() -> torch.Tensor:
        return fisher_by_samples(model, images, labels)

    error = ((per_sample_fisher(model, images, labels) - one_by_one()).abs() / one_by_one()).max().item()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name:38} {parameters / 1e6:8.1f} {error:10.1e}", end="  ", flush=True)
    return {
        "forward-backward": lambda: training_pass(model, images, labels),
        "per_sample_fisher": lambda: per_sample_fisher(model, images, labels),
        "one by one": one_by_one,
    }


def networks(args: argparse.Namespace) -> dict:
    """Print a line for each network: its size, error, pass, and what its scores cost. Returns what was measured."""
    print(f"{'network':38} {'M param.':>8} {'error':>10}  {'pass, ms':>8}  scores/pass  one by one/pass  peak MiB")
    results = {}
    for name in args.networks:
        results[name] = in_a_process(name, args)
        ms, scores, loop = (1000 * statistics.median(v) for v in results[name]["seconds"].values())
        memory = f"{results[name]['peak_memory_mib']:8.0f}"
        print(f"{ms:8.1f}  {scores / ms:11.2f}  {loop / ms:15.2f}  {memory}", flush=True)
    return results


def in_a_process(name: str, args: argparse.Namespace) -> dict:
    """What `measure` returns of a case or a network, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"--measure": name, "--to": f"{folder}/x", "--repeats": args.repeats, "--threads": args.threads}
        options["--device"] = args.device
        words = [str(word) for option, value in options.items() if value for word in (option, value)]
        subprocess.run([sys.executable, "-W", "ignore", __file__, *words], check=True)
        return load_json(Path(folder, "x"))


def step(share: float, width: int = 16, size: int = 128) -> Timed:
    """A SharpBalance step with this share of SAM samples, against the passes that it cannot do without."""
    model, (images, labels) = network(width), batch(size)
    optimizer = SAM(model.parameters(), rho=0.1, lr=1e-3, momentum=0.9, weight_decay=5e-4)
    mask = torch.arange(size, device="cpu") < round(size * share)
    parts = [part.to(images.device) for part in (~mask, mask, mask) if part.any()]
    copies = [(images[part], labels[part]) for part in parts]

    def passes() -> None:
        for part_images, part_labels in copies:
            forward_backward(model, part_images, part_labels)

    return {
        "sharpbalance_step": lambda: sharpbalance_step(model, optimizer, images, labels, mask),
        "passes": passes,
    }


def loading() -> Timed:
    """An epoch of augmented batches, against a torchvision DataLoader with 2 workers and a copy of the same bytes."""
    data = synthetic(10_000)
    options = {"shuffle": True, "num_workers": 2, "persistent_workers": True}
    loader = torch.utils.data.DataLoader(PilDataset(data), 128, **options)
    source = [torch.randn(min(128, len(data) - i), 3, 32, 32) for i in range(0, len(data), 128)]
    epochs = iter(range(10**9))

    def ours() -> None:
        for _ in data.epoch(13, next(epochs), 128):
            pass

    def torchvision() -> None:
        for _ in loader:
            pass

    return {
        "ImageSet.epoch": ours,
        "DataLoader": torchvision,
        "copy": lambda: [tensor.clone() for tensor in source],
    }


def mapped() -> Timed:
    """An epoch of augmented batches from a memory map that the system has in memory, against an ImageSet in memory."""
    memory, file, epochs = synthetic(10_000), tempfile.NamedTemporaryFile(), iter(range(10**9))  # noqa: SIM115
    np.save(file, memory.images.numpy())
    rows, labels = np.arange(len(memory)), memory.labels.numpy()
    ours = ImageSet(load_array(Path(file.name)), labels, memory.preprocessing, memory.device, rows)

    def run(data: ImageSet) -> None:
        assert file  # which lives as long as this function
        for _ in data.epoch(13, next(epochs), 128):
            pass

    return {"memory-mapped": lambda: run(ours), "in memory": lambda: run(memory)}


def decoding() -> Timed:
    """A folder of JPEG and PNG of 400x300 to 64x64 pixels, against a bare loop, with Pillow, over one core's share."""
    place, random = tempfile.TemporaryDirectory(), np.random.RandomState(0)
    paths = [Path(place.name, "ab"[i % 2], f"{i:05d}.{('jpg', 'png')[i // 2 % 2]}") for i in range(4800)]
    for i, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        if i < 240:
            picture = Image.fromarray(random.randint(0, 256, (30, 40, 3), dtype=np.uint8))
            picture.resize((400, 300), Image.Resampling.BICUBIC).save(path)
        else:
            os.link(paths[i % 240], path)

    def ours() -> None:
        shutil.rmtree(Path(place.name, ".decoded"), ignore_errors=True)
        with redirect_stderr(io.StringIO()):
            read_images(Path(place.name), 64, cores())

    def bare() -> None:
        for path in paths[: len(paths) // cores()]:
            with Image.open(path) as picture:
                np.asarray(picture.crop((50, 0, 350, 300)).resize((64, 64), Image.Resampling.BILINEAR))

    return {"read_images": ours, "Pillow loop": bare}


def synthetic(images: int) -> ImageSet:
    """Random pictures in the form of CIFAR-10."""
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
    labels, device = random.integers(0, 10, images), torch.get_default_device()
    return ImageSet(pictures, labels, DATASETS["cifar10"].preprocessing, device)


def epoch(width: int) -> Timed:
    """An epoch of main.py with data, sums, validation, line and checkpoint, against bare passes on fixed batches."""
    parts = synthetic(2560), synthetic(256), synthetic(2)
    record = {"sha256_of_arrays_and_split": ""}
    data = Data("cifar10", DATASETS["cifar10"], *parts, mislabelled=np.zeros(2560, dtype=bool), record=record)
    folder, silence = tempfile.TemporaryDirectory(), redirect_stdout(io.StringIO())
    words = ["--data", "cifar10", "--width", str(width), "--epochs", "1000", "--lr", "0.001", "--seed", "13"]
    args = main_script.parse_args([*words, "--save_path", folder.name])
    member = Member(Run(main_script.settings_of(args), data), 13)
    with silence:
        member.run.progress.expect(member.passes_left)
    model, (images, labels), (others, _) = network(width), batch(128), batch(256)
    bare = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def ours() -> None:
        assert Path(folder.name).is_dir()  # which is removed with the object
        with silence:
            member.train_epoch()

    def passes() -> None:
        model.train()
        for _ in range(len(data.train) // 128):
            forward_backward(model, images, labels)
            bare.step()
        with torch.inference_mode():
            model.eval()(others)

    return {"epoch of main.py": ours, "passes": passes}


def epochs(samples: int = 512, members: int = 1, count: int = 1) -> Timed:
    """Epochs of members of width 8 in turn, without SAM."""
    data, models = synthetic(samples), [network(8) for _ in range(members)]
    optimizers = [SAM(model.parameters(), rho=0.1, lr=1e-3) for model in models]
    mask = torch.zeros(samples, dtype=torch.bool, device="cpu")

    def train() -> None:
        for epoch in range(count):
            for model, optimizer in zip(models, optimizers, strict=True):
                train_epoch(model, optimizer, data, mask, 13, epoch, 128)

    return {"train_epoch": train}


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


def worst_case(maximiser: str, norm: str, iterations: int = 10, batches: int = 1, width: int = 64) -> Timed:
    """Worst-case sharpness of batches of 5, against as many forward-backward passes."""
    model, data = network(width).eval(), [batch(5) for _ in range(batches)]
    rho = 0.5 if norm == "l2" else 0.01

    def passes() -> None:
        for images, labels in data * (iterations + 1):
            loss = F.cross_entropy(model(images), labels)
            torch.autograd.grad(loss, list(model.parameters()))

    def ours() -> None:
        worst_case_sharpness(model, data, rho, norm, n_iters=iterations, maximiser=maximiser)

    return {"worst_case_sharpness": ours, "passes": passes}


def hessian(samples: int = 128, size: int = 128) -> Timed:
    """A product of the Hessian with a vector, against one forward-backward pass of its images."""
    model, data = network(16).eval(), [batch(size) for _ in range(samples // size)]
    operator = HessianOperator(model, data)
    vector = torch.randn(operator.size)

    def passes() -> None:
        for images, labels in data:
            forward_backward(model, images, labels)

    return {"HessianOperator": lambda: operator @ vector, "forward-backward": passes}


def prediction(samples: int = 2048) -> Timed:
    """The pass that all metrics of diversity derive from, against forward passes alone."""
    data, model = synthetic(samples), network(16).eval()
    images = data.normalise(torch.zeros(512, 32, 32, 3, dtype=torch.uint8))

    @torch.inference_mode()
    def passes() -> None:
        for _ in range(samples // 512):
            model(images)

    return {"predict": lambda: predict(model, data), "passes": passes}


def random_logits(members: int, samples: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of members that agree for the most part, and labels."""
    generator = torch.Generator().manual_seed(0)
    shared = 3 * torch.randn(samples, classes, generator=generator)
    logits = shared + torch.randn(members, samples, classes, generator=generator)
    return logits, shared.argmax(dim=1)


def part_metrics(logits: torch.Tensor, labels: torch.Tensor) -> dict:
    """All metrics that measure_diversity.py computes of one part by default, with their resamples."""
    args = measure_diversity.parse_args(["--resume", "unused"])
    temperatures = {"members": [1.0] * len(logits), "ensemble": 1.0}
    _, columns, gaps = measure_diversity.measure_part(args, logits, labels, [], temperatures)
    return measure_diversity.resample(args.bootstrap, columns, gaps)


def metrics(members: int = 3, samples: int = 10_000, classes: int = 100) -> Timed:
    """The metrics of one of 75 corrupted parts, 3 x 10,000 x 100, from logits; against reading the file of the logits.

    75 parts in turn are 3 x 750,000 x 100; no more than one is in memory.
    """
    logits, labels = random_logits(members, samples, classes)
    file = io.BytesIO()
    np.savez(file, logits=logits.numpy())

    def read() -> None:
        file.seek(0)
        np.load(file)["logits"].sum()

    return {"metrics": lambda: part_metrics(logits, labels), "reading": read}


def diversity() -> Timed:
    """All of measure_diversity.py for 3 members on one part of 10,000 images, against the forward passes alone."""
    data, members = synthetic(10_000), [network(16).eval() for _ in range(3)]
    images = data.normalise(torch.zeros(512, 32, 32, 3, dtype=torch.uint8))

    def ours() -> None:
        part_metrics(torch.stack([predict(model, data)[0] for model in members]), data.labels)

    @torch.inference_mode()
    def passes() -> None:
        for model in members:
            for start in range(0, len(data), 512):
                model(images[: len(data) - start])

    return {"passes and metrics": ours, "passes": passes}


def partition(members: int = 9, samples: int = 1_000_000) -> Timed:
    """The sets of all members, against a partition of each member's scores."""
    scores = np.random.default_rng(0).random((members, samples)).astype(np.float32)
    return {
        "sharpness_aware_masks": lambda: sharpness_aware_masks(scores, 0.5),
        "np.partition": lambda: [np.partition(row, len(row) // 2) for row in scores],
    }


def theory(d: int = 150, data_sets: int = 10, members: int = 100) -> Timed:
    """One point of the SAM simulation, against explicit matrices and steps, of a fiftieth of the members."""
    setting = {"eta": 0.01, "rho": 0.1, "k": 3, "rho0": 0.01}
    more = {"n": 20 * d, "d": d, "sigma2": 0.1, "w_norm": 3.9215, "n_data": data_sets, "n_init": members}
    random = np.random.default_rng(0)

    def explicit() -> None:
        for _ in range(data_sets):
            data, teacher = random.standard_normal((20 * d, d)) / math.sqrt(d), random.standard_normal(d)
            starts = math.sqrt(more["sigma2"]) * random.standard_normal((members // 50, d))
            simulate_sam_step_by_step(data, teacher, starts, **setting)

    return {"simulate_sam": lambda: simulate_sam(**setting, **more), "explicit, 2 %": explicit}


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
    "optimizer": (optimizer, {"copy": 1.5}),
    "checkpoint": (checkpoint, {"writing": None}),
    "loading": (loading, {"DataLoader": 1 / 15, "copy": 4}),
    "mapped": (mapped, {"in memory": 1 / 0.8}),
    "decoding": (decoding, {"Pillow loop": 1 / 0.9}),
    "apgd-l2": (lambda: worst_case("apgd", "l2"), {"passes": 1.2}),
    "apgd-linf": (lambda: worst_case("apgd", "linf"), {"passes": 1.15}),
    "tight-l2": (lambda: worst_case("tight", "l2"), {"passes": 1.2}),
    "tight-linf": (lambda: worst_case("tight", "linf"), {"passes": 1.15}),
    "hessian": (hessian, {"forward-backward": 3.5}),
    "predict": (prediction, {"passes": 1.05}),
    "diversity": (diversity, {"passes": 1.1}),
    "metrics": (metrics, {"reading": 3}),
    "partition": (partition, {"np.partition": 2}),
    "theory": (theory, {"explicit, 2 %": 1}),
}
MAX_MEMORY = {"metrics": 1024}  # MiB
# part: (what grows, three sizes, the case of a size, the exponent to expect)
SCALING: dict[str, tuple[str, tuple[float, ...], Callable[[Any], Timed], str]] = {
    "training by N": ("samples", (512, 1024, 2048), epochs, "1"),
    "training by M": ("members", (1, 2, 4), lambda m: epochs(members=m), "1"),
    "training by E": ("epochs", (1, 2, 4), lambda e: epochs(count=e), "1"),
    "step by 1 + s": ("passes", (1.25, 1.5, 2.0), lambda passes: step(passes - 1, 16, 64), "1"),
    "normal step": ("width", (16, 32, 64), lambda width: step(0.0, width, 64), "1 to 2"),
    "step, half SAM": ("width", (16, 32, 64), lambda width: step(0.5, width, 64), "1 to 2"),
    "scores": ("width", (16, 32, 64), lambda width: fisher(width, 64), "1 to 2"),
    "predictions": ("samples", (512, 1024, 2048), prediction, "1"),
    "sharpness by n": ("batches", (2, 4, 8), lambda n: worst_case("tight", "l2", 10, n, 16), "1"),
    "sharpness by i": ("iterations", (5, 10, 20), lambda i: worst_case("tight", "l2", i, 2, 16), "1"),
    "Hessian product": ("samples", (64, 128, 256), lambda n: hessian(n, 64), "1"),
    "partition by N": ("samples", (100_000, 300_000, 1_000_000), lambda n: partition(9, n), "1"),
    "partition by M": ("members", (10, 30, 100), lambda m: partition(m, 100_000), "1"),
    "metrics by N": ("samples", (2500, 5000, 10_000), lambda n: metrics(3, n, 10), "1"),
    "metrics by C": ("classes", (10, 30, 100), lambda c: metrics(3, 10_000, c), "0 to 1"),
    "metrics by M": ("members", (2, 4, 8), lambda m: metrics(m, 2000, 10), "up to 2^M, at most 200 a size"),
    "theory": ("dimension", (75, 150, 300), theory, "1 to 2"),
}
# What does not run on a GPU, or compares with a part that does not.
CPU_ONLY = ("checkpoint", "loading", "mapped", "decoding", "diversity", "metrics", "partition", "theory")
SLOW = ("fisher64", "apgd-l2", "apgd-linf", "tight-l2", "tight-linf")  # width 64, half a minute and more each


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__)
    cli.add_flag(parser, "scaling", "time each part at three sizes instead")
    # Names may hold commas.
    text = (
        f"what to run (default: all) of the cases {'; '.join(CASES)}; with --scaling of the parts {'; '.join(SCALING)}"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help=text)
    cli.add_option(parser, "repeats", "timed repeats of each function", cli.number(int, 3), "N", default=9)
    cli.add_flag(parser, "quick", "3 repeats, without the slow cases of width 64: two minutes")
    cli.add_option(parser, "threads", "CPU threads (default: one for each core)", cli.COUNT, "N")
    text = "where the cases run; targets are those of the CPU, and cases of the CPU alone are left out elsewhere"
    cli.add_choice(parser, "device", text, ("cpu", "cuda", "mps"), default="cpu")
    cli.add_option(parser, "save", "folder of the JSON", cli.path, "DIR", default=Path("runs/benchmark"))
    cli.add_flag(parser, "check", "exit with status 1 if a ratio misses its target")
    text = "the cost of these networks' scores instead"
    parser.add_argument("--networks", type=cli.network, nargs="+", metavar="NAME", help=text)
    parser.add_argument("--pipeline", choices=pipeline.SETTINGS, nargs="+", help="time whole commands of these instead")
    text = "with --pipeline: what to time (default: %(default)s)"
    parser.add_argument("--arms", choices=pipeline.ARMS, nargs="+", default=list(pipeline.BY_DEFAULT), help=text)
    cli.add_flag(parser, "busy", "with --pipeline: each command again beside a program that takes one core")
    cli.add_option(parser, "data_path", "of --pipeline: folder of the data sets", cli.path, "DIR", default=Path("data"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=cli.path, help=argparse.SUPPRESS)
    given, args = parser.parse_given(argv), parser.parse_args(argv)
    if not args.pipeline:
        cli.note_idle([name for name in ("arms", "busy", "data_path") if name in given], "without --pipeline")
    if args.scaling and args.device != "cpu":
        parser.error(f"--scaling: measured on the CPU, got --device {args.device}; leave one of the two out")
    known = SCALING if args.scaling else [n for n in CASES if args.device == "cpu" or n not in CPU_ONLY]
    unknown = next((name for name in args.only or () if name not in known), None)
    if unknown:
        parser.error(f"--only: expected some of {'; '.join(known)}, got '{unknown}'")
    if args.quick:
        args.repeats = 3
        args.only = args.only or [name for name in known if name not in SLOW]
    args.only = args.only or list(known)
    return args


def measure(name: str, repeats: int, threads: int | None, device_name: str) -> dict:
    """Run one case in this process: seconds of every repeat, and the peak memory of the process, or of the GPU."""
    device = start_device(device_name, threads)
    with device:  # where the case makes its tensors
        functions = CASES[name][0]() if name in CASES else scores_of(name)
    seconds = seconds_of(functions, repeats, device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return {"seconds": seconds, "peak_memory_mib": peak, "environment": environment(device)}


def scaling(args: argparse.Namespace) -> None:
    """Print a line for each part: its times at three sizes and the fitted exponent."""
    device = start_device("cpu", args.threads)
    print(f"{'part':16} {'grows':10} {'sizes and ms':52} exponent  expected")
    for name in args.only:
        what, sizes, case, expected = SCALING[name]
        medians = []
        for size in sizes:
            label, function = next(iter(case(size).items()))
            medians.append(statistics.median(seconds_of({label: function}, args.repeats, device)[label]))
        exponent = np.polyfit(np.log(sizes), np.log(medians), 1)[0]
        cells = ", ".join(f"{size}: {1000 * t:.1f}" for size, t in zip(sizes, medians, strict=True))
        print(f"{name:16} {what:10} {cells:52} {exponent:8.2f}  {expected}", flush=True)
    print(f"n = {args.repeats}, threads: {torch.get_num_threads()}, torch {torch.__version__}")


def rows_of(name: str, result: dict) -> list[tuple[str, bool]]:
    """The lines of a case, and whether each of them misses its target."""
    (_, mine), *others = result["seconds"].items()
    rows = []
    for label, floor in others:
        target = CASES[name][1][label] if result["environment"]["device"] == "cpu" else None
        case_ms, floor_ms = (1000 * statistics.median(values) for values in (mine, floor))
        ratio = case_ms / floor_ms
        quarters = statistics.quantiles([a / b for a, b in zip(mine, floor, strict=True)], n=4)
        missed = target is not None and ratio > target
        text = f"{name:10} {label:17} {case_ms:7.1f} ms {floor_ms:7.1f} ms  {ratio:6.3f}  "
        text += f"{'-' if target is None else f'{target:.3f}':>7}  {quarters[2] - quarters[0]:6.3f}  "
        rows.append((text + ("-" if target is None else "MISSED" if missed else "ok"), missed))
    if name in MAX_MEMORY:
        peak, limit = result["peak_memory_mib"], MAX_MEMORY[name]
        text = f"{name:10} {'peak memory':17} {peak:6.0f} MiB{'':32}{limit:4} MiB  "
        rows.append((text + ("MISSED" if peak > limit else "ok"), peak > limit))
    return rows


def main(args: argparse.Namespace) -> None:
    """Run the cases and print their table."""
    if args.measure:
        write_json(args.to, measure(args.measure, args.repeats, args.threads, args.device))
        return
    if args.scaling:
        scaling(args)
        return
    for setting in args.pipeline or ():
        found = pipeline.run(setting, args.arms, args.repeats, args.busy, args.data_path, args.save)
        print(*pipeline.table(setting, found["rounds"]), sep="\n")
    if args.pipeline:
        return
    results, any_missed = networks(args) if args.networks else {}, False
    if not args.networks:
        print("case       compared with           case      floor   ratio   target  spread  verdict")
    for name in () if args.networks else args.only:
        results[name] = in_a_process(name, args)
        for text, missed in rows_of(name, results[name]):
            print(text, flush=True)
            any_missed |= missed
    args.save.mkdir(parents=True, exist_ok=True)
    file = args.save / "benchmark.json"
    write_json(file, (load_json(file) if file.is_file() else {}) | results)
    env = next(iter(results.values()))["environment"]
    print(f"n = {args.repeats}, threads: {env['threads']}, torch {env['torch']}; wrote {file}")
    if any_missed and args.check:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, parse_args())
