"""RepVGG: VGG's plain stack of 3x3 convolutions, trained with parallel branches.

Source: Ding, Zhang, Ma, Han, Ding, Sun 2021, "RepVGG: Making VGG-style ConvNets Great Again",
table 2 (A0). Parameter names are those of the published code.

| model             | parameters |          MACs |
|-------------------|------------|---------------|
| repvgg_a0         |  9,108,968 | 1,512,581,120 |
| repvgg_a0_deploy  |  8,309,384 | 1,361,451,008 |

In training every layer is the sum of a 3x3 and a 1x1 convolution and, where shapes allow, of its
input, each with its normalisation; for use they are added up to one 3x3 convolution. `repvgg_a0`
has the branches, `repvgg_a0_deploy` the sums; the compiler makes the second of the first.
"""

from __future__ import annotations

import math
from typing import cast

from torch import Tensor, nn

from .blocks import RELU_GAIN, initialise
from .checkpoint import Weights, load_weights

# Per stage: channels and layers. The first layer of a stage halves the image.
A0_STAGES = ((48, 1), (48, 2), (96, 4), (192, 14), (1280, 1))


def _normalised(in_channels: int, channels: int, size: int, stride: int) -> nn.Sequential:
    """A convolution and its normalisation, under the names `conv` and `bn`."""
    layers = nn.Sequential()
    conv = nn.Conv2d(in_channels, channels, size, stride, padding=size // 2, bias=False)
    layers.add_module("conv", conv)
    layers.add_module("bn", nn.BatchNorm2d(channels))
    return layers


class RepVGGLayer(nn.Module):
    """ReLU of three branches, added up: x: (N, C, H, W) -> (N, K, P, Q)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        has_identity = in_channels == channels and stride == 1
        self.rbr_identity = nn.BatchNorm2d(channels) if has_identity else None
        self.rbr_dense = _normalised(in_channels, channels, 3, stride)
        self.rbr_1x1 = _normalised(in_channels, channels, 1, stride)
        self.nonlinearity = nn.ReLU()

    def share_the_scale(self) -> None:
        """Starts the sum of the branches at the mean square of one convolution."""
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        convolutions = 2
        power = RELU_GAIN**2 * convolutions + (len(norms) - convolutions)
        for norm in norms:
            nn.init.constant_(norm.weight, RELU_GAIN / math.sqrt(power))

    def forward(self, x: Tensor) -> Tensor:
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.rbr_identity is not None:
            y = y + self.rbr_identity(x)
        return cast(Tensor, self.nonlinearity(y))


class DeployedLayer(nn.Module):
    """ReLU of one convolution: x: (N, C, H, W) -> (N, K, P, Q)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.rbr_reparam = nn.Conv2d(in_channels, channels, 3, stride, padding=1)
        self.nonlinearity = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.nonlinearity(self.rbr_reparam(x)))


class RepVGG(nn.Module):
    """x: (N, 3, 224, 224) -> (N, num_classes); layer: how each of the 22 layers is made."""

    def __init__(
        self,
        stages: tuple[tuple[int, int], ...],
        num_classes: int = 1000,
        layer: type[RepVGGLayer] | type[DeployedLayer] = RepVGGLayer,
    ) -> None:
        super().__init__()
        in_channels = 3
        for at, (channels, count) in enumerate(stages):
            layers = []
            for stride in (2, *[1] * (count - 1)):
                layers.append(layer(in_channels, channels, stride))
                in_channels = channels
            # Published names: the first stage is a layer, the others are sequences of layers.
            self.add_module(f"stage{at}", nn.Sequential(*layers) if at else layers[0])
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(in_channels, num_classes)
        initialise(self)
        for module in self.modules():
            if isinstance(module, RepVGGLayer):
                module.share_the_scale()

    def forward(self, x: Tensor) -> Tensor:
        for name, stage in self.named_children():
            if name.startswith("stage"):
                x = stage(x)
        return cast(Tensor, self.linear(self.gap(x).flatten(1)))


def repvgg_a0(num_classes: int = 1000, weights: Weights = None) -> RepVGG:
    """RepVGG-A0 as it is trained, with three branches: 9,108,968 parameters."""
    return load_weights(RepVGG(A0_STAGES, num_classes), weights)


def repvgg_a0_deploy(num_classes: int = 1000, weights: Weights = None) -> RepVGG:
    """RepVGG-A0 as it is used, one convolution per layer: 8,309,384 parameters."""
    return load_weights(RepVGG(A0_STAGES, num_classes, DeployedLayer), weights)
