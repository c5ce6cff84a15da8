"""One forward pass of a member over a part of the data, ever: cached logits, which every measure comes from.

A cache file lies under the measurement folder as predictions/<member>/<part>.npz, and holds the logits with the digests
of the member's weights and of the part's images, labels and transform. All scripts find it again; a file that is
damaged, or belongs to other weights or images, is noticed and made anew.
"""

import hashlib
import io
import json
import shlex
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils import InputError, RunError, first_line
from utils.checkpoint import find_checkpoints, load_model, read_settings, run_of, write_atomically, write_json
from utils.cli import start_device
from utils.data import CORRUPTED, DATASETS, Data, ImageSet, check_corrupted, find_corrupted, load_data, read_corrupted
from utils.ensemble import FREE_SETTINGS, environment
from utils.training import evaluating

FORM = 1  # of the cache files; another number makes old ones stale
BATCH = 512


@dataclass
class SavedMember:
    """A member read from a checkpoint: the network in eval mode, what is known of it, and the digest of its weights."""

    path: Path
    model: nn.Module
    seed: int | None
    epoch: int | None
    network: dict
    digest: str

    def describe(self) -> dict:
        """What a result file says of it."""
        return {"path": str(self.path), "sha256_of_weights": self.digest, "seed": self.seed, "epoch": self.epoch}


def load_members(paths: list[Path], at_least: int = 1, why: str = "", **told: object) -> list[SavedMember]:
    """Read the members of one ensemble.

    Args:
        paths: checkpoint files, of ours or of the authors' release.
        at_least: how many are needed, and `why`.
        told: what the caller knows of the networks, as for `utils.checkpoint.load_model`.

    Raises:
        InputError: for too few members, members of different networks or data sets, the same weights twice, or weights
            that are not finite.
    """
    if len(paths) < at_least:
        raise InputError(f"--resume: {len(paths)} member given; {why}, so that {at_least} are needed")
    members: list[SavedMember] = []
    for path in paths:
        model, checkpoint = load_model(path, **told)
        digest = hashlib.sha256()
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise InputError(f"{path}: {name} holds values that are not finite; take an earlier checkpoint")
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy())
        network = {
            name: checkpoint[name] for name in ("model", "dataset", "width", "num_classes", "image_size", "in_channels")
        }
        for other in members:
            for name, value in network.items():
                if other.network[name] != value:
                    raise InputError(
                        f"--resume: {path} has {name} {value}, {other.path} has {other.network[name]}; the members of "
                        "an ensemble are of one kind"
                    )
            if other.digest == digest.hexdigest():
                raise InputError(f"--resume: {path} and {other.path} hold the same weights; give each member once")
        seed, epoch = checkpoint.get("seed"), checkpoint["epoch"]
        members.append(SavedMember(path, model, seed, epoch, network, digest.hexdigest()))
    return members


@dataclass
class Part:
    """Some images that are measured together: a split, or one corruption at one severity.

    `load` reads them, on the device of the data and without augmentation; they are not kept.
    """

    name: str
    load: Callable[[], ImageSet]
    corruption: str | None = None
    severity: int | None = None


def parts_of(
    data: Data, data_path: Path, split: str, corruptions: Iterable[str], severities: Iterable[int]
) -> list[Part]:
    """The parts of a split of `SPLITS`; "corrupted" has one for each corruption and severity.

    Raises:
        InputError: if the corrupted set, or a file of it, is missing or has another form than the test set.
    """
    if split != "corrupted":
        return [Part(split, lambda: getattr(data, split))]
    folder = find_corrupted(data.name, data_path)
    if folder is None:
        raise InputError(
            f"--split corrupted: no {CORRUPTED[data.name]}/ in {data_path} or beside the data set; leave it out, or "
            "name the folder that holds it by --data_path"
        )
    check_corrupted(folder, data, corruptions, severities)
    return [
        Part(f"{name}-{severity}", partial(read_corrupted, folder, data, name, severity), name, severity)
        for name in corruptions
        for severity in severities
    ]


class Predictions:
    """The members' logits (and features) on any part, from the cache or by a forward pass.

    Args:
        members: as from `load_members`.
        folder: the measurement folder.
        features: also the inputs of the last linear layer.
        progress: called with the number of images after each batch of one member.
    """

    def __init__(
        self,
        members: list[SavedMember],
        folder: Path,
        features: bool = False,
        progress: Callable[[int], None] = lambda images: None,
    ):
        self.members, self.folder, self.features, self.progress = members, folder, features, progress
        self.digests: dict[str, str] = {}  # of the images of each part that was asked for

    def __call__(self, part: Part) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits float32 [M, N, C], labels int64 [N], and features, a list of M float32 [N, D], empty if not asked for.

        Raises:
            InputError: if a logit is not finite.
        """
        images = part.load()
        key = self.digests[part.name] = images.digest()
        found = [self._member(member, part.name, images, key) for member in self.members]
        logits = torch.stack([torch.from_numpy(arrays["logits"]) for arrays in found])
        features = [torch.from_numpy(arrays["features"]) for arrays in found] if self.features else []
        return logits, images.labels.cpu(), features

    def _member(self, member: SavedMember, part: str, images: ImageSet, key: str) -> dict[str, np.ndarray]:
        path = self.folder / "predictions" / member.digest[:16] / f"{part}.npz"
        about = json.dumps({"form": FORM, "weights": member.digest, "images": key})
        arrays = _read(path, about, (len(images), member.network["num_classes"]))
        if arrays is None or (self.features and "features" not in arrays):
            arrays = forward(member.model, images, self.features, self.progress)
            if not np.isfinite(arrays["logits"]).all():
                raise InputError(f"{member.path}: its logits on {part} are not finite")
            buffer = io.BytesIO()
            np.savez(buffer, about=np.array(about), **arrays)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, buffer.getvalue())
        else:
            self.progress(len(images))
        return arrays


@torch.inference_mode()
def forward(
    model: nn.Module, images: ImageSet, features: bool, progress: Callable[[int], None] = lambda images: None
) -> dict[str, np.ndarray]:
    """One pass in eval mode: `logits` float32 [N, C] and, if asked, `features` [N, D], the last layer's input."""
    model.to(images.device, memory_format=torch.channels_last)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    rows: dict[str, list[Tensor]] = {"logits": [], "features": []}
    hook = last.register_forward_pre_hook(lambda module, args: rows["features"].append(args[0].float()))
    try:
        with evaluating(model):
            for batch, _ in images.in_order(BATCH):
                rows["logits"].append(model(batch).float())
                progress(len(batch))
                if not features:
                    rows["features"].clear()
    finally:
        hook.remove()
    return {name: torch.cat(tensors).cpu().numpy() for name, tensors in rows.items() if tensors}


def _read(path: Path, about: str, shape: tuple[int, int]) -> dict[str, np.ndarray] | None:
    """A cache file, or None if it is missing, damaged or about something else; `shape` is that of the logits."""
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
            # numpy.savez packs nothing; what is packed could hold a thousand times the size of the file.
            if any(entry.compress_type or entry.file_size > path.stat().st_size for entry in entries):
                return None
            if _array(file.read("about.npy")).item() != about:
                return None
            names = [entry.filename for entry in entries if entry.filename != "about.npy"]
            arrays = {name.removesuffix(".npy"): _array(file.read(name)) for name in names}
        whole = all(array.dtype == np.float32 and array.ndim == 2 for array in arrays.values())
        whole = whole and all(len(array) == shape[0] and np.isfinite(array).all() for array in arrays.values())
        return arrays if whole and arrays["logits"].shape == shape else None
    except Exception:  # a damaged file raises nearly anything
        return None


def _array(content: bytes) -> np.ndarray:
    """The array of an .npy file that numpy writes, out of its content: no header makes it larger than that."""
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not a form that is written here")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    array = np.frombuffer(bytearray(content[file.tell() :]), dtype=dtype)  # writable, as torch wants it
    return array.reshape(shape, order="F" if fortran_order else "C")


class Measurement:
    """What the measuring scripts share: members, data, predictions, a bar, and the form of the result file.

    Args:
        args: the options of `utils.cli.add_data_options`, `add_checkpoint_options` and `add_measure_options`; what was
            not given is filled in.
        at_least: how many members are needed, and `why`.
        features: whether predictions have features.

    Raises:
        InputError: naming the flag or file.
    """

    def __init__(self, args: Namespace, at_least: int = 1, why: str = "", features: bool = False):
        self.args = args
        paths = find_checkpoints(args.resume, args.checkpoint)
        run = run_of(args.resume[0])
        settings = read_settings(run) if run else {}
        self.trained = {name: value for name, value in settings.items() if name not in FREE_SETTINGS} or None
        self.members = load_members(
            paths, at_least, why, model=args.model, width=args.width, dataset=args.data or settings.get("data")
        )
        args.data = self.members[0].network["dataset"]
        if args.data is None:
            raise InputError(f"--data: {paths[0]} does not say which data set its network was trained on; name it")
        if not isinstance(args.data, str) or args.data not in DATASETS:
            raise InputError(f"{paths[0]}: its data set is {str(args.data)[:40]!r}, not one of {', '.join(DATASETS)}")
        for name in ("data_path", "train_idx_path", "val_idx_path"):
            told = settings.get(name)
            if getattr(args, name) is None and told is not None:
                if not isinstance(told, str):
                    raise InputError(f"{run / 'args.json'}: its {name} is no path")
                setattr(args, name, Path(told))
        args.data_path = args.data_path or Path("data")
        args.save = args.save or Path("measurements") / (run or paths[0].parent).resolve().name
        try:
            args.save.mkdir(parents=True, exist_ok=True)
            write_atomically(args.save / ".writable", b"")
            (args.save / ".writable").unlink()
        except (OSError, RunError) as error:
            raise InputError(f"--save {args.save}: cannot be written ({first_line(error)}); name another") from error
        device = start_device(args.device, args.threads)
        noise = settings.get("label_noise") or 0.0  # the labels that the members were trained on
        if not isinstance(noise, int | float) or not 0 <= noise <= 1:
            raise InputError(f"{run / 'args.json'}: its label_noise is no share")
        self.data = load_data(
            args.data, args.data_path, device, args.train_idx_path, args.val_idx_path, args.download, noise
        )
        _check_fit(self.members[0], self.data)
        if getattr(args, "split", "") is None:
            found = find_corrupted(args.data, args.data_path) is not None
            args.split = ["test", "corrupted"] if found else ["test"]
        self.bar = tqdm(disable=not sys.stderr.isatty(), unit="img", unit_scale=True, dynamic_ncols=True, delay=2)
        self._parts: dict[str, list[Part]] = {}
        self.predictions = Predictions(self.members, args.save, features, self.bar.update)

    def parts(self, split: str) -> list[Part]:
        """The parts of a split; the bar counts them in."""
        if split not in self._parts:
            args = self.args
            self._parts[split] = parts_of(self.data, args.data_path, split, args.corruptions, args.severities)
            images = len(getattr(self.data, "test" if split == "corrupted" else split))
            self.bar.total = (self.bar.total or 0) + images * len(self._parts[split]) * len(self.members)
        return self._parts[split]

    def write(self, name: str, result: dict) -> Path:
        """Write a result file: what was measured, on which members and data, by which protocol, and where."""
        path = self.args.save / name
        protocol = {key: _plain(value) for key, value in vars(self.args).items() if key not in ("threads", "download")}
        data, corrupted = self.data.record, [part.name for part in self._parts.get("corrupted", [])]
        if corrupted:
            digests = json.dumps([(name, self.predictions.digests[name]) for name in corrupted])
            data = data | {"sha256_of_corrupted": hashlib.sha256(digests.encode()).hexdigest()}
        write_json(
            path,
            {
                "command": shlex.join(["python", *sys.argv]),
                "members": [member.describe() for member in self.members],
                "network": self.members[0].network,
                "trained": self.trained,
                "data": data,
                "protocol": protocol,
                "environment": environment(self.data.train.device),
                "result": result,
            },
        )
        return path


def _check_fit(member: SavedMember, data: Data) -> None:
    info = data.info
    for name, value in (
        ("num_classes", info.num_classes),
        ("image_size", info.image_size),
        ("in_channels", len(info.mean)),
    ):
        if member.network[name] != value:
            raise InputError(
                f"--data {data.name}: its {name} is {value}, the network of {member.path} has {member.network[name]}"
            )


def _plain(value: object) -> object:
    """A setting as JSON holds it."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def mean_of(values: list) -> Any:
    """The mean of equally built nested dicts and lists, number by number; None where a number is missing."""
    first = values[0]
    if isinstance(first, dict):
        return {key: mean_of([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [mean_of(list(column)) for column in zip(*values, strict=True)]
    return None if any(value is None for value in values) else sum(values) / len(values)
