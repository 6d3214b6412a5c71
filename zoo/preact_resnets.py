"""Residual networks with pre-activation, with timm's names (resnetv2_18, resnetv2_50).

Source: He, Zhang, Ren, Sun 2016, "Identity Mappings in Deep Residual Networks", figure 1(b):
normalisation and ReLU stand before each convolution, and nothing stands on the way of the sum.

| model           | blocks per stage | block      | parameters |          MACs |
|-----------------|------------------|------------|------------|---------------|
| preact_resnet18 | 2, 2, 2, 2       | basic      | 11,687,720 | 1,814,073,344 |
| preact_resnet50 | 3, 4, 6, 3       | bottleneck | 25,549,352 | 4,089,184,256 |
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import end_linearly, initialise
from .checkpoint import Weights, load_weights


class PreactBasic(nn.Module):
    """Two 3x3 convolutions: x: (N, C, H, W) -> (N, K, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.downsample = _projection(in_channels, out_channels, stride)
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(active)
        y = self.conv1(active)
        y = self.conv2(F.relu(self.norm2(y)))
        out: Tensor = y + shortcut
        return out

    def last_norm(self) -> nn.BatchNorm2d:
        """The normalisation before the branch's last convolution."""
        return self.norm2


class PreactBottleneck(nn.Module):
    """1x1 reduce, 3x3, 1x1 expand: x: (N, C, H, W) -> (N, K, H/stride, W/stride)."""

    expansion = 4

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        width = out_channels // self.expansion
        self.downsample = _projection(in_channels, out_channels, stride)
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        shortcut = x if self.downsample is None else self.downsample(active)
        y = self.conv1(active)
        y = self.conv2(F.relu(self.norm2(y)))
        y = self.conv3(F.relu(self.norm3(y)))
        out: Tensor = y + shortcut
        return out

    def last_norm(self) -> nn.BatchNorm2d:
        """The normalisation before the branch's last convolution."""
        return self.norm3


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The shortcut's 1x1 convolution; None where the shortcut is the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(OrderedDict[str, nn.Module](conv=conv))


class PreactResNet(nn.Module):
    """Four stages of blocks, then one normalisation: x: (N, 3, 224, 224) -> (N, num_classes)."""

    def __init__(
        self,
        block: type[PreactBasic] | type[PreactBottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            OrderedDict[str, nn.Module](
                conv=nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
                pool=nn.MaxPool2d(3, stride=2, padding=1),
            )
        )
        stages, in_channels = [], 64
        for i, depth in enumerate(depths):
            channels = block.expansion * 64 * 2**i
            blocks = [block(in_channels, channels, stride=1 if i == 0 else 2)]
            blocks += [block(channels, channels) for _ in range(depth - 1)]
            stages.append(nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks))))
            in_channels = channels
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(in_channels)
        self.head = nn.Sequential(
            OrderedDict[str, nn.Module](
                global_pool=nn.AdaptiveAvgPool2d(1),
                fc=nn.Conv2d(in_channels, num_classes, 1),
                flatten=nn.Flatten(),
            )
        )
        initialise(self)
        ends = [m.last_norm() for m in self.modules() if isinstance(m, block)]
        end_linearly(ends, share=1 / len(ends))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.relu(self.norm(self.stages(self.stem(x)))))
        return y


def preact_resnet18(num_classes: int = 1000, weights: Weights = None) -> PreactResNet:
    """ResNet-18 with pre-activation: (N, 3, 224, 224) -> (N, num_classes).

    11,687,720 parameters.
    """
    return load_weights(PreactResNet(PreactBasic, (2, 2, 2, 2), num_classes), weights)


def preact_resnet50(num_classes: int = 1000, weights: Weights = None) -> PreactResNet:
    """ResNet-50 with pre-activation: (N, 3, 224, 224) -> (N, num_classes).

    25,549,352 parameters.
    """
    return load_weights(PreactResNet(PreactBottleneck, (3, 4, 6, 3), num_classes), weights)
