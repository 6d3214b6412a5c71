"""Residual networks with torchvision's names: ResNet, ResNeXt, Wide ResNet.

Sources: He, Zhang, Ren, Sun 2016, "Deep Residual Learning for Image Recognition", table 1; Xie,
Girshick, Dollár, Tu, He 2017, "Aggregated Residual Transformations for Deep Neural Networks";
Zagoruyko, Komodakis 2016, "Wide Residual Networks".

On 224x224 images: conv 7x7/2, 64 -> 112x112; max-pool 3x3/2 -> 56x56; four stages at 56, 28, 14
and 7 pixels; global average pooling; a linear layer. As in torchvision (and not in the paper) a
bottleneck that halves the resolution does so in its 3x3 convolution, at the price of a few more
MACs: the paper's are 1.8, 3.6, 3.8, 7.6 and 11.3 billion.

| model           | blocks per stage | block      | parameters |           MACs |
|-----------------|------------------|------------|------------|----------------|
| resnet18        | 2, 2, 2, 2       | basic      | 11,689,512 |  1,814,073,344 |
| resnet34        | 3, 4, 6, 3       | basic      | 21,797,672 |  3,663,761,408 |
| resnet50        | 3, 4, 6, 3       | bottleneck | 25,557,032 |  4,089,184,256 |
| resnet101       | 3, 4, 23, 3      | bottleneck | 44,549,160 |  7,801,405,440 |
| resnet152       | 3, 8, 36, 3      | bottleneck | 60,192,808 | 11,513,626,624 |
| resnext50_32x4d | 3, 4, 6, 3       | 32 groups  | 25,028,904 |  4,230,479,872 |
| wide_resnet50_2 | 3, 4, 6, 3       | 2x as wide | 68,883,240 | 11,398,021,120 |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from .blocks import end_linearly, initialise
from .checkpoint import Weights, load_weights


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: x: (N, C, H, W) -> (N, K, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = _projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(y + shortcut)
        return out

    def last_norm(self) -> nn.BatchNorm2d:
        """The normalisation that ends the residual branch."""
        return self.bn2


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3, 1x1 expand and a shortcut.

    x: (N, C, H, W) -> (N, K, H/stride, W/stride). The 3x3 convolution has K/4 channels, or
    `width_factor` times as many.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        width_factor: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        width = out_channels // self.expansion * width_factor
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(
            width, width, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False
        )
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.downsample = _projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(y + shortcut)
        return out

    def last_norm(self) -> nn.BatchNorm2d:
        """The normalisation that ends the residual branch."""
        return self.bn3


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The shortcut's 1x1 convolution; None where the shortcut is the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class ResNetTrunk(nn.Module):
    """A residual net's convolutions: x: (N, 3, H, W) -> (N, expansion * 512, H/32, W/32).

    `options` (width_factor, groups) go to the blocks.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        **options: int,
    ) -> None:
        super().__init__()
        make = partial(block, **options)
        k1, k2, k3, k4 = (block.expansion * channels for channels in (64, 128, 256, 512))
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(make, depths[0], 64, k1, stride=1)
        self.layer2 = _stage(make, depths[1], k1, k2, stride=2)
        self.layer3 = _stage(make, depths[2], k2, k3, stride=2)
        self.layer4 = _stage(make, depths[3], k3, k4, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer4(self.lower(x))
        return y

    def lower(self, x: Tensor) -> Tensor:
        """The output of `layer3`, which a segmentation net's auxiliary head reads."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        y: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return y

    def tame_branches(self) -> None:
        """Starts the L residual branches at 1/L of their size (see `end_linearly`)."""
        ends = [m.last_norm() for m in self.modules() if isinstance(m, BasicBlock | Bottleneck)]
        end_linearly(ends, share=1 / len(ends))


def _stage(
    block: Callable[..., BasicBlock | Bottleneck],
    depth: int,
    in_channels: int,
    out_channels: int,
    stride: int,
) -> nn.Sequential:
    first = block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(out_channels, out_channels) for _ in range(depth - 1)))


class ResNet(ResNetTrunk):
    """A residual net that classifies images: x: (N, 3, 224, 224) -> (N, num_classes)."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, int, int, int],
        num_classes: int = 1000,
        **options: int,
    ) -> None:
        super().__init__(block, depths, **options)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(block.expansion * 512, num_classes)
        initialise(self)
        self.tame_branches()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.avgpool(super().forward(x)).flatten(1))
        return y


def resnet18(num_classes: int = 1000, weights: Weights = None) -> ResNet:
    """ResNet-18: (N, 3, 224, 224) -> (N, num_classes), 11,689,512 parameters, 1.81 GMACs."""
    return load_weights(ResNet(BasicBlock, (2, 2, 2, 2), num_classes), weights)


def resnet34(num_classes: int = 1000, weights: Weights = None) -> ResNet:
    """ResNet-34: (N, 3, 224, 224) -> (N, num_classes), 21,797,672 parameters, 3.66 GMACs."""
    return load_weights(ResNet(BasicBlock, (3, 4, 6, 3), num_classes), weights)


def resnet50(num_classes: int = 1000, weights: Weights = None) -> ResNet:
    """ResNet-50: (N, 3, 224, 224) -> (N, num_classes), 25,557,032 parameters, 4.09 GMACs."""
    return load_weights(ResNet(Bottleneck, (3, 4, 6, 3), num_classes), weights)


def resnet101(num_classes: int = 1000, weights: Weights = None) -> ResNet:
    """ResNet-101: (N, 3, 224, 224) -> (N, num_classes), 44,549,160 parameters, 7.80 GMACs."""
    return load_weights(ResNet(Bottleneck, (3, 4, 23, 3), num_classes), weights)


def resnet152(num_classes: int = 1000, weights: Weights = None) -> ResNet:
    """ResNet-152: (N, 3, 224, 224) -> (N, num_classes), 60,192,808 parameters, 11.5 GMACs."""
    return load_weights(ResNet(Bottleneck, (3, 8, 36, 3), num_classes), weights)


def resnext50_32x4d(num_classes: int = 1000, weights: Weights = None) -> ResNet:
    """ResNeXt-50: each 3x3 in 32 groups of 4 channels and more: 25,028,904 parameters."""
    model = ResNet(Bottleneck, (3, 4, 6, 3), num_classes, width_factor=2, groups=32)
    return load_weights(model, weights)


def wide_resnet50_2(num_classes: int = 1000, weights: Weights = None) -> ResNet:
    """Wide ResNet-50-2: ResNet-50, its 3x3 layers twice as wide: 68,883,240 parameters."""
    return load_weights(ResNet(Bottleneck, (3, 4, 6, 3), num_classes, width_factor=2), weights)
