"""Runs that suffer faults, and what becomes of them.

    python -m tests.faults.harness --faults 1000

Each scenario is a tiny run in a folder of its own that meets one to four faults: it is killed, its writes fail, its
files are damaged. Then the same command is given until it ends. Each session is a process, so that kills are real. It
is checked that

- a session that ends early says why in one line and has a status other than 0,
- it loses nothing that was saved before it,
- it changes no file if it refuses to go on, and what its line names as the way out is one,
- in the end weights, scores, masks, logs and summary are those of a run without faults, byte for byte.

Two scenarios in eight are killed between the best and the last checkpoint. One of them has sums that differ from
session to session, as on a GPU: it has to end, with the best checkpoint of its own best epoch.

Everything is drawn from --seed; --only N repeats one scenario.
"""

import argparse
import collections
import errno
import os
import pkgutil
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import main
import utils.checkpoint
import utils.ensemble
from models import create_model
from tests.test_ensemble import results
from utils import InputError, cli, distributed
from utils.checkpoint import load_checkpoint, pack_checkpoint
from utils.data import Data, ImageSet
from utils.datasets import load_data
from utils.files import write_atomically
from utils.member import LOG
from utils.run import CHECKPOINTS, PREVIOUS, Run

FLAGS = ["--width", "2", "--epochs", "4", "--batch_size", "16", "--seed", "13 17", "--sam", "--rho", "0.1"]
FLAGS += ["--flat_ratio", "0.4", "--initial_epochs", "2", "--average_from", "1", "--threads", "1"]
# Where a session can be killed or told to stop: before a call of one of these.
POINTS = (
    "utils.training.sharpbalance_step",
    "utils.member.predict",
    "utils.member.per_sample_fisher",
    "utils.ensemble.sharpness_aware_masks",
    "utils.member.digest",
    "utils.member.pack_checkpoint",
    "utils.member.save_checkpoint",
    "utils.member.write_atomically",
    "utils.member.write_array",
    "utils.ensemble.write_json",
    "utils.run.write_json",
    "utils.run.write_atomically",
    "utils.ensemble.evaluate_members",
    "os.fsync",
    "os.replace",
    "os.link",
    "utils.checkpoint.hashlib.sha256",
)
KINDS = (
    "killed at a random time",
    "killed at a named point",
    "killed within a write",
    "SIGTERM",
    "Ctrl-C",
    "failing write",
    "short write",
    "write that lies",
    "full disk",
    "flipped bit",
    "truncated file",
    "removed file",
    "swapped files",
    "clock jump",
    "dead rank",
    "killed after best, equal",
    "killed after best, other",
)
DAMAGE = KINDS[9:13]


class WrongError(Exception):
    """The run lost something, or ended without saying so."""


class Harness:
    """The reference run, and sessions to compare with it.

    Args:
        root: an empty folder for the runs.
    """

    def __init__(self, root: Path):
        self.root, self.counts = root, collections.defaultdict(collections.Counter)
        torch.set_num_threads(1)
        whole = load_data("digits")
        parts = {}
        for part, count in (("train", 40), ("val", 20), ("test", 30)):
            images = getattr(whole, part)
            few = images.images[:count].contiguous().numpy(), images.labels[:count].numpy().copy()
            parts[part] = ImageSet(*few, images.preprocessing)
        self.data = Data("digits", whole.info, **parts, mislabelled=whole.mislabelled[:40], record=whole.record)
        # The processes that are forked from this one inherit what it has compiled.
        calls = collections.Counter()
        originals = {point: count_calls(point, calls) for point in POINTS}
        before = time.monotonic()
        utils.ensemble.train_ensemble(Run(main.settings_of(self.args(root / "reference")), self.data))
        self.seconds, self.calls = time.monotonic() - before, calls
        for point, original in originals.items():
            patch(point, original)
        self.reference = self.outcome(root / "reference")
        self.bytes = sum(path.stat().st_size for path in (root / "reference").rglob("*") if path.is_file()) * 4

    def args(self, folder: Path, flags: tuple = ()) -> argparse.Namespace:
        return main.parse_args([*FLAGS, *flags, "--save_path", str(folder)])

    def outcome(self, folder: Path) -> dict:
        """What must be equal: all but the checkpoint that is kept in case, in which damage may be unnoticed."""
        return {name: value for name, value in results(folder).items() if "previous" not in name}

    def session(
        self, folder: Path, arm: Callable[[], None] = lambda: None, kill_after: float | None = None
    ) -> SimpleNamespace:
        """Give the command once, in a process of its own: exit status, error output, and whether the fault came."""
        return self.end(self.begin(folder, arm), kill_after)

    def begin(self, folder: Path, arm: Callable[[], None], environment: dict | None = None) -> SimpleNamespace:
        errors = self.root / f"errors_{environment['RANK'] if environment else 0}"
        fired = errors.with_suffix(".fired")
        fired.unlink(missing_ok=True)
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return SimpleNamespace(pid=pid, errors=errors, fired=fired)
        status = 99
        try:
            os.environ |= environment or {}
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            globals()["note_fault"] = fired.touch
            arm()
            flags = random.Random(folder.name).choice(((), ("--save_every", "0")))

            def train(args: argparse.Namespace) -> None:
                distributed.join(torch.device("cpu"), args.seed, args.save_path)
                utils.ensemble.train_ensemble(Run(main.settings_of(args), self.data))

            cli.run(train, self.args(folder, flags))
            status = 0
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def end(self, child: SimpleNamespace, kill_after: float | None = None, limit: float = 120) -> SimpleNamespace:
        started, child.killed = time.monotonic(), False
        while True:
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                break
            seconds = time.monotonic() - started
            if (kill_after is not None and seconds > kill_after) or seconds > limit:
                os.kill(child.pid, signal.SIGKILL)
                child.killed = True
                if seconds > limit:
                    raise WrongError(f"no end after {limit} s")
            time.sleep(0.002)
        child.status = os.waitstatus_to_exitcode(status)
        child.text = child.errors.read_text() if child.errors.exists() else ""
        child.fault_came = child.fired.exists() or (child.killed and child.status == -9)
        return child

    def progress(self, folder: Path) -> dict[int, tuple]:
        """How far the whole checkpoints of each member reach."""
        reached = {}
        for seed in (13, 17):
            reached[seed] = (0, 0)
            for path in (folder / f"seed_{seed}").glob("checkpoint*.tar"):
                try:
                    found = utils.checkpoint.load_checkpoint(path, ours=True)
                except InputError:
                    continue
                steps = (found.get("position") or {}).get("steps", 0)
                reached[seed] = max(reached[seed], (found["epoch"], steps))
        return reached

    def check_end(self, end: SimpleNamespace) -> None:
        """A status that says how it ended, and one line that says why, unless the process was killed."""
        noise = r"warning: |\[(rank\d+\]:\[)?[EW]|Exception raised from|frame #|<omitting|$"  # torch's, but the first
        lines = [line for line in end.text.splitlines() if not re.match(noise, line)]
        if end.status not in (0, 1, 2, 130, 143, -9) or "Traceback" in end.text:
            raise WrongError(f"status {end.status}: {end.text}")
        if end.status not in (0, -9) and not 1 <= len(lines) <= 2:
            raise WrongError(f"status {end.status} with the lines {lines}")

    def scenario(self, rng: random.Random, name: str) -> int:
        """One run that meets some faults. Returns how many came."""
        folder, came = self.root / name, 0
        for _ in range(rng.randint(1, 4)):
            kinds = KINDS[:15]
            kind = rng.choices(kinds, [1 if kind == "dead rank" else 3 for kind in kinds])[0]  # it takes seconds
            if kind in DAMAGE:
                if not (folder / "args.json").is_file():
                    continue
                originals = self.damage(rng, kind, folder)
                came += 1
                self.counts[kind][self.finish(folder, originals)] += 1
                self.begin_anew(rng, folder)
                continue
            before = self.progress(folder)
            end = self.dead_rank(rng, folder) if kind == "dead rank" else self.meet(rng, kind, folder)
            self.check_end(end)
            if not end.fault_came:
                continue
            came += 1
            after = self.progress(folder)
            if kind == "write that lies":  # it may lose what is written; the next session finds that
                self.counts[kind][self.finish(folder)] += 1
                self.begin_anew(rng, folder)
                continue
            if any(after[seed] < before[seed] for seed in before):
                raise WrongError(f"{kind}: from {before} back to {after}")
            status = {0: "not stopped by it", -9: "killed"}.get(end.status, f"ended with status {end.status}")
            self.counts[kind][status] += 1
        self.finish(folder)
        shutil.rmtree(folder)
        return came

    def after_best(self, rng: random.Random, name: str, kind: str) -> int:
        """One run that is killed several times between the best and the last checkpoint. Returns how often."""
        folder, came = self.root / name, 0
        drift = (lambda session: None) if kind.endswith("equal") else arm_drift
        for session in rng.sample(range(10**6), rng.randint(1, 4)):
            number = rng.randint(1, 4)
            end = self.session(folder, lambda s=session, n=number: (drift(s), arm_after_best(n)))
            self.check_end(end)
            if end.status not in (0, -9):
                raise WrongError(f"{kind}: refused to go on: {end.text}")
            came += end.fault_came
            self.counts[kind]["killed"] += end.fault_came
        if kind.endswith("equal"):
            self.finish(folder)
        else:
            end = self.session(folder, lambda: drift(10**6))
            if end.status:
                raise WrongError(f"{kind}: status {end.status} at its end: {end.text}")
            for member in folder.glob("seed_*"):
                last, best = (load_checkpoint(member / CHECKPOINTS[name], ours=True) for name in ("last", "best"))
                accuracies = last["log"][:, LOG.index("val_acc")].tolist()
                if best["epoch"] != max(i + 1 for i, value in enumerate(accuracies) if value == max(accuracies)):
                    raise WrongError(f"{kind}: best checkpoint of epoch {best['epoch'] - 1}, accuracies {accuracies}")
        shutil.rmtree(folder)
        return came

    def begin_anew(self, rng: random.Random, folder: Path) -> None:
        """The next fault meets the finished run, or one that is not finished."""
        if rng.random() < 0.5:
            shutil.rmtree(folder)
            self.session(folder, lambda: arm_kill(self.random_point(rng), signal.SIGKILL))

    def finish(self, folder: Path, originals: dict[Path, bytes] | None = None) -> str:
        """Give the command until it ends well, taking the way out where it refuses; compare the result."""
        outcome = "mended at the next start"
        for _ in range(6):
            before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            end = self.session(folder)
            self.check_end(end)
            if end.status == 0:
                if self.outcome(folder) != self.reference:
                    wrong = [name for name, value in self.outcome(folder).items() if self.reference[name] != value]
                    raise WrongError(f"another result: {wrong}; {end.text}")
                return outcome
            after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            changed = [path for path in before if after.get(path) != before[path] and path.name != "lock"]
            # A member that is not the refused one may have taken its previous checkpoint, or have been trained: that a
            # model_best.pth.tar is none is at times seen at the end only.
            changed = [path for path in changed if not re.search(r"\.tar|log\.jsonl|\.tmp|fisher|mask", path.name)]
            if end.status == 2 and changed:
                raise WrongError(f"refused, and changed {changed}: {end.text}")
            outcome = "refused, put back and gone on"
            if originals:
                for path, content in originals.items():
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(content)
                originals = None
                continue
            way_out = re.search(r"remove (\S+) to train", end.text)
            if not way_out:
                raise WrongError(f"refused without a fault in sight: {end.text}")
            shutil.rmtree(way_out.group(1))
        raise WrongError(f"no end: {end.text}")

    def damage(self, rng: random.Random, kind: str, folder: Path) -> dict[Path, bytes]:
        """Damage one file, or swap two. Returns what they were."""
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
        weights = [5 if path.suffix == ".tar" else 1 for path in files]
        first, second = rng.choices(files, weights, k=2)
        content = first.read_bytes()
        originals = {first: content}
        if kind == "removed file":
            first.unlink()
        elif kind == "truncated file":
            first.write_bytes(content[: rng.randrange(len(content))])
        elif kind == "flipped bit":
            place = rng.randrange(len(content))
            first.write_bytes(
                content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
            )
        else:
            other = second.read_bytes()
            originals[second] = other
            first.write_bytes(other)
            second.write_bytes(content)
        return originals

    def random_point(self, rng: random.Random) -> tuple[str, int]:
        point = rng.choice([point for point in POINTS if self.calls[point]])
        return point, rng.randint(1, self.calls[point])

    def meet(self, rng: random.Random, kind: str, folder: Path) -> SimpleNamespace:
        """One session with a fault."""
        point = self.random_point(rng)
        if kind == "killed at a random time":
            return self.session(folder, kill_after=rng.uniform(0, 1.2 * self.seconds))
        if kind in ("killed at a named point", "SIGTERM", "Ctrl-C"):
            number = {"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}.get(kind, signal.SIGKILL)
            if number != signal.SIGKILL:  # from where on signals are answered
                point = rng.choice(POINTS[:2]), rng.randint(1, 8)
            end = self.session(folder, lambda: arm_kill(point, number))
            if end.fault_came and end.status not in (-9, 128 + number):
                raise WrongError(f"{kind} at {point}: status {end.status}: {end.text}")
            return end
        if kind == "clock jump":
            end = self.session(folder, lambda: arm_clock(rng.uniform(-1e9, 1e9), rng.randint(1, 60)))
            if end.status:
                raise WrongError(f"clock jump: status {end.status}: {end.text}")
            for path in folder.rglob("*"):
                os.utime(path, (rng.uniform(0, 4e9),) * 2)
            return end
        number, code = rng.randint(1, 50), rng.choice((errno.ENOSPC, errno.EIO, errno.EDQUOT))
        if kind == "failing write" and rng.random() < 0.5:
            return self.session(
                folder, lambda: arm_error(rng.choice(("os.fsync", "os.replace", "os.link")), number, code)
            )
        room = rng.randint(0, self.bytes) if kind == "full disk" else None
        return self.session(folder, lambda: arm_write(kind, number, code, room, rng.random()))

    def dead_rank(self, rng: random.Random, folder: Path) -> SimpleNamespace:
        """Two or three ranks, one of which is killed at a named point; the others must end by themselves."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        world = rng.choice((2, 3))
        victim, (point, number) = rng.randrange(world), self.random_point(rng)
        ranks = []
        for rank in range(world):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "1"}
            shot = lambda rank=rank: rank == victim and arm_kill((point, max(1, number // 2)), signal.SIGKILL)  # noqa: E731
            ranks.append(self.begin(folder, shot, {name: str(value) for name, value in environment.items()}))
        ends = [self.end(rank) for rank in ranks]
        dead = ends[victim]
        if dead.fault_came and not (folder / "summary.json").exists():
            for end in ends:
                self.check_end(end)
                if end.status == 0 and victim != 0:
                    raise WrongError(f"rank {victim} was killed at {point}, another one ended well: {end.text}")
        return dead


def note_fault() -> None:
    """Tell the harness that the fault has come; each session has its own."""


def patch(name: str, value: object) -> object:
    """Put something else in the place of `module.attribute`; returns what was there."""
    owner, attribute = name.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner)
    before = getattr(owner, attribute, open)
    setattr(owner, attribute, value)
    return before


def count_calls(point: str, calls: collections.Counter) -> object:
    """Count the calls of a function; returns the function."""

    def counted(*args: object, **kwargs: object) -> object:
        calls[point] += 1
        return original(*args, **kwargs)

    original = patch(point, counted)
    return original


def before_call(point: str, number: int, fault: Callable[[], None]) -> None:
    """Let something happen before the n-th call."""
    calls = 0

    def faulty(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number:
            note_fault()
            fault()
        return original(*args, **kwargs)

    original = patch(point, faulty)


def arm_kill(point: tuple[str, int], number: int) -> None:
    """A signal before the n-th call."""
    before_call(*point, lambda: os.kill(os.getpid(), number))


def arm_error(point: str, number: int, code: int) -> None:
    """An OSError at the n-th call."""

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    before_call(point, number, fail)


def arm_after_best(number: int) -> None:
    """SIGKILL before a last checkpoint is written, for the n-th time that it is a best one as well."""
    calls, best = 0, False

    def write(path: Path, *rest: object) -> None:
        nonlocal calls, best
        calls += best and path.name == CHECKPOINTS["last"]
        if calls == number:
            note_fault()
            os.kill(os.getpid(), signal.SIGKILL)
        best = path.name == CHECKPOINTS["best"] or (best and path.name != CHECKPOINTS["last"])
        original(path, *rest)

    original = patch("utils.member.write_atomically", write)


def arm_drift(session: int) -> None:
    """Weights and validation accuracies after an epoch that differ from session to session."""

    def drifting(model: torch.nn.Module, *rest: object, **more: object) -> tuple[float, float]:
        result = original(model, *rest, **more)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
        return result

    def accuracy(*arguments: object) -> dict[str, torch.Tensor]:
        return {"nll": torch.ones(1), "correct": torch.rand(1, generator=generator)}

    generator = torch.Generator().manual_seed(session)
    original = patch("utils.member.train_epoch", drifting)
    patch("utils.member.per_sample", accuracy)


def arm_clock(jump: float, number: int) -> None:
    """From the n-th look on, the wall clock is elsewhere."""
    original = time.time

    def jumped() -> float:
        return original() + jump

    before_call("utils.training.sharpbalance_step", max(1, number // 4), lambda: patch("time.time", jumped))


def arm_write(kind: str, number: int, code: int, room: int | None, share: float) -> None:
    """The n-th file that is written gets a part of its content; or files do until the room is used up."""
    files, used = 0, 0
    original = open

    class Faulty:
        def __init__(self, file: object):
            self.file = file

        def __enter__(self) -> "Faulty":
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def write(self, content: bytes) -> int:
            nonlocal used
            used += len(content)
            if room is not None and used <= room:
                return self.file.write(content)
            if room is None and files != number:
                return self.file.write(content)
            note_fault()
            if kind != "failing write":
                self.file.write(content[: int(share * len(content))])
                self.file.flush()
            if kind == "write that lies":
                return len(content)
            if kind == "killed within a write":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(code, os.strerror(code))

    def faulty_open(path: object, mode: str = "r", **options: object) -> object:
        nonlocal files
        file = original(path, mode, **options)
        if "w" not in mode:
            return file
        # A disk that lies about a JSON file leaves a folder of unknown settings: that is refused, see `damage`.
        files += not (kind == "write that lies" and "seed_" not in str(path))
        return Faulty(file)

    patch("utils.files.open", faulty_open)


def run_faults(count: int, seed: int, only: int | None = None) -> dict[str, collections.Counter]:
    """Scenarios until that many faults have come, or a single one.

    Returns:
        How often each kind came, by what became of it.

    Raises:
        WrongError: naming the scenario.
    """
    came, number = 0, only or 0
    with tempfile.TemporaryDirectory() as root:
        harness = Harness(Path(root))
        while came < count:
            try:
                arguments = random.Random(f"{seed} {number}"), f"scenario_{number}"
                if number % 8 < 2:
                    came += harness.after_best(*arguments, KINDS[-1 - number % 8])
                else:
                    came += harness.scenario(*arguments)
            except WrongError as error:
                raise WrongError(f"--seed {seed} --only {number}: {error}") from None
            number += 1
            if only is not None:
                break
    return harness.counts


def kill_saves(count: int, seed: int) -> None:
    """Kill a process that saves a ResNet-18 of width 64 again and again, at random times.

    Raises:
        WrongError: if the last or the previous checkpoint is not whole, or if one that was there is lost.
    """
    rng = random.Random(seed)
    model = create_model("resnet18", 10, 64)
    state = {"state_dict": model.state_dict(), "optimizer": {n: p.data for n, p in model.named_parameters()}}
    with tempfile.TemporaryDirectory() as root:
        last, previous = Path(root) / CHECKPOINTS["last"], Path(root) / PREVIOUS
        epoch = 0
        for number in range(count):
            pid = os.fork()
            if not pid:
                while True:
                    epoch += 1
                    write_atomically(last, pack_checkpoint(state | {"epoch": epoch}), previous)
            time.sleep(rng.uniform(0.05, 1.5))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            found = [load_checkpoint(path, ours=True)["epoch"] for path in (last, previous) if path.exists()]
            # Between the link and the rename both names stand for the same file.
            if (
                (found and found[0] < epoch)
                or (epoch and not found)
                or (found[1:] and found[0] - found[1] not in (0, 1))
            ):
                raise WrongError(f"kill {number}: epochs {found} after {epoch}")
            epoch = found[0] if found else 0


def report(counts: dict[str, collections.Counter]) -> None:
    """Print the counts by kind."""
    total = 0
    for kind in KINDS:
        row = counts.get(kind, collections.Counter())
        total += sum(row.values())
        print(f"{kind:>24} {sum(row.values()):5d}   " + ", ".join(f"{n} {what}" for what, n in sorted(row.items())))
    print(f"{'all':>24} {total:5d}   0 results lost or wrong")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument(
        "--saves", type=int, default=200, help="kills while a large net is saved (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="what is drawn (default: %(default)s)")
    parser.add_argument("--only", type=int, help="number of the one scenario to run")
    options = parser.parse_args()
    np.seterr(all="ignore")
    try:
        report(run_faults(options.faults, options.seed, only=options.only))
        kill_saves(options.saves, options.seed)
        print(f"{options.saves} kills while a net of width 64 was saved: 0 lost")
    except WrongError as error:
        sys.exit(f"WRONG: {error}")
