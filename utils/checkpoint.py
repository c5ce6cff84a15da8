"""Files of a run: atomic writes, checkpoints with a checksum that load without executing anything, the run's lock."""

import fcntl
import hashlib
import io
import json
import os
import pickle
import pickletools
import re
import socket
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models import create_model
from models.resnet import BLOCKS
from utils import InputError, RunError, first_line

# The file of each choice of --checkpoint, in a member's folder.
CHECKPOINTS = {"last": "checkpoint.pth.tar", "best": "model_best.pth.tar", "averaged": "model_averaged.pth.tar"}
# The checkpoint of the epoch before the last, and the one of an epoch that is not finished.
PREVIOUS, PARTIAL = "checkpoint_previous.pth.tar", "checkpoint_partial.pth.tar"
# What a checkpoint of ours always holds; the authors' hold `state_dict` and little that we need besides.
REQUIRED = ("state_dict", "epoch", "model", "dataset", "width", "num_classes", "image_size", "in_channels")
KINDS = {"model": str, "dataset": str} | dict.fromkeys((*REQUIRED[4:], "epoch", "seed"), int)


# A zip archive, which a torch file is, ends with a record of 22 bytes and a comment of the length that it tells. The
# checksum is this comment: it cannot part from its file when that is renamed or copied, and every reader skips it.
ZIP_END, ZIP_END_BYTES = b"PK\x05\x06", 22
MARK = b"sha256:"
CHECKSUM_BYTES = len(MARK) + 64


# More than a checkpoint of the largest network needs: bytes that say what is in it, tuples among them, files in it.
MOST_PICKLE, MOST_TUPLES, MOST_ENTRIES = 2**21, 20_000, 20_000
MOST_JSON = 2**28


class DamagedError(InputError):
    """A file that is there and readable, but not what was written."""


def write_atomically(path: str | Path, content: bytes, previous: Path | None = None) -> None:
    """Write a file so that at any moment either its old or its new content is there, whole, on the disk.

    A temporary file in the same folder, fsync, rename, fsync of the folder.

    Args:
        path: the file.
        content: its new content.
        previous: a file of the same folder that gets the old content, once the new one is on the disk.

    Raises:
        RunError: if it cannot be written; the old content remains.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)  # `path` itself stays where it is until the rename below
            except OSError:  # a file system without hard links
                os.replace(path, previous)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(
            f"{path}: could not be written ({error.strerror}; {len(content) / 2**20:.1f} MiB are needed); what was "
            "there before is untouched: make room and give the same command again"
        ) from error


def write_json(path: str | Path, value: Any) -> None:
    """Atomically write a value as indented JSON."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def load_json(path: str | Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no JSON, nested without end, larger than any file of a run, or not a file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError("not a file")
    if path.stat().st_size > MOST_JSON:
        raise ValueError(f"larger than {MOST_JSON} bytes")
    try:
        return json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def write_array(path: str | Path, array: np.ndarray) -> None:
    """Atomically write an array as .npy."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomically(path, buffer.getvalue())


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def pack_checkpoint(checkpoint: dict[str, Any]) -> bytes:
    """The content of a checkpoint file: a dict of tensors and primitives, and a checksum.

    The same checkpoint gives the same bytes.
    """
    buffer = io.BytesIO()  # torch puts the name of a file into the archive; a buffer has none
    torch.save(checkpoint, buffer)
    with buffer.getbuffer() as archive:
        archive[-2:] = CHECKSUM_BYTES.to_bytes(2, "little")  # the length of the comment
        checksum = _checksum(archive)
    buffer.seek(0, io.SEEK_END)
    buffer.write(checksum)
    return buffer.getvalue()


def save_checkpoint(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Atomically write what `pack_checkpoint` returns.

    Raises:
        RunError: if it cannot be written.
    """
    write_atomically(path, pack_checkpoint(checkpoint))


def _checksum(archive: bytes | memoryview) -> bytes:
    return MARK + hashlib.sha256(archive).hexdigest().encode()


def _check(path: str | Path, content: bytes, ours: bool) -> None:
    """Compare a file with its checksum; the authors' files have none, and no comment either."""
    end = content.rfind(ZIP_END)
    comment = content[end + ZIP_END_BYTES - 2 :] if end >= 0 else b""
    if not ours and comment in (b"", b"\0\0"):
        return
    if content[-CHECKSUM_BYTES:] != _checksum(memoryview(content)[:-CHECKSUM_BYTES]):
        raise DamagedError(f"{path}: damaged: its bytes do not have the checksum that they were written with")


def load_checkpoint(path: str | Path, ours: bool = False) -> dict[str, Any]:
    """Read a checkpoint of ours or of the authors' release, on the CPU, without executing anything in it.

    The state_dict of the result has no `module.` prefixes (DataParallel) and no `mask` buffers (the authors' Tiny
    ResNet holds two of ones beside each layer).

    Args:
        path: the file.
        ours: whether it must have a checksum, as all files that `save_checkpoint` writes; where there is one, it is
            compared in any case.

    Raises:
        InputError: naming the file, if it is missing.
        DamagedError: naming the file, if it is damaged, not a checkpoint, or holds objects beyond tensors and
            primitives.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise InputError(f"{path}: cannot be read (not a file)")
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    _check(path, content, ours)
    archive = _clean_archive(path, content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read is an error all the same
            checkpoint = torch.load(archive, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]{1,99})", str(error))
        reason = f"it refers to {refused.group(1)}" if refused else "it is damaged or not a torch file"
        raise DamagedError(
            f"{path}: {reason}; only tensors, numbers, strings, lists and dicts are read, and nothing was executed"
        ) from error
    except Exception as error:  # a truncated archive raises nearly anything
        raise DamagedError(f"{path}: damaged or not a torch file ({first_line(error)})") from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise DamagedError(f"{path}: not a checkpoint: it must be a dict whose 'state_dict' holds tensors")
    plain = all(v.layout == torch.strided and v.device.type == "cpu" and not v.is_quantized for v in state.values())
    # A tensor may show few numbers as many, and be copied later.
    if not plain or sum(v.numel() * v.element_size() for v in state.values()) > len(content):
        raise DamagedError(f"{path}: damaged: its tensors are not plain ones, or are larger than the file")
    if not all(isinstance(name, str) for name in state):
        raise DamagedError(f"{path}: not a checkpoint: the names in its 'state_dict' must be strings")
    names = {name: name.removeprefix("module.") for name in state}
    checkpoint["state_dict"] = {short: state[name] for name, short in names.items() if not short.endswith("mask")}
    return checkpoint


def _clean_archive(path: str | Path, content: bytes) -> io.BytesIO:
    """The archive anew, once it is seen that reading it takes no more memory and time than its size tells.

    torch then reads what was looked at here, however the file is built, and the checksums of its entries were compared.
    """
    clean = io.BytesIO()
    try:
        if content.count(b"PK\x01\x02") > MOST_ENTRIES:
            raise ValueError("too many files in it")
        with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(clean, "w") as copy:
            entries = archive.infolist()
            # torch packs nothing; what is packed could hold a thousand times the size of the file.
            if any(e.compress_type for e in entries) or sum(e.file_size for e in entries) > len(content):
                raise ValueError("its entries are packed, or larger than the file")
            if len({e.filename for e in entries}) < len(entries):
                raise ValueError("a file is in it twice")
            for entry in entries:
                data = archive.read(entry)
                if entry.filename.endswith("data.pkl"):
                    _check_pickle(data)
                copy.writestr(zipfile.ZipInfo(entry.filename), data)
    except pickle.UnpicklingError as error:
        raise DamagedError(
            f"{path}: {error}; only tensors, numbers, strings, lists and dicts are read, and nothing was executed"
        ) from error
    except Exception as error:  # a damaged archive raises nearly anything
        raise DamagedError(
            f"{path}: it is damaged or not a torch file, as torch writes since 1.6 ({first_line(error)}); only "
            "tensors, numbers, strings, lists and dicts are read, and nothing was executed; a file of an older torch, "
            "if you trust it, can be loaded and saved again"
        ) from error
    clean.seek(0)
    return clean


def _check_pickle(data: bytes) -> None:
    """Refuse what torch would read all the same: numbers that take memory, nests that overflow the stack."""
    if len(data) > MOST_PICKLE:
        raise ValueError("the list of what is in it is too long")
    tuples = 0
    for operation, argument, _ in pickletools.genops(data):
        tuples += operation.name.startswith("TUPLE")
        if operation.name == "GLOBAL" and argument.split() == ["builtins", "bytearray"]:
            raise pickle.UnpicklingError("it refers to builtins.bytearray")  # takes memory for a number
    if tuples > MOST_TUPLES:
        raise ValueError("too many tuples in it")


def find_checkpoints(paths: list[Path], which: str) -> list[Path]:
    """The checkpoint files that `--resume` means: of a run folder all members', of a member folder its own.

    Args:
        paths: run folders, member folders or checkpoint files.
        which: best | last | averaged, for folders.

    Raises:
        InputError: naming the path that is none of these, or the member whose checkpoint is missing.
    """
    name, found = CHECKPOINTS[which], []
    for path in paths:
        if path.is_file():
            found.append(path)
            continue
        if not path.is_dir():
            raise InputError(f"--resume {path}: no such file or folder")
        folders = [path]
        if (path / "args.json").is_file():
            folders = [path / f"seed_{seed}" for seed in read_settings(path)["seed"]]
        for folder in folders:
            if not (folder / name).is_file():
                raise InputError(
                    f"--resume {path}: {folder / name} is missing; give a run of main.py or a checkpoint"
                    + (", of a run with --average_from" if which == "averaged" else "")
                )
            found.append(folder / name)
    return found


def run_of(path: Path) -> Path | None:
    """The run folder that a path of --resume is or lies in."""
    return next(
        (folder for folder in (path, path.parent, path.parent.parent) if os.path.isfile(folder / "args.json")), None
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """The args.json of a run.

    Raises:
        InputError: if it is not readable or not what main.py writes.
    """
    try:
        settings = load_json(folder / "args.json")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'args.json'}: cannot be read ({error})") from error
    seeds = settings.get("seed") if isinstance(settings, dict) else None
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int and 0 <= s < 2**32 for s in seeds):
        raise InputError(f"{folder / 'args.json'}: not the settings of a run: it holds no list of seeds")
    return settings


def load_model(path: str | Path, **told: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network of a checkpoint and fill it, on the CPU, in eval mode.

    Args:
        path: a checkpoint file, of ours or of the authors' release.
        told: what the caller knows of `model`, `dataset`, `width`, `num_classes`, `image_size` and `in_channels`; None
            means: not known. A checkpoint of ours holds them all; for the authors', which lacks them, all but
            `dataset` are read off the tensors.

    Returns:
        The network and the checkpoint, in which the entries of `REQUIRED` stand.

    Raises:
        InputError: naming the file and what contradicts or does not fit.
    """
    checkpoint = load_checkpoint(path)
    if not all(name in checkpoint for name in REQUIRED):
        try:
            found = _read_off(checkpoint["state_dict"])
        except (IndexError, TypeError, ZeroDivisionError):  # tensors of other dimensions
            found = None
        if found is None:
            raise InputError(f"{path}: its tensors have the names of no network known here")
        checkpoint = {"epoch": None, "dataset": told.get("dataset"), **checkpoint, **found}
    for name, kind in KINDS.items():
        if type(checkpoint.get(name)) not in (kind, type(None)):
            raise InputError(
                f"{path}: describes a network that cannot be built (its {name} is a {type(checkpoint[name]).__name__})"
            )
    for name, value in told.items():
        if value is not None and checkpoint[name] != value:
            raise InputError(f"{path}: --{name} {value} contradicts the checkpoint, which has {checkpoint[name]}")
    arguments = ("model", "num_classes", "width", "image_size", "in_channels")
    try:
        with torch.device("meta"):  # takes no memory: the file may name any size
            model = create_model(*(checkpoint[name] for name in arguments))
    except (ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise InputError(f"{path}: describes a network that cannot be built ({first_line(error)})") from error
    _check_state(model, checkpoint["state_dict"], path)
    model = create_model(*(checkpoint[name] for name in arguments))
    fill_model(model, checkpoint["state_dict"], path)
    return model.eval(), checkpoint


def fill_model(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load a state_dict whose names and shapes must be the model's own.

    Raises:
        InputError: naming the file and the first tensor that does not fit.
    """
    _check_state(model, state, path)
    model.load_state_dict(state)


def _check_state(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in state:
            raise InputError(f"{path}: not of this network: it lacks {name}")
        if state[name].shape != tensor.shape:
            raise InputError(
                f"{path}: not of this network: {name} is {list(state[name].shape)}, {list(tensor.shape)} is needed"
            )
        if state[name].is_floating_point() != tensor.is_floating_point() or state[name].is_complex():
            raise InputError(f"{path}: not of this network: {name} is {state[name].dtype}, not {tensor.dtype}")
    for name in state:
        if name not in own:
            raise InputError(f"{path}: not of this network, which has no {name}")


def _read_off(state: dict[str, Tensor]) -> dict[str, Any] | None:
    """Name, width, classes, channels and image size of the network that a state_dict of the authors' belongs to."""

    def blocks(stage: str) -> int:
        return len({name.split(".")[0] for name in (n.removeprefix(stage) for n in state if n.startswith(stage))})

    if "block1.layer.0.conv1.weight" in state and "fc.weight" in state:
        stem, last = state["conv1.weight"], state["fc.weight"]
        widen_factor = len(state["block1.layer.0.conv1.weight"]) // len(stem)
        model = f"wrn-{6 * blocks('block1.layer.') + 4}-{widen_factor}"
        width, image_size = 4 * len(stem), 32
    else:
        if "layer1.0.conv1.weight" in state and "linear.weight" in state:
            stem, last, image_size = state["conv1.weight"], state["linear.weight"], 32
            depths = tuple(blocks(f"layer{stage}.") for stage in (1, 2, 3, 4))
            bottleneck = "layer1.0.conv3.weight" in state
        elif "conv1.0.weight" in state and "fc.weight" in state:
            stem, last, image_size = state["conv1.0.weight"], state["fc.weight"], 64
            depths = tuple(blocks(f"conv{stage}_x.") for stage in (2, 3, 4, 5))
            bottleneck = "conv2_x.0.residual_function.6.weight" in state
        else:
            return None
        model = next((f"resnet{n}" for n, d in BLOCKS.items() if d == depths and (n >= 50) == bottleneck), None)
        width = len(stem)
    return {
        "model": model,
        "width": width,
        "num_classes": len(last),
        "in_channels": stem.shape[1],
        "image_size": image_size,
    }


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder, which is made if need be, so that no second run works in it.

    The file `lock` is locked by the operating system, which lets go of it when the process ends, however it ends. The
    host, the process and the file's own number are written in it: for the message, and for file systems whose locks do
    not reach other machines. A lock that a dead process of this host left is taken over, as is one that came with a
    copy of the folder, where the file has another number.

    Raises:
        InputError: if the folder cannot be made, if another process holds it, or if one of another host did not let
            go of it.
    """
    path = folder / "lock"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", errors="replace")  # noqa: SIM115, closed by the `with` below
        except OSError as error:
            raise InputError(f"--save_path {folder}: cannot be made ({error.strerror}); name another folder") from error
        held = reaches = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = False
        except BlockingIOError:
            pass
        except OSError:
            held = reaches = False  # a file system without locks: what is written in the file must do
        number = os.fstat(file.fileno()).st_ino
        try:
            same = path.stat().st_ino == number
        except FileNotFoundError:
            same = False
        if held or same:
            break
        file.close()  # its holder removed it between our two calls
    with file:
        file.seek(0)
        host, process, written = (file.read().split() + ["?"] * 3)[:3]
        me = socket.gethostname()
        refusal = f"--save_path {folder}: process {process} on host {host} "
        if held or (not reaches and host == me and _alive(process)):
            raise InputError(refusal + "is training in it; wait for its end, or name another folder")
        if host not in ("?", me) and written == str(number):
            raise InputError(refusal + f"began a run in it and did not end it; if it is dead, remove {path}")
        try:
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"{me} {os.getpid()} {number}\n".encode())
        except OSError as error:
            raise RunError(f"{path}: could not be written ({error.strerror}); make room") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True  # it is another user's
    except (OSError, ValueError):
        return False
    return True
