"""Wide residual networks WRN-40-2 and WRN-28-10 for small images.

Reference: Zagoruyko and Komodakis, "Wide residual networks", BMVC 2016; without dropout.
The names in the state_dict (conv1, block1.layer.0.bn1, ..., convShortcut, bn1, fc) are those of the authors'
checkpoints.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.resnet import Pointwise


class WideBlock(nn.Module):
    """Pre-activation block: BatchNorm, ReLU and convolution, twice, and a shortcut."""

    def __init__(self, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.convShortcut = None if in_planes == planes else Pointwise(in_planes, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        out = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        # Where the shape changes, the shortcut starts after the activation, as in the original networks.
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


class Stage(nn.Module):
    """Blocks of one resolution; the first one changes the shape."""

    def __init__(self, blocks: int, in_planes: int, planes: int, stride: int):
        super().__init__()
        self.layer = nn.Sequential(
            *(WideBlock(in_planes if i == 0 else planes, planes, stride if i == 0 else 1) for i in range(blocks))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-`depth`-`widen_factor`: three stages on a stem of `base` channels (16 in the published networks)."""

    def __init__(self, depth: int, widen_factor: int, num_classes: int, base: int = 16, in_channels: int = 3):
        super().__init__()
        blocks = (depth - 4) // 6
        planes = [base] + [base * widen_factor * 2**stage for stage in range(3)]
        self.conv1 = nn.Conv2d(in_channels, base, 3, padding=1, bias=False)
        self.block1 = Stage(blocks, planes[0], planes[1], 1)
        self.block2 = Stage(blocks, planes[1], planes[2], 2)
        self.block3 = Stage(blocks, planes[2], planes[3], 2)
        self.bn1 = nn.BatchNorm2d(planes[3])
        self.fc = nn.Linear(planes[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(out), inplace=True).mean(dim=(2, 3)))
