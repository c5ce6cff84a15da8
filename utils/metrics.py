"""Accuracy, likelihood and calibration of predicted probabilities, all from log-probabilities.

Arguments: log_probs [N, C], natural logarithms of probabilities; labels int64 [N]. Every figure is a sum over samples
that is divided once.
"""

import base64
import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats
from scipy.optimize import minimize_scalar
from torch import Tensor

MOST_COUNTS = 2**24  # bytes of unpacked counts: a text may hold a thousand times its own size


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


def accuracy(log_probs: Tensor, labels: Tensor) -> float:
    """Share of samples whose largest entry is at the label, 0 to 1."""
    return (log_probs.argmax(dim=1) == labels).double().mean().item()


def negative_log_likelihood(log_probs: Tensor, labels: Tensor) -> float:
    """Mean over samples of -log p(label), in nats."""
    return -log_probs.double().gather(1, labels[:, None]).mean().item()


def brier_score(log_probs: Tensor, labels: Tensor) -> float:
    """Mean over samples of sum_c (p_c - 1[c = label])^2 = sum_c p_c^2 - 2 p_label + 1, 0 to 2 (Brier, 1950)."""
    probs = log_probs.double().exp()
    return (probs.square().sum(1) - 2 * probs.gather(1, labels[:, None])[:, 0] + 1).mean().item()


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
        raise ValueError(f"n_bins: {n_bins} given, 1 or more is needed")
    if not len(probs) or not bool(((probs >= 0) & (probs <= 1 + 1e-6)).all()):
        raise ValueError("probs: numbers from 0 to 1 are needed, at least one row")
    confidence, prediction = probs.double().max(dim=1)
    gap = (prediction == labels).double() - confidence
    sums = torch.zeros(n_bins, dtype=torch.float64).index_add_(0, calibration_bins(confidence, n_bins), gap)
    return sums.abs().sum().item() / len(probs)


def calibration_bins(confidence: Tensor, n_bins: int) -> Tensor:
    """The bin of each confidence, int64 [N]: that b with b/n <= confidence < (b+1)/n; the last bin holds 1 too."""
    borders = torch.arange(1, n_bins, dtype=torch.float64) / n_bins
    return torch.bucketize(confidence.double(), borders, right=True)


def fit_temperature(log_probs: Tensor, labels: Tensor) -> float:
    """The T > 0 for which softmax(log p / T) has the smallest negative log-likelihood.

    Since softmax ignores shifts, log-probabilities serve as logits. For an ensemble, pass those of its mean: it is
    calibrated after averaging. The loss is convex in 1/T; T is searched from 0.01 to 100. Where all predictions are
    right, the loss falls for ever as T goes to 0 and says nothing of other samples: then T is 1.

    Source: Guo et al., "On calibration of modern neural networks", ICML 2017.
    """
    scores = log_probs.double()
    if accuracy(log_probs, labels) == 1:
        return 1.0

    def loss(log_inverse: float) -> float:
        return negative_log_likelihood(torch.log_softmax(math.exp(log_inverse) * scores, dim=1), labels)

    # Convex in 1/T, and therefore with one minimum in log(1/T) as well.
    found = minimize_scalar(loss, bounds=(-math.log(100), math.log(100)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(-found.x))


def with_temperature(log_probs: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of softmax(log p / T)."""
    return torch.log_softmax(log_probs.double() / temperature, dim=1)


def bootstrap_weights(samples: int, draws: int, seed: int = 0) -> Tensor:
    """How often each sample is drawn in each resample with replacement, over the number of samples: float64 [B, N].

    A row times a column of per-sample values is a resampled mean. The same seed gives the same resamples, so that
    figures of the same samples can be compared pair by pair.
    """
    random = np.random.RandomState(seed)
    rows = [np.bincount(random.randint(0, samples, samples), minlength=samples) for _ in range(draws)]
    return torch.from_numpy(np.stack(rows) / samples) if rows else torch.zeros(0, samples, dtype=torch.float64)


def percentile_interval(draws: Tensor, level: float = 0.95) -> list[float] | None:
    """The percentile interval of bootstrap draws; None without draws, or where one is not finite (a ratio to 0)."""
    if not len(draws) or not bool(draws.isfinite().all()):
        return None
    edge = (1 - level) / 2
    return torch.quantile(draws, torch.tensor([edge, 1 - edge], dtype=draws.dtype)).tolist()


def corrected_interval(value: float, draws: Tensor, level: float = 0.95) -> list[float] | None:
    """The basic bootstrap interval [2 v - q_high, 2 v - q_low] of a value v of 0 or more; q: percentiles of its draws.

    For a figure that resampling pushes upwards, as it does the calibration error, whose percentile interval can lie
    above the figure itself. Where a model is calibrated all but perfectly no interval of this kind covers at its level.

    Source: Davison and Hinkley, "Bootstrap methods and their application", 1997, section 5.2.
    """
    interval = percentile_interval(draws, level)
    return None if interval is None else [max(2 * value - edge, 0.0) for edge in reversed(interval)]


def paired_bootstrap(difference: Tensor, level: float = 0.95, draws: int = 2000, seed: int = 0) -> list[float]:
    """The percentile interval of the mean of a difference of two models, [N], over resampled test samples."""
    return percentile_interval(bootstrap_weights(len(difference), draws, seed) @ difference.double(), level)


def t_interval(values: Sequence[float], level: float = 0.95) -> list[float] | None:
    """Student's interval of the mean of independent values; None for fewer than two."""
    if len(values) < 2:
        return None
    mean, error = np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values))
    half = stats.t.ppf((1 + level) / 2, len(values) - 1) * error
    return [float(mean - half), float(mean + half)]


def crossed_interval(values: Tensor, level: float = 0.95) -> list[float]:
    """The interval of the mean of [E, N] values of E ensembles on the same N images, both of them random.

    Student's interval over ensembles holds the images fixed, and one over images the ensembles; more of the one do not
    make up for few of the other. Here the variance of the mean is that of a crossed design,
    s_E^2 / E + s_N^2 / N - s_R^2 / (E N), of the row means, the column means and the residuals of both, and not less
    than either of the first two; the degrees of freedom are Satterthwaite's.

    Args:
        values: [E, N], both of 2 or more; of a difference of two methods, the difference by ensemble and image.

    Source: Searle, Casella and McCulloch, "Variance components", 1992, chapter 4; Satterthwaite, Biometrics 1946.
    """
    values = values.double()
    ensembles, images = values.shape
    rows, columns, mean = values.mean(dim=1), values.mean(dim=0), values.mean()
    residuals = values - rows[:, None] - columns + mean
    freedom = [ensembles - 1, images - 1, (ensembles - 1) * (images - 1)]
    terms = [
        (rows.var() / ensembles).item(),
        (columns.var() / images).item(),
        (residuals.square().sum() / freedom[2] / (ensembles * images)).item(),
    ]
    variance = max(terms[0] + terms[1] - terms[2], terms[0], terms[1])
    spread = sum(term**2 / degrees for term, degrees in zip(terms, freedom, strict=True))
    if not spread:
        return [mean.item()] * 2
    half = stats.t.ppf((1 + level) / 2, variance**2 / spread) * math.sqrt(variance)
    return [mean.item() - half, mean.item() + half]


def pack_counts(counts: np.ndarray) -> str:
    """Counts of samples, [N] and below 65,536, as text for a JSON file: base64 of the deflated uint16."""
    return base64.b64encode(zlib.compress(np.asarray(counts, dtype="<u2").tobytes())).decode()


def unpack_counts(text: str) -> np.ndarray:
    """Counts int64 [N] from `pack_counts`.

    Raises:
        ValueError: if it is not such a text.
    """
    try:
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(base64.b64decode(text, validate=True), MOST_COUNTS)
        if not unpacker.eof:
            raise ValueError("cut off, or too many")
        return np.frombuffer(content, dtype="<u2").astype(np.int64)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"no packed counts ({error})") from error
