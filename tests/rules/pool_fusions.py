"""Examples and near misses of the rules of `compiler/passes/fusions/pool_fusions.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..properties.example import Example, NearMiss, example

IMAGE = (2, 16, 7, 6)


def _pooled(*, shared: bool = False, **changes: Any) -> Any:
    """relu(conv1x1(pool(x))), and the pooled tensor's sigmoid where it is shared."""
    layers = {
        "pool": changes.get("pool", nn.MaxPool2d(3, 1, 1)),
        "conv": nn.Conv2d(
            IMAGE[1], 24, 1, changes.get("stride", 1), groups=changes.get("groups", 1)
        ),
    }

    def run(m: Any, x: Tensor) -> Any:
        t = m["pool"](x)
        y = torch.relu(m["conv"](t))
        return (y, torch.sigmoid(t)) if shared else y

    return example(run, IMAGE, **layers)


def _after_pooling(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """DenseNet's: the normalised, activated tensor is read by the convolution alone."""
    t = m["pool"](x)
    result: Tensor = m["conv"](torch.relu(m["norm"](t)))
    return result, torch.sigmoid(t)


def _dense_block() -> Any:
    layers = {
        "pool": nn.AvgPool2d(2),
        "norm": nn.BatchNorm2d(IMAGE[1]),
        "conv": nn.Conv2d(IMAGE[1], 24, 1),
    }
    return example(_after_pooling, IMAGE, **layers)


POOL_NEAR_MISSES = (
    NearMiss(lambda: _pooled(stride=2), "not dense with stride 1"),
    NearMiss(lambda: _pooled(groups=2), "not dense with stride 1"),
    NearMiss(lambda: _pooled(pool=nn.MaxPool2d(7, 1, 3)), "loads per thread"),
)


def _gate(**changes: Any) -> Any:
    """x scaled by the gate of its averages, as convolutions compute it."""
    channels, hidden = IMAGE[1], 6
    layers = {
        "down": nn.Conv2d(channels, hidden, 1, groups=changes.get("groups", 1)),
        "up": nn.Conv2d(hidden, changes.get("up", channels), 1),
    }
    activation = changes.get("activation", lambda s: s)

    def run(m: Any, x: Tensor) -> Tensor:
        s = activation(x.mean((2, 3), keepdim=True))
        gate = torch.sigmoid(m["up"](torch.relu(m["down"](s))))
        return gate if "up" in changes else x * gate

    return example(run, IMAGE, **layers)


def _excited() -> Any:
    """The gate of averages that somebody else needs as well."""
    layers = {"down": nn.Conv2d(IMAGE[1], 6, 1), "up": nn.Conv2d(6, IMAGE[1], 1)}

    def run(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        s = x.mean((2, 3), keepdim=True)
        return torch.sigmoid(m["up"](torch.relu(m["down"](s)))), s

    return example(run, IMAGE, **layers)


def _linear_gate(*, keepdim: bool) -> Any:
    """The same as linear layers compute it."""
    channels, hidden = IMAGE[1], 6
    layers = {"down": nn.Linear(channels, hidden), "up": nn.Linear(hidden, channels)}

    def run(m: Any, x: Tensor) -> Tensor:
        s = x.mean((2, 3), keepdim=keepdim).flatten(1)
        gate = torch.sigmoid(m["up"](torch.relu(m["down"](s))))
        return x * gate.view(*gate.shape, 1, 1)

    return example(run, IMAGE, **layers)


def _normalised(*, lrn_first: bool, activation: Any = None) -> Any:
    layers = [nn.LocalResponseNorm(5, 1e-2), nn.MaxPool2d(3, 2)]
    first, last = layers if lrn_first else layers[::-1]

    def run(m: Any, x: Tensor) -> Tensor:
        t = m["first"](x)
        result: Tensor = torch.relu(m["last"](activation(t) if activation else t))
        return result

    return example(run, IMAGE, first=first, last=last)


EXAMPLES = {
    "conv1x1(pool(x), w) => pool_conv(x, w)": Example(_pooled, POOL_NEAR_MISSES),
    "conv1x1(t = pool(x), w) => pool_conv(x, w) giving t as well": Example(
        _dense_block, (NearMiss(lambda: _pooled(shared=True, stride=2), "not dense with stride 1"),)
    ),
    "conv1x1(conv1x1(mean(x), v), w) => squeeze_excite(x, v, w)": Example(
        _gate,
        (
            NearMiss(lambda: _gate(up=10), "one number per channel"),
            NearMiss(lambda: _gate(groups=2), "not dense with stride 1"),
            NearMiss(lambda: _gate(activation=torch.tanh), "has an epilogue"),
        ),
    ),
    "linear(linear(mean(x), v), w) => squeeze_excite(x, v, w)": Example(
        lambda: _linear_gate(keepdim=False)
    ),
    "linear(linear(flatten(mean(x)), v), w) => squeeze_excite(x, v, w)": Example(
        lambda: _linear_gate(keepdim=True)
    ),
    "conv1x1(conv1x1(s, v), w) => squeeze_excite(s, v, w), s of one pixel": Example(
        _excited, (NearMiss(lambda: _gate(up=10), "one number per channel"),)
    ),
    "max_pool2d(local_response_norm(x)) => lrn_pool(x)": Example(
        lambda: _normalised(lrn_first=True),
        (NearMiss(lambda: _normalised(lrn_first=True, activation=torch.tanh), "has an epilogue"),),
    ),
    "local_response_norm(max_pool2d(x)) => lrn_pool(x)": Example(
        lambda: _normalised(lrn_first=False)
    ),
}
