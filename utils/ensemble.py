"""The algorithm. M members start from M seeds; each is trained by `utils.member`.

    for each of the epochs:
        before epoch `initial_epochs`, once (SharpBalance only):
            every member scores every training sample by its sharpness     utils.fisher
            the scores of all members are exchanged                        utils.distributed
            each member is assigned the samples that it trains with SAM    utils.partition
        every member trains one epoch: its assigned samples with SAM,      utils.training
        all others with normal steps; until samples are assigned,
        all of them with SAM (or none, in the variant with
        `initial_method` sgd, in which SAM without SharpBalance is late)
    every member is evaluated, alone and in the ensemble

Process r of K trains and evaluates the members r, r + K, ... A run that was stopped resumes from its files.
"""

import filecmp
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import InputError, distributed
from utils.checkpoint import load_model
from utils.diversity import disagreement, mean_over_pairs
from utils.files import write_json
from utils.member import Member
from utils.metrics import accuracy, ensemble_log_probs, negative_log_likelihood
from utils.partition import PARTITION_RULE, SCORE_FREE, sharpness_aware_masks
from utils.run import CHECKPOINTS, Run, Stopped
from utils.training import predict


def train_ensemble(run: Run) -> dict | None:
    """Train all members in lockstep, from where their files say that they are, and evaluate them.

    Args:
        run: settings, folder and data.

    Returns:
        The summary, as it is written to summary.json: `evaluate_members` by checkpoint; None on ranks other than 0.

    Raises:
        InputError: if the folder holds something other than this run, if another process trains in it, or if
            `flat_ratio` picks no sample.
        RunError: if a loss is not finite, if a file cannot be written, or if another rank has ended.
        Stopped: on SIGTERM and Ctrl-C.
    """
    settings, samples = run.settings, len(run.data.train)
    fresh = run.overwrite or not (run.folder / "args.json").is_file()  # earlier versions let it pass
    if fresh and settings.flat_ratio and not int(settings.flat_ratio * samples):
        way_out = f"give {math.ceil(1e6 / samples) / 1e6:g} or more, or leave it out for SAM on all of them"
        raise InputError(f"--flat_ratio: {settings.flat_ratio:g} of {samples} training images is none; {way_out}")
    with run.open():
        try:
            members = [Member(run, seed) for seed in settings.seed[distributed.rank() :: distributed.ranks()]]
            train_members(run, members)
            summary = evaluate_members(run)
            distributed.finish()
        except Stopped as stop:
            raise Stopped(1 if distributed.lost() else stop.code) from None
        if distributed.rank():
            return None
        write_json(run.folder / "summary.json", summary)
        return summary


def train_members(run: Run, members: list[Member]) -> None:
    """Train this rank's members to the end."""
    settings = run.settings
    run.progress.expect(sum(member.passes_left for member in members))
    try:
        for epoch in range(settings.epochs):
            if settings.method == "sharpbalance" and epoch == settings.initial_epochs:
                assign_samples(run, members)
                run.progress.expect(sum(member.passes_left for member in members))
            for member in members:
                if member.epoch == epoch:
                    member.train_epoch()
    finally:
        run.progress.close()
    for member in members:
        member.check_best()
        if member.average is not None:
            member.save_average()


def assign_samples(run: Run, members: list[Member]) -> None:
    """The exchange: every member scores the training samples, and each is assigned those that it trains with SAM.

    Scores and masks are saved, and saved scores are used again, so that a rank that is past this point still gives the
    others what they wait for.

    Args:
        run: settings, folder and data.
        members: those of this rank.

    Raises:
        InputError: if a member is past this point and the scores do not give the mask it was trained with.
        RunError: if a score is not finite, or if another rank has ended.
    """
    settings, samples = run.settings, len(run.data.train)
    select, count = PARTITION_RULE[settings.partition], len(settings.seed)
    sizes = None
    if select in SCORE_FREE and not settings.match_size:
        scores = np.zeros((count, samples), dtype=np.float32)
    else:
        own = [member.score() for member in members]
        scores = distributed.gather(np.reshape(own, (-1, samples)).astype(np.float32), count)
    if settings.match_size:
        rule = PARTITION_RULE[settings.match_size]
        sizes = sharpness_aware_masks(scores, settings.flat_ratio, rule, settings.unselected).sum(axis=1)
    unselected = settings.unselected or "normal"  # which drawn sets ignore
    draws = run.recorded.get("draws")
    masks = sharpness_aware_masks(scores, settings.flat_ratio, select, unselected, settings.seed, sizes, draws)
    for member in members:
        member.assign(masks[settings.seed.index(member.seed)])


def evaluate_members(run: Run) -> dict:
    """Accuracy (0 to 1) and loss of the saved members and of their ensemble (mean of softmax) on validation and test.

    Each process evaluates its own members; what they predict is exchanged. A best checkpoint that holds the same bytes
    as the last one is not evaluated again.

    Args:
        run: settings, folder and data.

    Returns:
        By the names of `CHECKPOINTS`: {"members": one row each, "ensemble": one row}.

    Raises:
        InputError: if a checkpoint cannot be used or is of another data set.
        RunError: if another rank has ended.
    """
    data, seeds, summary = run.data, run.settings.seed, {}
    own = seeds[distributed.rank() :: distributed.ranks()]
    shapes = [(-1, 1), *((-1, len(part), data.info.num_classes) for part in (data.val, data.test))]
    before: dict[int, tuple[Path, list[np.ndarray]]] = {}  # of a seed, what was evaluated last
    for kind, file in CHECKPOINTS.items():
        if kind == "averaged" and run.settings.average_from is None:
            continue
        for seed in own:
            path = run.folder / f"seed_{seed}" / file
            if seed not in before or not _same_bytes(path, before[seed][0]):
                before[seed] = path, saved_log_probs(path, run)
        found = []
        for i, shape in enumerate(shapes):
            values = np.reshape([before[seed][1][i] for seed in own], shape).astype(np.float32)
            found.append(torch.from_numpy(distributed.gather(values, len(seeds))))
        epochs, *log_probs = found
        members: list[dict[str, Any]] = [
            {"checkpoint": str(run.folder / f"seed_{seed}" / file), "seed": seed, "epoch": int(epoch)}
            for seed, epoch in zip(seeds, epochs, strict=True)
        ]
        ensemble = {}
        for split, images, stacked in zip(("val", "test"), (data.val, data.test), log_probs, strict=True):
            labels = images.labels.cpu()
            for row, one in zip(members, stacked, strict=True):
                row |= _rates(split, one, labels)
            ensemble |= _rates(split, ensemble_log_probs(stacked), labels)
            if len(members) > 1:
                ensemble[f"{split}_disagreement"] = mean_over_pairs(disagreement(stacked.argmax(dim=2)))
        summary[kind] = {"members": members, "ensemble": ensemble}
    return summary


def _same_bytes(path: Path, other: Path) -> bool:
    try:
        return filecmp.cmp(path, other, shallow=False)
    except OSError:  # reading it says what is wrong
        return False


def saved_log_probs(path: Path, run: Run) -> list[np.ndarray]:
    """Of a saved member its epoch, and its log-probabilities float32 [N, C] on validation and on test."""
    data, at_once = run.data, run.settings.batch_size
    model, checkpoint = load_model(path, model=run.settings.model, dataset=data.name, **data.info.network)
    model = model.to(data.train.device, memory_format=torch.channels_last)
    logits = (predict(model, images, at_once=at_once)[0] for images in (data.val, data.test))
    return [np.array(checkpoint["epoch"]), *(F.log_softmax(one, dim=1).numpy() for one in logits)]


def _rates(split: str, log_probs: Tensor, labels: Tensor) -> dict:
    return {
        f"{split}_acc": accuracy(log_probs, labels),
        f"{split}_loss": negative_log_likelihood(log_probs, labels),
    }
