"""Published data sets: readers, validation split, label noise, and the corrupted copies of the test sets."""

import gzip
import hashlib
import io
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image

from utils import InputError
from utils.corruptions import CONSTANTS, SEVERITIES
from utils.data import Data, DatasetInfo, ImageSet, Preprocessing
from utils.files import ArrayUnpickler, check_file, load_array, read_bytes, read_text, refusing

# torchvision and scikit-learn take more than a second to import; the functions that need them import them.


def _info(name: str, classes: int, size: int, mean: tuple, std: tuple, marker: str) -> DatasetInfo:
    return DatasetInfo(classes, size, Preprocessing(mean, std, padding=4, flip=True), PLACES[name], marker)


# Below --data_path, in the order in which they are tried.
PLACES = {
    "cifar10": ("", "cifar10", "cifar-10-batches-py", "cifar10/cifar-10-batches-py"),
    "cifar100": ("", "cifar100", "cifar-100-python", "cifar100/cifar-100-python"),
    "tiny_imgnet": ("", "tiny-imagenet-200", "tiny_imgnet", "tiny_imgnet/tiny-imagenet-200"),
    "fashion_mnist": ("", "fashion-mnist", "fashion_mnist", "FashionMNIST/raw", "fashion_mnist/FashionMNIST/raw"),
}
# Means and deviations of the colour sets are those of the authors' release; of the grey ones, those of their training
# images.
DATASETS = {
    "cifar10": _info("cifar10", 10, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "data_batch_1"),
    "cifar100": _info("cifar100", 100, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "test"),
    "tiny_imgnet": _info("tiny_imgnet", 200, 64, (0.480, 0.448, 0.397), (0.276, 0.269, 0.282), "val"),
    "fashion_mnist": _info("fashion_mnist", 10, 32, (0.2190,), (0.3318,), "train-images-idx3-ubyte*"),
    # A mirrored digit is another sign, and in 8 pixels a shift by one is large.
    "digits": DatasetInfo(10, 8, Preprocessing((0.3053,), (0.3763,), padding=1), (), ""),
}

# The corrupted copies of the test sets: those that are published, and those that scripts/make_corrupted.py makes.
CORRUPTED = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C", "tiny_imgnet": "Tiny-ImageNet-C"}
CORRUPTED |= {"fashion_mnist": "Fashion-MNIST-C", "digits": "digits-C"}
CORRUPTIONS = tuple(CONSTANTS)
SPLITS = ("val", "test", "train", "corrupted")
AUGMENTATIONS = ("standard", "flip", "none")

VALIDATION_SHARE = 0.1
# The splits are part of the experiment: they must not move with a library's version. RandomState's stream is frozen.
SPLIT_SEED = 0
NOISE_SEED = 1

# Upper limits, above what the published files need: of an unpacked IDX file (45 MiB) and of a 64x64 image (16 KiB).
MAX_IDX, MAX_IMAGE = 2**27, 2**20


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
    """Read a data set and hold out its validation images.

    10 % of the training images, drawn without regard to their classes from a fixed seed, are validation. The test
    images are the published test set (TinyImageNet: the official val folder). digits has none: half of its images,
    drawn from the same seed, are its test set.

    Args:
        name: a key of `DATASETS`.
        data_path: the folder of the data set, or one that has it in one of its usual subfolders.
        device: where the images are kept.
        train_idx_path, val_idx_path: .npy files of int64 indices into the official training images; both or none.
        download: fetch a missing data set through torchvision.
        label_noise: share of the training labels that `mislabel` replaces by wrong ones.
        augmentation: of training batches. standard: a crop of the padded image, and a flip where the data set allows
            it; flip: the flip alone; none: neither.

    Raises:
        InputError: naming the path or flag, for missing, damaged or contradictory files.
    """
    info = DATASETS[name]
    if name == "digits":
        arrays, files = _read_digits(), []
    else:
        folder = _find(name, Path(data_path), download)
        read = {"fashion_mnist": _read_fashion_mnist, "tiny_imgnet": _read_tiny}.get(name, _read_cifar)
        arrays, files = read(folder, info)
    images, labels, test_images, test_labels = arrays
    train_index, val_index = split_indices(len(images), train_idx_path, val_idx_path)
    digest = hashlib.sha256()
    for array in (*arrays, train_index, val_index):
        digest.update(np.ascontiguousarray(array))
    train_labels, mislabelled = mislabel(labels[train_index], info.num_classes, label_noise)
    record = {"dataset": name, "train": len(train_index), "val": len(val_index), "test": len(test_images)}
    if label_noise:
        digest.update(train_labels)
        record |= {"label_noise": label_noise, "mislabelled": int(mislabelled.sum())}
    record |= {"sha256_of_arrays_and_split": digest.hexdigest(), "files": files}
    training, unaugmented = info.preprocessing, replace(info.preprocessing, padding=0, flip=False)
    if augmentation != "standard":
        training = replace(unaugmented, flip=training.flip and augmentation == "flip")
    train = ImageSet(images[train_index], train_labels, training, device)
    val = ImageSet(images[val_index], labels[val_index], unaugmented, device)
    test = ImageSet(test_images, test_labels, unaugmented, device)
    return Data(name, info, train, val, test, mislabelled, record)


def mislabel(labels: np.ndarray, classes: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Give int(share N) samples, drawn without regard to their classes, the label of another class.

    All other classes are equally likely. The draw depends on N, `classes` and `share` alone.

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


def split_indices(samples: int, train: str | Path | None, val: str | Path | None) -> tuple[np.ndarray, np.ndarray]:
    """The training and validation images among `samples`: those of two .npy files, or of the fixed 10 % split."""
    if train is None and val is None:
        order = np.random.RandomState(SPLIT_SEED).permutation(samples)
        held_out = int(VALIDATION_SHARE * samples)
        return np.sort(order[held_out:]), np.sort(order[:held_out])
    if train is None or val is None:
        raise InputError("--train_idx_path and --val_idx_path go together: give both, or neither for the 10 % split")
    parts = []
    for flag, path in (("--train_idx_path", train), ("--val_idx_path", val)):
        index = load_array(Path(path), flag + " ")
        if index.ndim != 1 or index.dtype.kind not in "iu" or not len(index):
            raise InputError(f"{flag} {path}: expected a list of whole numbers, got {index.dtype} {index.shape}")
        twice = len(index) > samples or len(np.unique(index)) < len(index)
        if twice or index.min() < 0 or index.max() >= samples:
            raise InputError(f"{flag} {path}: indices must be distinct and from 0 to {samples - 1}")
        parts.append(index.astype(np.int64))
    if len(parts[0]) < 2:  # BatchNorm has no spread of one sample
        raise InputError(f"--train_idx_path {train}: expected 2 or more samples, got 1")
    if len(np.intersect1d(*parts)):
        raise InputError(f"--train_idx_path {train} and --val_idx_path {val} share samples")
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
            raise InputError(f"--download: torchvision cannot fetch {name}; INSTALL.md says how to get it")
        data_path.mkdir(parents=True, exist_ok=True)
        with FileLock(data_path / ".download.lock"), refusing(f"--download: {name} could not be fetched"):
            fetch(str(data_path), download=True)
        folder = found()
    if folder is None:
        places, remedy = ", ".join(map(str, tried)), "" if name == "tiny_imgnet" else ", or --download"
        problem = f"--data_path {data_path}: no {name} found (looked for {info.marker} in {places})"
        raise InputError(f"{problem}; give the folder that holds the data sets{remedy}")
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
    arrays, files = [], []
    for file_list in (source.train_list, source.test_list):
        batches = []
        for file_name, md5 in file_list:
            path = folder / file_name
            content = read_bytes(path)
            files.append(_fingerprint(path, content, md5))
            batches.append(cifar_batch(path, content, key, info.num_classes))
        arrays += map(np.concatenate, zip(*batches, strict=True))
    return tuple(arrays), files


def cifar_batch(path: Path, content: bytes, key: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 32, 32, 3] and labels int64 [N] of a CIFAR batch; `key` is that of the labels."""
    with refusing(f"{path}: not a CIFAR batch", "nothing in it was executed"):
        try:
            batch = ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        except KeyError as error:  # no entry in its table of operations
            raise ValueError(f"operation {error} of pickle") from error
    if not isinstance(batch, dict):
        raise InputError(f"{path}: expected a dict, got a {type(batch).__name__}")
    images, labels = (batch.get(k, batch.get(k.encode())) for k in ("data", key))
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise InputError(f"{path}: expected 'data' to be uint8 [images, 3072], got {found}")
    whole = labels.dtype.kind in "iu" if isinstance(labels, np.ndarray) else isinstance(labels, list)
    if whole and isinstance(labels, list):  # of lists in lists, numpy would make more numbers than the file has bytes
        whole = all(type(label) is int and abs(label) < 2**31 for label in labels)
    if not whole or np.shape(labels) != (len(images),) or not len(images):
        raise InputError(f"{path}: expected one whole number in '{key}' for each of the {len(images)} images")
    labels = np.array(labels)
    _check_labels(path, labels, classes)
    pixels = np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return pixels, labels.astype(np.int64)


def _read_fashion_mnist(folder: Path, info: DatasetInfo) -> tuple[Arrays, list[dict]]:
    from torchvision.datasets import FashionMNIST

    published = dict(FashionMNIST.resources)
    arrays, files = [], []
    for part in ("train", "t10k"):
        pair = []
        for kind, magic, item in (("images-idx3", 2051, (28, 28)), ("labels-idx1", 2049, ())):
            name = f"{part}-{kind}-ubyte"
            path = folder / name if (folder / name).is_file() else folder / f"{name}.gz"
            content = read_bytes(path)
            files.append(_fingerprint(path, content, published.get(path.name)))
            pair.append(_read_idx(path, content, magic, item))
        images, labels = pair
        if len(images) != len(labels):
            raise InputError(f"{folder}: got {len(images)} images but {len(labels)} labels in {part}")
        _check_labels(path, labels, info.num_classes)
        border = (info.image_size - images.shape[1]) // 2
        padded = np.pad(images, ((0, 0), (border, border), (border, border)))
        arrays += [padded[..., None], labels.astype(np.int64)]
    return tuple(arrays), files


def _read_idx(path: Path, content: bytes, magic: int, item: tuple[int, ...]) -> np.ndarray:
    """An IDX file: big-endian magic number, count and item shape as 32-bit numbers, then the bytes."""
    packed = path.suffix == ".gz"
    stream = gzip.GzipFile(fileobj=io.BytesIO(content)) if packed else io.BytesIO(content)
    with refusing(f"{path}: not a readable IDX file"):
        header = np.frombuffer(stream.read(8 + 4 * len(item)), dtype=">u4")
        if header.tolist()[:1] != [magic] or tuple(header[2:]) != item or not header[1]:
            raise ValueError(f"expected the header {[magic, 'count', *item]}, got {header.tolist()}")
        size = int(header[1]) * int(np.prod(item))
        # A packed file may hold a thousand times its own size.
        if size > (min(MAX_IDX, 1024 * len(content)) if packed else len(content)):
            raise ValueError(f"its header promises {size} bytes, more than the file can hold")
        body = stream.read(size + 1)
        if len(body) != size:
            raise ValueError(f"its header promises {size} bytes, {'more' if len(body) > size else len(body)} follow")
    return np.frombuffer(body, dtype=np.uint8).reshape(-1, *item)


def _read_tiny(folder: Path, info: DatasetInfo) -> tuple[Arrays, list[dict]]:
    """TinyImageNet. Classes are numbered in the order of their sorted folder names, as in the authors' release."""
    train = folder / "train"
    if not train.is_dir():
        raise InputError(f"{folder}: has val/ but no train/; unpack the whole archive")
    names = sorted(path.name for path in train.iterdir() if path.is_dir())
    number = {name: i for i, name in enumerate(names)}
    if not 2 <= len(names) <= info.num_classes:
        raise InputError(f"{train}: expected 2 to {info.num_classes} class folders, got {len(names)}")
    listed = folder / "wnids.txt"
    if listed.is_file() and set(read_text(listed).split()) != set(names):
        raise InputError(f"{train}: its class folders are not those of {listed}")
    train_files = [(path, number[name]) for name in names for path in _images_of_class(train / name)]

    val = folder / "val"
    annotations = val / "val_annotations.txt"
    if (val / "images").is_dir():
        if not annotations.is_file():
            raise InputError(f"{annotations}: missing; without it the images of {val / 'images'} have no labels")
        listed_files: dict[str, int] = {}
        for row in (line.split("\t") for line in read_text(annotations).splitlines() if line):
            # A name with a folder in it could lead anywhere, and one image named a million times fills the memory.
            if len(row) < 2 or row[1] not in number or Path(row[0]).name != row[0][:255] or row[0] in listed_files:
                found = " ".join(row[:2])[:80]
                raise InputError(f"{annotations}: expected a file, named once, and a class of {train}, got '{found}'")
            listed_files[row[0]] = number[row[1]]
        test_files = [(val / "images" / name, label) for name, label in listed_files.items()]
    else:
        found = sorted(path.name for path in val.iterdir() if path.is_dir())
        if found != names:
            raise InputError(f"{val}: expected images/ or the {len(names)} folders of {train}, got {len(found)} others")
        test_files = [(path, number[name]) for name in names for path in _images_of_class(val / name)]
    arrays = (*_read_jpegs(train, train_files), *_read_jpegs(val, test_files))
    return arrays, [{"path": str(folder), "classes": names}]


def _images_of_class(folder: Path) -> list[Path]:
    inner = folder / "images"
    return sorted((inner if inner.is_dir() else folder).glob("*.JPEG"))


def _read_jpegs(folder: Path, files: list[tuple[Path, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a list of (file in the folder, label)."""
    if not files:
        raise InputError(f"{folder}: no .JPEG images found")
    # Pillow lets go of the interpreter lock while it decodes, and warns of large images, which are refused here.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")
        images = list(pool.map(read_jpeg, (path for path, _ in files)))
    return np.stack(images), np.array([label for _, label in files])


def read_jpeg(path: Path) -> np.ndarray:
    """An image of TinyImageNet, uint8 [64, 64, 3]."""
    size = DATASETS["tiny_imgnet"].image_size
    check_file(path, MAX_IMAGE)
    # JPEG alone: for some other formats Pillow starts programs.
    with refusing(f"{path}: not a readable image"), Image.open(path, formats=("JPEG",)) as image:
        if image.size != (size, size):
            raise ValueError(f"expected {size}x{size} pixels, got {image.size[0]}x{image.size[1]}")
        return np.asarray(image.convert("RGB"))


def find_corrupted(name: str, data_path: Path) -> Path | None:
    """The folder of the corrupted copies of a test set, in `data_path` or beside the data set; None without one."""
    tried = [data_path, *(data_path / place for place in DATASETS[name].places)]
    folders = [folder / CORRUPTED[name] for folder in tried] + [data_path.parent / CORRUPTED[name]]
    return next((folder for folder in folders if folder.is_dir()), None)


def check_corrupted(folder: Path, data: Data, corruptions: Iterable[str], severities: Iterable[int]) -> None:
    """Check every file of a corrupted set that will be measured, without reading the images.

    Raises:
        InputError: naming all missing files, or the first file of a wrong shape.
    """
    if _in_arrays(folder):
        paths = [folder / f"{name}.npy" for name in (*corruptions, "labels")]
    else:
        paths = [folder / name / str(severity) for name in corruptions for severity in severities]
    missing = ", ".join(str(path.relative_to(folder)) for path in paths if not path.exists())
    if missing:
        raise InputError(f"{folder}: {missing} missing; complete it, or name a part by --corruptions and --severities")
    if _in_arrays(folder):
        for name in corruptions:
            corrupted_arrays(folder, data, name)


def read_corrupted(folder: Path, data: Data, name: str, severity: int) -> ImageSet:
    """One corruption at one severity, 1 to 5, of the test set.

    Two layouts: `<name>.npy`, uint8 [5 N, H, W, C] with severities 1 to 5 in turn, and `labels.npy` [5 N] (as in
    CIFAR-10-C; only the rows of the severity are read), or `<name>/<severity>/<class>/*.JPEG` (as in Tiny-ImageNet-C).

    Raises:
        InputError: naming the file, for a wrong shape, dtype or label.
    """
    if _in_arrays(folder):
        images, labels = corrupted_arrays(folder, data, name)
        count = len(labels) // len(SEVERITIES)
        rows = slice((severity - 1) * count, severity * count)
        return ImageSet(np.array(images[rows]), np.array(labels[rows]), data.test.preprocessing, data.test.device)
    root = folder / name / str(severity)
    number = {wnid: i for i, wnid in enumerate(data.record["files"][0]["classes"])}
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    if not classes or not set(classes) <= set(number):
        raise InputError(f"{root}: its {len(classes)} class folders are not those of the training images")
    files = [(path, number[wnid]) for wnid in classes for path in _images_of_class(root / wnid)]
    return ImageSet(*_read_jpegs(root, files), data.test.preprocessing, data.test.device)


def _in_arrays(folder: Path) -> bool:
    """Whether a corrupted set is in .npy files, and not in folders of images."""
    return any(folder.glob("*.npy"))


def corrupted_arrays(folder: Path, data: Data, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [5 N, H, W, C], as a memory map, and labels int64 [5 N] of one corruption of a set in .npy files."""
    path, labels_path, severities = folder / f"{name}.npy", folder / "labels.npy", len(SEVERITIES)
    images, labels = load_array(path), load_array(labels_path)
    shape = (data.info.image_size, data.info.image_size, data.info.channels)
    if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images) or len(images) % severities:
        wanted = f"uint8 [{severities} N, {', '.join(map(str, shape))}], severity by severity"
        raise InputError(f"{path}: expected {wanted}, got {images.dtype} {list(images.shape)}")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise InputError(f"{labels_path}: expected {len(images)} integers, got {labels.dtype} {list(labels.shape)}")
    _check_labels(labels_path, labels, data.info.num_classes)
    expected = data.test.labels.cpu().numpy()
    if len(labels) == severities * len(expected) and (labels.reshape(severities, -1) != expected).any():
        raise InputError(f"{labels_path}: expected {severities} times the labels of the test set, in its order")
    return images, labels.astype(np.int64)


def _check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"{path}: expected labels from 0 to {classes - 1}, got {labels.min()} to {labels.max()}")


def _fingerprint(path: Path, content: bytes, published: str | None) -> dict:
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return {"path": str(path), "md5": md5, "md5_is_the_published_one": md5 == published}
