"""What TensorBoard shows of a member while it trains: a file of events beside its log.jsonl.

Steps of the optimizer are counted from the beginning of the training, and values of an epoch stand at its last one.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from utils import InputError, first_line

FILES = "events.out.tfevents"  # how the names of these files begin
STEP_TAGS = ("step/gradient_norm", "step/perturbation_norm", "step/cosine_of_gradients")
EPOCH_TAGS = {"train_loss": "train/loss", "train_acc": "train/accuracy", "val_loss": "val/loss"}
EPOCH_TAGS |= {"val_acc": "val/accuracy", "lr": "learning_rate", "sam_share": "sam_share"}


def check_tensorboard() -> None:
    """See that events can be written.

    Raises:
        InputError: saying how to install what is missing.
    """
    try:
        import torch.utils.tensorboard  # noqa: F401, takes a second, so nobody waits for it without the option
    except ImportError as error:
        reason = f"tensorboard cannot be imported ({first_line(error)})"
        raise InputError(f"--tensorboard: {reason}; install it by pip install tensorboard, or leave it out") from error


class Events:
    """The events of a member, from some step on.

    Events that an interrupted process wrote of steps after it are not shown: they are made again.

    Args:
        folder: of the member.
        step: how many steps it has made.

    Attributes:
        rows: the record of steps that are not written yet, as `utils.training.sharpbalance_step` appends it.
    """

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.rows: list[Tensor] = []
        self.step = step
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write_steps(self) -> None:
        """Write what the steps since the last call have recorded; this waits for the device, once."""
        for row in torch.stack(self.rows).tolist() if self.rows else ():
            self.step += 1
            for tag, value in zip(STEP_TAGS, row, strict=True):
                if not math.isnan(value):  # a step without SAM has no eps
                    self.writer.add_scalar(tag, value, self.step)
        self.rows.clear()
        self.writer.flush()

    def write_epoch(self, line: dict, images: int) -> None:
        """Write a line of log.jsonl, after the steps of its epoch, and the training images that it took per second."""
        self.write_steps()
        for name, tag in EPOCH_TAGS.items():
            self.writer.add_scalar(tag, line[name], self.step)
        if line["seconds"]:
            self.writer.add_scalar("images_per_second", images / line["seconds"], self.step)
        self.writer.flush()
