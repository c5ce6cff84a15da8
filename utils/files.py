"""Files: atomic writes, and reads that never execute anything or take more memory than a file can hold."""

import errno
import hashlib
import io
import json
import math
import os
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from utils import InputError, RunError, again, first_line

try:
    import fcntl
except ImportError:  # Windows: what only measures runs there
    fcntl = None

# Upper limits, well above what the published data sets and our own files need.
MAX_JSON, MAX_FILE, MAX_TEXT = 2**28, 2**28, 2**24
# What systems answer that cannot sync a folder: FUSE, network and Windows file systems, folders without read access.
NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}
# What often lies where a file should be, by its first bytes, and the way out.
NOT_DOWNLOADED = {
    rb"version https://git-lfs": "a git-lfs pointer, not the file itself; fetch that by git lfs pull",
    rb"\s*<(?i:!doctype|html|head|\?xml|!--)": "a web page; download the file itself, by its direct link",
}
# What systems and tools leave behind: hidden files, ._* and .DS_Store of macOS, @eaDir and #recycle of file servers.
# Not every name that begins so: a class may be the sign # or $.
JUNK = re.compile(
    r"\..*|@(eaDir|tmp|Recycle|Recently-Snapshot)|#(recycle|snapshot)|\$RECYCLE\.BIN"
    r"|__MACOSX|__pycache__|Thumbs\.db|desktop\.ini|lost\+found|System Volume Information",
    re.IGNORECASE,
)
OTHERWISE = (AttributeError, LookupError, TypeError, ValueError)  # of who reads a JSON file that is built otherwise
NOT_FINITE = "not_finite"  # the key in our JSON files under which their infinities and nans are named


@contextmanager
def open_atomically(path: str | Path, size: int, previous: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file for writing so that at any moment its old or its new content is on the disk, whole.

    Writes a temporary file in the same folder; fsync, rename and fsync of the folder follow when the block ends. Of
    several processes that write the same file each writes its own, and the last one's content stays.

    Args:
        path: the file.
        size: bytes that its content takes, for the error line.
        previous: a file in the same folder that receives the old content once the new one is on the disk.

    Raises:
        RunError: if it cannot be written; the old content remains.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        file = _open_alone(temporary)
        temporary = Path(file.name)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:  # Windows renames no open file
                file.close()
            if previous and path.exists():
                previous.unlink(missing_ok=True)
                try:
                    os.link(path, previous)  # `path` itself stays in place until the rename below
                except OSError:  # a file system without hard links
                    os.replace(path, previous)
            os.replace(temporary, path)  # before the file is closed, which gives its lock back
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        problem = f"{path}: could not be written ({error.strerror}; {size / 2**20:.1f} MiB are needed)"
        way_out = f"the previous content is untouched: free some space and {again()}"
        raise RunError(f"{problem}; {way_out}") from error


def _open_alone(path: Path) -> BinaryIO:
    """Open a file for writing, or, while another process writes that, one of another name; empty in any case."""
    file = open(path, "wb", opener=lambda name, flags: os.open(name, flags & ~os.O_TRUNC, 0o666))  # noqa: SIM115
    try:
        if fcntl is not None:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                raise BlockingIOError  # the other one has just renamed it
    except (BlockingIOError, FileNotFoundError):
        file.close()
        return open(path.with_name(f"{path.name}.{os.getpid()}.tmp"), "wb")
    except OSError:
        pass  # a file system without locks
    file.truncate(0)
    return file


def sync_folder(path: Path) -> None:
    """Make a rename survive a power cut, where the file system can: the content is on the disk already."""
    try:
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise


def write_atomically(path: str | Path, content: bytes, previous: Path | None = None) -> None:
    """Write a file as `open_atomically` does."""
    with open_atomically(path, len(content), previous) as file:
        file.write(content)


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    """Atomically write a value as `json_text`; with indent None on one line."""
    write_atomically(path, (json_text(value, indent) + "\n").encode())


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON, which has no infinity and no nan.

    They become null, and `not_finite` of the dict says what each was, by its place as a JSON pointer (RFC 6901):
    {"result": {"fisher": null}, "not_finite": {"/result/fisher": "inf"}}. `parse_json` restores them.

    Raises:
        ValueError: for a number that is not finite in anything but a dict.
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        if not isinstance(value, dict):
            raise
    found: dict[str, str] = {}
    return json.dumps(_with_nulls(value, "", found) | {NOT_FINITE: found}, indent=indent, allow_nan=False)


def _with_nulls(value: Any, place: str, found: dict[str, str]) -> Any:
    """The value with None for numbers that are not finite, which are added to `found` by their place."""
    if isinstance(value, float) and not math.isfinite(value):
        found[place] = str(float(value))
        return None
    if isinstance(value, dict):
        names = {key: str(key).replace("~", "~0").replace("/", "~1") for key in value}
        return {key: _with_nulls(item, f"{place}/{names[key]}", found) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(item, f"{place}/{i}", found) for i, item in enumerate(value)]
    return value


def parse_json(text: str) -> Any:
    """The value of a text of `json_text`, or of any JSON.

    Raises:
        ValueError: if it is not JSON, is nested too deeply, or names numbers as not finite that are not there.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(content, dict) or NOT_FINITE not in content:
        return content
    words = content.pop(NOT_FINITE)
    try:
        for place, word in words.items():
            *keys, last = (key.replace("~1", "/").replace("~0", "~") for key in place.split("/")[1:])
            target = content
            for key in keys:
                target = target[int(key) if isinstance(target, list) else key]
            last = int(last) if isinstance(target, list) else last
            if target[last] is not None or word not in ("inf", "-inf", "nan"):
                raise ValueError
            target[last] = float(word)
    except OTHERWISE:
        raise ValueError(f"its {NOT_FINITE} does not fit its numbers") from None
    return content


def write_array(path: str | Path, array: np.ndarray) -> None:
    """Atomically write an array as .npy."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomically(path, buffer.getvalue())


def load_json(path: str | Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: if it cannot be read.
        ValueError: as `parse_json`, or if it is larger than any file of a run, or is not a file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError("not a file")
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"larger than {MAX_JSON} bytes")
    return parse_json(path.read_text("utf-8"))


def read_entry(path: Path, *keys: str | int) -> Any:
    """What a JSON file holds at these keys; None where it is missing, damaged or holds nothing there."""
    try:
        content = load_json(path)
        for key in keys:
            content = content[key]
        return content
    except (OSError, ValueError, LookupError, TypeError):
        return None


def read_json(path: str | Path, remedy: str) -> dict[str, Any]:
    """A JSON file that holds a dict.

    Raises:
        InputError: naming the file and the remedy.
    """
    with refusing(f"{path}: cannot be read", remedy):
        content = load_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a result file; {remedy}")
    return content


def load_array(path: Path, flag: str = "") -> np.ndarray:
    """A .npy file as a read-only memory map, so that its header cannot promise more than the file holds.

    Raises:
        InputError: naming the file, after `flag`.
    """
    check_file(path, flag=flag)
    with refusing(f"{flag}{path}: not a readable .npy file"), warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        array = np.lib.format.open_memmap(path, mode="r")
        if array.offset + array.nbytes != path.stat().st_size:
            raise ValueError("it is longer than its header says")
    return array


def array_of(content: bytes) -> np.ndarray:
    """The array in the content of a .npy file that numpy wrote; a header cannot make it larger than the content.

    Raises:
        ValueError: for anything else.
    """
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not version 1.0 of the .npy format")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    array = np.frombuffer(bytearray(content[file.tell() :]), dtype=dtype)  # writable, as torch wants it
    return array.reshape(shape, order="F" if fortran_order else "C")


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


PINNED = re.compile(r"(.+)@([0-9a-f]{16})", re.DOTALL)


def pinned(path: Path) -> str:
    """A file by its absolute path and its content: PATH@DIGEST, the beginning of its SHA-256.

    Raises:
        InputError: if it cannot be read.
    """
    return f"{path.absolute()}@{hashlib.sha256(read_bytes(path, limit=None)).hexdigest()[:16]}"


def unpinned(name: str) -> Path:
    """The file of such a name, which must still hold what it held.

    Raises:
        InputError: if it cannot be read, or has changed.
    """
    match = PINNED.fullmatch(name)
    path = Path(match[1] if match else name)
    if match and pinned(path).rpartition("@")[2] != match[2]:
        raise InputError(f"{path}: has changed since the run began with it; restore it, or begin another run")
    return path


def without_folder(value: Any) -> Any:
    """Such a name without the folder, in which the same file may have moved; anything else as it is."""
    return os.path.basename(value) if isinstance(value, str) and PINNED.fullmatch(value) else value


@contextmanager
def refusing(problem: str, remedy: str = "", kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Turn errors into an InputError "<problem> (<reason>); <remedy>": a damaged file raises nearly anything."""
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{problem} ({reason})" + (f"; {remedy}" if remedy else "")) from error


@contextmanager
def hold(path: Path) -> Iterator[bool]:
    """Hold a folder, or a file that is made if need be, waiting for who holds it.

    Yields:
        False where the system or the file system has no locks.
    """
    with ExitStack() as stack:
        held = fcntl is not None
        try:
            if path.is_dir():
                number = os.open(path, os.O_RDONLY)
                stack.callback(os.close, number)
            else:
                number = stack.enter_context(open(path, "w")).fileno()
            if held:
                fcntl.flock(number, fcntl.LOCK_EX)
        except OSError:
            held = False
        yield held


def broken_link(path: Path) -> str | None:
    """What is wrong where the path, or a folder above it, is a link whose target is not there; else None."""
    for place in (path, *path.parents):
        if os.path.islink(place) and not os.path.exists(place):
            return f"{place} is a link to {os.readlink(place)}, which does not exist"
    return None


def visible(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without hidden files and other junk.

    Raises:
        InputError: naming the folder, if it cannot be read.
    """
    with refusing(f"{folder}: cannot be read"):
        return sorted(path for path in folder.iterdir() if not JUNK.fullmatch(path.name))


def check_file(path: Path, limit: int | None = None, flag: str = "") -> None:
    """Refuse anything but an ordinary file (a pipe or a device has no end), or one of more than `limit` bytes.

    Raises:
        InputError: naming the file, after `flag`.
    """
    with refusing(f"{flag}{path}: cannot be read"):
        ordinary, size = path.is_file(), path.stat().st_size
        if not ordinary:
            raise ValueError("not a file")
    if limit is not None and size > limit:
        raise InputError(f"{flag}{path}: expected at most {limit} bytes, got {size}")


def read_bytes(path: Path, limit: int | None = MAX_FILE) -> bytes:
    """The content of an ordinary file of at most `limit` bytes.

    Raises:
        InputError: naming the file.
    """
    check_file(path, limit)
    with refusing(f"{path}: cannot be read"):
        return path.read_bytes()


def read_text(path: Path) -> str:
    """A text in UTF-8, without the mark that some editors put before it.

    Raises:
        InputError: naming the file.
    """
    with refusing(f"{path}: not a text in UTF-8"):
        return read_bytes(path, MAX_TEXT).decode("utf-8-sig")


_NDARRAY = object()  # stands for numpy.ndarray: the class itself, called, could reserve any amount of memory


class ArrayUnpickler(pickle._Unpickler):
    """Reads pickles of arrays, bytes, strings, numbers, lists, tuples and dicts; refuses a reference to anything else.

    Built on pickle's Python implementation: the one in C reserves memory for every number that a file claims.
    """

    def find_class(self, module: str, name: str) -> object:
        """The stand-in for a reference that numpy writes."""
        admitted = {
            ("multiarray", "_reconstruct"): _new_array,
            ("numpy", "ndarray"): _NDARRAY,
            ("numpy", "dtype"): _new_dtype,
            ("multiarray", "scalar"): _number,
            ("numeric", "_frombuffer"): _array_from_bytes,
            ("_codecs", "encode"): _latin1_bytes,
        }
        # numpy's internals are in numpy.core up to version 1 and in numpy._core from 2 on.
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
        if not all(isinstance(key, str | bytes) for key in items[::2]):  # nested tuples as keys overflow the stack
            raise pickle.UnpicklingError("it holds a dict whose keys are not strings")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.metastack.append(self.stack)
        self.stack = [key, value]
        self._set_items()

    # The operations that data need: none that makes objects in other ways, and no sets.
    _admitted = (
        "PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT STRING "
        "BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
        "BYTEARRAY8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT GET BINGET "
        "LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE"
    )
    _codes = (getattr(pickle, name)[0] for name in _admitted.split())
    dispatch: ClassVar = {code: pickle._Unpickler.dispatch[code] for code in _codes}
    dispatch |= {pickle.BUILD[0]: _build, pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items}


def _new_array(array_type: object, shape: tuple, _dtype: object) -> np.ndarray:
    # numpy always writes an empty array here and fills it afterwards; another shape would reserve memory at will.
    if array_type is not _NDARRAY or tuple(shape) != (0,):
        raise pickle.UnpicklingError("it holds an array in a form that numpy does not write")
    return np.ndarray((0,), np.uint8)


def _new_dtype(code: str, *flags: object) -> np.dtype:
    if not isinstance(code, str) or not re.fullmatch(r"[|<>]?[biuf][1248]", code):
        raise pickle.UnpicklingError(f"it holds an array of objects or strings ({str(code)[:20]}), not of numbers")
    return np.dtype(code, *flags)


def _number(dtype: np.dtype, content: bytes) -> int | float | bool:
    return np.frombuffer(content, dtype, count=1).item()


def _array_from_bytes(buffer: bytes, dtype: np.dtype, shape: tuple, _order: str) -> np.ndarray:
    return np.frombuffer(buffer, dtype=dtype).reshape(shape)


def _latin1_bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds bytes written as {encoding}, which pickle does not do")
    return text.encode("latin1")
