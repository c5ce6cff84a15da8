"""All members of an ensemble: warm-up, the exchange of scores, the rest; a run that is cut off goes on where it was.

A run lies in one folder (--save_path): args.json, environment.json, command.txt, summary.json, and for each member
seed_<seed>/ with checkpoint.pth.tar (the last epoch), model_best.pth.tar, log.jsonl, fisher.npy and sam_mask.npy.
"""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models import create_model
from sam import SAM
from utils import InputError, RunError
from utils.checkpoint import (
    CHECKPOINTS,
    digest,
    fill_model,
    load_checkpoint,
    load_model,
    read_array,
    read_settings,
    save_checkpoint,
    write_array,
    write_atomically,
    write_json,
)
from utils.data import Data, ImageSet
from utils.diversity import disagreement
from utils.fisher import per_sample_fisher
from utils.metrics import accuracy, ensemble_log_probs, negative_log_likelihood
from utils.partition import sharpness_aware_masks
from utils.training import evaluating, learning_rate, predict, train_epoch

RUN_FILES = ("args.json", "environment.json", "command.txt", "summary.json")
MEMBER_FILES = (*CHECKPOINTS.values(), "log.jsonl", "fisher.npy", "sam_mask.npy")
# Settings that do not change what is computed: they may differ when a run is taken up again. The data are compared by
# their content instead of by their path.
FREE_SETTINGS = (
    "data_path",
    "train_idx_path",
    "val_idx_path",
    "download",
    "device",
    "threads",
    "save_path",
    "resume",
    "checkpoint",
    "overwrite",
    "evaluate",
)
SCORE_BATCH = 128


@dataclass
class Member:
    """One network of the ensemble and how far it has come."""

    seed: int
    folder: Path
    model: nn.Module
    optimizer: SAM
    epoch: int = 0  # epochs finished
    best_acc: float = -1.0
    mask_digest: str | None = None
    mask: Tensor | None = None  # bool [N] on the CPU, after the split
    log: list[dict] = field(default_factory=list)


def train_ensemble(args: Namespace, data: Data) -> dict:
    """Train all members in lockstep, from where their files say that they are, and summarise.

    Args:
        args: the settings that `main.parse_args` returns.
        data: the loaded data set, on the training device.

    Returns:
        The summary, as it is written to summary.json.

    Raises:
        InputError: if the folder holds something else than this run.
        RunError: if a loss is not finite, or if a file cannot be written.
    """
    open_run(args, data)
    members = [_open_member(args, data, seed) for seed in args.seed]
    sharpbalance = args.sam and args.flat_ratio > 0
    progress = _Progress(members, args, len(data.train))
    for epoch in range(args.epochs):
        if sharpbalance and epoch == args.initial_epochs:
            split(args, data, members)
            progress.count(members)
        for member in members:
            if member.epoch == epoch:
                _train_one_epoch(args, data, member, progress)
    progress.close()
    summary = {
        name: evaluate_members([member.folder / file for member in members], data) for name, file in CHECKPOINTS.items()
    }
    write_json(args.save_path / "summary.json", summary)
    return summary


def _train_one_epoch(args: Namespace, data: Data, member: Member, progress: "_Progress") -> None:
    started, epoch = time.monotonic(), member.epoch
    lr = learning_rate(args.lr, args.schedule, epoch, args.epochs)
    for group in member.optimizer.param_groups:
        group["lr"] = lr
    mask = member.mask if member.mask is not None else torch.full((len(data.train),), args.sam)
    train_loss, train_acc = train_epoch(
        member.model,
        member.optimizer,
        data.train,
        mask,
        member.seed,
        epoch,
        args.batch_size,
        args.bn_perturbed,
        args.amp,
        progress.advance,
    )
    log_probs = F.log_softmax(predict(member.model, data.val), dim=1)
    labels = data.val.labels.cpu()
    val_loss, val_acc = negative_log_likelihood(log_probs, labels), accuracy(log_probs, labels)
    if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
        raise RunError(
            f"member with seed {member.seed}, epoch {epoch}: the loss is not finite at learning rate {lr:g}; what was "
            "saved before remains. Start anew with a smaller --lr or --rho and another --save_path"
        )
    line = {
        "epoch": epoch,
        "seconds": round(time.monotonic() - started, 3),
        "lr": lr,
        "train_loss": train_loss,
        "train_acc": train_acc,
        "val_loss": val_loss,
        "val_acc": val_acc,
        "sam_share": mask.double().mean().item(),
    }
    member.log.append(line)
    member.epoch += 1
    # Of equally good epochs the latest counts: on a small validation part an early one would win by luck.
    best = val_acc >= member.best_acc
    member.best_acc = max(val_acc, member.best_acc)
    _save(args, data, member, best)
    progress.print(member.seed, line)


def split(args: Namespace, data: Data, members: list[Member]) -> None:
    """The exchange: every member scores the training samples, and each gets its set of samples to train with SAM.

    Scores are those of un-augmented images in eval mode. Scores and masks are saved; saved scores are used again.

    Raises:
        InputError: if a member is past the split and its scores are missing or do not give the mask it trained with.
        RunError: if a score is not finite.
    """
    samples = len(data.train)
    if args.select in ("random", "same"):
        scores = np.zeros((len(members), samples), dtype=np.float32)
    else:
        scores = np.stack([_scores(member, args.initial_epochs, data.train) for member in members])
    masks = sharpness_aware_masks(scores, args.flat_ratio, args.select, args.unselected, args.seed)
    for member, mask in zip(members, masks, strict=True):
        path = member.folder / "sam_mask.npy"
        if member.mask_digest not in (None, digest(mask)):
            raise InputError(
                f"{path}: the saved scores do not give the set that seed {member.seed} was trained with; put the "
                "fisher.npy files of this run back, or start anew with --overwrite"
            )
        write_array(path, mask)
        member.mask, member.mask_digest = torch.from_numpy(mask), digest(mask)


def _scores(member: Member, split_epoch: int, train: ImageSet) -> np.ndarray:
    path = member.folder / "fisher.npy"
    scores = read_array(path, (len(train),), np.float32)
    if scores is not None:
        return scores
    if member.epoch > split_epoch:
        raise InputError(f"{path}: missing or damaged, and the member has moved on; put it back, or use --overwrite")
    with evaluating(member.model):
        batches = train.in_order(SCORE_BATCH)
        scores = torch.cat([per_sample_fisher(member.model, *batch) for batch in batches]).cpu().numpy()
    if not np.isfinite(scores).all():
        raise RunError(
            f"member with seed {member.seed}, epoch {member.epoch}: {np.sum(~np.isfinite(scores))} sharpness scores "
            "are not finite; start anew with a smaller --lr or --rho and another --save_path"
        )
    write_array(path, scores)
    return scores


def evaluate_members(paths: list[Path], data: Data, **told: Any) -> dict:
    """Accuracy (0 to 1) and loss of saved members and of their ensemble (mean of softmax) on validation and test.

    Args:
        paths: checkpoint files.
        data: where they are evaluated.
        told: what is known of the networks, as for `load_model`.

    Raises:
        InputError: if a checkpoint cannot be used or is of another data set.
    """
    labels = {part: getattr(data, part).labels.cpu() for part in ("val", "test")}
    members, log_probs = [], {part: [] for part in labels}
    for path in paths:
        model, checkpoint = load_model(path, **(_network(data) | {"dataset": data.name} | told))
        model = model.to(data.train.device, memory_format=torch.channels_last)
        row = {"checkpoint": str(path), "seed": checkpoint.get("seed"), "epoch": checkpoint["epoch"]}
        for part in labels:
            log_probs[part].append(F.log_softmax(predict(model, getattr(data, part)), dim=1))
            row |= _rates(part, log_probs[part][-1], labels[part])
        members.append(row)
    ensemble = {}
    for part in labels:
        stacked = torch.stack(log_probs[part])
        ensemble |= _rates(part, ensemble_log_probs(stacked), labels[part])
        pairs = disagreement(stacked.argmax(dim=2))
        if len(paths) > 1:
            ensemble[f"{part}_disagreement"] = (pairs.sum() / (len(paths) * (len(paths) - 1))).item()
    return {"members": members, "ensemble": ensemble}


def _rates(part: str, log_probs: Tensor, labels: Tensor) -> dict:
    return {
        f"{part}_acc": accuracy(log_probs, labels),
        f"{part}_loss": negative_log_likelihood(log_probs, labels),
    }


def _network(data: Data) -> dict:
    return {
        "num_classes": data.info.num_classes,
        "image_size": data.info.image_size,
        "in_channels": len(data.info.mean),
    }


def open_run(args: Namespace, data: Data) -> None:
    """Make the folder of a run, or check that the one that is there is this run.

    Raises:
        InputError: naming the settings that differ, or if the folder is something else.
    """
    folder: Path = args.save_path
    settings = {name: value for name, value in vars(args).items() if name not in FREE_SETTINGS}
    args_file = folder / "args.json"
    if args_file.is_file() and args.overwrite:
        # The settings go last: until then the folder is still known as a run.
        for member in folder.glob("seed_*"):
            for name in MEMBER_FILES:
                (member / name).unlink(missing_ok=True)
            if not any(member.iterdir()):
                member.rmdir()
        for name in reversed(RUN_FILES):
            (folder / name).unlink(missing_ok=True)
    if args_file.is_file():
        _check_same(folder, settings, data.record)
    elif folder.is_dir() and any(path.name != "args.json.tmp" for path in folder.iterdir()):
        raise InputError(f"--save_path {folder}: not empty and not a run of main.py; name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not args_file.is_file():
            write_json(args_file, {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()})
        for seed in args.seed:
            (folder / f"seed_{seed}").mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"--save_path {folder}: cannot be made ({error.strerror}); name another folder") from error
    if not (folder / "environment.json").is_file():
        write_json(folder / "environment.json", {**environment(data.train.device), "data": data.record})
        write_atomically(folder / "command.txt", (shlex.join(["python", *sys.argv]) + "\n").encode())


def _check_same(folder: Path, settings: dict, record: dict) -> None:
    way_out = "give the same settings to go on with it, another --save_path, or --overwrite to start anew"
    before = read_settings(folder)
    differ = [
        f"--{name} {_plain(value)} here, {_plain(before.get(name))} there"
        for name, value in settings.items()
        if before.get(name) != value
    ]
    if differ:
        raise InputError(f"--save_path {folder}: a run of other settings ({'; '.join(differ)}); {way_out}")
    try:
        data_before = json.loads((folder / "environment.json").read_text())["data"]
    except (OSError, ValueError, KeyError):
        return  # cut off before it was written: it is made anew
    key = "sha256_of_arrays_and_split"
    if data_before.get(key) != record[key]:
        raise InputError(f"--data_path: the images or their split are not those that the run in {folder} began with")


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def environment(device: torch.device) -> dict:
    """Versions, hardware and the repository's commit."""
    commit = None
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass  # not a clone, or no git
    return {
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _open_member(args: Namespace, data: Data, seed: int) -> Member:
    """Build a member from its seed, and bring it to where its checkpoint stands."""
    torch.manual_seed(seed)  # the start of a network is drawn on the CPU, so that it does not depend on the device
    model = create_model(args.model, width=args.width, **_network(data))
    model.to(data.train.device, memory_format=torch.channels_last)
    optimizer = SAM(
        model.parameters(),
        torch.optim.SGD,
        rho=args.rho,
        adaptive=args.sam_adaptive,
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
    )
    member = Member(seed, args.save_path / f"seed_{seed}", model, optimizer)
    path = member.folder / CHECKPOINTS["last"]
    if not path.exists():
        return member
    checkpoint = load_checkpoint(path)
    fill_model(model, checkpoint["state_dict"], path)
    try:
        # The param_groups are made from the settings, which are the same; only the state comes from the file.
        state = {"state": checkpoint["optimizer"]["state"], "param_groups": optimizer.state_dict()["param_groups"]}
        optimizer.load_state_dict(state)
        member.epoch, member.best_acc = checkpoint["epoch"], checkpoint["best_acc"]
        member.mask_digest = checkpoint["mask_digest"]
        lines = (member.folder / "log.jsonl").read_text().splitlines()
        # The log is written before the checkpoint: after a cut it may be an epoch ahead, never behind.
        member.log = [json.loads(line) for line in lines[: member.epoch]]
    except (KeyError, ValueError, OSError) as error:
        raise InputError(
            f"{member.folder}: cannot be taken up again ({error}); use --overwrite to start anew"
        ) from error
    return member


def _save(args: Namespace, data: Data, member: Member, best: bool) -> None:
    """Write an epoch's files. Only the last of them, checkpoint.pth.tar, makes the epoch count."""
    checkpoint = {
        "state_dict": {name: tensor.cpu() for name, tensor in member.model.state_dict().items()},
        "optimizer": member.optimizer.state_dict(),
        "epoch": member.epoch,
        "best_acc": member.best_acc,
        "mask_digest": member.mask_digest,
        "seed": member.seed,
        "model": args.model,
        "dataset": data.name,
        "width": args.width,
        **_network(data),
    }
    if best:
        save_checkpoint(member.folder / CHECKPOINTS["best"], checkpoint)
    log = "".join(json.dumps(line) + "\n" for line in member.log)
    write_atomically(member.folder / "log.jsonl", log.encode())
    save_checkpoint(member.folder / CHECKPOINTS["last"], checkpoint)


class _Progress:
    """One bar for the whole run on a terminal, and a line for each epoch and member anywhere."""

    HEADER = "epoch   seed      lr  train loss  train acc  val loss  val acc  SAM share     time     left"

    def __init__(self, members: list[Member], args: Namespace, samples: int):
        self.args, self.samples = args, samples
        self.done, self.started = 0, time.monotonic()
        self.bar = tqdm(
            disable=not sys.stderr.isatty(),
            desc="training",
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left",
        )
        self.count(members)
        if self.total:
            self._write(self.HEADER)

    def count(self, members: list[Member]) -> None:
        """Count what is left, in forward-backward passes of one image; a sample with SAM needs two."""
        left = 0
        for member in members:
            share = float(self.args.sam) if member.mask is None else member.mask.double().mean().item()
            left += (self.args.epochs - member.epoch) * self.samples * (1 + share)
        self.total = self.done + left
        self.bar.total = self.total
        self.bar.refresh()

    def advance(self, passes: int) -> None:
        self.done += passes
        self.bar.update(passes)

    def print(self, seed: int, line: dict) -> None:
        left = (time.monotonic() - self.started) / max(self.done, 1) * max(self.total - self.done, 0)
        self._write(
            f"{line['epoch']:5d} {seed:6d} {line['lr']:7.4g}  {line['train_loss']:10.4f}  {line['train_acc']:8.2%}"
            f"  {line['val_loss']:8.4f}  {line['val_acc']:7.2%}  {line['sam_share']:8.1%}"
            f"  {line['seconds']:6.1f}s  {_clock(left):>7}"
        )

    def close(self) -> None:
        self.bar.close()

    @staticmethod
    def _write(text: str) -> None:
        tqdm.write(text)
        sys.stdout.flush()  # a log file shall show it now


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
