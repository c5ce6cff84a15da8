"""scripts/summarize.py and the intervals it uses."""

import base64
import csv
import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from scripts import summarize
from tests import commands
from utils.files import write_json
from utils.metrics import (
    OOD_METRICS,
    OOD_SCORES,
    bootstrap_means,
    calibration_bins,
    corrected_interval,
    crossed_interval,
    pack_counts,
    pack_values,
    paired_bootstrap,
    percentile_interval,
    t_interval,
    unpack_counts,
    unpack_values,
)
from utils.results import copy_results, read_ensemble

ROOT = Path(__file__).resolve().parent.parent
SAM = {"sam": True, "rho": 0.1, "sam_adaptive": False, "flat_ratio": 0.0, "partition": "released", "unselected": None}
SHARPBALANCE = SAM | {"flat_ratio": 0.5, "unselected": "one", "initial_epochs": 15}
IMAGES = 200


def write(folder, settings, seeds, accuracy, sharpness=None, **change):
    """The files of one ensemble, as the measuring scripts write them; the first images are right."""
    right = np.zeros(IMAGES, dtype=int)
    right[: round(accuracy * IMAGES)] = 1
    row = {
        "rates": {"member_accuracy": accuracy - 0.05, "ensemble_accuracy": accuracy, "disagreement": 0.04},
        "ensemble": {"nll": 0.1, "ece": 0.02},
        "members": [{"accuracy": accuracy - 0.06}, {"accuracy": accuracy - 0.04}],
        "der": 0.8,
        "eir": 0.3,
        "right_of_samples": {
            "members": pack_counts(2 * right),
            "ensemble": pack_counts(right),
            "differing_pairs": pack_counts(1 - right),
        },
        "intervals_95": {"ensemble_accuracy": [accuracy - 0.01, accuracy + 0.01]},
        "parts": 1,
    }
    common = {
        "command": f"python measure_diversity.py --save {folder.name}",
        "members": [{"seed": seed, "sha256_of_weights": f"{seed:064x}"} for seed in seeds],
        "network": {"model": "resnet18", "width": 8},
        "data": {"dataset": "digits", "test": IMAGES, "sha256_of_arrays_and_split": "d"},
        "protocol": {"checkpoint": "best", "bins": 15, "corruptions": ["fog", "snow"], "severities": [1, 5]},
        "environment": {"commit": "abc", "cpus": 2, "torch": "2"},
        "trained": settings | {"seed": list(seeds)},
        "result": {"test": row},
    }
    write_json(_made(folder) / "diversity.json", common | change)
    if sharpness is not None:
        result = {"APGD_worst-l2": {"mean": sharpness, "std": 0.1}}
        protocol = {"rho0": 0.5, "adaptive": True, "batch_num": 20, "eval_batch_size": 5, "maximiser": "tight"}
        write_json(folder / "sharpness.json", {"protocol": protocol | {"n_iters": 7}, "result": result})
    return folder


def _made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


call = partial(commands.call, summarize)


def refused(capsys, *argv):
    return commands.refusal(capsys, call, *argv)


def test_one_ensemble_each(tmp_path, capsys):
    a = write(tmp_path / "sam", SAM, (1, 2), 0.80, sharpness=2.0)
    b = write(tmp_path / "sharp", SHARPBALANCE, (1, 2), 0.85, sharpness=1.5)
    call(a, b)
    out = capsys.readouterr().out
    assert "SharpBalance (released), rho 0.1, k 0.5, T_d 15" in out
    assert "80.00 [79.00, 81.00]" in out
    assert "75.00 ± 1.41" in out
    assert "2.0000 ± 0.1000" in out
    difference = out[out.index("difference of") :]
    assert re.search(r"^to +SAM, rho 0\.1$", difference, re.MULTILINE)
    assert re.search(r"^ensemble acc\. % +\+5\.00$", difference, re.MULTILINE)  # one pair has no interval
    assert "of these networks only" in out
    assert "-0.5000" in difference
    line = (
        "sharp: measured by python measure_diversity.py --save sharp; seeds 1 2; commit abc; weights 00000000, 00000000"
    )
    assert line in out


def test_several_ensembles_are_one_row_and_pairs_have_the_same_seeds(tmp_path, capsys):
    sam = [write(tmp_path / f"sam{i}", SAM, (i, i + 10), 0.80 + 0.01 * i) for i in range(3)]
    other = [write(tmp_path / f"sharp{i}", SHARPBALANCE, (i, i + 10), 0.82 + 0.015 * i) for i in range(1, 4)]
    call(*sam, *other, "--format", "csv")
    rows = [line.split(",") for line in capsys.readouterr().out.replace('"', "").splitlines()]
    assert len(rows) == 14
    right = torch.zeros(3, IMAGES)
    for i, row in enumerate(right):
        row[: 160 + 2 * i] = 1
    interval = [100 * edge for edge in crossed_interval(right)]
    text = ",".join(rows[1])
    assert f"81.00 ± 1.00 [{interval[0]:.2f}, {interval[1]:.2f}]" in text
    interval = t_interval([2.0, 2.0, 2.0])
    # Seeds 1 and 2 are in both: 83.5 - 81 and 85 - 82.
    trained = "--sam True --rho 0.1 --sam_adaptive False --flat_ratio 0.0 --partition released"
    first, second = (torch.zeros(IMAGES) for _ in range(2))
    first[162:167] = second[164:170] = 1
    low, high = (100 * edge for edge in crossed_interval(torch.stack([first, second])))
    assert f"+2.75 [{low:.2f}, {high:.2f}]" in ",".join(rows[5])
    low, high = t_interval([0.0, 0.0])
    assert "+0.0000 [0.0000, 0.0000]" in ",".join(rows[5])  # of the NLL
    assert (
        ",".join(rows[8]) == f"{sam[0]},python measure_diversity.py --save sam0,,{trained},0 10,abc,00000000, 00000000"
    )
    call(*sam, *other, "--format", "markdown", "--to", tmp_path / "t" / "table.md")
    text = (tmp_path / "t" / "table.md").read_text()
    assert len(re.findall(r"^\|[-|]+\|$", text, re.MULTILINE)) == 2
    assert "over new ensembles, with the images as they are: " in text
    # One ensemble beside several has a table of its own.
    alone = write(tmp_path / "alone", SAM | {"rho": 0.2}, (1, 11), 0.80)
    call(*sam, alone, "--format", "markdown", "--to", tmp_path / "t" / "table.md")
    text = (tmp_path / "t" / "table.md").read_text()
    assert len(re.findall(r"^\|[-|]+\|$", text, re.MULTILINE)) == 3
    assert re.search("One ensemble: .* Several: ", text)


def test_values_by_image_give_intervals_over_both(tmp_path, capsys):
    """Of the NLL before and after the temperature, on clean images and as means over corrupted ones."""
    random, names = np.random.default_rng(0), ("ensemble_nll", "ensemble_nll_calibrated")
    folders, values = [], {}
    for i, settings in enumerate([SAM] * 3 + [SHARPBALANCE] * 3):
        folder = write(tmp_path / str(i), settings, (i % 3, 9), 0.8)
        content = json.loads((folder / "diversity.json").read_text())
        clean = content["result"]["test"]
        corrupted = json.loads(json.dumps(clean)) | {"parts": 75, "samples": 200.0, "right_of_samples": {}}
        content["result"]["corrupted"], content["data"]["sha256_of_corrupted"] = {"mean": corrupted}, "c"
        for place, row in (("", clean), ("corrupted_", corrupted)):
            drawn = {name: random.exponential(j + 1 + bool(place), IMAGES) for j, name in enumerate(names)}
            row["values_of_samples"] = {name: pack_values(column) for name, column in drawn.items()}
            for name, text in row["values_of_samples"].items():
                values.setdefault(place + name, []).append(torch.from_numpy(unpack_values(text)))
            nll, calibrated = (drawn[name].mean() for name in names)
            row["ensemble"] |= {"nll": nll, "calibrated": {"nll": calibrated, "ece": 0.01}}
            row |= {"rmsce": 0.04 if place else 0.03, "rmsce_interval": [0.01, 0.05]}
        write_json(folder / "diversity.json", content)
        folders.append(folder)
    call(*folders, "--format", "csv")
    table, differences = (list(csv.reader(part.splitlines())) for part in capsys.readouterr().out.split("\n\n")[:2])
    for title, value in {
        "ensemble ECE %, calibrated": 1,
        "ensemble RMSCE %": 3,
        "ensemble RMSCE % (corrupted)": 4,
    }.items():
        assert table[1][table[0].index(title)].startswith(f"{value}.00 ± 0.00")
    titles = {"ensemble NLL": names[0], "ensemble NLL, calibrated": names[1]}
    titles |= {f"{title} (corrupted)": f"corrupted_{name}" for title, name in titles.items()}
    for title, name in titles.items():
        column, stacked = table[0].index(title), torch.stack(values[name])
        for row, part in (
            (table[1], stacked[:3]),
            (table[2], stacked[3:]),
            (differences[1], stacked[3:] - stacked[:3]),
        ):
            low, high = crossed_interval(part)
            assert row[column].endswith(f" [{low:.4f}, {high:.4f}]")
            assert float(row[column].split()[0]) == pytest.approx(part.mean().item(), abs=2e-3)
    call(*folders)
    only = re.search(r"with the images as they are: (.*); else over new", " ".join(capsys.readouterr().out.split()))[1]
    assert "NLL" not in only
    assert "ensemble ECE %" in only


def test_the_note_names_what_is_over_ensembles_alone(tmp_path, capsys):
    """Of a value that one ensemble of one method does not have by image, and that all ensembles have."""
    groups = {"sam": SAM, "sharp": SHARPBALANCE}
    folders = [write(tmp_path / f"{n}{i}", s, (i, 9), 0.8 + i / 50, 2.0) for n, s in groups.items() for i in range(2)]

    def over(ensembles):
        call(*ensembles)
        return re.search(r"95 % interval (over .*?)\. method ", " ".join(capsys.readouterr().out.split()))[1]

    def change(folder, *names):
        content = json.loads((folder / "diversity.json").read_text())
        for name in names:
            del content["result"]["test"]["right_of_samples"][name]
        write_json(folder / "diversity.json", content)

    alone = "over new ensembles, with the images as they are: "
    rest = "ensemble NLL, ensemble ECE %, sharpness (worst, l2)"
    assert over(folders) == f"{alone}{rest}; else over new ensembles and new test images"
    change(folders[3], "ensemble")
    expected = f"{alone}ensemble acc. %, gain, points, EIR, DER, {rest}; else over new ensembles and new test images"
    assert over(folders) == over(folders[::-1]) == expected
    # What some ensembles lack has an interval in the other row, and what is never known by image leaves nothing else.
    for folder in folders:
        change(folder, "members", "differing_pairs", *["ensemble"] * (folder != folders[3]))
    (folders[0] / "sharpness.json").unlink()
    assert over(folders) == f"{alone}member acc. %, ensemble acc. %, gain, points, EIR, DER, disagreement %, {rest}"


def test_latex(tmp_path, capsys):
    """Nothing but commands, cells and comments, and no sign that would stop LaTeX."""
    a, b = write(tmp_path / "a", SAM, (1, 2), 0.8), write(tmp_path / "b", SHARPBALANCE, (1, 2), 0.9)
    call(a, b, "--format", "latex")
    text = capsys.readouterr().out
    assert r"75.00 $\pm$ 1.41" in text
    assert r"T\_d 15" in text
    for line in filter(None, text.splitlines()):
        assert re.match(r"% |\\begin\{tabular\}\{lr+\}$|\\end\{tabular\}$|\\hline$|.* \\\\$", line), line
        if not line.startswith(("%", "\\begin")):
            assert not re.search(r"(?<!\\)[%_#]", line), line


def test_the_baseline_has_the_same_rho(tmp_path, capsys):
    """Else it is the first SAM ensemble; what has no partner says so."""
    folders = [write(tmp_path / f"sam{rho}", SAM | {"rho": rho}, (1, 2), 0.8 + rho) for rho in (0.05, 0.1)]
    folders.append(write(tmp_path / "sharp", SHARPBALANCE, (1, 2), 0.92))
    folders.append(write(tmp_path / "plain", SAM | {"sam": False, "rho": 0.0}, (1, 2), 0.8))
    folders.append(write(tmp_path / "other", SHARPBALANCE | {"rho": 0.1, "flat_ratio": 0.3}, (3, 4), 0.92))
    call(*folders, "--format", "csv")
    lines = capsys.readouterr().out.splitlines()
    rows = list(csv.reader(lines[lines.index("") + 1 :]))[:5]
    assert [row[1:3] for row in rows[1:]] == [
        ["SAM, rho 0.05", "1"],
        ["SAM, rho 0.1", "1"],
        ["SAM, rho 0.05", "1"],
        ["SAM, rho 0.1", "no same seeds"],
    ]
    assert rows[2][0].startswith("SharpBalance")
    assert rows[2][rows[0].index("ensemble acc. %")].startswith("+2.00")
    assert set(rows[4][3:]) == {"-"}


def test_ratios_by_sample(tmp_path):
    """Their mean is the ratio; the interval over resampled images is that of the resampled ratio."""
    random = np.random.default_rng(0)
    a, b = (random.random(2000) < rate for rate in (0.7, 0.8))
    whole = a | (random.random(2000) < 0.3)
    error, gain, differ = 1 - (a.mean() + b.mean()) / 2, whole.mean() - (a.mean() + b.mean()) / 2, (a != b).mean()
    row = {
        "rates": {"member_accuracy": 1 - error, "ensemble_accuracy": whole.mean(), "disagreement": differ},
        "der": differ / error,
        "eir": gain / error,
        "right_of_samples": {
            "members": pack_counts(a.astype(int) + b),
            "ensemble": pack_counts(whole),
            "differing_pairs": pack_counts(a != b),
        },
        "intervals_95": {},
        "parts": 1,
    }
    folder = write(tmp_path / "a", SAM, (1, 2), 0.8, result={"test": row})
    found = read_ensemble(folder)
    columns = np.stack([(a + 0.0 + b) / 2, whole, a != b], axis=1)
    member, ensemble, pairs = bootstrap_means(torch.from_numpy(columns.astype(float)), 2000).T
    for name, draws in (("eir", (ensemble - member) / (1 - member)), ("der", pairs / (1 - member))):
        assert found.by_sample[name].mean().item() == pytest.approx(found.values[name])
        expected = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        assert paired_bootstrap(found.by_sample[name]) == pytest.approx(expected, abs=0.01)


def test_gain_and_all_parts_of_sharpness(tmp_path, capsys):
    """The gain is of images as well, and so has an interval; of what was not measured there is no line."""
    folder = write(tmp_path / "sam", SAM, (1, 2), 0.9, sharpness=2.0)
    content = json.loads((folder / "sharpness.json").read_text())
    for i, part in enumerate(("APGD_average-l2", "hessian_t", "hessian_e", "fisher", "NTK")):
        content["result"][part] = {"mean": i + 1.25, "std": 0.5, "n": 2}
    content["result"]["NTK"]["n"] = 1  # cut off
    write_json(folder / "sharpness.json", content)
    call(folder)
    out = capsys.readouterr().out
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "5.00 [" in rows["gain, points"]
    assert "1.2500 ± 0.5000" in rows["sharpness (average, normal noise)"]
    assert "2.2 ± 0.5" in rows["trace of Hessian"]
    assert "3.25 ± 0.50" in rows["top eigenvalue"]
    assert "4.250 ± 0.500" in rows["Fisher trace"]
    assert not {"log det NTK", "sharpness (worst, linf)"} & set(rows)
    one = read_ensemble(folder)
    assert one.by_sample["gain"].mean() == pytest.approx((one.by_sample["ensemble"] - one.by_sample["member"]).mean())


@pytest.mark.parametrize(("radius", "shown"), [(0.005, True), (0.05, True), (0.051, False), (0.5, False)])
def test_linf_is_shown_at_small_radii_only(radius, shown, tmp_path, capsys):
    folder = write(tmp_path / "sam", SAM, (1, 2), 0.9, sharpness=2.0)
    content = json.loads((folder / "sharpness.json").read_text())
    content["result"]["APGD_worst-linf"] = {"mean": 3e9, "std": 1e9, "n": 2, "protocol": {"rho0": radius}}
    write_json(folder / "sharpness.json", content)
    call(folder)
    out = capsys.readouterr().out
    assert ("sharpness (worst, linf)" in out) == shown
    assert ("Sharpness in linf at a radius above 0.05 is left out." in out) != shown
    assert re.search(r"^sharpness \(worst, l2\) +2\.0000 ± 0\.1000$", out, re.MULTILINE)


def test_linf_that_is_left_out_need_not_agree(tmp_path, capsys):
    """As where half of the ensembles were measured by an earlier version, at 0.5."""
    for name, radius, value in (("sam", 0.5, 3e9), ("sharpbalance", 0.01, 1.5)):
        folder = write(tmp_path / name, {"sam": SAM, "sharpbalance": SHARPBALANCE}[name], (1, 2), 0.9, sharpness=2.0)
        content = json.loads((folder / "sharpness.json").read_text())
        protocol = content["protocol"] | {"rho0": radius}
        content["result"]["APGD_worst-linf"] = {"mean": value, "std": 0.5, "n": 2, "protocol": protocol}
        write_json(folder / "sharpness.json", content)
    call(tmp_path / "sam", tmp_path / "sharpbalance")
    out = capsys.readouterr().out
    assert re.search(r"^sharpness \(worst, linf\) +- +1\.5000 ± 0\.5000$", out, re.MULTILINE)
    assert "above 0.05 is left out" in out


def test_the_data_are_named(tmp_path, capsys):
    data = {"dataset": "digits", "test": IMAGES, "sha256_of_arrays_and_split": "d", "train": 7, "label_noise": 0.2}
    call(write(tmp_path / "sam", SAM, (1, 2), 0.9, data=data))
    text = capsys.readouterr().out
    assert "resnet18 of width 8, 7 training images, 20 % of their labels wrong, checkpoints" in text


def test_the_note_has_the_numbers_of_clean_and_corrupted_images(tmp_path, capsys):
    """Corrupted copies may be of the first test images only. Of some ensembles they need not be measured."""
    folders = [write(tmp_path / f"sam{i}", SAM, (i, i + 10), 0.8) for i in range(3)]
    call(*folders)
    assert f", test set of {IMAGES} images. ±:" in capsys.readouterr().out
    content = json.loads((folders[1] / "diversity.json").read_text())
    content["result"]["corrupted"] = {"mean": content["result"]["test"] | {"parts": 75, "samples": 50.0}}
    write_json(folders[1] / "diversity.json", content)
    for form in ("text", "markdown", "latex"):
        call(*folders, "--format", form)
        assert f", test set of {IMAGES} images, corrupted copies of 50 of them. ±:" in capsys.readouterr().out


def test_the_note_says_how_members_are_averaged(tmp_path, capsys):
    """Where it is not the mean of the probabilities."""
    for average, said in (("probs", False), ("logits", True)):
        folder = write(tmp_path / average, SAM, (1, 2), 0.8)
        content = json.loads((folder / "diversity.json").read_text())
        content["protocol"]["average"] = average
        write_json(folder / "diversity.json", content)
        call(folder)
        assert (" images. Ensembles: softmax of the mean logit. " in capsys.readouterr().out) is said


def test_copied_files_give_the_same_table(tmp_path, capsys):
    """`copy_results` leaves out what no table needs."""
    folder = write(tmp_path / "a" / "sam", SAM, (1, 2), 0.9, sharpness=2.0)
    content = json.loads((folder / "diversity.json").read_text())
    part = content["result"]["test"]
    content["result"]["corrupted"] = {"mean": part, "parts": {"fog-1": part}}
    write_json(folder / "diversity.json", content)
    copy_results(folder, tmp_path / "b" / "sam")
    kept = json.loads((tmp_path / "b" / "sam" / "diversity.json").read_text())
    assert kept["result"]["corrupted"]["parts"] == {"fog-1": {"rates": part["rates"]}}
    tables = []
    for name in "ab":
        call(tmp_path / name / "sam")
        tables.append(capsys.readouterr().out.replace(str(tmp_path / name), ""))
    assert tables[0] == tables[1]
    # Without a corrupted set, too.
    write(tmp_path / "c" / "sam", SAM, (1, 2), 0.9, sharpness=2.0)
    copy_results(tmp_path / "c" / "sam", tmp_path / "d" / "sam")
    for name in ("diversity.json", "sharpness.json"):
        before, after = (json.loads((tmp_path / place / "sam" / name).read_text()) for place in "cd")
        assert before == after


def test_copies_may_leave_out_values_by_image(tmp_path):
    """What is named stays, of test and corrupted images and of other data; what is right stays in any case."""
    folder = write(tmp_path / "a" / "sam", SAM, (1, 2), 0.9, sharpness=2.0)
    content = json.loads((folder / "diversity.json").read_text())
    part = content["result"]["test"]
    part["values_of_samples"] = {name: pack_values(np.ones(IMAGES)) for name in ("ensemble_nll", "ensemble_brier")}
    content["result"]["corrupted"] = {"mean": dict(part), "parts": {}}
    packed = {score: dict.fromkeys(OOD_METRICS, "x") for score in OOD_SCORES}
    part["ood"] = {"digits": {"values_of_samples": packed}}
    write_json(folder / "diversity.json", content)
    copy_results(folder, tmp_path / "b", {"asked": "all"}, ["ensemble_nll", "auroc entropy"])
    copy = json.loads((tmp_path / "b" / "diversity.json").read_text())
    for row in (copy["result"]["test"], copy["result"]["corrupted"]["mean"]):
        assert row["values_of_samples"].keys() == {"ensemble_nll"}
        assert row["right_of_samples"] == part["right_of_samples"]
    left = copy["result"]["test"]["ood"]["digits"]["values_of_samples"]
    assert {score: list(by_metric) for score, by_metric in left.items() if by_metric} == {"entropy": ["auroc"]}
    assert copy["experiment"] == json.loads((tmp_path / "b" / "sharpness.json").read_text())["experiment"]
    assert copy["experiment"] == {"asked": "all"}


def test_late_sam_is_no_baseline(tmp_path, capsys):
    """Differences are to SAM in all epochs, whatever comes first."""
    late = SAM | {"initial_method": "sgd", "initial_epochs": 5}
    folders = [
        write(tmp_path / f"{n}_{seed}", s, (seed,), 0.9) for n, s in (("a", late), ("b", SAM)) for seed in (1, 2)
    ]
    call(*folders)
    out = capsys.readouterr().out
    assert re.search(r"difference of +SAM, SGD first, rho 0\.1, T_d 5\nto +SAM, rho 0\.1\n", out)


def test_the_table_of_digits_is_that_of_its_result_files(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    place = Path("results/digits")
    call(*sorted(place.glob("measurements/*")), "--format", "markdown", "--to", tmp_path / "tables.md")
    table = (tmp_path / "tables.md").read_text()
    assert table == (place / "tables.md").read_text()
    report = (place / "README.md").read_text()
    cells = re.findall(
        r"[+-]\d\.\d\d \[-?\d\.\d\d, \d\.\d\d\]", report.replace("| worst-case", "\n\n").partition("\n\n\n")[0]
    )
    assert len(cells) == 12
    assert all(f" {cell} " in table for cell in cells)


def test_large_numbers_are_short(tmp_path, capsys):
    """Worst-case sharpness in linf may be anything."""
    folder = write(tmp_path / "sam", SAM, (1, 2), 0.9, sharpness=4841839502.9)
    call(folder)
    assert re.search(r"sharpness \(worst, l2\) +4\.84e\+09 ± 0\.1000$", capsys.readouterr().out, re.MULTILINE)


def test_bad_input(tmp_path, capsys):
    a = write(tmp_path / "a", SAM, (1, 2), 0.8)
    (tmp_path / "none").mkdir()
    assert "none/diversity.json: cannot be read (No such file" in refused(capsys, a, tmp_path / "none")
    (tmp_path / "none" / "diversity.json").write_text("[1]")
    assert "not a result file" in refused(capsys, a, tmp_path / "none")
    (tmp_path / "none" / "diversity.json").write_text('{"result": {}}')
    assert "not a result of the test set" in refused(capsys, a, tmp_path / "none")
    data = {"dataset": "digits", "test": IMAGES, "sha256_of_arrays_and_split": "other"}
    b = write(tmp_path / "b", SHARPBALANCE, (1, 2), 0.8, data=data)
    assert "data differs (other, d)" in refused(capsys, a, b)
    b = write(tmp_path / "b", SHARPBALANCE, (1, 2), 0.8, protocol={"checkpoint": "last", "bins": 15})
    assert "--checkpoint differs (last, best)" in refused(capsys, a, b)
    c = write(tmp_path / "c", SAM, (1, 2), 0.8)
    assert "same method and seeds" in refused(capsys, a, c)
    a, b = write(tmp_path / "a", SAM, (1, 2), 0.8, 1.0), write(tmp_path / "b", SHARPBALANCE, (1, 2), 0.8, 1.0)
    content = json.loads((b / "sharpness.json").read_text())
    write_json(b / "sharpness.json", content | {"protocol": {"rho0": 0.1}})
    assert "--rho0 of the sharpness differs (0.1, 0.5)" in refused(capsys, a, b)
    write_json(b / "sharpness.json", content | {"protocol": content["protocol"] | {"params": "conv"}})
    one = json.loads((a / "sharpness.json").read_text())
    write_json(a / "sharpness.json", one | {"protocol": one["protocol"] | {"params": "fc"}})
    assert "--params of the sharpness differs (conv, fc)" in refused(capsys, a, b)
    # What a part that was not measured depends on does not matter.
    for part, key in (("hessian_t", "hessian_samples"), ("NTK", "ntk_samples")):
        for folder, value in ((a, 4), (b, 8)):
            write_json(folder / "sharpness.json", content | {"protocol": content["protocol"] | {key: value}})
        call(a, b)
        for folder, value in ((a, 4), (b, 8)):
            changed = {"protocol": content["protocol"] | {key: value}, "result": {part: {"mean": 1.0}}}
            write_json(folder / "sharpness.json", content | changed)
        assert f"--{key} of the sharpness differs (8, 4)" in refused(capsys, a, b)
    write_json(a / "sharpness.json", content)
    write_json(b / "sharpness.json", content | {"protocol": {"rho0": 0.1}})
    # Also if the first one has no sharpness.
    c = write(tmp_path / "c", SAM, (3, 4), 0.8)
    assert "--rho0 of the sharpness differs (0.1, 0.5)" in refused(capsys, c, a, b)
    b = write(tmp_path / "b", SHARPBALANCE, (1, 2), 0.8, network={"model": "wrn-40-2", "width": 64})
    assert "network differs (wrn-40-2 of width 64, resnet18 of width 8)" in refused(capsys, a, b)
    data = {"dataset": "digits", "test": IMAGES, "sha256_of_arrays_and_split": "d", "sha256_of_corrupted": "c"}
    c = write(tmp_path / "c", SAM, (3, 4), 0.8, data=data)
    b = write(tmp_path / "b", SHARPBALANCE, (1, 2), 0.8, data=data | {"sha256_of_corrupted": "e"})
    assert "the corrupted set differs (e, c)" in refused(capsys, a, c, b)
    (tmp_path / "file").write_text("")
    assert "--to" in refused(capsys, a, "--to", tmp_path / "file" / "table.md")


def test_counts_survive():
    counts = np.random.default_rng(0).integers(0, 60000, 1000)
    assert (unpack_counts(pack_counts(counts)) == counts).all()
    for text in ("", "x", "AAAA"):
        with pytest.raises(ValueError, match="not packed numbers"):
            unpack_counts(text)


def test_values_survive():
    """To 0.05 %; what is too large for 16 bits is the largest that they hold."""
    values = 10 ** np.random.default_rng(0).uniform(-3, 4, 1000)
    found = unpack_values(pack_values(values))
    assert found.dtype == np.float64
    assert found == pytest.approx(values, rel=5e-4)
    assert unpack_values(pack_values(np.array([1e6, -np.inf, 0.0]))).tolist() == [65504, -65504, 0]


def covers(intervals, truth):
    hits = sum(low <= truth <= high for low, high in intervals)
    return stats.binomtest(hits, len(intervals), 0.95).pvalue > 1e-3


def test_intervals_cover_at_their_level():
    random = np.random.default_rng(0)
    assert covers([t_interval(random.normal(0.3, 2, 3)) for _ in range(400)], 0.3)
    differences = []
    for seed in range(200):
        # Two models, right on 90 % and 85 % of the images, and right together where they are alike.
        shared = random.random(300) < 0.7
        a, b = random.random(300) < 0.9, random.random(300) < 0.85
        a, b = np.where(shared, True, a), np.where(shared, True, b)
        differences.append(paired_bootstrap(torch.from_numpy(a.astype(float) - b), draws=400, seed=seed))
    assert covers(differences, 0.3 * 0.05)
    assert t_interval([1.0]) is None
    low, high = t_interval([1.0, 2.0, 4.0])
    half = stats.t.ppf(0.975, 2) * np.std([1, 2, 4], ddof=1) / math.sqrt(3)
    assert (low, high) == (pytest.approx(7 / 3 - half), pytest.approx(7 / 3 + half))


def test_a_sharpness_that_was_cut_off(tmp_path, capsys):
    """Of some members only: no value."""
    a = write(tmp_path / "a", SAM, (1, 2), 0.8, 2.0)
    content = json.loads((a / "sharpness.json").read_text())
    content["result"]["APGD_worst-l2"] |= {"n": 1, "missing": [2]}
    write_json(a / "sharpness.json", content)
    call(a)
    assert "sharpness (" not in capsys.readouterr().out
    b = write(tmp_path / "b", SHARPBALANCE, (1, 2), 0.8, 1.0)
    call(a, b)
    out = capsys.readouterr().out
    assert re.search(r"^sharpness \(worst, l2\) +- +1\.0000 ± 0\.1000$", out, re.MULTILINE)


@pytest.mark.parametrize("images", [200, 10_000])
@pytest.mark.parametrize("ensembles", [2, 3, 5, 10])
@pytest.mark.parametrize("ratio", [0.02, 0.5, 1, 2, 50])
def test_intervals_over_ensembles_and_images_cover(ensembles, images, ratio):
    """93 to 97 % where either population rules, and not less anywhere; ratio: of the two standard errors."""
    random, draws = np.random.default_rng(0), 1000 if images == 200 else 300
    hits = 0
    for _ in range(draws):
        own = ratio * math.sqrt(ensembles / images) * random.standard_normal((ensembles, 1))
        values = torch.from_numpy(own + random.standard_normal(images))
        low, high = crossed_interval(values)
        hits += low <= 0 <= high
        # Never within a one-way interval.
        for one_way in (t_interval(values.mean(dim=1).tolist()), t_interval(values.mean(dim=0).tolist())):
            assert low <= one_way[0] + 1e-12
            assert one_way[1] - 1e-12 <= high
    assert stats.binomtest(hits, draws, 0.93).pvalue > 1e-3 or hits > 0.93 * draws, hits
    if ratio in (0.02, 50):
        assert stats.binomtest(hits, draws, 0.97).pvalue > 1e-3 or hits < 0.97 * draws, hits


@pytest.mark.parametrize(
    ("ensembles", "row", "column", "largest", "widest"),
    [(6, 0.1, 1, 0, 0), (6, 1, 0, 1, 0), (6, 0, 1, 2, 0), (2, 0.3, 1, 0, 1)],
)
def test_interval_over_ensembles_and_images_by_its_definition(ensembles, row, column, largest, widest):
    """Where each of the three variances is the largest, and where an interval over one population is the widest."""
    random = np.random.default_rng(41)
    table = row * random.normal(size=(ensembles, 1)) + column * random.normal(size=(1, 50))
    table += 2 * random.normal(size=(ensembles, 50))
    low, high = crossed_interval(torch.from_numpy(table))
    a, b, whole = table.mean(axis=1), table.mean(axis=0), (ensembles - 1) * 49
    residuals = table - a[:, None] - b + table.mean()
    parts = [a.var(ddof=1) / ensembles, b.var(ddof=1) / 50, (residuals**2).sum() / whole / (50 * ensembles)]
    variances = [parts[0] + parts[1] - parts[2], *parts[:2]]
    assert np.argmax(variances) == largest
    degrees = max(variances) ** 2 / (parts[0] ** 2 / (ensembles - 1) + parts[1] ** 2 / 49 + parts[2] ** 2 / whole)
    halves = [stats.t.ppf(0.975, degrees) * math.sqrt(max(variances))]
    sizes = zip((ensembles, 50), parts[:2], strict=True)
    halves += [stats.t.ppf(0.975, n - 1) * math.sqrt(part) for n, part in sizes]
    assert np.argmax(halves) == widest
    assert (low + high) / 2 == pytest.approx(table.mean())
    assert (high - low) / 2 == pytest.approx(max(halves))
    # The two populations are treated alike.
    assert crossed_interval(torch.from_numpy(table.T)) == pytest.approx([low, high])
    assert crossed_interval(torch.ones(2, 3)) == [1, 1]


@pytest.mark.parametrize(("ensembles", "share"), [(3, 0.83), (7, 0.57)])
def test_students_interval_over_few_ensembles_covers_too_little(ensembles, share):
    """The shares that docs/MEASURING.md names, where the images matter."""
    random = np.random.default_rng(0)
    parts = [(0.05, (ensembles, 1)), (1, (1, 300)), (0.5, (ensembles, 300))]
    found = [t_interval(sum(a * random.normal(size=n) for a, n in parts).mean(axis=1)) for _ in range(2000)]
    assert np.mean([low <= 0 <= high for low, high in found]) == pytest.approx(share, abs=0.02)


def test_intervals_of_the_calibration_error_cover():
    """Which resampling pushes upwards: percentile intervals of few images do not."""
    random = np.random.default_rng(0)
    borders = torch.arange(15)

    def sample(count):
        confidence = torch.from_numpy(0.1 + 0.899 * random.beta(4, 1.5, count))
        right = torch.from_numpy(random.random(count)) < (confidence - 0.05).clamp(min=0)
        return (right.double() - confidence)[:, None] * (calibration_bins(confidence, 15)[:, None] == borders)

    truth = sample(1_000_000).mean(dim=0).abs().sum().item()
    hits = {"corrected": 0, "percentile": 0}
    for _ in range(200):
        gaps = sample(200)
        draws = bootstrap_means(gaps, 300).abs().sum(dim=1)
        for name, interval in (
            ("corrected", corrected_interval(gaps.mean(dim=0).abs().sum().item(), draws)),
            ("percentile", percentile_interval(draws)),
        ):
            hits[name] += interval[0] <= truth <= interval[1]
    assert hits["corrected"] > 0.85 * 200
    assert hits["percentile"] < 0.5 * 200
    assert corrected_interval(0.1, torch.zeros(0)) is None
    low, high = corrected_interval(0.1, torch.linspace(0.0, 0.4, 1001, dtype=torch.float64))
    assert (low, high) == (0.0, pytest.approx(0.19))


def test_averaged_weights_are_a_method_of_their_own(tmp_path, capsys):
    """By the file that was measured, and compared with what was measured at the end of training."""
    last = {"protocol": {"checkpoint": "last", "bins": 15}}
    a = write(tmp_path / "a", SAM, (1, 2), 0.8, **last)
    files = [
        {"seed": s, "sha256_of_weights": f"{s:064x}", "path": f"run/seed_{s}/model_averaged.pth.tar"} for s in (1, 2)
    ]
    b = write(tmp_path / "b", SAM, (1, 2), 0.9, members=files)
    call(b, a)
    text = capsys.readouterr().out
    assert "checkpoints 'last'" in text
    assert re.search(r"^difference of +ensemble of averages \(EoA\), SAM, rho 0\.1$", text, re.MULTILINE)
    assert "+10.00" in text


def test_packed_counts_that_are_cut_off():
    """A stream without its end would give fewer counts without a word."""
    counts = np.random.default_rng(0).integers(0, 200, 1000)
    packed = base64.b64decode(pack_counts(counts))
    assert (unpack_counts(base64.b64encode(packed).decode()) == counts).all()
    with pytest.raises(ValueError, match="not packed numbers"):
        unpack_counts(base64.b64encode(packed[:-300]).decode())
