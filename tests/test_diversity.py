import itertools
import math

import numpy as np
import pytest
import torch
from scipy import special

from tests import reference
from tests.test_metrics import case
from utils.diversity import (
    bias_and_variance,
    centred,
    disagreement,
    disagreement_error_ratio,
    disagreement_per_sample,
    ensemble_improvement_rate,
    ensemble_variance,
    error_ratios,
    improvement_bounds,
    linear_cka,
    mean_over_pairs,
    pairwise_js,
    pairwise_kl,
    squared_distances,
    subsets_by_size,
)


def clones(members=3):
    log_probs, labels = case(1)
    return log_probs.expand(members, -1, -1).clone(), labels


def test_disagreement_equals_loops():
    log_probs, labels = case(4)
    predictions = log_probs.argmax(dim=2)
    matrix = disagreement(predictions)
    for i in range(4):
        for j in range(4):
            assert matrix[i, j].item() == sum(a != b for a, b in zip(predictions[i], predictions[j], strict=True)) / 200
    assert disagreement(torch.tensor([[0, 1], [0, 2]])).tolist() == [[0, 0.5], [0.5, 0]]
    pairs = [matrix[i, j].item() for i in range(4) for j in range(i)]
    error = np.mean([(p != labels).double().mean().item() for p in predictions])
    assert disagreement_error_ratio(predictions, labels) == pytest.approx(np.mean(pairs) / error, rel=1e-12)
    by_sample = [np.mean([a != b for a, b in itertools.combinations(p, 2)]) for p in predictions.T.tolist()]
    assert disagreement_per_sample(predictions).tolist() == pytest.approx(by_sample, abs=1e-15)


def test_ratios_of_rates():
    draws = error_ratios(torch.tensor([0.5, 1.0]), torch.tensor([0.6, 1.0]), torch.tensor([0.25, 0.0]))
    assert draws["der"].tolist()[0] == 0.5
    assert draws["eir"].tolist()[0] == pytest.approx(0.2)
    assert not draws["der"].isfinite()[1]
    assert list(error_ratios(0.5, disagreement=0.25)) == ["der"]


def test_subsets():
    assert subsets_by_size(3) == {1: [(0,), (1,), (2,)], 2: [(0, 1), (0, 2), (1, 2)], 3: [(0, 1, 2)]}
    many = subsets_by_size(12)
    assert [len(many[size]) for size in (1, 3, 6, 12)] == [12, 200, 200, 1]
    assert len(set(many[6])) == 200
    assert many == subsets_by_size(12)


def test_disagreement_equals_torch_uncertainty():
    library = pytest.importorskip("torch_uncertainty.metrics")
    log_probs, _ = case(4)
    theirs = library.Disagreement()
    theirs.update(log_probs.exp().transpose(0, 1).float())
    assert mean_over_pairs(disagreement(log_probs.argmax(dim=2))) == pytest.approx(theirs.compute().item(), rel=1e-5)


def test_improvement_equals_loops_and_its_limits():
    log_probs, labels = case(3)
    probs = log_probs.exp()
    errors = [1 - reference.accuracy(p, labels) for p in probs]
    ensemble = 1 - reference.accuracy(sum(probs) / 3, labels)
    expected = (np.mean(errors) - ensemble) / np.mean(errors)
    assert ensemble_improvement_rate(probs, labels) == pytest.approx(expected, rel=1e-12)
    geometric = 1 - reference.accuracy(probs.log().mean(dim=0).exp(), labels)
    by_logits = (np.mean(errors) - geometric) / np.mean(errors)
    assert ensemble_improvement_rate(probs, labels, "logits") == pytest.approx(by_logits, rel=1e-12)
    same, labels = clones()
    assert ensemble_improvement_rate(same.exp(), labels) == 0
    assert disagreement_error_ratio(same.argmax(dim=2), labels) == 0
    perfect = torch.eye(3).expand(2, 3, 3)
    assert math.isnan(ensemble_improvement_rate(perfect, torch.arange(3)))
    assert math.isnan(disagreement_error_ratio(perfect.argmax(dim=2), torch.arange(3)))


def test_theisens_bounds_hold_for_competent_majority_votes():
    """Members that err independently: DER >= EIR of the majority vote >= the lower bound."""
    random = np.random.default_rng(0)
    labels = np.zeros(20000, dtype=int)
    votes = np.where(random.random((5, 20000)) < 0.75, 0, random.integers(1, 3, (5, 20000)))
    counts = np.stack([(votes == c).sum(0) for c in range(3)])
    error, majority = (votes != labels).mean(), (counts.argmax(0) != labels).mean()
    der = disagreement_error_ratio(torch.from_numpy(votes), torch.from_numpy(labels))
    low, high = improvement_bounds(der, 3)
    assert low <= (error - majority) / error <= high


def test_kl_and_js_equal_scipy():
    log_probs, _ = case(3)
    kl, js = pairwise_kl(log_probs), pairwise_js(log_probs)
    probs = log_probs.exp().numpy()
    for i in range(3):
        for j in range(3):
            expected = special.rel_entr(probs[i], probs[j]).sum(1).mean()
            assert kl[i, j].item() == pytest.approx(expected, abs=1e-12)
            middle = (probs[i] + probs[j]) / 2
            both = special.rel_entr(probs[i], middle) + special.rel_entr(probs[j], middle)
            assert js[i, j].item() == pytest.approx(both.sum(1).mean() / 2, abs=1e-12)
    assert bool((kl >= 0).all())
    assert bool((js <= math.log(2)).all())
    assert torch.equal(js, js.T)
    shifted = torch.log_softmax(log_probs + 5.0, dim=2)
    torch.testing.assert_close(pairwise_kl(shifted), kl, rtol=0, atol=1e-12)
    same, _ = clones()
    assert pairwise_kl(same).abs().max() < 1e-12
    assert pairwise_js(same).abs().max() < 1e-12


def test_kl_of_extreme_logits_is_finite():
    logits = torch.tensor([[[0.0, 1000.0]], [[1000.0, 0.0]]])
    log_probs = torch.log_softmax(logits.double(), dim=2)
    assert pairwise_kl(log_probs)[0, 1].item() == pytest.approx(1000)
    assert pairwise_js(log_probs)[0, 1].item() == pytest.approx(math.log(2))
    never = torch.tensor([[[0.0, -math.inf]], [[0.0, -math.inf]]], dtype=torch.float64)
    assert pairwise_kl(never)[0, 1] == 0
    assert pairwise_js(never)[0, 1] == 0


def test_variance_equals_numpy_and_the_authors_form():
    outputs = torch.randn(4, 50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = outputs.numpy().var(axis=0, ddof=1).sum(axis=1).mean()
    assert ensemble_variance(outputs) == pytest.approx(expected, rel=1e-12)
    square, mean = (outputs**2).sum(2).mean(0), outputs.mean(0)
    authors = 4 / 3 * (square - (mean**2).sum(1)).mean().item()
    assert ensemble_variance(outputs) == pytest.approx(authors, rel=1e-10)
    # No digits are lost where the mean is large.
    assert ensemble_variance(outputs.float() + 4096) == pytest.approx(expected, rel=1e-3)
    assert ensemble_variance(outputs[:1].expand(3, -1, -1)) == pytest.approx(0, abs=1e-28)
    with pytest.raises(ValueError, match="2 or more members, got 1"):
        ensemble_variance(outputs[:1])
    assert mean_over_pairs(squared_distances(outputs)) / 2 == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 200, 1), (1, 200, 1)])
def test_centred_logits_do_not_see_what_softmax_ignores(shape, seed):
    """Shifts of members, of members and images, and of images."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(1, 200, 10, generator=generator, dtype=torch.float64)
    logits = logits + torch.randn(3, 200, 10, generator=generator, dtype=torch.float64)
    moved = logits + 5 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(torch.softmax(moved, dim=2), torch.softmax(logits, dim=2))
    torch.testing.assert_close(centred(moved), centred(logits), rtol=0, atol=1e-12)
    assert ensemble_variance(centred(moved)) == pytest.approx(ensemble_variance(centred(logits)), rel=1e-12)
    if len(moved) == shape[0]:  # by C times the variance of the shift
        assert ensemble_variance(moved) > 2 * ensemble_variance(logits)
    for debiased in (True, False):
        values = [linear_cka(*centred(x[:2]), debiased) for x in (logits, moved)]
        assert values[0] == pytest.approx(values[1], abs=1e-12)
    if shape[1] > 1:
        assert abs(linear_cka(*moved[:2]) - linear_cka(*logits[:2])) > 0.05
    assert torch.equal(centred(logits.float()), centred(logits.float().double()))
    classes = logits.mean(dim=2, keepdim=True)
    whole = ensemble_variance(centred(logits)) + 10 * ensemble_variance(classes)
    assert ensemble_variance(logits) == pytest.approx(whole, rel=1e-12)


def test_variance_of_gaussians_of_known_covariance():
    """E V = trace of the covariance; its spread over samples is known, too."""
    random = np.random.default_rng(0)
    factor = random.standard_normal((5, 5))
    outputs = torch.from_numpy(random.standard_normal((3, 40000, 5)) @ factor.T)
    covariance = factor @ factor.T
    error = math.sqrt(np.sum(covariance**2) / 40000)  # Var of one sample's V with M = 3 is 2 ||C||_F^2 / 2
    assert abs(ensemble_variance(outputs) - np.trace(covariance)) < 4 * error


def test_bias_and_variance_add_up():
    log_probs, labels = case(4)
    probs = log_probs.exp()
    parts = bias_and_variance(probs, labels)
    assert parts["mse"] == pytest.approx(parts["bias2"] + parts["variance"], rel=1e-12)
    assert parts["mse"] == pytest.approx(np.mean([reference.brier(p, labels) for p in probs]), rel=1e-12)
    # The estimate of the squared bias is unbiased: members scattered about a known mean.
    random = np.random.default_rng(1)
    mean, labels = np.array([[0.7, 0.2, 0.1]]), torch.zeros(1, dtype=torch.int64)
    draws = []
    for _ in range(4000):
        noise = 0.1 * random.standard_normal((3, 1, 3))
        draws.append(bias_and_variance(torch.from_numpy(mean + noise), labels)["bias2"])
    true = 0.3**2 + 0.2**2 + 0.1**2
    assert abs(np.mean(draws) - true) < 4 * np.std(draws) / math.sqrt(4000)


def test_cka_equals_the_gram_form():
    random = np.random.default_rng(0)
    x, y = random.standard_normal((40, 12)), random.standard_normal((40, 9))
    y[:, :5] += x[:, :5]
    for debiased in (True, False):
        ours = linear_cka(torch.from_numpy(x), torch.from_numpy(y), debiased)
        assert ours == pytest.approx(reference.cka_by_gram(x, y, debiased), abs=1e-10)


@pytest.mark.parametrize("debiased", [True, False])
def test_cka_invariances(debiased):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    y[:, :3] += 2 * x[:, :3]
    rotation = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=torch.float64)).Q
    value = linear_cka(x, y, debiased)
    assert linear_cka(3.5 * x @ rotation + 7, y, debiased) == pytest.approx(value, abs=1e-10)
    assert linear_cka(x, x @ rotation, debiased) == pytest.approx(1, abs=1e-10)
    assert linear_cka(x, y, debiased) == pytest.approx(linear_cka(y, x, debiased), abs=1e-12)


def test_independent_features_are_near_zero_only_debiased():
    random = np.random.default_rng(0)
    values = {True: [], False: []}
    for _ in range(200):
        x, y = (torch.from_numpy(random.standard_normal((32, 64))) for _ in range(2))
        for debiased, found in values.items():
            found.append(linear_cka(x, y, debiased))
    assert abs(np.mean(values[True])) < 4 * np.std(values[True]) / math.sqrt(200)
    assert abs(np.mean(values[True])) < 0.02
    assert np.mean(values[False]) > 0.5


def test_cka_refuses_what_has_no_value():
    x = torch.randn(10, 3)
    with pytest.raises(ValueError, match="the same 4 or more samples"):
        linear_cka(x, x[:9])
    with pytest.raises(ValueError, match="the same for all samples"):
        linear_cka(x, torch.ones(10, 2))
