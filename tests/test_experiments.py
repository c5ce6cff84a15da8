"""The paper's experiments, from the script to its tables and figures, at a tiny size on files of the true form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import files
from tests.test_measure import save_corrupted
from tests.test_readme import call

ROOT = Path(__file__).resolve().parent.parent
STEPS = ["main.py", "measure_diversity.py", "measure_diversity_variance.py", "measure_sharpness.py"]
TINY = ("--width", "2", "--epochs", "2", "--initial_epochs", "1", "--batch_size", "16")
SHARPNESS = "--batch_num 1 --n_iters 1 --n_draws 4 --hessian_samples 4 --probes 2 --top_k 1 --ntk_samples 4"


def write_data(folder, data, corrupted=True):
    """A few images of a data set, and of its corrupted copy fog and snow at severities 1 and 2."""
    if data == "tiny_imgnet":
        tiny = files.write_tiny_imagenet(folder / "tiny-imagenet-200", per_class=8)
        for place in [
            folder / "Tiny-ImageNet-C" / name / severity / wnid.name
            for name in ("fog", "snow")
            if corrupted
            for severity in "12"
            for wnid in (tiny / "train").iterdir()
        ]:
            place.mkdir(parents=True)
            Image.fromarray(np.full((64, 64, 3), 99, np.uint8)).save(place / "val_0.JPEG")
        return
    files.write_cifar(folder / data, data, images=5 if data == "cifar10" else 24)
    if corrupted:
        name, classes = {"cifar10": ("CIFAR-10-C", 10), "cifar100": ("CIFAR-100-C", 100)}[data]
        save_corrupted(folder / name, 10, ("fog", "snow"), 32, 3, classes)


def environment(folder, **variables):
    """Variables of a script that works in a folder, and finds this python with all that it needs installed."""
    binaries = folder / "venv" / "bin"
    if not binaries.exists():
        binaries.mkdir(parents=True)
        for name, module in (("python", ""), ("torchrun", "-m torch.distributed.run")):
            (binaries / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
            (binaries / name).chmod(0o755)
        requirements = (ROOT / "requirements.txt").read_text()
        (binaries.parent / "installed-requirements.txt").write_text(2 * requirements)
    small = {"MEASURE_FLAGS": "--corruptions fog snow --severities 1 2", "SHARPNESS_FLAGS": SHARPNESS}
    places = {name: str(folder / name.lower()) for name in ("RUNS", "MEASUREMENTS", "RESULTS", "VENV")}
    return os.environ | places | {"DATA_PATH": str(folder / "data")} | small | variables


def run(data, folder, **variables):
    """The script as a user calls it: what it prints."""
    command = ["bash", f"scripts/experiments/{data}.sh", *TINY]
    done = subprocess.run(command, cwd=ROOT, env=environment(folder, **variables), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_here(data, folder, monkeypatch, **variables):
    """The same, but this process does what it calls python for, without importing torch each time: those calls.

    The script's python hands its arguments over and waits for the answer; no arguments tell that the script has ended.
    """
    variables = environment(folder, **variables)
    questions, answers = folder / "questions", folder / "answers"
    for pipe in (questions, answers):
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
    (folder / "venv" / "bin" / "python").write_text(
        f'#!/bin/sh\n[ "$1" != -c ] || exec "{sys.executable}" "$@"\n'
        f'printf "%s\\0" "$@" >"{questions}"\nread status <"{answers}"\nexit "$status"\n'
    )
    words = ["bash", "-c", f'bash "$@"; status=$?; : >"{questions}"; exit $status', "-"]
    words += [f"scripts/experiments/{data}.sh", *TINY]
    calls = []
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(words, cwd=ROOT, env=variables, stdout=output, stderr=output)
        while argv := questions.read_text().split("\0")[:-1]:
            calls.append(argv)
            status = 1
            try:
                with monkeypatch.context() as patch:
                    patch.setattr(sys, "argv", argv)
                    call(*argv[:1], argv[1:])
                status = 0
            finally:
                answers.write_text(f"{status}\n")
                if status:
                    process.terminate()
        assert process.wait() == 0, (folder / "output").read_text()
    return calls


def contents(folder):
    """The files of a folder; a PDF holds its date."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pdf")
    return {path.relative_to(folder): path.read_bytes() for path in files}


def check_results(folder, ensembles, methods, corrupted=True):
    """A row of the table for each method, of all its ensembles; and the figures."""
    lines = (folder / "results" / "tables.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| method"))
    header, _, *rows = [line.strip("| ").split(" | ") for line in lines[start : lines.index("", start)]]
    assert [row[1:3] for row in rows] == [[str(ensembles), "3"]] * methods
    assert len({row[0] for row in rows}) == methods
    assert ("ensemble acc. % (corrupted)" in header) == corrupted
    assert "sharpness (worst, l2)" in header
    figures = ["benchmark", "ensemble_size", "tradeoff", *(["severity"] if corrupted else [])]
    found = {path.name for path in (folder / "results").iterdir()}
    assert found == {"tables.md", *(f"{figure}.{suffix}" for figure in figures for suffix in ("pdf", "png"))}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


ALL = ("13 17 27,113 117 127,43 59 223", "deep_ensemble sam sharpbalance sharpbalance_paper")


@pytest.mark.parametrize(
    ("data", "seeds", "methods"),
    [
        ("cifar100", "13 17 27,113 117 127", "sam sharpbalance_paper"),
        slow("cifar10", *ALL),
        slow("cifar100", *ALL),
        slow("tiny_imgnet", *ALL),
    ],
)
def test_all_of_it(data, seeds, methods, tmp_path, monkeypatch):
    """`ALL` is what is there by default."""
    part = {}
    if (seeds, methods) != ALL:
        part = {"SEEDS": seeds, "METHODS": methods, "SHARPNESS_FLAGS": f"{SHARPNESS} --mode APGD_worst --norms l2"}
    seeds, methods = [group.split() for group in seeds.split(",")], methods.split()
    write_data(tmp_path / "data", data)
    calls = run_here(data, tmp_path, monkeypatch, **part)
    check_results(tmp_path, len(seeds), len(methods))
    names = [f"{method}_{group[0]}" for group in seeds for method in methods]
    assert [argv[0] for argv in calls] == STEPS * len(names) + ["scripts/summarize.py"] + ["scripts/plot.py"] * 4
    for name, group in zip(names, [group for group in seeds for _ in methods], strict=True):
        settings = json.loads((tmp_path / "runs" / name / "args.json").read_text())
        assert (settings["data"], settings["model"], settings["width"]) == (data, "resnet18", 2)
        assert settings["seed"] == list(map(int, group))
        assert (settings["sam"], settings["rho"]) == ((False, 0) if "deep" in name else (True, 0.2))
        assert settings["flat_ratio"] == (0.5 if "sharpbalance" in name else 0)
        if "sharpbalance" in name:
            unselected = "normal" if "paper" in name else "others" if data == "cifar10" else "one"
            assert settings["unselected"] == unselected
        variance = json.loads((tmp_path / "measurements" / name / "variance.json").read_text())["result"]
        assert set(variance["corrupted"]["parts"]) == {"fog-1", "fog-2", "snow-1", "snow-2"}

    # Again: what is finished is passed over; an ensemble of which a file was lost is taken up. All is as it was.
    places = [tmp_path / name for name in ("runs", "measurements", "results")]
    before = list(map(contents, places))
    (tmp_path / "measurements" / names[-1] / "variance.json").unlink()
    calls = run_here(data, tmp_path, monkeypatch, **part)
    assert [argv[0] for argv in calls[:5]] == [*STEPS, "scripts/summarize.py"]
    assert Path(calls[0][-1]).name == names[-1]
    for place, one, other in zip(places, before, map(contents, places), strict=True):
        assert [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)] == [], place


@pytest.mark.parametrize(
    "methods", ["same eoa", slow("sam sharpbalance sharpbalance_paper random same asam eoa")], ids=["part", "whole"]
)
def test_ablations(methods, tmp_path, monkeypatch):
    """Each method is what it is called; the whole is what is there by default."""
    write_data(tmp_path / "data", "cifar10")
    part = {"METHODS": methods} if methods == "same eoa" else {}
    part |= {"SHARPNESS_FLAGS": f"{SHARPNESS} --mode APGD_worst --norms l2", "INITIAL_EPOCHS": "1"}
    run_here("ablations", tmp_path, monkeypatch, DATA="cifar10", SEEDS="13 17 27", **part)
    check_results(tmp_path, 1, len(methods.split()))
    settings = {
        name: json.loads((tmp_path / "runs" / f"{name}_13" / "args.json").read_text()) for name in methods.split()
    }
    for name in {"random", "same"} & settings.keys():
        assert (settings[name]["select"], settings[name]["match_size"]) == (name, True)
    if "asam" in settings:
        assert (settings["asam"]["sam_adaptive"], settings["asam"]["rho"]) == (True, 0.5)
    eoa = json.loads((tmp_path / "measurements" / "eoa_13" / "diversity.json").read_text())
    assert {Path(member["path"]).name for member in eoa["members"]} == {"model_averaged.pth.tar"}


@pytest.mark.slow
def test_members(tmp_path, monkeypatch):
    """Nine members, of which every size is measured."""
    write_data(tmp_path / "data", "cifar10")
    part = {
        "DATA": "cifar10",
        "METHODS": "sharpbalance",
        "SHARPNESS_FLAGS": f"{SHARPNESS} --mode APGD_worst --norms l2",
    }
    run_here("members", tmp_path, monkeypatch, **part)
    found = json.loads((tmp_path / "measurements" / "sharpbalance_13" / "diversity.json").read_text())
    assert len(found["members"]) == 9
    assert set(found["result"]["test"]["ensemble_by_size"]) == set("123456789")


@pytest.mark.slow
def test_regime(tmp_path):
    """A row for each ensemble, of the numbers that its run wrote; the folder's name has a space."""
    folder = tmp_path / "a place"
    files.write_fashion_mnist(folder / "data" / "fashion-mnist", train=4600)
    run("regime", folder)
    train, val = (set(np.load(folder / "runs" / f"{name}.npy").tolist()) for name in ("train", "val"))
    assert (len(train), len(val), len(train & val)) == (2000, 2000, 0)
    rows = [line.strip("| ").split(" | ") for line in (folder / "results" / "regime.md").read_text().splitlines()]
    rows = [row for row in rows if row[0] in ("8", "16")]
    assert [row[:3] for row in rows] == [
        [width, augmentation, rho]
        for width, augmentation in (("16", "flip"), ("8", "flip"), ("8", "standard"))
        for rho in ("0", "0.05", "0.1")
    ]
    for width, augmentation, rho, _, member, ensemble, *_ in rows:
        place = folder / "runs" / f"width_{width}_{augmentation}_rho_{rho}"
        settings = json.loads((place / "args.json").read_text())
        assert (settings["augmentation"], settings["rho"]) == (augmentation, float(rho))
        last = json.loads((place / "summary.json").read_text())["last"]
        assert ensemble == f"{100 * last['ensemble']['val_acc']:.1f} %"
        assert member.startswith(f"{100 * np.mean([one['val_acc'] for one in last['members']]):.1f} ± ")


@pytest.mark.slow
def test_by_processes_and_without_a_corrupted_set(tmp_path):
    """Real processes: torchrun gives what one process gives, parts are added, a mistake ends it in one line."""
    write_data(tmp_path / "data", "cifar10", corrupted=False)
    part = {"MEASURE_FLAGS": "", "METHODS": "sharpbalance"}
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "data").symlink_to(tmp_path / "data")
    assert "clean images only" in run("cifar10", one, **part, SEEDS="13 17 27")
    check_results(one, 1, 1, corrupted=False)
    run("cifar10", two, **part, SEEDS="13 17 27", NPROC="2")
    check_results(two, 1, 1, corrupted=False)
    name = "measurements/sharpbalance_13/diversity.json"
    first, second = (json.loads((folder / name).read_text()) for folder in (one, two))
    assert first["result"] == second["result"]
    assert [m["sha256_of_weights"] for m in first["members"]] == [m["sha256_of_weights"] for m in second["members"]]
    # Another part joins the tables; the first one is passed over, by whatever number of processes it was made.
    before = contents(two / "measurements" / "sharpbalance_13")
    output = run("cifar10", two, **part, SEEDS="13 17 27,113 117 127")
    assert "sharpbalance_13: finished" in output
    assert contents(two / "measurements" / "sharpbalance_13") == before
    check_results(two, 2, 1, corrupted=False)
    # Other settings are not passed over; main.py refuses them.
    command = ["bash", "scripts/experiments/cifar10.sh", *TINY]
    for variables, message in (
        ({"RHO": "0.1", "METHODS": "sharpbalance"}, "--rho 0.1 here, 0.2 there"),
        ({"METHODS": "sgd"}, "METHODS: 'sgd' is none of"),
    ):
        done = subprocess.run(command, cwd=ROOT, env=environment(two, **variables), capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
