"""What the scripts' command lines share: a parser, argument types, groups of options, and how errors end."""

import argparse
import ctypes
import difflib
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from models import MODELS
from utils import InputError, RunError
from utils.data import CORRUPTIONS, DATASETS, SEVERITIES, SPLITS


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors (exit status 2), and no difference between - and _ in option names."""

    def __init__(self, doc: str):
        super().__init__(
            description=doc, formatter_class=_Help, allow_abbrev=False, argument_default=None, add_help=True
        )

    def parse_args(
        self, args: list[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As argparse's; a misspelt option is answered with the nearest one."""
        words = sys.argv[1:] if args is None else args
        for word in words:
            if word.startswith("--") and word.endswith("=--"):  # argparse would drop the value, and not look at it
                self.error(f"argument {word[:-3]}: '--' given, which is no value")
        parsed, unknown = self.parse_known_args([_underscored(word) for word in words], namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, n=1)
            self.error(f"{unknown[0]}: no such option" + (f"; did you mean {near[0]}?" if near else "; see --help"))
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        fail(message, status=2)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, where they are not None, and keeps the line breaks of the description."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, *value = word.split("=", 1)
    return "=".join(["--" + name[2:].replace("-", "_"), *value])


def fail(message: str, status: int) -> NoReturn:
    """Print `<script>: error: <message>` as one line on stderr and exit."""
    script = Path(sys.argv[0]).name or "python"
    if os.environ.get("RANK", "0") != "0":
        time.sleep(1)  # torchrun ends the other ranks once one has failed: what all would say is said once
    # The message may hold what stands in a file: that must not steer the terminal.
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    print(f"{script}: error: {line}", file=sys.stderr)
    sys.exit(status)


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Call a script's main and turn what the user can mend into one line: bad input status 2, a failed run status 1."""
    try:
        main(args)
    except InputError as error:
        fail(str(error), status=2)
    except RunError as error:
        fail(str(error), status=1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        fail("out of memory; a smaller --width, --batch_size or number of images needs less", status=1)
    except OSError as error:  # where nothing expects one: a disk that fails, rights that were taken away
        fail(f"{error.filename or 'a file'}: {error.strerror or error}", status=1)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on after the last finished epoch", status=130)


def boolean(text: str) -> bool:
    """true, yes, 1 and false, no, 0 in any case."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def path(text: str) -> Path:
    """An argument type: a path, at which there may be nothing yet."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path given")
    try:
        os.stat(text)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name too long, a folder without rights, a loop of links
        raise argparse.ArgumentTypeError(f"'{text[:200]}': {getattr(error, 'strerror', None) or error}") from error
    return Path(text)


def number(kind: type, low: float, high: float = float("inf"), open_low: bool = False) -> Callable[[str], Any]:
    """An argument type: int or float from low to high, finite; `open_low` leaves low itself out."""

    def convert(text: str) -> Any:
        try:
            value = kind(text) if text.isascii() else None
        except ValueError:
            value = None
        ok = (
            value is not None and low <= value <= high and abs(value) < float("inf") and not (open_low and value == low)
        )
        if not ok:
            what = "a whole number" if kind is int else "a number"
            above = f"above {low:g}" if open_low else f"of {low:g} or more"
            span = above if high == float("inf") else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"'{text}' given, {what} {span} is needed")
        return value

    return convert


class Seeds(argparse.Action):
    """One seed a member: `--seed 13 17 27`, `--seed "13 17 27"`."""

    def __call__(  # noqa: D102
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        seeds = []
        for text in " ".join(values).replace(",", " ").split():
            if not (text.isascii() and text.isdigit()) or len(text) > 20 or int(text) >= 2**32:
                parser.error(f"argument {option}: '{text}' given, whole numbers from 0 to {2**32 - 1} are needed")
            seeds.append(int(text))
        twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
        if twice is not None:
            parser.error(f"argument {option}: {twice} given twice, two members of one seed are the same network")
        if not seeds:
            parser.error(f"argument {option}: no seed given, one is needed for each member")
        setattr(namespace, self.dest, seeds)


class Choices(argparse.Action):
    """A list of words of `among`: `--mode a,b`, `--mode a b`; "all" stands for all of them."""

    def __init__(self, *args: Any, among: Sequence[Any], **kwargs: Any):
        super().__init__(*args, nargs="+", metavar=f"{{{','.join(map(str, among))}}}", **kwargs)
        self.among = {str(word): word for word in among}

    def __call__(  # noqa: D102
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        words = " ".join(values).replace(",", " ").split()
        if words == ["all"]:
            words = list(self.among)
        for word in words:
            if word not in self.among:
                parser.error(f"argument {option}: '{word}' given, choose of {', '.join(self.among)}")
        if not words:
            parser.error(f"argument {option}: nothing given, choose of {', '.join(self.among)}")
        # Each once, in the order of `among`.
        setattr(namespace, self.dest, [value for word, value in self.among.items() if word in words])


def add_flag(group: Any, name: str, text: str, default: bool = False) -> None:
    """A boolean option: --name, --name True, --name False."""
    group.add_argument(
        f"--{name}", type=boolean, nargs="?", const=True, default=default, metavar="True|False", help=text
    )


def add_data_options(parser: Parser, measuring: bool = False) -> None:
    """Which data set, where it lies, and on what it is computed; when measuring, what the run does not say itself."""
    group = parser.add_argument_group("data and device")
    told = " (default: what the checkpoint or the run says)" if measuring else ""
    group.add_argument(
        "--data", "--dataset", choices=DATASETS, default=None if measuring else "digits", help="data set" + told
    )
    group.add_argument(
        "--data_path",
        type=path,
        default=None if measuring else Path("data"),
        metavar="DIR",
        help="folder that holds the data sets" + told,
    )
    group.add_argument(
        "--train_idx_path", type=path, metavar="FILE", help=".npy of the indices to train on, in the official order"
    )
    group.add_argument("--val_idx_path", type=path, metavar="FILE", help=".npy of the indices to validate on")
    add_flag(group, "download", "fetch a missing data set through torchvision (not tiny_imgnet)")
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to compute")
    group.add_argument(
        "--threads", type=number(int, 1, 1024), metavar="N", help="CPU threads of a process (default: its cores)"
    )


def add_checkpoint_options(parser: Parser, measuring: bool = False) -> None:
    """Which saved members."""
    group = parser.add_argument_group("saved members")
    group.add_argument(
        "--resume",
        type=path,
        nargs="+",
        required=measuring,
        metavar="PATH",
        help="a run folder, member folders, or checkpoint files",
    )
    group.add_argument(
        "--checkpoint",
        choices=("best", "last", "averaged"),
        default="best",
        help="which checkpoint of a folder counts; averaged is there after --average_from",
    )


def add_measure_options(parser: Parser, parts: bool = True) -> None:
    """What is measured and where the result goes; `parts`: on which splits, corruptions and severities."""
    group = parser.add_argument_group("measurement")
    told = "default: what the checkpoint says; another value is refused"
    group.add_argument("--model", choices=MODELS, help=f"network of the members ({told})")
    group.add_argument("--width", type=number(int, 1, 2**16), metavar="N", help=f"its width ({told})")
    group.add_argument(
        "--save", type=path, metavar="DIR", help="folder of the results (default: measurements/<name of the run>)"
    )
    if not parts:
        return
    group.add_argument(
        "--split",
        action=Choices,
        among=SPLITS,
        help="images to measure on (default: test; in measure_diversity.py also corrupted where its folder is found)",
    )
    group.add_argument(
        "--corruptions", action=Choices, among=CORRUPTIONS, default=list(CORRUPTIONS), help="of the corrupted set"
    )
    group.add_argument(
        "--severities", action=Choices, among=SEVERITIES, default=list(SEVERITIES), help="of the corrupted set"
    )


def start_device(name: str, threads: int | None) -> torch.device:
    """The device for `--device`, and the CPU's settings: threads, and memory that is kept once it was used.

    Raises:
        InputError: if the device is not there.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    # The two parts of a batch have ever other sizes, and oneDNN compiles its kernels for each; its cache of 1024 is too
    # small for a ResNet's. It reads this at the first convolution.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")
    _keep_freed_memory()
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device in available if available[device])
    if not available[name]:
        raise InputError(f"--device {name}: torch finds none here; use --device cpu")
    return torch.device(name)


def _keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: large tensors are otherwise unmapped and faulted in again at every step."""
    m_trim_threshold, m_mmap_threshold, largest = -1, -3, 2**30
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, largest)
        libc.mallopt(m_trim_threshold, largest)
    except (OSError, AttributeError):
        pass  # another C library, which has its own ways
