"""Pooling that users and torch.export spell by other ops: rules of `recognise_composites`.

A mixture of maximum and average is two poolings, two products and a sum. The median of windows is
written as `x.unfold(2, r, sh).unfold(3, s, sw)`, or as `F.unfold(x, r)`, flattened and given to
`median`. The indices of a max pooling may be computed and never read.
"""

from __future__ import annotations

import math

import torch

from ...kernels.contract.op import Attributes
from ...kernels.movement.pointwise import Pointwise
from ...kernels.movement.unfold import Unfold
from ...kernels.pooling.median_pool import MOST_TAPS, MedianPool2d
from ...kernels.pooling.mixed_pool import MixedPool2d, is_weight
from ...kernels.pooling.pool_window import AvgPool2d, MaxPool2d
from ..fusion.pattern import Call, Match, Rule, Var, becomes
from ..graph.ir import Graph, Node, Value
from ..graph.torch_call import TorchCall

X = Var("x")
UNFOLD, MEDIAN = "aten.unfold.default", "aten.median.dim"


# Medians.


def _arguments(node: Node) -> tuple[int, ...]:
    """The numbers that an aten call was given, after its tensor."""
    flat: list[int] = []
    for argument in node.attributes.expect(TorchCall).arguments[1:]:
        flat += argument if isinstance(argument, (list, tuple)) else [argument]
    return tuple(map(int, flat))


def _median(graph: Graph, found: Match, pool: MedianPool2d) -> MedianPool2d | str:
    """The median of whole windows, or why there is no kernel for it."""
    root, x, window = found.root, graph.spec(found.values["x"]), pool.kernel
    if graph.uses(Value(root.name, 1)):
        return f"the indices of {root.name} are read too, and median_pool2d has none"
    if x.rank != 4:
        return f"the windows are of {x}, which is not a batch of images (N, C, H, W)"
    if window[0] * window[1] > MOST_TAPS:
        return f"a window of {window} has more than {MOST_TAPS} elements, the most of the kernel"
    return pool


def _of_unfolded(graph: Graph, found: Match) -> MedianPool2d | str:
    """Of the windows of two `Tensor.unfold`s over height and width, in either order."""
    flat = found.nodes["flat"].spec
    arguments = [_arguments(node) for node in found.those("inner", "outer")]
    sides = {dim: (size, step) for dim, size, step in arguments}
    if sides.keys() != {2, 3}:
        return "the windows do not run over height and width"
    kernel, stride = zip(sides[2], sides[3], strict=True)
    dim = _arguments(found.root)[0] % flat.rank
    if flat.rank != 5 or dim != 4 or flat.shape[4] != math.prod(kernel):
        return f"the median is not that of whole windows but over dimension {dim} of {flat}"
    return _median(graph, found, MedianPool2d(kernel, stride))


def _of_columns(graph: Graph, found: Match) -> MedianPool2d | str:
    windows = found.nodes["columns"].attributes.expect(Unfold)
    x, flat = graph.spec(found.values["x"]), found.nodes["flat"].spec
    if windows.dilation != (1, 1):
        return "the windows are dilated, and those of median_pool2d are not"
    dim, *more = _arguments(found.root)
    if any(more) or flat.shape[:-1] != (*x.shape[:2], math.prod(windows.kernel)) or dim % 4 != 2:
        return f"the median is not that of whole windows but over dimension {dim} of {flat}"
    return _median(graph, found, MedianPool2d(windows.kernel, windows.stride))


def _unfold_rule(name: str, copied: bool) -> Rule:
    windows = Call(UNFOLD, Call(UNFOLD, X, name="inner"), name="outer")
    flat = Call("reshape", Call("identity", windows) if copied else windows, name="flat")
    return becomes("median_pool2d", name, Call(MEDIAN, flat), _of_unfolded)


# Mixtures.


def _mixture(graph: Graph, found: Match) -> Attributes | str:
    most, mean = found.nodes["most"].attributes, found.nodes["mean"].attributes
    assert isinstance(most, MaxPool2d) and isinstance(mean, AvgPool2d)
    if mean != AvgPool2d(most.kernel, most.stride) or most != MaxPool2d(most.kernel, most.stride):
        return "the windows differ, overhang, are dilated or divided by another number"
    channels = graph.spec(found.values["x"]).shape[1]
    for value in _weights(found):
        if isinstance(value, Value) and not is_weight(graph.spec(value), channels):
            return f"{value} {graph.spec(value)} is neither one number nor one per channel"
    return MixedPool2d(most.kernel, most.stride)


def _weights(found: Match) -> list[Value | float]:
    """What the maximum and the average are multiplied by."""
    weights: list[Value | float] = []
    for scaled, variable in (("by_a", "a"), ("by_b", "b")):
        literal = found.nodes[scaled].attributes.expect(Pointwise).literal
        weights.append(found.values[variable] if literal is None else literal)
    return weights


def _mixed(graph: Graph, found: Match) -> list[Value]:
    x = found.values["x"]
    return [x] + [
        graph.add_constant(torch.tensor(weight), "mixture", graph.spec(x).dtype)
        if isinstance(weight, float)
        else weight
        for weight in _weights(found)
    ]


def _mixture_rule(learned: bool) -> Rule:
    most, mean = Call("max_pool2d", X, name="most"), Call("avg_pool2d", X, name="mean")
    if learned:
        by_a = Call("mul", most, Var("a"), name="by_a", commutes=True)
        by_b = Call("mul", mean, Var("b"), name="by_b", commutes=True)
        name = "a·max_pool(x) + b·avg_pool(x) => mixed_pool2d(x, a, b)"
    else:
        by_a, by_b = Call("mul", most, name="by_a"), Call("mul", mean, name="by_b")
        name = "0.5·max_pool(x) + 0.5·avg_pool(x) => mixed_pool2d(x, 0.5, 0.5)"
    pattern = Call("add", by_a, by_b, commutes=True)
    return becomes("mixed_pool2d", name, pattern, _mixture, _mixed)


DROP_INDICES = becomes(
    "max_pool2d",
    "values of max_pool2d_with_indices(x) => max_pool2d(x)",
    Call(
        "max_pool2d_with_indices", X,
        where=lambda graph, node: not graph.uses(Value(node.name, 1)),  # The indices.
    ),
    lambda graph, found: found.root.attributes,
)  # fmt: skip
POOL_RULES = (
    DROP_INDICES,
    _mixture_rule(learned=True),
    _mixture_rule(learned=False),
    _unfold_rule("median(flatten(copy(unfold(unfold(x))))) => median_pool2d(x)", copied=True),
    # Windows of one column lie in memory so that they are flattened without a copy.
    _unfold_rule("median(flatten(unfold(unfold(x)))) => median_pool2d(x)", copied=False),
    becomes(
        "median_pool2d",
        "median(im2col(x)) => median_pool2d(x)",
        Call(MEDIAN, Call("reshape", Call("unfold", X, name="columns"), name="flat")),
        _of_columns,
    ),
)
