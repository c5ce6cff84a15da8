"""Sharpness of the saved members of an ensemble.

    python measure_sharpness.py --resume runs/digits_sharpbalance --mode APGD_worst,fisher

APGD_worst: worst-case sharpness. APGD_average: average-case sharpness, by normal (l2) or uniform (linf) noise.
hessian_t, hessian_e: trace and largest eigenvalues of the Hessian. fisher: per-sample squared gradient norms. NTK:
log-determinant and condition of the neural tangent kernel. --protocol prints on what and how, and stops.

Writes sharpness.json under --save (default measurements/<run>), and each finished part of it under sharpness/, so that
a later call does not repeat it.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "4000")  # before torch is loaded, whose threads otherwise wait at full speed

import numpy as np
import torch
from tqdm import tqdm

from utils import InputError, cli
from utils.data import ImageSet
from utils.files import load_json, write_json
from utils.fisher import ntk_gram, per_sample_fisher
from utils.hessian import hessian_trace, matching_parameters, to_float64, top_eigenpairs
from utils.kept import made_by, why_stale
from utils.predictions import Measurement, SavedMember, measure_settings
from utils.results import standard_deviation
from utils.sharpness import MAXIMISERS, NORMS, average_sharpness, relative_sizes, worst_case_sharpness

MODES = ("APGD_worst", "APGD_average", "hessian_t", "hessian_e", "fisher", "NTK")
# What each mode depends on, beside the member and the data.
SUBSET = ("split", "subset_seed", "eval_batch_size", "batch_num")
PROTOCOL = {
    "APGD_worst": (*SUBSET, "rho0", "adaptive", "n_iters", "maximiser", "params"),
    "APGD_average": (*SUBSET, "rho0", "adaptive", "n_draws", "params"),
    "hessian_t": ("split", "subset_seed", "hessian_samples", "trace_method", "probes", "params"),
    "hessian_e": ("split", "subset_seed", "hessian_samples", "top_k", "params"),
    "fisher": SUBSET,
    "NTK": ("split", "subset_seed", "ntk_samples", "params"),
}
# By norm, where --rho0 is not given. At 0.5, the authors' for both, linf lets each weight change by half: 1e9 nats.
RADII = {"l2": 0.5, "linf": 0.01}
BATCH = 256  # of the modes whose value does not depend on it
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__)
    cli.add_measure_options(parser, parts=False)
    group = parser.add_argument_group("sharpness")
    group.add_argument("--mode", action=cli.Choices, among=MODES, default=["APGD_worst"], help="what to measure")
    cli.add_flag(group, "protocol", "print on what and how the modes measure, and stop")
    cli.add_choice(group, "split", "images, never augmented", ("train", "val", "test"), default="train")
    cli.add_option(group, "subset_seed", "seed of the images' order", cli.number(int, 0, 2**32 - 1), "N", default=13)
    text = "images a batch: the m of m-sharpness"
    group.add_argument("--eval_batch_size", "--eval_batch", type=cli.COUNT, default=5, metavar="M", help=text)
    cli.add_option(group, "batch_num", "batches, of the first images", cli.COUNT, "N", default=100)
    radius = cli.number(float, 0, open_low=True)
    text = "radius of the ball, for both norms (default: " + ", ".join(f"{r} for {n}" for n, r in RADII.items()) + ")"
    group.add_argument("--rho0", "--gamma", type=radius, metavar="R", help=text)
    group.add_argument("--norms", action=cli.Choices, among=NORMS, default=list(NORMS), help="of the ball")
    cli.add_flag(group, "adaptive", "ball relative to the size of each weight", default=True)
    cli.add_option(group, "n_iters", "iterations of APGD_worst", cli.COUNT, "N", default=20)
    cli.add_choice(group, "maximiser", "tight finds larger maxima; apgd is the authors'", MAXIMISERS, default="tight")
    cli.add_option(group, "n_draws", "perturbations of APGD_average", cli.number(int, 4), "N", default=100)
    cli.add_option(group, "hessian_samples", "images of the Hessian's loss", cli.COUNT, "N", default=4096)
    cli.add_choice(group, "trace_method", "estimator of hessian_t", ("hutchinson", "hutch++"), default="hutchinson")
    cli.add_option(group, "probes", "products with H of hessian_t", cli.number(int, 2), "N", default=30)
    cli.add_option(group, "top_k", "eigenvalues of hessian_e", cli.COUNT, "K", default=5)
    cli.add_option(group, "ntk_samples", "images of the NTK", cli.number(int, 2), "N", default=100)
    text = "only parameters whose names match (default: all; NTK: weight$); not in fisher"
    cli.add_option(group, "params", text, str, "REGEX")
    given, args = parser.parse_given(argv), parser.parse_args(argv)
    if args.n_draws % 2:
        parser.error(f"--n_draws: expected an even number, since draws come in pairs, got {args.n_draws}")
    if args.trace_method == "hutch++" and args.probes < 6:
        parser.error(f"--probes: expected 6 or more for hutch++, got {args.probes}")
    if args.params is not None and "fisher" in args.mode:
        parser.error("--params: has no effect on --mode fisher, which takes all parameters; leave one of the two out")
    used = {name for mode in args.mode for name in PROTOCOL[mode]}
    used |= {"norms"} if set(args.mode) & {"APGD_worst", "APGD_average"} else set()
    known = {"norms", *itertools.chain(*PROTOCOL.values())}
    cli.note_idle([name for name in given if name in known - used], f"on --mode {','.join(args.mode)}")
    return args


def main(args: argparse.Namespace) -> None:
    """Measure part by part, print a table, and write sharpness.json."""
    if args.protocol:
        print_protocol(args)
        return
    measurement = Measurement(measure_settings(args))
    members, images = measurement.members, getattr(measurement.data, args.split)
    for member in members:
        try:
            matching_parameters(member.model, args.params)
        except ValueError as error:
            raise InputError(f"--{error}") from error
    names = [name for mode in args.mode for name in part_names(mode, args.norms)]
    found: dict[str, dict[str, dict]] = {name: {} for name in names}
    todo, stale, digest = [], [], images.digest()
    for member, name in itertools.product(members, names):
        about = about_part(args, name, member, digest)
        path, part = find_part(measurement.settings.save / "sharpness" / member.digest[:16], about)
        why = None if part is None else why_stale(mode_of(name), part, measurement.environment)
        if part is None or why:
            todo.append((member, name, path, about))
            stale += [f"{path}: measured {why}"] if why else []
        else:
            found[name][member.digest] = part
    if stale:
        print(f"note: {stale[0]}; measured anew ({len(stale)} such parts)", file=sys.stderr)
    total = sum(passes_of(args, name, len(images)) for _, name, _, _ in todo)
    bar = tqdm(total=total, disable=not sys.stderr.isatty(), unit="pass", unit_scale=True, dynamic_ncols=True)

    def work(task: int, report: Callable[..., object]) -> None:
        member, name, path, about = todo[task]
        member.model.to(images.device, memory_format=torch.channels_last)
        done = 0

        def progress(passes: int) -> None:
            nonlocal done
            done += passes
            report("passes", passes)

        try:
            part = measure(args, name, member, images, progress)
        except ValueError as error:
            raise InputError(f"{name} of {member.path}: {error}") from error
        if part["value"] is not None and not math.isfinite(part["value"]):
            part["note"] = why_not_finite(args, name)
        part |= made_by(mode_of(name), measurement.environment)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"about": about, "result": part})
        report("passes", passes_of(args, name, len(images)) - done)
        report("part", task, part)

    def hear(kind: str, *values: Any) -> None:
        if kind == "passes":
            bar.update(*values)
            return
        member, name, *_ = todo[values[0]]
        found[name][member.digest] = values[1]
        measurement.write("sharpness.json", collect(args, members, names, found), vars(args), keep_parts)

    measurement.share(len(todo), work, hear)
    bar.close()
    path = measurement.write("sharpness.json", collect(args, members, names, found), vars(args), keep_parts)
    print_table(args, members, names, found)
    print(f"wrote {path}")


def mode_of(name: str) -> str:
    """The mode that a part belongs to."""
    return name.partition("-")[0]


def part_names(mode: str, norms: list[str]) -> list[str]:
    """The parts of a mode: one for each norm where there are norms."""
    return [f"{mode}-{norm}" for norm in norms] if mode.startswith("APGD") else [mode]


def about_part(args: argparse.Namespace, name: str, member: SavedMember, images: str) -> dict[str, Any]:
    """All that the value of a part depends on but what made it, which is with it; `images` is their digest."""
    return {"part": name, "weights": member.digest, "images": images, **protocol_of(args, name)}


def protocol_of(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The options that a part depends on; its radius, where none is given, is that of its norm."""
    mode, _, norm = name.partition("-")
    settings = {key: getattr(args, key) for key in PROTOCOL[mode]}
    if norm:
        settings["rho0"] = args.rho0 or RADII[norm]
    return settings


def find_part(folder: Path, about: dict[str, Any]) -> tuple[Path, dict | None]:
    """The file of a part, and what it holds already. What was measured by another protocol stays beside it."""
    path = folder / f"{about['part']}.json"
    if (part := read_part(path, about)) is None and path.exists():
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        path = folder / f"{about['part']}-{digest[:8]}.json"
        part = read_part(path, about)
    return path, part


def read_part(path: Path, expected: dict[str, Any]) -> dict | None:
    """A finished part, or None if it is missing, damaged or of another protocol."""
    try:
        content = load_json(path)
        result = content["result"] if content["about"] == expected else None
        return result if isinstance(result, dict) and isinstance(result["value"], float | None) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def passes_of(args: argparse.Namespace, name: str, samples: int) -> int:
    """Roughly how many passes of one image a part takes: what the bar counts."""
    subset = min(args.eval_batch_size * args.batch_num, samples)
    whole = min(args.hessian_samples, samples)
    return {
        "APGD_worst": subset * (args.n_iters + 1),
        "APGD_average": subset * args.n_draws // 2,
        "hessian_t": 3 * whole * args.probes,
        "hessian_e": 3 * whole * 10 * args.top_k,
        "fisher": subset,
        "NTK": 2 * min(args.ntk_samples, samples),
    }[mode_of(name)]


def measure(
    args: argparse.Namespace,
    name: str,
    member: SavedMember,
    images: ImageSet,
    progress: Callable[[int], object] = lambda passes: None,
) -> dict[str, Any]:
    """One part of one member; `progress` is called with the passes that were made."""
    model, (mode, _, norm) = member.model, name.partition("-")

    def batches(count: int, size: int = BATCH) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The first images of the shuffled split; all of them if there are fewer."""
        index = np.random.RandomState(args.subset_seed).permutation(len(images))[:count]
        return [images.batch(index[i : i + size]) for i in range(0, len(index), size)]

    count = args.eval_batch_size * args.batch_num
    if mode in ("APGD_worst", "APGD_average"):
        subset = batches(count, args.eval_batch_size)
        radius = protocol_of(args, name)["rho0"]
        common: dict[str, Any] = {"rho": radius, "norm": norm, "adaptive": args.adaptive, "params": args.params}
        if mode == "APGD_worst":
            each = args.eval_batch_size * (args.n_iters + 1)
            common |= {"n_iters": args.n_iters, "maximiser": args.maximiser}
            found = worst_case_sharpness(model, subset, progress=lambda: progress(each), **common)
        else:
            each = sum(len(labels) for _, labels in subset) // 2  # forward passes only
            found = average_sharpness(model, subset, n_draws=args.n_draws, progress=lambda: progress(each), **common)
        losses = found["loss_by_batch"]
        if mode == "APGD_average":  # to first order, as batches of other sizes move the mean more or less
            shares = relative_sizes([len(labels) for _, labels in subset])
            losses = [x + (share - 1) * (x - found["loss"]) for x, share in zip(losses, shares, strict=True)]
        spread = standard_deviation(losses)
        found["loss_standard_error_over_batches"] = None if spread is None else spread / len(subset) ** 0.5
        return {"value": found["loss"], **found, "images": sum(len(labels) for _, labels in subset)}
    if mode == "hessian_t":
        found = hessian_trace(model, batches(args.hessian_samples), args.probes, args.trace_method, args.params)
        return {"value": found["trace"], **found}
    if mode == "hessian_e":
        values, _, residuals = top_eigenpairs(model, batches(args.hessian_samples), args.top_k, args.params)
        return {"value": values[0].item(), "eigenvalues": values.tolist(), "residuals": residuals.tolist()}
    if mode == "fisher":
        scores = to_float64(torch.cat([per_sample_fisher(model, *batch) for batch in batches(count)]))
        points = torch.quantile(scores, torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
        quantiles = dict(zip(map(str, QUANTILES), points, strict=True))
        error = scores.std().item() / len(scores) ** 0.5 if len(scores) > 1 else None
        return {"value": scores.mean().item(), "standard_error": error, "quantiles": quantiles, "images": len(scores)}
    (pictures, _), *_ = batches(args.ntk_samples, args.ntk_samples)
    gram = ntk_gram(model, pictures, args.params or r"weight$")
    if not gram.isfinite().all():
        return {"value": math.nan, "log_determinant": math.nan, "condition": math.nan, "images": len(pictures)}
    values = torch.linalg.eigvalsh(gram)
    # float32 gradients resolve eigenvalues down to this share of the largest.
    full_rank = bool(values[0] > 1e-7 * values[-1])
    log_det = values.log().sum().item() if full_rank else None
    condition = (values[-1] / values[0]).item() if full_rank else None
    return {"value": log_det, "log_determinant": log_det, "condition": condition, "images": len(pictures)}


def collect(
    args: argparse.Namespace, members: list[SavedMember], names: list[str], found: dict[str, dict[str, dict]]
) -> dict[str, Any]:
    """The result: each part by member, with mean and standard deviation over members, and which parts are missing."""
    result: dict[str, Any] = {"missing": []}
    for name in names:
        rows = [found[name].get(member.digest) for member in members]
        values = [row["value"] for row in rows if row is not None and row["value"] is not None]
        result[name] = {
            "members": rows,
            "mean": statistics.mean(values) if values else None,
            "std": standard_deviation(values),
            "n": len(values),
            "protocol": protocol_of(args, name),
        }
        result["missing"] += [f"{name} of {m.path}" for m, row in zip(members, rows, strict=True) if row is None]
    return result


def keep_parts(before: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    """The result with the other parts of an earlier call, each with the protocol that it was measured by.

    A part that other code or another device made is left out, and one line says so.
    """
    rows, result = before["result"], content["result"]
    missing, stale = list(result["missing"]), {}
    kept = {name: row for name, row in rows.items() if name not in result and mode_of(name) in PROTOCOL}
    for name, row in kept.items():
        for part in filter(None, row["members"]):
            if why := why_stale(mode_of(name), part, content["environment"]):
                stale[name] = why
    if stale:
        name, why = next(iter(stale.items()))
        text = f"{', '.join(stale)}: left out of sharpness.json, since {name} was measured {why}"
        print(f"note: {text}; measure by --mode {','.join(dict.fromkeys(map(mode_of, stale)))}", file=sys.stderr)
        kept = {name: row for name, row in kept.items() if name not in stale}
    for name, row in kept.items():
        asked = PROTOCOL[mode_of(name)]
        kept[name] = {"protocol": {key: before["protocol"][key] for key in asked}} | row
        missing += [one for one in rows["missing"] if one.startswith(f"{name} of ")]
    return result | kept | {"missing": missing}


def print_table(
    args: argparse.Namespace, members: list[SavedMember], names: list[str], found: dict[str, dict[str, dict]]
) -> None:
    """A line for each part: the members' values, and mean ± standard deviation."""
    print(f"{'':16}" + "".join(f"{'seed ' + str(m.seed) if m.seed is not None else m.path.name:>14}" for m in members))
    spreads = []
    for name in names:
        values = [found[name][member.digest]["value"] for member in members]
        cells = "".join(f"{'singular' if value is None else format(value, '.5g'):>14}" for value in values)
        numbers = [value for value in values if value is not None]
        spread = standard_deviation(numbers)
        spread = "" if spread is None else f" ± {spread:.3g}"
        spreads.append(spread)
        mean = f"   mean {statistics.mean(numbers):.5g}{spread} (n = {len(numbers)})" if numbers else ""
        print(f"{name:16}{cells}{mean}")
        if not all(map(math.isfinite, numbers)):
            print(f"{'':16}  not finite: {why_not_finite(args, name)}")
    if any(spreads):
        print("±: standard deviation over members")


def why_not_finite(args: argparse.Namespace, name: str) -> str:
    """The reason for a value of a part that is not finite."""
    if name.startswith("APGD"):
        radius = protocol_of(args, name)["rho0"]
        return f"within the radius --rho0 {radius:g} the loss leaves the range of float32; a smaller one has a value"
    return "the loss or its derivatives leave the range of float32 at these weights"


def print_protocol(args: argparse.Namespace) -> None:
    """What the chosen modes depend on."""
    print("All modes: eval mode, images without augmentation, all members; cross-entropy.")
    for name in (name for mode in args.mode for name in part_names(mode, args.norms)):
        mode, _, norm = name.partition("-")
        words = [f"--{key} {value}" for key, value in protocol_of(args, name).items()]
        print(f"{mode}: " + " ".join([*words, *([f"--norms {norm}"] if norm else [])]))


if __name__ == "__main__":
    cli.run(main, parse_args(), forks=True)
