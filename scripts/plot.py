"""Draw figures, each as PDF and PNG, without Jupyter.

    python scripts/plot.py tradeoff --from measurements/* --to figures/tradeoff
    python scripts/plot.py theory --to figures

From folders that the measuring scripts wrote:
tradeoff: sharpness against diversity, a point an ensemble. benchmark: accuracy of members and ensemble, and the gain.
severity: accuracy and calibration error against the severity of corruption. ensemble_size: the same against the number
of members.

From run folders of main.py:
curves: training curves. sets: what is trained with SAM, of one SharpBalance run. landscape: the loss around members,
along random directions and along the top eigenvector of the Hessian, and between them. The numbers of the last two are
kept beside the figure as <name>.json, of which --from draws it again; a landscape that is begun goes on from it.

theory: the seven figures of theoretical_verifications.ipynb into the folder --to, simulated anew (about a minute), or
from the theory.json that this leaves beside them: --from results/theory/theory.json.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from utils import InputError, plots
from utils.checkpoint import find_checkpoints, write_atomically, write_json
from utils.cli import Parser, number, run, start_device
from utils.data import Data, ImageSet, load_data, load_npy
from utils.landscape import Batches, losses_along, losses_between, random_direction, top_direction
from utils.metrics import paired_bootstrap
from utils.plots import Row, how_many, looks
from utils.predictions import load_members
from utils.results import (
    Ensemble,
    check_alike,
    estimate,
    groups_of,
    method_of,
    needed,
    read_ensemble,
    read_json,
    read_run,
    setting_of,
)
from utils.verification import published, simulate_all

UNPICKED = {"normal": "no member", "one": "one member each", "others": "all members but one"}
EXAMPLES = 10  # pictures in a line of `sets`
IMAGES = 500  # of validation, for `landscape`; and as many of training for BatchNorm's statistics
DIRECTIONS = 2  # random ones for each member
ALONG = [round(-1 + i / 8, 3) for i in range(17)]
# Along the top eigenvector, which is as long: further out, the loss grows by orders of magnitude.
TOP = [round(-0.02 + i / 400, 4) for i in range(17)]
BETWEEN = [round(i / 12, 4) for i in range(13)]


def tradeoff(args: argparse.Namespace) -> Figure:
    """Sharpness against diversity."""
    ensembles = measured(args.folders)
    rows = looks(groups_of(ensembles).values())
    families = list(dict.fromkeys(row["family"] for row in rows))
    for row in rows:
        row["marker"] = plots.MARKERS[families.index(row["family"]) % len(plots.MARKERS)]
        row["points"] = []
        for ensemble in row["ensembles"]:
            needed(ensemble, "test", "rates", "disagreement")
            if ensemble.values.get("sharpness") is None:
                raise InputError(
                    f"{ensemble.folder / 'sharpness.json'}: holds no APGD_worst-l2 of all members; measure it by "
                    f"python measure_sharpness.py --mode APGD_worst --norms l2 --save {ensemble.folder}"
                )
            # Several ensembles of the same settings show their spread themselves.
            alone = len(row["ensembles"]) == 1
            row["points"].append(
                {
                    "sharpness": ensemble.values["sharpness"],
                    "disagreement": ensemble.values["disagreement"],
                    "spread": ensemble.spread.get("sharpness") if alone else None,
                    "interval": ensemble.intervals["disagreement"] if alone else None,
                    "corrupted": ensemble.values.get("corrupted_ensemble"),
                }
            )
    protocol = ensembles[0].content["sharpness"]["protocol"]
    kind = "adaptive worst-case" if protocol.get("adaptive") else "worst-case"
    note = (
        f"{setting_of(ensembles[0].content)}. A point is an ensemble; {how_many(rows)}. Sharpness: {kind}, l2, radius "
        f"{protocol.get('rho0')}."
    )
    if any(point["interval"] for row in rows for point in row["points"]):
        note += " Bars: 95 % bootstrap interval over test images, and ± standard deviation over members."
    return plots.tradeoff(rows, note)


def benchmark(args: argparse.Namespace) -> Figure:
    """Accuracy of members and ensembles, and the gain of ensembling."""
    ensembles = measured(args.folders)
    rows = looks(groups_of(ensembles).values())
    for row in rows:
        for name, prefix in (("test", ""), ("corrupted", "corrupted_")):
            if name not in ensembles[0].content["result"]:
                continue
            group: list[Ensemble] = row["ensembles"]
            row[name] = {
                bar: estimate([e.values[prefix + bar] for e in group], group[0].intervals.get(prefix + bar))
                for bar in ("member", "ensemble", "gain")
            }
            gains = group[0].by_sample.get(f"{prefix}gain")
            if len(group) == 1 and gains is not None:
                row[name]["gain"] = estimate([group[0].values[f"{prefix}gain"]], paired_bootstrap(gains.double()))
    what = setting_of(ensembles[0].content)
    note = f"{what}; {how_many(rows)}. {intervals(rows)} The accuracy axis does not begin at 0."
    return plots.benchmark(rows, note)


def severity(args: argparse.Namespace) -> Figure:
    """Accuracy and calibration error against the severity of corruption."""
    ensembles = measured(args.folders)
    for ensemble in ensembles:
        needed(ensemble, "corrupted", "by_severity")
    rows = looks(groups_of(ensembles).values())
    steps = sorted(map(int, needed(ensembles[0], "corrupted", "by_severity")))
    paths = [("test",), *(("corrupted", "by_severity", str(step)) for step in steps)]
    for row in rows:
        row["severity"] = [0, *steps]
        found = {
            kind: [[needed(e, *path, kind) for e in row["ensembles"]] for path in paths]
            for kind in ("members", "ensemble", "intervals_95")
        }
        edges = [parts[0] for parts in found["intervals_95"]]
        for key in ("accuracy", "ece"):
            members = [[statistics.mean(m[key] for m in one) for one in parts] for parts in found["members"]]
            whole = [[one[key] for one in parts] for parts in found["ensemble"]]
            row[key] = {
                "member": [estimate(v, i.get(f"member_{key}")) for v, i in zip(members, edges, strict=True)],
                "ensemble": [estimate(v, i.get(f"ensemble_{key}")) for v, i in zip(whole, edges, strict=True)],
            }
    corruptions = len(ensembles[0].content["protocol"]["corruptions"])
    what = setting_of(ensembles[0].content)
    note = f"{what}; {how_many(rows)}. Means over {corruptions} corruptions. {intervals(rows)}"
    plain, corrupted = (needed(ensembles[0], *path).get("samples") for path in (("test",), ("corrupted", "mean")))
    if plain and corrupted and plain != corrupted:
        note += (
            f" Severity 0: all {plain} test images; the others: {corrupted:g} of them. The error of calibration looks "
            "larger on few images."
        )
    return plots.severity(rows, note)


def ensemble_size(args: argparse.Namespace) -> Figure:
    """Accuracy, NLL and calibration error against the number of members."""
    ensembles = measured(args.folders)
    rows = looks(groups_of(ensembles).values())
    for row in rows:
        for name, path in (("test", ("test",)), ("corrupted", ("corrupted", "mean"))):
            if name not in ensembles[0].content["result"]:
                continue
            found = [needed(ensemble, *path, "ensemble_by_size") for ensemble in row["ensembles"]]
            edges = needed(row["ensembles"][0], *path, "intervals_95")
            row["size"] = sorted(map(int, found[0]))
            # The file holds intervals of single members and of the whole ensemble.
            prefixes = {row["size"][0]: "member_", row["size"][-1]: "ensemble_"}
            row[name] = {
                key: [
                    estimate([by[str(n)][key] for by in found], edges.get(prefixes.get(n, "-") + key))
                    for n in row["size"]
                ]
                for key in ("accuracy", "nll", "ece")
            }
    what = setting_of(ensembles[0].content)
    note = f"{what}; {how_many(rows)}. Points: means over subsets of members. {intervals(rows)}"
    if min(len(row["ensembles"]) for row in rows) == 1:
        note += " Of a single ensemble, only the ends have one."
    return plots.ensemble_size(rows, note)


def curves(args: argparse.Namespace) -> Figure:
    """Training curves."""
    runs = [read_run(folder) for folder in args.folders]
    check_alike(runs)
    rows = looks(groups_of(runs).values())
    for row in rows:
        row["logs"] = [read_log(one.folder / f"seed_{seed}") for one in row["ensembles"] for seed in one.seeds]
        trained = row["ensembles"][0].content["trained"]
        row["split"] = trained["initial_epochs"] if trained["sam"] and trained["flat_ratio"] else None
    note = (
        f"{setting_of(runs[0].content)}; {how_many(rows)}. Faint: a member; strong: their mean. Training: augmented "
        "images, at the weights before each step. Until its sets are made, SharpBalance is SAM."
    )
    return plots.curves(rows, note)


def sets(args: argparse.Namespace) -> Figure:
    """What is trained with SAM."""
    if len(args.folders) != 1:
        raise InputError(f"--from: {len(args.folders)} folders given; sets shows one run, name one folder")
    (source,) = args.folders
    if source.is_file():
        content = read_json(source, "draw it anew from a run folder")
    else:
        content = compute_sets(source)
        # In one line: with a line for each number, the pictures would take most of a megabyte.
        write_atomically(figure_path(args.to, ".json"), (json.dumps(content) + "\n").encode())
    try:
        shares = {key: np.array(rows, dtype=float) for key, rows in content["shares"].items()}  # null becomes nan
        shares["seeds"] = content["seeds"]
        pictures = [line | {"images": np.array(line["images"]) / 255} for line in content["pictures"]]
        return plots.sets(shares, pictures, content["note"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{source}: not the numbers of such a figure; draw it anew from a run folder") from error


def compute_sets(folder: Path) -> dict[str, Any]:
    """The numbers of `sets`: shares, example pictures of 256 levels, and what is said of them."""
    one = read_run(folder)
    trained = one.content["trained"]
    if not trained["flat_ratio"] or trained["select"] not in ("flattest", "sharpest"):
        raise InputError(f"--from {one.folder}: its sets do not come from scores; name a SharpBalance run")
    train = data_of(one).train
    labels = train.labels.numpy()
    masks, scores = (
        np.stack([read_array(one.folder / f"seed_{seed}" / name, len(train)) for seed in one.seeds])
        for name in ("sam_mask.npy", "fisher.npy")
    )
    masks = masks.astype(bool)
    ranks = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1)
    count = int(trained["flat_ratio"] * len(train))
    picks = ranks < count if trained["select"] == "flattest" else ranks >= len(train) - count

    def share(groups: list[np.ndarray]) -> list[list[float | None]]:
        """[M, G]: of each group, and None where a group is empty."""
        return [[float(mask[group].mean()) if group.any() else None for group in groups] for mask in masks]

    shares = {
        "classes": share([np.ones(len(train), bool), *(labels == c for c in range(train.info.num_classes))]),
        "picks": share([*picks, ~picks.any(axis=0)]),
    }
    order = np.argsort(ranks.mean(axis=0), kind="stable")
    pictures = [
        {
            "title": title,
            "images": pixels(train, index),
            "names": [f"{labels[i]}: {masks[:, i].sum()} of {len(masks)}" for i in index],
        }
        for title, index in (
            ("flattest: lowest scores", order[:EXAMPLES]),
            ("sharpest: highest scores", order[: -EXAMPLES - 1 : -1].copy()),
        )
    ]
    note = (
        f"{setting_of(one.content)}; 1 ensemble of {len(masks)} members, scored before epoch "
        f"{trained['initial_epochs'] + 1}. A member picks its {count} {trained['select']} images ($k$ = "
        f"{trained['flat_ratio']:g}) by squared gradient norm; those that nobody picked are trained with SAM by "
        f"{UNPICKED[trained['unselected']]}. "
        "Pictures are ordered by mean rank; below each: its class, and how many members train it with SAM."
    )
    return {"seeds": one.seeds, "shares": shares, "pictures": pictures, "note": note}


def landscape(args: argparse.Namespace) -> Figure:
    """The loss around members and between them."""
    if len(args.folders) == 1 and args.folders[0].is_file():
        content = read_landscape(args.folders[0])
    else:
        content = compute_landscape(args.folders, figure_path(args.to, ".json"))
    runs = [
        Ensemble(Path(r["folder"]), method_of(r["trained"]), tuple(r["trained"]["seed"]), {}, {}, {}, {}, r)
        for r in content["runs"]
    ]
    rows = looks(groups_of(runs).values())
    for row in rows:
        found = [one.content for one in row["ensembles"]]
        row["along"] = [np.mean(losses, axis=0) for one in found for losses in one["along"].values()]
        row["top"] = [curve["losses"] for one in found for curve in one.get("top", {}).values()]
        row["between"] = [losses for one in found for losses in one["between"].values()]
        row["steps"] = content["about"]
    settings = content["about"]
    top = (
        "Top eigenvector: of the Hessian of a member's loss on these images, as long as a random direction (norm of "
        "all filters), the higher side at the right; the loss may leave the panel. "
    )
    note = (
        f"{setting_of(runs[0].content)}; {how_many(rows)}; {settings['images']} validation images. Faint: a member "
        f"(its mean over {settings['directions']} random filter-normalised directions) or a pair; strong: their mean. "
        f"{top if any(row['top'] for row in rows) else ''}BatchNorm's statistics stay; between members, they are taken "
        f"anew from {settings['training_images']} training images."
    )
    return plots.landscape(rows, note)


def compute_landscape(folders: list[Path], path: Path) -> dict[str, Any]:
    """The content of the result file, of which is kept what was there of the same members and images."""
    runs = [read_run(folder) for folder in folders]
    check_alike(runs)
    device = start_device("auto", None)
    data = data_of(runs[0], device)
    batches, training = subset(data.val), subset(data.train)
    settings = {
        "images": sum(len(labels) for _, labels in batches),
        "training_images": sum(len(labels) for _, labels in training),
        "sha256_of_data": data.record["sha256_of_arrays_and_split"],
        "directions": DIRECTIONS,
        "along": ALONG,
        "between": BETWEEN,
        "top": TOP,
    }
    before: dict[str, Any] = {"along": {}, "between": {}, "top": {}}
    if path.is_file():
        content = read_landscape(path)
        earlier = {key: value for key, value in settings.items() if key != "top"}  # a file without eigenvectors
        if content["about"] in (settings, earlier):
            for one, key in itertools.product(content["runs"], before):
                before[key] |= one.get(key, {})
    content = {"about": settings, "runs": []}
    members = {one.folder: load_members(find_checkpoints([one.folder], "best")) for one in runs}
    total = sum(len(m) * (len(m) + 1) // 2 for m in members.values())
    bar = tqdm(total=total, desc="landscape", unit="curve", delay=5, disable=None, dynamic_ncols=True)
    for one in runs:
        row = {"folder": str(one.folder), "along": {}, "between": {}, "top": {}}
        row |= {key: one.content[key] for key in ("trained", "network", "data")}
        content["runs"].append(row)
        for member in members[one.folder]:
            member.model.to(device)
            generator = torch.Generator().manual_seed(0)  # the same directions for all, before they are scaled
            row["along"][member.digest] = before["along"].get(member.digest) or [
                losses_along(member.model, random_direction(member.model, generator), ALONG, batches)
                for _ in range(DIRECTIONS)
            ]
            row["top"][member.digest] = before["top"].get(member.digest) or along_top(member.model, batches)
            bar.update()
        for a, b in itertools.combinations(members[one.folder], 2):
            pair = f"{a.digest} {b.digest}"
            row["between"][pair] = before["between"].get(pair) or losses_between(
                a.model, b.model, BETWEEN, batches, training
            )
            bar.update()
        write_json(path, content)
    bar.close()
    return content


def along_top(model: nn.Module, batches: Batches) -> dict[str, Any]:
    """The losses along the top eigenvector of the Hessian, the higher side last, with what scales its curvature."""
    direction, eigenvalue, length = top_direction(model, batches)
    losses = losses_along(model, direction, TOP, batches)
    # An eigenvector has no sign: without one, a mean over members would mix up its sides.
    losses = losses if losses[-1] >= losses[0] else losses[::-1]
    return {"eigenvalue": eigenvalue, "length": length, "losses": losses}


def read_landscape(path: Path) -> dict[str, Any]:
    """The result file of `landscape`."""
    content = read_json(path, "draw it anew from run folders")
    if not {"about", "runs"} <= set(content):
        raise InputError(f"{path}: not the numbers of a landscape; draw it anew from run folders, to another --to")
    return content


def theory(args: argparse.Namespace) -> None:
    """Write the figures of what the theorems speak about into the folder `--to`, and what was simulated for them."""
    try:
        args.to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--to {args.to}: no folder can be made there ({error.strerror})") from error
    points = published()
    if args.folders is None:
        grids = simulate_all(args.data_sets, lambda plan: tqdm(plan, "simulations", unit="setting", disable=None))
        path = args.to / "theory.json"
        write_atomically(path, (json.dumps({"data_sets": args.data_sets, "grids": grids}) + "\n").encode())
        print(f"wrote {path}")
        figures = plots.theory(grids, points)
    else:
        (source,) = args.folders
        way_out = "leave --from out to simulate anew"
        try:
            figures = plots.theory(read_json(source, way_out)["grids"], points)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{source}: not the numbers of these figures; {way_out}") from error
    for name, figure in figures.items():
        print("wrote " + ", ".join(map(str, plots.save(figure, args.to / name))))


def measured(folders: list[Path]) -> list[Ensemble]:
    """The ensembles of measurement folders, which must be comparable."""
    ensembles = [read_ensemble(folder) for folder in folders]
    check_alike(ensembles)
    if any("corrupted" in one.content["result"] for one in ensembles):
        for one in ensembles:
            needed(one, "corrupted", "mean")
    return ensembles


def intervals(rows: list[Row]) -> str:
    """What the intervals of a figure are."""
    several = {len(row["ensembles"]) > 1 for row in rows}
    if several == {True}:
        return "95 % intervals: Student's, over ensembles."
    images = "95 % intervals: bootstrap over test images"
    return images + (", Student's over ensembles where there are several." if True in several else ".")


def read_log(folder: Path) -> list[dict[str, float]]:
    """The log of a member's training."""
    path = folder / "log.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        whole = all(
            row[f"{part}_{key}"] is not None for row in rows for part in ("train", "val") for key in ("loss", "acc")
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: missing or not the log of a run; give main.py's command again") from error
    if not rows or not whole:
        raise InputError(f"{path}: holds no epoch; let main.py train first")
    return rows


def read_array(path: Path, length: int) -> np.ndarray:
    """One of the arrays that a SharpBalance run leaves."""
    try:
        array = np.array(load_npy(path))
    except InputError as error:
        raise InputError(f"{path}: missing or not readable; the run has not made its sets yet, let it go on") from error
    if array.shape != (length,):
        raise InputError(
            f"{path}: shape {list(array.shape)}, the run has {length} training images; name the run's data"
        )
    return array


def data_of(one: Ensemble, device: torch.device | str = "cpu") -> Data:
    """The data set of a run, read again."""
    settings = one.content["settings"]
    data = load_data(
        *(settings[key] for key in ("data", "data_path")),
        device,
        *(settings[key] for key in ("train_idx_path", "val_idx_path")),
        label_noise=settings.get("label_noise") or 0.0,
    )
    key = "sha256_of_arrays_and_split"
    if data.record[key] != one.content["data"][key]:
        raise InputError(f"{settings['data_path']}: its images or split are not those of the run in {one.folder}")
    return data


def pixels(images: ImageSet, index: np.ndarray) -> list:
    """Images as whole numbers from 0 to 255, [N, H, W, C]."""
    mean, std = torch.tensor(images.info.mean), torch.tensor(images.info.std)
    return (255 * (images.plain(index)[0].permute(0, 2, 3, 1) * std + mean)).round().clamp(0, 255).int().tolist()


def subset(images: ImageSet) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of images that are drawn once and for all, without augmentation."""
    index = np.random.RandomState(0).permutation(len(images))[:IMAGES]
    return [images.plain(index[i : i + 250]) for i in range(0, len(index), 250)]


def figure_path(path: Path, suffix: str) -> Path:
    """The file of a figure with another suffix."""
    return path.with_name(path.name.removesuffix(".pdf").removesuffix(".png") + suffix)


KINDS: dict[str, Callable[[argparse.Namespace], Figure]] = {
    "tradeoff": tradeoff,
    "benchmark": benchmark,
    "severity": severity,
    "ensemble_size": ensemble_size,
    "sets": sets,
    "curves": curves,
    "landscape": landscape,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    parser.add_argument("kind", choices=[*KINDS, "theory"], help="which figure")
    parser.add_argument(
        "--from", type=Path, nargs="+", dest="folders", metavar="FOLDER", help="result folders, or a file of numbers"
    )
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FILE", help="the figure, without suffix; of theory a folder"
    )
    parser.add_argument(
        "--data_sets", type=number(int, 2), default=20, metavar="N", help="data sets of each setting of theory"
    )
    args = parser.parse_args(argv)
    if args.kind != "theory" and args.folders is None:
        parser.error(f"argument --from: {args.kind} is drawn from result folders, name them")
    if args.kind == "theory" and args.folders is not None and len(args.folders) != 1:
        parser.error(
            f"argument --from: {len(args.folders)} given; theory is drawn from one theory.json, or simulated without "
            "--from"
        )
    return args


def main(args: argparse.Namespace) -> None:
    """Draw the figures of one kind."""
    if args.kind == "theory":
        theory(args)
        return
    if args.to.is_dir():
        raise InputError(f"--to {args.to}: is a folder; name a file in it, for instance {args.to / args.kind}")
    try:
        args.to.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--to {args.to}: cannot be written ({error.strerror}); name another file") from error
    print("wrote " + ", ".join(map(str, plots.save(KINDS[args.kind](args), args.to))))


if __name__ == "__main__":
    run(main, parse_args())
