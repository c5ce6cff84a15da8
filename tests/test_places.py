"""Where data sets are found, what is said where they are not, and downloads."""

import errno
import fcntl
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torchvision

import main
from tests import files
from tests.commands import call
from utils import InputError, places
from utils.datasets import load_data

WRITE = {"tiny_imgnet": lambda folder: files.write_tiny_imagenet(folder, per_class=5)}
WRITE |= {"fashion_mnist": files.write_fashion_mnist, "cifar10": files.write_cifar}
WRITE["cifar100"] = lambda folder: files.write_cifar(folder, "cifar100")
TRAIN = {"tiny_imgnet": 14, "fashion_mnist": 36, "cifar10": 90, "cifar100": 18}


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("cifar10", "cifar-10-batches-py/cifar-10-batches-py"),
        ("cifar10", "cifar-10-python/cifar-10-batches-py"),
        ("cifar10", "CIFAR10"),
        ("cifar10", "data/cifar-10-batches-py"),
        ("cifar100", "cifar-100-python.tar/cifar-100-python"),
        ("cifar100", "datasets/CIFAR_100/cifar-100-python"),
        ("fashion_mnist", "fashion-mnist-master/data/fashion"),
        ("fashion_mnist", "raw"),
        ("fashion_mnist", "FashionMNIST"),
        ("fashion_mnist", "f-mnist"),
        ("tiny_imgnet", "tiny-imagenet-200/tiny-imagenet-200"),
        ("tiny_imgnet", "Tiny-ImageNet"),
    ],
)
def test_spellings_and_nested_folders(name, place, tmp_path):
    WRITE[name](tmp_path / place)
    assert places.find(name, tmp_path) == tmp_path / place
    assert len(load_data(name, tmp_path).train) == TRAIN[name]


@pytest.mark.parametrize("name", WRITE)
def test_a_folder_counts_only_with_all_its_files(name, tmp_path):
    """The first place is empty; files of the same names in the folder itself are something else."""
    whole = WRITE[name](tmp_path / places.PLACES[name][1])
    assert places.find(name, tmp_path) == whole
    if name == "tiny_imgnet":  # another set with train/ and val/
        touch(tmp_path, "train/cats/1.png", "train/dogs/1.png", "val/cats/1.png")
    elif name == "cifar100":
        touch(tmp_path, "train/cats/1.png", "test/cats/1.png")
    else:
        lacking = WRITE[name](tmp_path)
        next(path for path in sorted(lacking.iterdir()) if path.is_file()).unlink()
    (tmp_path / places.PLACES[name][0]).mkdir()
    assert places.find(name, tmp_path) == whole
    assert len(load_data(name, tmp_path).train) == TRAIN[name]


@pytest.mark.parametrize("name", WRITE)
def test_usual_subfolders_are_tried_before_the_folder_itself(name, tmp_path):
    """MNIST has files of the same names as Fashion-MNIST."""
    WRITE[name](tmp_path)
    assert places.find(name, tmp_path) == tmp_path
    whole = WRITE[name](tmp_path / places.PLACES[name][1])
    assert places.find(name, tmp_path) == whole


def test_tiny_imagenet_without_a_list_of_classes(tmp_path):
    """Worked before: the folder that is given is the set."""
    folder = WRITE["tiny_imgnet"](tmp_path)
    (folder / "wnids.txt").unlink()
    assert places.find("tiny_imgnet", tmp_path) == tmp_path


def refusal(name, data_path, **options):
    with pytest.raises(InputError) as error:
        load_data(name, data_path, **options)
    line = str(error.value)
    assert "\n" not in line
    assert f"--data_path {data_path}: no {name} found; " in line
    return line


@pytest.mark.parametrize(
    ("name", "archive", "command"),
    [
        ("cifar10", "cifar-10-python.tar.gz", "tar -xf {} -C {}"),
        ("cifar10", "cifar-10-python (1).tar", "tar -xf {} -C {}"),
        ("cifar10", "cifar10/cifar-10-batches-py.tar.gz", "tar -xf {} -C {}"),
        ("cifar100", "cifar100.tgz", "tar -xf {} -C {}"),
        ("fashion_mnist", "FashionMNIST.zip", "unzip -qo {} -d {}"),
        ("tiny_imgnet", "tiny-imagenet-200.zip", "unzip -qo {} -d {}"),
        ("tiny_imgnet", "tiny-imagenet-200/TINY-IMAGENET-200.ZIP", "unzip -qo {} -d {}"),
    ],
)
@pytest.mark.parametrize("direct", [False, True])
def test_archives_that_are_not_unpacked(name, archive, command, direct, tmp_path):
    touch(tmp_path, archive, "CIFAR-10-C.tar", "CIFAR-100-C.tar", "Tiny-ImageNet-C.tar", "Tiny-ImageNet-C-extra.tar")
    path = tmp_path / archive
    words = [f"'{path}'" if " " in str(path) else str(path), str(path.parent)]
    line = refusal(name, path if direct else tmp_path)
    assert f"{path} is not unpacked: unpack it ({command.format(*words)})" in line
    assert line.endswith(", or --download") == (name != "tiny_imgnet")


def test_a_corrupted_set_is_not_taken_for_the_set(tmp_path):
    touch(tmp_path, "CIFAR-10-C.tar", "CIFAR-100-C.tar", "Tiny-ImageNet-C.tar", "Tiny-ImageNet-C-extra.tar")
    for name in ("cifar10", "cifar100", "tiny_imgnet"):
        assert "unpack" not in refusal(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "there", "what"),
    [
        ("cifar10", "cifar-10-batches-bin/data_batch_1.bin", "is of the binary version"),
        ("cifar10", "data_batch_1.bin", "is of the binary version"),
        ("cifar100", "cifar-100-binary/train.bin", "is of the binary version"),
        ("cifar10", "cifar-10-batches-mat/data_batch_1.mat", "is of the Matlab version"),
        ("cifar10", "cifar-10-binary.tar.gz", "is of the binary or Matlab version"),
        ("cifar10", "cifar10/train/cat/1.png", "holds folders of images"),
        ("cifar100", "cifar100/plain_text/train-0.parquet", "is of the .parquet form"),
        ("fashion_mnist", "fashion-mnist_train.csv", "is a table"),
        ("tiny_imgnet", "tiny-imagenet/data/train-0.parquet", "is of the .parquet form"),
    ],
)
def test_sets_in_other_forms_are_named(name, there, what, tmp_path):
    touch(tmp_path, there, "other.csv", "weights.bin", "raw.npz")
    line = refusal(name, tmp_path)
    path = tmp_path / there
    assert f"{path.parent.parent if what.endswith('images') else path} {what}, which this program does not read" in line
    assert places.SOURCES[name] in line


def test_the_wrong_level(tmp_path):
    cifar, tiny = WRITE["cifar10"](tmp_path / "cifar-10-batches-py"), WRITE["tiny_imgnet"](tmp_path / "tiny")
    for given in (cifar / "data_batch_1", tmp_path / "cifar10"):
        assert f"it is in {cifar}: give this folder, or --download" in refusal("cifar10", given)
    assert f"it is in {tiny}: give this folder" in refusal("tiny_imgnet", tiny / "train")


def test_what_is_missing_and_what_is_there_is_named(tmp_path):
    folder = WRITE["fashion_mnist"](tmp_path / "fashion-mnist")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    line = refusal("fashion_mnist", tmp_path)
    assert f"found; {folder} lacks t10k-labels-idx1-ubyte; unpack the archive anew, or --download" in line
    folder = WRITE["tiny_imgnet"](tmp_path / "tiny-imagenet-200")
    (folder / "val").rename(folder / "validation")
    assert f"found; {folder} lacks val/; unpack the archive anew" in refusal("tiny_imgnet", tmp_path)
    assert "there is no such folder" in refusal("cifar100", tmp_path / "nowhere")
    touch(tmp_path / "x", *"abcdefg", ".hidden")
    line = refusal("cifar100", tmp_path / "x")
    assert f"looked for train, test in {tmp_path / 'x/cifar100'}, " in line
    assert f", {tmp_path / 'x'}; found there: a, b, c, d, e and 2 more; give the folder" in line
    assert "it is a file" in refusal("cifar100", tmp_path / "x" / "a")


# Downloads
def source(monkeypatch, name, fetch):
    """The class of a set in torchvision, without a network: `fetch` makes the set in a folder."""
    kind = {"cifar10": "CIFAR10", "fashion_mnist": "FashionMNIST"}[name]

    class Source(getattr(torchvision.datasets, kind)):
        def __init__(self, root, download):
            fetch(Path(root))

    monkeypatch.setattr(torchvision.datasets, kind, Source)
    return Source


def fetches(monkeypatch, name, calls):
    place = "cifar-10-batches-py" if name == "cifar10" else "FashionMNIST/raw"

    def fetch(root):
        calls.append(root)
        WRITE[name](root / place)

    source(monkeypatch, name, fetch)
    return place


@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
@pytest.mark.parametrize("state", ["nothing", "a file is missing", "a file is cut", "whole"])
def test_download_completes_a_set(name, state, tmp_path, monkeypatch, capsys):
    calls = []
    folder = tmp_path / "data" / fetches(monkeypatch, name, calls)
    if state != "nothing":
        WRITE[name](folder)
        path = sorted(folder.iterdir())[2]
        good = path.read_bytes()
        if state == "a file is missing":
            path.unlink()
        elif state == "a file is cut":
            path.write_bytes(good[:-100])
            with pytest.raises(InputError, match=f"{path.name}.*; --download fetches the published set"):
                load_data(name, tmp_path / "data")
    assert len(load_data(name, tmp_path / "data", download=True).train) == TRAIN[name]
    assert len(calls) == (state != "whole")
    assert ("; the published set is fetched\n" in capsys.readouterr().err) == (state == "a file is cut")
    assert state in ("nothing", "whole") or path.read_bytes() == good
    assert len(load_data(name, tmp_path / "data").train) == TRAIN[name]
    left = {path.name for path in (tmp_path / "data").iterdir() if path.name.startswith(".")}
    assert left <= {".download.lock"}


def test_a_download_that_breaks_off_leaves_nothing_half(tmp_path, monkeypatch):
    def broken(root):
        touch(root, "cifar-10-batches-py/data_batch_1")
        raise RuntimeError("Error downloading it:\nTried a mirror, got:\n<urlopen error [Errno 111] refused>\n")

    source(monkeypatch, "cifar10", broken)
    touch(tmp_path, ".download-of a process that was killed/x")
    message = r"--download: cifar10 could not be fetched \(Error .* refused>\); INSTALL\.md says how to get it by hand"
    with pytest.raises(InputError, match=message) as error:
        load_data("cifar10", tmp_path, download=True)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] in ([".download.lock"], [])


def test_an_archive_that_is_there_is_used(tmp_path, monkeypatch):
    """As torchvision would; one with another md5 is fetched anew and not written into."""
    seen = []
    kind = source(monkeypatch, "cifar10", lambda root: seen.append({path.name for path in root.iterdir()}))
    monkeypatch.setattr(kind, "tgz_md5", "d41d8cd98f00b204e9800998ecf8427e")
    touch(tmp_path, "cifar-10-python.tar.gz")
    places.fetch("cifar10", tmp_path)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half")
    places.fetch("cifar10", tmp_path)
    assert seen == [{"cifar-10-python.tar.gz"}, set()]
    assert (tmp_path / "cifar-10-python.tar.gz").read_bytes() == b"half"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number, tmp_path, monkeypatch):
    def flock(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    calls = []
    fetches(monkeypatch, "cifar10", calls)
    assert len(load_data("cifar10", tmp_path, download=True).train) == 90
    assert len(calls) == 1


def test_processes_that_fetch_at_the_same_time(tmp_path, monkeypatch):
    """The second waits, and finds what the first has fetched."""
    calls, started, go_on = [], threading.Event(), threading.Event()

    def fetch(root):
        calls.append(root)
        started.set()
        go_on.wait(60)
        WRITE["cifar10"](root / "cifar-10-batches-py")

    source(monkeypatch, "cifar10", fetch)
    found = []
    threads = [threading.Thread(target=lambda: found.append(places.fetch("cifar10", tmp_path))) for _ in range(2)]
    threads[0].start()
    assert started.wait(60)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert found == [tmp_path / "cifar-10-batches-py"] * 2
    assert len(calls) == 1


def test_downloads_that_cannot_be(tmp_path, capsys, monkeypatch):
    touch(tmp_path, "a file", "tiny-imagenet-200.zip")
    with pytest.raises(InputError, match=r"--download: .*a file cannot be written \(File exists\)"):
        load_data("cifar10", tmp_path / "a file", download=True)
    line = refusal("tiny_imgnet", tmp_path, download=True)
    assert "unpack it (unzip -qo " in line
    assert line.endswith("(--download cannot fetch it; INSTALL.md says how to get it)")

    def bad(root):
        WRITE["cifar10"](root / "cifar-10-batches-py")
        (root / "cifar-10-batches-py/data_batch_1").write_bytes(pickle.dumps({"data": np.zeros(3), "labels": []}))

    source(monkeypatch, "cifar10", bad)
    words = ["--data", "cifar10", "--data_path", str(tmp_path), "--download", "--save_path", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="2"):
        call(main, *words)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "error" in line and "data_batch_1: expected 'data'" in line] == lines[-1:]
