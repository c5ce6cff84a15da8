"""Where data sets lie: folders that hold one whole, archives that are not unpacked, and downloads."""

import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from utils import InputError, first_line, some
from utils.files import hold, refusing, visible

# Below --data_path, in the order in which they are tried; the folder itself is last, as the files of another set, such
# as MNIST, may lie in it under the same names.
PLACES = {
    "cifar10": ("cifar10", "cifar-10-batches-py", "cifar10/cifar-10-batches-py", ""),
    "cifar100": ("cifar100", "cifar-100-python", "cifar100/cifar-100-python", ""),
    "tiny_imgnet": ("tiny-imagenet-200", "tiny_imgnet", "tiny_imgnet/tiny-imagenet-200", ""),
    "fashion_mnist": ("fashion-mnist", "fashion_mnist", "FashionMNIST/raw", "fashion_mnist/FashionMNIST/raw", ""),
}
# What a folder must hold to be the set; a name that ends in / is a folder.
FILES = {
    "cifar10": (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"),
    "cifar100": ("train", "test"),
    "tiny_imgnet": ("train/", "val/"),
    "fashion_mnist": tuple(
        f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    ),
}
# How names of the set begin, in small letters and digits only; and other folders that are searched then.
STEMS = {
    "cifar10": ("cifar10(?!0)", "data|datasets?"),
    "cifar100": ("cifar100", "data|datasets?"),
    "tiny_imgnet": ("tiny(?:imagenet|imgnet)", "data|datasets?"),
    "fashion_mnist": ("f(?:ashion)?mnist", "data|datasets?|raw|fashion"),
}
ENDINGS = "(?:200)?(?:python|batchespy)?(?:tar)?(?:gz)?(?:master|main)?"
SOURCES = {
    "cifar10": "the 'python version' of https://www.cs.toronto.edu/~kriz/cifar.html",
    "cifar100": "the 'python version' of https://www.cs.toronto.edu/~kriz/cifar.html",
    "tiny_imgnet": "tiny-imagenet-200.zip, unpacked",
    "fashion_mnist": "the four IDX files of https://github.com/zalandoresearch/fashion-mnist",
}
OTHER_FORMS = {".bin": "is of the binary version", ".mat": "is of the Matlab version", ".csv": "is a table"}
OTHER_FORMS |= {end: f"is of the {end} form" for end in (".parquet", ".npz", ".arrow", ".tfrecord", ".h5", ".pt")}
ARCHIVE = re.compile(r"\.(zip|7z|rar|tgz|tbz2?|tar(\.\w+)?)$", re.IGNORECASE)
PACKED = r"(?:fixed|\d)*(?:tar|zip|7z|rar|tgz)"  # how names of archives end, as `plain` spells them


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, as `visible`; none where it cannot be read."""
    return [path for path in _within(folder) if os.path.isdir(path)]


def _within(folder: Path) -> list[Path]:
    try:
        return visible(folder)
    except InputError:
        return []


def plain(name: str) -> str:
    """A name in small letters and digits only: CIFAR-10-C, cifar_10_c and cifar10c are one."""
    return re.sub("[^a-z0-9]", "", name.lower())


def named(parents: list[Path], spelling: str) -> list[Path]:
    """The folders in some folders whose whole names, as `plain` spells them, match."""
    children = (child for folder in parents for child in _within(folder))
    return [child for child in children if re.fullmatch(spelling, plain(child.name)) and os.path.isdir(child)]


def folders(name: str, data_path: Path) -> list[Path]:
    """Where a data set may lie: the usual places, then folders named like it, in one another, down to three levels."""
    stem, others = STEMS[name]
    found, level = [data_path / place for place in PLACES[name]], [data_path]
    for _ in range(3):
        level = named(level, f"{stem}{ENDINGS}|{others}")
        found += level
    return list(dict.fromkeys(found))


def idx_file(folder: Path, name: str) -> Path | None:
    """An IDX file, packed or not; some programs write a dot, as in train-images.idx3-ubyte, some a folder for each."""
    spellings = (name, name.replace("-idx", ".idx"))
    names = [inner + end for spelling in spellings for inner in (spelling, f"{spelling}/{name}") for end in ("", ".gz")]
    return next((folder / spelling for spelling in names if os.path.isfile(folder / spelling)), None)


def missing(name: str, folder: Path) -> list[str]:
    """The files of a data set that a folder lacks."""

    def is_there(file: str) -> bool:
        if name == "fashion_mnist":
            return idx_file(folder, file) is not None
        if file == "train/":
            return bool(subfolders(folder / file))
        return bool(_within(folder / file)) if file.endswith("/") else os.path.isfile(folder / file)

    return [file for file in FILES[name] if not is_there(file)]


def find(name: str, data_path: Path) -> Path | None:
    """The first folder that holds a data set whole; one with a list of its classes before others."""
    whole = [folder for folder in folders(name, data_path) if not missing(name, folder)]
    # Many sets have train/ and val/.
    listed = [folder for folder in whole if os.path.isfile(folder / "wnids.txt")]
    return next(iter(listed + whole), None)


def archives(folder: Path, stem: str) -> Iterator[Path]:
    """Archives in a folder whose names begin as `stem` says, as `plain` spells them."""
    for path in _within(folder):
        if ARCHIVE.search(path.name) and re.match(stem, plain(path.name)) and os.path.isfile(path):
            yield path


def unpacking(archive: Path) -> str:
    """That an archive is not unpacked, with the command that does it."""
    source, target = shlex.quote(str(archive)), shlex.quote(str(archive.parent))
    commands = {".zip": f"unzip -qo {source} -d {target}", ".7z": f"7z x {source} -o{target}"}
    commands[".rar"] = f"unrar x {source} {target}"
    command = commands.get(archive.suffix.lower(), f"tar -xf {source} -C {target}")
    return f"{archive} is not unpacked: unpack it ({command})"


def not_found(name: str, data_path: Path) -> str:
    """Why a data set is not found: what was looked for where, what is there instead, and the way out."""
    lacking = {folder: missing(name, folder) for folder in folders(name, data_path)}
    folder = min(lacking, key=lambda folder: len(lacking[folder]))
    hint, parts = _hint(name, data_path), [f"--data_path {data_path}: no {name} found"]
    if len(lacking[folder]) < len(FILES[name]):
        parts += [f"{folder} lacks {', '.join(lacking[folder])}", hint or "unpack the archive anew"]
    elif hint:
        parts.append(hint)
    else:
        parts.append(f"looked for {', '.join(FILES[name])} in {', '.join(str(data_path / p) for p in PLACES[name])}")
        parts += [_content(data_path), "give the folder that holds the data sets"]
    return "; ".join(parts) + ("" if name == "tiny_imgnet" else ", or --download")


def _content(folder: Path) -> str:
    if not os.path.isdir(folder):
        return "it is a file" if os.path.isfile(folder) else "there is no such folder"
    try:
        names = [path.name for path in visible(folder)]
    except InputError as error:
        return str(error)
    return f"found there: {some(names, 5) or 'nothing'}"


def _hint(name: str, data_path: Path) -> str:
    """What lies there in another form, or where the set lies; empty if nothing is known."""
    if os.path.isfile(data_path) and ARCHIVE.search(data_path.name):
        return unpacking(data_path)
    stem = STEMS[name][0]
    near = [data_path, *named([data_path], f"{stem}.*"), *folders(name, data_path)]
    near = list(dict.fromkeys([*near, *named(near, f"{stem}.*")]))
    packed = [path for folder in near for path in archives(folder, f"{stem}(?!c(?:extra)?{PACKED})")]
    foreign = [path for path in packed if re.search("binary|matlab", path.name)]
    if len(packed) > len(foreign):
        return unpacking(next(path for path in packed if path not in foreign))
    near += [inner for folder in near[1:] for inner in subfolders(folder)]
    for path in [*foreign, *(path for folder in near for path in _within(folder))]:
        form = "is of the binary or Matlab version" if path in foreign else OTHER_FORMS.get(path.suffix.lower())
        where = plain("".join(path.parts[-3:]))
        if path.name == "train" and name != "tiny_imgnet" and re.match(stem, plain(path.parent.name)) and path.is_dir():
            form, where = "holds folders of images", stem
        if form and (re.search(f"{stem}|databatch", where) or where == stem):
            return f"{path} {form}, which this program does not read: get {SOURCES[name]}"
    for folder in data_path.absolute().parents[:2]:
        whole = find(name, folder)
        if whole is not None:
            return f"it is in {whole}: give this folder"
    return ""


def _published(name: str) -> tuple[type, Path, dict[Path, str]]:
    """The class in torchvision of a data set, the folder that it fills, and its archives with their md5."""
    from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

    if name == "fashion_mnist":
        raw = Path("FashionMNIST/raw")
        return FashionMNIST, raw, {raw / file: md5 for file, md5 in FashionMNIST.resources}
    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    return source, Path(source.base_folder), {Path(source.filename): source.tgz_md5}


def fetch(name: str, data_path: Path, damaged: bool = False) -> Path:
    """Download a data set through torchvision; the folder that holds it.

    It is unpacked aside, and each file is then moved to its place at once: nobody reads a part of it, whatever ends
    this process, and files that are there but incomplete are replaced.

    Args:
        name: of the data set.
        data_path: where it goes.
        damaged: whether the one that is there cannot be read.

    Raises:
        InputError: if it cannot be fetched, or not written.
    """
    from torchvision.datasets.utils import check_integrity

    if name == "tiny_imgnet":
        raise InputError(f"{not_found(name, data_path)} (--download cannot fetch it; INSTALL.md says how to get it)")
    source, place, packed = _published(name)
    with refusing(f"--download: {data_path} cannot be written"), ExitStack() as stack:
        data_path.mkdir(parents=True, exist_ok=True)
        # Without locks each of several processes that fetch it moves whole files.
        if stack.enter_context(hold(data_path / ".download.lock")):
            for left in data_path.glob(".download-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        whole = find(name, data_path)
        if whole is not None and not damaged:
            return whole  # another process has fetched it meanwhile
        aside = Path(stack.enter_context(TemporaryDirectory(dir=data_path, prefix=".download-")))
        for archive, md5 in packed.items():
            if check_integrity(data_path / archive, md5):  # torchvision unpacks what it finds
                (aside / archive).parent.mkdir(parents=True, exist_ok=True)
                (aside / archive).symlink_to((data_path / archive).absolute())
        try:
            source(str(aside), download=True)
        except Exception as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or first_line(error)
            way_out = "INSTALL.md says how to get it by hand"
            raise InputError(f"--download: {name} could not be fetched ({reason[:300]}); {way_out}") from error
        for path in aside.rglob("*"):
            if path.is_file() and not path.is_symlink():
                target = data_path / path.relative_to(aside)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
    return data_path / place
