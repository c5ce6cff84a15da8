"""A run's folder on machines that people have: file systems, names, launchers, restarts, and other hardware."""

import errno
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import torch

import main
import measure_diversity
import utils.run
from scripts import summarize
from tests.test_ensemble import results
from tests.test_main import call, refused
from utils import InputError, RunError, distributed
from utils.files import write_atomically

COMMIT = utils.run._commit  # which the tests of resuming replace
FLAGS = ["--width", "2", "--epochs", "2", "--batch_size", "200", "--seed", "1", "--threads", "1"]


@pytest.fixture(scope="module", autouse=True)
def _one_commit():
    """Whatever is committed while the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils.run, "_commit", lambda: "1234567")
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    call([*FLAGS, "--save_path", folder])
    return folder


@pytest.fixture
def stopped(whole, tmp_path):
    """A copy of it that lacks its summary, as if it had been stopped."""
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "summary.json").unlink()
    return folder


def about(folder):
    return json.loads((folder / "environment.json").read_text())


# File systems
def sync_of_folders(monkeypatch, error, of="fsync"):
    """Folders, and nothing else, cannot be synced, or not be opened to do so."""
    real = {"fsync": os.fsync, "open": os.open}

    def fsync(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(error, os.strerror(error))
        return real["fsync"](number)

    def open_(path, flags, *rest, **more):
        if os.path.isdir(path):
            raise OSError(error, os.strerror(error))
        return real["open"](path, flags, *rest, **more)

    monkeypatch.setattr(os, of, {"fsync": fsync, "open": open_}[of])


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_folders(error, monkeypatch, tmp_path):
    sync_of_folders(monkeypatch, error)
    write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"


def test_a_folder_that_cannot_be_opened(monkeypatch, tmp_path):
    """Written to but not read; or Windows."""
    sync_of_folders(monkeypatch, errno.EACCES, "open")
    write_atomically(tmp_path / "x", b"new")


def test_a_disk_that_fails(monkeypatch, tmp_path):
    sync_of_folders(monkeypatch, errno.EIO)
    with pytest.raises(RunError, match="x: could not be written"):
        write_atomically(tmp_path / "x", b"new")


@pytest.mark.parametrize("after", [0, 2, 89])
def test_a_rank_that_sees_the_folder_late(after, monkeypatch, tmp_path):
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == after:
            (tmp_path / "args.json").touch()

    monkeypatch.setattr(utils.run.time, "sleep", sleep)
    if not after:
        (tmp_path / "args.json").touch()
    assert utils.run._appears(tmp_path / "args.json")
    assert len(looks) == after


def test_a_rank_that_never_sees_the_folder(monkeypatch, tmp_path):
    waited = []
    monkeypatch.setattr(utils.run.time, "sleep", waited.append)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    args = main.parse_args([*FLAGS, "--save_path", str(tmp_path / "run")])
    run = utils.run.Run(main.settings_of(args), None)
    with pytest.raises(InputError, match="rank 1 does not see rank 0's folder"), run.open():
        pass
    assert sum(waited) == 90


def test_a_system_without_fcntl(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(utils.run, "fcntl", None)
    error = refused([*FLAGS, "--save_path", tmp_path / "run"], capsys)
    assert "training on Windows requires WSL" in error
    assert "INSTALL.md" in error
    assert not (tmp_path / "run").exists()


# Names
def test_names_that_are_not_utf_8(tmp_path, monkeypatch):
    """A run, its measurements and its row in a table, in a folder named in Latin-1; and a | in a name."""
    folder = tmp_path / os.fsdecode(b"exp\xe9riences") / "a|b"
    try:
        folder.mkdir(parents=True)
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    monkeypatch.setattr("sys.argv", ["main.py", "--save_path", str(folder)])
    call([*FLAGS, "--epochs", "1", "--seed", "1 2", "--save_path", folder])
    assert os.fsencode(folder) in (folder / "command.txt").read_bytes()
    (folder / "args.json").unlink()  # so that the ensemble is called by its folder's name
    members = [str(path) for path in sorted(folder.glob("seed_*"))]
    words = ["--resume", *members, "--mode", "predict,disagreement", "--save", str(folder), "--bootstrap", "0"]
    measure_diversity.main(measure_diversity.parse_args(words))
    table = folder / "table.md"
    summarize.main(summarize.parse_args([str(folder), "--format", "markdown", "--to", str(table)]))
    rows = [line for line in table.read_text().splitlines() if line.startswith("|")]
    assert rows[2].startswith("| a\\|b")
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1


def test_a_link_to_nothing_as_the_default_folder(tmp_path, monkeypatch, capsys):
    """`runs` as a link to a disk that is not mounted."""
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to("/mnt/not mounted")
    error = refused(FLAGS, capsys)
    assert "--save_path runs/digits_deep_ensemble: runs is a link to /mnt/not mounted, which does not exist" in error


def test_where_a_relative_path_came_from(tmp_path, monkeypatch, capsys, stopped):
    monkeypatch.chdir(tmp_path)
    error = refused(["--data", "cifar10", "--data_path", "nowhere"], capsys)
    assert error.endswith(f"; --data_path nowhere is relative to {tmp_path}")
    error = refused(["--data", "cifar10", "--data_path", tmp_path / "nowhere"], capsys)
    assert "is relative to" not in error
    recorded = json.loads((stopped / "args.json").read_text())
    recorded |= {"train_idx_path": "train.npy", "val_idx_path": str(tmp_path / "val.npy")}
    (stopped / "args.json").write_text(json.dumps(recorded))
    error = refused(["--resume", stopped], capsys)
    assert error.endswith(f"--train_idx_path train.npy is relative to {tmp_path}, and comes from {stopped}/args.json")
    words = ["--resume", str(stopped), "--save", str(tmp_path / "m"), "--mode", "predict"]
    with pytest.raises(InputError, match=r"train.npy is relative to .*, and comes from .*args.json"):
        measure_diversity.main(measure_diversity.parse_args(words))


# Settings of another version
@pytest.mark.parametrize("words", [["--resume"], [*FLAGS, "--save_path"]])
def test_settings_of_a_newer_version(words, stopped, capsys):
    """They are not the user's misspelt options, and are not left out."""
    recorded = json.loads((stopped / "args.json").read_text())
    (stopped / "args.json").write_text(json.dumps(recorded | {"cutmix": 0.1, "not_used": None}))
    (stopped / "environment.json").write_text(json.dumps(about(stopped) | {"commit": "abc1234"}))
    error = refused([*words, stopped], capsys)
    assert error.endswith(
        f"{stopped}/args.json: made by another version, whose settings are not known here (cutmix 0.1); "
        "use the version that made it, commit abc1234"
    )


@pytest.mark.parametrize(
    ("change", "part"),
    [({"model": "convnext"}, "--model: expected one of "), ({"epochs": "many"}, "--epochs: expected a whole number")],
)
def test_values_of_a_newer_version(change, part, stopped, capsys):
    recorded = json.loads((stopped / "args.json").read_text())
    (stopped / "args.json").write_text(json.dumps(recorded | change))
    error = refused(["--resume", stopped], capsys)
    assert f"error: {stopped}/args.json: {part}" in error
    assert "it was changed, or made by another version" in error


# The environment
def test_a_run_that_goes_on_on_another_machine(stopped, monkeypatch, capsys, whole):
    """Both are recorded, and one line says what that means; a third start on the second machine says nothing."""
    first = about(stopped)
    assert "cpu" in first
    monkeypatch.setattr(distributed, "cpu_kind", lambda: "Another CPU, AVX512")
    monkeypatch.setattr(utils.run, "_commit", lambda: "abc1234")
    call(["--resume", stopped])
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert errors.startswith(
        f"note: the run goes on with cpu Another CPU, AVX512 instead of {first['cpu']}, commit abc1234"
    )
    assert "bit for bit, on one kind of CPU, one version of torch and one number of threads only" in errors
    found = about(stopped)
    assert {name: value for name, value in found.items() if name != "resumed_with"} == first
    assert [later["cpu"] for later in found["resumed_with"]] == ["Another CPU, AVX512"]
    call(["--resume", stopped])  # finished: nothing goes on
    (stopped / "summary.json").unlink()
    call(["--resume", stopped])
    assert capsys.readouterr().err == ""
    assert about(stopped) == found
    assert results(stopped) == results(whole)
    monkeypatch.setattr(torch, "__version__", "9.9")
    (stopped / "summary.json").unlink()
    call(["--resume", stopped])
    assert "with torch 9.9 instead of " in capsys.readouterr().err
    assert len(about(stopped)["resumed_with"]) == 2


def test_another_number_of_threads(stopped, capsys):
    """Said once and recorded, and so is the way back: without --threads a run goes on as it began."""
    call(["--resume", stopped, "--threads", "2"])
    errors = capsys.readouterr().err
    assert errors.startswith("note: the run goes on with threads 2 instead of 1; environment.json has both; ")
    assert errors.endswith("and one number of threads only\n")
    (stopped / "summary.json").unlink()
    call(["--resume", stopped, "--threads", "2"])
    assert capsys.readouterr().err == ""
    (stopped / "summary.json").unlink()
    call(["--resume", stopped])
    assert capsys.readouterr().err.startswith("note: the run goes on with threads 1 instead of 2; ")
    assert about(stopped)["threads"] == 1
    assert [later["threads"] for later in about(stopped)["resumed_with"]] == [2, 1]


def test_another_commit_alone_is_said_too(stopped, monkeypatch, capsys):
    before = about(stopped)
    (stopped / "environment.json").write_text(json.dumps(before | {"commit": "abc1234"}))
    monkeypatch.setattr(utils.run, "_commit", lambda: "def5678")
    call(["--resume", stopped])
    errors = capsys.readouterr().err
    assert errors == "note: the run goes on with commit def5678 instead of abc1234; environment.json has both\n"


def test_an_environment_of_an_earlier_version(stopped, capsys):
    """Which did not record the CPU: not known is not another one."""
    before = about(stopped)
    del before["cpu"]
    (stopped / "environment.json").write_text(json.dumps(before))
    call(["--resume", stopped])
    assert capsys.readouterr().err == ""
    assert about(stopped) == before


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (
            "processor\t: 0\nmodel name\t: AMD EPYC 7B13\n\nprocessor\t: 1\nmodel name\t: AMD EPYC 7B13\n",
            "AMD EPYC 7B13",
        ),
        ("processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n", "0x41 0xd0c"),
    ],
)
def test_kinds_of_cpu(text, kind, monkeypatch):
    monkeypatch.setattr(distributed.Path, "read_text", lambda *words, **more: text)
    assert distributed.cpu_kind() == f"{kind}, {torch.backends.cpu.get_cpu_capability()}"


def test_the_kind_of_cpu_without_proc(monkeypatch):
    """As on macOS."""

    def missing(*words, **more):
        raise FileNotFoundError

    monkeypatch.setattr(distributed.Path, "read_text", missing)
    monkeypatch.setattr(distributed.subprocess, "run", lambda *w, **m: subprocess.CompletedProcess(w, 0, "Apple M2\n"))
    assert distributed.cpu_kind().startswith("Apple M2, ")
    monkeypatch.setattr(distributed.subprocess, "run", missing)
    assert len(distributed.cpu_kind()) > 3


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_this_code(tmp_path, monkeypatch):
    """Not that of a repository around it, or of a git hook that starts a run."""

    def git(*words):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.invalid", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    code = tmp_path / "code" / "utils" / "run.py"
    code.parent.mkdir(parents=True)
    code.write_text("# this code")
    monkeypatch.setattr(utils.run, "__file__", str(code))
    assert COMMIT() is None  # no repository at all
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    assert COMMIT() is None
    git("add", ".")
    git("commit", "-m", "second")
    commit = git("rev-parse", "--short", "HEAD")
    assert COMMIT() == commit
    monkeypatch.setenv("GIT_DIR", "/no/repository")
    assert COMMIT() == commit
    monkeypatch.delenv("GIT_DIR")
    code.write_text("# changed")
    assert COMMIT() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "/nowhere")
    assert COMMIT() is None  # no git


def test_more_threads_than_cores(stopped, monkeypatch, capsys):
    recorded = json.loads((stopped / "args.json").read_text())
    (stopped / "args.json").write_text(json.dumps(recorded | {"threads": 3}))
    monkeypatch.setattr(distributed, "cores", lambda: 2)
    call(["--resume", stopped])
    assert capsys.readouterr().err.startswith(
        "note: the run began with 3 threads, and this machine has 2 cores: "
        "the result is the same, but training is slower; "
    )
    call(["--resume", stopped, "--threads", "2"])
    assert capsys.readouterr().err == ""


# Launchers
@pytest.mark.parametrize("tasks", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_each_task_of_a_launcher_starts_the_whole_run(tasks, stopped, monkeypatch, capsys):
    """One holds the folder; the others say what to do."""
    monkeypatch.setenv(tasks, "1")
    with utils.run.locked(stopped):
        assert "torchrun" not in refused(["--resume", stopped], capsys)
        monkeypatch.setenv(tasks, "3")
        error = refused(["--resume", stopped], capsys)
    assert "is training in it; wait for it to end" in error
    assert "start it through torchrun" in error
    call(["--resume", stopped])


def test_a_process_of_jobs_knows_the_tasks_of_a_launcher(monkeypatch):
    """Its own WORLD_SIZE is none of them."""
    monkeypatch.setenv(distributed.STORE, "store")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not distributed.started_many_times()
    monkeypatch.setenv("SLURM_NTASKS", "3")
    assert distributed.started_many_times()


def overwrite(folder):
    """Start with --overwrite; whether an epoch that was there before is still there."""
    mark = folder / "seed_1" / "sam_mask.npy"
    mark.write_bytes(b"of before")
    call([*FLAGS, "--overwrite", "--save_path", folder])
    return mark.exists()


@pytest.mark.parametrize("variable", ["SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"])
def test_overwrite_acts_once_in_a_job(variable, stopped, monkeypatch, capsys):
    """A scheduler that starts the same job again must not delete what it has done; another job, or a person, may."""
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    monkeypatch.setenv(variable, "77")
    assert not overwrite(stopped)
    (stopped / "summary.json").unlink()
    assert capsys.readouterr().err == ""
    assert overwrite(stopped)
    assert f"--overwrite: this job began the run in {stopped}, and goes on" in capsys.readouterr().err
    with monkeypatch.context() as person:
        person.setattr("sys.stdin.isatty", lambda: True, raising=False)
        assert not overwrite(stopped)
    monkeypatch.setenv(variable, "78")
    assert not overwrite(stopped)
    # A run that this job began, but not by --overwrite.
    call([*FLAGS, "--save_path", stopped / "new"])
    assert not overwrite(stopped / "new")
    shutil.rmtree(stopped / "new")
    monkeypatch.delenv(variable)
    assert not overwrite(stopped)


@pytest.mark.parametrize("more", ["note.txt", None])
def test_overwrite_with_a_member_on_another_disk(more, stopped, tmp_path):
    """Its files go, the link stays, and what else lies there stays too."""
    shutil.move(stopped / "seed_1", tmp_path / "disk")
    (stopped / "seed_1").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / (more or "sam_mask.npy")).touch()
    call([*FLAGS, "--overwrite", "--save_path", stopped])
    assert (stopped / "seed_1").is_symlink()
    assert (tmp_path / "disk" / "checkpoint.pth.tar").exists()
    assert not (tmp_path / "disk" / "sam_mask.npy").exists()
    assert more is None or (tmp_path / "disk" / more).exists()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_overwrite_deletes_nothing_where_it_cannot_delete_all(kind, stopped, capsys):
    strange = stopped / "seed_0"
    strange.symlink_to("/mnt/not mounted") if kind == "link" else strange.touch()
    before = sorted(stopped.rglob("*"))
    error = refused([*FLAGS, "--overwrite", "--save_path", stopped], capsys)
    assert f"--overwrite: {strange}" in error
    assert "nothing was deleted" in error
    assert [path for path in sorted(stopped.rglob("*")) if path.name != "lock"] == before
