"""Device, threads and ranks. Without torchrun there is one rank, and the collective calls do nothing.

Members are independent except for one exchange of scores: rank r of K trains the members r, r + K, ...
"""

import ctypes
import logging
import math
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from utils import InputError, RunError, first_line

# Ranks start together; later they wait for slower ones as long as it takes, and the watch checks that these are alive.
START, FOREVER = timedelta(minutes=5), timedelta(days=365)
PULSE_SECONDS = 0.5
SILENCE = timedelta(seconds=30)

# Variables with the number of a scheduler's job, which a restarted job keeps; with the number of tasks of a launcher.
JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")
TASKS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE")

_group: dist.ProcessGroup | None = None  # its calls wait for ever
_watch: "Watch | None" = None


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_kind() -> str:
    """The CPU's model, and the instructions that torch uses: between kinds floats differ in their last bits."""
    names = ("model name", "CPU implementer", "CPU part")  # of x86; of Arm
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines()]
        found = {name.strip(): value.strip() for name, _, value in lines}
        model = " ".join(found[name] for name in names if name in found)
    except OSError:  # macOS
        sysctl = ["sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            model = subprocess.run(sysctl, capture_output=True, text=True).stdout.strip()
        except OSError:
            model = ""
    return f"{model or platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def job() -> list[str]:
    """What started this process and may do so again: a scheduler's job, a torchrun.

    Where standard input is a terminal a person did, whatever job the shell is in.
    """
    names = () if sys.stdin is not None and sys.stdin.isatty() else JOBS
    found = [f"{name} {os.environ[name]}" for name in names if os.environ.get(name)]
    if dist.is_torchelastic_launched():
        number = os.environ.get("TORCHELASTIC_RUN_ID")
        found.append(f"torchrun {number}, process {os.getppid()} on {socket.gethostname()}")
    return found


def started_many_times() -> bool:
    """Whether a launcher that is not torchrun started this command for several tasks, each of which trains it all."""
    several = any(os.environ.get(name, "1") not in ("", "0", "1") for name in TASKS)
    return several and not dist.is_torchelastic_launched()


def start_device(name: str, threads: int | None) -> torch.device:
    """The device for `--device`, and the CPU's settings: threads, and an allocator that keeps freed memory.

    Raises:
        InputError: if the device is not there.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    # The two parts of a batch vary in size, and oneDNN compiles its kernels for each size; its default cache of 1024 is
    # too small for a ResNet's. It reads this at the first convolution.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    _keep_freed_memory()
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device in available if available[device])
    device = torch.device(name)
    if not available[device.type]:
        raise InputError(f"--device {name}: torch finds none here; use --device cpu")
    if device.index is not None:
        count = torch.cuda.device_count()
        if device.index >= count:
            raise InputError(f"--device {name}: expected cuda:0 to cuda:{count - 1}, torch finds {count} here")
        torch.cuda.set_device(device)
    return device


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory: large tensors are otherwise unmapped and faulted in again at every step."""
    m_trim_threshold, m_mmap_threshold, largest = -1, -3, 2**30
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, largest)
        libc.mallopt(m_trim_threshold, largest)
    except (OSError, AttributeError):
        pass  # another C library, with an allocator of its own


def best_jobs(members: int, available: int) -> int:
    """The smallest number of processes, not more than cores, that train the members in the fewest rounds."""
    return min(range(1, min(members, available) + 1), key=lambda count: (math.ceil(members / count), count))


def threads_of_jobs(members: int, available: int) -> int:
    """Threads of each member with --jobs, whatever their number: the last bits of sums of floats depend on it."""
    return available // min(members, available)


def launch(jobs: str | int | None, members: int, device: str, threads: int | None) -> int | None:
    """Start this command as `--jobs` processes, as torchrun does, and exit as they do.

    Args:
        jobs: "auto", a number, or None for this process alone.
        members: of the ensemble; no more processes than that are started.
        device: of --device.
        threads: of each member, where the user or the run has chosen them.

    Returns:
        The threads to use, where this process alone is enough.
    """
    if jobs is None or dist.is_torchelastic_launched():
        return threads
    on_cpu = device == "cpu" or (device == "auto" and not torch.accelerator.is_available())
    count = min(jobs, members) if jobs != "auto" else best_jobs(members, cores()) if on_cpu else 1
    chosen = threads or (torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else None)
    if on_cpu and not chosen:
        chosen = threads = threads_of_jobs(members, cores())
    if chosen and chosen * count > cores():
        print(f"note: {count} processes of {chosen} threads share {cores()} cores", file=sys.stderr)
    if count == 1:
        return threads
    os.environ.setdefault("OMP_NUM_THREADS", str(chosen or max(1, cores() // count)))
    # The processes of one machine meet over its loopback address: its own name may be known to no server.
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    # Imported here because on macOS it prints a note.
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Silence what torchrun and gloo report about a failure: the process that failed has said it in a line.
    logging.disable(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        options = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(count)]
        torchrun.run(torchrun.parse_args([*options, *sys.argv]))
    except ChildFailedError as error:
        which, failure = error.get_first_failure()
        if failure.exitcode < 0:  # killed, for instance for its memory: it could say nothing
            cause = f"rank {which} was ended by signal {-failure.exitcode}"
            raise RunError(f"{cause}; re-run the same command to resume") from None
        sys.exit(failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    sys.exit(0)


def join(device: torch.device, seeds: list[int], folder: Path) -> None:
    """Where torchrun started this process: connect to the other ranks, choose this rank's GPU, and watch the others.

    Args:
        device: where this rank computes.
        seeds: those of all members, for messages.
        folder: the run's, likewise.

    Raises:
        RunError: if a rank has ended before all are connected.
    """
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    try:
        _connect(device, seeds, folder)
    except RuntimeError as error:
        problem = f"rank {os.environ['RANK']}: no connection to the other ranks ({first_line(error)})"
        raise RunError(f"{problem}; if one has ended, see its message") from error


def _connect(device: torch.device, seeds: list[int], folder: Path) -> None:
    global _group, _watch
    backend = "gloo"
    if device.type == "cuda":
        gpus = torch.cuda.device_count() if device.index is None else 1
        if device.index is None:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
        if int(os.environ["LOCAL_WORLD_SIZE"]) <= gpus:
            backend = "nccl"  # which refuses two ranks on one GPU
    store, number, count = next(dist.rendezvous("env://", timeout=START))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # torchrun keeps one store for all its restarts, and what dead ranks wrote to it must not be read. On several
        # machines the counts differ; docs/CLUSTER.md says what helps there.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    # nccl guesses a GPU by the rank, and warns of it at each barrier, unless it is told.
    gpu = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else None
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=START, device_id=gpu)
    names = []
    for number in range(ranks()):
        logs = [f"seed {seed}: {folder / f'seed_{seed}' / 'log.jsonl'}" for seed in seeds[number :: ranks()]]
        names.append(f"rank {number} ({', '.join(logs) or 'no member'})")
    print(names[rank()], flush=True)
    _watch = Watch(names)
    _group = dist.new_group(timeout=FOREVER)


def finish() -> None:
    """Wait until every rank calls this."""
    if _watch is not None:
        _watch.finish()


def lost() -> bool:
    """Whether another rank ended too early; it may have done so a second before this one was asked to stop."""
    if _watch is None:
        return False
    _watch.wait(4 * PULSE_SECONDS)
    return _watch.lost


def leave() -> None:
    """Disconnect from the other ranks."""
    global _group, _watch
    if dist.is_initialized():
        _group = _watch = None
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, 0 to `ranks()` - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes there are, on all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank calls this.

    Raises:
        RunError: if a rank has ended.
    """
    if dist.is_initialized():
        _wait(dist.barrier(_group, async_op=True))


def broadcast(number: int) -> int:
    """Rank 0's number, on every rank."""
    if not dist.is_initialized():
        return number
    tensor = torch.tensor([number], device=_device())
    _wait(dist.broadcast(tensor, 0, _group, async_op=True))
    return int(tensor)


def gather_scores(own: np.ndarray, members: int) -> np.ndarray:
    """The scores of all members, on every rank.

    Args:
        own: float32 [members of this rank, N].
        members: how many there are on all ranks.

    Returns:
        float32 [members, N], in the order of the seeds.

    Raises:
        RunError: if a rank has ended.
    """
    if not dist.is_initialized():
        return own
    mine = torch.zeros(-(-members // ranks()), own.shape[1], device=_device())  # as many rows on every rank
    mine[: len(own)] = torch.from_numpy(own)
    everyone = [torch.empty_like(mine) for _ in range(ranks())]
    _wait(dist.all_gather(everyone, mine, _group, async_op=True))
    # Row i of rank r is member i K + r.
    return torch.stack(everyone, dim=1).flatten(0, 1)[:members].cpu().numpy()


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _wait(work: dist.Work) -> None:
    """Wait in short sleeps, so that signals are handled."""
    try:
        while not work.is_completed():
            time.sleep(0.02)
        work.wait()
    except RuntimeError as error:
        time.sleep(4 * PULSE_SECONDS)  # the watch, if it runs, names the rank and stops this process
        raise RunError(f"rank {rank()}: another rank has ended, see its message ({first_line(error)})") from error


class Watch:
    """Notices within seconds that a rank has ended or no longer answers, names it, and stops this rank.

    Every half second a thread meets those of the other ranks at a barrier. Rank 0 hears from all of them; the others
    hear from rank 0. A rank is stopped by SIGTERM: it saves its state, and `lost` is true.

    Args:
        names: what messages call each rank.
    """

    def __init__(self, names: list[str]):
        self.names, self.lost, self._finished = names, False, False
        self._group = dist.new_group(backend="gloo", timeout=SILENCE)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until every rank calls this."""
        self._finished = True
        self.wait(None)

    def wait(self, seconds: float | None) -> None:
        """Give the thread time to notice a rank that has just ended."""
        self._thread.join(seconds)

    def _run(self) -> None:
        finished = torch.zeros(1)
        while not finished:
            time.sleep(PULSE_SECONDS)
            try:
                dist.monitored_barrier(self._group, SILENCE, wait_all_ranks=True)
            except RuntimeError as error:
                self._stop(str(error))
            try:
                # All threads end in the same round.
                finished.fill_(self._finished)
                dist.all_reduce(finished, dist.ReduceOp.MIN, self._group)
            except RuntimeError:
                finished.zero_()  # the next round says who it was

    def _reaches(self, other: int) -> bool:
        try:
            dist.send(torch.zeros(1), other, self._group)
        except RuntimeError:
            return False
        return True

    def _stop(self, error: str) -> None:
        self.lost = True
        missing = re.search(r"Ranks ([\d, ]+) failed", error)
        if missing:
            gone = [int(number) for number in missing.group(1).replace(",", " ").split()]
        elif rank():
            gone = [0]  # unless it has noticed that another one has ended, and says so
        else:  # the connection broke between two rounds, which the barrier reports without a name
            gone = [other for other in range(1, ranks()) if not self._reaches(other)]
        who = ", ".join(self.names[number] for number in gone) or "another rank"
        text = f"rank {rank()}: {who} has ended or does not answer"
        print(f"{text}; this rank stops: re-run the same command to resume", file=sys.stderr, flush=True)
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # before and after training: there is nothing to save
            os._exit(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(15)
        os._exit(1)  # the main thread is stuck
