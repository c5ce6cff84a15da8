"""The numbers of the two figures that are computed from run folders: `landscape` and `sets`.

landscape: the loss around saved members and between them. sets: which training images each member trains with SAM.
"""

import copy
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from models import evaluating
from utils import InputError
from utils.data import Data, ImageSet
from utils.datasets import load_data
from utils.distributed import start_device
from utils.files import load_array, read_json, write_json
from utils.hessian import full_float32, to_float64, top_eigenpairs
from utils.kept import made_by, why_stale
from utils.partition import PARTITION_RULE
from utils.predictions import load_members
from utils.results import Ensemble, check_alike, method_of, read_run, setting_of
from utils.run import current_settings, environment, find_checkpoints

Batches = list[tuple[Tensor, Tensor]]

IMAGES = 500  # of validation for the loss, and as many of training for BatchNorm's statistics
DIRECTIONS = 2  # random directions per member
ALONG = [round(-1 + i / 8, 3) for i in range(17)]
# Along the top eigenvector, scaled to the same length: further out, the loss grows by orders of magnitude.
TOP = [round(-0.02 + i / 400, 4) for i in range(17)]
BETWEEN = [round(i / 12, 4) for i in range(13)]
UNPICKED = {"normal": "no member", "one": "one member each", "others": "all members but one"}
EXAMPLES = 10  # pictures in a row
AGAIN = "draw it again from run folders, to another --to"


def data_of(run: Ensemble, device: torch.device | str = "cpu") -> Data:
    """The data set of a run, read again.

    Raises:
        InputError: if its images or its split are no longer those of the run.
    """
    settings, key = run.content["settings"], "sha256_of_arrays_and_split"
    data_path, *split = (settings[name] for name in ("data_path", "train_idx_path", "val_idx_path"))
    how = {"label_noise": settings["label_noise"] or 0.0, "image_size": settings.get("image_size")}
    data = load_data(settings["data"], data_path, device, *split, **how)
    if data.record[key] != run.content["data"][key]:
        raise InputError(f"{data_path}: its images or split are not those of the run in {run.folder}")
    return data


def compute_landscape(folders: list[Path], path: Path) -> None:
    """Write the losses along directions and between members of run folders, run by run.

    Curves that `path` already holds of the same weights, images, steps, code and device are not computed again, so
    that the same call resumes an interrupted one. The file holds `about` (images, steps) and, for each run, its
    settings and, by the digests of weights, `along` (a curve for each random direction), `top` (see `along_top`) and
    `between`; and in `made_by` what made each curve.

    Raises:
        InputError: naming the run that is not readable or differs from the others in data or network.
    """
    runs = [read_run(folder) for folder in folders]
    check_alike(runs)
    device = start_device("auto", None)
    data = data_of(runs[0], device)
    batches, training = subset(data.val), subset(data.train)
    images, training_images = (sum(len(labels) for _, labels in part) for part in (batches, training))
    digest = data.record["sha256_of_arrays_and_split"]
    about = {"images": images, "training_images": training_images, "sha256_of_data": digest, "directions": DIRECTIONS}
    about |= {"along": ALONG, "between": BETWEEN, "top": TOP}
    here = environment(device)
    before = _curves_of(path, about, here)
    members = [load_members(find_checkpoints([run.folder], "best")) for run in runs]
    total = sum(len(m) * (len(m) + 1) // 2 for m in members)
    content: dict[str, Any] = {"about": about, "runs": []}
    without: dict[str, None] = {}

    def keep(row: dict[str, Any], kind: str, key: str, compute: Callable[[], Any]) -> None:
        known, record = before[kind].get(key) or (None, made_by(kind, here))
        row[kind][key] = known or compute()
        row["made_by"][kind][key] = record
        bar.update(kind != "top")

    with tqdm(total=total, desc="landscape", unit="curve", delay=5, disable=None, dynamic_ncols=True) as bar:
        for run, members_of_run in zip(runs, members, strict=True):
            row: dict[str, Any] = {"folder": str(run.folder), "along": {}, "between": {}, "top": {}}
            row["made_by"] = {"along": {}, "between": {}, "top": {}}
            row |= {key: run.content[key] for key in ("trained", "network", "data")}
            content["runs"].append(row)
            for member in members_of_run:
                model = member.model.to(device)
                keep(row, "along", member.digest, partial(along_random, model, batches))
                try:
                    keep(row, "top", member.digest, partial(along_top, model, batches))
                except InputError as error:  # of a layer without a second derivative: the other panels need none
                    without.setdefault(str(error).partition(";")[0])
            for a, b in itertools.combinations(members_of_run, 2):
                compute = partial(losses_between, a.model, b.model, BETWEEN, batches, training)
                keep(row, "between", f"{a.digest} {b.digest}", compute)
            write_json(path, content)
    for reason in without:
        print(f"note: {path}: without the top eigenvector; {reason}", file=sys.stderr)


def read_landscape(path: Path) -> list[Ensemble]:
    """The ensembles of a file of `compute_landscape`; the content of each is its row, with `about` of the file.

    Raises:
        InputError: if it is no such file.
    """
    content, ensembles = read_json(path, AGAIN), []
    try:
        for row in content["runs"]:
            made = {kind: dict(records) for kind, records in row.get("made_by", {}).items()}
            row |= {"about": content["about"], "trained": current_settings(row["trained"]), "made_by": made}
            method, seeds = method_of(row["trained"]), tuple(row["trained"]["seed"])
            ensembles.append(Ensemble(Path(row["folder"]), method, seeds, content=row))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the numbers of a landscape; {AGAIN}") from error
    return ensembles


def _curves_of(path: Path, about: dict[str, Any], here: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The curves that a file holds of these images and steps, with what made them, by the digests of the weights.

    Those that other code or another device than `here` made are left out, and one line says so.
    """
    curves: dict[str, dict[str, Any]] = {"along": {}, "between": {}, "top": {}}
    stale: list[str] = []
    if path.is_file():
        without_top = {key: value for key, value in about.items() if key != "top"}  # as an earlier version wrote it
        alike = [run.content for run in read_landscape(path) if run.content["about"] in (about, without_top)]
        for kind, (content, found) in itertools.product(curves, [(one, one["made_by"]) for one in alike]):
            for key, curve in content.get(kind, {}).items():
                record = found.get(kind, {}).get(key)
                if why := why_stale(kind, record, here):
                    stale.append(f"{kind} was computed {why}")
                else:
                    curves[kind][key] = curve, record
    if stale:
        print(f"note: {path}: {stale[0]}; computed anew ({len(stale)} such curves)", file=sys.stderr)
    return curves


def subset(images: ImageSet) -> Batches:
    """Batches of up to `IMAGES` images, always the same ones, without augmentation."""
    index = np.random.RandomState(0).permutation(len(images))[:IMAGES]
    return [images.batch(index[i : i + 250]) for i in range(0, len(index), 250)]


def along_random(model: nn.Module, batches: Batches) -> list[list[float]]:
    """The losses along each of the random directions, which before their scaling are the same for all models."""
    generator = torch.Generator().manual_seed(0)
    return [losses_along(model, random_direction(model, generator), ALONG, batches) for _ in range(DIRECTIONS)]


def along_top(model: nn.Module, batches: Batches) -> dict[str, Any]:
    """The losses along the top eigenvector of the Hessian, the higher side last, with what scales its curvature."""
    direction, eigenvalue, length = top_direction(model, batches)
    losses = losses_along(model, direction, TOP, batches)
    # An eigenvector has no sign: without a choice, a mean over members would mix up its sides.
    losses = losses if losses[-1] >= losses[0] else losses[::-1]
    return {"eigenvalue": eigenvalue, "length": length, "losses": losses}


@full_float32()
@torch.inference_mode()
def mean_loss(model: nn.Module, batches: Batches) -> float:
    """Mean cross-entropy in eval mode, in nats."""
    with evaluating(model):
        logits = [model(images) for images, _ in batches]
    sums = [
        F.cross_entropy(to_float64(found), labels.cpu(), reduction="sum")
        for found, (_, labels) in zip(logits, batches, strict=True)
    ]
    return (sum(sums) / sum(len(labels) for _, labels in batches)).item()


def random_direction(model: nn.Module, generator: torch.Generator) -> list[Tensor]:
    """A filter-normalised Gaussian direction, a tensor for each parameter.

    Each filter (row of the first dimension) gets the norm of the model's own; biases and BatchNorm parameters stay.

    Source: Li et al., "Visualizing the loss landscape of neural nets", NeurIPS 2018, section 4.
    """
    direction = []
    for parameter in model.parameters():
        weight = parameter.detach()
        if weight.ndim < 2:
            direction.append(torch.zeros_like(weight))
            continue
        drawn = torch.randn(weight.shape, generator=generator).to(weight)
        norms = [tensor.flatten(1).norm(dim=1) for tensor in (weight, drawn)]
        scale = norms[0] / norms[1].clamp(min=1e-12)
        direction.append(drawn * scale.view(-1, *[1] * (weight.ndim - 1)))
    return direction


def top_direction(model: nn.Module, batches: Batches) -> tuple[list[Tensor], float, float]:
    """The top eigenvector of the Hessian of `mean_loss` over `batches`, as long as a random direction.

    H v = lambda v with the largest lambda and ||v||_2 = 1, in all parameters together. The direction is r v, where r is
    the norm of all parameters of two dimensions or more: the length of each `random_direction`, so that a step means
    the same for both. Along it, the second derivative of `mean_loss` by the step, at 0, is lambda r^2. The sign of v
    means nothing.

    Args:
        model: measured in eval mode, BatchNorm's statistics stay. Parameters that are not trained do not move.
        batches: (images, labels), over which the loss is taken.

    Returns:
        the direction, a tensor for each parameter; lambda [nats / weight^2]; r [weight].

    Raises:
        ValueError: if there are no images or fewer than two parameters.
    """
    with evaluating(model):
        values, vectors, _ = top_eigenpairs(model, batches)
    weights = list(model.parameters())
    length = sum(to_float64(w).square().sum() for w in weights if w.ndim > 1).sqrt().item()
    parts = iter((length * vectors[:, 0]).split([w.numel() for w in weights if w.requires_grad]))
    direction = [next(parts).view(w.shape).to(w) if w.requires_grad else torch.zeros_like(w) for w in weights]
    return direction, values[0].item(), length


@full_float32()
def losses_along(
    model: nn.Module, direction: list[Tensor], steps: list[float], batches: Batches, training: Batches | None = None
) -> list[float]:
    """The loss at weights + step * direction for each step; the model itself is not changed.

    BatchNorm keeps its statistics, or takes new ones at each step from `training`, if that is given.
    """
    moved, found = copy.deepcopy(model), []
    for step in steps:
        with torch.no_grad():
            for parameter, start, way in zip(moved.parameters(), model.parameters(), direction, strict=True):
                parameter.copy_(start + step * way)
        if training is not None:
            update_bn(training, moved)
        found.append(mean_loss(moved, batches))
    return found


def losses_between(
    first: nn.Module, second: nn.Module, steps: list[float], batches: Batches, training: Batches
) -> list[float]:
    """The loss at (1 - step) * first + step * second for each step from 0 to 1.

    BatchNorm's statistics belong to no point between: at each one, the ends included, they are taken anew from
    `training` (batches of training images), without which the loss would mostly show that they are wrong.
    """
    direction = [b.detach() - a.detach() for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    return losses_along(first, direction, steps, batches, training)


def compute_sets(folders: list[Path], path: Path) -> None:
    """Write the result file of one SharpBalance run: shares trained with SAM, example images, and the caption.

    `shares` holds by "classes" [M, 1 + C] the share of all samples and of each class, and by "picks" [M, M + 1] the
    share of each member's pick and of the samples that nobody picked; None where there is no such sample. `pictures`
    are two lines of images [N, H, W, C], whole numbers from 0 to 255.

    Raises:
        InputError: if there are several folders, or the run has no scores.
    """
    if len(folders) != 1:
        raise InputError(f"--from: expected one run folder for sets, got {len(folders)} folders")
    run = read_run(folders[0])
    trained = run.content["trained"]
    rule = PARTITION_RULE.get(trained["partition"])
    if not trained["flat_ratio"] or rule not in ("flattest", "sharpest"):
        raise InputError(f"--from {run.folder}: its sets do not come from scores; name a SharpBalance run")
    data = data_of(run)
    train, labels = data.train, data.train.labels.numpy()
    masks, scores = (
        np.stack([_read_array(run.folder / f"seed_{seed}" / name, len(train)) for seed in run.seeds])
        for name in ("sam_mask.npy", "fisher.npy")
    )
    masks = masks.astype(bool)
    ranks = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1)
    count = int(trained["flat_ratio"] * len(train))
    picks = ranks < count if rule == "flattest" else ranks >= len(train) - count

    def shares(groups: list[np.ndarray]) -> list[list[float | None]]:
        return [[float(mask[group].mean()) if group.any() else None for group in groups] for mask in masks]

    order = np.argsort(ranks.mean(axis=0), kind="stable")
    ends = {"flattest: lowest scores": order[:EXAMPLES], "sharpest: highest scores": order[::-1][:EXAMPLES].copy()}
    pictures = []
    for title, index in ends.items():
        names = [f"{labels[i]}: {masks[:, i].sum()} of {len(masks)}" for i in index]
        pictures.append({"title": title, "images": train.pixels(torch.from_numpy(index)).tolist(), "names": names})
    note = (
        f"{setting_of(run.content)}; 1 ensemble of {len(masks)} members, scored before epoch "
        f"{trained['initial_epochs'] + 1}. A member picks its {count} {rule} images ($k$ = {trained['flat_ratio']:g}) "
        "by squared gradient norm; those that nobody picked are trained with SAM by "
        f"{UNPICKED[trained['unselected']]}. Pictures are ordered by mean rank; below each: its class, and how many "
        "members train it with SAM."
    )
    classes = shares([np.ones(len(train), bool), *(labels == c for c in range(data.info.num_classes))])
    picked = shares([*picks, ~picks.any(axis=0)])
    content = {"seeds": run.seeds, "shares": {"classes": classes, "picks": picked}, "pictures": pictures, "note": note}
    # On one line: with a line for each number, the pictures would take most of a megabyte.
    write_json(path, content, indent=None)


def read_sets(path: Path) -> list[Ensemble]:
    """The ensemble of a file of `compute_sets`, whose content holds its shares and pictures as arrays.

    Raises:
        InputError: if it is no such file.
    """
    content = read_json(path, AGAIN)
    try:
        # null becomes nan.
        shares = {name: np.array(content["shares"][name], dtype=float) for name in ("classes", "picks")}
        pictures = [line | {"images": np.array(line["images"]) / 255} for line in content["pictures"]]
        content |= {"shares": shares, "pictures": pictures}
        return [Ensemble(path, "", tuple(content["seeds"]), content=content)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the numbers of sets; {AGAIN}") from error


def _read_array(path: Path, length: int) -> np.ndarray:
    """One of the arrays that a SharpBalance run leaves, [length]."""
    try:
        array = np.array(load_array(path))
    except InputError as error:
        raise InputError(f"{path}: missing or not readable; resume the run until it has made its sets") from error
    if array.shape != (length,):
        raise InputError(f"{path}: expected {length} numbers, one for each training image, got {list(array.shape)}")
    return array
