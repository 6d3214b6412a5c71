"""DenseNet: every layer reads all that came before it in its block.

Source: Huang, Liu, van der Maaten, Weinberger 2017, "Densely Connected Convolutional Networks",
table 1, growth rate 32. Names are torchvision's.

| densenet121           | output     | layers: 1x1 to 128 channels, 3x3 to 32 |
|-----------------------|------------|----------------------------------------|
| conv 7x7/2, pool 3x3/2| 64x56x56   |                                        |
| dense block 1         | 256x56x56  | 6                                      |
| 1x1, average pool 2x2 | 128x28x28  |                                        |
| dense block 2         | 512x28x28  | 12                                     |
| 1x1, average pool 2x2 | 256x14x14  |                                        |
| dense block 3         | 1024x14x14 | 24                                     |
| 1x1, average pool 2x2 | 512x7x7    |                                        |
| dense block 4         | 1024x7x7   | 16                                     |
| average pool, linear  | 1000       |                                        |
| all: 7,978,856 parameters, 2,834,161,664 MACs                               |
"""

from __future__ import annotations

import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import initialise
from .checkpoint import Weights, load_weights

GROWTH = 32
BOTTLENECK_CHANNELS = 4 * GROWTH


class DenseLayer(nn.Module):
    """Appends 32 new channels to its input: x: (N, C, H, W) -> (N, C + 32, H, W)."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, BOTTLENECK_CHANNELS, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(BOTTLENECK_CHANNELS)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(BOTTLENECK_CHANNELS, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu1(self.norm1(x)))
        y = self.conv2(self.relu2(self.norm2(y)))
        return torch.cat([x, y], dim=1)


def _dense_block(depth: int, in_channels: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            (f"denselayer{i + 1}", DenseLayer(in_channels + i * GROWTH)) for i in range(depth)
        )
    )


def _transition(in_channels: int) -> nn.Sequential:
    """Halves channels and resolution: x: (N, C, H, W) -> (N, C/2, H/2, W/2)."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            norm=nn.BatchNorm2d(in_channels),
            relu=nn.ReLU(),
            conv=nn.Conv2d(in_channels, in_channels // 2, 1, bias=False),
            pool=nn.AvgPool2d(2),
        )
    )


class DenseNet(nn.Module):
    """Dense blocks of the given depths: x: (N, 3, 224, 224) -> (N, num_classes)."""

    def __init__(self, depths: tuple[int, ...], num_classes: int = 1000) -> None:
        super().__init__()
        layers = OrderedDict[str, nn.Module](
            conv0=nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
            norm0=nn.BatchNorm2d(64),
            relu0=nn.ReLU(),
            pool0=nn.MaxPool2d(3, stride=2, padding=1),
        )
        channels = 64
        for i, depth in enumerate(depths, start=1):
            layers[f"denseblock{i}"] = _dense_block(depth, channels)
            channels += depth * GROWTH
            if i < len(depths):
                layers[f"transition{i}"] = _transition(channels)
                channels //= 2
        layers["norm5"] = nn.BatchNorm2d(channels)
        self.features = nn.Sequential(layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(F.relu(self.features(x)))
        y: Tensor = self.classifier(x.flatten(1))
        return y


def densenet121(num_classes: int = 1000, weights: Weights = None) -> DenseNet:
    """DenseNet-121: (N, 3, 224, 224) -> (N, num_classes), 7,978,856 parameters, 2.83 GMACs."""
    model = DenseNet((6, 12, 24, 16), num_classes)
    return load_weights(model, weights, rename=_current_name)


def _current_name(name: str) -> str:
    """torchvision's published file still says `denselayer1.norm.1` for `denselayer1.norm1`."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name)
