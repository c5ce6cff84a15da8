"""Verdicts on claims, from the result files of `scripts/experiment.py`, as a page.

    python scripts/report.py results/fashion_mnist

Reads plan.json and measurements/ in each folder below the given one, and writes README.md there. By `--claims` of the
experiment that is a verdict on each of the paper's `CLAIMS`, and the accuracy under each corruption; or, of the study
where SharpBalance helps, verdicts on `PRIMARY` and `SECONDARY` in all settings, and map.png. Tables and other figures
are those of the experiment.
"""

import argparse
import hashlib
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tabulate import tabulate

from utils import InputError, plots, results, table_cell, uncertainty_plots
from utils.claims import (
    ALL_NAMES,
    HEADER,
    LEVEL,
    MAX_ENSEMBLES,
    NAMES,
    POWER,
    Claim,
    Judged,
    Measured,
    above_the_curve,
    beyond_the_curve,
    compare,
    judge,
    slope,
)
from utils.cli import Parser, path, run
from utils.equivalent import training_cost
from utils.files import OTHERWISE, read_json, refusing, write_atomically
from utils.presets import PRESETS
from utils.results import Ensemble

FIGURES = {
    "tradeoff": "sharpness against diversity",
    "benchmark": "accuracy of members and ensembles, and differences to SAM",
    "severity": "scores against the severity of corruption, and differences to SAM",
    "ensemble_size": "scores against the number of members",
    "ood": "entropy of test images and of other data, and ROC curves",
    "reliability": "accuracy against confidence, before and after a temperature",
}

RECIPE = {
    "epochs": "{} epochs",
    "batch_size": "batch {}",
    "lr": "learning rate {:g}",
    "schedule": "schedule {}",
    "augmentation": "augmentation {}",
}

SLOPE = "from one rho to the next, sharper members are more diverse: slope of disagreement over log sharpness"
CLAIMS = (
    Claim("i", SLOPE, "points per factor e", 1, slope),
    compare("i, diversity", "deep_ensemble", "sam_largest", "disagreement"),
    compare("i, sharpness", "deep_ensemble", "sam_largest", "sharpness"),
    compare("ii", "deep_ensemble", "sam", "eir"),
    compare("iii, released", "sharpbalance", "sam", "corrupted_ensemble"),
    compare("iii, paper", "sharpbalance_paper", "sam", "corrupted_ensemble"),
    compare("iv, corrupted", "sharpbalance_paper", "sharpbalance", "corrupted_ensemble"),
    compare("iv, clean", "sharpbalance_paper", "sharpbalance", "ensemble"),
    compare("v, corrupted", "sharpbalance", "random", "corrupted_ensemble"),
    compare("v, diversity", "sharpbalance", "random", "disagreement"),
    compare("vi, released", "sharpbalance", "sam", "disagreement"),
    compare("vi, paper", "sharpbalance_paper", "sam", "disagreement"),
    compare("vii", "sharpbalance", "deep_ensemble", "corrupted_ensemble"),
)
# The study of where SharpBalance helps. Of each reading: its method, and random sets of its size.
READINGS = {"released": ("sharpbalance", "random"), "paper": ("sharpbalance_paper", "random_paper")}
CHEAPER = {"plain start": "plain_start", "late": "late_sharpbalance"}  # forms of SharpBalance (released)
POINTS, NATS = 0.3, 0.003  # margins of accuracy and of calibrated NLL
PRIMARY = tuple(compare(f"A1, {name}", rule, "sam", "ensemble", POINTS) for name, (rule, _) in READINGS.items())
SECONDARY = (
    *(compare(f"A2, {name}", *methods, "ensemble", POINTS) for name, methods in READINGS.items()),
    *(compare(f"A3, {name}", rule, "deep_ensemble", "ensemble", POINTS) for name, (rule, _) in READINGS.items()),
    compare("A3, SAM", "sam", "deep_ensemble", "ensemble", POINTS),
    compare("A4, late SAM", "late_sam", "sam", "ensemble", POINTS),
    *(compare(f"A5, {name}", f"{rule}_next", "sam", "ensemble", POINTS) for name, (rule, _) in READINGS.items()),
    *(compare(f"A6, {name}", method, "sharpbalance", "ensemble", POINTS) for name, method in CHEAPER.items()),
    *(compare(f"N1, {name}", "sam", rule, "nll_calibrated", NATS) for name, (rule, _) in READINGS.items()),
    *(compare(f"N2, {name}", drawn, rule, "nll_calibrated", NATS) for name, (rule, drawn) in READINGS.items()),
    *(compare(f"N3, {name}", "deep_ensemble", rule, "nll_calibrated", NATS) for name, (rule, _) in READINGS.items()),
    *(compare(f"N4, {name}", "sharpbalance", method, "nll_calibrated", NATS) for name, method in CHEAPER.items()),
    *(above_the_curve(f"D1, {name}", rule) for name, (rule, _) in READINGS.items()),
    *(above_the_curve(f"D2, {name}", f"{rule}_next") for name, (rule, _) in READINGS.items()),
    *(compare(f"U1, {name}", rule, "sam", "auroc entropy digits") for name, (rule, _) in READINGS.items()),
)
# Described without verdicts: N1 to N4 before the temperature.
BEFORE = tuple(compare(claim.name, *claim.methods, "nll", NATS) for claim in SECONDARY if claim.name.startswith("N"))
# What PLAN.md says of outcomes, by the verdicts on the claims of a reading, or on the claim that is named.
OUTCOMES = (
    ({"A1": "supported"}, "use this rule instead of SAM"),
    ({"A1": "supported", "A2": "supported"}, "it helps because of which samples it picks"),
    ({"A1": "supported", "A2": "equivalent"}, "fewer samples with SAM help, whichever they are"),
    ({"A1": "equivalent", "N1": "supported"}, "the same accuracy with better probabilities"),
    ({"A1": "equivalent", "N1": "equivalent"}, "the rule changes nothing of interest"),
    ({"A1": "contradicted"}, "use SAM"),
    ({"A5": "supported"}, "rho has to be chosen for SharpBalance on its own"),
    ({"D1": "supported"}, "the rule moves members off SAM's trade-off"),
    ({"U1": "supported"}, "other data are told from test images more reliably"),
    ({"A3, SAM": "contradicted or equivalent"}, "neither SAM nor SharpBalance is worth its passes"),
)
# The panels of the map: by what a claim of each kind compares with, its rows, where a setting has them.
AGAINST = {
    "gain in ensemble accuracy  [% points]": {"A1": "SAM", "A2": "random", "A3": "plain", "A6": "released"},
    "gain in calibrated NLL  [mnats]": {"N1": "SAM", "N2": "random", "N3": "plain", "N4": "released"},
}
MAP = {
    panel: {
        f"{name} - {other}": f"{claim}, {name}"
        for claim, other in kinds.items()
        for name in (CHEAPER if other == "released" else READINGS)
    }
    for panel, kinds in AGAINST.items()
}
VERDICTS = (
    "A claim is *supported* or *contradicted* where the mean difference between ensembles of the same seeds is above "
    f"or below 0 with a p value of at most {100 * LEVEL:g} % after Holm's correction for the claims of its family; "
    "*equivalent* where it is neither, and lies within the margin by two one-sided tests at 5 % (the 90 % interval is "
    "within it; each claim for itself, not corrected for their number); else *undecided*. *Within the margin* is added "
    "where a difference is supported or contradicted, and of no interest. "
    "Intervals are of 95 %, each for itself, over new ensembles and new test images, or over ensembles alone where "
    "that is written beside them; all hold for one draw of training and validation images and of wrong labels."
)
STUDY_OPENING = (
    "# Where does SharpBalance help?",
    "`bash scripts/experiments/study.sh` trains, measures and writes this page from the JSON files beside it; "
    "`scripts/report.py` alone writes it again. Settings, methods, claims and margins were written down in "
    "[PLAN.md](../study/PLAN.md) before networks of a setting were measured on test images, as its dated changes say. "
    "Networks of earlier experiments had been measured on the same test images, and suggested the claims. "
    "[INTERPRETATION.md](../fashion_mnist/INTERPRETATION.md) says in words what those of Fashion-MNIST mean.",
    f"{VERDICTS} The primary family of a setting is A1, each [reading of SharpBalance](../../docs/METHOD.md#sets) "
    "against SAM by ensemble accuracy; all others are the secondary one.",
)
OPENING = (
    "# The paper's claims",
    "`scripts/report.py` writes this page from the JSON files beside it. Each part names the command that trained and "
    "measured what it is about.",
    f"{VERDICTS} The claims of a table are a family. Accuracy and disagreement differ by percentage points.",
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument("results", type=path, metavar="FOLDER", help="which holds a folder for each experiment")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Write the page."""
    folders = sorted((file.parent for file in args.results.glob("*/plan.json")), reverse=True)
    if not folders:
        raise InputError(f"{args.results}: expected folders with a plan.json; run scripts/experiment.py first")
    remedy = "run scripts/experiment.py again"
    plans = {folder: read_json(folder / "plan.json", remedy) for folder in folders}
    of_study = {folder: isinstance(plan, dict) and plan.get("claims") == "study" for folder, plan in plans.items()}
    if len(set(of_study.values())) > 1:
        folder = next(folder for folder in folders if not of_study[folder])
        raise InputError(f"{folder}: made without --claims study, which others there were made with; move it elsewhere")
    blocks, settings = [] if of_study[folders[0]] else [*OPENING], []
    for folder, plan in plans.items():
        with refusing(f"{folder}: not an experiment with all methods of the claims", remedy, OTHERWISE):
            if of_study[folder]:
                settings.append(read_setting(folder, plan))
            else:
                blocks += section(folder, plan)
    if settings:
        with refusing(f"{args.results}: not experiments with the methods of the claims", remedy, OTHERWISE):
            blocks = study(args.results, settings)
    write_atomically(args.results / "README.md", ("\n\n".join(blocks) + "\n").encode(errors="backslashreplace"))
    print(f"wrote {args.results / 'README.md'}")


def read_measured(folder: Path, rho: float, methods: tuple[str, ...] = (*NAMES, "eoa")) -> Measured:
    """The ensembles of an experiment; `sam` is SAM at the chosen rho, `sam_largest` at the largest."""
    found: Measured = {}
    for place in sorted((folder / "measurements").glob("*")):
        method, _, seed = place.name.rpartition("_")
        found.setdefault(method, {})[seed] = results.read_ensemble(place)
    results.check_alike([ensemble for by_seeds in found.values() for ensemble in by_seeds.values()])
    if several := [name for name in found if name.startswith("sam_")]:
        largest = max(several, key=lambda name: float(name[4:]))
        found |= {"sam": found[f"sam_{rho:g}"], "sam_largest": found[largest]}
    seeds = {tuple(sorted(found[name])) for name in methods}
    if len(seeds) > 1 or len(seeds.pop()) < 2:
        raise InputError(f"{folder}: expected the same two or more seeds for all methods; complete the experiment")
    return found


def section(folder: Path, plan: dict[str, Any]) -> list[str]:
    """The paragraphs, tables and figures of one experiment."""
    if not plan.get("finished"):
        raise InputError(f"{folder}: not finished; run the same command of scripts/experiment.py again to go on")
    measured = read_measured(folder, plan["chosen"]["rho"])
    seeds = sorted(measured["sam"])
    results.require(measured["sam"][seeds[0]], "corrupted", "mean", "samples")
    made = f"`{plan['command']}`"
    if plan.get("plan"):
        digests = " and ".join(digests_of(measured))
        made += f", after {plan['plan']['file']} (SHA-256 {digests}) had been written, which has the claims, their "
        made += "margins and what had been looked at before"
    blocks = [
        f"## {table_cell(folder.name.replace('_', ' ').capitalize())}",
        f"{made}.",
        *described(plan, measured),
        _table([one.row for one in judge(CLAIMS, measured, seeds)], HEADER),
    ]
    blocks += sam_sets(plan)
    place = quote(os.fsencode(folder.name))
    uncertain = uncertainty(measured)
    drawn = {kind: text for kind, text in FIGURES.items() if (folder / f"{kind}.png").is_file()}
    figures = [f"![{text}]({place}/{kind}.png)" for kind, text in drawn.items()]
    return [*blocks, f"All methods: {tables_of(folder)}.", *uncertain, *by_corruption(measured), *figures]


def digests_of(measured: Measured) -> tuple[str, ...]:
    """The SHA-256 of the plans that the measurements name; none: of those that name no plan."""
    found = [one.content.get("experiment", {}) for by_seeds in measured.values() for one in by_seeds.values()]
    return tuple(sorted({one.get("plan", {}).get("sha256", "none") for one in found}))


def tables_of(folder: Path) -> str:
    """A link to the tables of an experiment."""
    return f"[{table_cell(folder.name)}/tables.md]({quote(os.fsencode(folder.name))}/tables.md)"


def described(plan: dict[str, Any], measured: Measured) -> list[str]:
    """The paragraphs on data, machine, choices and sharpness of an experiment."""
    ensembles = [one for by_seeds in measured.values() for one in by_seeds.values()]
    first, images = ensembles[0].content, ensembles[0].content["data"]["val"]
    trained, protocol, members = first["trained"], first["protocol"], {len(one.seeds) for one in ensembles}
    recipe = ", ".join(text.format(trained[name]) for name, text in RECIPE.items() if trained.get(name) is not None)
    machine = f"{plan['jobs']} single-thread processes" if plan["jobs"] > 1 else "One process at a time"
    made = [one.content["environment"] for one in ensembles]
    commits = sorted({one["commit"] or "no clone" for one in made})
    cores, torch = (" or ".join(map(str, sorted({one[name] for one in made}))) for name in ("cpus", "torch"))
    sam = next(iter(measured["sam"].values()))
    ball = results.sharpness_protocol(sam, "APGD_worst-l2")
    corrupted = ""
    if "corrupted" in first["result"]:
        corrupted = f", corrupted copies of {results.require(ensembles[0], 'corrupted', 'mean', 'samples'):g}"
        corrupted += f" ({len(protocol['corruptions'])} corruptions at {len(protocol['severities'])} severities)"
    return [
        f"{len(measured['sam'])} ensembles of {' or '.join(map(str, sorted(members)))} members by each method: "
        f"{results.setting_of(first)}, {recipe}; {images} validation images, {first['data']['test']} test images"
        f"{corrupted}; checkpoints '{protocol['checkpoint']}'. {machine} on {cores} cores, torch {torch}. Measured by "
        f"the code of {' and '.join(commits)}."
        + " (-dirty: with changes that no commit has.)"
        * any(commit.endswith("-dirty") for commit in commits),
        f"Ensemble accuracy on validation: {choices(plan)}.{chance(plan, images)}",
        f"Sharpness: the rise of the loss in the worst case within {'an adaptive' if ball['adaptive'] else 'a'} l2 "
        f"ball of radius {ball['rho0']:g}, mean over {results.batches_of(sam, 'APGD_worst-l2')} batches of "
        f"{ball['eval_batch_size']} training images, by '{ball['maximiser']}' in {ball['n_iters']} iterations.",
    ]


def sam_sets(plan: dict[str, Any]) -> list[str]:
    """The paragraph on the sets that members train with SAM: their size, and the share of wrong labels in them."""
    shares, found = plan["mislabelled"], []
    for name in ("sharpbalance", *CHEAPER.values(), "sharpbalance_paper", "random", "random_paper"):
        if f"{name}_size" in shares:
            wrong = f", {100 * shares[name]:.1f} % of them with a wrong label" if name in shares else ""
            found.append(f"{ALL_NAMES[name]} {100 * shares[f'{name}_size']:.0f} %{wrong}")
    if not found:
        return []
    every = f"Of all, {100 * shares['all']:.1f} % have one." if "all" in shares else ""
    return [
        f"Training images that a member trains with SAM once samples are assigned: {'; '.join(found)}. {every}".rstrip()
    ]


class Setting(NamedTuple):
    """A setting of the study, with its verdicts by the names of claims; an unfinished one has none.

    `label` is its title in the map, `key` the numbers that settings are sorted by, `digests` those of the plan, and
    `before` what is described without a verdict.
    """

    folder: Path
    plan: dict[str, Any]
    measured: Measured
    judged: dict[str, Judged]
    title: str = ""
    label: str = ""
    key: tuple[int, float] = (0, 0)
    digests: tuple[str, ...] = ()
    before: tuple[Judged, ...] = ()


def read_setting(folder: Path, plan: dict[str, Any]) -> Setting:
    """The verdicts on the claims about the methods of one setting."""
    if not plan["finished"]:
        return Setting(folder, plan, {}, {})
    planned = {"sam" if name.startswith("sam_") else name for name in plan["measured"]}
    measured = read_measured(folder, plan["chosen"]["rho"], tuple(planned))
    seeds, judged = sorted(measured["sam"]), {}
    for family in (PRIMARY, SECONDARY):
        claims = [claim for claim in family if planned.issuperset(claim.methods)]
        judged |= {one.claim.name: one for one in judge(claims, measured, seeds)}
    before = judge([claim for claim in BEFORE if planned.issuperset(claim.methods)], measured, seeds)
    data = measured["sam"][seeds[0]].content["data"]
    images, noise = data["train"], data.get("label_noise") or 0
    own = data["dataset"] == "folder"  # whose labels may be wrong, too
    title, label = f"{100 * noise:g} % wrong labels, {images} images", f"{100 * noise:g} %\n{images}"
    if own:
        title, label = f"{table_cell(folder.name)}, {images} images", f"{folder.name}\n{images}"
    return Setting(folder, plan, measured, judged, title, label, (images, noise), digests_of(measured), tuple(before))


def study(place: Path, settings: list[Setting]) -> list[str]:
    """The page of the study; draws its map."""
    finished = sorted((one for one in settings if one.judged), key=lambda one: one.key)
    plan, begun = place / "PLAN.md", {one.folder.name for one in settings}
    planned = [name.removeprefix("study/") for name in PRESETS if name.startswith("study/") and plan.is_file()]
    left = [one.folder.name for one in settings if not one.judged] + [name for name in planned if name not in begun]
    left_out = ", ".join(map(table_cell, left))
    if not finished:
        raise InputError(f"{place}: no setting is finished ({left_out}); run the same command again to go on")
    shown = {
        panel: {
            row: [one.judged.get(name) for one in finished]
            for row, name in rows.items()
            if any(name in one.judged for one in finished)
        }
        for panel, rows in MAP.items()
    }
    shown = {panel: rows for panel, rows in shown.items() if rows}
    data = next(iter(finished[0].measured["sam"].values())).content["data"]
    counts = " or ".join(map(str, sorted({len(one.measured["sam"]) for one in finished})))
    note = f"{data['dataset']}; n = {counts} ensembles for each method, {data['test']} test images. "
    note += "Columns: share of wrong labels (or data), number of training images. "
    note += "Blue: better than what is named second. Marks:"
    if shown:
        plots.save(uncertainty_plots.verdicts([one.label for one in finished], shown, note), place / "map")
    names = [name for name in (claim.name for claim in PRIMARY + SECONDARY) if any(name in s.judged for s in finished)]
    rows = [
        [name, next(s.judged[name] for s in finished if name in s.judged).claim.text]
        + [f"{s.judged[name].row[2]}, **{s.judged[name].verdict}**" if name in s.judged else "-" for s in finished]
        for name in names
    ]
    now = hashlib.sha256(plan.read_bytes()).hexdigest() if plan.is_file() else ""
    blocks = [
        *STUDY_OPENING,
        *([f"Not finished, and left out: {left_out}."] if left_out else []),
        *(["![paired differences of SharpBalance, by setting](map.png)"] if shown else []),
        "## Advice",
        *trained(finished),
        *advice(finished),
        "## Verdicts",
        _table(rows, ["claim", "", *(one.title for one in finished)]),
        "## What was not decided",
        *undecided(finished),
    ]
    for one in finished:
        blocks += [f"## {one.title}", *described(one.plan, one.measured), *sam_sets(one.plan)]
        for text, family in (("Primary claims:", PRIMARY), ("Secondary claims:", SECONDARY)):
            found = [one.judged[claim.name].row for claim in family if claim.name in one.judged]
            blocks += [text, _table(found, HEADER)]
        text = "The claims about NLL before the temperature was fitted, described without verdicts:"
        blocks += [text, _table([judged.row[:4] for judged in one.before], HEADER[:4])] if one.before else []
        rules = [method for rule, _ in READINGS.values() for method in (rule, f"{rule}_next") if method in one.measured]
        sides = {method: beyond_the_curve(one.measured, method) for method in rules if "deep_ensemble" in one.measured}
        beyond = [f"{ALL_NAMES[method]} is {side} than all of it" for method, side in sides.items() if side]
        if beyond:
            blocks.append(f"Beyond its ends SAM's curve over rho is taken as constant: {'; '.join(beyond)}.")
        named = ", ".join(digest + " (PLAN.md as it is)" * (digest == now) for digest in one.digests)
        blocks.append(f"All methods: {tables_of(one.folder)}. SHA-256 of the plan that the results name: {named}.")
    return blocks


def trained(finished: list[Setting]) -> list[str]:
    """What was compared in each setting: the chosen values, the images that have SAM, and the cost of training."""
    rules, rows = {rule: name for name, (rule, _) in READINGS.items()}, []
    for one in finished:
        shares = [one.plan["mislabelled"].get(f"{rule}_size") for rule in rules]
        groups = [list(one.measured.get(method, {}).values()) for method in ("sam", *rules)]
        cells = ["-" if share is None else f"{100 * share:.0f} %" for share in shares]
        cells += ["-" if x is None else f"{x / len(groups[0][0].seeds):.2f}" for x in map(training_cost, groups)]
        rows.append([one.title, chosen_values(one.plan), *cells])
    text = (
        "What was trained: the chosen values, the share of images that a member trains with SAM by each reading of "
        "SharpBalance after epoch T_d (before it, all), and passes of training and scores, in those of a plain member:"
    )
    shares, costs = ([f"{what}, {name}" for name in rules.values()] for what in ("images with SAM", "passes"))
    return [text, _table(rows, ["setting", "chosen", *shares, "passes, SAM", *costs])]


def advice(finished: list[Setting]) -> list[str]:
    """What to use when, each sentence from the verdicts that it names: in how many settings, and the range of means."""
    told: set[str] = set()

    def means(found: list[Judged]) -> str:
        low, high = (key(found, key=lambda one: one.mean).row[2] for key in (min, max))
        return low if low == high else f"{low.split()[0]} to {high}"

    def where(name: str) -> str:
        told.add(name)
        those, found = [one for one in finished if name in one.judged], {}
        if not those:
            return "not compared"
        for one in those:
            found.setdefault(one.judged[name].verdict, []).append(one.title)
        parts = []
        for verdict, titles in sorted(found.items(), key=lambda one: (list(WORDS).index(one[0].split(",")[0]), one)):
            word, _, small = verdict.partition(",")
            named = len(those) == 1 or word in ("supported", "contradicted")
            place = f"with {' and with '.join(titles)}" if named else f"in {len(titles)} of {len(those)} settings"
            parts.append(f"{WORDS[word]}{' by less than the margin' * bool(small)} {place}")
        about = [means([one.judged[name] for one in those]), name]
        if before := [judged for one in those for judged in one.before if judged.claim.name == name]:
            about.append(f"before the temperature {means(before)}")
        return f"{'; '.join(parts)} ({'; '.join(about)})"

    def asked(question: str, against: str, *claims: tuple[str, dict[str, str]]) -> str:
        lines = [
            f"{MEASURES[claim[0]]}, {ALL_NAMES[method]}: {where(f'{claim}, {name}')}"
            for claim, methods in claims
            for name, method in methods.items()
        ]
        return "\n".join([f"**{question}** Against {against}:\n", *(f"- {line}" for line in lines)])

    rules, late = {name: rule for name, (rule, _) in READINGS.items()}, {"late SAM": "late_sam"}
    blocks = [
        "In brackets: the mean difference, or the range of means over settings, and the claim. Above 0 is better. "
        "NLL before the temperature is described, without a verdict.",
        asked("SAM or plain training?", "a plain deep ensemble", ("A3", {"SAM": "sam"} | rules), ("N3", rules)),
        asked("SharpBalance or SAM?", "SAM", ("A1", rules), ("N1", rules)),
        asked("Does the choice of samples matter?", "random sets of the same size", ("A2", rules), ("N2", rules)),
    ]
    if any(f"A6, {name}" in one.judged for one in finished for name in CHEAPER):
        cheaper = (("A6", CHEAPER), ("N4", CHEAPER), ("A4", late))
        whole = f"the same with all of its passes ({NAMES['sharpbalance']}, or SAM)"
        blocks.append(asked("Are fewer passes as good?", whole, *cheaper))
    others = [
        f"{name} {judged.verdict} with {one.title}"
        for one in finished
        for name, judged in one.judged.items()
        if name not in told and judged.word != "undecided"
    ]
    decided = f"these are not undecided: {'; '.join(others)}" if others else "all are undecided"
    differ = [
        name for one in finished for name, judged in one.judged.items() if judged.word in ("supported", "contradicted")
    ]
    primary = sum(name in [claim.name for claim in PRIMARY] for name in differ)
    text = (
        f"Of the other claims in the table below {decided}. Supported or contradicted are {primary} primary and "
        f"{len(differ) - primary} secondary claims. Each setting is a question of its own: if nothing differed, one "
        "in 20 would still have a primary finding, and one in 20 a secondary one."
    )
    return [*blocks, outcomes(finished), text + chosen_on(finished)]


def outcomes(finished: list[Setting]) -> str:
    """What was written down before of the outcomes that are there."""
    found: dict[str, list[str]] = {}
    for one in finished:
        for name in READINGS:
            for verdicts, meaning in OUTCOMES:
                by_claim = {key if "," in key else f"{key}, {name}": word for key, word in verdicts.items()}
                if all(key in one.judged and one.judged[key].word in word for key, word in by_claim.items()):
                    named = " and ".join(f"{key} {one.judged[key].word}" for key in by_claim)
                    found.setdefault(f"{meaning} ({named})", []).append(one.title)
    told = [f"with {' and with '.join(dict.fromkeys(titles))}, {text}" for text, titles in found.items()]
    return f"**What the plan says of such outcomes:** {'; '.join(told) or 'none of those named is there'}."


def chosen_on(finished: list[Setting]) -> str:
    """What the choice on validation means for what is compared."""
    by, text = {"rho": "SAM", "k": NAMES["sharpbalance"], "T_d": NAMES["sharpbalance"]}, ""
    here = [one.plan for one in finished if not one.plan.get("choices_of")]
    if names := [name for name in by if any(len(plan["validation"].get(name, {})) > 1 for plan in here)]:
        favoured = " and ".join(dict.fromkeys(by[name] for name in names))
        how_much = "; the plan says how much" * any(plan["plan"] for plan in here)
        text += (
            f" The choice of {' and '.join(names)}, on some of the ensembles that are compared, favours {favoured} a "
            f"little{how_much}. The other methods have the same values."
        )
    for one in finished:
        if other := one.plan.get("choices_of"):
            text += f" With {one.title} they are those of {table_cell(other)}, chosen on other networks."
    return text


MEASURES = {"A": "accuracy", "N": "calibrated NLL"}  # by the first letter of a claim's name
WORDS = {"supported": "better", "contradicted": "worse", "equivalent": "equivalent", "undecided": "undecided"}


def undecided(finished: list[Setting]) -> list[str]:
    """How many ensembles each undecided claim would take."""
    rows = []
    for one in finished:
        for name, judged in one.judged.items():
            if judged.word == "undecided":
                number = f"more than {MAX_ENSEMBLES}"
                number += ", or more test images" * (judged.population == results.BOTH)
                if not math.isfinite(judged.mean):
                    number = "unknown"
                elif judged.ensembles:
                    number = str(judged.ensembles)
                    enough = judged.ensembles <= len(one.measured["sam"])
                    number += " (enough for the margin: what is there is smaller)" * enough
                rows.append([one.title, name, *judged.row[2:4], judged.row[6], number])
    if not rows:
        return ["All claims are decided."]
    text = (
        "Ensembles by each method with which a true difference as large as the margin would be found with a "
        f"probability of {100 * POWER:g} %, by the spread seen here, at {100 * LEVEL:g} % over the number of claims of "
        "the family (`ensembles_needed` in utils/claims.py). A spread of five ensembles is known to a factor of 0.6 to "
        "2.9 (95 %), and the number to its square. Where the mean is far beyond the margin, fewer would do if the true "
        "difference is as large as the mean. Ensembles that are added to these would be a second look."
    )
    return [text, _table(rows, ["setting", "claim", "mean", "95 % interval", "margin", "ensembles"])]


def chosen_values(plan: dict[str, Any]) -> str:
    """rho, k and T_d of an experiment, but for what main.py chose."""
    return ", ".join(f"{name} {value:g}" for name, value in plan["chosen"].items() if value is not None)


def choices(plan: dict[str, Any]) -> str:
    """The ensemble accuracies on validation that rho, k and T_d were chosen by."""
    found, tried = [], plan["validation"]
    if plan.get("choices_of"):
        return f"not compared; {chosen_values(plan)} are those of {table_cell(plan['choices_of'])}"
    on = f"the first {plan['choose_on']} ensembles" if plan.get("choose_on") else "the first seeds"
    if "deep ensemble" in tried:
        found.append(f"deep ensemble, all of them, {100 * tried['deep ensemble']:.2f} %")
    for name, of in (
        ("rho", "SAM" + f" on {on}" * bool(plan.get("choose_on"))),
        ("k", f"SharpBalance (released) on {on}"),
        ("T_d", "likewise"),
    ):
        values, chosen = tried.get(name, {}), plan["chosen"][name]
        if chosen is None:
            continue  # as main.py has it
        scores = ", ".join(f"{name} {value}: {100 * score:.2f} %" for value, score in values.items())
        edge = " (an end of what was tried)" if chosen in [f(map(float, values)) for f in (min, max) if values] else ""
        found.append(f"{of}, {scores}, chosen {chosen:g}{edge}" if scores else f"{name} {chosen:g}")
    return "; ".join(found)


def chance(plan: dict[str, Any], images: int) -> str:
    """The standard error of the accuracies that values were chosen by, beside how far apart these are."""
    found, gaps = [], []
    for name in ("rho", "k", "T_d"):
        values = {float(value): score for value, score in plan["validation"].get(name, {}).items()}
        if len(values) > 1 and plan["chosen"][name] in values:
            found.append(values[plan["chosen"][name]])
            gaps.append(f"{100 * (max(values.values()) - min(values.values())):.2f} points for {name}")
    if not found:
        return ""
    error = 100 * math.sqrt(found[-1] * (1 - found[-1]) / images)
    return (
        f" An ensemble's accuracy of {100 * found[-1]:.2f} % on {images} images has a standard error of {error:.1f} "
        "points, and less in differences on the same images; the best and the worst value that were tried are apart "
        f"by {' and '.join(gaps)}."
    )


def uncertainty(measured: Measured) -> list[str]:
    """What flatness does to uncertainty: sharpness, disagreement, AURC and AUROC of each method in one table."""
    methods = {method: list(measured[method].values()) for method in NAMES}
    ensembles = [one for group in methods.values() for one in group]
    columns = results.SHARPNESS | results.VALUES | results.ood_values(ensembles)
    chosen = ["sharpness", "disagreement", "aurc", *(name for name in columns if name.startswith("auroc "))]
    chosen = [name for name in chosen if all(one.values.get(name) is not None for one in ensembles)]
    if not any(name.startswith("auroc ") for name in chosen):
        return []

    def cell(name: str, group: list[Ensemble]) -> str:
        mean, interval = results.estimate_of(group, name)
        _, _, factor, digits = columns[name]
        edges = " [{:.{d}f}, {:.{d}f}]".format(*(factor * edge for edge in interval), d=digits) if interval else ""
        return f"{factor * mean:.{digits}f}{edges}"

    rows = [[columns[name].title, *(cell(name, group) for group in methods.values())] for name in chosen]
    over = results.populations(list(methods.values()), {name: columns[name].title for name in chosen})
    text = (
        "What flatness does to uncertainty: how well four scores tell other data from the test images (AUROC, 50 % for "
        "a score that says nothing), and the error at each coverage (AURC, lower is better), beside disagreement and "
        f"sharpness. Means and 95 % intervals {over}:"
    )
    return [text, _table(rows, ["", *NAMES.values()])]


def by_corruption(measured: Measured) -> list[str]:
    """A table of accuracy under each corruption, mean over ensembles: of all severities, and of SAM at each."""
    parts = {
        method: [one.content["result"].get("corrupted", {}).get("parts", {}) for one in measured[method].values()]
        for method in NAMES
    }
    if not all(one for rows in parts.values() for one in rows):
        return []
    found = [part.rpartition("-") for part in parts["sam"][0]]
    severities = sorted({severity for _, _, severity in found})

    def mean(method: str, name: str, chosen: list[str]) -> str:
        values = (one[f"{name}-{s}"]["rates"]["ensemble_accuracy"] for one in parts[method] for s in chosen)
        return f"{100 * statistics.mean(values):.1f}"

    rows = []
    for name in dict.fromkeys(name for name, _, _ in found):
        cells = [mean(method, name, severities) for method in NAMES] + [mean("sam", name, [s]) for s in severities]
        rows.append([name.replace("_", " "), *cells])
    header = ["", *NAMES.values(), *(f"SAM, {severity}" for severity in severities)]
    text = "Ensemble accuracy in % under each corruption, mean over the ensembles and all severities, and SAM's at "
    return [f"{text}each severity:", _table(rows, header)]


def _table(rows: list[list[Any]], header: list[str]) -> str:
    rows = [list(map(table_cell, row)) for row in rows]
    return tabulate(rows, header, "pipe", disable_numparse=True)


if __name__ == "__main__":
    run(main, parse_args())
