"""Processes of this machine side by side: started, heard and ended as one.

On Linux they are forked from this process, and share what it has imported and read. That is safe as long as it has
started neither a pool of threads nor a GPU: scripts begin with one thread (`begin`) and fork before they compute.
Elsewhere, and where the work is on a GPU, each process starts the same command anew.
"""

import json
import os
import runpy
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from tqdm import tqdm

from utils import InputError, RunError, again, control_groups, out_of_memory

ROOT = Path(__file__).resolve().parent.parent
# The variable that holds where a process that started the same command anew sends its messages.
PIPE = "SHARPBALANCE_PIPE"
MEMORY_SHARE = 0.8  # of the free memory is planned with
# Of a control group: its limit, what is taken, and which line of memory.stat says what of that are files' contents.
GROUP_MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
KILL_SECONDS = 60  # after which a process that was asked to end is killed
ERRORS: dict[str, type[Exception]] = {error.__name__: error for error in (InputError, RunError, MemoryError)}

_pipe: int | None = None  # of a process that was forked
_may_fork = False


def begin() -> None:
    """Say that this process is a script's own: it may fork, so it keeps to one thread until it has."""
    global _may_fork
    _may_fork = sys.platform == "linux"
    if _may_fork:
        torch.set_num_threads(1)


def may_fork() -> bool:
    """Whether processes can be forked from this one."""
    return _may_fork and _pipe is None


def supervised() -> bool:
    """Whether this is a process that `run` has started."""
    return _pipe is not None or PIPE in os.environ


def free_memory() -> int:
    """Bytes that this process and its children may still take: of the machine, or of its control group."""
    try:
        lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
        free = next(1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:")
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder in control_groups("memory"):
        for limit, used, cached in GROUP_MEMORY:
            try:
                most, taken = (int((folder / name).read_text()) for name in (limit, used))
            except (OSError, ValueError):  # of the other version, or without a limit
                continue
            try:  # files that were read count as taken, though the system drops them when memory is asked for
                found = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                taken -= int(found[cached])
            except (OSError, ValueError, KeyError):
                pass
            free = min(free, max(0, most - taken))
    return free


def that_fit(count: int, size: float) -> int:
    """How many of `count` processes of `size` bytes each there is memory for, 1 or more."""
    return max(1, min(count, int(MEMORY_SHARE * free_memory() / size)))


def tell(kind: str, *values: Any) -> None:
    """Send a message to the process that started this one. If that has been killed, this one is asked to end."""
    pipe = _pipe if _pipe is not None else int(os.environ[PIPE])
    line = json.dumps([kind, *values]).encode() + b"\n"
    try:
        while line:
            line = line[os.write(pipe, line) :]
    except BrokenPipeError:
        os.kill(os.getpid(), signal.SIGTERM)


@dataclass
class _Child:
    """A process that was started."""

    number: int
    pid: int
    pipe: int
    text: bytes = b""
    stopped: bool = False  # by a signal, after it had saved its state
    error: Exception | None = None
    status: int | None = None  # None while it runs

    def ask(self) -> None:
        """Ask it to end."""
        if self.status is None:
            os.kill(self.pid, signal.SIGTERM)


@dataclass
class _Group:
    """The processes of one call of `run`, and the signals that have come since it began."""

    children: list[_Child] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on: the processes ignore Ctrl-C, which reaches them all, and end on SIGTERM."""
        self.signals.append(number)
        for child in self.children:
            child.ask()


def run(
    count: int,
    work: Callable[[int], object] | None,
    hear: Callable[..., object] = lambda number, kind, *values: None,
    variables: dict[str, str] | None = None,
    name: Callable[[int], str] = lambda number: f"process {number}",
) -> None:
    """Run work(0) to work(count - 1) side by side, each in a process of its own, until all have ended.

    Where one fails the others are asked to end. SIGTERM and Ctrl-C are passed on; once all have ended, one line says
    how to resume if all have saved their state, and this process ends with 128 + the signal's number.

    Args:
        count: how many.
        work: what each does, called with its number; None to start this command anew, which calls `adopt`.
        hear: called here with a process's number and what it gives to `tell`.
        variables: of their environments, besides RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE.
        name: what messages call a process.

    Raises:
        InputError, RunError, MemoryError: that of the process that failed first, or that it was ended by a signal.
        KeyboardInterrupt: if Ctrl-C ended them before there was a state to save.
    """
    group = _Group()
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.signal(number, group.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in range(count):
            whole = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            group.children.append(_start(group, work, {k: str(v) for k, v in whole.items()} | (variables or {})))
        if group.signals:  # before the last of them was there
            group.handle(group.signals.pop(0), None)
        failed = _listen(group.children, hear, group.signals)
    finally:
        for child in group.children:
            child.ask()
        for child in group.children:
            _reap(child)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    _end(group, failed, name)


def _end(group: _Group, failed: _Child | None, name: Callable[[int], str]) -> None:
    """End as the processes did; return where all is done."""
    if failed is not None and failed.error is not None:
        raise failed.error
    if group.signals and any(child.status for child in group.children):
        first = group.signals[0]
        if all(child.stopped or child.status == 0 for child in group.children):
            say_stopped(first)
        elif first == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + first)
    if failed is not None:
        if failed.status > 0:
            sys.exit(failed.status)  # it has said why
        problem = f"{name(failed.number)} was ended by signal {-failed.status}"
        if failed.status == -signal.SIGKILL:
            problem += ", as a system does that runs out of memory"
        raise RunError(f"{problem}; {again()} to resume")


def say_stopped(number: int) -> None:
    """Say that a signal has ended the work and that nothing is lost."""
    name = signal.Signals(number).name.replace("SIGINT", "Ctrl-C")
    print(f"stopped by {name}; all work is saved: {again()} to resume", file=sys.stderr)


def adopt(work: Callable[[int], object]) -> NoReturn:
    """Do the work of a process that `run` has started by this command, and end."""
    global _pipe
    _pipe = int(os.environ.pop(PIPE))
    os.set_inheritable(_pipe, False)
    _work(int(os.environ["RANK"]), work)


def _start(group: _Group, work: Callable[[int], object] | None, variables: dict[str, str]) -> _Child:
    """Start a process. In that process this never returns."""
    global _pipe
    sys.stdout.flush()
    sys.stderr.flush()
    ours, theirs = os.pipe()
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        pid = os.fork()
        if pid:
            os.close(theirs)
            return _Child(int(variables["RANK"]), pid, ours)
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            # What another process holds open would not end with this one.
            for pipe in [ours, *(child.pipe for child in group.children)]:
                os.close(pipe)
            os.environ.update(variables)
            if work is not None:
                _pipe = theirs
                _work(int(variables["RANK"]), work)
            os.environ[PIPE] = str(theirs)
            os.set_inheritable(theirs, True)
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def _work(number: int, work: Callable[[int], object]) -> NoReturn:
    """Do the work, report how it ended, and end without what an interpreter does at its exit."""
    status, told = 0, None
    try:
        work(number)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except (InputError, RunError) as error:
        told = type(error).__name__, str(error)
    except OSError as error:
        told = "RunError", f"{error.filename or 'a file'}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            told = "MemoryError", "out of memory"
        else:
            traceback.print_exc()
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        try:
            if told:
                tell("error", *told)
                status = 2 if told[0] == "InputError" else 1
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _listen(children: list[_Child], hear: Callable[..., object], signals: list[int]) -> _Child | None:
    """Hear the processes until all have ended. Returns the one that failed first; the others are then asked to end."""
    failed, deadline = None, float("inf")
    with selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.pipe, selectors.EVENT_READ, child)
        while selector.get_map():
            for key, _ in selector.select(timeout=1):
                child = key.data
                if content := os.read(child.pipe, 2**16):
                    _hear(child, content, hear)
                    continue
                selector.unregister(child.pipe)
                _reap(child)
                if child.status and failed is None and not signals:
                    failed, deadline = child, time.monotonic() + KILL_SECONDS
                    for other in children:
                        other.ask()
            if time.monotonic() > deadline:
                for child in children:
                    if child.status is None:
                        os.kill(child.pid, signal.SIGKILL)
    return failed or next((child for child in children if child.error), None)


def _hear(child: _Child, content: bytes, hear: Callable[..., object]) -> None:
    """Take in what a process has sent."""
    *lines, child.text = (child.text + content).split(b"\n")
    for line in lines:
        try:
            kind, *values = json.loads(line)
        except ValueError:  # it was killed within a line
            continue
        if kind == "error":
            child.error = ERRORS[values[0]](values[1])
        elif kind == "stopped":
            child.stopped = True
        else:
            hear(child.number, kind, *values)


def _reap(child: _Child) -> None:
    """Wait for the end of a process."""
    if child.status is None:
        _, status = os.waitpid(child.pid, 0)
        child.status = os.waitstatus_to_exitcode(status)
        os.close(child.pipe)


def share(
    tasks: int,
    count: int,
    work: Callable[[int, Callable[..., object]], object],
    hear: Callable[..., object] = lambda kind, *values: None,
) -> None:
    """Do `tasks` tasks in `count` processes, each of which takes the next one when it is free.

    Args:
        tasks: how many.
        count: of processes; with one, and where none can be forked, the tasks are done here.
        work: called with the number of a task and a function that calls `hear` here.
        hear: called here with what tasks report: a kind, and values that JSON holds.

    Raises:
        InputError, RunError, MemoryError: as `run`.
    """
    count = min(count, tasks)
    if count < 2 or not may_fork():
        for task in range(tasks):
            work(task, hear)
        return
    # A file whose place the processes share; a pipe would hold 16,384 tasks, and the next one would wait for ever.
    with tempfile.TemporaryFile() as queue:
        queue.write(b"".join(task.to_bytes(4, "big") for task in range(tasks)))
        queue.seek(0)

        def some(number: int) -> None:
            while task := os.read(queue.fileno(), 4):  # a whole one, or at their end nothing
                work(int.from_bytes(task, "big"), tell)

        run(count, some, lambda number, kind, *values: hear(kind, *values))


def call(command: list[str], log: Path | None) -> int:
    """Run a script of this repository as `python <command>` does, forked from this process. Returns its exit status.

    Its output goes to the end of a log file, where one is given.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            if log:
                file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                for stream in (1, 2):
                    os.dup2(file, stream)
            sys.argv, sys.orig_argv = command, [sys.executable, *command]
            runpy.run_path(command[0], run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)
    interrupted = False
    while True:
        try:
            _, status = os.waitpid(pid, 0)
            break
        except KeyboardInterrupt:  # which the script has got as well
            interrupted = True
    if interrupted:
        raise KeyboardInterrupt
    return os.waitstatus_to_exitcode(status)


def run_script(words: list[Any], log: Path | None = None, jobs: int = 1) -> None:
    """Run a command of this repository, forked where that is safe; its output goes to a log file, or to the terminal.

    Args:
        words: of the command, as python takes them.
        log: the file.
        jobs: how many run side by side; with several each has one thread.

    Raises:
        InputError: if it ended with status 2.
        RunError: if it ended with another status than 0.
    """
    script = next(str(word) for word in words if str(word).endswith(".py"))
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
    # As one would type it, since the name goes into result files.
    command = [sys.executable, *(os.path.relpath(ROOT / word) if word == script else str(word) for word in words)]
    if jobs == 1 and words[0] == script and may_fork():
        status = call(command[1:], log)  # without importing everything anew
    else:
        variables = os.environ | ({"OMP_NUM_THREADS": "1"} if jobs > 1 else {})
        with log.open("ab") if log else nullcontext() as file:
            status = subprocess.run(command, env=variables, stdout=file, stderr=file).returncode
    if status:
        kind = InputError if status == 2 else RunError
        raise kind(f"{script} ended with status {status}" + f"; see {log}" * bool(log))


class Progress:
    """One bar for the whole run on a terminal, and a line for each epoch and member everywhere.

    The processes of --jobs send what they have done to the one that started them, which shows it. Under torchrun rank 0
    has the bar: it trains as many members as any, so that its time left is the run's.
    """

    HEADER = "epoch   seed      lr  train loss  train acc  val loss  val acc  SAM share     time     left"

    def __init__(self) -> None:
        self.done, self.bar = 0, None
        self.left: dict[int, float] = {}  # by process, in forward-backward passes of one image

    def hear(self, process: int, kind: str, *values: Any) -> None:
        """What a process of --jobs has done."""
        if kind == "expect":
            self._expect(process, *values)
        elif kind == "advance":
            self._advance(process, *values)
        else:
            self._print(*values)

    def expect(self, passes: float) -> None:
        """How much is left for this process, in forward-backward passes of one image."""
        self._call("expect", passes)

    def advance(self, passes: int) -> None:
        """Count passes that were made."""
        self._call("advance", passes)

    def print(self, seed: int, line: dict) -> None:
        """The line of a member's epoch, as log.jsonl holds it, with the time left."""
        self._call("print", seed, line)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()

    def _call(self, kind: str, *values: Any) -> None:
        if supervised():
            tell(kind, *values)
        else:
            self.hear(0, kind, *values)

    def _expect(self, process: int, passes: float) -> None:
        self.left[process] = passes
        if self.bar is None:
            self.started = time.monotonic()
            form = "{desc} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left"
            rank = dist.get_rank() if dist.is_initialized() else 0
            hidden = not sys.stderr.isatty() or rank > 0
            self.bar = tqdm(disable=hidden, desc="training", unit="img", dynamic_ncols=True, bar_format=form)
            if passes and not rank:
                self._write(self.HEADER)
        self.bar.total = self.done + sum(self.left.values())
        self.bar.refresh()

    def _advance(self, process: int, passes: int) -> None:
        self.done += passes
        self.left[process] -= passes
        self.bar.update(passes)

    def _print(self, seed: int, line: dict) -> None:
        left = (time.monotonic() - self.started) / max(self.done, 1) * max(sum(self.left.values()), 0)
        self._write(
            f"{line['epoch']:5d} {seed:6d} {line['lr']:7.4g}  {line['train_loss']:10.4f}  {line['train_acc']:8.2%}"
            f"  {line['val_loss']:8.4f}  {line['val_acc']:7.2%}  {line['sam_share']:8.1%}"
            f"  {line['seconds']:6.1f}s  {tqdm.format_interval(left):>7}"
        )

    @staticmethod
    def _write(text: str) -> None:
        tqdm.write(text)
        sys.stdout.flush()  # so that a log file shows it at once
