"""Predict image files with a saved ensemble, and say how sure it is.

    python scripts/predict.py --resume runs/digits_sharpbalance --images photo.jpg pictures

Prints a line for each image: the class, its probability, the entropy of the probabilities and the mutual information
(both in nats), how many of the members predict that class, and the file. A folder stands for all files in it and in the
folders below. What cannot be read is left out and named. --csv FILE writes the same, with all digits, as a table.
"""

import argparse
import csv
import io
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "4000")  # before torch is loaded, whose threads otherwise wait at full speed

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import InputError, cli, first_line, printable, some
from utils.distributed import cores, start_device
from utils.files import write_atomically
from utils.folder import decode, find_files, open_image
from utils.inference import Ensemble, load_ensemble

COLUMNS = ("class", "probability", "entropy", "mutual_information", "agree", "members", "image")
GREY_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
AT_ONCE = 128  # files that are decoded before they are predicted


class Picture(NamedTuple):
    """A file, and its pixels uint8 [1, S, S, C] as the ensemble takes them; None and the reason if it has none."""

    file: str
    pixels: Tensor | None
    reason: str
    other_size: bool
    other_colour: bool


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__)
    cli.add_ensemble_options(parser)
    group = parser.add_argument_group("images")
    text = "image files, of any format that Pillow reads, and folders of them"
    cli.add_option(group, "images", text, cli.path, "PATH", nargs="+", required=True)
    cli.add_option(group, "csv", "also write a table into this file", cli.path, "FILE")
    cli.add_option(group, "device", "auto, cpu, cuda, cuda:N or mps", cli.device, "DEVICE", default="auto")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Predict, print a line for each image, and write the table."""
    files = find_images(args.images)
    if args.csv is not None and (args.csv.is_dir() or not args.csv.parent.is_dir()):
        raise InputError(f"--csv {args.csv}: expected a file in a folder that is there; name another")
    device = start_device(args.device, None)
    ensemble = load_ensemble(args.resume, device, args.checkpoint, args.data, args.model)
    width = min(max(len(name) for name in [*ensemble.classes, "class"]), 30)
    rows: list[tuple] = []
    left_out, scaled, coloured = [], 0, 0
    for pictures in read_pictures(files, ensemble):
        left_out += [f"{picture.file} ({picture.reason})" for picture in pictures if picture.pixels is None]
        pictures = [picture for picture in pictures if picture.pixels is not None]
        scaled += sum(picture.other_size for picture in pictures)
        coloured += sum(picture.other_colour for picture in pictures)
        if pictures and not rows:
            print(f"{'class':{width}}  probability  entropy  mutual inf.  agree  image")
        for row in rows_of(ensemble, pictures):
            rows.append(row)
            name, probability, entropy, information, agree, members, file = row
            numbers = f"{probability:11.4f}  {entropy:7.4f}  {information:11.4f}  {f'{agree}/{members}':>5}"
            print(f"{printable(name)[:width]:{width}}  {numbers}  {printable(file)}")
    named = some(left_out)
    if not rows:
        raise InputError(f"--images: none of {len(files)} files is an image that can be read: {named}")
    changes = ("of another size", scaled, ensemble.how_scaled()), ("of another mode", coloured, ensemble.how_coloured())
    for what, count, done in changes:
        if count:
            print(f"note: {count} of {len(rows)} images are {what}: {done}", file=sys.stderr)
    if left_out:
        print(f"note: {len(left_out)} of {len(files)} files are left out: {named}", file=sys.stderr)
    if args.csv is not None:
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([COLUMNS, *rows])
        write_atomically(args.csv, table.getvalue().encode("utf-8", "surrogateescape"))
        print(f"wrote {args.csv}")


def find_images(places: list[Path]) -> list[str]:
    """The files, and all files of the folders and of those below, without hidden ones and what systems leave behind.

    Raises:
        InputError: naming a place where there is nothing, or a folder without files.
    """
    files = []
    for place in places:
        if place.is_dir():
            try:
                found = [os.path.join(place, inside) for inside, _, _ in find_files(place, "")]
            except InputError as error:
                raise InputError(str(error).replace("--data_path", "--images", 1)) from error
            if not found:
                raise InputError(f"--images {place}: an empty folder; name one that holds images")
            files += found
        elif place.exists():
            files.append(str(place))
        else:
            raise InputError(f"--images {place}: no such file or folder")
    return list(dict.fromkeys(files))


def read_pictures(files: list[str], ensemble: Ensemble) -> Iterator[list[Picture]]:
    """All files, some at a time, decoded side by side: Pillow lets go of the interpreter lock."""
    with ThreadPoolExecutor(cores()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about large images
        for start in range(0, len(files), AT_ONCE):
            yield list(pool.map(partial(read_picture, ensemble=ensemble), files[start : start + AT_ONCE]))


def read_picture(file: str, ensemble: Ensemble) -> Picture:
    """Decode a file as those of a folder are decoded for training (`utils.folder`)."""
    inputs, picture = (ensemble.image_size,) * 2, ensemble.picture_size
    try:
        with open_image(file) as image:
            size, grey = image.size, image.mode in GREY_MODES
        # Where inputs have a border, a picture of their size has it already.
        whole = size == inputs and picture < ensemble.image_size
        pixels = torch.from_numpy(decode(file, ensemble.image_size if whole else picture))[None]
    except Exception as error:  # a damaged file raises nearly anything
        return Picture(file, None, getattr(error, "strerror", None) or first_line(error)[:120], False, False)
    pixels = ensemble.coloured(pixels if whole else ensemble.placed(pixels))
    other_size = not whole and size != (picture, picture)
    return Picture(file, pixels, "", other_size, grey != (ensemble.channels == 1))


def rows_of(ensemble: Ensemble, pictures: list[Picture]) -> list[tuple]:
    """What `COLUMNS` names of each picture."""
    if not pictures:
        return []
    found = ensemble(torch.cat([picture.pixels for picture in pictures]))
    agree = (found.member_probs.argmax(dim=2) == found.predicted).sum(dim=0)
    columns = found.predicted, found.probs.amax(dim=1), found.entropy, found.mutual_information, agree
    members = len(ensemble.members)
    return [
        (ensemble.classes[label], *numbers, members, picture.file)
        for (label, *numbers), picture in zip(zip(*(c.tolist() for c in columns), strict=True), pictures, strict=True)
    ]


if __name__ == "__main__":
    cli.run(main, parse_args())
