"""ShuffleNet v2 at width 1.0, with torchvision's names.

Source: Ma, Zhang, Zheng, Sun 2018, "ShuffleNet V2: Practical Guidelines for Efficient CNN
Architecture Design", table 5 and figure 3.

| layer                  | output    | units |
|------------------------|-----------|-------|
| conv 3x3/2, pool 3x3/2 | 24x56x56  |       |
| stage 2                | 116x28x28 | 4     |
| stage 3                | 232x14x14 | 8     |
| stage 4                | 464x7x7   | 4     |
| conv 1x1               | 1024x7x7  |       |
| average pool, linear   | 1000      |       |
| all: 2,278,604 parameters, 144,907,992 MACs |
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import ConvNormAct, end_linearly, initialise
from .checkpoint import Weights, load_weights


class Unit(nn.Module):
    """Half of the channels passes by, half is convolved, then both are interleaved.

    x: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch2 = _branch(channels // 2, channels // 2, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        return interleave(torch.cat([kept, self.branch2(changed)], dim=1))


class DownsamplingUnit(nn.Module):
    """Two branches, both of stride 2: x: (N, C, H, W) -> (N, K, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.branch1 = nn.Sequential(
            *_depthwise(in_channels, stride=2), *ConvNormAct(in_channels, half, 1)
        )
        self.branch2 = _branch(in_channels, half, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return interleave(torch.cat([self.branch1(x), self.branch2(x)], dim=1))


def _branch(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """1x1, depthwise 3x3 without activation, 1x1."""
    return nn.Sequential(
        *ConvNormAct(in_channels, out_channels, 1),
        *_depthwise(out_channels, stride),
        *ConvNormAct(out_channels, out_channels, 1),
    )


def _depthwise(channels: int, stride: int) -> ConvNormAct:
    layer = ConvNormAct(channels, channels, 3, stride, channels, activation=None)
    end_linearly([layer.norm])
    return layer


def interleave(x: Tensor) -> Tensor:
    """Shuffles two halves of the channels into each other: (N, C, H, W) -> (N, C, H, W)."""
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class ShuffleNetV2(nn.Module):
    """x: (N, 3, 224, 224) -> (N, num_classes)."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(3, 24, 3, stride=2)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stage2 = _stage(24, 116, units=4)
        self.stage3 = _stage(116, 232, units=8)
        self.stage4 = _stage(232, 464, units=4)
        self.conv5 = ConvNormAct(464, 1024, 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1024, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        x = self.conv5(self.stage4(self.stage3(self.stage2(x))))
        y: Tensor = self.fc(self.avgpool(x).flatten(1))
        return y


def _stage(in_channels: int, out_channels: int, units: int) -> nn.Sequential:
    first = DownsamplingUnit(in_channels, out_channels)
    return nn.Sequential(first, *(Unit(out_channels) for _ in range(units - 1)))


def shufflenet_v2_x1_0(num_classes: int = 1000, weights: Weights = None) -> ShuffleNetV2:
    """ShuffleNet v2 1.0x: (N, 3, 224, 224) -> (N, num_classes), 2,278,604 parameters."""
    return load_weights(ShuffleNetV2(num_classes), weights)
