"""The figures of the theorems, drawn by the notebook and by `scripts/plot.py theory`: rows of simulations -> Figure."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.plots import FILLS, MARKERS, WIDTH, decimal_ticks, finished, grey, panels, shades, styled
from utils.results import METHODS
from utils.verification import BLOCKS, SETTING, TRAINED_K, Row, relative_to_sam, stable_limit

SHARPNESS = r"sharpness  $\kappa$  [loss]"
MEMBER_SHARPNESS = "members' sharpness\n$\\kappa$  [loss]"
VARIANCE = r"variance  $V$  [prediction$^2$]"
FORMULAS = {"variance": "variance_bound", "sharpness": "sharpness_upper"}  # of each simulated quantity
RADIUS = "radius  $\\rho$\n[weight / gradient]"
REGRESSION = f"Linear regression, n = {SETTING['n']} rows, d = {SETTING['d']}"
STARTS = {
    "sam": "100 starts each",
    "sharpbalance": f"20 starts on each of {BLOCKS} blocks",
    "trained": "3 members each, the same data and starts for all methods",
}


def theory(grids: dict[str, list[Row]], points: dict[str, list[Row]], data_sets: int) -> dict[str, Figure]:
    """All figures of the theory by their file names.

    Args:
        grids: from `utils.verification.simulate_all`.
        points: from `utils.verification.published`.
        data_sets: of each setting of the grids.
    """
    names = {f"theorem_{number}_{along}": along for number in (1, 2) for along in ("rho", "k")}
    theorems = {name: theorem(grids[name], along, data_sets) for name, along in names.items()}
    others = {"tradeoff": theory_tradeoff(grids, data_sets), "published": published(points)}
    return theorems | others | {"trained": trained(grids["trained"], data_sets)}


def _simulated(data_sets: int, starts: str) -> str:
    """The sentence of a caption on what was simulated."""
    return f"{REGRESSION}; {data_sets} data sets of each setting, {starts}. Bars: ± 1 standard error over data sets."


@styled
def theorem(rows: list[Row], along: str, data_sets: int) -> Figure:
    """A theorem against simulation: variance and sharpness over rho or k, and below each the ratio to the formula.

    Args:
        rows: of one theorem and one grid of `utils.verification.simulate_all`.
        along: "rho" (a curve for each k) or "k" (a curve for each rho).
        data_sets: of each setting.
    """
    first = rows[0]["method"] == "sam"  # theorem 1
    across, symbol = ("k", "k") if along == "rho" else ("rho", r"\rho")
    figure, axes = panels(3.2, 2, 2, sharex=True, height_ratios=[1.2, 1])
    curves = _curves(rows, across)
    width = max(_column(rows, along)) - min(_column(rows, along))
    for i, (value, curve, style) in enumerate(curves):
        x = _column(curve, along)
        # Side by side, so that error bars do not hide one another.
        beside = [v + (i - (len(curves) - 1) / 2) * 0.011 * width for v in x]
        for (upper, lower), (key, bound) in zip(axes.T, FORMULAS.items(), strict=True):
            upper.plot(x, _column(curve, bound), color=style["color"])
            label = f"${symbol} = {value:g}$"
            upper.errorbar(x, _column(curve, key), _column(curve, f"{key}_se"), label=label, **style)
            deviation = [100 * (row[key] / row[bound] - 1) for row in curve]
            lower.errorbar(beside, deviation, [100 * row[f"{key}_se"] / row[bound] for row in curve], **style)
        if first:
            ratio = [100 * (row["sharpness_lower_leading"] / row["sharpness_upper"] - 1) for row in curve]
            axes[1, 1].plot(x, ratio, color=style["color"], linestyle="--")
    kinds = [grey("formula, upper bound"), grey("simulation", marker="o", linestyle="")]
    axes[0, 0].set(title=f"Theorem {1 if first else 2}: variance", ylabel=VARIANCE)
    axes[0, 1].set(title=f"Theorem {1 if first else 2}: sharpness", ylabel=SHARPNESS)
    if first:  # it spans decades
        axes[0, 0].set_yscale("log")
        axes[0, 1].set_yscale("log")
        decimal_ticks(axes[0, 0].yaxis, (1,))
        decimal_ticks(axes[0, 1].yaxis, (1, 3))
        kinds.append(grey("lower bound", linestyle="--"))
    for axis, reference in zip(axes[1], ("formula", "bound"), strict=True):
        axis.set(xlabel=RADIUS if along == "rho" else "steps  $k$  [1]", ylabel=f"above the {reference}  [%]")
        axis.axhline(0, color="black", linewidth=0.9)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=along == "k", steps=[1, 2, 5, 10]))
    handles = [*axes[0, 0].get_legend_handles_labels()[0], *kinds]
    note = _simulated(data_sets, STARTS[rows[0]["method"]])
    return finished(figure, handles, note + " Lower bound: its leading order, without proof." * first)


@styled
def theory_tradeoff(grids: dict[str, list[Row]], data_sets: int) -> Figure:
    """Variance against sharpness, simulated: at the mean iterate, as in the theorems, and at the members.

    Args:
        grids: from `utils.verification.simulate_all`.
        data_sets: of each setting.
    """
    blocks = {"fmt": "h:", "color": METHODS["sharpbalance"].colour, "label": r"blocks, $\rho = 0$, over steps"}
    descent = {"fmt": "o:", "color": METHODS["deep_ensemble"].colour, "label": "deep ensemble, over steps"}
    figure, axes = panels(2.4, 1, 2, sharey=True)
    for axis, key, label, title in (
        (axes[0], "sharpness", SHARPNESS, "at the mean iterate"),
        (axes[1], "member_sharpness", MEMBER_SHARPNESS, "at the members"),
    ):
        for method in ("sharpbalance", "sam"):
            for k, rows, style in _curves(grids[f"tradeoff_{method}"], "k", "-"):
                _points(axis, rows, key, label=f"{METHODS[method].name}, {k} step{'s' * (k > 1)}", **style)
        _points(axis, grids["tradeoff_blocks"], key, **blocks)
        _points(axis, grids["tradeoff_deep_ensemble"], key, **descent)
        axis.set(xlabel=label, title=title, xscale="log", yscale="log")
        decimal_ticks(axis.xaxis)
        decimal_ticks(axis.yaxis)
    axes[0].set_ylabel(VARIANCE)
    note = (
        "Sharpness $\\kappa$: the largest rise of the loss within a radius, left at the mean of the members, as in the "
        f"theorems, right at each member. SharpBalance and blocks: each member trains on one of {BLOCKS} equal parts "
        "of the rows, others on all. Curves over SAM's radius $\\rho$, dotted ones over the number of gradient steps. "
    )
    note += _simulated(data_sets, f"{STARTS['sam']} or, on blocks, {STARTS['sharpbalance']}")
    return finished(figure, axes[0].get_legend_handles_labels()[0], note)


@styled
def published(rows: dict[str, list[Row]]) -> Figure:
    """Figure 1(b) of the paper: its points on the curves of the formulas, and SAM's points in the divergent regime.

    Args:
        rows: from `utils.verification.published`.
    """
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    axes = figure.subplot_mosaic([["panel", "panel"], ["sharpness", "variance"]], height_ratios=[1.2, 1])
    panel, red, blue = axes["panel"], METHODS["sam"].colour, METHODS["sharpbalance"].colour
    for method, colour, bound, regime in (
        ("sam", red, "sharpness_upper", "divergent"),
        ("sharpbalance", blue, "sharpness_upper_authors", "stable"),
    ):
        marker = MARKERS[method]
        name, points, style = METHODS[method].name, rows[method], {"color": colour, "markerfacecolor": "none"}
        _line(panel, points, bound, "variance_bound", "-", label=f"{name} ({regime})", **style)
        _line(panel, points, "published_sharpness", "published_variance", marker, label=f"{name}, published", **style)
    exact = {"color": blue, "label": "SharpBalance, exact $S$"}
    _line(panel, rows["sharpbalance"], "sharpness_upper", "variance_bound", "--", **exact)
    panel.set(xlabel="upper bound of the sharpness  [loss]", ylabel=VARIANCE, title="Figure 1(b) of the paper, redrawn")
    for key, label in (("sharpness", r"bound of $\kappa$  [loss]"), ("variance", VARIANCE)):
        axis = axes[key]
        axis.axvspan(stable_limit("sam"), 0.245, color="0.88", linewidth=0, label="SAM diverges")
        _line(axis, rows["curve"], "rho", FORMULAS[key], "-", color=red)
        _line(
            axis,
            rows["sam"],
            "rho",
            f"published_{key}",
            MARKERS["sam"],
            color=red,
            markersize=2,
            markerfacecolor="none",
        )
        axis.set(yscale="log", ylabel=label, xlim=(0, 0.245))
        decimal_ticks(axis.yaxis, (1,))
        axis.set(xlabel=RADIUS, title=f"SAM's formula, $k = {rows['curve'][0]['k']}$")
    handles = [handle for axis in (panel, axes["sharpness"]) for handle in axis.get_legend_handles_labels()[0]]
    note = f"{REGRESSION}; formulas and published points, nothing simulated. Points: read off the paper's graphic. "
    note += "Lines: theorems 1 and 2 with the authors' $S$; dashed with the exact one."
    return finished(figure, handles, note)


@styled
def trained(rows: list[Row], data_sets: int) -> Figure:
    """The algorithm as it is trained: variance against the members' sharpness, and its ratio to SAM's.

    Args:
        rows: "trained" of `utils.verification.simulate_all`.
        data_sets: of each setting.
    """
    figure, (left, right) = panels(2.2, 1, 2)
    relative = relative_to_sam(rows)
    for method in ("sam", "released", "paper", "random"):
        # Random samples lie on SAM's curve; a dotted line leaves it visible.
        style = {"fmt": MARKERS[method] + (":" if method == "random" else "-"), "color": METHODS[method].colour}
        _points(left, [row for row in rows if row["method"] == method], label=METHODS[method].name, **style)
        part = [row for row in relative if row["method"] == method]
        if part:
            right.errorbar(*(_column(part, key) for key in ("member_sharpness", "ratio", "ratio_se")), **style)
    right.axhline(1, color=METHODS["sam"].colour)
    left.set(xlabel=MEMBER_SHARPNESS, ylabel=VARIANCE, xscale="log", yscale="log", title="trade-off")
    right.set(xlabel=MEMBER_SHARPNESS, xscale="log", title="at equal sharpness")
    right.set_ylabel("variance / SAM's  [1]")
    decimal_ticks(left.xaxis)
    decimal_ticks(left.yaxis)
    decimal_ticks(right.xaxis, (1, 2, 3, 5))
    note = f"Members see all rows, as in training: outside both theorems, $k = {TRAINED_K}$, curves over $\\rho$. "
    return finished(figure, left.get_legend_handles_labels()[0], note + _simulated(data_sets, STARTS["trained"]))


def _curves(rows: list[Row], key: str, line: str = "") -> list[tuple[Any, list[Row], dict[str, Any]]]:
    """Rows of a method by the value of a key, ascending, each with a style: marker, line and a shade of its colour."""
    values = sorted({row[key] for row in rows})
    colours = shades(rows[0]["method"], len(values))
    marker = MARKERS[rows[0]["method"]]
    styles = [{"fmt": marker + line, "color": colour, **fill} for colour, fill in zip(colours, FILLS, strict=False)]
    parts = [[row for row in rows if row[key] == value] for value in values]
    return list(zip(values, parts, styles, strict=True))


def _column(rows: list[Row], key: str) -> list[Any]:
    """One key of every row."""
    return [row[key] for row in rows]


def _line(axis: Axes, rows: list[Row], x: str, y: str, line: str, **style: Any) -> None:
    """One key against another."""
    axis.plot(_column(rows, x), _column(rows, y), line, **style)


def _points(axis: Axes, rows: list[Row], key: str = "member_sharpness", **style: Any) -> None:
    """Simulated variance against sharpness, both with their standard errors."""
    axis.errorbar(*(_column(rows, name) for name in (key, "variance", "variance_se", f"{key}_se")), **style)
