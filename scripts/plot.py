"""Draw figures, each as PDF and PNG, without Jupyter.

    python scripts/plot.py theory --to figures

theory: the seven figures of theoretical_verifications.ipynb, simulated anew (about a minute).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from utils import InputError, plots
from utils.cli import Parser, number, run
from utils.verification import published, simulate_all


def theory(args: argparse.Namespace) -> None:
    """Simulate what the theorems speak about and write the figures into the folder `--to`."""
    try:
        args.to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--to {args.to}: no folder can be made there ({error.strerror})") from error
    grids = simulate_all(args.data_sets, lambda plan: tqdm(plan, "simulations", unit="setting", disable=None))
    for name, figure in plots.theory(grids, published()).items():
        print("wrote " + ", ".join(map(str, plots.save(figure, args.to / name))))


KINDS: dict[str, Callable[[argparse.Namespace], None]] = {"theory": theory}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument("kind", choices=KINDS, help="which figures")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="folder to write into")
    parser.add_argument(
        "--data_sets", type=number(int, 2), default=20, metavar="N", help="data sets of each setting of theory"
    )
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Draw the figures of one kind."""
    KINDS[args.kind](args)


if __name__ == "__main__":
    run(main, parse_args())
