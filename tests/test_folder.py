"""A folder of one's own images: what is found, what is read of each file, the decoded cache, and whole runs."""

import gzip
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import main
import measure_diversity
import measure_diversity_variance
import measure_sharpness
import utils.datasets
import utils.folder
from scripts import make_corrupted
from tests import commands, files, reference
from tests.test_ensemble import ROOT, results
from utils import InputError, RunError
from utils.checkpoint import load_checkpoint, load_model
from utils.corruptions import corrupt
from utils.data import DatasetInfo, ImageSet, Preprocessing
from utils.datasets import load_data
from utils.folder import PARTS, decode, draw_parts, read_images
from utils.landscape import data_of
from utils.results import read_run

CLASSES = {"ape": 20, "bee": 20, "cat": 20}
TINY = ["--data", "folder", "--image_size", "8", "--width", "2", "--epochs", "3"]
TINY += ["--batch_size", "16", "--seed", "13 17"]
SHARPBALANCE = [*TINY, "--sam", "--rho", "0.1", "--flat_ratio", "0.5", "--initial_epochs", "1"]


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    utils.datasets.note.cache_clear()


@pytest.fixture
def folder(tmp_path):
    return files.write_image_folder(tmp_path / "pictures", CLASSES)


def picture(height=20, width=20, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


call = partial(commands.call, main)


# One file.


@pytest.mark.parametrize("shape", [(20, 20), (20, 31), (32, 20), (64, 50), (1, 1), (1, 500), (500, 1), (7, 300)])
@pytest.mark.parametrize("size", [8, 20, 33])
def test_the_middle_is_scaled(shape, size, tmp_path):
    """Compared with the twin in float64; Pillow rounds to eight bits between the two directions."""
    image = picture(*shape)
    Image.fromarray(image).save(tmp_path / "x.png")
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    expected = reference.scaled(image[top : top + side, left : left + side], size)
    found = decode(tmp_path / "x.png", size)
    assert found.shape == (size, size, 3)
    assert np.abs(found - expected).max() <= (1.01 if side != size else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["png", "jpg", "tiff", "webp"])
def test_turned_as_exif_says(orientation, form, tmp_path):
    """As Pillow turns the whole image."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{form}"
    Image.fromarray(np.kron(picture(4, 5), np.ones((6, 6, 1), np.uint8))).save(path, exif=exif)
    with Image.open(path) as image:
        turned = ImageOps.exif_transpose(image).convert("RGB")
    if form != "tiff":
        assert turned.size == ((24, 30) if orientation > 4 else (30, 24))
    Image.fromarray(np.asarray(turned)).save(tmp_path / "turned.png")
    assert (decode(path, 24) == decode(tmp_path / "turned.png", 24)).all()


MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]
MODES += ["I", "F", "I;16", "I;16L", "I;16B"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode):
    """Grey stays grey in all modes that hold it, whatever else they hold."""
    grey = Image.fromarray(picture(channels=1))
    if mode.startswith("I;16"):
        values = (np.asarray(grey).astype(np.uint16) * 257).astype(">u2" if mode.endswith("B") else "<u2")
        image = Image.frombytes(mode, grey.size, values.tobytes())
    elif mode in ("La", "RGBa", "PA"):
        image = grey.convert({"La": "LA", "RGBa": "RGBA", "PA": "LA"}[mode])
        image = grey.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    elif mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBX"):
        image = grey.convert("RGB").convert(mode) if mode != "LAB" else Image.new("LAB", grey.size, (128, 128, 128))
    else:
        image = grey.convert(mode)
    found = np.asarray(utils.folder._in_colour(image))
    assert found.shape == (20, 20, 3)
    if mode == "LAB":
        assert np.ptp(found) <= 3
        assert abs(int(found.mean()) - 119) < 5  # lightness 50
        return
    expected = np.asarray(grey if mode != "1" else grey.convert("1").convert("L")).astype(int)
    assert np.abs(found.astype(int) - expected[..., None]).max() <= (1 if mode in ("CMYK", "YCbCr") else 0)


def test_sixteen_bits_and_floats(tmp_path):
    """Values above eight bits are scaled down, not cut off."""
    values = np.linspace(0, 65535, 400).reshape(20, 20)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "x.png")
    eight = values.astype(np.uint16) // 256
    assert (decode(tmp_path / "x.png", 20)[..., 0] == eight).all()
    for image in (values / 65535, values / 257, np.where(values > 60000, np.nan, values / 65535)):
        Image.fromarray(image.astype(np.float32)).save(tmp_path / "x.tiff")
        found = decode(tmp_path / "x.tiff", 20)[..., 0].astype(int)
        known = ~np.isnan(image)
        assert np.abs(found - eight)[known].max() <= 1
        assert (found[~known] == 0).all()
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "x.tiff")
    assert (decode(tmp_path / "x.tiff", 20)[..., 0] == eight).all()
    Image.fromarray((values / 257).astype(np.int32)).save(tmp_path / "x.tiff")  # eight bits in mode I
    assert (decode(tmp_path / "x.tiff", 20)[..., 0] == (values / 257).astype(int)).all()


def test_what_is_transparent_becomes_white(tmp_path):
    """Whatever colour it hides: alpha, a palette's entry, a colour that stands for nothing."""
    image = picture(channels=4)
    Image.fromarray(image).save(tmp_path / "x.png")
    alpha = image[..., 3:] / 255
    expected = image[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(decode(tmp_path / "x.png", 20) - expected).max() <= 1.5
    grey = Image.fromarray(np.repeat([[0, 255]], 20, axis=0).repeat(10, axis=1).astype(np.uint8))
    for name, form in (("x.png", "L"), ("y.png", "P"), ("x.gif", "P")):
        grey.convert(form).save(tmp_path / name, transparency=0)
        assert (decode(tmp_path / name, 20) == 255).all()


def formats():
    Image.init()
    return sorted(set(Image.SAVE) & set(Image.OPEN) - {"EPS", "PDF"})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a format
@pytest.mark.parametrize("form", formats())
def test_every_format(form, tmp_path):
    """Whatever Pillow writes here and reads again is read, under any name."""
    image = Image.fromarray(np.kron(picture(4, 4), np.ones((16, 16, 1), np.uint8)))
    path = tmp_path / "picture.txt"
    for mode in ("RGB", "L", "1", "P", "RGBA"):
        try:
            image.convert(mode).save(path, format=form)
            with Image.open(path) as read:
                expected = read.convert("RGB")
            break
        except (OSError, ValueError, KeyError, AttributeError):
            continue
    else:
        pytest.skip(f"Pillow does not write and read {form} here")
    assert np.abs(decode(path, expected.size[0]).astype(int) - np.asarray(expected)).max() <= 2


@pytest.mark.parametrize("times", [30, 100])
def test_large_jpegs_are_decoded_in_part(times, tmp_path):
    """As far as the result needs it: nearly the same pixels."""
    image = np.kron(picture(10, 10), np.ones((times, times, 1), np.uint8))
    Image.fromarray(image).save(tmp_path / "x.jpg", quality=95)
    assert np.abs(decode(tmp_path / "x.jpg", 40) - reference.scaled(image, 40)).mean() < 3


def bomb():
    """A PNG whose header promises 30000 x 30000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def write_odd_files(place):
    """Files that are no images, by name, with what is said of them."""
    whole = (place / "000.png").read_bytes()
    (place / "a_truncated.png").write_bytes(whole[: len(whole) // 2])
    (place / "b_bomb.png").write_bytes(bomb())
    (place / "c_text.jpg").write_text("a text")
    (place / "d_empty.png").touch()
    (place / "e_script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\nshowpage\n")
    (place / "f_link.png").symlink_to("nowhere.png")
    os.mkfifo(place / "g_pipe.png")
    (place / "h_damaged.png").write_bytes(whole[:40] + bytes(40) + whole[80:])
    return {
        "a_truncated.png": "",
        "b_bomb.png": "exceeds limit",
        "c_text.jpg": "no image",
        "d_empty.png": "no image",
        "e_script.eps": "no image",
        "f_link.png": "a link to nothing",
        "g_pipe.png": "not a file",
        "h_damaged.png": "",
    }


def test_odd_files_are_named(folder, capsys):
    """One line; an image under a wrong suffix, in a subfolder or with a strange name is read, junk is passed over."""
    odd = write_odd_files(folder / "ape")
    Image.fromarray(picture()).save(folder / "bee" / "x.png")
    (folder / "bee" / "x.png").rename(folder / "bee" / "x.jpg")
    (folder / "bee" / "more" / "and more").mkdir(parents=True)
    Image.fromarray(picture(seed=1)).save(folder / "bee" / "more" / "and more" / "\udcff\n.png")
    (folder / "bee" / "more" / "again").symlink_to(folder / "bee")  # a circle
    for junk in (".hidden.png", "Thumbs.db", "._000.png", "@eaDir/x.png", "__MACOSX/y.png", "#recycle/z.png"):
        (folder / "cat" / junk).parent.mkdir(exist_ok=True)
        (folder / "cat" / junk).write_text("junk")
    (folder / ".git").mkdir()
    (folder / "readme.txt").write_text("about")
    images = read_images(folder, 8, 2)
    assert images.classes == ["ape", "bee", "cat"]
    assert np.bincount(images.labels[images.parts[""]]).tolist() == [20, 22, 20]
    assert set(images.unreadable) == {os.path.join("ape", name) for name in odd}
    for name, why in odd.items():
        assert why in images.unreadable[os.path.join("ape", name)]
    capsys.readouterr()
    data = load_data("folder", folder, image_size=8)
    said = capsys.readouterr().err
    assert f"{folder}: 8 of 70 files are left out, since they cannot be read: ape/a_truncated.png (" in said
    assert "and 5 more" in said
    assert len(data.record["files"][0]["left_out"]) == 8


# What is found.


def refused(capsys, *words):
    with pytest.raises(SystemExit) as end:
        call(*words)
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert sum("error:" in line for line in said) == 1
    assert said[-1].startswith(Path(sys.argv[0]).name)
    return said[-1]


WRONG = {
    "missing": "nowhere: expected a folder of images, got no such folder",
    "file": "expected a folder of images, got a file",
    "no folder": "expected a folder for each of 2 or more classes, got no folder",
    "one class": "expected a folder for each of 2 or more classes, got ape alone",
    "empty class": "no images in dog; add some, or remove it",
    "no image": "no file in dog is an image that can be read (no image of a format that Pillow reads)",
    "train alone": "expected train/ and test/ (and val/), got train alone",
    "train and valid": "holds valid/ beside train/ and test/",
    "train and Val": "holds Val/ beside train/ and test/",
    "Training and Testing": "expected train/ and test/ (and val/), got Testing, Training alone; rename or complete",
    "train and val among others": "expected train/ and test/ (and val/), got train, val; rename or complete them, or",
    "other classes": "dog: only in train/ or in test/, expected in both",
    "empty test class": "no images in test/bee",
    "too few": "too few images, none are left for val",
    "one colour": "all training images are of one colour",
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_folders(case, folder, tmp_path, capsys):
    place = folder
    if case == "missing":
        place = tmp_path / "nowhere"
    elif case == "file":
        place = folder / "ape" / "000.png"
    elif case == "no folder":
        place = folder / "ape"
    elif case == "one class":
        shutil.rmtree(folder / "bee")
        shutil.rmtree(folder / "cat")
    elif case in ("empty class", "no image"):
        (folder / "dog").mkdir()
        if case == "no image":
            (folder / "dog" / "x.png").write_text("a text")
    elif case == "too few":
        place = files.write_image_folder(tmp_path / "few", {"a": 3, "b": 3})
    else:
        parts = {f"{part}/{name}": 6 for part in ("train", "test") for name in ("ape", "bee")}
        place = files.write_image_folder(tmp_path / "parts", parts)
        if case == "train alone":
            shutil.rmtree(place / "test")
        elif case == "train and valid":
            (place / "valid").mkdir()
        elif case == "train and Val":
            (place / "Val").mkdir()
        elif case == "Training and Testing":
            (place / "train").rename(place / "Training")
            (place / "test").rename(place / "Testing")
        elif case == "train and val among others":
            (place / "test").rename(place / "val")
            (place / "unlabelled").mkdir()
        elif case == "other classes":
            (place / "train" / "dog").mkdir()
        elif case == "empty test class":
            shutil.rmtree(place / "test" / "bee")
            (place / "test" / "bee").mkdir()
        elif case == "one colour":
            for path in place.glob("train/*/*.png"):
                Image.new("RGB", (8, 8), "red").save(path)
    line = refused(capsys, *TINY, "--data_path", place, "--save_path", tmp_path / "run")
    assert WRONG[case] in line
    assert "--data_path" in line
    assert not (tmp_path / "run").exists()


def test_a_class_without_training_images(tmp_path, capsys):
    """By the user's own split, or by the draw of 10 %, which is blind to classes."""
    place = files.write_image_folder(tmp_path / "x", {"train/a": 8, "train/b": 8, "test/a": 2, "test/b": 2})
    np.save(tmp_path / "train.npy", np.arange(8))
    np.save(tmp_path / "val.npy", np.arange(8, 16))
    split = ["--train_idx_path", tmp_path / "train.npy", "--val_idx_path", tmp_path / "val.npy"]
    line = refused(capsys, *TINY, "--data_path", place, "--save_path", tmp_path / "run", *split)
    assert f"--data_path {place}: no training images of b; add some, or remove the class" in line


def test_classes_that_are_signs(tmp_path):
    """Their names begin as those of some junk do."""
    names = ("#", "$", "@", "#5", "train")  # a vehicle, among others
    place = files.write_image_folder(tmp_path / "signs", dict.fromkeys(names, 8))
    assert read_images(place, 8, 1).classes == sorted(names)


def test_options_that_contradict(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main.parse_args(["--image_size", "32"])
    assert "--image_size: given with --data digits" in capsys.readouterr().err
    assert main.parse_args(["--data", "folder"]).image_size == 64
    assert main.parse_args([]).image_size is None
    np.save(tmp_path / "index.npy", np.arange(4))
    flags = [*TINY, "--data_path", folder, "--save_path", tmp_path / "run"]
    split = ["--train_idx_path", tmp_path / "index.npy", "--val_idx_path", tmp_path / "index.npy"]
    assert "has no train/ and test/; leave both out" in refused(capsys, *flags, *split)
    assert "--download: given with --data folder" in refused(capsys, *flags, "--download")


def test_parts_of_its_own(tmp_path):
    """train/, val/ and test/ are what they say, whatever else lies there."""
    counts = {f"{part}/{name}": n for part, n in zip(PARTS, (6, 3, 4), strict=True) for name in ("a", "b", "c")}
    place = files.write_image_folder(tmp_path / "x", counts)
    images = read_images(place, 8, 1)
    data = load_data("folder", place, image_size=8)
    for part, count in (("train", 6), ("val", 3), ("test", 4)):
        split = getattr(data, part)
        assert torch.bincount(split.labels).tolist() == [count] * 3
        expected = [decode(path, 8) for name in "abc" for path in sorted((place / part / name).iterdir())]
        assert (split.pixels(slice(None)).numpy() == np.stack(expected)).all()
        assert len(images.parts[part]) == 3 * count
    pixels = data.train.pixels(slice(None)).double().flatten(0, 2) / 255
    assert data.info.preprocessing.mean == pytest.approx(pixels.mean(dim=0).tolist(), rel=1e-12)
    assert data.info.preprocessing.std == pytest.approx(pixels.std(dim=0, correction=0).tolist(), rel=1e-9)
    # Without val/ a tenth of the training images, as of every set with a test set of its own.
    shutil.rmtree(place / "val")
    data = load_data("folder", place, image_size=8)
    train, val = utils.datasets.split_indices(18, None, None)
    every = [decode(path, 8) for name in "abc" for path in sorted((place / "train" / name).iterdir())]
    assert (data.train.pixels(slice(None)).numpy() == np.stack(every)[train]).all()
    assert (data.val.pixels(slice(None)).numpy() == np.stack(every)[val]).all()


def test_what_a_run_began_with(folder):
    """The digest is of the names of the classes and the labels, too."""
    key = "sha256_of_arrays_and_split"
    known = load_data("folder", folder, image_size=8).record[key]
    noisy = load_data("folder", folder, image_size=8, label_noise=0.2)
    (folder / "bee").rename(folder / "bug")
    renamed = load_data("folder", folder, image_size=8)
    assert noisy.mislabelled.sum() == 8
    assert len({known, noisy.record[key], renamed.record[key]}) == 3


def test_an_empty_channel(tmp_path):
    """As of fluorescence: it stays zero, and nothing becomes nan."""
    place = files.write_image_folder(tmp_path / "x", {"a": 10, "b": 10})
    for path in place.glob("*/*.png"):
        Image.fromarray(np.asarray(Image.open(path)) * np.array([0, 1, 1], np.uint8)).save(path)
    data = load_data("folder", place, image_size=8)
    assert (data.info.preprocessing.mean[0], data.info.preprocessing.std[0]) == (0.0, 1.0)
    ((batch, _),) = data.train.in_order(64)
    assert (batch[:, 0] == 0).all()
    assert batch[:, 1:].std(dim=(0, 2, 3)).tolist() == pytest.approx([1, 1], rel=1e-2)


def test_the_drawn_split(capsys, folder):
    """Class by class, the same on every machine; what has the same pixels stays together."""
    labels, digests = np.repeat([0, 1], [30, 11]), np.arange(41)
    parts = draw_parts(labels, digests)
    assert {part: np.bincount(labels[index]).tolist() for part, index in parts.items()} == {
        "train": [21, 8],
        "val": [3, 1],
        "test": [6, 2],
    }
    assert sorted(np.concatenate(list(parts.values()))) == list(range(41))
    assert parts["test"].tolist() == [2, 10, 13, 24, 26, 28, 36, 37]
    assert parts["val"].tolist() == [11, 17, 27, 39]
    for part, index in draw_parts(labels, digests[::-1]).items():  # whatever their order is
        assert index.tolist() == parts[part].tolist()
    twins = np.concatenate([digests, digests])
    drawn = draw_parts(np.concatenate([labels, labels]), twins)
    assert all((twins[drawn[part]].reshape(2, -1) == parts[part]).all() for part in PARTS)
    shutil.copytree(folder / "ape", folder / "bee", dirs_exist_ok=True)
    load_data("folder", folder, image_size=8)
    said = capsys.readouterr().err
    assert (
        "has no train/ and test/: 10 % of each class are drawn for val and 20 % for test (42 train, 6 val, 12 test)"
        in said
    )
    assert re.search(r"\d of 12 test images have the pixels of a training image", said)


# The cache.


def caches(folder):
    return sorted(path.name for path in (folder / ".decoded").iterdir() if path.name != "lock")


def no_process(*words, **more):
    raise AssertionError("nothing is to be decoded")


def test_nothing_is_decoded_twice(folder, monkeypatch):
    first = read_images(folder, 8, 2)
    before = first.pixels.tobytes()
    kept = caches(folder)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", no_process)
        again = read_images(folder, 8, 2)
        assert again.pixels.tobytes() == before
        assert again.digest(again.parts[""]) == first.digest(first.parts[""])
    read_images(folder, 9, 2)  # of another size: beside it
    assert len(caches(folder)) == 2
    Image.fromarray(picture(seed=5)).save(folder / "ape" / "000.png")
    changed = read_images(folder, 8, 2)
    assert (changed.pixels[0] != first.pixels[0]).any()
    assert (changed.pixels[1:] == first.pixels[1:]).all()
    assert len(caches(folder)) == 2
    assert kept[0] not in caches(folder)  # of files that are no longer there


@pytest.mark.parametrize("damage", [None, "pixels", "a file", "an array", "another form"])
def test_decoding_goes_on_after_a_kill(damage, folder, tmp_path, monkeypatch):
    """What was done is not done again, except for what a power cut took."""
    other = shutil.copytree(folder, tmp_path / "other")  # shutil keeps the times
    expected = read_images(other, 8, 2)
    monkeypatch.setattr(utils.folder, "CHUNK", 7)
    asked, ask = [], utils.folder._ask

    class Killed(BaseException):
        pass

    def recorded(worker, chunk, last=4):
        asked.extend(row for row, _ in chunk)
        if len(asked) > 7 * last:
            raise Killed
        ask(worker, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(utils.folder, "_ask", recorded)
        with pytest.raises(Killed):
            read_images(folder, 8, 2)
    (part,) = caches(folder)
    assert part.endswith(".part")
    records = np.load(folder / ".decoded" / part / "records.npy")
    done = set(np.flatnonzero(records["done"]).tolist())
    assert 14 <= len(done) <= 28
    if damage == "pixels":
        pixels = np.load(folder / ".decoded" / part / "images.npy", mmap_mode="r+")
        pixels[min(done)] = 0
        pixels.flush()
        done -= {min(done)}
    elif damage == "an array":
        (folder / ".decoded" / part / "records.npy").write_bytes(b"damaged")
        done = set()
    asked.clear()
    monkeypatch.setattr(utils.folder, "_ask", lambda worker, chunk: recorded(worker, chunk, 99))
    images = read_images(folder, 8, 2)
    assert sorted(asked) == sorted(set(range(60)) - done)
    assert images.pixels.tobytes() == expected.pixels.tobytes()
    assert images.digest(images.parts[""]) == expected.digest(expected.parts[""])
    assert len(caches(folder)) == 1
    if damage == "a file":  # of the finished cache
        (folder / ".decoded" / caches(folder)[0] / "images.npy").write_bytes(b"damaged")
        assert read_images(folder, 8, 2).pixels.tobytes() == expected.pixels.tobytes()
    if damage == "another form":
        np.save(folder / ".decoded" / caches(folder)[0] / "images.npy", expected.pixels[1:])
        assert read_images(folder, 8, 2).pixels.tobytes() == expected.pixels.tobytes()


def test_where_the_cache_is(folder, tmp_path, monkeypatch):
    """In the folder, or in the user's cache folder where that cannot be written or is full."""
    (folder / ".decoded").write_text("in the way")
    images = read_images(folder, 8, 1)
    place = Path(images.pixels.filename).parent.parent
    assert place.parent == tmp_path / "cache" / "sharpbalance"
    assert place.name.startswith("pictures-")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", no_process)
        read_images(folder, 8, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match=r"are needed for the decoded images, but .*; free some space, or set XDG"):
        read_images(folder, 9, 1)


def test_a_process_that_dies(folder, monkeypatch):
    """Its file is named."""
    start = subprocess.Popen

    def deadly(words, **more):
        words[2] = words[2].replace("from utils.folder import work", "import os, utils.folder as f; real = f.decode")
        words[2] = words[2].replace(
            "work(sys", "f.decode = lambda p, s: os.kill(os.getpid(), 9) if '003' in p else real(p, s); f.work(sys"
        )
        return start(words, **more)

    monkeypatch.setattr(subprocess, "Popen", deadly)
    with pytest.raises(RunError, match=r"ape/003\.png: the process that decoded it was ended \(SIGKILL"):
        read_images(folder, 8, 1)


def test_a_full_disk_and_files_without_rights(folder, monkeypatch):
    """Neither is taken for a damaged image."""
    start = subprocess.Popen

    def failing(code):
        def patched(words, **more):
            words[2] = f"import os, errno, utils.folder as f\n{code}\nf.work(sys.argv[1:])"
            words[2] = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{words[2]}"
            return start(words, **more)

        return patched

    full = "def full(*a): raise OSError(errno.ENOSPC, 'No space left on device')\nos.pwrite = full"
    monkeypatch.setattr(subprocess, "Popen", failing(full))
    with pytest.raises(RunError, match=r"could not be written \(No space left on device; .* are needed\)"):
        read_images(folder, 8, 1)
    closed = "def closed(*a): raise PermissionError(errno.EACCES, 'Permission denied')\nf.decode = closed"
    monkeypatch.setattr(subprocess, "Popen", failing(closed))
    with pytest.raises(InputError, match=r"ape/000\.png: cannot be read \(Permission denied\)"):
        read_images(folder, 8, 1)


def test_two_at_a_time(folder):
    """One decodes, the other waits for it."""
    code = f"from utils.folder import read_images; from pathlib import Path; read_images(Path({str(folder)!r}), 8, 2)"
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in "ab"]
    said = "".join(process.communicate()[1] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert said.count("note: decoded in") == 1


# Batches.


@pytest.mark.parametrize("form", [{"padding": 4}, {}, {"size": 24, "random_scale": True}, {"size": 24}])
def test_memory_mapped_batches_are_the_same(form, tmp_path):
    """Bit for bit, in any order of rows."""
    random = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", random.integers(0, 256, (40, 28, 28, 3), dtype=np.uint8))
    stored, rows = np.load(tmp_path / "x.npy", mmap_mode="r"), random.permutation(40)[:30]
    labels = random.integers(0, 10, 30)
    preprocessing = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.25), flip=True, **form)
    mapped = ImageSet(stored, labels, preprocessing, rows=rows)
    memory = ImageSet(stored[rows], labels, preprocessing)
    mapped._waiting = 3  # as after a batch that had to wait for the disk
    for one, two in zip(mapped.epoch(13, 2, 8), memory.epoch(13, 2, 8), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    mapped._waiting = 3
    for one, two in zip(mapped.in_order(7), memory.in_order(7), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert mapped.digest() == memory.digest()
    index = np.array([3, 1, 7])
    assert torch.equal(mapped.batch(index)[0], memory.batch(index)[0])
    late = list(mapped.epoch(13, 2, 8, done=2))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(late, list(memory.epoch(13, 2, 8))[2:], strict=True))


def test_large_images_are_stored_larger(tmp_path):
    """From 128 on by 15 %; evaluation takes the middle, training crops at a random scale."""
    place = files.write_image_folder(tmp_path / "x", {"a": 10, "b": 10}, size=30)
    data = load_data("folder", place, image_size=128)
    assert (data.info.image_size, data.train.height, data.test.preprocessing.random_scale) == (128, 128, False)
    first = sorted((place / "a").iterdir())[0]
    images = read_images(place, 147, 1)
    assert images.pixels.shape[1:] == (147, 147, 3)
    assert (images.pixels[0] == decode(first, 147)).all()
    middle = data.test.pixels(slice(1))[0].numpy()
    row = images.parts[""][draw_parts(images.labels, images.pixel_digests(images.parts[""]))["test"][0]]
    assert (middle == images.pixels[row, 9:137, 9:137]).all()
    batch = next(data.train.epoch(1, 0, 8))
    assert batch[1].shape == (8, 3, 128, 128)
    flip = load_data("folder", place, image_size=128, augmentation="flip").train
    inside = flip.pixels(slice(None))
    for index, images, _ in flip.epoch(1, 0, 8):
        for i, image in zip(index, images, strict=True):
            plain = flip.normalise(inside[i : i + 1])[0]
            assert torch.equal(image, plain) or torch.equal(image, plain.flip(2))
    assert load_data("folder", place, image_size=127).train.preprocessing.padding == 4


# Whole runs.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A SharpBalance run on a folder, and that folder."""
    place = files.write_image_folder(tmp_path_factory.mktemp("trained") / "pictures", CLASSES)
    call(*SHARPBALANCE, "--data_path", place, "--save_path", place.parent / "run")
    return place, place.parent / "run"


def test_a_run_on_a_folder(trained, tmp_path, monkeypatch):
    """It trains, its checkpoint knows its classes, and all scripts measure it without being told anything again."""
    place, run = trained
    data = load_data("folder", place, image_size=8)
    checkpoint = load_checkpoint(run / "seed_13" / "model_best.pth.tar", ours=True)
    assert checkpoint["classes"] == ["ape", "bee", "cat"]
    assert (checkpoint["num_classes"], checkpoint["image_size"], checkpoint["dataset"]) == (3, 8, "folder")
    assert tuple(checkpoint["mean"]) == data.info.preprocessing.mean
    assert tuple(checkpoint["std"]) == data.info.preprocessing.std
    assert load_model(run / "seed_13" / "model_best.pth.tar")[1]["classes"] == ["ape", "bee", "cat"]
    assert data_of(read_run(run)).record == data.record  # the images of figures
    monkeypatch.chdir(tmp_path)
    make_corrupted.main(make_corrupted.parse_args(["--data", "folder", "--data_path", str(place), "--image_size", "8"]))
    copies = place / "folder-8-C"
    expected = corrupt(data.test.pixels(slice(None)).numpy(), "fog", 3)
    assert (np.load(copies / "fog.npy")[2 * len(expected) : 3 * len(expected)] == expected).all()
    assert load_data("folder", place, image_size=8).info.classes == ("ape", "bee", "cat")  # they are no class
    small = ["--eval_batch_size", "5", "--batch_num", "2", "--n_iters", "2", "--n_draws", "4"]
    small += ["--hessian_samples", "40"]
    for script, more in (
        (measure_diversity, ["--bootstrap", "10"]),
        (measure_diversity_variance, []),
        (measure_sharpness, [*small, "--probes", "6", "--top_k", "2", "--ntk_samples", "6"]),
    ):
        commands.call(script, "--resume", run, "--save", "measured", *more)
    result = json.loads(Path("measured/diversity.json").read_text())["result"]
    assert {"test", "corrupted"} <= result.keys()
    summary = json.loads((run / "summary.json").read_text())["best"]
    assert summary["ensemble"]["test_acc"] == result["test"]["ensemble"]["accuracy"]


def test_tasks_of_corruptions_are_few_at_a_time():
    """Images are read when their turn comes, and results come in order."""
    read = []

    class Pool:
        def submit(self, function, *task):
            future = Future()
            future.set_result(function(*task))
            return future

    images = (read.append(i) or i for i in range(10))
    results_of = make_corrupted._map(Pool(), 3, lambda i, one: i + one, images, itertools.repeat(1))
    assert next(results_of) == 1
    assert read == [0, 1, 2, 3]
    assert list(results_of) == list(range(2, 11))


def test_measuring_on_other_images(trained, tmp_path, capsys):
    """Other classes are refused; of other training images only the test images count, normalised as in training."""
    _, run = trained
    other = files.write_image_folder(tmp_path / "other", {"ape": 20, "bee": 20, "dog": 20})
    words = ["--resume", str(run), "--save", str(tmp_path / "measured"), "--mode", "disagreement", "--bootstrap", "0"]
    found = "expected the 3 classes of the checkpoint, but it lacks cat and also has dog; give the folder of"
    assert found in commands.refusal(capsys, commands.call, measure_diversity, *words, "--data_path", other)
    (other / "dog").rename(other / "cat")
    inputs = {
        name: load_checkpoint(run / "seed_13" / "checkpoint.pth.tar")[name] for name in ("classes", "mean", "std")
    }
    shutil.rmtree(other / "bee")
    files.write_image_folder(other, {"bee": 20}, seed=3)
    data = load_data("folder", other, image_size=8, inputs=inputs)
    assert list(data.info.preprocessing.mean) == inputs["mean"]
    assert "means and deviations are those of training" in capsys.readouterr().err
    # Their temperature is not the run's: on its own images, predictions would be cooled by that of others.
    words[words.index("disagreement")] = "predict"
    (run / "temperatures.json").unlink(missing_ok=True)
    for place, kept in ((other, False), (trained[0], True)):
        commands.call(measure_diversity, *words, "--data_path", place)
        assert ("not the images, or not the split, that the members were" in capsys.readouterr().err) == (not kept)
        assert (run / "temperatures.json").exists() == kept


def test_a_run_is_resumed_to_the_bits(trained, tmp_path, monkeypatch, capsys):
    """Stopped within an epoch, and with decoded images that are gone; other sizes and other images are refused."""
    place, whole = trained
    flags = [*SHARPBALANCE, "--data_path", place, "--save_path", tmp_path / "run", "--save_every", "0"]
    step, calls = utils.training.sharpbalance_step, []

    def stopping(*rest, **more):
        calls.append(1)
        if len(calls) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(utils.training, "sharpbalance_step", stopping)
        with pytest.raises(SystemExit) as end:
            call(*flags)
    assert end.value.code == 128 + signal.SIGTERM
    shutil.rmtree(place / ".decoded")
    call(*flags)
    assert results(tmp_path / "run") == results(whole)
    call("--resume", tmp_path / "run")
    assert "--image_size 9 here, 8 there" in refused(capsys, *flags, "--image_size", "9")
    Image.fromarray(picture()).save(place / "ape" / "zebra.png")
    line = refused(capsys, *flags)
    (place / "ape" / "zebra.png").unlink()
    assert "the images or their split are not those that the run began with" in line


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fashion_mnist_as_pictures_trains_to_the_same_bits(real, tmp_path, monkeypatch):
    """The same pixels in three channels, the same order, split and normalisation: the same weights.

    The order of a folder is by class, so the set is written by class; channels, means and deviations of
    fashion_mnist are set to those of the folder. The real set is that of Debian's dataset-fashion-mnist.
    """
    files.write_fashion_mnist(tmp_path / "fashion_mnist", train=200, test=40, zipped=False)
    if real:
        packed = sorted(Path("/usr/share/datasets/fashion-mnist").glob("*.gz"))
        if len(packed) != 4:
            pytest.skip("no Fashion-MNIST in /usr/share/datasets")
        for path in packed:
            (tmp_path / "fashion_mnist" / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    arrays = {}
    for part, kind in (("train", "train"), ("t10k", "test")):
        images, labels = (tmp_path / "fashion_mnist" / f"{part}-{k}-ubyte" for k in ("images-idx3", "labels-idx1"))
        pixels = np.frombuffer(images.read_bytes()[16:], np.uint8).reshape(-1, 28, 28)
        order = np.argsort(np.frombuffer(labels.read_bytes()[8:], np.uint8), kind="stable")
        sorted_labels = np.frombuffer(labels.read_bytes()[8:], np.uint8)[order]
        images.write_bytes(images.read_bytes()[:16] + pixels[order].tobytes())
        labels.write_bytes(labels.read_bytes()[:8] + sorted_labels.tobytes())
        arrays[kind] = np.pad(pixels[order], ((0, 0), (2, 2), (2, 2))), sorted_labels
    for part, (pixels, labels) in arrays.items():
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            (tmp_path / "png" / part / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / "png" / part / str(label) / f"{i:05d}.png")
    flags = ["--width", "2", "--epochs", "2", "--batch_size", "64", "--seed", "1 2", "--sam", "--flat_ratio", "0.5"]
    flags += ["--initial_epochs", "1", "--lr", "0.1"]
    call(
        "--data", "folder", "--data_path", tmp_path / "png", "--image_size", "32", "--save_path", tmp_path / "a", *flags
    )
    preprocessing = load_data("folder", tmp_path / "png", image_size=32).info.preprocessing
    monkeypatch.setitem(utils.datasets.DATASETS, "fashion_mnist", DatasetInfo(10, 32, preprocessing))
    read = utils.datasets._read_fashion_mnist

    def in_colour(*arguments):
        (images, labels, test_images, test_labels), found = read(*arguments)
        return (images.repeat(3, axis=3), labels, test_images.repeat(3, axis=3), test_labels), found

    monkeypatch.setattr(utils.datasets, "_read_fashion_mnist", in_colour)
    call("--data", "fashion_mnist", "--data_path", tmp_path, "--save_path", tmp_path / "b", *flags)
    for seed in (1, 2):
        one, two = (load_checkpoint(tmp_path / run / f"seed_{seed}" / "checkpoint.pth.tar") for run in "ab")
        for key in ("scores", "log"):
            assert torch.equal(one[key], two[key])
        assert all(torch.equal(one["state_dict"][name], two["state_dict"][name]) for name in two["state_dict"])
    summaries = [json.loads((tmp_path / run / "summary.json").read_text())["last"]["ensemble"] for run in "ab"]
    assert summaries[0] == summaries[1]


def test_a_folder_of_many_files(tmp_path):
    """100,000 names are listed in seconds, without an object of their own for each."""
    place = tmp_path / "x"
    for name in ("a", "b"):
        (place / name).mkdir(parents=True)
    for name in ("a", "b"):
        for i in range(50000):
            os.mknod(place / name / f"{i:06d}.png")
    started = time.monotonic()
    found = [list(utils.folder.find_files(place / name, name)) for name in ("a", "b")]
    assert time.monotonic() - started < 20
    assert [len(part) for part in found] == [50000, 50000]
    assert found[1][-1][0] == os.path.join("b", "049999.png")


# A command under 2 GB of memory, or with its images copied into memory.
LARGE = """
import resource, runpy, sys
form, sys.argv = sys.argv[1], sys.argv[2:]
sys.path.insert(0, ".")
if form == "limit":
    resource.setrlimit(resource.RLIMIT_DATA, (2**31, 2**31))
else:
    import utils.datasets as datasets
    base = datasets.ImageSet
    datasets.ImageSet = lambda pixels, labels, how, device, rows: base(pixels[rows], labels, how, device)
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# A pass takes next to nothing, so that reading is what takes time.
SMALL = """
from torch import nn


def make(num_classes):
    features = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(features, nn.Linear(8, num_classes))
"""


@pytest.mark.slow
def test_larger_than_memory(tmp_path):
    """6 GB of decoded images under 2 GB of memory, killed while decoding and while training: the same bits.

    Five minutes, 6 GB of disk, and for the comparison 15 GB of memory. `-s` prints the seconds of an epoch, by turns:
    bash scripts/test.sh -m slow -s tests/test_folder.py -k larger
    """
    place = tmp_path / "pictures"
    first = files.write_image_folder(place, dict.fromkeys(("a", "b"), 700), size=20)
    for path in sorted(first.glob("*/*")):
        for i in range(100):
            os.link(path, path.with_name(f"{path.stem}_{i}.png"))
    (tmp_path / "net.py").write_text(SMALL)
    flags = ["--data", "folder", "--data_path", str(place), "--image_size", "120", "--model", f"{tmp_path}/net.py:make"]
    flags += ["--epochs", "1", "--batch_size", "128", "--lr", "0.01", "--seed", "1", "--threads", "1"]
    flags += ["--save_every", "5"]

    def start(run, form="limit"):
        command = [sys.executable, "-c", LARGE, form, "main.py", *flags, "--save_path", str(tmp_path / run)]
        return subprocess.Popen(command, cwd=ROOT)

    def records():
        return next(iter((place / ".decoded").glob("*.part/records.npy")), None)

    def wait(process, condition):
        while not condition():
            assert process.poll() is None
            time.sleep(0.2)
        process.kill()
        process.wait()

    process = start("killed")
    wait(process, lambda: records() and np.load(records(), mmap_mode="r")["done"].mean() > 0.3)
    done = np.load(records())["done"].sum()
    process = start("killed")
    wait(process, (tmp_path / "killed" / "seed_1" / "checkpoint_partial.pth.tar").exists)
    assert done > 0.3 * 141400
    assert np.load(next((place / ".decoded").glob("*/images.npy")), mmap_mode="r").nbytes > 6e9
    for run in ("killed", "whole"):
        assert start(run).wait() == 0
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    images, seconds = next((place / ".decoded").glob("*/images.npy")), {"not cached": [], "mapped": [], "memory": []}
    for number, (form, found) in itertools.product(range(3), seconds.items()):
        if form == "not cached":
            with open(images) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        run = tmp_path / f"{form}_{number}"
        assert start(run.name, "memory" if form == "memory" else "limit").wait() == 0
        assert results(run) == results(tmp_path / "whole")
        found.append(json.loads((run / "seed_1" / "log.jsonl").read_text())["seconds"])
    print("seconds of an epoch, medians of 3:", {form: statistics.median(found) for form, found in seconds.items()})
