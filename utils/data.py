"""Data sets in memory, their validation split, and batches that are a pure function of (seed, epoch).

Images are uint8 [N, H, W, C] on the training device; a whole batch is cropped, flipped and normalised there at once.
"""

import fcntl
import gzip
import hashlib
import io
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from utils import InputError, first_line

# torchvision and scikit-learn take more than a second to import; the functions that need them import them.


@dataclass(frozen=True)
class DatasetInfo:
    """Facts of a data set.

    `mean` and `std` are of pixels in [0, 1], by channel; `padding` is the width of the zeros around an image of which
    training crops the image's size again; `flip` tells whether training mirrors images; `places` are the folders below
    --data_path where the set is looked for; `marker` is a file or folder that shows that it is there.
    """

    num_classes: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int
    flip: bool
    places: tuple[str, ...]
    marker: str


# Means and deviations of the colour sets: those of the authors' release. Of the grey ones: their training images'.
DATASETS = {
    "cifar10": DatasetInfo(
        10,
        32,
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        4,
        True,
        ("", "cifar10", "cifar-10-batches-py", "cifar10/cifar-10-batches-py"),
        "data_batch_1",
    ),
    "cifar100": DatasetInfo(
        100,
        32,
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        4,
        True,
        ("", "cifar100", "cifar-100-python", "cifar100/cifar-100-python"),
        "test",
    ),
    "tiny_imgnet": DatasetInfo(
        200,
        64,
        (0.480, 0.448, 0.397),
        (0.276, 0.269, 0.282),
        4,
        True,
        ("", "tiny-imagenet-200", "tiny_imgnet", "tiny_imgnet/tiny-imagenet-200"),
        "val",
    ),
    "fashion_mnist": DatasetInfo(
        10,
        32,
        (0.2190,),
        (0.3318,),
        4,
        True,
        ("", "fashion-mnist", "fashion_mnist", "FashionMNIST/raw", "fashion_mnist/FashionMNIST/raw"),
        "train-images-idx3-ubyte*",
    ),
    # A mirrored digit is another sign, and of 8 pixels one is a large shift.
    "digits": DatasetInfo(10, 8, (0.3053,), (0.3763,), 1, False, (), ""),
}

# The corrupted copies of the test sets, by data set. Published: CIFAR-10-C, CIFAR-100-C, Tiny-ImageNet-C.
CORRUPTED = {
    "cifar10": "CIFAR-10-C",
    "cifar100": "CIFAR-100-C",
    "tiny_imgnet": "Tiny-ImageNet-C",
    "fashion_mnist": "Fashion-MNIST-C",
    "digits": "digits-C",
}
CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
SEVERITIES = (1, 2, 3, 4, 5)
SPLITS = ("val", "test", "train", "corrupted")
AUGMENTATIONS = ("standard", "flip", "none")

VALIDATION_SHARE = 0.1
# The splits are part of the experiment: they must not move with a library's version. RandomState's stream is frozen.
SPLIT_SEED = 0
NOISE_SEED = 1
TAGS = {"order": 0, "augmentation": 1}

# More than the published files need, and no more memory than a machine has: of a file of a data set (CIFAR-100's
# training file has 148 MiB), of an unpacked IDX file (45 MiB), of a 64x64 image (16 KiB), and of a text (0.5 MiB).
MOST_FILE, MOST_IDX, MOST_IMAGE, MOST_TEXT = 2**28, 2**27, 2**20, 2**24


class ImageSet:
    """Images with labels on one device, ready to be drawn as normalised float32 batches.

    Args:
        images: uint8 [N, H, W, C].
        labels: int64 [N].
        info: means, deviations, padding and flip.
        device: where images are kept and batches are made.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, info: DatasetInfo, device: torch.device | str = "cpu"):
        self.info = info
        self.device = torch.device(device)
        self.labels = torch.from_numpy(labels).to(self.device)
        self.height, self.width, self.channels = images.shape[1:]
        p = info.padding
        padded = F.pad(torch.from_numpy(images), (0, 0, p, p, p, p)).contiguous().to(self.device)
        # [N, 2p + 1, 2p + 1, H, W, C]: all crops of all images, as a view of the padded images.
        self._crops = padded.unfold(1, self.height, 1).unfold(2, self.width, 1).permute(0, 1, 2, 4, 5, 3)
        # [., W C]: a row of a crop, from each pixel on, for as many pixels as there are; likewise a view.
        pixels, numbers = len(images) * padded.shape[1] * padded.shape[2], self.width * self.channels
        self._rows = padded.as_strided((max(pixels - self.width + 1, 0), numbers), (self.channels, 1))
        self._heights = torch.arange(self.height, device=self.device)
        mean, std = torch.tensor(info.mean), torch.tensor(info.std)
        # (x / 255 - mean) / std = x * scale + shift, for each number of an image's row.
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
        # By whole rows, four times as fast as an index into all crops.
        p = self.info.padding
        first = (index * (self.height + 2 * p) + rows)[:, None] + self._heights
        starts = first * (self.width + 2 * p) + columns[:, None]
        images = self._rows.index_select(0, starts.flatten()).view(-1, self.height, self.width, self.channels)
        flipped, numbers = images.flip(2), self.height * self.width * self.channels
        # Eight bytes at once, where they go into an image.
        wide = torch.int64 if numbers % 8 == 0 else torch.uint8
        choice = (image.view(-1, numbers).view(wide) for image in (flipped, images))
        return torch.where(mirror[:, None], *choice).view(torch.uint8).view_as(images)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, C] -> float32 [B, C, H, W] in channels_last memory: (x / 255 - mean) / std."""
        rows = images.reshape(len(images), self.height, self.width * self.channels)
        rows = rows.float().mul_(self._scale).add_(self._shift)
        return rows.view(len(images), self.height, self.width, self.channels).permute(0, 3, 1, 2)

    def digest(self) -> str:
        """SHA-256 of the images, the labels and what they are normalised by."""
        p = self.info.padding
        digest = hashlib.sha256(repr((self.info.mean, self.info.std)).encode())
        for start in range(0, len(self), 1024):
            digest.update(self._crops[start : start + 1024, p, p].cpu().contiguous().numpy())
        digest.update(self.labels.cpu().numpy())
        return digest.hexdigest()

    def plain(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        """The chosen images without augmentation, normalised, and their labels."""
        chosen, p = torch.from_numpy(index).to(self.device), self.info.padding
        return self.normalise(self._crops[chosen, p, p]), self.labels[chosen]

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images once, in order and without augmentation: (images, labels) batch by batch."""
        p = self.info.padding
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield self.normalise(self._crops[part, p, p]), self.labels[part]

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
        draws = generator(seed, epoch, "augmentation")
        shifts = draws.randint(0, 2 * self.info.padding + 1, size=(2, len(self)))
        mirror = draws.randint(0, 2, size=len(self)).astype(bool) & self.info.flip
        # One transfer an epoch; from here on the host waits for nothing.
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
    """The generator of one purpose ("order" or "augmentation") in one epoch of one member."""
    return np.random.RandomState([seed, epoch, TAGS[tag]])


@dataclass
class Data:
    """A loaded data set: training, validation and test part, and what is worth recording about it."""

    name: str
    info: DatasetInfo
    train: ImageSet
    val: ImageSet
    test: ImageSet
    mislabelled: np.ndarray  # bool [N], whose training label was replaced by a wrong one
    record: dict = field(default_factory=dict)


def load_data(
    name: str,
    data_path: str | Path = "data",
    device: torch.device | str = "cpu",
    train_idx_path: str | Path | None = None,
    val_idx_path: str | Path | None = None,
    download: bool = False,
    label_noise: float = 0.0,
    augmentation: str = "standard",
) -> Data:
    """Read a data set and cut its validation part from the training images.

    10 % of the training images, drawn without regard to the classes and always the same, are validation. The test part
    is the published test set (TinyImageNet: the official val folder); digits has none, so that half of its images,
    drawn once and for all, are the test part.

    Args:
        name: a key of `DATASETS`.
        data_path: the folder of the data set, or one that has it in its usual subfolder.
        device: where the images are kept.
        train_idx_path, val_idx_path: .npy files of int64 indices into the official training images; both or none.
        download: fetch a missing data set through torchvision.
        label_noise: share of the training labels that are replaced by wrong ones, as `mislabel` says.
        augmentation: of training batches. standard: a crop of the padded image, and a flip where `DatasetInfo.flip`;
            flip: no crop; none.

    Raises:
        InputError: naming the path or flag, for missing, damaged or contradicting files.
    """
    info = DATASETS[name]
    if name == "digits":
        arrays, files = _read_digits(), []
    else:
        folder = _find(name, Path(data_path), download)
        read = {"fashion_mnist": _read_fashion_mnist, "tiny_imgnet": _read_tiny}.get(name, _read_cifar)
        arrays, files = read(folder, info)
    images, labels, test_images, test_labels = arrays
    train_index, val_index = _split(len(images), train_idx_path, val_idx_path)
    digest = hashlib.sha256()
    for array in (images, labels, test_images, test_labels, train_index, val_index):
        digest.update(np.ascontiguousarray(array))
    train_labels, mislabelled = mislabel(labels[train_index], info.num_classes, label_noise)
    record = {"dataset": name, "train": len(train_index), "val": len(val_index), "test": len(test_images)}
    if label_noise:
        digest.update(train_labels)
        record |= {"label_noise": label_noise, "mislabelled": int(mislabelled.sum())}
    record |= {"sha256_of_arrays_and_split": digest.hexdigest(), "files": files}
    if augmentation != "standard":
        info = replace(info, padding=0, flip=info.flip and augmentation == "flip")
    return Data(
        name,
        info,
        train=ImageSet(images[train_index], train_labels, info, device),
        val=ImageSet(images[val_index], labels[val_index], info, device),
        test=ImageSet(test_images, test_labels, info, device),
        mislabelled=mislabelled,
        record=record,
    )


def mislabel(labels: np.ndarray, classes: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which a share is wrong: int(share N) samples, drawn without regard to the classes, get another class.

    Each of the other classes is equally likely. The draw depends on N, `classes` and `share` alone.

    Args:
        labels: int64 [N].
        classes: how many there are.
        share: 0 to 1.

    Returns:
        int64 [N], the labels, and bool [N], True = wrong.
    """
    random = np.random.RandomState(NOISE_SEED)
    chosen = random.permutation(len(labels))[: int(share * len(labels))]
    wrong = np.zeros(len(labels), dtype=bool)
    wrong[chosen] = True
    changed = labels.copy()
    changed[chosen] = (labels[chosen] + random.randint(1, classes, size=len(chosen))) % classes
    return changed, wrong


def _split(samples: int, train_path: str | Path | None, val_path: str | Path | None) -> tuple[np.ndarray, np.ndarray]:
    if train_path is None and val_path is None:
        order = np.random.RandomState(SPLIT_SEED).permutation(samples)
        held_out = int(VALIDATION_SHARE * samples)
        return np.sort(order[held_out:]), np.sort(order[:held_out])
    if train_path is None or val_path is None:
        raise InputError("--train_idx_path and --val_idx_path go together: give both, or none for the fixed 10 % split")
    parts = []
    for flag, path in (("--train_idx_path", train_path), ("--val_idx_path", val_path)):
        index = load_npy(Path(path), flag + " ")
        if index.ndim != 1 or index.dtype.kind not in "iu" or not len(index):
            raise InputError(f"{flag} {path}: {index.dtype} {index.shape} found, a list of whole numbers is needed")
        twice = len(index) > samples or len(np.unique(index)) < len(index)
        if twice or index.min() < 0 or index.max() >= samples:
            raise InputError(f"{flag} {path}: indices must be distinct and from 0 to {samples - 1}")
        parts.append(index.astype(np.int64))
    if len(parts[0]) < 2:
        raise InputError(
            f"--train_idx_path {train_path}: 1 sample, 2 or more are needed: BatchNorm has no spread of one"
        )
    if len(np.intersect1d(*parts)):
        raise InputError(f"--train_idx_path {train_path} and --val_idx_path {val_path} share samples")
    return parts[0], parts[1]


def _find(name: str, data_path: Path, download: bool) -> Path:
    info = DATASETS[name]
    tried = [data_path / place for place in info.places]

    def found() -> Path | None:
        return next((folder for folder in tried if any(folder.glob(info.marker))), None)

    folder = found()
    if folder is None and download:
        from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

        fetch = {"cifar10": CIFAR10, "cifar100": CIFAR100, "fashion_mnist": FashionMNIST}.get(name)
        if fetch is None:
            raise InputError(f"--download: {name} cannot be fetched by torchvision; INSTALL.md says how to get it")
        data_path.mkdir(parents=True, exist_ok=True)
        with open(data_path / ".download.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                fetch(str(data_path), download=True)
            except Exception as error:
                raise InputError(f"--download: {name} could not be fetched ({first_line(error)})") from error
        folder = found()
    if folder is None:
        raise InputError(
            f"--data_path {data_path}: no {name} found (looked for {info.marker} in "
            f"{', '.join(str(folder) for folder in tried)}); give the folder that holds the data sets"
            + ("" if name == "tiny_imgnet" else ", or --download")
        )
    return folder


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _read_digits() -> Arrays:
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 16 grey levels and white, 0 to 16.
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    order = np.random.RandomState(SPLIT_SEED).permutation(len(images))
    train, test = np.sort(order[: len(images) // 2]), np.sort(order[len(images) // 2 :])
    return images[train], labels[train], images[test], labels[test]


def _read_cifar(folder: Path, info: DatasetInfo) -> tuple[Arrays, list[dict]]:
    from torchvision.datasets import CIFAR10, CIFAR100

    source, key = (CIFAR10, "labels") if info.num_classes == 10 else (CIFAR100, "fine_labels")
    parts, files = [], []
    for file_list in (source.train_list, source.test_list):
        images, labels = [], []
        for file_name, md5 in file_list:
            path = folder / file_name
            content = _read_file(path)
            files.append(_fingerprint(path, content, md5))
            batch_images, batch_labels = _cifar_batch(path, content, key, info.num_classes)
            images.append(batch_images)
            labels.append(batch_labels)
        parts += [np.concatenate(images), np.concatenate(labels)]
    return tuple(parts), files


def _cifar_batch(path: Path, content: bytes, key: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _CifarUnpickler(io.BytesIO(content), encoding="latin1").load()
    except KeyError as error:  # no entry in its table of operations
        raise InputError(
            f"{path}: not a CIFAR batch (operation {error} of pickle); nothing in it was executed"
        ) from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise InputError(f"{path}: not a CIFAR batch ({first_line(error)}); nothing in it was executed") from error
    if not isinstance(batch, dict):
        raise InputError(f"{path}: holds a {type(batch).__name__}, a CIFAR batch is a dict")
    images, labels = (batch.get(k, batch.get(k.encode())) for k in ("data", key))
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        found = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise InputError(f"{path}: 'data' is {found}, a CIFAR batch has uint8 [images, 3072]")
    whole = labels.dtype.kind in "iu" if isinstance(labels, np.ndarray) else isinstance(labels, list)
    if whole and isinstance(labels, list):  # of lists in lists, numpy would make more numbers than the file has bytes
        whole = all(type(label) is int and abs(label) < 2**31 for label in labels)
    if not whole or np.shape(labels) != (len(images),) or not len(images):
        raise InputError(f"{path}: '{key}' must hold one whole number for each of the {len(images)} images")
    labels = np.array(labels)
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"{path}: labels from {labels.min()} to {labels.max()}, 0 to {classes - 1} are possible")
    pixels = np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return pixels, labels.astype(np.int64)


_NDARRAY = object()  # stands for numpy.ndarray: the class itself, called, would take memory at will


class _CifarUnpickler(pickle._Unpickler):
    """Admits arrays, bytes, strings, numbers, lists, tuples and dicts; a reference to anything else is an error.

    pickle's form in Python: the one in C takes memory for every number that a file claims.
    """

    def find_class(self, module: str, name: str) -> object:
        admitted = {
            ("multiarray", "_reconstruct"): _new_array,
            ("numpy", "ndarray"): _NDARRAY,
            ("numpy", "dtype"): _new_dtype,
            ("numeric", "_frombuffer"): _array_from_bytes,
            ("_codecs", "encode"): _latin1_bytes,
        }
        # numpy keeps its internals in numpy.core up to version 1 and in numpy._core from 2 on.
        short = module.removeprefix("numpy.core.").removeprefix("numpy._core.")
        if (short, name) not in admitted:
            raise pickle.UnpicklingError(f"it refers to {module[:80]}.{name[:80]}, which no CIFAR batch needs")
        return admitted[short, name]

    def _build(self) -> None:
        """Fill an array or a dtype as numpy does; nothing else has a state."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, np.dtype) and state[2:] == (None, None, None, -1, -1, 0) and state[1] in ("<", ">", "|"):
            target.__setstate__(state)
        elif isinstance(target, np.ndarray) and isinstance(state[2], np.dtype) and isinstance(state[4], str | bytes):
            target.__setstate__(state)  # compares the number of bytes with the shape
        else:
            raise pickle.UnpicklingError("it holds an array in a form that numpy does not write")

    def _set_items(self) -> None:
        items = self.pop_mark()
        if not all(isinstance(key, str | bytes) for key in items[::2]):  # tuples in tuples overflow the stack
            raise pickle.UnpicklingError("it holds a dict whose keys are not strings")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.metastack.append(self.stack)
        self.stack = [key, value]
        self._set_items()

    # What data need. Left out is what makes objects in other ways, or sets.
    _admitted = (
        "PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT STRING "
        "BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
        "BYTEARRAY8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT GET BINGET "
        "LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE"
    )
    dispatch: ClassVar = {
        **{
            getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _admitted.split()
        },
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
    }


def _new_array(array_type: object, shape: tuple, _dtype: object) -> np.ndarray:
    # numpy always writes an empty array here and fills it afterwards; another shape would reserve memory at will.
    if array_type is not _NDARRAY or tuple(shape) != (0,):
        raise pickle.UnpicklingError("it holds an array in a form that numpy does not write")
    return np.ndarray((0,), np.uint8)


def _new_dtype(code: str, *flags: object) -> np.dtype:
    if not isinstance(code, str) or not re.fullmatch(r"[|<>]?[biuf][1248]", code):
        raise pickle.UnpicklingError(
            f"it holds an array of objects or strings ({str(code)[:20]}), which no CIFAR batch needs"
        )
    return np.dtype(code, *flags)


def _array_from_bytes(buffer: bytes, dtype: np.dtype, shape: tuple, _order: str) -> np.ndarray:
    return np.frombuffer(buffer, dtype=dtype).reshape(shape)


def _latin1_bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds bytes written as {encoding}, which pickle does not do")
    return text.encode("latin1")


def _read_fashion_mnist(folder: Path, info: DatasetInfo) -> tuple[Arrays, list[dict]]:
    from torchvision.datasets import FashionMNIST

    published = dict(FashionMNIST.resources)
    arrays, files = [], []
    for part in ("train", "t10k"):
        pair = []
        for kind, magic, item in (("images-idx3", 2051, (28, 28)), ("labels-idx1", 2049, ())):
            name = f"{part}-{kind}-ubyte"
            path = folder / name if (folder / name).is_file() else folder / f"{name}.gz"
            content = _read_file(path)
            files.append(_fingerprint(path, content, published.get(path.name)))
            pair.append(_read_idx(path, content, magic, item))
        images, labels = pair
        if len(images) != len(labels):
            raise InputError(f"{folder}: {len(images)} images but {len(labels)} labels in the {part} files")
        if labels.max() >= info.num_classes:
            raise InputError(
                f"{folder}: label {labels.max()} in the {part} files, 0 to {info.num_classes - 1} are possible"
            )
        border = (info.image_size - images.shape[1]) // 2
        padded = np.pad(images, ((0, 0), (border, border), (border, border)))
        arrays += [padded[..., None], labels.astype(np.int64)]
    return tuple(arrays), files


def _read_idx(path: Path, content: bytes, magic: int, item: tuple[int, ...]) -> np.ndarray:
    """An IDX file: big-endian magic number, count and item shape as 32-bit numbers, then the bytes."""
    header_bytes = 8 + 4 * len(item)
    stream = gzip.GzipFile(fileobj=io.BytesIO(content)) if path.suffix == ".gz" else io.BytesIO(content)
    # A packed file may hold a thousand times its own size.
    limit = MOST_IDX if path.suffix == ".gz" else len(content)
    try:
        header = np.frombuffer(stream.read(header_bytes), dtype=">u4")
        if header.tolist()[:1] != [magic] or tuple(header[2:]) != item or not header[1]:
            raise InputError(f"{path}: header {header.tolist()} found, [{magic}, count, {str(item)[1:-1]}] is needed")
        size = int(header[1]) * int(np.prod(item))
        if size > min(limit, 1024 * len(content)):
            raise InputError(f"{path}: its header promises {size} bytes, more than the file can hold")
        body = stream.read(size + 1)
    except InputError:
        raise
    except Exception as error:  # a damaged stream raises nearly anything
        raise InputError(f"{path}: not a readable IDX file ({first_line(error)})") from error
    if len(body) != size:
        raise InputError(
            f"{path}: its header promises {size} bytes, {'more' if len(body) > size else len(body)} follow"
        )
    return np.frombuffer(body, dtype=np.uint8).reshape(-1, *item)


def _read_tiny(folder: Path, info: DatasetInfo) -> tuple[Arrays, list[dict]]:
    """TinyImageNet. Classes are numbered in the order of their sorted folder names, as in the authors' release."""
    train = folder / "train"
    if not train.is_dir():
        raise InputError(f"{folder}: has val/ but no train/; unpack the whole archive")
    names = sorted(path.name for path in train.iterdir() if path.is_dir())
    number = {name: i for i, name in enumerate(names)}
    if not 2 <= len(names) <= info.num_classes:
        raise InputError(f"{train}: {len(names)} class folders found, 2 to {info.num_classes} are possible")
    listed = folder / "wnids.txt"
    if listed.is_file() and set(_read_text(listed).split()) != set(names):
        raise InputError(f"{train}: its class folders are not those of {listed}")
    train_files = [(path, number[name]) for name in names for path in _images_of_class(train / name)]

    val = folder / "val"
    annotations = val / "val_annotations.txt"
    if (val / "images").is_dir():
        if not annotations.is_file():
            raise InputError(f"{annotations}: missing; without it the images of {val / 'images'} have no labels")
        rows = [line.split("\t") for line in _read_text(annotations).splitlines() if line]
        listed_files: dict[str, int] = {}
        for row in rows:
            # A name with a folder in it could lead anywhere, and one image named a million times fills the memory.
            if len(row) < 2 or row[1] not in number or Path(row[0]).name != row[0][:255] or row[0] in listed_files:
                found = " ".join(row[:2])[:80]
                raise InputError(f"{annotations}: '{found}' is not a file, named once, and a class of {train}")
            listed_files[row[0]] = number[row[1]]
        test_files = [(val / "images" / name, label) for name, label in listed_files.items()]
    else:
        found = sorted(path.name for path in val.iterdir() if path.is_dir())
        if found != names:
            raise InputError(
                f"{val}: {len(found)} class folders that are not the {len(names)} of {train}; val/ needs either "
                "images/ with val_annotations.txt or one folder for each class"
            )
        test_files = [(path, number[name]) for name in names for path in _images_of_class(val / name)]
    arrays = []
    for part, part_files in ((train, train_files), (val, test_files)):
        if not part_files:
            raise InputError(f"{part}: no .JPEG images found")
        arrays += _read_jpegs(part_files)
    return tuple(arrays), [{"path": str(folder), "classes": names}]


def _images_of_class(folder: Path) -> list[Path]:
    inner = folder / "images"
    return sorted((inner if inner.is_dir() else folder).glob("*.JPEG"))


def _read_jpegs(files: list[tuple[Path, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a list of (file, label)."""
    # Pillow lets go of the interpreter lock while it decodes, and warns of large images, which are refused here.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")
        images = list(pool.map(_read_jpeg, (path for path, _ in files)))
    return np.stack(images), np.array([label for _, label in files])


def _read_jpeg(path: Path) -> np.ndarray:
    size = DATASETS["tiny_imgnet"].image_size
    _check_file(path, MOST_IMAGE)
    try:
        # Other formats are not needed, and Pillow calls programs for some of them.
        with Image.open(path, formats=("JPEG",)) as image:
            if image.size != (size, size):
                raise InputError(f"{path}: {image.size[0]}x{image.size[1]} pixels, {size}x{size} are needed")
            return np.asarray(image.convert("RGB"))
    except InputError:
        raise
    except Exception as error:  # a damaged image raises nearly anything
        raise InputError(f"{path}: not a readable image ({first_line(error)})") from error


def find_corrupted(name: str, data_path: Path) -> Path | None:
    """The folder of the corrupted copies of a test set, in `data_path` or beside the data set; None without one."""
    tried = [data_path, *(data_path / place for place in DATASETS[name].places)]
    folders = [folder / CORRUPTED[name] for folder in tried] + [data_path.parent / CORRUPTED[name]]
    return next((folder for folder in folders if folder.is_dir()), None)


def check_corrupted(folder: Path, data: Data, corruptions: Iterable[str], severities: Iterable[int]) -> None:
    """Look at every file that will be measured, without reading the images.

    Raises:
        InputError: naming all that is missing, or the first file of a wrong shape.
    """
    if _in_blocks(folder):
        paths = [folder / f"{name}.npy" for name in corruptions] + [folder / "labels.npy"]
    else:
        paths = [folder / name / str(severity) for name in corruptions for severity in severities]
    missing = [str(path.relative_to(folder)) for path in paths if not path.exists()]
    if missing:
        raise InputError(
            f"{folder}: {', '.join(missing)} missing; complete it, or measure a part by --corruptions and --severities"
        )
    if _in_blocks(folder):
        for name in corruptions:
            _blocks(folder, data, name)


def read_corrupted(folder: Path, data: Data, name: str, severity: int) -> ImageSet:
    """One corruption at one severity, 1 to 5, of the test set.

    Two layouts: `<name>.npy`, uint8 [5 N, H, W, C] with severities 1 to 5 one after another, and `labels.npy` [5 N] (as
    CIFAR-10-C; only the rows of the severity are read), or `<name>/<severity>/<class>/*.JPEG` (as Tiny-ImageNet-C).

    Raises:
        InputError: naming the file, for a wrong shape, dtype or label.
    """
    if _in_blocks(folder):
        images, labels = _blocks(folder, data, name)
        count = len(labels) // 5
        rows = slice((severity - 1) * count, severity * count)
        return ImageSet(np.array(images[rows]), np.array(labels[rows]), data.info, data.train.device)
    root = folder / name / str(severity)
    number = {wnid: i for i, wnid in enumerate(data.record["files"][0]["classes"])}
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    if not classes or not set(classes) <= set(number):
        raise InputError(f"{root}: its {len(classes)} class folders are not those of the training images")
    files = [(path, number[wnid]) for wnid in classes for path in _images_of_class(root / wnid)]
    if not files:
        raise InputError(f"{root}: no .JPEG images found")
    return ImageSet(*_read_jpegs(files), data.info, data.train.device)


def _in_blocks(folder: Path) -> bool:
    return any(folder.glob("*.npy"))


def _blocks(folder: Path, data: Data, name: str) -> tuple[np.ndarray, np.ndarray]:
    arrays = []
    for path in (folder / f"{name}.npy", folder / "labels.npy"):
        arrays.append(load_npy(path))
    images, labels = arrays
    info = data.info
    shape = (info.image_size, info.image_size, len(info.mean))
    if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images) or len(images) % 5:
        raise InputError(
            f"{folder / name}.npy: {images.dtype} {list(images.shape)} found, uint8 [5 N, {', '.join(map(str, shape))}]"
            " is needed, N images for each of the severities 1 to 5"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise InputError(f"{folder / 'labels.npy'}: {labels.dtype} {list(labels.shape)} found for {len(images)} images")
    if labels.min() < 0 or labels.max() >= info.num_classes:
        raise InputError(f"{folder / 'labels.npy'}: labels must be from 0 to {info.num_classes - 1}")
    expected = data.test.labels.cpu().numpy()
    if len(labels) == 5 * len(expected) and (labels.reshape(5, -1) != expected).any():
        raise InputError(f"{folder / 'labels.npy'}: its labels are not five times those of the test set, in its order")
    return images, labels.astype(np.int64)


def load_npy(path: Path, flag: str = "") -> np.ndarray:
    """A .npy file as a read-only map. It takes no memory, and its header cannot promise more than the file holds.

    Raises:
        InputError: naming the file, after `flag`.
    """
    _check_file(path, flag=flag)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            array = np.lib.format.open_memmap(path, mode="r")
        whole = array.offset + array.nbytes == path.stat().st_size
    except Exception as error:  # a damaged header raises nearly anything
        raise InputError(f"{flag}{path}: not a readable .npy file ({first_line(error)})") from error
    if not whole:
        raise InputError(f"{flag}{path}: not a readable .npy file (it is longer than its header says)")
    return array


def _check_file(path: Path, most: int | None = None, flag: str = "") -> None:
    """Refuse what is no ordinary file (a pipe or a device has no end) or has more than `most` bytes."""
    try:
        ordinary, size = path.is_file(), path.stat().st_size
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{flag}{path}: cannot be read ({reason}); the data set needs this file") from error
    if not ordinary:
        raise InputError(f"{flag}{path}: cannot be read (not a file)")
    if most is not None and size > most:
        raise InputError(f"{flag}{path}: {size} bytes, at most {most} are possible here")


def _read_file(path: Path, most: int = MOST_FILE) -> bytes:
    _check_file(path, most)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); the data set needs this file") from error


def _read_text(path: Path) -> str:
    try:
        return _read_file(path, MOST_TEXT).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a text in UTF-8 ({first_line(error)})") from error


def _fingerprint(path: Path, content: bytes, published: str | None) -> dict:
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return {"path": str(path), "md5": md5, "md5_is_the_published_one": md5 == published}
