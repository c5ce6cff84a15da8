"""Whole runs: resuming, what is written, and what is refused. Tiny networks on digits."""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import main
import utils.checkpoint
import utils.ensemble
import utils.files
import utils.member
import utils.run
import utils.training
from tests import reference
from tests.faults.faulty import arm
from tests.small import NETWORK
from utils import InputError, RunError, cli, processes
from utils.checkpoint import load_model
from utils.datasets import load_data
from utils.fisher import per_sample_fisher

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--model", NETWORK, "--epochs", "4", "--batch_size", "128", "--seed", "13 17"]
SHARPBALANCE = [*TINY, "--sam", "--rho", "0.1", "--flat_ratio", "0.4", "--initial_epochs", "2", "--average_from", "1"]


def run(folder, flags=SHARPBALANCE):
    args = main.parse_args([*flags, "--save_path", str(folder)])
    main.main(args)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without interruption."""
    return run(tmp_path_factory.mktemp("whole") / "run")


def results(folder):
    """All files of the members and the summary; the log without its wall times."""
    found = {}
    for path in sorted(folder.glob("seed_*/*")):
        found[str(path.relative_to(folder))] = path.read_bytes()
        if path.name == "log.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[str(path.relative_to(folder))] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    summary = json.loads((folder / "summary.json").read_text())
    for rows in summary.values():
        for row in rows["members"]:
            row["checkpoint"] = str(Path(row["checkpoint"]).relative_to(folder))
    return found | {"summary.json": summary}


def test_averaged_weights(whole, tmp_path, monkeypatch):
    """The plain mean of the weights after each step from epoch 1 on; BatchNorm's statistics those of an epoch."""
    steps, statistics, step = [], [], utils.training.sharpbalance_step

    def recorded(model, *rest, **more):
        result = step(model, *rest, **more)
        steps.append({name: p.detach().double() for name, p in model.named_parameters()})
        return result

    monkeypatch.setattr(utils.training, "sharpbalance_step", recorded)
    folder = run(tmp_path / "run", [*SHARPBALANCE, "--seed", "13"])
    saved = torch.load(folder / "seed_13" / "model_averaged.pth.tar", weights_only=True)
    counted = steps[len(steps) // 4 :]
    for name in counted[0]:
        mean = torch.stack([weights[name] for weights in counted]).mean(dim=0)
        torch.testing.assert_close(saved["state_dict"][name].double(), mean, rtol=1e-5, atol=1e-6)

    model, _ = load_model(folder / "seed_13" / "model_averaged.pth.tar")
    model.train()
    model.bn1.register_forward_hook(lambda module, inputs, output: statistics.append(inputs[0].double()))
    with torch.no_grad():
        for _, images, _ in load_data("digits").train.epoch(13, 4, 128):
            model(images)
    mean = torch.stack([batch.mean(dim=(0, 2, 3)) for batch in statistics]).mean(dim=0)
    variance = torch.stack([batch.var(dim=(0, 2, 3)) for batch in statistics]).mean(dim=0)
    torch.testing.assert_close(saved["state_dict"]["bn1.running_mean"].double(), mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(saved["state_dict"]["bn1.running_var"].double(), variance, rtol=1e-4, atol=1e-6)
    summary = json.loads((whole / "summary.json").read_text())
    assert set(summary) == {"last", "best", "averaged"}
    assert summary["averaged"]["members"][0]["checkpoint"].endswith("model_averaged.pth.tar")


def test_a_run_of_a_version_without_these_options_is_resumed(tmp_path):
    folder = run(tmp_path / "run", [*TINY, "--epochs", "2"])
    before = results(folder)
    settings = json.loads((folder / "args.json").read_text())
    for name in utils.run.OLD_DEFAULTS:
        del settings[name]
    (folder / "args.json").write_text(json.dumps(settings))
    # What that version hashed: all settings that it had and that count, and the data.
    for name in [*utils.run.FREE_SETTINGS, "seed"]:
        settings.pop(name, None)
    settings["data"] = load_data("digits").record["sha256_of_arrays_and_split"]
    saved = torch.load(folder / "seed_13" / "checkpoint.pth.tar", weights_only=True)["run"]
    assert saved == hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    (folder / "summary.json").unlink()
    assert results(run(folder, [*TINY, "--epochs", "2"])) == before
    with pytest.raises(InputError, match="--average_from 0 here, None there"):
        run(folder, [*TINY, "--epochs", "2", "--average_from", "0"])


@pytest.mark.parametrize("partition", ["random", "same"])
@pytest.mark.parametrize("old", [False, True])
def test_a_run_that_was_begun_earlier_keeps_its_draws(partition, old, tmp_path):
    """It does not say by which generator its sets are drawn."""
    flags = [*SHARPBALANCE, "--epochs", "2", "--initial_epochs", "1", "--partition", partition]
    args = main.parse_args([*flags, "--save_path", str(tmp_path / "run")])
    settings = main.settings_of(args).recorded()
    assert settings["draws"] == "RandomState"
    if old:
        del settings["draws"]
    args.save_path.mkdir()
    (args.save_path / "args.json").write_text(json.dumps(settings))
    main.main(main.parse_args(["--resume", str(args.save_path)]))
    seeds = [13, 17] if partition == "random" else [13, 13]
    for name, seed in zip(("seed_13", "seed_17"), seeds, strict=True):
        random = np.random.default_rng(seed) if old else np.random.RandomState([seed, 0, 2])
        found = np.flatnonzero(np.load(args.save_path / name / "sam_mask.npy"))
        assert found.tolist() == sorted(random.permutation(809)[:323].tolist())
    assert json.loads((args.save_path / "args.json").read_text()) == settings
    if not old:
        before = results(args.save_path)
        assert results(run(args.save_path, flags)) == before


@pytest.mark.parametrize(
    ("recorded", "flags"),
    [
        ({"partition": "paper", "initial_epochs": 1}, ["--sam"]),
        ({"partition": "paper", "initial_epochs": 1}, ["--sam", "--initial_epochs", "0"]),
        ({"bn_perturbed": "freeze", "rho": 0.3}, []),
    ],
)
def test_settings_without_effect_do_not_hinder_a_run(recorded, flags, tmp_path):
    """Earlier versions took them; given today, some are refused."""
    args = main.parse_args([*TINY, "--epochs", "1", *flags, "--save_path", str(tmp_path / "run")])
    args.save_path.mkdir()
    (args.save_path / "args.json").write_text(json.dumps(main.settings_of(args).recorded() | recorded))
    main.main(main.parse_args(["--resume", str(args.save_path)]))
    before = results(args.save_path)
    assert results(run(args.save_path, [*TINY, "--epochs", "1", *flags])) == before


@pytest.mark.parametrize("partition", ["random", "same"])
@pytest.mark.parametrize("reading", ["released", "paper"])
def test_drawn_sets_of_the_size_of_sharpbalances(partition, reading, tmp_path):
    """The warm-up is the same, so that the sizes are those of the SharpBalance run of the same seeds."""
    sizes = []
    for name, flags in (("balance", [reading]), ("drawn", [partition, "--match_size", reading])):
        folder = run(tmp_path / name, [*SHARPBALANCE, "--epochs", "3", "--partition", *flags])
        masks = [np.load(folder / f"seed_{seed}" / "sam_mask.npy") for seed in (13, 17)]
        sizes.append([int(mask.sum()) for mask in masks])
    assert sizes[0] == sizes[1]
    assert (masks[0] <= masks[1]).all() or (masks[1] <= masks[0]).all() or partition == "random"


def test_label_noise_is_of_the_training_labels(tmp_path):
    data, clean = load_data("digits", label_noise=0.2), load_data("digits")
    wrong = data.train.labels != clean.train.labels
    assert (wrong.numpy() == data.mislabelled).all()
    assert int(wrong.sum()) == int(0.2 * len(clean.train)) == data.record["mislabelled"]
    assert (data.val.labels == clean.val.labels).all()
    assert (data.test.labels == clean.test.labels).all()
    run(tmp_path / "run", [*TINY, "--epochs", "1", "--label_noise", "0.2"])
    with pytest.raises(InputError, match=r"--label_noise 0.0 here, 0.2 there"):
        run(tmp_path / "run", [*TINY, "--epochs", "1"])


# Where a run is killed: before or after the n-th call of a function.
KILLS = {
    "in warm-up, within an epoch": ("utils.training.sharpbalance_step", 10, "before"),
    "after the first epoch of the first member": ("utils.member.train_epoch", 2, "before"),
    "during the save of a checkpoint": ("utils.files.os.fsync", 9, "before"),
    "between the log and the best checkpoint": ("utils.files.os.replace", 4, "after"),
    "between the best and the last checkpoint": ("utils.files.os.replace", 5, "after"),
    "before the scores": ("utils.member.Member.score", 1, "before"),
    "between the scores of two members": ("utils.member.Member.score", 2, "before"),
    "between scores and split": ("utils.ensemble.sharpness_aware_masks", 1, "before"),
    "between the masks of two members": ("utils.member.digest", 4, "before"),
    "after the split": ("utils.ensemble.assign_samples", 1, "after"),
    "in the last epoch": ("utils.training.sharpbalance_step", 55, "before"),
    "before the averages": ("utils.member.Member.save_average", 1, "before"),
    "between the averages": ("utils.member.Member.save_average", 2, "before"),
    "before the summary": ("utils.ensemble.evaluate_members", 1, "before"),
}


class Forked:
    """main.py in a process that is forked from this one, which has imported torch already: seconds less.

    Args:
        words: the command line.
        fault: of `arm`, if any.
        start: what main.py calls.
    """

    def __init__(self, words, fault=(), start=main.main):
        self.output, self.errors = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115, closed with this
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(words, fault, start))
        self.process.start()

    def _run(self, words, fault, start):
        for number, file in ((1, self.output), (2, self.errors)):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr, sys.argv = sys.__stdout__, sys.__stderr__, ["main.py", *words]
        sys.orig_argv = [sys.executable, *sys.argv]  # what starts anew is not pytest
        if fault:
            arm(*(str(word) for word in fault))
        processes._may_fork = True  # as a script says that begins
        cli.run(start, main.parse_args())

    def end(self, seconds=240):
        """Exit status, output and errors."""
        self.process.join(seconds)
        ended = self.process.exitcode
        self.process.kill()  # pytest waits for it at its end
        assert ended is not None, f"no end after {seconds} s"
        texts = []
        for file in (self.output, self.errors):
            file.seek(0)
            texts.append(file.read().decode())
        return ended, *texts


def killed(folder, name, count, when, number=signal.SIGKILL):
    """A run that gets a signal before or after the n-th call of a function: exit status, errors."""
    status, _, errors = Forked([*SHARPBALANCE, "--save_path", str(folder)], (name, count, when, int(number))).end()
    return status, errors


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_run_ends_as_if_it_was_not(moment, whole, tmp_path):
    status, errors = killed(tmp_path / "run", *KILLS[moment])
    assert status == -9, errors
    assert not (tmp_path / "run" / "summary.json").exists()
    assert results(run(tmp_path / "run")) == results(whole)


def partial(folder, seed=13):
    return torch.load(folder / f"seed_{seed}" / "checkpoint_partial.pth.tar", weights_only=True)


@pytest.mark.parametrize(
    ("number", "status", "name", "count", "steps"),
    [
        (signal.SIGTERM, 143, "utils.training.sharpbalance_step", 10, 3),  # of 7 steps an epoch
        (signal.SIGINT, 130, "utils.training.sharpbalance_step", 45, 3),
        (signal.SIGTERM, 143, "utils.training.sharpbalance_step", 14, 7),
        (signal.SIGTERM, 143, "utils.member.per_sample", 3, 7),
        (signal.SIGTERM, 143, "utils.member.predict", 3, 7),
        (signal.SIGTERM, 143, "utils.member.Member.score", 2, None),
        (signal.SIGTERM, 143, "utils.files.os.replace", 5, None),
        (signal.SIGINT, 130, "utils.ensemble.evaluate_members", 1, None),
    ],
)
def test_signals(number, status, name, count, steps, whole, tmp_path):
    """A signal during a call ends the run after the step in hand, which is saved: only what is left is done again."""
    folder = tmp_path / "run"
    ended, errors = killed(folder, name, count, "before", number)
    assert ended == status, errors
    assert errors.count("\n") == 1
    assert "re-run the same command to resume" in errors
    assert not (folder / "lock").exists()
    if steps is not None:
        seed = 13 if count in (3, 45) else 17
        assert partial(folder, seed)["position"]["steps"] == steps
    assert results(run(folder)) == results(whole)


def test_saving_within_an_epoch(whole, tmp_path, monkeypatch):
    """With --save_every 0 no step is made twice, wherever the run is killed."""
    folder, flags = tmp_path / "run", [*SHARPBALANCE, "--save_every", "0"]
    original, steps = utils.training.sharpbalance_step, 0

    def step(*args, **more):
        nonlocal steps
        steps += 1
        if steps % 9 == 0:
            raise MemoryError
        return original(*args, **more)

    monkeypatch.setattr(utils.training, "sharpbalance_step", step)
    interruptions = 0
    while not (folder / "summary.json").exists():
        try:
            run(folder, flags)
        except MemoryError:
            interruptions += 1
    assert interruptions == 6
    assert steps == 2 * 4 * 7 + interruptions
    assert results(folder) == results(whole)


def test_a_partial_checkpoint_of_a_finished_epoch_is_dropped(whole, tmp_path):
    folder = tmp_path / "run"
    killed(folder, "utils.training.sharpbalance_step", 10, "before", signal.SIGTERM)
    old = (folder / "seed_17" / "checkpoint_partial.pth.tar").read_bytes()
    run(folder)
    (folder / "seed_17" / "checkpoint_partial.pth.tar").write_bytes(old)
    assert results(run(folder)) == results(whole)


def test_a_finished_run_given_again_changes_nothing(whole):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    run(whole)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before
    main.main(main.parse_args(["--resume", str(whole)]))
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_what_is_written(whole):
    assert {path.name for path in whole.iterdir()} == {
        "args.json",
        "environment.json",
        "command.txt",
        "summary.json",
        "seed_13",
        "seed_17",
    }
    names = {"checkpoint.pth.tar", "checkpoint_previous.pth.tar", "model_best.pth.tar"}
    names |= {"model_averaged.pth.tar", "log.jsonl", "fisher.npy", "sam_mask.npy"}
    assert {path.name for path in (whole / "seed_13").iterdir()} == names
    settings = json.loads((whole / "args.json").read_text())
    assert settings["seed"] == [13, 17]
    assert settings["partition"] == "released"
    assert settings["unselected"] == "one"
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["data"]["train"] == 809
    log = [json.loads(line) for line in (whole / "seed_17" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in log] == [0, 1, 2, 3]
    assert [line["lr"] for line in log] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    mask = np.load(whole / "seed_17" / "sam_mask.npy")
    assert [line["sam_share"] for line in log] == pytest.approx([1, 1, mask.mean(), mask.mean()])
    checkpoint = torch.load(whole / "seed_17" / "checkpoint.pth.tar", weights_only=True)
    assert checkpoint["epoch"] == 4
    assert all("momentum_buffer" in state for state in checkpoint["optimizer"]["state"].values())


def test_scores_and_masks_are_those_of_the_members_at_the_split(whole, tmp_path):
    """The scores of a run that ends where the other splits, and the set algebra of slow lists."""
    # The same learning rate in the first two epochs, and nothing after them.
    flags = [*TINY, "--sam", "--rho", "0.1", "--epochs", "4"]
    args = main.parse_args([*flags, "--save_path", str(tmp_path / "run")])
    data = load_data("digits")
    opened = utils.run.Run(main.settings_of(args), data)
    with opened.open():
        members = [utils.member.Member(opened, seed) for seed in args.seed]
        opened.progress.expect(sum(member.passes_left for member in members))
        for member in members * 2:
            member.train_epoch()
    scores = []
    for member in members:
        parts = [per_sample_fisher(member.model.eval(), x, y) for x, y in data.train.in_order(200)]
        scores.append(torch.cat(parts).numpy())
        saved = np.load(whole / f"seed_{member.seed}" / "fisher.npy")
        assert (saved.shape, saved.dtype) == ((809,), np.float32)
        np.testing.assert_allclose(saved, scores[-1], rtol=1e-3)
    saved = np.stack([np.load(whole / f"seed_{seed}" / "fisher.npy") for seed in (13, 17)])
    expected = reference.sharpness_aware_sets(saved, 0.4, "flattest", "one")
    for seed, members_set in zip((13, 17), expected, strict=True):
        assert set(np.flatnonzero(np.load(whole / f"seed_{seed}" / "sam_mask.npy"))) == members_set


def test_the_logged_accuracy_is_that_of_the_saved_weights(whole):
    data = load_data("digits")
    summary = json.loads((whole / "summary.json").read_text())
    for seed, row in zip((13, 17), summary["last"]["members"], strict=True):
        log = [json.loads(line) for line in (whole / f"seed_{seed}" / "log.jsonl").read_text().splitlines()]
        assert row["val_acc"] == log[-1]["val_acc"]
        model, _ = load_model(whole / f"seed_{seed}" / "checkpoint.pth.tar")
        with torch.no_grad():
            right = sum((model(x).argmax(1) == y).sum().item() for x, y in data.test.in_order(100))
        assert row["test_acc"] == pytest.approx(right / 899)
    best = summary["best"]["members"][0]
    log = [json.loads(line) for line in (whole / "seed_13" / "log.jsonl").read_text().splitlines()]
    assert best["val_acc"] == max(line["val_acc"] for line in log)
    assert best["epoch"] == max(line["epoch"] for line in log if line["val_acc"] == best["val_acc"]) + 1


def test_a_member_does_not_depend_on_the_others_before_the_split(tmp_path):
    alone = run(tmp_path / "alone", [*TINY, "--seed", "17", "--epochs", "2"])
    both = run(tmp_path / "both", [*TINY, "--epochs", "2"])
    name = Path("seed_17") / "checkpoint.pth.tar"
    assert (alone / name).read_bytes() == (both / name).read_bytes()


def test_random_and_same_need_no_scores(tmp_path):
    folder = run(tmp_path / "run", [*SHARPBALANCE, "--partition", "random"])
    assert not list(folder.glob("seed_*/fisher.npy"))
    masks = [np.load(path) for path in sorted(folder.glob("seed_*/sam_mask.npy"))]
    assert [mask.sum() for mask in masks] == [323, 323]
    assert (masks[0] != masks[1]).any()


def test_sam_from_the_start_and_split_at_once(tmp_path):
    folder = run(tmp_path / "run", [*SHARPBALANCE, "--initial_epochs", "0", "--average_from", "0", "--epochs", "1"])
    log = json.loads((folder / "seed_13" / "log.jsonl").read_text())
    assert 0 < log["sam_share"] < 1


def changed(whole, tmp_path, change):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(whole), str(copy)], check=True)
    change(copy)
    return copy


def test_a_moved_run_goes_on(whole, tmp_path):
    def cut(folder):
        (folder / "summary.json").unlink()

    assert results(run(changed(whole, tmp_path, cut))) == results(whole)


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "checkpoint.pth.tar",
            lambda b: b[:-1],
            r"damaged.*resuming from (checkpoint_previous\.pth\.tar, after epoch 2|model_best\.pth\.tar, after .* 3)",
        ),
        ("checkpoint.pth.tar", flipped, "damaged.*resuming from"),
        ("checkpoint.pth.tar", lambda b: None, "missing; resuming from"),
        ("checkpoint.pth.tar", "seed_17", r"of another member \(seed 17\); resuming from"),
        ("checkpoint_partial.pth.tar", lambda b: b"", "damaged.*is repeated"),
        ("fisher.npy", flipped, ""),
        ("fisher.npy", lambda b: None, ""),
        ("sam_mask.npy", flipped, ""),
        ("log.jsonl", lambda b: b"{", "rewritten from the checkpoint, with 4 lines that lack their seconds"),
        ("log.jsonl", lambda b: b.replace(b"train_acc", b"train_bcc", 1), "with 1 lines"),
        ("checkpoint.pth.tar.tmp", lambda b: b"half", ""),
    ],
)
def test_damage_is_mended(name, damage, message, whole, tmp_path, capsys):
    """From what is left the run ends as if nothing had been, and says so in one line."""

    def break_it(folder):
        path = folder / "seed_13" / name
        if damage == "seed_17":
            path.write_bytes((folder / "seed_17" / name).read_bytes())
            return
        content = damage(path.read_bytes() if path.exists() else b"")
        path.unlink() if content is None else path.write_bytes(content)

    assert results(run(changed(whole, tmp_path, break_it))) == results(whole)
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == bool(message)


def test_settings_changed_by_hand_are_refused(whole, tmp_path):
    """The line names the file with the settings, not an option that nobody gave."""

    def break_it(folder):
        settings = json.loads((folder / "args.json").read_text())
        (folder / "args.json").write_text(json.dumps(settings | {"rho": 0.3}))

    copy = changed(whole, tmp_path, break_it)
    with pytest.raises(InputError, match=r"of a run of other settings or images than .*args\.json has"):
        main.main(main.parse_args(["--resume", str(copy)]))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["seed_13/checkpoint.pth.tar", "seed_13/checkpoint_previous.pth.tar"], "restore one of them, or remove .*13"),
        (["seed_13/model_best.pth.tar"], r"model_best\.pth\.tar: damaged.*restore it, or remove .*seed_13"),
        (["args.json"], "cannot be read"),
        (["environment.json"], r"environment\.json: damaged .*restore it"),
    ],
)
def test_damage_that_cannot_be_mended(names, message, whole, tmp_path):
    def break_it(folder):
        for name in names:
            (folder / name).write_bytes((folder / name).read_bytes()[:-5])

    copy = changed(whole, tmp_path, break_it)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message):
        run(copy)
    assert {path: path.read_bytes() for path in before} == before
    if "remove" in message:  # the way out
        subprocess.run(["rm", "-r", str(copy / "seed_13")], check=True)
        assert results(run(copy)) == results(whole)


def test_the_best_checkpoint_of_another_epoch_is_refused(whole, tmp_path):
    """Whichever epoch was best: of the last two, one was not."""
    folder = whole / "seed_13"
    best = torch.load(folder / "model_best.pth.tar", weights_only=True)["epoch"]
    other = "checkpoint_previous.pth.tar" if best == 4 else "checkpoint.pth.tar"
    epoch = torch.load(folder / other, weights_only=True)["epoch"]

    def swap(copy):
        (copy / "seed_13" / "model_best.pth.tar").write_bytes((folder / other).read_bytes())

    with pytest.raises(InputError, match=rf"model_best.*of epoch {epoch - 1}, the best one was {best - 1}"):
        run(changed(whole, tmp_path, swap))


def test_a_full_disk(whole, tmp_path, monkeypatch):
    """The run stops in one line that says how much is needed; what was saved is whole, and the run goes on."""
    folder, original, calls = tmp_path / "run", utils.files.os.fsync, 0

    def full(number):
        nonlocal calls
        calls += 1
        if calls == 24:
            raise OSError(28, "No space left on device")
        return original(number)

    monkeypatch.setattr(utils.files.os, "fsync", full)
    with pytest.raises(RunError, match=r"could not be written \(No space left on device; [0-9.]+ MiB are needed\)"):
        run(folder)
    assert not list(folder.rglob("*.tmp"))
    assert utils.checkpoint.load_checkpoint(folder / "seed_13" / "checkpoint.pth.tar", ours=True)["epoch"] >= 1
    assert results(run(folder)) == results(whole)


def test_a_second_run_on_a_folder_is_refused(whole, tmp_path, monkeypatch):
    copy = changed(whole, tmp_path, lambda folder: None)
    refusal = (
        rf"--save_path {re.escape(str(copy))}: process (\d+) on host {re.escape(socket.gethostname())} is training"
    )
    script = "import sys, time; from pathlib import Path; from utils.run import locked\n"
    script += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script, str(copy)], cwd=ROOT, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=refusal) as error:
            run(copy)
        assert str(holder.pid) in str(error.value)
        with monkeypatch.context() as patch:  # where the file system has no locks, the process is looked up
            patch.setattr(utils.run.fcntl, "flock", no_locks)
            with pytest.raises(InputError, match=refusal):
                run(copy)
        holder.kill()
    assert (copy / "lock").exists()
    with monkeypatch.context() as patch:
        patch.setattr(utils.run.fcntl, "flock", no_locks)
        run(copy)  # a dead process' lock is taken over
    assert not (copy / "lock").exists()
    assert results(copy) == results(whole)


def no_locks(*args):
    raise OSError(95, "Operation not supported")


def test_locks_of_another_host_and_of_a_copied_folder(whole, tmp_path):
    copy = changed(whole, tmp_path, lambda folder: None)
    lock = copy / "lock"
    lock.write_text("")
    lock.write_text(f"elsewhere 12 {lock.stat().st_ino}\n")
    with pytest.raises(InputError, match=r"process 12 on host elsewhere began a run.*if it is dead, remove .*lock"):
        run(copy)
    moved = copy.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="host elsewhere"):
        run(moved)
    subprocess.run(["cp", "-r", str(moved), str(copy)], check=True)
    run(copy)
    (copy / "lock").write_bytes(b"\xff\xfe elsewhere")  # damaged
    assert results(run(copy)) == results(whole)


def test_other_settings_are_refused_and_overwrite_starts_anew(whole, tmp_path):
    copy = changed(whole, tmp_path, lambda folder: None)
    other = [*SHARPBALANCE, "--rho", "0.2", "--seed", "13", "19"]
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"--seed 13 19 here, 13 17 there; --rho 0.2 here, 0.1 there.*--overwrite"):
        run(copy, other)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    run(copy, [*other, "--overwrite", "--epochs", "3"])
    assert not (copy / "seed_17").exists()
    assert json.loads((copy / "args.json").read_text())["rho"] == 0.2


def test_other_data_are_refused(whole, tmp_path):
    np.save(tmp_path / "train.npy", np.arange(100))
    np.save(tmp_path / "val.npy", np.arange(100, 120))
    split = ["--train_idx_path", str(tmp_path / "train.npy"), "--val_idx_path", str(tmp_path / "val.npy")]
    with pytest.raises(InputError, match="the images or their split are not those"):
        run(whole, [*SHARPBALANCE, *split])


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    for flags in ([], ["--overwrite"]):
        with pytest.raises(InputError, match="not empty and not a run"):
            run(tmp_path, [*TINY, *flags])
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be created"):
        run(tmp_path / "file" / "run", TINY)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", "file"}


def test_a_diverging_member_stops_the_run(whole, tmp_path, monkeypatch):
    original, calls = utils.member.train_epoch, []

    def diverge(*args, **kwargs):
        calls.append(1)
        loss, accuracy = original(*args, **kwargs)
        return (float("nan") if len(calls) == 6 else loss), accuracy

    monkeypatch.setattr(utils.member, "train_epoch", diverge)
    with pytest.raises(RunError, match=r"seed 17, epoch 2: the loss is not finite at learning rate 0\.01"):
        run(tmp_path / "run")
    monkeypatch.undo()
    assert results(run(tmp_path / "run")) == results(whole)


def test_divergence_for_real(tmp_path):
    with pytest.raises(RunError, match="seed 13, epoch 0: the loss is not finite at learning rate 1e"):
        run(tmp_path / "run", [*TINY, "--lr", "1e30"])


def test_scores_that_are_not_finite(tmp_path, monkeypatch):
    monkeypatch.setattr(utils.member, "per_sample_fisher", lambda m, x, y: torch.full((len(x),), float("inf")))
    with pytest.raises(RunError, match="seed 13, epoch 2: 809 sharpness scores are not finite"):
        run(tmp_path / "run")
    assert not list(tmp_path.glob("run/seed_*/fisher.npy"))


def test_the_commit_is_dirty_by_code_not_by_results(tmp_path, monkeypatch):
    """Measuring changes result files that git holds."""

    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    for name in ("utils", "results"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    monkeypatch.setattr(utils.run, "__file__", str(tmp_path / "utils" / "file"))
    commit = utils.run.environment(torch.device("cpu"))["commit"]
    assert re.fullmatch("[0-9a-f]{7,}", commit)
    (tmp_path / "results" / "file").write_text("other")
    assert utils.run.environment(torch.device("cpu"))["commit"] == commit
    (tmp_path / "utils" / "file").write_text("other")
    assert utils.run.environment(torch.device("cpu"))["commit"] == f"{commit}-dirty"
