"""A result is of one ensemble, and says of which: what is mixed is refused, what is there is kept or replaced aloud."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests import test_summarize
from tests.test_measure import SMALL, call, refused, save_corrupted, save_member
from tests.test_plots import DEEP, PAPER, SAM, SHARPBALANCE, make_run
from tests.test_summarize import write
from utils.files import load_json, write_json
from utils.results import groups_of, read_ensemble


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Makes run folders of given names and settings, of members of seeds 1 and 2, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)  # which `measure` sets
    return lambda name, settings=SAM, **more: make_run(Path("runs") / name, settings, checkpoints=True, **more)


@pytest.mark.parametrize("script", ["diversity", "variance", "sharpness"])
@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        (DEEP, SAM, "sam True and False; rho 0.1 and 0.05"),
        (SAM, SAM | {"rho": 0.2}, "rho 0.2 and 0.1"),
        (SHARPBALANCE, PAPER, "partition paper and released; unselected normal and one"),
        (SAM, SAM | {"epochs": 9, "label_noise": 0.2}, "label_noise 0.2 and 0.0"),
    ],
)
def test_runs_that_were_not_trained_alike(script, one, other, differ, runs, capsys):
    """As the shell gives them for --resume runs/*; as members, and as files."""
    a, b = runs("a", one), runs("bb", other)
    for paths in ([a, b], [a / "seed_1", b / "seed_2"], [a, b / "seed_2/model_best.pth.tar"]):
        line = refused(capsys, script, "--resume", *paths)
        assert f"--resume: runs/bb and runs/a were not trained alike ({differ})" in line
        assert "measure each run by itself" in line
    assert not Path("measurements").exists()


def test_runs_of_other_images(runs, capsys):
    a, b = runs("a"), runs("bb")
    write_json(b / "environment.json", {"data": {"sha256_of_arrays_and_split": "other"}})
    assert "(digest of images and split other and " in refused(capsys, "diversity", "--resume", a, b)
    (b / "environment.json").unlink()  # what is not known is no difference
    call("diversity", "--resume", a, b, "--save", "m")


def test_runs_that_differ_in_the_seeds_are_one_ensemble(runs):
    content = call("diversity", "--resume", runs("a", seeds=(1, 2)), runs("bb", seeds=(3,)), "--save", "m")
    assert content["trained"]["seed"] == [1, 2, 3]
    assert len(content["members"]) == 3
    assert read_ensemble(Path("m")).method == "SAM, rho 0.1"
    # Part of a run: its settings are those of the run.
    content = call("diversity", "--resume", "runs/a/seed_2", "--save", "m2", "--mode", "predict")
    assert content["trained"]["seed"] == [1, 2]


def test_a_member_of_unknown_training_makes_the_method_unknown(runs):
    a, file = runs("a"), save_member(Path("theirs/x.pth.tar"), 8)
    content = call("diversity", "--resume", a, file, "--save", "m")
    assert content["trained"] is None
    assert read_ensemble(Path("m")).key == "unknown"


def test_checkpoints_of_several_kinds(runs, capsys):
    """Of one member, as runs/a/seed_1/*.tar gives them, and of two."""
    folder = runs("a")
    last = [save_member(folder / f"seed_{seed}/checkpoint.pth.tar", 30 + seed) for seed in (1, 2)]
    for paths in ([last[0], folder / "seed_1/model_best.pth.tar"], [last[0], folder / "seed_2"]):
        line = refused(capsys, "diversity", "--resume", *paths)
        assert f"--resume: {last[0]} and " in line
        assert "are not the same checkpoint of members" in line
    # What was measured is recorded, not the default of --checkpoint.
    assert call("diversity", "--resume", *last, "--save", "m")["protocol"]["checkpoint"] == "last"
    assert call("diversity", "--resume", folder, "--save", "m2")["protocol"]["checkpoint"] == "best"
    # Files of other names are of no kind: not the best ones, and equal to none.
    other = [save_member(Path(f"theirs/{seed}.pth.tar"), 40 + seed) for seed in (1, 2)]
    content = call("diversity", "--resume", *other, "--save", "m3")
    assert content["protocol"]["checkpoint"] == "named one by one"
    capsys.readouterr()
    test_summarize.call("m3", "m2")
    error = capsys.readouterr().err
    assert error == "note: not recorded, so that it may differ: how it was trained, --checkpoint (of m3)\n"


@pytest.mark.parametrize("script", ["diversity", "variance", "sharpness"])
def test_a_checkpoint_that_is_asked_for_is_the_one_that_is_measured(script, runs, capsys):
    """Where files are named, --checkpoint chooses none: it may say what they are, and nothing else."""
    folder, other = runs("a"), save_member(Path("theirs/x.pth.tar"), 8)
    best = [folder / f"seed_{seed}/model_best.pth.tar" for seed in (1, 2)]
    common = ["--save", "m", *(SMALL if script == "sharpness" else [])]
    way_out = "leave --checkpoint out, or give the folder that it is in"
    for paths in (best, [folder / "seed_1", best[1]]):
        save_member(folder / "seed_1/checkpoint.pth.tar", 31)
        line = refused(capsys, script, "--resume", *paths, "--checkpoint", "last", *common)
        assert "--checkpoint last: chooses in folders, and --resume " in line
        assert line.endswith(f"model_best.pth.tar is 'best'; {way_out}")
    line = refused(capsys, script, "--resume", best[0], other, "--checkpoint", "best", *common)
    problem = f"--resume {other} is named otherwise than model_best.pth.tar, and is taken as it is; {way_out}"
    assert line.endswith(problem)
    assert not list(Path("m").glob("*.json"))
    for words in ([], ["--checkpoint", "best"]):
        assert call(script, "--resume", *best, *words, *common)["protocol"]["checkpoint"] == "best"


@pytest.mark.parametrize("script", ["diversity", "sharpness"])
def test_two_runs_of_one_name(script, runs, capsys):
    a, b = runs("one/sam"), runs("other/sam", SAM | {"rho": 0.2})
    for seed in (1, 2):
        save_member(b / f"seed_{seed}/model_best.pth.tar", 70 + seed)
    more = [*SMALL, "--mode", "fisher"] if script == "sharpness" else ["--bootstrap", 0]
    call(script, "--resume", a, *more)
    file = Path(f"measurements/sam/{script}.json")
    before = file.read_bytes()
    line = refused(capsys, "variance", "--resume", b)
    assert f"--save: {file} is a measurement of {a}/seed_1/model_best.pth.tar, another run of that name" in line
    assert "another run of that name" in refused(capsys, script, "--resume", b, *more)
    assert file.read_bytes() == before
    call(script, "--resume", b, *more, "--save", "measurements/other/sam")
    # The same run from another place, and after more training.
    call(script, "--resume", a.resolve(), *more)
    assert "replaces" not in capsys.readouterr().err
    save_member(a / "seed_1/model_best.pth.tar", 99)
    call(script, "--resume", a, *more)
    assert f"note: {file}: replaces what was measured of other weights" in capsys.readouterr().err
    shutil.move("runs/one", "runs/moved")  # its weights are known again
    call(script, "--resume", "runs/moved/sam", *more)


def test_two_folders_of_checkpoints_of_one_name(runs, capsys):
    one, other = (save_member(Path(f"{name}/best/{name}.pth.tar"), seed) for name, seed in (("a", 1), ("b", 2)))
    call("diversity", "--resume", one, "--mode", "predict")
    assert "another run of that name" in refused(capsys, "diversity", "--resume", other, "--mode", "predict")


def measure(script, folder, *argv):
    sys.argv = [f"measure_{script}.py", *map(str, argv)]
    return call(script, "--resume", "runs/a", "--save", folder, *argv)


def rounded(result):
    """Products of other shapes differ in their last bits."""
    return json.loads(json.dumps(result), parse_float=lambda text: f"{float(text):.9g}")


def test_other_modes_and_splits_are_kept(runs, capsys):
    """In any order, the file is that of one call for all of them."""
    runs("a")
    common = ["--bootstrap", 20]
    whole = measure("diversity", "whole", "--mode", "predict,disagreement,KL", "--split", "test,val", *common)
    for i, (first, second) in enumerate(((("predict", "KL"), "disagreement"), (("disagreement",), "predict,KL"))):
        measure("diversity", f"m{i}", "--mode", ",".join(first), "--split", "val,test", *common)
        content = measure("diversity", f"m{i}", "--mode", second, "--split", "test,val", *common)
        assert rounded(content["result"]) == rounded(whole["result"])
        assert sorted(content["protocol"]["mode"]) == sorted(whole["protocol"]["mode"])
        assert [set(call) for call in content["earlier"]] == [{"command", "environment"}]
    assert "earlier" not in whole
    content = measure("diversity", "m0", "--mode", "KL", "--split", "train", *common)
    assert {"val", "test", "train"} <= content["result"].keys()
    assert rounded(content["result"]["test"]) == rounded(whole["result"]["test"])
    assert sorted(content["protocol"]["split"]) == ["test", "train", "val"]
    assert "replaces" not in capsys.readouterr().err
    # Bias and variance, likewise.
    one = measure("variance", "m0", "--mode", "variance")["result"]["test"]
    both = measure("variance", "m0", "--mode", "variance_mse")["result"]["test"]
    assert both["variance_of_logits"] == one["variance_of_logits"]
    assert "mse" in both
    # By other options it is another measurement.
    content = measure("diversity", "m0", "--mode", "KL", "--bins", 7, *common)
    assert "replaces what was measured by other options" in capsys.readouterr().err
    assert "disagreement" not in content["result"]["test"]
    assert "earlier" not in content
    (Path("m0") / "diversity.json").write_text('{"members": 3}')
    assert "kl" in measure("diversity", "m0", "--mode", "KL", *common)["result"]["test"]


def test_corrupted_images_are_kept_with_their_digest(runs):
    runs("a")
    save_corrupted(Path("data/digits-C"))
    part = ["--corruptions", "fog", "--severities", "1", "--bootstrap", 0]
    first = measure("diversity", "m", "--split", "corrupted", "--mode", "predict", *part, "--data_path", "data")
    content = measure("diversity", "m", "--split", "test", "--mode", "KL", *part)
    assert content["result"]["corrupted"] == first["result"]["corrupted"]
    assert content["data"]["sha256_of_corrupted"] == first["data"]["sha256_of_corrupted"]


def test_parts_of_the_sharpness_are_kept_with_their_protocol(runs, capsys):
    runs("a")
    runs("b", SAM | {"rho": 0.2})
    first = measure("sharpness", "m", *SMALL, "--mode", "APGD_worst", "--norms", "l2", "--rho0", 0.1)["result"]
    content = measure("sharpness", "m", *SMALL, "--mode", "fisher", "--batch_num", 1)
    assert content["result"]["APGD_worst-l2"] == first["APGD_worst-l2"]
    assert content["protocol"]["mode"] == ["APGD_worst", "fisher"]
    assert content["result"]["APGD_worst-l2"]["protocol"]["rho0"] == 0.1
    assert content["result"]["fisher"]["protocol"]["batch_num"] == 1
    assert [call["command"].split()[1] for call in content["earlier"]] == ["measure_sharpness.py"]
    measure("diversity", "m", "--bootstrap", 0)
    ensemble = read_ensemble(Path("m"))
    assert {"sharpness", "fisher"} <= {name for name, value in ensemble.values.items() if value is not None}
    # Part by part, what is compared was measured alike.
    for path in Path("runs/b").glob("seed_*/model_best.pth.tar"):
        save_member(path, 50 + int(path.parent.name[-1]))
    for rho0 in (0.1, 0.2):
        common = ["--resume", "runs/b", "--save", f"n{rho0}"]
        call("diversity", *common, "--bootstrap", 0)
        call("sharpness", *common, *SMALL, "--mode", "APGD_worst", "--norms", "l2", "--rho0", rho0)
    capsys.readouterr()
    test_summarize.call("m", "n0.1")
    output = capsys.readouterr()
    assert "Fisher trace" in output.out
    assert output.err == ""  # all that has to agree is recorded
    line = test_summarize.refused(capsys, "m", "n0.2")
    assert "APGD_worst-l2: --rho0 of the sharpness differs (0.2, 0.1)" in line
    # A file of an earlier version, which has one protocol for all: it goes with the parts that are kept.
    content = load_json("m/sharpness.json")
    for name in ("APGD_worst-l2", "fisher"):
        del content["result"][name]["protocol"]
    content["protocol"]["rho0"] = 0.3
    write_json("m/sharpness.json", content)
    content = measure("sharpness", "m", *SMALL, "--mode", "NTK")
    assert content["result"]["APGD_worst-l2"]["protocol"]["rho0"] == 0.3


def test_what_is_missing_of_kept_parts_stays_missing(runs):
    runs("a")
    measure("sharpness", "m", *SMALL, "--mode", "fisher")
    content = load_json("m/sharpness.json")
    content["result"]["missing"] = ["fisher of runs/a/seed_2/model_best.pth.tar"]
    write_json("m/sharpness.json", content)
    assert measure("sharpness", "m", *SMALL, "--mode", "NTK")["result"]["missing"] == content["result"]["missing"]
    assert measure("sharpness", "m", *SMALL, "--mode", "fisher")["result"]["missing"] == []


def test_results_of_another_machine_are_no_results_of_this_run(runs, capsys):
    """A file of the same path and settings but other weights, as git brings it: nothing of it remains."""
    runs("a")
    for script, more in (("diversity", ["--mode", "KL"]), ("sharpness", [*SMALL, "--mode", "fisher"])):
        measure(script, "m", *more)
        content = load_json(f"m/{script}.json")
        for member in content["members"]:
            member["sha256_of_weights"] = "f" * 64
        content["result"]["mine"] = content["result"]["test"] = {"kl": 7.0, "theirs": 1}
        write_json(f"m/{script}.json", content)
        capsys.readouterr()
        result = measure(script, "m", *more)["result"]
        assert "replaces what was measured of other weights" in capsys.readouterr().err
        assert "mine" not in result
        assert "theirs" not in json.dumps(result)


def test_unknown_methods_are_not_one_method(tmp_path, capsys):
    """Folders of one name are no ensembles of one method; the same folder twice is refused."""
    folders = [write(tmp_path / str(i) / "x", SAM, (i, i + 5), 0.8, trained=None) for i in range(3)]
    names = list(groups_of([read_ensemble(folder) for folder in folders]))
    assert len(names) == 3
    assert names[0] == "x"
    line = test_summarize.refused(capsys, folders[0], tmp_path / "1/../0/x")
    assert "are the same method and seeds; give each once" in line


def test_three_groups_of_one_method_and_folder_name(tmp_path):
    folders = [write(tmp_path / str(i) / "x", SAM | {"lr": 0.1 * i}, (1, 2), 0.8) for i in range(3)]
    names = list(groups_of([read_ensemble(folder) for folder in folders]))
    assert names == ["SAM, rho 0.1", "SAM, rho 0.1 (x)", f"SAM, rho 0.1 ({folders[2]})"]
