"""Claims about methods: the differences that they compare, verdicts on them, and how many ensembles a verdict takes.

A claim is about one difference for each group of seeds, and holds if it is above 0. Claims that are written down
together are a family: `judge` corrects for their number.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy
import torch

from utils import results
from utils.results import METHODS, Ensemble, Gap

# The methods that claims compare, by their names in an experiment.
NAMES = {"deep_ensemble": METHODS["deep_ensemble"].name, "sam": METHODS["sam"].name}
NAMES |= {"sharpbalance": METHODS["released"].name, "sharpbalance_paper": METHODS["paper"].name}
NAMES |= {"random": METHODS["random"].name}
ALL_NAMES = NAMES | {
    "sam_largest": "SAM with the largest rho",
    "late_sam": "SAM in the last eighth of training",
    "late_sharpbalance": f"{METHODS['released'].name} in the last eighth of training",
    "plain_start": f"{METHODS['released'].name} after a plain start",
    "random_paper": f"{METHODS['random'].name}, sized as {METHODS['paper'].name}",
    "sharpbalance_next": f"{METHODS['released'].name} at the next rho",
    "sharpbalance_paper_next": f"{METHODS['paper'].name} at the next rho",
}
# The values that claims compare: what the page calls each; the unit, if any; and the margin within which a difference
# is of no interest, in that unit.
COMPARED = {
    "ensemble": ("clean images: ensemble accuracy", "points", 0.5),
    "corrupted_ensemble": ("corrupted images: ensemble accuracy", "points", 1),
    "disagreement": ("clean images: disagreement", "points", 0.5),
    "sharpness": ("logarithm of sharpness", "", 0.1),
    "eir": ("SAM lowers the gain of ensembling: EIR", "", 0.02),
    "nll": ("clean images: ensemble NLL before calibration", "nats", 0.003),
    "nll_calibrated": ("clean images: ensemble NLL, calibrated", "nats", 0.003),
    "auroc entropy digits": ("digits from test images, by entropy: AUROC", "points", 1),
}
FACTORS = {"points": 100, "points per factor e": 100}  # of units
LEVEL = 0.05  # of the claims of a family together
POWER = 0.8
MAX_ENSEMBLES = 1000

Measured = dict[str, dict[str, Ensemble]]  # by method, by seeds


class Claim(NamedTuple):
    """A claim holds if `gap`, the difference for the ensembles of given seeds, is above 0.

    `margin`, in the unit, is what is of no interest; `methods` are those that it compares.
    """

    name: str
    text: str
    unit: str
    margin: float
    gap: Callable[[Measured, str], Gap]
    methods: tuple[str, ...] = ()


class Judged(NamedTuple):
    """A claim with its mean difference and 95 % interval in its unit, its p values, and the verdict."""

    claim: Claim
    mean: float
    interval: results.Interval
    population: str
    p: float
    corrected: float
    word: str
    ensembles: int | None
    small: bool  # the 90 % interval lies within the margin

    @property
    def verdict(self) -> str:
        """The verdict, with an addition where a difference that is decided is one of no interest."""
        return self.word + ", within the margin" * (self.small and self.word in ("supported", "contradicted"))

    @property
    def row(self) -> list[str]:
        """Name, text, mean, interval, p, corrected p, margin and verdict, as cells of a table."""
        claim, digits = self.claim, 2 if self.claim.unit in FACTORS else 4 if self.claim.unit == "nats" else 3
        edges = "[{:.{d}f}, {:.{d}f}]".format(*self.interval, d=digits) if self.interval else "-"
        edges += f" ({self.population})" * (self.interval is not None and self.population != results.BOTH)
        mean = f"{self.mean:+.{digits}f} {claim.unit}".strip() if math.isfinite(self.mean) else "none"
        found = [claim.name, claim.text, mean, edges, _p(self.p, 4), _p(self.corrected, 3)]
        return [*found, f"{claim.margin:g} {claim.unit}".strip(), f"**{self.verdict}**"]


def _p(value: float, digits: int) -> str:
    least = 10.0**-digits
    return f"<{least:.{digits}f}" if 0 < value < least else f"{value:.{digits}f}"


HEADER = ["claim", "", "mean", "95 % interval", "p", "p, Holm", "margin", "verdict"]


def compare(name: str, first: str, second: str, value: str, margin: float | None = None) -> Claim:
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

    what, unit, usual = COMPARED[value]
    text = f"{what}, {ALL_NAMES[first]} - {ALL_NAMES[second]}"
    return Claim(name, text, unit, usual if margin is None else margin, gap, (first, second))


def curve_of_rho(found: Measured) -> list[dict[str, Ensemble]]:
    """The ensembles by SGD, and by SAM at each rho that is there for the same seeds."""
    plain = found["deep_ensemble"]
    sam = [by_seeds for name, by_seeds in found.items() if name.startswith("sam_") and name != "sam_largest"]
    return [plain, *([group for group in sam if group.keys() >= plain.keys()] or [found["sam"]])]


def slope(found: Measured, seeds: str) -> float:
    """The slope of the least-squares line of disagreement over log sharpness, along rho of SAM (0: SGD).

    It says nothing of ensembles that were trained by the same rho. nan where a sharpness is not finite.
    """
    values = [by_seeds[seeds].values for by_seeds in curve_of_rho(found)]
    if not all(0 < v["sharpness"] < math.inf for v in values):
        return math.nan
    return float(np.polyfit([np.log(v["sharpness"]) for v in values], [v["disagreement"] for v in values], 1)[0])


def above_the_curve(name: str, method: str) -> Claim:
    """The disagreement of a method less that of SAM at equal sharpness: pseudo-values of the jackknife over ensembles.

    With d and s the means over ensembles of disagreement and sharpness, theta = d(method) - f(log s(method)), where f
    is linear from point to point through (log s, d) of SGD and of SAM at each rho, and constant beyond both ends. Of
    ensemble i among n it is n theta - (n - 1) theta without i; n is 2 or more. nan where a sharpness is not finite.

    Source: Tukey's pseudo-values, in Miller, "The jackknife: a review", Biometrika 1974.
    """

    def theta(found: Measured, every: list[str]) -> float:
        def mean(by_seeds: dict[str, Ensemble], name: str) -> float:
            return statistics.mean(by_seeds[seeds].values[name] for seeds in every)

        groups = [*curve_of_rho(found), found[method]]
        sharpness = [mean(group, "sharpness") for group in groups]
        if not all(0 < value < math.inf for value in sharpness):
            return math.nan
        *points, (at, disagreement) = zip(np.log(sharpness), [mean(g, "disagreement") for g in groups], strict=True)
        return float(disagreement - np.interp(at, *zip(*sorted(points), strict=True)))

    def gap(found: Measured, seeds: str) -> float:
        every = list(found[method])
        others = [one for one in every if one != seeds]
        return len(every) * theta(found, every) - len(others) * theta(found, others)

    text = f"disagreement at equal sharpness, {ALL_NAMES[method]} - SAM on its curve over rho"
    return Claim(name, text, *COMPARED["disagreement"][1:], gap, ("deep_ensemble", "sam", method))


def beyond_the_curve(found: Measured, method: str) -> str:
    """Where a method's mean sharpness lies beyond the curve of `above_the_curve`: "flatter", "sharper", or ""."""
    groups = [*curve_of_rho(found), found[method]]
    *curve, own = (statistics.mean(one.values["sharpness"] for one in group.values()) for group in groups)
    return "flatter" if own < min(curve) else "sharper" if own > max(curve) else ""


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
    mean, interval, _ = results.interval_of(gaps)
    if interval is not None and p <= LEVEL:
        return "supported" if mean > 0 else "contradicted"
    return "equivalent" if is_small(gaps, margin) else "undecided"


def is_small(gaps: list[Gap], margin: float) -> bool:
    """Whether a difference lies within the margin by two one-sided tests at `LEVEL`."""
    _, interval, _ = results.interval_of(gaps, 1 - 2 * LEVEL)
    return interval is not None and -margin < interval[0] and interval[1] < margin


def judge(claims: Sequence[Claim], measured: Measured, seeds: list[str]) -> list[Judged]:
    """The verdicts on the claims of one family, over the ensembles of these seeds."""
    gaps = [[FACTORS.get(claim.unit, 1) * claim.gap(measured, one) for one in seeds] for claim in claims]
    p_values = [results.p_value_of(one) for one in gaps]
    found = []
    for claim, gap, p, corrected in zip(claims, gaps, p_values, holm(p_values), strict=True):
        number = ensembles_needed(gap, claim.margin, LEVEL / len(claims))
        word, small = verdict(gap, corrected, claim.margin), is_small(gap, claim.margin)
        found.append(Judged(claim, *results.interval_of(gap), p, corrected, word, number, small))
    return found


def ensembles_needed(gaps: list[Gap], margin: float, level: float) -> int | None:
    """The smallest number E of ensembles that shows a true difference of the margin with a power of `POWER`.

    The smallest E with (t(1 - level/2) + t(POWER)) SE(E) <= margin, quantiles t of Student's distribution of E - 1
    degrees of freedom, and SE(E)^2 = F + R/E, from the n ensembles that there are as `crossed_interval` finds it: R is
    the larger of the variances of the ensembles' means, s^2, and of the residuals of N images, s_residual^2/N. F is
    what more ensembles do not lessen, the images' own part, s_image^2/N - s_residual^2/(n N) of the means by image, or
    0 if that is negative. Where values by image are not known, F is 0 and R is s^2.

    Args:
        gaps: differences of the ensembles that there are, 2 or more.
        margin: the difference that is of interest, above 0, in their unit.
        level: of the two-sided test: for the smallest p value of m claims by Holm's rule, the level over m.

    Returns:
        The number, 2 or more; None where even `MAX_ENSEMBLES` do not do, or a difference is not finite.

    Source: Chow, Shao and Wang, "Sample size calculations in clinical research", 2008, section 3.1.
    """
    if len(gaps) < 2 or results.interval_of(gaps)[1] is None:
        return None
    means = [torch.as_tensor(gap).double().mean().item() for gap in gaps]
    fixed, lessening = 0.0, statistics.variance(means)
    if results.interval_of(gaps)[2] == results.BOTH:
        table = torch.stack([torch.as_tensor(gap) for gap in gaps]).double()
        rows, columns = table.mean(dim=1, keepdim=True), table.mean(dim=0)
        residuals = (table - rows - columns + table.mean()).square().sum() / ((len(table) - 1) * (table.shape[1] - 1))
        fixed = max((columns.var() / table.shape[1] - residuals / table.numel()).item(), 0.0)
        lessening = max(lessening, residuals.item() / table.shape[1])
    for number in range(2, MAX_ENSEMBLES + 1):
        quantiles = scipy.special.stdtrit(number - 1, [1 - level / 2, POWER]).sum()
        if quantiles * math.sqrt(fixed + lessening / number) <= margin:
            return number
    return None
