"""Images that an ensemble was not trained on, and how well its scores tell them from the test images."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models import expand_user
from utils import InputError, metrics, some
from utils.data import Data, ImageSet, coloured, scaled
from utils.datasets import NAMES, PICTURE_SIZE, corrupted_name, find_corrupted, load_data, note
from utils.distributed import cores
from utils.folder import read_unlabelled, stored_size
from utils.metrics import OOD_METRICS, OOD_SCORES

# What --ood names besides data sets: the corrupted copies of the test images, and pixels that are drawn.
CORRUPTED, NOISE = "corrupted", "noise"
WORDS = (*NAMES, CORRUPTED, NOISE)
NOISE_SEED, MAX_NOISE = 0, 2_000
AT_ONCE = 256  # images that are scaled together
CURVE_POINTS, HISTOGRAM_BINS = 101, 30
# Of one part: numbers by score; and columns [N + K], or [N], by score and number.
Compared = tuple[dict[str, dict[str, Any]], dict[str, dict[str, Tensor]]]


def split_word(text: str) -> tuple[str, Path | None]:
    """A value of --ood, DATA or DATA:PATH, in its two parts.

    Raises:
        ValueError: if DATA is not of `WORDS`, has no path where it needs one or one where it has none, or if the path
            begins with ~NAME and there is no such user.
    """
    name, colon, place = text.partition(":")
    if name not in WORDS:
        raise ValueError(f"expected one of {', '.join(WORDS)}, or one of them with :PATH, got '{text[:80]}'")
    if name == "folder" and not place:
        raise ValueError(f"'{text[:80]}' says no folder; write folder:PATH")
    if name in (CORRUPTED, NOISE, "digits") and colon:
        raise ValueError(f"'{text[:80]}': {name} is not read from a path; write {name}")
    return name, expand_user(place) if place else None


def read_set(name: str, path: Path | None, data: Data, data_path: Path, download: bool = False) -> ImageSet:
    """Images of other data in the form of the run's: of its size and channels, and normalised by its numbers.

    Their test images, or all of a folder that has no test/. The shorter side is scaled to the run's size (linear,
    antialiased), and the middle cut out; grey images become colour ones of three equal channels, colour ones grey by
    Pillow's weights. `noise` is uniform in all numbers of all pixels, from a fixed seed, as many as the test images and
    at most 2,000. Labels are 0.

    Args:
        name: of `WORDS`, but not "corrupted".
        path: of the set; None for the usual places below `data_path`.
        data: of the run.
        data_path: of the run.
        download: fetch a missing set.

    Raises:
        InputError: naming --ood, for the run's own data, and files that are missing or damaged.
    """
    flag, test = f"--ood {name}{'' if path is None else f':{path}'}", data.test
    if name == data.name and name != "folder":
        raise InputError(f"{flag}: is what the members were trained on; name other data, or corrupted, or noise")
    preprocessing, rows = replace(test.preprocessing, size=None), None
    if name == NOISE:
        shape = (min(len(test), MAX_NOISE), test.height, test.width, test.channels)
        images = np.random.RandomState(NOISE_SEED).randint(0, 256, shape, dtype=np.uint8)
    else:
        try:
            if name == "folder":
                size = stored_size(test.height) if test.preprocessing.size else test.height
                images, rows, unreadable = read_unlabelled(path, size, cores())
                preprocessing = test.preprocessing
                if unreadable:
                    files = some([f"{file} ({why})" for file, why in unreadable.items()])
                    note(f"{flag}: {len(unreadable)} files are left out, since they cannot be read: {files}")
                if test.channels == 1:
                    images, rows = fit(images[rows], size, 1), None
            else:
                other = load_data(name, data_path if path is None else path, download=download).test
                images = fit(other.pixels(slice(0, len(other))).numpy(), test.height, test.channels)
        except InputError as error:
            raise InputError(str(error).replace(f"--data_path {data_path if path is None else path}", flag)) from error
    found = ImageSet(
        images, np.zeros(len(images if rows is None else rows), np.int64), preprocessing, test.device, rows
    )
    if name != NOISE:
        _refuse_the_same(flag, found, data)
    return found


def fit(images: np.ndarray, size: int, channels: int) -> np.ndarray:
    """Square images uint8 [N, H, H, C] in another size and number of channels: [N, size, size, channels]."""
    found = np.empty((len(images), size, size, channels), dtype=np.uint8)
    for start in range(0, len(images), AT_ONCE):
        part = torch.from_numpy(np.array(images[start : start + AT_ONCE]))
        found[start : start + AT_ONCE] = scaled(coloured(part, channels), size).numpy()
    return found


def _refuse_the_same(flag: str, found: ImageSet, data: Data) -> None:
    """Refuse images of which all are test images of the run; say so where some are.

    Of those that have a border, files are scaled as pictures without it.
    """
    test = data.test
    border = (test.height - PICTURE_SIZE.get(data.name, test.height)) // 2
    known = {digest for cut in {0, border} for digest in _digests(test, cut)}
    same = sum(digest in known for digest in _digests(found))
    if same == len(found):
        raise InputError(f"{flag}: its images are the test images of the run; name other data")
    if same:
        note(f"{flag}: {same} of its {len(found)} images are test images of the run")


def _digests(images: ImageSet, border: int = 0) -> Iterator[bytes]:
    for start in range(0, len(images), AT_ONCE):
        pixels = images.pixels(slice(start, start + AT_ONCE)).cpu().contiguous().numpy()
        if border:  # by Pillow, as files are scaled, to the bit; the images that have one are grey
            inner, size = pixels[:, border:-border, border:-border, 0], (images.height, images.height)
            pixels = np.stack([Image.fromarray(one).resize(size, Image.Resampling.BILINEAR) for one in inner])
        yield from (hashlib.sha256(image).digest() for image in pixels)


def require_corrupted(data: Data, data_path: Path) -> None:
    """Refuse --ood corrupted where the test images have no corrupted copies."""
    size = data.info.image_size
    if find_corrupted(data.name, data_path, image_size=size) is None:
        title = corrupted_name(data.name, size)
        way_out = "make it by scripts/make_corrupted.py, or leave the word out"
        raise InputError(f"--ood corrupted: no {title}/ in {data_path} or beside the data set; {way_out}")


def scores(logits: Tensor, average: str = "probs") -> dict[str, Tensor]:
    """The scores of `OOD_SCORES` of an ensemble, float64 [N] each.

    `max_probability`, 1 less the largest probability of the ensemble; `entropy` of its probabilities, and
    `mutual_information` between prediction and member, both in nats; `energy`, -log sum_c exp(logit_c), mean over
    members.

    Args:
        logits: [M, N, C].
        average: of the members, as for `utils.metrics.ensemble_log_probs`.

    Source: Hendrycks and Gimpel, ICLR 2017; Lakshminarayanan, Pritzel and Blundell, NeurIPS 2017; Depeweg et al., ICML
    2018; Liu et al., "Energy-based out-of-distribution detection", NeurIPS 2020.
    """
    logits = logits.double()
    log_probs = torch.log_softmax(logits, dim=2)
    output = metrics.ensemble_log_probs(log_probs, average).exp()
    return {
        "max_probability": 1 - output.amax(dim=1),
        "entropy": metrics.predictive_entropy(output),
        "mutual_information": metrics.mutual_information(log_probs.exp()),
        "energy": -torch.logsumexp(logits, dim=2).mean(dim=0),
    }


def largest_scores(members: int, classes: int) -> dict[str, float]:
    """What the scores that begin at 0 can reach."""
    return {
        "max_probability": 1 - 1 / classes,
        "entropy": math.log(classes),
        "mutual_information": math.log(min(members, classes)) or 1.0,
    }


def compare(inside: dict[str, Tensor], outside: dict[str, Tensor], largest: dict[str, float], paired: bool) -> Compared:
    """The numbers of `utils.metrics.out_of_distribution` of each score, what figures show of it, and its columns.

    Args:
        inside: `scores` of the test images.
        outside: of the other images.
        largest: `largest_scores`.
        paired: the others are copies of the first test images.

    Returns:
        By score: `auroc`, `aupr`, `fpr95`; `tpr` at 101 values of the false positive rate from 0 to 1; and `histogram`,
        the shares of test images (`in`) and of others (`out`) in equal bins between two `edges`. Then the columns by
        score and number.
    """
    numbers, columns = {}, {}
    for name, low in inside.items():
        high = outside[name]
        values = metrics.out_of_distribution(low, high)
        columns[name] = metrics.out_of_distribution_columns(values, low, high, paired)
        span = (
            low.max() - low.min()
        ).item() / 2  # of the energy there is no largest: what is beyond is in the end bins
        edges = [0.0, largest[name]] if name in largest else [low.min().item() - span, low.max().item() + span]
        histogram = {"edges": edges} | {kind: _shares(one, edges) for kind, one in (("in", low), ("out", high))}
        numbers[name] = values | {"tpr": _true_positives(low, high), "histogram": histogram}
    return numbers, columns


def _shares(values: Tensor, edges: list[float]) -> list[float]:
    counts, _ = np.histogram(np.clip(values.numpy(), *edges), HISTOGRAM_BINS, edges)
    return (counts / len(values)).round(6).tolist()


def _true_positives(low: Tensor, high: Tensor) -> list[float]:
    """The share of `high` above thresholds that these shares of `low` reach; between them linear, as is their AUROC."""
    from sklearn import metrics as curves

    is_out = np.repeat([0, 1], [len(low), len(high)])
    false, true, _ = curves.roc_curve(is_out, torch.cat([low, high]).numpy())
    return np.interp(np.linspace(0, 1, CURVE_POINTS), false, true).round(6).tolist()


def summarize(parts: list[Compared], about: dict[str, Any]) -> dict[str, Any]:
    """What a result holds of one set, from `compare` of its parts: means over parts, and their intervals over images.

    The intervals are DeLong's, or as his, of the mean of the columns; none where all are alike, as of a score that
    tells everything apart, or nothing; nor are there values by image of parts with different numbers of images.
    """
    if len({len(columns["entropy"]["auroc"]) for _, columns in parts}) > 1:
        none = {score: dict.fromkeys(OOD_METRICS) for score in OOD_SCORES}
        about = about | {"parts": len(parts), "scores": means(parts, curves=True)}
        return about | {"intervals_95": none, "values_of_samples": {}}
    columns: dict[str, dict[str, Tensor]] = {
        score: {name: sum(one[1][score][name] for one in parts) / len(parts) for name in OOD_METRICS}
        for score in OOD_SCORES
    }
    return about | {
        "parts": len(parts),
        "scores": means(parts, curves=True),
        "intervals_95": {score: {n: _interval(column) for n, column in of.items()} for score, of in columns.items()},
        "values_of_samples": {
            score: {name: metrics.pack_values(_rounded(column)) for name, column in of.items()}
            for score, of in columns.items()
        },
    }


def means(parts: list[Compared], curves: bool = False) -> dict[str, Any]:
    """The numbers of each score, means over parts; with `curves` also what figures show."""
    rows = [numbers for numbers, _ in parts]
    if not curves:
        rows = [{score: {name: of[name] for name in OOD_METRICS} for score, of in row.items()} for row in rows]
    return metrics.mean_of(rows)


def _interval(column: Tensor) -> list[float] | None:
    if column.max() - column.min() < 1e-12:
        return None
    return [min(max(edge, 0.0), 1.0) for edge in metrics.t_interval(column) or []] or None


def _rounded(column: Tensor) -> np.ndarray:
    """Values in steps of a 32nd of their deviation or less, which packs well: the variance changes by 1 in 10,000."""
    step = 2.0 ** np.floor(np.log2(max(column.std().item() / 32, 1e-9)))
    return (column.numpy() / step).round() * step
