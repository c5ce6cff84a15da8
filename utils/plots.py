"""Every figure. A function takes rows (dicts), draws them and returns a Figure; `save` writes it as PDF and PNG.

No display and no pyplot: figures are drawn by Agg and keep no global state. Each method has one colour everywhere, of
the palette of Okabe and Ito, which colour-blind readers tell apart, and markers and lines differ as well.
"""

import io
import json
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from utils.checkpoint import write_atomically
from utils.results import Ensemble, family_of
from utils.verification import relative_to_sam, stable_limit

Row = dict[str, Any]

COLOURS = {
    "deep_ensemble": "#009E73",
    "sam": "#D55E00",
    "sharpbalance": "#0072B2",
    # SharpBalance with the paper's sets; with those of the released code it has SharpBalance's own colour.
    "paper": "#56B4E9",
    "released": "#0072B2",
    "random": "#CC79A7",
    "random_set": "#CC79A7",
    "same_set": "#E69F00",
    "eoa": "#F0E442",
    "asam": "#7F7F7F",
    "other": "#000000",  # a checkpoint that does not say how it was trained
}
NAMES = {
    "deep_ensemble": "deep ensemble",
    "sam": "SAM",
    "sharpbalance": "SharpBalance",
    "paper": "SharpBalance, the paper's sets",
    "released": "SharpBalance, the released code's sets",
    "random": "SAM on random rows, as many",
    "random_set": "SAM on random samples",
    "same_set": "SAM on the same random samples",
    "eoa": "averaged weights (EoA)",
    "asam": "ASAM",
    "other": "unknown method",
}
MARKERS = "osD^vph<>"
# Later ones have gaps, through which the earlier are seen where two curves are the same.
LINES = ("-", (0, (6, 2)), (0, (3, 2)), (0, (1, 1)))
# Of settings that tell two curves of one method apart.
SYMBOLS = {"rho": r"$\rho$", "flat_ratio": "$k$", "initial_epochs": "$T_d$"}
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9.5,
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
styled = matplotlib.rc_context(STYLE)

SHARPNESS = r"sharpness at the mean iterate  $\kappa$  [loss]"
MEMBER_SHARPNESS = r"mean sharpness of a member  $\kappa$  [loss]"
VARIANCE = r"variance  $V$  [prediction$^2$]"
BARS = {"member": "mean of the members", "ensemble": "ensemble", "gain": "ensemble - members"}
TEST_SETS = {"test": "clean test images", "corrupted": "corrupted test images"}
RADIUS = r"SAM radius  $\rho$  [weight / gradient]"


def save(figure: Figure, path: str | Path) -> list[Path]:
    """Write a figure as <path>.pdf and <path>.png, each atomically; the same figure gives the same bytes on any day.

    Args:
        figure: to write.
        path: with or without one of the two suffixes.

    Returns:
        the two files.
    """
    path = Path(path)
    stem = path.name.removesuffix(".pdf").removesuffix(".png")
    files = []
    # Constrained layout moves a little each time that it is solved, and ticks may change with the size of the panels:
    # twice is enough, and the two files agree.
    with matplotlib.rc_context(STYLE):
        figure.draw_without_rendering()
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for kind, metadata in (("pdf", {"CreationDate": None, "Creator": None, "Producer": None}), ("png", {})):
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            figure.savefig(buffer, format=kind, dpi=160, metadata={"Software": None} if kind == "png" else metadata)
        files.append(path.with_name(f"{stem}.{kind}"))
        write_atomically(files[-1], buffer.getvalue())
    return files


def shades(method: str, count: int) -> list[tuple[float, ...]]:
    """The colour of a method from dark to light, for several curves of it."""
    colour = to_rgb(COLOURS[method])
    # Towards black first, then towards white, and far enough from either.
    mixes = [-0.45 + 0.95 * i / max(count - 1, 1) for i in range(count)] if count > 1 else [0.0]
    return [tuple(c * (1 + m) if m < 0 else c + (1 - c) * m for c in colour) for m in mixes]


def by_value(rows: list[Row], key: str) -> list[tuple[Any, list[Row]]]:
    """Rows by the value of a key, ascending."""
    return [(value, [row for row in rows if row[key] == value]) for value in sorted({row[key] for row in rows})]


def column(rows: Iterable[Row], key: str) -> list[Any]:
    """One key of every row."""
    return [row[key] for row in rows]


@styled
def theorem(rows: list[Row], along: str) -> Figure:
    """A theorem against simulation: variance and sharpness over rho or k, and below each the ratio to the formula.

    Args:
        rows: of one theorem and one grid of `utils.verification.simulate_all`.
        along: "rho" (a curve for each k) or "k" (a curve for each rho).
    """
    across = "k" if along == "rho" else r"\rho"
    label = RADIUS if along == "rho" else "steps  $k$  [1]"
    method, number = rows[0]["method"], 1 if rows[0]["method"] == "sam" else 2
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, height_ratios=[1.2, 1])
    groups = by_value(rows, "k" if along == "rho" else "rho")
    width = max(column(rows, along)) - min(column(rows, along))
    for i, ((value, group), colour) in enumerate(zip(groups, shades(method, len(groups)), strict=True)):
        x = column(group, along)
        for axis, key, bound in ((axes[0, 0], "variance", "variance_bound"), (axes[0, 1], "sharpness", None)):
            axis.plot(x, column(group, bound or "sharpness_upper"), color=colour)
            axis.errorbar(
                x,
                column(group, key),
                column(group, f"{key}_se"),
                fmt=MARKERS[i],
                color=colour,
                label=f"${across} = {value:g}$" if key == "variance" else None,
            )
        # The curves lie side by side, so that their error bars do not hide one another.
        beside = [v + (i - (len(groups) - 1) / 2) * 0.011 * width for v in x]
        for axis, key, bound in ((axes[1, 0], "variance", "variance_bound"), (axes[1, 1], "sharpness", None)):
            bound = bound or "sharpness_upper"
            axis.errorbar(
                beside,
                [100 * (row[key] / row[bound] - 1) for row in group],
                [100 * row[f"{key}_se"] / row[bound] for row in group],
                fmt=MARKERS[i],
                color=colour,
            )
        if number == 1:
            lower = [100 * (row["sharpness_lower_leading"] / row["sharpness_upper"] - 1) for row in group]
            axes[1, 1].plot(x, lower, color=colour, linestyle="--")
    for axis, title, text in (
        (axes[0, 0], f"Theorem {number}: variance", VARIANCE),
        (axes[0, 1], f"Theorem {number}: sharpness", r"sharpness  $\kappa$  [loss]"),
    ):
        axis.set(title=title, ylabel=text)
        if number == 1:  # over decades
            axis.set_yscale("log")
    if number == 1:
        _plain_ticks(axes[0, 1].yaxis, (1, 3))
    axes[1, 0].set(xlabel=label, ylabel="deviation from\nformula  [%]")
    axes[1, 1].set(xlabel=label, ylabel="deviation from\nbound  [%]")
    for axis in axes[1]:
        axis.axhline(0, color="black", linewidth=0.9)
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=along == "k", steps=[1, 2, 5, 10]))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(groups))
    kinds = [
        Line2D([], [], color="grey", label="formula, upper bound"),
        Line2D([], [], color="grey", marker="o", linestyle="", label="simulation ± 1 s.e."),
    ]
    if number == 1:
        kinds.append(Line2D([], [], color="grey", linestyle="--", label="lower bound, leading order (no proof)"))
    figure.legend(handles=kinds, loc="outside lower center", ncols=3, columnspacing=1.2)
    return figure


@styled
def theory_tradeoff(grids: dict[str, list[Row]]) -> Figure:
    """Variance against sharpness, simulated: at the mean iterate, as in the theorems, and at the members.

    Args:
        grids: the result of `utils.verification.simulate_all`.
    """
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, label, title, left in (
        (axes[0], "sharpness", SHARPNESS, "at the mean iterate (the theorems')", 0.1),
        (axes[1], "member_sharpness", MEMBER_SHARPNESS, "at the members (what is deployed)", 0.14),
    ):
        for method in ("sharpbalance", "sam"):
            groups = by_value(grids[f"tradeoff_{method}"], "k")
            for i, ((k, rows), colour) in enumerate(zip(groups, shades(method, len(groups)), strict=True)):
                _points(axis, rows, key, f"{NAMES[method]}, $k = {k}$", fmt=f"{MARKERS[i]}-", color=colour)
        for name, method, text, line in (
            ("tradeoff_blocks", "sharpbalance", r"blocks, $\rho = 0$, over $k$", "P:"),
            ("tradeoff_deep_ensemble", "deep_ensemble", "deep ensemble, over $k$", "v:"),
        ):
            _points(axis, grids[name], key, text, fmt=line, color=COLOURS[method])
        axis.set(xlabel=label, title=title, xscale="log", yscale="log", xlim=(left, None), ylim=(3e-3, None))
        _plain_ticks(axis.xaxis)
        _plain_ticks(axis.yaxis)
    axes[0].set_ylabel(VARIANCE)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@styled
def published(rows: dict[str, list[Row]]) -> Figure:
    """Figure 1(b) of the paper, drawn from the formulas, with its points on top, and where SAM's part of it lies.

    Args:
        rows: as `utils.verification.published` gives them.
    """
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplot_mosaic([["panel", "sharpness"], ["panel", "variance"]], width_ratios=[1.15, 1])
    panel = axes["panel"]
    for method, regime, marker in (("sam", "divergent", "o"), ("sharpbalance", "stable", "s")):
        bound = "sharpness_upper_authors" if method == "sharpbalance" else "sharpness_upper"
        points = rows[method]
        text = f"{NAMES[method]} ({regime})"
        panel.plot(column(points, bound), column(points, "variance_bound"), color=COLOURS[method], label=text)
        panel.plot(
            column(points, "published_sharpness"),
            column(points, "published_variance"),
            marker,
            color=COLOURS[method],
            markerfacecolor="none",
            label=f"{NAMES[method]}, published",
        )
    points = rows["sharpbalance"]
    panel.plot(
        column(points, "sharpness_upper"),
        column(points, "variance_bound"),
        "--",
        color=COLOURS["sharpbalance"],
        label="SharpBalance, exact $S$",
    )
    panel.set(xlabel="upper bound of the sharpness  [loss]", ylabel=VARIANCE, title="Figure 1(b) of the paper, redrawn")
    limit = stable_limit("sam")
    for key, bound, label in (
        ("sharpness", "sharpness_upper", "upper bound of\nthe sharpness  [loss]"),
        ("variance", "variance_bound", VARIANCE),
    ):
        axis = axes[key]
        axis.axvspan(limit, 0.245, color="0.88", linewidth=0, label="SAM diverges")
        axis.plot(column(rows["curve"], "rho"), column(rows["curve"], bound), color=COLOURS["sam"])
        axis.plot(
            column(rows["sam"], "rho"),
            column(rows["sam"], f"published_{key}"),
            "o",
            color=COLOURS["sam"],
            markerfacecolor="none",
            markersize=3,
        )
        axis.set(yscale="log", ylabel=label, xlim=(0, 0.245))
        _plain_ticks(axis.yaxis, (1,))
    axes["sharpness"].set_title(f"SAM's formulas at the same $k = {rows['curve'][0]['k']}$")
    axes["sharpness"].tick_params(labelbottom=False)
    axes["variance"].set_xlabel(RADIUS)
    handles, names = panel.get_legend_handles_labels()
    more, more_names = axes["sharpness"].get_legend_handles_labels()
    figure.legend(handles + more, names + more_names, loc="outside lower center", ncols=3)
    return figure


@styled
def trained(rows: list[Row]) -> Figure:
    """The algorithm as it is trained: variance against the members' sharpness, and its ratio to SAM's.

    Args:
        rows: "trained" of `utils.verification.simulate_all`.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    relative = relative_to_sam(rows)
    for i, method in enumerate(("sam", "released", "paper", "random")):
        part = [row for row in rows if row["method"] == method]
        # Random rows lie on SAM's curve: dots let it shine through.
        look = {"fmt": f"{MARKERS[i]}{':' if method == 'random' else '-'}", "color": COLOURS[method]}
        _points(left, part, "member_sharpness", NAMES[method], **look)
        part = [row for row in relative if row["method"] == method]
        if part:
            right.errorbar(
                column(part, "member_sharpness"),
                column(part, "ratio"),
                column(part, "ratio_se"),
                **look,
            )
    right.axhline(1, color=COLOURS["sam"])
    left.set(xlabel=MEMBER_SHARPNESS, ylabel=VARIANCE, xscale="log", yscale="log", title="trade-off")
    right.set(xlabel=MEMBER_SHARPNESS, xscale="log", title="at equal sharpness of the members")
    right.set_ylabel("variance / variance of SAM  [1]")
    for axis in (left.xaxis, left.yaxis, right.xaxis):
        _plain_ticks(axis, (1, 2, 3, 5) if axis is right.xaxis else (1, 2, 5))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def theory(grids: dict[str, list[Row]], points: dict[str, list[Row]]) -> dict[str, Figure]:
    """All figures of the theory by their file names.

    Args:
        grids: as `utils.verification.simulate_all` gives them.
        points: as `utils.verification.published` gives them.
    """
    return {
        "theorem_1_rho": theorem(grids["theorem_1_rho"], "rho"),
        "theorem_1_k": theorem(grids["theorem_1_k"], "k"),
        "theorem_2_rho": theorem(grids["theorem_2_rho"], "rho"),
        "theorem_2_k": theorem(grids["theorem_2_k"], "k"),
        "tradeoff": theory_tradeoff(grids),
        "published": published(points),
        "trained": trained(grids["trained"]),
    }


def looks(groups: Iterable[list[Ensemble]]) -> list[Row]:
    """Name, colour, marker, line and ensembles of each group, methods always in the order of `COLOURS`.

    Groups of one method get shades of its colour, from dark to light by rho and else in their order, and a name that
    tells in which settings they differ.
    """
    families: dict[str, list[list[Ensemble]]] = {}
    for group in groups:
        families.setdefault(family_of(group[0]), []).append(group)
    rows: list[Row] = []
    for family in [name for name in COLOURS if name in families]:
        alike = sorted(families[family], key=lambda group: (group[0].content.get("trained") or {}).get("rho") or 0)
        for group, colour in zip(alike, shades(family, len(alike)), strict=True):
            label = group[0].method if family == "other" else NAMES[family] + _differences(group, alike)
            look = {
                "colour": colour,
                "marker": MARKERS[len(rows) % len(MARKERS)],
                "line": LINES[len(rows) % len(LINES)],
            }
            rows.append({"family": family, "label": label, "ensembles": group, **look})
    return rows


def _differences(group: list[Ensemble], groups: list[list[Ensemble]]) -> str:
    """What tells a group of one method from the others of it."""

    def settings(one: list[Ensemble]) -> Row:
        return {**one[0].content["trained"], "members": len(one[0].seeds)}

    # The partition is only a name for two other settings.
    differing = [
        key
        for key in settings(group)
        if key not in ("seed", "partition") and len({json.dumps(settings(other).get(key)) for other in groups}) > 1
    ]
    return "".join(f", {SYMBOLS.get(key, key)} = {settings(group)[key]}" for key in differing)


def how_many(rows: list[Row]) -> str:
    """The n of each row of `looks`."""
    counts = []
    for row in rows:
        ensembles, members = len(row["ensembles"]), len(row["ensembles"][0].seeds)
        counts.append(f"{ensembles} ensemble{'s' * (ensembles > 1)} of {members} members")
    if len(set(counts)) == 1:
        return f"n = {counts[0]} for each method"
    return "n: " + ", ".join(f"{row['label']} {count}" for row, count in zip(rows, counts, strict=True))


@styled
def tradeoff(rows: list[Row], note: str) -> Figure:
    """Disagreement against sharpness, a point an ensemble; its filling is its accuracy on corrupted images.

    Args:
        rows: of `looks`, with `points`: dicts of `sharpness`, `spread` (its standard deviation over members),
            `disagreement`, `interval` and `corrupted` (ensemble accuracy, or None for all). Without bars, `spread` and
            `interval` are None.
        note: what stands below.
    """
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axis = figure.subplots()
    points = [point for row in rows for point in row["points"]]
    filled = points[0]["corrupted"] is not None
    shades_of = matplotlib.cm.ScalarMappable(cmap="cividis")
    if filled:
        values = [100 * point["corrupted"] for point in points]
        shades_of.set_clim(*_around(min(values), max(values)))
        bar = figure.colorbar(shades_of, ax=axis, pad=0.02)
        bar.set_label("ensemble accuracy on corrupted images  [%]")
        bar.outline.set_visible(False)
    for row in rows:
        for point in row["points"]:
            x, y = point["sharpness"], 100 * point["disagreement"]
            if point["spread"] is not None:
                axis.errorbar(x, y, xerr=point["spread"], fmt="none", ecolor=row["colour"], elinewidth=1, alpha=0.55)
            _bar(axis, x, point["interval"], row["colour"], 100, alpha=0.55)
            axis.plot(
                x,
                y,
                row["marker"],
                markersize=9,
                markeredgewidth=2,
                markeredgecolor=row["colour"],
                markerfacecolor=shades_of.to_rgba(100 * point["corrupted"]) if filled else row["colour"],
                zorder=3,
            )
    axis.set(xlabel="worst-case sharpness of a member, mean  [nats]", ylabel="disagreement of two members  [%]")
    sharpness = [point["sharpness"] for point in points]
    if max(sharpness) > 3 * min(sharpness) > 0:
        axis.set_xscale("log")
        _plain_ticks(axis.xaxis, (1, 1.5, 2, 3, 5, 7))
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker=row["marker"],
            markersize=8,
            markeredgewidth=2,
            markeredgecolor=row["colour"],
            markerfacecolor="none" if filled else row["colour"],
            label=row["label"],
        )
        for row in rows
    ]
    _legend(figure, handles)
    return _noted(figure, note)


@styled
def benchmark(rows: list[Row], note: str) -> Figure:
    """Bars of the members' mean, the ensemble and its gain, with 95 % intervals; a line of panels for each test set.

    Args:
        rows: of `looks`, each with `test` and perhaps `corrupted`: dicts of (mean, interval) by "member", "ensemble"
            and "gain", all shares.
        note: what stands below.
    """
    sets = [name for name in ("test", "corrupted") if name in rows[0]]
    figure = Figure(figsize=(7, 1.2 + 2.1 * len(sets)), layout="constrained")
    axes = figure.subplots(len(sets), 2, squeeze=False, width_ratios=[2, 1.1])
    for (left, right), name in zip(axes, sets, strict=True):
        for axis, bars in ((left, ("member", "ensemble")), (right, ("gain",))):
            width, edges = 0.8 / len(rows), []
            for i, row in enumerate(rows):
                for j, bar in enumerate(bars):
                    mean, interval = row[name][bar]
                    x = j + (i - (len(rows) - 1) / 2) * width
                    top = 100 * max([mean, *(interval or [])])
                    edges += [100 * min([mean, *(interval or [])]), top]
                    axis.bar(x, 100 * mean, 0.92 * width, color=row["colour"], label=row["label"] if j == 0 else None)
                    _bar(axis, x, interval, "black", 100)
                    text = f"{100 * mean:.{1 if axis is left else 2}f}"
                    axis.annotate(
                        text,
                        (x, max(top, 0)),
                        (0, 2),
                        textcoords="offset points",
                        ha="center",
                        va="bottom",
                        fontsize=7.5,
                        rotation=90 if len(rows) > 4 else 0,
                    )
            low, high = min(edges), max(edges)
            if axis is left:  # from 0 on, all bars would look alike
                low, high = _around(low, high)
                axis.set_ylim(max(0, low - 0.35 * (high - low)), high + 0.25 * (high - low))
            else:
                axis.set_ylim(min(0, 1.15 * low), 1.25 * max(high, 0) or 1)
                axis.axhline(0, color="black", linewidth=0.9)
            axis.set_xticks(range(len(bars)), [BARS[bar] for bar in bars])
            axis.grid(visible=False, axis="x")
        left.set(title=TEST_SETS[name], ylabel="accuracy  [%]")
        right.set(title="gain of ensembling", ylabel="gain  [% points]")
    _legend(figure, axes[0, 0].get_legend_handles_labels()[0])
    return _noted(figure, note)


@styled
def severity(rows: list[Row], note: str) -> Figure:
    """Accuracy and ECE of members and ensembles against the severity of corruption, 0 for clean images.

    Args:
        rows: of `looks`, each with `severity` (list) and, by "accuracy" and "ece", dicts of lists of (mean, interval)
            for "member" and "ensemble".
        note: what stands below.
    """
    figure = Figure(figsize=(7, 3.7), layout="constrained")
    axes = figure.subplots(1, 2)
    for i, row in enumerate(rows):
        for axis, key in zip(axes, ("accuracy", "ece"), strict=True):
            for kind, look in (("member", {"linestyle": "--", "markerfacecolor": "white"}), ("ensemble", {})):
                x = [value + 0.05 * (i - (len(rows) - 1) / 2) for value in row["severity"]]
                _estimates(axis, x, row[key][kind], row, 100, **look)
    axes[0].set(ylabel="accuracy  [%]", xlabel="severity  [1]")
    axes[1].set(ylabel="ECE  [%]", xlabel="severity  [1]", ylim=(0, None))
    for axis in axes:
        axis.set_xticks(rows[0]["severity"], ["0\nclean", *map(str, rows[0]["severity"][1:])])
    handles = [Line2D([], [], color=row["colour"], marker=row["marker"], label=row["label"]) for row in rows]
    handles += [
        Line2D([], [], color="grey", label="ensemble"),
        Line2D([], [], color="grey", linestyle="--", label="mean of the members"),
    ]
    _legend(figure, handles)
    return _noted(figure, note)


@styled
def ensemble_size(rows: list[Row], note: str) -> Figure:
    """Accuracy, NLL and ECE against the number of members; a line of panels for each test set.

    Args:
        rows: of `looks`, each with `size` (list) and `test` and perhaps `corrupted`: lists of (mean, interval) by
            "accuracy", "nll" and "ece".
        note: what stands below.
    """
    sets = [name for name in ("test", "corrupted") if name in rows[0]]
    figure = Figure(figsize=(7, 1.2 + 2.0 * len(sets)), layout="constrained")
    axes = figure.subplots(len(sets), 3, squeeze=False, sharex=True)
    for line, name in zip(axes, sets, strict=True):
        for axis, (key, factor, label) in zip(
            line,
            (
                ("accuracy", 100, "accuracy  [%]"),
                ("nll", 1, "NLL  [nats]"),
                ("ece", 100, "ECE  [%]"),
            ),
            strict=True,
        ):
            for i, row in enumerate(rows):
                x = [size + 0.04 * (i - (len(rows) - 1) / 2) for size in row["size"]]
                _estimates(axis, x, row[name][key], row, factor)
            axis.set(ylabel=label)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            if axis.get_subplotspec().is_last_row():
                axis.set_xlabel("members  [1]")
        line[1].set_title(TEST_SETS[name])
    handles = [Line2D([], [], color=row["colour"], marker=row["marker"], label=row["label"]) for row in rows]
    _legend(figure, handles)
    return _noted(figure, note)


@styled
def curves(rows: list[Row], note: str) -> Figure:
    """Loss and accuracy by epoch, on training and validation images: each member faint, the mean of all strong.

    Args:
        rows: of `looks`, each with `logs` (for each member its list of epochs, dicts of train_loss, train_acc, val_loss
            and val_acc) and `split` (the epoch before which the sets were made, or None).
        note: what stands below.
    """
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for line, part, title in zip(axes, ("train", "val"), ("training", "validation"), strict=True):
        for axis, key, factor, label in zip(
            line, ("loss", "acc"), (1, 100), ("loss  [nats]", "accuracy  [%]"), strict=True
        ):
            for row in rows:
                curves_of = [[factor * epoch[f"{part}_{key}"] for epoch in log] for log in row["logs"]]
                for values in curves_of:
                    axis.plot(range(1, len(values) + 1), values, color=row["colour"], alpha=0.3, linewidth=0.7)
                mean = np.mean([values[: min(map(len, curves_of))] for values in curves_of], axis=0)
                axis.plot(range(1, len(mean) + 1), mean, label=row["label"], **_strong(row))
                if row["split"] is not None:
                    axis.axvline(row["split"] + 0.5, color=row["colour"], linestyle=":", linewidth=1)
            axis.set(title=title, ylabel=label)
            if key == "loss":
                axis.set_yscale("log")
                low, high = axis.get_ylim()
                _plain_ticks(axis.yaxis, (1, 2, 5) if high < 100 * low else (1,))
    for axis in axes[1]:
        axis.set_xlabel("epoch  [1]")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles = axes[0, 0].get_legend_handles_labels()[0]
    if any(row["split"] is not None for row in rows):
        handles.append(Line2D([], [], color="grey", linestyle=":", linewidth=1, label="the sets are made"))
    _legend(figure, handles)
    return _noted(figure, note)


@styled
def landscape(rows: list[Row], note: str) -> Figure:
    """The loss along directions and on the lines between members: each member or pair faint, the mean strong.

    The panels share the axis of the loss, which ends where random directions and lines between do: along an eigenvector
    the loss may leave it. The panel of eigenvectors shows the mean over random directions too, for steps have the same
    unit: dotted, and straight between the steps of its own panel, which are wider.

    Args:
        rows: of `looks`, each with `along` (random directions), `top` (eigenvectors; where no row has one, there is no
            such panel) and `between`: lists of curves [nats]; and `steps`: their abscissae by these names.
        note: what stands below.
    """
    keys = ["along", "top", "between"] if any(row["top"] for row in rows) else ["along", "between"]
    figure = Figure(figsize=(7, 3.7), layout="constrained")
    axes = dict(zip(keys, figure.subplots(1, len(keys), sharey=True), strict=True))
    for key, title, label in (
        ("along", "random directions", "step  [filter norm]"),
        ("between", "between two members", "way to the other  [1]"),
        ("top", "top eigenvector", "step  [filter norm]"),
    )[: len(keys)]:
        axis, steps = axes[key], rows[0]["steps"][key]
        if key == "top":
            axis.set(xlim=(1.05 * steps[0], 1.05 * steps[-1]), ylim=axis.get_ylim())
            for row in rows:
                axis.plot(row["steps"]["along"], np.mean(row["along"], axis=0), color=row["colour"], linestyle=":")
        for row in rows:
            for values in row[key]:
                axis.plot(steps, values, color=row["colour"], alpha=0.3, linewidth=0.7)
            if row[key]:
                axis.plot(steps, np.mean(row[key], axis=0), **_strong(row))
        axis.set(title=title, xlabel=label, yscale="log")
        # More ticks would run into those of the next panel.
        axis.set_xticks(ticks := [steps[0], steps[len(steps) // 2], steps[-1]], map("{:g}".format, ticks))
        _plain_ticks(axis.yaxis)
    axes["along"].set_ylabel("validation loss  [nats]")
    handles = [Line2D([], [], label=row["label"], **_strong(row)) for row in rows]
    if "top" in keys:
        handles.append(Line2D([], [], color="grey", linestyle=":", label="random directions"))
    _legend(figure, handles)
    return _noted(figure, note)


@styled
def sets(shares: Row, pictures: list[Row], note: str) -> Figure:
    """Which share of each class, and of each member's pick, is trained with SAM; and the flattest and sharpest images.

    Args:
        shares: `seeds` of the M members; `classes`: [M, 1 + C], of all samples and of each class; `picks`: [M, M + 1],
            of each member's pick and of the samples that nobody picked.
        pictures: two lines, each with `title`, `images` [N, H, W, C] from 0 to 1 and `names`.
        note: what stands below.
    """
    members, classes = len(shares["seeds"]), shares["classes"].shape[1] - 1
    figure = Figure(figsize=(7, 4.4 + 0.28 * members), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.3 + 0.28 * members, 3.1])
    axes = upper.subplots(1, 2, width_ratios=[min(classes, 12) + 1, members + 2], sharey=True)
    picks = [*map(str, shares["seeds"]), "none"]
    for axis, key, names, label, title in (
        (axes[0], "classes", ["all", *map(str, range(classes))], "class  [label]", "share of each class"),
        (axes[1], "picks", picks, "picked by member  [seed]", "share of each pick"),
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
        axis.set(title=title, xlabel=label, yticks=range(members), yticklabels=shares["seeds"])
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    axes[0].set_ylabel("member  [seed]")
    upper.colorbar(image, ax=axes, pad=0.01).set_label("trained with SAM  [%]")
    for axis, line in zip(lower.subplots(len(pictures), 1), pictures, strict=True):
        count, height, width, channels = line["images"].shape
        gap = max(1, width // 8)
        strip = np.ones((height, count * (width + gap) - gap, channels))
        for i, picture in enumerate(line["images"]):
            strip[:, i * (width + gap) : i * (width + gap) + width] = picture
        axis.imshow(strip.squeeze(2) if channels == 1 else strip, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_xticks([i * (width + gap) + (width - 1) / 2 for i in range(count)], line["names"], fontsize=8)
        axis.set_yticks([])
        axis.set_title(line["title"])
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    _noted(lower, note)
    return figure


def _strong(row: Row) -> Row:
    """The look of the mean of several curves."""
    return {"color": row["colour"], "linestyle": row["line"], "linewidth": 1.8}


def _legend(figure: Figure, handles: list[Any], columns: int = 3) -> None:
    """A legend above the panels, which stay as high; filled line by line, as matplotlib does not."""
    columns = min(columns, len(handles))
    figure.set_figheight(figure.get_figheight() + 0.2 * ((len(handles) - 1) // columns))
    ordered = [handle for i in range(columns) for handle in handles[i::columns]]
    figure.legend(handles=ordered, loc="outside upper center", ncols=columns)


def _noted(figure: Any, note: str) -> Any:
    """The note below a figure, which constrained layout makes room for."""
    figure.supxlabel(textwrap.fill(note, 112), fontsize=8, color="0.25")
    return figure


def _bar(axis: Axes, x: float, interval: list[float] | None, colour: Any, factor: float, **look: Any) -> None:
    """A vertical interval; a bootstrap's need not hold the value that it belongs to, so that it is drawn for itself."""
    if interval is not None:
        low, high = (factor * edge for edge in interval)
        axis.errorbar(x, (low + high) / 2, (high - low) / 2, fmt="none", ecolor=colour, elinewidth=1, **look)


def _estimates(
    axis: Axes, x: list[float], values: list[tuple[float, list[float] | None]], row: Row, factor: float, **look: Any
) -> None:
    """A curve of means with their intervals."""
    axis.plot(x, [factor * mean for mean, _ in values], marker=row["marker"], color=row["colour"], **look)
    for place, (_, interval) in zip(x, values, strict=True):
        _bar(axis, place, interval, row["colour"], factor)


def _around(low: float, high: float) -> tuple[float, float]:
    """Limits that are not the same."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _points(axis: Axes, rows: list[Row], key: str, label: str, **style: Any) -> None:
    """Simulated variance against sharpness with both errors."""
    axis.errorbar(
        column(rows, key),
        column(rows, "variance"),
        column(rows, "variance_se"),
        column(rows, f"{key}_se"),
        label=label,
        **style,
    )


def _plain_ticks(axis: Axis, digits: tuple[int, ...] = (1, 2, 5)) -> None:
    """Decimal numbers on a logarithmic axis, also between powers of ten, which would leave one tick in a decade."""
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
