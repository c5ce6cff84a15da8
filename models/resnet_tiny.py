"""The ResNet form of the authors' TinyImageNet experiments, for 64x64 images.

It differs from `models/resnet.py` in its names and in one place of its arithmetic: an identity shortcut carries a
learnable scale for each channel. Convolutions start from Kaiming's normal distribution with fan-out.
The names in the state_dict (conv1.0, conv2_x.0.residual_function.0, ..., shortcut.weight, fc) are those of the
authors' checkpoints, whose `*weight_mask` buffers of ones are ignored here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet import BLOCKS, Pointwise


class Scale(nn.Module):
    """y = weight * x, with one weight for each channel, of shape [C, 1, 1]; ones at the start."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class ResidualBlock(nn.Module):
    """A residual function, given as a list of (kernel size, channels, stride), and its shortcut."""

    def __init__(self, in_channels: int, convolutions: list[tuple[int, int, int]]):
        super().__init__()
        layers: list[nn.Module] = []
        channels, total_stride = in_channels, 1
        for kernel, out_channels, stride in convolutions:
            conv = nn.Conv2d(channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
            channels, total_stride = out_channels, total_stride * stride
        self.residual_function = nn.Sequential(*layers[:-1])
        if total_stride == 1 and channels == in_channels:
            self.shortcut: nn.Module = Scale(channels)
        else:
            self.shortcut = nn.Sequential(Pointwise(in_channels, channels, total_stride), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual_function(x) + self.shortcut(x), inplace=True)


class TinyResNet(nn.Module):
    """A ResNet with 3x3 stem and stages of `width`, 2, 4 and 8 times `width` channels (times 4 with bottlenecks)."""

    def __init__(self, depth: int, num_classes: int, width: int = 64, in_channels: int = 3):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        channels = width
        for stage, blocks in enumerate(BLOCKS[depth]):
            planes = width * 2**stage
            layers = []
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                if depth < 50:
                    convolutions = [(3, planes, stride), (3, planes, 1)]
                else:
                    convolutions = [(1, planes, 1), (3, planes, stride), (1, 4 * planes, 1)]
                layers.append(ResidualBlock(channels, convolutions))
                channels = convolutions[-1][1]
            self.add_module(f"conv{stage + 2}_x", nn.Sequential(*layers))
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.conv5_x(self.conv4_x(self.conv3_x(self.conv2_x(out))))
        return self.fc(out.mean(dim=(2, 3)))
