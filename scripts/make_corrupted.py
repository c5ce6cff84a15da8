"""Make the corrupted copies of a test set: 15 corruptions at 5 severities, by utils/corruptions.py.

    python scripts/make_corrupted.py --data digits

Writes <to>/digits-C/, <to>/Fashion-MNIST-C/ or <to>/folder-<size>-C/ in the layout of CIFAR-10-C: <corruption>.npy,
uint8 [5 N, H, W, C] with severities 1 to 5 in turn; labels.npy, int64 [5 N]; about.json, which identifies the images
they were made from. The measuring scripts find the set in --data_path, which is where it goes without --to. Re-run the
same command to resume after an interruption. The sets of CIFAR and TinyImageNet are published and are not made here.
"""

import argparse
import io
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import repeat
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import PIL
import scipy
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import InputError, RunError
from utils.cli import Choices, Parser, add_flag, add_image_size, fail, image_size_of, number, path, run
from utils.corruptions import SIZES, corrupt
from utils.data import ImageSet
from utils.datasets import CORRUPTIONS, NAMES, SEVERITIES, corrupted_name, load_data
from utils.files import hold, load_json, open_atomically, refusing, visible, write_array, write_atomically, write_json

PUBLISHED = {"cifar10": 2535967, "cifar100": 3555552, "tiny_imgnet": 8206060}  # records at zenodo.org
CHUNK = 256  # images of one task


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument("--data", "--dataset", choices=NAMES, default="digits", help="whose test images")
    parser.add_argument("--data_path", type=path, default=Path("data"), metavar="DIR", help="folder of the data sets")
    add_image_size(parser)
    add_flag(parser, "download", "fetch a missing data set through torchvision")
    parser.add_argument("--to", type=path, metavar="DIR", help="where to make the set's folder (default: --data_path)")
    parser.add_argument("--corruptions", action=Choices, among=CORRUPTIONS, default=list(CORRUPTIONS), help="which")
    parser.add_argument("--images", type=number(int, 1), metavar="N", help="how many, the first N (default: all)")
    parser.add_argument("--workers", type=number(int, 1), default=1, metavar="N", help="processes, one core each")
    sheet = "draw the first test image under all corruptions into this .png, and make no set"
    parser.add_argument("--contact_sheet", type=path, metavar="FILE", help=sheet)
    args = parser.parse_args(argv)
    if args.contact_sheet is not None and args.contact_sheet.suffix.lower() != ".png":
        parser.error(f"--contact_sheet: expected a name that ends in .png, got '{args.contact_sheet}'")
    args.image_size = image_size_of(parser, args.data, args.image_size)
    if args.data == "folder" and not SIZES[0] <= args.image_size <= SIZES[1]:
        parser.error(f"--image_size: expected {SIZES[0]} to {SIZES[1]} pixels, got {args.image_size}")
    args.to = args.to or args.data_path
    return args


def main(args: argparse.Namespace) -> None:
    """Make the set, or draw the contact sheet."""
    name = corrupted_name(args.data, args.image_size)
    if args.contact_sheet is None and args.data in PUBLISHED:
        source = f"https://zenodo.org/records/{PUBLISHED[args.data]}"
        raise InputError(f"--data {args.data}: {name} is published; unpack it from {source} in {args.data_path}")
    test = load_data(args.data, args.data_path, download=args.download, image_size=args.image_size).test
    count = min(args.images or len(test), len(test))
    if args.contact_sheet is not None:
        picture = io.BytesIO()
        contact_sheet(test.pixels(slice(1))[0].numpy()).save(picture, format="PNG")
        with refusing(f"--contact_sheet: {args.contact_sheet.parent} cannot be created"):
            args.contact_sheet.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.contact_sheet, picture.getvalue())
        print(f"wrote {args.contact_sheet}")
        return
    folder = args.to / name
    with refusing(f"--to: {folder} cannot be created"):
        folder.mkdir(parents=True, exist_ok=True)
    shape = (len(SEVERITIES) * count, test.height, test.width, test.channels)
    with hold(args.to / f".{name}.lock"):  # the same command that is started meanwhile waits
        _check_origin(folder, test, count)
        todo = [corruption for corruption in args.corruptions if not _is_done(folder / f"{corruption}.npy", shape)]
        started = time.monotonic()
        try:
            _make(folder, test, shape, todo, args.workers)
        except BrokenProcessPool as error:
            what = "a worker was killed (out of memory?)"
            raise RunError(f"{what}; re-run the same command with fewer --workers") from error
        except KeyboardInterrupt:
            fail("interrupted; re-run the same command to resume after the last finished corruption", status=130)
    speed, existed = len(todo) * shape[0] / (time.monotonic() - started), len(args.corruptions) - len(todo)
    notes = (f", {speed:.0f} images/s" if todo else "") + (f", {existed} existed" if existed else "")
    print(f"wrote {len(todo)} corruptions of {count} images to {folder}{notes}")


def contact_sheet(image: np.ndarray) -> Image.Image:
    """Draw one image, uint8 [H, W, C], under the 15 corruptions (rows) at the 5 severities (columns)."""
    scale = -(-72 // len(image))
    cell, gap, left, top = scale * len(image), 4, 160, 26
    font = ImageFont.load_default(18)  # in print at half a page about 6.5 points

    def place(row: int, column: int) -> tuple[int, int]:
        return left + column * (cell + gap), top + row * (cell + gap)

    sheet = Image.new("RGB", place(len(CORRUPTIONS), 1 + len(SEVERITIES)), "white")
    text = ImageDraw.Draw(sheet)
    text.text((4, 12), "severity", fill="black", font=font, anchor="lm")
    for column, title in enumerate(("clean", *map(str, SEVERITIES))):
        text.text((place(0, column)[0] + cell // 2, 12), title, fill="black", font=font, anchor="mm")
    for row, name in enumerate(CORRUPTIONS):
        middle = place(row, 0)[1] + cell // 2
        text.text((4, middle), name.replace("_", " "), fill="black", font=font, anchor="lm")
        for column in (0, *SEVERITIES):
            drawn = corrupt(image[None], name, column)[0] if column else image
            drawn = Image.fromarray(np.broadcast_to(drawn, (*drawn.shape[:2], 3)))
            sheet.paste(drawn.resize((cell, cell), Image.Resampling.NEAREST), place(row, column))
    return sheet


def _check_origin(folder: Path, test: ImageSet, count: int) -> None:
    """Write about.json and labels.npy, or check that those that exist belong to these test images."""
    about, labels = folder / "about.json", np.tile(test.labels.numpy()[:count], len(SEVERITIES))
    images = test.digest()
    if about.is_file() or any(path.suffix == ".npy" for path in visible(folder)):
        with refusing(f"{about}: cannot be read", "give another --to"):
            found = load_json(about)
        known = found if isinstance(found, dict) else {}
        if (known.get("sha256_of_test_images"), known.get("images", len(test))) != (images, count):
            raise InputError(f"{folder}: holds a set made of other images; remove it, or give another --to")
    else:
        versions = {"numpy": np.__version__, "scipy": scipy.__version__, "pillow": PIL.__version__}
        origin = {"made_by": "scripts/make_corrupted.py", "sha256_of_test_images": images, "images": count}
        write_json(about, origin | versions)
    if not _is_done(folder / "labels.npy", labels.shape, labels.dtype):
        write_array(folder / "labels.npy", labels)


def _is_done(path: Path, shape: tuple[int, ...], dtype: type = np.uint8) -> bool:
    """Whether the file exists in this form; its content was complete when it got its name."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return array.shape == shape and array.dtype == dtype


def _make(folder: Path, test: ImageSet, shape: tuple[int, ...], corruptions: list[str], workers: int) -> None:
    total = len(corruptions) * shape[0]
    with tqdm(total=total, disable=not sys.stderr.isatty(), unit="img", unit_scale=True, dynamic_ncols=True) as bar:
        if workers > 1:  # read by the workers when they start
            os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker)  # starts none before the first task
        each = map if workers == 1 else partial(_map, pool, 2 * workers)
        try:
            for name in corruptions:
                _write_blocks(folder / f"{name}.npy", test, shape, each, bar)
        finally:
            pool.shutdown(cancel_futures=True)


def _map(pool: ProcessPoolExecutor, ahead: int, function: Callable, *arguments: Iterable) -> Iterator[Any]:
    """As map, with a few tasks ahead: pool.map would read all images at once."""
    waiting: deque[Future] = deque()
    for task in zip(*arguments, strict=False):  # some have no end
        waiting.append(pool.submit(function, *task))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and exit when it does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=end_with_parent, daemon=True).start()


def _write_blocks(
    path: Path, test: ImageSet, shape: tuple[int, ...], each: Callable[..., Iterator[np.ndarray]], bar: tqdm
) -> None:
    """Write one corruption piece by piece, so that it is never whole in memory."""
    bar.set_description(path.stem)
    count = shape[0] // len(SEVERITIES)
    parts = [range(count)[start : start + CHUNK] for start in range(0, count, CHUNK)] * len(SEVERITIES)
    pieces = (test.pixels(slice(part.start, part.stop)).numpy() for part in parts)
    severities = np.repeat(SEVERITIES, len(parts) // len(SEVERITIES)).tolist()
    with open_atomically(path, math.prod(shape)) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for piece in each(corrupt, pieces, repeat(path.stem), severities, repeat(0), parts):
            file.write(piece.tobytes())
            bar.update(len(piece))


if __name__ == "__main__":
    run(main, parse_args())
