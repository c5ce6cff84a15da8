"""Every figure. A function takes rows (dicts), draws them and returns a Figure; `save` writes it as PDF and PNG.

No display and no pyplot: figures are drawn by Agg and keep no global state. Each method has one colour everywhere, of
the palette of Okabe and Ito, which colour-blind readers tell apart, and markers and lines differ as well.
"""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from utils.checkpoint import write_atomically
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
}
NAMES = {
    "deep_ensemble": "deep ensemble",
    "sam": "SAM",
    "sharpbalance": "SharpBalance",
    "paper": "SharpBalance, the paper's sets",
    "released": "SharpBalance, the released code's sets",
    "random": "SAM on random rows, as many",
}
MARKERS = "osD^vP"
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
    # Constrained layout moves a little each time that it is solved: once is enough, and the two files agree.
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


def curves(rows: list[Row], key: str) -> list[tuple[Any, list[Row]]]:
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
    groups = curves(rows, "k" if along == "rho" else "rho")
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
    axes[1, 0].set(xlabel=label, ylabel="deviation from formula  [%]")
    axes[1, 1].set(xlabel=label, ylabel="deviation from bound  [%]")
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
def tradeoff(grids: dict[str, list[Row]]) -> Figure:
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
            groups = curves(grids[f"tradeoff_{method}"], "k")
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
        "tradeoff": tradeoff(grids),
        "published": published(points),
        "trained": trained(grids["trained"]),
    }


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
