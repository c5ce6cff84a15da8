"""torchrun: the same results as one process, whatever the number of processes, and an end when a rank ends."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import main
from tests.test_ensemble import ROOT, TINY, Forked, results, run
from utils import RunError, distributed, processes
from utils.files import load_json

FLAGS = [*TINY, "--seed", "13 17 27", "--sam", "--rho", "0.1", "--flat_ratio", "0.4", "--initial_epochs", "2"]
FLAGS += ["--threads", "1"]
RESNET = [*FLAGS, "--model", "resnet18", "--width", "2"]  # main.py forks processes for networks of this repository only


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of one process."""
    return run(tmp_path_factory.mktemp("whole") / "run", FLAGS)


@pytest.fixture(scope="module")
def whole_resnet(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole") / "run", RESNET)


def start(folder, options, fault=None, flags=FLAGS):
    """Torchrun, with a fault where one is given."""
    program = "main.py" if fault is None else "tests/faults/faulty.py"
    command = [sys.executable, "-m", "torch.distributed.run", *options, program, *flags, "--save_path", str(folder)]
    environment = os.environ | {"FAULT": fault or "", "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **streams)


def end(process, seconds=240):
    """Exit status and output."""
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, output


def torchrun(folder, options, fault=None, flags=FLAGS):
    return end(start(folder, ["--standalone", *options.split()], fault, flags))


# The test of --overwrite below has two, to their end.
@pytest.mark.parametrize("count", [4, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 2, 3))])
def test_any_number_of_processes_gives_the_same_bytes(count, whole, tmp_path):
    status, output = torchrun(tmp_path / "run", f"--nproc-per-node {count}")
    assert status == 0, output
    assert output.count("epoch   seed") == 1
    assert results(tmp_path / "run") == results(whole)


def begin(folder, *options, fault=""):
    """main.py with processes that are forked, and a fault in one of them where one is given."""
    return Forked([*RESNET, "--save_path", str(folder), *options], fault.split(), main.launch)


def jobs(forked, folder, *options, fault=""):
    """The same, or one whose processes start the command anew, from its start to its end: exit status and output."""
    if forked:
        status, output, errors = begin(folder, *options, fault=fault).end()
        return status, output + errors
    command = [sys.executable, "tests/faults/faulty.py", *FLAGS, "--save_path", str(folder), *options]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return end(subprocess.Popen(command, cwd=ROOT, env=os.environ | {"FAULT": fault}, **streams))


@pytest.mark.parametrize("forked", [False, True])
def test_jobs_give_the_same_bytes(forked, whole, whole_resnet, tmp_path):
    """More than there are members are not started; one is enough to go on; so it is where processes are not forked."""
    folder, wanted = tmp_path / "run", results(whole_resnet if forked else whole)
    status, output = jobs(forked, folder, "--jobs", "8")
    assert status == 0, output
    assert output.count("epoch   seed") == output.count("deep") + output.count("sharpbalance of") == 1
    assert ", by 3 processes\n" in output
    assert results(folder) == wanted
    assert results(run(folder, [*(RESNET if forked else FLAGS), "--jobs", "1"])) == wanted
    status, output = jobs(forked, folder, "--rho", "0.2")
    assert status == 2
    assert output.count(": error: --save_path ") == 1
    assert "Traceback" not in output
    assert results(folder) == wanted


def test_one_process_jobs_and_torchrun_agree_by_default(tmp_path):
    """The number of threads is that of the settings, though torchrun sets another one."""
    flags = [*TINY, "--epochs", "2", "--seed", "13"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    found = []
    for name, start in (
        ("run", []),
        ("torchrun", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]),
    ):
        command = [sys.executable, *start, "main.py", *flags, "--save_path", str(tmp_path / name)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        found.append(results(tmp_path / name))
        assert load_json(tmp_path / name / "args.json")["threads"] == distributed.cores()
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("members", "cores", "count", "threads"),
    [(1, 8, 1, 8), (3, 1, 1, 1), (3, 2, 3, 1), (4, 3, 4, 1), (3, 4, 3, 1), (3, 64, 3, 21), (9, 2, 3, 1), (2, 5, 2, 2)],
)
def test_automatic_jobs(members, cores, count, threads, monkeypatch):
    """Each has as many members, and every core a process; threads depend neither on that nor on torchrun."""
    monkeypatch.setattr(distributed, "cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS")
    seeds = [str(seed) for seed in range(members)]
    for words, expected in (([], count), (["--jobs", "2"], min(2, members)), (["--jobs", "1"], 1)):
        args = main.parse_args(["--seed", *seeds, *words, "--device", "cpu"])
        assert (main.count_processes(args), main.threads_of(args)) == (expected, threads)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main.threads_of(args) == 1
    monkeypatch.setattr(distributed.dist, "is_torchelastic_launched", lambda: True)
    assert main.threads_of(args) == threads


def test_jobs_of_several_threads_are_no_more_than_cores(monkeypatch, tmp_path, capsys):
    """As of a run that earlier versions began, in one process with all cores; more are noted where they are chosen."""
    monkeypatch.setattr(distributed, "cores", lambda: 4)
    (tmp_path / "args.json").write_text('{"seed": [1, 2, 3], "threads": 4, "jobs": null}')
    for words, count in (([], 1), (["--threads", "2"], 2), (["--threads", "1"], 3)):
        args = main.parse_args(["--seed", "1 2 3", "--save_path", str(tmp_path), "--device", "cpu", *words])
        assert main.count_processes(args) == count
    args = main.parse_args(["--seed", "1 2 3", "--jobs", "3", "--threads", "2"])
    assert main.count_processes(args) == 3
    assert capsys.readouterr().err == "note: 3 processes of 2 threads share 4 cores\n"


def test_jobs_fit_into_the_memory(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "cores", lambda: 4)
    args = main.parse_args(["--device", "cpu", "--seed", "1 2 3 4", "--threads", "1"])
    each = main.memory_of_process(args, 1)
    for enough in (4, 2, 0.5):
        free = 1.01 * enough * each / processes.MEMORY_SHARE
        monkeypatch.setattr(processes, "free_memory", lambda free=free: free)
        assert main.count_processes(args) == max(1, int(enough))
        text = capsys.readouterr().err
        assert text.count("\n") == (enough < 4)
        assert enough == 4 or f"free memory are enough for {max(1, int(enough))} of 4 processes" in text
    larger = main.parse_args(["--device", "cpu", "--width", "64", "--batch_size", "128"])
    assert main.memory_of_process(larger, 1) > 2 * each
    monkeypatch.setattr(distributed, "cores", lambda: 2)  # two processes of two members
    between = (main.memory_of_process(args, 2) + each) / 2
    monkeypatch.setattr(processes, "free_memory", lambda: 2 * between / processes.MEMORY_SHARE)
    assert main.count_processes(args) == 1


def test_more_gpus_than_are_used(monkeypatch, capsys):
    """One process trains on a GPU; where others are idle, a line says how they are used."""
    monkeypatch.setattr(distributed, "on_cpu", lambda device: False)
    for gpus, device, share in ((1, "auto", None), (2, "auto", 2), (8, "cuda", 3), (8, "cuda:1", None)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        args = main.parse_args(["--seed", "1 2 3"])
        args.device = device
        capsys.readouterr()
        assert main.count_processes(args) == 1
        assert capsys.readouterr().err.count(f"torchrun --nproc-per-node {share} main.py") == (share is not None)
        args.seed = [1]
        assert main.count_processes(args) == 1
        assert capsys.readouterr().err == ""


FATAL = {
    "in warm-up": "utils.training.sharpbalance_step 10 before 9 1",
    "in the exchange": "utils.distributed.dist.all_gather 1 after 9 1",
    "after it": "utils.training.sharpbalance_step 23 before 9 1",
    "rank 0 in warm-up": "utils.training.sharpbalance_step 10 before 9 0",
    "rank 0 while the others wait for it": "utils.distributed.dist.all_gather 1 before 9 0",
}


SELDOM = ("rank 0 in warm-up", "after it")  # of torchrun; processes of --jobs are tried at all moments


@pytest.mark.parametrize("moment", [pytest.param(m, marks=[pytest.mark.slow] * (m in SELDOM)) for m in FATAL])
def test_a_dead_rank_ends_the_others_and_another_number_goes_on(moment, whole, tmp_path):
    folder, fault = tmp_path / "run", FATAL[moment]
    started = time.monotonic()
    status, output = torchrun(folder, "--nproc-per-node 2", fault)
    assert status != 0
    assert time.monotonic() - started < 90
    dead = fault[-1]
    assert f"rank {dead} (seed {17 if dead == '1' else 13}: {folder}" in output.partition("has ended or does not")[0]
    assert re.search(rf"rank\s+: {dead}|rank: {dead}", output), output  # torchrun's own report
    assert (
        "Traceback" not in output.partition("ChildFailedError")[0].partition("main.py FAILED")[0].split("has ended")[0]
    )
    assert results(run(folder, FLAGS)) == results(whole)


@pytest.mark.slow  # the next one has a restart, too
def test_max_restarts_goes_on_by_itself(whole, tmp_path):
    fault = f"utils.training.sharpbalance_step 24 before 9 1 {tmp_path / 'marker'}"
    status, output = torchrun(tmp_path / "run", "--nproc-per-node 2 --max-restarts 1", fault)
    assert (tmp_path / "marker").exists()
    assert status == 0, output
    assert results(tmp_path / "run") == results(whole)


def test_overwrite_acts_once_under_torchrun(whole, tmp_path):
    """A restart goes on with what was trained since; another torchrun begins anew."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    fault = f"utils.training.sharpbalance_step 24 before 9 1 {tmp_path / 'marker'}"
    flags = [*FLAGS, "--overwrite"]
    status, output = torchrun(folder, "--nproc-per-node 2 --max-restarts 1", fault, flags)
    assert (tmp_path / "marker").exists()
    assert status == 0, output
    assert results(folder) == results(whole)
    epochs = re.findall(r"^ +(\d) +13 ", output, re.M)
    assert epochs == ["0", "1", "2", "3"], output
    assert output.count("--overwrite: this job began the run") == 1
    status, output = torchrun(folder, "--nproc-per-node 2", flags=flags)
    assert re.findall(r"^ +(\d) +13 ", output, re.M) == epochs
    assert "--overwrite" not in output


def test_a_torchrun_is_not_another_one_of_the_same_number(monkeypatch):
    """Its number may be given, as --rdzv-id; the process that waits for its ranks, which restarts share, is its own."""
    monkeypatch.setattr(distributed.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    found = []
    for parent in (10, 10, 11):
        monkeypatch.setattr(distributed.os, "getppid", lambda parent=parent: parent)
        found.append(distributed.job()[-1])
    assert found[0] == found[1] != found[2]


def free_port():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("case", ["whole", "dead rank", pytest.param("restart", marks=pytest.mark.slow)])
def test_two_nodes(case, whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "7"]
    options += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    fault = None if case == "whole" else "utils.training.sharpbalance_step 10 before 9 1"
    if case == "restart":  # as docs/CLUSTER.md says
        monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
        options += ["--max-restarts", "2"]
        fault += f" {tmp_path / 'marker'}"
    nodes = [start(folder, options, fault) for _ in range(2)]
    ends = [end(node) for node in nodes]
    if case == "dead rank":
        assert 0 not in [status for status, _ in ends]
        output = "\n".join(output for _, output in ends)
        assert f"rank 1 (seed 17: {folder}" in output.partition("has ended or does not")[0], output
        run(folder, FLAGS)
    else:
        assert [status for status, _ in ends] == [0, 0], ends
    assert results(folder) == results(whole)


def test_sigterm_for_all(whole, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, ["--standalone", "--nproc-per-node", "2"])
    while not (folder / "seed_13" / "log.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    status, output = end(process)
    assert status != 0
    assert time.monotonic() - started < 15
    assert output.count("stopped by SIGTERM") == 2, output
    assert "has ended or does not answer" not in output
    assert results(run(folder, FLAGS)) == results(whole)


def test_one_process_alone_has_nobody_to_wait_for():
    assert (distributed.rank(), distributed.ranks(), distributed.broadcast(3)) == (0, 1, 3)
    scores = np.ones((2, 3), np.float32)
    assert distributed.gather(scores, 2) is scores
    distributed.barrier()
    distributed.finish()
    assert not distributed.lost()


def test_a_refusal_on_rank_0_ends_all(whole):
    status, output = torchrun(whole, "--nproc-per-node 2", flags=[*FLAGS, "--rho", "0.3"])
    assert status != 0
    assert "--rho 0.3 here, 0.1 there" in output


@pytest.mark.parametrize(("gpus", "name", "backend"), [(2, "cuda", "nccl"), (1, "cuda", "gloo"), (2, "cuda:1", "gloo")])
def test_the_gpu_of_a_rank(gpus, name, backend, monkeypatch, tmp_path):
    """That of its local rank, or the one that was named, which all share: nccl refuses two ranks on one GPU."""
    chosen, backends = [], []

    def init(backend, **more):
        backends.append(backend)
        raise RuntimeError("far enough")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(distributed.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(distributed.dist, "rendezvous", lambda *w, **m: iter([(None, 1, 2)]))
    monkeypatch.setattr(distributed.dist, "PrefixStore", lambda *words: None)
    monkeypatch.setattr(distributed.dist, "init_process_group", init)
    for variable, value in {"RANK": 1, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(variable, str(value))
    with pytest.raises(RunError, match="far enough"):
        distributed.join(torch.device(name), [1, 2], tmp_path)
    assert backends == [backend]
    assert chosen == ([1 % gpus] if name == "cuda" else [])


@pytest.mark.parametrize("moment", FATAL)
@pytest.mark.parametrize("forked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_dead_process_of_jobs_ends_the_others(moment, forked, whole, whole_resnet, tmp_path):
    folder, started = tmp_path / "run", time.monotonic()
    status, output = jobs(forked, folder, "--jobs", "2", fault=FATAL[moment])
    assert status == 1, output
    assert time.monotonic() - started < 60
    who = "rank 1 (seed 17: " if FATAL[moment][-1] == "1" else "rank 0 (seed 13: "
    assert f".py: error: {who}{folder}" in output
    assert "was ended by signal 9" in output
    assert output.count("re-run the same command to resume") == 1
    assert "Traceback" not in output
    assert not (folder / "lock").exists() or who.startswith("rank 0")
    assert results(run(folder, RESNET if forked else FLAGS)) == results(whole_resnet if forked else whole)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_to_jobs_stops_all(number, status, whole_resnet, tmp_path):
    """Also one that ends the first process without a word: the others see that it does not listen."""
    folder = tmp_path / "run"
    program = begin(folder)
    while not (folder / "seed_13" / "log.jsonl").exists():
        time.sleep(0.05)
    os.kill(program.process.pid, number)
    ended, _, errors = program.end(30)
    assert ended == status, errors
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}.get(number)
    assert errors.count(f"stopped by {name}; all work is saved") == (name is not None)
    until = time.monotonic() + 20
    while (folder / "lock").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert not (folder / "summary.json").exists()
    assert results(run(folder, RESNET)) == results(whole_resnet)


def test_a_rank_that_is_not_training_yet_ends_with_a_status(monkeypatch, capsys):
    """A signal that nobody handles would kill it."""

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed.os, "_exit", leave)
    monkeypatch.setattr(distributed.os, "kill", lambda *words: pytest.fail("killed"))
    watch = object.__new__(distributed.Watch)
    watch.names = ["rank 0 (seed 13)", "rank 1 (seed 17)"]
    with pytest.raises(SystemExit, match="1"):
        watch._stop("Connection closed by peer")
    assert watch.lost
    assert capsys.readouterr().err.startswith("rank 1: rank 0 (seed 13) has ended or does not answer")


@pytest.mark.parametrize(
    ("error", "reached", "who"),
    [
        ("[Rank 0]: Ranks 1, 2 failed to pass monitoredBarrier in 30000 ms", (), "b, c"),
        ("Connection closed by peer", (1,), "c"),
        ("Connection closed by peer", (1, 2), "another rank"),
    ],
)
def test_a_rank_that_is_training_is_asked_to_save_its_state(error, reached, who, monkeypatch, capsys):
    """And is left the time for it. Rank 0 names those that have ended, also where the barrier does not."""
    done = []
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "ranks", lambda: 3)
    monkeypatch.setattr(distributed.os, "kill", lambda process, number: done.append((process, number)))
    monkeypatch.setattr(distributed.time, "sleep", done.append)
    monkeypatch.setattr(distributed.os, "_exit", done.append)
    monkeypatch.setattr(distributed.signal, "getsignal", lambda number: print)
    watch = object.__new__(distributed.Watch)
    watch.names, watch.lost, watch._reaches = ["a", "b", "c"], False, lambda other: other in reached
    watch._stop(error)
    assert watch.lost
    assert done == [(os.getpid(), signal.SIGTERM), 15, 1]
    assert capsys.readouterr().err.startswith(f"rank 0: {who} has ended or does not answer; this rank stops: re-run")
