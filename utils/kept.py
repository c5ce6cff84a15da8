"""What is kept of earlier calls: by which version of the code numbers were made, and what a result file held before."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.files import json_text, parse_json, read_entry

# The result with what an earlier content of its file has beside it, from both contents; or why it replaces that.
Keep = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any] | str]
LISTS = ("mode", "split", "norms", "ood")  # of what is measured: options that do not change a value
VALUE_OPTIONS = ("average", "bins", "bootstrap", "corruptions", "severities")  # that do
# By the kind of a kept number, the version of the code that makes it. Whoever changes such numbers raises it, so that
# what was kept before is made anew. tests/test_predictions.py holds values of each.
VERSIONS = {
    "logits": 1,
    **{"predict": 3, "disagreement": 1, "KL": 1, "CKA": 2, "ood": 1},
    **{"variance": 2, "variance_mse": 1, "variance_mse_c": 1},
    **{"APGD_worst": 1, "APGD_average": 2, "hessian_t": 1, "hessian_e": 1, "fisher": 1, "NTK": 1},
    **{"along": 1, "top": 1, "between": 1},  # curves of a landscape
}
FROM_LOGITS = ("predict", "disagreement", "KL", "CKA", "ood", "variance", "variance_mse", "variance_mse_c")


def made_by(kind: str, environment: dict[str, Any]) -> dict[str, Any]:
    """What a kept number carries: the versions that it depends on, and device and commit of an environment."""
    kinds = ("logits", kind) if kind in FROM_LOGITS else (kind,)
    return {"versions": {k: VERSIONS[k] for k in kinds}, **{k: environment[k] for k in ("device", "commit")}}


def up_to_date(content: Any) -> bool:
    """Whether all versions that a result names, at whatever depth, are those of this code."""
    if isinstance(content, list):
        return all(map(up_to_date, content))
    if not isinstance(content, dict):
        return True
    versions, parts = content.get("versions") or {}, [part for name, part in content.items() if name != "versions"]
    return all(VERSIONS.get(kind) == version for kind, version in versions.items()) and up_to_date(parts)


def why_stale(kind: str, record: Any, environment: dict[str, Any]) -> str | None:
    """Why a kept number with this record of `made_by` has to be made anew here, as the end of a sentence; else None."""
    if kind not in VERSIONS:
        return f"by a version whose {kind!s:.20} is not known here"
    here = made_by(kind, environment)
    if not isinstance(record, dict) or not isinstance(record.get("versions"), dict) or "device" not in record:
        return f"by a version of {kind} that is not recorded"
    for name, version in here["versions"].items():
        if record["versions"].get(name) != version:
            return f"by version {record['versions'].get(name)!s:.20} of {name}, which is now {version}"
    return None if record["device"] == here["device"] else f"on another device ({record['device']!s:.40})"


def keep_modes(before: dict[str, Any], content: dict[str, Any]) -> dict[str, Any] | str:
    """The result with the values of other modes and splits of an earlier call, if it measured alike; else why not."""

    def merged(old: Any, new: Any) -> Any:
        if not (isinstance(old, dict) and isinstance(new, dict)):
            return new
        return old | {name: merged(old.get(name), value) for name, value in new.items()}

    if any(before["protocol"].get(name) != content["protocol"].get(name) for name in VALUE_OPTIONS):
        return "by other options"
    # Earlier versions recorded nothing.
    made = before.get("made_by") or {"": dict.fromkeys(content["protocol"]["mode"])}
    stale = [why_stale(mode, one, content["environment"]) for by in made.values() for mode, one in by.items()]
    return next(filter(None, stale), None) or merged(before["result"], content["result"])


def with_earlier(path: Path, content: dict[str, Any], keep: Keep) -> dict[str, Any]:
    """The content of a result file with the results of earlier calls, which the file holds now, and their commands."""
    before, content = read_entry(path), parse_json(json_text(content))
    try:
        weights = [[row["sha256_of_weights"] for row in one["members"]] for one in (before, content)]
        known = [{k: v for k, v in one["data"].items() if k.startswith("sha256")} for one in (before, content)]
        corrupted, replaced = known[0].get("sha256_of_corrupted"), None
        if weights[0] != weights[1]:
            replaced = "of other weights"
        elif any(known[0].get(name, value) != value for name, value in known[1].items()):
            replaced = "on other images"
        elif isinstance(result := keep(before, content), str):
            replaced = result
        if replaced:
            print(f"note: {path}: replaces what was measured {replaced}", file=sys.stderr)
        if replaced or result == content["result"]:
            return content
        if made := before.get("made_by", {}):
            here = content["made_by"]
            content["made_by"] = {split: made.get(split, {}) | here.get(split, {}) for split in made | here}
        calls = [*before.get("earlier", []), {key: before[key] for key in ("command", "environment")}]
        for name in LISTS:
            old, new = before["protocol"].get(name), content["protocol"].get(name)
            if isinstance(old, list) and isinstance(new, list):
                content["protocol"][name] = list(dict.fromkeys([*old, *new]))
    except (AttributeError, LookupError, TypeError):
        return content  # there is none, or it is damaged
    if corrupted is not None:
        content["data"]["sha256_of_corrupted"] = corrupted
    earlier = [call for call in calls if call["command"] != content["command"]]
    return content | {"result": result} | ({"earlier": earlier} if earlier else {})
