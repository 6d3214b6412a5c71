"""Permutations and the reshapes around them as one copy, or none.

Pixel and channel shuffles, partitions into windows and tokens are written as reshape, permute,
reshape. Taken one by one, each needs the dense layout and copies; together they are one `rearrange`
in whatever layout there is, often a view. Products read permuted factors where they lie.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import InvalidInputError
from ...kernels.contract.spec import Operand, TensorSpec
from ...kernels.movement import rearrange
from ...kernels.movement.movement import Permute
from ...kernels.movement.rearrangement import Rearrange, composed, permutation, rearrangement
from ...kernels.products import bmm
from ...kernels.products.bmm import Bmm
from ..fusion import refusals
from ..fusion.pattern import Call, Match, Rule, Var, absorb, becomes
from ..graph.ir import Graph, Value

X = Var("x")
SIDES = ("left", "right")


def _why_not(x: TensorSpec, made: Rearrange) -> str | None:
    """Why x cannot be taken apart in this way, or None."""
    try:
        rearrange.infer_rearrange(made, (x,))
    except InvalidInputError as error:
        return str(error)
    return None


def _rearranged(graph: Graph, found: Match) -> Rearrange | str:
    """The rearrangement that a permutation, or another one, and what stands around it are."""
    if busy := [node for node in found.consumed if node.epilogue]:
        return refusals.has_epilogue(busy[0])
    root, moved = found.root, found.nodes["moved"]
    x, own = graph.spec(found.values["x"]), moved.attributes
    if isinstance(own, Rearrange) and isinstance(root.attributes, Permute):
        made = composed(own, permutation(moved.spec.shape, root.attributes.dims))
    elif isinstance(own, Rearrange):
        made = rearrangement(x.shape, own.split, own.dims, root.spec.shape)
    else:
        middle = graph.spec(graph.inputs(moved.name)[0]).shape
        made = rearrangement(x.shape, middle, own.expect(Permute).dims, root.spec.shape)
    if made is None:
        return "the reshapes cut across dimensions that are permuted: one copy cannot do both"
    return _why_not(x, made) or made


def _rule(name: str, pattern: Call) -> Rule:
    return becomes("rearrange", name, pattern, _rearranged, label="rearrange")


def _permutation(inner: Any) -> Call:
    return Call("permute", inner, name="moved")


def _side(graph: Graph, found: Match) -> int:
    """Which factor of the product is moved: 0 or 1."""
    return graph.own_inputs(found.root).index(Value(found.nodes["moved"].name))


def _factor(graph: Graph, found: Match) -> Rearrange | str:
    """How the product's factor is made of what the movement reads: by the movement, and then by
    what the product does to its factor already; or why it cannot be read so."""
    if found.nodes["moved"].epilogue:
        return refusals.has_epilogue(found.nodes["moved"])
    moved, root = found.nodes["moved"].attributes, found.root.attributes.expect(Bmm)
    x = graph.spec(found.values["x"])
    if isinstance(moved, Permute):
        moved = permutation(x.shape, moved.dims)
    assert isinstance(moved, Rearrange)
    own: Rearrange | None = getattr(root, SIDES[_side(graph, found)])
    factor = moved if own is None else composed(moved, own)
    if factor is None:
        return "the factor's reshapes cut across dimensions that are permuted"
    if (reason := _why_not(x, factor)) is not None:
        return reason
    if bmm.factor_of(factor, Operand.dense(x)) is None:
        return "rows or columns of the factor have no single stride, so a copy has to be made"
    return factor


def _bmm_guard(graph: Graph, found: Match) -> str | None:
    factor = _factor(graph, found)
    return factor if isinstance(factor, str) else None


def _read_permuted(graph: Graph, found: Match) -> Value:
    root, side = found.root, _side(graph, found)
    inputs = list(graph.inputs(root.name))
    inputs[side] = found.values["x"]
    changes: dict[str, Any] = {SIDES[side]: _factor(graph, found)}
    attributes = replace(root.attributes.expect(Bmm), **changes)
    return absorb(graph, found, root.name, tuple(inputs), attributes=attributes)


RULES = (
    _rule("permute(reshape(x)) => rearrange(x)", _permutation(Call("reshape", X, name="split"))),
    _rule("reshape(permute(x)) => rearrange(x)", Call("reshape", _permutation(X))),
    _rule(
        "reshape(rearrange(x)) => rearrange(x)",
        Call("reshape", Call("rearrange", X, name="moved")),
    ),
    _rule(
        "permute(rearrange(x)) => rearrange(x)",
        Call("permute", Call("rearrange", X, name="moved")),
    ),
    *(
        Rule(f"bmm({name}(a), b) => bmm(a, b, {side})", Call("bmm", *factors), _read_permuted,
             _bmm_guard, label="rearrange")
        for name in ("permute", "rearrange")
        for moved in [Call(name, X, name="moved")]
        for side, factors in zip(SIDES, ((moved, Var("b")), (Var("b"), moved)), strict=True)
    ),
)  # fmt: skip
