"""SqueezeNet 1.1: AlexNet's accuracy with a fiftieth of its parameters, with torchvision's names.

Source: Iandola et al. 2016, "SqueezeNet", in its authors' later version 1.1. 224x224 images.

| layer                      | output    | squeeze, expand 1x1, expand 3x3 |
|----------------------------|-----------|---------------------------------|
| conv 3x3/2, pool 3x3/2     | 64x55x55  |                                 |
| fire, fire, pool 3x3/2     | 128x27x27 | 16, 64, 64                      |
| fire, fire, pool 3x3/2     | 256x13x13 | 32, 128, 128                    |
| fire, fire                 | 384x13x13 | 48, 192, 192                    |
| fire, fire                 | 512x13x13 | 64, 256, 256                    |
| conv 1x1, average pool     | 1000      |                                 |
| all: 1,235,496 parameters, 349,151,936 MACs                                    |
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import initialise
from .checkpoint import Weights, load_weights


class Fire(nn.Module):
    """1x1 squeeze, then 1x1 beside 3x3: x: (N, C, H, W) -> (N, 2*expanded, H, W)."""

    def __init__(self, in_channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeezed, 1)
        self.squeeze_activation = nn.ReLU()
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand1x1_activation = nn.ReLU()
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)
        self.expand3x3_activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        single = self.expand1x1_activation(self.expand1x1(x))
        triple = self.expand3x3_activation(self.expand3x3(x))
        return torch.cat([single, triple], dim=1)


class SqueezeNet(nn.Module):
    """x: (N, 3, 224, 224) -> (N, num_classes)."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            Fire(64, 16, 64),
            Fire(128, 16, 64),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            Fire(128, 32, 128),
            Fire(256, 32, 128),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            Fire(256, 48, 192),
            Fire(384, 48, 192),
            Fire(384, 64, 256),
            Fire(512, 64, 256),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Conv2d(512, num_classes, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.features(x))
        return y.flatten(1)


def squeezenet1_1(num_classes: int = 1000, weights: Weights = None) -> SqueezeNet:
    """SqueezeNet 1.1: (N, 3, 224, 224) -> (N, num_classes), 1,235,496 parameters, 0.349 GMACs."""
    return load_weights(SqueezeNet(num_classes), weights)
