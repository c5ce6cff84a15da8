"""The verdicts, the plans, and the report of the reproduction; the programs that it calls have tests of their own."""

import json
import math
import re
import shutil
import statistics
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from scripts import reproduce_fashion_mnist as reproduce
from tests import files
from tests.test_ensemble import ROOT
from tests.test_summarize import SAM, write
from utils import InputError, RunError
from utils.metrics import crossed_interval
from utils.results import Ensemble, read_ensemble

SPEED = {8: 1000.0, 16: 400.0}


def test_verdict():
    """By scipy's interval, of values without spread too; over images as well where they are given."""
    assert reproduce.verdict([1.0, 1.1, 1.2])[0] == "supported"
    assert reproduce.verdict([-1.0, -1.1, -1.2])[0] == "contradicted"
    assert reproduce.verdict([1.0, -1.1, 0.2])[0] == "undecided"
    gaps = [0.3, 0.1, 0.7, 0.2]
    low, high = stats.t.interval(0.95, 3, np.mean(gaps), stats.sem(gaps))
    _, mean, interval = reproduce.verdict(gaps)
    assert mean == pytest.approx(0.325)
    assert interval == pytest.approx([low, high])
    # Ensembles that agree on a difference which three images of a thousand make.
    images = torch.zeros(1000)
    images[:3] = 1
    assert reproduce.verdict([0.003, 0.003, 0.003])[0] == "supported"
    assert reproduce.verdict([images] * 3)[:2] == ("undecided", pytest.approx(0.003))
    # Where one of them is not known by image, over ensembles.
    some = reproduce.verdict([images, 0.002, images])
    assert some == reproduce.verdict([images.mean().item(), 0.002, images.mean().item()])
    assert reproduce.verdict([-images - 1] * 3)[0] == "contradicted"


def test_claims_have_the_sign_of_their_words():
    """Each is above 0 if it is right; numbers in which they are told apart."""
    names = ("ensemble", "corrupted_ensemble", "disagreement", "eir", "sharpness")
    numbers = {
        "deep_ensemble": (0.80, 0.50, 0.30, 0.40, 3.0),
        "sam_0.05": (0.82, 0.55, 0.20, 0.30, 2.0),
        "sam_0.2": (0.70, 0.40, 0.10, 0.10, 1.0),
        "sharpbalance": (0.85, 0.57, 0.22, 0.35, 1.5),
        "sharpbalance_paper": (0.84, 0.60, 0.19, 0.33, 1.5),
        "random": (0.86, 0.56, 0.25, 0.31, 1.5),
    }
    measured = {
        method: {"11": Ensemble(Path(), method, (11,), dict(zip(names, values, strict=True)), {}, {}, {}, {})}
        for method, values in numbers.items()
    }
    measured |= {"sam": measured["sam_0.05"], "sam_largest": measured["sam_0.2"]}
    for images in (False, True):
        if images:
            for found in measured.values():
                ensemble = found["11"]
                ensemble.by_sample = {
                    name: torch.full((4,), value, dtype=torch.float64)
                    for name, value in ensemble.values.items()
                    if name != "sharpness"
                }
        gaps = {claim.name: float(np.mean(np.asarray(claim.gap(measured, "11")))) for claim in reproduce.CLAIMS}
        logs, rates = np.log([3, 2, 1]), np.array([0.3, 0.2, 0.1])
        assert gaps == pytest.approx(
            {
                "i": np.cov(logs, rates)[0, 1] / np.var(logs, ddof=1),
                "i, diversity": 0.20,
                "i, sharpness": math.log(3),
                "ii": 0.10,
                "iii, released": 0.02,
                "iii, paper": 0.05,
                "iv, released": 0.03,
                "iv, paper": 0.02,
                "v, corrupted": 0.03,
                "v, clean": -0.01,
                "vi, corrupted": 0.01,
                "vi, clean": -0.01,
                "vi, diversity": -0.03,
                "vii, released": 0.02,
                "vii, paper": -0.01,
            }
        )


def test_plans_are_the_largest_first():
    for name in (*reproduce.NAMES, ""):
        costs = [
            sum(
                reproduce.estimate(setting, SPEED[setting.width], 2)
                for setting in plan
                if setting.name == (name or setting.name)
            )
            for plan in reproduce.PLANS
        ]
        assert costs == sorted(costs, reverse=True)
    settings = [setting for plan in reproduce.PLANS for setting in plan]
    assert all(3 <= setting.ensembles <= len(reproduce.SEEDS) for setting in settings)
    for setting in settings:
        cost, speed = reproduce.estimate(setting, SPEED[setting.width], 2), SPEED[setting.width]
        assert cost / 32 < reproduce.estimate(setting, 32 * speed, 64) < cost
    # Where there are more jobs than commands, the five stages take as long as their longest commands.
    many = reproduce.estimate(setting, 1000 * speed, 1000)
    longest = [passes / count / speed for count, passes in reproduce.stages(setting)]
    assert many == pytest.approx(sum(longest) + 5 * reproduce.STARTUP, rel=0.01)


def test_the_plan_that_fits_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "throughput", lambda width, jobs: SPEED[width])
    monkeypatch.setattr(reproduce, "load_data", lambda *args, **more: type("Data", (), {"test": range(10_000)}))
    flags = ["--runs", str(tmp_path), "--jobs", "2", "--minutes"]
    with pytest.raises(InputError, match=r"--minutes 1: the smallest plan takes about \d+ minutes here"):
        reproduce.choose(reproduce.parse_args([*flags, "1"]))
    (setting,) = reproduce.choose(reproduce.parse_args([*flags, "300", "--only", "clean_labels"]))
    assert setting.name == "clean_labels"
    assert reproduce.estimate(setting, SPEED[16], 2) <= 300 * 60
    assert re.search(
        r"into 300 minutes takes about \d+: \d ensembles of 3 by each method, \d\d ep", capsys.readouterr().out
    )
    # The other one gets all of the time.
    plan = reproduce.choose(reproduce.parse_args([*flags, "100"]))
    text = capsys.readouterr().out
    assert "going on with 3 ensembles" in text
    assert "into 100 minutes" in text
    assert [one.name for one in plan] == ["clean_labels", "noisy_labels"]
    assert [asdict(one) for one in plan] == [about["setting"] for about in plan.values()]
    assert reproduce.choose(reproduce.parse_args([*flags, "10000"])).keys() == plan.keys()
    (tmp_path / "noisy_labels" / "plan.json").write_text("{}")
    with pytest.raises(InputError, match=r"plan\.json: no plan of this script; remove .*noisy_labels, or give"):
        reproduce.choose(reproduce.parse_args([*flags, "200"]))
    (tmp_path / "noisy_labels" / "plan.json").rename(tmp_path / "noisy_labels" / "x")
    with pytest.raises(InputError, match=r"noisy_labels: not empty, and without a plan"):
        reproduce.choose(reproduce.parse_args([*flags, "200"]))


def test_a_command_that_fails(tmp_path):
    work = object.__new__(reproduce.Work)
    with pytest.raises(RunError, match=r"main\.py ended with status 2; see .*a\.log"):
        work.run_one([["main.py", "--seed", "x"], ["main.py", "--help"]], tmp_path / "logs" / "a.log")
    assert (tmp_path / "logs" / "a.log").read_text().count("error:") == 1


@pytest.fixture
def results(tmp_path):
    """Result files in which SharpBalance is better than SAM by one point, and SAM than a deep ensemble by 0.4 to 3."""
    methods = {"deep_ensemble": 0.0, "sam_0.1": 0.02, "sam_0.2": 0.01, "eoa": 0.0}
    methods |= {"sharpbalance": 0.03, "sharpbalance_paper": 0.02, "random": 0.02}
    about = {
        "settings": {
            "noisy_labels": {
                "setting": asdict(reproduce.noisy(100, 10, 5, 3)),
                "environment": {"cpus": 2, "platform": "here", "torch": "2"},
                "jobs": 2,
                "estimated_seconds": 60,
                "validation_images": 10,
                "test_images": 10,
                "chosen": {"rho": 0.1, "k": 0.5, "T_d": 5},
                "validation": {
                    "deep ensemble": 0.45,
                    "rho": {"0.1": 0.5, "0.2": 0.4},
                    "k": {"0.3": 0.52, "0.5": 0.53},
                    "T_d": {"2": 0.51, "5": 0.53},
                },
                "mislabelled": {
                    "all": 0.2,
                    **{m + s: 0.25 for m in reproduce.LABELS for s in ("", "_size")},
                },
            }
        }
    }
    (tmp_path / "plan.json").write_text(json.dumps(about))
    for i, seed in enumerate(("11", "21", "31")):
        for method, gain in methods.items():
            trained = SAM | {
                "seed": [int(seed)],
                "rho": float(method[4:]) if method[:4] == "sam_" else 0.1,
                "at": method,
            }
            write(
                tmp_path / "noisy_labels" / f"{method}_{seed}",
                trained,
                (int(seed), 99),
                0.8 + gain + (0.01 * i if method == "sam_0.1" else 0),
                1.0 + gain,
            )
    return tmp_path


def test_report(results, monkeypatch):
    monkeypatch.setattr(reproduce, "FIGURES", {})
    monkeypatch.setattr(
        reproduce,
        "CLAIMS",
        [
            claim
            for claim in reproduce.CLAIMS
            if claim.name in ("i", "i, diversity", "i, sharpness", "iv, released", "vi, clean")
        ],
    )
    reproduce.report(results)
    text = (results / "README.md").read_text()
    table = (results / "noisy_labels.md").read_text()
    assert "| difference of | to | pairs |" in table
    # The first images are right: 166 of 200 by SharpBalance, 164, 166 and 168 by SAM, 164 on random samples.
    gaps = torch.zeros(3, 200)
    gaps[0, 164:166], gaps[2, 166:168] = 1, -1
    low, high = (100 * edge for edge in crossed_interval(gaps))
    assert f"| +0.00 points | [{low:.2f}, {high:.2f}] | 3 | **undecided** |" in text
    low, high = (100 * edge for edge in crossed_interval(gaps[:1].expand(3, 200)))
    assert f"random sets of its size | +1.00 points | [{low:.2f}, {high:.2f}] | 3 | **undecided** |" in text
    assert "| i, diversity | clean images: disagreement," in text
    assert "deep ensemble 45.00 %; SAM, rho 0.1: 50.00 %, rho 0.2: 40.00 %; SharpBalance (released), " in text
    assert "first seeds alone, k 0.3: 52.00 %, k 0.5: 53.00 %, T_d 2: 51.00 %, T_d 5: 53.00 %; chosen: " in text
    edge = "(an end of what was tried)"
    assert f"k 0.5 {edge}, T_d 5 {edge}. One ensemble on 10 images has a standard error of 11.3 points" in text
    assert "in an adaptive l2 ball of radius 0.5, mean over 20 batches of 5 training images, by 'tight' in 7" in text
    assert f"rho 0.1 {edge}" in text
    assert "Of the training images 20.0 % have a wrong label" in text
    (results / "plan.json").write_text('{"settings": {"noisy_labels": {"validation": {"rho": {}}}}}')
    with pytest.raises(InputError, match=r"plan\.json: not of this version; give another --results"):
        reproduce.report(results)
    (results / "plan.json").unlink()
    with pytest.raises(InputError, match=r"plan\.json: missing"):
        reproduce.report(results)


def test_former_results_are_removed(tmp_path):
    """Those of ensembles that are not in the plan; nothing else."""
    for name in ("sam_0.1_11/diversity.json", "sam_0.1_21/sharpness.json", "notes/mine.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    (tmp_path / "table.md").write_text("")
    reproduce.clear(tmp_path, {"sam_0.1_11"})
    assert {path.name for path in tmp_path.iterdir()} == {"sam_0.1_11", "notes", "table.md"}


def test_table_of_corruptions(results):
    """Means over severities and ensembles; no table without the numbers."""
    measured = {method: {} for method in ("deep_ensemble", "sam", "sharpbalance", "sharpbalance_paper", "random")}
    for i, method in enumerate(measured):
        for seeds, shift in (("11", 0.0), ("21", 0.1)):
            parts = {f"{name}-{s}": 0.1 * i + 0.02 * s + shift for s in (1, 3) for name in ("glass_blur", "fog")}
            parts = {name: {"rates": {"ensemble_accuracy": rate}} for name, rate in parts.items()}
            content = {"result": {"corrupted": {"parts": parts}}}
            measured[method][seeds] = Ensemble(Path(), method, (11,), {}, {}, {}, {}, content)
    *_, glass, fog, _ = reproduce.by_corruption(measured)
    assert glass == "| glass blur | 9.0 | 19.0 | 29.0 | 39.0 | 49.0 | 17.0 | 21.0 |"
    assert fog.startswith("| fog | 9.0 |")
    for ensemble in measured["sam"].values():
        ensemble.content["result"] = {}
    assert reproduce.by_corruption(measured) == []


def test_the_report_in_the_repository_is_that_of_its_result_files(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "results" / "fashion_mnist", tmp_path / "results" / "fashion_mnist")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce.plot, "main", lambda args: None)  # pictures depend on matplotlib's version
    reproduce.report(Path("results/fashion_mnist"))
    for path in sorted((ROOT / "results" / "fashion_mnist").glob("*.md")):
        assert (tmp_path / path.relative_to(ROOT)).read_text() == path.read_text(), path.name


def test_tables_of_the_readme_are_those_of_the_result_files():
    names = {
        "deep ensemble": "deep_ensemble",
        "averaged weights (EoA)": "eoa",
        "SAM on random samples, as many": "random",
    }
    names |= {"SharpBalance, released": "sharpbalance", "SharpBalance, paper": "sharpbalance_paper"}
    tables, rows = re.split(r"\| \| member, clean .*\n", (ROOT / "README.md").read_text())[1:], 0
    for setting, table in zip(reproduce.NAMES, tables, strict=True):
        for line in table.partition("\n\n")[0].splitlines()[1:]:
            label, *cells = line.strip("| ").split(" | ")
            label = label.removesuffix(" (chosen on validation)")
            method = (
                label.replace("SAM, rho ", "sam_") if label.startswith("SAM, rho") else names[label.split(", rho")[0]]
            )
            folders = (ROOT / "results" / "fashion_mnist" / setting).glob(f"{method}_[1-9]*")
            found = [
                read_ensemble(folder).values for folder in folders if folder.name.count("_") == method.count("_") + 1
            ]
            for value, cell in zip(("member", "ensemble", "corrupted_ensemble", "disagreement"), cells, strict=True):
                values = [100 * one[value] for one in found]
                assert cell == f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} %", (
                    setting,
                    label,
                    value,
                )
            rows += 1
    assert rows == 16


@pytest.mark.slow
def test_whole(tmp_path, monkeypatch, capsys):
    """Everything, with two ensembles of tiny runs; given again it finds all done, and writes the same report."""
    monkeypatch.chdir(tmp_path)
    files.write_fashion_mnist(Path("data/fashion-mnist"), train=130)
    monkeypatch.setattr(reproduce, "VALIDATION", 10)
    monkeypatch.setattr(reproduce, "RHOS", (0.1,))
    monkeypatch.setattr(reproduce, "KS", (0.5, 0.7))
    monkeypatch.setattr(reproduce, "SPLITS", (0.25, 0.5))
    monkeypatch.setattr(reproduce, "throughput", lambda width, jobs: SPEED[width])
    setting = reproduce.Setting("noisy_labels", 2, 0.2, 100, 4, 2, 2)
    monkeypatch.setattr(reproduce, "PLANS", ((setting,),))
    monkeypatch.setitem(SPEED, 2, 100.0)
    reproduce.main(reproduce.parse_args(["--jobs", "2"]))
    assert " 100%  about 0 min left" in capsys.readouterr().out
    report = Path("results/fashion_mnist/README.md").read_text()
    found = json.loads(Path("results/fashion_mnist/plan.json").read_text())["settings"]["noisy_labels"]
    k, t_d = found["chosen"]["k"], found["chosen"]["T_d"]
    assert found["validation"]["k"][str(k)] == max(found["validation"]["k"].values())
    assert found["validation"]["T_d"][str(t_d)] == max(found["validation"]["T_d"].values())
    for method, partition in (("sharpbalance", "released"), ("sharpbalance_paper", "paper")):
        run = Path(f"runs/fashion_mnist/noisy_labels/{method}_0.1_{k}_{t_d}_21")
        trained = json.loads((run / "args.json").read_text())
        assert trained["partition"] == partition
        assert trained["initial_epochs"] == t_d
        assert trained["flat_ratio"] == k
    assert report.count("| 2 | **") == len(reproduce.CLAIMS)
    reproduce.main(reproduce.parse_args(["--jobs", "2"]))
    assert "min left" not in capsys.readouterr().out
    assert Path("results/fashion_mnist/README.md").read_text() == report
