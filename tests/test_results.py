"""How results are read: by the settings of any version, under one name for each method, without the trainer."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import summarize
from tests.test_ensemble import ROOT
from tests.test_summarize import SAM, SHARPBALANCE, write
from utils import InputError
from utils.files import load_json, write_json
from utils.landscape import read_landscape
from utils.results import (
    METHODS,
    SAME_SHARPNESS,
    Ensemble,
    check_alike,
    estimate_of,
    groups_of,
    key_of,
    method_of,
    read_ensemble,
    read_run,
)

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
    assert method_of(settings | {"bn_perturbed": "update"}) == method_of(settings) == name
    late = method_of(settings | {"initial_method": "sgd", "initial_epochs": 15})
    assert (late == name) == (key == "deep_ensemble")
    assert late == name or (", SGD first, " in late and late.endswith(", T_d 15"))
    frozen = method_of(settings | {"bn_perturbed": "freeze"})
    assert frozen == name.replace(f"{METHODS[key].name}, ", f"{METHODS[key].name}, bn_perturbed freeze, ")
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
        "late_sharpbalance": "SharpBalance (released)",
        "plain_start": "SharpBalance (released)",
        "random": "SAM on random samples",
        "random_paper": "SAM on random samples",
        "eoa": "ensemble of averages (EoA)",
    }
    folders = [path.parent for path in ROOT.glob("results/**/diversity.json")]
    assert len(folders) > 100
    for folder in folders:
        method = folder.name.rpartition("_")[0]
        method = "sam" if method.startswith(("sam_", "late_sam")) else method.removesuffix("_next")
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
def test_names_of_folders_in_tables(name, shown, tmp_path):
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


RECIPE = {"epochs": 8, "lr": 0.1, "batch_size": 128, "augmentation": "standard", "label_noise": 0.0, "schedule": "step"}
RECIPE |= {"momentum": 0.9, "weight_decay": 5e-4, "amp": "none"}
OTHER = {"epochs": 2, "lr": 0.2, "batch_size": 64, "augmentation": "flip", "label_noise": 0.2, "schedule": "cosine"}
OTHER |= {"momentum": 0.0, "weight_decay": 0.0, "amp": "bf16"}


def three_alike(folder):
    """Of three methods, which is what is compared."""
    methods = [SAM, SHARPBALANCE | {"partition": "paper"}, SAM | {"sam": False, "bn_perturbed": "freeze"}]
    return [write(folder / str(i), RECIPE | one, (1, 2), 0.8, 2.0) for i, one in enumerate(methods)]


def change(folder, name, *path_and_value):
    """Set an entry of a result file, or delete it where the value is ...."""
    content = load_json(folder / name)
    *path, last, value = path_and_value
    place = content
    for key in path:
        place = place.setdefault(key, {})
    if value is ...:
        place.pop(last, None)
    else:
        place[last] = value
    write_json(folder / name, content)


def checked(folders, capsys):
    """What `check_alike` says of them: a note, or what it refuses."""
    capsys.readouterr()
    try:
        check_alike([read_ensemble(folder) for folder in folders])
    except InputError as error:
        return str(error)
    return capsys.readouterr().err


def test_splits_may_be_measured_in_any_order(tmp_path, capsys):
    folders = three_alike(tmp_path)
    for folder, splits in zip(folders, (["test", "corrupted"], ["corrupted", "test"], ["test"]), strict=True):
        change(folder, "diversity.json", "protocol", "split", splits)
    assert checked(folders[:2], capsys) == ""
    assert "--split differs" in checked(folders, capsys)


@pytest.mark.parametrize("name", [*RECIPE, "a_setting_of_tomorrow"])
def test_what_is_compared_was_trained_alike(name, tmp_path, capsys):
    folders = three_alike(tmp_path)
    change(folders[2], "diversity.json", "trained", "seed", [3, 4])
    assert checked(folders, capsys) == ""
    for folder in folders:
        change(folder, "diversity.json", "trained", name, RECIPE.get(name, 1))
    change(folders[1], "diversity.json", "trained", name, OTHER.get(name, 2))
    line = checked(folders, capsys)
    assert f"{folders[1]} and {folders[0]} cannot be compared: --{name} of the training differs" in line
    assert f"({OTHER.get(name, 2)}, {RECIPE.get(name, 1)}); compare what was trained alike" in line
    change(folders[1], "diversity.json", "trained", name, ...)
    if name in ("augmentation", "label_noise"):  # which an earlier version did not have: what it did is known
        assert checked(folders, capsys) == ""
    else:
        note = f"note: not recorded, so that it may differ: --{name} of the training (of {folders[1]})\n"
        assert checked(folders, capsys) == note


def test_runs_that_are_compared_were_trained_alike(tmp_path, capsys):
    """Also before they are measured."""
    for i, epochs in enumerate((8, 2)):
        run = RECIPE | SAM | {"seed": [i, 5], "model": "resnet18", "width": 2, "epochs": epochs}
        (tmp_path / str(i)).mkdir()
        write_json(tmp_path / f"{i}/args.json", run)
        write_json(tmp_path / f"{i}/environment.json", {"data": {"sha256_of_arrays_and_split": "d"}})
    with pytest.raises(InputError, match=r"--epochs of the training differs \(2, 8\)"):
        check_alike([read_run(tmp_path / str(i)) for i in range(2)])
    change(tmp_path / "1", "args.json", "epochs", 8)
    check_alike([read_run(tmp_path / str(i)) for i in range(2)])
    assert capsys.readouterr().err == ""


CORRUPTED = {"mean": {"rates": {"member_accuracy": 0.5, "ensemble_accuracy": 0.6}, "right_of_samples": {}, "parts": 75}}
CORRUPTED["mean"] |= {"intervals_95": {}, "samples": 200.0}
UNRECORDED = {
    "all weights and a part": ("sharpness.json", ("protocol", "params"), None, "conv", "--params of the sharpness"),
    "two parts": ("sharpness.json", ("protocol", "params"), "linear", "conv", "--params of the sharpness"),
    "corrupted sets": ("diversity.json", ("data", "sha256_of_corrupted"), "c", "e", "the corrupted set"),
    "average": ("diversity.json", ("protocol", "average"), "probs", "logits", "--average"),
    "version": (
        *("diversity.json", ("made_by", "test", "predict", "versions")),
        *({"logits": 1, "predict": 1}, {"logits": 1, "predict": 2}, "the version of predict"),
    ),
    "version of sharpness": (
        *("sharpness.json", ("result", "APGD_worst-l2", "members"), [{"versions": {"APGD_worst": 1}}] * 2),
        *([{"versions": {"APGD_worst": 2}}] * 2, "APGD_worst-l2: the version of the sharpness"),
    ),
}


@pytest.mark.parametrize("name", UNRECORDED)
def test_unknown_is_not_equal(name, tmp_path, capsys):
    """Known and different is refused; known for some only is said in one line; known and equal passes."""
    file, path, value, other, fact = UNRECORDED[name]
    folders = three_alike(tmp_path)
    for folder in folders:
        change(folder, "diversity.json", "result", "corrupted", CORRUPTED)
        change(folder, "diversity.json", "data", "sha256_of_corrupted", "c")
        change(folder, "diversity.json", "protocol", "mode", ["predict", "KL"])
        made = {"test": {"predict": {"versions": 1}}, "train": {"KL": {"versions": 1}}}  # KL not on the test set
        change(folder, "diversity.json", "made_by", made)
        change(folder, file, *path, value)
    assert checked(folders, capsys) == ""
    change(folders[1], file, *path, other)
    assert f"{fact} differs (" in checked(folders, capsys)
    change(folders[1], file, *path, ...)
    note = "note: not recorded, so that it may differ: "
    assert re.fullmatch(rf"{note}.*{re.escape(fact)} \(of {folders[1]}\)\n", checked(folders, capsys))
    change(folders[2], file, *path, ...)
    assert f"{fact} (of {folders[1]} and 1 more)" in checked(folders, capsys)
    change(folders[0], file, *path, ...)
    # What no file records says nothing of a difference; but that images are the same is never taken on trust.
    expected = f"{note}the corrupted set (of {folders[0]} and 2 more)\n" if fact == "the corrupted set" else ""
    assert checked(folders, capsys) == expected
    assert checked(folders[:1], capsys) == ""


PROTOCOL = {"diversity.json": "average bins split corruptions severities"}
PROTOCOL["sharpness.json"] = "rho0 adaptive n_iters maximiser eval_batch_size batch_num subset_seed split params"


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in PROTOCOL.items() for name in names.split()])
def test_what_is_compared_was_measured_alike(file, name, tmp_path, capsys):
    folders = three_alike(tmp_path)
    for folder in folders:
        change(folder, file, "protocol", name, "one")
    assert checked(folders, capsys) == ""
    change(folders[1], file, "protocol", name, "another")
    assert re.search(rf"--{name}( of the sharpness)? differs \(another, one\); measure both", checked(folders, capsys))


OF_A_PART = [("APGD_average-l2", "n_draws"), ("hessian_t", "trace_method"), ("hessian_t", "probes")]
OF_A_PART += [("hessian_e", "top_k"), ("NTK", "ntk_samples"), ("fisher", "an_option_of_tomorrow")]


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(("part", "name"), OF_A_PART)
def test_options_of_one_part_of_the_sharpness(part, name, recorded, tmp_path, capsys):
    """By the protocol of the part, or in older files by that of the call; other parts do not have the option."""
    if not recorded and name not in SAME_SHARPNESS:
        return  # such files have no option of tomorrow
    folders = three_alike(tmp_path)
    place = ("result", part, "protocol") if recorded else ("protocol",)
    for folder in folders:
        change(folder, "sharpness.json", "result", part, {"mean": 1.0, "std": 0.1, "members": []})
    assert checked(folders, capsys) == ""  # none of them has it
    for folder in folders:
        change(folder, "sharpness.json", *place, name, 30)
    assert checked(folders, capsys) == ""
    change(folders[1], "sharpness.json", *place, name, 5)
    assert f"{part}: --{name} of the sharpness differs (5, 30); measure both alike" in checked(folders, capsys)
    for folder in folders:
        change(folder, "sharpness.json", "result", part, ...)
    assert checked(folders, capsys) == ""


def test_files_of_other_names_may_be_of_any_epoch(tmp_path, capsys):
    folders = three_alike(tmp_path)
    for folder in folders[1:]:
        change(folder, "diversity.json", "protocol", "checkpoint", "named one by one")
    note = f"note: not recorded, so that it may differ: --checkpoint (of {folders[1]} and 1 more)\n"
    assert checked(folders, capsys) == note


def test_corrupted_sets_of_other_sizes(tmp_path, capsys):
    """Their digests are not known, their sizes are."""
    folders = three_alike(tmp_path)
    for folder in folders[:2]:
        change(folder, "diversity.json", "result", "corrupted", CORRUPTED)
    assert "the corrupted set (of" in checked(folders, capsys)
    change(folders[1], "diversity.json", "result", "corrupted", "mean", "samples", 500.0)
    assert "the number of corrupted images differs (500.0, 200.0)" in checked(folders, capsys)


@pytest.mark.parametrize("damage", [{"test": 3}, {"test": {"predict": 3}}, 3])
def test_damaged_records_of_versions(damage, tmp_path, capsys):
    folders = three_alike(tmp_path)
    change(folders[1], "diversity.json", "made_by", damage)
    assert f"{folders[1]}: a result file is damaged (" in checked(folders, capsys)


def test_of_unknown_training(tmp_path, capsys):
    """As checkpoints of others are."""
    folders = three_alike(tmp_path)
    change(folders[0], "diversity.json", "trained", None)
    assert checked(folders, capsys).endswith(f": how it was trained (of {folders[0]})\n")
    for folder in folders[1:]:
        change(folder, "diversity.json", "trained", None)
    assert checked(folders, capsys).endswith(f": how it was trained (of {folders[0]} and 2 more)\n")


@pytest.mark.parametrize("place", sorted({file.parents[2] for file in ROOT.glob("results/**/diversity.json")}), ids=str)
def test_committed_results_can_be_compared(place, capsys):
    """Nothing that they were measured by is unknown, and no file was made by code that no commit has."""
    folders = sorted(file.parent for file in place.glob("measurements/*/diversity.json"))
    assert checked(folders, capsys) == ""
    contents = [load_json(folder / f"{name}.json") for folder in folders for name in ("diversity", "sharpness")]
    assert not any((content["environment"]["commit"] or "-dirty").endswith("-dirty") for content in contents)


def test_the_interval_of_a_share_ends_at_its_ends():
    group = [
        Ensemble(Path(), "SAM", (seed,), {"ensemble": rate, "eir": rate}, by_sample={})
        for seed, rate in ((1, 0.999), (2, 0.97))
    ]
    mean, (low, high) = estimate_of(group, "ensemble")
    assert (mean, high) == (pytest.approx(0.9845), 1.0)
    assert 0 < low < 0.9
    assert estimate_of(group, "eir")[1][1] > 1
    for ensemble, rate in zip(group, (0.999, 0.97), strict=True):
        column = torch.full((4,), rate, dtype=torch.float64)
        ensemble.values["auroc entropy digits"] = rate
        ensemble.by_sample["auroc entropy digits"] = column
    assert estimate_of(group, "auroc entropy digits")[1][1] == 1.0
