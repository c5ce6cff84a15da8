"""Write a saved ensemble as one file that needs none of this code: for ONNX, or for torch.export.load.

    python scripts/export.py --resume runs/digits_sharpbalance --to ensemble.onnx
    python scripts/export.py --resume runs/digits_sharpbalance --to ensemble.pt2

The file takes `images`, uint8 [N, H, W, C] for any N, and gives `probabilities` [N, C], `member_probabilities`
[M, N, C], `entropy` and `mutual_information` [N] (nats). Normalisation and temperature are inside, and the names of the
classes are in its metadata. It is compared with the ensemble, for 1 and for 7 images, before it is written.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "4000")  # before torch is loaded, whose threads otherwise wait at full speed

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import InputError, RunError, cli, first_line
from utils.files import refusing, write_atomically
from utils.inference import Ensemble, load_ensemble
from utils.run import find_checkpoints

OUTPUTS = ("probabilities", "member_probabilities", "entropy", "mutual_information")
METADATA = "metadata.json"  # within a .pt2
NEEDED = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".pt2": ()}
# What the exporter notes of the code that a step comes from: paths of this machine, which nobody else has a use for.
OF_THIS_MACHINE = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn")
BATCHES, TOLERANCE = (1, 7), 1e-5
TIMED, PAIRS = (1, 32), 10  # batches that are timed, and how often
MAX_ONNX = 2**31 - 2**20  # bytes that the format allows in one file

Run = Callable[[Tensor], list[Tensor]]  # what a file does with images


class Exported(nn.Module):
    """The ensemble as it is exported: tensors in, tensors out."""

    def __init__(self, ensemble: Ensemble):
        super().__init__()
        self.ensemble = ensemble

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """`Ensemble.of_pixels`, by the names of the file."""
        return self.ensemble.of_pixels(images)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__)
    cli.add_ensemble_options(parser)
    text = "file to write; its name ends in .onnx or .pt2"
    cli.add_option(parser, "to", text, cli.path, "FILE", required=True)
    cli.add_flag(parser, "timings", "also time the file against the members one by one, on this CPU")
    args = parser.parse_args(argv)
    if args.to.suffix not in NEEDED:
        parser.error(f"--to: expected a name that ends in .onnx or .pt2, got '{args.to.name}'")
    if args.to.is_dir() or not args.to.parent.is_dir():
        parser.error(f"--to {args.to}: expected a file in a folder that is there; name another")
    return args


def main(args: argparse.Namespace) -> None:
    """Export, compare and write."""
    for name in NEEDED[args.to.suffix]:
        try:
            __import__(name)
        except ImportError as error:
            way_out = f"install them by pip install {' '.join(NEEDED['.onnx'])}, or write a .pt2"
            raise InputError(f"--to {args.to}: {name} cannot be imported ({first_line(error)}); {way_out}") from error
    ensemble = load_ensemble(args.resume, "cpu", args.checkpoint, args.data, args.model)
    metadata = {
        "classes": json.dumps(ensemble.classes),
        "image_size": str(ensemble.image_size),
        "channels": str(ensemble.channels),
        "members": str(len(ensemble.members)),
        "temperature": repr(ensemble.temperature),
    }
    with quiet():
        program = traced(ensemble, args.to)
        content = as_pt2(program, metadata) if args.to.suffix == ".pt2" else as_onnx(program, metadata, args.to)
        with refusing(f"--to {args.to}: what was exported cannot be run", "write the other form, .pt2 or .onnx"):
            run = run_pt2(content) if args.to.suffix == ".pt2" else run_onnx(content)
            difference = largest_difference(ensemble, run)
    if not difference <= TOLERANCE:  # nan too
        problem = f"{args.to}: not written, since what it gives differs from the ensemble's by {difference:.1e}"
        raise RunError(f"{problem} (allowed: {TOLERANCE:g}); please report the network and the versions")
    write_atomically(args.to, content)
    checked = f"largest difference to the ensemble {difference:.1e}, for {' and '.join(map(str, BATCHES))} images"
    print(f"wrote {args.to} ({len(content) / 2**20:.1f} MiB, {len(ensemble.members)} members; {checked})")
    if args.timings:
        sizes = [member.stat().st_size for member in find_checkpoints(args.resume, args.checkpoint)]
        programs = ("torch", *(["onnxruntime"] if args.to.suffix == ".onnx" else []))
        versions = ", ".join(f"{name} {sys.modules[name].__version__}" for name in programs)
        print_timings(ensemble, run, sizes, len(content), versions)


@contextlib.contextmanager
def quiet():
    """Keep what torch's exporters print and log about their inner steps off the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def example(ensemble: Ensemble, count: int) -> Tensor:
    """Images uint8 [N, S, S, C]: smooth ones, noise, and both."""
    random, size = np.random.RandomState(count), ensemble.image_size
    slopes = np.linspace(0, 1, size)[:, None, None] * random.uniform(-1, 1, (count, 1, 1, ensemble.channels))
    noise = random.uniform(-1, 1, (count, size, size, ensemble.channels)) * random.uniform(0, 1, (count, 1, 1, 1))
    level = random.uniform(0, 255, (count, 1, 1, ensemble.channels))
    return torch.from_numpy(np.clip(level + 128 * slopes + 128 * noise, 0, 255).astype(np.uint8))


def traced(ensemble: Ensemble, path: Path) -> torch.export.ExportedProgram:
    """The graph of the ensemble, for any number of images.

    Raises:
        InputError: naming the reason for which a network cannot be exported.
    """
    batch = torch.export.Dim("batch")
    try:
        with torch.no_grad():
            module = Exported(ensemble).eval()
            program = torch.export.export(module, (example(ensemble, 2),), dynamic_shapes={"images": {0: batch}})
    except Exception as error:  # whatever a network of a library or of a user's file does
        reason = first_line(error)[:200]
        raise InputError(f"--to {path}: this network cannot be exported for any number of images ({reason})") from error
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if hasattr(graph, "graph") else ():
            for name in OF_THIS_MACHINE:
                node.meta.pop(name, None)
    return program


def as_pt2(program: torch.export.ExportedProgram, metadata: dict[str, str]) -> bytes:
    """The content of a .pt2 file."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA: json.dumps(metadata)})
    return buffer.getvalue()


def run_pt2(content: bytes) -> Run:
    """What a .pt2 file does."""
    module = torch.export.load(io.BytesIO(content)).module()
    return lambda images: list(module(images))


def as_onnx(program: torch.export.ExportedProgram, metadata: dict[str, str], path: Path) -> bytes:
    """The content of an ONNX file.

    Raises:
        InputError: if it is larger than the format allows, or if a network holds what ONNX does not know.
    """
    import onnx

    names = {"input_names": ["images"], "output_names": list(OUTPUTS)}
    try:
        found = torch.onnx.export(program, dynamo=True, verbose=False, **names)
        model = found.model_proto
    except Exception as error:
        raise InputError(f"--to {path}: cannot be written as ONNX ({first_line(error)[:200]}); write a .pt2") from error
    graph = model.graph
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in [*graph.input, *graph.output, *graph.value_info]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == symbol:
                dimension.dim_param = "batch"
    for part in [graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        del part.metadata_props[:]
    onnx.helper.set_model_props(model, metadata)
    if model.ByteSize() > MAX_ONNX:
        raise InputError(f"--to {path}: larger than 2 GiB, which one ONNX file cannot be; write a .pt2")
    return model.SerializeToString()


def run_onnx(content: bytes) -> Run:
    """What an ONNX file does in onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(one) for one in session.run(list(OUTPUTS), {"images": images.numpy()})]


def largest_difference(ensemble: Ensemble, run: Run) -> float:
    """The largest difference of any output to the ensemble's, for batches of `BATCHES` images."""
    differences = []
    for count in BATCHES:
        images = example(ensemble, count)
        found = ensemble(images)
        expected = found.probs, found.member_probs, found.entropy, found.mutual_information
        differences += [(a - b).abs().max() for a, b in zip(run(images), expected, strict=True)]
    return torch.stack(differences).max().item()


def print_timings(ensemble: Ensemble, run: Run, sizes: list[int], size: int, versions: str) -> None:
    """Size and time of the file, and of the members that torch evaluates one after the other, in turn."""
    members = f"members: {len(sizes)} files of {sum(sizes) / len(sizes) / 2**20:.1f} MiB"
    print(f"{members}; this file {size / 2**20:.1f} MiB; threads: {torch.get_num_threads()}, {versions}")
    for count in TIMED:
        images, times = example(ensemble, count), []
        for _ in range(PAIRS + 3):
            marks = [time.perf_counter()]
            for function in (ensemble, run):
                function(images)
                marks.append(time.perf_counter())
            times.append(1000 * np.diff(marks))
        low, middle, high = np.quantile(times[3:], (0.25, 0.5, 0.75), axis=0)  # the first ones compile kernels
        both = (f"{m:.2f} ms [{a:.2f}, {b:.2f}]" for a, m, b in zip(low, middle, high, strict=True))
        text = "batch of {}: members one by one {}, this file {} (median, quartiles of {} pairs)"
        print(text.format(count, *both, PAIRS))


if __name__ == "__main__":
    cli.run(main, parse_args())
