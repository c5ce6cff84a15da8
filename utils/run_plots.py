"""Every figure of run folders, drawn like those of `utils.plots`: a function takes ensembles and returns a Figure."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from utils import InputError
from utils.plots import (
    WIDTH,
    Group,
    about,
    caption,
    decimal_ticks,
    finished,
    grey,
    line_styles,
    panels,
    styled,
    whole_numbers,
)
from utils.results import Ensemble


@styled
def curves(runs: list[Ensemble]) -> Figure:
    """Loss and accuracy by epoch on training and validation images: members faint, their mean strong.

    A dotted line marks the epoch before which SharpBalance assigns samples.
    """
    figure, axes = panels(3.4, 2, 2, sharex=True)
    groups, handles, dotted, above = line_styles(runs), [], {"linestyle": ":", "linewidth": 1}, 0.0
    for (loss, accuracy), part, title in zip(axes, ("train", "val"), ("training", "validation"), strict=True):
        for group in groups:
            logs = [_read_log(run.folder / f"seed_{seed}") for run in group.ensembles for seed in run.seeds]
            trained = group.ensembles[0].content["trained"]
            for axis, key, factor in ((loss, "loss", 1), (accuracy, "acc", 100)):
                members = [[factor * epoch[f"{part}_{key}"] for epoch in log] for log in logs]
                _members(axis, range(1, 1 + max(map(len, logs))), members, group)
                if trained["sam"] and trained["flat_ratio"]:
                    axis.axvline(trained["initial_epochs"] + 0.5, color="grey", **dotted)
                    handles = [grey("samples are assigned", **dotted)]
        loss.set(title=title, ylabel="loss  [nats]", yscale="log")
        accuracy.set(title=title, ylabel="accuracy  [%]")
        # A member that diverges, or the first epochs of all, must not squeeze the rest.
        losses = np.concatenate([line.get_ydata() for line in loss.get_lines() if len(line.get_xdata()) > 2] or [[1.0]])
        losses = losses[np.isfinite(losses) & (losses > 0)]
        if len(losses) and losses.max() > 10 * (usual := np.percentile(losses, 90)):
            loss.set_ylim(0.8 * losses.min(), 3 * usual)
            above = max(above, losses.max())
        low, high = loss.get_ylim()
        decimal_ticks(loss.yaxis, (1, 2, 5) if high < 100 * low else (1,))
    whole_numbers(axes[1], "epoch  [1]")
    images = runs[0].content["data"].get("val")
    note = f"{about(groups)}{f'; {images} validation images' if images else ''}. Faint: a member; strong: their mean. "
    note += "Training: augmented images, at the weights before each step."
    starts = [group.ensembles[0].content["trained"] for group in groups]
    starts = {one.get("initial_method", "sam") for one in starts if one["sam"] and one["flat_ratio"]}
    if starts:
        note += f" Until samples are assigned, SharpBalance is {' or '.join(map(str.upper, sorted(starts)))}."
    if above:
        note += f" Losses above a panel, up to {float(f'{above:.2g}'):,g} nats, are cut off."
    return finished(figure, axes[0, 0].get_legend_handles_labels()[0] + handles, note)


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
    """The rise of the loss along directions and between members: each member or pair faint, their mean strong.

    The sign of a direction and the order of two members mean nothing: all curves are means over both. The rise is that
    above the loss at the weights, between members above the mean of both ends. The panels share its axis, linear up to
    0.1 and logarithmic above, whose range is that of random directions and of lines between members. The panel of
    eigenvectors, whose steps have the same unit but are shorter, also has the mean over random directions, dotted.

    Args:
        runs: from `utils.landscape.read_landscape`. The panel of eigenvectors is left out if no run has them.
    """
    groups, facts = line_styles(runs), runs[0].content["about"]
    rises: dict[str, list[list[np.ndarray]]] = {"along": [], "between": [], "top": []}  # the curves of each group
    for group in groups:
        found = [run.content for run in group.ensembles]
        along = [np.mean(curves, axis=0) for one in found for curves in one["along"].values()]
        rises["along"].append([_rise(curve, len(curve) // 2) for curve in along])
        rises["between"].append([_rise(curve, 0) for one in found for curve in one["between"].values()])
        tops = [top["losses"] for one in found for top in one.get("top", {}).values()]
        rises["top"].append([_rise(curve, len(curve) // 2) for curve in tops])
    titles = {"along": ("random directions", "step  [filter norm]"), "top": ("top eigenvector", "step  [filter norm]")}
    titles["between"] = ("between members", "position between\ntwo members  [1]")
    if not any(rises["top"]):
        del titles["top"], rises["top"]
    figure, axes = panels(2.3, 1, len(titles), sharey=True)
    axes = dict(zip(titles, axes, strict=True))
    # Eigenvectors come last: their panel takes its range of the loss from the other two.
    for key, curves_of_groups in rises.items():
        axis, steps, (title, label) = axes[key], facts[key], titles[key]
        steps = steps if key == "between" else steps[len(steps) // 2 :]
        axis.set_yscale("symlog", linthresh=0.1, linscale=0.5)
        if key == "top":
            axis.set(xlim=(-0.05 * steps[-1], 1.05 * steps[-1]), ylim=axis.get_ylim())
            along = facts["along"][len(facts["along"]) // 2 :]
            for group, members in zip(groups, rises["along"], strict=True):
                axis.plot(along, np.mean(members, axis=0), color=group.colour, linestyle=":")
        for group, members in zip(groups, curves_of_groups, strict=True):
            _members(axis, steps, members, group)
        axis.set(title=title, xlabel=label)
        # More labels would overlap those of the next panel.
        axis.set_xticks(ticks := [steps[0], steps[len(steps) // 2], steps[-1]], map("{:g}".format, ticks))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes["along"].set_ylabel("rise of the validation loss  [nats]")
    handles, top = axes["along"].get_legend_handles_labels()[0], ""
    if "top" in rises:
        handles.append(grey("random directions", linestyle=":"))
        top = (
            "Top eigenvector: of the Hessian of a member's loss on these images, as long as a random direction (norm "
            "of all filters); the loss may leave the panel. "
        )
    known = all(np.isfinite(curve).all() for found in rises.values() for curves in found for curve in curves)
    note = (
        f"{about(groups)}; {facts['images']} validation images. Faint: a member (its mean over {facts['directions']} "
        f"random filter-normalised directions) or a pair; strong: their mean. Each is the mean over both signs of a "
        f"direction, or both orders of a pair. {top}BatchNorm's statistics stay; between members, they are taken anew "
        f"from {facts['training_images']} training images. No intervals: these trained networks only."
        + ("" if known else " Where a curve is missing, the loss leaves the range of float32.")
    )
    return finished(figure, handles, note)


def _rise(losses: Any, start: int) -> np.ndarray:
    """The mean of a curve and its reverse, from index `start` on, above its value there."""
    curve = np.asarray(losses, dtype=float)
    with np.errstate(invalid="ignore"):  # inf - inf
        both = ((curve + curve[::-1]) / 2)[start:]
        return both - both[0]


@styled
def sets(runs: list[Ensemble]) -> Figure:
    """The share of each class and of each member's pick that is trained with SAM; the flattest and sharpest images.

    Args:
        runs: exactly one, from `utils.landscape.read_sets`.
    """
    (run,) = runs
    seeds, shares, pictures = run.seeds, run.content["shares"], run.content["pictures"]
    members, classes = len(seeds), shares["classes"].shape[1] - 1
    figure = Figure(figsize=(WIDTH, 3.6 + 0.3 * members), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.1 + 0.3 * members, 2.5])
    axes = upper.subplots(2, 1)
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
                colour = "black" if value > 55 else "white"
                axis.text(j, i, text, ha="center", va="center", fontsize=6 if len(names) <= 12 else 4, color=colour)
        else:
            axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "all" if x == 0 else f"{x - 1:.0f}"))
        axis.set(title=title, xlabel=label, ylabel="member  [seed]", yticks=range(members), yticklabels=seeds)
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
        places, names = [i * (width + gap) + (width - 1) / 2 for i in range(count)], line["names"]
        axis.set_xticks(places, [name.replace(": ", ":\n") for name in names], fontsize=6)
        axis.set_yticks([])
        axis.set_title(line["title"])
    for axis in (*axes, *strips):
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    caption(lower, run.content["note"])
    return figure


def _members(axis: Axes, x: range | list[float], members: list[Any], group: Group) -> None:
    """The curve of each member, faint, and their mean over the length of the shortest one, strong."""
    for values in members:
        axis.plot(x[: len(values)], values, color=group.colour, alpha=0.3, linewidth=0.7)
    if members:
        end, style = min(map(len, members)), {"color": group.colour, "linestyle": group.line, "linewidth": 1.4}
        axis.plot(x[:end], np.mean([values[:end] for values in members], axis=0), label=group.label, **style)
