"""Ensembles as the result files tell of them: reading, refusing what cannot be compared, and grouping."""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from utils import InputError
from utils.checkpoint import CHECKPOINTS, load_json, read_settings, write_atomically
from utils.ensemble import FREE_SETTINGS, NEUTRAL
from utils.metrics import t_interval, unpack_counts
from utils.partition import DRAWN, PICKED

INTERVALS = {
    "member": "member_accuracy",
    "ensemble": "ensemble_accuracy",
    "disagreement": "disagreement",
    "der": "der",
    "eir": "eir",
    "nll": "ensemble_nll",
    "ece": "ensemble_ece",
}
# What has to be the same in all files of a table.
SAME = ("average", "bins", "checkpoint", "split", "corruptions", "severities")
SAME_SHARPNESS = (
    *("rho0", "adaptive", "n_iters", "maximiser", "eval_batch_size", "batch_num", "subset_seed", "split", "params"),
    *("hessian_samples", "ntk_samples"),
)
# Of these only where such a part was measured.
PARTS_OF = {"hessian_samples": {"hessian_t", "hessian_e"}, "ntk_samples": {"NTK"}}
# The parts of sharpness.json by the names of their values.
SHARPNESS = {
    "sharpness": "APGD_worst-l2",
    "sharpness_linf": "APGD_worst-linf",
    "sharpness_average": "APGD_average-l2",
    "hessian_trace": "hessian_t",
    "hessian_top": "hessian_e",
    "fisher": "fisher",
    "ntk": "NTK",
}


@dataclass
class Ensemble:
    """What was measured of one ensemble, by the names of `COLUMNS`.

    values, their standard deviations over members, their intervals, and, where they are known, by_sample: [N] numbers
    of the test images whose mean is the value (of DER and EIR, which are ratios, to first order).
    """

    folder: Path
    method: str
    seeds: tuple[int | None, ...]
    values: dict[str, float | None]
    spread: dict[str, float]
    intervals: dict[str, list[float] | None]
    by_sample: dict[str, torch.Tensor]
    content: dict[str, Any]


def read_ensemble(folder: Path) -> Ensemble:
    """The measurements of one ensemble.

    Raises:
        InputError: naming the file that is missing or not what the scripts write.
    """
    content = read_result(folder / "diversity.json", "python measure_diversity.py")
    try:
        if content.get("trained"):
            content["trained"] = NEUTRAL | content["trained"]
        row = content["result"]["test"]
        values = _values(row)
        corrupted = content["result"].get("corrupted")
        seeds = tuple(member["seed"] for member in content["members"])
        by_sample = _by_sample(row, len(seeds))
        if corrupted is not None:
            mean = corrupted["mean"]
            values |= {f"corrupted_{name}": value for name, value in _values(mean).items()}
            by_sample |= {f"corrupted_{name}": column for name, column in _by_sample(mean, len(seeds)).items()}
        spread = {}
        if len(row.get("members", [])) > 1:
            spread["member"] = statistics.stdev(member["accuracy"] for member in row["members"])
        intervals = {name: row["intervals_95"].get(key) for name, key in INTERVALS.items()}
        if corrupted is not None:
            intervals |= {f"corrupted_{n}": corrupted["mean"]["intervals_95"].get(key) for n, key in INTERVALS.items()}
        method = method_of(content["trained"]) if content.get("trained") else folder.name
        if all(str(member.get("path")).endswith(CHECKPOINTS["averaged"]) for member in content["members"]):
            content["protocol"]["checkpoint"] = "averaged"  # also where the files were named one by one
            method += ", averaged (EoA)"
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder / 'diversity.json'}: not a result of the test set ({error}); measure it anew, --split test"
        ) from error
    if (folder / "sharpness.json").is_file():
        sharpness = read_result(folder / "sharpness.json", "python measure_sharpness.py")
        for name, part in SHARPNESS.items():
            found = sharpness.get("result", {}).get(part, {})
            # A measurement that was cut off is of some members only.
            whole = found.get("n", len(seeds)) == len(seeds)
            values[name] = found.get("mean") if whole else None
            if whole and found.get("std") is not None:
                spread[name] = found["std"]
        if "members" in sharpness and weights_of(sharpness) != weights_of(content):
            raise InputError(
                f"{folder / 'sharpness.json'}: of other weights than diversity.json beside it; measure one of them anew"
            )
        content["sharpness"] = sharpness
    return Ensemble(folder, method, seeds, values, spread, intervals, by_sample, content)


def keep(folder: Path, kept: Path) -> None:
    """Copy the result files of an ensemble; of each part of a corrupted set the accuracies only."""
    kept.mkdir(parents=True, exist_ok=True)
    content = load_json(folder / "diversity.json")
    parts = content["result"]["corrupted"]["parts"]
    content["result"]["corrupted"]["parts"] = {name: {"rates": part["rates"]} for name, part in parts.items()}
    write_atomically(kept / "diversity.json", (json.dumps(content) + "\n").encode())
    write_atomically(kept / "sharpness.json", (json.dumps(load_json(folder / "sharpness.json")) + "\n").encode())


def weights_of(content: dict[str, Any]) -> list[str]:
    """The digests of the members that a result file is about."""
    return [member["sha256_of_weights"] for member in content["members"]]


def read_result(path: Path, script: str) -> dict[str, Any]:
    """A result file.

    Raises:
        InputError: if it cannot be read; `script` is what makes it.
    """
    return read_json(path, f"make it by {script} --save {path.parent}")


def read_json(path: Path, way_out: str) -> dict[str, Any]:
    """A JSON file that holds a dict.

    Raises:
        InputError: naming the file and the way out.
    """
    try:
        content = load_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: missing or not readable; {way_out}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a result file; {way_out}")
    return content


def _values(row: dict[str, Any]) -> dict[str, float | None]:
    ensemble = row.get("ensemble", {})
    return {
        "member": row["rates"]["member_accuracy"],
        "ensemble": row["rates"]["ensemble_accuracy"],
        "gain": row["rates"]["ensemble_accuracy"] - row["rates"]["member_accuracy"],
        "disagreement": row["rates"].get("disagreement"),
        "variance": row.get("variance_of_probabilities"),
        "der": row.get("der"),
        "eir": row.get("eir"),
        "nll": ensemble.get("nll"),
        "ece": ensemble.get("ece"),
    }


def _by_sample(row: dict[str, Any], members: int) -> dict[str, torch.Tensor]:
    pairs = members * (members - 1) / 2
    units = {"members": ("member", members), "ensemble": ("ensemble", 1), "differing_pairs": ("disagreement", pairs)}
    found = {}
    for name, text in row["right_of_samples"].items():
        value, most = units[name]
        found[value] = torch.from_numpy(unpack_counts(text)) / (most * row["parts"])
    if {"member", "ensemble"} <= found.keys():
        found["gain"] = found["ensemble"] - found["member"]
        wrong = 1 - found["member"]
        for name, part in {"eir": found["gain"], "der": found.get("disagreement")}.items():
            if part is not None and row.get(name) is not None:
                # The ratio of two means r = a/b moves with sample x by (a_x - r b_x) / b.
                found[name] = row[name] + (part - row[name] * wrong) / wrong.mean()
    return found


def method_of(settings: dict[str, Any]) -> str:
    """A short name of how an ensemble was trained, from the settings of its run."""
    if not settings["sam"] or not settings["rho"]:
        return "deep ensemble"
    kind = "ASAM" if settings["sam_adaptive"] else "SAM"
    if not settings["flat_ratio"]:
        return f"{kind}, rho {settings['rho']:g}"
    if settings["select"] in DRAWN:
        name = f"{kind} on {settings['select']} samples"
        if settings.get("match_size"):
            name += f", sized as ({PICKED[settings['partition']]}, {settings['unselected']})"
    else:
        name = f"SharpBalance ({settings['select']}, {settings['unselected']})"
    return f"{name}, rho {settings['rho']:g}, k {settings['flat_ratio']:g}, T_d {settings['initial_epochs']}"


def family_of(ensemble: Ensemble) -> str:
    """The method as `utils.plots` knows it by name and colour; "other" where the settings of the run are not known."""
    settings = ensemble.content.get("trained")
    if not settings:
        return "other"
    if ensemble.content.get("protocol", {}).get("checkpoint") == "averaged":
        return "eoa"
    if not settings["sam"] or not settings["rho"]:
        return "deep_ensemble"
    if not settings["flat_ratio"]:
        return "asam" if settings["sam_adaptive"] else "sam"
    drawn = {"random": "random_set", "same": "same_set", "sharpest": "paper"}
    return drawn.get(settings["select"], "sharpbalance")


def read_run(folder: Path) -> Ensemble:
    """An ensemble as its run folder tells of it: how it was trained and on which data, without measurements.

    Raises:
        InputError: naming the file that is missing or not what main.py writes.
    """
    settings = read_settings(folder)
    path = folder / "environment.json"
    content = read_json(path, "it is part of a run of main.py")
    trained = NEUTRAL | {name: value for name, value in settings.items() if name not in FREE_SETTINGS}
    try:
        about = {"data": content["data"], "protocol": {}, "trained": trained, "settings": settings}
        about["data"]["sha256_of_arrays_and_split"]
        about["network"] = {"model": trained["model"], "width": trained["width"]}
        method = method_of(trained)
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder}: its args.json and environment.json do not tell of a run ({error})") from error
    return Ensemble(folder, method, tuple(settings["seed"]), {}, {}, {}, {}, about)


def needed(ensemble: Ensemble, *keys: str) -> Any:
    """An entry of the result in diversity.json.

    Raises:
        InputError: if it was not measured, and how to do that.
    """
    value = ensemble.content["result"]
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            what, flag = f"'{key}' is missing", "--mode predict,disagreement"
            if key == "corrupted":
                what, flag = "no corrupted set was measured", "--split test,corrupted"
            path = ensemble.folder / "diversity.json"
            raise InputError(f"{path}: {what}; measure it by python measure_diversity.py {flag}")
        value = value[key]
    return value


def estimate(values: list[float], interval: list[float] | None = None) -> tuple[float, list[float] | None]:
    """Mean over ensembles and its 95 % interval: Student's, or of a single ensemble the given one."""
    return statistics.mean(values), t_interval(values) if len(values) > 1 else interval


def check_alike(ensembles: list[Ensemble]) -> None:
    """Refuse to compare what was measured on different data or by different protocols.

    Averaged weights are those of the end of training, as checkpoints 'last' are.
    """
    facts: dict[str, Callable[[Ensemble], Any]] = {
        "data": lambda e: e.content["data"]["sha256_of_arrays_and_split"],
        "the corrupted set": lambda e: e.content["data"].get("sha256_of_corrupted"),
        "network": lambda e: "{model} of width {width}".format(**e.content["network"]),
        **{f"--{key}": partial(protocol_of, key=key) for key in SAME},
        **{f"--{key} of the sharpness": partial(_sharpness_protocol, key=key) for key in SAME_SHARPNESS},
    }
    for name, fact in facts.items():
        known = [(ensemble, value) for ensemble in ensembles if (value := fact(ensemble)) is not None]
        for other, value in known:
            if value != known[0][1]:
                raise InputError(
                    f"{other.folder} and {known[0][0].folder} cannot be compared: {name} differs ({_short(value)}, "
                    f"{_short(known[0][1])}); measure both alike, or give those that are alike"
                )
    folders = {}
    for ensemble in ensembles:
        key = (ensemble.method, ensemble.seeds, json.dumps(ensemble.content.get("trained"), sort_keys=True))
        if key in folders and ensemble.content.get("trained"):
            raise InputError(f"{ensemble.folder} and {folders[key]} are the same method and seeds; give each once")
        folders[key] = ensemble.folder


def setting_of(content: dict[str, Any]) -> str:
    """Data and network of a result file or a run, in words."""
    data, network = content["data"], content["network"]
    text = f"{data['dataset']}, {network['model']} of width {network['width']}"
    if data.get("train"):
        text += f", {data['train']} training images"
    return text + (f", {100 * data['label_noise']:g} % of their labels wrong" if data.get("label_noise") else "")


def protocol_of(ensemble: Ensemble, key: str) -> Any:
    """What an ensemble was measured by; averaged weights are those of the end of training."""
    value = ensemble.content["protocol"].get(key)
    return "last" if key == "checkpoint" and value == "averaged" else value


def _sharpness_protocol(ensemble: Ensemble, key: str) -> Any:
    sharpness = ensemble.content.get("sharpness")
    if sharpness is None or (key in PARTS_OF and not PARTS_OF[key] & sharpness.get("result", {}).keys()):
        return None
    return sharpness["protocol"].get(key)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."


def groups_of(ensembles: list[Ensemble]) -> dict[str, list[Ensemble]]:
    """Ensembles of equal settings but for the seeds, by a name that tells the groups apart."""
    by_settings: dict[str, list[Ensemble]] = {}
    for ensemble in ensembles:
        settings = ensemble.content.get("trained")
        key = ensemble.method
        if settings:
            key = json.dumps({name: value for name, value in settings.items() if name != "seed"}, sort_keys=True)
            key += ensemble.method + str(len(ensemble.seeds))
        by_settings.setdefault(key, []).append(ensemble)
    groups: dict[str, list[Ensemble]] = {}
    for rows in by_settings.values():
        name = rows[0].method
        if name in groups:  # the same method by other settings
            name = f"{name} ({rows[0].folder.name})"
        groups[name] = rows
    return groups
