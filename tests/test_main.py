"""The command line of main.py: what it accepts, what it fills in, and what it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import main
import measure_diversity
from main import parse_args
from tests import commands, files
from utils.datasets import DATASETS
from utils.run import current_settings

ROOT = Path(__file__).resolve().parent.parent


def call(argv):
    commands.call(main, *argv)


def refused(argv, capsys):
    return commands.refusal(capsys, call, argv)


def test_no_flags():
    args = parse_args([])
    assert (args.data, args.model, args.width, args.epochs, args.seed) == ("digits", "resnet18", 8, 30, [13, 17, 27])
    assert (args.sam, args.rho, args.flat_ratio) == (False, 0.0, 0.0)
    assert args.save_path == Path("runs/digits_deep_ensemble")


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "tiny_imgnet"])
def test_the_papers_recipe(data):
    args = parse_args(["--data", data])
    found = (args.width, args.epochs, args.batch_size, args.lr, args.momentum, args.weight_decay, args.schedule)
    assert found == (64, 200, 128, 0.1, 0.9, 5e-4, "step")


@pytest.mark.parametrize(
    ("argv", "seeds"),
    [
        (["--seed", "13 17 27"], [13, 17, 27]),
        (["--seed", "13", "17", "27"], [13, 17, 27]),
        (["--seed", "13,17", "27"], [13, 17, 27]),
        (["--seed=5"], [5]),
        (["--seed", "0"], [0]),
    ],
)
def test_seeds(argv, seeds):
    assert parse_args(argv).seed == seeds


@pytest.mark.parametrize(
    ("argv", "sam"),
    [([], False), (["--sam"], True), (["--sam", "True"], True), (["--sam", "true"], True), (["--sam", "False"], False)],
)
def test_booleans(argv, sam):
    assert parse_args(argv).sam is sam


def test_hyphens_and_underscores_and_dataset():
    args = parse_args(
        ["--dataset", "cifar10", "--batch-size=64", "--weight_decay", "1e-4", "--sam", "--flat-ratio", "0.3"]
    )
    assert (args.data, args.batch_size, args.weight_decay, args.flat_ratio) == ("cifar10", 64, 1e-4, 0.3)


def test_partitions():
    sharpbalance = ["--sam", "--flat_ratio", "0.5"]
    for data, unselected in (("cifar10", "others"), ("cifar100", "one"), ("tiny_imgnet", "one"), ("digits", "one")):
        args = parse_args([*sharpbalance, "--data", data])
        assert (args.partition, args.unselected, args.initial_epochs) == ("released", unselected, args.epochs // 2)
        args = parse_args([*sharpbalance, "--data", data, "--partition", "random", "--match_size"])
        assert (args.match_size, args.unselected) == ("released", unselected)
        args = parse_args([*sharpbalance, "--data", data, "--partition", "paper"])
        assert (args.partition, args.unselected) == ("paper", "normal")
    args = parse_args([*sharpbalance, "--partition", "paper", "--unselected", "others"])
    assert (args.partition, args.unselected) == ("paper", "others")
    args = parse_args([*sharpbalance, "--partition", "same"])
    assert (args.match_size, args.unselected) == (None, None)
    for word, reading, unselected in (("paper", "paper", "normal"), ("True", "released", "one"), ("False", None, None)):
        args = parse_args([*sharpbalance, "--partition", "random", "--match_size", word])
        assert (args.match_size, args.unselected) == (reading, unselected)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (("released", "flattest", "one", False), ("released", "one", None)),
        (("paper", "sharpest", "normal", False), ("paper", "normal", None)),
        (("released", "sharpest", "others", False), ("paper", "others", None)),
        (("paper", "flattest", "normal", False), ("released", "normal", None)),
        (("released", "random", "one", False), ("random", None, None)),
        (("paper", "same", "normal", False), ("same", None, None)),
        (("released", "random", "one", True), ("random", "one", "released")),
        (("paper", "same", "normal", True), ("same", "normal", "paper")),
        (("released", None, None, False), ("released", None, None)),
    ],
)
def test_settings_of_earlier_versions(before, now):
    """--select beside --partition, and a --match_size that was true or false."""
    recorded = dict(zip(("partition", "select", "unselected", "match_size"), before, strict=True))
    settings = current_settings({"rho": 0.1} | recorded)
    assert (settings["partition"], settings["unselected"], settings["match_size"]) == now
    assert current_settings(settings) == settings
    assert "select" not in settings


def test_default_folders():
    assert parse_args(["--sam"]).save_path == Path("runs/digits_deep_ensemble_sam")
    assert parse_args(["--sam", "--flat_ratio", "0.5"]).save_path == Path("runs/digits_sharpbalance")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--data", "imagenet"], ["--data", "imagenet", "cifar10"]),
        (["--seed", "13", "13"], ["--seed", "13", "twice"]),
        (["--seed", "abc"], ["--seed: expected whole numbers", "got 'abc'"]),
        (["--seed", "-1"], ["--seed"]),
        (["--seed", "1.5"], ["--seed", "'1.5'"]),
        (["--seed", "٣"], ["--seed", "whole numbers"]),
        (["--seed", str(2**32)], ["--seed", str(2**32)]),
        (["--seed", "9" * 5000], ["--seed", "whole numbers"]),
        (["--seed", ""], ["--seed", "got none"]),
        (["--seed"], ["--seed"]),
        (["--sam", "--rho", "-0.1"], ["--rho: expected a number >= 0, got '-0.1'"]),
        (["--sam", "--rho", "nan"], ["--rho", "'nan'"]),
        (["--sam", "--rho", "inf"], ["--rho", "'inf'"]),
        (["--sam", "--flat_ratio", "1.5"], ["--flat_ratio", "'1.5'", "from 0 to 1"]),
        (["--sam", "--flat_ratio", "-0.5"], ["--flat_ratio", "'-0.5'"]),
        (["--flat_ratio", "0.5"], ["--flat_ratio", "0.5", "--sam"]),
        (["--sam", "False", "--flat_ratio", "0.5"], ["--flat_ratio", "0.5", "--sam"]),
        (["--sam", "--flat_ratio", "0.5", "--epochs", "10", "--initial_epochs", "10"], ["--initial_epochs", "10", "9"]),
        (["--sam", "maybe"], ["--sam: expected True or False, got 'maybe'"]),
        (["--sam_adaptive"], ["--sam_adaptive", "--sam"]),
        (["--sam", "--partition", "random"], ["--partition", "--flat_ratio"]),
        (["--sam", "--partition", "paper"], ["--partition: paper given without a --flat_ratio", "leave it out"]),
        (["--partition", "released", "--flat_ratio", "0"], ["--partition: released given without"]),
        (["--initial_method", "sgd"], ["--initial_method: sgd given without --sam"]),
        (["--sam", "--initial_method", "sgd", "--initial_epochs", "0"], ["--initial_method: sgd", "no initial epochs"]),
        (
            ["--sam", "--initial_method", "sgd", "--initial_epochs", "30"],
            ["--initial_epochs: expected at most 29", "no epoch has SAM"],
        ),
        (["--bn_perturbed", "freeze"], ["--bn_perturbed: given without --sam"]),
        (["--sam", "False", "--bn_perturbed=update"], ["--bn_perturbed: given without --sam"]),
        (["--sam", "--unselected", "one"], ["--unselected", "--flat_ratio"]),
        (["--batch_size", "0"], ["--batch_size: expected a whole number >= 2, got '0'"]),
        (["--batch_size", "1"], ["--batch_size", "'1'"]),
        (["--batch_size", "many"], ["--batch_size", "'many'", "whole number"]),
        (["--epochs", "0"], ["--epochs", "'0'"]),
        (["--epochs", "1e3"], ["--epochs", "'1e3'"]),
        (["--lr", "fast"], ["--lr", "'fast'"]),
        (["--model", "resnet19"], ["--model: expected one of resnet18, ", "got 'resnet19'"]),
        (["--model", "wrn-40-2", "--width", "6"], ["--width", "6", "multiple of 4"]),
        (["--width", "0"], ["--width", "'0'"]),
        (["--threads", "0"], ["--threads", "'0'"]),
        (["--jobs", "0"], ["--jobs", "'0'"]),
        (["--jobs", "all"], ["--jobs", "'all'"]),
        (["--label_noise", "1.5"], ["--label_noise", "'1.5'"]),
        (["--match_size"], ["--match_size", "--partition random"]),
        (["--sam", "--flat_ratio", "0.5", "--partition", "paper", "--match_size"], ["--match_size", "random"]),
        (["--match_size", "other"], ["--match_size: expected one of released, paper, got 'other'"]),
        (["--select", "random"], ["--select: no such option"]),
        (["--average_from", "30"], ["--average_from", "30", "less than --epochs"]),
        (["--threads", "5000"], ["--threads", "'5000'", "from 1 to 1024"]),
        (["--epochs", "٣"], ["--epochs", "'٣'"]),
        (["--data=--"], ["--data: expected a value, got '--'"]),
        (["--data_path", ""], ["--data_path: expected a path, got an empty one"]),
        (["--resume", "x" * 300], ["--resume", "File name too long"]),
        (["--evaluate"], ["--evaluate: no such option"]),
        (["--device", "tpu"], ["--device", "tpu", "cpu"]),
        (["--flat_rato", "0.5"], ["--flat_rato", "did you mean --flat_ratio?"]),
        (["--zzz"], ["--zzz", "--help"]),
        (["stray"], ["stray"]),
        (["--resume", "nowhere"], ["--resume: expected a run folder with args.json, got nowhere"]),
        (["--train_idx_path", "a.npy"], ["--train_idx_path", "--val_idx_path"]),
        (["--data", "cifar10", "--data_path", "nowhere"], ["--data_path", "nowhere", "--download"]),
        (
            ["--data", "tiny_imgnet", "--data_path", "nowhere", "--download"],
            ["--download", "tiny_imgnet", "INSTALL.md"],
        ),
    ],
)
def test_bad_input(argv, parts, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused(argv, capsys)
    for part in parts:
        assert part in error, error
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there(capsys):
    assert "--device cuda: torch finds none here" in refused(["--device", "cuda"], capsys)


def test_bad_files_end_in_one_line(tmp_path, capsys):
    files.write_cifar(tmp_path / "data")
    (tmp_path / "data" / "data_batch_2").write_bytes(b"half a batch")
    common = ["--data", "cifar10", "--data_path", tmp_path / "data", "--save_path", tmp_path / "run"]
    assert "data_batch_2: not a CIFAR batch" in refused(common, capsys)
    assert not (tmp_path / "run").exists()


def test_resume_by_the_folder(tmp_path, monkeypatch, capsys):
    """By the run's own settings, without its command; a flag that contradicts it is refused."""
    flags = ["--width", "2", "--epochs", "2", "--seed", "1 2", "--batch_size", "200", "--save_path", tmp_path / "run"]
    call(flags)
    output = capsys.readouterr().out
    table = output.partition("checkpoints")[2]
    assert "finished before" not in output
    call(flags)
    assert ", finished before (--overwrite trains it anew)\n" in capsys.readouterr().out
    call(["--resume", tmp_path / "run"])
    output = capsys.readouterr().out
    assert (output.partition("checkpoints")[2], ", finished before\n" in output) == (table, True)
    assert "--epochs 3 here, 2 there" in refused(["--resume", tmp_path / "run", "--epochs", "3"], capsys)
    assert "--overwrite: given with --resume" in refused(["--resume", tmp_path / "run", "--overwrite"], capsys)
    line = refused(["--resume", tmp_path / "run", "--save_path", tmp_path / "other"], capsys)
    assert "--save_path: given with --resume" in line
    assert "--width: expected a whole number from 1 to 65536" in refused(["--width", "10000000000"], capsys)
    with monkeypatch.context() as patch:
        patch.setattr(main.dist, "is_torchelastic_launched", lambda: True)
        patch.setenv("RANK", "0")
        main.parse_args(["--data", "digits", "--jobs", "2", "--save_path", str(tmp_path / "other")])
    assert "--jobs has no effect under torchrun" in capsys.readouterr().err
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    call(["--resume", moved])
    assert f"wrote {moved}" in capsys.readouterr().out
    (moved / "args.json").write_text("[]")
    assert "args.json: not the settings of a run" in refused(["--resume", moved], capsys)


def test_the_accuracies_are_those_of_measure_diversity(tmp_path, monkeypatch):
    """What was --evaluate: on the images and the split of the run."""
    monkeypatch.chdir(tmp_path)
    np.save("train.npy", np.arange(0, 100))
    np.save("val.npy", np.arange(100, 160))
    call(
        ["--width", "2", "--epochs", "1", "--seed", "1 2", "--train_idx_path", "train.npy", "--val_idx_path", "val.npy"]
    )
    summary = json.loads(Path("runs/digits_deep_ensemble/summary.json").read_text())["best"]
    words = ["--resume", "runs/digits_deep_ensemble", "--mode", "predict,disagreement", "--split", "val,test"]
    measure_diversity.main(measure_diversity.parse_args([*words, "--bootstrap", "0"]))
    result = json.loads(Path("measurements/digits_deep_ensemble/diversity.json").read_text())["result"]
    for split in ("val", "test"):
        for row, member in zip(summary["members"], result[split]["members"], strict=True):
            assert row[f"{split}_acc"] == member["accuracy"]
            assert row[f"{split}_loss"] == pytest.approx(member["nll"], rel=1e-6)
        assert summary["ensemble"][f"{split}_acc"] == result[split]["ensemble"]["accuracy"]
        disagreement = summary["ensemble"][f"{split}_disagreement"]
        assert disagreement == pytest.approx(result[split]["disagreement"]["mean"])


def test_notes(capsys):
    parse_args(["--rho", "0.1"])
    assert "no effect without --sam" in capsys.readouterr().err
    parse_args(["--sam", "--initial_epochs", "3"])
    assert "--initial_epochs 3 has no effect without a --flat_ratio above 0" in capsys.readouterr().err
    parse_args(["--sam", "--flat_ratio", "0.5", "--seed", "13"])
    assert "one member alone" in capsys.readouterr().err
    assert (parse_args(["--sam"]).rho, parse_args(["--sam", "--sam_adaptive"]).rho) == (0.05, 0.5)
    parse_args(["--sam", "--rho", "0.4"])
    parse_args(["--sam", "--sam_adaptive", "--rho", "2"])
    assert capsys.readouterr().err == ""
    parse_args(["--sam", "--rho", "0.5"])
    assert capsys.readouterr().err == "note: --rho 0.5 is large; 0.05 is usual\n"
    parse_args(["--sam", "--sam_adaptive", "--rho", "5"])
    assert "0.5 is usual with --sam_adaptive" in capsys.readouterr().err


def test_help_names_type_and_default_of_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for action in main.build_parser()._actions:
        assert action.option_strings[0] in text
        assert action.help
        assert action.type or action.choices or action.dest in ("help", "seed")
    assert "(default: digits)" in text
    for group in ("data and device", "network", "ensemble", "optimization", "run"):
        assert f"\n{group}:" in text


def test_as_a_program(tmp_path):
    """One process: exit status, streams, plain lines where there is no terminal, and no traceback."""
    command = [sys.executable, str(ROOT / "main.py"), "--width", "2", "--epochs", "1", "--seed", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "wrote runs/digits_deep_ensemble" in done.stdout
    assert done.stderr == ""
    assert not re.search(r"[\r\x1b]", done.stdout)
    done = subprocess.run([*command, "--lr", "2"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "main.py: error: --save_path runs/digits_deep_ensemble: a run of other settings (--lr"
    )
    assert done.stderr.count("\n") == 1


TRAIN_SCRIPTS = {"deep_ensemble": [], "deep_ensemble_sam": ["--sam True"], "sharpbalance": ["--flat_ratio 0.5"]}


@pytest.mark.parametrize("name", TRAIN_SCRIPTS)
def test_train_scripts(name, tmp_path):
    """The scripts as a user calls them, on a tiny CIFAR-100; every flag after the script's own wins."""
    files.write_cifar(tmp_path / "data" / "cifar100", "cifar100", images=30)
    environment = os.environ | {"DATA_PATH": str(tmp_path / "data"), "SAVE_PATH": str(tmp_path / "run")}
    extra = ["--width", "2", "--epochs", "2", "--initial_epochs", "1", "--batch_size", "16", "--seed", "1 2"]
    command = ["bash", f"scripts/train/{name}.sh", *extra]
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "seed_2" / "sam_mask.npy").exists() == (name == "sharpbalance")
    settings = (tmp_path / "run" / "args.json").read_text()
    assert '"data": "cifar100"' in settings
    assert ('"rho": 0.2' in settings) == (name != "deep_ensemble")


def test_every_data_set_trains(tmp_path):
    files.write_cifar(tmp_path / "cifar10", "cifar10", images=10)
    files.write_cifar(tmp_path / "cifar100", "cifar100", images=40)
    files.write_fashion_mnist(tmp_path / "fashion-mnist")
    files.write_tiny_imagenet(tmp_path / "tiny-imagenet-200", per_class=8)
    for data in DATASETS:
        flags = ["--width", "2", "--epochs", "2", "--batch_size", "16", "--seed", "1 2", "--sam", "--flat_ratio", "0.5"]
        call(["--data", data, "--data_path", tmp_path, "--save_path", tmp_path / "runs" / data, *flags])
        assert (tmp_path / "runs" / data / "summary.json").exists()
