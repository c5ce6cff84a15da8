"""Make the corrupted copies of a test set: 15 corruptions in 5 severities, drawn by utils/corruptions.py.

    python scripts/make_corrupted.py --data digits

Writes <to>/digits-C/ or <to>/Fashion-MNIST-C/ in the layout of CIFAR-10-C: <corruption>.npy, uint8 [5 N, H, W, C] with
severities 1 to 5 one after another; labels.npy, int64 [5 N]; about.json, which says of which images they were made. The
measuring scripts find it in --data_path, which is where it goes if --to is not given. The same command again makes only
what is missing. The sets of CIFAR and TinyImageNet are published and are not made here.
"""

import argparse
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import repeat
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import numpy as np
import PIL
import scipy
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import InputError, RunError, first_line
from utils.checkpoint import load_json, write_array, write_atomically, write_json
from utils.cli import Choices, Parser, add_flag, fail, number, run
from utils.corruptions import corrupt
from utils.data import CORRUPTED, CORRUPTIONS, DATASETS, SEVERITIES, ImageSet, load_data

PUBLISHED = {
    "cifar10": "https://zenodo.org/records/2535967",
    "cifar100": "https://zenodo.org/records/3555552",
    "tiny_imgnet": "https://zenodo.org/records/2536630",
}
CHUNK = 256  # images of one task


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--data", "--dataset", choices=DATASETS, default="digits", help="whose test images")
    parser.add_argument(
        "--data_path", type=Path, default=Path("data"), metavar="DIR", help="folder that holds the data sets"
    )
    add_flag(parser, "download", "fetch a missing data set through torchvision")
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="folder that the set's own folder is made in (default: --data_path)"
    )
    parser.add_argument(
        "--corruptions", action=Choices, among=CORRUPTIONS, default=list(CORRUPTIONS), help="which to make"
    )
    parser.add_argument(
        "--images", type=number(int, 1), metavar="N", help="only the first N test images (default: all)"
    )
    parser.add_argument("--workers", type=number(int, 1), default=1, metavar="N", help="processes, one core each")
    parser.add_argument(
        "--contact_sheet",
        type=Path,
        metavar="FILE",
        help="draw the first test image in all corruptions and severities into this .png, and make no set",
    )
    args = parser.parse_args(argv)
    if args.contact_sheet is not None and args.contact_sheet.suffix.lower() != ".png":
        parser.error(f"argument --contact_sheet: '{args.contact_sheet}' given, a name that ends in .png is needed")
    args.to = args.to or args.data_path
    return args


def main(args: argparse.Namespace) -> None:
    """Make the set, or draw the contact sheet."""
    name = CORRUPTED[args.data]
    if args.contact_sheet is None and args.data in PUBLISHED:
        raise InputError(
            f"--data {args.data}: {name} is a published set, and another must not bear its name; get it from "
            f"{PUBLISHED[args.data]} and unpack it in {args.data_path}"
        )
    test = load_data(args.data, args.data_path, download=args.download).test
    images = _pixels(test)[: args.images]
    if args.contact_sheet is not None:
        picture = io.BytesIO()
        contact_sheet(images[0]).save(picture, format="PNG")
        _make_folder(args.contact_sheet.parent, "--contact_sheet")
        write_atomically(args.contact_sheet, picture.getvalue())
        print(f"wrote {args.contact_sheet}")
        return
    folder = args.to / name
    _make_folder(folder, "--to")
    _check_origin(folder, test, len(images))
    shape = (len(SEVERITIES) * len(images), *images.shape[1:])
    todo = [corruption for corruption in args.corruptions if not _is_done(folder / f"{corruption}.npy", shape)]
    started = time.monotonic()
    try:
        _make(folder, images, todo, args.workers)
    except BrokenProcessPool as error:
        raise RunError(
            "a worker was killed (too little memory?); give the same command with fewer --workers"
        ) from error
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on after the last finished corruption", status=130)
    kept = len(args.corruptions) - len(todo)
    speed = len(todo) * shape[0] / (time.monotonic() - started)
    print(
        f"wrote {len(todo)} corruptions of {len(images)} images to {folder}"
        + (f", {speed:.0f} images/s" if todo else "")
        + (f", {kept} were there" if kept else "")
    )


def contact_sheet(image: np.ndarray) -> Image.Image:
    """A picture of one image, uint8 [H, W, C], in the 15 corruptions (rows) and 5 severities (columns)."""
    scale = -(-96 // len(image))
    cell, gap, left, top = scale * len(image), 4, 130, 20

    def place(row: int, column: int) -> tuple[int, int]:
        return left + column * (cell + gap), top + row * (cell + gap)

    sheet = Image.new("RGB", place(len(CORRUPTIONS), 1 + len(SEVERITIES)), "white")
    text = ImageDraw.Draw(sheet)
    for column, title in enumerate(("plain", *map(str, SEVERITIES))):
        text.text((place(0, column)[0], 4), title, fill="black")
    for row, name in enumerate(CORRUPTIONS):
        text.text((4, place(row, 0)[1] + cell // 2 - 5), name, fill="black")
        for column in (0, *SEVERITIES):
            drawn = corrupt(image[None], name, column)[0] if column else image
            drawn = Image.fromarray(np.broadcast_to(drawn, (*drawn.shape[:2], 3)))
            sheet.paste(drawn.resize((cell, cell), Image.Resampling.NEAREST), place(row, column))
    return sheet


def _pixels(part: ImageSet) -> np.ndarray:
    """The images as they are stored, uint8 [N, H, W, C]."""
    index = torch.arange(len(part))
    centre = torch.full_like(index, part.info.padding)
    return part.crop(index, centre, centre, torch.zeros_like(index, dtype=torch.bool)).numpy()


def _make_folder(folder: Path, flag: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag}: {folder} cannot be made ({error.strerror}); name another place") from error


def _check_origin(folder: Path, test: ImageSet, count: int) -> None:
    """Write about.json and labels.npy, or see that those that are there belong to these test images."""
    about, labels = folder / "about.json", np.tile(test.labels.numpy()[:count], len(SEVERITIES))
    images = test.digest()
    if about.is_file() or any(folder.glob("*.npy")):
        try:
            found = load_json(about)
        except (OSError, ValueError) as error:
            raise InputError(f"{about}: cannot be read ({first_line(error)}); give another --to") from error
        before = (
            (found.get("sha256_of_test_images"), found.get("images", len(test))) if isinstance(found, dict) else None
        )
        if before != (images, count):
            raise InputError(f"{folder}: holds a set made of other images; remove it, or give another --to")
    else:
        versions = {"numpy": np.__version__, "scipy": scipy.__version__, "pillow": PIL.__version__}
        origin = {"made_by": "scripts/make_corrupted.py", "sha256_of_test_images": images, "images": count}
        write_json(about, origin | versions)
    if not _is_done(folder / "labels.npy", labels.shape, labels.dtype):
        write_array(folder / "labels.npy", labels)


def _is_done(path: Path, shape: tuple[int, ...], dtype: type = np.uint8) -> bool:
    """Whether the file is there in this form; what is in it was complete when it got its name."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return array.shape == shape and array.dtype == dtype


def _make(folder: Path, images: np.ndarray, corruptions: list[str], workers: int) -> None:
    total = len(corruptions) * len(SEVERITIES) * len(images)
    with tqdm(total=total, disable=not sys.stderr.isatty(), unit="img", unit_scale=True, dynamic_ncols=True) as bar:
        if workers == 1:
            for name in corruptions:
                _write_blocks(folder / f"{name}.npy", images, map, bar)
            return
        for library in ("OMP", "OPENBLAS", "MKL"):  # read by the workers when they start
            os.environ[f"{library}_NUM_THREADS"] = "1"
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker)
        try:
            for name in corruptions:
                _write_blocks(folder / f"{name}.npy", images, pool.map, bar)
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=end_with_parent, daemon=True).start()


def _write_blocks(path: Path, images: np.ndarray, each: Callable[..., Iterator[np.ndarray]], bar: tqdm) -> None:
    """Write one corruption piece by piece, never whole in memory, under another name until it is complete."""
    temporary = path.with_name(path.name + ".tmp")
    bar.set_description(path.stem)
    parts = [range(len(images))[start : start + CHUNK] for start in range(0, len(images), CHUNK)]
    pieces = [images[part.start : part.stop] for part in parts]
    count = len(SEVERITIES)
    severities = [severity for severity in SEVERITIES for _ in parts]
    shape = (count * len(images), *images.shape[1:])
    try:
        with open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for piece in each(corrupt, pieces * count, repeat(path.stem), severities, repeat(0), parts * count):
                file.write(piece.tobytes())
                bar.update(len(piece))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(
            f"{path}: could not be written ({error.strerror}; {np.prod(shape) / 2**20:.0f} MiB are needed); the same "
            "command goes on after the last finished corruption"
        ) from error


if __name__ == "__main__":
    run(main, parse_args())
