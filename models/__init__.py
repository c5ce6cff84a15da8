"""The networks. `create_model` builds each of them from its name.

Those of this repository are `MODELS`; `models/external.py` makes those of torchvision, timm and a user's file.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from models.external import create_external, expand_user, is_external, nearest, pinned_name, try_external
from models.resnet import BLOCKS, ResNet
from models.resnet_tiny import TinyResNet
from models.vit import PATCHES, VisionTransformer
from models.wide_resnet import WideResNet

__all__ = ["MODELS", "check_model", "create_model", "evaluating", "expand_user", "full_name", "is_external"]

MODELS = (*(f"resnet{depth}" for depth in BLOCKS), "wrn-40-2", "wrn-28-10", "vit_t")
EXTERNAL = "torchvision:NAME, timm:NAME or FILE.py:FACTORY"
MAX_SIZE = 64  # of the images that the networks of this repository are for
# What to use for larger images instead. At the same size torchvision's ResNets cost a fifteenth: after a strided stem
# and max-pooling their stages see a sixteenth of the pixels.
LARGE = {name: f"torchvision:{name}" for name in MODELS if name.startswith("resnet")}
LARGE |= dict.fromkeys(("wrn-40-2", "wrn-28-10"), "torchvision:wide_resnet50_2")
LARGE |= {"vit_t": "timm:vit_tiny_patch16_224"}


def create_model(name: str, num_classes: int, width: int = 64, image_size: int = 32, in_channels: int = 3) -> nn.Module:
    """Build a network with freshly drawn weights, on the CPU, from torch's global generator.

    Args:
        name: one of `MODELS`, torchvision:NAME, timm:NAME or FILE.py:FACTORY (`models/external.py`). A ResNet of
            `MODELS` has the authors' form for TinyImageNet (`models/resnet_tiny.py`) at 64x64 and their form for
            CIFAR (`models/resnet.py`) below.
        num_classes: number of logits.
        width: 64 is the published size of every network; other values scale all its channels by width / 64
            (ResNet: channels of the first stage; WRN: the stem has width / 4; ViT: 3 * width dimensions). Networks
            that are not of `MODELS` have that size only.
        image_size: height and width of the images, 8 or more; of `MODELS` at most 64. The ViT needs a multiple of 8.
        in_channels: 1 for grey images, 3 for colour.

    Returns:
        A module that maps images [B, in_channels, image_size, image_size] to logits [B, num_classes].

    Raises:
        ValueError: for an unknown name or a size that the network does not support; the message names the argument.
    """
    _check_name(name)
    if num_classes < 2:
        raise ValueError(f"num_classes: expected 2 or more, got {num_classes}")
    if width < 1:
        raise ValueError(f"width: expected 1 or more, got {width}")
    if image_size < 8:
        raise ValueError(f"image_size: expected 8 or more, got {image_size}")
    if in_channels < 1:
        raise ValueError(f"in_channels: expected 1 or more, got {in_channels}")
    if is_external(name):
        if width != 64:
            why = "since this network comes in its own size only; leave it out"
            raise ValueError(f"width: expected 64 with {name}, {why}, got {width}")
        return create_external(name, num_classes, image_size, in_channels)
    if image_size > MAX_SIZE:
        gain = "a fifteenth of that" if name.startswith("resnet") else "far less"
        what = f"{name} of this repository is for at most {MAX_SIZE} x {MAX_SIZE} pixels, got {image_size}"
        raise ValueError(f"model: {what}; {LARGE[name]} costs {gain}")
    if name.startswith("resnet"):
        form = TinyResNet if image_size >= 64 else ResNet
        return form(int(name.removeprefix("resnet")), num_classes, width, in_channels)
    if name.startswith("wrn"):
        if width % 4:
            why = f"for {name}, whose stem has width / 4 channels"
            raise ValueError(f"width: expected a multiple of 4 {why}, got {width}")
        depth, widen_factor = (int(part) for part in name.split("-")[1:])
        return WideResNet(depth, widen_factor, num_classes, width // 4, in_channels)
    if image_size % PATCHES:
        raise ValueError(f"image_size: expected a multiple of {PATCHES} for {name}, got {image_size}")
    return VisionTransformer(num_classes, width, image_size, in_channels)


def _check_name(name: str) -> None:
    if name not in MODELS and not is_external(name):
        near = nearest(name, MODELS)
        found = f"got '{name[:100]}'" + (f"; nearest: {near}" if near else "")
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, {EXTERNAL}, {found}")


def full_name(name: str) -> str:
    """The name of a network; that of a user's file with its absolute path and the digest of its content.

    Raises:
        ValueError: if it is not of a known form, or if the file cannot be read or has another content.
    """
    _check_name(name)
    return pinned_name(name)


def check_model(
    name: str,
    num_classes: int,
    width: int = 64,
    image_size: int = 32,
    in_channels: int = 3,
    seeds: Sequence[int] = (),
) -> None:
    """Check, before anything is trained, that a network can be built, takes such images and returns logits.

    Args:
        name, num_classes, width, image_size, in_channels: as for `create_model`.
        seeds: of the members that start from freshly drawn weights: those of a user's file must be a function of the
            seed, and differ between the first two.

    Raises:
        ValueError: as `create_model`, or saying what is wrong with the network.
    """
    if is_external(name):
        if width != 64:
            create_model(name, num_classes, width, image_size, in_channels)
        try_external(name, num_classes, image_size, in_channels, seeds)
        return
    with torch.device("meta"):  # no memory, no random numbers
        create_model(name, num_classes, width, image_size, in_channels)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; afterwards each of its modules is back in its own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
