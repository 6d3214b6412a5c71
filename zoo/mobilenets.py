"""MobileNets: depthwise convolutions, then inverted residuals, then squeeze-and-excitation.

Sources: Howard et al. 2017, "MobileNets", table 1; Sandler et al. 2018, "MobileNetV2", table 2;
Howard et al. 2019, "Searching for MobileNetV3", table 1. Names of v1 are timm's (mobilenetv1_100),
of v2 and v3 torchvision's. As in the published code, v1 clips its ReLUs at 6.

| model              | parameters |        MACs |
|--------------------|------------|-------------|
| mobilenet_v1       |  4,231,976 | 568,740,352 |
| mobilenet_v2       |  3,504,872 | 300,774,272 |
| mobilenet_v3_large |  5,483,032 | 216,589,760 |
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from .blocks import ConvNormAct, InvertedResidual, SqueezeExcite, initialise, tame_bottlenecks
from .checkpoint import Weights, load_weights

# Per stage: output channels, blocks, stride of the first block.
V1_STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))

# Per stage: expansion factor, output channels, blocks, stride of the first block.
V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)

# Per block: kernel, expanded channels, output channels, squeezed channels (0: none), hard, stride.
V3_LARGE_BLOCKS = (
    (3, 16, 16, 0, False, 1),
    (3, 64, 24, 0, False, 2),
    (3, 72, 24, 0, False, 1),
    (5, 72, 40, 24, False, 2),
    (5, 120, 40, 32, False, 1),
    (5, 120, 40, 32, False, 1),
    (3, 240, 80, 0, True, 2),
    (3, 200, 80, 0, True, 1),
    (3, 184, 80, 0, True, 1),
    (3, 184, 80, 0, True, 1),
    (3, 480, 112, 120, True, 1),
    (3, 672, 112, 168, True, 1),
    (5, 672, 160, 168, True, 2),
    (5, 960, 160, 240, True, 1),
    (5, 960, 160, 240, True, 1),
)


class SeparableConv(nn.Module):
    """A depthwise 3x3 and a pointwise 1x1 convolution: x: (N, C, H, W) -> (N, K, P, Q)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(
            in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False
        )
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.activation = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.bn1(self.conv_dw(x)))
        y: Tensor = self.activation(self.bn2(self.conv_pw(x)))
        return y


class MobileNetV1(nn.Module):
    """x: (N, 3, 224, 224) -> (N, num_classes)."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.activation = nn.ReLU6()
        stages, in_channels = [], 32
        for channels, depth, stride in V1_STAGES:
            blocks = [SeparableConv(in_channels, channels, stride)]
            blocks += [SeparableConv(channels, channels, 1) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            in_channels = channels
        self.blocks = nn.Sequential(*stages)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(in_channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.activation(self.bn1(self.conv_stem(x))))
        y: Tensor = self.classifier(self.global_pool(x).flatten(1))
        return y


class LinearBottleneck(nn.Module):
    """MobileNetV2's inverted residual: x: (N, C, H, W) -> (N, K, H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        expanded = expansion * in_channels
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(ConvNormAct(in_channels, expanded, 1, activation=nn.ReLU6))
        layers += [
            ConvNormAct(expanded, expanded, 3, stride, expanded, nn.ReLU6),
            *ConvNormAct(expanded, out_channels, 1, activation=None),
        ]
        self.conv = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.attenuation = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.has_shortcut else y

    def last_norm(self) -> nn.BatchNorm2d:
        """The normalisation that ends the block."""
        return cast(nn.BatchNorm2d, self.conv[-1])


class MobileNetV2(nn.Module):
    """x: (N, 3, 224, 224) -> (N, num_classes)."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = [ConvNormAct(3, 32, 3, stride=2, activation=nn.ReLU6)]
        in_channels = 32
        for expansion, channels, depth, first_stride in V2_STAGES:
            for i in range(depth):
                stride = first_stride if i == 0 else 1
                layers.append(LinearBottleneck(in_channels, channels, stride, expansion))
                in_channels = channels
        layers.append(ConvNormAct(in_channels, 1280, 1, activation=nn.ReLU6))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))
        initialise(self)
        tame_bottlenecks([m for m in layers if isinstance(m, LinearBottleneck)])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return y


class MobileNetV3(nn.Module):
    """x: (N, 3, 224, 224) -> (N, num_classes)."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        eps = 0.001
        layers: list[nn.Module] = [ConvNormAct(3, 16, 3, 2, activation=nn.Hardswish, eps=eps)]
        in_channels = 16
        for kernel_size, expanded, channels, squeezed, hard, stride in V3_LARGE_BLOCKS:
            block = InvertedResidual(
                in_channels,
                expanded,
                channels,
                kernel_size,
                stride,
                activation=nn.Hardswish if hard else nn.ReLU,
                squeeze=SqueezeExcite(expanded, squeezed, nn.ReLU, nn.Hardsigmoid)
                if squeezed
                else None,
                eps=eps,
            )
            layers.append(block)
            in_channels = channels
        layers.append(ConvNormAct(in_channels, 960, 1, activation=nn.Hardswish, eps=eps))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(960, 1280), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(1280, num_classes)
        )
        initialise(self)
        tame_bottlenecks([m for m in layers if isinstance(m, InvertedResidual)])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return y


def mobilenet_v1(num_classes: int = 1000, weights: Weights = None) -> MobileNetV1:
    """MobileNet v1: (N, 3, 224, 224) -> (N, num_classes), 4,231,976 parameters, 0.569 GMACs."""
    return load_weights(MobileNetV1(num_classes), weights)


def mobilenet_v2(num_classes: int = 1000, weights: Weights = None) -> MobileNetV2:
    """MobileNet v2: (N, 3, 224, 224) -> (N, num_classes), 3,504,872 parameters, 0.301 GMACs."""
    return load_weights(MobileNetV2(num_classes), weights)


def mobilenet_v3_large(num_classes: int = 1000, weights: Weights = None) -> MobileNetV3:
    """MobileNet v3-large: (N, 3, 224, 224) -> (N, num_classes).

    5,483,032 parameters, 0.217 GMACs.
    """
    return load_weights(MobileNetV3(num_classes), weights)
