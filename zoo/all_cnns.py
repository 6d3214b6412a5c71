"""The All-Convolutional Net: strides instead of pooling, convolutions instead of linear layers.

Source: Springenberg, Dosovitskiy, Brox, Riedmiller 2015, "Striving for Simplicity: The All
Convolutional Net", model All-CNN-C of table 2. Whitened 32x32 images.

| layer           | output   | parameters |       MACs |
|-----------------|----------|------------|------------|
| conv 3x3, 96    | 96x32x32 |      2,688 |  2,654,208 |
| conv 3x3, 96    | 96x32x32 |     83,040 | 84,934,656 |
| conv 3x3/2, 96  | 96x16x16 |     83,040 | 21,233,664 |
| conv 3x3, 192   | 192x16x16|    166,080 | 42,467,328 |
| conv 3x3, 192   | 192x16x16|    331,968 | 84,934,656 |
| conv 3x3/2, 192 | 192x8x8  |    331,968 | 21,233,664 |
| conv 3x3, 192   | 192x6x6  |    331,968 | 11,943,936 |
| conv 1x1, 192   | 192x6x6  |     37,056 |  1,327,104 |
| conv 1x1, 10    | 10x6x6   |      1,930 |     69,120 |
| global average  | 10       |            |            |
| all             |          |  1,369,738 |270,798,336 |
"""

from __future__ import annotations

from torch import nn

from .blocks import initialise
from .checkpoint import Weights, load_weights


def all_cnn_c(num_classes: int = 10, weights: Weights = None) -> nn.Sequential:
    """All-CNN-C: (N, 3, 32, 32) -> (N, num_classes), 1,369,738 parameters (the paper: 1.4 M)."""
    model = nn.Sequential(
        nn.Dropout(0.2),
        *_conv(3, 96),
        *_conv(96, 96),
        *_conv(96, 96, stride=2),
        nn.Dropout(0.5),
        *_conv(96, 192),
        *_conv(192, 192),
        *_conv(192, 192, stride=2),
        nn.Dropout(0.5),
        *_conv(192, 192, padding=0),
        *_conv(192, 192, kernel_size=1, padding=0),
        *_conv(192, num_classes, kernel_size=1, padding=0),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    initialise(model)
    return load_weights(model, weights)


def _conv(
    in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, padding: int = 1
) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding), nn.ReLU()
