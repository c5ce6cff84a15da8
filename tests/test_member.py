"""One member: where its best checkpoint comes from after a kill, and how many images it takes at once."""

import json

import numpy as np
import pytest
import torch

import measure_diversity
import utils.checkpoint
import utils.member
import utils.training
from models import create_model
from tests import reference
from tests.small import NETWORK
from tests.test_ensemble import TINY, results, run
from utils import InputError
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.datasets import load_data
from utils.files import write_atomically
from utils.fisher import per_sample_fisher
from utils.training import in_parts

ONE = [*TINY, "--seed", "13"]
BEST, LAST, PREVIOUS = "model_best.pth.tar", "checkpoint.pth.tar", "checkpoint_previous.pth.tar"
AVERAGED, PARTIAL = "model_averaged.pth.tar", "checkpoint_partial.pth.tar"


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture
def accuracies(monkeypatch):
    """The validation accuracies of the epochs to come, in place of the true ones."""
    left = []

    def scripted(log_probs, labels):
        return {"nll": torch.ones(1), "correct": torch.tensor([left.pop(0)])}

    monkeypatch.setattr(utils.member, "per_sample", scripted)
    return left


def killed_before_the_last(folder, monkeypatch, writes):
    """A run that dies when checkpoint.pth.tar is to be written for the n-th time."""
    calls = []

    def deadly(path, *rest):
        calls.extend([path] * (path.name == LAST))
        if len(calls) == writes:
            raise Killed
        write_atomically(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(utils.member, "write_atomically", deadly)
        with pytest.raises(Killed):
            run(folder, ONE)


def epochs(folder):
    return {name: load_checkpoint(folder / "seed_13" / name, ours=True)["epoch"] for name in (BEST, LAST, PREVIOUS)}


@pytest.mark.parametrize(
    ("first", "again", "best"),
    [
        ([0.5, 0.625, 0.75], [0.25], 3),  # repeated, the third epoch would not have been the best
        ([0.5, 0.625, 0.75], [0.875], 4),
        ([0.5], [0.25, 0.125, 0.375], 1),  # the first one: there is nothing else
        ([0.5, 0.5], [0.25, 0.25], 2),
        ([0.5, 0.25, 0.125, 0.75], [], 4),  # the last one
    ],
)
def test_a_kill_between_best_and_last(first, again, best, accuracies, tmp_path, monkeypatch):
    """The epoch counts and is not repeated: on a GPU that could end elsewhere, with another best epoch."""
    accuracies += first
    killed_before_the_last(tmp_path / "run", monkeypatch, len(first))
    accuracies += again
    run(tmp_path / "run", ONE)
    assert accuracies == []
    assert epochs(tmp_path / "run") == {BEST: best, LAST: 4, PREVIOUS: 3}
    log = [json.loads(line) for line in (tmp_path / "run" / "seed_13" / "log.jsonl").read_text().splitlines()]
    assert [line["val_acc"] for line in log] == first + again
    assert None not in [line["seconds"] for line in log]
    # A finished run that is started again keeps all three.
    run(tmp_path / "run", ONE)
    assert epochs(tmp_path / "run") == {BEST: best, LAST: 4, PREVIOUS: 3}


def test_the_best_checkpoint_stands_in_for_a_damaged_last_one(accuracies, tmp_path, capsys):
    accuracies += [0.5, 0.25, 0.125, 0.75]
    member = run(tmp_path / "run", ONE) / "seed_13"
    before = {path: path.read_bytes() for path in member.iterdir()}
    (member / LAST).write_bytes(before[member / LAST][:-9])
    run(tmp_path / "run", ONE)
    assert {path: path.read_bytes() for path in member.iterdir()} == before
    assert f"resuming from {BEST}, after epoch 3" in capsys.readouterr().err


@pytest.mark.parametrize("name", [BEST, PREVIOUS])
def test_an_older_best_checkpoint_is_refused(name, accuracies, tmp_path):
    """That of an epoch which was not the best, and which the last checkpoint is past."""
    accuracies += [0.5, 0.25, 0.125, 0.0]
    member = run(tmp_path / "run", ONE) / "seed_13"
    content = load_checkpoint(member / name, ours=True)
    save_checkpoint(member / BEST, content | {"epoch": 3})
    with pytest.raises(InputError, match=r"model_best\.pth\.tar: of epoch 2, the best one was 0; restore it"):
        run(tmp_path / "run", ONE)


@pytest.mark.parametrize("name", [BEST, LAST, PARTIAL])
def test_averaged_weights_of_the_same_epoch_are_told_apart(name, accuracies, tmp_path, capsys):
    """Swapped files of one member and one epoch: the averaged weights are neither the best nor the last ones."""
    accuracies += [0.5, 0.25, 0.125, 0.75]
    flags = [*ONE, "--average_from", "1"]
    member = run(tmp_path / "run", flags) / "seed_13"
    before = {path: path.read_bytes() for path in member.iterdir()}
    (member / name).write_bytes(before[member / AVERAGED])
    if name != PARTIAL:
        (member / AVERAGED).write_bytes(before[member / name])
    if name == BEST:
        with pytest.raises(InputError, match=f"{BEST}: expected a checkpoint of a whole epoch, got one of averaged"):
            run(tmp_path / "run", flags)
        (member / BEST).write_bytes(before[member / BEST])
    run(tmp_path / "run", flags)
    assert {path: path.read_bytes() for path in member.iterdir()} == before
    assert ("expected a checkpoint" in capsys.readouterr().err) == (name != BEST)


def test_a_partial_checkpoint_is_not_the_best(accuracies, tmp_path):
    accuracies += [0.5, 0.25, 0.125, 0.75]
    member = run(tmp_path / "run", ONE) / "seed_13"
    save_checkpoint(member / BEST, load_checkpoint(member / LAST, ours=True) | {"position": None})
    with pytest.raises(InputError, match=f"{BEST}: expected a checkpoint of a whole epoch, got one within an epoch"):
        run(tmp_path / "run", ONE)


NO_MEMORY = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


def limited(limit, error=NO_MEMORY):
    """Counts images in a call, and a function that raises where they are more than the limit."""
    sizes = []

    def function(images, labels):
        sizes.append(len(images))
        if len(images) > limit:
            raise error
        return images.sum(dim=(1, 2, 3))

    return sizes, function


OTHER_WORDS = [torch.OutOfMemoryError("x out of memory"), MemoryError()]
OTHER_WORDS += [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]


@pytest.mark.parametrize(
    ("batch_size", "at_once", "limit", "sizes"),
    [
        (128, 128, 999, [89]),
        (50, 128, 999, [50, 39]),
        (128, 64, 999, [44, 45]),  # equal parts: of a few images alone kernels may sum in another order
        (128, 128, 30, [89, 30, 30, 29]),
        (50, 16, 5, None),
    ],
)
def test_in_parts(batch_size, at_once, limit, sizes):
    data = load_data("digits").val
    expected = torch.cat([images.sum(dim=(1, 2, 3)) for images, _ in data.in_order(89)])
    seen, function = limited(limit)
    found = torch.cat(list(in_parts(function, data, batch_size, at_once)))
    torch.testing.assert_close(found, expected)
    assert max(seen) <= at_once
    if sizes:
        assert sorted(seen) == sorted(sizes)


@pytest.mark.parametrize("error", OTHER_WORDS)
def test_less_memory(error, monkeypatch):
    """For the function, and for making the images float: no more than one part is made at once."""
    data = load_data("digits").val
    function = limited(20, error)[1]
    assert len(torch.cat(list(in_parts(function, data, 128, 128)))) == 89
    normalise, made = data.normalise, []

    def made_float(pixels):
        made.append(len(pixels))
        if len(pixels) > 20:
            raise error
        return normalise(pixels)

    monkeypatch.setattr(data, "normalise", made_float)
    assert len(torch.cat(list(in_parts(limited(999)[1], data, 128, 64)))) == 89
    assert made[0] == 45
    monkeypatch.undo()
    with pytest.raises(type(error)):
        list(in_parts(limited(0, error)[1], data, 128, 128))


def test_other_errors_are_not_repeated():
    seen, function = limited(20, RuntimeError("sizes do not match"))
    with pytest.raises(RuntimeError, match="sizes do not match"):
        list(in_parts(function, load_data("digits").val, 128, 128))
    assert len(seen) == 1


def test_no_more_images_at_once_than_a_step(tmp_path, monkeypatch):
    """In training, scores, validation, evaluation and measured predictions; and the same scores as of all at once."""
    seen = []
    create = utils.member.create_model

    def watched(*args, **kwargs):
        model = create(*args, **kwargs)
        model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        return model

    monkeypatch.setattr(utils.member, "create_model", watched)
    monkeypatch.setattr(utils.checkpoint, "create_model", watched)
    flags = [*TINY, "--sam", "--flat_ratio", "0.4", "--batch_size", "20", "--epochs", "1", "--initial_epochs", "0"]
    folder = run(tmp_path / "run", flags)
    words = ["--resume", str(folder), "--split", "val", "--save", str(tmp_path / "measured"), "--bootstrap", "0"]
    measure_diversity.main(measure_diversity.parse_args(words))
    assert max(seen) == 20
    for seed in (13, 17):
        torch.manual_seed(seed)
        model = create(NETWORK, 10, 64, 8, 1).eval()
        everything = next(load_data("digits").train.in_order(999))
        scores = torch.from_numpy(np.load(folder / f"seed_{seed}" / "fisher.npy"))
        torch.testing.assert_close(scores, per_sample_fisher(model, *everything), rtol=1e-3, atol=1e-6)


def steps_of(monkeypatch):
    """By seed and epoch, the masks of the steps that follow, in order, and the weights before each epoch."""
    masks, weights = [], []
    step, train_epoch = utils.training.sharpbalance_step, utils.member.train_epoch

    def recorded_step(model, optimizer, images, labels, sam_mask, *rest, **more):
        masks[-1].append(sam_mask.clone())
        return step(model, optimizer, images, labels, sam_mask, *rest, **more)

    def recorded_epoch(model, *rest, **more):
        masks.append([])
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return train_epoch(model, *rest, **more)

    monkeypatch.setattr(utils.training, "sharpbalance_step", recorded_step)
    monkeypatch.setattr(utils.member, "train_epoch", recorded_epoch)
    return masks, weights


@pytest.mark.parametrize("flat_ratio", [[], ["--flat_ratio", "0.4"]])
def test_a_start_without_sam(flat_ratio, tmp_path, monkeypatch):
    """The initial epochs are those of a deep ensemble; then comes SAM, or SharpBalance by the scores of that start."""
    flags = [*TINY, "--initial_epochs", "2", "--sam", "--rho", "0.1", *flat_ratio]
    masks, weights = steps_of(monkeypatch)
    run(tmp_path / "plain", TINY)
    deep = weights[:]
    masks.clear()
    weights.clear()
    folder = run(tmp_path / "run", [*flags, "--initial_method", "sgd"])
    for epoch in range(3):  # before the third, two have been trained
        for member in range(2):
            ours, theirs = weights[2 * epoch + member], deep[2 * epoch + member]
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(not torch.equal(weights[6][name], deep[6][name]) for name in deep[6])
    found = [torch.cat(steps) for steps in masks]
    assert not any(mask.any() for mask in found[:4])
    shares = [mask.double().mean().item() for mask in found[4:]]
    if not flat_ratio:
        assert shares == [1.0] * 4
        return
    scores = []
    for member, seed in enumerate((13, 17)):
        saved = np.load(folder / f"seed_{seed}" / "fisher.npy")
        model = create_model(NETWORK, **load_data("digits").info.network)
        model.load_state_dict(deep[4 + member])
        batches = load_data("digits").train.in_order(809)
        expected = [reference.fisher_by_samples(model.double().eval(), x[:20].double(), y[:20]) for x, y in batches]
        np.testing.assert_allclose(saved[:20], torch.cat(expected).numpy(), rtol=1e-3, atol=1e-6)
        scores.append(saved)
    sets = reference.sharpness_aware_sets(np.stack(scores), 0.4, "flattest", "one")
    assert shares == pytest.approx([len(one) / 809 for one in sets * 2])


def test_a_start_without_sam_is_resumed_and_is_another_run(tmp_path, monkeypatch, capsys):
    flags = [*ONE, "--sam", "--initial_epochs", "2", "--initial_method", "sgd"]
    folder, train_epoch = run(tmp_path / "run", flags), utils.member.train_epoch
    calls = []

    def third(*words, **more):
        calls.append(words)
        if len(calls) == 3:
            raise Killed
        return train_epoch(*words, **more)

    monkeypatch.setattr(utils.member, "train_epoch", third)
    with pytest.raises(Killed):
        run(tmp_path / "again", flags)
    monkeypatch.undo()
    assert results(run(tmp_path / "again", flags)) == results(folder)
    assert "no effect" not in capsys.readouterr().err
    for other in ([*flags, "--initial_epochs", "1"], [*ONE, "--sam"]):
        with pytest.raises(InputError, match=r"--initial_(epochs 1|method sam) here, (2|sgd) there"):
            run(folder, other)
