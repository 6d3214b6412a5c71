"""Examples and near misses of the rules of `compiler/passes/fusions/bottlenecks.py`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ..properties.example import Example, NearMiss, example


def _bottleneck(*, front: bool, reduce: bool, **changes: Any) -> Any:
    channels, mid = 32, 16
    layers: dict[str, nn.Module] = {
        "a": nn.Conv2d(channels, mid, 1),
        "b": nn.Conv2d(mid, mid, changes.get("filter", 3), padding=changes.get("filter", 3) // 2,
                       groups=changes.get("groups", 1)),
        "c": nn.Conv2d(mid, channels, 1),
        "d": nn.Conv2d(channels, mid, 1, stride=changes.get("stride", 1)),
        "e": nn.Conv2d(mid, mid, 3, padding=1, stride=changes.get("stride", 1)),
    }  # fmt: skip

    def run(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t = torch.relu(m["a"](x))
        t = torch.relu(m["b"](t)) if front else torch.relu(m["e"](t)).tanh().square()
        y = torch.relu(m["c"](t) + x) if "stride" not in changes else torch.relu(m["c"](t))
        return y, (torch.relu(m["d"](y)) if reduce else y)

    module, inputs = example(run, (2, channels, 6, 5), **layers)
    if changes.get("dtype", torch.float16) is torch.float16:
        return module.half(), tuple(x.half() for x in inputs)
    return module, inputs


def _x_chain(before: Any = None, between: Any = None, beside: bool = False) -> Any:
    """An expansion and the reduction behind it; before, between: what else their inputs pass."""
    layers = {"c": nn.Conv2d(16, 32, 1), "d": nn.Conv2d(32, 16, 1)}

    def run(m: Any, t: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = m["c"](before(t) if before else t) + x
        y = y if between else torch.relu(y)
        z = m["d"](between(y) if between else y)
        return y, torch.relu(z + t if beside else z)

    module, inputs = example(run, (2, 16, 6, 5), (2, 32, 6, 5), **layers)
    return module.half(), tuple(x.half() for x in inputs)


def _back_to_back() -> Any:
    layers = {"b": nn.Conv2d(16, 16, 3, padding=1), "c": nn.Conv2d(16, 32, 1)}
    module, inputs = example(
        lambda m, x: torch.relu(m["c"](torch.relu(m["b"](x)))), (2, 16, 6, 5), **layers
    )
    return module.half(), tuple(x.half() for x in inputs)


def _wide_chain() -> Any:
    layers = {"c": nn.Conv2d(512, 64, 1), "d": nn.Conv2d(64, 16, 1)}
    module, inputs = example(lambda m, x: m["d"](m["c"](x)), (1, 512, 2, 2), **layers)
    return module.half(), tuple(x.half() for x in inputs)


class Links(NamedTuple):
    """What a stage begins with besides its expansion, and which term of the sum the shortcut is."""

    front: bool
    reduce: bool
    shortcut: str


def _stage_start(links: Links, padding: int = 0) -> Any:
    """The first block of a stage; the order of the sum decides which convolution adds."""
    layers: dict[str, nn.Module] = {
        "b": nn.Conv2d(16, 16, 3, padding=1),
        "c": nn.Conv2d(16, 32, 1),
        "s": nn.Conv2d(24, 32, 1, stride=2, padding=padding),
        "d": nn.Conv2d(32, 16, 1),
    }

    def run(m: Any, x: torch.Tensor, r: torch.Tensor) -> Any:
        t = torch.relu(m["b"](x)) if links.front else x
        terms = (m["s"](r), m["c"](t)) if links.shortcut == "first" else (m["c"](t), m["s"](r))
        y = torch.relu(terms[0] + terms[1])
        return (y, torch.relu(m["d"](y))) if links.reduce else y

    shapes = (2, 16, 6, 5), (2, 24, 12 - 2 * padding, 10 - 2 * padding)
    module, inputs = example(run, *shapes, **layers)
    return module.half(), tuple(x.half() for x in inputs)


STAGE_START = Links(True, True, "second")
NEAR_MISSES = (
    NearMiss(lambda: _bottleneck(front=True, reduce=True, dtype=torch.float32), "registers"),
    NearMiss(lambda: _bottleneck(front=True, reduce=True, stride=2), "with stride 1"),
    NearMiss(lambda: _bottleneck(front=True, reduce=True, groups=4), "grouped"),
)


EXAMPLES = {
    "conv1x1(y = conv1x1(conv(x))) => conv_chain(x) giving y and the reduction": Example(
        lambda: _bottleneck(front=True, reduce=True), NEAR_MISSES
    ),
    "conv1x1(y = conv1x1(conv(x)) + conv1x1(s)) => conv_chain(x, s) giving y and the reduction": (
        Example(
            lambda: _stage_start(STAGE_START),
            (NearMiss(lambda: _stage_start(STAGE_START, padding=1), "is padded"),),
        )
    ),
    "conv1x1(y = conv1x1(s) + conv1x1(conv(x))) => conv_chain(x, s) giving y and the reduction": (
        Example(lambda: _stage_start(Links(True, True, "first")))
    ),
    "conv1x1(y = conv1x1(t)) => conv_chain(t) giving y and the reduction": Example(
        _x_chain,
        (
            NearMiss(_wide_chain, "do not fit one tile"),
            NearMiss(lambda: _x_chain(before=torch.tanh), "has a prologue"),
            NearMiss(lambda: _x_chain(between=torch.tanh), "has a prologue"),
            NearMiss(lambda: _x_chain(beside=True), "adds the computed tensor"),
        ),
    ),
    "conv1x1(y = conv1x1(t) + conv1x1(s)) => conv_chain(t, s) giving y and the reduction": (
        Example(lambda: _stage_start(Links(False, True, "second")))
    ),
    "conv1x1(y = conv1x1(s) + conv1x1(t)) => conv_chain(t, s) giving y and the reduction": (
        Example(lambda: _stage_start(Links(False, True, "first")))
    ),
    "conv1x1(conv(x)) => conv_chain(x)": Example(_back_to_back),
    "conv1x1(conv(x)) + conv1x1(s) => conv_chain(x, s)": Example(
        lambda: _stage_start(Links(True, False, "second"))
    ),
    "conv1x1(s) + conv1x1(conv(x)) => conv_chain(x, s)": Example(
        lambda: _stage_start(Links(True, False, "first"))
    ),
}
