"""Every figure of measurements and runs: a function takes comparable ensembles and returns a Figure; `save` writes it.

Figures are drawn by Agg, without a display, and without pyplot, which would keep global state. Colours belong to
methods (`utils.results.METHODS`); markers and lines differ as well.
"""

import io
import json
import math
import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from utils import InputError
from utils.files import write_atomically
from utils.results import (
    BOTH,
    METHODS,
    Ensemble,
    Estimate,
    Interval,
    estimate,
    estimate_of,
    groups_of,
    population_of,
    require,
    setting_of,
    sharpness_protocol,
)

MARKERS = "osD^vph<>"
# All but the first have gaps: where curves coincide, those below stay visible.
LINES = ("-", (0, (6, 2)), (0, (3, 2)), (0, (1, 1)))
# How labels write the settings in which curves of one method differ.
SYMBOLS = {"rho": r"$\rho$", "flat_ratio": "$k$", "initial_epochs": "$T_d$"}
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "errorbar.capsize": 2,
    "font.size": 9.5,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "pdf.fonttype": 42,  # text stays text
}
# All other settings are matplotlib's own: a user's matplotlibrc could ask for LaTeX, or for black paper.
DEFAULTS = {name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")}
styled = matplotlib.rc_context(DEFAULTS | STYLE)

# The test sets that figures show: the prefix of their values, their place in the result, and their title.
TEST_SETS = {"": (("test",), "clean test images"), "corrupted_": (("corrupted", "mean"), "corrupted test images")}


@dataclass
class Group:
    """Ensembles of the same settings, and how figures show them.

    `offset` is the position among all groups, centred at 0, by which points of different groups are drawn side by side.
    """

    key: str  # in METHODS
    label: str
    ensembles: list[Ensemble]
    colour: tuple[float, ...]
    marker: str
    line: Any
    offset: float


def file_beside(path: Path, kind: str) -> Path:
    """The file <path>.<kind>, where the path may end in .pdf or .png itself."""
    return path.with_name(f"{path.name.removesuffix('.pdf').removesuffix('.png')}.{kind}")


@styled
def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write a figure atomically as <path>.pdf and <path>.png; the same figure always gives the same bytes.

    Args:
        figure: the figure.
        path: with or without one of the two suffixes.

    Returns:
        the two files.
    """
    # Each solution of constrained layout moves things a little, and ticks may change with the size of the panels. After
    # two of them the layout is fixed, so that both files agree.
    figure.draw_without_rendering()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    left_out = {"pdf": ("CreationDate", "Creator", "Producer"), "png": ("Software",)}
    files = [file_beside(Path(path), kind) for kind in left_out]
    for file, (kind, entries) in zip(files, left_out.items(), strict=True):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=160, metadata=dict.fromkeys(entries))
        write_atomically(file, buffer.getvalue())
    return files


def shades(key: str, count: int) -> list[tuple[float, ...]]:
    """Shades of a method's colour from dark to light, one for each of its curves."""
    colour = to_rgb(METHODS[key].colour)
    # From a mixture with black to one with white; neither end is reached.
    mixes = [0.0] if count == 1 else [-0.45 + 0.95 * i / (count - 1) for i in range(count)]
    return [tuple(c * (1 + m) if m < 0 else c + (1 - c) * m for c in colour) for m in mixes]


def line_styles(ensembles: list[Ensemble]) -> list[Group]:
    """Label, colour, marker and line of each group of ensembles, in the order of `METHODS`.

    Groups of one method get shades of its colour, darker for smaller rho, and labels with the settings in which they
    differ.
    """
    found, groups = groups_of(ensembles).values(), []
    for key in METHODS:
        same = [group for group in found if group[0].key == key]
        same.sort(key=lambda group: (group[0].content.get("trained") or {}).get("rho") or 0)
        for group, colour in zip(same, shades(key, len(same)), strict=True):
            # That of an unknown method is a folder's name: no formula, and legends leave out what begins with _.
            unknown = group[0].method.replace("$", r"\$").lstrip("_")
            label = unknown if key == "unknown" else METHODS[key].name + _differences(group, same)
            i = len(groups)
            marker, line, offset = MARKERS[i % len(MARKERS)], LINES[i % len(LINES)], i - (len(found) - 1) / 2
            groups.append(Group(key, label, group, colour, marker, line, offset))
    return groups


def _differences(group: list[Ensemble], groups: list[list[Ensemble]]) -> str:
    """The settings in which a group differs from other groups of its method, as the end of its label."""
    settings, *others = ({**one[0].content["trained"], "members": len(one[0].seeds)} for one in (group, *groups))
    differing = [key for key in settings if key != "seed" and any(settings[key] != one.get(key) for one in others)]
    return "".join(f", {SYMBOLS.get(key, key)} = {settings[key]}" for key in differing)


def _how_many(groups: list[Group]) -> str:
    """The number of ensembles of each group."""
    counts = []
    for group in groups:
        ensembles, members = len(group.ensembles), len(group.ensembles[0].seeds)
        counts.append(f"{ensembles} ensemble{'s' * (ensembles > 1)} of {members} members")
    if len(set(counts)) == 1:
        return f"n = {counts[0]} for each method"
    return "n: " + ", ".join(f"{group.label} {count}" for group, count in zip(groups, counts, strict=True))


def _about(groups: list[Group]) -> str:
    """Data, network, and the number of ensembles of each group."""
    return f"{setting_of(groups[0].ensembles[0].content)}; {_how_many(groups)}"


def _intervals(groups: list[Group], *names: str) -> str:
    """The sentence that says what the intervals of a figure are over; `names`: of its values, if by `estimate_of`."""
    several = [group.ensembles for group in groups if len(group.ensembles) > 1]
    crossed = names and all(population_of(one, name) == BOTH for one in several for name in names)
    over = "over new ensembles and new test images" if crossed else "Student's, over ensembles"
    if len(several) == len(groups):
        return f"95 % intervals: {over}."
    return f"95 % intervals: bootstrap over test images{f', {over} where there are several' if several else ''}."


def _test_sets(ensembles: list[Ensemble]) -> dict[str, tuple[tuple[str, ...], str]]:
    """The entries of `TEST_SETS` that were measured."""
    return {name: entry for name, entry in TEST_SETS.items() if entry[0][0] in ensembles[0].content["result"]}


@styled
def tradeoff(ensembles: list[Ensemble]) -> Figure:
    """Disagreement against sharpness, one point per ensemble, filled by its accuracy on corrupted images.

    A method with a single ensemble gets bars: the interval of its disagreement, and the standard deviation of sharpness
    over members. Several ensembles show their spread by themselves.
    """
    for one in ensembles:
        require(one, "test", "rates", "disagreement")
        if one.values.get("sharpness") is None:
            path, flags = one.folder / "sharpness.json", f"--mode APGD_worst --norms l2 --save {one.folder}"
            raise InputError(f"{path}: holds no APGD_worst-l2 of all members; run measure_sharpness.py {flags}")
    groups = line_styles(ensembles)
    keys = list(dict.fromkeys(group.key for group in groups))

    def finite(one: Ensemble) -> bool:
        return math.isfinite(one.values["sharpness"])

    sharpness = [one.values["sharpness"] for one in filter(finite, ensembles)]
    if not sharpness:
        path = ensembles[0].folder / "sharpness.json"
        raise InputError(f"{path}: its APGD_worst-l2 is not finite, nor is any other; measure all by a smaller --rho0")
    figure, axis = panels(4.4)
    filling = _filling(figure, axis, [one.values.get("corrupted_ensemble") for one in ensembles])
    handles, bars = [], ""
    for group in groups:
        marker = MARKERS[keys.index(group.key) % len(MARKERS)]
        style = {"marker": marker, "linestyle": "", "markeredgewidth": 2, "markeredgecolor": group.colour}
        for one in filter(finite, group.ensembles):
            x, y, interval = one.values["sharpness"], 100 * one.values["disagreement"], one.intervals["disagreement"]
            if len(group.ensembles) == 1:
                faint = {"ecolor": group.colour, "elinewidth": 1, "alpha": 0.55}
                if one.spread.get("sharpness") is not None:
                    axis.errorbar(x, y, xerr=one.spread["sharpness"], fmt="none", **faint)
                _bar(axis, x, interval, 100, **faint)
                if interval is not None:
                    bars = " Bars: 95 % bootstrap interval over test images, and ± standard deviation over members."
            face = filling.to_rgba(100 * one.values["corrupted_ensemble"]) if filling else group.colour
            axis.plot(x, y, markersize=9, markerfacecolor=face, zorder=3, **style)
        face = "none" if filling else group.colour
        handles.append(Line2D([], [], markersize=8, markerfacecolor=face, label=group.label, **style))
    axis.set(xlabel="worst-case sharpness of a member, mean  [nats]", ylabel="disagreement of two members  [%]")
    if max(sharpness) > 3 * min(sharpness) > 0:
        axis.set_xscale("log")
        decimal_ticks(axis.xaxis, (1, 1.5, 2, 3, 5, 7))
    protocol = sharpness_protocol(ensembles[0], "APGD_worst-l2")
    note = (
        f"{setting_of(ensembles[0].content)}. A point is an ensemble; {_how_many(groups)}. Sharpness: "
        f"{'adaptive ' * bool(protocol.get('adaptive'))}worst-case, l2, radius {protocol.get('rho0')}.{bars}"
    )
    for group in groups:
        if missing := [str(one.values["sharpness"]) for one in group.ensembles if not finite(one)]:
            note += f" Not drawn: {len(missing)} of {group.label}, of sharpness {', '.join(dict.fromkeys(missing))}."
    return _finished(figure, handles, note)


def _filling(figure: Figure, axis: Axes, accuracies: list[float | None]) -> ScalarMappable | None:
    """The colour map of accuracies on corrupted images, and its bar; None if one of them was not measured."""
    if None in accuracies:
        return None
    colours = ScalarMappable(cmap="cividis")
    colours.set_clim(*_around(100 * min(accuracies), 100 * max(accuracies)))
    bar = figure.colorbar(colours, ax=axis, pad=0.02)
    bar.set_label("ensemble accuracy on corrupted images  [%]")
    bar.outline.set_visible(False)
    return colours


@styled
def benchmark(ensembles: list[Ensemble]) -> Figure:
    """Bars of the members' mean, the ensemble and its gain, with 95 % intervals; one row of panels per test set."""
    groups, test_sets = line_styles(ensembles), _test_sets(ensembles)
    figure, axes = panels(1.2 + 2.1 * len(test_sets), len(test_sets), 2, squeeze=False, width_ratios=[2, 1.1])
    for (left, right), (name, (_, title)) in zip(axes, test_sets.items(), strict=True):
        bars = {f"{name}member": "mean of the members", f"{name}ensemble": "ensemble"}
        low, high = _around(*_bars(left, groups, bars, 1))  # on an axis from 0, all bars would be equally high
        left.set_ylim(max(0, low - 0.35 * (high - low)), high + 0.25 * (high - low))
        low, high = _bars(right, groups, {f"{name}gain": "ensemble - members"}, 2)
        right.set_ylim(min(0, 1.15 * low), 1.25 * max(high, 0) or 1)
        right.axhline(0, color="black", linewidth=0.9)
        left.set(title=title, ylabel="accuracy  [%]")
        right.set(title="gain of ensembling", ylabel="gain  [% points]")
    note = (
        f"{_about(groups)}. {_intervals(groups, 'member', 'ensemble', 'gain')} The accuracy axis does not begin at 0."
    )
    return _finished(figure, axes[0, 0].get_legend_handles_labels()[0], note)


def _bars(axis: Axes, groups: list[Group], names: dict[str, str], digits: int) -> tuple[float, float]:
    """Bars of values (name: label) in percent, the groups side by side; the range of bars and intervals."""
    width, edges = 0.8 / len(groups), []
    above = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 7.5}
    for group in groups:
        for j, name in enumerate(names):
            mean, interval = estimate_of(group.ensembles, name)
            x, ends = j + group.offset * width, [100 * value for value in (mean, *(interval or []))]
            edges += ends
            axis.bar(x, 100 * mean, 0.92 * width, color=group.colour, label=group.label if j == 0 else None)
            _bar(axis, x, interval, 100, ecolor="black", elinewidth=1)
            rotation = 90 if len(groups) > 4 else 0
            axis.annotate(f"{100 * mean:.{digits}f}", (x, max(0, *ends)), (0, 2), rotation=rotation, **above)
    axis.set_xticks(range(len(names)), names.values())
    axis.grid(visible=False, axis="x")
    return min(edges), max(edges)


@styled
def severity(ensembles: list[Ensemble]) -> Figure:
    """Accuracy and ECE of members and ensembles against the severity of corruption, 0 for clean images."""
    found = [require(one, "corrupted", "by_severity") for one in ensembles]
    first, groups = ensembles[0], line_styles(ensembles)
    severities = [0, *sorted(map(int, found[0]))]
    places = [("test",), *(("corrupted", "by_severity", str(step)) for step in severities[1:])]
    figure, axes = panels(3.7, 1, 2)
    for group in groups:
        x = [value + 0.05 * group.offset for value in severities]
        for axis, key in zip(axes, ("accuracy", "ece"), strict=True):
            for kind, style in (("member", {"linestyle": "--", "markerfacecolor": "white"}), ("ensemble", {})):
                _curve(axis, x, [_score(group.ensembles, place, kind, key) for place in places], group, 100, **style)
    axes[0].set(ylabel="accuracy  [%]", xlabel="severity  [1]")
    axes[1].set(ylabel="ECE  [%]", xlabel="severity  [1]", ylim=(0, None))
    for axis in axes:
        axis.set_xticks(severities, ["0\nclean", *map(str, severities[1:])])
    handles = [*_markers(groups), grey("ensemble"), grey("mean of the members", linestyle="--")]
    note = f"{_about(groups)}. Means over {len(first.content['protocol']['corruptions'])} corruptions. "
    note += _intervals(groups)
    clean, corrupted = (require(first, *place).get("samples") for place in (("test",), ("corrupted", "mean")))
    if clean and corrupted and clean != corrupted:
        note += f" Severity 0: all {clean} test images; the others: {corrupted:g} of them."
        note += " The error of calibration looks larger on few images."
    return _finished(figure, handles, note)


def _score(ensembles: list[Ensemble], place: tuple[str, ...], kind: str, key: str) -> Estimate:
    """Accuracy or ECE at a place of the result, of the ensemble or as the mean of its members."""
    if kind == "member":
        values = [statistics.mean(m[key] for m in require(one, *place, "members")) for one in ensembles]
    else:
        values = [require(one, *place, "ensemble")[key] for one in ensembles]
    return estimate(values, require(ensembles[0], *place, "intervals_95").get(f"{kind}_{key}"))


@styled
def ensemble_size(ensembles: list[Ensemble]) -> Figure:
    """Accuracy, NLL and ECE against the number of members; one row of panels per test set."""
    groups, test_sets = line_styles(ensembles), _test_sets(ensembles)
    figure, axes = panels(1.2 + 2.0 * len(test_sets), len(test_sets), 3, squeeze=False, sharex=True)
    scores = {"accuracy": (100, "accuracy  [%]"), "nll": (1, "NLL  [nats]"), "ece": (100, "ECE  [%]")}
    for line, (place, title) in zip(axes, test_sets.values(), strict=True):
        for axis, (key, (factor, label)) in zip(line, scores.items(), strict=True):
            for group in groups:
                found = [require(one, *place, "ensemble_by_size") for one in group.ensembles]
                edges = require(group.ensembles[0], *place, "intervals_95")
                sizes = sorted(map(int, found[0]))
                # The file holds intervals for single members and for the whole ensemble only.
                names = {sizes[0]: f"member_{key}", sizes[-1]: f"ensemble_{key}"}
                values = [estimate([by[str(n)][key] for by in found], edges.get(names.get(n))) for n in sizes]
                _curve(axis, [n + 0.04 * group.offset for n in sizes], values, group, factor)
            axis.set(ylabel=label)
        line[1].set_title(title)
    _whole_numbers(axes[-1], "members  [1]")
    note = f"{_about(groups)}. Points: means over subsets of members. {_intervals(groups)}"
    if any(len(group.ensembles) == 1 for group in groups):
        note += " Of a single ensemble, only the ends have one."
    return _finished(figure, _markers(groups), note)


@styled
def curves(runs: list[Ensemble]) -> Figure:
    """Loss and accuracy by epoch on training and validation images: members faint, their mean strong.

    A dotted line marks the epoch before which SharpBalance assigns samples.
    """
    figure, axes = panels(4.8, 2, 2, sharex=True)
    groups, handles, dotted = line_styles(runs), [], {"linestyle": ":", "linewidth": 1}
    for (loss, accuracy), part, title in zip(axes, ("train", "val"), ("training", "validation"), strict=True):
        for group in groups:
            logs = [_read_log(run.folder / f"seed_{seed}") for run in group.ensembles for seed in run.seeds]
            trained = group.ensembles[0].content["trained"]
            for axis, key, factor in ((loss, "loss", 1), (accuracy, "acc", 100)):
                members = [[factor * epoch[f"{part}_{key}"] for epoch in log] for log in logs]
                _members(axis, range(1, 1 + max(map(len, logs))), members, group)
                if trained["sam"] and trained["flat_ratio"]:
                    axis.axvline(trained["initial_epochs"] + 0.5, color=group.colour, **dotted)
                    handles = [grey("the sets are made", **dotted)]
        loss.set(title=title, ylabel="loss  [nats]", yscale="log")
        accuracy.set(title=title, ylabel="accuracy  [%]")
        low, high = loss.get_ylim()
        decimal_ticks(loss.yaxis, (1, 2, 5) if high < 100 * low else (1,))
    _whole_numbers(axes[1], "epoch  [1]")
    note = f"{_about(groups)}. Faint: a member; strong: their mean. Training: augmented images, at the weights before "
    note += "each step. Until its sets are made, SharpBalance is SAM."
    return _finished(figure, axes[0, 0].get_legend_handles_labels()[0] + handles, note)


def _read_log(folder: Path) -> list[dict[str, float]]:
    """The training log of a member, one dict for each epoch."""
    path = folder / "log.jsonl"
    keys = [f"{part}_{key}" for part in ("train", "val") for key in ("loss", "acc")]
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        if rows and all(row[key] is not None for row in rows for key in keys):
            return rows
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: missing or not the log of a run; run main.py's command again") from error
    raise InputError(f"{path}: holds no epoch; let main.py train first")


@styled
def landscape(runs: list[Ensemble]) -> Figure:
    """The loss along directions and between members: each member or pair faint, their mean strong.

    The panels share the axis of the loss, whose range is that of random directions and of lines between members; along
    an eigenvector the loss may leave it. Its panel also has the mean over random directions, dotted: the steps have the
    same unit, but those of random directions are wider, with straight lines between them.

    Args:
        runs: from `utils.landscape.read_landscape`. The panel of eigenvectors is left out if no run has them.
    """
    groups, about = line_styles(runs), runs[0].content["about"]
    losses: dict[str, list[list]] = {"along": [], "between": [], "top": []}  # the curves of each group
    for group in groups:
        found = [run.content for run in group.ensembles]
        losses["along"].append([np.mean(curves, axis=0) for one in found for curves in one["along"].values()])
        losses["between"].append([curve for one in found for curve in one["between"].values()])
        losses["top"].append([top["losses"] for one in found for top in one.get("top", {}).values()])
    titles = {"along": ("random directions", "step  [filter norm]"), "top": ("top eigenvector", "step  [filter norm]")}
    titles["between"] = ("between two members", "way to the other  [1]")
    if not any(losses["top"]):
        del titles["top"], losses["top"]
    figure, axes = panels(3.7, 1, len(titles), sharey=True)
    axes = dict(zip(titles, axes, strict=True))
    # Eigenvectors come last: their panel takes its range of the loss from the other two.
    for key, curves_of_groups in losses.items():
        axis, steps, (title, label) = axes[key], about[key], titles[key]
        if key == "top":
            axis.set(xlim=(1.05 * steps[0], 1.05 * steps[-1]), ylim=axis.get_ylim())
            for group, members in zip(groups, losses["along"], strict=True):
                axis.plot(about["along"], np.mean(members, axis=0), color=group.colour, linestyle=":")
        for group, members in zip(groups, curves_of_groups, strict=True):
            _members(axis, steps, members, group)
        axis.set(title=title, xlabel=label, yscale="log")
        # More labels would overlap those of the next panel.
        axis.set_xticks(ticks := [steps[0], steps[len(steps) // 2], steps[-1]], map("{:g}".format, ticks))
        decimal_ticks(axis.yaxis)
    axes["along"].set_ylabel("validation loss  [nats]")
    handles, top = axes["along"].get_legend_handles_labels()[0], ""
    if "top" in losses:
        handles.append(grey("random directions", linestyle=":"))
        top = (
            "Top eigenvector: of the Hessian of a member's loss on these images, as long as a random direction (norm "
            "of all filters), the higher side at the right; the loss may leave the panel. "
        )
    known = all(np.isfinite(curve).all() for found in losses.values() for curves in found for curve in curves)
    note = (
        f"{_about(groups)}; {about['images']} validation images. Faint: a member (its mean over {about['directions']} "
        f"random filter-normalised directions) or a pair; strong: their mean. {top}BatchNorm's statistics stay; "
        f"between members, they are taken anew from {about['training_images']} training images."
        + ("" if known else " Where a curve is missing, the loss leaves the range of float32.")
    )
    return _finished(figure, handles, note)


@styled
def sets(runs: list[Ensemble]) -> Figure:
    """The share of each class and of each member's pick that is trained with SAM; the flattest and sharpest images.

    Args:
        runs: exactly one, from `utils.landscape.read_sets`.
    """
    (run,) = runs
    seeds, shares, pictures = run.seeds, run.content["shares"], run.content["pictures"]
    members, classes = len(seeds), shares["classes"].shape[1] - 1
    figure = Figure(figsize=(7, 4.4 + 0.28 * members), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.3 + 0.28 * members, 3.1])
    axes = upper.subplots(1, 2, width_ratios=[min(classes, 12) + 1, members + 2], sharey=True)
    for axis, key, names, label, title in (
        (axes[0], "classes", ["all", *map(str, range(classes))], "class  [label]", "share of each class"),
        (axes[1], "picks", [*map(str, seeds), "none"], "picked by member  [seed]", "share of each pick"),
    ):
        values = 100 * shares[key]
        image = axis.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto", interpolation="nearest")
        if len(names) <= 21:
            axis.set_xticks(range(len(names)), names)
            for (i, j), value in np.ndenumerate(values):
                text = "-" if np.isnan(value) else f"{value:.0f}"
                axis.text(j, i, text, ha="center", va="center", fontsize=8, color="black" if value > 55 else "white")
        else:
            axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "all" if x == 0 else f"{x - 1:.0f}"))
        axis.set(title=title, xlabel=label, yticks=range(members), yticklabels=seeds)
    axes[0].set_ylabel("member  [seed]")
    upper.colorbar(image, ax=axes, pad=0.01).set_label("trained with SAM  [%]")
    strips = lower.subplots(len(pictures), 1)
    for axis, line in zip(strips, pictures, strict=True):
        images = line["images"]
        count, height, width, channels = images.shape
        gap = max(1, width // 8)
        # Side by side, with white gaps.
        strip = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=1).swapaxes(0, 1)
        strip = strip.reshape(height, -1, channels)[:, :-gap]
        axis.imshow(strip.squeeze(2) if channels == 1 else strip, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_xticks([i * (width + gap) + (width - 1) / 2 for i in range(count)], line["names"], fontsize=8)
        axis.set_yticks([])
        axis.set_title(line["title"])
    for axis in (*axes, *strips):
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    lower.supxlabel(textwrap.fill(run.content["note"], 112), fontsize=8, color="0.25")
    return figure


def panels(height: float, *shape: int, **options: Any) -> tuple[Figure, Any]:
    """A figure of `height` inches with one panel or an array of panels."""
    figure = Figure(figsize=(7, height), layout="constrained")
    return figure, figure.subplots(*shape, **options)


def _finished(figure: Figure, handles: list[Any], note: str) -> Figure:
    """Add a legend above the panels, without taking their height, and a note below them."""
    columns = min(3, len(handles))
    figure.set_figheight(figure.get_figheight() + 0.2 * ((len(handles) - 1) // columns))
    # matplotlib fills columns first; this order fills rows first.
    ordered = [handle for i in range(columns) for handle in handles[i::columns]]
    figure.legend(handles=ordered, loc="outside upper center", ncols=columns)
    figure.supxlabel(textwrap.fill(note, 112), fontsize=8, color="0.25")
    return figure


def grey(label: str, **style: Any) -> Line2D:
    """A legend entry for what a kind of line means in every colour."""
    return Line2D([], [], color="grey", label=label, **style)


def _markers(groups: list[Group]) -> list[Line2D]:
    """The entries of a legend of curves with markers."""
    return [Line2D([], [], color=group.colour, marker=group.marker, label=group.label) for group in groups]


def _whole_numbers(axes: np.ndarray, label: str) -> None:
    """Label horizontal axes and put their ticks at whole numbers only."""
    for axis in axes:
        axis.set_xlabel(label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _bar(axis: Axes, x: float, interval: Interval, factor: float, **style: Any) -> None:
    """A vertical interval. It is drawn without its value, which a bootstrap interval need not contain."""
    if interval is not None:
        low, high = (factor * edge for edge in interval)
        axis.errorbar(x, (low + high) / 2, (high - low) / 2, fmt="none", **style)


def _curve(axis: Axes, x: list[float], values: list[Estimate], group: Group, factor: float, **style: Any) -> None:
    """Means with their intervals."""
    axis.plot(x, [factor * mean for mean, _ in values], marker=group.marker, color=group.colour, **style)
    for place, (_, interval) in zip(x, values, strict=True):
        _bar(axis, place, interval, factor, ecolor=group.colour, elinewidth=1)


def _members(axis: Axes, x: range | list[float], members: list[Any], group: Group) -> None:
    """The curve of each member, faint, and their mean over the length of the shortest one, strong."""
    for values in members:
        axis.plot(x[: len(values)], values, color=group.colour, alpha=0.3, linewidth=0.7)
    if members:
        end, style = min(map(len, members)), {"color": group.colour, "linestyle": group.line, "linewidth": 1.8}
        axis.plot(x[:end], np.mean([values[:end] for values in members], axis=0), label=group.label, **style)


def _around(low: float, high: float) -> tuple[float, float]:
    """Limits of an axis, widened where they are equal."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def decimal_ticks(axis: Axis, digits: tuple[float, ...] = (1, 2, 5)) -> None:
    """Label a logarithmic axis with decimal numbers at these multiples of powers of ten."""
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
