"""Pooling that users and torch.export spell by other ops: rules of `recognise_composites`.

A mixture of maximum and average is two poolings, two products and a sum. The median of windows is
written as `x.unfold(2, r, sh).unfold(3, s, sw)`, or as `F.unfold(x, r)`, flattened and given to
`median`. The indices of a max pooling may be computed and never read.
"""

from __future__ import annotations

import math

import torch

from ...kernels.movement.pointwise import Pointwise
from ...kernels.movement.rearrangement import Reshape
from ...kernels.movement.unfold import Unfold
from ...kernels.pooling.median_pool import MOST_TAPS, MedianPool2d
from ...kernels.pooling.mixed_pool import MixedPool2d, is_weight
from ...kernels.pooling.pool_window import AvgPool2d, MaxPool2d
from ..fusion.pattern import Call, Match, Rule, Var, replace_root
from ..graph.ir import Graph, Node, Value
from ..graph.torch_call import TorchCall

X = Var("x")


# Indices.


def _indices_are_unread(graph: Graph, node: Node) -> bool:
    return not graph.uses(Value(node.name, 1))


def _drop_indices_rule() -> Rule:
    def rewrite(graph: Graph, found: Match) -> Value:
        return replace_root(graph, found, "max_pool2d", (found.values["x"],), found.root.attributes)

    return Rule(
        "values of max_pool2d_with_indices(x) => max_pool2d(x)",
        Call("max_pool2d_with_indices", X, where=_indices_are_unread),
        rewrite,
    )


# Medians.


def _arguments(node: Node) -> tuple[int, ...]:
    """The numbers that an aten call was given, after its tensor."""
    flat: list[int] = []
    for argument in node.attributes.expect(TorchCall).arguments[1:]:
        flat += argument if isinstance(argument, (list, tuple)) else [argument]
    return tuple(map(int, flat))


def _windows(found: Match) -> MedianPool2d | None:
    """The window of two `Tensor.unfold`s over height and width, in either order."""
    sides = {}
    for name in ("inner", "outer"):
        dim, size, step = _arguments(found.nodes[name])
        sides[dim] = (size, step)
    if sides.keys() != {2, 3}:
        return None
    return MedianPool2d((sides[2][0], sides[3][0]), (sides[2][1], sides[3][1]))


def _refusal(graph: Graph, found: Match, window: tuple[int, ...]) -> str | None:
    """Why the median of windows cannot be a `median_pool2d`, or None."""
    root, x = found.root, graph.spec(found.values["x"])
    if graph.uses(Value(root.name, 1)):
        return f"the indices of {root.name} are read too, and median_pool2d has none"
    if x.rank != 4:
        return f"the windows are of {x}, which is not a batch of images (N, C, H, W)"
    if window[0] * window[1] > MOST_TAPS:
        return f"a window of {window} has more than {MOST_TAPS} elements, the most of the kernel"
    return None


def _unfold_guard(graph: Graph, found: Match) -> str | None:
    pool, flat = _windows(found), found.nodes["flat"].spec
    if pool is None:
        return "the windows do not run over height and width"
    dim = _arguments(found.root)[0] % flat.rank
    if flat.rank != 5 or dim != 4 or flat.shape[4] != pool.kernel[0] * pool.kernel[1]:
        return f"the median is not that of whole windows but over dimension {dim} of {flat}"
    return _refusal(graph, found, pool.kernel)


def _make_from_unfold(graph: Graph, found: Match) -> Value:
    pool = _windows(found)
    assert pool is not None
    return replace_root(graph, found, "median_pool2d", (found.values["x"],), pool)


def _columns_guard(graph: Graph, found: Match) -> str | None:
    windows = found.nodes["columns"].attributes.expect(Unfold)
    x, flat = graph.spec(found.values["x"]), found.nodes["flat"].spec
    if windows.dilation != (1, 1):
        return "the windows are dilated, and those of median_pool2d are not"
    dim, *more = _arguments(found.root)
    if any(more) or flat.shape[:-1] != (*x.shape[:2], math.prod(windows.kernel)) or dim % 4 != 2:
        return f"the median is not that of whole windows but over dimension {dim} of {flat}"
    return _refusal(graph, found, windows.kernel)


def _make_from_columns(graph: Graph, found: Match) -> Value:
    windows, like = found.nodes["columns"].attributes.expect(Unfold), list(reversed(found.consumed))
    pool = MedianPool2d(windows.kernel, windows.stride)
    y = graph.add("median_pool2d", (found.values["x"],), pool, like=like)
    return replace_root(graph, found, "reshape", (y,), Reshape(found.root.spec.shape))


# Mixtures.


def _mixture_guard(graph: Graph, found: Match) -> str | None:
    most, mean = found.nodes["most"].attributes, found.nodes["mean"].attributes
    assert isinstance(most, MaxPool2d) and isinstance(mean, AvgPool2d)
    if mean != AvgPool2d(most.kernel, most.stride) or most != MaxPool2d(most.kernel, most.stride):
        return "the windows differ, overhang, are dilated or divided by another number"
    channels = graph.spec(found.values["x"]).shape[1]
    for value in _weights(graph, found):
        if isinstance(value, Value) and not is_weight(graph.spec(value), channels):
            return f"{value} {graph.spec(value)} is neither one number nor one per channel"
    return None


def _weights(graph: Graph, found: Match) -> list[Value | float]:
    """What the maximum and the average are multiplied by."""
    weights: list[Value | float] = []
    for scaled, variable in (("by_a", "a"), ("by_b", "b")):
        attributes = found.nodes[scaled].attributes.expect(Pointwise)
        literal = attributes.literal
        weights.append(found.values[variable] if literal is None else literal)
    return weights


def _make_mixture(graph: Graph, found: Match) -> Value:
    window = found.nodes["most"].attributes.expect(MaxPool2d)
    x = found.values["x"]
    inputs = [
        graph.add_constant(torch.tensor(weight), "mixture", graph.spec(x).dtype)
        if isinstance(weight, float)
        else weight
        for weight in _weights(graph, found)
    ]
    attributes = MixedPool2d(window.kernel, window.stride)
    return replace_root(graph, found, "mixed_pool2d", (x, *inputs), attributes)


def _mixture_rule(learned: bool) -> Rule:
    most, mean = Call("max_pool2d", X, name="most"), Call("avg_pool2d", X, name="mean")
    if learned:
        by_a = Call("mul", most, Var("a"), name="by_a", commutes=True)
        by_b = Call("mul", mean, Var("b"), name="by_b", commutes=True)
        name = "a·max_pool(x) + b·avg_pool(x) => mixed_pool2d(x, a, b)"
    else:
        by_a, by_b = Call("mul", most, name="by_a"), Call("mul", mean, name="by_b")
        name = "0.5·max_pool(x) + 0.5·avg_pool(x) => mixed_pool2d(x, 0.5, 0.5)"

    return Rule(name, Call("add", by_a, by_b, commutes=True), _make_mixture, _mixture_guard)


def _unfold_rule(name: str, copied: bool) -> Rule:
    windows = Call(UNFOLD, Call(UNFOLD, X, name="inner"), name="outer")
    flat = Call("reshape", Call("identity", windows) if copied else windows, name="flat")
    return Rule(name, Call(MEDIAN, flat), _make_from_unfold, _unfold_guard)


UNFOLD, MEDIAN = "aten.unfold.default", "aten.median.dim"
DROP_INDICES = _drop_indices_rule()
POOL_RULES = (
    DROP_INDICES,
    _mixture_rule(learned=True),
    _mixture_rule(learned=False),
    _unfold_rule("median(flatten(copy(unfold(unfold(x))))) => median_pool2d(x)", copied=True),
    # Windows of one column lie in memory so that they are flattened without a copy.
    _unfold_rule("median(flatten(unfold(unfold(x)))) => median_pool2d(x)", copied=False),
    Rule(
        "median(im2col(x)) => median_pool2d(x)",
        Call(MEDIAN, Call("reshape", Call("unfold", X, name="columns"), name="flat")),
        _make_from_columns,
        _columns_guard,
    ),
)
