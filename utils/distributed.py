"""The few torch.distributed calls that the members need. Without torchrun there is one rank, and they do nothing.

Members are independent but for one exchange of scores: rank r of K holds the members r, r + K, ...
"""

import os
import re
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from utils import RunError, first_line

# Ranks start together; later they wait for slower ones as long as it takes, and the watch sees whether these are alive.
START, FOREVER = timedelta(minutes=5), timedelta(days=365)
PULSE_SECONDS = 0.5
SILENCE = timedelta(seconds=30)

_group: dist.ProcessGroup | None = None  # whose calls wait for ever
_watch: "Watch | None" = None


def join(device: torch.device, seeds: list[int], folder: Path) -> None:
    """Meet the other ranks, where torchrun started this process, choose this rank's GPU, and watch the others.

    Args:
        device: where this rank computes.
        seeds: those of all members, for messages.
        folder: the run's, likewise.

    Raises:
        RunError: if a rank has ended before all have met.
    """
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    try:
        _meet_first(device, seeds, folder)
    except RuntimeError as error:
        raise RunError(
            f"rank {os.environ['RANK']}: the other ranks were not met ({first_line(error)}); if one has ended, see its "
            "message"
        ) from error


def _meet_first(device: torch.device, seeds: list[int], folder: Path) -> None:
    global _group, _watch
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        if int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count():
            backend = "nccl"  # which refuses two ranks on one GPU
    store, number, count = next(dist.rendezvous("env://", timeout=START))
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # torchrun keeps one store for all its restarts: what the dead ranks wrote must not be read. On several machines
        # the counts differ between them; docs/CLUSTER.md says what helps there.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=START)
    names = []
    for number in range(ranks()):
        logs = [f"seed {seed}: {folder / f'seed_{seed}' / 'log.jsonl'}" for seed in seeds[number :: ranks()]]
        names.append(f"rank {number} ({', '.join(logs) or 'no member'})")
    print(names[rank()], flush=True)
    _watch = Watch(names)
    _group = dist.new_group(timeout=FOREVER)


def finish() -> None:
    """Wait until every rank has come here."""
    if _watch is not None:
        _watch.finish()


def lost() -> bool:
    """Whether another rank has ended too early; where this one is told to end, that may be a second ago."""
    if _watch is None:
        return False
    _watch.look(4 * PULSE_SECONDS)
    return _watch.lost


def leave() -> None:
    """Part from the other ranks."""
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


def meet() -> None:
    """Wait until every rank is here.

    Raises:
        RunError: if a rank has ended.
    """
    if dist.is_initialized():
        _wait(dist.barrier(_group, async_op=True))


def agree(number: int) -> int:
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
    """Wait in short sleeps, so that signals are answered."""
    try:
        while not work.is_completed():
            time.sleep(0.02)
        work.wait()
    except RuntimeError as error:
        time.sleep(4 * PULSE_SECONDS)  # the watch, if it runs, names the rank and stops this process
        raise RunError(f"rank {rank()}: another rank has ended, see its message ({first_line(error)})") from error


class Watch:
    """Notices within seconds that a rank has ended or answers no more, says which, and stops this rank.

    A thread meets the other ranks' every half second. Rank 0 hears all of them; the others hear rank 0. A rank that is
    stopped gets SIGTERM: it saves what it has, and `lost` is true.

    Args:
        names: what the message calls each rank.
    """

    def __init__(self, names: list[str]):
        self.names, self.lost, self._finished = names, False, False
        self._group = dist.new_group(backend="gloo", timeout=SILENCE)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until every rank has come here."""
        self._finished = True
        self.look(None)

    def look(self, seconds: float | None) -> None:
        """Give it time to notice a rank that has just ended."""
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
            gone = [0]  # or it has noticed that another one has, and says so
        else:  # the connection broke between two rounds, which the barrier reports without a name
            gone = [other for other in range(1, ranks()) if not self._reaches(other)]
        who = ", ".join(self.names[number] for number in gone) or "another rank"
        print(
            f"rank {rank()}: {who} has ended or does not answer; this rank stops, and the same command goes on",
            file=sys.stderr,
            flush=True,
        )
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(15)
        os._exit(1)  # the main thread waits for something that will not come
