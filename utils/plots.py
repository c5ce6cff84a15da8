"""Every figure of measurements: a function takes comparable ensembles and returns a Figure; `save` writes it.

Figures are drawn by Agg, without a display, and without pyplot, which would keep global state. Colours belong to
methods (`utils.results.METHODS`); markers and lines differ as well.
"""

import io
import itertools
import math
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from utils import InputError
from utils.files import write_atomically
from utils.metrics import paired_bootstrap
from utils.results import (
    BOTH,
    METHODS,
    Ensemble,
    Gap,
    Interval,
    batches_of,
    estimate_of,
    gap_between,
    groups_of,
    interval_of,
    is_sam,
    population_of,
    require,
    setting_of,
    sharpness_protocol,
)

# Of each method in the order of `METHODS`, so that a method looks alike in all figures and can be told without colour.
MARKERS = dict(zip(METHODS, "osdD^v<pX*", strict=True))
# Of those that can begin with plain SGD, where they do.
LATE = MARKERS | {"sam": ">", "released": "P", "paper": "H", "random": "8", "same": "h", "asam": (6, 1, 0)}
# Of the settings of one method: they share its marker.
FILLS: tuple[dict[str, Any], ...] = (
    {},
    {"markerfacecolor": "white"},
    *({"fillstyle": side, "markerfacecoloralt": "white"} for side in ("bottom", "left", "right", "top")),
)
# All but the first have gaps: where curves coincide, those below stay visible.
LINES = ("-", (0, (6, 2)), (0, (3, 2)), (0, (1, 1)))
# How labels write the settings in which curves of one method differ.
SYMBOLS = {"rho": r"$\rho$", "k": "$k$", "T_d": "$T_d$"}
# From dark to light. Those of other methods go from dark to the colour.
SHADES = {"sam": ("#710000", "#D67822", "#AA8856")}
MATH, SIGN = r"\$[^$]*\$", "\N{REPLACEMENT CHARACTER}"  # a formula, and what stands for a letter of one
MAX_LEGEND = 58  # characters of both columns of a legend that are as wide as half a page
WIDTH = 3.4  # inches, in print: half a page. All sizes of text are those of print.
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "axes.labelpad": 2,
    "axes.titlepad": 4,
    "figure.dpi": 200,  # of PNG files and notebooks: text of 7 points is then 19 pixels high
    "font.size": 7,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "lines.markeredgewidth": 0.8,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
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

    `nth` counts those of its method from 0, late ones apart: first those of SharpBalance's rho, so that what others are
    compared with looks alike in all figures, and by rho. `offset` is the position among all groups, centred at 0, by
    which points of different groups are drawn side by side.
    """

    key: str  # in METHODS
    label: str
    ensembles: list[Ensemble]
    nth: int
    late: bool  # plain SGD comes first
    line: Any
    offset: float

    @property
    def colour(self) -> tuple[float, ...]:
        """The method's own of the first of its groups, shades of it of the others."""
        own = to_rgb(METHODS[self.key].colour)
        others = [shade for shade in shades(self.key, 3) if shade != own] or [own]
        return others[-1] if self.late else (own, *others)[self.nth % (1 + len(others))]

    @property
    def fill(self) -> dict[str, Any]:
        """The filling of its points."""
        return FILLS[self.nth % len(FILLS)]

    @property
    def mark(self) -> dict[str, Any]:
        """Colour, marker and filling of its points."""
        return {"color": self.colour, "marker": (LATE if self.late else MARKERS)[self.key], **self.fill}


class Shown(NamedTuple):
    """A mean over ensembles, its 95 % interval and the population that this is over, a key of `POPULATIONS`."""

    mean: float
    interval: Interval
    over: str


# How captions name what intervals are over. Those of the first have caps, so that no figure mixes them unseen.
POPULATIONS = {
    BOTH: "over new ensembles and new test images",
    "ensembles": "Student's, over ensembles with the images as they are",
    "images": "over test images, for these trained networks only",
}


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
        figure.savefig(buffer, format=kind, metadata=dict.fromkeys(entries))
        write_atomically(file, buffer.getvalue())
    return files


def shades(key: str, count: int) -> list[tuple[float, ...]]:
    """Shades of a method's colour, one for each of its curves; none is too light for white paper."""
    colour = to_rgb(METHODS[key].colour)
    if count == 1:
        return [colour]
    dark = tuple(0.45 * c for c in colour)
    stops = np.array([to_rgb(c) for c in SHADES.get(key, (dark, colour))])
    places = np.linspace(0, len(stops) - 1, count)
    return [tuple(float(np.interp(x, range(len(stops)), c)) for c in stops.T) for x in places]


def line_styles(ensembles: list[Ensemble]) -> list[Group]:
    """Label, colour, marker and line of each group of ensembles, in the order of `METHODS`, then of rho.

    Groups of one method have labels with the settings in which they differ.
    """
    found, groups = groups_of(ensembles).values(), []
    usual = {_rho(one) for one in ensembles if one.key in ("released", "paper")}
    for key, late in itertools.product(METHODS, (False, True)):
        alike = [group for group in found if group[0].key == key]
        same = [group for group in alike if ("SGD first" in group[0].method.split(", ")) == late]
        same.sort(key=lambda group: (_rho(group[0]), ", sized as SharpBalance (paper)" in group[0].method))
        order = sorted(range(len(same)), key=lambda j: _rho(same[j][0]) not in usual)
        for j, group in enumerate(same):
            # That of an unknown method is a folder's name: no formula, and legends leave out what begins with _.
            unknown = group[0].method.replace("$", r"\$").lstrip("_")
            label = unknown if key == "unknown" else METHODS[key].name + _differences(group, alike)
            line, offset = LINES[len(groups) % len(LINES)], len(groups) - (len(found) - 1) / 2
            groups.append(Group(key, label, group, order.index(j), late, line, offset))
    return groups


def _rho(ensemble: Ensemble) -> float:
    return (ensemble.content.get("trained") or {}).get("rho") or 0.0


def _differences(group: list[Ensemble], groups: list[list[Ensemble]]) -> str:
    """What a group differs in from other groups of its method, as the end of its label.

    That is what its method's name in tables says, and, where this is the same, the settings.
    """
    parts, *others = (one[0].method.split(", ")[1:] for one in (group, *groups))
    found = [part for part in parts if any(part not in other for other in others)]
    same = [one for one in groups if one[0].method == group[0].method]
    settings, *others = ({**one[0].content["trained"], "members": len(one[0].seeds)} for one in (group, *same))
    differing = [key for key in settings if key != "seed" and any(settings[key] != one.get(key) for one in others)]
    found += [f"{key} {settings[key]}" for key in differing]
    named = (part.partition(" ") for part in found)
    return "".join(f", {SYMBOLS[key]} = {value}" if key in SYMBOLS else f", {key} {value}" for key, _, value in named)


def _how_many(groups: list[Group]) -> str:
    """The number of ensembles of each group."""
    counts = []
    for group in groups:
        ensembles, members = len(group.ensembles), len(group.ensembles[0].seeds)
        counts.append(f"{ensembles} ensemble{'s' * (ensembles > 1)} of {members} members")
    if len(set(counts)) == 1:
        return f"n = {counts[0]} for each method"
    return "n: " + ", ".join(f"{group.label} {count}" for group, count in zip(groups, counts, strict=True))


def _settings(groups: list[Group]) -> str:
    """The rho, k and T_d that labels do not name, by label where they differ."""
    texts, labelled = [], False
    for key, symbol in SYMBOLS.items():
        found: dict[str, list[str]] = {}
        for group in [group for group in groups if group.key != "unknown"]:
            settings = dict(part.split(" ", 1) for part in group.ensembles[0].method.split(", ") if " " in part)
            if key in settings and f", {symbol} = " in group.label:
                labelled = True
            elif key in settings:
                found.setdefault(settings[key], []).append(group.label)
        texts += [
            f"{symbol} = {value}" + f" ({', '.join(labels)})" * (len(found) > 1) for value, labels in found.items()
        ]
    return f"; {', '.join(texts)}{' unless a label says otherwise' * labelled}" if texts else ""


def about(groups: list[Group], corrupted: bool = False) -> str:
    """Data and network, the number of ensembles, the settings that labels do not name, and the number of test images.

    Args:
        groups: of the figure.
        corrupted: whether it shows corrupted images, if they were measured.
    """
    content = groups[0].ensembles[0].content
    result, text = content.get("result"), f"{setting_of(content)}; {_how_many(groups)}{_settings(groups)}"
    if result and (images := _samples(groups[0].ensembles[0], "test")):
        text += f"; {images} test images"
        if corrupted and "corrupted" in result and (copies := _samples(groups[0].ensembles[0], "corrupted", "mean")):
            text += f", corrupted copies of {copies}"
    return text


def _samples(ensemble: Ensemble, *place: str) -> int | None:
    """The number of images at a place of the result, if it is recorded."""
    count = require(ensemble, *place).get("samples") or (ensemble.content["data"].get("test") if len(place) == 1 else 0)
    return round(count) if count else None


def intervals(shown: Iterable[Shown]) -> str:
    """The sentence that says what the intervals of a figure are over."""
    found = {one.over for one in shown if one.interval}
    texts = [text for over, text in POPULATIONS.items() if over in found]
    if BOTH in found and len(texts) > 1:
        return f" 95 % intervals: with caps {texts[0]}; without caps {'; of a single ensemble '.join(texts[1:])}."
    return f" 95 % intervals: {'; of a single ensemble '.join(texts)}." if texts else ""


def _estimate(ensembles: list[Ensemble], name: str) -> Shown:
    """The mean over ensembles of a value."""
    return Shown(*estimate_of(ensembles, name), population_of(ensembles, name))


def _shown(values: list[Gap], of_images: Interval = None) -> Shown:
    """The mean over ensembles of values, or of differences; `of_images`: the interval of the value of a single one."""
    mean, interval, over = interval_of(values)
    if len(values) == 1 and of_images:
        return Shown(mean, paired_bootstrap(values[0]) if isinstance(values[0], torch.Tensor) else of_images, "images")
    return Shown(mean, interval, over)


def _test_sets(ensembles: list[Ensemble]) -> dict[str, tuple[tuple[str, ...], str]]:
    """The entries of `TEST_SETS` that were measured."""
    return {name: entry for name, entry in TEST_SETS.items() if entry[0][0] in ensembles[0].content["result"]}


@styled
def tradeoff(ensembles: list[Ensemble]) -> Figure:
    """Disagreement against sharpness: a light mark for each ensemble, means with the cross of both intervals."""
    for one in ensembles:
        require(one, "test", "rates", "disagreement")
        if one.values.get("sharpness") is None:
            path, flags = one.folder / "sharpness.json", f"--mode APGD_worst --norms l2 --save {one.folder}"
            raise InputError(f"{path}: holds no APGD_worst-l2 of all members; run measure_sharpness.py {flags}")
    finite = [one.values["sharpness"] for one in ensembles if math.isfinite(one.values["sharpness"])]
    if not finite:
        path = ensembles[0].folder / "sharpness.json"
        raise InputError(f"{path}: its APGD_worst-l2 is not finite, nor is any other; measure all by a smaller --rho0")
    figure, axis = panels(2.9)
    groups, means, shown, left_out = line_styles(ensembles), {}, [], ""
    for group in groups:
        style, drawn = {**group.mark, "linestyle": ""}, list(map(_is_drawn, group.ensembles))
        for one in [one for one, known in zip(group.ensembles, drawn, strict=True) if known]:
            x, y = one.values["sharpness"], 100 * one.values["disagreement"]
            axis.plot(x, y, markersize=2.5, markeredgewidth=0.5, alpha=0.45, zorder=3, **style)
        if all(drawn):
            x, y = (_estimate(group.ensembles, name) for name in TRADEOFF)
            bar(axis, x.mean, y, 100, ecolor=group.colour, zorder=3.5)
            bar(axis, 100 * y.mean, x, 1, across=True, ecolor=group.colour, zorder=3.5)
            # Of marks at one place each shows: the smaller, the nearer. SharpBalance lies on what it is compared with.
            rule = group.key in ("released", "paper") and group.nth == 0 and not group.late
            near = 2 if rule else int(_is_reference(group))
            edge = {"markeredgecolor": "white"} if near else {}
            axis.plot(x.mean, 100 * y.mean, **{**style, "markersize": 7 - 1.5 * near, "zorder": 4 + near, **edge})
            shown += [x, y]
            one = group.ensembles[0]
            later = (one.content.get("trained") or {}).get("average_from")
            others = re.sub(r", rho [^,]+", "", one.method), len(one.seeds), later
            colour = group.colour if group.late else METHODS[group.key].colour
            means.setdefault((colour, *others), []).append((x.mean, 100 * y.mean))
        else:
            missing = [str(one.values["sharpness"]) for one in group.ensembles if not _is_drawn(one)]
            left_out += (
                f" Not drawn: {len(missing)} of {group.label}, of sharpness {', '.join(dict.fromkeys(missing))}."
            )
            left_out += " Nor is their mean." * (len(group.ensembles) > 1)
    for (colour, *_), points in means.items():
        axis.plot(*zip(*points, strict=True), color=colour, linewidth=0.7, zorder=2)
    axis.set(xlabel="worst-case sharpness of a member  [nats]", ylabel="disagreement of two members  [%]")
    if max(finite) > 3 * min(finite) > 0:
        axis.set_xscale("log")
        decimal_ticks(axis.xaxis, (1, 1.5, 2, 3, 5, 7))
    protocol, note = sharpness_protocol(ensembles[0], "APGD_worst-l2"), f"{about(groups)}."
    note += " Small: an ensemble; large: their mean." * any(len(group.ensembles) > 1 for group in groups)
    note += " A line joins what differs in rho only." * any(len(points) > 1 for points in means.values())
    note += f" Sharpness: {'adaptive ' * bool(protocol.get('adaptive'))}worst case, l2, radius {protocol.get('rho0')}"
    if "batch_num" in protocol:
        batches = batches_of(ensembles[0], "APGD_worst-l2")
        note += f", mean over members and {batches} batches of {protocol['eval_batch_size']} {protocol['split']} images"
    note += f".{intervals(shown)}{left_out}"
    return finished(figure, markers(groups, linestyle="", markersize=5), note)


TRADEOFF = ("sharpness", "disagreement")


def _is_drawn(ensemble: Ensemble) -> bool:
    """Whether both values of `tradeoff` are finite."""
    return all(math.isfinite(ensemble.values[name]) for name in TRADEOFF)


@styled
def benchmark(ensembles: list[Ensemble]) -> Figure:
    """Accuracy of the members' mean and of the ensemble, and the paired differences to SAM of the same seeds.

    One row of panels per test set. The differences are left out where no other method has the seeds of SAM.
    """
    groups, test_sets, shown = line_styles(ensembles), _test_sets(ensembles), []
    kinds = {"member": "members, mean", "ensemble": "ensemble"}
    reference, pairs = _pairs(groups)
    height = 0.6 + len(test_sets) * (0.5 + len(kinds) * max(0.6, 0.1 * len(groups)))
    figure, axes = panels(height, len(test_sets), 1 + bool(pairs), squeeze=False, sharey=True)
    for line, (name, (_, title)) in zip(axes, test_sets.items(), strict=True):
        for (j, kind), group in itertools.product(enumerate(kinds), groups):
            place, name_of = -(j * (len(groups) + 1) + groups.index(group)), name + kind
            values = [_estimate(group.ensembles, name_of)]
            if group.label in pairs:
                values.append(_shown([gap_between(a, b, name_of) for a, b in pairs[group.label]]))
            for axis, value in zip(line, values, strict=False):
                bar(axis, place, value, 100, across=True, ecolor=group.colour)
                axis.plot(100 * value.mean, place, linestyle="", zorder=3, **group.mark)
                shown.append(value)
        centres = [-(j * (len(groups) + 1) + (len(groups) - 1) / 2) for j in range(len(kinds))]
        line[0].set_yticks(centres, kinds.values(), rotation=90, va="center")
        line[0].set(title=title, xlabel="accuracy  [%]")
        for axis in line:
            axis.grid(visible=False, axis="y")
            axis.tick_params(axis="y", length=0)
        if pairs:
            line[1].axvline(0, color="black", linewidth=0.8)
            line[1].set(title=f"minus {reference.label}", xlabel="accuracy  [% points]")
    note = f"{about(groups, True)}.{_pairing(pairs)}{intervals(shown)}"
    return finished(figure, markers(groups, linestyle=""), note)


def _is_reference(group: Group) -> bool:
    return group.nth == 0 and is_sam(group.ensembles[0])


def _pairs(groups: list[Group]) -> tuple[Group | None, dict[str, list[tuple[Ensemble, Ensemble]]]]:
    """SAM, of SharpBalance's rho where there are several, and by label the ensembles of its seeds, each with SAM's."""
    reference = next(filter(_is_reference, groups), None)
    by_seeds = {one.seeds: one for one in reference.ensembles} if reference else {}
    pairs = {
        group.label: [(one, by_seeds[one.seeds]) for one in group.ensembles if one.seeds in by_seeds]
        for group in groups
        if group is not reference
    }
    return reference, {label: both for label, both in pairs.items() if both}


def _pairing(pairs: dict[str, Any]) -> str:
    """The sentence on the differences of a figure."""
    if not pairs:
        return ""
    alone = any(len(both) == 1 for both in pairs.values())
    return f" Differences: of the same seeds{'; that of a single pair has no interval' * alone}."


# Scores of an ensemble in rows of the result: their factor, name and unit, and the unit of differences. The square
# calibration error is shown as its root; unlike the ECE, it is not too large where the images are few.
SCORES = {
    "accuracy": (100, "accuracy", "%", "% points"),
    "nll": (1, "NLL before\ntemperature", "nats", "nats"),
    "calibration_mse": (100, "RMSCE before\ntemperature", "%", "% points"),
}
# The names of scores in `Ensemble.by_sample`.
BY_IMAGE = {"accuracy": "ensemble", "nll": "nll", "nll_calibrated": "nll_calibrated"}


def _scores(ensembles: list[Ensemble]) -> dict[str, tuple[int, str, str, str]]:
    """The entries of `SCORES` that the files of all ensembles hold; earlier versions wrote no calibration_mse."""
    rows = [require(one, *place, "ensemble") for one in ensembles for place, _ in _test_sets(ensembles).values()]
    return {key: entry for key, entry in SCORES.items() if all(key in row for row in rows)}


def _score(row: dict[str, float], key: str) -> float:
    """A score of a row, the root of a square error."""
    return math.sqrt(max(row[key], 0.0)) if key == "calibration_mse" else row[key]


@styled
def severity(ensembles: list[Ensemble]) -> Figure:
    """Scores of the ensembles against the severity of corruption, and the paired differences to SAM of the same seeds.

    Clean images stand apart. They are those that were corrupted, for scores that files keep by image.
    """
    found = [require(one, "corrupted", "by_severity") for one in ensembles]
    groups, scores, shown = line_styles(ensembles), _scores(ensembles), []
    reference, pairs = _pairs(groups)
    places = [("test",), *(("corrupted", "by_severity", str(step)) for step in sorted(map(int, found[0])))]
    clean, corrupted = _samples(ensembles[0], "test"), _samples(ensembles[0], "corrupted", "mean")
    names = {key: name.replace("\n", " ") for key, (_, name, *_) in scores.items()}
    same = [key for key in scores if all(BY_IMAGE.get(key) in one.by_sample for one in ensembles)]

    def value(one: Ensemble, place: tuple[str, ...], key: str) -> Gap:
        if place == ("test",) and key in same:
            return one.by_sample[BY_IMAGE[key]][:corrupted].double()
        return _score(require(one, *place, "ensemble"), key)

    figure, axes = panels(0.8 + 1.3 * len(scores), len(scores), 1 + bool(pairs), squeeze=False, sharex=True)
    for line, (key, (factor, name, unit, gap)) in zip(axes, scores.items(), strict=True):
        for group in groups:
            of_images = [require(group.ensembles[0], *place, "intervals_95").get(_name(key)) for place in places]
            at = [[value(one, place, key) for one in group.ensembles] for place in places]
            curves_of = [list(map(_shown, at, of_images))]
            if group.label in pairs:
                gaps = [
                    [value(a, place, key) - value(b, place, key) for a, b in pairs[group.label]] for place in places
                ]
                curves_of.append(list(map(_shown, gaps)))
            for axis, curve in zip(line, curves_of, strict=False):
                x = [step + 0.13 * group.offset for step in range(len(places))]
                for part in (slice(1), slice(1, None)):  # clean images are no severity: not joined to the others
                    _curve(axis, x[part], curve[part], group, factor)
                shown += curve
        line[0].set_ylabel(f"{name}  [{unit}]")
        if pairs:
            line[1].axhline(0, color="black", linewidth=0.8)
            line[1].set_ylabel(f"difference  [{gap}]")
    for axis in axes[-1]:
        axis.set(xlabel="severity  [1]")
        axis.set_xticks(range(len(places)), ["clean", *(place[-1] for place in places[1:])])
    if pairs:
        axes[0, 1].set_title(f"minus {reference.label}")
    axes[0, 0].set_title("ensemble")
    note = f"{about(groups, True)}. Means over {len(ensembles[0].content['protocol']['corruptions'])} corruptions."
    if clean != corrupted:
        images = {f"the same {corrupted}": [name for key, name in names.items() if key in same]}
        images[f"all {clean}"] = [name for key, name in names.items() if key not in same]
        note += " Clean: " + ", ".join(f"{' and '.join(of)} of {n} images" for n, of in images.items() if of) + "."
    return finished(figure, markers(groups), f"{note}{_pairing(pairs)}{intervals(shown)}")


def _name(key: str, kind: str = "ensemble") -> str:
    """The name of a score among the intervals in a row."""
    return f"{kind}_{'rmsce' if key == 'calibration_mse' else key}"


@styled
def ensemble_size(ensembles: list[Ensemble]) -> Figure:
    """Scores against the number of members, a row of panels each; one column per test set.

    NLL is calibrated where all files hold that by size, which none does of corrupted images.
    """
    groups, scores, test_sets, shown = line_styles(ensembles), _scores(ensembles), _test_sets(ensembles), []
    shape, calibrated = (len(scores), len(test_sets)), ""
    figure, axes = panels(0.8 + 1.3 * shape[0], *shape, squeeze=False, sharex=True)
    for column, (prefix, (place, title)) in zip(axes.T, test_sets.items(), strict=True):
        known = all("calibrated_nll_by_size" in require(one, *place) for one in ensembles)
        for axis, left, (key, (factor, name, unit, _)) in zip(column, axes[:, 0], scores.items(), strict=True):
            if key == "nll" and known:
                key, name = "nll_calibrated", "NLL, calibrated"
                calibrated = " Calibrated: each subset by one temperature, fitted on validation."
            for group in groups:
                curve = _by_size(group, place, prefix, key)
                _curve(axis, [n + 0.05 * group.offset for n in curve], list(curve.values()), group, factor)
                shown += curve.values()
            label = f"{name}  [{unit}]"
            axis.set_ylabel(label if axis is left or left.get_ylabel() != label else "")
        column[0].set_title(title)
    whole_numbers(axes[-1], "members  [1]")
    note = f"{about(groups, True)}. Points: means over subsets of members.{calibrated}{intervals(shown)}"
    return finished(figure, markers(groups), note)


def _by_size(group: Group, place: tuple[str, ...], prefix: str, key: str) -> dict[int, Shown]:
    """A score of a group on a test set by the number of members, means over subsets of members."""
    rows = [require(one, *place) for one in group.ensembles]
    if key == "nll_calibrated":
        found = [row["calibrated_nll_by_size"] for row in rows]
    else:
        of = (require(one, *place, "ensemble_by_size") for one in group.ensembles)
        found = [{size: _score(row, key) for size, row in by.items()} for by in of]
    sizes = sorted(map(int, found[0]))
    # Files may keep by image: whole ensembles, the accuracy of single members, and calibrated NLL of each size.
    by_image = {sizes[0]: {"accuracy": "member"}, sizes[-1]: BY_IMAGE}
    kinds, curve = {sizes[0]: "member", sizes[-1]: "ensemble"}, {}
    for size in sizes:
        of_size = f"{key}_of_{size}"
        name = prefix + by_image.get(size, {}).get(key, of_size)
        columns = [one.by_sample.get(name) for one in group.ensembles]
        columns = columns if all(column is not None for column in columns) else None
        edges = rows[0]["intervals_95"]
        of_images = edges.get(_name(key, kinds.get(size, "")), edges.get(f"ensemble_{of_size}"))
        curve[size] = _shown(columns or [by[str(size)] for by in found], of_images)
    return curve


def panels(height: float, *shape: int, **options: Any) -> tuple[Figure, Any]:
    """A figure of `WIDTH` and `height` inches, to which `finished` adds, with one panel or an array of panels."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(*shape, **options)


def _letters(text: str) -> str:
    """A text as long as it is drawn: a sign for each letter of its formulas."""
    return re.sub(MATH, lambda found: SIGN * len(re.sub(r"[$_{}^]", "", re.sub(r"\\\w+", "x", found[0]))), text)


def caption(figure: Any, text: str) -> int:
    """Write a caption below the panels, and return its number of lines."""
    formulas = iter(re.findall(MATH, text))
    lines = textwrap.wrap(re.sub(r" (?=%)| (?==)|(?<==) ", "\N{NO-BREAK SPACE}", _letters(text)), 74)
    drawn = re.sub(f"{SIGN}+", lambda _: next(formulas), "\n".join(lines))
    figure.supxlabel(drawn, x=0.01, ha="left", fontsize=6, color="0.25")
    return len(lines)


def finished(figure: Figure, handles: list[Any], note: str) -> Figure:
    """Add a legend above the panels and a note below them, without taking the panels' height."""
    widths = [len(_letters(handle.get_label())) for handle in handles]
    columns = 2 if len(handles) > 1 and max(widths[::2]) + max(widths[1::2]) <= MAX_LEGEND else 1
    rows = -(-len(handles) // columns)
    ordered = [handle for i in range(columns) for handle in handles[i::columns]]  # legends fill columns first
    narrow = {"handlelength": 1.8, "handletextpad": 0.5, "columnspacing": 1, "labelspacing": 0.3}
    figure.legend(handles=ordered, loc="outside upper center", ncols=columns, **narrow)
    figure.set_figheight(figure.get_figheight() + 0.14 * rows + 0.1 * caption(figure, note))
    return figure


def grey(label: str, **style: Any) -> Line2D:
    """A legend entry for what a kind of line means in every colour."""
    return Line2D([], [], color="grey", label=label, **style)


def markers(groups: list[Group], **style: Any) -> list[Line2D]:
    """The entries of a legend of curves with markers."""
    return [Line2D([], [], label=group.label, **group.mark, **style) for group in groups]


def whole_numbers(axes: np.ndarray, label: str) -> None:
    """Label horizontal axes and put their ticks at whole numbers only."""
    for axis in axes:
        axis.set_xlabel(label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def bar(axis: Axes, x: float, shown: Shown, factor: float, across: bool = False, **style: Any) -> None:
    """An interval, vertical or across, with caps if it is crossed.

    It is drawn without its value, which a bootstrap interval need not contain.
    """
    if shown.interval is not None:
        low, high = (factor * edge for edge in shown.interval)
        style = {"fmt": "none", "elinewidth": 0.9, "capsize": 1.6 if shown.over == BOTH else 0, **style}
        place = ((low + high) / 2, x) if across else (x, (low + high) / 2)
        axis.errorbar(*place, **{"xerr" if across else "yerr": (high - low) / 2}, **style)


def _curve(axis: Axes, x: list[float], values: list[Shown], group: Group, factor: float) -> None:
    """Means with their intervals."""
    axis.plot(x, [factor * value.mean for value in values], linewidth=0.8, zorder=3, **group.mark)
    for place, value in zip(x, values, strict=True):
        bar(axis, place, value, factor, ecolor=group.colour)


def decimal_ticks(axis: Axis, digits: tuple[float, ...] = (1, 2, 5)) -> None:
    """Label a logarithmic axis with decimal numbers at these multiples of powers of ten."""
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())  # its ticks would have no labels
