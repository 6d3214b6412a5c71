"""What several families share: convolution + normalisation + activation, and initial weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch.nn.functional as F
from torch import Tensor, nn

Size = int | tuple[int, int]
Activation = Callable[[], nn.Module]

RELU_GAIN = math.sqrt(2.0)
SILU_GAIN = 1.56  # the mean square of silu(1.56 z) is 1 for normally distributed z


class ConvNormAct(nn.Sequential):
    """Convolution, batch normalisation, activation: layers 0, 1, 2 of a sequence.

    x: (N, C, H, W) -> (N, K, P, Q). "Same" padding for odd filters; `activation=None` makes it
    linear, which is how a bottleneck ends.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        activation: Activation | None = nn.ReLU,
        eps: float = 1e-5,
    ) -> None:
        padding = (kernel_size - 1) // 2
        layers: list[nn.Module] = [
            nn.Conv2d(
                in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
            ),
            nn.BatchNorm2d(out_channels, eps),
        ]
        if activation is not None:
            layers.append(activation())
        super().__init__(*layers)

    @property
    def norm(self) -> nn.BatchNorm2d:
        """The batch normalisation."""
        return cast(nn.BatchNorm2d, self[1])


class BasicConv2d(nn.Module):
    """Convolution, batch normalisation, ReLU, under the Inceptions' names `conv` and `bn`.

    x: (N, C, H, W) -> (N, K, P, Q).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: int = 1,
        padding: Size = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def same_conv(in_channels: int, out_channels: int, kernel_size: Size) -> BasicConv2d:
    """A `BasicConv2d` of stride 1 that keeps the image's size; odd filters only."""
    rows, columns = (kernel_size,) * 2 if isinstance(kernel_size, int) else kernel_size
    padding = (rows // 2, columns // 2)
    return BasicConv2d(in_channels, out_channels, kernel_size, padding=padding)


class SqueezeExcite(nn.Module):
    """Weighs channels by what all pixels of the image hold: x: (N, C, H, W) -> (N, C, H, W).

    Global average, C -> squeezed channels, `activation`, back to C, `gate` (between 0 and 1).

    Source: Hu, Shen, Sun 2018, "Squeeze-and-Excitation Networks".
    """

    def __init__(
        self, channels: int, squeezed: int, activation: Activation, gate: Activation
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.activation = activation()
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.gate(self.fc2(self.activation(self.fc1(self.avgpool(x)))))
        y: Tensor = scale * x
        return y


class InvertedResidual(nn.Module):
    """1x1 expand, depthwise, squeeze-and-excite, linear 1x1 project, shortcut.

    x: (N, C, H, W) -> (N, K, H/stride, W/stride). Without expansion (`expanded` equal to C) the
    first convolution is left out; the shortcut exists where input and output have one shape.

    Source: Sandler et al. 2018, "MobileNetV2"; Howard et al. 2019, "Searching for MobileNetV3".
    """

    def __init__(
        self,
        in_channels: int,
        expanded: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        *,
        activation: Activation,
        squeeze: SqueezeExcite | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if expanded != in_channels:
            layers.append(ConvNormAct(in_channels, expanded, 1, activation=activation, eps=eps))
        layers.append(
            ConvNormAct(expanded, expanded, kernel_size, stride, expanded, activation, eps)
        )
        if squeeze is not None:
            layers.append(squeeze)
        layers.append(ConvNormAct(expanded, out_channels, 1, activation=None, eps=eps))
        self.block = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.attenuation = 1.0 if squeeze is None else 0.5  # a gate starts near sigmoid(0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return x + y if self.has_shortcut else y

    def last_norm(self) -> nn.BatchNorm2d:
        """The normalisation that ends the block."""
        return cast(ConvNormAct, self.block[-1]).norm


def local_response_norm() -> nn.LocalResponseNorm:
    """AlexNet's normalisation across channels: x / (2 + 1e-4 * sum of 5 squares) ** 0.75.

    torch divides alpha by the number of channels summed, the paper does not: hence 5e-4.

    Source: Krizhevsky, Sutskever, Hinton 2012, section 3.3.
    """
    return nn.LocalResponseNorm(size=5, alpha=5e-4, beta=0.75, k=2.0)


def initialise(model: nn.Module, gain: float = RELU_GAIN) -> None:
    """Draws the weights of all convolutions and linear layers from N(0, gain² / fan_in).

    Biases become zero; transposed convolutions keep torch's own start. With the default gain a
    layer followed by ReLU keeps the mean square of its input, so that activations neither vanish
    nor explode on the way through a deep net, even where batch normalisation, still holding its
    initial statistics, does nothing.

    Source: He, Zhang, Ren, Sun 2015, "Delving Deep into Rectifiers", equation 10.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight.shape[1:].numel()
            nn.init.normal_(module.weight, std=gain / math.sqrt(fan_in))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def end_linearly(
    norms: Sequence[nn.BatchNorm2d], share: float = 1.0, gain: float = RELU_GAIN
) -> None:
    """Starts layers that no activation follows at `share` of their input's mean square.

    `norms` end these layers: their weights become sqrt(share) / gain, which undoes the `gain` that
    an activation would have taken back. For each of L residual branches `share` is 1/L: every
    addition adds the branch's variance to the trunk's, and at full size would double it L times
    (2**50 for ResNet-152 in eval mode, beyond fp16).
    """
    for norm in norms:
        nn.init.constant_(norm.weight, math.sqrt(share) / gain)


class LinearEnd(Protocol):
    """A block that ends without an activation, with or without a shortcut around it.

    `attenuation` is the factor that a fresh block's gate takes off its signal.
    """

    has_shortcut: bool
    attenuation: float

    def last_norm(self) -> nn.BatchNorm2d: ...


def tame_bottlenecks(blocks: Sequence[LinearEnd], gain: float = RELU_GAIN) -> None:
    """`end_linearly` for inverted residuals, where those with a shortcut share one doubling."""
    branches = sum(block.has_shortcut for block in blocks)
    for block in blocks:
        share = 1 / branches if block.has_shortcut else 1.0
        end_linearly([block.last_norm()], share, gain * block.attenuation)
