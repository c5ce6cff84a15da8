"""Other people's checkpoints: read as the network that they hold, or named for what they are."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import random
import struct
import sys
import tarfile
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import measure_diversity
from models import create_model
from tests import reference
from tests.commands import call, refusal
from tests.test_fuzz import read
from tests.test_hostile import _archive, _call, _int, _state, _tensor, _text
from utils import InputError
from utils.checkpoint import DamagedError, load_checkpoint, load_model


def network(model="resnet18", classes=10, width=2, size=8, channels=1, seed=0):
    torch.manual_seed(seed)
    return reference.randomize_batch_norm(create_model(model, classes, width, size, channels)).eval()


NET = network()
STATE = NET.state_dict()


def prefixed(prefix):
    return {prefix + name: tensor for name, tensor in STATE.items()}


def cast(dtype, counters=False):
    return {n: t.to(dtype) if t.is_floating_point() or counters else t for n, t in STATE.items()}


def safetensors(state, change=lambda header: header, cut=None):
    """A file of the safetensors format, by its specification."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in state.items():
        raw = (
            tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            if tensor.dim()
            else (tensor.view(1).view(torch.uint8).numpy().tobytes())
        )
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return (len(text).to_bytes(8, "little") + text + data)[:cut]


def write(content, path):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


# What people save, beside what the network must then be.
READ = {
    "compiled": {"state_dict": prefixed("_orig_mod.")},
    "parallel and compiled": {"state_dict": prefixed("module._orig_mod.")},
    "compiled and parallel": {"state_dict": prefixed("_orig_mod.module.")},
    "Lightning, compiled": {"state_dict": prefixed("model._orig_mod."), "epoch": 3, "global_step": 9},
    "Lightning with a loss that has weights": {"state_dict": prefixed("net.") | {"criterion.weight": torch.ones(10)}},
    "an attribute of an attribute": prefixed("classifier.resnet.my_net.module."),
    "FSDP": prefixed("_fsdp_wrapped_module."),
    "a layer compiled": {
        n.replace("layer1.", "layer1._orig_mod.").replace("1.0.", "1.0.module."): t for n, t in STATE.items()
    },
    "net": {"net": prefixed("module."), "acc": 91.5, "epoch": 7},
    "model_state_dict": {"model_state_dict": STATE, "optimizer_state_dict": {"state": {0: {"a": torch.ones(1)}}}},
    "model": {"model": STATE, "arch": "resnet", "optimizer": {"state": {"a.b": torch.ones(1)}}},
    "weights": {"weights": STATE},
    "params": {"params": STATE},
    "a key that nobody knows": {"teacher_weights": STATE, "optimizer": {"exp.avg": torch.ones(1)}},
    "a tensor with a dot beside": {"state_dict": STATE, "best.acc": torch.ones(1)},
    "keys in keys": {"checkpoint": {"model": {"state_dict": STATE}}, "seed": 5},
    "weights and their average": {"ema": {n: t + 1 for n, t in STATE.items()}, "model": STATE},
    "bare": STATE,
    "bare, a dict": dict(STATE),
    "bare, with the epoch": {**STATE, "epoch": 3},
    "an averaged model": AveragedModel(NET).state_dict(),
    "an averaged model of a parallel one": {"state_dict": AveragedModel(nn.ModuleDict({"module": NET})).state_dict()},
    "parameters": {
        "state_dict": OrderedDict((n, nn.Parameter(t, requires_grad=t.is_floating_point())) for n, t in STATE.items())
    },
    "no counters": {"state_dict": {n: t for n, t in STATE.items() if "num_batches" not in n}},
    "counters of operations": {**STATE, "total_ops": torch.ones(1), "layer1.total_params": torch.ones(1)},
    "float64": cast(torch.float64),
    "numbers of numpy": {"state_dict": STATE, "best": np.float64(91.25), "epoch": np.int64(3), "ok": np.bool_(True)},
    "small numbers of numpy": {"model": STATE, "acc": np.float32(0.5), "step": np.uint8(200)},
    "argparse": {"state_dict": STATE, "args": Namespace(lr=0.1, names=["a"], deep=Namespace(x=np.float32(1)))},
    "safetensors": safetensors(STATE),
    "safetensors, parallel": safetensors(prefixed("module.")),
}
HALF = {
    "float16": {"state_dict": cast(torch.float16)},
    "float16, counters too": cast(torch.float16, counters=True),
    "bfloat16": {"net": cast(torch.bfloat16)},
    "safetensors in bfloat16": safetensors(cast(torch.bfloat16)),
    "safetensors in float16": safetensors(cast(torch.float16)),
}


def same(network, state):
    found = network.state_dict()
    names = [name for name in state if "num_batches" not in name]
    return all(torch.equal(found[name], state[name]) for name in names) and found.keys() == state.keys()


@pytest.mark.parametrize("name", READ)
def test_forms_of_the_weights(name, tmp_path):
    loaded, about = load_model(write(READ[name], tmp_path / "x.pth"), dataset="digits", image_size=8)
    assert same(loaded, STATE)
    assert not loaded.training
    assert [about[key] for key in ("model", "width", "num_classes", "in_channels")] == ["resnet18", 2, 10, 1]
    assert about["epoch"] in (None, 3, 7)
    assert about["note"].startswith("read as resnet18 of width 2 with 10 classes and 1 channels")
    assert ("'ema'" in about["note"]) == (name == "weights and their average")
    assert ("criterion.weight" in about["note"]) == ("criterion.weight" in str(READ[name])[: 10**6])


@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_computed_with_in_float32(name, tmp_path):
    loaded, _ = load_model(write(HALF[name], tmp_path / "x.pth"))
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float16
    assert same(loaded, {n: t.float() if t.is_floating_point() else t for n, t in cast(dtype).items()})
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float32, torch.int64}


def test_numbers_of_numpy_are_their_values(tmp_path):
    for kind, value in (("f8", 91.25), ("f4", -0.5), ("f2", 2.0), (">i4", 7), ("u1", 255), ("b1", True)):
        torch.save({"state_dict": STATE, "value": np.array(value, dtype=kind)[()]}, tmp_path / "x")
        found = load_checkpoint(tmp_path / "x")["value"]
        assert found == value
        assert type(found) in (int, float, bool)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("place", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numbers_of_either_numpy(place, order, tmp_path):
    """Version 2 moved the function that makes them."""
    state = _text(order) + b"NNN" + _int(-1) + _int(-1) + _int(0)
    kind = _call("numpy.dtype", _text("f8"), b"\x89", b"\x88") + b"(" + _int(3) + state + b"tb"
    eight = _call("_codecs.encode", _text(struct.pack(f"{order}d", 2.0).decode()), _text("latin1"))
    content = _state(_tensor(2, [2]))[:-1] + _text("best") + _call(f"{place}.scalar", kind, eight) + b"s."
    assert load_checkpoint(write(_archive(content), tmp_path / "x"))["best"] == 2


@pytest.mark.parametrize(
    ("model", "size", "classes"),
    [("resnet50", 32, 7), ("resnet34", 64, 200), ("wrn-40-2", 32, 100), ("vit_t", 16, 10), ("vit_t", 64, 10)],
)
def test_networks_are_inferred(model, size, classes, tmp_path):
    net = network(model, classes, 4, size, 3)
    torch.save(net.state_dict(), tmp_path / "x")
    loaded, about = load_model(tmp_path / "x")
    assert same(loaded, net.state_dict())
    found = [about[key] for key in ("model", "width", "num_classes", "image_size", "in_channels")]
    assert found == [model, 4, classes, size, 3]
    for flag, value in (("model", "resnet101"), ("width", 8)):
        with pytest.raises(InputError, match=f"--{flag} {value} contradicts the checkpoint, which has"):
            load_model(tmp_path / "x", **{flag: value})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"G": STATE, "D": STATE.copy()}, "it holds weights under 'G', 'D'; save those alone"),
        ({"G": STATE, "D": {"x": STATE.copy()}}, "it holds weights under 'G', 'D.x'; save those alone"),
        ({"ema": {"online": STATE, "target": STATE.copy()}}, "it holds weights under 'ema.online', 'ema.target'"),
        (prefixed("module.") | STATE, "the weights of a network twice"),
        ({"args": 1, "epoch": 3}, "expected named tensors, as in a state_dict, got a dict of 'args', 'epoch'"),
        (torch.ones(3), "got a Tensor"),
        ({n.replace("linear", "fc"): t for n, t in STATE.items()}, "conv1.weight, bn1.weight, ..., fc.bias: no n"),
        ({n: t for n, t in STATE.items() if "layer3.1" not in n}, "no network known here"),
        ({n: t for n, t in STATE.items() if "layer3.1.bn1" not in n}, "it lacks layer3.1.bn1.weight"),
    ],
    ids=[
        "two networks",
        "at two depths",
        "two in one",
        "twice",
        "no tensors",
        "a tensor",
        "other names",
        "other depth",
        "incomplete",
    ],
)
def test_weights_that_cannot_be_told(content, message, tmp_path):
    with pytest.raises(InputError) as error:
        load_model(write(content, tmp_path / "x.pth"))
    assert str(error.value).startswith(f"{tmp_path / 'x.pth'}: ")
    assert message in str(error.value)
    assert "damaged" not in str(error.value)


def saved(value, **more):
    file = io.BytesIO()
    torch.save(value, file, **more)
    return file.getvalue()


def scripted():
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), file)
    return file.getvalue()


def tar(name):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = 4
        archive.addfile(entry, io.BytesIO(b"1234"))
    return file.getvalue()


def zipped(*names, packing=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive:
        for name in names:
            archive.writestr(name, saved(STATE) if name.endswith(".pth") else b"\x80\x02}.")
    return file.getvalue()


def numpys(save):
    file = io.BytesIO()
    save(file, np.ones(3))
    return file.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"7" * 64 + b"\nsize 44800000\n"
NAMED = {
    "a pointer of git-lfs": (lambda: LFS, "a git-lfs pointer"),
    "a web page": (lambda: b"\n<!DOCTYPE html><html><title>Sign in</title>", "a web page"),
    "a page of Google Drive": (lambda: b"<html><head><title>Google Drive - Virus scan warning", "a web page"),
    "an error of a bucket": (lambda: b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>AccessDenied", "a web page"),
    "an error of a hub": (lambda: b"Entry not found", "a text that begins with 'Entry not found'"),
    "an index of shards": (lambda: b'{"metadata": {"total_size": 1}}', "a text that begins with '{"),
    "gzip": (lambda: gzip.compress(saved(STATE)), "packed by gzip"),
    "bzip2": (lambda: bz2.compress(b"x"), "packed by bzip2"),
    "xz": (lambda: lzma.compress(b"x"), "packed by xz"),
    "tar": (lambda: tar("seed_13.pth.tar"), "a tar archive"),
    "zip": (lambda: zipped("seed_13.pth"), "a zip archive of 'seed_13.pth'; unpack it"),
    "an empty zip": (lambda: zipped(), "a zip archive of nothing"),
    "npz": (lambda: zipped("a.npy"), "arrays of numpy"),
    "npy": (lambda: numpys(np.save), "an array of numpy"),
    "the old form": (lambda: saved(STATE, _use_new_zipfile_serialization=False), "of an older torch (before 1.6)"),
    "the old form, protocol 4": (
        lambda: saved(STATE, _use_new_zipfile_serialization=False, pickle_protocol=4),
        "of an older torch (before 1.6)",
    ),
    "a model in the old form": (
        lambda: saved(nn.Sequential(nn.Linear(2, 2)), _use_new_zipfile_serialization=False),
        "a whole model",
    ),
    "the oldest form": (lambda: tar("storages"), "of an older torch (before 1.6)"),
    "a model": (lambda: saved(nn.Sequential(nn.Linear(2, 2))), "got a whole model"),
    "a model of this repository": (lambda: saved({"model": NET, "epoch": 3}), "got a whole model"),
    "a model, protocol 4": (lambda: saved(nn.Sequential(nn.Linear(2, 2)), pickle_protocol=4), "got a whole model"),
    "another protocol": (lambda: saved(STATE, pickle_protocol=4), "saved with another pickle_protocol"),
    "TorchScript": (scripted, "a TorchScript archive"),
    "a pickle": (lambda: pickle.dumps({"state_dict": 1}), "a pickle"),
    "an object": (lambda: saved({"state_dict": STATE, "path": Path("x")}), "it refers to pathlib."),
    "an array beside": (lambda: saved({"state_dict": STATE, "history": np.ones(3)}), "it refers to numpy._core."),
    "an array for weights": (lambda: saved({"state_dict": {n: t.numpy() for n, t in STATE.items()}}), "it refers to"),
    "Keras": (lambda: zipped("metadata.json", "model.weights.h5"), "a model of Keras"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(90), "an HDF5 file"),
    "ONNX": (lambda: b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\x99\x01", "an ONNX model"),
    "SavedModel": (lambda: b"\x08\x01\x12\xd4\x07\n\x94\x07", "a model of TensorFlow"),
    "TFLite": (lambda: b"\x1c\0\0\0TFL3\x14\0", "TensorFlow Lite"),
    "an empty file": (lambda: b"", "an empty file"),
    "an unfinished copy": (lambda: bytes(5000), "a file of zeros"),
    "an unfinished download": (lambda: saved(STATE)[:60000], "its end is missing"),
    "an unfinished safetensors": (lambda: safetensors(STATE, cut=-9), "safetensors file whose end is missing"),
    "the beginning of a safetensors": (lambda: safetensors(STATE, cut=200), "safetensors file whose end is missing"),
    "packed once more": (
        lambda: zipped("a/data.pkl", "a/version", packing=zipfile.ZIP_DEFLATED),
        "its entries are packed",
    ),
    "quantized": (
        lambda: saved({"a.b": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)}),
        "expected dense tensors, got sparse, quantized",
    ),
    "a picture": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "a file of unknown kind"),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_files_are_called_by_their_name(name, tmp_path):
    content, message = NAMED[name]
    path = write(content(), tmp_path / "x.pth")
    for ours in (False, True):
        with pytest.raises(DamagedError) as error:
            load_checkpoint(path, ours)
        line = str(error.value)
        assert line.startswith(f"{path}: ")
        assert "\n" not in line
        # A file of torch in a run's folder that is not the run's own lacks the checksum.
        assert ours or (message in line and "damaged" not in line and "; " in line)


def test_the_whole_way(tmp_path, monkeypatch, capsys):
    """A script says what it read, gives the numbers of the plain file, and refuses with one line."""
    monkeypatch.setattr(sys, "argv", ["measure_diversity.py"])
    results = []
    for name, content in (("plain", {"state_dict": STATE}), ("other", {"net": prefixed("module._orig_mod.")})):
        path, save = write(content, tmp_path / f"{name}.pth"), tmp_path / name
        words = ["--resume", path, "--data", "digits", "--mode", "predict", "--split", "test", "--save", save]
        measure_diversity.main(measure_diversity.parse_args([str(word) for word in words]))
        captured = capsys.readouterr()
        assert captured.err == f"note: {path}: {load_model(path)[1]['note']}\n"
        results.append(json.loads((save / "diversity.json").read_text())["result"])
    assert results[0] == results[1]
    line = refusal(
        capsys, call, measure_diversity, "--resume", write(LFS, path), "--data", "digits", "--mode", "predict"
    )
    assert line.startswith(
        f"measure_diversity.py: error: {path}: expected a checkpoint of torch, got a git-lfs pointer"
    )


def entry(**change):
    whole = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return lambda header: {"linear.weight": whole | change}


HEADERS = {
    "another kind": entry(dtype="F8_E4M3"),
    "no kind": entry(dtype=["F32"]),
    "10^12 numbers": entry(shape=[10**12]),
    "a size of many digits": entry(shape=[10**4000, 0]),
    "many dimensions": entry(shape=[1] * 100_000 + [2]),
    "a negative size": entry(shape=[-2]),
    "a size that is true": entry(shape=[True, 2]),
    "a size that is no number": entry(shape=[2.0]),
    "negative places": entry(data_offsets=[-8, 0]),
    "places that end before they begin": entry(data_offsets=[8, 0]),
    "places beyond the file": entry(data_offsets=[0, 2**39], shape=[2**37]),
    "three places": entry(data_offsets=[0, 4, 8]),
    "no places": entry(data_offsets=None),
    "a text for an entry": lambda header: {"linear.weight": "x"},
    "a list": lambda header: [header],
    "one number as many": lambda header: {f"a.{i}": {**header["conv1.weight"]} for i in range(9000)},
    "a name twice": lambda header: b'{"a.b": 1, "a.b": 2}',
    "nested deep": lambda header: b'{"a":' * 100_000,
    "a number of a million digits": lambda header: b'{"a":' + b"9" * 10**6 + b"}",
    "no JSON": lambda header: b"{" * 90,
    "a long header": lambda header: b"{" + b" " * 2**22 + b"}",
    "nothing": lambda header: {},
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_safetensors(name, tmp_path):
    path = write(safetensors(STATE, HEADERS[name]), tmp_path / "x.safetensors")
    with pytest.raises(DamagedError) as error:
        load_checkpoint(path)
    assert len(str(error.value)) < 1000


def test_names_of_many_parts(tmp_path):
    """A name of 100,000 parts is not 100,000 steps."""
    names = ["a." * 10**5 + end for end in ("weight", "bias")]
    state = {name: torch.ones(1) for name in names}
    assert len(load_checkpoint(write(state, tmp_path / "x"))["state_dict"]) == 2
    circle = {"model": {}}
    circle["model"] |= {f"net{i}": circle for i in range(1000)}
    with pytest.raises(DamagedError, match="not a checkpoint"):
        load_checkpoint(write(circle, tmp_path / "x"))


@pytest.mark.parametrize(
    "value",
    [
        _call("_codecs.encode", _text("\u4e00\xe9" * 10**5), _text("punycode")),
        _call("_codecs.encode", _text("a" * 10**6), _text("utf-32")),
        _call("numpy.dtype", _text("V2000000000"), b"\x89", b"\x88"),
        _call("numpy.dtype", _text("O"), b"\x89", b"\x88"),
        _call("numpy._core.multiarray.scalar", _text("f8"), _text("12345678")),
        _call("numpy._core.multiarray.scalar", _call("numpy.dtype", _text("f8"), b"\x89", b"\x88"), _int(10**9)),
        _call("numpy.core.multiarray._reconstruct", _int(1)),
        _call("argparse.Namespace", _int(1)),
        _call("argparse.ArgumentParser"),
        _call("builtins.getattr", _text("a"), _text("upper")),
        _call("builtins.eval", _text("1")),
        _call("importlib.import_module", _text("os")),
        _call("functools.partial", _text("a")),
    ],
    ids=[
        *("punycode", "utf-32", "2 GB", "objects", "text for a kind", "a number for bytes", "array", "with", "parser"),
        *("getattr", "eval", "import", "partial"),
    ],
)
def test_calls_beside_the_weights(value, tmp_path):
    """None of torch's own functions, or of those that stand in for numpy's, can be misused."""
    weights = _state(_tensor(2, [2]))
    content = weights[:-1] + _text("more") + value + b"s."
    assert load_checkpoint(write(_archive(weights), tmp_path / "x"))["state_dict"]
    with pytest.raises(DamagedError):
        load_checkpoint(write(_archive(content), tmp_path / "x"))


@pytest.mark.parametrize("name", ["safetensors", "compiled", "numbers of numpy", "an averaged model"])
def test_changed_bytes(name, tmp_path):
    """Any change of a few bytes, and any cut, is read or refused in one line."""
    content, draw = write(READ[name], tmp_path / "x").read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little") if name == "safetensors" else len(content)
    for _ in range(50):
        changed = bytearray(content)
        for _ in range(draw.choice([1, 1, 3, 20])):
            changed[draw.randrange(header)] = draw.randrange(256)
        for bad in (bytes(changed), content[: draw.randrange(len(content))]):
            read(lambda bad=bad: load_model(write(bad, tmp_path / "x")))
