"""Verdicts on the paper's claims, from the result files of `scripts/experiment.py`, as a page.

    python scripts/report.py results/fashion_mnist

Reads plan.json and measurements/ in each folder below the given one, and writes README.md there: what was compared, a
verdict on each of `CLAIMS`, and the accuracy under each corruption. Tables and figures are those of the experiment.
"""

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tabulate import tabulate

from utils import InputError, results, table_cell
from utils.cli import Parser, path, run
from utils.files import read_json, write_atomically
from utils.results import METHODS, Ensemble, Gap

# The methods that claims compare, by their names in the experiment.
NAMES = {"deep_ensemble": METHODS["deep_ensemble"].name, "sam": METHODS["sam"].name}
NAMES |= {"sharpbalance": METHODS["released"].name, "sharpbalance_paper": METHODS["paper"].name}
NAMES |= {"random": METHODS["random"].name}
# The values that claims compare: what the page calls each; the unit, if any; and the margin within which a difference
# is of no interest, in that unit.
COMPARED = {
    "ensemble": ("clean images: ensemble accuracy", "points", 0.5),
    "corrupted_ensemble": ("corrupted images: ensemble accuracy", "points", 1),
    "disagreement": ("clean images: disagreement", "points", 0.5),
    "sharpness": ("logarithm of sharpness", "", 0.1),
    "eir": ("SAM lowers the gain of ensembling: EIR", "", 0.02),
    "nll_calibrated": ("clean images: ensemble NLL, calibrated", "nats", 0.003),
}
FACTORS = {"points": 100, "points per factor e": 100}  # of units
LEVEL = 0.05  # of the claims of a setting together
FIGURES = {
    "tradeoff": "sharpness against diversity",
    "benchmark": "accuracy of members and ensembles, and differences to SAM",
    "severity": "scores against the severity of corruption, and differences to SAM",
    "ensemble_size": "scores against the number of members",
}
# Of settings where other data were measured.
UNCERTAINTY = {
    "ood": "entropy of test images and of other data, and ROC curves",
    "reliability": "accuracy against confidence, before and after a temperature",
}

Measured = dict[str, dict[str, Ensemble]]  # by method, by seeds


class Claim(NamedTuple):
    """A claim holds if `gap`, the difference for the ensembles of given seeds, is above 0.

    `margin`, in the unit, is what is of no interest.
    """

    name: str
    text: str
    unit: str
    margin: float
    gap: Callable[[Measured, str], Gap]


def compare(name: str, first: str, second: str, value: str) -> Claim:
    """The first method minus the second in one value; in sharpness, the difference of the logarithms.

    nan where a sharpness is not finite, or a value was not measured.
    """

    def gap(found: Measured, seeds: str) -> Gap:
        one, other = found[first][seeds], found[second][seeds]
        if value == "sharpness":
            a, b = one.values[value], other.values[value]
            return math.log(a / b) if 0 < a < math.inf and 0 < b < math.inf else math.nan
        difference = results.gap_between(one, other, value)
        return math.nan if difference is None else difference

    what, unit, margin = COMPARED[value]
    names = NAMES | {"sam_largest": "SAM with the largest rho"}
    return Claim(name, f"{what}, {names[first]} - {names[second]}", unit, margin, gap)


def line_of_rho(found: Measured, seeds: str) -> tuple[float, float]:
    """Slope and intercept of the least-squares line of disagreement over log sharpness, along rho of SAM (0: SGD).

    It says nothing of ensembles that were trained by the same rho. nan where a sharpness is not finite.
    """
    methods = [found["deep_ensemble"], *(found[name] for name in found if name.startswith("sam_0"))]
    values = [by_seeds[seeds].values for by_seeds in methods]
    if not all(0 < v["sharpness"] < math.inf for v in values):
        return math.nan, math.nan
    line = np.polyfit([np.log(v["sharpness"]) for v in values], [v["disagreement"] for v in values], 1)
    return float(line[0]), float(line[1])


def slope(found: Measured, seeds: str) -> float:
    """The slope of `line_of_rho`."""
    return line_of_rho(found, seeds)[0]


def above_the_line(name: str, method: str) -> Claim:
    """The disagreement of a method less that of SAM on the `line_of_rho` at the method's sharpness."""

    def gap(found: Measured, seeds: str) -> float:
        values, (slope, intercept) = found[method][seeds].values, line_of_rho(found, seeds)
        if not 0 < values["sharpness"] < math.inf:
            return math.nan
        return values["disagreement"] - (intercept + slope * math.log(values["sharpness"]))

    text = f"disagreement at equal sharpness, {NAMES[method]} - SAM on its line over rho"
    return Claim(name, text, *COMPARED["disagreement"][1:], gap)


SLOPE = "from one rho to the next, sharper members are more diverse: slope of disagreement over log sharpness"
CLAIMS = (
    Claim("i", SLOPE, "points per factor e", 1, slope),
    compare("i, diversity", "deep_ensemble", "sam_largest", "disagreement"),
    compare("i, sharpness", "deep_ensemble", "sam_largest", "sharpness"),
    compare("ii", "deep_ensemble", "sam", "eir"),
    compare("iii, released", "sharpbalance", "sam", "corrupted_ensemble"),
    compare("iii, paper", "sharpbalance_paper", "sam", "corrupted_ensemble"),
    compare("iv, released", "sharpbalance", "sam", "ensemble"),
    compare("iv, paper", "sharpbalance_paper", "sam", "ensemble"),
    compare("v, corrupted", "sharpbalance_paper", "sharpbalance", "corrupted_ensemble"),
    compare("v, clean", "sharpbalance_paper", "sharpbalance", "ensemble"),
    compare("vi, corrupted", "sharpbalance", "random", "corrupted_ensemble"),
    compare("vi, clean", "sharpbalance", "random", "ensemble"),
    compare("vi, diversity", "sharpbalance", "random", "disagreement"),
    compare("vii, released", "sharpbalance", "sam", "disagreement"),
    compare("vii, paper", "sharpbalance_paper", "sam", "disagreement"),
)
# Written down after the experiments of plans without "claims": 2, whose numbers suggested some of them.
LATER_CLAIMS = (
    compare("viii, clean", "sharpbalance", "deep_ensemble", "ensemble"),
    compare("viii, corrupted", "sharpbalance", "deep_ensemble", "corrupted_ensemble"),
    compare("ix, released", "sam", "sharpbalance", "nll_calibrated"),
    compare("ix, paper", "sam", "sharpbalance_paper", "nll_calibrated"),
    above_the_line("x, released", "sharpbalance"),
    above_the_line("x, paper", "sharpbalance_paper"),
)
OPENING = (
    "# The paper's claims on Fashion-MNIST",
    "`bash scripts/reproduce_fashion_mnist.sh` trains and measures; `python scripts/report.py results/fashion_mnist` "
    "writes this page from the JSON files beside it.",
    "Ensembles of 3 members; ResNet-18, batch 64, learning rate 0.1 in steps, no augmentation except mirroring; "
    "Fashion-MNIST-C of the first test images (15 corruptions at 5 severities, by scripts/make_corrupted.py). "
    "Checkpoints: end of training. rho was chosen by the ensemble accuracy of SAM on validation, k (the share of the "
    "images that each member picks by its scores) and T_d (the epoch before which samples are assigned) by that of "
    "SharpBalance (released) on the first seeds, and used for all methods; none of them was chosen on test images.",
    "The claims were written down before test images were looked at. A claim is *supported* or *contradicted* where "
    "the mean difference between ensembles of the same seeds is above or below 0 with a p value of at most "
    f"{100 * LEVEL:g} % after Holm's correction for the claims of a table; *equivalent* where it is "
    "neither, and lies within the margin of interest by two one-sided tests at 5 % (the 90 % interval is within it); "
    "else *undecided*. The margins and the correction were chosen after these results were known. The intervals of the "
    "tables are of 95 %, each for itself, over new ensembles and new test images, or over ensembles with these images "
    "where that is written beside them; all hold for this one draw of training images and of wrong labels. "
    "Differences of accuracy and disagreement are in percentage points.",
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
    blocks = [*OPENING]
    for folder in folders:
        plan = read_json(folder / "plan.json", "run scripts/experiment.py again")
        try:
            blocks += section(folder, plan)
        except InputError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            what = f"not an experiment with all methods of the claims ({error!r})"
            raise InputError(f"{folder}: {what}; run scripts/experiment.py again") from error
    write_atomically(args.results / "README.md", ("\n\n".join(blocks) + "\n").encode(errors="backslashreplace"))
    print(f"wrote {args.results / 'README.md'}")


def read_measured(folder: Path, rho: float) -> Measured:
    """The ensembles of an experiment; `sam` is SAM at the chosen rho, `sam_largest` at the largest."""
    found: Measured = {}
    for place in sorted((folder / "measurements").glob("*")):
        method, _, seed = place.name.rpartition("_")
        found.setdefault(method, {})[seed] = results.read_ensemble(place)
    results.check_alike([ensemble for by_seeds in found.values() for ensemble in by_seeds.values()])
    largest = max((name for name in found if name.startswith("sam_")), key=lambda name: float(name[4:]))
    found |= {"sam": found[f"sam_{rho:g}"], "sam_largest": found[largest]}
    seeds = {tuple(sorted(found[name])) for name in (*NAMES, "eoa")}
    if len(seeds) > 1 or len(seeds.pop()) < 2:
        raise InputError(f"{folder}: expected the same two or more seeds for all methods; complete the experiment")
    return found


def holm(p_values: list[float]) -> list[float]:
    """The p values, corrected for their number: the i-th smallest of m times m + 1 - i, and not below a smaller one's.

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = largest
    return corrected


def verdict(gaps: list[Gap], p: float, margin: float) -> str:
    """Supported, contradicted, equivalent or undecided, by a p value that is corrected for the number of claims.

    A mean that is not finite has no interval, and decides nothing.
    """
    mean, interval, _ = results.interval_of(gaps, 1 - 2 * LEVEL)
    if interval is None:
        return "undecided"
    if p <= LEVEL:
        return "supported" if mean > 0 else "contradicted"
    return "equivalent" if -margin < interval[0] and interval[1] < margin else "undecided"


def section(folder: Path, plan: dict[str, Any]) -> list[str]:
    """The paragraphs, tables and figures of one experiment."""
    measured = read_measured(folder, plan["chosen"]["rho"])
    ensembles = [one for by_seeds in measured.values() for one in by_seeds.values()]
    first, seeds = ensembles[0].content, sorted(measured["sam"])
    corrupted, images = results.require(ensembles[0], "corrupted", "mean", "samples"), first["data"]["val"]
    commits = sorted({one.content["environment"]["commit"] or "no clone" for one in ensembles})
    ball = results.sharpness_protocol(next(iter(measured["sam"].values())), "APGD_worst-l2")
    blocks = [
        f"## {table_cell(folder.name.replace('_', ' ').capitalize())}",
        f"{len(seeds)} ensembles by each method: {results.setting_of(first)}, {first['trained']['epochs']} epochs; "
        f"{images} validation images, {first['data']['test']} test images, corrupted copies of {corrupted:g}. "
        f"{plan['jobs']} single-thread processes on {plan['environment']['cpus']} cores, torch "
        f"{plan['environment']['torch']}. Measured by the code of {' and '.join(commits)}."
        + " (-dirty: with changes that no commit has.)" * any(commit.endswith("-dirty") for commit in commits)
        + looks(plan),
        f"Ensemble accuracy on validation: {choices(plan)}.{chance(plan, images)}",
        f"Sharpness: the rise of the loss in the worst case within {'an adaptive' if ball['adaptive'] else 'a'} l2 "
        f"ball of radius {ball['rho0']:g}, mean over {ball['batch_num']} batches of {ball['eval_batch_size']} training "
        f"images, by '{ball['maximiser']}' in {ball['n_iters']} iterations.",
        claims_table(CLAIMS + LATER_CLAIMS * (plan.get("claims") == 2), measured, seeds),
    ]
    if plan.get("claims") != 2:
        blocks += [
            "Claims for the next experiment. They were written down after these test images had been looked at, so "
            "that here nothing is decided by them:",
            claims_table(LATER_CLAIMS, measured, seeds, decide=False),
        ]
    if shares := plan["mislabelled"]:
        sets = (
            f"{NAMES[name]} {100 * shares[name]:.1f} % (sets of {100 * shares[f'{name}_size']:.0f} % of the images)"
            for name in ("sharpbalance", "sharpbalance_paper", "random")
        )
        blocks.append(
            f"Of the training images {100 * shares['all']:.1f} % have a wrong label. Of those that a member trains "
            f"with SAM once samples are assigned: {'; '.join(sets)}."
        )
    place = quote(os.fsencode(folder.name))
    uncertain = uncertainty(measured)
    shown = FIGURES | (UNCERTAINTY if uncertain else {})
    figures = [f"![{text}]({place}/{kind}.png)" for kind, text in shown.items()]
    tables = f"[{table_cell(folder.name)}/tables.md]({place}/tables.md)"
    return [*blocks, f"All methods: {tables}.", *uncertain, *by_corruption(measured), *figures]


def looks(plan: dict[str, Any]) -> str:
    """What is to be said where test images were looked at before all ensembles were there."""
    numbers = plan.get("looks", [])
    if len(numbers) < 2:
        return ""
    times = " and again with ".join(map(str, numbers))
    return (
        f" Test images were looked at with {times} ensembles; where nothing differs, one of these looks excludes 0 "
        "more often than the last alone."
    )


def choices(plan: dict[str, Any]) -> str:
    """The ensemble accuracies on validation that rho, k and T_d were chosen by."""
    found, tried = [], plan["validation"]
    if "deep ensemble" in tried:
        found.append(f"deep ensemble {100 * tried['deep ensemble']:.2f} %")
    for name, of in (("rho", "SAM"), ("k", "SharpBalance (released) on the first seeds"), ("T_d", "likewise")):
        values, chosen = tried.get(name, {}), plan["chosen"][name]
        scores = ", ".join(f"{name} {value}: {100 * score:.2f} %" for value, score in values.items())
        edge = " (an end of what was tried)" if chosen in [f(map(float, values)) for f in (min, max) if values] else ""
        found.append(f"{of}, {scores}, chosen {chosen:g}{edge}" if scores else f"{name} {chosen:g}")
    return "; ".join(found)


def chance(plan: dict[str, Any], images: int) -> str:
    """The standard error of the accuracies that k and T_d were chosen by, beside how far apart these are."""
    found, gaps = [], []
    for name in ("k", "T_d"):
        values = {float(value): score for value, score in plan["validation"].get(name, {}).items()}
        if len(values) > 1 and plan["chosen"][name] in values:
            found.append(values[plan["chosen"][name]])
            gaps.append(f"{100 * (max(values.values()) - min(values.values())):.2f} points for {name}")
    if not found:
        return ""
    error = 100 * math.sqrt(found[-1] * (1 - found[-1]) / images)
    return (
        f" The accuracy of one ensemble on {images} images, {100 * found[-1]:.2f} %, has a standard error of "
        f"{error:.1f} points; the best and the worst value that were tried are apart by {' and '.join(gaps)}."
    )


def claims_table(claims: tuple[Claim, ...], measured: Measured, seeds: list[str], decide: bool = True) -> str:
    """A line for each claim; without verdicts unless these decide."""
    gaps = [[FACTORS.get(claim.unit, 1) * claim.gap(measured, one) for one in seeds] for claim in claims]
    p_values = [results.p_value_of(one) for one in gaps]
    rows = []
    for claim, gap, p, corrected in zip(claims, gaps, p_values, holm(p_values), strict=True):
        mean, interval, population = results.interval_of(gap)
        digits = 2 if claim.unit in FACTORS else 3
        edges = "[{:.{d}f}, {:.{d}f}]".format(*interval, d=digits) if interval else "-"
        edges += f" ({population})" * (interval is not None and population != results.BOTH)
        shown = f"{mean:+.{digits}f} {claim.unit}".strip() if math.isfinite(mean) else "not finite"
        row, margin = [claim.name, claim.text, shown, edges], f"{claim.margin:g} {claim.unit}".strip()
        word = verdict(gap, corrected, claim.margin)
        rows.append(row + [f"{p:.4f}", f"{corrected:.3f}", margin, f"**{word}**"] * decide)
    header = ["claim", "", "mean", "95 % interval"] + ["p", "p, Holm", "margin", "verdict"] * decide
    return _table(rows, header)


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
    text = (
        "What flatness does to uncertainty: how well four scores tell other data from the test images (AUROC, 50 % for "
        "a score that says nothing), and the error at each coverage (AURC, lower is better), beside disagreement and "
        "sharpness. Means and 95 % intervals over new ensembles and new images, but of sharpness over ensembles:"
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
    text = (
        "Ensemble accuracy in % under each corruption, mean over the ensembles and all severities, and SAM's at each "
    )
    return [f"{text}severity:", _table(rows, ["", *NAMES.values(), *(f"SAM, {severity}" for severity in severities)])]


def _table(rows: list[list[Any]], header: list[str]) -> str:
    rows = [list(map(table_cell, row)) for row in rows]
    return tabulate(rows, header, "pipe", disable_numparse=True)


if __name__ == "__main__":
    run(main, parse_args())
