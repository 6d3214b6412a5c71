"""Permutations and the reshapes around them as one copy, or none.

Pixel and channel shuffles, partitions into windows and tokens are written as reshape, permute,
reshape. Taken one by one, each needs the dense layout and copies; together they are one `rearrange`
in whatever layout there is, often a view. Products read permuted factors where they lie.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from ...errors import InvalidInputError
from ...kernels.contract.spec import Operand
from ...kernels.movement import rearrange
from ...kernels.movement.movement import Permute
from ...kernels.movement.rearrangement import Rearrange, composed, permutation, rearrangement
from ...kernels.products import bmm
from ...kernels.products.bmm import Bmm
from ..fusion import refusals
from ..fusion.pattern import Call, Match, Rule, Var, absorb, replace_root
from ..graph.ir import Graph, Value

X = Var("x")
SIDES = ("left", "right")


def _made(graph: Graph, found: Match) -> Rearrange | None:
    """The rearrangement that a permutation, or another one, and what stands around it are."""
    root, moved = found.root, found.nodes["moved"]
    x = graph.spec(found.values["x"])
    if isinstance(moved.attributes, Rearrange) and isinstance(root.attributes, Permute):
        return composed(moved.attributes, permutation(moved.spec.shape, root.attributes.dims))
    if isinstance(moved.attributes, Rearrange):
        middle, dims = moved.attributes.split, moved.attributes.dims
    else:
        middle = graph.spec(graph.inputs(moved.name)[0]).shape
        dims = moved.attributes.expect(Permute).dims
    return rearrangement(x.shape, middle, dims, root.spec.shape)


def _guard(graph: Graph, found: Match) -> str | None:
    if busy := [node for node in found.nodes.values() if node.epilogue]:
        return refusals.has_epilogue(busy[0])
    made = _made(graph, found)
    if made is None:
        return "the reshapes cut across dimensions that are permuted: one copy cannot do both"
    try:
        rearrange.infer_rearrange(made, (graph.spec(found.values["x"]),))
    except InvalidInputError as error:
        return str(error)
    return None


def _rearrange(graph: Graph, found: Match) -> Value:
    made = _made(graph, found)
    assert made is not None
    return replace_root(graph, found, "rearrange", (found.values["x"],), made)


def _rule(name: str, pattern: Call) -> Rule:
    return Rule(name, pattern, _rearrange, _guard, label="rearrange")


def _permutation(inner: Any) -> Call:
    return Call("permute", inner, name="moved")


def _factor(side: str, graph: Graph, found: Match) -> Rearrange | None:
    """How the product's factor is made of what the movement reads: by the movement, and then by
    what the product does to its factor already."""
    moved, root = found.nodes["moved"].attributes, found.root.attributes.expect(Bmm)
    if isinstance(moved, Permute):
        moved = permutation(graph.spec(found.values["x"]).shape, moved.dims)
    assert isinstance(moved, Rearrange)
    own: Rearrange | None = getattr(root, side)
    return moved if own is None else composed(moved, own)


def _read_permuted(side: str, graph: Graph, found: Match) -> Value:
    root = found.root
    inputs = list(graph.inputs(root.name))
    inputs[SIDES.index(side)] = found.values["x"]
    changes: dict[str, Any] = {side: _factor(side, graph, found)}
    attributes = replace(root.attributes.expect(Bmm), **changes)
    return absorb(graph, found, root.name, tuple(inputs), attributes=attributes)


def _bmm_guard(side: str, graph: Graph, found: Match) -> str | None:
    if found.nodes["moved"].epilogue:
        return refusals.has_epilogue(found.nodes["moved"])
    factor = _factor(side, graph, found)
    if factor is None:
        return "the factor's reshapes cut across dimensions that are permuted"
    x = graph.spec(found.values["x"])
    try:
        rearrange.infer_rearrange(factor, (x,))
    except InvalidInputError as error:
        return str(error)
    if bmm.factor_of(factor, Operand.dense(x)) is None:
        return "rows or columns of the factor have no single stride, so a copy has to be made"
    return None


RULES = (
    _rule("permute(reshape(x)) => rearrange(x)", _permutation(Call("reshape", X, name="split"))),
    _rule("reshape(permute(x)) => rearrange(x)", Call("reshape", _permutation(X), name="root")),
    _rule(
        "reshape(rearrange(x)) => rearrange(x)",
        Call("reshape", Call("rearrange", X, name="moved"), name="root"),
    ),
    _rule(
        "permute(rearrange(x)) => rearrange(x)",
        Call("permute", Call("rearrange", X, name="moved"), name="root"),
    ),
    *(
        Rule(
            f"bmm({name}(a), b) => bmm(a, b, {side})",
            Call("bmm", moved, Var("b"), name="root")
            if side == "left"
            else Call("bmm", Var("b"), moved, name="root"),
            partial(_read_permuted, side),
            partial(_bmm_guard, side),
            label="rearrange",
        )
        for name in ("permute", "rearrange")
        for moved in [Call(name, X, name="moved")]
        for side in SIDES
    ),
)  # fmt: skip
