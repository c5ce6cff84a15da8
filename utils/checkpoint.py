"""Checkpoints: dicts of tensors and primitives with a checksum, which load without executing anything."""

import hashlib
import io
import pickle
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import create_model
from models.resnet import BLOCKS
from utils import InputError, first_line
from utils.files import read_bytes, refusing, write_atomically

# The arguments of `create_model` that a checkpoint of ours holds, in their order, and all that it always holds. The
# authors' hold `state_dict` and little else of use here.
NETWORK = ("model", "num_classes", "width", "image_size", "in_channels")
REQUIRED = ("state_dict", "epoch", "dataset", *NETWORK)
KINDS = {"model": str, "dataset": str} | dict.fromkeys((*NETWORK[1:], "epoch", "seed"), int)

# A torch file is a zip archive, which ends with a record of 22 bytes and a comment whose length that record states. The
# checksum is this comment: it stays with its file when that is renamed or copied, and every reader skips it.
ZIP_END, ZIP_END_BYTES = b"PK\x05\x06", 22
MARK = b"sha256:"
CHECKSUM_BYTES = len(MARK) + 64

# Upper limits, above what a checkpoint of the largest network needs: bytes of its index, tuples in that, files in it.
MAX_PICKLE, MAX_TUPLES, MAX_ENTRIES = 2**21, 20_000, 20_000


class DamagedError(InputError):
    """A file that can be read, but does not hold what was written."""


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
    """Atomically write a checkpoint as `pack_checkpoint` forms it.

    Raises:
        RunError: if it cannot be written.
    """
    write_atomically(path, pack_checkpoint(checkpoint))


def _checksum(archive: bytes | memoryview) -> bytes:
    return MARK + hashlib.sha256(archive).hexdigest().encode()


def _check(path: str | Path, content: bytes, ours: bool) -> None:
    """Compare a file with its checksum; the authors' files have neither a checksum nor a comment."""
    end = content.rfind(ZIP_END)
    comment = content[end + ZIP_END_BYTES - 2 :] if end >= 0 else b""
    if not ours and comment in (b"", b"\0\0"):
        return
    if content[-CHECKSUM_BYTES:] != _checksum(memoryview(content)[:-CHECKSUM_BYTES]):
        raise DamagedError(f"{path}: damaged: its bytes do not match the checksum that they were written with")


def load_checkpoint(path: str | Path, ours: bool = False) -> dict[str, Any]:
    """Read a checkpoint of ours or of the authors' release, on the CPU, without executing anything in it.

    The state_dict of the result has no `module.` prefixes (DataParallel) and no `mask` buffers (the authors' Tiny
    ResNet holds two of ones beside each layer).

    Args:
        path: the file.
        ours: whether it must have a checksum, as every file that `save_checkpoint` writes; a checksum that is there is
            always compared.

    Raises:
        InputError: naming the file, if it is missing.
        DamagedError: naming the file, if it is damaged, not a checkpoint, or holds objects other than tensors and
            primitives.
    """
    content = read_bytes(Path(path), limit=None)
    _check(path, content, ours)
    try:
        archive = _clean_archive(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read raises in any case
            checkpoint = torch.load(archive, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises nearly anything
        refused = re.search(r"GLOBAL ([\w.]{1,99})", str(error))
        # Left out is torch's own first line, which advises to load the file without this protection.
        detail = "" if isinstance(error, pickle.UnpicklingError) else f" ({first_line(error)})"
        reason = f"it refers to {refused[1]}" if refused else f"it is damaged, or not of torch 1.6 or later{detail}"
        read = "only tensors, numbers, strings, lists and dicts are read, and nothing was executed"
        raise DamagedError(f"{path}: {reason}; {read}") from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    named = isinstance(state, dict) and all(isinstance(n, str) and isinstance(v, Tensor) for n, v in state.items())
    if not named or not state:
        raise DamagedError(f"{path}: not a checkpoint: expected a dict whose 'state_dict' holds named tensors")
    dense = all(v.layout == torch.strided and v.device.type == "cpu" and not v.is_quantized for v in state.values())
    # A tensor may show few numbers as many, which a later copy would write out.
    if not dense or sum(v.numel() * v.element_size() for v in state.values()) > len(content):
        raise DamagedError(f"{path}: damaged: its tensors are not dense ones, or are larger than the file")
    names = {name: name.removeprefix("module.") for name in state}
    checkpoint["state_dict"] = {short: state[name] for name, short in names.items() if not short.endswith("mask")}
    return checkpoint


def _clean_archive(content: bytes) -> io.BytesIO:
    """Rebuild the archive, after checking that reading it takes no more memory and time than its size suggests.

    torch then reads exactly what was checked here, however the file is built, and its entries have the right checksums.
    """
    clean = io.BytesIO()
    if content.count(b"PK\x01\x02") > MAX_ENTRIES:
        raise ValueError("too many files in it")
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(clean, "w") as copy:
        entries = archive.infolist()
        # torch compresses nothing; what is compressed could hold a thousand times the size of the file.
        if any(e.compress_type for e in entries) or sum(e.file_size for e in entries) > len(content):
            raise ValueError("its entries are compressed, or larger than the file")
        if len({e.filename for e in entries}) < len(entries):
            raise ValueError("it holds a file twice")
        for entry in entries:
            data = archive.read(entry)
            if entry.filename.endswith("data.pkl"):
                _check_pickle(data)
            copy.writestr(zipfile.ZipInfo(entry.filename), data)
    clean.seek(0)
    return clean


def _check_pickle(data: bytes) -> None:
    """Refuse what torch would still read: numbers that reserve memory, nesting that overflows the stack."""
    if len(data) > MAX_PICKLE:
        raise ValueError("its index is too long")
    tuples = 0
    for operation, argument, _ in pickletools.genops(data):
        tuples += operation.name.startswith("TUPLE")
        if operation.name == "GLOBAL" and argument.split() == ["builtins", "bytearray"]:
            raise ValueError("GLOBAL builtins.bytearray")  # a number reserves its memory
    if tuples > MAX_TUPLES:
        raise ValueError("too many tuples in it")


def load_model(path: str | Path, **known: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network of a checkpoint and fill it, on the CPU, in eval mode.

    Args:
        path: a checkpoint file, of ours or of the authors' release.
        known: what the caller knows of `model`, `dataset`, `width`, `num_classes`, `image_size` and `in_channels`; None
            stands for unknown. A checkpoint of ours holds them all; for the authors', which lack them, all but
            `dataset` are inferred from the tensors.

    Returns:
        The network, and the checkpoint with all entries of `REQUIRED`.

    Raises:
        InputError: naming the file and what contradicts or does not fit.
    """
    checkpoint = load_checkpoint(path)
    if not all(name in checkpoint for name in REQUIRED):
        try:
            found = _infer_network(checkpoint["state_dict"])
        except (LookupError, TypeError, ZeroDivisionError) as error:  # other tensors, or of other dimensions
            raise InputError(f"{path}: the names of its tensors are those of no network known here") from error
        checkpoint = {"epoch": None, "dataset": known.get("dataset"), **checkpoint, **found}
    network = [checkpoint[name] for name in NETWORK]
    with refusing(f"{path}: describes a network that cannot be built"):
        for name, kind in KINDS.items():
            if type(checkpoint.get(name)) not in (kind, type(None)):
                raise ValueError(f"its {name} is a {type(checkpoint[name]).__name__}")
        with torch.device("meta"):  # takes no memory, whatever size the file claims
            model = create_model(*network)
    for name, value in known.items():
        if value is not None and checkpoint[name] != value:
            raise InputError(f"{path}: --{name} {value} contradicts the checkpoint, which has {checkpoint[name]}")
    _check_state(model, checkpoint["state_dict"], path)
    model = create_model(*network)
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
    own, other = model.state_dict(), f"{path}: not of this network"
    for name, tensor in own.items():
        if name not in state:
            raise InputError(f"{other}: it lacks {name}")
        found = state[name]
        if found.shape != tensor.shape:
            raise InputError(f"{other}: expected {name} of shape {list(tensor.shape)}, got {list(found.shape)}")
        if found.is_floating_point() != tensor.is_floating_point() or found.is_complex():
            raise InputError(f"{other}: expected {name} of {tensor.dtype}, got {found.dtype}")
    for name in state:
        if name not in own:
            raise InputError(f"{other}, which has no {name}")


def _infer_network(state: dict[str, Tensor]) -> dict[str, Any]:
    """The entries of `NETWORK` for a state_dict of the authors'; a LookupError if it is of another network."""

    def blocks(stage: str) -> int:
        return len({name.removeprefix(stage).split(".")[0] for name in state if name.startswith(stage)})

    if "block1.layer.0.conv1.weight" in state:
        stem, last, size = state["conv1.weight"], state["fc.weight"], 32
        widen_factor = len(state["block1.layer.0.conv1.weight"]) // len(stem)
        model, width = f"wrn-{6 * blocks('block1.layer.') + 4}-{widen_factor}", 4 * len(stem)
    else:
        if "layer1.0.conv1.weight" in state:
            stem, last, size = state["conv1.weight"], state["linear.weight"], 32
            depths = tuple(blocks(f"layer{stage}.") for stage in (1, 2, 3, 4))
            bottleneck = "layer1.0.conv3.weight" in state
        else:
            stem, last, size = state["conv1.0.weight"], state["fc.weight"], 64
            depths = tuple(blocks(f"conv{stage}_x.") for stage in (2, 3, 4, 5))
            bottleneck = "conv2_x.0.residual_function.6.weight" in state
        model = next((f"resnet{n}" for n, d in BLOCKS.items() if d == depths and (n >= 50) == bottleneck), None)
        width = len(stem)
    return dict(zip(NETWORK, (model, len(last), width, size, stem.shape[1]), strict=True))
