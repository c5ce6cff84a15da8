"""Device, threads and ranks. In a process that trains alone there is one rank, and the collective calls do nothing.

Members are independent except for one exchange of scores: rank r of K trains the members r, r + K, ...
"""

import ctypes
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

from utils import InputError, RunError, again, control_groups, first_line

# Ranks start together; later they wait for slower ones as long as it takes, and the watch checks that these are alive.
START, FOREVER = timedelta(minutes=5), timedelta(days=365)
PULSE_SECONDS = 0.5
SILENCE = timedelta(seconds=30)

# Variables with the number of a scheduler's job, which a restarted job keeps; with the number of tasks of a launcher.
JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")
TASKS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE")
# The variable that names the file over which the processes of --jobs find one another.
STORE = "SHARPBALANCE_STORE"

_group: dist.ProcessGroup | None = None  # its calls wait for ever
_watch: "Watch | None" = None


def cores() -> int:
    """How many CPU cores this process may use: those it is bound to, or the whole ones that its quota comes to."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in control_groups("cpu"):
        for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # of version 2, and of version 1
            try:
                quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
            except (OSError, ValueError):  # of the other version, or without a quota
                continue
            if quota > 0:
                count = min(count, max(1, quota // period))
    return count


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
    names = TASKS[:-1] if STORE in os.environ else TASKS  # WORLD_SIZE is then ours, see `utils.processes`
    several = any(os.environ.get(name, "1") not in ("", "0", "1") for name in names)
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
    # Of cuDNN's kernels only those that always add in the same order: the same run gives the same weights.
    torch.backends.cudnn.deterministic = True
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
        if not libc.mallopt(m_mmap_threshold, largest):
            libc.mallopt(m_mmap_threshold, 2**25)  # the most that glibc before 2.35 takes
        libc.mallopt(m_trim_threshold, largest)
    except (OSError, AttributeError):
        pass  # another C library, with an allocator of its own


def default_threads(members: int) -> int:
    """Threads of each member where nobody has chosen them: the last bits of sums of floats depend on their number.

    They do not depend on the number of processes. OMP_NUM_THREADS counts where a user set it: torchrun sets it to 1.
    """
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if chosen.isdigit() and int(chosen) and not (dist.is_torchelastic_launched() and chosen == "1"):
        return int(chosen)
    return max(1, cores() // members)


def default_jobs(members: int, threads: int) -> int:
    """The number of processes of this machine's CPU that train the members in the shortest time.

    Of one thread each, the smallest number that is a process for each core or more and gives all the same number of
    members: what the system shares out by time ends sooner than rounds in which a core has nothing to do, and more
    processes take memory. Several threads of a process wait for one another: such processes are no more than fit.
    """
    if threads > 1:
        return max(1, min(members, cores() // threads))
    return next(count for count in range(min(cores(), members), members + 1) if members % count == 0)


def on_cpu(device: str) -> bool:
    """Whether a --device computes on the CPU."""
    return device == "cpu" or (device == "auto" and not torch.accelerator.is_available())


def launched() -> bool:
    """Whether this is one of several processes that train together: of torchrun, or of `utils.processes`."""
    return dist.is_torchelastic_launched() or STORE in os.environ


def join(device: torch.device, seeds: list[int], folder: Path) -> None:
    """Where this is one of several ranks: connect to the others, choose this rank's GPU, and under torchrun watch them.

    Args:
        device: where this rank computes.
        seeds: those of all members, for messages.
        folder: the run's, likewise.

    Raises:
        RunError: if a rank has ended before all are connected.
    """
    if not launched() or dist.is_initialized():
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
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if STORE in os.environ:
        # The processes of one machine meet over its loopback address: its own name may be known to no server.
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
        if loopback:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        store = dist.FileStore(os.environ[STORE], count)
    else:
        store, number, count = next(dist.rendezvous("env://", timeout=START))
        if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
            # torchrun keeps one store for all its restarts, and what dead ranks wrote to it must not be read. On
            # several machines the counts differ; docs/CLUSTER.md says what helps there.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    # nccl guesses a GPU by the rank, and warns of it at each barrier, unless it is told.
    gpu = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else None
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=START, device_id=gpu)
    if STORE not in os.environ:  # else the process that started all of them sees at once when one has ended
        names = [name_of(number, ranks(), seeds, folder) for number in range(ranks())]
        print(names[rank()], flush=True)
        _watch = Watch(names)
    _group = dist.new_group(timeout=FOREVER)


def name_of(number: int, count: int, seeds: list[int], folder: Path) -> str:
    """What messages call a rank: its number, its members and their logs."""
    logs = [f"seed {seed}: {folder / f'seed_{seed}' / 'log.jsonl'}" for seed in seeds[number::count]]
    return f"rank {number} ({', '.join(logs) or 'no member'})"


def finish() -> None:
    """Wait until every rank calls this, under torchrun; else return at once."""
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


def gather(own: np.ndarray, members: int) -> np.ndarray:
    """What belongs to the members, of all of them, on every rank.

    Args:
        own: float32 [members of this rank, ...].
        members: how many there are on all ranks.

    Returns:
        float32 [members, ...], in the order of the seeds.

    Raises:
        RunError: if a rank has ended.
    """
    if not dist.is_initialized():
        return own
    mine = torch.zeros(-(-members // ranks()), *own.shape[1:], device=_device())  # as many rows on every rank
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
        print(f"{text}; this rank stops: {again()} to resume", file=sys.stderr, flush=True)
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # before and after training: there is nothing to save
            os._exit(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(15)
        os._exit(1)  # the main thread is stuck
