import itertools
import math

import numpy as np
import pytest
import sklearn.metrics
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

import utils.metrics
from tests import reference
from utils.metrics import (
    accuracy,
    aurc_influence,
    bootstrap_counts,
    bootstrap_means,
    calibration_bins,
    calibration_gaps,
    calibration_mse,
    crossed_interval,
    ensemble_log_probs,
    expected_calibration_error,
    fit_temperature,
    mutual_information,
    negative_log_likelihood,
    out_of_distribution,
    out_of_distribution_columns,
    out_of_distribution_influence,
    paired_bootstrap,
    per_sample,
    percentile_interval,
    predictive_entropy,
    risk_coverage,
    t_interval,
    with_temperature,
)


def case(members=3, samples=200, classes=7, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(members, samples, classes, generator=generator, dtype=torch.float64)
    return torch.log_softmax(logits, dim=2), torch.randint(0, classes, (samples,), generator=generator)


def test_equal_the_slow_forms():
    log_probs, labels = case()
    for member in log_probs:
        assert accuracy(member, labels) == pytest.approx(reference.accuracy(member.exp(), labels), abs=1e-15)
        assert negative_log_likelihood(member, labels) == pytest.approx(reference.nll(member.exp(), labels), rel=1e-12)
        brier = per_sample(member, labels)["brier"].mean().item()
        assert brier == pytest.approx(reference.brier(member.exp(), labels), rel=1e-12)
        for bins in (1, 7, 15, 100):
            ece = expected_calibration_error(member.exp(), labels, bins)
            assert ece == pytest.approx(reference.ece(member.exp(), labels, bins), abs=1e-12)


def test_columns_are_those_of_each_member():
    log_probs, labels = case()
    columns = per_sample(log_probs, labels)
    for i, member in enumerate(log_probs):
        probs = member.exp()
        for j, label in enumerate(labels.tolist()):
            onehot = torch.nn.functional.one_hot(torch.tensor(label), 7)
            assert columns["correct"][i, j] == float(probs[j].argmax() == label)
            assert columns["nll"][i, j].item() == pytest.approx(-math.log(probs[j, label]), rel=1e-12)
            assert columns["brier"][i, j].item() == pytest.approx((probs[j] - onehot).square().sum().item(), rel=1e-12)
            assert columns["confidence"][i, j] == probs[j].max()
    again = per_sample(log_probs, labels, log_probs.exp())
    assert all(torch.equal(again[name], column) for name, column in columns.items())


def test_gaps_give_the_calibration_error():
    log_probs, labels = case(1)
    gaps = calibration_gaps(per_sample(log_probs[0], labels), 15)
    ece = expected_calibration_error(log_probs[0].exp(), labels, 15)
    assert gaps.mean(dim=0).abs().sum().item() == pytest.approx(ece, rel=1e-12)


def test_equal_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    log_probs, labels = case(classes=5)
    probs = log_probs[0].exp()
    ours = expected_calibration_error(probs, labels, 15)
    theirs = torchmetrics.multiclass_calibration_error(probs, labels, num_classes=5, n_bins=15, norm="l1")
    assert ours == pytest.approx(theirs.item(), abs=1e-6)
    assert accuracy(log_probs[0], labels) == pytest.approx(
        torchmetrics.multiclass_accuracy(probs, labels, num_classes=5, average="micro").item()
    )


def test_ece_at_the_edges():
    labels = torch.tensor([0, 0, 1])
    sure = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert expected_calibration_error(sure, labels) == pytest.approx(1 / 3)  # confidence 1 is in the last bin
    assert expected_calibration_error(sure[:2], labels[:2]) == 0
    half = torch.full((4, 2), 0.5)
    assert expected_calibration_error(half, torch.tensor([0, 0, 1, 1])) == 0
    # Bin borders belong to the bin above them, 0 to the first and 1 to the last.
    borders = torch.arange(16, dtype=torch.float64) / 15
    assert calibration_bins(borders, 15).tolist() == [*range(15), 14]
    assert np.histogram(borders[:-1].numpy(), bins=borders.numpy())[0].tolist() == [1] * 15
    for bad in (torch.tensor([[1.5, -0.5]]), torch.tensor([[math.nan, 1.0]]), torch.zeros(0, 2)):
        with pytest.raises(ValueError, match="probs: "):
            expected_calibration_error(bad, torch.zeros(len(bad), dtype=torch.int64))
    with pytest.raises(ValueError, match="n_bins: expected 1 or more, got 0"):
        expected_calibration_error(half, torch.zeros(4, dtype=torch.int64), 0)


def test_ensembles():
    log_probs, _ = case()
    mean = log_probs.exp().mean(dim=0)
    torch.testing.assert_close(ensemble_log_probs(log_probs).exp(), mean, rtol=1e-12, atol=0)
    geometric = log_probs.exp().prod(dim=0) ** (1 / 3)
    geometric /= geometric.sum(dim=1, keepdim=True)
    torch.testing.assert_close(ensemble_log_probs(log_probs, "logits").exp(), geometric, rtol=1e-12, atol=0)
    # The two differ: one sure member outvotes in the mean of logits what it cannot in the mean of probabilities.
    toy = torch.log_softmax(torch.tensor([[[0.0, 30.0]], [[2.0, 0.0]], [[2.0, 0.0]]], dtype=torch.float64), dim=2)
    assert ensemble_log_probs(toy).argmax() == 0
    assert ensemble_log_probs(toy, "logits").argmax() == 1


def test_no_infinities():
    """Probabilities far below the smallest float: logarithms stay finite where log(softmax) would not."""
    logits = torch.tensor([[[0.0, 2000.0]], [[0.0, 3000.0]]])
    log_probs = torch.log_softmax(logits.double(), dim=2)
    labels = torch.tensor([0])
    assert negative_log_likelihood(log_probs[0], labels) == pytest.approx(2000)
    expected = 2000 + math.log(2)
    assert negative_log_likelihood(ensemble_log_probs(log_probs), labels) == pytest.approx(expected)


def test_temperature_is_the_minimum_and_recovers_a_known_scale():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20000, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(torch.softmax(logits, dim=1), 1, generator=generator)[:, 0]
    log_probs = torch.log_softmax(3.0 * logits, dim=1)  # three times too sure
    temperature = fit_temperature(log_probs, labels)
    assert temperature == pytest.approx(3.0, rel=0.03)

    def loss(t):
        return negative_log_likelihood(with_temperature(log_probs, t), labels)

    assert loss(temperature) < min(loss(temperature * 1.001), loss(temperature / 1.001), loss(1.0))
    assert accuracy(with_temperature(log_probs, temperature), labels) == accuracy(log_probs, labels)
    assert fit_temperature(log_probs[:50], log_probs[:50].argmax(1)) == 1  # all right: nothing to fit


def test_bootstrap_intervals_cover():
    """Of 400 samples of 200 coins, the 95 % interval holds the true mean in 92 to 98 %."""
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        low, high = percentile_interval(bootstrap_means(torch.from_numpy(random.random(200) < 0.3), 1000))
        hits += low <= 0.3 <= high
    assert stats.binomtest(hits, 400, 0.95).pvalue > 1e-3, hits
    assert percentile_interval(torch.zeros(0)) is None
    assert percentile_interval(torch.tensor([1.0, math.nan])) is None


@pytest.mark.parametrize("samples", [200, 500, 899, 10_000])
@pytest.mark.parametrize("true", [0.0, 0.01, 0.03, 0.05, 0.1])
def test_calibration_error_of_few_samples(samples, true):
    """Unbiased in its square, and an interval that covers, where the plug-in error is far too large."""
    random, draws = np.random.default_rng(0), 600 if samples < 1000 else 200
    found, hits, plug_in = [], 0, []
    for _ in range(draws):
        confidence = 0.1 + 0.9 * random.beta(2, 1.5, samples)
        correct = random.random(samples) < np.clip(confidence - true, 0, 1)
        confidence, correct = torch.from_numpy(confidence), torch.from_numpy(correct)
        value, (low, high) = calibration_mse(confidence, correct)
        assert low <= max(value, 0) <= high
        found.append(value)
        hits += low <= (1.001 * true) ** 2 and true**2 <= high
        plug_in.append(
            calibration_gaps({"confidence": confidence, "correct": correct.double()}, 15).mean(0).abs().sum()
        )
    assert stats.binomtest(hits, draws, 0.95).pvalue > 1e-4 or hits > 0.95 * draws, hits
    assert np.mean(found) == pytest.approx(true**2, abs=4 * np.std(found) / math.sqrt(draws) + 5e-4)
    if samples == 200:
        assert np.mean(plug_in) > true + 0.01


def test_calibration_error_by_its_definition():
    """All pairs of a bin, one by one."""
    random = np.random.default_rng(0)
    confidence, correct = random.random(60), random.random(60) < 0.4
    bins, square = np.minimum((confidence * 5).astype(int), 4), 0.0
    for b in range(5):
        gap = (correct - confidence)[bins == b]
        products = [x * y for i, x in enumerate(gap) for j, y in enumerate(gap) if i != j]
        square += len(gap) / 60 * np.mean(products)
    value, _ = calibration_mse(torch.from_numpy(confidence), torch.from_numpy(correct), 5)
    assert value == pytest.approx(square, rel=1e-12)
    # Without a second sample in any bin nothing is known.
    assert calibration_mse(torch.tensor([0.5]), torch.tensor([1.0]))[0] == 0


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_interval_of_the_calibration_error_by_its_definition(level):
    """Its edges are as far from the estimate as the quantile times the standard error there, bin by bin."""
    random, reached = np.random.default_rng(0), set()
    z = stats.norm.ppf((1 + level) / 2) ** 2
    for case in range(60):
        samples = (9, 30, 300)[case % 3]
        confidence = random.beta(5, 1, samples) if case % 2 else random.random(samples)
        shift = 0.4 * (confidence < 0.7) if case % 4 < 2 else 0.1
        correct = random.random(samples) < confidence - shift
        value, edges = calibration_mse(torch.from_numpy(confidence), torch.from_numpy(correct), 5, level)
        bins, rows = np.minimum((5 * confidence).astype(int), 4), []
        for b in range(5):
            gap = (correct - confidence)[bins == b]
            if len(gap) > 1:
                rows.append((len(gap), gap.mean(), gap.var(ddof=1), (gap**2).mean()))
        count, mean, variance, square = np.array(rows).T
        share, weight = count / samples, count / samples * mean**2
        at_zero = 2 * (share**2 * square**2 / (count * (count - 1))).sum()
        slopes = [(share * square).sum(), (weight * variance).sum() / weight.sum()]
        spread = ((weight * mean**2).sum() / weight.sum() ** 2 - 1) / samples
        reached |= {("slope", int(np.argmax(slopes))), ("spread", int(np.searchsorted([0, 0.2], spread)))}
        for sign, edge in zip((-1, 1), edges, strict=True):
            if edge > 0:
                assert sign * (edge - value) > 0
                error = at_zero + 4 * max(slopes) / samples * edge + min(max(spread, 0), 0.2) * edge**2
                assert (edge - value) ** 2 == pytest.approx(z * error, rel=1e-9)
            else:  # then 0 is within reach
                assert value**2 <= z * at_zero
    assert reached >= {("slope", 0), ("slope", 1), ("spread", 1), ("spread", 2)}


@pytest.mark.parametrize(("samples", "draws", "seed"), [(1, 5, 0), (200, 1000, 0), (3000, 1500, 3), (40_000, 450, 0)])
def test_bootstrap_means_are_those_of_all_resamples_at_once(samples, draws, seed):
    """Blocks, kept or not, of the same resamples as one matrix [B, N] of weights, which may take gigabytes."""
    random = np.random.RandomState(seed)
    chosen = [random.randint(0, samples, samples) for _ in range(draws)]
    values = np.random.default_rng(1).normal(size=(samples, 3))
    expected = torch.from_numpy(np.stack([values[rows].mean(axis=0) for rows in chosen]))
    for _ in range(2):
        found = bootstrap_means(torch.from_numpy(values), draws, seed)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(bootstrap_means(torch.from_numpy(values[:, 0]), draws, seed), expected[:, 0])
    interval = paired_bootstrap(torch.from_numpy(values[:, 1]), draws=draws, seed=seed)
    assert interval == pytest.approx(np.quantile(expected[:, 1].numpy(), [0.025, 0.975]).tolist(), abs=1e-12)
    counts = list(bootstrap_counts(samples, draws, seed))
    assert torch.cat([block.sum(dim=1) for block in counts]).tolist() == [samples] * draws
    assert all(block.dtype == torch.uint8 and block.numel() <= 2**22 for block in counts)


class _Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.nbytes)
        return result


@pytest.mark.parametrize(("samples", "draws"), [(45_000, 400), (2_000_000, 9)])
def test_memory_of_a_bootstrap_does_not_grow_with_the_draws(samples, draws):
    """One matrix of float64 for 1,000 draws of 45,000 images takes 360 MB, and making it four times as much."""
    assert samples * draws > utils.metrics.MAX_KEPT  # or the counts are kept
    kept = utils.metrics._kept_counts.cache_info()
    with _Largest() as seen:
        found = bootstrap_means(torch.ones(samples, 2), draws)
    assert utils.metrics._kept_counts.cache_info() == kept
    assert found.shape == (draws, 2)
    assert seen.largest <= 40e6
    assert bootstrap_means(torch.ones(5, 2), 0).shape == (0, 2)


def test_entropy_and_mutual_information_equal_those_of_scipy():
    log_probs, _ = case(scale=5)
    probs = log_probs.exp()
    assert np.allclose(predictive_entropy(probs), stats.entropy(probs.numpy(), axis=2), atol=1e-14)
    mean = probs.mean(dim=0).numpy()
    divergences = [stats.entropy(member.numpy(), mean, axis=1) for member in probs]  # whose mean it is
    assert np.allclose(mutual_information(probs), np.mean(divergences, axis=0), atol=1e-14)


def test_entropy_and_mutual_information_at_their_ends():
    sure = torch.eye(3)
    assert predictive_entropy(sure).tolist() == [0, 0, 0]
    assert not predictive_entropy(sure).signbit().any()  # -0.0000 in a table
    assert mutual_information(sure[None]).tolist() == [0, 0, 0]  # of one member
    apart = mutual_information(torch.stack([sure[:1], sure[1:2]]))
    assert apart.item() == pytest.approx(math.log(2), rel=1e-6)
    same = torch.softmax(torch.randn(1, 1000, 10, generator=torch.Generator().manual_seed(0)), dim=2).expand(7, -1, -1)
    entropies = predictive_entropy(same)
    assert (predictive_entropy(same.mean(dim=0)) - entropies.mean(dim=0)).min() < 0  # rounding alone
    assert mutual_information(same).min() == 0


def tied(seed, samples=60, levels=9):
    """Scores of test images and of others, many of them equal."""
    random = np.random.default_rng(seed)
    low, high = random.random(samples) * 0.8, random.random(samples // 2) * 0.7 + 0.3
    return [torch.from_numpy(np.round(scores * levels) / levels if levels else scores) for scores in (low, high)]


@pytest.mark.parametrize("levels", [0, 4, 9, 60])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_out_of_distribution_equals_the_slow_form_and_torchmetrics(levels, seed):
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    low, high = tied(seed, levels=levels)
    found = out_of_distribution(low, high)
    assert found == pytest.approx(reference.out_of_distribution(low.tolist(), high.tolist()), abs=1e-12)
    scores, is_out = torch.cat([low, high]), torch.tensor([0] * len(low) + [1] * len(high))
    torch.set_default_dtype(torch.float64)  # of what torchmetrics divides
    try:
        theirs = {
            "auroc": torchmetrics.binary_auroc(scores, is_out),
            "aupr": torchmetrics.binary_average_precision(scores, is_out),
            "fpr95": 1 - torchmetrics.binary_specificity_at_sensitivity(scores, is_out, 0.95)[0],
        }
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == pytest.approx({name: value.item() for name, value in theirs.items()}, abs=1e-9)


def test_out_of_distribution_at_its_ends():
    low, high = torch.arange(40.0), torch.arange(20.0)
    assert out_of_distribution(low, high + 40) == {"auroc": 1, "aupr": 1, "fpr95": 0}
    nothing = out_of_distribution(torch.zeros(30), torch.zeros(10))  # such as the mutual information of one member
    assert nothing == {"auroc": 0.5, "aupr": 0.25, "fpr95": 1}
    assert out_of_distribution(low, low - 100)["auroc"] == 0
    # 19 of 20 other images are reached at the score of 1, which 5 test images have; for 20 of 20 it takes all.
    few = torch.tensor([0.0] * 15 + [1.0] * 5)
    assert out_of_distribution(few, torch.tensor([0.0] + [1.0] * 19))["fpr95"] == 0.25
    for bad in (torch.zeros(0), torch.tensor([math.nan]), torch.zeros(2, 2), torch.tensor([math.inf, 1])):
        with pytest.raises(ValueError, match="scores_out: expected one finite number or more"):
            out_of_distribution(low, bad)
        with pytest.raises(ValueError, match="confidence: expected one finite number or more"):
            risk_coverage(bad, torch.ones(len(bad)))


@pytest.mark.parametrize("levels", [0, 9])
def test_influences_are_derivatives_by_weights(levels):
    low, high = tied(3, samples=24, levels=levels)
    lists, step = (low.tolist(), high.tolist()), 1e-5
    found = out_of_distribution_influence(low, high)
    for kind, i in itertools.product((0, 1), (0, 5, 11)):
        sides = []
        for sign in (1, -1):
            weights = [[1.0] * len(scores) for scores in lists]
            weights[kind][i] += sign * step
            sides.append(reference.out_of_distribution(*lists, *weights))
        for name in ("auroc", "aupr"):  # fpr95 is a step function of the weights
            derivative = (sides[0][name] - sides[1][name]) / (2 * step)
            assert found[name][kind][i].item() == pytest.approx(derivative, abs=1e-8), (name, kind, i)
    assert all(part.sum().item() == pytest.approx(0, abs=1e-12) for both in found.values() for part in both)


@pytest.mark.parametrize(("shift", "ratio", "samples"), [(1, 1, 400), (2, 0.5, 1000), (0.5, 1.2, 300)])
def test_intervals_of_out_of_distribution_cover(shift, ratio, samples):
    """Normal scores of deviations 1 and `ratio`, whose AUROC and FPR95 are known."""
    random, draws = np.random.default_rng(0), 300
    true = {"auroc": stats.norm.cdf(shift / math.hypot(1, ratio))}
    true["fpr95"] = stats.norm.sf(shift + ratio * stats.norm.ppf(0.05))
    hits, found = dict.fromkeys(("auroc", "aupr", "fpr95"), 0), []
    sets = [random.normal(size=(draws, samples)), shift + ratio * random.normal(size=(draws, samples // 2))]
    sets = [torch.from_numpy(scores) for scores in sets]
    found = [out_of_distribution(*pair) for pair in zip(*sets, strict=True)]
    true["aupr"] = np.mean([one["aupr"] for one in found])  # biased a little, of which no interval knows
    for value, *pair in zip(found, *sets, strict=True):
        for name, column in out_of_distribution_columns(value, *pair).items():
            assert column.mean().item() == pytest.approx(value[name], abs=1e-12)
            low, high = t_interval(column)
            hits[name] += low <= true[name] <= high
    for name, count in hits.items():
        assert stats.binomtest(count, draws, 0.95).pvalue > 1e-3, (name, count)


def test_risk_coverage():
    random = np.random.default_rng(0)
    for levels in (1, 2, 3):
        confidence = np.round(random.random(7) * levels)
        correct = (random.random(7) < 0.6).astype(float)
        found = risk_coverage(torch.from_numpy(confidence), torch.from_numpy(correct))
        expected = reference.risks_over_all_orders(confidence, correct)
        assert found["risk"].numpy() == pytest.approx(expected, abs=1e-12)
        assert found["aurc"] == pytest.approx(expected.mean(), abs=1e-12)
        assert found["coverage"].tolist() == pytest.approx([n / 7 for n in range(1, 8)])
        best = reference.risks_over_all_orders(range(7), sorted(correct)).mean()
        assert found["excess_aurc"] == pytest.approx(found["aurc"] - best, abs=1e-12)
    right = torch.tensor([1.0, 1, 1, 0, 0])
    assert risk_coverage(torch.tensor([5.0, 4, 3, 2, 1]), right)["excess_aurc"] == 0
    assert risk_coverage(torch.ones(5), right)["aurc"] == pytest.approx(0.4)  # of no order
    assert risk_coverage(torch.rand(5), torch.ones(5)) | {"coverage": 0, "risk": 0} == {
        **{"aurc": 0, "excess_aurc": 0},
        **{"coverage": 0, "risk": 0},
    }
    # torch_uncertainty 0.13 says 0.0833 of this (its documentation): by trapezoids between the N risks, not their mean.
    three = risk_coverage(torch.tensor([0.7, 0.6, 0.8]), torch.tensor([1.0, 0, 1]))
    trapezoids = sklearn.metrics.auc(three["coverage"], three["risk"]) / (1 - 1 / 3)
    assert trapezoids == pytest.approx(0.0833, abs=5e-5)
    assert three["aurc"] == pytest.approx(2 / 3 * trapezoids + (three["risk"][0] + three["risk"][-1]).item() / 2 / 3)


@pytest.mark.parametrize("levels", [0, 12])
def test_influence_on_aurc(levels):
    random = np.random.default_rng(1)
    confidence = random.random(200)
    correct = (random.random(200) < confidence).astype(float)
    if not levels:
        influence = aurc_influence(torch.from_numpy(confidence), torch.from_numpy(correct))
        for i in (0, 17, int(confidence.argmax()), int(confidence.argmin())):
            sides = []
            for weight in (1 + 1e-5, 1 - 1e-5):
                weights = [1.0] * 200
                weights[i] = weight
                sides.append(reference.aurc(confidence, correct, weights))
            assert influence[i].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=1e-8)
        return
    confidence = torch.from_numpy(np.round(confidence * levels))
    correct = torch.from_numpy(correct)
    influence, drawn = aurc_influence(confidence, correct), []
    assert influence.sum().item() == pytest.approx(0, abs=1e-12)
    for _ in range(1000):
        rows = torch.from_numpy(random.integers(0, 200, 200))
        drawn.append(risk_coverage(confidence[rows], correct[rows])["aurc"])
    assert influence.square().sum().sqrt().item() == pytest.approx(np.std(drawn), rel=0.1)


@pytest.mark.parametrize(("ensembles", "of_ensemble", "paired"), [(2, 0.1, False), (4, 0.02, False), (4, 0.1, True)])
def test_crossed_intervals_of_out_of_distribution_cover(ensembles, of_ensemble, paired):
    """Ensembles and images both random: what ensembles add, what images add, and what both do, to normal scores."""
    random, draws, hits, truth = np.random.default_rng(0), 150, dict.fromkeys(("auroc", "fpr95"), 0), []

    def drawn(count, n, k):
        inside, outside = random.normal(size=n), random.normal(1.2, 1, size=k)
        outside = outside + (0.5 * inside[:k] if paired else 0)
        pairs = (
            (inside + random.normal(0, 0.5, n), outside + random.normal(0, 0.5, k) + random.normal(0, of_ensemble))
            for _ in range(count)
        )
        return [tuple(map(torch.from_numpy, pair)) for pair in pairs]

    for _ in range(40):
        truth += [out_of_distribution(*pair) for pair in drawn(3, 2000, 1000)]
    for _ in range(draws):
        pairs = drawn(ensembles, 200, 100)
        columns = [out_of_distribution_columns(out_of_distribution(*pair), *pair, paired) for pair in pairs]
        for name in hits:
            low, high = crossed_interval(torch.stack([column[name] for column in columns]))
            hits[name] += low <= np.mean([one[name] for one in truth]) <= high
    for name, count in hits.items():
        assert count >= stats.binom.ppf(1e-3, draws, 0.95), (name, count)
