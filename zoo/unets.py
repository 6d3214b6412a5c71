"""U-Net: down, up, and a bridge at every resolution.

Source: Ronneberger, Fischer, Brox 2015, "U-Net: Convolutional Networks for Biomedical Image
Segmentation", figure 1. Convolutions are not padded, so that every output pixel sees real ones
only: 572x572 pixels in, 388x388 out, and each bridge cuts the centre out of what it carries.
Input sizes are 16k + 12, such as 188, 284, 572.

| level | down          | channels | up            |
|-------|---------------|----------|---------------|
| 1     | 572, 570, 568 |       64 | 392, 390, 388 |
| 2     | 284, 282, 280 |      128 | 200, 198, 196 |
| 3     | 140, 138, 136 |      256 | 104, 102, 100 |
| 4     | 68, 66, 64    |      512 | 56, 54, 52    |
| 5     | 32, 30, 28    |     1024 |               |

Then a 1x1 convolution to the classes; 31,030,658 parameters, 150,428,424,448 MACs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import initialise
from .checkpoint import Weights, load_weights

WIDTHS = (64, 128, 256, 512, 1024)


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions without padding, ReLU after each: (N, C, H, W) -> (N, K, H-4, W-4)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3),
            nn.ReLU(),
        )


class Up(nn.Module):
    """Doubles the resolution and joins the bridge.

    x: (N, 2K, H, W), bridge: (N, K, P, Q) -> (N, K, 2H-4, 2W-4).
    """

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2 * out_channels, out_channels, 2, stride=2)
        self.convs = DoubleConv(2 * out_channels, out_channels)

    def forward(self, x: Tensor, bridge: Tensor) -> Tensor:
        x = self.up(x)
        y: Tensor = self.convs(torch.cat([_centre(bridge, x), x], dim=1))
        return y


def _centre(bridge: Tensor, x: Tensor) -> Tensor:
    """The middle of `bridge` that is as large as `x`."""
    h, w = x.shape[-2:]
    top, left = (bridge.shape[-2] - h) // 2, (bridge.shape[-1] - w) // 2
    return bridge[:, :, top : top + h, left : left + w]


class UNet(nn.Module):
    """x: (N, 1, H, W) -> (N, num_classes, H-184, W-184)."""

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            DoubleConv(c, k) for c, k in zip((1, *WIDTHS[:-1]), WIDTHS, strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(Up(k) for k in reversed(WIDTHS[:-1]))
        self.classifier = nn.Conv2d(WIDTHS[0], num_classes, 1)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        bridges = []
        for convs in self.down[:-1]:
            bridges.append(convs(x))
            x = self.pool(bridges[-1])
        x = self.down[-1](x)
        for up, bridge in zip(self.up, reversed(bridges), strict=True):
            x = up(x, bridge)
        y: Tensor = self.classifier(x)
        return y


def unet(num_classes: int = 2, weights: Weights = None) -> UNet:
    """U-Net: (N, 1, 572, 572) -> (N, num_classes, 388, 388).

    31,030,658 parameters, 150 GMACs.
    """
    return load_weights(UNet(num_classes), weights)
