"""Fuses pooling with what stands beside it: a window's maximum or average with the 1x1 convolution
that reads it (`pool_conv`), the average over the whole image with the two of a
squeeze-and-excitation block (`squeeze_excite`), max pooling with the local response normalisation
before or after it (`lrn_pool`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.fused.lrn_pool import LrnPool
from ....kernels.fused.pool_conv import PoolConv
from ....kernels.fused.squeeze_excite import SqueezeExcite
from ....kernels.normalisation.lrn import LocalResponseNorm
from ....kernels.normalisation.reduce import Reduce
from ....kernels.pooling.pool_window import AdaptivePool2d, AvgPool2d, MaxPool2d
from ....kernels.tile.conv_geometry import Conv2d
from ...fusion.estimate import Fused
from ...fusion.pattern import Call, Constant, Match, NearMiss, Rule, Var
from ...fusion.rules import example
from ...graph.ir import Graph, Node, Value

AVERAGES = ("adaptive_avg_pool2d", "mean", "avg_pool2d")


def is_1x1(graph: Graph, node: Node) -> bool:
    """Whether a convolution's filter has one tap."""
    return graph.spec(graph.own_inputs(node)[1]).shape[2:] == (1, 1)


def averages_all(graph: Graph, node: Node) -> bool:
    """Whether one of AVERAGES averages whole images."""
    attributes, x = node.attributes, graph.spec(graph.own_inputs(node)[0])
    if isinstance(attributes, Reduce):
        return x.rank == 4 and attributes.dims == (2, 3)
    if isinstance(attributes, AdaptivePool2d):
        return attributes.size == (1, 1)
    assert isinstance(attributes, AvgPool2d)
    plain = not any(attributes.padding) and attributes.divisor_override is None
    return plain and attributes.kernel == x.shape[2:]


def _not_plain(node: Node) -> str | None:
    """Why a 1x1 convolution is no product of pixels with channels, or None."""
    if node.attributes != Conv2d():
        return f"{node.name} is not dense with stride 1 and no padding: {node.attributes}"
    return None


# Pooling -> 1x1 convolution.


def _is_shared(graph: Graph, node: Node) -> bool:
    return len(graph.uses(Value(node.name))) > 1


def _pool_guard(graph: Graph, found: Match) -> str | None:
    return _not_plain(found.root)


def _build_pool_conv(graph: Graph, found: Match) -> Fused:
    pool, conv = found.nodes["pool"], found.root
    assert isinstance(pool.attributes, (MaxPool2d, AvgPool2d))
    keep = pool.name in found.kept
    attributes = PoolConv(pool.attributes, pool.epilogue, conv.prologue, keep)
    inputs = (
        found.values["x"],
        found.values["w"],
        *graph.operands(pool),
        *graph.prologue_operands(conv),
    )
    results = {conv.name: 0} | ({pool.name: 1} if keep else {})
    return Fused(
        "pool_conv", attributes, inputs, results, conv.epilogue, graph.operands(conv)
    )


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
POOLS = ("max_pool2d", "avg_pool2d")


def _pool_rule(
    label: str, name: str, make: Any, shared: bool, near_misses: tuple[NearMiss, ...]
) -> Rule:
    pool = Call(
        POOLS, Var("x"), name="pool", kept=shared, where=_is_shared if shared else None
    )
    return Rule(
        name,
        Call("conv2d", pool, Constant("w"), where=is_1x1),
        build=_build_pool_conv,
        guard=_pool_guard,
        example=make,
        near_misses=near_misses,
        label=label,
    )


# Global average -> 1x1 convolution -> 1x1 convolution.


def _layers(found: Match) -> tuple[Node, Node]:
    return found.nodes["squeeze"], found.root


def _squeeze_guard(graph: Graph, found: Match) -> str | None:
    average = found.nodes.get("average")
    if average is not None and average.epilogue:
        return f"{average.name} has an epilogue"
    for node in _layers(found):
        if node.op == "conv2d" and (reason := _not_plain(node)) is not None:
            return reason
        if node.prologue:
            return f"{node.name} has a prologue"
    channels = graph.spec(found.values["x"]).shape[1]
    if found.root.spec.shape[1] != channels:
        return f"{found.root.name} does not give one number per channel of its input"
    return None


def _build_squeeze_excite(graph: Graph, found: Match) -> Fused:
    squeeze, excite = _layers(found)
    inputs = (
        found.values["x"], found.values["w1"], found.values["w2"], *graph.operands(squeeze)
    )  # fmt: skip
    attributes = SqueezeExcite(squeeze.epilogue)
    results = {excite.name: 0}
    operands = graph.operands(excite)
    return Fused("squeeze_excite", attributes, inputs, results, excite.epilogue, operands)


def _is_one_pixel(graph: Graph, node: Node) -> bool:
    return is_1x1(graph, node) and graph.spec(graph.own_inputs(node)[0]).shape[2:] == (1, 1)


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


def _squeeze_rule(
    name: str, layer: str, source: Call, make: Any, near_misses: tuple[NearMiss, ...] = ()
) -> Rule:
    where = is_1x1 if layer == "conv2d" else None
    squeeze = Call(layer, source, Constant("w1"), name="squeeze", where=where)
    return Rule(
        name,
        Call(layer, squeeze, Constant("w2"), where=where),
        build=_build_squeeze_excite,
        guard=_squeeze_guard,
        example=make,
        near_misses=near_misses,
        label="squeeze-excite",
    )


# Local response normalisation and max pooling.


def _lrn_guard(graph: Graph, found: Match) -> str | None:
    inner = found.nodes["inner"]
    return f"{inner.name} has an epilogue" if inner.epilogue else None


def _build_lrn_pool(graph: Graph, found: Match) -> Fused:
    root, inner = found.root, found.nodes["inner"]
    lrn_first = isinstance(inner.attributes, LocalResponseNorm)
    lrn, pool = (inner, root) if lrn_first else (root, inner)
    assert isinstance(lrn.attributes, LocalResponseNorm)
    assert isinstance(pool.attributes, MaxPool2d)
    attributes = LrnPool(lrn.attributes, pool.attributes, lrn_first)
    results = {root.name: 0}
    operands = graph.operands(root)
    return Fused("lrn_pool", attributes, (found.values["x"],), results, root.epilogue, operands)


def _normalised(*, lrn_first: bool, activation: Any = None) -> Any:
    layers = [nn.LocalResponseNorm(5, 1e-2), nn.MaxPool2d(3, 2)]
    first, last = layers if lrn_first else layers[::-1]

    def run(m: Any, x: Tensor) -> Tensor:
        t = m["first"](x)
        result: Tensor = torch.relu(m["last"](activation(t) if activation else t))
        return result

    return example(run, IMAGE, first=first, last=last)


AVERAGE = Call(AVERAGES, Var("x"), name="average", where=averages_all)
RULES = (
    _pool_rule(
        "pool-conv",
        "conv1x1(pool(x), w) => pool_conv(x, w)",
        _pooled,
        shared=False,
        near_misses=POOL_NEAR_MISSES,
    ),
    _pool_rule(
        "pool-conv-kept",
        "conv1x1(t = pool(x), w) => pool_conv(x, w) giving t as well",
        _dense_block,
        shared=True,
        near_misses=(NearMiss(lambda: _pooled(shared=True, stride=2), "not dense with stride 1"),),
    ),
    _squeeze_rule(
        "conv1x1(conv1x1(mean(x), v), w) => squeeze_excite(x, v, w)",
        "conv2d",
        AVERAGE,
        _gate,
        near_misses=(
            NearMiss(lambda: _gate(up=10), "one number per channel"),
            NearMiss(lambda: _gate(groups=2), "not dense with stride 1"),
            NearMiss(lambda: _gate(activation=torch.tanh), "has an epilogue"),
        ),
    ),
    _squeeze_rule(
        "linear(linear(mean(x), v), w) => squeeze_excite(x, v, w)",
        "linear",
        AVERAGE,
        lambda: _linear_gate(keepdim=False),
    ),
    _squeeze_rule(
        "linear(linear(flatten(mean(x)), v), w) => squeeze_excite(x, v, w)",
        "linear",
        Call(("reshape", "flatten_pixels"), AVERAGE),
        lambda: _linear_gate(keepdim=True),
    ),
    Rule(
        "conv1x1(conv1x1(s, v), w) => squeeze_excite(s, v, w), s of one pixel",
        Call(
            "conv2d",
            Call("conv2d", Var("x"), Constant("w1"), name="squeeze", where=_is_one_pixel),
            Constant("w2"),
            where=is_1x1,
        ),
        build=_build_squeeze_excite,
        guard=_squeeze_guard,
        example=_excited,
        near_misses=(NearMiss(lambda: _gate(up=10), "one number per channel"),),
        label="excite",
    ),
    Rule(
        "max_pool2d(local_response_norm(x)) => lrn_pool(x)",
        Call("max_pool2d", Call("local_response_norm", Var("x"), name="inner")),
        build=_build_lrn_pool,
        guard=_lrn_guard,
        example=lambda: _normalised(lrn_first=True),
        near_misses=(
            NearMiss(
                lambda: _normalised(lrn_first=True, activation=torch.tanh), "has an epilogue"
            ),
        ),
        label="lrn-pool",
    ),
    Rule(
        "local_response_norm(max_pool2d(x)) => lrn_pool(x)",
        Call("local_response_norm", Call("max_pool2d", Var("x"), name="inner")),
        build=_build_lrn_pool,
        guard=_lrn_guard,
        example=lambda: _normalised(lrn_first=False),
        label="lrn-pool",
    ),
)
