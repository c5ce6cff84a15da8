"""The figures of results: from small result files to what is drawn."""

import itertools
import json
import os
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from models import create_model
from scripts import plot
from tests import commands
from tests.test_ensemble import ROOT
from tests.test_measure import save_member
from utils import InputError, claims, landscape, plots
from utils.checkpoint import load_model
from utils.datasets import load_data
from utils.files import write_array, write_json
from utils.hessian import top_eigenvalues
from utils.metrics import crossed_interval, pack_counts, pack_values, t_interval
from utils.partition import PARTITION_RULE, sharpness_aware_masks
from utils.results import METHODS, read_ensemble
from utils.uncertainty_plots import BETTER, verdicts

DEEP = {
    "data": "digits",
    "model": "resnet18",
    "width": 2,
    "sam": False,
    "rho": 0.05,
    "sam_adaptive": False,
    "flat_ratio": 0.0,
    "initial_epochs": 2,
    "partition": "released",
    "unselected": None,
}
SAM = DEEP | {"sam": True, "rho": 0.1}
SHARPBALANCE = SAM | {"flat_ratio": 0.5, "unselected": "one"}
PAPER = SHARPBALANCE | {"partition": "paper", "unselected": "normal"}
TRAINED = {"deep": DEEP, "sam": SAM, "sharpbalance": SHARPBALANCE}
IMAGES = 50
SEVERITIES = (1, 2, 3, 4, 5)


def row(accuracy):
    """What measure_diversity.py finds on one part, for an ensemble of two with this accuracy."""
    member = accuracy - 0.1
    right, both = (np.arange(IMAGES) < round(value * IMAGES) for value in (accuracy, member))

    def scores(value):
        return {"accuracy": value, "nll": 1 - value, "ece": 0.1 * value}

    return {
        "members": [scores(member - 0.02), scores(member + 0.02)],
        "ensemble": scores(accuracy),
        "ensemble_by_size": {"1": scores(member), "2": scores(accuracy)},
        "rates": {"member_accuracy": member, "ensemble_accuracy": accuracy, "disagreement": 0.2 * accuracy},
        "der": 0.8,
        "eir": 0.3,
        "right_of_samples": {"members": pack_counts(2 * both), "ensemble": pack_counts(right)},
        "intervals_95": {
            name: [value - 0.03, value + 0.04]
            for name, value in (
                ("member_accuracy", member),
                ("ensemble_accuracy", accuracy),
                ("member_nll", 1 - member),
                ("ensemble_nll", 1 - accuracy),
                ("ensemble_ece", 0.1 * accuracy),
                ("disagreement", 0.2 * accuracy),
            )
        },
        "parts": 1,
    }


def measure(folder, settings, seeds=(1, 2), accuracy=0.8, sharpness=2.0, corrupted=True, **change):
    """The result files of one ensemble."""
    folder.mkdir(parents=True, exist_ok=True)
    members = [{"seed": seed, "sha256_of_weights": f"{seed:064x}"} for seed in seeds]
    result = {"test": row(accuracy)}
    if corrupted:
        by = {str(s): row(accuracy - 0.08 * s) for s in SEVERITIES}
        result["corrupted"] = {"mean": row(accuracy - 0.24) | {"parts": 15}, "by_severity": by}
    content = {
        "members": members,
        "network": {"model": "resnet18", "width": 2},
        "data": {"dataset": "digits", "test": IMAGES, "sha256_of_arrays_and_split": "d", "sha256_of_corrupted": "c"},
        "protocol": {"checkpoint": "best", "bins": 15, "corruptions": ["fog"], "split": sorted(result)},
        "trained": settings | {"seed": list(seeds)},
        "result": result,
    }
    write_json(folder / "diversity.json", content | change)
    found = {"APGD_worst-l2": {"mean": sharpness, "std": 0.1, "n": len(seeds)}}
    write_json(
        folder / "sharpness.json", {"members": members, "protocol": {"rho0": 0.5, "adaptive": True}, "result": found}
    )
    return folder


@pytest.fixture
def three(tmp_path):
    """One ensemble of each method."""
    accuracies = zip(TRAINED.items(), (0.7, 0.8, 0.9), (9.0, 3.0, 2.0), strict=True)
    return [measure(tmp_path / "m" / n, s, accuracy=a, sharpness=x) for (n, s), a, x in accuracies]


def make_run(folder, settings, seeds=(1, 2), epochs=4, checkpoints=False):
    """A run folder of digits."""
    folder.mkdir(parents=True)
    data = load_data("digits")
    free = {"data_path": "data", "train_idx_path": None, "val_idx_path": None, "device": "auto"}
    write_json(folder / "args.json", settings | free | {"seed": list(seeds)})
    write_json(folder / "environment.json", {"data": data.record})
    random = np.random.default_rng(len(folder.name))
    scores = random.exponential(size=(len(seeds), len(data.train))).astype(np.float32)
    masks = sharpness_aware_masks(scores, settings["flat_ratio"], PARTITION_RULE[settings["partition"]], "one")
    for i, seed in enumerate(seeds):
        member = folder / f"seed_{seed}"
        member.mkdir()
        lines = [
            {"epoch": e, "train_loss": 1 / (e + 1) + i, "train_acc": 0.5, "val_loss": 2.0, "val_acc": 0.4 + 0.1 * i}
            for e in range(epochs)
        ]
        (member / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if settings["flat_ratio"]:
            write_array(member / "fisher.npy", scores[i])
            write_array(member / "sam_mask.npy", masks[i])
        if checkpoints:
            save_member(member / "model_best.pth.tar", seed + 10 * len(folder.name))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / name, settings, checkpoints=True) for name, settings in TRAINED.items()]


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(landscape, "ALONG", [-0.5, 0.0, 0.5])
    monkeypatch.setattr(landscape, "BETWEEN", [0.0, 0.5, 1.0])
    monkeypatch.setattr(landscape, "TOP", [-0.01, 0.0, 0.01])


def call(kind, folders, to):
    commands.call(plot, kind, "--from", *folders, "--to", to)


def figure(kind, folders, to="x"):
    return plot.draw(plot.parse_args([kind, "--from", *map(str, folders), "--to", str(to)]))


def refused(capsys, kind, folders, to):
    return commands.refusal(capsys, call, kind, folders, to)


def drawn_well(one, panels):
    """Labels with units, the legend and the note inside the picture and off the panels."""
    for _ in range(2):  # as `save` does
        one.draw_without_rendering()
    axes = [axis for axis in one.axes if axis.get_label() != "<colorbar>"]
    assert len(axes) == panels
    for axis in axes:
        assert axis.get_legend() is None
        shared = axis.get_shared_y_axes().joined(axis, axes[0])
        first = axes[0] if shared else axis
        words = "".join(tick.get_text() for tick in first.get_yticklabels()[:1]).startswith("members")
        alike = axis.get_subplotspec().colspan.start > 0 and not axis.get_ylabel()
        assert words or alike or "[" in first.get_ylabel()
        assert "[" in axis.get_xlabel() or not axis.get_subplotspec().is_last_row() or axis.patches
    (legend,) = one.legends
    boxes = [artist.get_window_extent() for artist in (legend, one._supxlabel)]
    assert not any(box.overlaps(axis.get_window_extent()) for box in boxes for axis in axes)
    for box in (*boxes, *(axis.get_tightbbox() for axis in axes)):  # with titles and labels
        assert min(box.x0, box.y0, one.bbox.x1 - box.x1, one.bbox.y1 - box.y1) >= -1
    assert legend.get_texts()[0].get_text() == "deep ensemble"
    return axes


@pytest.mark.parametrize("kind", ["tradeoff", "benchmark", "severity", "ensemble_size"])
def test_files_of_measured_kinds(kind, three, tmp_path, capsys):
    call(kind, three, tmp_path / "new" / "a.png")
    call(kind, reversed(three), tmp_path / "new" / "b")
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path / 'new' / 'a.pdf'}, ")
    for suffix, magic in (("pdf", b"%PDF"), ("png", b"\x89PNG")):
        content = (tmp_path / "new" / f"a.{suffix}").read_bytes()
        assert content.startswith(magic)
        assert content == (tmp_path / "new" / f"b.{suffix}").read_bytes()  # whatever the order of the folders
    assert len(list((tmp_path / "new").iterdir())) == 4


def notes(one):
    """The caption of a figure, on one line."""
    return " ".join(one._supxlabel.get_text().split())


def at(axis, zorder):
    """The points that are drawn at a height, each alone."""
    return [line.get_xydata()[0].tolist() for line in axis.get_lines() if line.get_zorder() == zorder]


def bars(axis):
    """Both ends of each interval, in the order of drawing."""
    return [segment.tolist() for one in axis.collections for segment in one.get_segments()]


def test_tradeoff(three, tmp_path):
    one = figure("tradeoff", three)
    (axis,) = drawn_well(one, 1)
    assert axis.get_xscale() == "log"
    expected = [pytest.approx([x, 20 * a]) for x, a in ((9, 0.7), (3, 0.8), (2, 0.9))]
    assert at(axis, 3) == expected
    # The mean of the only one: SharpBalance above SAM, which it is compared with, and SAM above others; each smaller.
    assert [at(axis, zorder) for zorder in (4, 5, 6)] == [expected[:1], expected[1:2], expected[2:]]
    sizes = [line.get_markersize() for line in sorted(axis.get_lines(), key=lambda line: line.get_zorder())]
    assert sizes[-3] > sizes[-2] > sizes[-1]
    colours = [plots.to_rgb(METHODS[key].colour) for key in ("deep_ensemble", "sam", "released")]
    means = [line for line in axis.get_lines() if line.get_zorder() >= 4]
    assert [plots.to_rgb(line.get_markerfacecolor()) for line in means] == colours
    assert len({line.get_marker() for line in means}) == 3
    assert "1 ensemble of 2 members" in notes(one)
    assert "50 test images" in notes(one)
    assert "95 % intervals: over test images, for these trained networks only." in notes(one)
    # Several ensembles of several radii: one marker, a filling for each radius, a line through the means.
    folders = [
        measure(tmp_path / f"{rho}{i}", SAM | {"rho": rho}, (i, i + 5), 0.8 + 0.02 * i, 2.0 + i + rho, corrupted=False)
        for rho in (0.1, 0.2)
        for i in range(2)
    ]
    one = figure("tradeoff", folders)
    (axis,) = one.axes
    assert [text.get_text() for text in one.legends[0].get_texts()] == [r"SAM, $\rho$ = 0.1", r"SAM, $\rho$ = 0.2"]
    assert at(axis, 5) + at(axis, 4) == [pytest.approx([2.6, 16.2]), pytest.approx([2.7, 16.2])]
    assert len(at(axis, 3)) == 4
    (line,) = (line for line in axis.get_lines() if line.get_zorder() == 2)
    assert line.get_xydata().tolist() == at(axis, 5) + at(axis, 4)
    assert line.get_color() == METHODS["sam"].colour
    handles = one.legends[0].get_lines()
    assert [handle.get_marker() for handle in handles] == ["s", "s"]
    assert handles[0].get_markerfacecolor() != handles[1].get_markerfacecolor() == "white"


def test_captions_are_wrapped_by_what_shows():
    words = [r"$\rho$ = 0.1, $k$ = 0.2, $T_d$ = 15", "5 % of their labels", "12345 "] * 20
    one = plots.Figure()
    lines = plots.caption(one, " ".join(words))
    text = one._supxlabel.get_text()
    assert text.count("\n") + 1 == lines
    assert " ".join(text.replace("\N{NO-BREAK SPACE}", " ").split()) == " ".join(" ".join(words).split())
    shown = text.replace(r"$\rho$", "x").replace("$k$", "x").replace("$T_d$", "xx").splitlines()
    assert all(60 < len(line) <= 74 for line in shown[:-1])
    assert not any(line.startswith(("=", "%")) or line.endswith("=") for line in shown)


def test_labels_say_what_tables_say(tmp_path):
    """And fit into the picture; a line joins what differs in rho only."""
    late = SAM | {"initial_method": "sgd", "initial_epochs": 8}
    drawn = SHARPBALANCE | {"partition": "random", "match_size": "released"}
    settings = [DEEP, SAM, SAM | {"rho": 0.05}, late, drawn, drawn | {"match_size": "paper", "unselected": "normal"}]
    folders = [
        measure(tmp_path / str(i), own, accuracy=0.7 + i / 50, sharpness=9.0 - i) for i, own in enumerate(settings)
    ]
    one = figure("tradeoff", folders)
    (axis,) = drawn_well(one, 1)
    assert [text.get_text() for text in one.legends[0].get_texts()] == [
        "deep ensemble",
        r"SAM, $\rho$ = 0.05",
        rf"SAM, $\rho$ = {SAM['rho']}",
        rf"SAM, SGD first, $\rho$ = {SAM['rho']}, $T_d$ = 8",
        "SAM on random samples, sized as SharpBalance (released)",
        "SAM on random samples, sized as SharpBalance (paper)",
    ]
    lines = [line.get_xydata()[:, 0].tolist() for line in axis.get_lines() if line.get_zorder() == 2]
    assert [line for line in lines if len(line) > 1] == [[7.0, 8.0]]
    # Nor are ensembles of more members joined to others, or those whose weights are averaged later.
    averaged = measure(tmp_path / "6", SAM | {"rho": 0.02, "average_from": 5}, sharpness=9.5)
    more = measure(tmp_path / "7", SAM | {"rho": 0.02}, seeds=(1, 2, 3), sharpness=9.5)
    (axis,) = figure("tradeoff", [*folders, averaged, more]).axes
    assert [line for line in axis.get_lines() if line.get_zorder() == 2 and len(line.get_xdata()) > 1] != []
    assert sum(len(line.get_xdata()) for line in axis.get_lines() if line.get_zorder() == 2) == len(folders) + 2
    assert max(len(line.get_xdata()) for line in axis.get_lines() if line.get_zorder() == 2) == 2


def test_captions_have_the_settings_that_no_label_has(tmp_path):
    """Each with the methods that have it, where these differ and are not named with it."""
    drawn = SHARPBALANCE | {"partition": "random", "unselected": None}
    trained = {"deep": DEEP, "sam": SAM, "small": SAM | {"rho": 0.05}, "ours": SHARPBALANCE, "drawn": drawn}
    folders = {name: measure(tmp_path / name, one) for name, one in trained.items()}
    common = r"for each method; $\rho$ = 0.1, $k$ = 0.5, $T_d$ = 2"
    assert f"{common} unless a label says otherwise; 50 test" in notes(figure("tradeoff", folders.values()))
    del folders["small"]
    assert f"{common}; 50 test" in notes(figure("benchmark", folders.values()))
    folders["drawn"] = measure(tmp_path / "other", drawn | {"rho": 0.2, "initial_epochs": 3})
    differ = r"$\rho$ = 0.1 (SAM, SharpBalance (released)), $\rho$ = 0.2 (SAM on random samples), $k$ = 0.5, "
    differ += "$T_d$ = 2 (SharpBalance (released)), $T_d$ = 3 (SAM on random samples); 50 test images"
    assert differ in notes(figure("tradeoff", folders.values()))
    unknown = measure(tmp_path / "rho 7, k 3", SAM, trained=None)
    assert "for each method; 50 test images" in notes(figure("tradeoff", [folders["deep"], unknown]))


def test_captions_name_the_images_of_the_figure(three):
    """Of the trade-off no corrupted ones, though they were measured."""
    for folder in three:
        with_scores(folder, 20)
    assert "50 test images. " in notes(figure("tradeoff", three))
    assert "corrupted" not in notes(figure("tradeoff", three))
    for kind in ("benchmark", "severity", "ensemble_size"):
        assert "50 test images, corrupted copies of 20. " in notes(figure(kind, three))


def test_ticks_have_labels():
    """The axis of a range that has no decimal of its own at an end."""
    one, axis = plots.panels(2)
    axis.set(xscale="log", xlim=(1.1, 4.2))
    plots.decimal_ticks(axis.xaxis, (1, 1.5, 2, 3, 5, 7))
    one.draw_without_rendering()
    assert [tick.label1.get_text() for tick in axis.xaxis.get_major_ticks()]
    assert axis.xaxis.get_minorticklocs().size == 0


def by_sample(folders, name):
    return torch.stack([read_ensemble(folder).by_sample[name] for folder in folders])


def test_benchmark(three, tmp_path):
    axes = drawn_well(figure("benchmark", three), 4)
    left, right = axes[:2]
    # Dots are those of a method after another: mean of the members, ensemble.
    assert [x for x, _ in at(left, 3)] == pytest.approx([60, 70, 80, 70, 80, 90])
    assert np.array(bars(left))[3, :, 0] == pytest.approx([67, 74])
    # Differences to SAM of the same seeds; one pair has no interval over ensembles.
    assert [x for x, _ in at(right, 3)] == pytest.approx([-10, 10, -10, 10])
    assert bars(right) == []
    assert "that of a single pair has no interval" in notes(figure("benchmark", three))
    more = [measure(tmp_path / f"sam{i}", SAM, (i, i + 5), a) for i, a in enumerate((0.7, 0.8, 0.84))]
    more += [measure(tmp_path / f"deep{i}", DEEP, (i, i + 5), a) for i, a in enumerate((0.6, 0.72, 0.7))]
    one = figure("benchmark", more)
    left, right = one.axes[:2]
    assert at(left, 3)[3][0] == pytest.approx(78)
    assert at(right, 3)[1][0] == pytest.approx(100 * (2.02 - 2.34) / 3)
    sam, deep = by_sample(more[:3], "ensemble"), by_sample(more[3:], "ensemble")
    crossed = [100 * edge for edge in crossed_interval(sam)]
    assert np.array(bars(left))[3, :, 0] == pytest.approx(crossed)
    assert np.array(bars(right))[1, :, 0] == pytest.approx([100 * edge for edge in crossed_interval(deep - sam)])
    assert "95 % intervals: over new ensembles and new test images." in notes(one)
    assert "3 ensembles of 2 members" in notes(one)
    clean = measure(tmp_path / "clean", SAM, corrupted=False)
    assert len(figure("benchmark", [clean]).axes) == 1


def test_differences_are_to_sam_of_the_rho_of_sharpbalance(tmp_path):
    folders = [measure(tmp_path / f"{rho}", SAM | {"rho": rho}, accuracy=0.7 + rho) for rho in (0.05, 0.1, 0.2)]
    folders.append(measure(tmp_path / "ours", SHARPBALANCE | {"rho": 0.2}))
    right = figure("benchmark", folders).axes[1]
    assert right.get_title() == r"minus SAM, $\rho$ = 0.2"
    assert [x for x, _ in at(right, 3)][:3] == pytest.approx([-16, -10, -10])


def test_labels_are_not_cut_off(tmp_path):
    """Of this figure the ticks, and with them the room that labels take, depend on the size of the font."""
    folders = sorted((ROOT / "results/fashion_mnist/noisy_labels/measurements").iterdir())
    plot.main(plot.parse_args(["benchmark", "--from", *map(str, folders), "--to", str(tmp_path / "bars")]))
    with Image.open(tmp_path / "bars.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert edge.min() == 255


def with_scores(folder, corrupted, **values):
    """The result file of an ensemble of which only the first images were corrupted; the values are kept by image."""
    content = json.loads((folder / "diversity.json").read_text())
    result = content["result"]
    result["test"]["samples"], result["corrupted"]["mean"]["samples"] = IMAGES, corrupted
    result["test"]["values_of_samples"] = {name: pack_values(column) for name, column in values.items()}
    write_json(folder / "diversity.json", content)
    return content


def test_severity(three):
    axes = drawn_well(figure("severity", three), 4)
    curves = [line for line in axes[0].get_lines() if len(line.get_xdata()) == 5]
    assert len(curves) == 3  # ensembles of three methods
    assert curves[0].get_ydata().tolist() == pytest.approx([70 - 8 * s for s in SEVERITIES])
    clean = [line for line in axes[0].get_lines() if len(line.get_xdata()) == 1]  # not joined to the others
    assert [line.get_ydata()[0] for line in clean] == pytest.approx([70, 80, 90])
    assert len(bars(axes[0])) == 18
    gaps = [line for line in axes[1].get_lines() if len(line.get_xdata()) == 5]
    assert [gap.get_ydata().tolist() for gap in gaps] == [pytest.approx([d] * 5) for d in (-10, 10)]
    assert bars(axes[1]) == []
    assert axes[2].get_ylabel() == "NLL before\ntemperature  [nats]"
    # Without SAM there is nothing to subtract.
    assert len(figure("severity", three[:1]).axes) == 2


def test_severity_has_clean_and_corrupted_on_the_same_images(three, tmp_path):
    more = [measure(tmp_path / f"more{i}", DEEP, (i, i + 5), 0.7) for i in (7, 8)]
    for folder in (three[0], *more):
        content = with_scores(folder, 20, ensemble_nll=np.arange(IMAGES) / 10)
    assert content["result"]["test"]["ensemble"]["accuracy"] == 0.7  # the first 35 of 50
    one = figure("severity", [three[0], *more])
    accuracy, nll = (axis.get_lines()[0].get_ydata()[0] for axis in one.axes)
    assert (accuracy, nll) == (100, pytest.approx(0.95, rel=1e-3))
    assert "Clean: accuracy and NLL before temperature of the same 20 images. " in notes(one)
    assert "with caps over new ensembles and new test images; without caps Student's, over ensembles" in notes(one)
    # Of a file that does not keep NLL by image: of all of them, which is said.
    for folder in (three[0], *more):
        with_scores(folder, 20)
    one = figure("severity", [three[0], *more])
    assert one.axes[1].get_lines()[0].get_ydata() == pytest.approx([0.3])
    assert "Clean: accuracy of the same 20 images, NLL before temperature of all 50 images. " in notes(one)


def test_calibration_is_shown_in_the_form_for_few_images(three):
    """As its root, where the files hold it; never as the ECE."""
    assert not any("CE" in axis.get_ylabel() for axis in figure("severity", three).axes)
    for folder in three:
        content = json.loads((folder / "diversity.json").read_text())
        rows = [content["result"]["test"], content["result"]["corrupted"]["mean"]]
        for row_of in (*rows, *content["result"]["corrupted"]["by_severity"].values()):
            for scores in (row_of["ensemble"], *row_of["ensemble_by_size"].values()):
                scores["calibration_mse"] = -1e-4 if row_of is rows[0] else 0.0025
        write_json(folder / "diversity.json", content)
    axes = drawn_well(figure("severity", three), 6)
    assert axes[4].get_ylabel() == "RMSCE before\ntemperature  [%]"
    clean, corrupted = axes[4].get_lines()[:2]
    assert clean.get_ydata().tolist() == [0]  # an estimate of a square, below 0
    assert corrupted.get_ydata().tolist() == pytest.approx([5] * 5)
    axes = drawn_well(figure("ensemble_size", three), 6)
    assert axes[5].get_lines()[0].get_ydata().tolist() == pytest.approx([5, 5])


def test_ensemble_size(three, tmp_path):
    axes = drawn_well(figure("ensemble_size", three), 4)
    for axis, values in zip(axes[::2], ([60, 70], [0.4, 0.3]), strict=True):
        curves = [line for line in axis.get_lines() if len(line.get_xdata()) == 2]
        assert len(curves) == 3
        assert curves[0].get_ydata().tolist() == pytest.approx(values)
        assert len(bars(axis)) == 6
    assert [axis.get_ylabel() for axis in axes] == ["accuracy  [%]", "", "NLL before\ntemperature  [nats]", ""]
    # What is kept by image has crossed intervals, the rest Student's, and the caption says which is which.
    more = [measure(tmp_path / f"sam{i}", SAM, (i, i + 5), a, corrupted=False) for i, a in enumerate((0.7, 0.8, 0.84))]
    one = figure("ensemble_size", more)
    edges = [[100 * edge for edge in crossed_interval(by_sample(more, name))] for name in ("member", "ensemble")]
    assert np.array(bars(one.axes[0]))[:, :, 1].tolist() == [pytest.approx(pair) for pair in edges]
    students = [t_interval([1 - a + 0.1 * one for a in (0.7, 0.8, 0.84)]) for one in (1, 0)]
    assert np.array(bars(one.axes[1]))[:, :, 1].tolist() == [pytest.approx(pair) for pair in students]
    assert [sum(line.get_marker() == "_" for line in axis.get_lines()) for axis in one.axes] == [4, 0]
    assert "with caps over new ensembles and new test images; without caps Student's" in notes(one)


def test_the_number_of_members_by_calibrated_nll(tmp_path):
    """Where all files hold it, by image if all keep it so; the axis says which NLL it is."""
    folders = [measure(tmp_path / f"deep{i}", DEEP, (i, i + 5)) for i in range(3)]
    kept = []
    for i, folder in enumerate(folders):
        content = json.loads((folder / "diversity.json").read_text())
        kept.append([torch.linspace(0, 2 - 0.1 * i, IMAGES) + 0.2 / size for size in (1, 2)])
        names = ("ensemble_nll_calibrated_of_1", "ensemble_nll_calibrated")
        test = content["result"]["test"]
        test["values_of_samples"] = {name: pack_values(one.numpy()) for name, one in zip(names, kept[i], strict=True)}
        test["calibrated_nll_by_size"] = {str(n): one.mean().item() for n, one in enumerate(kept[i], 1)}
        test["intervals_95"] |= {names[0]: [1.0, 1.3], names[1]: [0.9, 1.2]}
        write_json(folder / "diversity.json", content)
    one = figure("ensemble_size", folders)
    left, right = drawn_well(one, 4)[2:]
    assert left.get_ylabel() == "NLL, calibrated  [nats]"
    assert right.get_ylabel() == "NLL before\ntemperature  [nats]"  # of corrupted images it is not known
    assert "Calibrated: each subset by one temperature, fitted on validation." in notes(one)
    columns = [torch.stack(of_size) for of_size in zip(*kept, strict=True)]
    assert left.get_lines()[0].get_ydata() == pytest.approx([of.mean().item() for of in columns], abs=1e-3)
    expected = [crossed_interval(of.double()) for of in columns]
    assert np.array(bars(left))[:, :, 1] == pytest.approx(np.array(expected), abs=2e-3)
    # Of a single ensemble whose file does not keep it by image, the intervals are those of the file.
    del test["values_of_samples"]
    write_json(folders[2] / "diversity.json", content)
    single = figure("ensemble_size", folders[2:]).axes[2]
    assert np.array(bars(single))[:, :, 1] == pytest.approx(np.array([[1.0, 1.3], [0.9, 1.2]]))
    other = measure(tmp_path / "sam", SAM)
    one = figure("ensemble_size", [*folders, other])
    assert one.axes[2].get_ylabel() == "NLL before\ntemperature  [nats]"
    assert "Calibrated" not in notes(one)


def test_curves(runs):
    axes = drawn_well(figure("curves", runs), 4)
    lines = axes[0].get_lines()
    assert len(lines) == 3 * (2 + 1) + 1  # members and mean of each method, and where the sets are made
    assert lines[2].get_ydata().tolist() == pytest.approx([1 / (e + 1) + 0.5 for e in range(4)])
    assert lines[2].get_xdata().tolist() == [1, 2, 3, 4]
    assert lines[-1].get_xdata()[0] == 2.5
    entry = figure("curves", runs).legends[0].get_lines()[-1]  # it looks as the legend shows it
    assert [(line.get_color(), line.get_linestyle()) for line in (entry, lines[-1])] == [("grey", ":")] * 2
    assert entry.get_label() == "samples are assigned"
    assert axes[3].get_lines()[0].get_ydata().tolist() == pytest.approx([40] * 4)
    assert "Until samples are assigned, SharpBalance is SAM." in notes(figure("curves", runs))
    assert "Until samples" not in notes(figure("curves", runs[:2]))


def test_a_diverged_loss_does_not_squeeze_the_others(tmp_path):
    folder = make_run(tmp_path / "run", SAM, epochs=20)
    one = figure("curves", [folder])
    assert "cut off" not in notes(one)
    log = folder / "seed_1" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[3]["train_loss"] = 34567.0
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    one = figure("curves", [folder])
    low, high = one.axes[0].get_ylim()
    assert 2 < high < 10
    assert low < 0.05
    assert one.axes[2].get_ylim() == figure("curves", [folder]).axes[2].get_ylim()
    assert "Losses above a panel, up to 35,000 nats, are cut off." in notes(one)


def test_sets(runs, tmp_path):
    one = figure("sets", [runs[2]], tmp_path / "sets")
    one.draw_without_rendering()
    classes, picks, bar, flat, sharp = (axis for part in one.subfigs for axis in part.axes)
    train = load_data("digits").train
    labels = train.labels.numpy()
    masks, scores = (
        np.stack([np.load(runs[2] / f"seed_{seed}" / f"{name}.npy") for seed in (1, 2)])
        for name in ("sam_mask", "fisher")
    )
    shares = classes.images[0].get_array()
    for member, label in itertools.product(range(2), range(10)):
        chosen = [masks[member, i] for i in range(len(labels)) if labels[i] == label]
        assert shares[member, 1 + label] == pytest.approx(100 * np.mean(chosen))
    assert shares[:, 0].tolist() == pytest.approx((100 * masks.mean(axis=1)).tolist())
    # A member trains with SAM all that the other one picked; of its own only what that one picked too.
    shares = picks.images[0].get_array()
    own = [set(np.argsort(row)[: len(row) // 2]) for row in scores]
    both = 100 * len(own[0] & own[1]) / len(own[0])
    assert shares[:, :2].ravel().tolist() == pytest.approx([both, 100, 100, both])
    assert shares[:, 2].sum() == pytest.approx(100)  # one of the two for each
    assert len(classes.texts) == 22
    assert len(picks.texts) == 6
    assert flat.images[0].get_array().shape == sharp.images[0].get_array().shape == (8, 10 * 9 - 1)
    ranks = np.argsort(np.argsort(scores, axis=1), axis=1).mean(axis=0)
    first = train.images[int(ranks.argmin()), :, :, 0].numpy() / 255
    np.testing.assert_allclose(flat.images[0].get_array()[:, :8], first, atol=1e-6)
    assert sharp.get_xticklabels()[0].get_text().startswith(f"{labels[ranks.argmax()]}:\n")
    assert all(
        "[" in text for text in (classes.get_xlabel(), classes.get_ylabel(), picks.get_xlabel(), bar.get_ylabel())
    )
    call("sets", [runs[2]], tmp_path / "a")
    call("sets", [runs[2]], tmp_path / "b")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    # From its numbers alone.
    call("sets", [tmp_path / "a.json"], tmp_path / "c")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "c.png").read_bytes()


def test_landscape(runs, few_steps, tmp_path, monkeypatch):
    one = figure("landscape", runs, tmp_path / "a")
    left, middle, right = drawn_well(one, 3)
    assert len(left.get_lines()) == 3 * (2 + 1)
    assert len(middle.get_lines()) == 3 * (1 + 2 + 1)  # the mean over random directions, too
    assert len(right.get_lines()) == 3 * (1 + 1)
    dotted, strong = middle.get_lines()[0], left.get_lines()[2]
    assert dotted.get_xydata().tolist() == strong.get_xydata().tolist()
    assert middle.get_xlim() == pytest.approx((-0.0005, 0.0105))
    assert right.get_xlabel() == "position between\ntwo members  [1]"
    assert "Top eigenvector" in notes(one)
    path = tmp_path / "a.json"
    content = json.loads(path.read_text())
    data = load_data("digits")
    batches = landscape.subset(data.val)
    model, _ = load_model(runs[0] / "seed_1" / "model_best.pth.tar")
    with torch.no_grad():
        images, labels = zip(*batches, strict=True)
        loss = torch.nn.functional.cross_entropy(model(torch.cat(images)), torch.cat(labels)).item()
    # The rise, both signs of a direction and both orders of a pair averaged.
    for line, top in zip(middle.get_lines()[3:5], content["runs"][0]["top"].values(), strict=True):
        below, here, above = top["losses"]
        assert line.get_xydata().tolist() == [[0, 0], pytest.approx([0.01, (below + above) / 2 - here])]
    for line, along in zip(left.get_lines()[:2], content["runs"][0]["along"].values(), strict=True):
        below, here, above = np.mean(along, axis=0)
        assert line.get_xydata().tolist() == [[0, 0], pytest.approx([0.5, (below + above) / 2 - here])]
    first, half, last = next(iter(content["runs"][0]["between"].values()))
    rise = right.get_lines()[0].get_xydata().tolist()
    assert rise == [[0, 0], pytest.approx([0.5, half - (first + last) / 2]), [1, 0]]
    curves = next(iter(content["runs"][0]["along"].values()))
    assert [values[1] for values in curves] == pytest.approx([loss, loss], rel=1e-5)
    assert curves[0] != curves[1]
    for key, top in content["runs"][0]["top"].items():
        assert top["losses"][1] == content["runs"][0]["along"][key][0][1]
        assert top["losses"][2] >= top["losses"][0]
    top = next(iter(content["runs"][0]["top"].values()))
    assert top["eigenvalue"] == pytest.approx(top_eigenvalues(model, batches).item(), rel=1e-3)
    length = sum(w.square().sum().item() for w in model.parameters() if w.ndim > 1) ** 0.5
    assert top["length"] == pytest.approx(length, rel=1e-5)

    # The numbers are taken up again, by the same command and from the file alone.
    def computed(*args):
        raise AssertionError("computed what the file holds")

    monkeypatch.setattr(landscape, "losses_along", computed)
    monkeypatch.setattr(landscape, "losses_between", computed)
    monkeypatch.setattr(landscape, "top_direction", computed)
    call("landscape", runs, tmp_path / "a")
    call("landscape", [path], tmp_path / "b")
    assert (tmp_path / "a.pdf").read_bytes() == (tmp_path / "b.pdf").read_bytes()
    assert json.loads(path.read_text()) == content
    # A file without eigenvectors is drawn without them, and serves for all else.
    earlier = json.loads(path.read_text())
    for part in (earlier["about"], *earlier["runs"]):
        del part["top"]
    write_json(tmp_path / "c.json", earlier)
    one = figure("landscape", [tmp_path / "c.json"])
    drawn_well(one, 2)
    assert "Top eigenvector" not in one._supxlabel.get_text()
    with monkeypatch.context() as patch:
        tops = {key: top for one in content["runs"] for key, top in one["top"].items()}
        patch.setattr(landscape, "along_top", lambda model, batches: tops.popitem()[1])
        figure("landscape", runs, tmp_path / "c")
    assert not tops
    # Other images or steps are another matter.
    monkeypatch.setattr(landscape, "IMAGES", 40)
    with pytest.raises(AssertionError, match="computed"):
        figure("landscape", runs, tmp_path / "a")


def test_the_lines_of_a_landscape():
    torch.manual_seed(0)
    a, b = (create_model("resnet18", 10, 2, 8, 1) for _ in range(2))
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in (a, b)]
    batches = [(torch.randn(9, 1, 8, 8), torch.arange(9)), (torch.randn(4, 1, 8, 8), torch.arange(4))]
    direction = landscape.random_direction(a, torch.Generator().manual_seed(1))
    for parameter, way in zip(a.parameters(), direction, strict=True):
        if parameter.ndim == 1:
            assert not way.any()
        else:
            norms = parameter.flatten(1).norm(dim=1), way.flatten(1).norm(dim=1)
            torch.testing.assert_close(*norms)
    assert landscape.losses_along(a, direction, [0.0], batches)[0] == landscape.mean_loss(a, batches)
    there = landscape.losses_between(a, b, [0.0, 0.25, 1.0], batches, batches)
    back = landscape.losses_between(b, a, [0.0, 0.75, 1.0], batches, batches)
    assert there == pytest.approx(back[::-1], rel=1e-4)
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert model.training


def test_the_curvature_along_the_top_eigenvector():
    """It is the eigenvalue times the squared length; and no direction of this length is more curved."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 6 * 6, 10)
    model = nn.Sequential(*layers).double()
    batches = [(torch.randn(n, 1, 8, 8, dtype=torch.float64), torch.arange(n)) for n in (9, 4)]
    direction, eigenvalue, length = landscape.top_direction(model, batches)
    random = landscape.random_direction(model, torch.Generator().manual_seed(1))
    assert model.training
    step = 1e-4

    def curvature(direction):
        below, here, above = landscape.losses_along(model, direction, [-step, 0.0, step], batches)
        return (above - 2 * here + below) / step**2

    norms = [torch.cat([way.flatten() for way in ways]).norm().item() for ways in (direction, random)]
    assert norms == pytest.approx([length, length])
    assert curvature(direction) == pytest.approx(eigenvalue * length**2, rel=1e-3)
    assert curvature(random) < eigenvalue * length**2
    # What is not trained does not move.
    model[0].requires_grad_(False)
    direction, eigenvalue, _ = landscape.top_direction(model, batches)
    assert not any(way.any() for way in direction[:2])
    assert curvature(direction) == pytest.approx(eigenvalue * sum(w.square().sum().item() for w in direction), rel=1e-3)


def test_a_landscape_without_second_derivatives(runs, few_steps, tmp_path, monkeypatch, capsys):
    """As of hard sigmoids: the other panels need none."""

    def without(*rest):
        raise InputError("the Hessian: torch has no second derivative of hardswish; measure without")

    monkeypatch.setattr(landscape, "along_top", without)
    assert len(drawn_well(figure("landscape", runs, tmp_path / "a"), 2)) == 2
    assert capsys.readouterr().err.count("without the top eigenvector; the Hessian: torch has no second derivat") == 1


def test_a_method_has_one_name_and_colour(tmp_path):
    random, same = (SHARPBALANCE | {"partition": name, "unselected": None} for name in ("random", "same"))
    settings = [PAPER, SAM | {"rho": 0.2}, SAM, SHARPBALANCE, DEEP, random, same, SAM | {"sam_adaptive": True}]
    ensembles = [read_ensemble(measure(tmp_path / str(i), one)) for i, one in enumerate(settings)]
    groups = plots.line_styles(ensembles)
    names = ["deep ensemble", "SAM", "SAM", "SharpBalance (released)", "SharpBalance (paper)"]
    names += ["SAM on random samples", "SAM on the same random samples", "ASAM"]
    assert [group.label for group in groups] == [
        *(names[0], r"SAM, $\rho$ = 0.1", r"SAM, $\rho$ = 0.2"),
        *names[3:],
    ]
    assert [group.ensembles[0].method.partition(", ")[0] for group in groups] == names  # as tables have it
    colours = [group.colour for group in groups]
    assert len(set(colours)) == 8
    assert colours[3] == plots.to_rgb(METHODS["released"].colour)
    assert len({plots.MARKERS[group.key] for group in groups}) == 7  # both SAM have the same, filled differently
    assert groups[1].fill != groups[2].fill
    (unknown,) = plots.line_styles([read_ensemble(measure(tmp_path / "theirs", DEEP, trained=None))])
    assert unknown.label == "theirs"


def test_a_setting_looks_alike_in_all_figures(tmp_path):
    """SAM at SharpBalance's rho, or at the smallest one, has SAM's colour, filled, whichever others are beside it."""
    late = {"initial_method": "sgd", "initial_epochs": 8}
    settings = {"sam": SAM, "small": SAM | {"rho": 0.05}, "large": SAM | {"rho": 0.2}, "late": SAM | late}
    settings |= {"late_large": SAM | late | {"rho": 0.2}, "ours": SHARPBALANCE, "ours_late": SHARPBALANCE | late}
    found = {name: read_ensemble(measure(tmp_path / name, one)) for name, one in settings.items()}

    def marks(*names):
        groups = plots.line_styles([found[name] for name in names])
        return {group.ensembles[0].folder.name: group.mark for group in groups}

    own = {"color": plots.to_rgb(METHODS["sam"].colour), "marker": "s"}
    several = marks(*settings)
    assert list(several) == ["small", "sam", "large", "late", "late_large", "ours", "ours_late"]  # by rho
    assert several["sam"] == marks("sam", "ours")["sam"] == marks("sam")["sam"] == own
    assert marks("small", "large")["small"] == own  # where SharpBalance is not shown
    assert several["late"] == marks("late")["late"] == marks("sam", "late")["late"]
    assert several["ours"] == marks("ours")["ours"]
    of_sam = [json.dumps(several[name], sort_keys=True) for name in ("small", "sam", "large", "late", "late_large")]
    assert len(set(of_sam)) == 5
    assert len({several[name]["color"] for name in ("small", "sam", "large")}) == 3
    assert several["late"]["color"] != own["color"]
    markers = [several[name]["marker"] for name in ("sam", "late", "ours", "ours_late")]
    assert len(set(markers)) == 4
    assert not set(markers[1::2]) & set(plots.MARKERS.values())
    # Lines that join what differs in rho only: that of late SAM has another colour than SAM's.
    (axis,) = figure("tradeoff", [tmp_path / name for name in settings]).axes
    joined = [line for line in axis.get_lines() if line.get_zorder() == 2 and len(line.get_xdata()) > 1]
    assert [plots.to_rgb(line.get_color()) for line in joined] == [own["color"], several["late"]["color"]]


# Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision deficiency", 2009:
# matrices of linear RGB for no deficiency, and for severity 1.0 of each.
SIGHT = {
    "normal": np.eye(3),
    "protanope": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranope": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanope": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.119192, 0.9503041]]
)


def linear(colours):
    """Linear RGB of sRGB colours, [N, 3]."""
    values = np.array([plots.to_rgb(colour) for colour in colours])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrasts(colours):
    """WCAG's contrast of each colour to white."""
    return 1.05 / (linear(colours) @ TO_XYZ[1] + 0.05)


def least_distance(colours, sight):
    """The least CIE76 distance of two colours."""
    xyz = np.clip(linear(colours) @ np.array(SIGHT[sight]).T, 0, 1) @ TO_XYZ.T / TO_XYZ.sum(axis=1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
    return min(np.linalg.norm(a - b) for a, b in itertools.combinations(lab, 2))


def test_the_palette_can_be_read():
    """On white paper; and the measures find what could not be read in an earlier palette."""
    palette = [*{method.colour for method in METHODS.values()}, plots.SHADES["sam"][0], plots.SHADES["sam"][2]]
    assert contrasts(palette).min() > 3
    assert contrasts(["#F0E442", "#FFFFFF"]) == pytest.approx([1.3, 1], abs=0.05)
    assert (
        least_distance(["#009E73", "#CC79A7"], "deuteranope")
        < 20
        < 80
        < least_distance(["#009E73", "#CC79A7"], "normal")
    )


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_of_methods_differ(sight):
    palette = [*{method.colour for method in METHODS.values()}, plots.SHADES["sam"][0], plots.SHADES["sam"][2]]
    assert least_distance(palette, sight) > 12
    palette.remove(METHODS["unknown"].colour)
    assert least_distance(palette, sight) > 17


def test_no_two_methods_look_alike(tmp_path):
    """Without colour, too: each has a marker of its own, and settings of one method a filling each."""
    assert len(set(plots.MARKERS.values())) == len(METHODS)
    assert len({marker for markers in (plots.MARKERS, plots.LATE) for marker in markers.values()}) == len(METHODS) + 6
    settings = [SAM | {"rho": rho} for rho in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)]
    settings += [DEEP, SHARPBALANCE, PAPER, SAM | {"sam_adaptive": True}]
    groups = plots.line_styles([read_ensemble(measure(tmp_path / str(i), one)) for i, one in enumerate(settings)])
    looks = {json.dumps([group.mark["marker"], group.fill]) for group in groups}
    assert len(looks) == len(groups) == 10
    assert len({(group.colour, str(group.line), group.mark["marker"]) for group in groups}) == 10


@pytest.mark.parametrize(("key", "count"), [("sam", 2), ("sam", 5), ("deep_ensemble", 3), ("paper", 4)])
def test_shades_are_dark_enough(key, count):
    assert contrasts(plots.shades(key, count)).min() > 3


def test_settings_that_tell_groups_apart(tmp_path):
    """Those of one method; the number of members is one of them."""
    settings = [SHARPBALANCE, SHARPBALANCE | {"unselected": "normal"}, SHARPBALANCE | {"flat_ratio": 0.3}]
    folders = [measure(tmp_path / str(i), one) for i, one in enumerate(settings)]
    folders.append(measure(tmp_path / "3", SHARPBALANCE, seeds=(1, 2, 3)))
    folders.append(measure(tmp_path / "sam", SAM))
    assert [group.label for group in plots.line_styles(list(map(read_ensemble, folders)))] == [
        "SAM",
        "SharpBalance (released), $k$ = 0.5, members 2",
        "SharpBalance (released), unselected normal, $k$ = 0.5",
        "SharpBalance (released), $k$ = 0.3",
        "SharpBalance (released), $k$ = 0.5, members 3",
    ]


def test_map_of_verdicts():
    """Each cell has its number and mark, in black or white that can be read on its colour; what is small is pale."""
    claim = claims.Claim("a", "", "points", 0.3, None)
    means, words = [-2.0, -0.3, 0.0, 0.3, 1.0, 2.0], 3 * ["equivalent"] + 3 * ["supported"]

    def judged(mean, word, margin):
        return claims.Judged(claim._replace(margin=margin), mean, None, "", 1, 1, word, None, False)

    row = [judged(mean, word, 0.3) for mean, word in zip(means, words, strict=True)]
    small = [judged(0.003, "undecided", 0.003), *5 * [None]]
    parts = {"gain  [% points]": {"one": row}, "gain  [mnats]": {"two": small}}
    figure = verdicts(list("abcdef"), parts, "Note.")
    first, second = figure.axes
    found = [text.get_text() for text in first.texts]
    assert found == ["-2.00 =", "-0.30 =", "+0.00 =", "+0.30 \u25b2", "+1.00 \u25b2", "+2.00 \u25b2"]
    assert [text.get_text() for text in second.texts] == ["+3.00 ?"]
    assert "? undecided" in figure.texts[-1].get_text().replace("\n", " ")
    for axis in figure.axes:
        image = axis.images[0]
        colours = image.cmap(image.norm(image.get_array().filled(np.nan)))[0, :, :3]
        for text, colour in zip(axis.texts, colours, strict=False):
            of_text = contrasts([text.get_color()])[0]
            pair = sorted((1.05 / contrasts([colour])[0], 1.05 / of_text))
            assert pair[1] / pair[0] > 4, text
    of_no_interest = [judged(0.1, word, 0.3)._replace(small=True) for word in ("supported", "contradicted")]
    marked = verdicts(["a", "b"], {"gain": {"one": of_no_interest}}, "").axes[0].texts
    assert [text.get_text()[-1] for text in marked] == ["\u25b3", "\u25bd"]
    (unknown,) = verdicts(["a"], {"gain": {"one": [judged(np.nan, "undecided", 0.3)]}}, "").axes[0].texts
    assert (unknown.get_text(), unknown.get_color()) == ("- ?", "black")  # on white
    half = second.images[0]
    assert half.norm(3.0) == pytest.approx(0.75)  # half of the way, since twice the margin has the full colour
    for sight in SIGHT:
        assert least_distance([BETTER(0.0)[:3], BETTER(1.0)[:3], (1, 1, 1)], sight) > 30


def test_the_batches_of_few_images(tmp_path):
    """Those that there were, not those that were asked for."""
    folder = measure(tmp_path / "a", SAM)
    content = json.loads((folder / "sharpness.json").read_text())
    content["protocol"] |= {"batch_num": 100, "eval_batch_size": 5, "split": "train"}
    content["result"]["APGD_worst-l2"]["members"] = [{"images": 297}] * 2
    write_json(folder / "sharpness.json", content)
    assert "mean over members and 60 batches of 5 train images" in notes(figure("tradeoff", [folder])).replace(
        "\n", " "
    )


def test_bad_measurements(three, tmp_path, capsys):
    to = tmp_path / "x"
    assert "none/diversity.json: cannot be read (No such file" in refused(capsys, "benchmark", [tmp_path / "none"], to)
    data = {"dataset": "digits", "test": IMAGES, "sha256_of_arrays_and_split": "other"}
    other = measure(tmp_path / "other", PAPER, data=data)
    assert "data differs" in refused(capsys, "tradeoff", [*three, other], to)
    other = measure(tmp_path / "other", PAPER, protocol={"checkpoint": "last", "bins": 15})
    assert "--checkpoint differs (last, best)" in refused(capsys, "ensemble_size", [*three, other], to)
    clean = measure(tmp_path / "clean", SAM, corrupted=False)
    error = refused(capsys, "severity", [clean], to)
    assert "clean/diversity.json: no corrupted set was measured" in error
    assert "--split test,corrupted" in error
    damaged = measure(tmp_path / "damaged", SAM)
    (damaged / "sharpness.json").write_text('{"result": {"APGD_worst-l2": null}}')
    assert "damaged/sharpness.json: not a result of measure_sharpness.py" in refused(capsys, "tradeoff", [damaged], to)
    content = json.loads((three[0] / "diversity.json").read_text())
    del content["result"]["test"]["ensemble_by_size"]
    write_json(three[0] / "diversity.json", content)
    assert "'ensemble_by_size' is missing; measure it by" in refused(capsys, "ensemble_size", three, to)
    sharpness = json.loads((three[1] / "sharpness.json").read_text())
    write_json(three[1] / "sharpness.json", sharpness | {"members": [{"sha256_of_weights": "0"}]})
    error = refused(capsys, "tradeoff", three, to)
    assert "sharpness.json: of other weights than diversity.json beside it" in error
    assert "not a result" not in error
    (three[1] / "sharpness.json").unlink()
    error = refused(capsys, "tradeoff", three, to)
    assert "sam/sharpness.json: holds no APGD_worst-l2 of all members" in error
    assert "measure_sharpness.py" in error
    content = json.loads((three[1] / "diversity.json").read_text())
    del content["result"]["corrupted"]
    write_json(three[1] / "diversity.json", content)
    for folders in (three, three[::-1]):
        assert "no corrupted set was measured" in refused(capsys, "benchmark", folders, to)
    assert "is a folder" in refused(capsys, "benchmark", three, tmp_path)
    (tmp_path / "file").write_text("")
    assert "--to" in refused(capsys, "benchmark", three, tmp_path / "file" / "x")
    assert not to.with_suffix(".png").exists()


def test_bad_runs(runs, tmp_path, capsys):
    to = tmp_path / "x"
    assert f"{tmp_path}: not a run of main.py" in refused(capsys, "curves", [tmp_path], to)
    assert "do not come from scores" in refused(capsys, "sets", [runs[1]], to)
    assert "--from: expected one run folder for sets, got 3 folders" in refused(capsys, "sets", runs, to)
    (tmp_path / "y.json").write_text('{"seeds": [1], "shares": {"classes": [[0.5]]}, "pictures": [], "note": ""}')
    assert "y.json: not the numbers of sets" in refused(capsys, "sets", [tmp_path / "y.json"], to)
    broken = make_run(tmp_path / "broken", SHARPBALANCE)
    (broken / "seed_2" / "sam_mask.npy").unlink()
    error = refused(capsys, "sets", [broken], to)
    assert "seed_2/sam_mask.npy: missing" in error
    write_array(broken / "seed_2" / "sam_mask.npy", np.ones(7, dtype=bool))
    error = refused(capsys, "sets", [broken], to)
    assert "seed_2/sam_mask.npy: expected 809 numbers, one for each training image, got [7]" in error
    (broken / "seed_1" / "log.jsonl").write_text("{}\n")
    assert "seed_1/log.jsonl: missing or not the log of a run" in refused(capsys, "curves", [broken], to)
    (broken / "seed_1" / "log.jsonl").write_text("")
    assert "holds no epoch" in refused(capsys, "curves", [broken], to)
    assert "model_best.pth.tar is missing" in refused(capsys, "landscape", [broken], to)
    assert "same method and seeds" in refused(capsys, "curves", [runs[0], runs[0]], to)
    content = json.loads((broken / "environment.json").read_text())
    content["data"]["sha256_of_arrays_and_split"] = "other"
    write_json(broken / "environment.json", content)
    assert "data differs" in refused(capsys, "curves", [runs[0], broken], to)
    assert "are not those of the run" in refused(capsys, "sets", [broken], to)
    (broken / "environment.json").unlink()
    assert "environment.json: cannot be read (No such file" in refused(capsys, "curves", [broken], to)
    for content in ({}, {"about": {}, "runs": [{}]}, {"about": {}, "runs": 3}):
        write_json(tmp_path / "x.json", content)
        assert "x.json: not the numbers of a landscape" in refused(capsys, "landscape", [tmp_path / "x.json"], to)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sets", "--to", "x"], "sets is drawn from result folders"),
        (["theory", "--from", "a", "b", "--to", "x"], "--from: expected one theory.json, got 2 files"),
    ],
)
def test_bad_words(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        plot.parse_args(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


HOSTILE = {
    "text.usetex": True,
    "figure.facecolor": "black",
    "axes.labelcolor": "white",
    "font.family": ["serif"],
    "savefig.bbox": "tight",
    "savefig.transparent": True,
    "figure.dpi": 30,
    "savefig.dpi": 20,
    "axes.unicode_minus": False,
    "lines.linestyle": "--",
}


@pytest.mark.parametrize("kind", ["tradeoff", "benchmark", "ensemble_size"])
def test_the_users_settings_of_matplotlib_change_nothing(kind, three, tmp_path):
    """Also where they ask for LaTeX, which is not there."""
    call(kind, three, tmp_path / "a")
    with matplotlib.rc_context(HOSTILE):
        call(kind, three, tmp_path / "b")
        assert matplotlib.rcParams["text.usetex"]  # they are the user's again
    for suffix in ("pdf", "png"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


@pytest.mark.parametrize("variable", ["MPLBACKEND", "MPLCONFIGDIR"])
def test_the_users_backend(variable, three, tmp_path):
    """One that is not there, by a variable or by a file."""
    call("tradeoff", three, tmp_path / "a")
    (tmp_path / "matplotlibrc").write_text("backend: tkagg\ntext.usetex: True\n")
    command = [sys.executable, ROOT / "scripts/plot.py", "tradeoff", "--from", *three, "--to", tmp_path / "b"]
    variables = os.environ | {variable: "nowhere" if variable == "MPLBACKEND" else str(tmp_path)}
    subprocess.run(command, env=variables, check=True, capture_output=True)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("name", ["a$b_$c", "_hidden", "a|b", r"x^{\broken$ and $"])
def test_a_folders_name_is_no_formula(name, three, tmp_path):
    """Of checkpoints whose training is not known, the label is the folder's name."""
    folder = measure(tmp_path / "odd" / name, SAM, trained=None)
    one = figure("tradeoff", [folder, *three[:1]])
    plots.save(one, tmp_path / "a")
    labels = [text.get_text() for text in one.legends[0].get_texts()]
    assert labels[1].replace(r"\$", "$") == name.lstrip("_")
