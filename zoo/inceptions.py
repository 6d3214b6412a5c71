"""Inception v3, with torchvision's names.

Source: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna 2016, "Rethinking the Inception Architecture for
Computer Vision", table 1 and figures 5 to 7 and 10. 299x299 images.

| layer                        | output    | what is factorised                             |
|------------------------------|-----------|------------------------------------------------|
| 3x3/2, 3x3, 3x3, pool 3x3/2  | 64x73x73  |                                                |
| 1x1, 3x3, pool 3x3/2         | 192x35x35 |                                                |
| Mixed_5b, 5c, 5d             | 288x35x35 | 5x5 as two 3x3                                 |
| Mixed_6a (grid reduction)    | 768x17x17 |                                                |
| Mixed_6b, 6c, 6d, 6e         | 768x17x17 | 7x7 as 1x7 and 7x1                             |
| Mixed_7a (grid reduction)    | 1280x8x8  |                                                |
| Mixed_7b, 7c                 | 2048x8x8  | 3x3 as 1x3 beside 3x1                          |
| average pool, linear         | 1000      |                                                |
| 23,834,568 parameters (27,161,264 with the auxiliary head), 5,713,216,096 MACs                |
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import BasicConv2d, initialise, same_conv
from .checkpoint import Weights, load_weights


class InceptionOutput(NamedTuple):
    """What Inception v3 returns while it trains with its auxiliary head: twice (N, classes)."""

    logits: Tensor
    aux: Tensor


class MixedA(nn.Module):
    """1x1; 5x5; two 3x3; pool: x: (N, C, H, W) -> (N, 224 + pool_features, H, W)."""

    def __init__(self, in_channels: int, pool_features: int) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(in_channels, 64, 1)
        self.branch5x5_1 = BasicConv2d(in_channels, 48, 1)
        self.branch5x5_2 = same_conv(48, 64, 5)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, 1)
        self.branch3x3dbl_2 = same_conv(64, 96, 3)
        self.branch3x3dbl_3 = same_conv(96, 96, 3)
        self.branch_pool = BasicConv2d(in_channels, pool_features, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        pooled = self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1))
        return torch.cat([self.branch1x1(x), five, double, pooled], dim=1)


class MixedB(nn.Module):
    """Halves the grid: x: (N, C, H, W) -> (N, C + 480, (H-1)/2, (W-1)/2)."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3 = BasicConv2d(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, 1)
        self.branch3x3dbl_2 = same_conv(64, 96, 3)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class MixedC(nn.Module):
    """1x1; 7x7; two 7x7; pool; each 7x7 as 1x7 and 7x1: x: (N, C, H, W) -> (N, 768, H, W)."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = BasicConv2d(in_channels, 192, 1)
        self.branch7x7_1 = BasicConv2d(in_channels, width, 1)
        self.branch7x7_2 = same_conv(width, width, row)
        self.branch7x7_3 = same_conv(width, 192, column)
        self.branch7x7dbl_1 = BasicConv2d(in_channels, width, 1)
        self.branch7x7dbl_2 = same_conv(width, width, column)
        self.branch7x7dbl_3 = same_conv(width, width, row)
        self.branch7x7dbl_4 = same_conv(width, width, column)
        self.branch7x7dbl_5 = same_conv(width, 192, row)
        self.branch_pool = BasicConv2d(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        pooled = self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1))
        return torch.cat([self.branch1x1(x), seven, double, pooled], dim=1)


class MixedD(nn.Module):
    """Halves the grid again: x: (N, C, H, W) -> (N, C + 512, (H-1)/2, (W-1)/2)."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = BasicConv2d(in_channels, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(in_channels, 192, 1)
        self.branch7x7x3_2 = same_conv(192, 192, (1, 7))
        self.branch7x7x3_3 = same_conv(192, 192, (7, 1))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([three, self.branch7x7x3_4(seven), F.max_pool2d(x, 3, stride=2)], dim=1)


class MixedE(nn.Module):
    """The wide modules on the coarsest grid: x: (N, C, H, W) -> (N, 2048, H, W)."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        row, column = (1, 3), (3, 1)
        self.branch1x1 = BasicConv2d(in_channels, 320, 1)
        self.branch3x3_1 = BasicConv2d(in_channels, 384, 1)
        self.branch3x3_2a = same_conv(384, 384, row)
        self.branch3x3_2b = same_conv(384, 384, column)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 448, 1)
        self.branch3x3dbl_2 = same_conv(448, 384, 3)
        self.branch3x3dbl_3a = same_conv(384, 384, row)
        self.branch3x3dbl_3b = same_conv(384, 384, column)
        self.branch_pool = BasicConv2d(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1)),
        ]
        return torch.cat(branches, dim=1)


class AuxiliaryHead(nn.Module):
    """The classifier that helps to train the lower layers: x: (N, C, 17, 17) -> (N, classes)."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(5, stride=3)
        self.conv0 = BasicConv2d(in_channels, 128, 1)
        self.conv1 = BasicConv2d(128, 768, 5)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.conv0(self.pool(x)))
        y: Tensor = self.fc(self.avgpool(x).flatten(1))
        return y


class InceptionV3(nn.Module):
    """x: (N, 3, 299, 299) -> (N, num_classes); `InceptionOutput` while the auxiliary head trains.

    With `aux_logits` there is an auxiliary head, which runs in training mode only.
    """

    def __init__(self, num_classes: int = 1000, aux_logits: bool = False) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = same_conv(32, 64, 3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.maxpool2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b = MixedA(192, pool_features=32)
        self.Mixed_5c = MixedA(256, pool_features=64)
        self.Mixed_5d = MixedA(288, pool_features=64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b = MixedC(768, width=128)
        self.Mixed_6c = MixedC(768, width=160)
        self.Mixed_6d = MixedC(768, width=160)
        self.Mixed_6e = MixedC(768, width=192)
        self.AuxLogits = AuxiliaryHead(768, num_classes) if aux_logits else None
        self.Mixed_7a = MixedD(768)
        self.Mixed_7b = MixedE(1280)
        self.Mixed_7c = MixedE(2048)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout()
        self.fc = nn.Linear(2048, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor | InceptionOutput:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.maxpool2(x))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        middle = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(middle)))
        logits: Tensor = self.fc(self.dropout(self.avgpool(x).flatten(1)))
        if not self.training or self.AuxLogits is None:
            return logits
        return InceptionOutput(logits, self.AuxLogits(middle))


def inception_v3(
    num_classes: int = 1000, aux_logits: bool = False, weights: Weights = None
) -> InceptionV3:
    """Inception v3: (N, 3, 299, 299) -> (N, num_classes), 23,834,568 parameters, 5.71 GMACs.

    `aux_logits=True` adds the auxiliary head (27,161,264), which runs in training mode only, and
    which torchvision's published checkpoint contains. That checkpoint was trained elsewhere and
    expects pixels scaled to [-1, 1].
    """
    return load_weights(InceptionV3(num_classes, aux_logits), weights)
