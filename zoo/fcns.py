"""A fully convolutional network on a dilated ResNet-50, with torchvision's names.

Sources: Long, Shelhamer, Darrell 2015, "Fully Convolutional Networks for Semantic Segmentation";
dilation instead of the last two strides as in Chen et al. 2017, "Rethinking Atrous Convolution for
Semantic Image Segmentation". Any image size; 21 classes are those of PASCAL VOC.

| part (224x224)                              | output     |
|---------------------------------------------|------------|
| ResNet-50 to layer2                         | 512x28x28  |
| layer3, dilation 2                          | 1024x28x28 |
| layer4, dilation 4                          | 2048x28x28 |
| conv 3x3, conv 1x1                          | 21x28x28   |
| bilinear upsampling                         | 21x224x224 |
| 32,957,013 parameters (35,322,218 with the auxiliary head), 26,484,498,432 MACs |
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import initialise
from .checkpoint import Weights, load_weights
from .resnets import Bottleneck, ResNetTrunk


class FCNOutput(NamedTuple):
    """What FCN returns while it trains with its auxiliary head: twice (N, classes, H, W)."""

    logits: Tensor
    aux: Tensor


class DilatedResNet50(ResNetTrunk):
    """ResNet-50 that stays at an eighth of the resolution: (N, 3, H, W) -> (N, 2048, H/8, W/8)."""

    def __init__(self) -> None:
        super().__init__(Bottleneck, (3, 4, 6, 3))
        self.layer3 = _dilated_stage(6, 512, 1024, first_dilation=1, dilation=2)
        self.layer4 = _dilated_stage(3, 1024, 2048, first_dilation=2, dilation=4)


def _dilated_stage(
    depth: int, in_channels: int, out_channels: int, first_dilation: int, dilation: int
) -> nn.Sequential:
    first = Bottleneck(in_channels, out_channels, dilation=first_dilation)
    rest = (Bottleneck(out_channels, out_channels, dilation=dilation) for _ in range(depth - 1))
    return nn.Sequential(first, *rest)


def _head(in_channels: int, num_classes: int) -> nn.Sequential:
    width = in_channels // 4
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(width, num_classes, 1),
    )


class FCN(nn.Module):
    """x: (N, 3, H, W) -> (N, num_classes, H, W); an `FCNOutput` while the auxiliary head trains.

    With `aux_logits` there is an auxiliary head on `layer3`, which runs in training mode only.
    """

    def __init__(self, num_classes: int = 21, aux_logits: bool = False) -> None:
        super().__init__()
        self.backbone = DilatedResNet50()
        self.classifier = _head(2048, num_classes)
        self.aux_classifier = _head(1024, num_classes) if aux_logits else None
        initialise(self)
        self.backbone.tame_branches()

    def forward(self, x: Tensor) -> Tensor | FCNOutput:
        size = [x.shape[-2], x.shape[-1]]
        middle = self.backbone.lower(x)
        coarse = self.classifier(self.backbone.layer4(middle))
        logits = F.interpolate(coarse, size, mode="bilinear", align_corners=False)
        if not self.training or self.aux_classifier is None:
            return logits
        aux = self.aux_classifier(middle)
        return FCNOutput(logits, F.interpolate(aux, size, mode="bilinear", align_corners=False))


def fcn_resnet50(num_classes: int = 21, aux_logits: bool = False, weights: Weights = None) -> FCN:
    """FCN on a dilated ResNet-50: (N, 3, H, W) -> (N, num_classes, H, W), 32,957,013 parameters.

    `aux_logits=True` adds the auxiliary head (35,322,218), which runs in training mode only, and
    which torchvision's published checkpoint contains.
    """
    return load_weights(FCN(num_classes, aux_logits), weights)
