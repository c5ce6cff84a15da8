"""Compare finished runs of main.py in one table, from their summary.json files.

    python scripts/summarize.py runs/quickstart/*

Prints member accuracy (mean and standard deviation over members), ensemble accuracy and disagreement on the test set.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import InputError
from utils.checkpoint import read_settings
from utils.cli import Parser, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders that main.py wrote")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="last", help="which checkpoints count")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    rows = []
    for folder in args.runs:
        settings = read_settings(folder)
        try:
            summary = json.loads((folder / "summary.json").read_text())[args.checkpoint]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{folder}: no summary.json of a finished run; give its main.py command again to finish it"
            ) from error
        rows.append((folder, settings, summary))
    data = {settings["data"] for _, settings, _ in rows}
    if len(data) > 1:
        raise InputError(f"runs on different data sets cannot be compared: {', '.join(sorted(data))}")
    width = max(len(folder.name) for folder, _, _ in rows)
    print(
        f"{data.pop()}, checkpoints '{args.checkpoint}', test set\n"
        f"{'run':{width}}  members  member accuracy    ensemble accuracy  disagreement"
    )
    for folder, settings, summary in rows:
        accuracies = [100 * row["test_acc"] for row in summary["members"]]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        member = f"{statistics.mean(accuracies):.2f}{spread} %"
        differ = summary["ensemble"].get("test_disagreement")
        print(
            f"{folder.name:{width}}  {len(settings['seed']):7d}  {member:17}  "
            f"{100 * summary['ensemble']['test_acc']:15.2f} %  {'-' if differ is None else f'{100 * differ:10.2f} %'}"
        )
    print("from " + ", ".join(str(folder / "summary.json") for folder, _, _ in rows))


if __name__ == "__main__":
    run(main, parse_args())
