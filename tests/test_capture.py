"""Captured passes, with a graph that is the recorded function itself; tests/test_gpu.py has real ones."""

import pytest
import torch

from models import create_model
from sam import SAM
from utils import capture
from utils.capture import CAPTURE_AT, CapturedPasses
from utils.training import sharpbalance_step


@pytest.fixture
def recorded(monkeypatch):
    """What was recorded, in order."""
    found = []

    def record(work):
        found.append(work)
        return work

    monkeypatch.setattr(capture, "record", record)
    return found


def train(captured, sizes=(12, 12, 12, 9, 12, 9, 9, 12), **options):
    """Weights with statistics, losses, and a `record` of steps on batches of 20, so many of them with SAM."""
    torch.manual_seed(0)
    model = create_model("resnet18", 5, 2, 8).double().to(memory_format=torch.channels_last).train()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, weight_decay=1e-3)
    passes = CapturedPasses(model, 20) if captured else None
    losses, record = [], []
    for size in sizes:
        images = torch.randn(20, 3, 8, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
        labels, mask = torch.randint(0, 5, (20,)), torch.randperm(20) < size
        step = {"captured": passes, "record": record if options.get("recording") else None}
        step |= {name: value for name, value in options.items() if name != "recording"}
        losses.append(torch.stack(sharpbalance_step(model, optimizer, images, labels, mask, **step)))
    state = torch.cat([value.double().flatten() for value in model.state_dict().values()])
    return [state, torch.stack(losses), *record]


@pytest.mark.parametrize(
    "options",
    [{}, {"bn_perturbed": "freeze"}, {"clip_norm": 0.5}, {"label_smoothing": 0.1}, {"recording": True}],
    ids=str,
)
def test_steps_are_those_without_it(recorded, options):
    got, wanted = train(True, **options), train(False, **options)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    assert recorded
    assert len(got) == 2 + 8 * ("recording" in options)


def test_rare_sizes_are_not_recorded(recorded):
    """They are at their third use, of which the part with SAM has two in a step."""
    train(True, sizes=[12] * (CAPTURE_AT - 1))
    assert len(recorded) == 1  # 12: the first pass of the second step is the third use
    recorded.clear()
    train(True, sizes=[12] * CAPTURE_AT + [20])
    assert len(recorded) == 2  # and 8


def test_what_cannot_be_recorded_is_trained_without(monkeypatch, capsys):
    calls = []

    def record(work):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return work

    monkeypatch.setattr(capture, "record", record)
    monkeypatch.setattr(CapturedPasses, "failed", False)
    got, wanted = train(True), train(False)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-9, atol=1e-12)
    assert len(calls) == 2
    assert capsys.readouterr().err == (
        "note: training without CUDA graphs, which is slower (operation not permitted when stream is capturing)\n"
    )
    train(True)  # nor is another network's pass
    assert len(calls) == 2
