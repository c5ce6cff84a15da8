"""One forward pass of each member over each part of the data: cached logits, which every metric derives from.

A cache file is predictions/<member>/<part>.npz in the measurement folder. It holds the logits with the digests of the
member's weights and of the part's images, labels and normalisation, the version of the code, the device and the commit.
All scripts share it; a file that is damaged, or of other weights, images, versions or devices, is computed anew.
"""

import hashlib
import io
import json
import shlex
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils import InputError, RunError, first_line, processes
from utils.checkpoint import NETWORK, load_model
from utils.data import Data, ImageSet
from utils.datasets import (
    CORRUPTIONS,
    DATASETS,
    NAMES,
    SEVERITIES,
    check_corrupted,
    corrupted_name,
    find_corrupted,
    load_data,
    read_corrupted,
)
from utils.distributed import default_jobs, default_threads, start_device
from utils.files import array_of, hold, parse_json, read_entry, write_atomically, write_json
from utils.kept import Keep, keep_modes, made_by, why_stale, with_earlier
from utils.run import (
    CHECKPOINTS,
    FREE_SETTINGS,
    environment,
    find_checkpoints,
    read_settings,
    relative_paths,
    run_of,
    training_passes,
)
from utils.training import predict

Progress = Callable[[int], object]  # called with the number of images that are done
INPUTS = ("classes", "mean", "std")  # what a checkpoint holds of its images, besides their size
NAMED = "named one by one"  # the value of "checkpoint" for files that are of no kind of `CHECKPOINTS`
# Bytes that a process takes while it measures: before, and for each weight. They are a rough upper end.
MEMORY_OF_PROCESS, MEMORY_OF_WEIGHT = 5e8, 60
RESULT_FILES = ("diversity.json", "variance.json", "sharpness.json")


@dataclass
class SavedMember:
    """A member read from a checkpoint: the network in eval mode, its description, and the digest of its weights."""

    path: Path
    model: nn.Module
    seed: int | None
    epoch: int | None
    network: dict
    inputs: dict
    digest: str

    def describe(self) -> dict:
        """What a result file records of it."""
        return {"path": str(self.path), "sha256_of_weights": self.digest, "seed": self.seed, "epoch": self.epoch}


def load_members(paths: list[Path], at_least: int = 1, why: str = "", **known: object) -> list[SavedMember]:
    """Read the members of one ensemble.

    Args:
        paths: checkpoint files, of ours or of the authors' release.
        at_least: how many there have to be, and `why`.
        known: what the caller knows of the networks, as for `utils.checkpoint.load_model`.

    Raises:
        InputError: for too few members, members of different networks or data sets, the same weights twice, or weights
            that are not finite.
    """
    if len(paths) < at_least:
        raise InputError(f"--resume: expected {at_least} or more members, since {why}, got {len(paths)}")
    members: list[SavedMember] = []
    for path in paths:
        model, checkpoint = load_model(path, **known)
        if "note" in checkpoint:
            print(f"note: {path}: {checkpoint['note']}", file=sys.stderr)
        digest = hashlib.sha256()
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise InputError(f"{path}: {name} holds values that are not finite; use an earlier checkpoint")
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy())
        network = {name: checkpoint[name] for name in ("dataset", *NETWORK)}
        inputs = _inputs_of(checkpoint)
        for other in members:
            theirs = other.network | other.inputs
            for name, value in (network | inputs).items():
                if theirs[name] != value:
                    differ = f"{path} has {name} {value!s:.60}, {other.path} has {theirs[name]!s:.60}"
                    raise InputError(f"--resume: {differ}; the members of an ensemble are of one kind")
            if other.digest == digest.hexdigest():
                raise InputError(f"--resume: {path} and {other.path} hold the same weights; give each member once")
        seed, epoch = checkpoint.get("seed"), checkpoint["epoch"]
        members.append(SavedMember(path, model, seed, epoch, network, inputs, digest.hexdigest()))
    return members


def _inputs_of(checkpoint: dict[str, Any]) -> dict[str, list | None]:
    """What a checkpoint of ours holds of `INPUTS`; None for each where it is not what we write."""
    found = {name: checkpoint.get(name) for name in INPUTS}
    classes, *numbers = found.values()
    known = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    for values in numbers:
        known = known and isinstance(values, list) and len(values) == checkpoint["in_channels"]
        known = known and all(isinstance(x, float) and 0 <= x <= 1 for x in values)
    return found if known and all(found["std"]) else dict.fromkeys(INPUTS)


def trained_settings(paths: list[Path]) -> dict[str, Any] | None:
    """The settings that the members of an ensemble were trained by; None where they are not known for all of them.

    Args:
        paths: checkpoint files, of one run or of several that differ in the seeds only.

    Raises:
        InputError: naming two runs and in what they differ, or two files that are not the same checkpoint.
    """
    runs = {path: run for path in paths if (run := run_of(path))}
    known = {}
    for run in runs.values():
        known[run] = {name: value for name, value in read_settings(run).items() if name not in FREE_SETTINGS}
        digest = read_entry(run / "environment.json", "data", "sha256_of_arrays_and_split")
        known[run] |= {} if digest is None else {"digest of images and split": digest}
    if not runs:
        return None
    (first, settings), *others = known.items()
    for run, other in others:
        names = [name for name in settings if name != "seed" and other.get(name, settings[name]) != settings[name]]
        if names:
            differ = "; ".join(f"{name} {other[name]!s:.40} and {settings[name]!s:.40}" for name in names)
            problem = f"--resume: {run} and {first} were not trained alike ({differ})"
            raise InputError(f"{problem}: their members are not one ensemble; measure each run by itself")
    kinds = {path.name: path for path in runs}
    if len(kinds) > 1:
        one, other = list(kinds.values())[:2]
        raise InputError(f"--resume: {one} and {other} are not the same checkpoint of members; give one of each member")
    settings.pop("digest of images and split", None)
    seeds = [seed for one in known.values() for seed in one["seed"]]
    return settings | {"seed": seeds} if len(runs) == len(paths) else None


@dataclass
class Part:
    """Images that are measured together: a split, or one corruption at one severity.

    `load` reads them, on the device of the data and without augmentation.
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
        InputError: if the corrupted set, or a file of it, is missing or does not fit the test set.
    """
    if split != "corrupted":
        return [Part(split, lambda: getattr(data, split))]
    folder = find_corrupted(data.name, data_path, required=True, image_size=data.info.image_size)
    check_corrupted(folder, data, corruptions, severities)
    return [
        Part(f"{name}-{severity}", partial(read_corrupted, folder, data, name, severity), name, severity)
        for name in corruptions
        for severity in severities
    ]


class Predictions:
    """The members' logits (and features) on any part, from the cache or from a forward pass.

    Args:
        members: as from `load_members`.
        folder: the measurement folder.
        environment: as of `utils.run.environment`, of the device that the images are on.
        features: also the inputs of the last linear layer.
        progress: called with the number of images after each batch of one member.
        at_once: the most images in one pass.
    """

    def __init__(
        self,
        members: list[SavedMember],
        folder: Path,
        environment: dict[str, Any],
        features: bool = False,
        progress: Progress = lambda images: None,
        at_once: int = 128,
    ):
        self.members, self.folder, self.environment, self.features = members, folder, environment, features
        self.progress, self.at_once = progress, at_once
        self.loaded: tuple[str, ImageSet] | None = None  # the part that was read last
        self.digests: dict[str, str] = {}  # of the images of each part that was asked for
        self.commits: dict[str, list[str | None]] = {}  # that made its logits
        self._said = False

    def __call__(self, part: Part) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits float32 [M, N, C], labels int64 [N], and features, a list of M float32 [N, D], empty if not asked for.

        Raises:
            InputError: if a logit is not finite.
        """
        images = self._images(part)
        self.commits[part.name] = []
        found = [self._member(member, part.name, images) for member in self.members]
        self.loaded = None
        logits = torch.stack([torch.from_numpy(arrays["logits"]) for arrays in found])
        features = [torch.from_numpy(arrays["features"]) for arrays in found] if self.features else []
        return logits, images.labels.cpu(), features

    def missing(self, parts: list[Part]) -> list[tuple[Part, SavedMember]]:
        """What no file holds, as far as is seen without the images."""
        return [(part, member) for part in parts for member in self.members if not self._is_there(part.name, member)]

    def make(self, part: Part, member: SavedMember, progress: Progress) -> None:
        """Make a member's file of a part."""
        before, self.progress = self.progress, progress
        self.commits.setdefault(part.name, [])
        self._member(member, part.name, self._images(part))
        self.progress = before

    def _images(self, part: Part) -> ImageSet:
        if self.loaded is None or self.loaded[0] != part.name:
            self.loaded = part.name, part.load()
            self.digests[part.name] = self.loaded[1].digest()
        return self.loaded[1]

    def _path(self, part: str, member: SavedMember) -> Path:
        return self.folder / "predictions" / member.digest[:16] / f"{part}.npz"

    def _is_there(self, part: str, member: SavedMember) -> bool:
        path, made = self._path(part, member), made_by("logits", self.environment)
        made.pop("commit")
        record = _entry_of(path, "about")
        if isinstance(record, dict) and all(record.get(k) == v for k, v in ({"weights": member.digest} | made).items()):
            with zipfile.ZipFile(path) as file:
                return not self.features or "features.npy" in file.namelist()
        if path.exists():
            self._say_why(path, member)
        return False

    def _say_why(self, path: Path, member: SavedMember) -> None:
        """Say once why a file is made anew."""
        if self._said:
            return
        self._said = True
        record = _entry_of(path, "about")
        why = "by other weights"
        if isinstance(record, dict) and record.get("weights") == member.digest:
            why = why_stale("logits", record, self.environment) or "for other images, or damaged since"
        print(f"note: {path}: logits made {why}; they and others like them are made anew", file=sys.stderr)

    def _member(self, member: SavedMember, part: str, images: ImageSet) -> dict[str, np.ndarray]:
        path = self._path(part, member)
        made = made_by("logits", self.environment)
        commit = json.dumps(made.pop("commit"))
        about = json.dumps({"weights": member.digest, "images": self.digests[part]} | made)
        arrays = read_cache(path, about, (len(images), member.network["num_classes"]))
        if arrays is not None and (not self.features or "features" in arrays):
            self.progress(len(images))
            commit = _entry_of(path, "commit")
            self.commits[part].append(commit if isinstance(commit, str) else None)
            return arrays
        if arrays is None and path.exists():
            self._say_why(path, member)
        member.model.to(images.device, memory_format=torch.channels_last)
        logits, features = predict(member.model, images, self.features, self.progress, self.at_once)
        if not logits.isfinite().all():
            raise InputError(f"{member.path}: its logits on {part} are not finite")
        arrays = {"logits": logits.numpy()} | ({"features": features.numpy()} if self.features else {})
        buffer = io.BytesIO()
        np.savez(buffer, about=np.array(about), commit=np.array(commit), **arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
        self.commits[part].append(self.environment["commit"])
        return arrays


def read_cache(path: Path, about: str, shape: tuple[int, int]) -> dict[str, np.ndarray] | None:
    """A cache file, or None if it is missing, damaged or about something else; `shape` is that of its logits."""
    try:
        with zipfile.ZipFile(path) as file:
            entries = file.infolist()
            # numpy.savez compresses nothing; what is compressed could hold a thousand times the size of the file.
            if any(entry.compress_type or entry.file_size > path.stat().st_size for entry in entries):
                return None
            if array_of(file.read("about.npy")).item() != about:
                return None
            names = [entry.filename for entry in entries if entry.filename not in ("about.npy", "commit.npy")]
            arrays = {name.removesuffix(".npy"): array_of(file.read(name)) for name in names}
        whole = all(array.dtype == np.float32 and array.ndim == 2 for array in arrays.values())
        whole = whole and all(len(array) == shape[0] and np.isfinite(array).all() for array in arrays.values())
        return arrays if whole and arrays["logits"].shape == shape else None
    except Exception:  # a damaged file raises nearly anything
        return None


def _entry_of(path: Path, name: str) -> Any:
    """What an entry of a cache file holds as JSON; None if it is missing or damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            entry = file.getinfo(f"{name}.npy")
            whole = not entry.compress_type and entry.file_size <= path.stat().st_size
            return parse_json(array_of(file.read(entry)).item()) if whole else None
    except Exception:  # a damaged file raises nearly anything
        return None


@dataclass(frozen=True)
class MeasureSettings:
    """Which members are measured, on which data, and where the result goes: `utils.cli.add_measure_options`.

    None stands for what the checkpoints or the run say; of `checkpoint` for the best.
    """

    resume: list[Path]
    checkpoint: str | None
    data: str | None
    data_path: Path | None
    train_idx_path: Path | None
    val_idx_path: Path | None
    download: bool
    device: str
    threads: int | None
    model: str | None
    width: int | None
    save: Path | None
    split: list[str] | None = None
    corruptions: tuple[str, ...] = ()
    severities: tuple[int, ...] = ()


def measure_settings(args: Namespace) -> MeasureSettings:
    """The settings of a measuring script's command line."""
    return MeasureSettings(**{f.name: getattr(args, f.name) for f in fields(MeasureSettings) if hasattr(args, f.name)})


class Measurement:
    """What the measuring scripts share: members, data, predictions, a bar, and the form of a result file.

    Args:
        settings: of the command line.
        at_least: how many members there have to be, and `why`.
        features: whether predictions have features.

    Attributes:
        settings: with what was not given filled in.
        splits: the splits to measure on.
        other_data: whether the images, or their split, are others than the members' runs record.
        environment: what result files record of it.

    Raises:
        InputError: naming the flag or file.
    """

    def __init__(self, settings: MeasureSettings, at_least: int = 1, why: str = "", features: bool = False):
        paths = find_checkpoints(settings.resume, settings.checkpoint)
        run = run_of(settings.resume[0])
        recorded = read_settings(run) if run else {}
        self.trained = trained_settings(paths)
        data = settings.data or recorded.get("data")
        size = DATASETS[data].image_size if str(data) in DATASETS else recorded.get("image_size")
        known = {"model": settings.model, "width": settings.width, "dataset": data, "image_size": size}
        self.members = load_members(paths, at_least, why, **known)
        data = self.members[0].network["dataset"]
        if data is None:
            raise InputError(f"--data: {paths[0]} does not say which data set its network was trained on; name it")
        if not isinstance(data, str) or data not in NAMES:
            raise InputError(f"{paths[0]}: expected a data set of {', '.join(NAMES)}, got {str(data)[:40]!r}")
        places = {}
        for name in ("data_path", "train_idx_path", "val_idx_path"):
            place = recorded.get(name) if getattr(settings, name) is None else getattr(settings, name)
            if not isinstance(place, str | Path | None):
                raise InputError(f"{run / 'args.json'}: its {name} is not a path")
            places[name] = None if place is None else Path(place)
        places["data_path"] = places["data_path"] or Path("data")
        save = settings.save or Path("measurements") / (run or paths[0].parent).resolve().name
        names = {path.name for path in paths}  # that were given, whatever --checkpoint says
        named = all(path.is_file() for path in settings.resume)
        other = NAMED if named else settings.checkpoint or "best"
        checkpoint = next((kind for kind, name in CHECKPOINTS.items() if names == {name}), other)
        self.settings = replace(settings, data=data, save=save, checkpoint=checkpoint, **places)
        if settings.save is None:
            self._refuse_of_another_run()
        try:
            save.mkdir(parents=True, exist_ok=True)
            write_atomically(save / ".writable", b"")
            (save / ".writable").unlink(missing_ok=True)  # another program may have tried meanwhile
        except (OSError, RunError) as error:
            raise InputError(f"--save {save}: cannot be written ({first_line(error)}); name another") from error
        # Before processes are forked there is one thread; `share` takes the others.
        device = start_device(settings.device, None if processes.may_fork() else settings.threads)
        noise = recorded.get("label_noise") or 0.0  # the labels that the members were trained on
        if not isinstance(noise, int | float) or not 0 <= noise <= 1:
            raise InputError(f"{run / 'args.json'}: its label_noise is not a share")
        with relative_paths(run, **places):
            more = {"image_size": self.members[0].network["image_size"], "inputs": self.members[0].inputs}
            self.data = load_data(data, device=device, download=settings.download, label_noise=noise, **places, **more)
        for name, value in self.data.info.network.items():
            other = self.members[0].network[name]
            if other != value:
                raise InputError(f"--data {data}: its {name} is {value}, the network of {paths[0]} has {other}")
        key = "sha256_of_arrays_and_split"
        digests = {run: read_entry(run / "environment.json", "data", key) for run in map(run_of, paths) if run}
        self.other_data = any(digest not in (None, self.data.record[key]) for digest in digests.values())
        if self.other_data:
            what = "not the images, or not the split, that the members were trained on: test images may be among those"
            print(f"note: {places['data_path']}: {what}", file=sys.stderr)
        self.splits = settings.split
        if self.splits is None:
            copies = find_corrupted(data, places["data_path"], image_size=self.data.info.image_size)
            self.splits = ["test", *(["corrupted"] if copies else [])]
            if not copies:
                self._note_idle_parts()
        self.bar = tqdm(disable=not sys.stderr.isatty(), unit="img", unit_scale=True, dynamic_ncols=True, delay=2)
        self._parts: dict[str, list[Part]] = {}
        at_once = recorded.get("batch_size")  # what the run's memory was enough for
        at_once = at_once if type(at_once) is int and at_once > 0 else 128
        self.environment = environment(self.data.train.device) | {"threads": self._threads(len(self.members))}
        self.predictions = Predictions(self.members, save, self.environment, features, self.bar.update, at_once)

    def _note_idle_parts(self) -> None:
        """Say that no corrupted set is there for the options that choose some of it."""
        whole = {"corruptions": CORRUPTIONS, "severities": SEVERITIES}
        chosen = [name for name, among in whole.items() if {*getattr(self.settings, name)} not in (set(), {*among})]
        if chosen:
            flags, data = ", ".join(f"--{name}" for name in chosen), self.data
            title = corrupted_name(data.name, data.info.image_size)
            print(f"note: {flags}: no effect, since no {title}/ is found beside the data", file=sys.stderr)

    def parts(self, split: str) -> list[Part]:
        """The parts of a split; the bar counts them in."""
        if split not in self._parts:
            s = self.settings
            parts = parts_of(self.data, s.data_path, split, s.corruptions, s.severities)
            images = len(getattr(self.data, "test" if split == "corrupted" else split))
            self.add_parts(split, parts, images * len(parts))
        return self._parts[split]

    def add_parts(self, split: str, parts: list[Part], images: int) -> None:
        """Name parts of so many images together, of other data too; the bar counts them in."""
        self._parts[split] = parts
        self.bar.total = (self.bar.total or 0) + images * len(self.members)

    def predict(self, splits: list[str]) -> None:
        """Make the logits that are not kept, members and parts side by side."""
        parts = [part for split in dict.fromkeys(splits) for part in self.parts(split)]
        tasks = self.predictions.missing(parts)[::-1]  # validation, which is small, at the end

        def work(task: int, report: Callable[..., object]) -> None:
            self.predictions.make(*tasks[task], partial(report, "images"))

        self.share(len(tasks), work, lambda kind, images: self.bar.update(images))
        self.bar.total = (self.bar.total or 0) + self.bar.n  # they are read again, and counted

    def share(self, tasks: int, work: Callable[..., object], hear: Callable[..., object]) -> None:
        """Do tasks as `utils.processes.share`, in at most as many as `--jobs auto` gives; none are left after it."""
        members, device = len(self.members), self.data.train.device
        if processes.may_fork():
            threads, count = self._threads(members), 1
            if device.type == "cpu":
                weights = sum(tensor.numel() for tensor in self.members[0].model.state_dict().values())
                size = MEMORY_OF_PROCESS + MEMORY_OF_WEIGHT * weights
                count = processes.that_fit(default_jobs(members, threads), size)
            if min(count, tasks) > 1:
                processes.share(tasks, count, lambda *task: (torch.set_num_threads(threads), work(*task)), hear)
                tasks = 0
            torch.set_num_threads(self._threads(1))
        processes.share(tasks, 1, work, hear)

    def _threads(self, members: int) -> int:
        """Of each of the processes that compute for so many members side by side."""
        if not processes.may_fork():
            return torch.get_num_threads()
        return self.settings.threads or default_threads(members)

    def _refuse_of_another_run(self) -> None:
        """Refuse a folder, named after the run, that holds the measurements of another run of that name."""
        save, mine = self.settings.save, {_place(member.path) for member in self.members}
        digests = {member.digest for member in self.members}
        for name in RESULT_FILES:
            members = read_entry(save / name, "members")
            found = [row for row in members if isinstance(row, dict)] if isinstance(members, list) else []
            theirs = {_place(Path(str(row.get("path")))) for row in found}
            if found and not mine & theirs and not digests & {row.get("sha256_of_weights") for row in found}:
                problem = f"--save: {save / name} is a measurement of {found[0].get('path')}, another run of that name"
                raise InputError(f"{problem}; name another folder for this one by --save")

    def write(self, name: str, result: dict, options: dict[str, Any], keep: Keep = keep_modes) -> Path:
        """Write a result file: what was measured, on which members and data, by which protocol, and where.

        Values of other modes that an earlier call left there remain, if they are of the same weights and images.

        Args:
            name: of the file.
            result: what was measured.
            options: of the script; with the settings they are the protocol.
            keep: joins the result with an earlier one.
        """
        path = self.settings.save / name
        protocol = options | asdict(self.settings) | {"split": options.get("split") or self.splits}
        protocol = {key: _jsonable(value) for key, value in protocol.items() if key not in ("threads", "download")}
        data, corrupted = self.data.record, [part.name for part in self._parts.get("corrupted", [])]
        if corrupted:
            digests = json.dumps([(name, self.predictions.digests[name]) for name in corrupted])
            data = data | {"sha256_of_corrupted": hashlib.sha256(digests.encode()).hexdigest()}
        content = {
            "command": shlex.join(["python", *sys.argv]),
            "members": [member.describe() for member in self.members],
            "network": self.members[0].network,
            "trained": self.trained,
            "passes": training_passes([member.path for member in self.members]),
            "data": data,
            "protocol": protocol,
            "environment": self.environment,
            "result": result,
        }
        if made := {split: self._made_by(split, options["mode"]) for split in result if split in self._parts}:
            content["made_by"] = made
        with hold(path.parent):  # a program with other modes may end meanwhile
            write_json(path, with_earlier(path, content, keep))
        return path

    def _made_by(self, split: str, modes: list[str]) -> dict[str, Any]:
        """By mode, what made its numbers of a split; the logits may come from an earlier commit."""

        def commits(parts: list[Part]) -> list[str | None]:
            found = [commit for part in parts for commit in self.predictions.commits[part.name]]
            return list(dict.fromkeys(found))

        parts = {mode: self._parts[split] + (self._parts["ood"] if mode == "ood" else []) for mode in modes}
        return {m: made_by(m, self.environment) | {"commits_of_logits": commits(of)} for m, of in parts.items()}


def _place(path: Path) -> Path:
    """The run, or else the folder, that a checkpoint is in."""
    return (run_of(path) or path.parent).resolve()


def _jsonable(value: object) -> object:
    """A setting as JSON holds it."""
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, Path) else value
