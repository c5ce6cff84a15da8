"""Files of the published sets: CIFAR batches, IDX files and images of TinyImageNet, read without executing anything."""

import gzip
import hashlib
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils import InputError
from utils.files import NOT_DOWNLOADED, ArrayUnpickler, check_file, refusing

# Upper limits, above what the published files need: of an unpacked IDX file (45 MiB) and of a 64x64 image (16 KiB).
MAX_IDX, MAX_IMAGE = 2**27, 2**20
TINY_SIZE = 64


def cifar_batch(path: Path, content: bytes, key: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 32, 32, 3] and labels int64 [N] of a CIFAR batch; `key` is that of the labels."""
    _refuse_other(path, content)
    with refusing(f"{path}: not a CIFAR batch", "nothing in it was executed"):
        try:
            batch = ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        except EOFError as error:
            raise ValueError("it ends too early") from error
        except KeyError as error:  # no entry in its table of operations
            raise ValueError(f"operation {error} of pickle") from error
    if not isinstance(batch, dict):
        raise InputError(f"{path}: expected a dict, got a {type(batch).__name__}")
    images, labels = (batch.get(k, batch.get(k.encode())) for k in ("data", key))
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise InputError(f"{path}: expected 'data' to be uint8 [images, 3072], got {found}")
    if isinstance(labels, list | tuple):  # of lists in lists, numpy would make more numbers than the file has bytes
        whole = all(type(label) is int and abs(label) < 2**31 for label in labels)
    else:
        whole = isinstance(labels, np.ndarray) and labels.dtype.kind in "iu"
    if not whole or np.shape(labels) != (len(images),) or not len(images):
        found = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, np.ndarray) else type(labels).__name__
        found += f" of {len(labels)}" if isinstance(labels, list | tuple) else ""
        problem = f"{path}: expected one whole number in '{key}' for each of the {len(images)} images"
        raise InputError(f"{problem}, got {found if labels is not None else 'no such entry'}")
    labels = np.array(labels)
    check_labels(path, labels, classes)
    pixels = np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return pixels, labels.astype(np.int64)


def _refuse_other(path: Path, content: bytes) -> None:
    """Refuse what often lies where a file of a data set is expected, by its name."""
    for start, what in (NOT_DOWNLOADED | {rb"\Z": "empty"}).items():
        if re.match(start, content[:512]):
            raise InputError(f"{path}: {what}")


def read_idx(path: Path, content: bytes, magic: int, item: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """An IDX file: big-endian magic number, count and item shape as 32-bit numbers, then the bytes; its md5, unpacked.

    Whether it is packed is seen from its first bytes: browsers unpack files and leave their names as they are.
    """
    _refuse_other(path, content)
    packed = content[:2] == b"\x1f\x8b"
    stream = gzip.GzipFile(fileobj=io.BytesIO(content)) if packed else io.BytesIO(content)
    with refusing(f"{path}: not a readable IDX file"):
        start = stream.read(8 + 4 * len(item))
        header = np.frombuffer(start, dtype=">u4")
        if header.tolist()[:1] != [magic] or tuple(header[2:]) != item or not header[1]:
            raise ValueError(f"expected the header {[magic, 'count', *item]}, got {header.tolist()}")
        size = int(header[1]) * int(np.prod(item))
        # A packed file may hold a thousand times its own size.
        if size > (min(MAX_IDX, 1024 * len(content)) if packed else len(content)):
            raise ValueError(f"its header promises {size} bytes, more than the file can hold")
        body = stream.read(size + 1)
        if len(body) != size:
            raise ValueError(f"its header promises {size} bytes, {'more' if len(body) > size else len(body)} follow")
    md5 = hashlib.md5(start, usedforsecurity=False)
    md5.update(body)
    return np.frombuffer(body, dtype=np.uint8).reshape(-1, *item), md5.hexdigest()


def _open_image(path: Path) -> Image.Image:
    try:
        return Image.open(path, formats=("JPEG", "PNG"))  # for some others Pillow starts programs
    except UnidentifiedImageError as error:
        raise ValueError("neither JPEG nor PNG") from error


def read_jpeg(path: Path) -> np.ndarray:
    """An image of TinyImageNet, JPEG or PNG, uint8 [64, 64, 3]."""
    size = TINY_SIZE
    check_file(path, MAX_IMAGE)
    with refusing(f"{path}: not a readable image"), _open_image(path) as image:
        if image.size != (size, size):
            raise ValueError(f"expected {size}x{size} pixels, got {image.size[0]}x{image.size[1]}")
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"expected 8 bits a channel, got mode {image.mode}")
        return np.asarray(image.convert("RGB"))


def check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    """Refuse labels that are none of the classes."""
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"{path}: expected labels from 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
