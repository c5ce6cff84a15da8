"""All members of an ensemble: warm-up, the exchange of scores, the rest; a run that is cut off goes on where it was.

A run lies in one folder (--save_path): args.json, environment.json, command.txt, summary.json, and for each member
seed_<seed>/ with checkpoint.pth.tar (the last epoch), checkpoint_previous.pth.tar (the one before), model_best.pth.tar,
log.jsonl, fisher.npy and sam_mask.npy; with --average_from also model_averaged.pth.tar, and while an epoch is not
finished checkpoint_partial.pth.tar.

What a run goes on from is in its checkpoints alone, each of which has a checksum: log, scores and masks as well. The
files of these are copies, which are written anew where they are damaged.
"""

import hashlib
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from tqdm import tqdm

from models import create_model
from sam import SAM
from utils import InputError, RunError, distributed, first_line
from utils.checkpoint import (
    CHECKPOINTS,
    PARTIAL,
    PREVIOUS,
    DamagedError,
    digest,
    fill_model,
    load_checkpoint,
    load_json,
    load_model,
    locked,
    pack_checkpoint,
    read_settings,
    save_checkpoint,
    write_array,
    write_atomically,
    write_json,
)
from utils.data import Data
from utils.diversity import disagreement
from utils.fisher import per_sample_fisher
from utils.metrics import accuracy, ensemble_log_probs, negative_log_likelihood
from utils.partition import DRAWN, PICKED, sharpness_aware_masks
from utils.training import evaluating, learning_rate, predict, train_epoch

RUN_FILES = ("args.json", "environment.json", "command.txt", "summary.json")
MEMBER_FILES = (*CHECKPOINTS.values(), PREVIOUS, PARTIAL, "log.jsonl", "fisher.npy", "sam_mask.npy")
# Settings that do not change what is computed: they may differ when a run is taken up again. The data are compared by
# their content instead of by their path.
FREE_SETTINGS = (
    "data_path",
    "train_idx_path",
    "val_idx_path",
    "download",
    "device",
    "threads",
    "jobs",
    "save_path",
    "save_every",
    "resume",
    "checkpoint",
    "overwrite",
    "evaluate",
)
# Settings that runs of older versions lack, by the value that they had; they count where they differ from it.
NEUTRAL = {"match_size": False, "augmentation": "standard", "label_noise": 0.0, "average_from": None}
SCORE_BATCH = 128
# What a line of log.jsonl holds besides its wall time.
LOG = ("epoch", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "sam_share")


@dataclass
class Member:
    """One network of the ensemble and how far it has come."""

    seed: int
    folder: Path
    model: nn.Module
    optimizer: SAM
    epoch: int = 0  # epochs finished
    position: dict | None = None  # where in the next epoch, as `train_epoch` tells it
    best_acc: float = -1.0
    best_epoch: int = 0  # epochs that were finished then
    scores: np.ndarray | None = None  # float32 [N], from the split on
    mask_digest: str | None = None
    mask: Tensor | None = None  # bool [N] on the CPU, after the split
    log: list[dict] = field(default_factory=list)
    average: AveragedModel | None = None  # with --average_from


class Stopped(SystemExit):
    """A signal ended the run, and what it had done is saved; the code is 128 + the signal's number."""


class Signals:
    """Within this context SIGTERM and Ctrl-C raise `Stopped`, and one line says how to go on."""

    def __init__(self) -> None:
        self._received, self._deferred = 0, False

    def __enter__(self) -> "Signals":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Stopped):
            name = signal.Signals(self._received).name.replace("SIGINT", "Ctrl-C")
            print(
                f"stopped by {name}; what was done is saved, and the same command goes on from there", file=sys.stderr
            )

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """What must not be cut: a signal is answered at the end, or where `check` is called."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.check()

    def check(self) -> None:
        """Raise `Stopped` if a signal has come."""
        if self._received:
            raise Stopped(128 + self._received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._received:  # torchrun and schedulers send it several times
            self._received = number
            if not self._deferred:
                self.check()


def train_ensemble(args: Namespace, data: Data) -> dict | None:
    """Train all members in lockstep, from where their files say that they are, and summarise.

    Under torchrun rank r of K trains the members r, r + K, ...

    Args:
        args: the settings that `main.parse_args` returns.
        data: the loaded data set, on the training device.

    Returns:
        The summary, as it is written to summary.json; None on ranks other than 0.

    Raises:
        InputError: if the folder holds something else than this run, or if another process works in it.
        RunError: if a loss is not finite, if a file cannot be written, or if another rank has ended.
        Stopped: on SIGTERM and Ctrl-C.
    """
    with Signals() as signals, open_run(args, data):
        try:
            members = [_open_member(args, data, seed) for seed in args.seed[distributed.rank() :: distributed.ranks()]]
            _train(args, data, members, signals)
            distributed.finish()
        except Stopped as stop:
            raise Stopped(1 if distributed.lost() else stop.code) from None
        if distributed.rank():
            return None
        folders = [args.save_path / f"seed_{seed}" for seed in args.seed]
        summary = {
            name: evaluate_members([folder / file for folder in folders], data)
            for name, file in CHECKPOINTS.items()
            if name != "averaged" or args.average_from is not None
        }
        write_json(args.save_path / "summary.json", summary)
        return summary


def _train(args: Namespace, data: Data, members: list[Member], signals: Signals) -> None:
    progress = _Progress(members, args, len(data.train))
    try:
        for epoch in range(args.epochs):
            if args.sam and args.flat_ratio > 0 and epoch == args.initial_epochs:
                split(args, data, members)
                progress.count(members)
            for member in members:
                if member.epoch == epoch:
                    _train_one_epoch(args, data, member, progress, signals)
    finally:
        progress.close()
    for member in members:
        _check_best(args, data, member, finished=True)
        if member.average is not None:
            with signals.deferred():
                _save_average(args, data, member)


def _train_one_epoch(args: Namespace, data: Data, member: Member, progress: "_Progress", signals: Signals) -> None:
    started, epoch, here = time.monotonic(), member.epoch, None
    if member.position is not None:
        started -= member.position["seconds"]
    lr = learning_rate(args.lr, args.schedule, epoch, args.epochs)
    for group in member.optimizer.param_groups:
        group["lr"] = lr
    mask = member.mask if member.mask is not None else torch.full((len(data.train),), args.sam)
    saved = time.monotonic()

    def save() -> None:
        member.position = {**here(), "seconds": time.monotonic() - started}
        _save_partial(args, data, member)

    def after_step(passes: int, position: Any) -> None:
        nonlocal here, saved
        here = position
        if member.average is not None and epoch >= args.average_from:
            member.average.update_parameters(member.model)
        progress.advance(passes)
        if time.monotonic() - saved >= args.save_every:
            save()
            saved = time.monotonic()
        signals.check()

    try:
        with signals.deferred():  # within a step the weights are elsewhere
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
                after_step,
                member.position,
            )
        log_probs, labels = F.log_softmax(predict(member.model, data.val), dim=1), data.val.labels.cpu()
        val_loss, val_acc = negative_log_likelihood(log_probs, labels), accuracy(log_probs, labels)
    except Stopped:
        if here is not None:
            save()
        raise
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
    with signals.deferred():
        member.log.append(line)
        member.epoch, member.position = epoch + 1, None
        # Of equally good epochs the latest counts: on a small validation part an early one would win by luck.
        if val_acc >= member.best_acc:
            member.best_acc, member.best_epoch = val_acc, member.epoch
        _save(args, data, member)
    progress.print(member.seed, line)


def split(args: Namespace, data: Data, members: list[Member]) -> None:
    """The exchange: every member scores the training samples, and each gets its set of samples to train with SAM.

    Scores are those of un-augmented images in eval mode. Scores and masks are saved; saved scores are used again, so
    that a rank that is past the split gives the others what they wait for.

    Raises:
        InputError: if a member is past the split and the scores do not give the mask it trained with.
        RunError: if a score is not finite, or if another rank has ended.
    """
    samples = len(data.train)
    drawn, sizes = args.select in DRAWN, None
    if drawn and not args.match_size:
        scores = np.zeros((len(args.seed), samples), dtype=np.float32)
    else:
        own = [_scores(args, data, member) for member in members]
        scores = distributed.gather_scores(np.reshape(own, (-1, samples)).astype(np.float32), len(args.seed))
    if drawn and args.match_size:
        likewise = sharpness_aware_masks(scores, args.flat_ratio, PICKED[args.partition], args.unselected)
        sizes = likewise.sum(axis=1)
    masks = sharpness_aware_masks(scores, args.flat_ratio, args.select, args.unselected, args.seed, sizes)
    for member in members:
        mask = masks[args.seed.index(member.seed)]
        if member.mask_digest not in (None, digest(mask)):
            raise InputError(
                f"{member.folder}: the scores of the members do not give the set that seed {member.seed} was trained "
                "with: a part of the run was made anew on another device or with another --threads; put its files "
                "back, or start anew with --overwrite"
            )
        write_array(member.folder / "sam_mask.npy", mask)
        member.mask, member.mask_digest = torch.from_numpy(mask), digest(mask)


def _scores(args: Namespace, data: Data, member: Member) -> np.ndarray:
    """A member's scores: those that it has, or new ones."""
    if member.scores is None and member.epoch > args.initial_epochs:
        raise InputError(f"{member.folder}: a checkpoint after the split that has no scores; use --overwrite")
    if member.scores is None:
        with evaluating(member.model):
            batches = data.train.in_order(SCORE_BATCH)
            scores = torch.cat([per_sample_fisher(member.model, *batch) for batch in batches]).cpu().numpy()
        if not np.isfinite(scores).all():
            raise RunError(
                f"member with seed {member.seed}, epoch {member.epoch}: {np.sum(~np.isfinite(scores))} sharpness "
                "scores are not finite; start anew with a smaller --lr or --rho and another --save_path"
            )
        member.scores = scores
        # Before anybody trains with them: on a GPU a second computation may differ in the last bits.
        _save_partial(args, data, member)
    write_array(member.folder / "fisher.npy", member.scores)
    return member.scores


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


@contextmanager
def open_run(args: Namespace, data: Data) -> Iterator[None]:
    """Hold the folder of a run: a new one, or one that is there and is this run.

    Rank 0 makes and locks it; the others wait until it has.

    Raises:
        InputError: naming the settings that differ, the process that works in it, or if it is something else.
    """
    folder: Path = args.save_path
    if distributed.rank():
        distributed.meet()
        if not (folder / "args.json").is_file():
            raise InputError(f"--save_path {folder}: rank {distributed.rank()} does not see the folder of rank 0")
        yield
        return
    known = {"args.json", "args.json.tmp", "lock"}
    if folder.is_dir() and not (folder / "args.json").is_file() and {path.name for path in folder.iterdir()} - known:
        raise InputError(f"--save_path {folder}: not empty and not a run of main.py; name another folder")
    with locked(folder):
        _prepare(args, data)
        distributed.meet()
        yield


def _prepare(args: Namespace, data: Data) -> None:
    folder: Path = args.save_path
    settings = {name: value for name, value in vars(args).items() if name not in FREE_SETTINGS}
    args_file = folder / "args.json"
    if args_file.is_file() and args.overwrite:
        # The settings go last: until then the folder is still known as a run.
        for member in folder.glob("seed_*"):
            for name in MEMBER_FILES:
                (member / name).unlink(missing_ok=True)
                (member / f"{name}.tmp").unlink(missing_ok=True)
            if not any(member.iterdir()):
                member.rmdir()
        for name in reversed(RUN_FILES):
            (folder / name).unlink(missing_ok=True)
    if args_file.is_file():
        _check_same(folder, settings, data.record)
    else:
        write_json(args_file, {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()})
    for name in RUN_FILES:  # what a killed write left
        (folder / f"{name}.tmp").unlink(missing_ok=True)
    if not (folder / "environment.json").is_file():
        write_json(folder / "environment.json", {**environment(data.train.device), "data": data.record})
        write_atomically(folder / "command.txt", (shlex.join(["python", *sys.argv]) + "\n").encode())


def _check_same(folder: Path, settings: dict, record: dict) -> None:
    way_out = "give the same settings to go on with it, another --save_path, or --overwrite to start anew"
    before = read_settings(folder)
    differ = [
        f"--{name} {_plain(value)} here, {_plain(before.get(name))} there"
        for name, value in settings.items()
        if before.get(name, NEUTRAL.get(name)) != value
    ]
    if differ:
        raise InputError(f"--save_path {folder}: a run of other settings ({'; '.join(differ)}); {way_out}")
    key = "sha256_of_arrays_and_split"
    try:
        data_before = load_json(folder / "environment.json")["data"][key]
    except FileNotFoundError:
        return  # cut off before it was written: it is made anew
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'environment.json'}: damaged ({first_line(error)}); put it back, or remove it if the data are "
            "those that the run began with"
        ) from error
    if data_before != record[key]:
        raise InputError(f"--data_path: the images or their split are not those that the run in {folder} began with")


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def environment(device: torch.device) -> dict:
    """Versions, hardware and the repository's commit."""
    commit = None
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        commit = subprocess.run(
            [*git, "describe", "--always"], capture_output=True, text=True, check=True
        ).stdout.strip()
        # Not by results/, which measuring itself changes.
        changed = [*git, "diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)results"]
        if subprocess.run(changed, capture_output=True).returncode:
            commit += "-dirty"
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
    if args.average_from is not None:
        member.average = AveragedModel(model)
    try:
        member.folder.mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(f"{member.folder}: cannot be made ({error.strerror})") from error
    for name in MEMBER_FILES:  # what a killed write left
        (member.folder / f"{name}.tmp").unlink(missing_ok=True)
    checkpoint = _newest_checkpoint(args, data, member)
    if checkpoint is None:
        return member
    fill_model(model, checkpoint["state_dict"], member.folder)
    try:
        # The param_groups are made from the settings, which are the same; only the state comes from the file.
        state = {"state": checkpoint["optimizer"]["state"], "param_groups": optimizer.state_dict()["param_groups"]}
        optimizer.load_state_dict(state)
        if member.average is not None:
            member.average.load_state_dict(checkpoint["average"])
        member.epoch, member.position = checkpoint["epoch"], checkpoint.get("position")
        member.best_acc, member.best_epoch = checkpoint["best_acc"], checkpoint["best_epoch"]
        member.scores = None if checkpoint["scores"] is None else checkpoint["scores"].numpy()
        member.mask_digest = checkpoint["mask_digest"]
        member.log = [dict(zip(LOG, row, strict=True)) for row in checkpoint["log"].tolist()]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{member.folder}: cannot be taken up again ({first_line(error)}); use --overwrite to start anew"
        ) from error
    _restore_log(member)
    if member.epoch:
        _check_best(args, data, member, finished=False)
    return member


def _newest_checkpoint(args: Namespace, data: Data, member: Member) -> dict | None:
    """Where the member stands: the last whole checkpoint, and the one within the next epoch if there is one."""
    last, previous, partial = (member.folder / name for name in (CHECKPOINTS["last"], PREVIOUS, PARTIAL))
    checkpoint, faults = None, []
    for path in (last, previous):
        if not path.exists():
            faults.append(f"{path}: missing")
            continue
        try:
            checkpoint = _load_own(args, data, member, path)
            break
        except DamagedError as error:
            faults.append(str(error))
    if checkpoint is None and (last.exists() or previous.exists()):
        raise InputError(
            f"{'; '.join(faults)}; put one of them back, or remove {member.folder} to train this member from its start"
        )
    if checkpoint is not None and faults:
        _warn(f"{faults[0]}; going on from {previous.name}, after epoch {checkpoint['epoch'] - 1}")
        os.replace(previous, last)
    if partial.exists():
        try:
            within = _load_own(args, data, member, partial)
            if within["epoch"] == (checkpoint["epoch"] if checkpoint else 0):
                return within
        except DamagedError as error:
            _warn(f"{error}; the epoch that it was in begins anew")
        partial.unlink()  # damaged, or of an epoch that is finished
    return checkpoint


def _load_own(args: Namespace, data: Data, member: Member, path: Path) -> dict:
    """Read a checkpoint that must be this member's."""
    checkpoint = load_checkpoint(path, ours=True)
    if (checkpoint.get("run"), checkpoint.get("seed")) != (_run_digest(args, data), member.seed):
        raise DamagedError(f"{path}: of another member or run (seed {checkpoint.get('seed')})")
    return checkpoint


def _check_best(args: Namespace, data: Data, member: Member, finished: bool) -> None:
    """Check that model_best.pth.tar is that of the best epoch, before days are spent and before it is counted."""
    path = member.folder / CHECKPOINTS["best"]
    try:
        found = _load_own(args, data, member, path)["epoch"]
        # It is written before checkpoint.pth.tar; where a run was cut off between the two it comes again.
        if found == member.best_epoch or (found > member.epoch and not finished):
            return
        fault = f"{path}: of epoch {found - 1}, the best one was {member.best_epoch - 1}"
    except InputError as error:
        fault = str(error)
    raise InputError(f"{fault}; put it back, or remove {member.folder} to train this member from its start")


def _restore_log(member: Member) -> None:
    """Take the wall times of the log from log.jsonl, and write that anew where it is not what the checkpoint says."""
    path = member.folder / "log.jsonl"
    try:
        text = path.read_text()
        found = [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError, RecursionError):
        text, found = "", []
    lost = 0
    for i, line in enumerate(member.log):
        old = found[i] if i < len(found) and isinstance(found[i], dict) else {}
        line["epoch"] = int(line["epoch"])
        whole = {name: old.get(name) for name in LOG} == line and isinstance(old.get("seconds"), float)
        lost += not whole
        member.log[i] = {"epoch": line["epoch"], "seconds": old["seconds"] if whole else None, **line}
    if lost:
        _warn(f"{path}: damaged; written anew from the checkpoint, with {lost} lines that lack their seconds")
    if text != _log_text(member):  # after a cut it may be an epoch ahead
        write_atomically(path, _log_text(member).encode())


def _log_text(member: Member) -> str:
    return "".join(json.dumps(line) + "\n" for line in member.log)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _run_digest(args: Namespace, data: Data) -> str:
    """What a member's training depends on besides its seed; the other members' seeds are seen in its mask."""
    settings = {name: value for name, value in vars(args).items() if name not in (*FREE_SETTINGS, "seed")}
    settings = {name: value for name, value in settings.items() if NEUTRAL.get(name, ...) != value}
    settings["data"] = data.record["sha256_of_arrays_and_split"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _checkpoint(args: Namespace, data: Data, member: Member) -> dict:
    """All that exact resuming needs; the same state gives the same bytes."""
    return {
        "state_dict": {name: tensor.cpu() for name, tensor in member.model.state_dict().items()},
        "optimizer": member.optimizer.state_dict(),
        "average": None if member.average is None else member.average.state_dict(),
        "epoch": member.epoch,
        "best_acc": member.best_acc,
        "best_epoch": member.best_epoch,
        "log": torch.tensor([[line[name] for name in LOG] for line in member.log], dtype=torch.float64),
        "scores": None if member.scores is None else torch.from_numpy(member.scores),
        "mask_digest": member.mask_digest,
        "run": _run_digest(args, data),
        "seed": member.seed,
        "model": args.model,
        "dataset": data.name,
        "width": args.width,
        **_network(data),
    }


def _save(args: Namespace, data: Data, member: Member) -> None:
    """Write an epoch's files. Only checkpoint.pth.tar makes the epoch count."""
    content = pack_checkpoint(_checkpoint(args, data, member))
    if member.best_epoch == member.epoch:
        write_atomically(member.folder / CHECKPOINTS["best"], content)
    write_atomically(member.folder / "log.jsonl", _log_text(member).encode())
    write_atomically(member.folder / CHECKPOINTS["last"], content, member.folder / PREVIOUS)
    (member.folder / PARTIAL).unlink(missing_ok=True)


def _save_average(args: Namespace, data: Data, member: Member) -> None:
    """Write the mean of the weights as a checkpoint, with BatchNorm's statistics of one epoch of training batches."""
    path = member.folder / CHECKPOINTS["averaged"]
    try:
        _load_own(args, data, member, path)
        return
    except InputError:
        pass  # missing or damaged: made anew, with the same bytes
    batches = data.train.epoch(member.seed, args.epochs, args.batch_size)
    update_bn((images for _, images, _ in batches), member.average)
    state = {name: tensor.cpu() for name, tensor in member.average.module.state_dict().items()}
    save_checkpoint(path, {**_checkpoint(args, data, member), "state_dict": state, "optimizer": None, "average": None})


def _save_partial(args: Namespace, data: Data, member: Member) -> None:
    """Write a checkpoint within an epoch, or before one."""
    save_checkpoint(member.folder / PARTIAL, {**_checkpoint(args, data, member), "position": member.position})


class _Progress:
    """One bar for the whole run on a terminal, and a line for each epoch and member anywhere.

    Of several processes rank 0 has the bar: it holds as many members as any, so that its time left is the run's.
    """

    HEADER = "epoch   seed      lr  train loss  train acc  val loss  val acc  SAM share     time     left"

    def __init__(self, members: list[Member], args: Namespace, samples: int):
        self.args, self.samples = args, samples
        self.done, self.started = 0, time.monotonic()
        self.bar = tqdm(
            disable=not sys.stderr.isatty() or distributed.rank() > 0,
            desc="training",
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left",
        )
        self.count(members)
        if self.total and not distributed.rank():
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
