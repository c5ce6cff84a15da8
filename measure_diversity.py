"""Accuracy, calibration and diversity of a saved ensemble, on clean and corrupted images.

    python measure_diversity.py --resume runs/digits_sharpbalance --mode predict,disagreement,KL,CKA

Writes under --save (default measurements/<run>): diversity.json, and the members' logits under predictions/, which all
measuring scripts share.
"""

import argparse
import itertools
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from utils import InputError, cli, diversity, metrics
from utils.diversity import mean_over_pairs
from utils.metrics import mean_of
from utils.predictions import Measurement, Part, measure_settings

MODES = ("predict", "disagreement", "KL", "CKA")
PAIR_MODES = {"disagreement", "KL", "CKA"}
# The lines below the table of scores: title, where the value is in a result, and the name of its interval.
LINES = (
    ("member accuracy", ("rates", "member_accuracy"), "member_accuracy"),
    ("ensemble accuracy", ("rates", "ensemble_accuracy"), "ensemble_accuracy"),
    ("RMSCE of the ensemble", ("rmsce",), "ensemble_rmsce"),
    ("disagreement", ("disagreement", "mean"), "disagreement"),
    ("DER", ("der",), "der"),
    ("EIR", ("eir",), "eir"),
    ("variance of probabilities", ("variance_of_probabilities",), None),
    ("KL", ("kl", "mean"), None),
    ("Jensen-Shannon", ("jensen_shannon", "mean"), None),
    ("CKA of features", ("cka", "features", "debiased", "mean"), None),
    ("CKA of centred logits", ("cka", "centred_logits", "debiased", "mean"), None),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__)
    cli.add_measure_options(parser)
    group = parser.add_argument_group("diversity")
    group.add_argument("--mode", action=cli.Choices, among=MODES, default=list(MODES[:3]), help="what to measure")
    text = "the ensemble's output: mean of the members' probabilities, or softmax of their mean logit"
    cli.add_choice(group, "average", text, ("probs", "logits"), default="probs")
    cli.add_option(group, "bins", "equal-width bins of the ECE", cli.COUNT, "N", default=15)
    cli.add_option(group, "bootstrap", "resamples of the 95%% intervals, 0 for none", cli.NATURAL, "N", default=1000)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Measure, print tables, and write diversity.json."""
    pairs = sorted(PAIR_MODES & set(args.mode))
    why = f"--mode {','.join(pairs)} compares members"
    measurement = Measurement(measure_settings(args), 2 if pairs else 1, why, features="CKA" in args.mode)
    measurement.predict(["val"] * ("predict" in args.mode) + measurement.splits)
    temperatures: dict[str, Any] = {}
    if "predict" in args.mode:
        logits, labels, _ = measurement.predictions(measurement.parts("val")[0])
        temperatures = fit_temperatures(torch.log_softmax(logits.double(), dim=2), labels, args.average)
    results: dict[str, Any] = {}
    for split in measurement.splits:
        found, draws = {}, {}
        for part in measurement.parts(split):
            logits, labels, features = measurement.predictions(part)
            result, columns, gaps = measure_part(args, logits, labels, features, temperatures)
            found[part.name], draws[part.name] = result, resample(args.bootstrap, columns, gaps)
        results[split] = summarize(measurement.parts(split), found, draws)
    path = measurement.write("diversity.json", {"temperatures": temperatures, **results}, vars(args))
    for split, result in results.items():
        print_tables(split, result)
    print(f"wrote {path}")


def fit_temperatures(log_probs: Tensor, labels: Tensor, average: str) -> dict[str, Any]:
    """One temperature for each member and one for the ensemble, fitted on validation."""
    return {
        "fitted_on": "val",
        "members": [metrics.fit_temperature(member, labels) for member in log_probs],
        "ensemble": metrics.fit_temperature(metrics.ensemble_log_probs(log_probs, average), labels),
    }


def measure_part(
    args: argparse.Namespace, logits: Tensor, labels: Tensor, features: list[Tensor], temperatures: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
    """All metrics of one part.

    Args:
        args: mode, average and bins.
        logits: float32 [M, N, C].
        labels: int64 [N].
        features: M times [N, D], for CKA.
        temperatures: as from `fit_temperatures`.

    Returns:
        The metrics; the columns [N] that get an interval; and, in mode predict, the gaps [N, bins] of the ECE.
    """
    log_probs = torch.log_softmax(logits.double(), dim=2)
    probs, predictions = log_probs.exp(), log_probs.argmax(dim=2)
    output = metrics.ensemble_log_probs(log_probs, args.average)
    members, ensemble = metrics.per_sample(log_probs, labels, probs), metrics.per_sample(output, labels)
    columns = {"member_accuracy": members["correct"].mean(dim=0), "ensemble_accuracy": ensemble["correct"]}
    # For comparisons of two ensembles sample by sample.
    counts = {"members": members["correct"].sum(dim=0).long()}
    result: dict[str, Any] = {"samples": len(labels), "classes": log_probs.shape[2]}
    gaps, by_size = None, {}
    if {"predict", "disagreement"} & set(args.mode):
        by_size = scores_by_size(args, log_probs, probs, members["nll"], labels)

    if "predict" in args.mode:
        both = zip(log_probs, temperatures["members"], strict=True)
        result["members"] = [scores(args, member, labels, temperature) for member, temperature in both]
        result["ensemble"] = scores(args, output, labels, temperatures["ensemble"])
        result["ensemble_by_size"] = {size: mean_of([row for _, row in rows]) for size, rows in by_size.items()}
        columns |= {"member_nll": members["nll"].mean(dim=0), "ensemble_nll": ensemble["nll"]}
        calibrated = metrics.per_sample(metrics.with_temperature(output, temperatures["ensemble"]), labels)
        columns["ensemble_nll_calibrated"] = calibrated["nll"]
        kept = {name: columns[name] for name in ("ensemble_nll", "ensemble_nll_calibrated")}
        kept["ensemble_brier"] = ensemble["brier"]
        result["values_of_samples"] = {name: metrics.pack_values(column.numpy()) for name, column in kept.items()}
        gaps = metrics.calibration_gaps(ensemble, args.bins)
        _, edges = metrics.calibration_mse(ensemble["confidence"], ensemble["correct"], args.bins)
        result["rmsce_interval"] = [math.sqrt(edge) for edge in edges]

    if "disagreement" in args.mode:
        matrix = diversity.disagreement(predictions)
        columns["disagreement"] = diversity.disagreement_per_sample(predictions)
        pairs = math.comb(len(predictions), 2)
        counts["differing_pairs"] = (columns["disagreement"] * pairs).round().long()
        result["disagreement"] = {"matrix": matrix.tolist(), "mean": mean_over_pairs(matrix)}
        result["variance_of_probabilities"] = diversity.ensemble_variance(probs)
        result["der"] = diversity.disagreement_error_ratio(predictions, labels)
        result["eir"] = diversity.ensemble_improvement_rate(probs, labels, args.average)
        errors, distances = 1 - members["correct"].mean(dim=1), diversity.squared_distances(probs)
        of = partial(subset_diversity, matrix, distances, errors)
        sizes = {size: mean_of([of(*row) for row in rows]) for size, rows in by_size.items() if size > 1}
        result["disagreement_by_size"] = sizes

    if "KL" in args.mode:
        for name, distance in (("kl", diversity.pairwise_kl), ("jensen_shannon", diversity.pairwise_js)):
            matrix = distance(log_probs)
            result[name] = {"matrix": matrix.tolist(), "mean": mean_over_pairs(matrix)}

    if "CKA" in args.mode:
        result["cka"] = {
            name: {form: cka_matrix(tensors, form == "debiased") for form in ("debiased", "biased")}
            for name, tensors in (("features", features), ("centred_logits", list(diversity.centred(logits))))
        }

    counts["ensemble"] = ensemble["correct"].long()
    result["right_of_samples"] = {name: metrics.pack_counts(count.numpy()) for name, count in counts.items()}
    result["rates"] = {name: column.mean().item() for name, column in columns.items()}
    return result, columns, gaps


def scores(
    args: argparse.Namespace, log_probs: Tensor, labels: Tensor, temperature: float | None = None
) -> dict[str, Any]:
    """The scores of log-probabilities [N, C]; with a temperature also `calibrated`, those with it."""
    probs = log_probs.exp()
    result: dict[str, Any] = metrics.scores(metrics.per_sample(log_probs, labels, probs), probs, labels, args.bins)
    if temperature is not None:
        result["calibrated"] = scores(args, metrics.with_temperature(log_probs, temperature), labels)
    return result


def resample(count: int, columns: dict[str, Tensor], gaps: Tensor | None) -> dict[str, Tensor]:
    """The bootstrap draws [count] of each column's mean and of the ECE."""
    values = torch.stack(list(columns.values()), dim=1)
    # At once: the resamples are larger than all that is resampled, and are read once.
    drawn = metrics.bootstrap_means(values if gaps is None else torch.cat([values, gaps], dim=1), count)
    draws = dict(zip(columns, drawn.T, strict=False))
    if gaps is not None:
        draws["ensemble_ece"] = drawn[:, len(columns) :].abs().sum(dim=1)
    return draws


def scores_by_size(
    args: argparse.Namespace, log_probs: Tensor, probs: Tensor, nll: Tensor, labels: Tensor
) -> dict[int, list[tuple[tuple[int, ...], dict[str, float]]]]:
    """The scores of the ensemble of each subset of the members, by size."""

    def of(subset: tuple[int, ...]) -> dict[str, float]:
        if args.average == "logits":
            return scores(args, metrics.ensemble_log_probs(log_probs[list(subset)], args.average), labels)
        output = sum(probs[i] for i in subset) / len(subset)
        subset_nll = math.log(len(subset)) - torch.logsumexp(-nll[list(subset)], dim=0)
        return metrics.scores(metrics.columns_of(output, subset_nll, labels), output, labels, args.bins)

    sizes = diversity.subsets_by_size(len(probs))
    return {size: [(subset, of(subset)) for subset in chosen] for size, chosen in sizes.items()}


def subset_diversity(
    matrix: Tensor, distances: Tensor, errors: Tensor, subset: tuple[int, ...], of_ensemble: dict[str, float]
) -> dict[str, float | None]:
    """Disagreement, DER, EIR and variance of probabilities of some members, whose ensemble has these scores."""
    index = torch.tensor(subset)
    differ = mean_over_pairs(matrix[index][:, index])
    ratios = diversity.error_ratios(1 - errors[index].mean().item(), of_ensemble["accuracy"], differ)
    return {
        "disagreement": differ,
        **{name: number_or_none(value) for name, value in ratios.items()},
        "variance_of_probabilities": mean_over_pairs(distances[index][:, index]) / 2,
    }


def number_or_none(value: float) -> float | None:
    """None for nan, which JSON does not have."""
    return None if math.isnan(value) else value


def cka_matrix(representations: list[Tensor], debiased: bool) -> dict[str, Any]:
    """CKA of each pair of members, and its mean."""
    members = len(representations)
    matrix = torch.eye(members, dtype=torch.float64)
    for i, j in itertools.combinations(range(members), 2):
        try:
            matrix[i, j] = matrix[j, i] = diversity.linear_cka(representations[i], representations[j], debiased)
        except ValueError as error:
            raise InputError(f"--mode CKA: {error}; leave it out") from error
    return {"matrix": matrix.tolist(), "mean": mean_over_pairs(matrix)}


def summarize(parts: list[Part], found: dict[str, dict], draws: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """The metrics of a split with intervals; of a corrupted set by part, by severity, and the mean of all.

    Means over parts are means of the metrics; DER and EIR are ratios of mean rates, for a part as for a mean.
    """
    if parts[0].corruption is None:
        return mean_of_parts([parts[0]], found, draws)
    severities = sorted({part.severity for part in parts})
    alike = len({found[part.name]["samples"] for part in parts}) == 1  # the same images in the same order
    packed = [found[part.name].pop("right_of_samples") for part in parts]
    counts = {name: sum(metrics.unpack_counts(one[name]) for one in packed) for name in packed[0] if alike}
    packed = [found[part.name].pop("values_of_samples", {}) for part in parts]
    values = {name: sum(metrics.unpack_values(one[name]) for one in packed) for name in packed[0] if alike}
    mean = mean_of_parts(parts, found, draws)
    known = {name: count for name, count in counts.items() if count.max() < 2**16}
    mean["right_of_samples"] = {name: metrics.pack_counts(count) for name, count in known.items()}
    mean["values_of_samples"] = {name: metrics.pack_values(value / len(parts)) for name, value in values.items()}
    return {
        "mean": mean,
        "by_severity": {s: mean_of_parts([p for p in parts if p.severity == s], found, draws) for s in severities},
        "parts": {part.name: mean_of_parts([part], found, draws) for part in parts},
    }


def mean_of_parts(parts: list[Part], found: dict[str, dict], draws: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """The mean over parts, with intervals and what derives from its rates."""
    rows = [found[part.name] for part in parts]
    result = (rows[0] if len(rows) == 1 else mean_of(rows)) | {"parts": len(parts)}
    rmsce_interval = result.pop("rmsce_interval", None)
    names = draws[parts[0].name]
    resampled = {name: torch.stack([draws[part.name][name] for part in parts]).mean(dim=0) for name in names}
    if "disagreement" in resampled:
        if len(rows) > 1:
            rates = (result["rates"][name] for name in ("member_accuracy", "ensemble_accuracy", "disagreement"))
            result |= diversity.error_ratios(*rates)
        result |= {name: number_or_none(result[name]) for name in ("der", "eir")}
        bounds = (None, None)
        if result["der"] is not None:
            bounds = diversity.improvement_bounds(result["der"], round(result["classes"]))
        result["eir_bounds"] = list(bounds)
        drawn = (resampled[name] for name in ("member_accuracy", "ensemble_accuracy", "disagreement"))
        resampled |= diversity.error_ratios(*drawn)
    result["intervals_95"] = {name: metrics.percentile_interval(values) for name, values in resampled.items()}
    if "ensemble_ece" in resampled:
        interval = metrics.corrected_interval(result["ensemble"]["ece"], resampled["ensemble_ece"])
        result["intervals_95"]["ensemble_ece"] = interval
        result["rmsce"] = math.sqrt(max(result["ensemble"]["calibration_mse"], 0.0))
        if len(parts) == 1:  # of a mean over parts, which share their images, no interval is known
            result["intervals_95"]["ensemble_rmsce"] = rmsce_interval
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
            members, count = row["members"], len(row["members"])
            titles = [*(f"member {i + 1}" for i in range(count)), f"mean of {count}", "ensemble"]
            for name, one in zip(titles, [*members, mean_of(members), row["ensemble"]], strict=True):
                raw = f"{one['accuracy']:9.2%}  {one['nll']:8.4f} {one['brier']:8.4f} {one['ece']:8.4f}"
                print(
                    f"  {name:14} {raw}  |            {one['calibrated']['nll']:8.4f} {one['calibrated']['ece']:8.4f}"
                )
        for title, path, interval in LINES:
            value: Any = row
            for key in path:
                value = None if value is None else value.get(key)
            if value is not None:
                edges = row["intervals_95"].get(interval)
                print(f"  {title:26} {value:8.4f}" + ("  [{:.4f}, {:.4f}]".format(*edges) if edges else ""))


if __name__ == "__main__":
    cli.run(main, parse_args())
