"""The plain and residual networks with which ResNet's paper argues on CIFAR-10.

Source: He, Zhang, Ren, Sun 2016, "Deep Residual Learning for Image Recognition", section 4.2:
6n + 2 layers, 3x3 convolutions of 16, 32 and 64 filters on 32, 16 and 8 pixels, 2n of each. The
shortcuts have no parameters ("option A"): where channels double, pixels are skipped and zeros fill
the new channels; so a plain net and its residual pair have the same parameters.

| model                    | n  | parameters |        MACs |
|--------------------------|----|------------|-------------|
| plain20, cifar_resnet20  | 3  |    269,722 |  40,551,040 |
| plain56, cifar_resnet56  | 9  |    853,018 | 125,485,696 |
| cifar_resnet110          | 18 |  1,727,962 | 252,887,680 |
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import end_linearly, initialise
from .checkpoint import Weights, load_weights


class CifarBlock(nn.Module):
    """Two 3x3 convolutions, with a shortcut if `residual`: (N, C, H, W) -> (N, K, P, Q)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, residual: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.residual = residual
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.residual:
            y = y + self._shortcut(x)
        out: Tensor = self.relu(y)
        return out

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


class CifarNet(nn.Module):
    """6n + 2 layers: x: (N, 3, 32, 32) -> (N, num_classes)."""

    def __init__(self, n: int, residual: bool, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(n, 16, 16, 1, residual)
        self.layer2 = _stage(n, 16, 32, 2, residual)
        self.layer3 = _stage(n, 32, 64, 2, residual)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        initialise(self)
        if residual:
            blocks = [m for m in self.modules() if isinstance(m, CifarBlock)]
            end_linearly([block.bn2 for block in blocks], share=1 / len(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        y: Tensor = self.fc(self.avgpool(x).flatten(1))
        return y


def _stage(
    n: int, in_channels: int, out_channels: int, stride: int, residual: bool
) -> nn.Sequential:
    first = CifarBlock(in_channels, out_channels, stride, residual)
    return nn.Sequential(
        first, *(CifarBlock(out_channels, out_channels, 1, residual) for _ in range(n - 1))
    )


def plain20(num_classes: int = 10, weights: Weights = None) -> CifarNet:
    """Plain-20: (N, 3, 32, 32) -> (N, num_classes), 269,722 parameters."""
    return load_weights(CifarNet(3, False, num_classes), weights)


def plain56(num_classes: int = 10, weights: Weights = None) -> CifarNet:
    """Plain-56, worse than plain-20: (N, 3, 32, 32) -> (N, num_classes), 853,018 parameters."""
    return load_weights(CifarNet(9, False, num_classes), weights)


def cifar_resnet20(num_classes: int = 10, weights: Weights = None) -> CifarNet:
    """ResNet-20: (N, 3, 32, 32) -> (N, num_classes), 269,722 parameters (the paper: 0.27 M)."""
    return load_weights(CifarNet(3, True, num_classes), weights)


def cifar_resnet56(num_classes: int = 10, weights: Weights = None) -> CifarNet:
    """ResNet-56: (N, 3, 32, 32) -> (N, num_classes), 853,018 parameters (the paper: 0.85 M)."""
    return load_weights(CifarNet(9, True, num_classes), weights)


def cifar_resnet110(num_classes: int = 10, weights: Weights = None) -> CifarNet:
    """ResNet-110: (N, 3, 32, 32) -> (N, num_classes), 1,727,962 parameters (the paper: 1.7 M)."""
    return load_weights(CifarNet(18, True, num_classes), weights)
