"""A run's folder: its settings, its lock, the environment it was trained in, and how it stops.

A run is one folder (--save_path): args.json, environment.json, command.txt, summary.json, and seed_<seed>/ for each
member (`utils.member`); once it has been measured, temperatures.json.
"""

import hashlib
import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from utils import InputError, RunError, distributed, first_line, processes
from utils.data import Data
from utils.events import FILES as EVENTS
from utils.files import broken_link, fcntl, hold, load_json, read_entry, without_folder, write_atomically, write_json
from utils.partition import DRAWS, SCORE_FREE

TEMPERATURES = "temperatures.json"
RUN_FILES = ("args.json", "environment.json", "command.txt", "summary.json", TEMPERATURES)
# In a member's folder: the file of each choice of --checkpoint; that of the epoch before the last, and that of an epoch
# that is not finished.
CHECKPOINTS = {"last": "checkpoint.pth.tar", "best": "model_best.pth.tar", "averaged": "model_averaged.pth.tar"}
PREVIOUS, PARTIAL = "checkpoint_previous.pth.tar", "checkpoint_partial.pth.tar"
MEMBER_FILES = (*CHECKPOINTS.values(), PREVIOUS, PARTIAL, "log.jsonl", "fisher.npy", "sam_mask.npy")
# Settings that do not change what is computed: they may differ when a run is resumed. Data are compared by their
# content, not by their path. `draws` is what the run began with; the last four are of earlier versions.
FREE_SETTINGS = ("data_path", "train_idx_path", "val_idx_path", "download", "device", "threads", "jobs", "save_path")
FREE_SETTINGS += ("save_every", "tensorboard", "draws", "resume", "checkpoint", "overwrite", "evaluate")
# Settings that earlier versions lack, and what these versions did. They count where they differ from it.
OLD_DEFAULTS = {"match_size": None, "augmentation": "standard", "label_noise": 0.0, "average_from": None}
OLD_DEFAULTS |= {"optimizer": "sgd", "warmup_epochs": 0, "label_smoothing": 0.0, "clip_norm": None, "init_from": None}
OLD_DEFAULTS |= {"initial_method": "sam", "image_size": None}
# What of the environment a run may go on without, though the last bits of floats, or the code, differ then.
MACHINE, CODE = ("torch", "device", "cpu", "threads"), "commit"
LATE_SECONDS = 90  # NFS holds for 30 to 60 seconds that a file is not there


@dataclass(frozen=True)
class Settings:
    """All settings of a run, by the names of main.py's options, which explain them."""

    data: str
    data_path: Path
    image_size: int | None
    train_idx_path: Path | None
    val_idx_path: Path | None
    download: bool
    device: str
    threads: int | None
    model: str
    width: int
    seed: list[int]
    sam: bool
    rho: float
    sam_adaptive: bool
    flat_ratio: float
    initial_epochs: int
    initial_method: str
    partition: str
    unselected: str | None
    match_size: str | None
    bn_perturbed: str
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    schedule: str
    optimizer: str
    warmup_epochs: int
    label_smoothing: float
    clip_norm: float | None
    init_from: str | None
    augmentation: str
    label_noise: float
    average_from: int | None
    amp: str
    save_path: Path
    save_every: float
    tensorboard: bool
    jobs: str | int | None

    @property
    def method(self) -> str:
        """deep_ensemble, deep_ensemble_sam or sharpbalance."""
        if not self.sam:
            return "deep_ensemble"
        return "sharpbalance" if self.flat_ratio else "deep_ensemble_sam"

    def share_of_sam(self, epoch: int) -> float:
        """The share of the samples that an epoch trains with SAM, as long as none are assigned: 0 or 1."""
        return float(self.sam and (self.initial_method == "sam" or epoch >= self.initial_epochs))

    def recorded(self) -> dict[str, Any]:
        """The settings as JSON holds them; where sets are drawn, also by which generator."""
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
        return settings | ({"draws": DRAWS} if self.partition in SCORE_FREE else {})


def _without_effect(settings: dict[str, Any]) -> set[str]:
    """The settings that change nothing beside the others."""
    sets = set() if settings.get("flat_ratio") else {"initial_epochs", "partition", "unselected", "match_size"}
    if settings.get("initial_method") == "sgd":  # late SAM
        sets.discard("initial_epochs")
    momentum = {"momentum"} if settings.get("optimizer") == "adamw" else set()
    return {*sets, *momentum, *(() if settings.get("sam") else ("rho", "sam_adaptive", "bn_perturbed"))}


def current_settings(recorded: dict[str, Any]) -> dict[str, Any]:
    """Settings that any version recorded, by today's names.

    Earlier versions had --select beside --partition, and a --match_size that was true or false.
    """
    settings = OLD_DEFAULTS | recorded
    if "select" in recorded:
        select, reading = settings.pop("select"), settings["partition"]
        settings["match_size"] = reading if settings["match_size"] else None
        settings["partition"] = {"flattest": "released", "sharpest": "paper", None: "released"}.get(select, select)
        if select in SCORE_FREE and not settings["match_size"]:
            settings["unselected"] = None
    return settings


def _read_recorded(folder: Path) -> dict[str, Any]:
    try:
        settings = load_json(folder / "args.json")
    except FileNotFoundError as error:
        raise InputError(f"{folder}: not a run of main.py, which has an args.json; give only such folders") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'args.json'}: cannot be read ({error})") from error
    seeds = settings.get("seed") if isinstance(settings, dict) else None
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int and 0 <= s < 2**32 for s in seeds):
        raise InputError(f"{folder / 'args.json'}: not the settings of a run: it holds no list of seeds")
    return settings


def read_settings(folder: Path) -> dict[str, Any]:
    """The args.json of a run, by today's names.

    Raises:
        InputError: if it is not readable or not what main.py writes.
    """
    try:
        return current_settings(_read_recorded(folder))
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'args.json'}: not the settings of a run ({error} is missing)") from error


def check_known(folder: Path, recorded: dict[str, Any]) -> None:
    """Refuse a run that has settings of a newer version: what they mean is not known here.

    Raises:
        InputError: naming args.json, the settings and the commit that it was trained with.
    """
    known = {*Settings.__dataclass_fields__, *FREE_SETTINGS}
    unknown = [f"{name} {_words(value)}" for name, value in recorded.items() if name not in known and value is not None]
    if unknown:
        problem = f"{folder / 'args.json'}: made by another version, whose settings are not known here"
        raise InputError(f"{problem} ({', '.join(unknown)}); use the version that made it{commit_of(folder)}")


def commit_of(folder: Path) -> str:
    """The commit that a run was begun with, as the end of a sentence; empty where it is not known."""
    commit = read_entry(folder / "environment.json", "commit")
    return f", commit {commit}" if isinstance(commit, str) else ""


def begun_by_this_job(folder: Path) -> bool:
    """Whether --overwrite began this run in the job, or under the torchrun, that now starts the same command again."""
    job = read_entry(folder / "environment.json", "overwritten_by")
    return isinstance(job, list) and any(name in job for name in distributed.job())


@contextmanager
def relative_paths(run: Path | None, **paths: Path | None) -> Iterator[None]:
    """Say in an error about a relative path what it is relative to, and whether a run's args.json named it.

    Args:
        run: the folder of the run whose settings are used, if there is one.
        paths: by the names of their options.
    """
    try:
        yield
    except InputError as error:
        recorded = read_settings(run) if run and (run / "args.json").is_file() else {}
        for name, path in paths.items():
            if path is None or path.is_absolute() or str(path) not in str(error):
                continue
            place = f"--{name} {path} is relative to {Path.cwd()}"
            if str(path) == recorded.get(name):
                raise InputError(f"{error}; {place}, and comes from {run / 'args.json'}") from error
            if not os.path.exists(path):
                raise InputError(f"{error}; {place}") from error
        raise


def run_of(path: Path) -> Path | None:
    """The run folder that a path of --resume is or lies in."""
    places = (path, path.parent, path.parent.parent)
    return next((folder for folder in places if os.path.isfile(folder / "args.json")), None)


def training_passes(paths: list[Path]) -> float | None:
    """The forward-backward passes that a member's training took, over those of plain training by as many epochs.

    A sample trained with SAM takes two, one that is scored one more; mean over members. None where a log is missing.

    Args:
        paths: checkpoint files.
    """
    found = []
    for folder in {path.parent for path in paths}:
        try:
            lines = (folder / "log.jsonl").read_text().splitlines()
            shares = [float(json.loads(line)["sam_share"]) for line in lines]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None
        found.append(1 + (sum(shares) + (folder / "fisher.npy").is_file()) / max(len(shares), 1))
    return sum(found) / len(found)


def find_checkpoints(paths: list[Path], which: str | None) -> list[Path]:
    """The checkpoint files that --resume stands for: a run folder for all its members, a member folder for itself.

    Args:
        paths: run folders, member folders or checkpoint files.
        which: a key of `CHECKPOINTS`, for folders; None, where none is asked for, is the best.

    Raises:
        InputError: naming the path that is none of these, the member whose checkpoint is missing, or the file that is
            not the checkpoint that is asked for.
    """
    name, found = CHECKPOINTS[which or "best"], []
    for path in paths:
        if path.is_file():
            if which and path.name != name:
                kind = next((kind for kind, of in CHECKPOINTS.items() if of == path.name), None)
                what = f"'{kind}'" if kind else f"named otherwise than {name}, and is taken as it is"
                way_out = "leave --checkpoint out, or give the folder that it is in"
                raise InputError(f"--checkpoint {which}: chooses in folders, and --resume {path} is {what}; {way_out}")
            found.append(path)
            continue
        if not path.is_dir():
            raise InputError(f"--resume {path}: no such file or folder")
        folders = [path]
        if (path / "args.json").is_file():
            folders = [path / f"seed_{seed}" for seed in read_settings(path)["seed"]]
        for folder in folders:
            if not (folder / name).is_file():
                way_out = "give a run of main.py or a checkpoint" + ", of --average_from" * (which == "averaged")
                raise InputError(f"--resume {path}: {folder / name} is missing; {way_out}")
            found.append(folder / name)
    return found


def keep_temperature(folder: Path, record: dict[str, Any]) -> None:
    """Add a fitted temperature to a run's temperatures.json, in the place of one of the same members and average.

    Args:
        folder: of the run.
        record: `weights`, the sorted digests of the members; `average`, as of `utils.metrics.ensemble_log_probs`;
            `temperature`; and what made it.

    Raises:
        RunError: if it cannot be written.
    """
    with hold(folder):
        kept = kept_temperatures(folder)
        others = [one for one in kept if any(one[key] != record[key] for key in ("weights", "average"))]
        write_json(folder / TEMPERATURES, {"temperatures": [*others, record]})


def kept_temperatures(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's temperatures.json; those that are not what `keep_temperature` writes are left out."""
    records = read_entry(folder / TEMPERATURES, "temperatures")
    kinds = {"weights": list, "average": str, "temperature": float}
    records = [one for one in records if isinstance(one, dict)] if isinstance(records, list) else []
    records = [one for one in records if all(type(one.get(key)) is kind for key, kind in kinds.items())]
    return [one for one in records if 0 < one["temperature"] < float("inf")]


def environment(device: torch.device) -> dict:
    """Versions, hardware and the repository's commit."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": distributed.cpu_kind(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        # Of training and predictions; sharpness, Hessian, scores and NTK never use it.
        "tf32": device.type == "cuda" and torch.backends.cudnn.conv.fp32_precision == "tf32",
    }


def _commit() -> str | None:
    """The commit that holds this code; None without git, and where only a repository around it is found."""
    git = ["git", "-C", str(Path(__file__).parent)]
    # A git hook sets GIT_DIR and the like, to a repository of its own.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def call(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([*git, *words], capture_output=True, text=True, env=variables)

    try:
        if call("ls-files", "--error-unmatch", Path(__file__).name).returncode:
            return None
        commit = call("describe", "--always").stdout.strip()
        # Results do not make a commit dirty: measuring itself changes them.
        dirty = call("diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)results").returncode
    except OSError:
        return None
    return commit + "-dirty" * bool(dirty) if commit else None


def _is_ours(name: str) -> bool:
    """Whether a file in a member's folder is one that training writes."""
    return name.removesuffix(".tmp") in MEMBER_FILES or name.startswith(EVENTS)


class Run:
    """A run that is trained: what its members share.

    Args:
        settings: of the run.
        data: its data set, on the training device.
        overwrite: whether `open` deletes a run that the folder holds.
    """

    def __init__(self, settings: Settings, data: Data, overwrite: bool = False):
        self.settings, self.data, self.folder, self.overwrite = settings, data, settings.save_path, overwrite
        self.recorded = settings.recorded()  # once the folder is open: what its args.json holds
        self.signals, self.progress = Signals(), processes.Progress()

    @property
    def digest(self) -> str:
        """SHA-256 of what a member depends on besides its seed; its mask shows the seeds of the others."""
        settings = {name: value for name, value in self.recorded.items() if name not in (*FREE_SETTINGS, "seed")}
        for name, default in OLD_DEFAULTS.items():
            if settings.get(name) == default or settings.get(name) is False:  # False: the old form of match_size
                settings.pop(name, None)
        settings["data"] = self.data.record["sha256_of_arrays_and_split"]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the folder: create it, or check that what it holds is this run.

        Rank 0 creates and locks it; the others wait for that.

        Raises:
            InputError: naming the settings that differ, the process that trains in it, or if it is something else.
        """
        folder = self.folder
        with self.signals:
            if distributed.rank():
                distributed.barrier()
                if not _appears(folder / "args.json"):
                    raise InputError(f"--save_path {folder}: rank {distributed.rank()} does not see rank 0's folder")
                self.recorded = _read_recorded(folder)
                yield
                return
            known = {"args.json", "args.json.tmp", "lock"}
            strange = folder.is_dir() and {path.name for path in folder.iterdir()} - known
            if strange and not (folder / "args.json").is_file():
                raise InputError(f"--save_path {folder}: not empty and not a run of main.py; name another folder")
            with locked(folder):
                self._prepare()
                distributed.barrier()
                yield

    def _prepare(self) -> None:
        folder, args_file = self.folder, self.folder / "args.json"
        if args_file.is_file() and self.overwrite:
            self._delete()
        if args_file.is_file():
            self.check_same()
        else:
            write_json(args_file, self.recorded)
        for name in RUN_FILES:  # left by a write that was killed
            (folder / f"{name}.tmp").unlink(missing_ok=True)
        about = environment(self.data.train.device)
        if not (folder / "environment.json").is_file():
            about |= {"data": self.data.record}
            if self.overwrite:
                about["overwritten_by"] = distributed.job()
            write_json(folder / "environment.json", about)
            command = shlex.join(["python", *sys.argv]) + "\n"
            write_atomically(folder / "command.txt", command.encode("utf-8", "surrogateescape"))
        elif not (folder / "summary.json").is_file():
            self._record_change(about)

    def _delete(self) -> None:
        """Delete a run's files; of a member's folder that is a link the files, not the link."""
        folder, files = self.folder, []
        members = sorted(folder.glob("seed_*"))
        for member in members:
            try:
                files += [path for path in member.iterdir() if _is_ours(path.name)]
            except OSError as error:
                reason = broken_link(member) or f"{member} cannot be read ({error.strerror})"
                raise InputError(f"--overwrite: {reason}; nothing was deleted: remove it, and re-run") from error
        for file in files:
            file.unlink()
        for member in members:
            if not member.is_symlink() and not any(member.iterdir()):
                member.rmdir()
        for name in reversed(RUN_FILES):  # the settings last: until then the folder is recognisable as a run
            (folder / name).unlink(missing_ok=True)

    def _record_change(self, about: dict[str, Any]) -> None:
        """Where a run goes on with another machine, threads or code, add that to environment.json, and say so."""
        path = self.folder / "environment.json"
        content = load_json(path)
        later = content.get("resumed_with", [])
        before = later[-1] if isinstance(later, list) and later and isinstance(later[-1], dict) else content
        # Earlier versions did not record everything.
        changed = [name for name in (*MACHINE, CODE) if before.get(name, about[name]) != about[name]]
        if not changed:
            return
        write_json(path, content | {"resumed_with": [*(later if before is not content else []), about]})
        what = ", ".join(f"{name} {about[name]} instead of {before[name]}" for name in changed)
        text = f"note: the run goes on with {what}; environment.json has both"
        if set(changed) & set(MACHINE):
            text += "; results are the same, bit for bit, on one kind of CPU, one version of torch and one number of "
            text += "threads only"
        print(text, file=sys.stderr)

    def check_same(self) -> None:
        """Refuse a folder that holds a run of other settings or data.

        Raises:
            InputError: naming what differs.
        """
        way_out = "give the same settings to resume it, another --save_path, or --overwrite to start anew"
        before, here = read_settings(self.folder), self.settings.recorded()
        check_known(self.folder, before)
        free = {*FREE_SETTINGS, *(_without_effect(before) & _without_effect(here))}
        differ = [
            f"--{name} {_words(value)} here, {_words(before.get(name))} there"
            for name, value in here.items()
            if name not in free and without_folder(before.get(name)) != without_folder(value)
        ]
        if differ:
            raise InputError(f"--save_path {self.folder}: a run of other settings ({'; '.join(differ)}); {way_out}")
        self.recorded = _read_recorded(self.folder)
        key, path = "sha256_of_arrays_and_split", self.folder / "environment.json"
        try:
            data_before = load_json(path)["data"][key]
        except FileNotFoundError:
            return  # stopped before it was written: it is written now
        except (OSError, ValueError, KeyError, TypeError) as error:
            way_out = "restore it, or remove it if the data are those that the run began with"
            raise InputError(f"{path}: damaged ({first_line(error)}); {way_out}") from error
        if data_before != self.data.record[key]:
            what = "the images or their split are not those that the run began with"
            raise InputError(f"--data_path: {what}, see {path}")


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


class Stopped(SystemExit):
    """A signal ended the run after its state was saved; the code is 128 + the signal's number."""


class Signals:
    """Within this context SIGTERM and Ctrl-C raise `Stopped`, and one line says how to resume."""

    def __init__(self) -> None:
        self._received, self._deferred = 0, False

    def __enter__(self) -> "Signals":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            # Ctrl-C reaches all processes of a terminal; the one that started this one passes it on as SIGTERM.
            numbers = (signal.SIGTERM,) if processes.supervised() else (signal.SIGTERM, signal.SIGINT)
            self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Stopped):
            if processes.supervised():
                processes.tell("stopped")
            else:
                processes.say_stopped(self._received)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Hold signals back until the end, or until `check` is called, around what must not be interrupted."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.check()

    def check(self) -> None:
        """Raise `Stopped` if a signal has come."""
        if self._received:
            raise Stopped(128 + self._received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._received:  # torchrun and schedulers send it several times
            self._received = number
            if not self._deferred:
                self.check()


def _appears(path: Path) -> bool:
    """Whether a file is there, or is seen within some seconds: another machine may have written it."""
    for _ in range(int(LATE_SECONDS)):
        if path.is_file():
            return True
        time.sleep(1)
    return path.is_file()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder, created if need be, so that no second run trains in it.

    The file `lock` is locked by the operating system, which releases it when the process ends, however it ends. Host,
    process and the file's own inode number are written into it: for the message, and for file systems whose locks do
    not reach other machines. A lock that a dead process of this host left is taken over, and so is one that came with a
    copy of the folder, where the file has another inode number.

    Raises:
        InputError: if the folder cannot be created, if another process holds it, or if one of another host did not
            release it.
    """
    if fcntl is None:
        raise InputError("training on Windows requires WSL, since a run locks its folder as Unix does; see INSTALL.md")
    path = folder / "lock"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", errors="replace")  # noqa: SIM115, closed by the `with` below
        except OSError as error:
            reason = broken_link(folder) or f"cannot be created ({error.strerror})"
            raise InputError(f"--save_path {folder}: {reason}; name another folder") from error
        held = reaches = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = False
        except BlockingIOError:
            pass
        except OSError:
            held = reaches = False  # a file system without locks: what is written in the file has to do
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
        refusal, way_out = f"--save_path {folder}: process {process} on host {host} ", ""
        if distributed.started_many_times():
            way_out = "; where srun or mpirun started this command once for each task, start it through torchrun, "
            way_out += "which shares the members out (docs/CLUSTER.md)"
        if held or (not reaches and host == me and _alive(process)):
            raise InputError(refusal + "is training in it; wait for it to end, or name another folder" + way_out)
        if host not in ("?", me) and written == str(number):
            problem = f"began a run in it and did not end it; if it is dead, remove {path}"
            raise InputError(refusal + problem + way_out)
        try:
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"{me} {os.getpid()} {number}\n".encode())
        except OSError as error:
            raise RunError(f"{path}: could not be written ({error.strerror}); free some space") from error
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
