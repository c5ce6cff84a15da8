"""The deep ensemble equivalent: from curves of NLL to a number of members."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from scripts import summarize
from tests.test_summarize import IMAGES, SAM, SHARPBALANCE, write
from utils import cli
from utils.equivalent import deep_ensemble_equivalent
from utils.files import load_json, write_json
from utils.metrics import pack_values
from utils.results import BOTH
from utils.run import training_passes

SIZES = np.arange(1, 10)


def power_law(sizes):
    return 0.3 + 0.2 * sizes**-0.8


def drawn(random, ensembles, sizes, images=400):
    """NLL by ensemble, size and image: a law, and what ensembles, images and both add."""
    image = random.normal(0, 0.5, images)
    found = []
    for _ in range(ensembles):
        own, both = random.normal(0, 0.003), random.normal(0, 0.1, images)
        found.append([torch.from_numpy(power_law(size) + image + own + both / math.sqrt(size)) for size in sizes])
    return found


@pytest.mark.parametrize(("ensembles", "others"), [(5, 5), (4, 8), (3, 2), (1, 1)])
@pytest.mark.parametrize("members", [2, 5, 7])
def test_a_power_law_gives_back_its_members(members, ensembles, others):
    """Its interval holds them about as often as it says; of one pair it is over images, of these networks."""
    random, hits, draws = np.random.default_rng(members), 0, 40
    for _ in range(draws):
        found = drawn(random, ensembles + others, [*SIZES, members], 300)
        plain, other = [one[:-1] for one in found[:ensembles]], [one[-1] for one in found[ensembles:]]
        result = deep_ensemble_equivalent(plain, other)
        low, high = result.interval
        assert low <= result.members <= high
        assert (result.over, result.largest) == (BOTH if min(ensembles, others) > 1 else "images", 9)
        hits += low <= members <= high
    assert hits >= stats.binom.ppf(1e-3, draws, 0.95) or ensembles == others == 1, hits


def test_without_noise_it_is_exact():
    plain = [[torch.full((20,), power_law(size)) for size in SIZES] for _ in range(3)]
    for members in (1, 2, 4.5, 8, 9):
        nll = np.interp(members, SIZES, power_law(SIZES))
        result = deep_ensemble_equivalent(plain, [torch.full((20,), nll)] * 3)
        assert result.members == pytest.approx(members, abs=1e-9)
        assert result.interval == pytest.approx((members, members), abs=1e-9)
    assert deep_ensemble_equivalent(plain, [torch.full((20,), 0.6)] * 3)[:2] == (1, (1, 1))  # 1 at the least
    better = deep_ensemble_equivalent(plain, [torch.full((20,), 0.31)] * 3)
    assert better[:2] == (math.inf, (math.inf, math.inf))


def test_of_numbers_and_of_one_size():
    plain = [[torch.tensor(power_law(size) + shift) for size in SIZES] for shift in (-0.001, 0.001)]
    result = deep_ensemble_equivalent(plain, [torch.tensor(power_law(4.0))] * 2)
    assert (result.over, result.members) == ("ensembles", pytest.approx(4))
    assert result.interval[0] < 4 < result.interval[1]
    assert deep_ensemble_equivalent(plain[:1], [torch.tensor(power_law(4.0))]).interval is None
    one = deep_ensemble_equivalent([[torch.tensor(0.5)]], [torch.tensor(0.4)])
    assert (one.members, one.largest) == (math.inf, 1)


def test_a_wide_interval_is_open():
    random = np.random.default_rng(0)
    found = drawn(random, 4, [*SIZES, 8])
    other = [one[-1] + 0.02 * (-1) ** i for i, one in enumerate(found[2:])]
    result = deep_ensemble_equivalent([one[:-1] for one in found[:2]], other)
    assert result.interval[1] == math.inf


PLAIN = SAM | {"sam": False}


def write_nll(folder, settings, seeds, columns, passes=None, by_image=True):
    """An ensemble whose calibrated NLL by image is the last column, and of fewer members the others."""
    path = write(folder, settings, seeds, 0.8) / "diversity.json"
    content = load_json(path)
    row, names = content["result"]["test"], [f"ensemble_nll_calibrated_of_{n + 1}" for n in range(len(columns) - 1)]
    row["ensemble"]["calibrated"] = {"nll": columns[-1].mean().item(), "ece": 0.01}
    row["calibrated_nll_by_size"] = {str(n + 1): column.mean().item() for n, column in enumerate(columns)}
    if by_image:
        names = [*names, "ensemble_nll_calibrated"]
        row["values_of_samples"] = {n: pack_values(c.numpy()) for n, c in zip(names, columns, strict=True)}
    write_json(path, content | ({"passes": passes} if passes else {}))
    return folder


@pytest.mark.parametrize("by_image", [True, False])
def test_the_table_of_plain_members(by_image, tmp_path, capsys):
    random, sizes = np.random.default_rng(0), (1, 2, 3, 4)
    plain = drawn(random, 3, sizes, IMAGES)
    folders = [
        write_nll(tmp_path / f"plain_{i}", PLAIN, range(4 * i, 4 * i + 4), columns, 1.0, by_image)
        for i, columns in enumerate(plain)
    ]
    for i, columns in enumerate(plain):
        method = (columns[1] + columns[2]) / 2
        folders.append(write_nll(tmp_path / f"b_{i}", SHARPBALANCE, (i, i + 50), [method, method], 1.9, by_image))
    cli.run(summarize.main, summarize.parse_args([*map(str, folders), "--format", "csv"]))
    rows = csv.reader(capsys.readouterr().out.splitlines())
    name, ensembles, members, worth, interval, over, training = next(row for row in rows if "3.80" in row)
    assert (name[:12], ensembles, members, training) == ("SharpBalance", "3", "2", "3.80")
    assert float(worth) == pytest.approx(2.5, abs=0.05)
    low, high = map(float, interval.split(" to "))
    assert low <= 2.5 <= high
    assert over == ("new ensembles, new images" if by_image else "ensembles")


def test_passes_of_a_training(tmp_path):
    """Two epochs of SAM and two with half of the samples, and the scores: 1 + (1 + 1 + 0.5 + 0.5 + 1) / 4."""
    for name, shares, scored in (("sharp", (1, 1, 0.5, 0.5), True), ("plain", (0, 0, 0, 0), False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps({"sam_share": s}) + "\n" for s in shares))
        if scored:
            (tmp_path / name / "fisher.npy").touch()
    files = {name: tmp_path / name / "model_best.pth.tar" for name in ("sharp", "plain", "unknown")}
    assert training_passes([files["sharp"]]) == 2
    assert training_passes([files["plain"]]) == 1
    assert training_passes([files["sharp"], files["plain"]]) == 1.5
    assert training_passes([files["sharp"], files["unknown"]]) is None
