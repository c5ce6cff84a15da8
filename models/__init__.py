"""The networks. `create_model` builds each of them from its name."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from models.resnet import BLOCKS, ResNet
from models.resnet_tiny import TinyResNet
from models.vit import PATCHES, VisionTransformer
from models.wide_resnet import WideResNet

MODELS = (*(f"resnet{depth}" for depth in BLOCKS), "wrn-40-2", "wrn-28-10", "vit_t")


def create_model(name: str, num_classes: int, width: int = 64, image_size: int = 32, in_channels: int = 3) -> nn.Module:
    """Build a network with freshly drawn weights, on the CPU, from torch's global generator.

    Args:
        name: one of `MODELS`. A ResNet takes the authors' form for TinyImageNet (`models/resnet_tiny.py`) from
            64x64 on and their form for CIFAR (`models/resnet.py`) below.
        num_classes: number of logits.
        width: 64 is the published size of every network; other values scale all its channels by width / 64
            (ResNet: channels of the first stage; WRN: the stem has width / 4; ViT: 3 * width dimensions).
        image_size: height and width of the images, 8 or more. The ViT needs a multiple of 8.
        in_channels: 1 for grey images, 3 for colour.

    Returns:
        A module that maps images [B, in_channels, image_size, image_size] to logits [B, num_classes].

    Raises:
        ValueError: for an unknown name or a size that the network does not support; the message names the argument.
    """
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got '{name}'")
    if num_classes < 2:
        raise ValueError(f"num_classes: expected 2 or more, got {num_classes}")
    if width < 1:
        raise ValueError(f"width: expected 1 or more, got {width}")
    if image_size < 8:
        raise ValueError(f"image_size: expected 8 or more, got {image_size}")
    if in_channels < 1:
        raise ValueError(f"in_channels: expected 1 or more, got {in_channels}")
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
