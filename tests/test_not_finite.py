"""Numbers that are not finite: measured as such, written as JSON has it, read back, and shown in tables and figures."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from tests import test_plots, test_report, test_summarize
from tests.test_measure import MODES, SMALL, call, refused, save_member
from tests.test_report import results as _results
from tests.test_summarize import SAM, SHARPBALANCE, write
from utils import InputError, claims, landscape, plots, run_plots
from utils.files import json_text, load_json, parse_json, read_json, write_json
from utils.hessian import hessian_trace, top_eigenpairs
from utils.results import difference_of, estimate, interval_of, read_ensemble, standard_deviation
from utils.sharpness import MAXIMISERS, NORMS, average_sharpness, worst_case_sharpness

INF, NAN = math.inf, math.nan
measured = _results  # the fixture


def strict(text):
    """As every other reader of JSON has it."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def same(one, other):
    return json.dumps(one) == json.dumps(other)  # in which nan is equal to itself


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": INF}, {"/a": "inf"}),
        ({"a": {"b": [1.0, (NAN, -INF)]}, "c": None}, {"/a/b/1/0": "nan", "/a/b/1/1": "-inf"}),
        ({"of runs/a~b": np.float64(INF), 3: [[NAN]]}, {"/of runs~1a~0b": "inf", "/3/0/0": "nan"}),
    ],
)
def test_json_round_trip(value, words, tmp_path):
    write_json(tmp_path / "a.json", value)
    content = strict((tmp_path / "a.json").read_text())
    assert content["not_finite"] == words
    expected = json.loads(json.dumps(value))  # keys as strings, tuples as lists
    assert same(load_json(tmp_path / "a.json"), expected)
    assert same(parse_json(json.dumps(value)), expected)  # as earlier versions wrote it
    assert same(read_json(tmp_path / "a.json", ""), expected)


def test_finite_json_is_as_it_was(tmp_path):
    value = {"a": [1, 2.5, None, "x"], "b": {"c": True}}
    write_json(tmp_path / "a.json", value)
    assert (tmp_path / "a.json").read_text() == json.dumps(value, indent=2) + "\n"
    with pytest.raises(ValueError, match="JSON"):
        json_text([INF])


@pytest.mark.parametrize(
    "text",
    [
        '{"not_finite": 3}',
        '{"not_finite": {"/a": "inf"}}',
        '{"a": 1, "not_finite": {"/a": "inf"}}',
        '{"a": null, "not_finite": {"/a": "much"}}',
        '{"a": [null], "not_finite": {"/a/x": "inf"}}',
        '{"a": null, "not_finite": {"": "inf"}}',
    ],
)
def test_json_whose_words_do_not_fit(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"a\.json: cannot be read \(its not_finite does not fit its numbers\); again"):
        read_json(tmp_path / "a.json", "again")


class Steep(nn.Module):
    """Two logits, (0, z) or (-z, z) with z = slope (w - 1): the loss of label 0 is about z or 2 z."""

    def __init__(self, slope, both=False, count=3):
        super().__init__()
        self.w, self.one = nn.Parameter(torch.ones(count)), torch.ones(count)
        self.slope, self.both = slope, both

    def forward(self, images):
        z = self.slope * ((self.w - 1) * self.one).sum()
        return torch.stack([-z if self.both else torch.zeros_like(z), z]).expand(len(images), 2)


BATCHES = [(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))] * 2


@pytest.mark.parametrize("maximiser", MAXIMISERS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("both", [False, True])
def test_a_loss_that_overflows_is_infinite(maximiser, norm, both):
    """The logit overflows at the larger radius, or the loss alone: in neither case is nothing found."""
    model = Steep(1e38, both).eval()
    if not both:
        found = worst_case_sharpness(model, BATCHES, 0.5, norm, maximiser=maximiser)
        exact = 1e38 * (1.5 if norm == "linf" else 0.5 * 3**0.5)
        assert found["loss"] == pytest.approx(exact, rel=1e-3)
        assert found["error"] == 1.0
    found = worst_case_sharpness(model, BATCHES, 8.0, norm, maximiser=maximiser)
    assert found["loss"] == INF
    assert found["loss_by_batch"] == [INF, INF]
    assert (model.w == 1).all()


def test_a_search_that_overflows_itself_says_nothing():
    """Where no point of the ball was tried the value is not known; it is not 0."""
    found = worst_case_sharpness(Steep(1.0).eval(), BATCHES, 1e30, "l2", maximiser="apgd")
    assert math.isnan(found["loss"])
    assert worst_case_sharpness(Steep(1.0).eval(), BATCHES, 1e30, "l2")["loss"] == pytest.approx(3**0.5 * 1e30)
    with pytest.raises(ValueError, match=r"rho: expected a number above 0 and up to 1e\+30, got 1e\+39"):
        worst_case_sharpness(Steep(1.0).eval(), BATCHES, 1e39)


@pytest.mark.parametrize("both", [False, True])
def test_an_average_that_overflows_is_infinite(both):
    found = average_sharpness(Steep(1e38, both).eval(), BATCHES, 50.0, n_draws=6)
    assert found["loss"] == INF
    assert math.isnan(found["loss_standard_error"])
    assert average_sharpness(Steep(1.0).eval(), BATCHES, 50.0, n_draws=6)["loss"] < 200


@pytest.mark.parametrize("measure", [worst_case_sharpness, average_sharpness])
def test_a_loss_that_is_infinite_at_the_weights(measure):
    model = Steep(1e38, both=True).eval()
    with torch.no_grad():
        model.w.fill_(9.0)
    with pytest.raises(ValueError, match="its loss is not finite at the weights themselves"):
        measure(model, BATCHES, 0.5)


def test_a_hessian_that_overflows():
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 2, bias=False)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1e19)
    batches = [(torch.full((2, 2), 1e19), torch.zeros(2, dtype=torch.int64))]
    assert math.isnan(hessian_trace(model, batches, 4)["trace"])
    values, vectors, residuals = top_eigenpairs(model, batches, 2)
    assert values.isnan().all()
    assert (values.shape, vectors.shape, residuals.shape) == ((2,), (16, 2), (2,))


def scaled(factor):
    def change(network):
        for weight in network.parameters():
            weight.mul_(factor)

    return change


def test_the_script_goes_on(tmp_path, capsys):
    """All modes, in a ball that is far too large: a table, a file that is JSON, and the same table again from parts."""
    paths = [save_member(tmp_path / f"seed_{seed}" / "model_best.pth.tar", seed) for seed in (3, 5)]
    common = ["--resume", *paths, "--save", tmp_path / "m", "--data_path", tmp_path, *SMALL, "--mode", ",".join(MODES)]
    call("sharpness", *common, "--rho0", 1e10)
    out = capsys.readouterr().out
    assert out.count("not finite: within the radius --rho0 1e+10 the loss leaves the range of float32") == 4
    (line,) = (line for line in out.splitlines() if line.startswith("APGD_worst-l2"))
    assert line.split() == ["APGD_worst-l2", "inf", "inf", "mean", "inf", "(n", "=", "2)"]
    content = strict((tmp_path / "m/sharpness.json").read_text())
    assert content["result"]["APGD_worst-l2"]["mean"] is None
    assert content["result"]["APGD_worst-l2"]["std"] is None
    assert content["not_finite"]["/result/APGD_worst-l2/mean"] == "inf"
    assert "--rho0 1e+10" in content["result"]["APGD_worst-l2"]["members"][0]["note"]
    assert load_json(tmp_path / "m/sharpness.json")["result"]["APGD_worst-l2"]["mean"] == INF
    for file in (tmp_path / "m").rglob("*.json"):
        strict(file.read_text())
    before = (tmp_path / "m/sharpness.json").read_bytes()
    call("sharpness", *common, "--rho0", 1e10)
    assert capsys.readouterr().out == out
    assert (tmp_path / "m/sharpness.json").read_bytes() == before
    # A smaller radius, and the larger one again, whose parts are still there.
    parts = sorted((tmp_path / "m").rglob("APGD*.json"))
    call("sharpness", *common, "--rho0", 0.01)
    assert "not finite" not in capsys.readouterr().out
    assert len(list((tmp_path / "m").rglob("APGD*.json"))) == 2 * len(parts)
    call("sharpness", *common, "--rho0", 1e10)
    assert capsys.readouterr().out == out


def test_weights_at_which_nothing_is_finite(tmp_path, capsys):
    path = save_member(tmp_path / "seed_3" / "model_best.pth.tar", 3, change=scaled(100))
    common = ["--resume", path, "--save", tmp_path / "m", "--data_path", tmp_path, *SMALL, "--mode"]
    line = refused(capsys, "sharpness", *common, "APGD_worst")
    assert f"APGD_worst-l2 of {path}: model: its loss is not finite at the weights themselves" in line
    call("sharpness", *common, "hessian_t,hessian_e,fisher,NTK")
    out = capsys.readouterr().out
    assert out.count("not finite: the loss or its derivatives leave the range of float32 at these weights") == 4
    strict((tmp_path / "m/sharpness.json").read_text())


def test_what_a_mode_cannot_do_is_one_line(tmp_path, capsys):
    path = save_member(tmp_path / "seed_3" / "model_best.pth.tar", 3)
    words = ["--resume", path, "--save", tmp_path, "--data_path", tmp_path, *SMALL, "--mode", "hessian_e"]
    line = refused(capsys, "sharpness", *words, "--params", r"^bn1\.bias$", "--top_k", 5)
    assert f"hessian_e of {path}: k: expected 1 to 1, got 5" in line


def test_means_and_intervals():
    assert standard_deviation([1.0, INF]) is None
    assert standard_deviation([1.0]) is None
    assert standard_deviation([1.0, 3.0]) == pytest.approx(2**0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert estimate([1.0, INF, 2.0]) == (INF, None)
        assert interval_of([1.0, -INF])[:2] == (-INF, None)
        assert math.isnan(interval_of([INF, -INF])[0])


@pytest.fixture
def pairs(tmp_path):
    """Two pairs of ensembles, of which one of SAM is infinitely sharp."""
    sharpness = {"sam0": INF, "sam1": 2.0, "new0": 1.0, "new1": 1.5}
    folders = []
    for name, value in sharpness.items():
        seeds = (int(name[3]), int(name[3]) + 10)
        settings = SAM if name[:3] == "sam" else SHARPBALANCE
        folders.append(write(tmp_path / name, settings, seeds, 0.8, value))
    return folders


def test_tables(pairs, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        test_summarize.call(*pairs)
    out = capsys.readouterr().out
    (row, difference) = (line for line in out.splitlines() if line.startswith("sharpness (worst, l2)"))
    assert row.split()[3:5] == ["inf", "1.2500"]
    assert difference.split()[3:] == ["-inf"]
    assert "inf, nan: the loss leaves the range of float32 (sharpness (worst, l2))." in " ".join(out.split())
    test_summarize.call(*pairs[2:])
    assert "inf" not in capsys.readouterr().out
    both = [[read_ensemble(folder) for folder in pairs[i : i + 2]] for i in (0, 2)]
    assert difference_of(list(zip(*both, strict=True)), "sharpness")[:2] == (INF, None)


def test_tradeoff_says_what_it_leaves_out(tmp_path, capsys):
    sharpness = {1: INF, 2: 3.0, 3: 4.0}
    folders = [
        test_plots.measure(tmp_path / str(i), test_plots.SAM, (i, i + 5), sharpness=value)
        for i, value in sharpness.items()
    ]
    figure = test_plots.figure("tradeoff", folders)
    points = [line for line in figure.axes[0].get_lines() if line.get_zorder() == 3]
    assert sorted(float(point.get_xdata()[0]) for point in points) == [3.0, 4.0]
    assert "Not drawn: 1 of SAM, of sharpness inf." in " ".join(figure._supxlabel.get_text().split())
    plots.save(figure, tmp_path / "a")
    line = test_plots.refused(capsys, "tradeoff", folders[:1], tmp_path / "b")
    assert f"{folders[0] / 'sharpness.json'}: its APGD_worst-l2 is not finite" in line


@pytest.mark.parametrize("value", [INF, NAN, 1e30])
@pytest.mark.parametrize("whole", [False, True])
def test_a_landscape_with_gaps(value, whole, tmp_path):
    content = load_json(test_plots.ROOT / "results/digits/landscape.json")
    for run in content["runs"] if whole else content["runs"][:1]:
        for curves in run["along"].values():
            for curve in curves:
                curve[: None if whole else 3] = [value] * (len(curve) if whole else 3)
        for key in run["between"]:
            run["between"][key][3:] = [value] * len(run["between"][key][3:])
        for top in run["top"].values():
            top["losses"] = [value] * len(top["losses"])
    write_json(tmp_path / "a.json", content)
    strict((tmp_path / "a.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = run_plots.landscape(landscape.read_landscape(tmp_path / "a.json"))
        plots.save(figure, tmp_path / "a")
    note = " ".join(figure._supxlabel.get_text().split())
    assert note.endswith("Where a curve is missing, the loss leaves the range of float32.") == (value != 1e30)


def test_report_decides_nothing_by_them(measured):
    for folder in measured.glob("noisy_labels/measurements/sam_0.2_*"):
        content = load_json(folder / "sharpness.json")
        content["result"]["APGD_worst-l2"]["mean"] = INF
        write_json(folder / "sharpness.json", content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        test_report.call(measured)
    text = test_report.squeezed((measured / "README.md").read_text())
    assert text.count("| none | - | 1.0000 | 1.000 |") == 2  # the slope, and the largest rho
    assert claims.verdict([NAN, 1.0], 0.01, 1) == "undecided"
