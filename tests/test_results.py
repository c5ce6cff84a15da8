"""How results are read: by the settings of any version, under one name for each method, without the trainer."""

import json
import re
import subprocess
import sys

import pytest

from scripts import summarize
from tests.test_ensemble import ROOT
from tests.test_summarize import SAM, SHARPBALANCE, write
from utils import InputError
from utils.files import write_json
from utils.landscape import read_landscape
from utils.results import METHODS, groups_of, key_of, method_of, read_ensemble, read_run

PAPER = SHARPBALANCE | {"partition": "paper", "unselected": "normal"}
RANDOM = SHARPBALANCE | {"partition": "random", "unselected": None, "match_size": None}
RHO, ALL = "rho 0.1", "rho 0.1, k 0.5, T_d 15"


@pytest.mark.parametrize(
    ("settings", "key", "name"),
    [
        (SAM | {"sam": False}, "deep_ensemble", "deep ensemble"),
        (SAM | {"rho": 0.0}, "deep_ensemble", "deep ensemble"),
        (SHARPBALANCE | {"rho": 0.0}, "deep_ensemble", "deep ensemble"),
        (SAM, "sam", f"SAM, {RHO}"),
        (SAM | {"sam_adaptive": True}, "asam", f"ASAM, {RHO}"),
        (SHARPBALANCE, "released", f"SharpBalance (released), {ALL}"),
        (SHARPBALANCE | {"data": "cifar10", "unselected": "others"}, "released", f"SharpBalance (released), {ALL}"),
        (
            SHARPBALANCE | {"data": "cifar10"},
            "released",
            f"SharpBalance (released), unselected one, {ALL}",
        ),
        (SHARPBALANCE | {"unselected": "normal"}, "released", f"SharpBalance (released), unselected normal, {ALL}"),
        (SHARPBALANCE | {"sam_adaptive": True}, "released", f"SharpBalance (released), adaptive, {ALL}"),
        (PAPER, "paper", f"SharpBalance (paper), {ALL}"),
        (PAPER | {"unselected": "one"}, "paper", f"SharpBalance (paper), unselected one, {ALL}"),
        (RANDOM, "random", f"SAM on random samples, {ALL}"),
        (RANDOM | {"partition": "same"}, "same", f"SAM on the same random samples, {ALL}"),
        (
            RANDOM | {"match_size": "released", "unselected": "one"},
            "random",
            f"SAM on random samples, sized as SharpBalance (released), {ALL}",
        ),
        (
            RANDOM | {"match_size": "paper", "unselected": "one"},
            "random",
            f"SAM on random samples, sized as SharpBalance (paper), unselected one, {ALL}",
        ),
    ],
)
def test_names_of_methods(settings, key, name):
    settings = {"match_size": None, "data": "digits", "initial_epochs": 15} | settings
    assert key_of(settings) == key
    assert method_of(settings) == name
    averaged = "ensemble of averages (EoA)"
    assert method_of(settings, averaged=True) == (averaged if key == "deep_ensemble" else f"{averaged}, {name}")


def test_names_and_colours_differ():
    shown = {key: method for key, method in METHODS.items() if key != "sharpbalance"}  # which is of the theorems only
    assert len({method.name for method in METHODS.values()}) == len(METHODS)
    assert len({method.colour for method in shown.values()}) == len(shown)


OLD = {
    "released": ({"select": "flattest", "unselected": "one"}, SHARPBALANCE),
    "paper": ({"partition": "paper", "select": "sharpest", "unselected": "normal"}, PAPER),
    "random": ({"select": "random", "unselected": "one"}, RANDOM),
    "sized": (
        {"partition": "paper", "select": "same", "unselected": "normal", "match_size": True},
        RANDOM | {"partition": "same", "match_size": "paper", "unselected": "normal"},
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_settings_of_earlier_versions(name, tmp_path):
    """They were --partition beside --select, and --match_size true or false: the same method as with those of today."""
    old, new = OLD[name]
    old = {"partition": "released", "match_size": False} | SHARPBALANCE | old
    new = {"match_size": None, "augmentation": "standard", "label_noise": 0.0, "average_from": None} | new
    one, other = (read_ensemble(write(tmp_path / str(i), s, (i, i + 5), 0.8)) for i, s in enumerate((old, new)))
    assert one.method == other.method
    assert one.key == other.key == new["partition"]
    assert list(groups_of([one, other]).values()) == [[one, other]]
    # Of run folders and of the numbers of a landscape, too.
    run = {"seed": [0, 5], "model": "resnet18", "width": 2}
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run/args.json", old | run)
    write_json(tmp_path / "run/environment.json", {"data": {"sha256_of_arrays_and_split": "d"}})
    assert read_run(tmp_path / "run").method == other.method
    row = {"folder": "run", "trained": old | run, "along": {}, "between": {}}
    write_json(tmp_path / "landscape.json", {"about": {}, "runs": [row]})
    (found,) = read_landscape(tmp_path / "landscape.json")
    assert (found.method, found.key) == (other.method, other.key)


def test_committed_results_have_the_names_of_today():
    names = {
        "deep_ensemble": "deep ensemble",
        "sam": "SAM",
        "sharpbalance": "SharpBalance (released)",
        "sharpbalance_paper": "SharpBalance (paper)",
        "random": "SAM on random samples",
        "eoa": "ensemble of averages (EoA)",
    }
    folders = [path.parent for path in ROOT.glob("results/**/diversity.json")]
    assert len(folders) > 100
    for folder in folders:
        method = folder.name.rpartition("_")[0]
        method = "sam" if method.startswith("sam_") else method
        assert read_ensemble(folder).method.partition(",")[0] == names[method], folder
    content = json.loads((ROOT / "results/digits/landscape.json").read_text())
    assert [run.key for run in read_landscape(ROOT / "results/digits/landscape.json")] == [
        "deep_ensemble",
        "sam",
        "released",
    ]
    assert "select" in content["runs"][0]["trained"]  # of an earlier version


@pytest.mark.parametrize("change", ["partition", "sam"])
def test_settings_that_lack_one(change, tmp_path):
    """One line that names the file, of a result file, of a run folder, and of the numbers of a landscape."""
    settings = OLD["released"][0] | SHARPBALANCE | {"seed": [0, 5], "model": "resnet18", "width": 2}
    del settings[change]
    write(tmp_path / "a", settings, (0, 5), 0.8)
    with pytest.raises(
        InputError, match=rf"diversity\.json: not a result of the test set \('{change}'\); measure again"
    ):
        read_ensemble(tmp_path / "a")
    write_json(tmp_path / "a/args.json", settings)
    write_json(tmp_path / "a/environment.json", {"data": {"sha256_of_arrays_and_split": "d"}})
    with pytest.raises(InputError, match=f"^{tmp_path / 'a'}.*{change}"):
        read_run(tmp_path / "a")
    row = {"folder": "run", "trained": settings, "along": {}, "between": {}}
    write_json(tmp_path / "landscape.json", {"about": {}, "runs": [row]})
    with pytest.raises(InputError, match=r"landscape\.json: not the numbers of a landscape"):
        read_landscape(tmp_path / "landscape.json")


READERS = ("utils.results", "utils.plots", "utils.theory_plots", "utils.landscape", "utils.verification")


@pytest.mark.parametrize("module", [*READERS, "scripts.summarize", "scripts.report", "scripts.plot"])
def test_readers_of_results_do_not_import_the_trainer(module):
    code = f"import sys, {module}; assert not {{'utils.ensemble', 'utils.member', 'main'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a|b", r"a\|b"),
        ("a\nb", r"a\\nb"),
        ("\x1b[31m", r"\\x1b[31m"),
        ("<b>`x`", r"\<b>\`x\`"),
        ("caf\udce9", r"caf\\udce9"),
    ],
)
def test_names_of_folders_in_tables(name, shown, tmp_path, capsys):
    """A name ends no cell and no line, and cannot control a terminal."""
    folder = tmp_path / name
    try:
        write(folder, SAM, (1, 2), 0.8, trained=None)
    except OSError:
        pytest.skip("a file system without such names")
    for form in ("markdown", "latex", "text", "csv"):
        arguments = summarize.parse_args([str(tmp_path / "a"), "--format", form, "--to", str(tmp_path / f"t.{form}")])
        arguments.folders = [folder]  # the command line may refuse such a path
        summarize.main(arguments)
        text = (tmp_path / f"t.{form}").read_text()
        assert all(character.isprintable() for line in text.split("\n") for character in line)
    lines = (tmp_path / "t.markdown").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 3
    assert table[2].startswith(f"| {shown} ")
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert f"/{shown}: measured by" in lines[-1]
