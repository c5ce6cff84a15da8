"""Published data sets and the user's folder: validation split, label noise, and the corrupted copies of test sets."""

import functools
import hashlib
import sys
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils import InputError, places, some
from utils.corruptions import CONSTANTS, SEVERITIES
from utils.data import Data, DatasetInfo, ImageSet, Preprocessing
from utils.distributed import cores, rank
from utils.files import load_array, load_json, read_bytes, read_text, refusing, visible
from utils.folder import FOLDER_CORRUPTED, PARTS, Images, draw_parts, find_classes, read_images, stored_size
from utils.formats import check_labels, cifar_batch, read_idx, read_jpeg
from utils.places import FILES, PLACES, idx_file, named, plain, subfolders

# torchvision takes more than a second to import; the functions that need it import it.


def _info(classes: int, size: int, mean: tuple, std: tuple) -> DatasetInfo:
    return DatasetInfo(classes, size, Preprocessing(mean, std, padding=4, flip=True))


# Means and deviations of the colour sets are those of the authors' release; of the grey ones, those of their training
# images.
DATASETS = {
    "cifar10": _info(10, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _info(100, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny_imgnet": _info(200, 64, (0.480, 0.448, 0.397), (0.276, 0.269, 0.282)),
    "fashion_mnist": _info(10, 32, (0.2190,), (0.3318,)),
    # A mirrored digit is another sign, and in 8 pixels a shift by one is large.
    "digits": DatasetInfo(10, 8, Preprocessing((0.3053,), (0.3763,), padding=1)),
}
# To which pictures are scaled where inputs have a border of zeros, see `_read_fashion_mnist`.
PICTURE_SIZE = {"fashion_mnist": 28}
NAMES = (*DATASETS, "folder")
DEFAULT_SIZE = 64  # of the images of a folder

# The corrupted copies of the test sets: those that are published, and those that scripts/make_corrupted.py makes.
CORRUPTED = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C", "tiny_imgnet": "Tiny-ImageNet-C"}
CORRUPTED |= {"fashion_mnist": "Fashion-MNIST-C", "digits": "digits-C"}
CORRUPTIONS = tuple(CONSTANTS)

# Of the published sets: the numbers of training and test images; the md5 of the IDX files unpacked, since packed ones
# differ by who packed them; and how the training labels of MNIST begin, whose files have the same names.
COUNTS = {"cifar10": (50000, 10000), "cifar100": (50000, 10000)}
COUNTS |= {"tiny_imgnet": (100000, 10000), "fashion_mnist": (60000, 10000)}
IDX_MD5 = {"f4a8712d7a061bf5bd6d2ca38dc4d50a", "9018921c3c673c538a1fc5bad174d6f9"}
IDX_MD5 |= {"8181f5470baa50b63fa0f6fddb340f0a", "15d484375f8d13e6eb1aabb0c3f46965"}
MNIST_LABELS = [5, 0, 4, 1, 9, 2, 1, 3, 1, 4, 3, 5, 3, 6, 1, 7]
SPLITS = ("val", "test", "train", "corrupted")
AUGMENTATIONS = ("standard", "flip", "none")

VALIDATION_SHARE = 0.1
# The splits are part of the experiment: they must not move with a library's version. RandomState's stream is frozen.
SPLIT_SEED = 0
NOISE_SEED = 1


def load_data(
    name: str,
    data_path: str | Path = "data",
    device: torch.device | str = "cpu",
    train_idx_path: str | Path | None = None,
    val_idx_path: str | Path | None = None,
    download: bool = False,
    label_noise: float = 0.0,
    augmentation: str = "standard",
    image_size: int | None = None,
    inputs: dict[str, list] | None = None,
) -> Data:
    """Read a data set and hold out its validation images.

    10 % of the training images, drawn without regard to their classes from a fixed seed, are validation. The test
    images are the published test set (TinyImageNet: the official val folder). digits has none: half of its images,
    drawn from the same seed, are its test set. A folder of the user may have parts of its own (`utils.folder`).

    Args:
        name: one of `NAMES`.
        data_path: the folder of the data set, or one that has it in one of its usual subfolders.
        device: where the images are kept.
        train_idx_path, val_idx_path: .npy files of int64 indices into the official training images; both or none.
        download: fetch a missing data set through torchvision.
        label_noise: share of the training labels that `mislabel` replaces by wrong ones.
        augmentation: of training batches. standard: a crop of the padded image, and a flip where the data set allows
            it; flip: the flip alone; none: neither.
        image_size: of a folder: height and width of the inputs.
        inputs: of a folder, where saved members are measured: classes, means and deviations of their checkpoints.

    Raises:
        InputError: naming the path or flag, for missing, damaged or contradictory files.
    """
    split = train_idx_path, val_idx_path
    _given_indices(*split)  # what is wrong with them is said before anything is read or downloaded
    if name == "folder":
        if download:
            raise InputError("--download: given with --data folder, which is nowhere to be fetched; leave it out")
        info, parts, digest, files = _folder_parts(Path(data_path), split, image_size or DEFAULT_SIZE, inputs)
    else:
        info, parts, digest, files = _published_parts(name, Path(data_path), split, download)
    record: dict = {"dataset": name} | {part: len(labels) for part, (_, labels, _) in parts.items()}
    if name == "folder":
        record["image_size"] = info.image_size
    images, labels, rows = parts["train"]
    labels, mislabelled = mislabel(labels, info.num_classes, label_noise)
    if label_noise:
        digest.update(labels)
        record |= {"label_noise": label_noise, "mislabelled": int(mislabelled.sum())}
    record |= {"sha256_of_arrays_and_split": digest.hexdigest(), "files": files}
    training, unaugmented = _preprocessing(info, augmentation)
    train = ImageSet(images, labels, training, device, rows)
    val, test = (ImageSet(*parts[part][:2], unaugmented, device, parts[part][2]) for part in ("val", "test"))
    return Data(name, info, train, val, test, mislabelled, record)


# Of each part: images, labels and, of a memory map, its rows; and the digest and the files that the record names.
Parts = tuple[DatasetInfo, dict[str, tuple[np.ndarray, np.ndarray, np.ndarray | None]], Any, list[dict]]
SplitPaths = tuple[str | Path | None, str | Path | None]


def _published_parts(name: str, data_path: Path, split: SplitPaths, download: bool) -> Parts:
    info = DATASETS[name]
    if name == "digits":
        arrays, files = _read_digits(), []
    else:
        arrays, files = _read_published(name, data_path, download)
    images, labels, test_images, test_labels = arrays
    if len(images) < 1 / VALIDATION_SHARE and split == (None, None):
        problem = f"--data_path {data_path}: expected 10 or more training images of {name}, got {len(images)}"
        raise InputError(f"{problem}, so that 10 % are no validation image; give --train_idx_path and --val_idx_path")
    train, val = split_indices(len(images), *split)
    digest = hashlib.sha256()
    for array in (*arrays, train, val):
        digest.update(np.ascontiguousarray(array))
    if name in COUNTS:
        _compare_with_published(name, arrays, files)
    parts = {"train": (images[train], labels[train], None), "val": (images[val], labels[val], None)}
    return info, parts | {"test": (test_images, test_labels, None)}, digest, files


def _preprocessing(info: DatasetInfo, augmentation: str) -> tuple[Preprocessing, Preprocessing]:
    """Of training images, and of others."""
    training, unaugmented = info.preprocessing, replace(info.preprocessing, padding=0, flip=False, random_scale=False)
    if augmentation != "standard":
        training = replace(unaugmented, flip=training.flip and augmentation == "flip")
    return training, unaugmented


def expected_info(name: str, image_size: int | None) -> DatasetInfo:
    """What is known of a data set before it is read."""
    return folder_info(image_size) if name == "folder" else DATASETS[name]


def folder_info(
    image_size: int,
    classes: Iterable[str] = ("", ""),
    mean: Iterable[float] = (0.5,) * 3,
    std: Iterable[float] = (0.5,) * 3,
) -> DatasetInfo:
    """Facts of a folder of images; before it is read, its classes, means and deviations are stand-ins."""
    form = {"size": image_size, "random_scale": True} if stored_size(image_size) > image_size else {"padding": 4}
    preprocessing = Preprocessing(tuple(mean), tuple(std), flip=True, **form)
    return DatasetInfo(len(tuple(classes)), image_size, preprocessing, tuple(classes))


def _folder_parts(path: Path, split: SplitPaths, image_size: int, inputs: dict[str, list] | None) -> Parts:
    """Of a folder of images, which stay in the memory map."""
    if split != (None, None):  # whether one can be given is known before an image is decoded
        there, _ = find_classes(path)
        if "" in there or "val" in there:
            reason = "has val/" if "val" in there else "has no train/ and test/"
            raise InputError(f"--train_idx_path, --val_idx_path: {path} {reason}; leave both out")
    images = read_images(path, stored_size(image_size), cores())
    if images.unreadable:
        unread = [f"{name} ({why})" for name, why in images.unreadable.items()]
        problem = f"{path}: {len(unread)} of {len(images.labels)} files are left out, since they cannot be read"
        note(f"{problem}: {some(unread)}")
    rows = _folder_rows(path, images, *split)
    seen = np.isin(images.pixel_digests(rows["test"]), images.pixel_digests(rows["train"]))
    if seen.any():
        note(f"{path}: {seen.sum()} of {len(rows['test'])} test images have the pixels of a training image")
    mean, std = images.normalisation(rows["train"])
    if not any(std):
        raise InputError(f"--data_path {path}: all training images are of one colour; nothing can be learnt from them")
    std = tuple(deviation or 1.0 for deviation in std)  # a channel may be empty, as of fluorescence
    info = folder_info(image_size, images.classes, mean, std)
    if inputs and inputs["classes"]:
        expected, way_out = inputs["classes"], "give the folder of the training images"
        what = f"the {len(expected)} classes of the checkpoint"
        _check_classes(f"--data_path {path}", images.classes, expected, what, way_out)
        if inputs["mean"] != list(mean) or inputs["std"] != list(std):
            note(f"{path}: not the images that the members were trained on; means and deviations are those of training")
            info = folder_info(image_size, images.classes, inputs["mean"], inputs["std"])
    digest = hashlib.sha256(images.digest(*(rows[part] for part in PARTS)).encode())
    digest.update(repr((images.classes, mean, std)).encode())
    files = [{"path": str(path), "classes": images.classes, "left_out": dict(list(images.unreadable.items())[:100])}]
    parts = {part: (images.pixels, images.labels[rows[part]], rows[part]) for part in PARTS}
    return info, parts, digest, files


def _folder_rows(path: Path, images: Images, train: str | Path | None, val: str | Path | None) -> dict[str, np.ndarray]:
    """The rows of the training, validation and test images of a folder."""
    rows = images.parts
    if "" in rows:
        drawn = draw_parts(images.labels[rows[""]], images.pixel_digests(rows[""]))
        rows = {part: rows[""][index] for part, index in drawn.items()}
        counts = ", ".join(f"{len(rows[part])} {part}" for part in PARTS)
        note(f"{path}: has no train/ and test/: 10 % of each class are drawn for val and 20 % for test ({counts})")
    elif "val" not in rows:
        index = split_indices(len(rows["train"]), train, val)
        rows = rows | {part: rows["train"][chosen] for part, chosen in zip(("train", "val"), index, strict=True)}
    few = [part for part in PARTS if len(rows[part]) < 1 + (part == "train")]
    if few:
        raise InputError(f"--data_path {path}: too few images, none are left for {few[0]}; add some")
    counts = np.bincount(images.labels[rows["train"]], minlength=len(images.classes))
    if not counts.all():
        empty = [images.classes[label] for label in np.flatnonzero(counts == 0)]
        raise InputError(f"--data_path {path}: no training images of {some(empty)}; add some, or remove the class")
    return rows


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
    given = _given_indices(train, val)
    if not given:
        order = np.random.RandomState(SPLIT_SEED).permutation(samples)
        held_out = int(VALIDATION_SHARE * samples)
        return np.sort(order[held_out:]), np.sort(order[:held_out])
    parts = []
    for (flag, index), path in zip(given.items(), (train, val), strict=True):
        outside = index.min() < 0 or index.max() >= samples
        if outside or len(index) > samples or len(np.unique(index)) < len(index):
            found = f"{index.min()} to {index.max()}" if outside else "some of them twice"
            raise InputError(f"{flag} {path}: expected distinct indices from 0 to {samples - 1}, got {found}")
        parts.append(index.astype(np.int64))
    if len(parts[0]) < 2:  # BatchNorm has no spread of one sample
        raise InputError(f"--train_idx_path {train}: expected 2 or more samples, got 1")
    if len(np.intersect1d(*parts)):
        raise InputError(f"--train_idx_path {train} and --val_idx_path {val} share samples")
    return parts[0], parts[1]


def _given_indices(train: str | Path | None, val: str | Path | None) -> dict[str, np.ndarray]:
    """The arrays of two .npy files by their flags, empty where none is given: all that needs no images is checked."""
    if train is None and val is None:
        return {}
    if train is None or val is None:
        raise InputError("--train_idx_path and --val_idx_path go together: give both, or neither for the 10 % split")
    found = {}
    for flag, path in (("--train_idx_path", train), ("--val_idx_path", val)):
        index = found[flag] = load_array(Path(path), flag + " ")
        if index.ndim != 1 or index.dtype.kind not in "iu" or not len(index):
            problem = f"{flag} {path}: expected an .npy list of whole numbers, got {index.dtype} {list(index.shape)}"
            raise InputError(problem + "; numpy.flatnonzero makes one of a mask" * (index.dtype == bool))
    return found


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _read_published(name: str, data_path: Path, download: bool) -> tuple[Arrays, list[dict]]:
    """Find and read a set; with `download` one that is missing, incomplete or damaged is fetched."""
    info, folder = DATASETS[name], places.find(name, data_path)
    read = {"fashion_mnist": _read_fashion_mnist, "tiny_imgnet": _read_tiny}.get(name, _read_cifar)
    if folder is None and not download:
        raise InputError(places.not_found(name, data_path))
    damaged = False
    while True:
        folder = folder or places.fetch(name, data_path, damaged)
        try:
            return read(folder, info)
        except InputError as error:
            if name == "tiny_imgnet" or damaged:
                raise
            if not download:
                raise InputError(f"{error}; --download fetches the published set") from error
            note(f"{error}; the published set is fetched")
            folder, damaged = None, True


@functools.cache
def note(text: str) -> None:
    """Say once what does not stop the program."""
    if not rank():
        print(f"note: {text}", file=sys.stderr)


def _compare_with_published(name: str, arrays: Arrays, files: list[dict]) -> None:
    """Say in one line where a set is not the published one: another set of that name, a part, or the user's own."""
    facts, counts = [], (len(arrays[0]), len(arrays[2]))
    others = [Path(file["path"]).name for file in files if not file.get("md5_is_the_published_one", True)]
    if name == "fashion_mnist" and arrays[1][: len(MNIST_LABELS)].tolist() == MNIST_LABELS:
        facts.append("its labels are those of MNIST")
    if counts != COUNTS[name]:
        facts.append("{} training and {} test images, published are {} and {}".format(*counts, *COUNTS[name]))
    for part, labels in (("training", arrays[1]), ("test", arrays[3])):
        sizes = np.bincount(labels, minlength=DATASETS[name].num_classes)
        if not sizes.all():
            facts.append(f"{(sizes == 0).sum()} of {len(sizes)} classes have no {part} images")
        sizes = sizes[sizes > 0]
        if sizes.min() < sizes.max() and not others:
            facts.append(f"classes have {sizes.min()} to {sizes.max()} {part} images, published are equally many")
    if others:
        facts.append(f"the md5 of {some(others, 2)} differs")
    if facts:
        note(f"--data {name}: not the published set: {'; '.join(facts)}")


def _read_digits() -> Arrays:
    # As sklearn.datasets.load_digits, whose import takes more than a second. A row: 8 x 8 pixels, and the label.
    folders = find_spec("sklearn").submodule_search_locations
    rows = np.loadtxt(Path(folders[0], "datasets", "data", "digits.csv.gz"), delimiter=",")
    # 16 grey levels and white, 0 to 16.
    images = np.round(rows[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = rows[:, -1].astype(np.int64)
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


def _read_fashion_mnist(folder: Path, info: DatasetInfo) -> tuple[Arrays, list[dict]]:
    arrays, files = [], []
    for name, magic, item in zip(FILES["fashion_mnist"], (2051, 2049) * 2, ((28, 28), ()) * 2, strict=True):
        path = idx_file(folder, name) or folder / name
        content = read_bytes(path)
        array, md5 = read_idx(path, content, magic, item)
        files.append(_fingerprint(path, content, None) | {"md5_is_the_published_one": md5 in IDX_MD5})
        if item:
            border = (info.image_size - array.shape[1]) // 2
            arrays.append(np.pad(array, ((0, 0), (border, border), (border, border)))[..., None])
            continue
        if len(array) != len(arrays[-1]):
            raise InputError(f"{path}: expected one label for each of {len(arrays[-1])} images, got {len(array)}")
        check_labels(path, array, info.num_classes)
        arrays.append(array.astype(np.int64))
    return tuple(arrays), files


def _read_tiny(folder: Path, info: DatasetInfo) -> tuple[Arrays, list[dict]]:
    """TinyImageNet. Classes are numbered in the order of their sorted folder names, as in the authors' release."""
    train, val = folder / "train", folder / "val"
    names = _folder_names(train)
    if not 2 <= len(names) <= info.num_classes:
        raise InputError(f"{train}: expected 2 to {info.num_classes} class folders, got {len(names)}")
    listed = folder / "wnids.txt"
    if listed.is_file():
        _check_classes(train, names, read_text(listed).split(), f"the classes of {listed}")
    train_files = _files_of_classes(train, names)
    # As unpacked, val/images/<file>, or val/images/<class>/<file>; else val/<class>/<file>.
    place = val / "images" if images_in(val / "images") or _folder_names(val / "images") else val
    single, inner = images_in(place), [name for name in _folder_names(place) if name != "images"]
    if single and inner:
        raise InputError(f"{place}: holds {len(single)} images beside class folders; unpack the archive anew")
    if single:
        test_files = _annotated(val / "val_annotations.txt", single, {name: i for i, name in enumerate(names)})
    else:
        _check_classes(place, inner, names, f"the class folders of {train}")
        test_files = _files_of_classes(place, names)
    arrays = (*_read_jpegs(train_files), *_read_jpegs(test_files))
    return arrays, [{"path": str(folder), "classes": names}]


def _annotated(annotations: Path, images: list[Path], number: dict[str, int]) -> list[tuple[Path, int]]:
    """Images with the labels of a list that names each of them once; .jpg and .JPEG are alike."""
    if not annotations.is_file():
        raise InputError(f"{annotations}: missing; without it the images of {images[0].parent} have no labels")
    known = {path.stem: path for path in images} | {path.name: path for path in images}
    found: dict[Path, int] = {}
    for line in read_text(annotations).splitlines():
        name, wnid = [*line.strip().split("\t"), ""][:2]
        if not name:
            continue
        path = known.get(name) or known.get(Path(name).stem)
        # An image named a million times fills the memory.
        if wnid not in number or path in found or (path is None and Path(name).name != name[:255]):
            where = f"a class of {annotations.parent.parent / 'train'}"
            raise InputError(f"{annotations}: expected a file, named once, and {where}, got '{f'{name} {wnid}'[:80]}'")
        if path is None:
            raise InputError(
                f"{annotations}: names {name[:80]}, which {images[0].parent} lacks; unpack the archive anew"
            )
        found[path] = number[wnid]
    rest = [path.name for path in images if path not in found]
    if rest:
        problem = f"{annotations}: names {len(found)} of the {len(images)} images of {images[0].parent}, not"
        raise InputError(f"{problem} {some(rest)}; unpack the archive anew")
    return list(found.items())


def _check_classes(
    folder: Path | str, found: list[str], expected: list[str], what: str, way_out: str = "unpack the archive anew"
) -> None:
    """Refuse class folders that are not the expected ones."""
    lacking, strange = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if lacking or strange:
        differ = [f"{words} {some(names)}" for words, names in (("lacks", lacking), ("also has", strange)) if names]
        raise InputError(f"{folder}: expected {what}, but it {' and '.join(differ)}; {way_out}")


def _folder_names(folder: Path) -> list[str]:
    return [path.name for path in visible(folder) if path.is_dir()] if folder.is_dir() else []


def images_in(folder: Path) -> list[Path]:
    """The images of a folder, sorted; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return [path for path in visible(folder) if path.suffix.lower() in (".jpeg", ".jpg", ".png")]


def _files_of_classes(folder: Path, names: list[str]) -> list[tuple[Path, int]]:
    """Images and labels of the folders of all classes, in each directly or in images/."""
    classes = [images_in(folder / name / "images") or images_in(folder / name) for name in names]
    empty = [name for name, images in zip(names, classes, strict=True) if not images]
    if empty:
        raise InputError(f"{folder}: no images (.JPEG, .jpg or .png) in {some(empty)}; unpack the archive anew")
    return [(path, label) for label, images in enumerate(classes) for path in images]


def _read_jpegs(files: list[tuple[Path, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a list of (file, label)."""
    # Pillow lets go of the interpreter lock while it decodes, and warns of large images, which are refused here.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")
        images = list(pool.map(read_jpeg, (path for path, _ in files)))
    return np.stack(images), np.array([label for _, label in files])


def corrupted_name(name: str, image_size: int | None = None) -> str:
    """The name of the folder of a set's corrupted copies; of the user's own images that depends on their size."""
    return CORRUPTED.get(name) or FOLDER_CORRUPTED.format(image_size)


def find_corrupted(name: str, data_path: Path, required: bool = False, image_size: int | None = None) -> Path | None:
    """The folder of the corrupted copies of a test set, in `data_path` or beside the data set; None without one.

    Of an archive that is not unpacked it says so.

    Raises:
        InputError: if it is `required` and not there.
    """
    title = corrupted_name(name, image_size)
    spelling = plain(title)
    beside = [data_path, *(places.folders(name, data_path) if name in PLACES else ()), data_path.parent]
    found = named(beside, spelling)
    found += named(found, spelling)  # unpacked into a folder of its name
    for folder in found:
        if _in_arrays(folder) or any(path.name in CORRUPTIONS for path in subfolders(folder)):
            return folder
    packed = [path for folder in beside + found for path in places.archives(folder, spelling + places.PACKED)]
    way_out = places.unpacking(packed[0]) if packed else "leave it out, or name the folder that holds it by --data_path"
    if found:
        way_out = way_out if packed else "remove it, or unpack the archive into it"
        raise InputError(f"{found[0]}: expected .npy files or folders of corruptions, got neither; {way_out}")
    if required:
        raise InputError(f"--split corrupted: no {title}/ in {data_path} or beside the data set; {way_out}")
    if packed:
        note(f"{way_out}: without it only clean images are measured")
    return None


def check_corrupted(folder: Path, data: Data, corruptions: Iterable[str], severities: Iterable[int]) -> None:
    """Check every file of a corrupted set that will be measured, without reading the images.

    Raises:
        InputError: naming all missing files, or the first file or folder of a wrong form.
    """
    arrays = _in_arrays(folder)
    if arrays:
        paths = [folder / f"{name}.npy" for name in (*corruptions, "labels")]
    else:
        paths = [folder / name / str(severity) for name in corruptions for severity in severities]
    missing = ", ".join(str(path.relative_to(folder)) for path in paths if not path.exists())
    if missing:
        way_out = "complete it, or name a part by --corruptions and --severities"
        raise InputError(f"{folder}: {missing} missing; {way_out}")
    about = folder / "about.json"
    if about.is_file():  # of scripts/make_corrupted.py
        with refusing(f"{about}: cannot be read", "make the set anew"):
            origin = load_json(about)
            made_of, whole = origin["sha256_of_test_images"], origin["images"]
        if made_of != data.test.digest():
            raise InputError(f"{folder}: made of other test images than those of --data_path; make the set anew")
    else:
        whole = len(data.test)
    if arrays:
        counts = [len(corrupted_arrays(folder, data, name)[1]) // len(SEVERITIES) for name in corruptions]
    else:
        counts = [len(_corrupted_files(path, data)) for path in paths]
    if set(counts) - {whole}:
        found = " to ".join(map(str, sorted({min(counts), max(counts)})))
        note(f"{folder}: {found} images of a corruption at a severity, expected {whole}")


def read_corrupted(folder: Path, data: Data, name: str, severity: int) -> ImageSet:
    """One corruption at one severity, 1 to 5, of the test set.

    Two layouts: `<name>.npy`, uint8 [5 N, H, W, C] with severities 1 to 5 in turn, and `labels.npy` [5 N] (as in
    CIFAR-10-C; only the rows of the severity are read), or `<name>/<severity>/<class>/*.JPEG` (as in Tiny-ImageNet-C).

    Raises:
        InputError: naming the file or folder, for a wrong shape, dtype, label or class.
    """
    if _in_arrays(folder):
        images, labels = corrupted_arrays(folder, data, name)
        count = len(labels) // len(SEVERITIES)
        rows = slice((severity - 1) * count, severity * count)
        index = np.arange(rows.start, rows.stop)
        return ImageSet(images, np.array(labels[rows]), data.test.preprocessing, data.test.device, index)
    files = _corrupted_files(folder / name / str(severity), data)
    return ImageSet(*_read_jpegs(files), data.test.preprocessing, data.test.device)


def _in_arrays(folder: Path) -> bool:
    """Whether a corrupted set is in .npy files, and not in folders of images."""
    return any(path.suffix == ".npy" for path in visible(folder))


def _corrupted_files(folder: Path, data: Data) -> list[tuple[Path, int]]:
    """Images and labels of one corruption at one severity in a set of folders of images."""
    classes, found = data.record["files"][0]["classes"], _folder_names(folder)
    if len(found) > data.info.num_classes:
        problem = f"{folder}: expected the {len(classes)} classes of the training images, got {len(found)}"
        raise InputError(f"{problem}, as frost of zenodo.org/records/2536630; get records/8206060")
    _check_classes(folder, found, classes, "the classes of the training images")
    return _files_of_classes(folder, classes)


def corrupted_arrays(folder: Path, data: Data, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [5 N, H, W, C], as a memory map, and labels int64 [5 N] of one corruption of a set in .npy files."""
    path, labels_path, severities = folder / f"{name}.npy", folder / "labels.npy", len(SEVERITIES)
    images, labels = load_array(path), load_array(labels_path)
    shape = (data.info.image_size, data.info.image_size, data.info.channels)
    if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images) or len(images) % severities:
        wanted = f"uint8 [{severities} N, {', '.join(map(str, shape))}], severity by severity"
        raise InputError(f"{path}: expected {wanted}, got {images.dtype} {list(images.shape)}")
    if labels.ndim == 1 and len(labels) == severities * len(images):
        raise InputError(f"{path}: expected {len(labels)} images as in {labels_path}, got a fifth, one severity alone")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise InputError(f"{labels_path}: expected {len(images)} integers, got {labels.dtype} {list(labels.shape)}")
    check_labels(labels_path, labels, data.info.num_classes)
    fifths, expected = labels.reshape(severities, -1), data.test.labels.cpu().numpy()
    if (fifths != fifths[0]).any() or np.array_equal(labels, expected):
        problem = f"{labels_path}: expected {severities} times the same labels, severity by severity"
        raise InputError(f"{problem}; a set of one severity alone cannot be measured")
    if fifths.shape[1] == len(expected) and (fifths != expected).any():
        raise InputError(f"{labels_path}: expected {severities} times the labels of the test set, in its order")
    return images, labels.astype(np.int64)


def _fingerprint(path: Path, content: bytes, published: str | None) -> dict:
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return {"path": str(path), "md5": md5, "md5_is_the_published_one": md5 == published}
