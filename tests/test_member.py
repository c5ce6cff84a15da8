"""One member: where its best checkpoint comes from after a kill, and how many images it takes at once."""

import json

import pytest
import torch

import utils.member
from tests.test_ensemble import TINY, run
from utils import InputError
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.files import write_atomically

ONE = [*TINY, "--seed", "13"]
BEST, LAST, PREVIOUS = "model_best.pth.tar", "checkpoint.pth.tar", "checkpoint_previous.pth.tar"


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
