"""A saved ensemble as one module: images in; probabilities, entropy and mutual information out.

ensemble = load_ensemble("runs/digits_sharpbalance")
found = ensemble(images)  # uint8 [N, H, W, C], or float [N, C, H, W] in [0, 1]
print(ensemble.classes[found.predicted[0]], found.probs[0].max(), found.entropy[0], found.mutual_information[0])
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import expand_user
from utils import InputError
from utils.data import DatasetInfo, coloured, scaled
from utils.datasets import DATASETS, NAMES, PICTURE_SIZE, folder_info, note
from utils.files import read_entry
from utils.folder import stored_size
from utils.kept import VERSIONS
from utils.metrics import ensemble_log_probs, mutual_information, predictive_entropy
from utils.predictions import SavedMember, load_members
from utils.run import CHECKPOINTS, find_checkpoints, kept_temperatures, read_settings, run_of

AT_ONCE, LARGE = 128, 64  # the most images in one pass, and the size from which on there are fewer
# Of the published sets, in the order of their labels; those of TinyImageNet are the names of its folders.
CLASS_NAMES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "cifar100": "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly "
    "camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur "
    "dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion "
    "lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree "
    "pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea "
    "seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank "
    "telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm",
    "fashion_mnist": "T-shirt/top Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Ankle_boot",
    "digits": "0 1 2 3 4 5 6 7 8 9",
}


@dataclass(frozen=True)
class Prediction:
    """What an ensemble of M members says of N images, C classes.

    Attributes:
        probs: [N, C], the mean of the members' probabilities; with a temperature T, softmax(log(mean) / T).
        member_probs: [M, N, C], of each member, without temperature.
        entropy: [N], of `probs`, in nats: all uncertainty.
        mutual_information: [N], in nats: entropy of the mean of `member_probs` less the mean of their entropies, that
            part of the uncertainty which is the members' disagreement.
        predicted: int64 [N], the class of the largest probability.
    """

    probs: Tensor
    member_probs: Tensor
    entropy: Tensor
    mutual_information: Tensor
    predicted: Tensor


class Ensemble(nn.Module):
    """Members that predict together, in eval mode and without gradients; normalisation and temperature are inside.

    Args:
        members: the networks, which map [N, C, S, S] to logits.
        info: size of their inputs, means and deviations, names of the classes.
        picture_size: height and width to which images of another size are scaled, before their middle is taken, or
            zeros are put around them, to the size of the inputs.
        temperature: see `Prediction`.

    Attributes:
        members, temperature: as above; the temperature may be set, 1 is none.
        classes: names, in the order of the labels.
    """

    def __init__(self, members: Iterable[nn.Module], info: DatasetInfo, picture_size: int, temperature: float = 1.0):
        super().__init__()
        self.members = nn.ModuleList(members).requires_grad_(False)
        self.classes, self.temperature = list(info.classes), temperature
        self.image_size, self.channels, self.picture_size = info.image_size, info.channels, picture_size
        mean, std = torch.tensor(info.preprocessing.mean), torch.tensor(info.preprocessing.std)
        # As `utils.data.ImageSet` normalises, bit for bit.
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "Ensemble":
        """Stay in eval mode: in train mode a prediction would depend on the other images of its batch."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor | np.ndarray) -> Prediction:
        """Predict images, some at a time, so that memory does not depend on their number.

        Images of another size are scaled as those of a folder: their middle square, antialiased (`utils.folder`). Grey
        images are repeated for networks of colour, colours are turned grey (ITU-R 601) for networks of grey. Both are
        said in a line, once.

        Args:
            images: tensor or array, uint8 [N, H, W, C] or float [N, C, H, W] from 0 to 1; C is 1 or 3.

        Raises:
            ValueError: for images of another form or range.
        """
        if not isinstance(images, Tensor | np.ndarray):
            raise ValueError(f"images: expected a tensor or an array of numpy, got {type(images).__name__}")
        whole = images.dtype in (torch.uint8, np.uint8)
        floats = images.is_floating_point() if isinstance(images, Tensor) else images.dtype.kind == "f"
        channels = images.shape[-1 if whole else 1] if images.ndim == 4 else None
        if not (whole or floats) or channels not in (1, 3):
            found = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"images: expected uint8 [N, H, W, C] or float [N, C, H, W], C 1 or 3, got {found}")
        self._say_what_is_done(*(images.shape[1:3] if whole else images.shape[2:]), channels)
        at_once = max(1, AT_ONCE * LARGE**2 // max(self.image_size, LARGE) ** 2)
        # At least one pass: of no images, the results have their shapes all the same.
        passes = [self._pass(images[i : i + at_once], whole) for i in range(0, max(len(images), 1), at_once)]
        found = [torch.cat(parts, dim) for parts, dim in zip(zip(*passes, strict=True), (0, 1, 0, 0), strict=True)]
        return Prediction(*found, found[0].argmax(dim=1))

    def _pass(self, images: Tensor | np.ndarray, whole: bool) -> tuple[Tensor, ...]:
        if not isinstance(images, Tensor):
            images = torch.from_numpy(np.array(images))  # a copy: of a memory map too, which may be read-only
        images = images.to(self.scale.device)
        if not whole:
            if images.numel() and not (images.amin() >= 0 and images.amax() <= 1):  # of nan too
                span = f"{images.amin().item():g} to {images.amax().item():g}"
                raise ValueError(f"images: expected floats from 0 to 1, neither normalised nor of 0 to 255, got {span}")
            images = images.permute(0, 2, 3, 1).float() * 255  # what was uint8 is the same number again
        if images.shape[1:3] != (self.image_size, self.image_size):
            images = self.placed(scaled(images, self.picture_size))
        return self.of_pixels(self.coloured(images))

    def of_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors of `Prediction` but `predicted`, of inputs [N, S, S, C] with numbers from 0 to 255, in one pass.

        This is what `scripts/export.py` exports.
        """
        inputs = (pixels.float() * self.scale + self.shift).permute(0, 3, 1, 2)
        log_probs = torch.log_softmax(torch.stack([member(inputs).float() for member in self.members]), dim=2)
        member_probs = log_probs.exp()
        probs = member_probs.mean(dim=0)
        if self.temperature != 1:
            probs = torch.softmax(ensemble_log_probs(log_probs) / self.temperature, dim=1)
        return probs, member_probs, predictive_entropy(probs), mutual_information(member_probs)

    def placed(self, pictures: Tensor) -> Tensor:
        """Pictures [N, P, P, C] of `picture_size` as inputs [N, S, S, C]: their middle, or zeros around them."""
        if self.picture_size <= self.image_size:
            border = (self.image_size - self.picture_size) // 2
            return F.pad(pictures, (0, 0, border, border, border, border))
        start = (self.picture_size - self.image_size) // 2
        return pictures[:, start : start + self.image_size, start : start + self.image_size]

    def coloured(self, images: Tensor) -> Tensor:
        """Images [N, H, W, 1 or 3] with as many channels as the networks have."""
        return coloured(images, self.channels)

    def _say_what_is_done(self, height: int, width: int, channels: int) -> None:
        if (height, width) != (self.image_size, self.image_size):
            note(f"images of {height}x{width} pixels: {self.how_scaled()}")
        if channels != self.channels:
            note(f"images of {channels} channels: {self.how_coloured()}")

    def how_scaled(self) -> str:
        """What is done with images of another size, in words."""
        size, picture = self.image_size, self.picture_size
        then = "" if size == picture else ", and its middle taken" if size < picture else ", and zeros put around it"
        end = then and f", as inputs of {size}x{size}"
        return f"the middle square is scaled to {picture}x{picture}{then}{end}, as those of a folder are for training"

    def how_coloured(self) -> str:
        """What is done with images of other channels, in words."""
        return "repeated for networks of colour" if self.channels == 3 else "turned grey for networks of grey images"


def load_ensemble(
    path: str | Path | Iterable[str | Path],
    device: str | torch.device = "cpu",
    checkpoint: str | None = None,
    data: str | None = None,
    model: str | None = None,
) -> Ensemble:
    """A saved ensemble that predicts: call it on images, and see `Prediction`.

    The temperature is the one that `measure_diversity.py --mode predict` has fitted on validation images and kept with
    the run, of exactly these members; a line says so, or that there is none.

    Args:
        path: a run, member folders or checkpoint files, one or several, as of --resume; also files of earlier versions
            and of the authors' release.
        device: where the members are put.
        checkpoint: best | last | averaged, for folders (default: best).
        data: the data set that others' files do not name, whose means and deviations normalise the images.
        model: the new place of a file of yours that makes the network, FILE.py:FACTORY, where it has moved.

    Raises:
        InputError: naming the file, if something is missing, damaged or contradictory.
    """
    try:
        places = [expand_user(p) for p in ([path] if isinstance(path, str | os.PathLike) else path)]
    except ValueError as error:
        raise InputError(f"path: {error}") from error
    if not places:
        raise InputError("path: expected a run, member folders or checkpoint files, got none")
    if checkpoint is not None and checkpoint not in CHECKPOINTS:
        raise InputError(f"checkpoint: expected one of {', '.join(CHECKPOINTS)}, got {checkpoint!r}")
    paths = find_checkpoints(places, checkpoint)
    run = run_of(places[0])
    recorded = read_settings(run) if run else {}
    data = data or recorded.get("data")
    size = DATASETS[data].image_size if str(data) in DATASETS else recorded.get("image_size")
    members = load_members(paths, model=model, dataset=data, image_size=size)
    name, info = _info(members[0])
    picture_size = PICTURE_SIZE.get(name) or (stored_size(info.image_size) if name == "folder" else info.image_size)
    ensemble = Ensemble([m.model for m in members], info, picture_size, _temperature(members))
    return ensemble.to(torch.device(device), memory_format=torch.channels_last)


def _info(member: SavedMember) -> tuple[str, DatasetInfo]:
    """The data set of a member, and what its inputs and classes are."""
    name, network, inputs = member.network["dataset"], member.network, member.inputs
    facts = {key: network[key] for key in ("num_classes", "image_size", "in_channels")}
    form = "{num_classes} classes, {in_channels} channels, {image_size}x{image_size} pixels"
    known = {one: info.network for one, info in DATASETS.items()}
    if name is None:
        names = [one for one, other in known.items() if other == facts]
        if len(names) != 1:
            problem = f"{member.path} does not say which data set its network was trained on ({form.format(**facts)})"
            raise InputError(f"data: {problem}; name it by data (--data)")
        name = names[0]
        note(f"{member.path}: taken for a network of {name}, by {form.format(**facts)}; name another by data (--data)")
    if name not in NAMES:
        raise InputError(f"{member.path}: expected a data set of {', '.join(NAMES)}, got {str(name)[:40]!r}")
    if known.get(name, facts) != facts:
        problem = f"{member.path}: a network of {form.format(**facts)}"
        raise InputError(f"{problem}; {name} has {form.format(**known[name])}")
    mean, std, classes = inputs["mean"], inputs["std"], inputs["classes"]
    if mean is None and name == "folder":
        raise InputError(f"{member.path}: holds no means and deviations of the images that it was trained on")
    if mean is None:
        p = DATASETS[name].preprocessing
        mean, std = p.mean, p.std
    classes = classes or CLASS_NAMES.get(name, "").split() or _folder_names(member.path)
    if len(classes) != facts["num_classes"]:
        classes = [str(label) for label in range(facts["num_classes"])]
    classes = [one.replace("_", " ") for one in classes] if name in CLASS_NAMES else classes
    return name, folder_info(facts["image_size"], classes, mean, std)


def _folder_names(path: Path) -> list[str]:
    """The names of TinyImageNet's folders, which its run has recorded; none where they are not known."""
    run = run_of(path)
    names = read_entry(run / "environment.json", "data", "files", 0, "classes") if run else None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def _temperature(members: list[SavedMember]) -> float:
    """The temperature that the members' runs keep for exactly these members, and by this code; else 1."""
    weights = sorted(member.digest for member in members)
    versions = {kind: VERSIONS[kind] for kind in ("logits", "predict")}
    for run in dict.fromkeys(run_of(member.path) for member in members):
        for one in kept_temperatures(run) if run else ():
            if (one["weights"], one["average"]) != (weights, "probs"):
                continue
            if one.get("versions") == versions:
                note(f"{run}: its temperature, {one['temperature']:.4g}, is used (fitted on validation images)")
                return one["temperature"]
            note(f"{run}: its temperature was fitted by another version of the code, and is not used")
            return 1.0
    way_out = "python measure_diversity.py --mode predict --resume RUN fits one"
    note(f"{members[0].path}: no temperature of these members is kept, probabilities are as they are; {way_out}")
    return 1.0
