"""scripts/summarize.py and the intervals it uses."""

import base64
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from scripts import summarize
from utils import cli
from utils.checkpoint import write_json
from utils.metrics import pack_counts, paired_bootstrap, t_interval, unpack_counts

SAM = {"sam": True, "rho": 0.1, "sam_adaptive": False, "flat_ratio": 0.0, "select": None, "unselected": None}
SHARPBALANCE = SAM | {"flat_ratio": 0.5, "select": "flattest", "unselected": "one", "initial_epochs": 15}
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
        "right_of_samples": {"members": pack_counts(2 * right), "ensemble": pack_counts(right)},
        "intervals_95": {"ensemble_accuracy": [accuracy - 0.01, accuracy + 0.01]},
        "parts": 1,
    }
    common = {
        "command": f"python measure_diversity.py --save {folder.name}",
        "members": [{"seed": seed, "sha256_of_weights": f"{seed:064x}"} for seed in seeds],
        "network": {"model": "resnet18", "width": 8},
        "data": {"dataset": "digits", "test": IMAGES, "sha256_of_arrays_and_split": "d"},
        "protocol": {"checkpoint": "best", "bins": 15},
        "trained": settings | {"seed": list(seeds)},
        "result": {"test": row},
    }
    write_json(_made(folder) / "diversity.json", common | change)
    if sharpness is not None:
        result = {"APGD_worst-l2": {"mean": sharpness, "std": 0.1}}
        write_json(folder / "sharpness.json", {"protocol": {"rho0": 0.5}, "result": result})
    return folder


def _made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def call(*argv):
    cli.run(summarize.main, summarize.parse_args([str(word) for word in argv]))


def refused(capsys, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call(*argv)
    assert end.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def test_one_ensemble_each(tmp_path, capsys):
    a = write(tmp_path / "sam", SAM, (1, 2), 0.80, sharpness=2.0)
    b = write(tmp_path / "sharp", SHARPBALANCE, (1, 2), 0.85, sharpness=1.5)
    call(a, b)
    out = capsys.readouterr().out
    assert "SharpBalance (flattest, one), rho 0.1, k 0.5, T_d 15" in out
    assert "80.00 [79.00, 81.00]" in out
    assert "75.00 ± 1.41" in out
    assert "2.0000 ± 0.1000" in out
    difference = out[out.index("difference to SAM, rho 0.1") :]
    low, high = paired_bootstrap(torch.tensor([0.0] * 160 + [1.0] * 10 + [0.0] * 30))
    assert f"+5.00 [{100 * low:.2f}, {100 * high:.2f}]" in difference
    assert "-0.5000" in difference
    assert "python measure_diversity.py --save sharp; weights 00000000, 00000000" in out


def test_several_ensembles_are_one_row_and_pairs_have_the_same_seeds(tmp_path, capsys):
    sam = [write(tmp_path / f"sam{i}", SAM, (i, i + 10), 0.80 + 0.01 * i) for i in range(3)]
    other = [write(tmp_path / f"sharp{i}", SHARPBALANCE, (i, i + 10), 0.82 + 0.015 * i) for i in range(1, 4)]
    call(*sam, *other, "--format", "csv")
    rows = [line.split(",") for line in capsys.readouterr().out.replace('"', "").splitlines()]
    assert len(rows) == 5
    interval = t_interval([80.0, 81.0, 82.0])
    text = ",".join(rows[1])
    assert f"81.00 ± 1.00 [{interval[0]:.2f}, {interval[1]:.2f}]" in text
    # Seeds 1 and 2 are in both: 83.5 - 81 and 85 - 82.
    low, high = t_interval([2.5, 3.0])
    assert f"+2.75 [{low:.2f}, {high:.2f}]" in ",".join(rows[4])
    call(*sam, *other, "--format", "markdown", "--to", tmp_path / "t" / "table.md")
    assert (tmp_path / "t" / "table.md").read_text().count("\n| --- |") == 2
    call(*sam, "--format", "latex")
    assert r"81.00 $\pm$ 1.00" in capsys.readouterr().out


def test_bad_input(tmp_path, capsys):
    a = write(tmp_path / "a", SAM, (1, 2), 0.8)
    (tmp_path / "none").mkdir()
    assert "none/diversity.json: missing" in refused(capsys, a, tmp_path / "none")
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
    (tmp_path / "file").write_text("")
    assert "--to" in refused(capsys, a, "--to", tmp_path / "file" / "table.md")


def test_counts_survive():
    counts = np.random.default_rng(0).integers(0, 60000, 1000)
    assert (unpack_counts(pack_counts(counts)) == counts).all()
    for text in ("", "x", "AAAA"):
        with pytest.raises(ValueError, match="no packed counts"):
            unpack_counts(text)


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
    assert "difference to SAM, rho 0.1  SAM, rho 0.1, averaged (EoA)" in text
    assert "+10.00" in text


def test_packed_counts_that_are_cut_off():
    """A stream without its end would give fewer counts without a word."""
    counts = np.random.default_rng(0).integers(0, 200, 1000)
    packed = base64.b64decode(pack_counts(counts))
    assert (unpack_counts(base64.b64encode(packed).decode()) == counts).all()
    with pytest.raises(ValueError, match="no packed counts"):
        unpack_counts(base64.b64encode(packed[:-300]).decode())
