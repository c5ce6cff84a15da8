import numpy as np
import pytest

from tests import reference
from utils.data import TAGS, generator
from utils.partition import SETS, sharpness_aware_masks

RATIOS = [0, 0.001, 0.1, 0.25, 0.4, 0.5, 0.77, 0.999, 1]


def scores_of(members, samples, seed, ties):
    random = np.random.default_rng(seed)
    scores = random.exponential(size=(members, samples))
    return np.round(scores, 1) if ties else scores


@pytest.mark.parametrize("members", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("select", ["flattest", "sharpest"])
@pytest.mark.parametrize("unselected", ["normal", "one", "others"])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_set_algebra(members, select, unselected, ties):
    for seed, ratio in enumerate(RATIOS):
        scores = scores_of(members, 61, seed, ties)
        masks = sharpness_aware_masks(scores, ratio, select, unselected)
        assert masks.dtype == bool
        assert masks.shape == scores.shape
        expected = reference.sharpness_aware_sets(scores, ratio, select, unselected)
        for mask, members_set in zip(masks, expected, strict=True):
            assert set(np.flatnonzero(mask).tolist()) == members_set


def test_all_scores_equal():
    """Then the lowest scores are the first samples, of every member, and nobody else's."""
    masks = sharpness_aware_masks(np.ones((3, 10)), 0.4, "flattest", "normal")
    assert (masks == (np.arange(10) < 4)).all()
    masks = sharpness_aware_masks(np.ones((3, 10)), 0.4, "sharpest", "normal")
    assert (masks == (np.arange(10) >= 6)).all()


@pytest.mark.parametrize("select", ["flattest", "sharpest"])
def test_laws(select):
    scores = scores_of(4, 200, 3, ties=False)
    masks = {u: sharpness_aware_masks(scores, 0.3, select, u) for u in ("normal", "one", "others")}
    rest = ~masks["normal"].any(axis=0)
    picked_alone = masks["normal"].sum(axis=0) == 3  # SAM at the three others: one member alone picked it
    assert not (rest & picked_alone).any()
    # What nobody picked has SAM at exactly one member, or at all but one.
    nobody = (masks["one"] & ~masks["normal"]).any(axis=0)
    assert ((masks["one"] & nobody).sum(axis=0)[nobody] == 1).all()
    assert ((masks["others"] & nobody).sum(axis=0)[nobody] == 3).all()
    # The order of the members only permutes the sets of what was picked.
    order = [2, 0, 3, 1]
    assert (sharpness_aware_masks(scores[order], 0.3, select, "normal") == masks["normal"][order]).all()
    # A monotone change of one member's scores changes nothing.
    assert (sharpness_aware_masks(np.log(scores), 0.3, select, "normal") == masks["normal"]).all()


def test_sizes_for_independent_scores():
    """999 samples, 3 members, ratio 0.4: about 229 picked by nobody; SAM sets of 700-722 (one) and 777-799 (others)."""
    sizes = {"one": [], "others": []}
    for seed in range(200):
        scores = np.random.default_rng(seed).random((3, 999))
        for rule, values in sizes.items():
            values.append(sharpness_aware_masks(scores, 0.4, "flattest", rule).sum(axis=1))
    assert 700 <= np.mean(sizes["one"]) <= 722
    assert 777 <= np.mean(sizes["others"]) <= 799
    for rule, (low, high) in {"one": (700, 722), "others": (777, 799)}.items():
        inside = np.mean([((v >= low) & (v <= high)).mean() for v in sizes[rule]])
        assert inside > 0.7, (rule, inside)


def test_identical_rankings():
    """One ranking for all: |SAM| = k + (1 - k)/m for `one`, k + (1 - k)(m - 1)/m for `others`."""
    scores = np.tile(np.random.default_rng(0).random(600), (3, 1))
    assert (sharpness_aware_masks(scores, 0.5, "flattest", "one").sum(axis=1) == 300 + 100).all()
    assert (sharpness_aware_masks(scores, 0.5, "flattest", "others").sum(axis=1) == 300 + 200).all()


def test_one_member():
    scores = scores_of(1, 10, 0, ties=False)
    assert sharpness_aware_masks(scores, 0.3, "flattest", "normal").sum() == 0
    assert sharpness_aware_masks(scores, 0.3, "flattest", "others").sum() == 0
    assert sharpness_aware_masks(scores, 0.3, "flattest", "one").sum() == 7


def test_random_and_same():
    scores = np.zeros((3, 1000))
    random = sharpness_aware_masks(scores, 0.3, "random", seeds=[13, 17, 27])
    assert (random.sum(axis=1) == 300).all()
    assert (random[0] != random[1]).any()
    assert (random == sharpness_aware_masks(scores, 0.3, "random", "others", seeds=[13, 17, 27])).all()
    same = sharpness_aware_masks(scores, 0.3, "same", seeds=[13, 17, 27])
    assert (same == random[0]).all()
    # A member's draw is its own: it does not depend on who else is there.
    assert (sharpness_aware_masks(scores[:2], 0.3, "random", seeds=[17, 13]) == random[[1, 0]]).all()


@pytest.mark.parametrize(
    ("draws", "sets"),
    [
        ({}, [[9, 11, 16, 17, 18, 19], [4, 7, 11, 15, 17, 18]]),
        ({"draws": None}, [[0, 1, 3, 6, 13, 15], [3, 4, 5, 6, 14, 17]]),  # of runs of earlier versions
    ],
)
def test_drawn_sets_are_the_same_for_ever(draws, sets):
    found = sharpness_aware_masks(np.zeros((2, 20)), 0.3, "random", seeds=[13, 17], **draws)
    assert [np.flatnonzero(mask).tolist() for mask in found] == sets


def test_drawn_sets_have_a_stream_of_their_own():
    """They are not the first images of an epoch's order."""
    drawn = sharpness_aware_masks(np.zeros((1, 50)), 0.3, "random", seeds=[13])[0]
    orders = [set(generator(13, 0, tag).permutation(50)[:15].tolist()) for tag in TAGS]
    assert set(np.flatnonzero(drawn).tolist()) not in orders
    assert SETS not in TAGS.values()


def test_drawn_sets_of_given_sizes():
    scores, seeds = np.zeros((3, 1000)), [13, 17, 27]
    whole = sharpness_aware_masks(scores, 0.3, "random", seeds=seeds)
    random = sharpness_aware_masks(scores, 0.9, "random", seeds=seeds, sizes=[100, 300, 0])
    assert random.sum(axis=1).tolist() == [100, 300, 0]
    assert (random[1] == whole[1]).all()
    assert (random <= whole).all()
    same = sharpness_aware_masks(scores, 0.3, "same", seeds=seeds, sizes=[100, 300, 200])
    assert (same[0] <= same[2]).all()
    assert (same[2] <= same[1]).all()
    assert (same[0] == random[0]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": np.zeros(5)}, "scores: expected shape"),
        ({"scores": np.full((2, 5), np.nan)}, "scores: member 0 has a score of nan at sample 0"),
        ({"flat_ratio": 1.5}, "flat_ratio: .*got 1.5"),
        ({"flat_ratio": float("nan")}, "flat_ratio: .*got nan"),
        ({"select": "flat"}, "select: .*got 'flat'"),
        ({"unselected": "all"}, "unselected: .*got 'all'"),
        ({"select": "random"}, "seeds: "),
        ({"select": "same", "seeds": [1]}, "seeds: "),
        ({"select": "random", "seeds": [1, 2], "sizes": [1]}, "sizes: "),
        ({"select": "random", "seeds": [1, 2], "sizes": [1, 6]}, "sizes: .*0 to 5"),
        ({"sizes": [1, 1]}, "sizes: given for select='flattest'"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"scores": np.zeros((2, 5)), "flat_ratio": 0.5} | change
    with pytest.raises(ValueError, match=message):
        sharpness_aware_masks(**arguments)
