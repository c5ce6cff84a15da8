"""Numbers at the edge: few samples, absent classes, gradients that are not finite. A run works or says why not."""

import argparse
import json

import numpy as np
import pytest
import torch

import main
import measure_diversity
import measure_diversity_variance
import measure_sharpness
import utils.member
from models import create_model
from tests.commands import call, refusal
from utils import cli
from utils.checkpoint import load_model
from utils.datasets import load_data
from utils.files import write_json

TINY = ["--width", "2", "--epochs", "2", "--initial_epochs", "1", "--lr", "0.01", "--sam", "--rho", "0.05"]
SMALL = ["--n_iters", "2", "--n_draws", "4", "--probes", "6", "--top_k", "2"]


def split(folder, train, val):
    """The flags of a split."""
    flags = []
    for name, index in (("train", train), ("val", val)):
        np.save(folder / f"{name}.npy", np.array(index))
        flags += [f"--{name}_idx_path", str(folder / f"{name}.npy")]
    return flags


def strict(path):
    """A JSON file without NaN and infinities, which JSON does not have."""
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in {path}"))


def train(folder, *flags):
    args = main.parse_args([*TINY, *flags, "--save_path", str(folder)])
    cli.run(main.main, args)
    return strict(folder / "summary.json")


@pytest.mark.parametrize("ratio", ["0.5", "1"])
@pytest.mark.parametrize("samples", [2, 3, 5])
def test_fewer_samples_than_a_batch(samples, ratio, tmp_path):
    flags = split(tmp_path, range(samples), [100])
    summary = train(tmp_path / "run", *flags, "--flat_ratio", ratio, "--batch_size", "64", "--seed", "1 2 3")
    assert all(np.isfinite(row["val_loss"]) for row in summary["last"]["members"])
    masks = [np.load(tmp_path / "run" / f"seed_{seed}" / "sam_mask.npy") for seed in (1, 2, 3)]
    assert {mask.shape for mask in masks} == {(samples,)}
    if ratio == "1":
        assert np.all(masks)


def test_one_sample_left_joins_the_batch_before_it(tmp_path):
    """5 samples in batches of 2: the images have 1x1 pixels in the last stage, where one sample has no spread."""
    train(tmp_path / "run", *split(tmp_path, range(5), [100]), "--batch_size", "2", "--seed", "1 2")


def test_one_training_sample_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        train(tmp_path / "run", *split(tmp_path, [7], [100]), "--seed", "1")
    assert end.value.code == 2
    assert "train.npy: expected 2 or more samples, got 1" in capsys.readouterr().err


def test_one_validation_image_and_absent_classes(tmp_path, capsys):
    """Training saw three classes and validation is one image of a fourth one: all measures have a value or None."""
    labels = load_data("digits").train.labels.numpy()
    order = np.sort(np.concatenate([np.flatnonzero(labels == label)[:7] for label in (1, 4, 6)]))
    # Indices count the official training images, validation among them.
    everything = np.sort(np.random.RandomState(0).permutation(898)[89:])
    flags = split(tmp_path, everything[order], [everything[np.flatnonzero(labels == 9)[0]]])
    data = load_data("digits", train_idx_path=tmp_path / "train.npy", val_idx_path=tmp_path / "val.npy")
    assert sorted(set(data.train.labels.tolist())) == [1, 4, 6]
    assert data.val.labels.tolist() == [9]
    train(tmp_path / "run", *flags, "--flat_ratio", "0.5", "--seed", "1 2 3")

    common = ["--resume", str(tmp_path / "run"), "--save", str(tmp_path / "m"), "--split"]
    for script, name, words in (
        (measure_diversity, "diversity", ["val", "--bootstrap", "20"]),
        (measure_diversity_variance, "variance", ["val"]),
        (measure_sharpness, "sharpness", ["val", "--mode", "all", *SMALL]),
    ):
        call(script, *common, *words)
        strict(tmp_path / "m" / f"{name}.json")
    assert "--mode CKA" in refusal(capsys, call, measure_diversity, *common, "val", "--mode", "CKA")


@pytest.fixture
def poison(monkeypatch):
    """Networks some of whose gradients, counted from 0, are a value that is not finite."""
    made = utils.member.create_model

    def start(value, which):
        calls = []

        def poisoned(*args, **kwargs):
            model = made(*args, **kwargs)

            def hook(gradient):
                calls.append(1)
                return torch.full_like(gradient, value) if which(len(calls) - 1) else gradient

            model.linear.weight.register_hook(hook)
            return model

        monkeypatch.setattr(utils.member, "create_model", poisoned)

    return start


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_that_is_not_finite(value, which, poison, tmp_path, capsys):
    """A step of SAM is skipped where either of its gradients is not finite, and the terminal says so."""
    poison(value, lambda call: call == which)
    # One batch, whose two passes are the two calls: the only step.
    train(tmp_path / "run", "--epochs", "1", "--batch_size", "1000", "--seed", "4")
    expected = "warning: member with seed 4, epoch 0: 1 of 1 steps were skipped, since their gradients are not finite"
    assert expected in capsys.readouterr().err.splitlines()
    saved = load_model(tmp_path / "run" / "seed_4" / "checkpoint.pth.tar")[0]
    torch.manual_seed(4)
    start = create_model("resnet18", 10, 2, 8, 1)
    assert all(torch.equal(p, q) for p, q in zip(saved.parameters(), start.parameters(), strict=True))


def test_many_gradients_that_are_not_finite(poison, tmp_path, capsys):
    """The run goes on after few, and ends with one line after 20 steps in a row; all earlier epochs are saved."""
    few, many = range(20, 40), range(100, 1000)  # two calls a step, 21 steps an epoch
    poison(float("inf"), lambda call: call in few or call in many)
    args = main.parse_args(["--width", "2", "--epochs", "5", "--batch_size", "40", "--seed", "4", "--sam"])
    args.save_path = tmp_path / "run"
    with pytest.raises(SystemExit) as end:
        cli.run(main.main, args)
    assert end.value.code == 1
    first, second, last = (line for line in capsys.readouterr().err.splitlines() if "skipped" in line)
    assert first.startswith("warning: member with seed 4, epoch 0: 10 of 21 steps were skipped")
    assert second.startswith("warning: member with seed 4, epoch 2: 13 of 21 steps were skipped")
    assert "error: member with seed 4, epoch 3: 21 of 21 steps were skipped" in last
    assert "the last 34 in a row; start anew with a smaller --lr or --rho and another --save_path" in last
    assert len((tmp_path / "run" / "seed_4" / "log.jsonl").read_text().splitlines()) == 3


def test_equal_scores_of_all_members(tmp_path, monkeypatch):
    """Then all pick the same samples, and the rest is dealt out: the run goes on as with any other scores."""
    monkeypatch.setattr(utils.member, "per_sample_fisher", lambda model, images, labels: torch.ones(len(images)))
    for unselected, counts in (("normal", (10, 10)), ("one", (15, 15)), ("others", (15, 15))):
        flags = [*split(tmp_path, range(20), range(30, 40)), "--flat_ratio", "0.5", "--unselected", unselected]
        train(tmp_path / unselected, *flags, "--seed", "1 2", "--batch_size", "8")
        masks = [np.load(tmp_path / unselected / f"seed_{seed}" / "sam_mask.npy") for seed in (1, 2)]
        assert tuple(int(mask.sum()) for mask in masks) == counts
        assert all(mask[:10].all() for mask in masks)


@pytest.mark.parametrize(
    ("partition", "share", "least"),
    [("paper", "0.001", "0.05"), ("released", "0.0499", "0.05"), ("same", "1e-9", "0.05")],
)
def test_a_share_that_picks_no_sample(partition, share, least, tmp_path, capsys):
    """0.001 of 20 samples is none. Runs that were begun with it go on."""
    flags = [*split(tmp_path, range(20), range(30, 40)), "--partition", partition, "--seed", "1 2", "--batch_size", "8"]
    flags = [*TINY, *flags, "--save_path", str(tmp_path / "run")]
    error = refusal(capsys, call, main, *flags, "--flat_ratio", share)
    assert (
        f"--flat_ratio: {share.replace('1e-9', '1e-09')} of 20 training images is none; give {least} or more" in error
    )
    assert not (tmp_path / "run").exists()
    args = main.parse_args([*flags, "--flat_ratio", share])
    args.save_path.mkdir()
    write_json(args.save_path / "args.json", main.settings_of(args).recorded())
    main.main(args)
    assert (tmp_path / "run" / "summary.json").exists()
    main.main(main.parse_args([*flags, "--overwrite", "--flat_ratio", least]))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate"), None])
def test_out_of_memory(error, capsys):
    def work(args):
        if error is not None:
            raise error
        torch.empty(2**60)

    for arguments, way_out in (
        ({"batch_size": 128, "width": 64, "jobs": None}, "a smaller --batch_size or --width needs less"),
        ({"batch_size": 8, "width": 64, "jobs": 1, "model": "torchvision:x"}, "a smaller --batch_size needs less"),
        ({"width": None, "eval_batch_size": 5}, "a smaller --eval_batch_size needs less"),
        ({"width": 64}, "use a larger machine or device"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.run(work, argparse.Namespace(**arguments))
        assert end.value.code == 1
        assert f"out of memory; {way_out}" in capsys.readouterr().err


def test_other_errors_are_not_hidden():
    def work(args):
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="of ours"):
        cli.run(work, None)
