"""Processes of this machine: what they share out, say and fail at, and scripts without a new interpreter."""

import json
import signal
import subprocess
import sys
import textwrap

import pytest

from tests.test_ensemble import ROOT, TINY, run
from utils import distributed, processes


def python(program, *words):
    """A program in a process of its own, which may fork: exit status and both outputs."""
    text = "from utils import processes\nprocesses.begin()\n" + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", text, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_tasks_are_shared_out():
    """Each is done once, by several processes, whose words are heard in full."""
    status, output, error = python(
        """
        import os, time
        heard = []
        def work(task, report):
            time.sleep(0.05)
            report("done", task, os.getpid(), "x" * 100_000)
        processes.share(7, 3, work, lambda *words: heard.append(words))
        assert sorted(words[1] for words in heard) == list(range(7))
        assert 2 <= len({words[2] for words in heard} - {os.getpid()}) <= 3
        assert {len(words[3]) for words in heard} == {100_000}
        heard.clear()
        processes.share(2, 1, work, lambda *words: heard.append(words))
        assert [words[1:3] for words in heard] == [(0, os.getpid()), (1, os.getpid())]
        done = []
        processes.share(20_000, 2, lambda task, report: report("done", task), lambda kind, task: done.append(task))
        assert sorted(done) == list(range(20_000))  # more than a pipe holds
        print("end")
        """
    )
    assert (status, output, error) == (0, "end\n", "")


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("raise InputError('--x: bad')", "InputError('--x: bad')"),
        ("raise RunError('y')", "RunError('y')"),
        ("raise OSError(28, 'full', 'file')", "RunError('file: full')"),
        ("raise RuntimeError('CUDA out of memory')", "MemoryError('out of memory')"),
        ("sys.exit(3)", "SystemExit(3)"),
        ("os.kill(os.getpid(), 11)", "RunError('process 1 was ended by signal 11; re-run the same command to resume')"),
        ("os.kill(os.getppid(), 2)", "KeyboardInterrupt()"),
        ("os.kill(os.getppid(), 15)", "SystemExit(143)"),
        ("1 / 0", "SystemExit(1)"),
    ],
)
def test_what_fails_in_one_ends_all(fault, expected):
    """As it fails there; the others, which would take minutes, are ended."""
    status, output, error = python(
        f"""
        import os, sys, time
        from utils import InputError, RunError
        def work(number):
            if number == 1:
                {fault}
            time.sleep(300)
        try:
            processes.run(3, work)
        except BaseException as error:
            print(repr(error))
        """
    )
    assert (status, output) == (0, expected + "\n")
    assert ("ZeroDivisionError" in error) == (fault == "1 / 0")
    assert error == "" or fault == "1 / 0"


def test_memory_of_a_control_group(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 100 kB\nMemAvailable: 50 kB\n"}
    files["/proc/self/cgroup"] = "0::/jobs/mine\n3:memory:/\n4:cpu,cpuacct:/\n"

    def read(path):
        if str(path) not in files:
            raise FileNotFoundError
        return files[str(path)]

    monkeypatch.setattr(processes.Path, "read_text", read)
    files |= {"/sys/fs/cgroup/memory.max": "40960\n", "/sys/fs/cgroup/memory.current": "10240\n"}
    files |= {
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "51200",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": "0",
    }
    assert processes.free_memory() == 30720
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert processes.free_memory() == 51200
    # The group of the process itself, in which files that were read can be dropped; one of those around it.
    mine = "/sys/fs/cgroup/jobs/mine/memory."
    files |= {f"{mine}max": "30000", f"{mine}current": "25000", f"{mine}stat": "anon 1\ninactive_file 4000\n"}
    assert processes.free_memory() == 9000
    files |= {"/sys/fs/cgroup/jobs/memory.max": "26000", "/sys/fs/cgroup/jobs/memory.current": "25000"}
    assert processes.free_memory() == 1000


def test_cores_of_a_quota(monkeypatch, tmp_path):
    """As a container has that may use two of eight cores."""
    monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.setattr(distributed, "control_groups", lambda controller: [tmp_path, tmp_path / "above"])
    assert distributed.cores() == 8
    for text, cores in (("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(text)
        assert distributed.cores() == cores
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    for text, cores in (("-1\n", 8), ("350000\n", 3)):
        (tmp_path / "cpu.cfs_quota_us").write_text(text)
        assert distributed.cores() == cores


def test_older_libraries_of_c_keep_what_they_can(monkeypatch):
    """More than 32 MiB are refused by glibc before 2.35, which then leaves its threshold at 128 KiB for good."""
    calls = []

    class Library:
        def mallopt(self, name, value):
            calls.append((name, value))
            return int(value <= 2**25 or name != -3)

    monkeypatch.setattr(distributed.ctypes, "CDLL", lambda name: Library())
    distributed._keep_freed_memory()
    assert calls == [(-3, 2**30), (-3, 2**25), (-1, 2**30)]


def test_a_command_that_would_begin_anew_is_not_said_again(monkeypatch, capsys):
    for words, text in ((["--epochs", "3"], "command to"), (["--overwrite"], "command without --overwrite to")):
        monkeypatch.setattr(sys, "argv", ["main.py", *words])
        processes.say_stopped(signal.SIGTERM)
        assert f"stopped by SIGTERM; all work is saved: re-run the same {text} resume" in capsys.readouterr().err


def test_measuring_side_by_side_gives_the_same_numbers(tmp_path):
    """As in one process, of all measuring scripts."""
    source = run(tmp_path / "run", [*TINY, "--epochs", "1", "--seed", "13 17 27"])
    common = ["--resume", source, "--threads", "1"]
    commands = [["diversity", "--mode", "all"], ["diversity_variance"], ["sharpness", "--batch_num", 2, "--n_iters", 2]]
    found = []
    for side_by_side in (True, False):
        folder = tmp_path / f"side_{side_by_side}"
        for name, *words in commands:
            entry = f"measure_{name}.py"
            program = f"import runpy, sys\nsys.argv = {[entry, *map(str, [*common, *words, '--save', folder])]}\n"
            program += "" if side_by_side else "processes.may_fork = lambda: False\n"
            program += f"runpy.run_path({entry!r}, run_name='__main__')"
            status, output, error = python(program)
            assert (status, error) == (0, ""), error
            assert f"wrote {folder}" in output
        results = [json.loads((folder / f"{name}.json").read_text()) for name in ("diversity", "variance", "sharpness")]
        found.append([one["result"] for one in results])
    assert found[0] == found[1]


def test_a_script_is_called_without_a_new_interpreter(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nif __name__ == '__main__':\n    print(sys.argv[1:])\n    sys.exit(int(sys.argv[1]))\n"
    )
    program = f"""
        print(processes.call(['{script}', '0'], None))
        from pathlib import Path
        print(processes.call(['{script}', '2'], Path('{tmp_path}/log')))
        """
    assert python(program) == (0, "['0']\n0\n2\n", "")
    assert (tmp_path / "log").read_text() == "['2']\n"
