"""--tensorboard: what is recorded, that nothing else changes, and that no step stands there twice."""

import json
import statistics
import sys
import time

import numpy as np
import pytest
import torch

import main
import utils.training
from models import create_model
from sam import SAM
from tests.test_ensemble import SHARPBALANCE
from utils import cli
from utils.data import ImageSet, Preprocessing
from utils.events import STEP_TAGS, Events
from utils.files import load_json
from utils.member import Member
from utils.training import sharpbalance_step, train_epoch


@pytest.fixture
def network():
    torch.manual_seed(0)
    return create_model("resnet18", 10, 2, 8, 1).double().train()


def gradient(model, images, labels):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    return torch.cat([one.flatten() for one in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("adaptive", [False, True])
def test_record_of_a_step(network, adaptive):
    """Against flat vectors; eps of ASAM is not of length rho."""
    images, labels = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6)
    sam, rho, record = torch.arange(6) < 4, 0.3, []
    start = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
    optimizer = SAM(network.parameters(), rho=rho, adaptive=adaptive, lr=0.1)
    g = gradient(network, images[:4], labels[:4])
    scale = start.abs() if adaptive else torch.ones_like(start)
    eps = rho * scale**2 * g / (scale * g).norm()
    torch.nn.utils.vector_to_parameters(start + eps, network.parameters())
    h = gradient(network, images[:4], labels[:4])
    torch.nn.utils.vector_to_parameters(start, network.parameters())
    sharpbalance_step(network, optimizer, images, labels, sam, record=record)
    expected = torch.stack([g.norm(), eps.norm(), torch.nn.functional.cosine_similarity(g, h, dim=0)])
    torch.testing.assert_close(record[0], expected)
    assert len(record) == 1


def test_record_of_a_step_without_sam(network):
    images, labels, record = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6), []
    g = gradient(network, images, labels)
    none = torch.zeros(6, dtype=torch.bool)
    sharpbalance_step(network, SAM(network.parameters(), lr=0.1), images, labels, none, record=record)
    torch.testing.assert_close(record[0][0], g.norm())
    assert record[0][1:].isnan().all()


@pytest.mark.parametrize("part", [0, 3, 6])
@pytest.mark.parametrize("clip_norm", [None, 0.01])
def test_the_step_is_the_same_bits(part, clip_norm):
    """With a weight that no loss reaches, too."""
    images, labels, weights = torch.randn(6, 1, 8, 8), torch.arange(6), []
    for record in (None, []):
        torch.manual_seed(0)
        model = create_model("resnet18", 10, 2, 8, 1).train()
        model.unused = torch.nn.Parameter(torch.ones(3))
        optimizer = SAM(model.parameters(), rho=0.5, lr=0.1, momentum=0.9, weight_decay=5e-4)
        for _ in range(3):
            step = {"clip_norm": clip_norm, "record": record}
            sharpbalance_step(model, optimizer, images, labels, torch.arange(6) < part, **step)
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*weights)


def test_perturbation_norm_is_of_moved_weights(network):
    optimizer = SAM(network.parameters(), rho=0.5, lr=0.1)
    with pytest.raises(RuntimeError, match="not perturbed; call first_step"):
        optimizer.perturbation_norm()
    network(torch.randn(2, 1, 8, 8, dtype=torch.float64)).sum().backward()
    optimizer.first_step()
    assert optimizer.perturbation_norm().item() == pytest.approx(0.5)
    optimizer.restore()


def test_tensorboard_is_optional(monkeypatch, capsys):
    """One line, before any data is read."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(SystemExit, match="2"):
        main.parse_args(["--tensorboard", "--data", "cifar10", "--data_path", "nowhere"])
    error = capsys.readouterr().err
    assert "--tensorboard: tensorboard cannot be imported (" in error
    assert error.endswith("; install it by pip install tensorboard, or leave it out\n")
    assert len(error.splitlines()) == 1


def train(folder, *flags):
    argv = [*SHARPBALANCE, "--save_path", str(folder), "--jobs", "1", *flags]
    cli.run(main.main, main.parse_args(list(map(str, argv))))


def events(folder):
    """By tag, what TensorBoard shows: (step, value)."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_a_run_with_events_is_the_same_run(tmp_path, monkeypatch):
    """Bit for bit, also where it is interrupted within an epoch, or once its events are written; no step is twice."""
    pytest.importorskip("tensorboard")
    train(tmp_path / "without")
    train(tmp_path / "with", "--tensorboard")
    stopped, saves = tmp_path / "stopped", []
    whole = Member.save_partial

    def stop(member):
        if len(saves) == 5:
            raise KeyboardInterrupt
        saves.append(member.epoch)
        whole(member)

    with monkeypatch.context() as patch:
        patch.setattr(Member, "save_partial", stop)
        with pytest.raises(SystemExit):
            train(stopped, "--tensorboard", "--save_every", 0)
    with monkeypatch.context() as patch:
        patch.setattr(Member, "_save", stop)  # events of the epoch are written, its checkpoint is not
        with pytest.raises(SystemExit):
            train(stopped, "--tensorboard", "--save_every", 600)
    train(stopped, "--tensorboard")
    settings = load_json(tmp_path / "with" / "args.json")
    folders = [f"seed_{seed}" for seed in settings["seed"]]
    for name in folders:
        contents = {(tmp_path / run / name / "checkpoint.pth.tar").read_bytes() for run in ("without", "with")}
        assert contents == {(stopped / name / "checkpoint.pth.tar").read_bytes()}
        found, again = events(tmp_path / "with" / name), events(stopped / name)
        for tag in set(STEP_TAGS) | {"train/loss", "val/accuracy", "sam_share", "learning_rate"}:
            assert again[tag] == found[tag], tag
        lines = (stopped / name / "log.jsonl").read_text().splitlines()
        log = [json.loads(line)["train_loss"] for line in lines]
        steps = len(found["step/gradient_norm"])
        assert [step for step, _ in found["step/gradient_norm"]] == list(range(1, steps + 1))
        assert [step for step, _ in found["train/loss"]] == [steps * (i + 1) // len(log) for i in range(len(log))]
        np.testing.assert_allclose([value for _, value in found["train/loss"]], log, rtol=1e-6)
        assert all(value > 0 for _, value in found["images_per_second"])
    train(tmp_path / "with", "--overwrite")
    assert not list((tmp_path / "with").glob("seed_*/events*"))


@pytest.mark.slow
def test_cost_at_width_8(tmp_path, monkeypatch):
    """Below 2 % of an epoch: what is done for the events, by its own processor time, of the whole; `-s` prints it.

    Epochs with and without it differ by more than that on a machine that does anything else.
    """
    pytest.importorskip("tensorboard")
    random, samples, spent = np.random.RandomState(0), 2560, []

    def timed(function):
        def call(*args):
            started = time.process_time()
            result = function(*args)
            spent[-1] += time.process_time() - started
            return timed(result) if callable(result) else result

        return call

    for name in ("_next_gradients", "_record_norm"):
        monkeypatch.setattr(utils.training, name, timed(getattr(utils.training, name)))
    pixels, labels = random.randint(0, 256, (samples, 32, 32, 1)), random.randint(0, 10, samples)
    data = ImageSet(pixels.astype(np.uint8), labels, Preprocessing((0.5,), (0.5,), 4, True))
    model = create_model("resnet18", 10, 8, 32, 1).to(memory_format=torch.channels_last)
    optimizer = SAM(model.parameters(), rho=0.1, lr=0.01, momentum=0.9)
    mask = torch.from_numpy(random.rand(samples) < 0.5)
    line = dict.fromkeys(("train_loss", "train_acc", "val_loss", "val_acc", "lr", "sam_share", "seconds"), 1.0)
    events, shares = Events(tmp_path, 0), []
    for _ in range(6):
        spent.append(0.0)
        started = time.process_time()
        train_epoch(model, optimizer, data, mask, 0, 0, 128, record=events.rows)
        timed(events.write_epoch)(line, samples)
        shares.append(spent[-1] / (time.process_time() - started))
    print(f"\nevents take {', '.join(f'{100 * share:.2f}' for share in shares[1:])} % of an epoch")
    assert statistics.median(shares[1:]) < 0.02
