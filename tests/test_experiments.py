"""Experiments, from the script to tables and figures, at a tiny size on files of the true form."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import main
from models import full_name
from scripts import experiment, report
from tests import files
from tests.small import NETWORK
from tests.test_ensemble import ROOT
from tests.test_measure import save_corrupted
from tests.test_readme import call, calls_of
from tests.test_report import squeezed
from utils import InputError, RunError, presets

STEPS = ["main.py", "measure_diversity.py", "measure_diversity_variance.py", "measure_sharpness.py"]
TINY = ["--model", NETWORK, "--width", "64", "--epochs", "2", "--initial_epochs", "1", "--batch_size", "16"]
SHARPNESS = "--batch_num 1 --n_iters 1 --n_draws 4 --hessian_samples 4 --probes 2 --top_k 1 --ntk_samples 4"
PARTS = "--corruptions fog snow --severities 1 2"
FEWER = f"{SHARPNESS} --mode APGD_worst --norms l2"


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


def words_of(folder, preset, *words):
    """A command line that works in a folder."""
    places = [word for name in ("runs", "measurements", "results") for word in (f"--{name}", str(folder / name))]
    small = ["--measure_flags", PARTS, "--sharpness_flags", SHARPNESS]
    return [preset, *TINY, *places, "--data_path", str(folder / "data"), *small, *words]


def run(words, monkeypatch):
    """The experiment in this process, with the commands that it calls; those that it called."""
    calls = []

    def call_here(command, log=None, jobs=1):
        argv = [str(word) for word in command]
        calls.append(argv)
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.touch()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", argv)
            call(argv[0], argv[1:])

    monkeypatch.setattr(experiment, "run_script", call_here)
    experiment.main(experiment.parse_args(words))
    return calls


def contents(folder):
    """The files of a folder; a PDF holds its date."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pdf")
    return {path.relative_to(folder): path.read_bytes() for path in files}


def check_results(folder, ensembles, methods, corrupted=True):
    """A row of the table for each method, of all its ensembles; and the figures."""
    lines = (folder / "results" / "tables.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| method"))
    table = [line.strip("|").split("|") for line in lines[start : lines.index("", start)]]
    header, _, *rows = [[cell.strip() for cell in row] for row in table]
    assert [row[1:3] for row in rows] == [[str(ensembles), "3"]] * methods
    assert len({row[0] for row in rows}) == methods
    assert ("ensemble acc. % (corrupted)" in header) == corrupted
    assert "sharpness (worst, l2)" in header
    figures = ["benchmark", "ensemble_size", "tradeoff", *(["severity"] if corrupted else [])]
    found = {path.name for path in (folder / "results").iterdir()}
    expected = {"tables.md", "validation.md", "plan.json", "measurements"}
    assert found == expected | {f"{figure}.{suffix}" for figure in figures for suffix in ("pdf", "png")}


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
    """`ALL` is the default; parts of it are chosen by variables as well as by options."""
    words = words_of(tmp_path, data)
    if (seeds, methods) != ALL:
        monkeypatch.setenv("METHODS", methods)
        words += ["--seeds", seeds, "--sharpness_flags", FEWER]
    seeds, methods = [group.split() for group in seeds.split(",")], methods.split()
    write_data(tmp_path / "data", data)
    calls = run(words, monkeypatch)
    check_results(tmp_path, len(seeds), len(methods))
    names = [f"{method}_{group[0]}" for group in seeds for method in methods]
    models = [argv[argv.index("--model") + 1] for argv in calls if argv[0] == "main.py"]
    assert models == ["resnet18"] * len(names)  # those of the experiment, before those that are given here
    expected = STEPS * len(names) + ["scripts/summarize.py"] + ["scripts/plot.py"] * 4
    assert [argv[0] for argv in calls] == expected
    for name, group in zip(names, [group for group in seeds for _ in methods], strict=True):
        settings = json.loads((tmp_path / "runs" / name / "args.json").read_text())
        assert (settings["data"], settings["model"]) == (data, full_name(NETWORK))
        assert settings["seed"] == list(map(int, group))
        assert (settings["sam"], settings["rho"]) == ((False, 0) if "deep" in name else (True, 0.2))
        assert settings["flat_ratio"] == (0.5 if "sharpbalance" in name else 0)
        if "sharpbalance" in name:
            unselected = "normal" if "paper" in name else "others" if data == "cifar10" else "one"
            assert settings["unselected"] == unselected
        variance = json.loads((tmp_path / "measurements" / name / "variance.json").read_text())["result"]
        assert set(variance["corrupted"]["parts"]) == {"fog-1", "fog-2", "snow-1", "snow-2"}

    # `summarize.py measurements/*`, as the documents say: nothing else lies there.
    assert sorted(place.name for place in (tmp_path / "measurements").iterdir()) == sorted(names)

    # Again: what is finished is skipped; an ensemble of which a file was lost is measured again. All is as it was.
    before = {name: contents(tmp_path / name) for name in ("runs", "measurements", "results")}
    (tmp_path / "measurements" / names[-1] / "variance.json").unlink()
    calls = run(words, monkeypatch)
    assert [argv[0] for argv in calls[:4]] == [*STEPS[1:], "scripts/summarize.py"]
    for place, one in before.items():
        other = contents(tmp_path / place)
        changed = [str(name) for name in one.keys() | other.keys() if one.get(name) != other.get(name)]
        assert [name for name in changed if name != "plan.json"] == [], place  # which names the command
    # Tables and figures again, from the copies alone.
    (tmp_path / "results" / "tables.md").unlink()
    (tmp_path / "measurements").rename(tmp_path / "elsewhere")
    assert [argv[0] for argv in run([*words, "--redraw"], monkeypatch)] == expected[-5:]
    assert contents(tmp_path / "results").keys() == before["results"].keys()


@pytest.mark.parametrize(
    "methods", ["same eoa", slow("sam sharpbalance sharpbalance_paper random same asam eoa")], ids=["part", "whole"]
)
def test_ablations(methods, tmp_path, monkeypatch):
    """Each method is what it is called; the whole is the default."""
    write_data(tmp_path / "data", "cifar10")
    part = ["--methods", methods] if methods == "same eoa" else []
    words = ["--data", "cifar10", "--seeds", "13 17 27", "--sharpness_flags", FEWER, *part]
    run(words_of(tmp_path, "ablations", *words), monkeypatch)
    check_results(tmp_path, 1, len(methods.split()))
    settings = {
        name: json.loads((tmp_path / "runs" / f"{name}_13" / "args.json").read_text()) for name in methods.split()
    }
    for name in {"random", "same"} & settings.keys():
        assert (settings[name]["partition"], settings[name]["match_size"]) == (name, "released")
    if "asam" in settings:
        assert (settings["asam"]["sam_adaptive"], settings["asam"]["rho"]) == (True, 0.5)
    assert settings["eoa"]["average_from"] == 1
    eoa = json.loads((tmp_path / "measurements" / "eoa_13" / "diversity.json").read_text())
    assert {Path(member["path"]).name for member in eoa["members"]} == {"model_averaged.pth.tar"}


def test_choices_on_validation(tmp_path, monkeypatch):
    """Rho by SAM over all seeds, then k and T_d by SharpBalance on the first seeds; what was chosen is measured."""
    files.write_fashion_mnist(tmp_path / "data" / "fashion-mnist", train=130)
    words = ["--images", "40", "--validation", "10", "--corrupted", "2", "--ensembles", "2", "--jobs", "1"]
    words += ["--rho", "0.1", "0.2", "--flat_ratio", "0.3", "0.5", "--initial_epochs", "0", "1"]
    words += ["--sharpness_flags", FEWER, "--methods", "deep_ensemble,eoa,sam,sharpbalance"]
    words += ["--data", "fashion_mnist", "--label_noise", "0.2"]
    calls = run(words_of(tmp_path, "digits", *words), monkeypatch)
    plan = json.loads((tmp_path / "results" / "plan.json").read_text())
    chosen, tried, runs = plan["chosen"], plan["validation"], plan["runs"]
    for name in ("rho", "k", "T_d"):
        assert tried[name][f"{chosen[name]:g}"] == max(tried[name].values())
    rho = np.mean([runs[f"sam_0.1_{seed}"]["ensemble accuracy"] for seed in (11, 21)])
    assert tried["rho"]["0.1"] == pytest.approx(rho)
    name = "_".join(["sharpbalance", *(f"{chosen[key]:g}" for key in ("rho", "k", "T_d"))])
    settings = json.loads((tmp_path / "runs" / f"{name}_21" / "args.json").read_text())
    assert (settings["rho"], settings["flat_ratio"], settings["initial_epochs"]) == tuple(chosen.values())
    measured = {argv[argv.index("--save") + 1] for argv in calls if argv[0] == "measure_diversity.py"}
    methods = ("deep_ensemble", "eoa", "sam_0.1", "sam_0.2", "sharpbalance")
    assert {Path(folder).name for folder in measured} == {f"{m}_{seed}" for m in methods for seed in (11, 21)}
    # The averages are those of the deep ensemble's own runs.
    assert not (tmp_path / "runs" / "eoa_11").exists()
    eoa = json.loads((tmp_path / "results" / "measurements" / "eoa_11" / "diversity.json").read_text())
    assert all("deep_ensemble_11" in member["path"] for member in eoa["members"])
    assert eoa["data"]["train"] == 40
    assert 0 < plan["mislabelled"]["all"] <= 0.2
    assert set(plan["mislabelled"]) == {"all", "sharpbalance", "sharpbalance_size"}
    assert "| deep_ensemble_21 " in (tmp_path / "results" / "validation.md").read_text()


def test_members(tmp_path, monkeypatch):
    """Plain ensembles of more members beside the others, whose networks another experiment measures again."""
    files.write_fashion_mnist(tmp_path / "data" / "fashion-mnist", train=130)
    (tmp_path / "choices").mkdir()
    (tmp_path / "choices" / "plan.json").write_text(json.dumps({"chosen": {"rho": 0.2, "k": 0.8, "T_d": 1}}))
    words = ["--images", "40", "--validation", "10", "--ensembles", "2", "--jobs", "1", "--rho", "0.1", "0.2"]
    words += ["--choices", str(tmp_path / "choices"), "--methods", "deep_ensemble,sam", "--sharpness_flags", FEWER]
    words += ["--runs", str(tmp_path / "runs"), "--data_path", str(tmp_path / "data"), *TINY]

    def places(name):
        return [f"--measurements={tmp_path / 'measurements' / name}", f"--results={tmp_path / name}"]

    run(["members", *words, "--plain_members", "4", *places("members")], monkeypatch)
    for name, seeds in (("deep_ensemble_of_4_21", [21, 22, 23, 24]), ("sam_0.2_21", [21, 22, 23])):
        assert json.loads((tmp_path / "runs" / name / "args.json").read_text())["seed"] == seeds
    lines = (tmp_path / "members" / "tables.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| worth of"))
    (row,) = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : start + 3])
    assert (row[:3], row[6]) == (["SAM, rho 0.2", "2", "3"], "6.00")
    assert row[5] == "new ensembles, new images"
    assert {path.name for path in (tmp_path / "members").glob("*.png")} == {"ensemble_size.png"}

    words += ["--corrupted", "2", "--measure_flags", f"--mode predict,disagreement,ood --ood digits corrupted {PARTS}"]
    calls = run(["fashion_mnist/noisy_labels", *words, *places("noisy_labels")], monkeypatch)
    trained = {Path(argv[argv.index("--save_path") + 1]).name for argv in calls if argv[0] == "main.py"}
    assert trained == {f"{name}_{seed}" for name in ("deep_ensemble", "sam_0.1") for seed in (11, 21)}
    measured = {path.name for path in (tmp_path / "noisy_labels" / "measurements").iterdir()}
    assert measured == {f"{name}_{seed}" for name in ("deep_ensemble", "sam_0.1", "sam_0.2") for seed in (11, 21)}
    assert "AUROC %, corrupted, mutual information" in (tmp_path / "noisy_labels" / "tables.md").read_text()
    figures = {path.name for path in (tmp_path / "noisy_labels").glob("*.png")}
    kinds = ("tradeoff", "benchmark", "severity", "ensemble_size", "ood", "reliability")
    assert figures == {f"{kind}.png" for kind in kinds}


STUDY = ["--data_path", "data", "--images", "40", "--validation", "10", "--ensembles", "2", "--seeds", "11 12,21 22"]
STUDY += ["--choose_on", "1", "--rho", "0.1", "0.2", "--flat_ratio", "0.5", "--sharpness_flags", FEWER, "--jobs", "1"]
STUDY += ["--measure_flags", "--mode predict,disagreement,ood --ood digits --bootstrap 20", *TINY, "--plan", "PLAN.md"]


def study(setting, *words):
    places = [word for name in ("runs", "measurements", "results") for word in (f"--{name}", f"{name}/{setting}")]
    return [f"study/{setting}", *places, *STUDY, *words]


def test_a_study(tmp_path, monkeypatch, capsys):
    """Two settings to the page; what --results holds is not made again, whatever became of runs and measurements."""
    monkeypatch.chdir(tmp_path)
    files.write_fashion_mnist(tmp_path / "data" / "fashion-mnist", train=130)
    Path("PLAN.md").write_text("# Plan")
    first, second = "noise_0.2_images_1000", "noise_0.2_images_4000"
    methods = ["--methods", "deep_ensemble,sam,late_sam,random_paper,sharpbalance_next"]
    with monkeypatch.context() as patch:  # rho 0.1 is the better one, so that there is a next one
        score = lambda self, method, values, seeds: 1 - (values["rho"] or 0)  # noqa: E731
        patch.setattr(experiment.Experiment, "validation", score)
        calls = run(study(first, *methods), patch)
        # Two ensembles by each method, and SAM at either rho.
        assert [argv[0] for argv in calls].count("main.py") == 2 * 6
        settings = {path.parent.name: json.loads(path.read_text()) for path in Path("runs", first).glob("*/args.json")}
        late, drawn = settings["late_sam_0.1_21"], settings["random_paper_0.1_0.5_1_11"]
        assert (late["sam"], late["initial_method"], late["initial_epochs"]) == (True, "sgd", 1)
        assert (drawn["partition"], drawn["match_size"], drawn["unselected"]) == ("random", "paper", "normal")
        assert settings["sharpbalance_0.2_0.5_1_11"]["rho"] == 0.2
        plan = json.loads(Path("results", first, "plan.json").read_text())
        assert (plan["finished"], plan["chosen"], plan["claims"]) == (True, {"rho": 0.1, "k": 0.5, "T_d": 1}, "study")
        sizes = {name: one["size"] for name, one in plan["sets"].items()}
        assert sizes["random_paper_0.1_0.5_1_11"] == 0.5  # of two members: what the other one picked
        digest = hashlib.sha256(b"# Plan").hexdigest()
        copies = sorted(Path("results", first, "measurements").glob("*/*.json"))
        found = [json.loads(path.read_text()) for path in copies]
        assert len(found) == 2 * 2 * 6
        assert {one["experiment"]["plan"]["sha256"] for one in [*found, {"experiment": plan}]} == {digest}
        kept = {name for one in found if "test" in one["result"] for name in one["result"]["test"]["values_of_samples"]}
        assert kept == {"ensemble_nll", "ensemble_nll_calibrated"}

        # Another machine: a clone, to which one measurement was not committed.
        before = contents(Path("results"))
        for place in ("runs", "measurements", Path("results", first, "measurements", "sharpbalance_next_21")):
            shutil.rmtree(place)
        assert "not made again" not in capsys.readouterr().out
        calls = run(study(first, *methods), patch)
        said = f"11 of 12 are in results/{first} and not made again; --results DIR makes all, there"
        assert said in capsys.readouterr().out
        assert [argv[0] for argv in calls] == [STEPS[i] for i in (0, 1, 3)] + [
            "scripts/summarize.py",
            "scripts/plot.py",
        ]
        assert calls[0][calls[0].index("--save_path") + 1] == f"runs/{first}/sharpbalance_0.2_0.5_1_21"
        assert contents(Path("results")) == before
        # What is there: --runs may hold another experiment's run of the same name, and who draws is not who made it.
        place, other = Path("results", first, "plan.json"), Path("runs", first, "deep_ensemble_11")
        other.mkdir()
        (other / "summary.json").write_text("{}")
        old = json.loads(place.read_text())
        for i in "12":
            old["runs"][f"sam_0.1_{i}1"]["ensemble accuracy"] = 1.5  # is chosen
        place.write_text(json.dumps(old))
        Path("PLAN.md").write_text("changed since")
        patch.undo()
        assert not set(STEPS) & {argv[0] for argv in run(study(first, *methods, "--jobs", "2"), patch)}
        new = json.loads(place.read_text())
        kept = ("command", "plan", "jobs", "runs")
        assert [new[name] for name in kept] == [old[name] for name in kept]
        assert list(new) == list(old)
        plain = [old["runs"][f"deep_ensemble_{i}1"]["ensemble accuracy"] for i in "12"]
        assert new["validation"]["deep ensemble"] == pytest.approx(np.mean(plain))
        # Other values by image are copied from what was measured, where that is.
        calls = run(study(first, *methods, "--by_image", "ensemble_nll"), patch)
        copies = [json.loads(path.read_text()) for path in Path("results", first).glob("measurements/*/diversity.json")]
        kept = [set(one["result"]["test"]["values_of_samples"]) == {"ensemble_nll"} for one in copies]
        assert (kept.count(True), not set(STEPS) & {argv[0] for argv in calls}) == (1, True)
        assert {one["experiment"]["plan"]["sha256"] for one in copies} == {digest}  # of the plan before the change
        # Another recipe is another experiment.
        words = ["--lr", "0.05", "--runs", "runs/other", "--skip_measuring", "--choices", f"results/{first}"]
        words = study(first, "--methods", "deep_ensemble,sharpbalance_next", *words, "--rho", "0.05", "0.1")
        assert [argv[0] for argv in run(words, patch)] == ["main.py"] * 2
        assert "rho 0.1 is the largest: without sharpbalance_next\n" in capsys.readouterr().out

    for name, content in before.items():  # as it was before that
        Path("results", name).write_bytes(content)
    run(study(second, "--choices", f"results/{first}", "--methods", "deep_ensemble,sam,sharpbalance"), monkeypatch)
    plan = json.loads(Path("results", second, "plan.json").read_text())
    assert (plan["chosen"]["rho"], plan["choices_of"], plan["validation"].keys()) == (0.1, first, {"deep ensemble"})
    call("scripts/report.py", ["results"])
    text = Path("results", "README.md").read_text()
    assert digest in text
    assert "not compared; rho 0.1, k 0.5, T_d 1 are those of noise_0.2_images_1000" in text
    what = "clean images: ensemble accuracy, SharpBalance (released) - SAM"
    row = next(line for line in squeezed(text).splitlines() if line.startswith(f"| A1, released | {what} |"))
    assert sorted(cell.strip() == "-" for cell in row.split("|")[3:-1]) == [False, True]  # of one setting only
    assert Path("results", "map.png").exists()


def test_the_command_of_the_study(tmp_path):
    """Settings in order, choices of 1,000 images for 4,000, other options to each; a page after each setting."""
    script, words = "scripts/experiments/study.sh", ["--epochs", "1"]
    calls = calls_of(script, tmp_path, words)
    settings = [Path(call[1]).name for call in calls[::2]]
    assert [name.replace("noise_", "").replace("_images", "") for name in settings] == [
        *("0.2_1000", "0.4_1000", "0_1000"),
        *("0.2_4000", "0_4000", "0.4_4000"),
    ]
    assert set(settings) == set(presets.SETTINGS)
    assert calls[1::2] == [["scripts/report.py", "results/study"]] * 6
    for name, (_, *argv) in zip(settings, calls[::2], strict=True):
        args = experiment.parse_args(argv)
        assert (args.results, args.train[-2:]) == (Path("results/study", name), words)
        choices = Path("results/study", name.replace("4000", "1000")) if "4000" in name else None
        assert args.choices == choices
    own, page = calls_of(script, tmp_path, ["--settings", "mine", "--data_path", "pets"])
    args = experiment.parse_args(own[1:])
    assert (args.preset, args.data_path, args.results) == ("mine", Path("pets"), Path("results/mine/mine"))
    assert page == ["scripts/report.py", "results/mine"]
    words = ["--settings", "noise_0_images_1000,noise_0_images_4000", "--to", "trial"]
    assert calls_of(script, tmp_path, words)[-1] == ["scripts/report.py", "results/trial"]


def test_images_of_a_folder(tmp_path, capsys):
    """They are drawn where there are enough and the parts are not the user's; else all are taken."""
    folder = tmp_path / "pets"
    files.write_image_folder(folder, {f"{part}/{name}": 8 for part in ("train", "test") for name in ("ape", "bee")})
    words = ["mine", "--data_path", str(folder), "--runs", str(tmp_path / "runs"), "--validation", "6", "--images"]
    for images, drawn in (("9", 9), ("11", None)):
        place = experiment.Experiment(experiment.parse_args([*words, images]))
        place.prepare()
        assert len(place.data.train) == (drawn or 15)
        assert ("all 15 training images" in capsys.readouterr().out) == (drawn is None)


def test_the_plan_is_of_the_claims_and_grids():
    """Each claim with its margin, and each value that is tried."""
    text = (ROOT / "results/study/PLAN.md").read_text()
    for claim in report.PRIMARY + report.SECONDARY:
        (row,) = re.findall(rf"^\| \**{claim.name[:2]}\** \|.*$", text, re.MULTILINE)
        assert f"| {claim.margin:g} {claim.unit}"[:-1] in row  # 1 point, 0.3 points
    for setting in presets.SETTINGS:
        assert f"| {setting} |" in text
        args = experiment.parse_args([f"study/{setting}"])
        assert (args.rho, args.flat_ratio, args.initial_epochs) == ([0.05, 0.1, 0.2, 0.4], [0.2, 0.5, 0.8], [15])
        assert (len(args.seeds), args.choose_on) == (5, 3)


def test_names_of_runs(tmp_path):
    """What has several values is part of them, and what the run has not is left out."""
    words = words_of(tmp_path, "digits", "--rho", "0.1", "0.2", "--methods", "sam,sharpbalance")
    place = experiment.Experiment(experiment.parse_args(words))
    assert place.run_name("sam", {"rho": 0.2, "k": 0.5, "T_d": None}) == "sam_0.2"
    assert place.run_name("sharpbalance", {"rho": 0.2, "k": 0.5, "T_d": None}) == "sharpbalance_0.2_0.5"


def test_cheaper_forms(tmp_path):
    """After a start without SAM until T_d or until 7/8 of the epochs: the names of runs, and what main.py is asked."""
    words = words_of(tmp_path, "digits", "--rho", "0.1", "0.2", "--methods", "sam,plain_start,late_sharpbalance")
    place = experiment.Experiment(experiment.parse_args([*words, "--epochs", "16"]))
    values = {"rho": 0.2, "k": 0.5, "T_d": 4}
    assert place.run_name("plain_start", values) == "plain_start_0.2_0.5_4"
    assert place.run_name("late_sharpbalance", values) == "late_sharpbalance_0.2_0.5"
    for method, begin in (("plain_start", 4), ("late_sharpbalance", 14)):
        args = main.parse_args([str(word) for word in place.flags_of(method, values)])
        assert (args.sam, args.rho, args.flat_ratio) == (True, 0.2, 0.5)
        assert (args.initial_method, args.initial_epochs, args.partition) == ("sgd", begin, "released")
    # Wrong labels in the SAM sets of all that pick samples.
    place.passed.label_noise, place.data = 0.5, SimpleNamespace(mislabelled=np.array([True, False]))
    names = [place.run_of(method, place.chosen, place.args.seeds[0]).name for method in place.args.methods]
    found = place.mislabelled({name: {"mislabelled": 0.2, "size": 0.4} for name in names})
    assert found.keys() == {
        "all",
        *(name + end for name in ("plain_start", "late_sharpbalance") for end in ("", "_size")),
    }


def test_options_by_other_names_and_variables(monkeypatch):
    """--dataset is --data, and a variable may hold a list."""
    for name, text in (("RHO", "0.1 0.2"), ("METHODS", "sam eoa"), ("MEASURE_FLAGS", "--mode KL --bins 3")):
        monkeypatch.setenv(name, text)
    args = experiment.parse_args(["digits", "--dataset", "fashion_mnist"])
    assert (args.data, args.train, args.rho, args.methods) == ("fashion_mnist", [], [0.1, 0.2], ["eoa", "sam"])
    assert args.measure_flags == "--mode KL --bins 3"


def test_passes_by_method(tmp_path):
    """They are those of what main.py is asked, with T_d at half of the epochs and sets of 0.8 of the images."""
    words, epochs = words_of(tmp_path, "digits", "--rho", "0.1"), ["--epochs", "32"]
    place = experiment.Experiment(experiment.parse_args([*words, *epochs]))
    for method in presets.METHODS:
        flags = place.flags_of(method, {"rho": 0.1, "k": 0.5, "T_d": 16})
        asked = main.parse_args([*epochs, *map(str, flags)])
        second = 0.8 if asked.flat_ratio else 1.0  # passes over its images after the start
        begin = asked.initial_epochs
        start = 1 + (asked.sam and asked.initial_method == "sam")
        passes = (start * begin + (1 + second * asked.sam) * (32 - begin)) / 32
        assert presets.PASSES[method] == pytest.approx(passes, abs=0.05), method


def test_what_cannot_be(tmp_path, monkeypatch, capsys):
    for words, message in (
        (["nothing"], "preset: expected one of quickstart, digits"),
        (["digits", "--methods", "sgd"], "--methods: expected some of deep_ensemble"),
        (["digits", "--images", "50"], "--images: given without --validation"),
        (["digits", "--match-size"], "--match_size: set by --methods, --seeds and --images; choose"),
        (
            ["digits", "--train_idx_path", "train.npy"],
            "--train_idx_path: set by --methods, --seeds and",
        ),
        (["digits", "--folder", "{x}"], "--folder: '{x}' cannot be read ('x'); see --help"),
        (["digits", "--measure_flags", "--mode 'a"], "--measure_flags: '--mode 'a' cannot be read (No closing quot"),
        (["digits", "--seeds", "1 2,3 x"], "--seeds: expected whole numbers, ensembles separated by commas, got '3 x'"),
        (["digits", "--jobs", "none"], "--jobs: expected a whole number from 1 to 1024, or auto, got 'none'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            experiment.parse_args(words)
        assert message in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--initial_epochs: eoa averages from this epoch on"):
        run(["digits", "--methods", "eoa"], monkeypatch)
    with pytest.raises(InputError, match="--images: expected at most 888, got 1000"):
        run(["digits", "--images", "1000", "--validation", "10"], monkeypatch)
    with pytest.raises(InputError, match="--epochs: late_sam begins after 7/8 of them"):
        run(["digits", "--methods", "late_sam"], monkeypatch)
    for words, message in (
        (["--rho", "0.1", "0.2", "--methods", "sharpbalance"], "--rho: sam chooses among several values; add it"),
        (
            ["--flat_ratio", "0.1", "0.2", "--methods", "sam,sharpbalance_paper"],
            "--flat_ratio: sharpbalance chooses among",
        ),
        (["--initial_epochs", "1", "2", "--methods", "sam,same"], "--initial_epochs: sharpbalance chooses"),
        (["--methods", "sam,sharpbalance_next"], "--rho: sharpbalance_next has the next of several values; give more"),
        (["--seeds", "1 2,2 3"], "--seeds: seed 2 is in two ensembles, which would share a network; give others"),
        (["--seeds", "1 2,4 5", "--plain_members", "4"], "--plain_members: seed 4 is in two ensembles"),
    ):
        with pytest.raises(InputError, match=message):
            run(["digits", *words], monkeypatch)
    with pytest.raises(InputError, match=r"x/plan\.json: .*run the experiment first"):
        run(["digits", "--choices", "x"], monkeypatch)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "plan.json").write_text("{}")
    with pytest.raises(InputError, match=r"--choices x: its plan\.json has no choices yet; run the experiment first"):
        run(["digits", "--choices", "x"], monkeypatch)
    with pytest.raises(InputError, match=r"nothing\.md"):
        run(["digits", "--plan", "nothing.md"], monkeypatch)


def test_a_command_that_fails(tmp_path):
    log = tmp_path / "logs" / "a.log"
    with pytest.raises(InputError, match=r"main\.py ended with status 2; see .*a\.log"):
        experiment.run_script(["main.py", "--seed", "x"], log)
    assert log.read_text().count("error:") == 1
    (tmp_path / "x.py").write_text("raise SystemExit(1)")
    with pytest.raises(RunError, match=r"x\.py ended with status 1$"):
        experiment.run_script([str(tmp_path / "x.py")])


SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "scripts" / "experiments").glob("*.sh"))
SCRIPTS += [Path("scripts/quickstart.sh")]


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_scripts_name_their_experiment(script, tmp_path):
    """What they call is a command line of the script, with the user's words at its end."""
    binaries = tmp_path / "venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" END >>"{tmp_path / "calls"}"\n')
    (binaries / "python").chmod(0o755)
    (binaries.parent / "installed-requirements.txt").write_text(2 * (ROOT / "requirements.txt").read_text())
    words = ["bash", str(script), "--data_path", "some place"]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"VENV": str(binaries.parent)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    calls = [call.splitlines() for call in (tmp_path / "calls").read_text().split("END\n")[:-1]]
    for name, *argv in calls:
        if name == "scripts/experiment.py":
            args = experiment.parse_args(argv)
            assert args.data_path == Path("some place")
            if script.stem != "study":
                assert args.preset.split("/")[-1] in f"{script.stem} noisy_labels regime"
    assert {call[0] for call in calls} <= {"scripts/experiment.py", "scripts/report.py"}


@pytest.mark.slow
def test_by_processes(tmp_path):
    """Real processes: torchrun gives what one process gives, parts are added, a mistake ends it in one line."""
    write_data(tmp_path / "data", "cifar10", corrupted=False)

    def start(folder, *words):
        command = [sys.executable, "scripts/experiment.py", *words_of(folder, "cifar10", "--measure_flags="), *words]
        command += ["--data_path", str(tmp_path / "data"), "--methods", "sharpbalance"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    one, two = tmp_path / "one", tmp_path / "two"
    for folder, words in ((one, []), (two, ["--nproc", "2"])):
        done = start(folder, "--seeds", "13 17 27", *words)
        assert done.returncode == 0, done.stdout + done.stderr
        check_results(folder, 1, 1, corrupted=False)
    name = "measurements/sharpbalance_13/diversity.json"
    first, second = (json.loads((folder / name).read_text()) for folder in (one, two))
    assert first["result"] == second["result"]
    assert [m["sha256_of_weights"] for m in first["members"]] == [m["sha256_of_weights"] for m in second["members"]]
    # Another part joins the tables; the first one is skipped, by whatever number of processes it was made.
    before = contents(two / "measurements" / "sharpbalance_13")
    done = start(two, "--seeds", "13 17 27,113 117 127")
    assert "sharpbalance_13" not in done.stdout.partition("wrote")[0]
    assert contents(two / "measurements" / "sharpbalance_13") == before
    check_results(two, 2, 1, corrupted=False)
    # Other settings are not skipped; main.py refuses them.
    done = start(two, "--seeds", "13 17 27", "--rho", "0.1")
    assert done.returncode == 2
    assert "--rho 0.1 here, 0.2 there" in done.stderr
