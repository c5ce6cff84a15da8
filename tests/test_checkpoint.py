import os
import pickle
import threading
import time
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import utils.checkpoint
import utils.files
from models import create_model
from tests.files import Call
from utils import InputError, RunError
from utils.checkpoint import DamagedError, load_checkpoint, load_model, pack_checkpoint, save_checkpoint
from utils.files import (
    digest,
    hold,
    load_json,
    open_atomically,
    write_array,
    write_atomically,
    write_json,
)
from utils.run import find_checkpoints


def checkpoint_of(name="resnet18", classes=10, width=4, size=32, channels=3, **more):
    torch.manual_seed(0)
    model = create_model(name, classes, width, size, channels)
    return model, {
        "state_dict": model.state_dict(),
        "epoch": 3,
        "model": name,
        "dataset": "cifar10",
        "width": width,
        "num_classes": classes,
        "image_size": size,
        "in_channels": channels,
        **more,
    }


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_round_trip_and_equal_bytes(tmp_path):
    model, checkpoint = checkpoint_of()
    save_checkpoint(tmp_path / "a", checkpoint)
    save_checkpoint(tmp_path / "b", checkpoint)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded, read = load_model(tmp_path / "a", model="resnet18", width=None)
    assert same_weights(model, loaded)
    assert not loaded.training
    assert read["epoch"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "size", "classes", "width"),
    [
        ("resnet18", 32, 10, 8),
        ("resnet50", 32, 100, 4),
        ("resnet34", 64, 200, 4),
        ("resnet101", 64, 200, 2),
        ("wrn-40-2", 32, 100, 16),
        ("wrn-28-10", 32, 10, 4),
    ],
)
def test_the_authors_form(name, size, classes, width, tmp_path):
    """A dict with state_dict, DataParallel's prefix, mask buffers, and nothing about the network."""
    model, _ = checkpoint_of(name, classes, width, size)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    if size == 64:
        for key in [key for key in state if key.endswith("residual_function.0.weight")]:
            state[key.replace(".weight", ".weight_mask")] = torch.ones_like(state[key])
    torch.save({"state_dict": state, "epoch": 200, "best_acc": 77.5, "optimizer": {}}, tmp_path / "seed_13.pth.tar")
    loaded, read = load_model(tmp_path / "seed_13.pth.tar", dataset="cifar100")
    assert same_weights(model, loaded)
    found = {key: read[key] for key in ("model", "width", "num_classes", "image_size", "in_channels", "dataset")}
    assert found == {
        "model": name,
        "width": width,
        "num_classes": classes,
        "image_size": size,
        "in_channels": 3,
        "dataset": "cifar100",
    }
    with pytest.raises(InputError, match=f"--width {width + 4} contradicts the checkpoint, which has {width}"):
        load_model(tmp_path / "seed_13.pth.tar", width=width + 4)


def test_nothing_is_executed(tmp_path):
    marker = tmp_path / "executed"
    for i, write in enumerate((torch.save, lambda o, p: p.write_bytes(pickle.dumps(o)))):
        path = tmp_path / f"{i}.pth"
        write({"state_dict": {"a": torch.ones(1)}, "mask": Call(os.system, f"touch {marker}")}, path)
        with pytest.raises(InputError, match=r"only tensors.*and nothing was executed"):
            load_checkpoint(path)
    torch.save({"state_dict": {"a": torch.ones(1)}, "args": Namespace(lr=SimpleNamespace())}, tmp_path / "namespace")
    with pytest.raises(InputError, match="nothing was executed"):
        load_checkpoint(tmp_path / "namespace")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file"),
        (b"no checkpoint", "got a text that begins with 'no checkpoint'"),
        ("half", "its end is missing"),
        (None, "cannot be read"),
        ([1, 2], "not a checkpoint"),
        ({"state_dict": {}}, "not a checkpoint"),
        ({"state_dict": {"a": 1}}, "not a checkpoint"),
        ({"model": torch.ones(1)}, "not a checkpoint"),
        ({"state_dict": {"a": torch.ones(1)}}, "no network known here"),
    ],
)
def test_bad_files(content, message, tmp_path):
    path = tmp_path / "x.pth"
    if content == "half":
        save_checkpoint(path, checkpoint_of()[1])
        content = path.read_bytes()[:20000]
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=message) as error:
        load_model(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_checkpoints_of_another_network(tmp_path):
    path = tmp_path / "x.pth"
    for change, message in (
        ({"model": "resnet34"}, r"it lacks layer1\.2"),
        ({"model": "resnet18", "width": 8}, r"expected conv1\.weight of shape \[8, 3, 3, 3\], got \[4, 3, 3, 3\]"),
        ({"model": "resnet19"}, "describes a network that cannot be built"),
        ({"width": "wide"}, "describes a network that cannot be built"),
    ):
        save_checkpoint(path, checkpoint_of()[1] | change)
        with pytest.raises(InputError, match=message):
            load_model(path)
    model, checkpoint = checkpoint_of()
    checkpoint["state_dict"] = {**model.state_dict(), "extra.weight": torch.ones(1)}
    save_checkpoint(path, checkpoint)
    with pytest.raises(InputError, match=r"has no extra\.weight"):
        load_model(path)
    save_checkpoint(path, checkpoint_of()[1])
    with pytest.raises(InputError, match="--dataset cifar100 contradicts the checkpoint, which has cifar10"):
        load_model(path, dataset="cifar100")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:

            def fail(*_):
                raise OSError(28, "No space left on device")

            patch.setattr(utils.files.os, name, fail)
            with pytest.raises(RunError, match=r"No space left on device; 0\.0 MiB are needed"):
                write_atomically(path, b"new")
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]


def test_two_that_write_one_file_at_once(tmp_path):
    """Each writes a whole one, and that of the last to end stays; what a killed process left does not matter."""
    path = tmp_path / "file"
    path.with_name("file.tmp").write_bytes(b"of a killed process")
    with open_atomically(path, 0) as first:
        first.write(b"first, ")
        first.flush()
        with open_atomically(path, 0) as second:
            second.write(b"2nd")
        assert path.read_bytes() == b"2nd"
        first.write(b"whole")
    assert path.read_bytes() == b"first, whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    """The other one waits, and reads what the first has written."""
    seen, path = [], tmp_path / "numbers.json"

    def add(number):
        with hold(tmp_path) as held:
            found = [*load_json(path), number] if path.exists() else [number]
            time.sleep(0.05)
            write_json(path, found)
            seen.append(held)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for function in ("start", "join"):
        for thread in threads:
            getattr(thread, function)()
    assert seen == [True] * 4
    assert sorted(load_json(path)) == [0, 1, 2, 3]


def test_every_flipped_byte_and_every_cut_is_noticed(tmp_path):
    path = tmp_path / "x"
    save_checkpoint(path, {"state_dict": {"a": torch.arange(5.0)}})
    content = path.read_bytes()
    assert torch.load(path, weights_only=True)["state_dict"]["a"].tolist() == [0, 1, 2, 3, 4]  # any reader reads it
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ (1 << i % 8)]) + content[i + 1 :])
        with pytest.raises(DamagedError):
            load_checkpoint(path)
        with pytest.raises(DamagedError):
            load_checkpoint(path, ours=True)
    for i in range(len(content)):
        path.write_bytes(content[:i])
        with pytest.raises(DamagedError):
            load_checkpoint(path)
    path.write_bytes(content + b"x")
    with pytest.raises(DamagedError):
        load_checkpoint(path)
    torch.save({"state_dict": {"a": torch.ones(1)}}, path)
    load_checkpoint(path)
    with pytest.raises(DamagedError, match="checksum"):
        load_checkpoint(path, ours=True)


def test_the_previous_checkpoint_is_kept(tmp_path, monkeypatch):
    path, previous = tmp_path / "x", tmp_path / "y"
    for number in range(3):
        write_atomically(path, pack_checkpoint({"state_dict": {"a": torch.tensor([number])}}), previous)
        assert load_checkpoint(path)["state_dict"]["a"] == number
        assert previous.exists() == (number > 0)
        if number:
            assert load_checkpoint(previous)["state_dict"]["a"] == number - 1

    def no_links(*args):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(utils.files.os, "link", no_links)
    write_atomically(path, pack_checkpoint({"state_dict": {"a": torch.tensor([3])}}), previous)
    assert [load_checkpoint(p)["state_dict"]["a"].item() for p in (path, previous)] == [3, 2]
    assert {p.name for p in tmp_path.iterdir()} == {"x", "y"}


def test_arrays(tmp_path):
    array = np.arange(5, dtype=np.float32)
    write_array(tmp_path / "a.npy", array)
    assert (np.load(tmp_path / "a.npy") == array).all()
    with pytest.raises(ValueError, match="Object arrays"):
        write_array(tmp_path / "b.npy", np.array([{}]))
    assert digest(array) == digest(array[::1].copy())
    assert digest(array) != digest(array + 1)


def test_find_checkpoints(tmp_path):
    run = tmp_path / "run"
    for seed in (17, 13):
        (run / f"seed_{seed}").mkdir(parents=True)
        for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
            (run / f"seed_{seed}" / name).write_bytes(b"")
    write_json(run / "args.json", {"seed": [17, 13]})
    best = [run / "seed_17" / "model_best.pth.tar", run / "seed_13" / "model_best.pth.tar"]
    assert find_checkpoints([run], "best") == best
    assert find_checkpoints([run / "seed_13"], "last") == [run / "seed_13" / "checkpoint.pth.tar"]
    assert find_checkpoints([best[1], run / "seed_17"], "best") == [best[1], best[0]]
    best[1].unlink()
    with pytest.raises(InputError, match=r"seed_13/model_best\.pth\.tar is missing"):
        find_checkpoints([run], "best")
    with pytest.raises(InputError, match="no such file or folder"):
        find_checkpoints([tmp_path / "nowhere"], "best")
    with pytest.raises(InputError, match="is missing"):
        find_checkpoints([tmp_path], "best")
    (run / "args.json").write_text("{")
    with pytest.raises(InputError, match=r"args\.json: cannot be read"):
        find_checkpoints([run], "best")
    (run / "args.json").write_text("[]")
    with pytest.raises(InputError, match="not the settings of a run"):
        find_checkpoints([run], "best")
