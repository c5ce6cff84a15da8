"""What the scripts' command lines share: a parser, argument types, groups of options, and how errors end a program."""

import argparse
import codecs
import difflib
import errno
import io
import os
import re
import stat
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from models import MODELS, expand_user, full_name, is_external
from utils import InputError, RunError, again, out_of_memory, printable, processes
from utils.datasets import CORRUPTIONS, DEFAULT_SIZE, NAMES, SEVERITIES, SPLITS
from utils.files import PINNED, broken_link, pinned

UNSET = object()
# Options, of the scripts that have them, whose smaller values need less memory.
LESS_MEMORY = ("batch_size", "jobs", "eval_batch_size", "hessian_samples", "ntk_samples", "images", "image_size")


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors (exit status 2), in which - and _ in option names are the same.

    Attributes:
        around: what is put before and after an error's text, where the words are not the user's.
    """

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=_Help, allow_abbrev=False)
        self.around = ("", "")
        _open_streams()

    def parse_args(
        self, args: list[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As argparse's; the error for a misspelt option names the nearest one."""
        words = sys.argv[1:] if args is None else args
        for word in words:
            if word.startswith("--") and word.endswith("=--"):  # argparse would drop the value without checking it
                self.error(f"{word[:-3]}: expected a value, got '--'")
        parsed, unknown = self.parse_known_args(words, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, n=1)
            self.error(f"{unknown[0]}: no such option" + (f"; did you mean {near[0]}?" if near else "; see --help"))
        return parsed

    def parse_known_args(self, args: list[str], namespace: argparse.Namespace | None = None) -> tuple:
        """As argparse's, with - for _ in option names."""
        return super().parse_known_args([_underscored(word) for word in args], namespace)

    def parse_given(self, args: list[str] | None = None) -> dict[str, Any]:
        """The options that are given, by name, without the defaults of the others."""
        blank = argparse.Namespace(**{action.dest: UNSET for action in self._actions})
        return {name: value for name, value in vars(self.parse_args(args, blank)).items() if value is not UNSET}

    def defaults(self) -> dict[str, Any]:
        """The default of every option, by name."""
        return {action.dest: action.default for action in self._actions if action.dest != "help"}

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        message = re.sub(
            r"^argument (\S+): invalid choice: (.*) \(choose from (.*)\)$",
            lambda match: f"{match[1]}: expected one of {match[3].replace(chr(39), '')}, got {match[2]}",
            message,
        )
        fail(message.removeprefix("argument ").join(self.around), status=2)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, except those that say nothing, and leaves the line breaks of the description alone."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", [], [None]) else super()._get_help_string(action)


def _underscored(word: str) -> str:
    name, *value = word.split("=", 1)
    if not name.startswith("--") or " " in name:  # with a space it is a value, for argparse as well
        return word
    return "=".join(["--" + name[2:].replace("-", "_"), *value])


class _Output(io.FileIO):
    """Standard output or error, whose reader may go away: what it would have shown is dropped, and the work goes on."""

    def write(self, data: Any) -> int:
        """As FileIO's, but for a pipe or a terminal that is closed."""
        number, name = self.fileno(), "standard output" if self.fileno() == 1 else "standard error"
        try:
            return super().write(data)
        except OSError as error:
            terminal = stat.S_ISCHR(os.fstat(number).st_mode)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)  # so that what is left to print does not fail again
            os.close(null)
            if error.errno != errno.EPIPE and not (error.errno == errno.EIO and terminal):
                error.filename = name  # a full disk, for instance
                raise
        if number == 1:
            print(f"note: {name} is closed; going on without it", file=sys.stderr)
        return memoryview(data).nbytes


def _shown(error: UnicodeError) -> tuple[str, int]:
    """Stand-ins for characters that the encoding of a terminal or a log lacks."""
    text = error.object[error.start : error.end].replace("±", "+-")
    return text.encode("ascii", "backslashreplace").decode(), error.end


def _open_streams() -> None:
    """Make standard output and error safe to print to: no character, closed pipe or closed stream ends a program."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: else the next file that is opened would have this number, and get what is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    codecs.register_error("shown", _shown)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", errors="shown"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            buffer, lines = io.BufferedWriter(_Output(number, "w", closefd=False)), stream.line_buffering
            lines = lines or stream.write_through  # python -u
            setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "shown", line_buffering=lines))
        elif isinstance(stream, io.TextIOWrapper):  # of a program that calls the script's functions
            stream.reconfigure(errors="shown")


def fail(message: str, status: int) -> NoReturn:
    """Print `<script>: error: <message>` as one line on stderr and exit."""
    script = Path(sys.argv[0]).name or "python"
    if os.environ.get("RANK", "0") != "0":
        time.sleep(1)  # torchrun ends the other ranks once one has failed: a message that all share is printed once
    line = re.sub(r"\s*[\r\n]+\s*", " ", message.strip())
    print(f"{script}: error: {printable(line)}", file=sys.stderr)
    sys.exit(status)


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace, forks: bool = False) -> None:
    """Call a script's main; an error that the user can fix becomes one line: bad input status 2, a failed run 1.

    Args:
        main: of the script.
        args: its arguments.
        forks: whether it forks processes (`utils.processes`), and therefore begins with one thread.
    """
    try:
        if forks:
            processes.begin()
        main(args)
        sys.stdout.flush()
    except InputError as error:
        fail(str(error), status=2)
    except RunError as error:
        fail(str(error), status=1)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        # That of saved members is what it is, and networks of others have none.
        width = ("width",) * (hasattr(args, "batch_size") and not is_external(getattr(args, "model", "")))
        smaller = [f"--{name}" for name in (*LESS_MEMORY, *width) if getattr(args, name, None) not in (None, 1)]
        way_out = f"a smaller {' or '.join(smaller)} needs less" if smaller else "use a larger machine or device"
        fail(f"out of memory; {way_out}", status=1)
    except OSError as error:  # unexpected ones: a failing disk, permissions that were taken away
        fail(f"{error.filename or 'a file'}: {error.strerror or error}", status=1)
    except KeyboardInterrupt:
        if hasattr(args, "epochs"):
            fail(f"interrupted; {again()} to resume after the last finished epoch", status=130)
        measuring = hasattr(args, "resume") and hasattr(args, "save")
        fail("interrupted" + "; what is finished is kept, re-run the same command" * measuring, status=130)


def boolean(text: str) -> bool:
    """An argument type: true, yes, 1 or false, no, 0, in any case."""
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got '{text}'")


def path(text: str) -> Path:
    """An argument type: a path, at which there may be nothing yet. `~` is the home folder, also in `--flag=~/x`."""
    shown = printable(text[:200])
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty one")
    if any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in text):  # control characters, separators of lines
        raise argparse.ArgumentTypeError(f"expected a path without control characters, got '{shown}'")
    try:
        place = expand_user(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    try:
        os.stat(place)
    except (FileNotFoundError, NotADirectoryError):
        if broken := broken_link(place):
            raise argparse.ArgumentTypeError(f"'{shown}': {broken}; create that, or name another path") from None
    except (OSError, ValueError) as error:  # a name too long, a folder without rights, a loop of links
        raise argparse.ArgumentTypeError(f"'{shown}': {getattr(error, 'strerror', None) or error}") from error
    return place


def weights(text: str) -> str:
    """An argument type: a file of weights, named with its content. One that is named so already may be gone."""
    if PINNED.fullmatch(text):
        return text
    try:
        return pinned(path(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def network(text: str) -> str:
    """An argument type: the name of a network; a user's file is named with its content."""
    try:
        return full_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("model: ")) from error


def device(text: str) -> str:
    """An argument type: auto, or a device of torch."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda, cuda:N or mps, got '{text}'")
    return text


def number(kind: type, low: float, high: float = float("inf"), open_low: bool = False) -> Callable[[str], Any]:
    """An argument type: a finite int or float from low to high; with `open_low`, not low itself."""

    def convert(text: str) -> Any:
        try:
            value = kind(text) if text.isascii() else None
        except ValueError:
            value = None
        if value is None or not low <= value <= high or abs(value) == float("inf") or (open_low and value == low):
            what = "a whole number" if kind is int else "a number"
            above = f"> {low:g}" if open_low else f">= {low:g}"
            span = above if high == float("inf") else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"expected {what} {span}, got '{text}'")
        return value

    return convert


class Seeds(argparse.Action):
    """One seed for each member: `--seed 13 17 27`, `--seed "13 17 27"`."""

    def __call__(  # noqa: D102
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        seeds = []
        for text in " ".join(values).replace(",", " ").split():
            if not (text.isascii() and text.isdigit()) or len(text) > 20 or int(text) >= 2**32:
                parser.error(f"{option}: expected whole numbers from 0 to {2**32 - 1}, got '{text}'")
            seeds.append(int(text))
        twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
        if twice is not None:
            parser.error(f"{option}: {twice} given twice, two members with one seed are the same network")
        if not seeds:
            parser.error(f"{option}: expected one seed for each member, got none")
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
        unknown = next((f"'{word}'" for word in words if word not in self.among), None if words else "nothing")
        if unknown:
            parser.error(f"{option}: expected some of {', '.join(self.among)}, got {unknown}")
        # Each once, in the order of `among`.
        setattr(namespace, self.dest, [value for word, value in self.among.items() if word in words])


COUNT, NATURAL = number(int, 1), number(int, 0)
POSITIVE, SHARE = number(float, 0), number(float, 0, 1)
THREADS = number(int, 1, 1024)


def job_count(text: str) -> str | int:
    """An argument type: auto, or how many processes."""
    try:
        return text if text == "auto" else THREADS(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(str(error).replace(", got", ", or auto, got")) from None


def add_option(group: Any, name: str, text: str, kind: Callable[[str], Any], metavar: str, **more: Any) -> None:
    """An option with a value."""
    group.add_argument(f"--{name}", help=text, type=kind, metavar=metavar, **more)


def add_choice(group: Any, name: str, text: str, choices: Iterable[str], **more: Any) -> None:
    """An option whose value is one of a few words."""
    group.add_argument(f"--{name}", help=text, choices=choices, **more)


def add_flag(group: Any, name: str, text: str, default: bool = False) -> None:
    """A boolean option: --name, --name True, --name False."""
    add_option(group, name, text, boolean, "True|False", nargs="?", const=True, default=default)


def note_idle(names: Iterable[str], why: str) -> None:
    """Say in one line which of the options that were given have no effect; `why` ends the sentence."""
    if flags := ", ".join(f"--{name}" for name in names):
        print(f"note: {flags}: no effect {why}", file=sys.stderr)


def note_idle_parts(given: dict[str, Any], corrupted: bool) -> None:
    """Say so of the options of the corrupted set (`add_measure_options`), where no corrupted images are measured."""
    names = [name for name in ("corruptions", "severities") if name in given and not corrupted]
    note_idle(names, "where no corrupted images are measured; add corrupted to --split, or leave them out")


def add_data_options(parser: Parser, measuring: bool = False) -> None:
    """Which data set, where it lies, and on what it is computed; when measuring, what the run does not say itself."""
    group = parser.add_argument_group("data and device")
    known = " (default: what the checkpoint or the run says)" if measuring else ""
    data, data_path = (None, None) if measuring else ("digits", Path("data"))
    group.add_argument("--data", "--dataset", choices=NAMES, default=data, help="data set" + known)
    add_option(group, "data_path", "folder that holds the data sets" + known, path, "DIR", default=data_path)
    if not measuring:
        add_image_size(group)
    add_option(group, "train_idx_path", ".npy of the indices to train on, in the official order", path, "FILE")
    add_option(group, "val_idx_path", ".npy of the indices to validate on", path, "FILE")
    add_flag(group, "download", "fetch a missing data set through torchvision (not tiny_imgnet)")
    add_option(group, "device", "auto, cpu, cuda, cuda:N or mps", device, "DEVICE", default="auto")
    add_option(group, "threads", "CPU threads of a member (default: cores over members, 1 or more)", THREADS, "N")


def add_image_size(group: Any) -> None:
    """The size of a user's own images."""
    text = "with --data folder: height and width of the inputs; the shorter side of an image is scaled to it, the "
    add_option(group, "image_size", text + f"middle cut out (default: {DEFAULT_SIZE})", number(int, 8, 1024), "N")


def image_size_of(parser: Parser, data: str, given: int | None) -> int | None:
    """The value of --image_size, which no published set has."""
    if given is not None and data != "folder":
        parser.error(f"--image_size: given with --data {data}, whose images have a size of their own; leave it out")
    return given or (DEFAULT_SIZE if data == "folder" else None)


def add_network_option(group: Any) -> None:
    """Which network every member is."""
    text = f"network of every member: {', '.join(MODELS)}; torchvision:NAME or timm:NAME, with weights that are drawn "
    text += "anew; or FILE.py:FACTORY, a function of a file of yours that is given the number of classes"
    add_option(group, "model", text, network, "NAME", default="resnet18")


def _add_members(group: Any) -> str:
    """Which saved members; returns what the help says of options that checkpoints answer."""
    text = "a run folder, member folders, or checkpoint files"
    add_option(group, "resume", text, path, "PATH", nargs="+", required=True)
    text = "which checkpoint of a folder to take; averaged is there after --average_from (default: best)"
    add_choice(group, "checkpoint", text, ("best", "last", "averaged"))
    known = "default: what the checkpoint says; another value is refused"
    text = "network of the members, or the new place of the file that makes it"
    add_option(group, "model", f"{text} ({known})", network, "NAME")
    return known


def add_ensemble_options(parser: Parser) -> None:
    """A saved ensemble that is put to use, without the data that it was trained on."""
    group = parser.add_argument_group("saved members")
    known = _add_members(group)
    text = f"data set that they were trained on ({known})"
    group.add_argument("--data", "--dataset", choices=NAMES, help=text)


def add_measure_options(parser: Parser, parts: bool = True) -> None:
    """Saved members, their data, and where the result goes; `parts`: on which splits, corruptions and severities."""
    add_data_options(parser, measuring=True)
    group = parser.add_argument_group("saved members")
    known = _add_members(group)
    add_option(group, "width", f"its width ({known})", number(int, 1, 2**16), "N")
    group = parser.add_argument_group("measurement")
    add_option(group, "save", "folder of the results (default: measurements/<name of the run>)", path, "DIR")
    if parts:
        text = "images (default: test; in measure_diversity.py also corrupted where its folder is found)"
        group.add_argument("--split", action=Choices, among=SPLITS, help=text)
        for name, among in (("corruptions", CORRUPTIONS), ("severities", SEVERITIES)):
            default = list(among)
            group.add_argument(f"--{name}", action=Choices, among=among, default=default, help="of the corrupted set")
