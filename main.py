"""Train a deep ensemble, a SAM ensemble or a SharpBalance ensemble.

    python main.py                                                   # deep ensemble on digits
    python main.py --sam --rho 0.1                                   # every member with SAM
    python main.py --sam --rho 0.1 --flat_ratio 0.5                  # SharpBalance

Writes under --save_path (default runs/<data>_<method>): args.json, environment.json, command.txt, summary.json, and for
each member seed_<seed>/ with checkpoint.pth.tar, model_best.pth.tar, log.jsonl, fisher.npy and sam_mask.npy.
Re-run the same command to resume an interrupted run. The members are trained side by side by processes on this machine
(--jobs), or on several machines by `torchrun --nproc-per-node K main.py ...`, with the same result for any number of
them.
"""

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "4000")  # before torch is loaded, whose threads otherwise wait at full speed

import torch
import torch.distributed as dist

from models import check_model, create_model, is_external
from utils import InputError, cli, distributed, processes
from utils.data import Data
from utils.datasets import AUGMENTATIONS, expected_info, load_data
from utils.ensemble import train_ensemble
from utils.events import check_tensorboard
from utils.files import load_json
from utils.folder import find_classes
from utils.partition import PARTITION_RULE, SCORE_FREE, UNSELECTED
from utils.run import Run, Settings, begun_by_this_job, check_known, commit_of, read_settings, relative_paths

# The paper's recipe for the colour sets, small ones for the others: (width, epochs, batch_size, lr).
RECIPES = {
    "cifar10": (64, 200, 128, 0.1),
    "cifar100": (64, 200, 128, 0.1),
    "tiny_imgnet": (64, 200, 128, 0.1),
    "fashion_mnist": (16, 30, 128, 0.1),
    "digits": (8, 30, 64, 0.1),
    "folder": (16, 60, 64, 0.1),
}
# What differs by the optimizer.
OPTIMIZERS = {"sgd": {"weight_decay": 5e-4}, "adamw": {"lr": 1e-3, "weight_decay": 0.05}}
USUAL_RHO = {False: 0.05, True: 0.5}  # of SAM, and of ASAM, whose rho is relative to the weights; from their papers
READINGS = ("released", "paper")  # of --partition, the two of the method
# Memory of a process in training: before its first step; a weight with gradient, momentum, SAM's copy and checkpoint;
# an output of a layer with its gradient. An upper end: of one member, ResNet-18 and the ViT took 0.3 to 0.8 of it.
BYTES_OF_PROCESS, BYTES_OF_WEIGHT, BYTES_OF_ACTIVATION = 100e6, 24, 8
CHECKPOINT_TITLES = {"last": "end of training", "best": "best validation accuracy", "averaged": "mean of the weights"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line, and fill in what depends on the run that is resumed and on the data set.

    A bad or contradictory setting ends the program with one line and status 2, before any data is read.
    """
    parser = build_parser()
    given, recorded = parser.parse_given(argv), {}
    if "resume" in given:
        # Options that are given stand; the run's folder refuses those that contradict it.
        words, folder = words_of(parser, given["resume"], given), given["resume"]
        parser.around = f"{folder / 'args.json'}: ", f"; it was changed, or made by another version{commit_of(folder)}"
        recorded = parser.parse_given(words)
        parser.around = "", ""
        if given.get("save_path", folder) != folder:
            parser.error(
                f"--save_path: given with --resume {folder}, which is the run's folder; leave one of the two out"
            )
        given["save_path"] = folder
        if given.get("overwrite"):
            parser.error("--overwrite: given with --resume; leave one of the two out")
    args = argparse.Namespace(**(parser.defaults() | recorded | given))

    args.image_size = cli.image_size_of(parser, args.data, args.image_size)
    recipe = dict(zip(("width", "epochs", "batch_size", "lr"), RECIPES[args.data], strict=True))
    recipe |= {"width": 64} if is_external(args.model) else {}
    for name, value in (recipe | OPTIMIZERS[args.optimizer]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_method(parser, args, given)
    usual = USUAL_RHO[args.sam_adaptive]
    if args.rho is None:
        args.rho = usual if args.sam else 0.0
    elif args.rho >= 10 * usual:
        note(f"--rho {args.rho:g} is large; {usual:g} is usual{' with --sam_adaptive' * args.sam_adaptive}")
    if args.initial_epochs is None:
        args.initial_epochs = args.epochs // 2
    # Whose samples that nobody picked matter: those of a reading, or of the one whose sizes are drawn.
    reading = args.match_size or (args.partition if args.partition in READINGS else None)
    if args.flat_ratio and reading:
        released = "others" if args.data == "cifar10" else "one"
        args.unselected = args.unselected or (released if reading == "released" else "normal")
    else:
        args.unselected = None
    if args.save_path is None:
        args.save_path = Path("runs") / f"{args.data}_{settings_of(args).method}"
    if args.overwrite and begun_by_this_job(args.save_path):
        args.overwrite = False
        note(f"--overwrite: this job began the run in {args.save_path}, and goes on; remove it to start anew")

    if processes.supervised():  # the process that started this one has tried the network
        return args
    if args.tensorboard:
        try:
            check_tensorboard()
        except InputError as error:
            parser.error(str(error))
    if "jobs" in given and dist.is_torchelastic_launched() and os.environ.get("RANK") == "0":
        note("--jobs has no effect under torchrun, which starts the processes")
    info = expected_info(args.data, args.image_size)
    classes = info.num_classes
    try:
        if args.data == "folder" and is_external(args.model):  # which may be made for so many
            with relative_paths(args.resume, data_path=args.data_path):
                classes = len(find_classes(args.data_path)[1])
        check_model(args.model, classes, args.width, info.image_size, info.channels, seeds_drawn(args))
    except InputError as error:
        parser.error(str(error))
    except ValueError as error:
        parser.error(f"--{error}")
    return args


def seeds_drawn(args: argparse.Namespace) -> list[int]:
    """The seeds of the members whose first weights are compared: all of a run that begins.

    The first alone where --init_from gives all the same, except perhaps a head; none where the run has its weights.
    """
    if not args.overwrite and (args.save_path / "args.json").is_file():
        return []
    return args.seed[:1] if args.init_from else args.seed


def words_of(parser: cli.Parser, folder: Path, given: dict[str, Any]) -> list[str]:
    """The settings of a run as the words of a command line, so that they are checked as those are.

    But for the network where it is given: the file that makes it may have moved.
    """
    if not (folder / "args.json").is_file():
        parser.error(f"--resume: expected a run folder with args.json, got {folder}")
    try:
        settings = read_settings(folder)
        check_known(folder, settings)
    except InputError as error:
        parser.error(str(error))
    words, skipped = [], {"resume", "checkpoint", "overwrite", "evaluate", "draws", *({"model"} & given.keys())}
    for name, value in settings.items():
        if value is not None and name not in skipped:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            words.append(f"--{name}={text}")
    return words


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of a run, as everything below this script takes them."""
    return Settings(**{name: value for name, value in vars(args).items() if name not in ("resume", "overwrite")})


def check_method(parser: cli.Parser, args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Refuse settings that contradict each other, and refuse or note those that are given and have no effect."""
    drawn = PARTITION_RULE[args.partition] in SCORE_FREE
    if args.flat_ratio and not args.sam:
        way_out = "so that no sample could have SAM; add --sam, or leave --flat_ratio out"
        parser.error(f"--flat_ratio: {args.flat_ratio} given without --sam, {way_out}")
    if args.sam_adaptive and not args.sam:
        parser.error("--sam_adaptive: given without --sam; add --sam, or leave it out")
    late = args.initial_method == "sgd"
    if late and not args.sam:
        parser.error("--initial_method: sgd given without --sam; add --sam, or leave it out")
    if late and (args.initial_epochs == 0 or args.epochs == 1):
        parser.error("--initial_method: sgd given with no initial epochs; give --initial_epochs, or leave it out")
    if "bn_perturbed" in given and not args.sam:
        parser.error("--bn_perturbed: given without --sam; add --sam, or leave it out")
    partition = args.partition if drawn else given.get("partition")
    for name, value in (("unselected", args.unselected), ("partition", partition)):
        if value and not args.flat_ratio:
            parser.error(f"--{name}: {value} given without a --flat_ratio above 0; add one, or leave it out")
    if args.match_size and not drawn:
        parser.error("--match_size: given without --partition random or same, whose sets it sizes")
    if args.average_from is not None and args.average_from >= args.epochs:
        parser.error(f"--average_from: expected less than --epochs {args.epochs}, got {args.average_from}")
    if args.warmup_epochs >= args.epochs:
        parser.error(f"--warmup_epochs: expected less than --epochs {args.epochs}, got {args.warmup_epochs}")
    if "momentum" in given and args.optimizer == "adamw":
        note(f"--momentum {args.momentum} has no effect with --optimizer adamw")
    if (args.flat_ratio or late) and args.initial_epochs is not None and args.initial_epochs >= args.epochs:
        way_out = "else samples are never assigned; leave --flat_ratio out for SAM on all samples"
        if not args.flat_ratio:
            way_out = "else no epoch has SAM; leave --sam out for a deep ensemble"
        limit = f"expected at most {args.epochs - 1} with --epochs {args.epochs}, got {args.initial_epochs}"
        parser.error(f"--initial_epochs: {limit}: {way_out}")
    drawn = drawn and not args.match_size
    if args.rho and not args.sam:
        note(f"--rho {args.rho} has no effect without --sam")
    if "initial_epochs" in given and not args.flat_ratio and not late:
        note(f"--initial_epochs {args.initial_epochs} has no effect without a --flat_ratio above 0")
    if args.unselected and drawn:
        note(f"--unselected {args.unselected} has no effect with --partition {args.partition}")
    if args.augmentation == "flip" and not expected_info(args.data, args.image_size).preprocessing.flip:
        note(f"images of {args.data} are never mirrored: --augmentation flip does nothing")
    if args.flat_ratio and len(args.seed) == 1 and not drawn:
        note("one member alone: there are no others whose samples it could take over")


def note(text: str) -> None:
    """Say what does not stop the program, once for all ranks."""
    if os.environ.get("RANK", "0") == "0" and not processes.supervised():
        print(f"note: {text}", file=sys.stderr)


def build_parser() -> cli.Parser:
    """All options, in groups."""
    parser = cli.Parser(__doc__)
    cli.add_data_options(parser)
    group = parser.add_argument_group("network")
    cli.add_network_option(group)
    cli.add_option(
        group, "width", f"64 is the published size of every network ({_by_data(0)})", cli.number(int, 1, 2**16), "N"
    )
    add_ensemble_options(parser.add_argument_group("ensemble"))
    add_optimization_options(parser.add_argument_group("optimization"))
    group = parser.add_argument_group("run")
    cli.add_option(group, "save_path", "folder of the run (default: runs/<data>_<method>)", cli.path, "DIR")
    cli.add_option(group, "resume", "resume the run in this folder by its own settings", cli.path, "RUN")
    text = "also save within an epoch that takes longer than this; the end of an epoch is always saved"
    cli.add_option(group, "save_every", text, cli.POSITIVE, "SECONDS", default=600.0)
    text = "write events for TensorBoard beside log.jsonl: loss, accuracy and speed by epoch, by step the norms of "
    text += "SAM's gradient and perturbation, and the cosine of the gradients before and after it"
    cli.add_flag(group, "tensorboard", text)
    text = "processes of this machine that share the members; auto: on a CPU one for each member, or fewer that share "
    text += "them equally and occupy all cores, as far as the memory goes; on a GPU one. No result depends on it"
    cli.add_option(group, "jobs", text, cli.job_count, "K", default="auto")
    cli.add_flag(group, "overwrite", "start anew in a folder that holds a run")
    return parser


def add_ensemble_options(group: Any) -> None:
    """The members, SAM, and which samples each member trains with it."""
    seeds = [13, 17, 27]
    group.add_argument("--seed", nargs="+", action=cli.Seeds, default=seeds, metavar="N", help="one for each member")
    cli.add_flag(group, "sam", "train with sharpness-aware minimization (SAM)")
    text = "radius of SAM's perturbation, in the norm of all weights (default: 0.05, with --sam_adaptive 0.5)"
    cli.add_option(group, "rho", text, cli.POSITIVE, "R")
    cli.add_flag(group, "sam_adaptive", "ASAM: the perturbation of each weight, and so --rho, is relative to its size")
    text = "share of the samples that each member picks by sharpness, 0 to 1; above 0 is SharpBalance"
    cli.add_option(group, "flat_ratio", text, cli.SHARE, "K", default=0.0)
    text = "epochs with SAM on all samples, before the scores are exchanged (default: half of --epochs)"
    cli.add_option(group, "initial_epochs", text, cli.NATURAL, "N")
    text = "how these epochs are trained; sgd: without SAM, a variant that is ours: SharpBalance after normal training "
    text += "or, without --flat_ratio, SAM late in training. It takes fewer passes"
    cli.add_choice(group, "initial_method", text, ("sam", "sgd"), default="sam")
    text = "released: as in the authors' code (a member picks its flattest samples; --unselected others on cifar10, "
    text += "one elsewhere); paper: as in its text (its sharpest samples; --unselected normal); random, same: sets "
    text += "drawn for each member, or one for all"
    cli.add_choice(group, "partition", text, PARTITION_RULE, default="released")
    text = "samples that nobody picked: normal steps at all members, SAM at one, or SAM at all but one "
    cli.add_choice(group, "unselected", text + "(default: by --partition)", UNSELECTED)
    text = "with --partition random or same: sets of the size that SharpBalance's would have, of this reading"
    cli.add_option(group, "match_size", text, match_size, "|".join(READINGS), nargs="?", const="released")
    text = "running statistics of BatchNorm in SAM's pass at the perturbed weights"
    cli.add_choice(group, "bn_perturbed", text, ("update", "freeze"), default="update")


def add_optimization_options(group: Any) -> None:
    """The recipe of each member."""
    cli.add_option(group, "epochs", f"passes over the training set ({_by_data(1)})", cli.COUNT, "N")
    cli.add_option(group, "batch_size", f"samples per step ({_by_data(2)})", cli.number(int, 2), "N")
    text = "takes the step with the summed gradient; adamw with torch's betas"
    cli.add_choice(group, "optimizer", text, OPTIMIZERS, default="sgd")
    text = f"initial learning rate ({_by_data(3)}; 0.001 with adamw)"
    cli.add_option(group, "lr", text, cli.POSITIVE, "R")
    cli.add_option(group, "momentum", "momentum of SGD", cli.SHARE, "R", default=0.9)
    text = "weight decay, on all parameters (default: 0.0005; 0.05 with adamw)"
    cli.add_option(group, "weight_decay", text, cli.POSITIVE, "R")
    text = "learning rate: times 0.1 at 1/2 and 3/4 of the epochs, or a cosine to 0"
    cli.add_choice(group, "schedule", text, ("step", "cosine"), default="step")
    text = "epochs in which the learning rate first rises linearly; the cosine begins after them"
    cli.add_option(group, "warmup_epochs", text, cli.NATURAL, "N", default=0)
    text = "share of the uniform distribution in the training targets; sharpness scores are without it"
    cli.add_option(group, "label_smoothing", text, cli.SHARE, "P", default=0.0)
    text = "scale the summed gradient down to this norm before each step; SAM's perturbation is not affected"
    cli.add_option(group, "clip_norm", text, cli.number(float, 0, open_low=True), "R")
    text = "start every member from the weights in this file; a head of another size is drawn from the member's seed"
    cli.add_option(group, "init_from", text, cli.weights, "FILE")
    text = "of training images; standard: crop and, except on digits, flip"
    cli.add_choice(group, "augmentation", text, AUGMENTATIONS, default="standard")
    text = "share of the training labels that are replaced by wrong ones, always the same"
    cli.add_option(group, "label_noise", text, cli.SHARE, "P", default=0.0)
    text = "EoA: also save the mean of a member's weights after each step from this epoch on"
    cli.add_option(group, "average_from", text, cli.NATURAL, "N")
    cli.add_choice(group, "amp", "autocast of the forward passes", ("none", "bf16"), default="none")


def _by_data(column: int) -> str:
    values: dict[object, list[str]] = {}
    for data, recipe in RECIPES.items():
        values.setdefault(recipe[column], []).append(data)
    if len(values) == 1:
        return f"default: {next(iter(values))}"
    return "default: " + ", ".join(f"{value} on {'/'.join(names)}" for value, names in values.items())


def match_size(text: str) -> str | None:
    """An argument type: the reading whose sizes drawn sets have; True stands for the released one, False for none."""
    if text in READINGS:
        return text
    if text.lower() in ("true", "false"):
        return "released" if text.lower() == "true" else None
    raise argparse.ArgumentTypeError(f"expected one of {', '.join(READINGS)}, got '{text}'")


def print_summary(rows: dict) -> None:
    """A table of members and ensemble."""
    print(f"{'member':>10}  {'epochs':>6}  {'val acc':>8}  {'val NLL':>8}  {'test acc':>8}  {'test NLL':>8}")
    for row in [*rows["members"], rows["ensemble"]]:
        seed, epoch = ("ensemble", "") if "seed" not in row else (f"seed {row['seed']}", row["epoch"])
        val = f"{row['val_acc']:8.2%}  {row['val_loss']:8.4f}"
        print(f"{seed:>10}  {epoch!s:>6}  {val}  {row['test_acc']:8.2%}  {row['test_loss']:8.4f}")
    if "test_disagreement" in rows["ensemble"]:
        print(f"mean disagreement of two members on test: {rows['ensemble']['test_disagreement']:.2%}")


def main(args: argparse.Namespace) -> None:
    """Train in this process, or as one of torchrun's, and print the accuracies of members and ensemble."""
    summary = train(args)
    if summary is not None:
        report(args, summary)


def launch(args: argparse.Namespace) -> None:
    """Train in as many processes as `--jobs` says, and print the accuracies of members and ensemble."""
    if processes.supervised():  # one of those that are started below, where they are not forked
        processes.adopt(lambda number: train(args))
    count = 1 if distributed.launched() else count_processes(args)
    if count == 1:
        main(args)
        return
    work = None
    # A network that is not of this repository has been tried, which may have started threads: of autograd where torch
    # finds a GPU, of sums on several cores, or what a user's file does. A process that is forked after that can hang.
    if processes.may_fork() and distributed.on_cpu(args.device) and not is_external(args.model):
        data = read_data(args, torch.device("cpu"))  # which the processes share
        work = lambda number: train(args, data)  # noqa: E731
    announce(args, count)
    progress, name = (
        processes.Progress(),
        partial(distributed.name_of, count=count, seeds=args.seed, folder=args.save_path),
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            processes.run(count, work, progress.hear, {distributed.STORE: f"{folder}/store"}, name)
        finally:
            progress.close()
    report(args, load_json(args.save_path / "summary.json"))


def count_processes(args: argparse.Namespace) -> int:
    """How many processes train the members side by side."""
    members, cores = len(args.seed), distributed.cores()
    threads = threads_of(args)
    if args.jobs != "auto":
        count = min(args.jobs, members)
        if args.threads and args.threads * count > cores:
            note(f"{count} processes of {args.threads} threads share {cores} cores")
        return count
    if not distributed.on_cpu(args.device):
        share = min(torch.cuda.device_count() if args.device in ("auto", "cuda") else 1, members)
        if share > 1:
            note(f"one GPU is used; torchrun --nproc-per-node {share} main.py ... shares the members among {share}")
        return 1
    count = distributed.default_jobs(members, threads)
    fit = processes.that_fit(count, memory_of_process(args, -(-members // count)))
    if fit < count:
        free = processes.free_memory() / 2**30
        note(f"--jobs auto: {free:.1f} GiB of free memory are enough for {fit} of {count} processes")
    return fit


def memory_of_process(args: argparse.Namespace, members: int) -> float:
    """Roughly the bytes that a process of so many members takes beyond what processes share."""
    info, numbers = expected_info(args.data, args.image_size), []
    device = "cpu" if is_external(args.model) else "meta"  # where a user's file may not work
    with torch.random.fork_rng(devices=[]), torch.device(device), torch.no_grad():
        model = create_model(args.model, info.num_classes, args.width, info.image_size, info.channels).eval()
        image = torch.empty(1, info.channels, info.image_size, info.image_size)

    def count(module: torch.nn.Module, inputs: object, output: object) -> None:
        numbers.append(output.numel() if isinstance(output, torch.Tensor) else 0)

    for module in model.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        model(image)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return BYTES_OF_PROCESS + BYTES_OF_WEIGHT * weights * members + BYTES_OF_ACTIVATION * args.batch_size * sum(numbers)


def train(args: argparse.Namespace, data: Data | None = None) -> dict | None:
    """Train the members of this process. Returns the summary; None on ranks other than 0."""
    device = distributed.start_device(args.device, threads_of(args))
    distributed.join(device, args.seed, args.save_path)
    args.threads = distributed.broadcast(torch.get_num_threads())
    torch.set_num_threads(args.threads)
    cores = distributed.cores()
    if args.threads > cores and args.threads == threads_of_run(args):
        why = f"the run began with {args.threads} threads, and this machine has {cores} cores"
        way_out = f"--threads {cores} is faster, and differs in the last bits"
        note(f"{why}: the result is the same, but training is slower; {way_out}")
    if data is None:
        data = read_data(args, device)
    if not distributed.rank() and not processes.supervised():
        announce(args, distributed.ranks())
    summary = train_ensemble(Run(settings_of(args), data, args.overwrite))
    distributed.leave()
    return summary


def read_data(args: argparse.Namespace, device: torch.device) -> Data:
    """The data set of the run."""
    split = {"train_idx_path": args.train_idx_path, "val_idx_path": args.val_idx_path}
    training = {"label_noise": args.label_noise, "augmentation": args.augmentation}
    training |= {"download": args.download, "image_size": args.image_size}
    with relative_paths(args.resume, data_path=args.data_path, **split):
        return load_data(args.data, args.data_path, device, **split, **training)


def announce(args: argparse.Namespace, count: int) -> None:
    """Say what is trained, and where; or that it was."""
    size = "" if is_external(args.model) else f" (width {args.width})"
    what = f"{len(args.seed)} x {args.model}{size} on {args.data}, in {args.save_path}"
    finished = not args.overwrite and (args.save_path / "summary.json").is_file()
    anew = "" if args.resume else " (--overwrite trains it anew)"
    how = f", finished before{anew}" if finished else f", by {count} processes" * (count > 1)
    print(f"{settings_of(args).method} of {what}{how}", flush=True)


def report(args: argparse.Namespace, summary: dict) -> None:
    """Print the accuracies of members and ensemble."""
    for name, rows in summary.items():
        print(f"\ncheckpoints '{name}' ({CHECKPOINT_TITLES[name]})")
        print_summary(rows)
    print(f"\nwrote {args.save_path}")


def threads_of(args: argparse.Namespace) -> int:
    """The threads of a member, which do not depend on the number of processes."""
    return args.threads or threads_of_run(args) or distributed.default_threads(len(args.seed))


def threads_of_run(args: argparse.Namespace) -> int | None:
    """The number that the run in this folder began with: the last bits of sums of floats depend on it."""
    if args.overwrite or not (args.save_path / "args.json").is_file():
        return None
    threads = read_settings(args.save_path).get("threads")
    return threads if isinstance(threads, int) and threads > 0 else None


if __name__ == "__main__":
    cli.run(launch, parse_args(), forks=True)
    if dist.is_torchelastic_launched():
        # While an interpreter exits, gloo's remaining threads can abort it, after all work is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
