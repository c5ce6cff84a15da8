"""Images with labels, and batches that are a pure function of (seed, epoch, index).

Images are uint8 [N, H, W, C], on the training device or in a memory-mapped file, which may be larger than the memory; a
whole batch is cropped, flipped and normalised on the device at once.
"""

import hashlib
import math
import mmap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import resource
except ImportError:  # Windows
    resource = None

READ_AHEAD = 100  # batches
# One tag for each use of a generator, so that no two of them share a stream.
TAGS = {"order": 0, "augmentation": 1}


@dataclass(frozen=True)
class Preprocessing:
    """How images become inputs.

    `mean` and `std` are of pixels in [0, 1], by channel; `padding` is the width of the zeros around a training image
    out of which a crop of the image's size is taken; `flip` says whether training mirrors images. `size` is the height
    and width of the inputs where the images are larger squares: what is taken is their middle, or in training, with
    `random_scale`, a crop at a random scale.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0
    flip: bool = False
    size: int | None = None
    random_scale: bool = False


@dataclass(frozen=True)
class DatasetInfo:
    """Facts of a data set."""

    num_classes: int
    image_size: int
    preprocessing: Preprocessing
    classes: tuple[str, ...] = ()  # their names, of the user's own images

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return len(self.preprocessing.mean)

    @property
    def network(self) -> dict[str, int]:
        """What a network has to fit, by the argument names of `models.create_model`."""
        return {"num_classes": self.num_classes, "image_size": self.image_size, "in_channels": self.channels}


class ImageSet:
    """Images with labels, read as normalised float32 batches on one device.

    Args:
        images: uint8 [N, H, W, C]; with `rows` a memory map with these images among others, which is read batch by
            batch and never whole.
        labels: int64 [N].
        preprocessing: means, deviations and augmentation.
        device: where batches are made, and where images are kept that are not memory-mapped.
        rows: int64 [N], where in the memory map each image is.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        preprocessing: Preprocessing,
        device: torch.device | str = "cpu",
        rows: np.ndarray | None = None,
    ):
        self.preprocessing = preprocessing
        self.device = torch.device(device)
        self.labels = torch.from_numpy(labels).to(self.device)
        stored_height, stored_width, self.channels = images.shape[1:]
        self.height, self.width = preprocessing.size or stored_height, preprocessing.size or stored_width
        self.stored_size = stored_height
        self._map, self._map_rows, self._file = None, None, None
        if rows is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a tensor that cannot be written; nobody does
                self._map, self._map_rows = torch.from_numpy(images), torch.from_numpy(rows)
            if isinstance(images.base, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED"):
                self._file, self._offset, self._waiting = images.base, images.offset, 0
                self._file.madvise(mmap.MADV_RANDOM)  # the system would read 128 KiB around each image
        else:
            p = preprocessing.padding
            padded = F.pad(torch.from_numpy(images), (0, 0, p, p, p, p)).contiguous().to(self.device)
            # [N, H, W, C]: the images themselves, as a view of the padded ones.
            self.images = padded[:, p : p + stored_height, p : p + stored_width]
            self._rows = self._crop_rows(padded)
        self._heights = torch.arange(self.height, device=self.device)
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        # (x / 255 - mean) / std = x * scale + shift, for each number in a row of an image.
        self._scale = (1 / (255 * std)).repeat(self.width).to(self.device)
        self._shift = (-mean / std).repeat(self.width).to(self.device)

    def __len__(self) -> int:
        return len(self.labels)

    def _crop_rows(self, padded: Tensor) -> Tensor:
        """[., W C]: a row of a crop that starts at each pixel of padded images, as a view."""
        pixels, numbers = math.prod(padded.shape[:3]), self.width * self.channels
        return padded.as_strided((max(pixels - self.width + 1, 0), numbers), (self.channels, 1))

    def _stored(self, index: Tensor | slice) -> Tensor:
        """The chosen images as they are stored, uint8 on the device; the index into a memory map is on the CPU."""
        if self._map is None:
            return self.images[index]
        waits = _disk_waits()
        images = self._map.index_select(0, self._map_rows[index])
        if _disk_waits() > waits:
            self._waiting = READ_AHEAD
        if self.device.type == "cuda":
            images = images.pin_memory()  # so that the host does not wait for the copy
        return images.to(self.device, non_blocking=True)

    def _read_ahead(self, index: Tensor | slice) -> None:
        """Have the system read the images of the next batch from the disk at once, while this one is trained on.

        Where that is of use: for some batches after one that had to wait for the disk.
        """
        if self._file is None or not self._waiting:
            return
        self._waiting -= 1
        rows, size = self._map_rows[index], self._map[0].nbytes
        together = len(rows) and rows[-1] - rows[0] == len(rows) - 1  # of a split, in order
        for row in rows[:1].tolist() if together else rows.tolist():
            start = self._offset + row * size
            first, length = start - start % mmap.PAGESIZE, size * (len(rows) if together else 1)
            self._file.madvise(mmap.MADV_WILLNEED, first, start - first + length)

    def pixels(self, index: Tensor | slice) -> Tensor:
        """The chosen images without augmentation, uint8 [B, H, W, C] on the device; indices are on the CPU."""
        images = self._stored(index if self._map is not None or isinstance(index, slice) else index.to(self.device))
        top, left = (images.shape[1] - self.height) // 2, (images.shape[2] - self.width) // 2
        return images[:, top : top + self.height, left : left + self.width]

    def crop(self, index: Tensor, rows: Tensor, columns: Tensor, mirror: Tensor) -> Tensor:
        """Crops of the zero-padded images, mirrored where asked.

        Args:
            index: which images, int64 [B]; on the device, but on the CPU where they are memory-mapped.
            rows: first row of the crop in the padded image, int64 [B], 0 to 2 * padding; `padding` is no shift.
            columns: the same for columns.
            mirror: bool [B], left-right flip, after the crop.

        Returns:
            uint8 [B, H, W, C].
        """
        p = self.preprocessing.padding
        if self._map is None and not self.preprocessing.size:
            source = self._rows
        else:
            source = self._crop_rows(F.pad(self.pixels(index), (0, 0, p, p, p, p)).contiguous())
            index = torch.arange(len(index), device=self.device)
        # Whole rows at a time: four times as fast as an index into all crops.
        first = (index * (self.height + 2 * p) + rows)[:, None] + self._heights
        starts = first * (self.width + 2 * p) + columns[:, None]
        images = source.index_select(0, starts.flatten()).view(-1, self.height, self.width, self.channels)
        flipped, numbers = images.flip(2), self.height * self.width * self.channels
        # Eight bytes at once where an image is a multiple of that.
        wide = torch.int64 if numbers % 8 == 0 else torch.uint8
        choice = (image.view(-1, numbers).view(wide) for image in (flipped, images))
        return torch.where(mirror[:, None], *choice).view(torch.uint8).view_as(images)

    def crop_scaled(self, index: Tensor, boxes: Tensor, mirror: Tensor) -> Tensor:
        """Crops of the stored images, scaled to the size of the inputs (linear, antialiased), mirrored where asked.

        Args:
            index: which images, int64 [B]; on the device, but on the CPU where they are memory-mapped.
            boxes: int64 [4, B], top, left, height and width of the crops.
            mirror: bool [B], left-right flip, after the crop.

        Returns:
            uint8 [B, H, W, C], as torchvision's resized_crop of images in uint8.
        """
        images = self._stored(index).permute(0, 3, 1, 2).float()  # [B, C, S, S]
        top, left, height, width = boxes
        down = _resampling(top, height, images.shape[2], self.height)
        across = _resampling(left, width, images.shape[3], self.width)
        across = torch.where(mirror[:, None, None], across.flip(1), across)
        scaled = torch.matmul(torch.matmul(down[:, None], images), across.mT[:, None])
        return scaled.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, C] -> float32 [B, C, H, W] in channels_last memory: (x / 255 - mean) / std."""
        rows = images.reshape(len(images), self.height, self.width * self.channels)
        rows = rows.float().mul_(self._scale).add_(self._shift)
        return rows.view(len(images), self.height, self.width, self.channels).permute(0, 3, 1, 2)

    def digest(self) -> str:
        """SHA-256 of the images, the labels, the means and the deviations."""
        digest = hashlib.sha256(repr((self.preprocessing.mean, self.preprocessing.std)).encode())
        for start in range(0, len(self), 1024):
            digest.update(self.pixels(slice(start, start + 1024)).cpu().contiguous().numpy())
        digest.update(self.labels.cpu().numpy())
        return digest.hexdigest()

    def batch(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """The chosen images without augmentation, normalised, and their labels."""
        chosen = torch.from_numpy(index)
        return self.normalise(self.pixels(chosen)), self.labels[chosen.to(self.device)]

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Consecutive images without augmentation, normalised, and their labels; those that follow are read ahead."""
        self._read_ahead(slice(stop, 2 * stop - start))
        return self.normalise(self.pixels(slice(start, stop))), self.labels[start:stop]

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, in order and without augmentation: (images, labels) batch by batch."""
        return (self.part(start, start + batch_size) for start in range(0, len(self), batch_size))

    def epoch(self, seed: int, epoch: int, batch_size: int, done: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """One epoch of training batches: every image once, in random order, cropped and mirrored at random.

        Order and augmentation are a pure function of (seed, epoch) and of the image's index; nothing else draws
        from their generators. Shifts are uniform over rows and columns, mirroring has probability 1/2, each
        independent for each image, as torchvision's RandomCrop(size, padding) and RandomHorizontalFlip; crops at a
        random scale are drawn as by its RandomResizedCrop.
        A last batch of one image joins the batch before it, since BatchNorm may be undefined for it.

        Args:
            seed, epoch: of the generators.
            batch_size: images of a batch.
            done: batches at the beginning that are left out.

        Yields:
            (index int64 [B] on the CPU, images float32 [B, C, H, W], labels int64 [B])
        """
        order = generator(seed, epoch, "order").permutation(len(self))
        random, p = generator(seed, epoch, "augmentation"), self.preprocessing
        if p.random_scale:
            draws = random_boxes(random, len(self), self.stored_size)
        else:
            draws = random.randint(0, 2 * p.padding + 1, size=(2, len(self)))
        mirror = random.randint(0, 2, size=len(self)).astype(bool) & p.flip
        # One transfer per epoch; from here on the host waits for nothing.
        on_cpu = torch.from_numpy(order)
        index = on_cpu.to(self.device)
        drawn = torch.from_numpy(draws).to(self.device)[:, index]
        mirrored = torch.from_numpy(mirror).to(self.device)[index]
        parts = batch_slices(len(self), batch_size)[done:]
        for part, following in zip(parts, [*parts[1:], slice(0)], strict=False):
            self._read_ahead(on_cpu[following])
            chosen = index[part] if self._map is None else on_cpu[part]
            if p.random_scale:
                images = self.crop_scaled(chosen, drawn[:, part], mirrored[part])
            else:
                images = self.crop(chosen, *drawn[:, part], mirrored[part])
            yield on_cpu[part], self.normalise(images), self.labels[index[part]]


def random_boxes(random: np.random.RandomState, count: int, size: int) -> np.ndarray:
    """Crops of squares, int64 [4, count]: top, left, height and width, drawn as by torchvision's RandomResizedCrop.

    Its share of the area is uniform in [0.08, 1], the logarithm of width / height uniform in [log 3/4, log 4/3], its
    place uniform; what does not fit is drawn anew, and after ten times the whole square is taken.
    """
    heights, widths = np.full(count, size), np.full(count, size)
    todo = np.arange(count)
    for _ in range(10):
        area = random.uniform(0.08, 1, len(todo)) * size**2
        ratio = np.exp(random.uniform(math.log(3 / 4), math.log(4 / 3), len(todo)))
        width, height = np.rint(np.sqrt(area * ratio)).astype(int), np.rint(np.sqrt(area / ratio)).astype(int)
        fits = (width <= size) & (height <= size) & (width > 0) & (height > 0)
        widths[todo[fits]], heights[todo[fits]] = width[fits], height[fits]
        todo = todo[~fits]
    return np.stack([random.randint(0, size - heights + 1), random.randint(0, size - widths + 1), heights, widths])


def _resampling(start: Tensor, length: Tensor, stored: int, size: int) -> Tensor:
    """Matrices [B, size, stored] that scale `length` pixels from `start` on to `size`: triangles, antialiased."""
    scale = (length.float() / size)[:, None, None]
    centres = start[:, None, None] + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    pixels = torch.arange(stored, device=start.device)
    weights = (1 - ((pixels + 0.5 - centres) / scale.clamp(min=1)).abs()).clamp_(min=0)
    inside = (pixels >= start[:, None, None]) & (pixels < (start + length)[:, None, None])
    weights = weights * inside
    return weights / weights.sum(dim=2, keepdim=True)


def _disk_waits() -> int:
    """How often this process has waited for a page of a file."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt if resource else 0


def scaled(images: Tensor, size: int) -> Tensor:
    """The middle square of images [N, H, W, C], scaled by a triangle filter, antialiased; uint8 remains uint8.

    As `utils.folder.decode`, which has Pillow do it, but for the last bit of uint8.
    """
    height, width = images.shape[1:3]
    side = min(height, width)
    if not side:
        raise ValueError(f"images: expected a pixel or more, got {height}x{width}")
    top, left = (height - side) // 2, (width - side) // 2
    images = images[:, top : top + side, left : left + side]
    if side == size:
        return images
    channels_first = images.permute(0, 3, 1, 2).float()
    result = F.interpolate(channels_first, (size, size), mode="bilinear", align_corners=False, antialias=True)
    result = result.permute(0, 2, 3, 1)
    return result.round().clamp(0, 255).to(torch.uint8) if images.dtype == torch.uint8 else result.clamp(0, 255)


def coloured(images: Tensor, channels: int) -> Tensor:
    """Images [N, H, W, 1 or 3] with 1 or 3 channels: grey repeated, or colour turned grey.

    Grey is 0.299 R + 0.587 G + 0.114 B (ITU-R 601-2), of uint8 in Pillow's whole numbers.
    """
    if images.shape[3] == channels:
        return images
    if channels == 3:
        return images.expand(-1, -1, -1, 3)
    if images.dtype == torch.uint8:
        weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32, device=images.device)
        return (((images.int() * weights).sum(dim=3, keepdim=True) + 2**15) >> 16).to(torch.uint8)
    return (images * torch.tensor([0.299, 0.587, 0.114], device=images.device)).sum(dim=3, keepdim=True)


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
    def inputs(self) -> dict[str, list]:
        """What turns images into inputs and outputs into classes, as checkpoints hold it."""
        p = self.info.preprocessing
        return {"classes": list(self.info.classes), "mean": list(p.mean), "std": list(p.std)}
