"""Accuracy, calibration and diversity of a saved ensemble, on clean and corrupted images.

    python measure_diversity.py --resume runs/digits_sharpbalance --mode predict,disagreement,KL,CKA

Writes under --save (default measurements/<run>): diversity.json, and the members' logits under predictions/, which
every measuring script finds again.
"""

import argparse
import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import InputError
from utils.cli import Choices, Parser, add_checkpoint_options, add_data_options, add_measure_options, number, run
from utils.diversity import (
    disagreement,
    improvement_bounds,
    linear_cka,
    mean_over_pairs,
    pairwise_js,
    pairwise_kl,
)
from utils.metrics import (
    bootstrap_weights,
    calibration_bins,
    corrected_interval,
    ensemble_log_probs,
    fit_temperature,
    pack_counts,
    percentile_interval,
    unpack_counts,
    with_temperature,
)
from utils.predictions import Measurement, Part, mean_of

MODES = ("predict", "disagreement", "KL", "CKA")
MOST_SUBSETS = 200
INTERVAL_OF = {
    "member accuracy": "member_accuracy",
    "ensemble accuracy": "ensemble_accuracy",
    "disagreement": "disagreement",
    "DER": "der",
    "EIR": "eir",
}
PAIR_MODES = {"disagreement", "KL", "CKA"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    add_data_options(parser, measuring=True)
    add_checkpoint_options(parser, measuring=True)
    add_measure_options(parser)
    group = parser.add_argument_group("diversity")
    group.add_argument("--mode", action=Choices, among=MODES, default=list(MODES[:3]), help="what to measure")
    group.add_argument(
        "--average",
        choices=("probs", "logits"),
        default="probs",
        help="the ensemble's output: mean of the members' probabilities, or softmax of their mean logit",
    )
    group.add_argument("--bins", type=number(int, 1), default=15, metavar="N", help="equal-width bins of the ECE")
    group.add_argument(
        "--bootstrap",
        type=number(int, 0),
        default=1000,
        metavar="N",
        help="resamples of the 95%% intervals, 0 for none",
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure, print tables, and write diversity.json."""
    pairs = sorted(PAIR_MODES & set(args.mode))
    why = f"--mode {','.join(pairs)} compares members"
    measurement = Measurement(args, at_least=2 if pairs else 1, why=why, features="CKA" in args.mode)
    temperatures: dict[str, Any] = {}
    if "predict" in args.mode:
        logits, labels, _ = measurement.predictions(measurement.parts("val")[0])
        temperatures = fit_temperatures(torch.log_softmax(logits.double(), dim=2), labels, args.average)
    weights: dict[int, Tensor] = {}
    results: dict[str, Any] = {}
    for split in args.split:
        found, draws = {}, {}
        for part in measurement.parts(split):
            logits, labels, features = measurement.predictions(part)
            if len(labels) not in weights:
                weights[len(labels)] = bootstrap_weights(len(labels), args.bootstrap)
            found[part.name], draws[part.name] = figures(
                args, logits, labels, features, temperatures, weights[len(labels)]
            )
        results[split] = summarize(measurement.parts(split), found, draws)
    measurement.write("diversity.json", {"temperatures": temperatures, **results})
    for split, result in results.items():
        print_tables(split, result)
    print(f"wrote {args.save / 'diversity.json'}")


def fit_temperatures(log_probs: Tensor, labels: Tensor, average: str) -> dict[str, Any]:
    """One temperature for each member and one for the ensemble, fitted on validation."""
    return {
        "fitted_on": "val",
        "members": [fit_temperature(member, labels) for member in log_probs],
        "ensemble": fit_temperature(ensemble_log_probs(log_probs, average), labels),
    }


def figures(
    args: argparse.Namespace,
    logits: Tensor,
    labels: Tensor,
    features: list[Tensor],
    temperatures: dict[str, Any],
    weights: Tensor,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All figures of one part, and the bootstrap draws [B] of those that get an interval.

    Args:
        args: mode, average and bins.
        logits: float32 [M, N, C].
        labels: int64 [N].
        features: M times [N, D], for CKA.
        temperatures: as from `fit_temperatures`.
        weights: resamples [B, N], as from `utils.metrics.bootstrap_weights`.
    """
    log_probs = torch.log_softmax(logits.double(), dim=2)
    members = len(log_probs)
    result: dict[str, Any] = {"samples": len(labels), "classes": log_probs.shape[2]}
    predictions = log_probs.argmax(dim=2)
    correct = predictions == labels
    counts = {"members": correct.sum(dim=0)}
    ensemble = ensemble_log_probs(log_probs, args.average)
    columns = {
        "member_accuracy": correct.double().mean(dim=0),
        "ensemble_accuracy": (ensemble.argmax(dim=1) == labels).double(),
    }
    gaps = torch.zeros(len(labels), 0, dtype=torch.float64)
    by_size: dict[int, list[tuple[tuple[int, ...], dict[str, float]]]] = {}
    if {"predict", "disagreement"} & set(args.mode):
        probs = log_probs.exp()
        label_logs = log_probs.gather(2, labels[:, None].expand(members, -1, 1))[:, :, 0]
        by_size = {
            size: [(subset, subset_scores(log_probs, probs, label_logs, labels, subset, args)) for subset in chosen]
            for size, chosen in subsets_by_size(members).items()
        }

    if "predict" in args.mode:
        rows = [scores_of(*member, labels, args.bins) for member in zip(probs, -label_logs, strict=True)]
        for row, member, temperature in zip(rows, log_probs, temperatures["members"], strict=True):
            row["calibrated"] = scores(with_temperature(member, temperature), labels, args.bins)
        result["members"] = rows
        result["ensemble"] = scores(ensemble, labels, args.bins) | {
            "calibrated": scores(with_temperature(ensemble, temperatures["ensemble"]), labels, args.bins)
        }
        result["ensemble_by_size"] = {size: mean_of([row for _, row in rows]) for size, rows in by_size.items()}
        columns["member_nll"] = -label_logs.mean(dim=0)
        columns["ensemble_nll"] = -ensemble.gather(1, labels[:, None])[:, 0]
        confidence = ensemble.exp().max(dim=1).values
        gaps = torch.zeros(len(labels), args.bins, dtype=torch.float64)
        gaps[torch.arange(len(labels)), calibration_bins(confidence, args.bins)] = (
            columns["ensemble_accuracy"] - confidence
        )

    if "disagreement" in args.mode:
        matrix = disagreement(predictions)
        result["disagreement"] = {"matrix": matrix.tolist(), "mean": mean_over_pairs(matrix)}
        distances = squared_distances(probs)
        result["variance_of_probabilities"] = mean_over_pairs(distances) / 2
        errors = 1 - correct.double().mean(dim=1)
        # All pairs at once: of n_c members that predict class c, n_c (n_c - 1) ordered pairs agree.
        votes = torch.zeros(len(labels), log_probs.shape[2], dtype=torch.float64)
        votes.scatter_add_(1, predictions.T, torch.ones_like(predictions.T, dtype=torch.float64))
        agreeing = (votes * (votes - 1)).sum(dim=1)
        columns["disagreement"] = 1 - agreeing / (members * (members - 1))
        counts["differing_pairs"] = ((members * (members - 1) - agreeing) / 2).long()
        result["disagreement_by_size"] = {
            size: mean_of(
                [subset_disagreement(matrix, distances, errors, row["accuracy"], subset) for subset, row in rows]
            )
            for size, rows in by_size.items()
            if size > 1
        }

    if "KL" in args.mode:
        kl, js = pairwise_kl(log_probs), pairwise_js(log_probs)
        result["kl"] = {"matrix": kl.tolist(), "mean": mean_over_pairs(kl)}
        result["jensen_shannon"] = {"matrix": js.tolist(), "mean": mean_over_pairs(js)}

    if "CKA" in args.mode:
        result["cka"] = {
            name: {form: cka_matrix(tensors, form == "debiased") for form in ("debiased", "biased")}
            for name, tensors in (("features", features), ("logits", list(logits)))
        }

    # For comparisons of two ensembles sample by sample: how many members are right, how many pairs of them differ, and
    # whether the ensemble is right.
    counts["ensemble"] = columns["ensemble_accuracy"].long()
    result["right_of_samples"] = {name: pack_counts(count.numpy()) for name, count in counts.items()}
    # One product: the resamples are larger than all that is resampled, and are read once.
    drawn = weights @ torch.cat([torch.stack(list(columns.values()), dim=1), gaps], dim=1)
    draws = dict(zip(columns, drawn.T, strict=False))
    if "predict" in args.mode:
        draws["ensemble_ece"] = drawn[:, len(columns) :].abs().sum(dim=1)
    result["rates"] = {name: column.mean().item() for name, column in columns.items()}
    return result, draws


def scores(log_probs: Tensor, labels: Tensor, bins: int) -> dict[str, float]:
    """Accuracy, NLL, Brier score and ECE of log-probabilities [N, C]."""
    return scores_of(log_probs.exp(), -log_probs.gather(1, labels[:, None])[:, 0], labels, bins)


def scores_of(probs: Tensor, nll: Tensor, labels: Tensor, bins: int) -> dict[str, float]:
    """The same from probabilities [N, C] and each sample's NLL [N], for which a probability may be too small."""
    confidence, prediction = probs.max(dim=1)
    correct = (prediction == labels).double()
    brier = torch.linalg.vecdot(probs, probs) - 2 * torch.exp(-nll) + 1
    sums = torch.zeros(bins, dtype=torch.float64)
    sums.index_add_(0, calibration_bins(confidence, bins), correct - confidence)
    return {
        "accuracy": correct.mean().item(),
        "nll": nll.mean().item(),
        "brier": brier.mean().item(),
        "ece": sums.abs().sum().item() / len(correct),
    }


def subsets_by_size(members: int) -> dict[int, list[tuple[int, ...]]]:
    """All subsets of each size while they are at most 200, else 200 drawn ones, always the same."""
    random = np.random.RandomState(0)
    found = {}
    for size in range(1, members + 1):
        if math.comb(members, size) <= MOST_SUBSETS:
            found[size] = list(itertools.combinations(range(members), size))
        else:
            drawn: set[tuple[int, ...]] = set()
            while len(drawn) < MOST_SUBSETS:
                drawn.add(tuple(sorted(random.permutation(members)[:size].tolist())))
            found[size] = sorted(drawn)
    return found


def subset_scores(
    log_probs: Tensor,
    probs: Tensor,
    label_logs: Tensor,
    labels: Tensor,
    subset: tuple[int, ...],
    args: argparse.Namespace,
) -> dict[str, float]:
    """Scores of the ensemble of some members; label_logs are the members' log-probabilities of the labels [M, N]."""
    if args.average == "logits":
        return scores(ensemble_log_probs(log_probs[list(subset)], args.average), labels, args.bins)
    output = sum(probs[i] for i in subset) / len(subset)
    nll = math.log(len(subset)) - torch.logsumexp(label_logs[list(subset)], dim=0)
    return scores_of(output, nll, labels, args.bins)


def squared_distances(probs: Tensor) -> Tensor:
    """Mean squared distance of the members' probabilities [M, N, C], pair by pair: float64 [M, M].

    The unbiased variance of any subset is half the mean over its pairs.
    """
    matrix = torch.zeros(len(probs), len(probs), dtype=torch.float64)
    for i, j in itertools.combinations(range(len(probs)), 2):
        gap = (probs[i] - probs[j]).flatten()
        matrix[i, j] = matrix[j, i] = torch.dot(gap, gap) / probs.shape[1]
    return matrix


def subset_disagreement(
    matrix: Tensor, distances: Tensor, errors: Tensor, accuracy: float, subset: tuple[int, ...]
) -> dict[str, float | None]:
    """Disagreement, DER, EIR and variance of probabilities of some members, whose ensemble has this accuracy."""
    index = torch.tensor(subset)
    rates = {
        "disagreement": mean_over_pairs(matrix[index][:, index]),
        "member_accuracy": 1 - errors[index].mean().item(),
        "ensemble_accuracy": accuracy,
    }
    ratios = ratios_of(rates)
    return {"disagreement": rates["disagreement"], "der": ratios["der"], "eir": ratios["eir"]} | {
        "variance_of_probabilities": mean_over_pairs(distances[index][:, index]) / 2
    }


def ratios_of(rates: dict[str, Any]) -> dict[str, Any]:
    """DER and EIR from mean rates, numbers or tensors of bootstrap draws; None where no member errs."""
    error = 1 - rates["member_accuracy"]
    if not isinstance(error, Tensor) and error == 0:
        return {"der": None, "eir": None}
    return {
        "der": rates["disagreement"] / error,
        "eir": (rates["ensemble_accuracy"] - rates["member_accuracy"]) / error,
    }


def cka_matrix(representations: list[Tensor], debiased: bool) -> dict[str, Any]:
    """CKA of each pair of members, and its mean."""
    members = len(representations)
    matrix = torch.eye(members, dtype=torch.float64)
    for i, j in itertools.combinations(range(members), 2):
        try:
            matrix[i, j] = matrix[j, i] = linear_cka(representations[i], representations[j], debiased)
        except ValueError as error:
            raise InputError(f"--mode CKA: {error}; leave it out") from error
    return {"matrix": matrix.tolist(), "mean": mean_over_pairs(matrix)}


def summarize(parts: list[Part], found: dict[str, dict], draws: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """The figures of a split with DER, EIR and intervals; of a corrupted set by part, by severity, and the mean of all.

    Means over parts are means of the figures; DER and EIR are ratios of mean rates, of a part as of a mean.
    """
    if parts[0].corruption is None:
        return finished([parts[0]], found, draws)
    severities = sorted({part.severity for part in parts})
    alike = len({found[part.name]["samples"] for part in parts}) == 1
    packed = [found[part.name].pop("right_of_samples") for part in parts]
    counts = {
        name: sum(unpack_counts(one[name]) for one in packed)
        for name in packed[0]
        if alike  # the parts show the same pictures in the same order
    }
    mean = finished(parts, found, draws)
    mean["right_of_samples"] = {name: pack_counts(count) for name, count in counts.items() if count.max() < 2**16}
    return {
        "mean": mean,
        "by_severity": {s: finished([p for p in parts if p.severity == s], found, draws) for s in severities},
        "parts": {part.name: finished([part], found, draws) for part in parts},
    }


def finished(parts: list[Part], found: dict[str, dict], draws: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """The mean over parts with what is derived from its rates."""
    rows = [found[part.name] for part in parts]
    result = (rows[0] if len(rows) == 1 else mean_of(rows)) | {"parts": len(parts)}
    resampled = {
        name: torch.stack([draws[part.name][name] for part in parts]).mean(dim=0) for name in draws[parts[0].name]
    }
    if "disagreement" in resampled:
        ratios = ratios_of(result["rates"])
        bounds = (None, None) if ratios["der"] is None else improvement_bounds(ratios["der"], round(result["classes"]))
        result |= ratios | {"eir_bounds": list(bounds)}
        resampled |= ratios_of(resampled)
    result["intervals_95"] = {name: percentile_interval(values) for name, values in resampled.items()}
    if "ensemble_ece" in resampled:
        result["intervals_95"]["ensemble_ece"] = corrected_interval(
            result["ensemble"]["ece"], resampled["ensemble_ece"]
        )
    return result


def print_tables(split: str, result: dict[str, Any]) -> None:
    """Members and ensemble of a split; of a corrupted set a line for each severity and the mean."""
    if "by_severity" in result:
        rows = [(f"{split}, severity {s}", row) for s, row in result["by_severity"].items()]
        rows.append((f"{split}, mean of {result['mean']['parts']}", result["mean"]))
    else:
        rows = [(split, result)]
    for title, row in rows:
        print(f"\n{title} ({round(row['samples'])} images{' each' if row['parts'] > 1 else ''})")
        if "ensemble" in row:
            print("                   accuracy      NLL    Brier      ECE  |  with temperature: NLL      ECE")
            for name, one in [
                *((f"member {i + 1}", member) for i, member in enumerate(row["members"])),
                (f"mean of {len(row['members'])}", mean_of(row["members"])),
                ("ensemble", row["ensemble"]),
            ]:
                print(
                    f"  {name:14} {one['accuracy']:9.2%}  {one['nll']:8.4f} {one['brier']:8.4f} {one['ece']:8.4f}  |"
                    f"            {one['calibrated']['nll']:8.4f} {one['calibrated']['ece']:8.4f}"
                )
        for name, value in (
            ("member accuracy", row["rates"]["member_accuracy"]),
            ("ensemble accuracy", row["rates"]["ensemble_accuracy"]),
            ("disagreement", row["rates"].get("disagreement")),
            ("DER", row.get("der")),
            ("EIR", row.get("eir")),
            ("variance of probabilities", row.get("variance_of_probabilities")),
            ("KL", row.get("kl", {}).get("mean")),
            ("Jensen-Shannon", row.get("jensen_shannon", {}).get("mean")),
            ("CKA of features, debiased", row.get("cka", {}).get("features", {}).get("debiased", {}).get("mean")),
            ("CKA of logits, debiased", row.get("cka", {}).get("logits", {}).get("debiased", {}).get("mean")),
        ):
            if value is not None:
                interval = row["intervals_95"].get(INTERVAL_OF.get(name, ""))
                print(f"  {name:26} {value:8.4f}" + ("  [{:.4f}, {:.4f}]".format(*interval) if interval else ""))


if __name__ == "__main__":
    run(main, parse_args())
