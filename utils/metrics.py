"""Per-sample columns of predicted probabilities, the scores that derive from them, calibration, and intervals.

log_probs [N, C] are natural logarithms of probabilities, labels int64 [N]. Every score is a sum over samples that is
divided once.
"""

import base64
import functools
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import scipy  # its submodules are loaded when they are used: scipy.stats alone takes half a second
import torch
from torch import Tensor

# The scores that tell other data from test images, and what is said of each, by their names in a result.
OOD_SCORES = {"max_probability": "maximum probability", "entropy": "entropy"}
OOD_SCORES |= {"mutual_information": "mutual information", "energy": "energy"}
OOD_METRICS = {"auroc": "AUROC", "aupr": "AUPR", "fpr95": "FPR95"}
SMALLEST = 1e-100  # avoids 0 / 0
MAX_KEPT = 2**24  # bytes of the counts of resamples that are kept
MAX_COUNTS = 2**24  # bytes of unpacked counts: a text may hold a thousand times its own size


def ensemble_log_probs(log_probs: Tensor, average: str = "probs") -> Tensor:
    """Log-probabilities of an ensemble, [M, N, C] -> [N, C].

    Args:
        log_probs: of the members.
        average: `probs`, the log of the mean probability, logsumexp over members minus log M; or `logits`, the softmax
            of the mean logit (the normalised geometric mean of the probabilities; log-probabilities serve as logits).
    """
    if average == "logits":
        return torch.log_softmax(log_probs.mean(dim=0), dim=1)
    return torch.logsumexp(log_probs, dim=0) - math.log(len(log_probs))


def predictive_entropy(probs: Tensor) -> Tensor:
    """H(p) = -sum_c p_c log p_c of each sample, in nats: [..., N, C] -> [..., N]. 0 log 0 counts 0."""
    # Not torch.special.entr, which torch 2.11 cannot write as ONNX; 0 less the sum, since -0.0 would be printed so.
    return 0 - torch.xlogy(probs, probs).sum(dim=-1)


def mutual_information(member_probs: Tensor) -> Tensor:
    """H(mean_m p_m) - mean_m H(p_m) of each sample, in nats: [M, N, C] -> [N], 0 to log M.

    The members' disagreement as probabilities, of the entropy of their mean: 0 for one member or members that agree.
    Rounding that would make it negative is cut off.

    Source: Depeweg et al., "Decomposition of uncertainty in Bayesian deep learning", ICML 2018; Houlsby et al., 2011.
    """
    entropies = predictive_entropy(member_probs).mean(dim=0)
    return (predictive_entropy(member_probs.mean(dim=0)) - entropies).clamp(min=0)


def per_sample(log_probs: Tensor, labels: Tensor, probs: Tensor | None = None) -> dict[str, Tensor]:
    """What every score is a mean of, by sample.

    Args:
        log_probs: [..., N, C], for instance of members and samples.
        labels: int64 [N].
        probs: their exponentials in float64, where these have been computed.

    Returns:
        float64 [..., N] each: `correct`, 1 where the largest probability is the label's; `nll`, -log p(label) in nats;
        `brier`, sum_c (p_c - 1[c = label])^2, 0 to 2 (Brier, 1950); `confidence`, the largest probability.
    """
    log_probs = log_probs.double()
    index = labels.expand(log_probs.shape[:-1])[..., None]
    return columns_of(log_probs.exp() if probs is None else probs, -log_probs.gather(-1, index)[..., 0], labels)


def columns_of(probs: Tensor, nll: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """`per_sample` from probabilities [..., N, C] and NLL [..., N], for which a probability may be too small."""
    confidence, prediction = probs.max(dim=-1)
    return {
        "correct": (prediction == labels).double(),
        "nll": nll,
        "brier": torch.linalg.vecdot(probs, probs) - 2 * torch.exp(-nll) + 1,
        "confidence": confidence,
    }


def accuracy(log_probs: Tensor, labels: Tensor) -> float:
    """Share of samples whose largest entry is at the label, 0 to 1."""
    return per_sample(log_probs, labels)["correct"].mean().item()


def negative_log_likelihood(log_probs: Tensor, labels: Tensor) -> float:
    """Mean over samples of -log p(label), in nats."""
    return per_sample(log_probs, labels)["nll"].mean().item()


def expected_calibration_error(probs: Tensor, labels: Tensor, n_bins: int = 15) -> float:
    """sum_b (N_b / N) |accuracy(b) - confidence(b)| over equal-width bins of the largest probability, 0 to 1.

    Bin b of n holds confidences in [b/n, (b+1)/n), the last one also 1; empty bins count nothing.

    Args:
        probs: probabilities [N, C] (not logarithms).
        labels: int64 [N].
        n_bins: number of bins.

    Raises:
        ValueError: if an entry is not in [0, 1] or n_bins is below 1.

    Source: Naeini et al., AAAI 2015; Guo et al., ICML 2017, with 15 bins.
    """
    if n_bins < 1:
        raise ValueError(f"n_bins: expected 1 or more, got {n_bins}")
    if not len(probs) or not (probs.amin() >= 0 and probs.amax() <= 1 + 1e-6):
        raise ValueError("probs: expected numbers from 0 to 1, in one row or more")
    confidence, prediction = probs.double().max(dim=1)
    gap = (prediction == labels).double() - confidence
    sums = torch.zeros(n_bins, dtype=torch.float64).index_add_(0, calibration_bins(confidence, n_bins), gap)
    return sums.abs().sum().item() / len(probs)


def calibration_mse(
    confidence: Tensor, correct: Tensor, n_bins: int = 15, level: float = 0.95
) -> tuple[float, list[float]]:
    """Mean square calibration error without the bias of few samples, and its interval.

    sum_b (N_b / N) m_b^2, m_b the mean of correct less confidence in bin b of `expected_calibration_error`, whose root
    (RMSCE) that error is never above. The square of a sample mean is too large by its variance: here m_b^2 is estimated
    by the mean product of two different samples of the bin, which is unbiased, and below 0 at times. The interval holds
    each q of 0 or more from which the estimate is no further than the normal quantile times its standard error at q,
    sqrt(A + C q + D q^2): A from pairs of samples where all m_b are 0, C and D from the linear part.

    Args:
        confidence: the largest probability, [N], 0 to 1.
        correct: 1 where it is the label's, else 0, [N].
        n_bins: number of bins.
        level: of the interval.

    Returns:
        The estimate, at most 1, and its interval over new samples, from 0 to 1.

    Source: Kumar, Liang and Ma, "Verified uncertainty calibration", NeurIPS 2019; Broecker, "Estimating reliability
    and resolution of probability forecasts through decomposition of the empirical score", Climate Dynamics 2012.
    """
    bins, gap = calibration_bins(confidence, n_bins), correct.double() - confidence.double()
    counts, sums, squares = (
        torch.zeros(n_bins, dtype=torch.float64).index_add_(0, bins, values)
        for values in (torch.ones_like(gap), gap, gap.square())
    )
    several = counts > 1
    counts, sums, squares = counts[several], sums[several], squares[several]
    samples, share = len(gap), counts / len(gap)
    pairs = counts * (counts - 1)
    square = (share * (sums.square() - squares) / pairs).sum().item()
    at_zero = 2 * (share.square() * (squares / counts).square() / pairs).sum().item()
    weight = share * (sums / counts).square()
    variance = (squares - sums.square() / counts) / (counts - 1)
    total = max(weight.sum().item(), SMALLEST)
    linear = 4 * max((share * squares / counts).sum().item(), (weight * variance).sum().item() / total) / samples
    spread = ((weight * (sums / counts).square()).sum().item() / total**2 - 1) / samples
    # (square - q)^2 = z^2 (at_zero + linear q + spread q^2)
    z = scipy.special.ndtri((1 + level) / 2) ** 2
    a, b = 1 - z * min(max(spread, 0.0), 0.2), 2 * square + z * linear
    root = math.sqrt(max(b * b - 4 * a * (square**2 - z * at_zero), 0.0))
    return square, [max((b + sign * root) / (2 * a), 0.0) for sign in (-1, 1)]


def reliability(columns: dict[str, Tensor], n_bins: int) -> dict[str, list[float]]:
    """The reliability diagram: sums over each bin of `expected_calibration_error`, divided by the number of samples.

    So divided, their means over parts are those of all samples.

    Args:
        columns: of `per_sample`, [N] each.
        n_bins: number of bins.

    Returns:
        `share`, `correct` and `confidence`, [n_bins] each: of samples, of right ones, of their confidences. Accuracy
        and mean confidence of a bin are the latter two divided by its share.

    Source: Niculescu-Mizil and Caruana, ICML 2005; Guo et al., ICML 2017.
    """
    bins, samples = calibration_bins(columns["confidence"], n_bins), len(columns["confidence"])
    parts = {"share": torch.ones(samples), "correct": columns["correct"], "confidence": columns["confidence"]}
    return {
        name: (torch.zeros(n_bins, dtype=torch.float64).index_add_(0, bins, part.double()) / samples).tolist()
        for name, part in parts.items()
    }


def calibration_gaps(columns: dict[str, Tensor], n_bins: int) -> Tensor:
    """Of each sample, correct less confidence in the column of its bin: [N, n_bins].

    The sum over bins of the absolute column means is the `expected_calibration_error`, of resampled ones too.
    """
    confidence = columns["confidence"]
    gaps = torch.zeros(len(confidence), n_bins, dtype=torch.float64)
    gaps[torch.arange(len(gaps)), calibration_bins(confidence, n_bins)] = columns["correct"] - confidence
    return gaps


def scores(columns: dict[str, Tensor], probs: Tensor, labels: Tensor, n_bins: int) -> dict[str, float]:
    """Accuracy, NLL, Brier score, ECE and `calibration_mse` of probabilities [N, C], whose columns are at hand."""
    return {
        "accuracy": columns["correct"].mean().item(),
        "nll": columns["nll"].mean().item(),
        "brier": columns["brier"].mean().item(),
        "ece": expected_calibration_error(probs, labels, n_bins),
        "calibration_mse": calibration_mse(columns["confidence"], columns["correct"], n_bins)[0],
    }


def calibration_bins(confidence: Tensor, n_bins: int) -> Tensor:
    """The bin of each confidence, int64 [N]: that b with b/n <= confidence < (b+1)/n; the last bin holds 1 too."""
    borders = torch.arange(1, n_bins, dtype=torch.float64) / n_bins
    return torch.bucketize(confidence.double(), borders, right=True)


def fit_temperature(log_probs: Tensor, labels: Tensor) -> float:
    """The T > 0 for which softmax(log p / T) has the smallest negative log-likelihood.

    Since softmax ignores shifts, log-probabilities serve as logits. For an ensemble, pass those of its mean: it is
    calibrated after averaging. The loss is convex in 1/T; T is searched from 0.01 to 100. Where all predictions are
    correct, the loss keeps falling as T goes to 0 and says nothing about other samples: then T is 1.

    Source: Guo et al., "On calibration of modern neural networks", ICML 2017.
    """
    logits = log_probs.double()
    if accuracy(log_probs, labels) == 1:
        return 1.0

    def loss(log_inverse: float) -> float:
        scaled = torch.log_softmax(math.exp(log_inverse) * logits, dim=1)
        return -scaled.gather(1, labels[:, None]).mean().item()

    # Convex in 1/T, and therefore with one minimum in log(1/T) as well.
    found = scipy.optimize.minimize_scalar(
        loss, bounds=(-math.log(100), math.log(100)), method="bounded", options={"xatol": 1e-6}
    )
    return float(np.exp(-found.x))


def with_temperature(log_probs: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of softmax(log p / T)."""
    return torch.log_softmax(log_probs.double() / temperature, dim=1)


def out_of_distribution(scores_in: Tensor, scores_out: Tensor) -> dict[str, float]:
    """How well a score tells images of other data, which are the positive class, from test images.

    Args:
        scores_in: of the test images, [N]; higher stands for out of distribution.
        scores_out: of the images of other data, [K].

    Returns:
        `auroc`, the probability that the score of another image is above that of a test image, equal ones counting
        half; `aupr`, the average precision, sum_t (R_t - R_(t-1)) P_t over falling thresholds t, K / (N + K) for a
        score that says nothing; `fpr95`, the smallest share of the test images at or above a threshold that 95 % or
        more of the other images reach. All are from 0 to 1. Equal scores share a threshold: no order among them counts.

    Raises:
        ValueError: for no scores, or some that are not finite.

    Source: Hendrycks and Gimpel, ICLR 2017; Hendrycks, Mazeika and Dietterich, "Deep anomaly detection with outlier
    exposure", ICLR 2019, where other data are the positive class too (in others, such as ODIN, test images are).
    """
    from sklearn import metrics  # whose import takes more than a second

    inside, outside = (_finite(*named) for named in (("scores_in", scores_in), ("scores_out", scores_out)))
    scores, is_out = np.concatenate([inside, outside]), np.repeat([0, 1], [len(inside), len(outside)])
    false, true, _ = metrics.roc_curve(is_out, scores, drop_intermediate=False)
    return {
        "auroc": float(metrics.auc(false, true)),
        "aupr": min(float(metrics.average_precision_score(is_out, scores)), 1.0),  # which rounding can exceed
        "fpr95": float(false[true >= 0.95].min()),
    }


def out_of_distribution_influence(scores_in: Tensor, scores_out: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By how much each image moves the numbers of `out_of_distribution`, to first order: float64 [N] and [K] of each.

    The derivative of the number by the image's weight among its own kind; both sum to 0. The sum of their squares is
    the variance of the number over new images: of `auroc` DeLong's, up to (N - 1) / N. `fpr95` moves with the slope of
    the ROC curve there, which is taken between 1.96 standard errors of 0.95 to either side.

    Source: DeLong, DeLong and Clarke-Pearson, Biometrics 1988; Efron, "The jackknife, the bootstrap and other
    resampling plans", 1982, chapter 6; of quantiles, McKean and Schrader, Communications in Statistics 1984.
    """
    inside, outside = (_finite(*named) for named in (("scores_in", scores_in), ("scores_out", scores_out)))
    low, high, n, k = np.sort(inside), np.sort(outside), len(inside), len(outside)

    def ranks(values: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.searchsorted(among, values, "left"), np.searchsorted(among, values, "right")

    below_in, below_out = (sum(ranks(*pair)) / 2 for pair in ((outside, low), (inside, high)))
    found = {"auroc": ((1 - below_out / k) / n, below_in / n / k)}

    # Of each other image: how many of both kinds reach its score; their derivatives are summed over lower thresholds.
    true, false = k - ranks(high, high)[0], n - ranks(high, low)[0]
    lost, gained = (np.append(0, np.cumsum(part / (true + false) ** 2)) / k for part in (true, false))
    precision = (true / (true + false))[ranks(outside, high)[0]]
    found["aupr"] = (-lost[ranks(inside, high)[1]], precision / k + gained[ranks(outside, high)[1]])

    step = 1.96 * math.sqrt(0.95 * 0.05 / k)
    shares = [max(0.95 - step, 0.0), 0.95, min(0.95 + step, 1.0)]
    edges = [high[k - max(math.ceil(share * k - 1e-9), 1)] for share in shares]  # which these shares reach
    fewer, _, more = (np.mean(inside >= edge) for edge in edges)
    slope = (more - fewer) / (shares[2] - shares[0])
    found["fpr95"] = ((inside >= edges[1]) / n, -slope * (outside >= edges[1]) / k)
    return {
        name: tuple(torch.from_numpy(part - part.mean()) for part in map(np.asarray, both))
        for name, both in found.items()
    }


def out_of_distribution_columns(
    values: dict[str, float], scores_in: Tensor, scores_out: Tensor, paired: bool = False
) -> dict[str, Tensor]:
    """Columns by image whose means are the numbers of `out_of_distribution`, and the intervals of these means theirs.

    Args:
        values: of `out_of_distribution` for these scores.
        scores_in, scores_out: [N] and [K].
        paired: the other images are copies of the first K test images, one image in two forms.

    Returns:
        float64 [N + K] of each number, the test images first; [N] if paired.
    """
    columns = {}
    for name, (inside, outside) in out_of_distribution_influence(scores_in, scores_out).items():
        moves = torch.cat([inside, outside])
        if paired:
            moves = inside.clone()
            moves[: len(outside)] += outside
        columns[name] = values[name] + len(moves) * moves
    return columns


def _finite(name: str, scores: Tensor) -> np.ndarray:
    values = torch.as_tensor(scores).double().numpy()
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"{name}: expected one finite number or more in a row, got {list(values.shape)}")
    return values


def risk_coverage(confidence: Tensor, correct: Tensor) -> dict[str, Any]:
    """The error among the most confident part of the samples, against the size of that part.

    The risk at coverage i / N is the share of errors among the i most confident samples. Among samples of equal
    confidence no order is known: it is the expected one over all of them, so that a group of g of which e are wrong
    counts e / g errors for each. AURC is the mean of the N risks; the excess is what it has above the least possible of
    as many errors, where these come last: 0 for a confidence that separates right from wrong.

    Args:
        confidence: of the prediction, [N]; only its order matters.
        correct: 1 where the prediction is right, else 0, [N].

    Returns:
        `aurc`, 0 to 1; `excess_aurc`; `coverage` and `risk`, float64 [N].

    Raises:
        ValueError: for no samples, or a confidence that is not finite.

    Source: Geifman and El-Yaniv, "Selective classification for deep neural networks", NeurIPS 2017; Geifman, Uziel and
    El-Yaniv, "Bias-reduced uncertainty estimation for deep neural classifiers", ICLR 2019 (AURC and excess AURC).
    """
    confidence, wrong = _finite("confidence", confidence), 1 - _finite("correct", correct)
    order = np.argsort(-confidence, kind="stable")
    _, group, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    expected = (np.bincount(group, wrong) / sizes)[group[order]]
    count = np.arange(1, len(wrong) + 1)
    risk = np.cumsum(expected) / count
    least = np.maximum(count - (len(wrong) - wrong.sum()), 0) / count
    aurc = float(risk.mean())
    whole = {"coverage": torch.from_numpy(count / len(wrong)), "risk": torch.from_numpy(risk)}
    return {"aurc": aurc, "excess_aurc": max(aurc - float(least.mean()), 0.0), **whole}


def aurc_influence(confidence: Tensor, correct: Tensor) -> Tensor:
    """By how much each sample moves the AURC of `risk_coverage`, to first order: float64 [N], whose sum is 0.

    The derivative by the sample's weight, as of `out_of_distribution_influence`; a sample among g of equal confidence
    is at the place of each of them with probability 1 / g.
    """
    confidence, wrong = _finite("confidence", confidence), 1 - _finite("correct", correct)
    risk = risk_coverage(torch.from_numpy(confidence), torch.from_numpy(1 - wrong))["risk"].numpy()
    order, count = np.argsort(-confidence, kind="stable"), np.arange(1, len(wrong) + 1)
    _, group, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    # A sample at place i adds (wrong - risk_j) / j to each risk_j from there on.
    ones, risks = (np.cumsum((part / count)[::-1])[::-1] for part in (np.ones_like(risk), risk))
    at, ones, risks = (np.bincount(group[order], part) / sizes for part in (risk, ones, risks))
    moves = (at[group] + wrong * ones[group] - risks[group]) / len(wrong)
    return torch.from_numpy(moves - moves.mean())


def bootstrap_means(values: Tensor, draws: int, seed: int = 0) -> Tensor:
    """Means over resamples of the samples with replacement: [N, ...] -> float64 [B, ...].

    The same number of samples, draws and seed give the same resamples, so that scores of the same samples can be
    compared draw by draw.
    """
    samples, values = len(values), values.double()
    counts = _kept_counts if samples * draws <= MAX_KEPT else bootstrap_counts
    means = [block.double().div_(samples) @ values for block in counts(samples, draws, seed)]
    return torch.cat([torch.zeros(0, *values.shape[1:], dtype=torch.float64), *means])


def bootstrap_counts(samples: int, draws: int, seed: int = 0) -> Iterator[Tensor]:
    """How often each sample is drawn in each resample: uint8 [B, N], in blocks of at most 4 MB (32 in float64)."""
    random = np.random.RandomState(seed)
    size = max(2**22 // samples, 1)
    for start in range(0, draws, size):
        block = torch.empty(min(size, draws - start), samples, dtype=torch.uint8)
        for row in block.numpy():  # a count above 255 has a probability below 1e-500
            row[:] = np.bincount(random.randint(0, samples, samples), minlength=samples)
        yield block


@functools.lru_cache(maxsize=2)
def _kept_counts(samples: int, draws: int, seed: int) -> list[Tensor]:
    """`bootstrap_counts` for the next call: drawing costs more than the product."""
    return list(bootstrap_counts(samples, draws, seed))


def percentile_interval(draws: Tensor, level: float = 0.95) -> list[float] | None:
    """The percentile interval of bootstrap draws; None without draws, or where one is not finite (a ratio to 0)."""
    if not len(draws) or not bool(draws.isfinite().all()):
        return None
    edge = (1 - level) / 2
    return torch.quantile(draws, torch.tensor([edge, 1 - edge], dtype=draws.dtype)).tolist()


def corrected_interval(value: float, draws: Tensor, level: float = 0.95) -> list[float] | None:
    """The basic bootstrap interval [2 v - q_high, 2 v - q_low] of a value v of 0 or more; q: percentiles of its draws.

    For a score that resampling pushes upwards, such as the calibration error, whose percentile interval can lie above
    the score itself. Where a model is almost perfectly calibrated, no interval of this kind covers at its level.

    Source: Davison and Hinkley, "Bootstrap methods and their application", 1997, section 5.2.
    """
    interval = percentile_interval(draws, level)
    return None if interval is None else [max(2 * value - edge, 0.0) for edge in reversed(interval)]


def paired_bootstrap(difference: Tensor, level: float = 0.95, draws: int = 2000, seed: int = 0) -> list[float]:
    """The percentile interval of the mean of a difference of two models, [N], over resampled test samples."""
    return percentile_interval(bootstrap_means(difference, draws, seed), level)


def t_interval(values: Sequence[float] | Tensor, level: float = 0.95) -> list[float] | None:
    """Student's interval of the mean of independent values; None for fewer than two."""
    if len(values) < 2:
        return None
    return _interval(torch.as_tensor(values, dtype=torch.float64), level)


def crossed_interval(values: Tensor, level: float = 0.95) -> list[float]:
    """The interval of the mean of [E, N] values of E ensembles on the same N images, both of them random.

    Student's interval over ensembles holds the images fixed, and one over images the ensembles; more of the one do not
    make up for few of the other. The variance of the mean is that of a crossed design,
    s_E^2 / E + s_N^2 / N - s_R^2 / (E N), of the row means, the column means and the residuals of both, with
    Satterthwaite's degrees of freedom. With few ensembles this interval alone is too short where both populations
    matter (87 % instead of 95 % at two), so the widest of it and the two one-way intervals is returned. It covers 94 %
    or more for 2 to 10 ensembles; where the residuals dominate and ensembles are few, up to 99 %.

    Args:
        values: [E, N], both of 2 or more; of a difference of two methods, the difference by ensemble and image.

    Source: Searle, Casella and McCulloch, "Variance components", 1992, chapter 4; Satterthwaite, Biometrics 1946.
    """
    return _interval(values.double(), level)


def p_value(values: Tensor) -> float:
    """The largest p for which the interval of level 1 - p of the mean of values holds 0.

    Args:
        values: [E, N], whose interval is the `crossed_interval`; or [E], whose interval is Student's.
    """
    mean, errors, degrees = _standard_errors(values.double())
    if not errors.any():
        return float(mean == 0)
    return float((2 * scipy.special.stdtr(degrees, -abs(mean) / np.maximum(errors, SMALLEST))).max())


def _interval(values: Tensor, level: float) -> list[float]:
    mean, errors, degrees = _standard_errors(values)
    half = float((scipy.special.stdtrit(degrees, (1 + level) / 2) * errors).max())
    return [mean - half, mean + half]


def _standard_errors(values: Tensor) -> tuple[float, np.ndarray, np.ndarray]:
    """The mean of float64 values, its standard errors, and the degrees of freedom of their t distributions.

    Of [E], Student's alone; of [E, N], the three of `crossed_interval`: crossed, over rows, over columns.
    """
    if values.dim() == 1:
        return (
            values.mean().item(),
            np.array([values.std().item() / math.sqrt(len(values))]),
            np.array([len(values) - 1]),
        )
    ensembles, images = values.shape
    rows, columns, mean = values.mean(dim=1), values.mean(dim=0), values.mean()
    residuals = values - rows[:, None] - columns + mean
    freedom = np.array([ensembles - 1, images - 1, (ensembles - 1) * (images - 1)])
    by_row, by_column, residual = terms = np.array(
        [
            (rows.var() / ensembles).item(),
            (columns.var() / images).item(),
            (residuals.square().sum() / freedom[2] / (ensembles * images)).item(),
        ]
    )
    crossed = max(by_row + by_column - residual, by_row, by_column)
    satterthwaite = crossed**2 / (terms**2 / freedom).sum() if crossed else 1.0
    return mean.item(), np.sqrt([crossed, by_row, by_column]), np.array([satterthwaite, *freedom[:2]])


def pack_counts(counts: np.ndarray) -> str:
    """Counts of samples, [N] and below 65,536, as text for a JSON file: base64 of the deflated uint16."""
    return _pack(counts, "<u2")


def unpack_counts(text: str) -> np.ndarray:
    """Counts int64 [N] from `pack_counts`.

    Raises:
        ValueError: if it is not such a text.
    """
    return _unpack(text, "<u2").astype(np.int64)


def pack_values(values: np.ndarray) -> str:
    """Values of samples, [N], as text for a JSON file, rounded to float16: to 0.05 %, and at most 65,504."""
    largest = np.finfo(np.float16).max
    return _pack(np.clip(values, -largest, largest), "<f2")


def unpack_values(text: str) -> np.ndarray:
    """Values float64 [N] from `pack_values`.

    Raises:
        ValueError: if it is not such a text.
    """
    return _unpack(text, "<f2").astype(np.float64)


def _pack(array: np.ndarray, kind: str) -> str:
    return base64.b64encode(zlib.compress(np.asarray(array).astype(kind).tobytes())).decode()


def _unpack(text: str, kind: str) -> np.ndarray:
    try:
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(base64.b64decode(text, validate=True), MAX_COUNTS)
        if not unpacker.eof:
            raise ValueError("truncated, or too many")
        return np.frombuffer(content, dtype=kind)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"not packed numbers of samples ({error})") from error


def mean_of(values: list) -> Any:
    """The mean of nested dicts and lists of the same form, number by number; None where a number is missing."""
    first = values[0]
    if isinstance(first, dict):
        return {key: mean_of([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [mean_of(list(column)) for column in zip(*values, strict=True)]
    return None if any(value is None for value in values) else sum(values) / len(values)
