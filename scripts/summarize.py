"""Compare measured ensembles in one table, from the files that measure_*.py wrote.

    python scripts/summarize.py measurements/*

A folder holds the measurements of one ensemble. Ensembles that were trained by the same settings but for their seeds
are one row: mean ± standard deviation over ensembles (over members where there is one ensemble), and the 95 % interval:
Student's over ensembles where there are two or more, else over resampled test images. Below, the paired differences of
ensembles of the same seeds to SAM with the same rho, or else to the first SAM ensemble, with intervals over ensembles
and test images, or one of them where the other is not known.
"""

import argparse
import csv
import io
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from utils import InputError, first_line
from utils.checkpoint import write_atomically
from utils.cli import Parser, run
from utils.ensemble import NEUTRAL
from utils.metrics import crossed_interval, paired_bootstrap, t_interval
from utils.results import Ensemble, check_alike, family_of, groups_of, protocol_of, read_ensemble, setting_of

# Title, factor, digits, and whether the value is one of test samples (for the paired bootstrap).
COLUMNS = {
    "member": ("member acc. %", 100, 2),
    "ensemble": ("ensemble acc. %", 100, 2),
    "gain": ("gain, points", 100, 2),
    "eir": ("EIR", 1, 3),
    "der": ("DER", 1, 3),
    "disagreement": ("disagreement %", 100, 2),
    "variance": ("variance", 1, 4),
    "nll": ("ensemble NLL", 1, 4),
    "ece": ("ensemble ECE %", 100, 2),
    "corrupted_member": ("member acc. % (corrupted)", 100, 2),
    "corrupted_ensemble": ("ensemble acc. % (corrupted)", 100, 2),
    "corrupted_gain": ("gain, points (corrupted)", 100, 2),
    "corrupted_eir": ("EIR (corrupted)", 1, 3),
    "corrupted_disagreement": ("disagreement % (corrupted)", 100, 2),
    "corrupted_nll": ("ensemble NLL (corrupted)", 1, 4),
    "corrupted_ece": ("ensemble ECE % (corrupted)", 100, 2),
    "sharpness": ("sharpness (worst, l2)", 1, 4),
    "sharpness_linf": ("sharpness (worst, linf)", 1, 4),
    "sharpness_average": ("sharpness (average, l2)", 1, 4),
    "hessian_trace": ("trace of Hessian", 1, 1),
    "hessian_top": ("top eigenvalue", 1, 2),
    "fisher": ("Fisher trace", 1, 3),
    "ntk": ("log det NTK", 1, 1),
}

SOURCES = ("measured by", "and", "trained with", "seeds", "commit", "weights")
BOTH = "ensembles, images"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="folders that measure_*.py wrote")
    parser.add_argument(
        "--format", choices=("text", "markdown", "latex", "csv"), default="text", help="form of the tables"
    )
    parser.add_argument("--to", type=Path, metavar="FILE", help="write there instead of on the terminal")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Print or write the tables."""
    ensembles = [read_ensemble(folder) for folder in args.folders]
    try:
        check_alike(ensembles)
        text = tables(ensembles, args.format)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        # Something is missing in a file, or is of another kind.
        if isinstance(error, InputError):
            raise
        folders = ", ".join(map(str, args.folders))
        raise InputError(f"{folders}: a result file there is damaged ({first_line(error)}); measure it anew") from error
    if args.to is None:
        print(text, end="")
    else:
        try:
            args.to.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(args.to, text.encode())
        except OSError as error:
            raise InputError(f"--to {args.to}: cannot be written ({error.strerror}); name another file") from error


def baseline_of(rows: list[Ensemble], groups: dict[str, list[Ensemble]]) -> str | None:
    """The SAM ensembles that some ensembles are compared with: those of the same rho, else the first ones."""
    sam = [name for name, others in groups.items() if family_of(others[0]) == "sam"]
    rho = None if family_of(rows[0]) == "sam" else (rows[0].content.get("trained") or {}).get("rho")
    return next((name for name in sam if groups[name][0].content["trained"]["rho"] == rho), next(iter(sam), None))


def difference(name: str, pairs: list[tuple[Ensemble, Ensemble]]) -> tuple[float, list[float] | None, str] | None:
    """Mean difference of a value over pairs of ensembles, its 95 % interval, and over what that was taken."""
    both = [(a.values.get(name), b.values.get(name)) for a, b in pairs]
    if not both or any(a is None or b is None for a, b in both):
        return None
    gaps = [a - b for a, b in both]
    mean, columns = statistics.mean(gaps), [(a.by_sample.get(name), b.by_sample.get(name)) for a, b in pairs]
    known = all(a is not None and b is not None for a, b in columns)
    if known and len({len(column) for pair in columns for column in pair}) == 1:
        by_sample = torch.stack([a.double() - b.double() for a, b in columns])
        if len(gaps) > 1:
            return mean, crossed_interval(by_sample), BOTH
        return mean, paired_bootstrap(by_sample[0]), "images"
    return (mean, t_interval(gaps), "ensembles") if len(gaps) > 1 else (mean, None, "-")


def tables(ensembles: list[Ensemble], form: str) -> str:
    """All tables, as text."""
    groups, first = groups_of(ensembles), ensembles[0].content
    shown = [name for name in COLUMNS if any(e.values.get(name) is not None for e in ensembles)]
    header = ["method", "ensembles", "members", *(COLUMNS[name][0] for name in shown)]
    body = []
    for name, rows in groups.items():
        cells = [name, str(len(rows)), str(len(rows[0].seeds))]
        for column in shown:
            cells.append(_cell(column, [row.values.get(column) for row in rows], rows))
        body.append(cells)
    pairs_header = ["difference of", "to", "pairs", "over", *(COLUMNS[n][0] for n in shown)]
    pairs_body = []
    for name, rows in groups.items():
        baseline = baseline_of(rows, groups)
        if baseline is None or name == baseline:
            continue
        by_seeds = {row.seeds: row for row in groups[baseline]}
        pairs = [(row, by_seeds[row.seeds]) for row in rows if row.seeds in by_seeds]
        found = {column: difference(column, pairs) for column in shown}
        over = next((f[2] for f in found.values() if f is not None and f[1] is not None), "-")
        cells = (_difference_cell(column, found[column]) for column in shown)
        pairs_body.append([name, baseline, str(len(pairs)), over if pairs else "no same seeds", *cells])
    notes = [
        f"{setting_of(first)}, checkpoints '{protocol_of(ensembles[0], 'checkpoint')}', test set of "
        f"{first['data']['test']} images. "
        "±: standard deviation over ensembles, or over the members of a single one; [ ]: 95 % interval."
    ]
    if any(row[3] == BOTH for row in pairs_body):
        notes[0] += " Differences of NLL, ECE and sharpness: over ensembles only, with the images as they are."
    if form == "csv":
        about = [_csv([["folder", *SOURCES], *([str(e.folder), *source_of(e).values()] for e in ensembles)])]
        return "\n".join([_csv([header, *body]), *([_csv([pairs_header, *pairs_body])] if pairs_body else []), *about])
    blocks = [_layout(header, body, form)]
    if pairs_body:
        blocks.append(_layout(pairs_header, pairs_body, form))
    sources = [
        f"{e.folder}: "
        + "; ".join(
            f"{name} {value}"
            for name, value in source_of(e).items()
            if value and (form != "text" or name not in ("and", "trained with"))
        )
        for e in ensembles
    ]
    lead = {"text": "", "markdown": "- ", "latex": "% "}[form]
    notes = [lead * (form == "latex") + note for note in notes]
    return "\n".join([*notes, "", *blocks, *(lead + line for line in sources)]) + "\n"


def source_of(ensemble: Ensemble) -> dict[str, str]:
    """Where the numbers of an ensemble come from, by the names of `SOURCES`."""
    content = ensemble.content
    settings = {k: v for k, v in (content.get("trained") or {}).items() if k != "seed" and NEUTRAL.get(k, k) != v}
    values = (
        content["command"],
        content.get("sharpness", {}).get("command", ""),
        " ".join(f"--{name} {value}" for name, value in settings.items() if value is not None),
        " ".join(map(str, ensemble.seeds)),
        str(content.get("environment", {}).get("commit") or ""),
        ", ".join(member["sha256_of_weights"][:8] for member in content["members"]),
    )
    return dict(zip(SOURCES, values, strict=True))


def _cell(column: str, values: list[float | None], rows: list[Ensemble]) -> str:
    _, factor, digits = COLUMNS[column]
    if any(value is None for value in values):
        return "-"
    mean = _number(factor * statistics.mean(values), digits)
    if len(values) > 1:
        mean += f" ± {_number(factor * statistics.stdev(values), digits)}"
    elif column in rows[0].spread:
        mean += f" ± {_number(factor * rows[0].spread[column], digits)}"
    if len(values) > 1:
        edges = t_interval(values)
    else:
        edges = rows[0].intervals.get(column)
        if edges is None and column in rows[0].by_sample:
            edges = paired_bootstrap(rows[0].by_sample[column].double())
    return mean + _interval(edges, factor, digits)


def _difference_cell(column: str, found: tuple[float, list[float] | None, str] | None) -> str:
    _, factor, digits = COLUMNS[column]
    return "-" if found is None else _number(factor * found[0], digits, "+") + _interval(found[1], factor, digits)


def _interval(interval: list[float] | None, factor: float, digits: int) -> str:
    return "" if interval is None else " [" + ", ".join(_number(factor * edge, digits) for edge in interval) + "]"


def _number(value: float, digits: int, sign: str = "") -> str:
    """With so many digits after the point; worst-case sharpness in linf may be beyond 1e9."""
    return f"{value:{sign}.3g}" if abs(value) >= 1e5 else f"{value:{sign}.{digits}f}"


def _csv(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _layout(header: list[str], body: list[list[str]], form: str) -> str:
    """One table. As text it is turned, a column for each method: that fits a terminal."""
    if form == "markdown":
        lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *body]]
    elif form == "latex":
        special = str.maketrans({c: "\\" + c for c in "%_&#$"} | {"±": r"$\pm$"})
        escaped = [[cell.translate(special) for cell in row] for row in [header, *body]]
        lines = [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\hline"]
        lines += [" & ".join(row) + r" \\" for row in escaped]
        lines = [*lines[:3], r"\hline", *lines[3:], r"\hline", r"\end{tabular}"]
    else:
        turned = list(zip(header, *body, strict=True))
        widths = [max(len(row[i]) for row in turned) for i in range(len(turned[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in turned
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main, parse_args())
