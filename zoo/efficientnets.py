"""EfficientNet-B0, with torchvision's names.

Source: Tan, Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
table 1. SiLU throughout; squeeze-and-excitation in every block, to a quarter of the block's input
channels. Without the stochastic depth that regularises its training.

| stage              | output     | blocks |
|--------------------|------------|--------|
| conv 3x3/2         | 32x112x112 |        |
| MBConv1 3x3        | 16x112x112 | 1      |
| MBConv6 3x3/2      | 24x56x56   | 2      |
| MBConv6 5x5/2      | 40x28x28   | 2      |
| MBConv6 3x3/2      | 80x14x14   | 3      |
| MBConv6 5x5        | 112x14x14  | 3      |
| MBConv6 5x5/2      | 192x7x7    | 4      |
| MBConv6 3x3        | 320x7x7    | 1      |
| conv 1x1           | 1280x7x7   |        |
| average pool, fc   | 1000       |        |
| all: 5,288,548 parameters, 385,814,752 MACs |
"""

from __future__ import annotations

from torch import Tensor, nn

from .blocks import (
    SILU_GAIN,
    ConvNormAct,
    InvertedResidual,
    SqueezeExcite,
    initialise,
    tame_bottlenecks,
)
from .checkpoint import Weights, load_weights

# Per stage: expansion factor, kernel, stride of the first block, output channels, blocks.
B0_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class EfficientNet(nn.Module):
    """x: (N, 3, 224, 224) -> (N, num_classes)."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        stages: list[nn.Module] = [ConvNormAct(3, 32, 3, stride=2, activation=nn.SiLU)]
        in_channels = 32
        for expansion, kernel_size, stride, channels, depth in B0_STAGES:
            blocks = [_block(in_channels, expansion, channels, kernel_size, stride)]
            blocks += [
                _block(channels, expansion, channels, kernel_size, 1) for _ in range(depth - 1)
            ]
            stages.append(nn.Sequential(*blocks))
            in_channels = channels
        stages.append(ConvNormAct(in_channels, 1280, 1, activation=nn.SiLU))
        self.features = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))
        initialise(self, SILU_GAIN)
        tame_bottlenecks([m for m in self.modules() if isinstance(m, InvertedResidual)], SILU_GAIN)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return y


def _block(
    in_channels: int, expansion: int, out_channels: int, kernel_size: int, stride: int
) -> InvertedResidual:
    expanded = expansion * in_channels
    return InvertedResidual(
        in_channels,
        expanded,
        out_channels,
        kernel_size,
        stride,
        activation=nn.SiLU,
        squeeze=SqueezeExcite(expanded, in_channels // 4, nn.SiLU, nn.Sigmoid),
    )


def efficientnet_b0(num_classes: int = 1000, weights: Weights = None) -> EfficientNet:
    """EfficientNet-B0: (N, 3, 224, 224) -> (N, num_classes), 5,288,548 parameters, 0.386 GMACs."""
    return load_weights(EfficientNet(num_classes), weights)
