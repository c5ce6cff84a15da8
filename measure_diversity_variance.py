"""Bias and variance of an ensemble's outputs, on clean and corrupted images.

    python measure_diversity_variance.py --resume runs/digits_sharpbalance --mode variance,variance_mse

variance: unbiased variance over members of the logits, centred over classes, and of the probabilities; in variance.json
also of the logits as they are (the authors' quantity), which moves with shifts that softmax ignores.
variance_mse, variance_mse_c: the mean squared error of a member's probabilities against the one-hot labels, split into
squared bias and variance; on --split, and on the corrupted set.

Writes variance.json under --save (default measurements/<run>).
"""

import argparse
import os
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "4000")  # before torch is loaded, whose threads otherwise wait at full speed

import torch
from torch import Tensor

from utils import cli, diversity
from utils.metrics import mean_of
from utils.predictions import Measurement, measure_settings

MODES = ("variance", "variance_mse", "variance_mse_c")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__)
    cli.add_measure_options(parser)
    group = parser.add_argument_group("variance")
    group.add_argument("--mode", action=cli.Choices, among=MODES, default=list(MODES[:2]), help="what to measure")
    given, args = parser.parse_given(argv), parser.parse_args(argv)
    if args.mode == ["variance_mse_c"] and set(args.split or ["corrupted"]) - {"corrupted"}:
        parser.error("--split: --mode variance_mse_c takes the corrupted images alone; leave it out, or add a mode")
    args.split = args.split or ["test"]
    cli.note_idle_parts(given, "corrupted" in args.split or "variance_mse_c" in args.mode)
    return args


def main(args: argparse.Namespace) -> None:
    """Measure, print a table, and write variance.json."""
    measurement = Measurement(measure_settings(args), at_least=2, why="a variance compares members")
    splits = list(args.split) if set(args.mode) & {"variance", "variance_mse"} else []
    if "variance_mse_c" in args.mode and "corrupted" not in splits:
        splits.append("corrupted")
    measurement.predict(splits)
    results: dict[str, Any] = {
        "note": "the variance of logits grows with their scale, which SAM reduces: compare methods by the variance of "
        "probabilities; variance_of_logits, the authors' quantity, is of logits that are not centred, and grows with "
        "shifts that softmax ignores as well"
    }
    for split in splits:
        parts = measurement.parts(split)
        modes = set(args.mode) if split in args.split else {"variance_mse_c"}
        found = {part.name: decompose(*measurement.predictions(part)[:2], modes) for part in parts}
        if split != "corrupted":
            results[split] = found[split]
            continue
        severities = sorted({part.severity for part in parts})
        results[split] = {
            "mean": mean_of(list(found.values())),
            "by_severity": {s: mean_of([found[part.name] for part in parts if part.severity == s]) for s in severities},
            "parts": found,
        }
    path = measurement.write("variance.json", results, vars(args) | {"split": splits})
    print(f"{'':24} variance of centred logits   of probabilities   squared bias   mean squared error")
    for split in splits:
        rows = {split: results[split]}
        if split == "corrupted":
            rows = {f"corrupted, severity {s}": row for s, row in results[split]["by_severity"].items()}
            rows[f"corrupted, mean of {len(results[split]['parts'])}"] = results[split]["mean"]
        for title, row in rows.items():
            numbers = map(row.get, ("variance_of_centred_logits", "variance_of_probabilities", "bias2", "mse"))
            cells = ["-" if value is None else f"{value:.4f}" for value in numbers]
            print(f"{title:24} {cells[0]:>26}   {cells[1]:>16}   {cells[2]:>12}   {cells[3]:>18}")
    print(f"note: {results['note']}\nwrote {path}")


def decompose(logits: Tensor, labels: Tensor, modes: set[str]) -> dict[str, float]:
    """The metrics of one part, from logits [M, N, C] and labels [N]."""
    probs = torch.softmax(logits.double(), dim=2)
    row = {"variance_of_probabilities": diversity.ensemble_variance(probs)}
    if "variance" in modes:
        row["variance_of_centred_logits"] = diversity.ensemble_variance(diversity.centred(logits))
        row["variance_of_logits"] = diversity.ensemble_variance(logits)
    if modes & {"variance_mse", "variance_mse_c"}:
        row |= diversity.bias_and_variance(probs, labels)
    return row


if __name__ == "__main__":
    cli.run(main, parse_args(), forks=True)
