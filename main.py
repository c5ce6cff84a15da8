"""Train a deep ensemble, a SAM ensemble or a SharpBalance ensemble.

    python main.py                                                   # deep ensemble on digits
    python main.py --sam --rho 0.1                                   # every member with SAM
    python main.py --sam --rho 0.1 --flat_ratio 0.5                  # SharpBalance

Writes under --save_path (default runs/<data>_<method>): args.json, environment.json, command.txt, summary.json, and for
each member seed_<seed>/ with checkpoint.pth.tar, model_best.pth.tar, log.jsonl, fisher.npy and sam_mask.npy.
The same command again goes on with a run that was cut off. `--jobs K` deals the members out to K processes of this
machine, and the result is the same for any K; `torchrun --nproc-per-node K main.py ...` does so on several machines,
with the same result where --threads is the same.
"""

import argparse
import logging
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from models import MODELS, create_model
from utils import InputError, distributed
from utils.checkpoint import find_checkpoints, read_settings, run_of
from utils.cli import (
    Parser,
    Seeds,
    add_checkpoint_options,
    add_data_options,
    add_flag,
    cores,
    fail,
    number,
    path,
    run,
    start_device,
)
from utils.data import AUGMENTATIONS, DATASETS, load_data
from utils.ensemble import evaluate_members, train_ensemble
from utils.partition import DRAWN, PICKED, SELECT, UNSELECTED

# The paper's recipe for the colour sets, small ones for the others: (width, epochs, batch_size, lr).
RECIPES = {
    "cifar10": (64, 200, 128, 0.1),
    "cifar100": (64, 200, 128, 0.1),
    "tiny_imgnet": (64, 200, 128, 0.1),
    "fashion_mnist": (16, 30, 128, 0.1),
    "digits": (8, 30, 64, 0.1),
}
USUAL_RHO = {False: 0.05, True: 0.5}  # of SAM, and of ASAM, whose rho is relative to the weights; of their papers
CHECKPOINT_TITLES = {"last": "end of training", "best": "best validation accuracy", "averaged": "mean of the weights"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and fill in what depends on the data set.

    A bad or contradicting setting ends the program with one line and status 2, before any data is read.
    """
    parser = build_parser()
    given = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(given)
    if args.evaluate:
        # Of the run, unless given: by another split, training images would count as validation.
        run_folder = run_of(args.resume[0] if args.resume else args.save_path or default_folder(args))
        try:
            settings = read_settings(run_folder) if run_folder else {}
        except InputError as error:
            parser.error(str(error))
        told = {name: settings.get(name) for name in ("data", "data_path", "train_idx_path", "val_idx_path")}
        args = parser.parse_args([*words_of(told), *given])
    elif args.resume:
        if len(args.resume) > 1 or not (args.resume[0] / "args.json").is_file():
            parser.error(
                f"argument --resume: {args.resume[0]} is not a run folder with args.json, which training needs"
            )
        try:
            settings = read_settings(args.resume[0])
        except InputError as error:
            parser.error(str(error))
        # Flags that are given stand; if they contradict the run they are refused where it is opened.
        resume = args.resume
        args = parser.parse_args([*words_of(settings), *given])
        args.save_path, args.resume, args.overwrite, args.evaluate = resume[0], None, False, False

    for name, value in zip(("width", "epochs", "batch_size", "lr"), RECIPES[args.data], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_method(parser, args)
    if args.rho is None:
        args.rho = USUAL_RHO[args.sam_adaptive] if args.sam else 0.0
    elif args.rho >= 10 * USUAL_RHO[args.sam_adaptive]:
        usual = USUAL_RHO[args.sam_adaptive]
        print(
            f"note: --rho {args.rho:g} is large; {usual:g} is usual{' with --sam_adaptive' * args.sam_adaptive}",
            file=sys.stderr,
        )
    if args.initial_epochs is None:
        args.initial_epochs = args.epochs // 2
    if args.flat_ratio:
        released = "others" if args.data == "cifar10" else "one"
        args.select = args.select or PICKED[args.partition]
        args.unselected = args.unselected or (released if args.partition == "released" else "normal")
    if args.save_path is None:
        args.save_path = default_folder(args)

    info = DATASETS[args.data]
    try:
        with torch.device("meta"):  # no memory, no random numbers
            create_model(args.model, info.num_classes, args.width, info.image_size, len(info.mean))
    except ValueError as error:
        parser.error(f"argument --{error}")
    return args


def words_of(settings: dict) -> list[str]:
    """The settings of an args.json as the words of a command line, so that they are checked as those are."""
    words = []
    for name, value in settings.items():
        if value is not None:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(f"--{name}={text}")
    return words


def check_method(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse settings that contradict each other."""
    if args.flat_ratio and not args.sam:
        parser.error(
            f"argument --flat_ratio: {args.flat_ratio} given without --sam, so that no sample could have SAM; "
            "add --sam, or leave --flat_ratio out"
        )
    if args.sam_adaptive and not args.sam:
        parser.error("argument --sam_adaptive: given without --sam; add --sam, or leave it out")
    for name in ("select", "unselected"):
        if getattr(args, name) and not args.flat_ratio:
            parser.error(f"argument --{name}: {getattr(args, name)} given without a --flat_ratio above 0; add one")
    if args.match_size and args.select not in DRAWN:
        parser.error("argument --match_size: given without --select random or same, whose sets it sizes")
    if args.average_from is not None and args.average_from >= args.epochs:
        parser.error(
            f"argument --average_from: {args.average_from} given with --epochs {args.epochs}: no step would be averaged"
        )
    if args.flat_ratio and args.initial_epochs is not None and args.initial_epochs >= args.epochs:
        parser.error(
            f"argument --initial_epochs: {args.initial_epochs} given with --epochs {args.epochs}: the split would "
            f"never come; give at most {args.epochs - 1}, or leave --flat_ratio out for SAM on all samples"
        )
    if args.rho and not args.sam:
        print(f"note: --rho {args.rho} has no effect without --sam", file=sys.stderr)
    drawn = args.select in DRAWN and not args.match_size
    if args.unselected and drawn:
        print(f"note: --unselected {args.unselected} has no effect with --select {args.select}", file=sys.stderr)
    if args.augmentation == "flip" and not DATASETS[args.data].flip:
        print(f"note: images of {args.data} are never mirrored: --augmentation flip is none", file=sys.stderr)
    if args.flat_ratio and len(args.seed) == 1 and not drawn:
        print("note: one member alone: there are no others whose samples it could take over", file=sys.stderr)


def method(args: argparse.Namespace) -> str:
    """deep_ensemble, deep_ensemble_sam or sharpbalance."""
    if not args.sam:
        return "deep_ensemble"
    return "sharpbalance" if args.flat_ratio else "deep_ensemble_sam"


def default_folder(args: argparse.Namespace) -> Path:
    """Where a run goes without --save_path."""
    return Path("runs") / f"{args.data}_{method(args)}"


def build_parser() -> Parser:
    """All options, in groups."""
    parser = Parser(__doc__)
    add_data_options(parser)

    group = parser.add_argument_group("network")
    group.add_argument("--model", choices=MODELS, default="resnet18", help="network of every member")
    group.add_argument(
        "--width", type=number(int, 1), metavar="N", help=f"64 is the published size of every network ({_by_data(0)})"
    )

    group = parser.add_argument_group("ensemble")
    group.add_argument(
        "--seed", nargs="+", action=Seeds, default=[13, 17, 27], metavar="N", help="one seed for each member"
    )
    add_flag(group, "sam", "train with sharpness-aware minimization (SAM)")
    group.add_argument(
        "--rho",
        type=number(float, 0),
        metavar="R",
        help="radius of SAM's perturbation, in the norm of all weights (default: 0.05, with --sam_adaptive 0.5)",
    )
    add_flag(group, "sam_adaptive", "ASAM: the perturbation of each weight is relative to its size, and so is --rho")
    group.add_argument(
        "--flat_ratio",
        type=number(float, 0, 1),
        default=0.0,
        metavar="K",
        help="share of the samples that each member picks by sharpness, 0 to 1; above 0 is SharpBalance",
    )
    group.add_argument(
        "--initial_epochs",
        type=number(int, 0),
        metavar="N",
        help="epochs with SAM on all samples, before the scores are exchanged (default: half of --epochs)",
    )
    group.add_argument(
        "--partition",
        choices=("released", "paper"),
        default="released",
        help="released: as the authors' code (select flattest; unselected others on cifar10, one elsewhere); "
        "paper: as its text (select sharpest, unselected normal)",
    )
    group.add_argument("--select", choices=SELECT, help="which samples a member picks (default: by --partition)")
    group.add_argument(
        "--unselected",
        choices=UNSELECTED,
        help="samples that nobody picked: normal steps for all, SAM at one member, or SAM at all others but one "
        "(default: by --partition)",
    )
    add_flag(
        group,
        "match_size",
        "with --select random or same: sets of the size that SharpBalance's would have at the split, by --partition",
    )
    group.add_argument(
        "--bn_perturbed",
        choices=("update", "freeze"),
        default="update",
        help="running statistics of BatchNorm in SAM's pass at the perturbed weights",
    )

    group = parser.add_argument_group("optimization")
    group.add_argument(
        "--epochs", type=number(int, 1), metavar="N", help=f"passes over the training set ({_by_data(1)})"
    )
    group.add_argument("--batch_size", type=number(int, 2), metavar="N", help=f"samples a step ({_by_data(2)})")
    group.add_argument("--lr", type=number(float, 0), metavar="R", help=f"learning rate at the start ({_by_data(3)})")
    group.add_argument("--momentum", type=number(float, 0, 1), default=0.9, metavar="R", help="momentum of SGD")
    group.add_argument(
        "--weight_decay", type=number(float, 0), default=5e-4, metavar="R", help="weight decay, on all parameters"
    )
    group.add_argument(
        "--schedule",
        choices=("step", "cosine"),
        default="step",
        help="learning rate: times 0.1 at 1/2 and 3/4 of the epochs, or a cosine to 0",
    )
    group.add_argument(
        "--augmentation",
        choices=AUGMENTATIONS,
        default="standard",
        help="of training images; standard: crop and, but for digits, flip",
    )
    group.add_argument(
        "--label_noise",
        type=number(float, 0, 1),
        default=0.0,
        metavar="P",
        help="share of the training labels that are replaced by wrong ones, always the same",
    )
    group.add_argument(
        "--average_from",
        type=number(int, 0),
        metavar="N",
        help="EoA: also keep the mean of a member's weights after each step from this epoch on",
    )
    group.add_argument("--amp", choices=("none", "bf16"), default="none", help="autocast of the forward passes")

    group = parser.add_argument_group("run")
    group.add_argument(
        "--save_path", type=path, metavar="DIR", help="folder of the run (default: runs/<data>_<method>)"
    )
    group.add_argument(
        "--save_every",
        type=number(float, 0),
        default=600.0,
        metavar="SECONDS",
        help="save within an epoch as well, where it takes longer than this; the end of an epoch is always saved",
    )
    group.add_argument(
        "--jobs",
        type=jobs,
        metavar="K",
        help="processes of this machine that share the members; auto: as many as shorten the run. Without --threads a "
        "member has the same number of threads whatever K is, so that the result is the same, bit for bit (default: "
        "one process, all cores to each member in turn)",
    )
    add_flag(group, "overwrite", "start anew in a folder that holds a run")
    add_flag(group, "evaluate", "train nothing: print the accuracies of the run in --save_path, or of --resume")
    add_checkpoint_options(parser)
    return parser


def _by_data(column: int) -> str:
    values: dict[object, list[str]] = {}
    for data, recipe in RECIPES.items():
        values.setdefault(recipe[column], []).append(data)
    if len(values) == 1:
        return f"default: {next(iter(values))}"
    return "default: " + ", ".join(f"{value} on {'/'.join(names)}" for value, names in values.items())


def jobs(text: str) -> str | int:
    """An argument type: auto, or how many processes."""
    return text if text == "auto" else number(int, 1, 1024)(text)


def best_jobs(members: int, available: int) -> int:
    """The smallest number of processes, not more than cores, that train the members in the fewest rounds."""
    return min(range(1, min(members, available) + 1), key=lambda count: (math.ceil(members / count), count))


def threads_of_jobs(members: int, available: int) -> int:
    """Threads of each member by --jobs, whatever their number: sums of floats depend on it, in their last bits."""
    return available // min(members, available)


def deal_out(args: argparse.Namespace) -> None:
    """Start this command as `--jobs` processes, as torchrun does, and end as they do; return where one is enough."""
    if args.jobs is None or args.evaluate or dist.is_torchelastic_launched():
        return
    on_cpu = args.device == "cpu" or (args.device == "auto" and not torch.accelerator.is_available())
    count = args.jobs
    if count == "auto":
        count = best_jobs(len(args.seed), cores()) if on_cpu else 1
    count = min(count, len(args.seed))
    # A number of threads that the user or the run has already chosen stands.
    told = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else None
    threads = args.threads or _threads_of(args) or told
    if on_cpu and not threads:
        threads = args.threads = threads_of_jobs(len(args.seed), cores())
    if threads and threads * count > cores():
        print(f"note: {count} processes of {threads} threads share {cores()} cores", file=sys.stderr)
    if count == 1:
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(threads or max(1, cores() // count)))
    # Imported here because on macOS it prints a note.
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The reports of torchrun and of gloo on a failure, which the process that failed has told in a line.
    logging.disable(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        torchrun.run(torchrun.parse_args(["--standalone", "--nproc-per-node", str(count), *sys.argv]))
    except ChildFailedError as error:
        which, failure = error.get_first_failure()
        if failure.exitcode < 0:  # killed, for instance for its memory: it could not tell
            fail(f"rank {which} was ended by signal {-failure.exitcode}; the same command goes on", 1)
        sys.exit(failure.exitcode)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    sys.exit(0)


def print_summary(rows: dict) -> None:
    """A table of members and ensemble."""
    print(f"{'member':>10}  {'epochs':>6}  {'val acc':>8}  {'val NLL':>8}  {'test acc':>8}  {'test NLL':>8}")
    for row in [*rows["members"], rows["ensemble"]]:
        seed, epoch = ("ensemble", "") if "seed" not in row else (f"seed {row['seed']}", row["epoch"])
        print(
            f"{seed:>10}  {epoch!s:>6}  {row['val_acc']:8.2%}  {row['val_loss']:8.4f}  {row['test_acc']:8.2%}"
            f"  {row['test_loss']:8.4f}"
        )
    if "test_disagreement" in rows["ensemble"]:
        print(f"mean disagreement of two members on test: {rows['ensemble']['test_disagreement']:.2%}")


def main(args: argparse.Namespace) -> None:
    """Train, or evaluate, as the settings say."""
    if args.threads is None and not args.evaluate:
        args.threads = _threads_of(args)
    device = start_device(args.device, args.threads)
    paths = find_checkpoints(args.resume or [args.save_path], args.checkpoint) if args.evaluate else []
    if not args.evaluate:
        distributed.join(device, args.seed, args.save_path)
        args.threads = distributed.agree(torch.get_num_threads())
        torch.set_num_threads(args.threads)
    data = load_data(
        args.data,
        args.data_path,
        device,
        args.train_idx_path,
        args.val_idx_path,
        args.download,
        args.label_noise,
        args.augmentation,
    )
    if args.evaluate:
        print_summary(evaluate_members(paths, data))
        return
    if not distributed.rank():
        what = f"{len(args.seed)} x {args.model} (width {args.width}) on {args.data}"
        print(f"{method(args)} of {what}, in {args.save_path}")
    summary = train_ensemble(args, data)
    distributed.leave()
    if summary is None:
        return
    for name, rows in summary.items():
        print(f"\ncheckpoints '{name}' ({CHECKPOINT_TITLES[name]})")
        print_summary(rows)
    print(f"\nwrote {args.save_path}")


def _threads_of(args: argparse.Namespace) -> int | None:
    """The number that the run in this folder began with: sums of floats depend on it, in their last bits."""
    if args.overwrite or not (args.save_path / "args.json").is_file():
        return None
    threads = read_settings(args.save_path).get("threads")
    return threads if isinstance(threads, int) and threads > 0 else None


if __name__ == "__main__":
    arguments = parse_args()
    run(deal_out, arguments)
    run(main, arguments)
    if dist.is_torchelastic_launched():
        # While an interpreter ends, what is left of gloo's threads can abort it, after all work is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
