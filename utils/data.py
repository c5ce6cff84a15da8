"""Images with labels, and batches that are a pure function of (seed, epoch, index).

Images are uint8 [N, H, W, C] on the training device; a whole batch is cropped, flipped and normalised there at once.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# One tag for each use of a generator, so that no two of them share a stream.
TAGS = {"order": 0, "augmentation": 1}


@dataclass(frozen=True)
class Preprocessing:
    """How images become inputs.

    `mean` and `std` are of pixels in [0, 1], by channel; `padding` is the width of the zeros around a training image
    out of which a crop of the image's size is taken; `flip` says whether training mirrors images.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0
    flip: bool = False


@dataclass(frozen=True)
class DatasetInfo:
    """Facts of a data set."""

    num_classes: int
    image_size: int
    preprocessing: Preprocessing

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return len(self.preprocessing.mean)


class ImageSet:
    """Images with labels on one device, read as normalised float32 batches.

    Args:
        images: uint8 [N, H, W, C].
        labels: int64 [N].
        preprocessing: means, deviations, padding and flip.
        device: where images are kept and batches are made.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        preprocessing: Preprocessing,
        device: torch.device | str = "cpu",
    ):
        self.preprocessing = preprocessing
        self.device = torch.device(device)
        self.labels = torch.from_numpy(labels).to(self.device)
        self.height, self.width, self.channels = images.shape[1:]
        p = preprocessing.padding
        padded = F.pad(torch.from_numpy(images), (0, 0, p, p, p, p)).contiguous().to(self.device)
        # [N, H, W, C]: the images themselves, as a view of the padded ones.
        self.images = padded[:, p : p + self.height, p : p + self.width]
        # [., W C]: a row of a crop that starts at each pixel; likewise a view.
        pixels, numbers = len(images) * padded.shape[1] * padded.shape[2], self.width * self.channels
        self._rows = padded.as_strided((max(pixels - self.width + 1, 0), numbers), (self.channels, 1))
        self._heights = torch.arange(self.height, device=self.device)
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        # (x / 255 - mean) / std = x * scale + shift, for each number in a row of an image.
        self._scale = (1 / (255 * std)).repeat(self.width).to(self.device)
        self._shift = (-mean / std).repeat(self.width).to(self.device)

    def __len__(self) -> int:
        return len(self.labels)

    def crop(self, index: Tensor, rows: Tensor, columns: Tensor, mirror: Tensor) -> Tensor:
        """Crops of the zero-padded images, mirrored where asked.

        Args:
            index: which images, int64 [B].
            rows: first row of the crop in the padded image, int64 [B], 0 to 2 * padding; `padding` is no shift.
            columns: the same for columns.
            mirror: bool [B], left-right flip, after the crop.

        Returns:
            uint8 [B, H, W, C].
        """
        # Whole rows at a time: four times as fast as an index into all crops.
        p = self.preprocessing.padding
        first = (index * (self.height + 2 * p) + rows)[:, None] + self._heights
        starts = first * (self.width + 2 * p) + columns[:, None]
        images = self._rows.index_select(0, starts.flatten()).view(-1, self.height, self.width, self.channels)
        flipped, numbers = images.flip(2), self.height * self.width * self.channels
        # Eight bytes at once where an image is a multiple of that.
        wide = torch.int64 if numbers % 8 == 0 else torch.uint8
        choice = (image.view(-1, numbers).view(wide) for image in (flipped, images))
        return torch.where(mirror[:, None], *choice).view(torch.uint8).view_as(images)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, C] -> float32 [B, C, H, W] in channels_last memory: (x / 255 - mean) / std."""
        rows = images.reshape(len(images), self.height, self.width * self.channels)
        rows = rows.float().mul_(self._scale).add_(self._shift)
        return rows.view(len(images), self.height, self.width, self.channels).permute(0, 3, 1, 2)

    def digest(self) -> str:
        """SHA-256 of the images, the labels, the means and the deviations."""
        digest = hashlib.sha256(repr((self.preprocessing.mean, self.preprocessing.std)).encode())
        for start in range(0, len(self), 1024):
            digest.update(self.images[start : start + 1024].cpu().contiguous().numpy())
        digest.update(self.labels.cpu().numpy())
        return digest.hexdigest()

    def batch(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """The chosen images without augmentation, normalised, and their labels."""
        chosen = torch.from_numpy(index).to(self.device)
        return self.normalise(self.images[chosen]), self.labels[chosen]

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, in order and without augmentation: (images, labels) batch by batch."""
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield self.normalise(self.images[part]), self.labels[part]

    def epoch(self, seed: int, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """One epoch of training batches: every image once, in random order, cropped and mirrored at random.

        Order and augmentation are a pure function of (seed, epoch) and of the image's index; nothing else draws
        from their generators. Shifts are uniform over rows and columns, mirroring has probability 1/2, each
        independent for each image, as torchvision's RandomCrop(size, padding) and RandomHorizontalFlip.
        A last batch of one image joins the batch before it, since BatchNorm may be undefined for it.

        Yields:
            (index int64 [B] on the CPU, images float32 [B, C, H, W], labels int64 [B])
        """
        order = generator(seed, epoch, "order").permutation(len(self))
        random = generator(seed, epoch, "augmentation")
        shifts = random.randint(0, 2 * self.preprocessing.padding + 1, size=(2, len(self)))
        mirror = random.randint(0, 2, size=len(self)).astype(bool) & self.preprocessing.flip
        # One transfer per epoch; from here on the host waits for nothing.
        on_cpu = torch.from_numpy(order)
        index = on_cpu.to(self.device)
        rows, columns = torch.from_numpy(shifts).to(self.device)[:, index]
        mirrored = torch.from_numpy(mirror).to(self.device)[index]
        for part in batch_slices(len(self), batch_size):
            images = self.crop(index[part], rows[part], columns[part], mirrored[part])
            yield on_cpu[part], self.normalise(images), self.labels[index[part]]


def batch_slices(samples: int, batch_size: int) -> list[slice]:
    """The batches of an epoch; a single sample at the end joins the batch before it."""
    starts = list(range(0, samples, batch_size))
    if len(starts) > 1 and samples - starts[-1] == 1:
        starts.pop()
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], samples], strict=True)]


def generator(seed: int, epoch: int, tag: str) -> np.random.RandomState:
    """The generator for one use ("order" or "augmentation") in one epoch of one member."""
    return np.random.RandomState([seed, epoch, TAGS[tag]])


@dataclass
class Data:
    """A loaded data set: its training, validation and test images, and what result files record about it."""

    name: str
    info: DatasetInfo
    train: ImageSet
    val: ImageSet
    test: ImageSet
    mislabelled: np.ndarray  # bool [N], True where the training label was replaced by a wrong one
    record: dict = field(default_factory=dict)

    @property
    def network(self) -> dict[str, int]:
        """What a network has to fit, by the argument names of `models.create_model`."""
        info = self.info
        return {"num_classes": info.num_classes, "image_size": info.image_size, "in_channels": info.channels}
