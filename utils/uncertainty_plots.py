"""Every figure of what is not known, drawn like those of `utils.plots`: by ensembles, and by claims about them."""

import itertools
import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from scipy import stats

from utils import InputError
from utils.metrics import OOD_SCORES, t_interval
from utils.plots import Group, Shown, about, bar, caption, finished, intervals, line_styles, markers, panels, styled
from utils.results import METHODS, Ensemble, Interval, require

MIN_IMAGES = 10  # of a bin whose accuracy is drawn


@styled
def ood(ensembles: list[Ensemble]) -> Figure:
    """How well entropy and mutual information tell other data from the test images: a row of panels for each set.

    The entropy of test images (lines) and of others (filled), and the ROC curves of both scores; means over ensembles.
    """
    found = [require(one, "test").get("ood", {}) for one in ensembles]
    sets = [name for name in found[0] if all(name in one for one in found)]
    if not sets:
        problem = f"{ensembles[0].folder}/diversity.json: no other data was measured, or not the same for all"
        raise InputError(f"{problem}; measure it by measure_diversity.py --mode ood --ood noise")
    groups = line_styles(ensembles)
    figure, axes = panels(0.3 + 1.15 * len(sets), len(sets), 3, squeeze=False)
    for (left, *right), name in zip(axes, sets, strict=True):
        for group in groups:
            rows = [one.content["result"]["test"]["ood"][name]["scores"] for one in group.ensembles]
            histograms = [row["entropy"]["histogram"] for row in rows]
            edges = np.linspace(*histograms[0]["edges"], len(histograms[0]["in"]) + 1)
            # Broken lines stand for methods: what tells the two kinds of images apart is the filling.
            for kind, filling in (("in", {}), ("out", {"fill": True, "alpha": 0.3})):
                shares = 100 * np.mean([one[kind] for one in histograms], axis=0)
                left.stairs(shares, edges, **_line(group), **filling)
            for axis, score in zip(right, ("entropy", "mutual_information"), strict=True):
                rates = 100 * np.mean([row[score]["tpr"] for row in rows], axis=0)
                axis.plot(np.linspace(0, 100, len(rates)), rates, color=group.colour, linestyle=group.line)
        left.set(xlabel="entropy  [nats]", ylabel="images  [%]", ylim=(0, None), xlim=(edges[0], edges[-1]))
        left.set_title(name.removeprefix("folder:"))
        for axis, score in zip(right, ("entropy", "mutual_information"), strict=True):
            _diagonal(axis)
            axis.set(xlabel="false pos.  [%]", title=OOD_SCORES[score])
            axis.set(xlim=(-2, 102), ylim=(-2, 102), xticks=(0, 50, 100), yticks=(0, 50, 100))
        right[0].set_ylabel("true pos.  [%]")
        right[1].set_yticklabels([])
    counts = ", ".join(f"{found[0][name]['images']} of {name}" for name in sets)
    copies = "".join(f" {n}: mean of {found[0][n]['parts']} comparisons." for n in sets if found[0][n]["parts"] > 1)
    note = f"{about(groups)}; other images: {counts}. Left: entropy of test images (lines) and of others (filled). "
    note += "ROC curves of both scores, positive: others; on the dotted line a score says nothing. Means over "
    note += f"ensembles, at equal false positives.{copies}"
    handles = [Line2D([], [], label=group.label, **_line(group)) for group in groups]
    return finished(figure, handles, note)


def _line(group: Group) -> dict:
    return {"color": group.colour, "linestyle": group.line, "linewidth": 1.1}


def _diagonal(axis: Axes) -> None:
    axis.plot([0, 100], [0, 100], color="black", linewidth=0.7, linestyle=":", zorder=1)


@styled
def reliability(ensembles: list[Ensemble]) -> Figure:
    """Accuracy against confidence, bin by bin, before and after the temperature; below, the images in each bin.

    A calibrated ensemble is on the diagonal. Bins of fewer than 10 images, mean over ensembles, have no accuracy.
    """
    groups, bins = line_styles(ensembles), []
    samples = min(round(require(one, "test", "samples")) for one in ensembles)
    figure, axes = panels(2.7, 2, 2, sharex=True, sharey="row", height_ratios=[2, 1])
    for column, (when, title) in zip(axes.T, (("before", "as trained"), ("after", "with a temperature")), strict=True):
        for group in groups:
            rows = [require(one, "test", "reliability", when) for one in group.ensembles]
            share, correct, confidence = (
                np.array([row[key] for row in rows]) for key in ("share", "correct", "confidence")
            )
            shown = share.mean(axis=0) * samples >= MIN_IMAGES
            with np.errstate(invalid="ignore"):
                accuracy = correct / share
            means = correct.sum(axis=0)[shown] / share.sum(axis=0)[shown]
            x = 100 * confidence.sum(axis=0)[shown] / share.sum(axis=0)[shown]
            column[0].plot(x, 100 * means, linewidth=0.8, zorder=3, **group.mark)
            for place, b in zip(x, np.flatnonzero(shown), strict=True):
                bins.append(Shown(math.nan, *_interval(accuracy[:, b], correct[:, b], share[:, b], samples)))
                bar(column[0], place, bins[-1], 100, ecolor=group.colour)
            borders = np.linspace(0, 100, share.shape[1] + 1)
            column[1].stairs(100 * share.mean(axis=0), borders, **_line(group))
        _diagonal(column[0])
        column[0].set(title=title, xlim=(-2, 102), ylim=(-2, 102), xticks=range(0, 101, 25))
        column[1].set(xlabel="confidence  [%]", yscale="log")
    decades = [10.0**power for power in range(math.floor(math.log10(100 / samples)), 3)]
    axes[1, 0].set_yticks(decades, map("{:g}".format, decades))
    axes[1, 0].set_ylim(100 / samples, 100)
    axes[1, 0].yaxis.set_minor_locator(NullLocator())
    axes[0, 0].set_ylabel("accuracy  [%]")
    axes[1, 0].set_ylabel("images  [%]")
    note = f"{about(groups)}. Bins of confidence of the ensemble, on the clean test images; one temperature, fitted on "
    note += "validation; the dotted line is perfect calibration. "
    note += f"Bins of fewer than {MIN_IMAGES} images have no accuracy.{intervals(bins)}"
    return finished(figure, markers(groups, linewidth=0.8), note)


def _interval(accuracy: np.ndarray, correct: np.ndarray, share: np.ndarray, samples: int) -> tuple[Interval, str]:
    """Of the accuracy in a bin: Student's over ensembles, or Wilson's over the images of a single one."""
    if len(accuracy) > 1:
        return (t_interval(accuracy.tolist()) if np.isfinite(accuracy).all() else None), "ensembles"
    test = stats.binomtest(round(correct[0] * samples), round(share[0] * samples))
    return list(test.proportion_ci(method="wilson")), "images"


# How the map marks the verdicts of utils/claims.py, and what the marks mean.
MARKS = {"supported": "\u25b2", "contradicted": "\u25bc", "supported, within the margin": "\u25b3"}
MARKS |= {"contradicted, within the margin": "\u25bd", "equivalent": "=", "undecided": "?"}
LEGEND = "\u25b2 \u25bc better, worse; \u25b3 \u25bd so within the margin; = equivalent within the margin; ? undecided"
LEGEND += "; empty: not compared"
# From worse to better: the colours of SAM and SharpBalance, which all readers can tell apart.
BETTER = LinearSegmentedColormap.from_list("better", [METHODS["sam"].colour, "#ffffff", METHODS["released"].colour])


@styled
def verdicts(settings: list[str], parts: dict[str, dict[str, list[Any]]], note: str) -> Figure:
    """A map of differences: a row for each comparison, a column for each setting, a panel for each value.

    Args:
        settings: the columns' labels.
        parts: by the panel's title and the row's label, for each setting a `utils.claims.Judged`, or None. Where the
            title's unit is a thousandth, [m...], so is what is shown.
        note: the caption.
    """
    rows = max(map(len, parts.values()))
    figure, axes = panels(0.3 + len(parts) * (0.55 + 0.2 * rows), len(parts), 1, squeeze=False)
    for axis, (title, found) in zip(axes[:, 0], parts.items(), strict=True):
        factor = 1000 if "[m" in title else 1
        table = np.array([[math.nan if one is None else factor * one.mean for one in row] for row in found.values()])
        finite = np.abs(table[np.isfinite(table)])
        margin = max((factor * one.claim.margin for row in found.values() for one in row if one is not None), default=1)
        limit = max([2 * margin, *finite])  # what is of no interest stays pale
        axis.imshow(table, cmap=BETTER, vmin=-limit, vmax=limit, aspect="auto")
        for (i, row), j in itertools.product(enumerate(found.values()), range(len(settings))):
            if row[j] is not None:
                value = table[i, j]
                text = f"{value:+.2f}" if math.isfinite(value) else "-"
                dark = math.isfinite(value) and _luminance(BETTER((value / limit + 1) / 2)) < 0.18
                colour = "white" if dark else "black"  # a cell without a number is not filled
                axis.text(j, i, f"{text} {MARKS[row[j].verdict]}", ha="center", va="center", fontsize=5.5, color=colour)
        axis.set_xticks(range(len(settings)), settings)
        axis.set_yticks(range(len(found)), found)
        axis.set(title=title)
        axis.grid(visible=False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.set_figheight(figure.get_figheight() + 0.1 * caption(figure, f"{note} {LEGEND}."))
    return figure


def _luminance(colour: tuple[float, ...]) -> float:
    """The relative luminance of WCAG 2, 0 to 1; at 0.18 black and white have the same contrast with a colour."""
    parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))
