"""Accuracy, calibration and diversity of a saved ensemble, on clean and corrupted images.

    python measure_diversity.py --resume runs/digits_sharpbalance --mode predict,disagreement,KL,CKA
    python measure_diversity.py --resume runs/digits_sharpbalance --mode ood --ood noise corrupted folder:PICTURES

Writes under --save (default measurements/<run>): diversity.json, and the members' logits under predictions/, which
measure_diversity_variance.py uses as well. The fitted temperature of the ensemble also goes into the run, as
temperatures.json.
"""

import argparse
import hashlib
import itertools
import math
import os
import sys
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "4000")  # before torch is loaded, whose threads otherwise wait at full speed

import torch
from torch import Tensor

from utils import InputError, RunError, cli, diversity, metrics, ood
from utils.diversity import mean_over_pairs
from utils.kept import made_by
from utils.metrics import mean_of
from utils.predictions import Measurement, Part, measure_settings
from utils.results import OF_SIZE
from utils.run import keep_temperature, run_of

MODES = ("predict", "disagreement", "KL", "CKA", "ood")
PAIR_MODES = {"disagreement", "KL", "CKA"}
# The lines below the table of scores: title, where the value is in a result, and the name of its interval.
LINES = (
    ("member accuracy", ("rates", "member_accuracy"), "member_accuracy"),
    ("ensemble accuracy", ("rates", "ensemble_accuracy"), "ensemble_accuracy"),
    ("RMSCE of the ensemble", ("rmsce",), "ensemble_rmsce"),
    ("AURC of the ensemble", ("rates", "aurc"), "aurc"),
    ("excess AURC", ("excess_aurc",), None),
    ("entropy, nats", ("rates", "entropy"), "entropy"),
    ("mutual information, nats", ("rates", "mutual_information"), "mutual_information"),
    ("disagreement", ("disagreement", "mean"), "disagreement"),
    ("DER", ("der",), "der"),
    ("EIR", ("eir",), "eir"),
    ("variance of probabilities", ("variance_of_probabilities",), None),
    ("KL", ("kl", "mean"), None),
    ("Jensen-Shannon", ("jensen_shannon", "mean"), None),
    ("CKA of features", ("cka", "features", "debiased", "mean"), None),
    ("CKA of centred logits", ("cka", "centred_logits", "debiased", "mean"), None),
)

# What is kept by sample: columns as counts, by their names in a result, and columns as they are.
COUNTS = {"member_accuracy": "members", "disagreement": "differing_pairs", "ensemble_accuracy": "ensemble"}
KEPT_VALUES = ("ensemble_nll", "ensemble_nll_calibrated", "ensemble_brier", "aurc", "entropy", "mutual_information")


class PartResult(NamedTuple):
    """The metrics of a part; the columns [N] whose means have intervals; and the bootstrap draws of these means."""

    metrics: dict[str, Any]
    columns: dict[str, Tensor]
    draws: dict[str, Tensor]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__)
    cli.add_measure_options(parser)
    group = parser.add_argument_group("diversity")
    group.add_argument("--mode", action=cli.Choices, among=MODES, default=list(MODES[:3]), help="what to measure")
    text = "the ensemble's output: mean of the members' probabilities, or softmax of their mean logit"
    cli.add_choice(group, "average", text, ("probs", "logits"), default="probs")
    text = "with --mode ood: what test images are to be distinguished from, DATA or DATA:PATH: another data set, a "
    text += "folder of images (folder:PATH), the corrupted copies of the test images (corrupted), or random pixels "
    text += "(noise; default)"
    cli.add_option(group, "ood", text, other_data, "DATA[:PATH]", nargs="+", default=[])
    cli.add_option(group, "bins", "equal-width bins of the ECE", cli.COUNT, "N", default=15)
    cli.add_option(group, "bootstrap", "resamples of the 95%% intervals, 0 for none", cli.NATURAL, "N", default=1000)
    given, args = parser.parse_given(argv), parser.parse_args(argv)
    if args.ood and "ood" not in args.mode:
        parser.error("--ood: given without --mode ood; add that mode, or leave it out")
    if "ood" in args.mode:
        args.ood = args.ood or [ood.NOISE]
        if args.split is not None and "test" not in args.split:
            parser.error(f"--split {','.join(args.split)}: --mode ood compares with the test images; add test")
        if args.mode == ["ood"] and args.split is None:
            args.split = ["test"]
    if "bins" in given and "predict" not in args.mode:
        cli.note_idle(["bins"], f"on --mode {','.join(args.mode)}")
    # Without --split the corrupted set is measured where it is found, which `Measurement` sees.
    cli.note_idle_parts(given, args.split is None or "corrupted" in args.split or ood.CORRUPTED in args.ood)
    return args


def other_data(text: str) -> str:
    """An argument type: a value of --ood."""
    try:
        _, place = ood.split_word(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text if place is None else f"{text.partition(':')[0]}:{cli.path(str(place))}"


def main(args: argparse.Namespace) -> None:
    """Measure, print tables, and write diversity.json."""
    pairs = sorted(PAIR_MODES & set(args.mode))
    why = f"--mode {','.join(pairs)} compares members"
    measurement = Measurement(measure_settings(args), 2 if pairs else 1, why, features="CKA" in args.mode)
    sets = other_sets(args.ood, measurement)
    measurement.predict(["val"] * ("predict" in args.mode) + measurement.splits + ["ood"] * bool(sets))
    temperatures: dict[str, Any] = {}
    of_subsets: dict[int, list[tuple[tuple[int, ...], float]]] = {}
    if "predict" in args.mode:
        logits, labels, _ = measurement.predictions(measurement.parts("val")[0])
        temperatures = fit_temperatures(torch.log_softmax(logits.double(), dim=2), labels, args.average)
        keep_temperatures(measurement, temperatures["ensemble"], args.average)
        of_subsets = subset_temperatures(logits, labels, args.average)
    results: dict[str, Any] = {}
    for split in measurement.splits:
        found = {}
        for part in measurement.parts(split):
            logits, labels, features = measurement.predictions(part)
            result, columns, gaps = measure_part(args, logits, labels, features, temperatures)
            if split == "test" and of_subsets:
                columns |= (by_size := calibrated_by_size(logits, labels, args.average, of_subsets))
                means = [*by_size.values(), columns["ensemble_nll_calibrated"]]
                result["calibrated_nll_by_size"] = {n + 1: column.mean().item() for n, column in enumerate(means)}
            found[part.name] = PartResult(result, columns, resample(args.bootstrap, columns, gaps))
        results[split] = summarize(measurement.parts(split), found, len(logits))
        if split == "test" and sets:
            results[split]["ood"] = measure_sets(args.average, measurement, sets)
    path = measurement.write("diversity.json", {"temperatures": temperatures, **results}, vars(args))
    for split, result in results.items():
        print_tables(split, result, args.average)
    print(f"wrote {path}")


def fit_temperatures(log_probs: Tensor, labels: Tensor, average: str) -> dict[str, Any]:
    """One temperature for each member and one for the ensemble, fitted on validation."""
    return {
        "fitted_on": "val",
        "members": [metrics.fit_temperature(member, labels) for member in log_probs],
        "ensemble": metrics.fit_temperature(metrics.ensemble_log_probs(log_probs, average), labels),
    }


def keep_temperatures(measurement: Measurement, temperature: float, average: str) -> None:
    """Put the ensemble's temperature into the runs of its members, where `utils.inference` finds it.

    One that was fitted on other images than theirs is not kept.
    """
    if measurement.other_data:
        print("note: the temperature is not kept with the run, since it is of other images", file=sys.stderr)
        return
    weights = sorted(member.digest for member in measurement.members)
    made = made_by("predict", measurement.environment) | {"sha256_of_images": measurement.predictions.digests["val"]}
    record = {"weights": weights, "average": average, "temperature": temperature, "fitted_on": "val"} | made
    for run in dict.fromkeys(run_of(member.path) for member in measurement.members):
        try:
            if run is not None:
                keep_temperature(run, record)
        except RunError as error:  # a run that may only be read
            print(f"note: the temperature is not kept with the run: {error}", file=sys.stderr)


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
    result: dict[str, Any] = {"samples": len(labels), "classes": log_probs.shape[2]}
    curve, aurc = risk_coverage_of(ensemble) if {"predict", "ood"} & set(args.mode) else ({}, {})
    gaps, by_size = None, {}
    if {"predict", "disagreement"} & set(args.mode):
        by_size = scores_by_size(args, log_probs, probs, members["nll"], labels)

    if "predict" in args.mode:
        by_member = [{name: column[i] for name, column in members.items()} for i in range(len(logits))]
        both = zip(log_probs, by_member, temperatures["members"], strict=True)
        result["members"] = [calibrated_scores(args, *one, labels)[0] for one in both]
        result["ensemble"], calibrated = calibrated_scores(args, output, ensemble, temperatures["ensemble"], labels)
        result["ensemble_by_size"] = {size: mean_of([row for _, row in rows]) for size, rows in by_size.items()}
        columns |= {"member_nll": members["nll"].mean(dim=0), "ensemble_nll": ensemble["nll"]}
        columns |= {"ensemble_nll_calibrated": calibrated["nll"], "ensemble_brier": ensemble["brier"]}
        columns |= {"entropy": metrics.predictive_entropy(output.exp())}
        columns |= {"mutual_information": metrics.mutual_information(probs)}
        both = (("before", ensemble), ("after", calibrated))
        curve |= {"reliability": {when: metrics.reliability(one, args.bins) for when, one in both}}
        gaps = metrics.calibration_gaps(ensemble, args.bins)
        _, edges = metrics.calibration_mse(ensemble["confidence"], ensemble["correct"], args.bins)
        result["rmsce_interval"] = [math.sqrt(edge) for edge in edges]
    result, columns = result | curve, columns | aurc

    if "disagreement" in args.mode:
        matrix = diversity.disagreement(predictions)
        columns["disagreement"] = diversity.disagreement_per_sample(predictions)
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
            name: {form: cka_matrix(name, tensors, form == "debiased") for form in ("debiased", "biased")}
            for name, tensors in (("features", features), ("centred_logits", list(diversity.centred(logits))))
        }

    result["rates"] = {name: column.mean().item() for name, column in columns.items()}
    return result, columns, gaps


def calibrated_scores(
    args: argparse.Namespace, log_probs: Tensor, columns: dict[str, Tensor], temperature: float, labels: Tensor
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The scores of log-probabilities [N, C], with a temperature as `calibrated`, and the columns of the latter."""
    with_it = metrics.with_temperature(log_probs, temperature)
    calibrated = metrics.per_sample(with_it, labels)
    result: dict[str, Any] = metrics.scores(columns, log_probs.exp(), labels, args.bins)
    return result | {"calibrated": metrics.scores(calibrated, with_it.exp(), labels, args.bins)}, calibrated


def risk_coverage_of(ensemble: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The risk-coverage curve of an ensemble with these columns [N], and its AURC by image."""
    confidence, correct = ensemble["confidence"], ensemble["correct"]
    found = metrics.risk_coverage(confidence, correct)
    points = torch.arange(1, 101, dtype=torch.float64) * len(correct) / 100
    risk = found["risk"][points.ceil().long() - 1]
    aurc = metrics.aurc_influence(confidence, correct) * len(correct) + found["aurc"]
    return {"excess_aurc": found["excess_aurc"], "risk_at_percent": risk.tolist()}, {"aurc": aurc}


def subset_temperatures(logits: Tensor, labels: Tensor, average: str) -> dict[int, list[tuple[tuple[int, ...], float]]]:
    """A temperature for each subset of the members but all of them, fitted on validation logits [M, N, C], by size."""
    log_probs = torch.log_softmax(logits.double(), dim=2)

    def fitted(subset: tuple[int, ...]) -> float:
        return metrics.fit_temperature(metrics.ensemble_log_probs(log_probs[list(subset)], average), labels)

    sizes = diversity.subsets_by_size(len(logits))
    return {n: [(subset, fitted(subset)) for subset in chosen] for n, chosen in sizes.items() if n < len(logits)}


def calibrated_by_size(
    logits: Tensor, labels: Tensor, average: str, of_subsets: dict[int, list[tuple[tuple[int, ...], float]]]
) -> dict[str, Tensor]:
    """Calibrated NLL [N] of ensembles of fewer members, by size: mean over `subset_temperatures`' subsets."""
    log_probs, found = torch.log_softmax(logits.double(), dim=2), {}
    for size, subsets in of_subsets.items():
        outputs = ((metrics.ensemble_log_probs(log_probs[list(s)], average), t) for s, t in subsets)
        columns = (metrics.per_sample(metrics.with_temperature(output, t), labels)["nll"] for output, t in outputs)
        found[f"{OF_SIZE}{size}"] = sum(columns) / len(subsets)
    return found


def other_sets(words: list[str], measurement: Measurement) -> dict[str, list[Part]]:
    """The parts of each set that --ood names, by its name in the result."""
    settings, data, sets, images = measurement.settings, measurement.data, {}, 0
    for word in words:
        name, path = ood.split_word(word)
        key = f"folder:{path.resolve().name}" if path and name == "folder" else name
        if key in sets:
            problem = f"--ood {word}: a set named {key} is given twice"
            raise InputError(f"{problem}; name each once, folders by different names")
        if name == ood.CORRUPTED:
            ood.require_corrupted(data, settings.data_path)
            sets[key] = measurement.parts("corrupted")
            continue
        found = ood.read_set(name, path, data, settings.data_path, settings.download)
        place = hashlib.sha256(str(path and path.resolve()).encode()).hexdigest()[:8]
        sets[key] = [Part(f"ood-{name}" + f"-{place}" * (path is not None), partial(lambda images: images, found))]
        images += len(found)
    if sets:
        measurement.add_parts("ood", [part for parts in sets.values() for part in parts], images)
    return sets


def measure_sets(average: str, measurement: Measurement, sets: dict[str, list[Part]]) -> dict[str, Any]:
    """What `utils.ood` finds of each set against the test images; of corrupted copies also by severity.

    Copies are compared with the images that they were made of, where their labels are those of the first test images.
    """
    (test,) = measurement.parts("test")
    logits, labels, _ = measurement.predictions(test)
    inside, largest, results = ood.scores(logits, average), ood.largest_scores(len(logits), logits.shape[2]), {}
    for key, parts in sets.items():
        compared, digests = [], []
        for part in parts:
            others, copied, _ = measurement.predictions(part)
            paired = part.corruption is not None and torch.equal(copied, labels[: len(copied)])
            known = {name: score[: len(copied)] if paired else score for name, score in inside.items()}
            compared.append(ood.compare(known, ood.scores(others, average), largest, paired))
            digests.append(measurement.predictions.digests[part.name])
        about = {"test_images": len(known["entropy"]), "images": len(copied), "members": len(logits)}
        about["sha256_of_images"] = hashlib.sha256("".join(digests).encode()).hexdigest()
        results[key] = ood.summarize(compared, about)
        if parts[0].corruption is not None:
            results[key]["by_severity"] = {
                s: ood.means([one for one, part in zip(compared, parts, strict=True) if part.severity == s])
                for s in sorted({part.severity for part in parts})
            }
    return results


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
            output = metrics.ensemble_log_probs(log_probs[list(subset)], args.average)
            return metrics.scores(metrics.per_sample(output, labels), output.exp(), labels, args.bins)
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


def cka_matrix(name: str, representations: list[Tensor], debiased: bool) -> dict[str, Any]:
    """CKA of each pair of members, and its mean; `name` is that of the representations."""
    members = len(representations)
    matrix = torch.eye(members, dtype=torch.float64)
    for i, j in itertools.combinations(range(members), 2):
        try:
            matrix[i, j] = matrix[j, i] = diversity.linear_cka(representations[i], representations[j], debiased)
        except ValueError as error:
            alike = next((k + 1 for k in (i, j) if (representations[k] == representations[k][0]).all()), None)
            which = f": the {name.replace('_', ' ')} of member {alike}" if alike else ""
            raise InputError(f"--mode CKA: {error}{which}; leave that mode{' or member' * bool(alike)} out") from error
    return {"matrix": matrix.tolist(), "mean": mean_over_pairs(matrix)}


def summarize(parts: list[Part], found: dict[str, PartResult], members: int) -> dict[str, Any]:
    """The metrics of a split with intervals; of a corrupted set by part, by severity, and the mean of all.

    Means over parts are means of the metrics; DER and EIR are ratios of mean rates, for a part as for a mean.
    """
    everything = mean_of_parts(parts, found) | of_samples(parts, found, members)
    if parts[0].corruption is None:
        return everything
    severities = sorted({part.severity for part in parts})
    return {
        "mean": everything,
        "by_severity": {s: mean_of_parts([p for p in parts if p.severity == s], found) for s in severities},
        "parts": {part.name: mean_of_parts([part], found) for part in parts},
    }


def of_samples(parts: list[Part], found: dict[str, PartResult], members: int) -> dict[str, dict[str, str]]:
    """What comparisons of two ensembles sample by sample need: `right_of_samples`, counts, and `values_of_samples`.

    Counts are sums over parts, values are means over parts; nothing where parts are of different images.
    """
    columns = [found[part.name].columns for part in parts]
    if len({len(one["ensemble_accuracy"]) for one in columns}) > 1:
        return {"right_of_samples": {}, "values_of_samples": {}}
    sums = {name: sum(one[name] for one in columns).numpy() for name in columns[0]}
    whole = {"member_accuracy": members, "disagreement": math.comb(members, 2), "ensemble_accuracy": 1}
    counts = {COUNTS[name]: (sums[name] * whole[name]).round() for name in COUNTS if name in sums}
    kept = [name for name in sums if name in KEPT_VALUES or name.startswith(OF_SIZE)]
    values = {name: sums[name] / len(parts) for name in kept}
    return {
        "right_of_samples": {name: metrics.pack_counts(n) for name, n in counts.items() if n.max() < 2**16},
        "values_of_samples": {name: metrics.pack_values(value) for name, value in values.items()},
    }


def mean_of_parts(parts: list[Part], found: dict[str, PartResult]) -> dict[str, Any]:
    """The mean over parts, with intervals and what derives from its rates."""
    rows, draws = ([found[part.name][i] for part in parts] for i in (0, 2))
    result = (dict(rows[0]) if len(rows) == 1 else mean_of(rows)) | {"parts": len(parts)}
    rmsce_interval = result.pop("rmsce_interval", None)
    resampled = {name: torch.stack([one[name] for one in draws]).mean(dim=0) for name in draws[0]}
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


def print_tables(split: str, result: dict[str, Any], average: str) -> None:
    """Members and ensemble of a split; of a corrupted set a line for each severity and the mean."""
    images, these, bracketed = {"train": "training", "val": "validation"}.get(split, "test"), "networks", False
    mean = "; ensemble: softmax of the mean logit" * (average == "logits")  # else the usual one, of probabilities
    if "by_severity" in result:
        these = "networks and corruptions"
        rows = [(f"{split}, severity {s}", row) for s, row in result["by_severity"].items()]
        rows.append((f"{split}, mean of {result['mean']['parts']}", result["mean"]))
    else:
        rows = [(split, result)]
    for title, row in rows:
        print(f"\n{title} ({round(row['samples'])} images{' each' if row['parts'] > 1 else ''}{mean})")
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
                bracketed |= bool(edges)
                print(f"  {title:26} {value:8.4f}" + ("  [{:.4f}, {:.4f}]".format(*edges) if edges else ""))
    if bracketed:
        print(f"[ ]: 95 % interval over {images} images, of these {these} only")
    of_sets = [print_set(name, found) for name, found in result.get("ood", {}).items()]
    if any(of_sets):
        print("[ ]: 95 % interval over test images and other images, of these networks only")


def print_set(name: str, found: dict[str, Any]) -> bool:
    """How well each score tells a set from the test images; returns whether there are intervals."""
    each = " each" if found["parts"] > 1 else ""
    print(f"\nout of distribution: {name} ({found['images']} images{each}), from {found['test_images']} test images")
    print("                            " + "".join(f"{text:26}" for text in metrics.OOD_METRICS.values()).rstrip())
    for score, text in metrics.OOD_SCORES.items():
        cells = []
        for metric in metrics.OOD_METRICS:
            edges, value = found["intervals_95"][score][metric], found["scores"][score][metric]
            cells.append(f"{value:.4f}" + ("  [{:.4f}, {:.4f}]".format(*edges) if edges else ""))
        print(f"  {text:26}" + "".join(f"{cell:26}" for cell in cells).rstrip())
    if found["members"] == 1:
        print("  One member: its mutual information is 0 for every image, and tells nothing apart.")
    return any(any(of.values()) for of in found["intervals_95"].values())


if __name__ == "__main__":
    cli.run(main, parse_args(), forks=True)
