"""How much the members of an ensemble differ, and what the ensemble gains from it.

M members, N samples, C classes. Matrices over pairs of members are [M, M]; means over pairs leave the diagonal out.
"""

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import metrics

MAX_SUBSETS = 200


def disagreement(predictions: Tensor) -> Tensor:
    """Share of samples on which each pair of members predicts different classes.

    d_ij = 1 - (1/N) sum_x 1[prediction_i(x) = prediction_j(x)]; the diagonal is 0.

    Args:
        predictions: predicted classes, whole numbers [M, N].

    Returns:
        float64 [M, M].

    Example: [[0, 1], [0, 2]] gives 0.5 off the diagonal.
    """
    return torch.stack([(predictions != one).double().mean(dim=1) for one in predictions])


def mean_over_pairs(matrix: Tensor) -> float:
    """Mean of the entries off the diagonal of [M, M].

    Raises:
        ValueError: for fewer than two members.
    """
    members = len(matrix)
    if members < 2:
        raise ValueError(f"a mean over pairs needs 2 or more members, got {members}")
    off_diagonal = matrix[~torch.eye(members, dtype=torch.bool)]
    return off_diagonal.mean().item()


def disagreement_per_sample(predictions: Tensor) -> Tensor:
    """Share of the pairs of members that predict different classes, by sample: float64 [N].

    Of n_c members that predict class c, n_c (n_c - 1) ordered pairs agree. The mean over samples is that of
    `disagreement` over pairs.

    Args:
        predictions: predicted classes, int64 [M, N], M of 2 or more.
    """
    members, samples = predictions.shape
    votes = torch.zeros(samples, int(predictions.max()) + 1, dtype=torch.float64)
    votes.scatter_add_(1, predictions.T, torch.ones_like(predictions.T, dtype=torch.float64))
    return 1 - (votes * (votes - 1)).sum(dim=1) / (members * (members - 1))


def error_ratios(member_accuracy: Any, ensemble_accuracy: Any = None, disagreement: Any = None) -> dict[str, Any]:
    """DER and EIR from mean rates (numbers, or tensors of resampled ones): a rate over the members' mean error.

    Returns:
        `der`, disagreement / error, and `eir`, (ensemble accuracy - member accuracy) / error, of the rates that are
        given; nan where a number of an error is 0.
    """
    error = 1 - member_accuracy
    if not isinstance(error, Tensor) and error == 0:
        error = math.nan
    ratios = {}
    if disagreement is not None:
        ratios["der"] = disagreement / error
    if ensemble_accuracy is not None:
        ratios["eir"] = (ensemble_accuracy - member_accuracy) / error
    return ratios


def disagreement_error_ratio(predictions: Tensor, labels: Tensor) -> float:
    """DER: mean disagreement of two members over mean error of a member.

    Args:
        predictions: predicted classes, int64 [M, N], M of 2 or more.
        labels: int64 [N].

    Returns:
        0 for equal members; nan where no member errs at all.

    Source: Theisen et al., "When are ensembles really effective?", NeurIPS 2023.
    """
    member_accuracy = (predictions == labels).double().mean(dim=0).mean().item()
    return error_ratios(member_accuracy, disagreement=disagreement_per_sample(predictions).mean().item())["der"]


def ensemble_improvement_rate(probs: Tensor, labels: Tensor, average: str = "probs") -> float:
    """EIR: (mean member error - ensemble error) / mean member error.

    Args:
        probs: probabilities [M, N, C].
        labels: int64 [N].
        average: the ensemble's output, as for `metrics.ensemble_log_probs`.

    Returns:
        At most 1; nan where no member errs at all.

    Source: Theisen et al., NeurIPS 2023; eq. (4) of arXiv 2407.12996.
    """
    ensemble = probs.double().mean(dim=0)
    if average != "probs":
        ensemble = metrics.ensemble_log_probs(probs.double().log(), average)
    members = (probs.argmax(dim=2) == labels).double().mean(dim=0).mean().item()
    return error_ratios(members, (ensemble.argmax(dim=1) == labels).double().mean().item())["eir"]


def improvement_bounds(der: float, classes: int) -> tuple[float, float]:
    """Bounds of EIR from DER for a competent majority vote of K classes: (2(K-1)/K DER - (3K-4)/K, DER).

    They hold for majority votes; the mean of probabilities, which is used here, may leave them.

    Source: Theisen et al., NeurIPS 2023.
    """
    return 2 * (classes - 1) / classes * der - (3 * classes - 4) / classes, der


def pairwise_kl(log_probs: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence of each ordered pair, in nats.

    KL_ij = (1/N) sum_x sum_c p_i(c|x) (log p_i(c|x) - log p_j(c|x)); the diagonal is 0. The matrix is not symmetric.

    Args:
        log_probs: [M, N, C].

    Returns:
        float64 [M, M].
    """
    logs = log_probs.double().flatten(1)
    probs = logs.exp()
    # A probability of exactly 0 contributes 0, also against one of 0.
    lowest = torch.finfo(torch.float64).min / 4
    flat = logs if logs.amin() > lowest else logs.clamp(min=lowest)
    cross = probs @ flat.T  # sum_x sum_c p_i log p_j
    divergence = (cross.diagonal()[:, None] - cross) / log_probs.shape[1]
    return divergence.fill_diagonal_(0)


def pairwise_js(log_probs: Tensor) -> Tensor:
    """Mean Jensen-Shannon divergence of each pair, in nats, 0 to log 2: half of KL(p_i || m) + KL(p_j || m).

    m is the pair's mean probability.

    Args:
        log_probs: [M, N, C].

    Returns:
        float64 [M, M], symmetric, with diagonal 0.
    """
    logs = log_probs.double().flatten(1)
    members, samples = log_probs.shape[:2]
    probs = logs.exp()
    smallest = torch.finfo(torch.float64).tiny  # below it a probability counts as 0
    if probs.amin() < smallest:
        logs = torch.where(probs < smallest, 0.0, logs)
    result = torch.zeros(members, members, dtype=torch.float64)
    for i in range(members):
        for j in range(i):
            mixture = torch.add(probs[i], probs[j]).div_(2).clamp_(min=smallest).log_()
            halves = sum(torch.dot(probs[one], logs[one] - mixture) for one in (i, j))
            result[i, j] = result[j, i] = halves / 2 / samples
    return result


def centred(logits: Tensor) -> Tensor:
    """Logits [..., C] less their mean over classes, in float64: equal for logits of equal softmax."""
    values = logits.double()
    return values - values.mean(dim=-1, keepdim=True)


def ensemble_variance(outputs: Tensor) -> float:
    """Unbiased variance over members, summed over classes, mean over samples.

    V = (1/N) sum_x sum_c (1/(M-1)) sum_i (g_i(x)_c - mean_j g_j(x)_c)^2, in two passes in float64.

    Of logits it moves with what softmax ignores, a number that a member adds to all classes of an image: by C times the
    variance over members of that number. Of `centred` logits it does not.

    Args:
        outputs: logits, centred logits or probabilities [M, N, C], M of 2 or more.

    Raises:
        ValueError: for fewer than two members.

    Source: Yang et al., "Rethinking bias-variance trade-off", ICML 2020; on logits it is the authors' quantity.
    """
    if len(outputs) < 2:
        raise ValueError(f"a variance needs 2 or more members, got {len(outputs)}")
    values = outputs.double()
    by_sample = (values - values.mean(dim=0)).square().sum(dim=(0, 2)) / (len(values) - 1)
    return by_sample.mean().item()


def bias_and_variance(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """The mean squared error of a member's probabilities against one-hot labels, as squared bias plus variance.

    With y(x) the one-hot label, which has no noise of its own: mse = (1/N) sum_x E_i ||p_i(x) - y(x)||^2 =
    bias2 + variance, where variance is `ensemble_variance` and bias2 the unbiased estimate
    (1/N) sum_x ||mean_i p_i(x) - y(x)||^2 - variance / M. An estimate of a small bias2 can be below 0.

    Args:
        probs: [M, N, C], M of 2 or more.
        labels: int64 [N].
    """
    values = probs.double()
    target = torch.nn.functional.one_hot(labels, values.shape[2])
    variance = ensemble_variance(values)
    mean_error = (values.mean(dim=0) - target).square().sum(dim=1).mean().item()
    return {
        "mse": (values - target).square().sum(dim=2).mean().item(),
        "bias2": mean_error - variance / len(values),
        "variance": variance,
    }


def linear_cka(x: Tensor, y: Tensor, debiased: bool = True) -> float:
    """Linear centred kernel alignment of two representations of the same samples.

    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with K = XX', L = YY'. Biased: HSIC(K, L) = <HKH, HLH> =
    ||Xc'Yc||_F^2 with centred columns. Debiased: the unbiased estimator, on K and L with zero diagonal,
    HSIC = <K, L> + (1'K1)(1'L1)/((n-1)(n-2)) - 2 (1'KL1)/(n-2), whose ratio is near 0 for independent features also
    where there are more features than samples; it can be negative. As representations, logits should be `centred`: a
    number added to all classes of an image is nothing to softmax, but much to CKA.

    Args:
        x: [N, D1].
        y: [N, D2]; N of 4 or more.
        debiased: which estimator.

    Returns:
        1 for equal representations, up to rotation and scale.

    Raises:
        ValueError: for different or too few samples, or for a representation that is constant over samples.

    Source: Kornblith et al., ICML 2019; Song et al., JMLR 2012 (unbiased HSIC). Computed in float64.
    """
    if len(x) != len(y) or len(x) < 4:
        raise ValueError(f"CKA needs the same 4 or more samples in both, got {len(x)} and {len(y)}")
    same = any(bool((tensor == tensor[0]).all()) for tensor in (x, y))  # their mean may be rounded
    x, y = (tensor.double() - tensor.double().mean(dim=0) for tensor in (x, y))
    hsic = _hsic_debiased if debiased else _hsic_biased
    scale = hsic(x, x) * hsic(y, y)
    if same or not scale > 0:
        raise ValueError("CKA: a representation is the same for all samples")
    return (hsic(x, y) / scale.sqrt()).item()


def _hsic_biased(x: Tensor, y: Tensor) -> Tensor:
    return (x.T @ y).square().sum()


def _hsic_debiased(x: Tensor, y: Tensor) -> Tensor:
    """By features, never N x N: with centred columns K1 = 0 for the full K, so that all sums are of diagonals."""
    n = len(x)
    dx, dy = x.square().sum(1), y.square().sum(1)  # diagonals of K and L
    inner = (x.T @ y).square().sum() - (dx * dy).sum()  # <K, L> without diagonals
    ones = dx.sum() * dy.sum() / ((n - 1) * (n - 2))  # 1'K1 = -sum of its diagonal
    cross = 2 * (dx * dy).sum() / (n - 2)  # K1 = -diagonal
    return inner + ones - cross


def squared_distances(probs: Tensor) -> Tensor:
    """Mean squared distance of the outputs of each pair of members, [M, N, C] -> float64 [M, M].

    `ensemble_variance` of any subset of the members is half the mean over its pairs.
    """
    matrix = torch.zeros(len(probs), len(probs), dtype=torch.float64)
    for i, j in itertools.combinations(range(len(probs)), 2):
        gap = (probs[i] - probs[j]).flatten()
        matrix[i, j] = matrix[j, i] = torch.dot(gap, gap) / probs.shape[1]
    return matrix


def subsets_by_size(members: int) -> dict[int, list[tuple[int, ...]]]:
    """All subsets of the members by size, as long as they are at most 200; else 200 of them, always the same."""
    random = np.random.RandomState(0)
    found = {}
    for size in range(1, members + 1):
        if math.comb(members, size) <= MAX_SUBSETS:
            found[size] = list(itertools.combinations(range(members), size))
        else:
            drawn: set[tuple[int, ...]] = set()
            while len(drawn) < MAX_SUBSETS:
                drawn.add(tuple(sorted(random.permutation(members)[:size].tolist())))
            found[size] = sorted(drawn)
    return found
