"""A network of few layers, for tests of whole runs: a fifth of the time of the smallest ResNet."""

from collections import OrderedDict

from torch import nn

NETWORK = f"{__file__}:network"  # the value of --model


def network(num_classes: int, in_channels: int) -> nn.Module:
    """Two convolutions, of which the first has BatchNorm, and a linear layer."""
    layers = {
        "conv1": nn.Conv2d(in_channels, 4, 3, bias=False),
        "bn1": nn.BatchNorm2d(4),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(4, 8, 3),
        "relu2": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "linear": nn.Linear(8, num_classes),
    }
    return nn.Sequential(OrderedDict(layers))
