"""What the scripts share; each module says in its first line what it holds."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path


class InputError(ValueError):
    """A flag, file or folder that cannot be used: the scripts print its message as one line and exit with status 2."""


class RunError(RuntimeError):
    """A run that cannot go on: the scripts print its message as one line and exit with status 1."""


def again() -> str:
    """How to go on with what was interrupted: by the same command, but for --overwrite, which would begin anew."""
    anew = any(word.partition("=")[0] == "--overwrite" for word in sys.argv[1:])
    return "re-run the same command" + " without --overwrite" * anew


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without colours, or its type where it has none."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines()
    return lines[0] if lines else type(error).__name__


def printable(text: str) -> str:
    """A text with its control characters, and what is not Unicode, as escapes: a name must not control a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def some(names: Sequence[object], count: int = 3) -> str:
    """The first of some names, and how many more there are: a list of any length on one line."""
    text = ", ".join(str(name) for name in names[:count])
    return text + (f" and {len(names) - count} more" if len(names) > count else "")


def table_cell(value: object) -> str:
    """A value as a cell of a Markdown table, which a | or a line break in a name would end, or as text beside it."""
    return re.sub(r"([\\|`<])", r"\\\1", printable(str(value)))


def out_of_memory(error: Exception) -> bool:
    """Whether the memory of the device or of the machine was too small: torch says so by a RuntimeError of any kind."""
    words = ("out of memory", "allocate memory", "enough memory")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def control_groups(controller: str) -> list[Path]:
    """Folders of the Linux control groups that may limit this process: its own, and those around it."""
    found = []
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:  # another system
        return []
    for _, controllers, path in lines:  # of version 2 there is one line, without names
        root = Path("/sys/fs/cgroup", *[controller] * bool(controllers))
        if not controllers or controller in controllers.split(","):
            place = root / path.lstrip("/")
            found += [folder for folder in (place, *place.parents) if folder.is_relative_to(root)]
    return found
