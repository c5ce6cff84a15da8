"""scripts/export.py: one file that gives what the ensemble gives, wherever it is loaded."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from models import full_name
from scripts import export
from tests.test_ensemble import ROOT
from tests.test_inference import NETWORKS, members_of
from tests.test_measure import save_member
from utils import cli, datasets
from utils.inference import load_ensemble
from utils.kept import VERSIONS
from utils.predictions import load_members
from utils.run import keep_temperature

# A program of somebody else, whose modules have the names of ours.
ELSEWHERE = """
import json, sys
import numpy as np
import models, utils
assert (models.mine, utils.mine) == ("models", "utils")
images, path = np.load("images.npy"), sys.argv[1]
if path.endswith(".pt2"):
    import torch
    extra = {"metadata.json": ""}
    run = torch.export.load(path, extra_files=extra).module()
    found, about = [one.numpy() for one in run(torch.from_numpy(images))], json.loads(extra["metadata.json"])
    assert "torchvision" not in sys.modules
else:
    import onnxruntime
    session = onnxruntime.InferenceSession(path)
    found, about = session.run(None, {"images": images}), session.get_modelmeta().custom_metadata_map
    assert "torch" not in sys.modules
json.dump([about, [one.tolist() for one in found]], sys.stdout)
"""


FAST = {("resnet18", "pt2"), ("resnet18", "onnx"), ("vit", "pt2")}
EVERY = [(name, ending) for name in NETWORKS for ending in ("pt2", "onnx")]


@pytest.fixture(autouse=True)
def _say_again():
    datasets.note.cache_clear()


def skip_without_onnx(path):
    if path.suffix == ".onnx":
        for name in export.NEEDED[".onnx"]:
            pytest.importorskip(name)


def exported(path, members, *argv):
    cli.run(export.main, export.parse_args(["--resume", *map(str, members), "--to", str(path), *argv]))
    return path


def outputs(path, images):
    run = {".pt2": export.run_pt2, ".onnx": export.run_onnx}[path.suffix](path.read_bytes())
    return run(images)


def close(found, prediction):
    expected = prediction.probs, prediction.member_probs, prediction.entropy, prediction.mutual_information
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "ending"), [one if one in FAST else pytest.param(*one, marks=pytest.mark.slow) for one in EVERY]
)
def test_it_gives_what_the_ensemble_gives(name, ending, tmp_path, capsys):
    """For 1, 7 and more images, whatever the number that was traced."""
    path = tmp_path / f"ensemble.{ending}"
    skip_without_onnx(path)
    members = members_of(tmp_path, name, 1 if name == "vit" else 2)  # a ViT takes long
    exported(path, members)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"wrote {path} (")
    assert len(out) == 1
    ensemble, size, channels = load_ensemble(members), *NETWORKS[name][4:]
    for count in (1, 7, 30):
        images = np.random.default_rng(count).integers(0, 256, (count, size, size, channels), dtype=np.uint8)
        close(outputs(path, torch.from_numpy(images)), ensemble(images))


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_it_is_loaded_where_modules_have_our_names(ending, tmp_path):
    """In a process with torch, or onnxruntime, only; with the temperature and the names of the classes."""
    path = tmp_path / f"ensemble.{ending}"
    skip_without_onnx(path)
    members = [save_member(tmp_path / f"seed_{seed}" / "model_best.pth.tar", seed) for seed in (3, 5)]
    (tmp_path / "args.json").write_text(json.dumps({"seed": [3, 5], "data": "digits", "partition": "released"}))
    weights = sorted(member.digest for member in load_members(members))
    versions = {kind: VERSIONS[kind] for kind in ("logits", "predict")}
    keep_temperature(tmp_path, {"weights": weights, "average": "probs", "temperature": 2.5, "versions": versions})
    exported(path, [tmp_path])
    for name in ("utils", "models"):
        (tmp_path / f"{name}.py").write_text(f"mine = {name!r}\n")
    (tmp_path / "there.py").write_text(ELSEWHERE)
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    done = subprocess.run([sys.executable, "there.py", path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    about, found = json.loads(done.stdout)
    assert json.loads(about["classes"]) == list("0123456789")
    assert (about["image_size"], about["channels"], about["members"], about["temperature"]) == ("8", "1", "2", "2.5")
    ensemble = load_ensemble(tmp_path)
    assert ensemble.temperature == 2.5
    close(found, ensemble(images))
    assert str(ROOT).encode() not in path.read_bytes()


def test_timings(tmp_path, capsys):
    exported(tmp_path / "ensemble.pt2", members_of(tmp_path, "resnet18", 2), "--timings")
    lines = capsys.readouterr().out.splitlines()[1:]
    assert re.fullmatch(r"members: 2 files of 0\.\d MiB; this file 0\.\d MiB; threads: 1, torch \S+", lines[0])
    assert [re.sub(r"\d+\.\d+", "x", line) for line in lines[1:]] == [
        f"batch of {count}: members one by one x ms [x, x], this file x ms [x, x] (median, quartiles of 10 pairs)"
        for count in (1, 32)
    ]


def test_what_differs_is_not_written(tmp_path, monkeypatch, capsys):
    members, path = members_of(tmp_path, "resnet18", 1), tmp_path / "ensemble.pt2"
    path.write_bytes(b"before")
    right = export.run_pt2
    monkeypatch.setattr(export, "run_pt2", lambda content: lambda images: [x + 1e-4 for x in right(content)(images)])
    with pytest.raises(SystemExit, match="1"):
        exported(path, members)
    assert "not written, since what it gives differs from the ensemble's by 1.0e-04" in capsys.readouterr().err
    assert path.read_bytes() == b"before"
    assert list(tmp_path.glob("*.tmp")) == []


FIXED = """
import torch

class Fixed(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.linear = torch.nn.Linear(64, num_classes)

    def forward(self, x):
        return self.linear(x.reshape(int(len(x)), -1))
"""


def test_a_network_that_fixes_the_number_of_images(tmp_path, capsys):
    (tmp_path / "net.py").write_text(FIXED)
    member = save_member(tmp_path / "0.pth.tar", 0, width=64, model=full_name(f"{tmp_path / 'net.py'}:Fixed"))
    with pytest.raises(SystemExit, match="2"):
        exported(tmp_path / "ensemble.pt2", [member])
    last = capsys.readouterr().err.splitlines()[-1]
    assert "this network cannot be exported for any number of images (" in last
    assert not (tmp_path / "ensemble.pt2").exists()


def test_a_file_that_cannot_be_run(tmp_path, monkeypatch, capsys):
    def fails(content):
        raise NotImplementedError("no kernel for\nComplex")

    monkeypatch.setattr(export, "run_pt2", fails)
    with pytest.raises(SystemExit, match="2"):
        exported(tmp_path / "ensemble.pt2", members_of(tmp_path, "resnet18", 1))
    line = "what was exported cannot be run (no kernel for); write the other form, .pt2 or .onnx\n"
    assert capsys.readouterr().err.endswith(line)
    assert not (tmp_path / "ensemble.pt2").exists()


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("ensemble.pth", "--to: expected a name that ends in .onnx or .pt2, got 'ensemble.pth'"),
        ("no/ensemble.pt2", "--to no/ensemble.pt2: expected a file in a folder that is there"),
        ("folder.pt2", "--to folder.pt2: expected a file in a folder that is there"),
        ("ensemble.onnx", "onnxscript cannot be imported (import of onnxscript halted; None in sys.modules); install"),
    ],
)
def test_export_refuses(to, words, tmp_path, monkeypatch, capsys):
    members = members_of(tmp_path, "resnet18", 1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.pt2").mkdir()
    monkeypatch.setitem(sys.modules, "onnx", json)  # any module
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SystemExit, match="2"):
        exported(to, members)
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
