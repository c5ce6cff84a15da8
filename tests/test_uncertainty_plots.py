"""The figures of other data and of calibration: from small result files to what is drawn."""

import numpy as np
import pytest

from tests.test_plots import DEEP, IMAGES, SAM, TRAINED, bars, call, drawn_well, figure, measure, notes, refused
from utils.files import load_json, write_json
from utils.metrics import OOD_METRICS, OOD_SCORES, pack_values, t_interval


def add(folder, shift=0.0, sets=("noise", "corrupted")):
    """What modes predict and ood add to a result file; `shift` moves curves and accuracies."""
    path = folder / "diversity.json"
    content = load_json(path)
    row, fair = content["result"]["test"], np.linspace(0, 1, 101)
    row["samples"] = content["result"]["corrupted"]["mean"]["samples"] = IMAGES
    scores = {
        name: dict.fromkeys(OOD_METRICS, 0.8 + shift)
        | {"tpr": list(fair ** (0.5 - shift)), "histogram": {"edges": [0, 2], "in": [0.7, 0.3], "out": [0.2, 0.8]}}
        for name in OOD_SCORES
    }
    columns = {name: dict.fromkeys(OOD_METRICS, pack_values(np.full(90, 0.8 + shift))) for name in OOD_SCORES}
    intervals = {name: {key: [0.7, 0.9] for key in OOD_METRICS} for name in OOD_SCORES}
    row["ood"] = {
        name: {"scores": scores, "values_of_samples": columns, "intervals_95": intervals, "images": 40}
        | {"parts": 1 + 9 * (name == "corrupted"), "sha256_of_images": name}
        for name in sets
    }
    share, accuracy, confidence = (
        np.array([0.1, 0.4, 0.5]),
        np.array([0.2, 0.6, 0.9 + shift]),
        np.array([0.3, 0.5, 0.9]),
    )
    curve = {"share": share, "correct": share * accuracy, "confidence": share * confidence}
    row["reliability"] = {when: {name: list(one) for name, one in curve.items()} for when in ("before", "after")}
    write_json(path, content)
    return folder


@pytest.fixture
def three(tmp_path):
    return [add(measure(tmp_path / "m" / name, settings)) for name, settings in TRAINED.items()]


@pytest.mark.parametrize("kind", ["ood", "reliability"])
def test_files(kind, three, tmp_path):
    call(kind, three, tmp_path / "a")
    call(kind, three[::-1], tmp_path / "b")
    for suffix in ("pdf", "png"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_other_data(three, tmp_path, capsys):
    one = figure("ood", three)
    axes = drawn_well(one, 6)
    assert [axis.get_title() for axis in axes[::3]] == ["noise", "corrupted"]
    assert [axis.get_title() for axis in axes[1:3]] == ["entropy", "mutual information"]
    stairs = [patch.get_data() for patch in axes[0].patches]
    assert [data.values.tolist() for data in stairs] == [pytest.approx(v) for v in [[70, 30], [20, 80]] * 3]
    assert stairs[0].edges.tolist() == [0, 1, 2]
    assert [patch.get_fill() for patch in axes[0].patches] == [False, True] * 3  # test images, others
    assert "other images: 40 of noise, 40 of corrupted." in notes(one)
    assert notes(one).endswith("corrupted: mean of 10 comparisons.")
    # The mean over ensembles; sets that not all have are left out.
    folders = [
        add(measure(tmp_path / f"d{i}", DEEP, (i, i + 5)), s, ("noise", *more))
        for i, (s, more) in enumerate([(0.1, ()), (0, ("digits",))])
    ]
    _, entropy, _ = figure("ood", folders).axes
    fair = np.linspace(0, 1, 101)
    curve = entropy.get_lines()[0].get_xydata()
    assert curve[:, 1] == pytest.approx(50 * (fair**0.4 + fair**0.5))
    assert curve[:, 0] == pytest.approx(100 * fair)
    # Nothing in common.
    other = add(measure(tmp_path / "s", SAM), sets=("digits",))
    problem = "no other data was measured, or not the same for all; measure it by measure_diversity.py --mode ood"
    assert problem in refused(capsys, "ood", [folders[0], other], tmp_path / "x")


def test_reliability(three, tmp_path):
    one = figure("reliability", three)
    axes = drawn_well(one, 4)
    assert [axis.get_title() for axis in axes[:2]] == ["as trained", "with a temperature"]
    assert "the dotted line is perfect calibration. " in notes(one)
    assert "50 test images. Bins" in notes(one)  # the corrupted ones do not enter
    points = axes[0].get_lines()[0].get_xydata()
    assert points == pytest.approx(np.array([[50, 60], [90, 90]]))  # in the first bin are 5 images
    low, high = np.array(bars(axes[0]))[0, :, 1]  # Wilson's, of 12 of 20
    assert (low, high) == (pytest.approx(38.66, abs=0.01), pytest.approx(78.12, abs=0.01))
    assert axes[2].patches[0].get_data().values.tolist() == pytest.approx([10, 40, 50])
    assert "95 % intervals: over test images, for these trained networks only." in notes(one)
    folders = [add(measure(tmp_path / f"d{i}", DEEP, (i, i + 5)), shift) for i, shift in enumerate((0, 0.02, 0.07))]
    one = figure("reliability", folders)
    assert np.array(bars(one.axes[0]))[1, :, 1] == pytest.approx([100 * edge for edge in t_interval([0.9, 0.92, 0.97])])
    assert one.axes[0].get_lines()[0].get_xydata()[1].tolist() == pytest.approx([90, 93])
    assert "95 % intervals: Student's, over ensembles with the images as they are." in notes(one)


def test_what_was_not_measured(tmp_path, capsys):
    folder = measure(tmp_path / "m", SAM)
    for kind, problem in (("ood", "no other data was measured"), ("reliability", "'samples' is missing")):
        assert problem in refused(capsys, kind, [folder], tmp_path / "x")
