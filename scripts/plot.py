"""Draw figures, each as PDF and PNG, without Jupyter.

    python scripts/plot.py tradeoff --from measurements/* --to figures/tradeoff
    python scripts/plot.py theory --to figures/theory

From folders that the measuring scripts wrote:
tradeoff: sharpness against diversity, a point an ensemble. benchmark: accuracy of members and ensemble. severity:
accuracy, NLL and RMSCE against the severity of corruption. ensemble_size: the same against the number of members, NLL
calibrated where files hold that. The second and the third also show the differences to SAM of the same seeds. ood:
entropy of test images and of other data, and ROC curves of entropy and mutual information. reliability: accuracy
against confidence, before and after one temperature.

From run folders of main.py:
curves: training curves. sets: which samples are trained with SAM, of one SharpBalance run. landscape: the loss around
members, along random directions and along the top eigenvector of the Hessian, and between them. The numbers of the last
two are saved beside the figure as <name>.json, from which --from draws it again. Re-run the same command to resume an
interrupted landscape.

theory: the seven figures of theoretical_verifications.ipynb into the folder --to, simulated again (about a minute), or
from the theory.json that this leaves beside them: --from results/theory/theory.json.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("GOMP_SPINCOUNT", "4000")  # before torch is loaded, whose threads otherwise wait at full speed
os.environ["MPLBACKEND"] = "agg"  # figures need no display, and matplotlib refuses to start by an unknown backend

from matplotlib.figure import Figure
from tqdm import tqdm

from utils import InputError, plots, run_plots, theory_plots, uncertainty_plots
from utils.cli import Parser, number, path, run
from utils.files import read_json, write_json
from utils.landscape import compute_landscape, compute_sets, read_landscape, read_sets
from utils.results import Ensemble, check_alike, read_ensemble, read_run, require
from utils.verification import published, simulate_all

# Kinds by what they are drawn from; each is a function of its module.
MEASURED, OF_RUNS = ("tradeoff", "benchmark", "severity", "ensemble_size"), ("curves", "sets", "landscape")
UNCERTAINTY = ("ood", "reliability")
DATA_SETS = 20  # of each setting of theory
# Kinds whose numbers are computed from run folders and saved beside the figure: how to compute and how to read them.
COMPUTED = {"sets": (compute_sets, read_sets), "landscape": (compute_landscape, read_landscape)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("kind", choices=[*MEASURED, *UNCERTAINTY, *OF_RUNS, "theory"], help="which figure")
    add("--from", type=path, nargs="+", dest="folders", metavar="FOLDER", help="result folders, or a file of numbers")
    add("--to", type=path, required=True, metavar="FILE", help="the figure, without suffix; of theory a folder")
    text = f"data sets of each setting of theory, simulated (default: {DATA_SETS})"
    add("--data_sets", type=number(int, 2), metavar="N", help=text)
    args = parser.parse_args(argv)
    if args.kind != "theory" and args.folders is None:
        parser.error(f"--from: {args.kind} is drawn from result folders, name them")
    if args.kind == "theory" and args.folders is not None and len(args.folders) != 1:
        parser.error(f"--from: expected one theory.json, got {len(args.folders)} files; leave it out to simulate again")
    if args.data_sets and (args.kind != "theory" or args.folders is not None):
        parser.error(
            "--data_sets: has no effect here, nothing is simulated; leave it out, or call theory without --from"
        )
    return args


def main(args: argparse.Namespace) -> None:
    """Draw the figures of one kind."""
    if args.kind != "theory" and args.to.is_dir():
        raise InputError(f"--to {args.to}: is a folder; name a file in it, for instance {args.to / args.kind}")
    folder = args.to if args.kind == "theory" else args.to.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--to {args.to}: cannot be written ({error.strerror}); name another place") from error
    figures = theory(args) if args.kind == "theory" else {args.to.name: draw(args)}
    for name, figure in figures.items():
        print("wrote " + ", ".join(map(str, plots.save(figure, folder / name))))


def draw(args: argparse.Namespace) -> Figure:
    """The figure of a kind other than theory."""
    modules = dict.fromkeys(MEASURED, plots) | dict.fromkeys(UNCERTAINTY, uncertainty_plots)
    return getattr(modules.get(args.kind, run_plots), args.kind)(read(args))


def read(args: argparse.Namespace) -> list[Ensemble]:
    """The ensembles that a figure shows, which must be comparable."""
    if args.kind in COMPUTED:
        compute, read_numbers = COMPUTED[args.kind]
        source = args.folders[0]
        if len(args.folders) > 1 or not source.is_file():
            source = plots.file_beside(args.to, "json")
            compute(args.folders, source)
        return read_numbers(source)
    ensembles = [(read_run if args.kind == "curves" else read_ensemble)(folder) for folder in args.folders]
    check_alike(ensembles)
    if any("corrupted" in one.content.get("result", {}) for one in ensembles):
        for one in ensembles:
            require(one, "corrupted", "mean")
    return ensembles


def theory(args: argparse.Namespace) -> dict[str, Figure]:
    """The figures of the theorems by their names; new simulations are written into the folder `--to`."""
    if args.folders is None:
        data_sets = args.data_sets or DATA_SETS
        grids = simulate_all(data_sets, partial(tqdm, desc="simulations", unit="setting", disable=None))
        write_json(args.to / "theory.json", {"data_sets": data_sets, "grids": grids}, indent=None)
        print(f"wrote {args.to / 'theory.json'}")
        return theory_plots.theory(grids, published(), data_sets)
    remedy = "leave --from out to simulate again"
    content = read_json(args.folders[0], remedy)
    try:
        return theory_plots.theory(content["grids"], published(), content["data_sets"])
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{args.folders[0]}: not the numbers of these figures; {remedy}") from error


if __name__ == "__main__":
    run(main, parse_args())
