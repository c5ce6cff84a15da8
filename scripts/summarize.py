"""Compare measured ensembles in one table, from the files that measure_*.py wrote.

    python scripts/summarize.py measurements/*

Each folder holds the measurements of one ensemble. Ensembles that were trained by the same settings apart from their
seeds share a row: mean ± standard deviation over ensembles and the 95 % interval over new ensembles and test images, or
over ensembles alone where values by image are not kept. One ensemble is in a table of its own, with the standard
deviation over members and the interval over test images, of these networks only. A further table has the paired
differences between ensembles of the same seeds and SAM with the same rho, or else the first SAM ensemble, with
intervals over the same populations; one pair alone has no interval. Where plain deep ensembles were measured, a last
one has the number of plain members that each method is worth.
"""

import argparse
import csv
import io
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tabulate import tabulate

from utils import InputError, first_line, printable, results, table_cell
from utils.cli import Parser, path, run
from utils.equivalent import Equivalent, plain_group, training_cost, worth
from utils.files import OTHERWISE, write_atomically
from utils.results import Ensemble, Value
from utils.run import OLD_DEFAULTS

# The columns, by the names of `Ensemble.values`.
COLUMNS = results.VALUES | {
    f"corrupted_{name}": value._replace(title=f"{value.title} (corrupted)")
    for name, value in results.VALUES.items()
    if name not in ("der", "variance", "ece", "ece_calibrated")  # ECE is biased upwards by few images: RMSCE is not
}
WORTH = ("worth of", "ensembles", "members", "plain members", "95 % interval", "over", "training, plain members")
Columns = dict[str, Value]
LONG = ("and", "trained with")  # sources that are left out on the terminal


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument("folders", type=path, nargs="+", metavar="FOLDER", help="folders that measure_*.py wrote")
    parser.add_argument("--format", choices=("text", "markdown", "latex", "csv"), default="text", help="of the tables")
    parser.add_argument("--to", type=path, metavar="FILE", help="write there instead of on the terminal")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Print or write the tables."""
    try:
        ensembles = [results.read_ensemble(folder) for folder in args.folders]
        results.check_alike(ensembles)
        text = tables(ensembles, args.format)
    except InputError:
        raise
    except OTHERWISE as error:
        folders = ", ".join(map(str, args.folders))
        raise InputError(f"{folders}: a result file is damaged ({first_line(error)}); measure it again") from error
    if args.to is None:
        print(text, end="")
        return
    try:
        args.to.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--to {args.to}: cannot be written ({error.strerror}); name another file") from error
    write_atomically(args.to, text.encode(errors="backslashreplace"))


def tables(ensembles: list[Ensemble], form: str) -> str:
    """All tables with notes and sources, in one of the formats of --format."""
    groups, first = results.groups_of(ensembles), ensembles[0].content
    columns = COLUMNS | results.ood_values(ensembles) | results.SHARPNESS
    shown = {name: of for name, of in columns.items() if any(one.values.get(name) is not None for one in ensembles)}
    titles = [column.title for column in shown.values()]
    head, rows = ["method", "ensembles", "members", *titles], {"single": [], "several": []}
    for title, group in groups.items():
        cells = [
            title,
            str(len(group)),
            str(len(group[0].seeds)),
            *(_cell(column, name, group) for name, column in shown.items()),
        ]
        rows["several" if len(group) > 1 else "single"].append(cells)
    differences = [["difference of", "to", "pairs", *titles], *difference_rows(groups, shown)]
    # Rows of one ensemble and of several have intervals over different populations: not in one table.
    blocks = [_table([head, *part], form) for part in rows.values() if part]
    blocks += [_table(differences, form)] * (len(differences) > 1)
    members = [[*WORTH], *worth_rows(groups)]
    blocks += [_table(members, form)] * (len(members) > 1)
    if form == "csv":
        sources = [[str(one.folder), *source_of(one).values()] for one in ensembles]
        return "\n".join([*blocks, _table([["folder", *source_of(ensembles[0])], *sources], form)])
    note = f"{results.setting_of(first)}, checkpoints '{results.protocol_of(ensembles[0], 'checkpoint')}', "
    note += f"test set of {first['data']['test']} images{_corrupted_images(ensembles)}. "
    if first["protocol"].get("average") == "logits":
        note += "Ensembles: softmax of the mean logit. "
    note += " ".join(explain(list(groups.values()), shown))
    if len(members) > 1:
        note += f" Worth: the number of members at which {len(plain_group(groups)[0].seeds)} plain ones or fewer have "
        note += "the same calibrated NLL (deep ensemble equivalent); training: in trainings of one plain member."
    if any(map(results.beyond_linf, ensembles)):
        note += f" Sharpness in linf at a radius above {results.MAX_LINF} is left out."
    unknown = [
        column.title for name, column in shown.items() if any(_infinite(one.values.get(name)) for one in ensembles)
    ]
    if unknown:
        note += f" inf, nan: the loss leaves the range of float32 ({', '.join(unknown)})."
    lead = {"text": "", "markdown": "- ", "latex": "% "}[form]
    lines = []
    for one in ensembles:
        source = source_of(one).items()
        known = [f"{name} {value}" for name, value in source if value and (form != "text" or name not in LONG)]
        line = f"{one.folder}: {'; '.join(known)}"
        lines.append(lead + (table_cell(line) if form == "markdown" else printable(line)))
    return "\n".join([lead * (form == "latex") + note, "", *blocks, *lines]) + "\n"


def _corrupted_images(ensembles: list[Ensemble]) -> str:
    """How many of the test images the corrupted ones are copies of, as the end of a sentence."""
    sets = (one.content["result"].get("corrupted") for one in ensembles)
    counts = {round(part["mean"]["samples"]) for part in sets if part and "samples" in part["mean"]}
    return f", corrupted copies of {max(counts)} of them" if counts else ""  # one number, by `results.check_alike`


def _infinite(value: float | None) -> bool:
    """Whether a value was measured but is not finite."""
    return value is not None and not math.isfinite(value)


def explain(groups: list[list[Ensemble]], shown: Columns) -> list[str]:
    """What ± and [ ] stand for in the tables, and over what population."""
    several, found = [group for group in groups if len(group) > 1], []
    if len(several) < len(groups):
        text = "±: standard deviation over members; [ ]: 95 % interval over test images, of these networks only."
        found.append(f"One ensemble: {text}" if several else text)
    if several:
        over = results.populations(several, {name: column.title for name, column in shown.items()})
        text = f"±: standard deviation over ensembles; [ ]: 95 % interval {over}."
        found.append("Several: " * bool(found) + text)
    return found


def difference_rows(groups: dict[str, list[Ensemble]], shown: Columns) -> list[list[str]]:
    """The rows of the table of differences: of each group to the SAM ensembles of the same seeds."""
    rows = []
    for name, group in groups.items():
        baseline = baseline_of(group, groups)
        if baseline is None or name == baseline:
            continue
        by_seeds = {one.seeds: one for one in groups[baseline]}
        pairs = [(one, by_seeds[one.seeds]) for one in group if one.seeds in by_seeds]
        found = {column: results.difference_of(pairs, column) for column in shown}
        cells = ["-" if part is None else _text(shown[name], *part[:2], sign="+") for name, part in found.items()]
        rows.append([name, baseline, str(len(pairs)) if pairs else "no same seeds", *cells])
    return rows


def baseline_of(group: list[Ensemble], groups: dict[str, list[Ensemble]]) -> str | None:
    """The SAM ensembles that some ensembles are compared with: those of the same rho, else the first ones."""
    sam = {name: others[0].content["trained"]["rho"] for name, others in groups.items() if results.is_sam(others[0])}
    rho = None if group[0].key == "sam" else (group[0].content.get("trained") or {}).get("rho")
    return next((name for name in sam if sam[name] == rho), next(iter(sam), None))


def source_of(ensemble: Ensemble) -> dict[str, str]:
    """Where the numbers of an ensemble come from: commands, settings, seeds, commit and weights."""
    content, settings = ensemble.content, ensemble.content.get("trained") or {}
    settings = {k: v for k, v in settings.items() if k != "seed" and v is not None and OLD_DEFAULTS.get(k, k) != v}
    return {
        "measured by": commands_of(content),
        "and": commands_of(content.get("sharpness", {})),
        "trained with": " ".join(f"--{name} {value}" for name, value in settings.items()),
        "seeds": " ".join(map(str, ensemble.seeds)),
        "commit": str(content.get("environment", {}).get("commit") or ""),
        "weights": ", ".join(member["sha256_of_weights"][:8] for member in content["members"]),
    }


def commands_of(content: dict) -> str:
    """The commands whose results a file holds."""
    return " && ".join([*(call["command"] for call in content.get("earlier", [])), content.get("command", "")])


def worth_rows(groups: dict[str, list[Ensemble]]) -> list[list[str]]:
    """The rows of the table of plain members: what each group is worth, and what its training cost, in plain ones."""
    plain, rows = plain_group(groups), []
    for name, group in groups.items() if plain else ():
        found, cost = worth(group, plain), training_cost(group)
        if found is None or (group is plain):
            continue
        over = {results.BOTH: "new ensembles, new images", "images": "images, these networks", "ensembles": "ensembles"}
        row = [name, str(len(group)), str(len(group[0].seeds)), *_members(found), over[found.over]]
        rows.append([*row, "-" if cost is None else f"{cost:.2f}"])
    return rows


def _members(found: Equivalent) -> tuple[str, str]:
    """A deep ensemble equivalent and its interval in words."""

    def text(members: float) -> str:
        return f"more than {found.largest}" if math.isinf(members) else f"{members:.2f}"

    if found.interval is None:
        return text(found.members), "-"
    low, high = found.interval
    return text(found.members), text(low) if math.isinf(low) else f"{text(low)} to {text(high)}"


def _cell(column: Value, name: str, group: list[Ensemble]) -> str:
    values = [one.values.get(name) for one in group]
    if None in values:
        return "-"
    spread = results.standard_deviation(values) if len(values) > 1 else group[0].spread.get(name)
    return _text(column, *results.estimate_of(group, name), spread)


def _text(column: Value, mean: float, interval: list[float] | None, spread: float | None = None, sign: str = "") -> str:
    """A mean with its standard deviation and interval, where they are known."""
    _, _, factor, digits = column

    def number(value: float, sign: str = "") -> str:
        # Worst-case sharpness in linf can exceed 1e9.
        value *= factor
        return f"{value:{sign}.3g}" if abs(value) >= 1e5 else f"{value:{sign}.{digits}f}"

    text = number(mean, sign if math.isfinite(mean) else "")
    if spread is not None:
        text += f" ± {number(spread)}"
    return text if interval is None else f"{text} [{', '.join(map(number, interval))}]"


def _table(rows: list[list[str]], form: str) -> str:
    """One table, whose first row is the header; as text it is transposed, to fit a terminal."""
    rows = [[table_cell(cell) if form == "markdown" else printable(cell) for cell in row] for row in rows]
    if form == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue()
    if form == "text":
        return tabulate(zip(*rows, strict=True), tablefmt="plain", disable_numparse=True) + "\n"
    style = {"markdown": "github", "latex": "latex"}[form]
    text = tabulate(rows[1:], rows[0], style, disable_numparse=True, colalign=("left",), stralign="right")
    return (text.replace("±", r"$\pm$") if form == "latex" else text) + "\n"


if __name__ == "__main__":
    run(main, parse_args())
