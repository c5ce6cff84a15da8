import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

import utils.metrics
from tests import reference
from utils.metrics import (
    accuracy,
    bootstrap_counts,
    bootstrap_means,
    calibration_bins,
    calibration_gaps,
    calibration_mse,
    ensemble_log_probs,
    expected_calibration_error,
    fit_temperature,
    mutual_information,
    negative_log_likelihood,
    paired_bootstrap,
    per_sample,
    percentile_interval,
    predictive_entropy,
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
    assert mutual_information(sure[None]).tolist() == [0, 0, 0]  # of one member
    apart = mutual_information(torch.stack([sure[:1], sure[1:2]]))
    assert apart.item() == pytest.approx(math.log(2), rel=1e-6)
    assert (mutual_information(torch.full((7, 5, 10), 0.1)) >= 0).all()
