"""Examples and near misses of the rules of `compiler/fusion/rules.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..properties.example import IMAGE, Example, NearMiss, example


def _conv(r: int = 3, k: int = 8) -> nn.Conv2d:
    return nn.Conv2d(IMAGE[1], k, r, padding=r // 2)


def _unary_example() -> Any:
    return example(lambda m, x: torch.sigmoid(m["conv"](x)), IMAGE, conv=_conv())


def _literal_example() -> Any:
    return example(lambda m, x: 1.5 - m["conv"](x), IMAGE, conv=_conv())


def _residual_example() -> Any:
    return example(lambda m, x, r: m["conv"](x) + r, IMAGE, (2, 8, 7, 5), conv=_conv())


def _reversed_example() -> Any:
    return example(lambda m, x, r: r / m["conv"](x), IMAGE, (2, 8, 7, 5), conv=_conv())


def _pointwise_example() -> Any:
    return example(lambda m, x, r: torch.tanh(x) - r, IMAGE, IMAGE)


def _pointwise_reversed_example() -> Any:
    return example(lambda m, x, r: r - torch.tanh(x), IMAGE, IMAGE)


def _activation_example() -> Any:
    return example(lambda m, x: torch.relu(m["pool"](x)), IMAGE, pool=nn.MaxPool2d(2))


def _prologue_example() -> Any:
    """Of a chain whose first operand is not the image."""

    def run(m: Any, x: torch.Tensor, g: torch.Tensor) -> Any:
        return m["conv"](torch.tanh(g - x))

    return example(run, IMAGE, (2, 6, 1, 1), conv=_conv(1))


def _enlarging() -> Any:
    return example(lambda m, x, r: m["conv"](x) + r, (1, 6, 7, 5), (2, 8, 7, 5), conv=_conv())


def _recomputing() -> Any:
    return example(lambda m, x: m["conv"](torch.relu(x)), IMAGE, conv=_conv(3))


def _grouped() -> Any:
    conv = nn.Conv2d(6, 6, 1, groups=3)
    return example(lambda m, x: m["conv"](torch.relu(x)), IMAGE, conv=conv)


def _gate(**options: Any) -> Any:
    conv = nn.Conv2d(IMAGE[1], 8, 1, **options)
    return example(lambda m, x, g: m["conv"](x * g), IMAGE, (2, 6, 1, 1), conv=conv)


def _not_channelwise() -> Any:
    return example(lambda m, x, r: m["conv"](x * r), IMAGE, IMAGE, conv=_conv(1))


def _where_first_example() -> Any:
    def run(m: Any, x: torch.Tensor, r: torch.Tensor) -> Any:
        return torch.where(r > 0.25, m["conv"](x), r)

    return example(run, IMAGE, (2, 8, 7, 5), conv=_conv())


def _where_second_example() -> Any:
    def run(m: Any, x: torch.Tensor, r: torch.Tensor) -> Any:
        return torch.where(r > 0.25, r, m["conv"](x))

    return example(run, IMAGE, (2, 8, 7, 5), conv=_conv())


def _chosen() -> Any:
    return example(lambda m, x, r: torch.where(x > r, r, x), IMAGE, IMAGE)


def _chosen_by_constants(swapped: bool) -> Any:
    """By a mask that the module holds, between an image and what is made of another."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.arange(35).reshape(7, 5) % 3 == 1)

        def forward(self, x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
            pair = (r, torch.tanh(x)) if swapped else (torch.tanh(x), r)
            return torch.where(self.mask, *pair)

    return Masked().eval(), example(None, IMAGE, IMAGE)[1]


def _choice_enlarged() -> Any:
    return example(lambda m, c, a, b: torch.where(c > 0, a, b), (2, 1, 7, 5), IMAGE, IMAGE)


def _compared() -> Any:
    """A comparison of what a kernel computes that is no pointwise one."""
    return example(lambda m, x: m["conv"](x) > 0.5, IMAGE, conv=_conv())


def _counted() -> Any:
    return example(lambda m, x: m["conv"]((x > 0.5).type_as(x)), IMAGE, conv=_conv())


def _rounded() -> Any:
    return example(lambda m, x: torch.tanh(x).half().float(), IMAGE)


def _booleans_multiplied() -> Any:
    """A mask that is no number yet where a convolution would read it."""

    def run(m: Any, x: torch.Tensor) -> Any:
        keep = m["pool"](x) > 0
        return m["conv"](torch.where(~keep, 0.5, 2.0).type_as(x)), keep

    return example(run, IMAGE, conv=_conv(1), pool=nn.MaxPool2d(3, 1, 1))


ENLARGES = NearMiss(_enlarging, "broadcasts")


def _flatten_example() -> Any:
    layers = {"pool": nn.MaxPool2d(2, 1), "fc": nn.Linear(6 * 6 * 4, 4)}
    return example(lambda m, x: m["fc"](m["pool"](x).flatten(1)), IMAGE, **layers)


def _partly_flattened() -> Any:
    layers = {"pool": nn.MaxPool2d(2, 1), "fc": nn.Linear(6 * 4, 4)}
    return example(lambda m, x: m["fc"](m["pool"](x).flatten(2)), IMAGE, **layers)


def _flattened_groups() -> Any:
    """The groups of a channel shuffle are no volume: channels are not innermost in memory."""
    layers = {"pool": nn.MaxPool2d(2, 1), "fc": nn.Linear(6 * 6 * 4, 4)}

    def run(m: Any, x: torch.Tensor) -> Any:
        groups = m["pool"](x).reshape(-1, 2, 3, 6, 4)
        return m["fc"]((groups * groups.sum(2, keepdim=True)).flatten(1))

    return example(run, IMAGE, **layers)


def _flattened_input() -> Any:
    return example(lambda m, x: m["fc"](x.flatten(1)), IMAGE, fc=nn.Linear(6 * 7 * 5, 4))


def _shared_weight() -> Any:
    def run(m: Any, x: torch.Tensor, r: torch.Tensor) -> Any:
        return m["fc"](m["pool"](x).flatten(1)) - m["fc"](m["pool"](r).flatten(1))

    layers = {"pool": nn.MaxPool2d(2, 1), "fc": nn.Linear(6 * 6 * 4, 4)}
    return example(run, IMAGE, IMAGE, **layers)


EXAMPLES = {
    "f(heavy(x)) => heavy(x, epilogue=[f])": Example(_unary_example),
    "where(c, heavy(x), b) => heavy(x, epilogue=[where_first c b])": Example(_where_first_example),
    "where(c, a, heavy(x)) => heavy(x, epilogue=[where_second c a])": Example(
        _where_second_example
    ),
    "where(op(x), a, b) => op(x, epilogue=[where a b])": Example(
        _chosen, (NearMiss(_choice_enlarged, "broadcasts"),)
    ),
    "where(c, op(x), b) => op(x, epilogue=[where_first c b])": Example(
        lambda: _chosen_by_constants(False)
    ),
    "where(c, a, op(x)) => op(x, epilogue=[where_second c a])": Example(
        lambda: _chosen_by_constants(True)
    ),
    "float(op(x)) => op(x, epilogue=[identity])": Example(
        _counted, (NearMiss(_rounded, "rounds"),)
    ),
    "f(heavy(x), literal) => heavy(x, epilogue=[f literal])": Example(
        _literal_example, (NearMiss(_compared, "makes booleans"),)
    ),
    "f(heavy(x), r) => heavy(x, epilogue=[f r])": Example(_residual_example, (ENLARGES,)),
    "f(r, heavy(x)) => heavy(x, epilogue=[reversed f r])": Example(_reversed_example),
    "f(op(x)) => op(x, epilogue=[f])": Example(_activation_example),
    "f(op(x), literal) => op(x, epilogue=[f literal])": Example(
        lambda: example(lambda m, x: torch.exp(x) * 2.0, IMAGE)
    ),
    "f(op(x), r) => op(x, epilogue=[f r])": Example(_pointwise_example),
    "f(r, op(x)) => op(x, epilogue=[reversed f r])": Example(_pointwise_reversed_example),
    "linear(reshape(x), w) => linear(flatten_pixels(x), w with permuted columns)": Example(
        _flatten_example,
        (
            NearMiss(_partly_flattened, "one row per sample"),
            NearMiss(_flattened_groups, "does not flatten an image"),
            NearMiss(_flattened_input, "a view already"),
            NearMiss(_shared_weight, "is shared"),
        ),
    ),
    "conv2d(f(x), w) => conv2d(x, w, prologue=[f])": Example(
        _prologue_example,
        (
            NearMiss(_recomputing, "taps"),
            NearMiss(_booleans_multiplied, "of another type"),
            NearMiss(_grouped, "grouped"),
            NearMiss(_not_channelwise, "per channel"),
            NearMiss(lambda: _gate(stride=2), "per channel for all images"),
            NearMiss(lambda: _gate(padding=1), "per channel for all images"),
        ),
    ),
}
