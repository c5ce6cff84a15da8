"""Result files and run folders as ensembles: read them, name their methods, check that they compare, group them."""

import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils import InputError, first_line, metrics, printable, some
from utils.files import OTHERWISE, load_json, read_json, write_json
from utils.metrics import (
    OOD_METRICS,
    OOD_SCORES,
    crossed_interval,
    paired_bootstrap,
    t_interval,
    unpack_counts,
    unpack_values,
)
from utils.run import CHECKPOINTS, FREE_SETTINGS, current_settings, read_settings


class Method(NamedTuple):
    """The name of a method in tables, figures and text, and its colour."""

    name: str
    colour: str


# All methods, in the order of legends. The palette was searched: each colour has a contrast above 3 on white, and all
# pairs differ for colour-blind readers too (tests/test_plots.py). The keys released, paper, random and same are the
# values of --partition.
METHODS = {
    "deep_ensemble": Method("deep ensemble", "#1A664D"),
    "sam": Method("SAM", "#D67822"),
    "sharpbalance": Method("SharpBalance", "#434AFA"),  # of the theorems, in which members do not pick samples
    "released": Method("SharpBalance (released)", "#434AFA"),
    "paper": Method("SharpBalance (paper)", "#1391DB"),
    "random": Method("SAM on random samples", "#8200AC"),
    "same": Method("SAM on the same random samples", "#590922"),
    "averaged": Method("ensemble of averages (EoA)", "#785A00"),
    "asam": Method("ASAM", "#868686"),
    "unknown": Method("unknown method", "#000000"),  # checkpoints that do not record how they were trained
}


class Value(NamedTuple):
    """A number in result files: its key there, and its title, factor and digits in tables."""

    key: str
    title: str
    factor: int
    digits: int


# Values of a test set in diversity.json, by their names in `Ensemble.values`.
VALUES = {
    "member": Value("member_accuracy", "member acc. %", 100, 2),
    "ensemble": Value("ensemble_accuracy", "ensemble acc. %", 100, 2),
    "gain": Value("gain", "gain, points", 100, 2),
    "eir": Value("eir", "EIR", 1, 3),
    "der": Value("der", "DER", 1, 3),
    "disagreement": Value("disagreement", "disagreement %", 100, 2),
    "variance": Value("variance_of_probabilities", "variance", 1, 4),
    "nll": Value("ensemble_nll", "ensemble NLL", 1, 4),
    "nll_calibrated": Value("ensemble_nll_calibrated", "ensemble NLL, calibrated", 1, 4),
    "ece": Value("ensemble_ece", "ensemble ECE %", 100, 2),
    "ece_calibrated": Value("ensemble_ece_calibrated", "ensemble ECE %, calibrated", 100, 2),
    "rmsce": Value("ensemble_rmsce", "ensemble RMSCE %", 100, 2),
    "aurc": Value("aurc", "AURC %", 100, 3),
    "entropy": Value("entropy", "entropy, nats", 1, 4),
    "mutual_information": Value("mutual_information", "mutual information, nats", 1, 4),
}
SHARES = ("member", "ensemble", "disagreement", "ece", "ece_calibrated", "rmsce", "aurc")
OF_SIZE = "ensemble_nll_calibrated_of_"  # of fewer members, by image; the number follows
# Values in sharpness.json, means over members.
SHARPNESS = {
    "sharpness": Value("APGD_worst-l2", "sharpness (worst, l2)", 1, 4),
    "sharpness_linf": Value("APGD_worst-linf", "sharpness (worst, linf)", 1, 4),
    "sharpness_average": Value("APGD_average-l2", "sharpness (average, normal noise)", 1, 4),
    "hessian_trace": Value("hessian_t", "trace of Hessian", 1, 1),
    "hessian_top": Value("hessian_e", "top eigenvalue", 1, 2),
    "fisher": Value("fisher", "Fisher trace", 1, 3),
    "ntk": Value("NTK", "log det NTK", 1, 1),
}
MAX_LINF = 0.05  # the largest radius in linf that tables show: at 0.5 each weight changes by half, a rise of 1e9 nats
# Options of measurements that must agree before ensembles are compared.
SAME = ("average", "bins", "checkpoint", "split", "corruptions", "severities")
# Of the sharpness, where a part does not record its own protocol, as those of earlier versions.
SAME_SHARPNESS = ("rho0", "adaptive", "n_iters", "maximiser", "eval_batch_size", "batch_num", "subset_seed", "split")
SAME_SHARPNESS += ("params", "hessian_samples", "ntk_samples", "n_draws", "trace_method", "probes", "top_k")
# Settings of a training that make its method, which may differ between ensembles that are compared, and the seeds.
COMPARED = {"sam", "rho", "sam_adaptive", "flat_ratio", "initial_epochs", "partition", "unselected", "match_size"}
COMPARED |= {"average_from", "bn_perturbed", "initial_method", "seed"}
UNKNOWN = object()  # what a file does not record, and which therefore is equal to nothing
UNVERIFIED = ("the corrupted set", "how it was trained")  # worth a line also where no file records them
# Those of `SAME_SHARPNESS` that matter to some parts only.
PARTS_OF = {"hessian_samples": {"hessian_t", "hessian_e"}, "ntk_samples": {"NTK"}, "top_k": {"hessian_e"}}
PARTS_OF |= {
    "n_draws": {"APGD_average-l2", "APGD_average-linf"},
    "trace_method": {"hessian_t"},
    "probes": {"hessian_t"},
}
BOTH = "ensembles, images"  # the population of a crossed interval

Interval = list[float] | None
Estimate = tuple[float, Interval]  # a mean over ensembles
Gap = float | torch.Tensor  # a difference of two ensembles, or [N] differences by test image


@dataclass
class Ensemble:
    """The measurements of one ensemble.

    Args:
        folder: where they were read.
        method: the method's name with its settings.
        seeds: of the members.
        values: means over members or of the whole ensemble, by the names of `VALUES` (with "corrupted_" before them on
            the corrupted set) and `SHARPNESS`; None where not measured.
        spread: standard deviations over members.
        intervals: 95 % intervals over test images.
        by_sample: [N] numbers, one for each test image, whose mean is the value (DER and EIR are ratios: to first
            order).
        content: the result file; `trained` holds the settings of the run by the names of today.
    """

    folder: Path
    method: str
    seeds: tuple[int | None, ...]
    values: dict[str, float | None] = field(default_factory=dict)
    spread: dict[str, float | None] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    by_sample: dict[str, torch.Tensor] = field(default_factory=dict)
    content: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The method's key in `METHODS`."""
        settings = self.content.get("trained")
        if not settings:
            return "unknown"
        averaged = self.content.get("protocol", {}).get("checkpoint") == "averaged"
        return "averaged" if averaged else key_of(settings)


def is_sam(ensemble: Ensemble) -> bool:
    """Whether SAM trained all samples from the first epoch on, as what others are compared with."""
    return ensemble.key == "sam" and ensemble.content["trained"].get("initial_method") != "sgd"


def key_of(settings: dict[str, Any]) -> str:
    """The key in `METHODS` of the method that a run was trained by."""
    if not settings["sam"] or not settings["rho"]:
        return "deep_ensemble"
    if settings["flat_ratio"]:
        return settings["partition"]
    return "asam" if settings["sam_adaptive"] else "sam"


def method_of(settings: dict[str, Any], averaged: bool = False) -> str:
    """The name of the method that a run was trained by, followed by its settings where they vary."""
    key = key_of(settings)
    if key == "deep_ensemble":
        return METHODS["averaged" if averaged else key].name
    parts, rho = [METHODS["averaged"].name] if averaged else [], f"rho {settings['rho']:g}"
    parts.append(METHODS[key].name)
    if settings.get("bn_perturbed") == "freeze":
        parts.append("bn_perturbed freeze")
    late = settings.get("initial_method") == "sgd"
    if late:
        parts.append("SGD first")
    begins = [f"T_d {settings['initial_epochs']}"] if late or settings["flat_ratio"] else []
    if not settings["flat_ratio"]:
        return ", ".join([*parts, rho, *begins])
    size, reading = settings["match_size"], settings["match_size"] or settings["partition"]
    usual = "normal" if reading == "paper" else "others" if settings.get("data") == "cifar10" else "one"
    if settings["sam_adaptive"]:
        parts.append("adaptive")
    if size:
        parts.append(f"sized as {METHODS[size].name}")
    if settings["unselected"] not in (None, usual):
        parts.append(f"unselected {settings['unselected']}")
    return ", ".join([*parts, rho, f"k {settings['flat_ratio']:g}", *begins])


def read_ensemble(folder: Path) -> Ensemble:
    """The measurements of one ensemble.

    Raises:
        InputError: naming the file that is missing or not what the scripts write.
    """
    path = folder / "diversity.json"
    content = read_json(path, f"make it by python measure_diversity.py --save {folder}")
    try:
        seeds = tuple(member["seed"] for member in content["members"])
        averaged = all(str(member.get("path")).endswith(CHECKPOINTS["averaged"]) for member in content["members"])
        if averaged:  # --checkpoint says something else where the files were named one by one
            content["protocol"]["checkpoint"] = "averaged"
        method = printable(folder.name) + averaged * f", {METHODS['averaged'].name}"
        if content.get("trained"):
            content["trained"] = current_settings(content["trained"])
            method = method_of(content["trained"], averaged)
        ensemble = Ensemble(folder, method, seeds, content=content)
        _add_part(ensemble, content["result"]["test"])
        if content["result"].get("corrupted") is not None:
            _add_part(ensemble, content["result"]["corrupted"]["mean"], "corrupted_")
        accuracies = [member["accuracy"] for member in content["result"]["test"].get("members", [])]
        if len(accuracies) > 1:
            ensemble.spread["member"] = standard_deviation(accuracies)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a result of the test set ({error}); measure again with --split test") from error
    path = folder / "sharpness.json"
    if path.is_file():
        try:
            _add_sharpness(ensemble)
        except InputError:
            raise
        except OTHERWISE as error:
            raise InputError(f"{path}: not a result of measure_sharpness.py ({error}); measure again") from error
    return ensemble


def _add_part(ensemble: Ensemble, row: dict[str, Any], prefix: str = "") -> None:
    """Add the values, intervals and per-image numbers of one test set."""
    scores = row.get("ensemble", {})
    known = {f"ensemble_{name}": scores.get(name) for name in ("nll", "ece")} | row["rates"]
    known |= {f"ensemble_{name}_calibrated": scores.get("calibrated", {}).get(name) for name in ("nll", "ece")}
    known["ensemble_rmsce"] = row.get("rmsce")
    known |= {key: row.get(key) for key in ("variance_of_probabilities", "der", "eir")}
    known["gain"] = known["ensemble_accuracy"] - known["member_accuracy"]
    members = len(ensemble.seeds)
    units = {"members": ("member", members), "ensemble": ("ensemble", 1)}
    units["differing_pairs"] = ("disagreement", members * (members - 1) / 2)
    by_sample = {}
    for key, text in row["right_of_samples"].items():
        name, whole = units[key]
        by_sample[name] = torch.from_numpy(unpack_counts(text)) / (whole * row["parts"])
    for name, (key, *_) in VALUES.items():
        if key in row.get("values_of_samples", {}):
            by_sample[name] = torch.from_numpy(unpack_values(row["values_of_samples"][key]))
    for key, text in row.get("values_of_samples", {}).items():
        if key.startswith(OF_SIZE):
            by_sample[key.removeprefix("ensemble_")] = torch.from_numpy(unpack_values(text))
    if "aurc" in by_sample:
        by_sample["aurc"] = _centred(by_sample["aurc"], known["aurc"])
    if {"member", "ensemble"} <= by_sample.keys():
        by_sample["gain"] = by_sample["ensemble"] - by_sample["member"]
        wrong = 1 - by_sample["member"]
        for name, part in {"eir": by_sample["gain"], "der": by_sample.get("disagreement")}.items():
            if part is not None and row.get(name) is not None:
                # The ratio of two means r = a/b moves with sample x by (a_x - r b_x) / b.
                by_sample[name] = row[name] + (part - row[name] * wrong) / wrong.mean()
    for name, (key, *_) in VALUES.items():
        ensemble.values[prefix + name] = known.get(key)
        ensemble.intervals[prefix + name] = row["intervals_95"].get(key)
    ensemble.by_sample |= {prefix + name: column for name, column in by_sample.items()}
    for of, found in row.get("ood", {}).items():
        for score, metric in itertools.product(OOD_SCORES, OOD_METRICS):
            name, value = ood_name(of, score, metric), found["scores"][score][metric]
            if text := found["values_of_samples"].get(score, {}).get(metric):
                ensemble.by_sample[name] = _centred(torch.from_numpy(unpack_values(text)), value)
            ensemble.values[name] = value
            ensemble.intervals[name] = found["intervals_95"][score][metric]


def _centred(column: torch.Tensor, mean: float) -> torch.Tensor:
    """A column of which only the deviations from its mean are kept exactly, with its mean."""
    return column + (mean - column.mean())


def ood_name(of: str, score: str, metric: str) -> str:
    """The name in `Ensemble.values` of how well a score tells a set of other data from the test images."""
    return f"{metric} {score} {of}"


def ood_values(ensembles: list[Ensemble]) -> dict[str, Value]:
    """The AUROC columns of tables of all sets of other data that were measured, by their names in `Ensemble.values`."""
    sets = dict.fromkeys(of for one in ensembles for of in one.content["result"]["test"].get("ood", {}))
    return {
        ood_name(of, score, "auroc"): Value("", f"{OOD_METRICS['auroc']} %, {of}, {text}", 100, 2)
        for of in sets
        for score, text in OOD_SCORES.items()
    }


def _add_sharpness(ensemble: Ensemble) -> None:
    """Add the sharpness.json beside diversity.json."""
    path, members = ensemble.folder / "sharpness.json", len(ensemble.seeds)
    sharpness = read_json(path, f"make it by python measure_sharpness.py --save {ensemble.folder}")
    ensemble.content["sharpness"] = sharpness
    for name, (part, *_) in SHARPNESS.items():
        found = sharpness.get("result", {}).get(part, {})
        # An interrupted measurement covers only some of the members.
        if found.get("n", members) == members and not beyond_linf(ensemble, part):
            ensemble.values[name], ensemble.spread[name] = found.get("mean"), found.get("std")
    ours, theirs = ([m["sha256_of_weights"] for m in one.get("members", [])] for one in (ensemble.content, sharpness))
    if "members" in sharpness and ours != theirs:
        raise InputError(f"{path}: of other weights than diversity.json beside it; measure one of them again")


def populations(groups: list[list[Ensemble]], titles: dict[str, str]) -> str:
    """What a table's intervals are over, as the end of a sentence.

    Args:
        groups: of several ensembles each. A value that some ensemble of a group lacks has no interval there.
        titles: of the values.
    """
    rows = {name: [g for g in groups if all(one.values.get(name) is not None for one in g)] for name in titles}
    known = [name for name in titles if rows[name]]
    alone = [name for name in known if any(population_of(group, name) != BOTH for group in rows[name])]
    if not alone:
        return "over new ensembles and new test images"
    names = ", ".join(titles[name] for name in alone)
    rest = "; else over new ensembles and new test images" * (alone != known)
    return f"over new ensembles, with the images as they are: {names}{rest}"


def batches_of(ensemble: Ensemble, part: str) -> int:
    """The number of batches that a part of the sharpness was measured on, of fewer images than were asked for too."""
    protocol = sharpness_protocol(ensemble, part)
    members = ensemble.content["sharpness"]["result"][part].get("members") or [{}]
    images = (members[0] or {}).get("images")
    return min(protocol["batch_num"], -(-images // protocol["eval_batch_size"])) if images else protocol["batch_num"]


def beyond_linf(ensemble: Ensemble, part: str = "APGD_worst-linf") -> bool:
    """Whether a part of the sharpness was measured in linf at a radius that tables do not show."""
    measured = part in ensemble.content.get("sharpness", {}).get("result", {})
    return measured and part.endswith("-linf") and (sharpness_protocol(ensemble, part).get("rho0") or 0) > MAX_LINF


def copy_results(
    folder: Path, target: Path, experiment: dict[str, Any] | None = None, by_image: list[str] | None = None
) -> None:
    """Copy the result files of an ensemble; of each part of a corrupted set only the mean rates.

    Args:
        folder, target: from and to.
        experiment: what asked for them, which the copies record.
        by_image: the values that are kept by image besides what is right (default: all), as "ensemble_nll" and
            "auroc entropy"; the intervals of others are then over ensembles alone.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in ("diversity.json", "sharpness.json"):
        content = load_json(folder / name)
        corrupted = content["result"].get("corrupted") or {"parts": {}}
        corrupted["parts"] = {part: {"rates": row["rates"]} for part, row in corrupted["parts"].items()}
        for row in (content["result"].get("test", {}), corrupted.get("mean", {})) if by_image is not None else ():
            row["values_of_samples"] = _chosen(row.get("values_of_samples", {}), by_image)
            for found in row.get("ood", {}).values():
                of_scores = found["values_of_samples"].items()
                values = {score: _chosen(by_metric, by_image, f" {score}") for score, by_metric in of_scores}
                found["values_of_samples"] = values
        write_json(target / name, content | ({"experiment": experiment} if experiment else {}), indent=None)


def _chosen(values: dict[str, Any], names: list[str], end: str = "") -> dict[str, Any]:
    """The values whose names, with this end, are among the given ones."""
    return {name: value for name, value in values.items() if f"{name}{end}" in names}


def read_run(folder: Path) -> Ensemble:
    """An ensemble without measurements, from its run folder: how it was trained, and on which data.

    Raises:
        InputError: naming the file that is missing or not what main.py writes.
    """
    settings = read_settings(folder)
    content = read_json(folder / "environment.json", "it is part of a run of main.py")
    trained = {name: value for name, value in settings.items() if name not in FREE_SETTINGS}
    try:
        content["data"]["sha256_of_arrays_and_split"]
        about = {"data": content["data"], "protocol": {}, "trained": trained, "settings": settings}
        about["network"] = {"model": trained["model"], "width": trained["width"]}
        return Ensemble(folder, method_of(trained), tuple(settings["seed"]), content=about)
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder}: its args.json and environment.json do not describe a run ({error})") from error


def require(ensemble: Ensemble, *keys: str) -> Any:
    """An entry of the result in diversity.json.

    Raises:
        InputError: if it was not measured, and how to measure it.
    """
    value = ensemble.content["result"]
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            what, flag = f"'{key}' is missing", "--mode predict,disagreement"
            if key == "corrupted":
                what, flag = "no corrupted set was measured", "--split test,corrupted"
            raise InputError(f"{ensemble.folder}/diversity.json: {what}; measure it by measure_diversity.py {flag}")
        value = value[key]
    return value


def standard_deviation(values: Sequence[float]) -> float | None:
    """The sample's; None for fewer than two values, or where one is not finite."""
    return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def estimate(values: list[float], interval: Interval = None, level: float = 0.95) -> Estimate:
    """Mean over ensembles and its interval: Student's, or the given one where there is a single ensemble.

    There is no interval where a value is not finite.
    """
    finite = all(map(math.isfinite, values))
    return statistics.mean(values), (t_interval(values, level) if len(values) > 1 else interval) if finite else None


def population_of(ensembles: list[Ensemble], name: str) -> str:
    """What the interval of `estimate_of` is over: "ensembles, images", "ensembles", or of one ensemble "images"."""
    if len(ensembles) == 1:
        return "images"
    lengths = {len(one.by_sample[name]) if name in one.by_sample else 0 for one in ensembles}
    return BOTH if len(lengths) == 1 and lengths != {0} else "ensembles"


def estimate_of(ensembles: list[Ensemble], name: str) -> Estimate:
    """Mean over ensembles of a value and its 95 % interval, over the population that `population_of` names.

    That of a share ends at 0 and 1.
    """
    values = [ensemble.values[name] for ensemble in ensembles]
    interval, by_sample = ensembles[0].intervals.get(name), ensembles[0].by_sample.get(name)
    if len(ensembles) == 1 and interval is None and by_sample is not None:
        interval = paired_bootstrap(by_sample.double())
    mean, interval = estimate(values, interval)
    if population_of(ensembles, name) == BOTH and all(map(math.isfinite, values)):
        interval = crossed_interval(torch.stack([one.by_sample[name] for one in ensembles]))
    if interval and (name.removeprefix("corrupted_") in SHARES or name.startswith("auroc ")):
        interval = [min(max(edge, 0.0), 1.0) for edge in interval]
    return mean, interval


def gap_between(a: Ensemble, b: Ensemble, name: str) -> Gap | None:
    """A value of a minus that of b: by image if both are known by image, None if one was not measured."""
    one, other = a.by_sample.get(name), b.by_sample.get(name)
    if one is not None and other is not None and len(one) == len(other):
        return one.double() - other.double()
    one, other = a.values.get(name), b.values.get(name)
    return None if one is None or other is None else one - other


def interval_of(gaps: list[Gap], level: float = 0.95) -> tuple[float, Interval, str]:
    """The mean of differences of ensembles, its 95 % interval, and the population that the interval is over.

    One pair has no interval: over test images alone it would tell these two trained ensembles apart, not their methods.
    """
    table = _table_of(gaps)
    if table.dim() == 2:
        return table.mean().item(), crossed_interval(table, level), BOTH
    return *estimate(table.tolist(), level=level), "ensembles" if len(gaps) > 1 else "-"


def p_value_of(gaps: list[Gap]) -> float:
    """The p value of a mean difference of 0, by the interval of `interval_of`; 1 where that has none."""
    return metrics.p_value(_table_of(gaps)) if interval_of(gaps)[1] is not None else 1.0


def _table_of(gaps: list[Gap]) -> torch.Tensor:
    """Differences of ensembles by image, float64 [E, N], where all are known on as many images; else means [E]."""
    if len(gaps) > 1 and all(isinstance(gap, torch.Tensor) for gap in gaps) and len({len(gap) for gap in gaps}) == 1:
        return torch.stack(gaps).double()
    return torch.tensor([gap.mean() if isinstance(gap, torch.Tensor) else gap for gap in gaps], dtype=torch.float64)


def difference_of(pairs: list[tuple[Ensemble, Ensemble]], name: str) -> tuple[float, Interval, str] | None:
    """`interval_of` the differences of pairs of ensembles in a value; None if one of them was not measured."""
    gaps = [gap_between(a, b, name) for a, b in pairs]
    return interval_of(gaps) if gaps and all(gap is not None for gap in gaps) else None


def check_alike(ensembles: list[Ensemble]) -> None:
    """Refuse to compare what was trained by different recipes, or measured on different data or by different protocols.

    What is recorded of some ensembles only (of `UNVERIFIED` also what is of none) is named in one line on stderr.

    Raises:
        InputError: naming two folders and what differs between them, or two of the same method and seeds.
    """
    settings = {name: UNKNOWN for one in ensembles for name in one.content.get("trained") or {}}
    facts, unknown = [], {}
    for ensemble in ensembles:
        try:
            facts.append((ensemble.folder, _facts(ensemble, settings)))
        except OTHERWISE as error:
            problem = f"{ensemble.folder}: a result file is damaged ({first_line(error)}); measure it again"
            raise InputError(problem) from error
    for name in dict.fromkeys(["data", *UNVERIFIED, *(name for _, found in facts for name in found)]):
        asked = [(folder, found[name]) for folder, found in facts if name in found]
        known = [(folder, value) for folder, value in asked if value is not UNKNOWN]
        for folder, value in known:
            first, expected = known[0]
            if value != expected:
                what = f"{name} differs ({value!s:.40}, {expected!s:.40})"
                way_out = "compare what was trained alike" if name.endswith("training") else "measure both alike"
                raise InputError(f"{folder} and {first} cannot be compared: {what}; {way_out}")
        if len(known) < len(asked) > 1 and (known or name in UNVERIFIED):
            unknown[name] = [folder for folder, value in asked if value is UNKNOWN]
    folders = {}
    for ensemble in ensembles:
        trained, place = ensemble.content.get("trained"), str(ensemble.folder.resolve())
        key = (ensemble.method, ensemble.seeds, json.dumps(trained, sort_keys=True) if trained else place)
        if key in folders:
            raise InputError(f"{ensemble.folder} and {folders[key]} are the same method and seeds; give each once")
        folders[key] = ensemble.folder
    if unknown:
        where = {}
        for name, missing in unknown.items():
            where.setdefault(some(missing, 1), []).append(name)
        text = "; ".join(f"{', '.join(names)} (of {place})" for place, names in where.items())
        print(f"note: not recorded, so that it may differ: {printable(text)}", file=sys.stderr)


def _facts(ensemble: Ensemble, settings: dict[str, Any]) -> dict[str, Any]:
    """What must agree between all ensembles that are compared and have it; `UNKNOWN` where that is not recorded.

    Args:
        ensemble: with its result files.
        settings: the names of all settings of training, with `UNKNOWN`.
    """
    content, sharpness = ensemble.content, ensemble.content.get("sharpness", {})
    facts = {
        "data": content["data"]["sha256_of_arrays_and_split"],
        "network": "{model} of width {width}".format(**content["network"]),
    }
    for of, found in content.get("result", {}).get("test", {}).get("ood", {}).items():
        facts[f"the images of --ood {of}"] = found.get("sha256_of_images", UNKNOWN)
    corrupted, digest = content.get("result", {}).get("corrupted"), content["data"].get("sha256_of_corrupted")
    if corrupted or digest:
        facts["the corrupted set"] = digest or UNKNOWN
    if corrupted:
        facts["the number of corrupted images"] = corrupted["mean"].get("samples", UNKNOWN)
    if content["protocol"]:  # a run that was only trained has none
        facts |= {f"--{key}": protocol_of(ensemble, key) if key in content["protocol"] else UNKNOWN for key in SAME}
        if isinstance(facts["--split"], list):  # in whatever order they were measured
            facts["--split"] = sorted(facts["--split"])
        if facts["--checkpoint"] not in CHECKPOINTS:  # files of other names
            facts["--checkpoint"] = UNKNOWN
        # Earlier versions of the code recorded none.
        made = content.get("made_by", {"test": {mode: {} for mode in content["protocol"].get("mode", [])}})
        for mode, record in made.get("test", {}).items():
            facts[f"the version of {mode}"] = record.get("versions", UNKNOWN)
    for part in [name for name in sharpness.get("result", {}) if name != "missing" and not beyond_linf(ensemble, name)]:
        protocol, row = sharpness_protocol(ensemble, part), sharpness["result"][part]
        for key in row.get("protocol", [key for key in SAME_SHARPNESS if part in PARTS_OF.get(key, {part})]):
            facts[f"{part}: --{key} of the sharpness"] = protocol.get(key, UNKNOWN)
        versions = [one.get("versions", UNKNOWN) for one in row.get("members", []) if one]
        facts[f"{part}: the version of the sharpness"] = versions[0] if versions else UNKNOWN
    trained = content.get("trained")
    facts["how it was trained"] = "recorded" if trained else UNKNOWN
    if trained:
        recipe = {name: value for name, value in (settings | trained).items() if name not in COMPARED}
        facts |= {f"--{name} of the training": value for name, value in recipe.items() if name not in FREE_SETTINGS}
    return facts


def sharpness_protocol(ensemble: Ensemble, part: str) -> dict[str, Any]:
    """The options that a part of the sharpness was measured with: its own, which later calls for other parts keep."""
    sharpness = ensemble.content["sharpness"]
    return sharpness["protocol"] | sharpness["result"].get(part, {}).get("protocol", {})


def setting_of(content: dict[str, Any]) -> str:
    """Data and network of a result file or a run, in words."""
    data, network = content["data"], content["network"]
    text = f"{data['dataset']}, {network['model']} of width {network['width']}"
    if data.get("train"):
        text += f", {data['train']} training images"
    return text + (f", {100 * data['label_noise']:g} % of their labels wrong" if data.get("label_noise") else "")


def protocol_of(ensemble: Ensemble, key: str) -> Any:
    """An option that the ensemble was measured with; averaged weights count as those of the end of training."""
    value = ensemble.content["protocol"].get(key)
    return "last" if key == "checkpoint" and value == "averaged" else value


def groups_of(ensembles: list[Ensemble]) -> dict[str, list[Ensemble]]:
    """Ensembles of equal settings, apart from the seeds, by a name that is different for each group.

    One whose settings are not known is a group of its own.
    """
    by_settings: dict[str, list[Ensemble]] = {}
    for ensemble in ensembles:
        settings = ensemble.content.get("trained")
        settings = settings and {**settings, "seed": len(ensemble.seeds)}  # their number counts, not which they are
        known = json.dumps(settings, sort_keys=True) if settings else str(ensemble.folder)
        by_settings.setdefault(f"{ensemble.method} {known}", []).append(ensemble)
    groups: dict[str, list[Ensemble]] = {}
    for rows in by_settings.values():
        name, folder = rows[0].method, rows[0].folder  # the method is not unique: other settings may differ
        names = (name, f"{name} ({printable(folder.name)})", f"{name} ({printable(str(folder))})")
        groups[next(name for name in names if name not in groups)] = rows
    return groups


def validation_of(folder: Path) -> dict[str, float]:
    """How a run did on validation at its end, and on its augmented training images in the last epoch."""
    last = load_json(folder / "summary.json")["last"]
    logs = [json.loads(file.read_text().splitlines()[-1]) for file in sorted(folder.glob("seed_*/log.jsonl"))]
    accuracies = [member["val_acc"] for member in last["members"]]
    return {
        "training accuracy": statistics.mean(line["train_acc"] for line in logs),
        "member accuracy": statistics.mean(accuracies),
        "standard deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "ensemble accuracy": last["ensemble"]["val_acc"],
        "ensemble NLL": last["ensemble"]["val_loss"],
        "disagreement": last["ensemble"].get("val_disagreement", 0.0),
    }
