"""BN-Inception (Inception v2): GoogLeNet with batch normalisation and two 3x3 for each 5x5.

Source: Ioffe, Szegedy 2015, "Batch Normalization", figure 5; 224x224 images. The first layer is an
ordinary convolution; the paper's is a depthwise-separable one.

| layer                 | output     | 1x1, 3x3 reduce, 3x3, double reduce, double, projection   |
|-----------------------|------------|-----------------------------------------------------------|
| conv 7x7/2, pool 3x3/2| 64x56x56   |                                                           |
| conv 1x1, 3x3, pool   | 192x28x28  | reduce 64, 192                                            |
| 3a                    | 256x28x28  | 64, 64, 64, 64, 96, average 32                            |
| 3b                    | 320x28x28  | 64, 64, 96, 64, 96, average 64                            |
| 3c, stride 2          | 576x14x14  | 0, 128, 160, 64, 96, max, passed through                  |
| 4a                    | 576x14x14  | 224, 64, 96, 96, 128, average 128                         |
| 4b                    | 576x14x14  | 192, 96, 128, 96, 128, average 128                        |
| 4c                    | 576x14x14  | 160, 128, 160, 128, 160, average 96                       |
| 4d                    | 576x14x14  | 96, 128, 192, 160, 192, average 96                        |
| 4e, stride 2          | 1024x7x7   | 0, 128, 192, 192, 256, max, passed through                |
| 5a                    | 1024x7x7   | 352, 192, 320, 160, 224, average 128                      |
| 5b                    | 1024x7x7   | 352, 192, 320, 192, 224, max 128                          |
| average pool, linear  | 1000       |                                                           |
| all: 11,194,984 parameters, 2,018,851,840 MACs                                                 |
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import BasicConv2d, initialise
from .checkpoint import Weights, load_weights


class Mixed(nn.Module):
    """1x1; 3x3; two 3x3; pool and projection: x: (N, C, H, W) -> (N, sum, H, W).

    `filters` as in the table above; `pool` is the fourth branch's 3x3 window.
    """

    def __init__(
        self,
        in_channels: int,
        filters: tuple[int, int, int, int, int, int],
        pool: type[nn.AvgPool2d] | type[nn.MaxPool2d] = nn.AvgPool2d,
    ) -> None:
        super().__init__()
        single, reduce3, out3, reduce33, out33, projection = filters
        self.branch1 = BasicConv2d(in_channels, single, 1)
        self.branch2 = nn.Sequential(
            BasicConv2d(in_channels, reduce3, 1), BasicConv2d(reduce3, out3, 3, padding=1)
        )
        self.branch3 = nn.Sequential(
            BasicConv2d(in_channels, reduce33, 1),
            BasicConv2d(reduce33, out33, 3, padding=1),
            BasicConv2d(out33, out33, 3, padding=1),
        )
        self.branch4 = nn.Sequential(
            pool(3, stride=1, padding=1), BasicConv2d(in_channels, projection, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(
            [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], dim=1
        )


class Reduction(nn.Module):
    """Halves the grid: x: (N, C, H, W) -> (N, C + out3 + out33, H/2, W/2)."""

    def __init__(self, in_channels: int, filters: tuple[int, int, int, int]) -> None:
        super().__init__()
        reduce3, out3, reduce33, out33 = filters
        self.branch2 = nn.Sequential(
            BasicConv2d(in_channels, reduce3, 1), BasicConv2d(reduce3, out3, 3, 2, padding=1)
        )
        self.branch3 = nn.Sequential(
            BasicConv2d(in_channels, reduce33, 1),
            BasicConv2d(reduce33, out33, 3, padding=1),
            BasicConv2d(out33, out33, 3, 2, padding=1),
        )
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch2(x), self.branch3(x), self.pool(x)], dim=1)


class InceptionV2(nn.Module):
    """x: (N, 3, 224, 224) -> (N, num_classes)."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = BasicConv2d(3, 64, 7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, padding=1)
        self.conv2 = BasicConv2d(64, 64, 1)
        self.conv3 = BasicConv2d(64, 192, 3, padding=1)
        self.maxpool2 = nn.MaxPool2d(3, stride=2, padding=1)
        self.inception3a = Mixed(192, (64, 64, 64, 64, 96, 32))
        self.inception3b = Mixed(256, (64, 64, 96, 64, 96, 64))
        self.inception3c = Reduction(320, (128, 160, 64, 96))
        self.inception4a = Mixed(576, (224, 64, 96, 96, 128, 128))
        self.inception4b = Mixed(576, (192, 96, 128, 96, 128, 128))
        self.inception4c = Mixed(576, (160, 128, 160, 128, 160, 96))
        self.inception4d = Mixed(576, (96, 128, 192, 160, 192, 96))
        self.inception4e = Reduction(576, (128, 192, 192, 256))
        self.inception5a = Mixed(1024, (352, 192, 320, 160, 224, 128))
        self.inception5b = Mixed(1024, (352, 192, 320, 192, 224, 128), pool=nn.MaxPool2d)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1024, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool2(self.conv3(self.conv2(self.maxpool1(self.conv1(x)))))
        x = self.inception3c(self.inception3b(self.inception3a(x)))
        x = self.inception4b(self.inception4a(x))
        x = self.inception4e(self.inception4d(self.inception4c(x)))
        x = self.inception5b(self.inception5a(x))
        y: Tensor = self.fc(self.avgpool(x).flatten(1))
        return y


def inception_v2(num_classes: int = 1000, weights: Weights = None) -> InceptionV2:
    """BN-Inception: (N, 3, 224, 224) -> (N, num_classes), 11,194,984 parameters, 2.02 GMACs."""
    return load_weights(InceptionV2(num_classes), weights)
