"""main.py that gets a signal at a named point: FAULT="<function> <n> <before|after> <signal> [<rank> <file>]".

The signal comes before or after the n-th call of the function, on one rank if it is given, and not where the file is:
it is made then, so that a restarted process goes on.
"""

import os
import pkgutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))


def arm(name: str, count: str, when: str, number: str, rank: str = "0", marker: str = "") -> None:
    """Put the signal in place; the rank is that of a process that is forked later, too."""
    owner, attribute = name.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner)
    original, calls = getattr(owner, attribute), 0

    def faulty(*args, **kwargs):
        nonlocal calls
        if os.environ.get("RANK", "0") != rank or (marker and Path(marker).exists()):
            return original(*args, **kwargs)
        calls += 1
        if calls == int(count) and when == "before":
            shoot()
        result = original(*args, **kwargs)
        if calls == int(count) and when == "after":
            shoot()
        return result

    def shoot():
        if marker and marker != "-":
            Path(marker).touch()
        os.kill(os.getpid(), int(number))

    setattr(owner, attribute, faulty)


if __name__ == "__main__":
    fault = os.environ["FAULT"].split()
    if fault:
        arm(*fault)
    import main
    from utils.cli import run

    run(main.launch, main.parse_args())
