"""From the sharpness scores of all members to the samples that each member trains with SAM."""

import math
from collections.abc import Sequence

import numpy as np

SELECT = ("flattest", "sharpest", "random", "same")
UNSELECTED = ("normal", "one", "others")
SCORE_FREE = ("random", "same")  # of SELECT, those that no score decides
# The `select` of each --partition.
PARTITION_RULE = {"released": "flattest", "paper": "sharpest", "random": "random", "same": "same"}
# What draws the sets of random and same. Runs of earlier versions do not name it: theirs is numpy's default_rng, which
# may change between versions of numpy.
DRAWS = "RandomState"
SETS = 2  # beside the tags in utils.data, so that no two uses of a seed share a stream


def sharpness_aware_masks(
    scores: np.ndarray,
    flat_ratio: float,
    select: str = "flattest",
    unselected: str = "one",
    seeds: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
    draws: str | None = DRAWS,
) -> np.ndarray:
    """Which samples each member trains with SAM; all others it trains with normal steps.

    With M members, N samples and T = int(flat_ratio N), member j picks Q_j: its T samples of lowest score
    (`flattest`) or highest score (`sharpest`). O_i is the union of Q_j over j != i, R the samples that nobody picked,
    in ascending order, and R_i = R[i::M]. The SAM set of member i is

        O_i                 unselected="normal"   (the paper)
        O_i + R_i           unselected="one"      (the authors' code on CIFAR-100 and TinyImageNet)
        O_i + (R - R_i)     unselected="others"   (the authors' code on CIFAR-10)

    `random` draws T samples for each member from its own seed; `same` draws T samples from the first seed for all
    members. Both ignore the values of the scores and `unselected`. With `sizes` member i has sizes[i] samples instead
    of T; those of `same` are then the first ones of one order.

    Equal scores are ordered by their index, as by a stable sort: a lower index counts as a lower score.

    Args:
        scores: [M, N], finite.
        flat_ratio: share of the samples that a member picks, 0 to 1.
        select: flattest | sharpest | random | same.
        unselected: normal | one | others.
        seeds: M whole numbers of 0 or more; used by random and same.
        sizes: M whole numbers from 0 to N; for random and same only.
        draws: their generator; None is that of earlier versions.

    Returns:
        bool [M, N], True = trained with SAM. With one member, O is empty.

    Raises:
        ValueError: for anything else; the message names the argument.

    Source: arXiv 2407.12996, section 4, and the authors' release.
    """
    scores = np.asarray(scores)
    if scores.ndim != 2 or scores.shape[0] < 1:
        raise ValueError(f"scores: expected shape [members, samples], got {scores.shape}")
    if not 0 <= flat_ratio <= 1:
        raise ValueError(f"flat_ratio: expected a number from 0 to 1, got {flat_ratio}")
    if select not in SELECT:
        raise ValueError(f"select: expected one of {', '.join(SELECT)}, got '{select}'")
    if unselected not in UNSELECTED:
        raise ValueError(f"unselected: expected one of {', '.join(UNSELECTED)}, got '{unselected}'")
    members, samples = scores.shape
    picked = math.floor(flat_ratio * samples)

    if select in SCORE_FREE:
        if seeds is None or len(seeds) != members:
            raise ValueError(f"seeds: select='{select}' needs one seed for each of the {members} members")
        sizes = [picked] * members if sizes is None else sizes
        if len(sizes) != members or not all(0 <= size <= samples for size in sizes):
            raise ValueError(f"sizes: expected {members} numbers from 0 to {samples}, got {list(sizes)}")
        masks = np.zeros((members, samples), dtype=bool)
        for mask, seed, size in zip(masks, seeds if select == "random" else [seeds[0]] * members, sizes, strict=True):
            random = np.random.RandomState([seed, 0, SETS]) if draws else np.random.default_rng(seed)
            mask[random.permutation(samples)[:size]] = True
        return masks
    if sizes is not None:
        raise ValueError(f"sizes: given for select='{select}', whose sets have the sizes that the scores give")

    if not np.isfinite(scores).all():
        member, sample = np.argwhere(~np.isfinite(scores))[0]
        raise ValueError(f"scores: member {member} has a score of {scores[member, sample]} at sample {sample}")
    picks = np.stack([_extreme(row, picked, highest=select == "sharpest") for row in scores])
    times_picked = picks.sum(axis=0)
    masks = times_picked - picks > 0  # O_i: picked by another member
    if unselected != "normal":
        rest = np.flatnonzero(times_picked == 0)
        owner = np.arange(len(rest)) % members
        for member, mask in enumerate(masks):
            mask[rest[(owner == member) if unselected == "one" else (owner != member)]] = True
    return masks


def _extreme(row: np.ndarray, count: int, highest: bool) -> np.ndarray:
    """The `count` lowest or highest entries of a stable ascending sort, as a mask, in linear time."""
    if count == 0:
        return np.zeros(len(row), dtype=bool)
    if highest:
        border = np.partition(row, len(row) - count)[len(row) - count]
        mask = row > border
        ties = np.flatnonzero(row == border)[::-1]
    else:
        border = np.partition(row, count - 1)[count - 1]
        mask = row < border
        ties = np.flatnonzero(row == border)
    mask[ties[: count - np.count_nonzero(mask)]] = True
    return mask
