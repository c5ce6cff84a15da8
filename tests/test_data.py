import collections
import gzip
import hashlib
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.datasets import load_digits

import utils.datasets
from tests import files, reference
from utils import InputError
from utils.data import ImageSet, Preprocessing, batch_slices, coloured, generator, random_boxes
from utils.datasets import load_data, mislabel
from utils.files import load_array
from utils.places import PLACES

COLOUR = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.25), padding=4, flip=True)


def image_set(n=50, preprocessing=COLOUR, size=32, seed=0):
    random = np.random.default_rng(seed)
    shape = (n, size, size, len(preprocessing.mean))
    images = random.integers(0, 256, shape, dtype=np.uint8)
    return images, ImageSet(images, random.integers(0, 10, n), preprocessing)


@pytest.mark.parametrize("padding", [4, 0])
@pytest.mark.parametrize("size", [(32, 32, 3), (5, 7, 3), (8, 8, 1)])
def test_crop_equals_one_image_at_a_time(size, padding):
    """Also where an image is not a multiple of eight bytes, and where the array is a transposed one."""
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (size[2], 50, *size[:2]), dtype=np.uint8).transpose(1, 2, 3, 0)
    preprocessing = Preprocessing(COLOUR.mean[: size[2]], COLOUR.std[: size[2]], padding, flip=True)
    data = ImageSet(images, np.zeros(50, dtype=np.int64), preprocessing)
    index = np.append(random.integers(0, 50, 300), [0, 49])
    rows, columns = (np.append(random.integers(0, 2 * padding + 1, 300), [0, 2 * padding]) for _ in range(2))
    mirror = random.integers(0, 2, 302) == 1
    out = data.crop(*(torch.from_numpy(a) for a in (index, rows, columns, mirror)))
    for image, i, r, c, m in zip(out.numpy(), index, rows, columns, mirror, strict=True):
        assert (image == reference.crop(images[i], r, c, m, padding)).all()


def test_crop_equals_torchvision():
    from torchvision.transforms import functional as T

    images, data = image_set(8)
    for i, (row, column, mirror) in enumerate(
        [(0, 0, False), (8, 8, True), (4, 4, False), (1, 7, True), (5, 2, False)]
    ):
        picture = T.pad(torch.from_numpy(images[i]).permute(2, 0, 1), 4)
        expected = T.crop(picture, row, column, 32, 32)
        expected = T.hflip(expected) if mirror else expected
        out = data.crop(torch.tensor([i]), torch.tensor([row]), torch.tensor([column]), torch.tensor([mirror]))
        assert torch.equal(out[0].permute(2, 0, 1), expected)


def test_normalise_equals_torchvision():
    from torchvision import transforms

    images, data = image_set(5)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(COLOUR.mean, COLOUR.std)])
    expected = torch.stack([transform(image) for image in images])
    (out, labels), *rest = data.in_order(5)
    assert not rest
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(labels, data.labels)


def draws_of(data, seeds, padding):
    """Shift and mirror of each image of each epoch, read off images that hold their own coordinates."""
    found = []
    for seed in seeds:
        for _, images, _ in data.epoch(seed, 0, 500):
            rows, columns = (images[:, :2] * 255).round().long()[:, :, 16, 15:17].unbind(1)
            mirror = columns[:, 0] > columns[:, 1]
            # Of a mirrored image, output column 15 shows input column 16 of the crop.
            shift = torch.where(mirror, columns[:, 0] - 16, columns[:, 0] - 15)
            found += zip((rows[:, 0] - 16 + padding).tolist(), (shift + padding).tolist(), mirror.tolist(), strict=True)
    return found


def test_distribution_is_torchvisions():
    """Chi-square: the 9 x 9 shifts and the two orientations are equally likely and independent."""
    from torchvision.transforms import RandomCrop

    preprocessing = Preprocessing((0.0,) * 3, (1.0,) * 3, padding=4, flip=True)
    grid = np.stack(np.meshgrid(np.arange(32), np.arange(32), [0], indexing="ij"), axis=-1).reshape(32, 32, 3)
    data = ImageSet(np.tile(grid.astype(np.uint8), (4000, 1, 1, 1)), np.zeros(4000, dtype=np.int64), preprocessing)
    draws = collections.Counter(draws_of(data, range(5), 4))
    counts = [draws[r, c, m] for r in range(9) for c in range(9) for m in (False, True)]
    assert sum(counts) == 20000
    assert stats.chisquare(counts).pvalue > 1e-3
    torch.manual_seed(0)
    theirs = collections.Counter(RandomCrop.get_params(torch.zeros(3, 40, 40), (32, 32))[:2] for _ in range(20000))
    ours = collections.Counter()
    for (r, c, _), n in draws.items():
        ours[r, c] += n
    keys = sorted(ours)
    assert sorted(theirs) == keys
    assert stats.chi2_contingency([[ours[k] for k in keys], [theirs[k] for k in keys]]).pvalue > 1e-3


SCALED = Preprocessing((0.0,) * 3, (1.0,) * 3, flip=True, size=24, random_scale=True)


def test_scaled_crops_equal_torchvisions():
    """Its crop, scaled with antialiasing, of images in uint8: to one level, and mostly the same."""
    from torchvision.transforms import functional as T

    images, data = image_set(40, SCALED, size=28)
    boxes = random_boxes(np.random.RandomState(0), 40, 28)
    mirror = torch.arange(40) % 2 == 0
    found = data.crop_scaled(torch.arange(40), torch.from_numpy(boxes), mirror)
    for image, box, flip, out in zip(images, boxes.T.tolist(), mirror, found, strict=True):
        expected = T.resized_crop(torch.from_numpy(image).permute(2, 0, 1), *box, [24, 24], antialias=True)
        expected = (T.hflip(expected) if flip else expected).permute(1, 2, 0)
        differences = (out.int() - expected.int()).abs()
        assert differences.max() <= 1
        assert (differences == 0).float().mean() > 0.9


def test_scaled_crops_equal_the_twin():
    """In float64, of whole squares that shrink and of parts that grow."""
    images, data = image_set(8, SCALED, size=28)
    for top, left, side in ((0, 0, 28), (3, 5, 9), (27, 27, 1), (1, 2, 26)):
        boxes = torch.tensor([[top], [left], [side], [side]]).expand(4, 8)
        found = data.crop_scaled(torch.arange(8), boxes, torch.zeros(8, dtype=torch.bool))
        for image, out in zip(images, found.numpy(), strict=True):
            expected = reference.scaled(image[top : top + side, left : left + side], 24)
            assert np.abs(out - expected).max() <= 0.501


def test_distribution_of_scaled_crops_is_torchvisions():
    """Area, ratio and place, each by the test of Kolmogorov and Smirnov."""
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    arguments = torch.zeros(3, 60, 60), [0.08, 1.0], [3 / 4, 4 / 3]
    theirs = np.array([RandomResizedCrop.get_params(*arguments) for _ in range(4000)]).T
    ours = random_boxes(np.random.RandomState(1), 20000, 60)
    assert (ours[:2] + ours[2:]).max() == 60
    assert ours[:2].min() == 0
    for of in (
        lambda b: b[2] * b[3],
        lambda b: b[2] / b[3],
        lambda b: b[0] / (61 - b[2]),
        lambda b: b[1] / (61 - b[3]),
    ):
        assert stats.ks_2samp(of(ours), of(theirs)).pvalue > 1e-3


def test_scaled_crops_belong_to_the_image_and_the_epoch():
    images, data = image_set(30, SCALED, size=28)
    small, large = epoch_of(data, 13, 2, 7), epoch_of(data, 13, 2, 30)
    assert torch.equal(torch.cat([i for i, _, _ in small]), large[0][0])
    torch.testing.assert_close(torch.cat([x for _, x, _ in small]), large[0][1], rtol=0, atol=1 / 255 + 1e-6)
    boxes = torch.from_numpy(random_boxes(generator(13, 2, "augmentation"), 30, 28))
    crops = data.normalise(data.crop_scaled(torch.arange(30), boxes, torch.zeros(30, dtype=torch.bool)))
    for i, image in zip(large[0][0], large[0][1], strict=True):
        nearest = min((image - crop).abs().max() for crop in (crops[i], crops[i].flip(2)))
        assert nearest <= 1 / 255 + 1e-6
    assert not same(large, epoch_of(data, 13, 3, 30))
    assert same(large, epoch_of(data, 13, 2, 30))
    assert torch.equal(next(data.in_order(30))[0], data.normalise(torch.from_numpy(images[:, 2:26, 2:26])))


def epoch_of(data, *arguments):
    return [(i.clone(), x.clone(), y.clone()) for i, x, y in data.epoch(*arguments)]


def same(a, b):
    return all(torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True))


def test_an_epoch_is_a_function_of_seed_and_epoch():
    _, data = image_set()
    first = epoch_of(data, 13, 2, 16)
    torch.manual_seed(99)
    np.random.seed(5)
    list(data.in_order(8))
    assert same(first, epoch_of(data, 13, 2, 16))
    assert not same(first, epoch_of(data, 13, 3, 16))
    assert not same(first, epoch_of(data, 17, 2, 16))
    index = torch.cat([i for i, _, _ in first])
    assert torch.equal(index.sort().values, torch.arange(50))
    assert torch.equal(torch.cat([y for _, _, y in first]), data.labels[index])


def test_augmentation_belongs_to_the_image_not_to_its_batch():
    _, data = image_set()
    small, large = epoch_of(data, 13, 2, 7), epoch_of(data, 13, 2, 50)
    assert torch.equal(torch.cat([x for _, x, _ in small]), large[0][1])


def test_no_augmentation_where_there_is_none():
    _, data = image_set(20, Preprocessing((0.5,), (0.5,)), size=8)
    plain = next(data.in_order(20))[0]
    for index, images, _ in data.epoch(1, 1, 6):
        assert torch.equal(images, plain[index])


def test_a_last_batch_of_one_joins_the_one_before():
    assert [s.stop - s.start for s in batch_slices(257, 128)] == [128, 129]
    assert [s.stop - s.start for s in batch_slices(258, 128)] == [128, 128, 2]
    assert [s.stop - s.start for s in batch_slices(1, 128)] == [1]
    assert [s.stop - s.start for s in batch_slices(100, 128)] == [100]


def test_digits():
    data = load_data("digits")
    assert (len(data.train), len(data.val), len(data.test)) == (809, 89, 899)
    pixels = torch.cat([x for x, _ in data.train.in_order(100)])
    assert abs(pixels.mean()) < 0.02
    assert abs(pixels.std() - 1) < 0.02
    # Three parts without an image in common.
    every = torch.cat([x.flatten(1) for part in (data.train, data.val, data.test) for x, _ in part.in_order(500)])
    assert len(torch.unique(every, dim=0)) == 1797
    # The reader's twin: scikit-learn's own.
    images = np.concatenate([part.images.numpy()[..., 0] for part in (data.train, data.val, data.test)])
    labels = np.concatenate([part.labels.numpy() for part in (data.train, data.val, data.test)])
    whole = load_digits()
    expected = np.round(whole.images * 255 / 16).astype(np.uint8)
    ours, theirs = (sorted(zip(map(bytes, x), y, strict=True)) for x, y in ((images, labels), (expected, whole.target)))
    assert ours == theirs


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("old_numpy", [True, False])
def test_cifar(name, place, old_numpy, tmp_path):
    folder = files.write_cifar(tmp_path / PLACES[name][place], name, images=20, old_numpy=old_numpy)
    data = load_data(name, tmp_path)
    total = 100 if name == "cifar10" else 20
    assert (len(data.train), len(data.val), len(data.test)) == (total - total // 10, total // 10, 20)
    batch = pickle.loads((folder / ("test_batch" if name == "cifar10" else "test")).read_bytes())
    image = batch["data"][3].reshape(3, 32, 32).transpose(1, 2, 0)
    assert (data.test.images[3].numpy() == image).all()
    assert data.test.labels.tolist() == batch["labels" if name == "cifar10" else "fine_labels"]
    assert len(data.record["files"]) == (6 if name == "cifar10" else 2)
    assert not any(file["md5_is_the_published_one"] for file in data.record["files"])


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("labels", [np.arange(6), list(np.arange(6, dtype=np.uint8)), tuple(range(6))])
def test_cifar_written_by_hand_in_any_protocol(labels, protocol, tmp_path):
    files.write_cifar(tmp_path)
    batch = {b"data": np.zeros((6, 3072), np.uint8), b"labels": labels}
    for i in range(1, 6):
        (tmp_path / f"data_batch_{i}").write_bytes(pickle.dumps(batch, protocol=protocol))
    assert len(load_data("cifar10", tmp_path).train) == 27


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda p: pickle.dumps({"data": files.Call(os.system, f"touch {p}"), "labels": []}),
            "refers to posix.system.*nothing in it was executed",
        ),
        (lambda p: pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}), "0 to 9, got 0 to 10"),
        (lambda p: pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, -1]}), "0 to 9, got -1 to 0"),
        (lambda p: pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}), "one whole number .*for each"),
        (lambda p: pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": ["a", {}]}), "one whole number"),
        (lambda p: pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}), "one whole number"),
        (lambda p: pickle.dumps({"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]}), r"uint8 \[2, 3071\]"),
        (lambda p: pickle.dumps({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}), "float32"),
        (lambda p: pickle.dumps({"data": np.array([{}, {}]), "labels": [0, 1]}), "array of object"),
        (lambda p: pickle.dumps([1, 2]), "expected a dict, got a list"),
        (lambda p: pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}, 2)[:500], "too early"),
        (lambda p: pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}, 5)[:500], "not a CIFAR batch .pickle exhaust"),
        (lambda p: b"", "data_batch_3: empty"),
        (lambda p: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "a git-lfs pointer"),
        (lambda p: b"\n<!DOCTYPE html><html>", "a web page"),
        (lambda p: pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [np.float32(0)] * 2}), "list of 2"),
        (lambda p: pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 1]}), "no such entry"),
        # numpy's array constructor asked for 10^13 bytes
        (lambda p: b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I10000000000000\ntS'b'\ntR.", "a form"),
    ],
)
def test_bad_cifar_batches(content, message, tmp_path):
    files.write_cifar(tmp_path)
    marker = tmp_path / "executed"
    (tmp_path / "data_batch_3").write_bytes(content(marker))
    with pytest.raises(InputError, match=message) as error:
        load_data("cifar10", tmp_path)
    assert "data_batch_3" in str(error.value)
    assert not marker.exists()


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(InputError, match=r"--data_path .*no cifar10 found.*cifar-10-batches-py.*--download"):
        load_data("cifar10", tmp_path / "nowhere")
    with pytest.raises(InputError, match="no tiny_imgnet found"):
        load_data("tiny_imgnet", tmp_path)
    files.write_cifar(tmp_path)
    (tmp_path / "data_batch_4").unlink()
    with pytest.raises(InputError, match=r"no cifar10 found; .* lacks data_batch_4; unpack .*, or --download"):
        load_data("cifar10", tmp_path)


def test_two_sets_in_one_folder(tmp_path):
    files.write_cifar(tmp_path, "cifar10")
    files.write_cifar(tmp_path, "cifar100")
    assert len(load_data("cifar10", tmp_path).train) == 90
    assert len(load_data("cifar100", tmp_path).train) == 18


@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist(zipped, tmp_path):
    files.write_fashion_mnist(tmp_path / "fashion-mnist", zipped=zipped)
    data = load_data("fashion_mnist", tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (36, 4, 20)
    images, labels = next(data.test.in_order(20))
    assert images.shape == (20, 1, 32, 32)
    assert labels.tolist() == [i % 10 for i in range(20)]
    border = (0 - 0.2190) / 0.3318
    assert images[:, :, :2].unique().tolist() == pytest.approx([border], abs=1e-5)
    raw = np.random.default_rng(0)
    raw.integers(0, 256, (40, 28, 28), dtype=np.uint8)
    assert (data.test.images[5, 2:-2, 2:-2, 0].numpy() == raw.integers(0, 256, (20, 28, 28), dtype=np.uint8)[5]).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-1], "promises"),
        (lambda b: b + b"x", "more follow"),
        (lambda b: b"\x00" + b[:-1], "header"),
        (lambda b: b[:10], "not a readable IDX file"),
        (lambda b: b"", "empty"),
        (lambda b: b"<html>", "a web page"),
        (lambda b: b[:4] + b"\xff\xff\xff\xff" + b[8:], "more than the file can hold"),
    ],
)
def test_damaged_idx(damage, message, tmp_path):
    files.write_fashion_mnist(tmp_path, zipped=False)
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        load_data("fashion_mnist", tmp_path)


def test_damaged_gzip(tmp_path):
    files.write_fashion_mnist(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="not a readable IDX file"):
        load_data("fashion_mnist", tmp_path)


@pytest.mark.parametrize("val_folders", [False, True])
def test_tiny_imagenet(val_folders, tmp_path):
    files.write_tiny_imagenet(tmp_path / "tiny-imagenet-200", val_folders=val_folders)
    data = load_data("tiny_imgnet", tmp_path)
    assert (len(data.train), len(data.val), len(data.test)) == (11, 1, 6)
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for part in (data.train, data.val, data.test):
        gaps = part.images.float().mean(dim=(1, 2, 3)) - (40 + 60 * part.labels)
        assert gaps.abs().max() < 5  # label and image belong together


def test_bad_tiny_imagenet(tmp_path):
    folder = files.write_tiny_imagenet(tmp_path / "a")
    (folder / "val" / "val_annotations.txt").unlink()
    with pytest.raises(InputError, match=r"val_annotations\.txt: missing"):
        load_data("tiny_imgnet", folder)
    folder = files.write_tiny_imagenet(tmp_path / "b", val_folders=True)
    for path in sorted((folder / "val").iterdir())[1:]:
        path.rename(folder / path.name)
    with pytest.raises(InputError, match=r"the class folders of .*train, but it lacks n00001007, n00001014; unpack"):
        load_data("tiny_imgnet", folder)
    folder = files.write_tiny_imagenet(tmp_path / "c")
    next((folder / "train").glob("*/images/*")).write_bytes(b"no picture")
    with pytest.raises(InputError, match="not a readable image"):
        load_data("tiny_imgnet", folder)
    folder = files.write_tiny_imagenet(tmp_path / "d")
    (folder / "wnids.txt").write_text("n00000001\n")
    problem = r"the classes of .*wnids\.txt, but it lacks n00000001 and also has n00001000, n00001007, n00001014;"
    with pytest.raises(InputError, match=problem):
        load_data("tiny_imgnet", folder)


def of_class(folder, number=1):
    return sorted((folder / "train").iterdir())[number] / "images"


def sort_val(folder, place):
    """Move the images of val/images/ to folders of their classes, as scripts on the web do; those of some."""
    for line in (folder / "val/val_annotations.txt").read_text().splitlines():
        file, wnid = line.split("\t")[:2]
        (folder / place / wnid).mkdir(parents=True, exist_ok=True)
        (folder / "val/images" / file).rename(folder / place / wnid / file)


def with_windows_lines(folder):
    for path in (folder / "wnids.txt", folder / "val/val_annotations.txt"):
        path.write_bytes(b"\xef\xbb\xbf\r\n" + path.read_bytes().replace(b"\n", b"\r\n") + b" \r\n\r\n")


def with_junk(folder):
    for place in (of_class(folder), folder / "train", folder / "val", folder / "val/images", folder):
        for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._x.JPEG"):
            (place / name).write_bytes(b"\0\5\x16\7")
        for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", "#recycle"):
            (place / name).mkdir()
            (place / name / "x.JPEG").write_bytes(b"a thumbnail")


def flatten(folder):
    for path in (folder / "train").glob("*/images/*"):
        path.rename(path.parent.parent / path.name)


def without_annotation_folder(folder):
    for path in (folder / "val/images").iterdir():
        path.rename(folder / "val" / path.name)
    (folder / "val/images").rmdir()


def convert(folder, end, kind):
    for path in folder.rglob("*.JPEG"):
        with Image.open(path) as image:
            image.save(path.with_suffix(end), kind)
        path.unlink()


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: sort_val(folder, "val/images"),
        lambda folder: sort_val(folder, "val"),  # val/images/ stays behind, empty
        without_annotation_folder,
        flatten,
        with_windows_lines,
        with_junk,
        lambda folder: (folder / "wnids.txt").unlink(),
        lambda folder: convert(folder, ".png", "PNG"),
        lambda folder: [p.rename(p.with_suffix(".jpg")) for p in folder.rglob("*.JPEG")],
        lambda folder: [p.rename(p.with_suffix(".jpeg")) for p in (folder / "train").rglob("*.JPEG")],
    ],
)
def test_forms_of_tiny_imagenet(change, tmp_path):
    """All are read as the form that is unpacked, with the same images and labels."""
    folder = files.write_tiny_imagenet(tmp_path, per_class=5)
    before = load_data("tiny_imgnet", folder).record["sha256_of_arrays_and_split"]
    change(folder)
    data = load_data("tiny_imgnet", folder)
    assert data.record["sha256_of_arrays_and_split"] == before
    assert data.record["files"][0]["classes"] == ["n00001000", "n00001007", "n00001014"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: [p.unlink() for p in of_class(f).iterdir()], r"train: no images .* in n00001007; unpack"),
        (lambda f: shutil.rmtree(of_class(f).parent), r"wnids\.txt, but it lacks n00001007; unpack"),
        (
            lambda f: (f / "val/images/val_3.JPEG").unlink(),
            r"annotations\.txt: names val_3\.JPEG, which .*images lacks",
        ),
        (lambda f: (f / "val/images/val_9.jpg").write_bytes(b"x"), r"names 6 of the 7 images of .*, not val_9\.jpg;"),
        (lambda f: (f / "val/val_annotations.txt").write_text("val_0.JPEG\tn00001000\n"), "names 1 of the 6 images"),
        (lambda f: (f / "val/val_annotations.txt").write_text("\n"), "names 0 of the 6 images"),
        (lambda f: (sort_val(f, "val/images"), (f / "val/images/a.JPEG").touch()), "1 images beside class folders"),
        (lambda f: (sort_val(f, "val"), shutil.rmtree(f / "val/n00001014")), "lacks n00001014"),
        (lambda f: Image.new("RGB", (32, 64)).save(of_class(f) / "a.jpg"), r"a\.jpg: .*64x64 pixels, got 32x64"),
        (lambda f: Image.new("RGB", (64, 64)).save(of_class(f) / "a.jpg", "WEBP"), "neither JPEG nor PNG"),
        (lambda f: Image.fromarray(np.zeros((64, 64), np.uint16)).save(of_class(f) / "a.png"), "8 bits a channel"),
        (lambda f: (of_class(f) / "a.JPEG").write_bytes(next(of_class(f).iterdir()).read_bytes()[:-99]), "truncated"),
        (lambda f: (f / "wnids.txt").write_bytes("n1\n".encode("utf-16")), r"wnids\.txt: not a text in UTF-8"),
    ],
)
def test_incomplete_tiny_imagenet(change, message, tmp_path):
    folder = files.write_tiny_imagenet(tmp_path, per_class=5)
    change(folder)
    with pytest.raises(InputError, match=message):
        load_data("tiny_imgnet", folder)


def notes(capsys, *arguments, **options):
    """What is said while a set is read."""
    utils.datasets.note.cache_clear()
    load_data(*arguments, **options)
    return capsys.readouterr().err


def test_sets_that_are_not_the_published_ones_are_named(tmp_path, capsys):
    assert notes(capsys, "digits") == ""
    folder = files.write_tiny_imagenet(tmp_path / "tiny", per_class=6)
    next(of_class(folder).iterdir()).unlink()
    line = notes(capsys, "tiny_imgnet", folder)
    assert re.fullmatch(r"note: --data tiny_imgnet: not the published set: 17 training and 6 test images, .*\n", line)
    assert "197 of 200 classes have no training images; classes have 5 to 6 training images" in line
    line = notes(capsys, "cifar100", files.write_cifar(tmp_path / "c", "cifar100", images=24))
    assert "classes have no test images; the md5 of train, test differs" in line
    folder = files.write_fashion_mnist(tmp_path / "f", zipped=False)
    line = notes(capsys, "fashion_mnist", folder)
    assert "40 training and 20 test images, published are 60000 and 10000; the md5 of" in line
    assert "MNIST:" not in line
    path = folder / "train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:8] + bytes([5, 0, 4, 1, 9, 2, 1, 3, 1, 4, 3, 5, 3, 6, 1, 7] + [0] * 24))
    assert "its labels are those of MNIST;" in notes(capsys, "fashion_mnist", folder)


def test_the_published_set_is_not_commented(tmp_path, monkeypatch, capsys):
    """Whoever packed it: the md5 of what is in the archive counts. Said once, whatever loads it how often."""
    folder = files.write_fashion_mnist(tmp_path)
    contents = [gzip.decompress(path.read_bytes()) for path in folder.iterdir()]
    monkeypatch.setattr(utils.datasets, "IDX_MD5", {hashlib.md5(content).hexdigest() for content in contents})
    monkeypatch.setitem(utils.datasets.COUNTS, "fashion_mnist", (40, 20))
    assert notes(capsys, "fashion_mnist", folder) == ""
    assert all(file["md5_is_the_published_one"] for file in load_data("fashion_mnist", folder).record["files"])
    monkeypatch.setitem(utils.datasets.COUNTS, "fashion_mnist", (41, 20))
    assert notes(capsys, "fashion_mnist", folder).count("\n") == 1
    load_data("fashion_mnist", folder)
    assert capsys.readouterr().err == ""


def test_fewer_than_ten_training_images(tmp_path):
    folder = files.write_fashion_mnist(tmp_path, train=9)
    with pytest.raises(
        InputError, match=r"expected 10 or more training images of fashion_mnist, got 9.*--val_idx_path"
    ):
        load_data("fashion_mnist", folder)
    np.save(tmp_path / "t.npy", np.arange(6))
    np.save(tmp_path / "v.npy", np.arange(6, 9))
    data = load_data("fashion_mnist", folder, train_idx_path=tmp_path / "t.npy", val_idx_path=tmp_path / "v.npy")
    assert (len(data.train), len(data.val)) == (6, 3)
    assert len(load_data("fashion_mnist", files.write_fashion_mnist(tmp_path / "ten", train=10)).val) == 1


@pytest.mark.parametrize("spelling", ["{}", "{}.gz"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
def test_names_of_idx_files(spelling, packed, dotted, tmp_path):
    """Packed or not, whatever the name says; and a dot for the last dash but one."""
    folder = files.write_fashion_mnist(tmp_path, zipped=packed)
    digest = load_data("fashion_mnist", folder).record["sha256_of_arrays_and_split"]
    for path in list(folder.iterdir()):
        name = path.name.removesuffix(".gz")
        path.rename(folder / spelling.format(name.replace("-idx", ".idx") if dotted else name))
    assert load_data("fashion_mnist", folder).record["sha256_of_arrays_and_split"] == digest
    for path in list(folder.iterdir()):  # as unpacked by some programs
        path.rename(folder / "x")
        (folder / path.name.removesuffix(".gz")).mkdir()
        (folder / "x").rename(folder / path.name.removesuffix(".gz") / path.name.replace(".idx", "-idx"))
    assert load_data("fashion_mnist", folder).record["sha256_of_arrays_and_split"] == digest


def test_grey_is_pillows():
    pixels = np.random.RandomState(0).randint(0, 256, (1, 1000, 1000, 3), dtype=np.uint8)
    wanted = np.asarray(Image.fromarray(pixels[0]).convert("L"))
    images = torch.from_numpy(pixels)
    assert torch.equal(coloured(images, 1)[0, :, :, 0], torch.tensor(wanted))
    assert (coloured(images.float(), 1)[0, :, :, 0] - torch.tensor(wanted)).abs().max() < 0.51
    assert torch.equal(coloured(images[..., :1], 3), images[..., :1].repeat(1, 1, 1, 3))


def test_given_split(tmp_path):
    np.save(tmp_path / "train.npy", np.array([5, 3, 1]))
    np.save(tmp_path / "val.npy", np.array([0, 2]))
    data = load_data("digits", train_idx_path=tmp_path / "train.npy", val_idx_path=tmp_path / "val.npy")
    assert (len(data.train), len(data.val), len(data.test)) == (3, 2, 899)
    whole = load_data("digits")
    assert data.record["sha256_of_arrays_and_split"] != whole.record["sha256_of_arrays_and_split"]
    with pytest.raises(InputError, match="go together"):
        load_data("digits", train_idx_path=tmp_path / "train.npy")
    for bad, message in (
        (np.array([0, 0]), "distinct .* got some of them twice"),
        (np.array([9999]), "0 to 897, got 9999 to 9999"),
        (np.array([-1, 4]), "0 to 897, got -1 to 4"),
        (np.arange(2000), "0 to 897, got 0 to 1999"),  # of a larger set
        (np.array([0.5]), r"an \.npy list of whole numbers, got float64 \[1\]"),
        (np.array([[0], [2]]), r"got int64 \[2, 1\]"),
        (np.arange(898) < 9, r"got bool \[898\]; numpy\.flatnonzero makes one of a mask"),
        (np.array([], dtype=int), "whole numbers"),
        (np.array([1]), "share samples"),
    ):
        np.save(tmp_path / "val.npy", bad)
        with pytest.raises(InputError, match=message):
            load_data("digits", train_idx_path=tmp_path / "train.npy", val_idx_path=tmp_path / "val.npy")
    bad = files.Call(os.system, f"touch {tmp_path / 'executed'}")
    np.save(tmp_path / "val.npy", np.array([bad]), allow_pickle=True)
    with pytest.raises(InputError, match=r"not a readable \.npy"):
        load_data("digits", train_idx_path=tmp_path / "train.npy", val_idx_path=tmp_path / "val.npy")
    assert not (tmp_path / "executed").exists()


def test_a_split_is_refused_before_images_are_read_or_downloaded(tmp_path, monkeypatch):
    def never(*words, **more):
        raise AssertionError

    for name in ("_read_published", "_read_digits", "read_images"):
        monkeypatch.setattr(utils.datasets, name, never)
    np.save(tmp_path / "good.npy", np.arange(4))
    np.save(tmp_path / "mask.npy", np.arange(4) < 2)
    files.write_image_folder(tmp_path / "parts", {"train/a": 1, "train/b": 1, "val/a": 1, "val/b": 1})
    good, mask, gone = (tmp_path / f"{name}.npy" for name in ("good", "mask", "gone"))
    for data, place in (("cifar10", tmp_path), ("digits", tmp_path), ("folder", tmp_path / "parts")):
        more = {"download": data == "cifar10"}
        for train, val, message in (
            (good, None, "--train_idx_path and --val_idx_path go together"),
            (None, good, "--train_idx_path and --val_idx_path go together"),
            (good, gone, "--val_idx_path .*gone.npy: "),
            (mask, good, "--train_idx_path .*mask.npy: expected an .npy list of whole numbers"),
        ):
            with pytest.raises(InputError, match=message):
                load_data(data, place, train_idx_path=train, val_idx_path=val, **more)
    for part in ("a", "b"):
        (tmp_path / "parts" / "test" / part).mkdir(parents=True)
    with pytest.raises(InputError, match="has val/; leave both out"):
        load_data("folder", tmp_path / "parts", train_idx_path=good, val_idx_path=good)


def test_the_split_never_moves():
    """Pinned: a split that changes with a library's version would put validation images into training."""
    data = load_data("digits")
    assert data.record["sha256_of_arrays_and_split"].startswith("62d7be14b0b3")


def test_mislabel():
    """Every other class, about equally often; the same draw each time; a larger share has the smaller one's samples."""
    labels = np.random.default_rng(0).integers(0, 10, 20_000)
    noisy, wrong = mislabel(labels, 10, 0.5)
    assert wrong.sum() == 10_000
    assert ((noisy != labels) == wrong).all()
    counts = np.zeros((10, 10))
    np.add.at(counts, (labels[wrong], noisy[wrong]), 1)
    expected = counts.sum(axis=1, keepdims=True) / 9
    off = ~np.eye(10, dtype=bool)
    assert (((counts - expected) ** 2 / expected)[off]).sum() < 130  # chi-squared of 80 degrees: 99.95 %
    assert (mislabel(labels, 10, 0.5)[0] == noisy).all()
    assert (mislabel(labels, 10, 0.2)[1] <= wrong).all()
    assert not mislabel(labels, 10, 0.0)[1].any()
    assert (mislabel(labels, 10, 1.0)[0] != labels).all()


@pytest.mark.parametrize("augmentation", ["flip", "none"])
def test_less_augmentation(augmentation, tmp_path):
    folder = files.write_fashion_mnist(tmp_path, train=40, test=10)
    data = load_data("fashion_mnist", folder, augmentation=augmentation)
    assert data.train.digest() == load_data("fashion_mnist", folder).train.digest()
    index, images, _ = next(data.train.epoch(3, 0, 36))
    plain = data.train.batch(index.numpy())[0]
    kept = (images == plain).flatten(1).all(dim=1)
    mirrored = (images == plain.flip(3)).flatten(1).all(dim=1)
    assert (kept | mirrored).all()
    assert bool((~kept).any()) == (augmentation == "flip")


def test_an_array_with_more_bytes_than_its_header_says(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(5))
    assert load_array(path).tolist() == [0, 1, 2, 3, 4]
    with path.open("ab") as file:
        file.write(bytes(8))
    with pytest.raises(InputError, match=r"x\.npy: .*longer than its header says"):
        load_array(path)
