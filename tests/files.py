"""Small data sets in the true on-disk formats, written for the tests."""

import gzip
import pickle

import numpy as np
from PIL import Image


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def write_cifar(folder, name="cifar10", images=20, old_numpy=True, seed=0):
    """CIFAR batches as the official archives hold them: pickled dicts with uint8 [N, 3072] and label lists."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    hundred = name == "cifar100"
    files = ["train", "test"] if hundred else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for file in files:
        batch = {
            "batch_label": file,
            "data": random.integers(0, 256, (images, 3072), dtype=np.uint8),
            "filenames": [f"{i}.png" for i in range(images)],
        }
        if hundred:
            batch["fine_labels"] = random.integers(0, 100, images).tolist()
            batch["coarse_labels"] = [label // 5 for label in batch["fine_labels"]]
        else:
            batch["labels"] = random.integers(0, 10, images).tolist()
        content = pickle.dumps(batch, protocol=2)
        # The official files were written by a numpy whose internals lay in numpy.core.
        (folder / file).write_bytes(content.replace(b"numpy._core", b"numpy.core") if old_numpy else content)
    return folder


def write_fashion_mnist(folder, train=40, test=20, zipped=True, seed=0):
    """The four IDX files."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for part, count in (("train", train), ("t10k", test)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, header, array in (
            ("images-idx3", [2051, count, 28, 28], images),
            ("labels-idx1", [2049, count], labels),
        ):
            content = np.array(header, dtype=">u4").tobytes() + array.tobytes()
            path = folder / f"{part}-{kind}-ubyte"
            if zipped:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)
    return folder


def write_tiny_imagenet(folder, classes=3, per_class=4, val_folders=False, seed=0):
    """tiny-imagenet-200 with few classes; `val_folders` is the second layout, one folder for each class."""
    random = np.random.default_rng(seed)
    names = [f"n{1000 + 7 * i:08d}" for i in range(classes)]

    def image(path, value, grey=False):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(value + random.integers(-10, 11, (64, 64) if grey else (64, 64, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(path, format="JPEG", quality=95)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "wnids.txt").write_text("\n".join(reversed(names)) + "\n")
    rows = []
    for label, name in enumerate(names):
        for i in range(per_class):
            image(folder / "train" / name / "images" / f"{name}_{i}.JPEG", 40 + 60 * label, grey=i == 0)
        for _ in range(2):
            file = f"val_{len(rows)}.JPEG"
            image(folder / "val" / (name if val_folders else "images") / file, 40 + 60 * label)
            rows.append(f"{file}\t{name}\t0\t0\t62\t62")
    if not val_folders:
        (folder / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    return folder


def write_image_folder(folder, counts, size=12, seed=0):
    """PNG of random sizes about `size`; `counts` are the images of each <part>/<class> or <class>.

    Classes differ in brightness, so that there is something to learn.
    """
    random = np.random.default_rng(seed)
    for number, (name, count) in enumerate(sorted(counts.items(), key=lambda item: item[0].split("/")[-1])):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            shape = (*random.integers(size - 3, size + 4, 2), 3)
            pixels = np.clip(40 + 60 * (number % 4) + random.integers(-30, 31, shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.png")
    return folder
