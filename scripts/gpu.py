"""What only a GPU can show: its tests, every method with resuming on made-up images, speed and memory.

    bash scripts/gpu.sh
    python scripts/gpu.py --device cpu --images 100 --width 2

The second form tries the script itself: on the CPU there are the runs alone, without tests and benchmark. Images are
random, in CIFAR-10's own files, and as many as the GPU trains in about three minutes, at most 50,000. Every run has two
members and two epochs, is stopped in the second one by SIGTERM, and is resumed. Writes --save; "images_per_second" and
"img/s" are of the first epoch, in which samples are not split yet, of the faster member.
"""

import argparse
import itertools
import json
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import main as main_script
import measure_sharpness
from models import create_model
from sam import SAM
from scripts.passes import seconds_of
from tests.files import write_cifar
from utils import InputError, RunError, cli
from utils.capture import CapturedPasses
from utils.checkpoint import load_model
from utils.data import Data
from utils.datasets import load_data
from utils.distributed import start_device
from utils.ensemble import train_ensemble
from utils.files import load_json, write_json
from utils.fisher import per_sample_fisher
from utils.run import Run, Stopped, environment
from utils.training import predict, train_epoch

ROOT = Path(__file__).resolve().parent.parent
BALANCE = ["--sam", "--rho", "0.1", "--flat_ratio", "0.5", "--initial_epochs", "1"]
METHODS = {
    "deep ensemble": [],
    "SAM": ["--sam", "--rho", "0.1"],
    "SharpBalance (released)": BALANCE,
    "SharpBalance (paper)": [*BALANCE, "--partition", "paper"],
    "random sets": [*BALANCE, "--partition", "random"],
    "averaged weights": ["--average_from", "1"],
    "SharpBalance (released), bf16": [*BALANCE, "--amp", "bf16"],
}
PASSES = 45  # forward-backward passes of one image that these runs take together
SECONDS = 180  # for them
EPOCHS = 4  # after which sizes of parts that come up often have graphs
EPOCH_IMAGES = 6000  # that these are measured on, a tenth for validation
MEASURE = ["--mode", "all", "--batch_num", "4", "--n_draws", "10", "--hessian_samples", "512", "--probes", "5"]
MEASURE += ["--top_k", "1", "--ntk_samples", "20"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__)
    cli.add_choice(parser, "device", "where to compute", ("cuda", "cpu"), default="cuda")
    images = cli.number(int, 20, 50_000)
    cli.add_option(parser, "images", "training images, a tenth for validation (default: by speed)", images, "N")
    cli.add_option(parser, "width", "of the ResNet-18", cli.COUNT, "N", default=64)
    cli.add_option(parser, "save", "file of the results", cli.path, "FILE", default=Path("runs/gpu.json"))
    return parser.parse_args(argv)


def made_up(folder: Path, images: int, device: torch.device) -> Data:
    """Random images in CIFAR-10's files, read as any data set."""
    write_cifar(folder / "cifar10", images=-(-images // 5))
    return load_data("cifar10", folder, device)


def images_for(width: int, device: torch.device) -> int:
    """How many images the runs take in `SECONDS`, by the speed of a short one."""
    with tempfile.TemporaryDirectory() as name:
        found = train(["--width", width], made_up(Path(name), 5000, device), Path(name, "run"))
    return int(min(max(SECONDS / PASSES * found["images_per_second"], 1000), 50_000))


def train(words: list[Any], data: Data, folder: Path) -> dict[str, Any]:
    """One run that is stopped in its second epoch and resumed: speed and peak memory.

    Raises:
        RunError: if it was not stopped, or did not go on where it was.
    """
    common = ["--data", "cifar10", "--epochs", 2, "--lr", 0.01, "--seed", "13 17", "--save_path", folder]
    settings = main_script.settings_of(main_script.parse_args([str(word) for word in [*common, *words]]))
    if data.train.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run = Run(settings, data)
    advance = run.progress.advance

    def stop(passes: int) -> None:
        advance(passes)
        if run.progress.done > 1.5 * sum(run.progress.left.values()):  # 0.6 of all
            signal.raise_signal(signal.SIGTERM)

    run.progress.advance = stop
    try:
        train_ensemble(run)
        raise RunError(f"{folder}: was not stopped")
    except Stopped:
        pass
    if not list(folder.glob("seed_*/checkpoint_partial.pth.tar")):
        raise RunError(f"{folder}: saved nothing within an epoch")
    summary = train_ensemble(Run(settings, data))
    logs = [[json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("seed_*/log.jsonl")]
    if [len(log) for log in logs] != [2, 2]:
        raise RunError(f"{folder}: expected two members of two epochs, got {[len(log) for log in logs]}")
    first = [log[0] for log in logs]
    found = {
        "images_per_second": len(data.train) / min(line["seconds"] for line in first),  # the first also warms up
        "passes_per_image": 1 + first[0]["sam_share"],
        "train_loss": [[line["train_loss"] for line in log] for log in logs],
        "test_accuracy": summary["last"]["ensemble"]["test_acc"],
    }
    if data.train.device.type == "cuda":
        found["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
        free, total = torch.cuda.mem_get_info()
        found["taken_memory_mib"] = (total - free) / 2**20  # with what torch keeps, graphs and the driver's own
    return found


def epochs(data: Data, width: int) -> dict[str, dict[str, float]]:
    """Images a second of an epoch by kind and by how passes are launched, by turns; the last of `EPOCHS` of each."""
    found, samples = {}, len(data.train)
    for (kind, share), amp in itertools.product({"plain": 0, "half SAM": 0.5, "SAM": 1}.items(), ("none", "bf16")):
        mask = torch.rand(samples, generator=torch.Generator().manual_seed(0)) < share
        makers = {}
        for how in ("graphs", "graphs of any kernels", "single kernels"):
            model = create_model("resnet18", width=width, **data.info.network)
            model.to(data.train.device, memory_format=torch.channels_last)
            optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.01, momentum=0.9, weight_decay=5e-4)
            makers[how] = model, optimizer, None if how == "single kernels" else CapturedPasses(model, 129)
        row = {}
        for epoch in range(EPOCHS):
            for how, (model, optimizer, captured) in makers.items():
                torch.backends.cudnn.deterministic = how != "graphs of any kernels"
                started = time.perf_counter()
                train_epoch(model, optimizer, data.train, mask, 0, epoch, 128, amp=amp, captured=captured)
                row[how] = samples / (time.perf_counter() - started)  # an epoch ends with a number from the device
        torch.backends.cudnn.deterministic = True
        found[f"{kind}, {amp}"] = row
        print(f"{kind:8} {amp:4}" + "".join(f"  {how}: {value:.0f} images/s" for how, value in row.items()), flush=True)
    return found


def speeds(folder: Path, data: Data) -> dict[str, float]:
    """Images a second of scores and predictions, and the seconds of measure_sharpness.py, of one member."""
    device = data.train.device
    model = load_model(folder / "seed_13" / "checkpoint.pth.tar")[0].to(device, memory_format=torch.channels_last)
    images, labels = next(data.train.in_order(128))
    functions = {
        "scores": (lambda: per_sample_fisher(model, images, labels), len(images)),
        "predictions": (lambda: predict(model, data.val), len(data.val)),
    }
    seconds = seconds_of({name: function for name, (function, _) in functions.items()}, 3, device)
    found = {f"{name}_per_second": 3 * count / sum(seconds[name]) for name, (_, count) in functions.items()}
    started, save = time.perf_counter(), folder / "measured"
    words = ["--resume", folder / "seed_13", "--data_path", folder.parent, "--device", device.type, "--save", save]
    measure_sharpness.main(measure_sharpness.parse_args([*map(str, words), *MEASURE]))
    return found | {"measure_sharpness_seconds": time.perf_counter() - started}


def gpu_tests() -> dict[str, Any]:
    """The tests marked gpu: pytest's exit status and last line."""
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    print(ended.stdout)
    return {"status": ended.returncode, "summary": ended.stdout.strip().splitlines()[-1]}


def timed(folder: Path) -> dict[str, Any]:
    """The medians of the benchmark's quick cases, in milliseconds."""
    script = ROOT / "scripts" / "benchmark.py"
    subprocess.run([sys.executable, script, "--device", "cuda", "--quick", "--save", folder], check=True)
    found = load_json(folder / "benchmark.json")
    return {
        name: {
            "ms": {label: 1000 * statistics.median(times) for label, times in case["seconds"].items()},
            "peak_memory_mib": case["peak_memory_mib"],
        }
        for name, case in found.items()
    }


def main(args: argparse.Namespace) -> None:
    """Test, train, time, and write the results."""
    on_gpu = args.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise InputError("no GPU was found: torch.cuda.is_available() is False; --device cpu tries the script itself")
    device = start_device(args.device, None)
    args.save.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "finished": False}
    content["environment"] = environment(device)

    def keep(name: str, value: object) -> None:
        content[name] = value
        write_json(args.save, content)

    if on_gpu:
        about = torch.cuda.get_device_properties(device)
        keep("gpu", {"name": about.name, "memory_mib": about.total_memory / 2**20, "cuda": torch.version.cuda})
        keep("tests", gpu_tests())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = made_up(folder, args.images or images_for(args.width, device), device)
        keep("images", {"train": len(data.train), "val": len(data.val), "test": len(data.test)})
        if on_gpu:
            keep("epochs", epochs(made_up(folder / "epochs", EPOCH_IMAGES, device), args.width))
        runs = {}
        print("each run is stopped in its second epoch and resumed: lines that say so are meant")
        for i, (method, words) in enumerate(METHODS.items()):
            print(f"\n{method}", flush=True)
            runs[method] = train([*words, "--width", args.width], data, folder / str(i))
            keep("runs", runs)
        keep("speeds", speeds(folder / "0", data))
        if on_gpu:
            keep("benchmark", timed(folder / "benchmark"))
        keep("finished", True)
    print(f"\n{'method':30} {'img/s':>8}" + f" {'peak MiB':>9}" * on_gpu)
    for method, row in content["runs"].items():
        print(f"{method:30} {row['images_per_second']:8.0f}" + f" {row.get('peak_memory_mib', 0):9.0f}" * on_gpu)
    print(f"wrote {args.save}")
    if on_gpu and content["tests"]["status"]:
        raise RunError(f"tests marked gpu: {content['tests']['summary']}")


if __name__ == "__main__":
    cli.run(main, parse_args())
