"""Checkpoints, ours and other people's, which load without executing anything.

Ours are dicts of tensors and primitives with a checksum. Of others the weights are found under whatever key, their
names are freed of what wrapped the network, and the network is inferred; a file that is something else is named.
"""

import hashlib
import io
import json
import math
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models import MODELS, create_model, full_name, is_external
from models.resnet import BLOCKS
from models.vit import PATCHES
from utils import InputError, first_line
from utils.files import NOT_DOWNLOADED, PINNED, read_bytes, refusing, without_folder, write_atomically
from utils.start import load_state

# The arguments of `create_model` that a checkpoint of ours holds, in their order, and all that it always holds. Others
# hold weights and little else of use here.
NETWORK = ("model", "num_classes", "width", "image_size", "in_channels")
REQUIRED = ("state_dict", "epoch", "dataset", *NETWORK)
KINDS = {"model": str, "dataset": str} | dict.fromkeys((*NETWORK[1:], "epoch", "seed"), int)

# A torch file is a zip archive, which ends with a record of 22 bytes and a comment whose length that record states. The
# checksum is this comment: it stays with its file when that is renamed or copied, and every reader skips it.
ZIP_END, ZIP_END_BYTES = b"PK\x05\x06", 22
MARK = b"sha256:"
CHECKSUM_BYTES = len(MARK) + 64

# Upper limits, above what a checkpoint of the largest network needs: bytes of its index, tuples in that, files in it,
# and wrappers around its weights or names.
MAX_PICKLE, MAX_TUPLES, MAX_ENTRIES, MAX_DEPTH = 2**21, 20_000, 20_000, 8

# The keys under which others save weights; of several in one file the first one here is read.
STATE_KEYS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "params", "ema")
# Parts of names: what torch puts in by wrapping a network or a layer of it; attributes that hold a network beside other
# modules; and ends of names that are no part of any network here (pruning, counters of operations, averages).
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
HOLDERS = ("model", "net", "network", "backbone", "encoder")
NO_WEIGHTS = ("mask", "total_ops", "total_params", "n_averaged")

ENCODE = b"c_codecs\nencode\n"  # how a pickle refers to that function

SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.uint8,
}

UNPACK = "unpack it and give the checkpoint in it"
STATE_ALONE = "in the code that made it, save the weights alone by torch.save(model.state_dict(), FILE)"
WHOLE_MODEL = f"a whole model, whose classes are code, and nothing was executed; {STATE_ALONE}"
OLD_TORCH = (
    "a checkpoint of an older torch (before 1.6); save it anew, with any newer torch, by "
    "torch.save(torch.load(OLD, map_location='cpu', weights_only=True), NEW)"
)
OLD_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # a pickled number, within its first bytes
# What a file is by its first bytes, and the way out.
OTHER_FILES = NOT_DOWNLOADED | {
    rb"\x89HDF": f"an HDF5 file, as Keras and TensorFlow write it; {STATE_ALONE}",
    rb"....TFL3": f"a model of TensorFlow Lite; {STATE_ALONE}",
    rb"\x08\x01\x12": f"what looks like a model of TensorFlow; {STATE_ALONE}",
    rb"\x08[\x02-\x20][\x12\x1a\x22\x28\x32\x3a\x42\x4a]": f"what looks like an ONNX model; {STATE_ALONE}",
    rb"GGUF": f"a GGUF file; {STATE_ALONE}",
    rb"\x93NUMPY": f"an array of numpy; {STATE_ALONE}",
    rb"(?:storages|tensors|pickle|sys_info)\0.{240}": OLD_TORCH,
    rb".{257}ustar": f"a tar archive; {UNPACK}",
    rb"\x1f\x8b": f"a file packed by gzip; {UNPACK}",
    rb"BZh": f"a file packed by bzip2; {UNPACK}",
    rb"\xfd7zXZ": f"a file packed by xz; {UNPACK}",
    rb"\x28\xb5\x2f\xfd": f"a file packed by zstd; {UNPACK}",
    rb"7z\xbc\xaf": f"a 7-Zip archive; {UNPACK}",
    rb"Rar!": f"a RAR archive; {UNPACK}",
}


class DamagedError(InputError):
    """A file that can be read, but does not hold what was written."""


class _RefusedError(ValueError):
    """A reason that is one whole part of an error line."""


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
    """Compare a file with its checksum; other people's files have neither a checksum nor a comment."""
    end = content.rfind(ZIP_END)
    comment = content[end + ZIP_END_BYTES - 2 :] if end >= 0 else b""
    if not ours and comment in (b"", b"\0\0"):
        return
    if content[-CHECKSUM_BYTES:] != _checksum(memoryview(content)[:-CHECKSUM_BYTES]):
        raise DamagedError(f"{path}: damaged: its bytes do not match the checksum that they were written with")


def load_checkpoint(path: str | Path, ours: bool = False, names: Container[str] = ()) -> dict[str, Any]:
    """Read a checkpoint of ours or of others, on the CPU, without executing anything in it.

    The result holds the weights under `state_dict`, wherever they were, and what stood beside them. Their names are
    freed of what wrapped the network (DataParallel, torch.compile, an averaged model, the attribute of a larger module,
    in any order), and entries that are no weights are left out: the authors' Tiny ResNet holds `mask` buffers of ones.
    `unread` lists what else looked like weights.

    Args:
        path: the file, of torch.save or in the safetensors format.
        ours: whether it must have a checksum, as every file that `save_checkpoint` writes; a checksum that is there is
            always compared.
        names: those of the network that the weights are for, where that is known: they are not freed of anything more
            once some are among these. Checkpoints of ours have the network's own names in any case.

    Raises:
        InputError: naming the file, if it is missing.
        DamagedError: naming the file, if it is damaged, something other than a checkpoint, or holds objects other than
            tensors, primitives, and numbers of numpy.
    """
    content = read_bytes(Path(path), limit=None)
    read = "only tensors, numbers, strings, lists and dicts are read, and nothing was executed"
    try:
        if _is_safetensors(content):
            checkpoint = _read_safetensors(content)
        elif not content.startswith(b"PK"):
            raise _RefusedError(f"expected a checkpoint of torch, got {_other_file(content)}")
        else:
            checkpoint = _read_archive(path, content, ours)
        checkpoint = _unwrapped(checkpoint, names)
    except DamagedError:
        raise
    except _RefusedError as error:
        raise DamagedError(f"{path}: {'damaged: ' * ours}{error}") from error
    except pickle.UnpicklingError as error:
        # Left out is torch's own first line, which advises to load the file without this protection.
        refused = re.search(r"GLOBAL ([\w.]{1,99})", str(error))
        reason = f"it refers to {refused[1]}" if refused else "it holds more than a checkpoint needs"
        if "Unsupported operand" in str(error):
            reason = "it was saved with another pickle_protocol than torch's own, 2"
        way_out = "if you trust it, load it where it was made and save its state_dict alone"
        raise DamagedError(f"{path}: {reason}; {read}; {way_out}") from error
    except Exception as error:  # a damaged archive raises nearly anything
        raise DamagedError(f"{path}: it is damaged ({first_line(error)[:200]}); {read}") from error
    state = checkpoint["state_dict"].values()
    if not all(v.layout == torch.strided and v.device.type == "cpu" and not v.is_quantized for v in state):
        raise DamagedError(f"{path}: expected dense tensors, got sparse, quantized or empty ones; save the dense ones")
    # A tensor may show few numbers as many, which a later copy would write out.
    # Weights that a network shares have one place in the file, and several names.
    shown = {(v.untyped_storage().data_ptr(), v.storage_offset(), v.shape, v.stride()): v for v in state}
    if sum(v.numel() * v.element_size() for v in shown.values()) > len(content):
        raise DamagedError(f"{path}: damaged: its tensors are larger than the file")
    return checkpoint


def _other_file(content: bytes) -> str:
    """What a file is that is no zip archive, and the way out."""
    if not content:
        return "an empty file; download or copy it again"
    if content.count(0) == len(content):
        return "a file of zeros, as unfinished copies are; download or copy it again"
    if OLD_MAGIC in content[:64]:
        return WHOLE_MODEL if b"torch.nn.modules." in content[:MAX_PICKLE] else OLD_TORCH
    for start, what in OTHER_FILES.items():
        if re.match(start, content[:1024].removeprefix(b"\xef\xbb\xbf"), re.DOTALL):
            return what
    if content[0] == 0x80 and content[1:2] <= b"\5":
        way_out = "only what torch.save writes is read: only tensors and primitives, and nothing was executed"
        return f"a pickle; {way_out}; {STATE_ALONE}"
    text = content[:60].decode(errors="ignore")
    if all(c.isprintable() or c.isspace() for c in text) and len(text) > len(content[:60]) // 2:
        return f"a text that begins with {text[:40]!r}; download or copy the checkpoint again"
    return f"a file of unknown kind (its first bytes are {content[:8].hex(' ')}); give what torch.save wrote"


def _read_archive(path: str | Path, content: bytes, ours: bool) -> Any:
    """What torch.save wrote, once it is clear that reading it is safe."""
    if ZIP_END not in content[-(2**16) - ZIP_END_BYTES :]:
        raise _RefusedError("it begins as a checkpoint, but its end is missing; download or copy it again")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if content.count(b"PK\x01\x02") <= MAX_ENTRIES:
            _check_names([entry.filename for entry in archive.infolist()])
    _check(path, content, ours)
    with warnings.catch_warnings(), torch.serialization.safe_globals(STAND_INS):
        warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read raises in any case
        return torch.load(_clean_archive(content), map_location="cpu", weights_only=True)


def _check_names(names: list[str]) -> None:
    """Refuse archives of other programs, by the names of their files."""
    what = None
    if any(name.endswith("constants.pkl") or "/code/" in name for name in names):
        what = f"a TorchScript archive; {STATE_ALONE}"
    elif any(name.endswith(".weights.h5") for name in names):
        what = f"a model of Keras; {STATE_ALONE}"
    elif names and all(name.endswith(".npy") for name in names):
        what = f"arrays of numpy (.npz); {STATE_ALONE}"
    elif not any(name.endswith("data.pkl") for name in names):
        some = ", ".join(repr(name[:60]) for name in names[:3]) or "nothing"
        what = f"a zip archive of {some}; {UNPACK}"
    if what:
        raise _RefusedError(f"expected a checkpoint of torch, got {what}")


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
            raise _RefusedError(
                "its entries are packed, or larger than the file, as torch.save never writes them; give the original"
            )
        if len({e.filename for e in entries}) < len(entries):
            raise ValueError("it holds a file twice")
        for entry in entries:
            data = archive.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = _check_pickle(data)
            copy.writestr(zipfile.ZipInfo(entry.filename), data)
    clean.seek(0)
    return clean


def _check_pickle(data: bytes) -> bytes:
    """An index without what torch would still read: numbers that reserve memory, deep nesting, slow codecs."""
    if len(data) > MAX_PICKLE:
        raise ValueError("its index is too long")
    tuples, start, clean = 0, 0, []
    for operation, argument, place in pickletools.genops(data):
        tuples += operation.name.startswith("TUPLE")
        if operation.name in ("GLOBAL", "SHORT_BINUNICODE") and argument.startswith("torch.nn.modules."):
            raise _RefusedError(f"expected weights, got {WHOLE_MODEL}")
        if operation.name == "GLOBAL" and argument.split() == ["builtins", "bytearray"]:
            raise pickle.UnpicklingError("GLOBAL builtins.bytearray")  # a number reserves its memory
        if data.startswith(ENCODE, place) and operation.name == "GLOBAL":
            # Of all codecs only the one of pickle's own bytes: "punycode" takes hours for a megabyte.
            clean += [data[start:place], b"cutils\nlatin1\n"]
            start = place + len(ENCODE)
    if tuples > MAX_TUPLES:
        raise ValueError("too many tuples in it")
    return b"".join([*clean, data[start:]])


def _latin1(text: str, encoding: str) -> bytes:
    """Stands for the function that makes bytes of text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError("GLOBAL _codecs.encode")
    return text.encode("latin1")


class _Dtype:
    """Stands for numpy.dtype where torch unpickles: kinds of numbers only."""

    def __init__(self, code: str, *_flags: object):
        if not (isinstance(code, str) and re.fullmatch("b1|[iu][1248]|f[248]", code)):
            raise pickle.UnpicklingError("GLOBAL numpy.dtype")
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        order, *rest = state[1:]
        if order not in ("<", ">", "|") or rest != [None, None, None, -1, -1, 0]:
            raise pickle.UnpicklingError("GLOBAL numpy.dtype")
        self.code = order + self.code


def _scalar(dtype: _Dtype, data: bytes) -> float | int | bool:
    """Stands for the function that makes a number of numpy."""
    return np.frombuffer(data, dtype.code).item()


class _Namespace:
    """Stands for argparse.Namespace; nothing of it is of use here."""

    def __setstate__(self, state: object) -> None:
        pass


# What torch may call beside its own, by the names in the file; numpy's internals moved with its version 2. torch calls
# _codecs.encode before it looks here, so that `_check_pickle` gives that another name.
STAND_INS = [
    (_latin1, "utils.latin1"),
    (_Dtype, "numpy.dtype"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    (_Namespace, "argparse.Namespace"),
]


def _is_safetensors(content: bytes) -> bool:
    return content[8:9] == b"{" and content[4:8] == bytes(4)


def _read_safetensors(content: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file: 8 bytes that give the length of a JSON header, that header, raw numbers."""
    length = int.from_bytes(content[:8], "little")
    if length > MAX_PICKLE:
        raise _RefusedError("a safetensors file whose header is too long")
    if length + 8 > len(content):
        raise _RefusedError("a safetensors file whose end is missing; download or copy it again")
    entries = json.loads(content[8 : 8 + length], object_pairs_hook=_once)
    entries.pop("__metadata__", None)
    data = torch.tensor([], dtype=torch.uint8)
    if len(content) > 8 + length:
        data = torch.frombuffer(bytearray(memoryview(content)[8 + length :]), dtype=torch.uint8)
    state, total = {}, 0
    for name, entry in entries.items():
        dtype, shape, (begin, end) = SAFETENSORS[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not all(type(n) is int and 0 <= n < 2**40 for n in (*shape, begin, end)) or len(shape) > 8:
            raise ValueError("its header holds sizes that are none")
        if end > len(data):
            raise _RefusedError("a safetensors file whose end is missing; download or copy it again")
        total += end - begin
        if end - begin != math.prod(shape) * dtype.itemsize or total > len(data):
            raise ValueError("its header and its numbers differ in size")
        state[name] = data[begin:end].clone().view(dtype).reshape(shape)
    return state


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which a name may stand only once."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("its header holds a name twice")
    return dict(pairs)


def _unwrapped(content: Any, names: Container[str] = ()) -> dict[str, Any]:
    """What `load_checkpoint` returns of the content of a file."""
    found = _states(content, (), set())

    def rank(keys: tuple[str, ...]) -> list[int]:
        return [STATE_KEYS.index(key) if key in STATE_KEYS else len(STATE_KEYS) for key in keys]

    places = sorted(found, key=rank)
    shown = [repr(".".join(keys)[:60]) for keys in places]
    if not places:
        what = f"a {type(content).__name__}"
        if isinstance(content, dict):
            what = "a dict of " + (", ".join(repr(str(key)[:40]) for key in list(content)[:8]) or "nothing")
        raise _RefusedError(f"not a checkpoint: expected named tensors, as in a state_dict, got {what}")
    if len(places) > 1 and (rank(places[0]) == rank(places[1]) or not set(places[0]) & set(STATE_KEYS)):
        raise _RefusedError(f"it holds weights under {', '.join(shown[:8])}; save those alone that are meant")
    own = places[0] == ("state_dict",) and all(name in content for name in REQUIRED)
    state, unread = (found[places[0]], []) if own else _short_names(found[places[0]], names)
    beside = {key: value for key, value in content.items() if key != places[0][0]} if places[0] else {}
    return {**beside, "state_dict": state, "unread": shown[1:9] + unread[:8]}


def _states(value: Any, keys: tuple[str, ...], seen: set[int]) -> dict[tuple[str, ...], dict[str, Tensor]]:
    """The dicts of named tensors in a checkpoint, by the keys that lead to each."""
    if not isinstance(value, dict) or len(keys) > MAX_DEPTH or id(value) in seen:  # a pickle can hold a circle
        return {}
    seen.add(id(value))
    state = {name: tensor for name, tensor in value.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    alone = len(state) == len(value) and keys[-1:] and keys[-1] in STATE_KEYS
    if state and (alone or (any("." in name for name in state) and 2 * len(state) > len(value))):
        return {keys: state}
    found = {}
    for key, inner in value.items():
        if isinstance(key, str) and not key.startswith("optim"):
            found |= _states(inner, (*keys, key), seen)
    return found


def _short_names(state: dict[str, Tensor], own: Container[str] = ()) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by their names in the network itself, and the names of those that belong to something else.

    `own` holds names that are the network's, if it is known.
    """
    named = {name: name.split(".") for name in state if not name.endswith(NO_WEIGHTS)}
    named = {name: [part for part in parts[:-1] if part not in WRAPPERS] + parts[-1:] for name, parts in named.items()}
    unread = []
    for _ in range(MAX_DEPTH):
        if any(".".join(parts) in own for parts in named.values()):
            break
        heads = {parts[0] for parts in named.values()}
        holder = next((head for head in HOLDERS if head in heads), None)
        if len(heads) == 1 and max(len(parts) for parts in named.values()) > 2:
            holder = heads.pop()
        if holder is None:
            break
        unread += [repr(name[:60]) for name, parts in named.items() if parts[0] != holder]
        named = {name: parts[1:] for name, parts in named.items() if parts[0] == holder and len(parts) > 1}
    short = {name: ".".join(parts) for name, parts in named.items()}
    if len(set(short.values())) < len(short):
        raise _RefusedError("it holds the weights of a network twice, under names that differ in their beginnings")
    return {short[name]: state[name] for name in named}, unread


def load_model(path: str | Path, **known: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network of a checkpoint and fill it, on the CPU, in eval mode.

    Args:
        path: a checkpoint file, of ours or of others.
        known: what the caller knows of `model`, `dataset`, `width`, `num_classes`, `image_size` and `in_channels`; None
            stands for unknown. A checkpoint of ours holds them all; for others, all but `dataset` are inferred from the
            tensors, and `image_size` only counts where the tensors leave it open.

    Returns:
        The network, and the checkpoint with all entries of `REQUIRED`; of others it has a `note` on what was inferred.

    Raises:
        InputError: naming the file and what contradicts or does not fit.
    """
    checkpoint = load_checkpoint(path)
    if not all(name in checkpoint for name in REQUIRED):
        checkpoint = _described(path, checkpoint, known)
    with refusing(f"{path}: describes a network that cannot be built"):
        for name, kind in KINDS.items():
            if type(checkpoint.get(name)) not in (kind, type(None)):
                raise ValueError(f"its {name} is a {type(checkpoint[name]).__name__}")
        _set_file(checkpoint, known)
        network = [checkpoint[name] for name in NETWORK]
        model = _on_meta(network)
    for name, value in known.items():
        inferred = name == "image_size" and "note" in checkpoint
        if value is not None and checkpoint[name] != value and not inferred:
            raise InputError(f"{path}: --{name} {value} contradicts the checkpoint, which has {checkpoint[name]}")
    _check_state(model, checkpoint["state_dict"], path)
    model = create_model(*network)
    fill_model(model, checkpoint["state_dict"], path)
    return model.eval(), checkpoint


def _on_meta(network: list) -> nn.Module:
    """The network of a checkpoint without its numbers: it takes no memory, whatever size the file claims."""
    if PINNED.fullmatch(network[0]):
        return create_model(*network)
    try:
        with torch.device("meta"):
            return create_model(*network)
    except ValueError as error:
        if not isinstance(error.__cause__, NotImplementedError):
            raise
        return create_model(*network)  # a network of others that reads numbers while it is built


def _set_file(checkpoint: dict[str, Any], known: dict[str, Any]) -> None:
    """Where a user's file makes the network: take the place that the caller knows, and see that it is safe to execute.

    Only a file whose content the checkpoint names is executed, and of its own only one at an absolute path.
    """
    name, given = checkpoint["model"], known.get("model")
    if given is not None and is_external(given):
        known["model"] = given = full_name(given)
        if without_folder(given) == without_folder(name):
            checkpoint["model"] = name = given
    if is_external(name) and name != full_name(name):
        raise ValueError(f"expected the absolute path of a file and its digest, got '{name[:200]}'")


def _described(path: str | Path, checkpoint: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of others with all entries of `REQUIRED`, and a `note` that says what it was taken for."""
    state, dataset = dict(checkpoint["state_dict"]), known.get("dataset") or checkpoint.get("dataset")
    try:
        network = _infer_network(state)
    except (LookupError, StopIteration, TypeError, ZeroDivisionError) as error:  # other tensors, or of other dimensions
        some = ", ".join(name[:60] for name in [*list(state)[:2], "...", list(state)[-1]])
        expected = f"expected the names and shapes of a network known here ({', '.join(MODELS)})"
        raise InputError(f"{path}: {expected}, got {some}: no network known here") from error
    if network["image_size"] is None:  # it takes images of any size, a ResNet of this form of any that are not Tiny's
        size = known.get("image_size") or 32
        network["image_size"] = 32 if size >= 64 and network["model"].startswith("resnet") else size
    for name in [name for name in state if name.endswith("running_var")]:
        # Old files lack these counters, and others hold them in float16; nothing here reads them.
        counter = name.removesuffix("running_var") + "num_batches_tracked"
        state[counter] = state.get(counter, torch.zeros(())).to(torch.int64)
    note = "read as {model} of width {width} with {num_classes} classes and {in_channels} channels".format(**network)
    note += ", by the names and shapes of its tensors"
    if checkpoint["unread"]:
        note += f"; also there, and not read: {', '.join(checkpoint['unread'])}"
    beside = {name: checkpoint.get(name) if type(checkpoint.get(name)) is int else None for name in ("epoch", "seed")}
    return {"state_dict": state, "dataset": dataset, "note": note, **beside, **network}


def fill_model(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load a state_dict whose names and shapes must be the model's own.

    Raises:
        InputError: naming the file and the first tensor that does not fit.
    """
    _check_state(model, state, path)
    load_state(model, state)


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
    """The entries of `NETWORK` for the weights of others, image_size None for any; an error if of another network."""

    def blocks(stage: str) -> int:
        return len({name.removeprefix(stage).split(".")[0] for name in state if name.startswith(stage)})

    if "tokens.cls_token" in state:
        stem, last, size = (
            state["patch_embed.weight"],
            state["head.weight"],
            PATCHES * len(state["patch_embed.weight"][0, 0]),
        )
        model, width = "vit_t", len(stem) // 3
    elif "block1.layer.0.conv1.weight" in state:
        stem, last, size = state["conv1.weight"], state["fc.weight"], None
        widen_factor = len(state["block1.layer.0.conv1.weight"]) // len(stem)
        model, width = f"wrn-{6 * blocks('block1.layer.') + 4}-{widen_factor}", 4 * len(stem)
    else:
        if "layer1.0.conv1.weight" in state:
            stem, last, size = state["conv1.weight"], state["linear.weight"], None
            depths = tuple(blocks(f"layer{stage}.") for stage in (1, 2, 3, 4))
            bottleneck = "layer1.0.conv3.weight" in state
        else:
            stem, last, size = state["conv1.0.weight"], state["fc.weight"], 64
            depths = tuple(blocks(f"conv{stage}_x.") for stage in (2, 3, 4, 5))
            bottleneck = "conv2_x.0.residual_function.6.weight" in state
        model = next(f"resnet{n}" for n, d in BLOCKS.items() if d == depths and (n >= 50) == bottleneck)
        width = len(stem)
    return dict(zip(NETWORK, (model, len(last), width, size, stem.shape[1]), strict=True))
