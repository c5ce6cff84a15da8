"""How many members of a plain deep ensemble an ensemble is worth, by calibrated NLL, and what their training costs."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.metrics import crossed_interval, t_interval
from utils.results import BOTH, Ensemble

STEP = 0.05  # of members, at which an interval's ends are looked for


class Equivalent(NamedTuple):
    """A number of members, its 95 % interval, and the population that this is over; inf: more than were measured."""

    members: float
    interval: tuple[float, float] | None
    over: str
    largest: int


def deep_ensemble_equivalent(
    plain: Sequence[Sequence[Tensor | float]], other: Sequence[Tensor | float], level: float = 0.95
) -> Equivalent:
    """The number of plain members whose ensemble has the same calibrated NLL: the deep ensemble equivalent.

    The smallest l of 1 or more at which the NLL of plain deep ensembles, linear between whole numbers of members, is at
    most that of the others; both are means over ensembles. inf where that of the largest is above it. The interval
    holds each l at which the difference of both NLL is not told from 0: where the `crossed_interval` of the differences
    by ensemble and image holds 0; it ends at inf where that of the largest size does. With one ensemble of either kind
    the interval is over images alone, for these trained networks. Where there are more of one kind than of the other,
    the mean of several of that kind is paired with one of the other.

    Args:
        plain: of each plain ensemble the calibrated NLL by its number of members, from 1 on: [N] by image, or a number.
        other: that of the other ensembles, [N] or a number.
        level: of the interval.

    Source: Ashukha, Lyzhov, Molchanov and Vetrov, "Pitfalls of in-domain uncertainty estimation and ensembling in deep
    learning", ICLR 2020, section 3; their band is of standard deviations over runs. Of an interval by inverted tests:
    Fieller, Journal of the Royal Statistical Society B 1954.
    """
    pairs = min(len(plain), len(other))
    curves = torch.stack([torch.stack([_column(one) for one in curve]) for curve in plain])  # [E, L, N]
    others = torch.stack([_column(one) for one in other])  # [E', N]
    largest, by_image = curves.shape[1], others.shape[1] > 1
    target, means = others.mean().item(), curves.mean(dim=(0, 2)).numpy()
    sizes = np.linspace(1, largest, round((largest - 1) / STEP) + 1)
    low, high = np.full(len(sizes), np.nan), np.full(len(sizes), np.nan)
    rows, rivals = _grouped(curves, pairs), _grouped(others, pairs)
    for i, size in enumerate(sizes):
        gaps = _at(rows, size) - rivals
        edges = None
        if not by_image:
            edges = t_interval(gaps[:, 0], level)
        elif gaps.shape[1] > 1:
            edges = crossed_interval(gaps, level) if pairs > 1 else t_interval(gaps[0], level)
        if edges:
            low[i], high[i] = edges
    over = (BOTH if pairs > 1 else "images") if by_image else "ensembles"
    interval = None
    if not np.isnan(low).any():
        # The NLL falls with the size: below the interval the lower edge of the difference is above 0.
        interval = (_first_at_most_0(sizes, low), _first_at_most_0(sizes, high))
    whole = np.interp(sizes, np.arange(1, largest + 1), means) - target
    return Equivalent(_first_at_most_0(sizes, whole), interval, over, largest)


def _column(values: Tensor | float) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64).reshape(-1)


def _grouped(values: Tensor, count: int) -> Tensor:
    """Means of consecutive ensembles, in so many groups."""
    return torch.stack([part.mean(dim=0) for part in torch.tensor_split(values, count)])


def _at(curves: Tensor, size: float) -> Tensor:
    """[E, N] of curves [E, L, N] at a number of members, linear between whole ones."""
    below = min(int(size), curves.shape[1] - 1) if curves.shape[1] > 1 else 1
    share = size - below
    if not share:
        return curves[:, below - 1]
    return (1 - share) * curves[:, below - 1] + share * curves[:, below]


def _first_at_most_0(sizes: np.ndarray, values: np.ndarray) -> float:
    """The first size at which values that are linear between sizes are 0 or less; inf if none is."""
    index = int(np.argmax(values <= 0))
    if values[index] > 0:
        return math.inf
    if not index:
        return float(sizes[0])
    before, after = values[index - 1], values[index]
    return float(sizes[index - 1] + (sizes[index] - sizes[index - 1]) * before / (before - after))


def plain_group(groups: dict[str, list[Ensemble]]) -> list[Ensemble]:
    """The plain deep ensembles with the most members whose calibrated NLL is known by size; none: an empty list."""
    found = [of for of in groups.values() if of[0].key == "deep_ensemble" and all(map(_curve, of))]
    return max(found, key=lambda of: len(of[0].seeds), default=[])


def worth(ensembles: list[Ensemble], plain: list[Ensemble]) -> Equivalent | None:
    """`deep_ensemble_equivalent` of ensembles of one method; None where their calibrated NLL is not known or finite.

    By image where that is kept of all, else by the means.
    """
    numbers = [one.values.get("nll_calibrated") for one in ensembles]
    if any(number is None or not math.isfinite(number) for number in numbers):
        return None
    curves, columns = [_curve(one) for one in plain], [one.by_sample.get("nll_calibrated") for one in ensembles]
    everything = [*columns, *(column for curve in curves for column in curve)]
    if all(isinstance(column, Tensor) for column in everything) and len({len(column) for column in everything}) == 1:
        return deep_ensemble_equivalent(curves, columns)
    return deep_ensemble_equivalent([[_column(column).mean() for column in curve] for curve in curves], numbers)


def _curve(ensemble: Ensemble) -> list[Tensor | float]:
    """The calibrated NLL by the number of members, by image where it is kept so; empty where it is not known."""
    row = ensemble.content["result"]["test"]
    means = row.get("calibrated_nll_by_size", {})
    sizes = [str(size + 1) for size in range(len(ensemble.seeds))]
    if list(means) != sizes:
        return []
    columns = [ensemble.by_sample.get(f"nll_calibrated_of_{size}") for size in sizes[:-1]]
    columns.append(ensemble.by_sample.get("nll_calibrated"))
    return columns if all(column is not None for column in columns) else list(means.values())


def training_cost(ensembles: list[Ensemble]) -> float | None:
    """Forward-backward passes of training, in trainings of one plain member by as many epochs; mean over ensembles."""
    passes = [one.content.get("passes") for one in ensembles]
    if not passes or not all(isinstance(count, int | float) for count in passes):
        return None
    return len(ensembles[0].seeds) * sum(passes) / len(passes)
