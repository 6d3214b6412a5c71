"""GoogLeNet (Inception v1): as the paper has it, and in torchvision's form.

Source: Szegedy et al. 2015, "Going Deeper with Convolutions", table 1.

The paper's net has biases and local response normalisation; torchvision's has batch normalisation
instead, 3x3 filters where the paper has 5x5, and a 2x2 window in the last max-pool.

| layer                 | output     | filters: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool proj |
|-----------------------|------------|-----------------------------------------------------------|
| conv 7x7/2, pool 3x3/2| 64x56x56   |                                                           |
| conv 1x1, 3x3, pool   | 192x28x28  | reduce 64, 192                                            |
| 3a                    | 256x28x28  | 64, 96, 128, 16, 32, 32                                   |
| 3b, pool              | 480x14x14  | 128, 128, 192, 32, 96, 64                                 |
| 4a                    | 512x14x14  | 192, 96, 208, 16, 48, 64                                  |
| 4b                    | 512x14x14  | 160, 112, 224, 24, 64, 64                                 |
| 4c                    | 512x14x14  | 128, 128, 256, 24, 64, 64                                 |
| 4d                    | 528x14x14  | 112, 144, 288, 32, 64, 64                                 |
| 4e, pool              | 832x7x7    | 256, 160, 320, 32, 128, 128                               |
| 5a                    | 832x7x7    | 256, 160, 320, 32, 128, 128                               |
| 5b                    | 1024x7x7   | 384, 192, 384, 48, 128, 128                               |
| average pool, linear  | 1000       |                                                           |

| model            | parameters | with auxiliary heads |          MACs |
|------------------|------------|----------------------|---------------|
| googlenet        |  6,624,904 |           13,004,888 | 1,498,376,192 |
| googlenet_paper  |  6,998,552 |           13,378,280 | 1,582,671,872 |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import BasicConv2d, initialise, local_response_norm
from .checkpoint import Weights, load_weights


class GoogLeNetOutput(NamedTuple):
    """What GoogLeNet returns while it trains with its auxiliary heads: three times (N, classes)."""

    logits: Tensor
    aux2: Tensor
    aux1: Tensor


class BiasedConv2d(nn.Module):
    """Convolution with bias, ReLU: x: (N, C, H, W) -> (N, K, P, Q)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


@dataclass(frozen=True)
class Recipe:
    """Where the paper's GoogLeNet and torchvision's differ."""

    conv: type[BasicConv2d] | type[BiasedConv2d]
    norm: Callable[[], nn.Module]
    large_filter: int  # of the third branch
    last_pool: int  # window of the max-pool before module 5a
    dropout: float  # before the last layer
    aux_pool: Callable[[], nn.Module]  # 14x14 -> 4x4, before an auxiliary head


TORCHVISION = Recipe(
    conv=BasicConv2d,
    norm=nn.Identity,
    large_filter=3,
    last_pool=2,
    dropout=0.2,
    aux_pool=lambda: nn.AdaptiveAvgPool2d(4),
)
PAPER = Recipe(
    conv=BiasedConv2d,
    norm=local_response_norm,
    large_filter=5,
    last_pool=3,
    dropout=0.4,
    aux_pool=lambda: nn.AvgPool2d(5, stride=3),
)


class Inception(nn.Module):
    """Four branches of different reach, concatenated: x: (N, C, H, W) -> (N, sum, H, W).

    `filters` as in the paper's table: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection.
    """

    def __init__(
        self, in_channels: int, filters: tuple[int, int, int, int, int, int], recipe: Recipe
    ) -> None:
        super().__init__()
        single, reduce3, out3, reduce5, out5, projection = filters
        conv, large = recipe.conv, recipe.large_filter
        self.branch1 = conv(in_channels, single, 1)
        self.branch2 = nn.Sequential(
            conv(in_channels, reduce3, 1), conv(reduce3, out3, 3, padding=1)
        )
        self.branch3 = nn.Sequential(
            conv(in_channels, reduce5, 1), conv(reduce5, out5, large, padding=large // 2)
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1), conv(in_channels, projection, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(
            [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], dim=1
        )


class AuxiliaryHead(nn.Module):
    """The classifier half-way up that trains the lower half: x: (N, C, 14, 14) -> (N, classes)."""

    def __init__(self, in_channels: int, num_classes: int, recipe: Recipe) -> None:
        super().__init__()
        self.pool = recipe.aux_pool()
        self.conv = recipe.conv(in_channels, 128, 1)
        self.fc1 = nn.Linear(128 * 4 * 4, 1024)
        self.dropout = nn.Dropout(0.7)
        self.fc2 = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.pool(x)).flatten(1)
        y: Tensor = self.fc2(self.dropout(F.relu(self.fc1(x))))
        return y


class GoogLeNet(nn.Module):
    """x: (N, 3, 224, 224) -> (N, num_classes); a `GoogLeNetOutput` while the auxiliary heads train.

    With `aux_logits` there are two auxiliary heads, which run in training mode only.
    """

    def __init__(self, recipe: Recipe, num_classes: int = 1000, aux_logits: bool = False) -> None:
        super().__init__()
        conv = recipe.conv
        self.conv1 = conv(3, 64, 7, stride=2, padding=3)
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.norm1 = recipe.norm()
        self.conv2 = conv(64, 64, 1)
        self.conv3 = conv(64, 192, 3, padding=1)
        self.norm2 = recipe.norm()
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception3a = Inception(192, (64, 96, 128, 16, 32, 32), recipe)
        self.inception3b = Inception(256, (128, 128, 192, 32, 96, 64), recipe)
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception4a = Inception(480, (192, 96, 208, 16, 48, 64), recipe)
        self.inception4b = Inception(512, (160, 112, 224, 24, 64, 64), recipe)
        self.inception4c = Inception(512, (128, 128, 256, 24, 64, 64), recipe)
        self.inception4d = Inception(512, (112, 144, 288, 32, 64, 64), recipe)
        self.inception4e = Inception(528, (256, 160, 320, 32, 128, 128), recipe)
        self.maxpool4 = nn.MaxPool2d(recipe.last_pool, stride=2, ceil_mode=True)
        self.inception5a = Inception(832, (256, 160, 320, 32, 128, 128), recipe)
        self.inception5b = Inception(832, (384, 192, 384, 48, 128, 128), recipe)
        self.aux1 = AuxiliaryHead(512, num_classes, recipe) if aux_logits else None
        self.aux2 = AuxiliaryHead(528, num_classes, recipe) if aux_logits else None
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(recipe.dropout)
        self.fc = nn.Linear(1024, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutput:
        x = self.norm1(self.maxpool1(self.conv1(x)))
        x = self.maxpool2(self.norm2(self.conv3(self.conv2(x))))
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        lower = self.inception4a(x)
        middle = self.inception4d(self.inception4c(self.inception4b(lower)))
        x = self.maxpool4(self.inception4e(middle))
        x = self.avgpool(self.inception5b(self.inception5a(x)))
        logits: Tensor = self.fc(self.dropout(x.flatten(1)))
        if not self.training or self.aux1 is None or self.aux2 is None:
            return logits
        return GoogLeNetOutput(logits, self.aux2(middle), self.aux1(lower))


def googlenet(
    num_classes: int = 1000, aux_logits: bool = False, weights: Weights = None
) -> GoogLeNet:
    """GoogLeNet with batch normalisation, as torchvision has it: (N, 3, 224, 224) -> logits.

    6,624,904 parameters. `aux_logits=True` adds the two auxiliary heads (13,004,888), which run
    in training mode only, and which torchvision's published checkpoint contains. That checkpoint
    was trained elsewhere and expects pixels scaled to [-1, 1].
    """
    return load_weights(GoogLeNet(TORCHVISION, num_classes, aux_logits), weights)


def googlenet_paper(
    num_classes: int = 1000, aux_logits: bool = False, weights: Weights = None
) -> GoogLeNet:
    """GoogLeNet as published, biases and no batch normalisation: (N, 3, 224, 224) -> logits.

    6,998,552 parameters; `aux_logits=True` adds the two auxiliary heads, used in training only.
    """
    return load_weights(GoogLeNet(PAPER, num_classes, aux_logits), weights)
