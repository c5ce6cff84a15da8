"""One member of an ensemble: its network, its files, and how far it has come.

A member's folder holds checkpoint.pth.tar (the last epoch), checkpoint_previous.pth.tar (the one before),
model_best.pth.tar, log.jsonl, fisher.npy and sam_mask.npy; with --average_from also model_averaged.pth.tar, and within
an epoch checkpoint_partial.pth.tar. Its state is in its checkpoints alone, each of which has a checksum; they hold log,
scores and the digest of the mask as well. The other files are copies, which are rewritten where they are damaged.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, update_bn

from models import MODELS, create_model, evaluating
from sam import SAM
from utils import InputError, RunError, first_line
from utils.capture import CapturedPasses
from utils.checkpoint import DamagedError, fill_model, load_checkpoint, pack_checkpoint, save_checkpoint
from utils.data import batch_slices
from utils.events import Events
from utils.files import digest, unpinned, write_array, write_atomically
from utils.fisher import per_sample_fisher
from utils.metrics import per_sample
from utils.run import CHECKPOINTS, MEMBER_FILES, PARTIAL, PREVIOUS, Run, Stopped
from utils.start import start_from
from utils.training import in_parts, learning_rate, predict, train_epoch

SCORE_BATCH = 128
# What a line of log.jsonl holds besides its wall time.
LOG = ("epoch", "lr", "train_loss", "train_acc", "val_loss", "val_acc", "sam_share")

# What the files of a member are that do not hold a whole epoch.
KINDS = {CHECKPOINTS["averaged"]: "of averaged weights", PARTIAL: "within an epoch"}


class Member:
    """One network of an ensemble, as its files say.

    Args:
        run: what it is a member of; its folder is open.
        seed: the network is drawn from it, and order and augmentation of its epochs.

    Attributes:
        epoch: epochs finished.
        position: where in the next epoch it stands, as `train_epoch` gives it; None is the beginning.
        scores: float32 [N], its sharpness scores, once they are taken.
        mask: bool [N] on the CPU, which samples it trains with SAM, once samples are assigned.

    Raises:
        InputError: if its files cannot be used.
        RunError: if its folder cannot be created.
    """

    def __init__(self, run: Run, seed: int):
        settings, device = run.settings, run.data.train.device
        self.run, self.seed, self.folder = run, seed, run.folder / f"seed_{seed}"
        torch.manual_seed(seed)  # the network is drawn on the CPU, so that its start does not depend on the device
        self.model = create_model(settings.model, width=settings.width, **run.data.info.network)
        self.epoch, self.position = 0, None
        self.best_acc, self.best_epoch = -1.0, 0  # best_epoch: epochs that were finished then
        self.scores: np.ndarray | None = None
        self.mask: Tensor | None = None
        self.mask_digest: str | None = None
        self.log: list[dict] = []
        self.events: Events | None = None  # from its first epoch here on, with --tensorboard
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be created ({error.strerror})") from error
        for name in MEMBER_FILES:  # left by a write that was killed
            (self.folder / f"{name}.tmp").unlink(missing_ok=True)
        checkpoint = self._newest_checkpoint()
        if checkpoint is None and settings.init_from is not None:
            path = unpinned(settings.init_from)
            found = load_checkpoint(path, names=self.model.state_dict())
            loaded = start_from(self.model, found["state_dict"], run.data.info.network["num_classes"], path)
            if found["unread"]:
                loaded += f"; also there, and not read: {', '.join(found['unread'])}"
            if seed == settings.seed[0]:  # it is the same for all
                print(f"--init_from {loaded}", file=sys.stderr)
        self.model.to(device, memory_format=torch.channels_last)
        self.optimizer = self._new_optimizer()
        self.captured = None
        if device.type == "cuda" and settings.model in MODELS:
            self.captured = CapturedPasses(self.model, min(settings.batch_size + 1, len(run.data.train)))
        self.average = None
        if settings.average_from is not None:
            self.average = AveragedModel(self.model, multi_avg_fn=self._average)
        if checkpoint is not None:
            self._load(checkpoint)

    def _new_optimizer(self) -> SAM:
        settings = self.run.settings
        options = {"rho": settings.rho, "adaptive": settings.sam_adaptive}
        options |= {"lr": settings.lr, "weight_decay": settings.weight_decay}
        if settings.optimizer == "adamw":
            return SAM(self.model.parameters(), torch.optim.AdamW, **options)
        return SAM(self.model.parameters(), torch.optim.SGD, momentum=settings.momentum, **options)

    @property
    def passes_left(self) -> float:
        """Forward-backward passes of one image until the end; a sample with SAM takes two."""
        settings, mask = self.run.settings, self.mask
        epochs = range(self.epoch, settings.epochs)
        shares = [settings.share_of_sam(epoch) if mask is None else mask.double().mean().item() for epoch in epochs]
        return sum(1 + share for share in shares) * len(self.run.data.train)

    def train_epoch(self) -> None:
        """Train the next epoch, or the rest of it, and save it."""
        run, settings, data = self.run, self.run.settings, self.run.data
        started, epoch, here = time.monotonic(), self.epoch, None
        if self.position is not None:
            started -= self.position["seconds"]
        lr = learning_rate(settings.lr, settings.schedule, epoch, settings.epochs, settings.warmup_epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        mask = self.mask
        if mask is None:
            mask = torch.full((len(data.train),), bool(settings.share_of_sam(epoch)))
        saved = time.monotonic()
        if settings.tensorboard and self.events is None:
            steps = epoch * len(batch_slices(len(data.train), settings.batch_size))
            self.events = Events(self.folder, steps + (self.position["steps"] if self.position else 0))

        def save() -> None:
            if self.events is not None:
                self.events.write_steps()
            self.position = {**here(), "seconds": time.monotonic() - started}
            self.save_partial()

        def after_step(passes: int, position: Callable[[], dict]) -> None:
            nonlocal here, saved
            here = position
            if self.average is not None and epoch >= settings.average_from:
                self.average.update_parameters(self.model)
            run.progress.advance(passes)
            if time.monotonic() - saved >= settings.save_every:
                save()
                saved = time.monotonic()
            run.signals.check()

        batches = mask, self.seed, epoch, settings.batch_size
        step = {name: getattr(settings, name) for name in ("bn_perturbed", "amp", "label_smoothing", "clip_norm")}
        more = {"after_step": after_step, "position": self.position, **step}
        more["captured"] = self.captured
        more["record"] = None if self.events is None else self.events.rows
        try:
            with run.signals.deferred():  # within a step the weights are elsewhere
                train_loss, train_acc = train_epoch(self.model, self.optimizer, data.train, *batches, **more)
            logits, _ = predict(self.model, data.val, at_once=settings.batch_size)
            val = per_sample(F.log_softmax(logits, dim=1), data.val.labels.cpu())
            val_loss, val_acc = val["nll"].mean().item(), val["correct"].mean().item()
        except Stopped:
            if here is not None:
                save()
            raise
        if not (math.isfinite(train_loss) and math.isfinite(val_loss)):
            what = f"member with seed {self.seed}, epoch {epoch}: the loss is not finite at learning rate {lr:g}"
            way_out = "start anew with a smaller --lr or --rho and another --save_path"
            raise RunError(f"{what}; what was saved before remains: {way_out}")
        values = epoch, lr, train_loss, train_acc, val_loss, val_acc, mask.double().mean().item()
        line = {"epoch": epoch, "seconds": round(time.monotonic() - started, 3)} | dict(zip(LOG, values, strict=True))
        with run.signals.deferred():
            if self.events is not None:  # before the checkpoint: events of steps that are made again are passed over
                self.events.write_epoch(line, len(data.train))
            self.log.append(line)
            self.epoch, self.position = epoch + 1, None
            # Of equally good epochs the latest counts: on a small validation set an early one would win by luck.
            if val_acc >= self.best_acc:
                self.best_acc, self.best_epoch = val_acc, self.epoch
            self._save()
            run.progress.print(self.seed, line)

    def _average(self, means: list[Tensor], weights: list[Tensor], count: Tensor) -> None:
        """Take the weights into their means. `count` is on the device: reading it there would wait for all steps."""
        changes = torch._foreach_sub(weights, means)
        torch._foreach_div_(changes, int(self.average.n_averaged) + 1)
        torch._foreach_add_(means, changes)

    def score(self) -> np.ndarray:
        """The sharpness scores of all training samples, float32 [N]: those it has, or new ones, which are saved.

        Taken in eval mode on images without augmentation.

        Raises:
            RunError: if a score is not finite.
        """
        if self.scores is None:
            if self.epoch > self.run.settings.initial_epochs:
                raise InputError(f"{self.folder}: its checkpoint has no scores, which it must have; use --overwrite")
            with evaluating(self.model):
                batch_sizes = SCORE_BATCH, self.run.settings.batch_size
                parts = in_parts(lambda x, y: per_sample_fisher(self.model, x, y), self.run.data.train, *batch_sizes)
                scores = torch.cat(list(parts)).cpu().numpy()
            if not np.isfinite(scores).all():
                what = f"{np.sum(~np.isfinite(scores))} sharpness scores are not finite"
                way_out = "start anew with a smaller --lr or --rho and another --save_path"
                raise RunError(f"member with seed {self.seed}, epoch {self.epoch}: {what}; {way_out}")
            self.scores = scores
            # Before anybody trains with them: on a GPU a second computation may differ in the last bits.
            self.save_partial()
        write_array(self.folder / "fisher.npy", self.scores)
        return self.scores

    def assign(self, mask: np.ndarray) -> None:
        """Set which samples are trained with SAM from now on, bool [N].

        Raises:
            InputError: if the member has already been trained with another set.
        """
        if self.mask_digest not in (None, digest(mask)):
            what = f"the scores of the members do not give the set that seed {self.seed} was trained with"
            why = "a part of the run was redone on another device or with another --threads"
            raise InputError(f"{self.folder}: {what}: {why}; restore its files, or start anew with --overwrite")
        write_array(self.folder / "sam_mask.npy", mask)
        self.mask, self.mask_digest = torch.from_numpy(mask), digest(mask)

    def check_best(self) -> None:
        """Check that model_best.pth.tar is that of the best epoch, before days are spent and before it is evaluated."""
        path = self.folder / CHECKPOINTS["best"]
        try:
            found = self._load_own(path)["epoch"]
            if found == self.best_epoch:
                return
            fault = f"{path}: of epoch {found - 1}, the best one was {self.best_epoch - 1}"
        except InputError as error:
            fault = str(error)
        raise InputError(f"{fault}; restore it, or remove {self.folder} to train this member from its start")

    def save_partial(self) -> None:
        """Write a checkpoint within an epoch, or before one."""
        save_checkpoint(self.folder / PARTIAL, {**self._checkpoint(), "position": self.position})

    def save_average(self) -> None:
        """Write the mean of the weights as a checkpoint, with BatchNorm statistics of one epoch of training batches."""
        path = self.folder / CHECKPOINTS["averaged"]
        try:
            self._load_own(path)
            return
        except InputError:
            pass  # missing or damaged: it is written anew, with the same bytes
        settings = self.run.settings
        batches = self.run.data.train.epoch(self.seed, settings.epochs, settings.batch_size)
        torch.manual_seed((self.seed << 20) + settings.epochs)  # of networks that draw, whatever was drawn before
        update_bn((images for _, images, _ in batches), self.average)
        state = {name: tensor.cpu() for name, tensor in self.average.module.state_dict().items()}
        save_checkpoint(path, {**self._checkpoint(), "state_dict": state, "optimizer": None, "average": None})

    def _save(self) -> None:
        """Write an epoch's files. It counts once one of its checkpoints is there."""
        content = pack_checkpoint(self._checkpoint())
        write_atomically(self.folder / "log.jsonl", log_text(self.log).encode())
        if self.best_epoch == self.epoch:
            write_atomically(self.folder / CHECKPOINTS["best"], content)
        write_atomically(self.folder / CHECKPOINTS["last"], content, self.folder / PREVIOUS)
        (self.folder / PARTIAL).unlink(missing_ok=True)

    def _checkpoint(self) -> dict[str, Any]:
        """All that exact resuming needs; the same state gives the same bytes."""
        settings, data = self.run.settings, self.run.data
        optimizer, average = self.optimizer.state_dict(), None if self.average is None else self.average.state_dict()
        # On the CPU, so that the file can be read where there is no such device.
        for index, state in optimizer["state"].items():
            optimizer["state"][index] = {name: tensor.cpu() for name, tensor in state.items()}
        for name in average or ():
            average[name] = average[name].cpu()
        return {
            "state_dict": {name: tensor.cpu() for name, tensor in self.model.state_dict().items()},
            "optimizer": optimizer,
            "average": average,
            "epoch": self.epoch,
            "best_acc": self.best_acc,
            "best_epoch": self.best_epoch,
            "log": torch.tensor([[line[name] for name in LOG] for line in self.log], dtype=torch.float64),
            "scores": None if self.scores is None else torch.from_numpy(self.scores),
            "mask_digest": self.mask_digest,
            "run": self.run.digest,
            "seed": self.seed,
            "model": settings.model,
            "dataset": data.name,
            "width": settings.width,
            **data.info.network,
            **data.inputs,
        }

    def _load(self, checkpoint: dict[str, Any]) -> None:
        fill_model(self.model, checkpoint["state_dict"], self.folder)
        try:
            # The param_groups come from the settings, which are the same; only the state comes from the file.
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": groups})
            if self.average is not None:
                self.average.load_state_dict(checkpoint["average"])
            self.epoch, self.position = checkpoint["epoch"], checkpoint.get("position")
            self.best_acc, self.best_epoch = checkpoint["best_acc"], checkpoint["best_epoch"]
            self.scores = None if checkpoint["scores"] is None else checkpoint["scores"].numpy()
            self.mask_digest = checkpoint["mask_digest"]
            self.log = [dict(zip(LOG, row, strict=True)) for row in checkpoint["log"].tolist()]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = f"cannot be resumed ({first_line(error)}); use --overwrite to start anew"
            raise InputError(f"{self.folder}: {reason}") from error
        restore_log(self.folder / "log.jsonl", self.log)
        if self.epoch:
            self.check_best()

    def _newest_checkpoint(self) -> dict[str, Any] | None:
        """The last whole checkpoint, or the one within the next epoch if there is one."""
        names = CHECKPOINTS["last"], PREVIOUS, CHECKPOINTS["best"], PARTIAL
        last, previous, best, partial = (self.folder / name for name in names)
        checkpoint, source, faults = None, last, []
        for path in (last, previous):
            if not path.exists():
                faults.append(f"{path}: missing")
                continue
            try:
                checkpoint, source = self._load_own(path), path
                break
            except DamagedError as error:
                faults.append(str(error))
        if checkpoint is None and (last.exists() or previous.exists()):
            way_out = f"restore one of them, or remove {self.folder} to train this member from its start"
            raise InputError(f"{'; '.join(faults)}; {way_out}")
        try:
            newer = self._load_own(best)
            # It is written first. To repeat its epoch would not do: on a GPU that may end elsewhere, with another best.
            if newer["epoch"] > (checkpoint["epoch"] if checkpoint else 0):
                checkpoint, source = newer, best
        except InputError:
            pass  # missing or damaged: `check_best` says so where there is to be one
        if checkpoint is not None and faults:
            _warn(f"{faults[0]}; resuming from {source.name}, after epoch {checkpoint['epoch'] - 1}")
        if source == best:
            write_atomically(last, best.read_bytes(), None if faults else previous)
        elif source == previous:
            os.replace(previous, last)
        if partial.exists():
            try:
                within = self._load_own(partial)
                if within["epoch"] == (checkpoint["epoch"] if checkpoint else 0):
                    return within
            except DamagedError as error:
                _warn(f"{error}; the epoch that it was in is repeated")
            partial.unlink()  # damaged, or of an epoch that is finished
        return checkpoint

    def _load_own(self, path: Path) -> dict[str, Any]:
        """Read a checkpoint that must be this member's."""
        checkpoint = load_checkpoint(path, ours=True)
        if checkpoint.get("seed") != self.seed:
            raise DamagedError(f"{path}: of another member (seed {checkpoint.get('seed')})")
        if checkpoint.get("run") != self.run.digest:
            raise DamagedError(f"{path}: of a run of other settings or images than {self.run.folder / 'args.json'} has")
        kind, expected = _kind_of(checkpoint), KINDS.get(path.name, "of a whole epoch")
        if kind != expected:  # files that were swapped may be of the same epoch
            raise DamagedError(f"{path}: expected a checkpoint {expected}, got one {kind}")
        return checkpoint


def _kind_of(checkpoint: dict[str, Any]) -> str:
    """What a checkpoint of a member is, in the words of `KINDS`."""
    if checkpoint.get("optimizer") is None:
        return KINDS[CHECKPOINTS["averaged"]]
    return KINDS[PARTIAL] if "position" in checkpoint else "of a whole epoch"


def restore_log(path: Path, log: list[dict]) -> None:
    """Add the wall times of log.jsonl to a checkpoint's log, and rewrite that file where it does not match."""
    try:
        text = path.read_text()
        found = [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError, RecursionError):
        text, found = "", []
    lost = 0
    for i, line in enumerate(log):
        old = found[i] if i < len(found) and isinstance(found[i], dict) else {}
        line["epoch"] = int(line["epoch"])
        whole = {name: old.get(name) for name in LOG} == line and isinstance(old.get("seconds"), float)
        lost += not whole
        log[i] = {"epoch": line["epoch"], "seconds": old["seconds"] if whole else None, **line}
    if lost:
        _warn(f"{path}: damaged; rewritten from the checkpoint, with {lost} lines that lack their seconds")
    if text != log_text(log):  # a stopped run may have written it an epoch ahead
        write_atomically(path, log_text(log).encode())


def log_text(log: list[dict]) -> str:
    """The content of log.jsonl."""
    return "".join(json.dumps(line) + "\n" for line in log)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
