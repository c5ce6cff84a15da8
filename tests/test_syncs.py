"""On a GPU nothing in an epoch may wait for the device: seen on the CPU by the operations that would."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import create_model
from sam import SAM
from utils import capture
from utils.capture import CAPTURE_AT, CapturedPasses
from utils.data import ImageSet, Preprocessing
from utils.training import sharpbalance_step, train_epoch

WAITS = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default", "aten.item.default"}


# Methods that would copy from the device; on the CPU they do nothing that a dispatcher could see.
COPIES = ("cpu", "numpy", "tolist", "__array__")


class Waits(TorchDispatchMode):
    """Collects the operations whose result the host has to wait for.

    The mask of a step lives on the CPU by design: what is done with bool and int64 tensors made from it is free.
    """

    def __init__(self, free=()):
        super().__init__()
        self.found, self.free = [], free
        self._patch = pytest.MonkeyPatch()

    def __enter__(self):
        for name in COPIES:
            self._patch.setattr(torch.Tensor, name, self._watched(name, getattr(torch.Tensor, name)))
        to = torch.Tensor.to
        watched = self._watched("to cpu", to)

        def maybe(tensor, *args, **kwargs):
            # A device that is not named as the CPU is the one that trains, which here happens to be the CPU.
            target = kwargs.get("device", args[0] if args else None)
            return (watched if isinstance(target, str) and target == "cpu" else to)(tensor, *args, **kwargs)

        self._patch.setattr(torch.Tensor, "to", maybe)
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.undo()
        return super().__exit__(*error)

    def _watched(self, name, method):
        def call(tensor, *args, **kwargs):
            if tensor.dtype not in self.free:
                self.found.append(name)
            return method(tensor, *args, **kwargs)

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        indexed_by_mask = name.startswith("aten.index") and any(
            index is not None and index.dtype == torch.bool for index in (args[1] if isinstance(args[1], list) else [])
        )
        if (name in WAITS and args[0].dtype not in self.free) or indexed_by_mask:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def network():
    torch.manual_seed(0)
    return create_model("resnet18", 5, 2, 16)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("bn_perturbed", ["update", "freeze"])
@pytest.mark.parametrize("captures", [False, True])
def test_a_step_waits_for_nothing(share, bn_perturbed, captures, monkeypatch):
    monkeypatch.setattr(capture, "record", lambda work: work)
    model = network()
    captured = CapturedPasses(model, 10) if captures else None
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9)
    images, labels, mask = torch.randn(10, 3, 16, 16), torch.randint(0, 5, (10,)), torch.arange(10) < 10 * share
    with Waits(free=(torch.bool,)) as waits:
        for _ in range(CAPTURE_AT):
            sharpbalance_step(model, optimizer, images, labels, mask, bn_perturbed, captured=captured)
    assert waits.found == []


def test_an_epoch_waits_only_for_its_sums():
    random = np.random.default_rng(0)
    preprocessing = Preprocessing((0.5,) * 3, (0.2,) * 3, padding=2, flip=True)
    data = ImageSet(random.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8), random.integers(0, 5, 40), preprocessing)
    model = network()
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9)
    with Waits(free=(torch.bool, torch.int64)) as waits:
        train_epoch(model, optimizer, data, torch.arange(40) < 15, 1, 0, 8)
    assert waits.found == ["cpu", "tolist"]


def test_the_watch_sees_waits():
    x = torch.randn(4)
    with Waits() as waits:
        x.sum().item()
        x[x > 0]
        x.nonzero()
    assert len(waits.found) >= 3
    for copy in (
        lambda: x.cpu(),
        lambda: x.numpy(),
        lambda: x.tolist(),
        lambda: x.to("cpu"),
        lambda: x.to(device="cpu"),
        lambda: np.asarray(x),
    ):
        with Waits() as waits:
            copy()
        assert waits.found
    with Waits(free=(torch.float32,)) as waits:
        x.cpu(), x.to(torch.float64)
    assert waits.found == []
    x.cpu()
    assert waits.found == []
