"""Inception v4 and Inception-ResNet v2, with timm's names.

Source: Szegedy, Ioffe, Vanhoucke, Alemi 2017, "Inception-v4, Inception-ResNet and the Impact of
Residual Connections on Learning", figures 3 to 9 (v4) and 15 to 19 (ResNet); 299x299 images.

| inception_v4          | output     | inception_resnet_v2     | output     |
|-----------------------|------------|-------------------------|------------|
| stem                  | 384x35x35  | stem, mixed 5b          | 320x35x35  |
| 4 x A                 | 384x35x35  | 10 x Block35            | 320x35x35  |
| reduction A           | 1024x17x17 | reduction A             | 1088x17x17 |
| 7 x B                 | 1024x17x17 | 20 x Block17            | 1088x17x17 |
| reduction B           | 1536x8x8   | reduction B             | 2080x8x8   |
| 3 x C                 | 1536x8x8   | 10 x Block8, conv 1x1   | 1536x8x8   |
| average pool, linear  | 1000       | average pool, linear    | 1000       |

| model               | parameters |           MACs |
|---------------------|------------|----------------|
| inception_v4        | 42,679,816 | 12,253,974,624 |
| inception_resnet_v2 | 55,843,464 | 13,155,794,016 |
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import BasicConv2d, initialise, same_conv
from .checkpoint import Weights, load_weights

ROW3, COLUMN3, ROW7, COLUMN7 = (1, 3), (3, 1), (1, 7), (7, 1)


class Branches(nn.Module):
    """Modules `branch0`, `branch1`, ... side by side: x: (N, C, H, W) -> (N, sum, P, Q)."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        for i, branch in enumerate(branches):
            self.add_module(f"branch{i}", branch)

    def forward(self, x: Tensor) -> Tensor:
        branches = [m for name, m in self.named_children() if name.startswith("branch")]
        return torch.cat([branch(x) for branch in branches], dim=1)


class ScaledResidual(Branches):
    """Branches, a 1x1 convolution back to C, scaled and added: x: (N, C, H, W) -> (N, C, H, W).

    `width` is the number of channels that the branches give together.
    """

    def __init__(
        self, channels: int, width: int, scale: float, *branches: nn.Module, relu: bool = True
    ) -> None:
        super().__init__(*branches)
        self.conv2d = nn.Conv2d(width, channels, 1)
        self.scale = scale
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(x + self.scale * self.conv2d(super().forward(x)))
        return y


class ConvBesidePool(nn.Module):
    """A 3x3/2 convolution and a 3x3/2 max-pool, concatenated; the pool first when `pool_first`."""

    def __init__(self, in_channels: int, out_channels: int, pool_first: bool) -> None:
        super().__init__()
        self.conv = BasicConv2d(in_channels, out_channels, 3, stride=2)
        self.pool = nn.MaxPool2d(3, stride=2)
        self.pool_first = pool_first

    def forward(self, x: Tensor) -> Tensor:
        convolved, pooled = self.conv(x), self.pool(x)
        return torch.cat([pooled, convolved] if self.pool_first else [convolved, pooled], dim=1)


def _average_and(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 3x3 average, the border excluded, and a 1x1 convolution."""
    return nn.Sequential(
        nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
        BasicConv2d(in_channels, out_channels, 1),
    )


def _stem_tail() -> Branches:
    return Branches(
        nn.Sequential(BasicConv2d(160, 64, 1), BasicConv2d(64, 96, 3)),
        nn.Sequential(
            BasicConv2d(160, 64, 1),
            same_conv(64, 64, ROW7),
            same_conv(64, 64, COLUMN7),
            BasicConv2d(64, 96, 3),
        ),
    )


def _inception_a() -> Branches:
    return Branches(
        BasicConv2d(384, 96, 1),
        nn.Sequential(BasicConv2d(384, 64, 1), same_conv(64, 96, 3)),
        nn.Sequential(BasicConv2d(384, 64, 1), same_conv(64, 96, 3), same_conv(96, 96, 3)),
        _average_and(384, 96),
    )


def _reduction_a(in_channels: int, widths: tuple[int, int, int]) -> Branches:
    k, m, n = widths
    return Branches(
        BasicConv2d(in_channels, 384, 3, stride=2),
        nn.Sequential(
            BasicConv2d(in_channels, k, 1), same_conv(k, m, 3), BasicConv2d(m, n, 3, stride=2)
        ),
        nn.MaxPool2d(3, stride=2),
    )


def _inception_b() -> Branches:
    return Branches(
        BasicConv2d(1024, 384, 1),
        nn.Sequential(
            BasicConv2d(1024, 192, 1), same_conv(192, 224, ROW7), same_conv(224, 256, COLUMN7)
        ),
        nn.Sequential(
            BasicConv2d(1024, 192, 1),
            same_conv(192, 192, COLUMN7),
            same_conv(192, 224, ROW7),
            same_conv(224, 224, COLUMN7),
            same_conv(224, 256, ROW7),
        ),
        _average_and(1024, 128),
    )


def _reduction_b() -> Branches:
    return Branches(
        nn.Sequential(BasicConv2d(1024, 192, 1), BasicConv2d(192, 192, 3, stride=2)),
        nn.Sequential(
            BasicConv2d(1024, 256, 1),
            same_conv(256, 256, ROW7),
            same_conv(256, 320, COLUMN7),
            BasicConv2d(320, 320, 3, stride=2),
        ),
        nn.MaxPool2d(3, stride=2),
    )


class InceptionC(nn.Module):
    """1x1; 3x3; 3x3 twice; pool; the last 3x3 a row beside a column: (N, 1536, H, W) -> same."""

    def __init__(self) -> None:
        super().__init__()
        self.branch0 = BasicConv2d(1536, 256, 1)
        self.branch1_0 = BasicConv2d(1536, 384, 1)
        self.branch1_1a = same_conv(384, 256, ROW3)
        self.branch1_1b = same_conv(384, 256, COLUMN3)
        self.branch2_0 = BasicConv2d(1536, 384, 1)
        self.branch2_1 = same_conv(384, 448, COLUMN3)
        self.branch2_2 = same_conv(448, 512, ROW3)
        self.branch2_3a = same_conv(512, 256, ROW3)
        self.branch2_3b = same_conv(512, 256, COLUMN3)
        self.branch3 = _average_and(1536, 256)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch1_0(x)
        twice = self.branch2_2(self.branch2_1(self.branch2_0(x)))
        branches = [
            self.branch0(x),
            self.branch1_1a(once),
            self.branch1_1b(once),
            self.branch2_3a(twice),
            self.branch2_3b(twice),
            self.branch3(x),
        ]
        return torch.cat(branches, dim=1)


class InceptionV4(nn.Module):
    """x: (N, 3, 299, 299) -> (N, num_classes)."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.features = nn.Sequential(
            BasicConv2d(3, 32, 3, stride=2),
            BasicConv2d(32, 32, 3),
            same_conv(32, 64, 3),
            ConvBesidePool(64, 96, pool_first=True),
            _stem_tail(),
            ConvBesidePool(192, 192, pool_first=False),
            *(_inception_a() for _ in range(4)),
            _reduction_a(384, (192, 224, 256)),
            *(_inception_b() for _ in range(7)),
            _reduction_b(),
            *(InceptionC() for _ in range(3)),
        )
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.last_linear = nn.Linear(1536, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.global_pool(self.features(x)).flatten(1)
        y: Tensor = self.last_linear(self.dropout(x))
        return y


def _mixed_5b() -> Branches:
    return Branches(
        BasicConv2d(192, 96, 1),
        nn.Sequential(BasicConv2d(192, 48, 1), same_conv(48, 64, 5)),
        nn.Sequential(BasicConv2d(192, 64, 1), same_conv(64, 96, 3), same_conv(96, 96, 3)),
        _average_and(192, 64),
    )


def _block35() -> ScaledResidual:
    return ScaledResidual(
        320,
        128,
        0.17,
        BasicConv2d(320, 32, 1),
        nn.Sequential(BasicConv2d(320, 32, 1), same_conv(32, 32, 3)),
        nn.Sequential(BasicConv2d(320, 32, 1), same_conv(32, 48, 3), same_conv(48, 64, 3)),
    )


def _block17() -> ScaledResidual:
    return ScaledResidual(
        1088,
        384,
        0.10,
        BasicConv2d(1088, 192, 1),
        nn.Sequential(
            BasicConv2d(1088, 128, 1), same_conv(128, 160, ROW7), same_conv(160, 192, COLUMN7)
        ),
    )


def _mixed_7a() -> Branches:
    return Branches(
        nn.Sequential(BasicConv2d(1088, 256, 1), BasicConv2d(256, 384, 3, stride=2)),
        nn.Sequential(BasicConv2d(1088, 256, 1), BasicConv2d(256, 288, 3, stride=2)),
        nn.Sequential(
            BasicConv2d(1088, 256, 1), same_conv(256, 288, 3), BasicConv2d(288, 320, 3, stride=2)
        ),
        nn.MaxPool2d(3, stride=2),
    )


def _block8(scale: float = 0.20, relu: bool = True) -> ScaledResidual:
    return ScaledResidual(
        2080,
        448,
        scale,
        BasicConv2d(2080, 192, 1),
        nn.Sequential(
            BasicConv2d(2080, 192, 1), same_conv(192, 224, ROW3), same_conv(224, 256, COLUMN3)
        ),
        relu=relu,
    )


class InceptionResNetV2(nn.Module):
    """x: (N, 3, 299, 299) -> (N, num_classes)."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv2d_1a = BasicConv2d(3, 32, 3, stride=2)
        self.conv2d_2a = BasicConv2d(32, 32, 3)
        self.conv2d_2b = same_conv(32, 64, 3)
        self.maxpool_3a = nn.MaxPool2d(3, stride=2)
        self.conv2d_3b = BasicConv2d(64, 80, 1)
        self.conv2d_4a = BasicConv2d(80, 192, 3)
        self.maxpool_5a = nn.MaxPool2d(3, stride=2)
        self.mixed_5b = _mixed_5b()
        self.repeat = nn.Sequential(*(_block35() for _ in range(10)))
        self.mixed_6a = _reduction_a(320, (256, 256, 384))
        self.repeat_1 = nn.Sequential(*(_block17() for _ in range(20)))
        self.mixed_7a = _mixed_7a()
        self.repeat_2 = nn.Sequential(*(_block8() for _ in range(9)))
        self.block8 = _block8(scale=1.0, relu=False)
        self.conv2d_7b = BasicConv2d(2080, 1536, 1)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.classif = nn.Linear(1536, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(x)))
        x = self.conv2d_4a(self.conv2d_3b(self.maxpool_3a(x)))
        x = self.repeat(self.mixed_5b(self.maxpool_5a(x)))
        x = self.repeat_1(self.mixed_6a(x))
        x = self.block8(self.repeat_2(self.mixed_7a(x)))
        x = self.global_pool(self.conv2d_7b(x)).flatten(1)
        y: Tensor = self.classif(self.dropout(x))
        return y


def inception_v4(num_classes: int = 1000, weights: Weights = None) -> InceptionV4:
    """Inception v4: (N, 3, 299, 299) -> (N, num_classes), 42,679,816 parameters, 12.3 GMACs."""
    return load_weights(InceptionV4(num_classes), weights)


def inception_resnet_v2(num_classes: int = 1000, weights: Weights = None) -> InceptionResNetV2:
    """Inception-ResNet v2: (N, 3, 299, 299) -> (N, num_classes), 55,843,464 parameters."""
    return load_weights(InceptionResNetV2(num_classes), weights)
