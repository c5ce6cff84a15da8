"""The user's own images: a folder whose subfolders are the classes, decoded once into a memory-mapped file.

Two forms: DIR/train/<class>/*, DIR/test/<class>/* and, where it is there, DIR/val/<class>/*; or DIR/<class>/* alone, of
which validation and test images are drawn class by class. Images may lie in folders within that of their class.

The decoded images are in DIR/.decoded/, or in the user's cache folder where that cannot be written: a folder
<size>-<key> holds images.npy (uint8 [files, S, S, 3]), records.npy (`RECORD`) and about.json. Its key is of the names,
sizes and times of all files. Processes that load neither torch nor the trainer fill it; what they have done is found
again after a kill.
"""

import hashlib
import json
import math
import os
import selectors
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from utils import InputError, RunError, first_line, some
from utils.files import JUNK, hold, load_array, load_json, refusing, sync_folder, visible, write_json

PARTS = ("train", "val", "test")
OTHER_PARTS = {*PARTS, "training", "valid", "validation", "dev", "testing"}  # in any case
# Shares of each class that are drawn where there are no parts; the seed is part of the experiment.
SHARES, SPLIT_SEED = {"test": 0.2, "val": 0.1}, 0
FOLDER_CORRUPTED = "folder-{}-C"  # the corrupted copies, which may lie beside the classes

# From this size on, images are stored larger than the inputs by this percentage, so that crops vary in scale.
SCALED_FROM, LARGER = 128, 115

# Raised by whoever changes what is decoded, so that it is decoded anew.
CACHE_VERSION = 1
CHUNK = 16  # files of one request to a process
# Of processes that decode: glibc keeps freed memory up to 32 MiB, the most that all its versions take, which it would
# hand back and fault in at every file.
KEPT_MEMORY = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(2**25))
# Of each file: whether it is decoded; SHA-256 of its pixels; their sums, and the sums of their squares, by channel.
RECORD = np.dtype([("done", "u1"), ("digest", "u1", 32), ("sums", "<i8", 3), ("squares", "<i8", 3)])
PROGRAMS = {"EPS"}  # formats for which Pillow starts a program
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


@dataclass(frozen=True)
class Images:
    """A folder's images, decoded.

    Attributes:
        classes: their names, sorted.
        pixels: uint8 [F, S, S, 3], the memory map of all F files.
        labels: int64 [F].
        parts: the rows of the images that could be read, by part; where there are no parts, those of "" are all.
        records: `RECORD` [F].
        unreadable: the files that were left out, and why.
    """

    classes: list[str]
    pixels: np.ndarray
    labels: np.ndarray
    parts: dict[str, np.ndarray]
    records: np.ndarray
    unreadable: dict[str, str]

    def normalisation(self, rows: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Means and deviations of the pixels in [0, 1] of some images, by channel, from exact sums."""
        count = len(rows) * math.prod(self.pixels.shape[1:3])
        sums, squares = (self.records[name][rows].sum(axis=0).tolist() for name in ("sums", "squares"))
        variances = (count * square - total**2 for total, square in zip(sums, squares, strict=True))
        means = tuple(total / (255 * count) for total in sums)
        return means, tuple(math.sqrt(variance) / (255 * count) for variance in variances)

    def pixel_digests(self, rows: np.ndarray) -> np.ndarray:
        """SHA-256 of each of some images."""
        return self.records["digest"][rows].view("V32").ravel()

    def digest(self, *parts: np.ndarray) -> str:
        """SHA-256 of the pixels and labels of the images in each part."""
        digest = hashlib.sha256()
        for rows in parts:
            digest.update(self.records["digest"][rows].tobytes())
            digest.update(self.labels[rows].tobytes())
        return digest.hexdigest()


def stored_size(size: int) -> int:
    """Height and width of the decoded images for inputs of this size."""
    return size if size < SCALED_FROM else (LARGER * size + 50) // 100


def read_images(path: Path, size: int, processes: int) -> Images:
    """Find the images of a folder, and decode those that are not decoded yet.

    Args:
        path: the folder.
        size: height and width of the decoded images: the shorter side is scaled to it (antialiased), the middle cut
            out. What is transparent becomes white; of several frames the first is taken.
        processes: that decode.

    Raises:
        InputError: naming the folder: missing, of no such form, fewer than two classes, classes that differ between its
            parts, a class without images that can be read.
        RunError: if the decoded images cannot be written, or a process was killed.
    """
    parts, classes = find_classes(path)
    files = []  # (part, label, path below `path`, bytes, time)
    for part in parts:
        for label, name in enumerate(classes):
            found = [(part, label, *entry) for entry in find_files(path / part / name, os.path.join(part, name))]
            if not found:
                raise InputError(f"--data_path {path}: no images in {os.path.join(part, name)}; add some, or remove it")
            files += found
    pixels, records, unreadable = _decoded(path, [file[2:] for file in files], size, processes)
    labels, done = np.array([file[1] for file in files]), records["done"] == 1
    whose = np.array([file[0] for file in files])
    rows = {part: np.flatnonzero((whose == part) & done) for part in parts}
    for part in parts:
        lost = np.bincount(labels[rows[part]], minlength=len(classes)) == 0
        if lost.any():
            name = os.path.join(part, classes[int(lost.argmax())])
            reason = next(why for file, why in unreadable.items() if file.startswith(name + os.sep))
            raise InputError(f"--data_path {path}: no file in {name} is an image that can be read ({reason})")
    return Images(classes, pixels, labels, rows, records, unreadable)


def read_unlabelled(path: Path, size: int, processes: int) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """The images of a folder of any form, decoded as by `read_images`: of one with train/ and test/ those of test/.

    Returns:
        uint8 [F, S, S, 3], the memory map of all files; the rows of those that could be read; and why others could not.

    Raises:
        InputError: naming the folder: missing, or without images.
    """
    try:
        images = read_images(path, size, processes)
        return images.pixels, images.parts["" if "" in images.parts else "test"], images.unreadable
    except InputError:
        if not path.is_dir():
            raise
    # Of no classes, such as images alone.
    files = [file for file in find_files(path, "") if Path(file[0]).suffix.lower() not in (".npy", ".json", ".txt")]
    pixels, records, unreadable = _decoded(path, files, size, processes) if files else (None, None, {})
    rows = np.flatnonzero(records["done"] == 1) if files else np.zeros(0)
    if not len(rows):
        example = next(iter(unreadable.items()), ("", "it holds no such files"))
        raise InputError(
            f"--data_path {path}: expected images, found none that can be read ({': '.join(example).strip(': ')})"
        )
    return pixels, rows, unreadable


def draw_parts(labels: np.ndarray, digests: np.ndarray) -> dict[str, np.ndarray]:
    """The sorted indices of training, validation and test images, drawn class by class from a fixed seed.

    Images of a class with the same pixels stay together. Of n different ones, the whole number nearest to 0.2 n goes to
    the test images, that nearest to 0.1 n to validation.

    Args:
        labels: int64 [N].
        digests: of the pixels, [N].
    """
    random, parts = np.random.RandomState(SPLIT_SEED), {part: [] for part in PARTS}
    for label in range(labels.max() + 1):
        index = np.flatnonzero(labels == label)
        _, first, inverse = np.unique(digests[index], return_index=True, return_inverse=True)
        order = random.permutation(np.sort(first))  # by the first image of each, in the order of the files
        start = 0
        for part, share in (*SHARES.items(), ("train", 1.0)):
            end = start + int(share * len(order) + 0.5)
            parts[part].append(index[np.isin(first[inverse], order[start:end])])
            start = end
    return {part: np.sort(np.concatenate(drawn)) for part, drawn in parts.items()}


def _parts(path: Path) -> list[str]:
    """The folders of the parts; [""] where the classes are in the folder itself."""
    if not path.is_dir():
        found = "a file" if path.exists() else "no such folder"
        raise InputError(f"--data_path {path}: expected a folder of images, got {found}")
    folders = _folders(path)
    names = [name for name in folders if name.lower() in OTHER_PARTS]
    if {"train", "test"} <= set(names):
        other = [name for name in names if name not in PARTS]
        if other:
            problem = f"--data_path {path}: holds {other[0]}/ beside train/ and test/"
            raise InputError(f"{problem}; rename it to val/ where it is for validation, or move it elsewhere")
        return [part for part in PARTS if part in names]
    if len(names) > 1 or (names and names == folders):  # one among others may be a class, as of vehicles
        problem = f"--data_path {path}: expected train/ and test/ (and val/), got {', '.join(names)}"
        problem += " alone" * (names == folders)
        raise InputError(f"{problem}; rename or complete them, or give a folder of classes, of which parts are drawn")
    return [""]


def _folders(path: Path) -> list[str]:
    ours = FOLDER_CORRUPTED.split("{}")
    names = [place.name for place in visible(path) if place.is_dir()]
    return [name for name in names if not (name.startswith(ours[0]) and name.endswith(ours[1]))]


def find_classes(path: Path) -> tuple[list[str], list[str]]:
    """The parts of a folder, and its classes, which all of them must have, without looking at an image.

    Raises:
        InputError: as `read_images`.
    """
    parts = _parts(path)
    names = _folders(path / parts[0])
    for part in parts[1:]:
        others = _folders(path / part)
        if others != names:
            differ = sorted(set(names) ^ set(others))
            where = f"{parts[0]}/ or in {part}/"
            raise InputError(f"--data_path {path}: {some(differ)}: only in {where}, expected in both")
    if len(names) < 2:
        found = f"{names[0]} alone" if names else "no folder"
        problem = f"--data_path {path / parts[0]}: expected a folder for each of 2 or more classes, got {found}"
        raise InputError(f"{problem}; give the folder whose subfolders are the classes")
    return parts, names


def find_files(folder: Path, inside: str, above: tuple = ()) -> Iterator[tuple[str, int, int]]:
    """All files in a folder and the folders in it, by name: path, bytes, and time of the last change; junk is left out.

    Links are followed, unless they lead back to a folder above. Of what is no file, and of broken links, bytes are -1.
    """
    with refusing(f"--data_path {folder}: cannot be read"), os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not JUNK.fullmatch(entry.name)), key=lambda entry: entry.name)
        here = os.stat(folder)
    above = (*above, (here.st_dev, here.st_ino))
    for entry in found:
        place = os.path.join(inside, entry.name)
        try:
            about = entry.stat()
        except OSError:
            yield place, -1, 0
            continue
        if not stat.S_ISDIR(about.st_mode):
            yield place, about.st_size if stat.S_ISREG(about.st_mode) else -1, about.st_mtime_ns
        elif (about.st_dev, about.st_ino) not in above:
            yield from find_files(folder / entry.name, place, above)


# The cache.


Cache = tuple[np.memmap, np.ndarray, dict[str, str]]  # pixels, records, and which files are left out and why


def _decoded(path: Path, files: list[tuple[str, int, int]], size: int, processes: int) -> Cache:
    """The cache of these files, filled if need be."""
    key = hashlib.sha256(json.dumps([CACHE_VERSION, size, files]).encode()).hexdigest()
    name, shape = f"{size}-{key[:16]}", (len(files), size, size, 3)
    for place in _places(path):
        found = _read_cache(place / name, shape)
        if found:
            return found
    place = _writable(path, math.prod(shape))
    with hold(place / "lock") as held:
        cache = place / name
        found = _read_cache(cache, shape)
        if not found:  # else another process has done it meanwhile
            shutil.rmtree(cache, ignore_errors=True)
            part = place / f"{name}.part{'' if held else os.getpid()}"
            unreadable = _fill(path, part, [file[0] for file in files], shape, processes)
            about = {"folder": str(path.absolute()), "pillow": PIL.__version__, "unreadable": unreadable}
            write_json(part / "about.json", about)
            os.rename(part, cache)
            sync_folder(place)
            for other in place.glob(f"{size}-*"):  # of files that were there before
                if other != cache:
                    shutil.rmtree(other, ignore_errors=True)
            found = _read_cache(cache, shape)
            if not found:
                raise RunError(f"{cache}: cannot be read again; re-run the same command")
        return found


def _places(path: Path) -> list[Path]:
    """Where decoded images may be, in the order in which these are tried."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    absolute = os.path.realpath(path)
    digest = hashlib.sha256(os.fsencode(absolute)).hexdigest()
    return [path / ".decoded", Path(home) / "sharpbalance" / f"{Path(absolute).name[:40]}-{digest[:8]}"]


def _writable(path: Path, size: int) -> Path:
    """The first place that can be written and has room."""
    problems = []
    for place in _places(path):
        try:
            place.mkdir(parents=True, exist_ok=True)
            (place / "lock").touch()
            held = sum(file.stat().st_blocks * 512 for file in place.glob("*.part/*"))  # by what was begun before
            free = shutil.disk_usage(place).free + held
            if free > size:
                return place
            problems.append(f"{place} has {free / 2**20:.0f} MiB")
        except OSError as error:
            problems.append(f"{place} cannot be written ({error.strerror})")
    problem = f"--data_path {path}: {size / 2**20:.0f} MiB are needed for the decoded images, but {'; '.join(problems)}"
    raise InputError(f"{problem}; free some space, or set XDG_CACHE_HOME to a folder elsewhere")


def _read_cache(cache: Path, shape: tuple[int, ...]) -> Cache | None:
    """A cache that is complete, as it was when it got its name; else None."""
    try:
        images, records = load_array(cache / "images.npy"), np.array(load_array(cache / "records.npy"))
        unreadable = load_json(cache / "about.json")["unreadable"]
        whole = images.shape == shape and images.dtype == np.uint8 and records.shape == shape[:1]
        whole = whole and records.dtype == RECORD and len(unreadable) + int(records["done"].sum()) == len(records)
        return (images, records, unreadable) if whole else None
    except (InputError, OSError, LookupError, TypeError, ValueError):
        return None


def _fill(path: Path, part: Path, names: list[str], shape: tuple[int, ...], processes: int) -> dict[str, str]:
    """Decode the files that are not in `part` yet; which could not be read, and why."""
    try:
        part.mkdir(exist_ok=True)
        images = _opened(part / "images.npy", np.dtype(np.uint8), shape)
        records = _opened(part / "records.npy", RECORD, shape[:1])
        for row in np.flatnonzero(records["done"]):  # a power cut may have taken the pixels
            if hashlib.sha256(images[row]).digest() != records["digest"][row].tobytes():
                records["done"][row] = 0
        todo, started = np.flatnonzero(records["done"] == 0), time.monotonic()
        what = f"{len(todo)} of {len(names)} files of {path}"
        print(f"note: decoding {what} to {shape[1]}x{shape[2]} pixels, once, in {part.parent}", file=sys.stderr)
        with tqdm(total=len(todo), disable=not sys.stderr.isatty(), unit="file", dynamic_ncols=True) as bar:
            files = [(int(row), str(path / names[row])) for row in todo]
            chunks = [files[i : i + CHUNK] for i in range(0, len(files), CHUNK)]
            found = _decode(part, (images.offset, records.offset, shape[1]), chunks, processes, bar)
        for array in (images, records):
            array.flush()
        seconds = time.monotonic() - started
        speed = f"{len(todo) / max(seconds, 1e-3):.0f} files/s"
        print(f"note: decoded in {seconds:.1f} s ({speed}, {images.nbytes / 2**20:.0f} MiB)", file=sys.stderr)
    except OSError as error:
        room = f"{math.prod(shape) / 2**20:.0f} MiB are needed"
        way_out = "free some space and re-run the same command, which goes on where it stopped"
        raise RunError(f"{part}: could not be written ({error.strerror}; {room}); {way_out}") from error
    return {names[row]: found[row] for row in np.flatnonzero(records["done"] == 0)}


def _opened(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """An array of an interrupted call, or a new one, of zeros."""
    try:
        array = load_array(path)
        if array.dtype == dtype and array.shape == shape:
            return np.lib.format.open_memmap(path, mode="r+")
    except InputError:
        pass
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def _decode(
    part: Path, form: tuple[int, int, int], chunks: list[list[tuple[int, str]]], processes: int, bar: tqdm
) -> dict[int, str]:
    """Have processes decode chunks of files into the arrays of `part`; why some could not be read, by their rows."""
    waiting, found, at = deque(chunks), {}, {}
    root, words = str(Path(__file__).resolve().parent.parent), [str(part), *map(str, form)]
    code = f"import sys; sys.path.insert(0, {root!r}); from utils.folder import work; work(sys.argv[1:])"
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    pipe["env"] = KEPT_MEMORY | os.environ
    with selectors.DefaultSelector() as selector:
        workers = [
            subprocess.Popen([sys.executable, "-c", code, *words], **pipe) for _ in range(min(processes, len(chunks)))
        ]
        try:
            for worker in workers:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
                at[worker.pid] = waiting.popleft()
                _ask(worker, at[worker.pid])
            while selector.get_map():
                for key, _ in selector.select():
                    worker = key.data
                    line = worker.stdout.readline()
                    if not line:
                        raise RunError(_ended(worker, part, at[worker.pid]))
                    reply = json.loads(line)
                    if reply["failed"]:
                        kind, text = reply["failed"]
                        raise OSError(None, text) if kind == "write" else InputError(text)
                    found |= dict(reply["unreadable"])
                    bar.update(len(at[worker.pid]))
                    if waiting:
                        at[worker.pid] = waiting.popleft()
                        _ask(worker, at[worker.pid])
                    else:
                        selector.unregister(worker.stdout)
        finally:
            for worker in workers:  # at the end of its input a process ends
                worker.stdout.close()
                with suppress(BrokenPipeError):
                    worker.stdin.close()
            for worker in workers:
                worker.wait()
    return found


def _ask(worker: subprocess.Popen, chunk: list[tuple[int, str]]) -> None:
    try:
        worker.stdin.write(json.dumps(chunk) + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended, which its output shows


def _ended(worker: subprocess.Popen, part: Path, chunk: list[tuple[int, str]]) -> str:
    """What is said of a process that ended by itself."""
    done = load_array(part / "records.npy")["done"]
    last = max((place for place, (row, _) in enumerate(chunk) if done[row]), default=-1)
    file = chunk[min(last + 1, len(chunk) - 1)][1]
    code = worker.wait()
    how = signal.Signals(-code).name if code < 0 else f"status {code}"
    way_out = "re-run the same command to go on; if it stops there again, remove that file"
    return f"{file}: the process that decoded it was ended ({how}; out of memory, or a fault of Pillow); {way_out}"


# In the processes that decode.


def work(words: list[str]) -> None:
    """Decode the files that standard input lists, chunk by chunk, into images.npy and records.npy.

    Each is written by its own process alone, its record after its pixels.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, at whose end the input ends
    warnings.simplefilter("ignore")
    part, images_at, records_at, size = Path(words[0]), *map(int, words[1:])
    images, records = (os.open(part / name, os.O_WRONLY) for name in ("images.npy", "records.npy"))
    for line in sys.stdin:
        unreadable, failed = [], None
        for row, path in json.loads(line):
            try:
                pixels = decode(path, size)
            except Exception as error:  # a damaged file raises nearly anything
                if isinstance(error, MemoryError) or getattr(error, "errno", None):
                    failed = "read", f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'out of memory'})"
                    break
                unreadable.append((row, first_line(error)[:120]))
                continue
            values = np.ascontiguousarray(pixels.reshape(-1, 3).T, np.int64)  # whole channels sum six times as fast
            digest = np.frombuffer(hashlib.sha256(pixels).digest(), np.uint8)
            record = np.array((1, digest, values.sum(axis=1), (values**2).sum(axis=1)), RECORD)
            try:
                os.pwrite(images, pixels, images_at + row * pixels.nbytes)
                os.pwrite(records, record.tobytes(), records_at + row * RECORD.itemsize)
            except OSError as error:
                failed = "write", error.strerror
                break
        print(json.dumps({"unreadable": unreadable, "failed": failed}), flush=True)


def decode(path: str, size: int) -> np.ndarray:
    """An image file of any format and mode of Pillow, uint8 [size, size, 3].

    Turned as its EXIF entry says; the middle of the longer side is cut out, and scaled with a triangle filter that is
    as wide as a pixel of the result (antialiased). What is transparent becomes white. Of 16 bits the upper eight are
    taken; floats are of [0, 1], or else of [0, 255].

    Raises:
        ValueError, OSError, ...: for what is no image, or a damaged one; an OSError with an errno if it is not the
            file's content that is at fault.
    """
    with open_image(path) as image:
        image.draft(None, (2 * size, 2 * size))  # JPEG: of large images only what is needed is decoded
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        if width != height:
            image = image.crop((left, top, left + side, top + side))
        image = _in_colour(image)
        if side != size:
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        return np.array(image)


def open_image(path: str) -> Image.Image:
    """An image file of any format of Pillow but `PROGRAMS`, whose size and mode are known, but not yet its pixels.

    Raises:
        ValueError, OSError, ...: as `decode`.
    """
    if not os.path.isfile(path):
        raise ValueError("a link to nothing" if os.path.islink(path) else "not a file")
    Image.init()  # all formats, once
    try:
        return Image.open(path, formats=[name for name in Image.ID if name not in PROGRAMS])
    except UnidentifiedImageError:
        raise ValueError("no image of a format that Pillow reads") from None


def _in_colour(image: Image.Image) -> Image.Image:
    """The image in mode RGB."""
    if image.mode in (*SIXTEEN_BITS, "I", "F"):
        values = np.asarray(image)
        if image.mode == "F":
            values = np.nan_to_num(values, posinf=255)
            values = values * 255 if values.min() >= 0 and values.max() <= 1 else values
            values = np.rint(np.clip(values, 0, 255))
        elif image.mode != "I" or values.max() > 255:  # some hold eight bits in mode I
            values = np.clip(values, 0, 65535) >> 8
        image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image)
            image = white
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
