"""The notebook runs, what git holds of it is small, and its figures can be drawn without it."""

import contextlib
import copy
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from scipy.optimize import brentq

from scripts import plot
from tests.commands import call, refusal
from utils import plots, theory_plots, verification
from utils.plots import shades
from utils.results import METHODS
from utils.verification import (
    GRIDS,
    PUBLISHED_POINTS,
    TRAINED,
    at_sharpness,
    bounds,
    published,
    relative_to_sam,
    simulate_all,
    stable_limit,
    table,
)

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "theoretical_verifications.ipynb"


@pytest.fixture(scope="module")
def grids():
    """All settings at the smallest size."""
    return simulate_all(2)


@pytest.fixture(scope="module")
def figures(grids):
    return theory_plots.theory(grids, published(), 2)


def test_the_notebook_runs_from_an_empty_kernel(monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("THEORY_DATA_SETS", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}})
    client.execute()  # raises at the first error
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 7
    assert "DIVERGENT" in "".join(output.get("text", "") for output in outputs)


@pytest.mark.parametrize("start", ["here", "in tests", "above", "elsewhere, by Jupyter's name of it", "nowhere near"])
def test_the_notebook_finds_the_repository(start, monkeypatch, tmp_path):
    """Wherever its kernel was started."""
    cell = next(c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code")
    source = "".join(line for line in cell["source"] if not line.startswith("%"))
    places = {"here": ROOT, "in tests": ROOT / "tests", "above": tmp_path}
    (tmp_path / "clone").symlink_to(ROOT)
    (tmp_path / "else" / "where").mkdir(parents=True)
    monkeypatch.chdir(places.get(start, tmp_path / "else" / "where"))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path and Path(path).resolve() != ROOT])
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    if start.startswith("elsewhere"):
        monkeypatch.setenv("JPY_SESSION_NAME", str(NOTEBOOK))
    if start == "nowhere near":
        (tmp_path / "clone").unlink()
        with pytest.raises(FileNotFoundError, match="start Jupyter in the repository, or set PYTHONPATH"):
            exec(source, {})
        return
    exec(source, {})
    assert Path(sys.path[0]).resolve() == ROOT


def test_what_git_holds_of_the_notebook():
    assert NOTEBOOK.stat().st_size < 2**20
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert cells[0]["cell_type"] == "markdown"
    outputs = []
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["execution_count"] is None
            assert "def " not in "".join(cell["source"])  # functions live in utils/
            outputs += cell["outputs"]
    pictures = [output for output in outputs if output["output_type"] == "display_data"]
    assert len(pictures) == 7
    assert all(set(output["data"]) == {"image/png"} for output in pictures)


def test_tables_of_the_notebook_are_those_of_the_result_file(monkeypatch):
    """What its cells print of results/theory/theory.json is what git holds below them."""
    grids = json.loads((ROOT / "results/theory/theory.json").read_text())["grids"]
    monkeypatch.setattr(verification, "simulate_all", lambda *_: grids)
    monkeypatch.chdir(ROOT)
    names, tables = {}, 0
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        source = "".join(line for line in cell["source"] if not line.startswith("%"))
        if cell["cell_type"] != "code" or source.startswith("figures["):
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(source, names)
        kept = "".join(line for output in cell["outputs"] for line in output["text"])
        assert kept == printed.getvalue()
        tables += kept.count("variance") > 0
    assert tables >= 5


def test_the_result_file_is_what_the_code_gives(monkeypatch):
    """Not what it gave before a change: a row of each method as it is trained, and the first of the grids."""
    kept = json.loads((ROOT / "results/theory/theory.json").read_text())["grids"]
    name, (method, values, steps) = next(iter(verification.GRIDS.items()))
    monkeypatch.setattr(verification, "GRIDS", {name: (method, values[:1], steps[:1])})
    monkeypatch.setattr(verification, "TRAINED_RHO", verification.TRAINED_RHO[1:2])
    found = verification.simulate_all()
    assert len(found["trained"]) == 4
    for place in ("trained", name):
        for row in found[place]:
            (same,) = (one for one in kept[place] if all(one[key] == row[key] for key in ("method", "rho", "k")))
            numbers = [key for key in row if key not in ("method", "gap")]  # the gap is that of two roundings
            assert [row[key] for key in numbers] == pytest.approx([same[key] for key in numbers], rel=1e-6)


@pytest.mark.parametrize("method", ["random", "paper", "released"])
def test_sizes_of_sets_are_those_of_the_simulation(method):
    text = "".join(line for cell in json.loads(NOTEBOOK.read_text())["cells"] for line in cell["source"])
    grids = json.loads((ROOT / "results/theory/theory.json").read_text())["grids"]
    (share,) = {f"{row['sam_share']:.2f}" for row in grids["trained"] if row["method"] == method}
    assert share + (" of all" if method == "random" else f" ({method})") in text


def test_every_figure_has_names_and_units(figures):
    assert len(figures) == 7
    for name, figure in figures.items():
        for axis in figure.axes:
            if axis.get_subplotspec().is_last_row():
                assert "[" in axis.get_xlabel(), name
            if not (name == "tradeoff" and axis is figure.axes[1]):  # which shares the other's axis
                assert "[" in axis.get_ylabel(), name
            assert axis.get_legend() is None  # it would lie on the data
        assert figure.legends, name


def test_legends_and_labels_are_inside_the_picture_and_off_the_axes(figures):
    for name, figure in figures.items():
        for _ in range(2):  # as `save` does
            figure.draw_without_rendering()
        for axis in figure.axes:
            box = axis.get_tightbbox()  # with titles and labels
            assert min(box.x0, box.y0, figure.bbox.x1 - box.x1, figure.bbox.y1 - box.y1) >= -1, name
            label, panel = axis.yaxis.label.get_window_extent(), axis.get_window_extent()
            assert label.x0 >= 0, name
            assert label.height < 1.15 * panel.height, name  # matplotlib's versions differ by some pixels
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert box.x0 >= 0, name
            assert box.x1 <= figure.bbox.x1, name
            assert not any(box.overlaps(axis.get_window_extent()) for axis in figure.axes), name


def test_a_method_has_one_colour(figures):
    assert len({METHODS[name].colour for name in ("deep_ensemble", "sam", "sharpbalance")}) == 3
    (panel, *_) = figures["published"].axes
    lines = {line.get_label(): line.get_color() for line in panel.get_lines()}
    assert lines["SAM, published"] == lines["SAM (divergent)"] == METHODS["sam"].colour
    assert lines["SharpBalance, published"] == lines["SharpBalance, exact $S$"] == METHODS["sharpbalance"].colour


def test_files_are_pdf_and_png_and_do_not_change(grids, tmp_path):
    first = plots.save(theory_plots.trained(grids["trained"], 2), tmp_path / "a.png")
    second = plots.save(theory_plots.trained(copy.deepcopy(grids["trained"]), 2), tmp_path / "rho0.5")
    assert [path.name for path in first + second] == ["a.pdf", "a.png", "rho0.5.pdf", "rho0.5.png"]
    content = [path.read_bytes() for path in first]
    assert content == [path.read_bytes() for path in second]
    assert content[0].startswith(b"%PDF")
    assert b"CreationDate" not in content[0]
    assert content[1].startswith(b"\x89PNG")
    assert matplotlib.__version__.encode() not in content[1]
    assert len(list(tmp_path.iterdir())) == 4


def test_drawing_leaves_matplotlib_as_it_was(grids, tmp_path):
    before = dict(matplotlib.rcParams)
    plots.save(theory_plots.theorem(grids["theorem_2_k"], "k", 2), tmp_path / "a")
    assert dict(matplotlib.rcParams) == before


def test_all_settings_are_simulated_and_stable(grids):
    for name, (method, values, steps) in GRIDS.items():
        assert len(grids[name]) == len(values) * len(steps)
        assert all(row["stable"] and row["method"] == method for row in grids[name])
        assert max(values) < stable_limit(method)
    assert {row["method"] for row in grids["trained"]} == set(TRAINED)
    assert all(row["gap"] < 1e-10 for rows in grids.values() for row in rows)
    random = [row["sam_share"] for row in grids["trained"] if row["method"] == "random"]
    others = [row["sam_share"] for row in grids["trained"] if row["method"] in ("paper", "released")]
    assert sum(random) / len(random) == pytest.approx(sum(others) / len(others), abs=0.02)


def test_every_published_point_has_a_row():
    rows = published()
    for method, points in PUBLISHED_POINTS.items():
        assert [(row["published_sharpness"], row["published_variance"]) for row in rows[method]] == points
    assert not any(row["stable"] for row in rows["sam"])
    assert all(row["stable"] for row in rows["sharpbalance"])


def test_the_variance_at_equal_sharpness():
    """Interpolated on the grid, from the formulas: within 1 % of the root in rho, at the best k."""
    for name, value in (("tradeoff_sam", 0.5), ("tradeoff_sam", 0.2), ("tradeoff_sharpbalance", 0.4)):
        method, values, steps = GRIDS[name]
        rows, best = [], 0.0
        for k in steps:
            for rho in values:
                row = {"rho": rho, "k": k, "variance_se": 0.0} | bounds(method, rho, k)
                rows.append(row | {"sharpness": row["sharpness_upper"], "variance": row["variance_bound"]})

            def distance(rho, k=k, method=method, value=value):
                return bounds(method, rho, k)["sharpness_upper"] - value

            if distance(0.0) > 0 > distance(values[-1]):
                best = max(best, bounds(method, brentq(distance, 0, values[-1]), k)["variance_bound"])
        assert at_sharpness(rows, value)[0] == pytest.approx(best, rel=0.01)
    assert math.isnan(at_sharpness(rows, 5.0)[0])


def test_the_variance_relative_to_sam():
    sam = [
        {"method": "sam", "rho": rho, "k": 4, "member_sharpness": x, "variance": x**2, "variance_se": 0.03 * x**2}
        for rho, x in ((0.0, 0.4), (0.1, 0.2), (0.2, 0.1))
    ]
    other = {"method": "paper", "rho": 0.1, "k": 4, "member_sharpness": 0.3, "variance": 0.18, "variance_se": 0.0072}
    (row,) = relative_to_sam([*sam, other, other | {"rho": 0.0}, other | {"member_sharpness": 0.5}])
    assert row["ratio"] == pytest.approx(2)
    assert row["ratio_se"] == pytest.approx(2 * 0.05)


def test_a_table():
    assert table([{"k": 1, "V": 0.5}, {"k": 10, "V": 2}], {"k": "d", "V": ".2f"}) == " k     V\n 1  0.50\n10  2.00"


def test_the_script_draws_the_same_figures(grids, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot, "simulate_all", lambda data_sets, progress: grids if data_sets == 2 else None)
    call(plot, "theory", "--to", tmp_path / "new/figures", "--data-sets", "2")
    assert capsys.readouterr().out.count("wrote") == 8
    for path in plots.save(theory_plots.published(published()), tmp_path / "published"):
        assert (tmp_path / "new/figures" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "new/figures").iterdir())) == 15


def test_the_tradeoff_shows_the_numbers_of_its_methods(grids):
    """Each curve, its colour, and its entry in the legend, at the mean iterate and at the members."""
    figure = theory_plots.theory_tradeoff(grids, 2)
    for axis, key in zip(figure.axes, ("sharpness", "member_sharpness"), strict=True):
        handles, labels = axis.get_legend_handles_labels()
        lines = {label: handle.lines[0] for handle, label in zip(handles, labels, strict=True)}
        expected = {r"blocks, $\rho = 0$, over steps": grids["tradeoff_blocks"]}
        expected["deep ensemble, over steps"] = grids["tradeoff_deep_ensemble"]
        for method in ("sharpbalance", "sam"):
            for row in grids[f"tradeoff_{method}"]:
                steps = "1 step" if row["k"] == 1 else f"{row['k']} steps"
                expected.setdefault(f"{METHODS[method].name}, {steps}", []).append(row)
        assert lines.keys() == expected.keys()
        for label, rows in expected.items():
            assert lines[label].get_xydata().tolist() == [[row[key], row["variance"]] for row in rows]
        found = {label: lines[label].get_color() for label in list(expected)[:2]}
        assert list(found.values()) == [METHODS[name].colour for name in ("sharpbalance", "deep_ensemble")]
        for method in ("sharpbalance", "sam"):
            own = [line.get_color() for label, line in lines.items() if label.startswith(f"{METHODS[method].name}, ")]
            assert own == shades(method, len(own))


def test_the_caption_of_the_tradeoff_says_what_is_drawn(grids):
    """And names steps, since k is another number in figures of measurements."""
    figure = theory_plots.theory_tradeoff(grids, 2)
    text = " ".join(figure._supxlabel.get_text().split())
    assert "k =" not in text + "".join(entry.get_text() for entry in figure.legends[0].get_texts())
    for words in (r"Sharpness $\kappa$: the largest rise of the loss", "blocks: each member trains on one of 10 equal"):
        assert words in text


def colours_of(picture):
    """The share of the pixels of each strong colour, of 4 levels a channel."""
    pixels = picture[..., :3].reshape(-1, 3)
    strong = pixels[np.ptp(pixels, axis=1) > 0.25]
    return np.bincount(np.minimum(4 * strong, 3).astype(int) @ [16, 4, 1], minlength=64) / len(pixels)


def test_the_numbers_in_the_repository_draw_its_figure(tmp_path):
    path = ROOT / "results/theory/theory.json"
    plot.main(plot.parse_args(["theory", "--from", str(path), "--to", str(tmp_path)]))
    drawn, committed = (matplotlib.image.imread(place / "tradeoff.png") for place in (tmp_path, path.parent))
    assert drawn.shape == committed.shape
    if tuple(map(int, matplotlib.__version__.split(".")[:2])) >= (3, 11):  # which drew it
        assert abs(drawn - committed).mean() < 1e-3
    # An earlier one takes other room for text, and so moves the panels by some pixels.
    found, expected = map(colours_of, (drawn, committed))
    assert abs(found - expected).sum() < 0.05 * expected.sum()
    assert not (tmp_path / path.name).exists()


def test_the_file_holds_what_was_simulated(grids, tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "simulate_all", lambda data_sets, progress: grids)
    plot.main(plot.parse_args(["theory", "--to", str(tmp_path / "a"), "--data_sets", "2"]))
    assert json.loads((tmp_path / "a/theory.json").read_text()) == {"data_sets": 2, "grids": grids}
    monkeypatch.setattr(plot, "simulate_all", None)
    plot.main(plot.parse_args(["theory", "--from", str(tmp_path / "a/theory.json"), "--to", str(tmp_path / "b")]))
    drawn = sorted((tmp_path / "b").iterdir())
    assert len(drawn) == 14
    for path in drawn:
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()


@pytest.mark.parametrize(
    "text",
    [None, "", "[]", "{}", '{"grids": 3}', '{"grids": {"theorem_1_rho": [{"rho": 1}]}}', '{"grids": {"trained": []}}'],
)
def test_a_bad_file_of_numbers(text, tmp_path, capsys):
    path = tmp_path / "theory.json"
    if text is not None:
        path.write_text(text)
    error = refusal(capsys, call, plot, "theory", "--from", path, "--to", tmp_path / "x")
    assert str(path) in error
    assert "leave --from out" in error
    assert not list((tmp_path / "x").iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["theory"], "--to"),
        (["nothing", "--to", "x"], "kind: expected one of tradeoff, "),
        (["theory", "--to", __file__], "cannot be written (File exists)"),
        (["theory", "--to", "x", "--data_sets", "1"], "--data_sets: expected a whole number >= 2, got '1'"),
        (["theory", "--to", "x", "--data_sets", "5", "--from", "a.json"], "--data_sets: has no effect here"),
        (["tradeoff", "--to", "x", "--data_sets", "5", "--from", "a"], "--data_sets: has no effect here"),
    ],
)
def test_bad_input_to_the_script(words, message, capsys):
    assert message in refusal(capsys, call, plot, *words)


def test_the_script_as_a_process():
    command = [sys.executable, ROOT / "scripts/plot.py", "theory", "--too", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("plot.py: error: ")
    assert len(done.stderr.strip().splitlines()) == 1
