"""Permutations and the reshapes around them as one copy, or none.

Pixel and channel shuffles, partitions into windows and tokens are written as reshape, permute,
reshape. Taken one by one, each needs the dense layout and copies; together they are one `rearrange`
in whatever layout there is, often a view. Products read permuted factors where they lie.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import nn

from ...errors import InvalidInputError
from ...kernels.contract.spec import Operand
from ...kernels.movement import rearrange
from ...kernels.movement.movement import Permute
from ...kernels.movement.rearrangement import Rearrange, composed, permutation, rearrangement
from ...kernels.products import bmm
from ...kernels.products.bmm import Bmm
from ..fusion import refusals
from ..fusion.pattern import Call, Match, NearMiss, Rule, Var, absorb, replace_root
from ..fusion.rules import example
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
        middle = moved.attributes.split
    else:
        assert isinstance(moved.attributes, Permute)
        middle = graph.spec(graph.inputs(moved.name)[0]).shape
    return rearrangement(x.shape, middle, moved.attributes.dims, root.spec.shape)


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


def _cut_across(m: Any, x: Any) -> Any:
    return F.channel_shuffle(x, 2).reshape(2, 8, 3, 8) * 2


def _rule(name: str, pattern: Call, make: Any, near_misses: tuple[NearMiss, ...] = ()) -> Rule:
    return Rule(name, pattern, _rearrange, make, _guard, near_misses, label="rearrange")


def _permutation(inner: Any) -> Call:
    return Call("permute", inner, name="moved")


def _factor(side: str, graph: Graph, found: Match) -> Rearrange | None:
    """How the product's factor is made of what the movement reads: by the movement, and then by
    what the product does to its factor already."""
    moved, root = found.nodes["moved"].attributes, found.root.attributes
    assert isinstance(root, Bmm)
    if isinstance(moved, Permute):
        moved = permutation(graph.spec(found.values["x"]).shape, moved.dims)
    assert isinstance(moved, Rearrange)
    own: Rearrange | None = getattr(root, side)
    return moved if own is None else composed(moved, own)


def _read_permuted(side: str, graph: Graph, found: Match) -> Value:
    root = found.root
    assert isinstance(root.attributes, Bmm)
    inputs = list(graph.inputs(root.name))
    inputs[SIDES.index(side)] = found.values["x"]
    changes: dict[str, Any] = {side: _factor(side, graph, found)}
    attributes = replace(root.attributes, **changes)
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


def _attention(side: str, name: str) -> Any:
    """A product one of whose factors is permuted, or made by a channel shuffle."""

    def run(m: Any, x: Any, r: Any) -> Any:
        moved = x.transpose(2, 3) if name == "permute" else F.channel_shuffle(x, 2)
        return moved @ r if side == "left" else r @ moved

    return example(run, (2, 4, 6, 6), (2, 4, 6, 6))


def _merged(side: str) -> Any:
    """Rows and columns of a pixel shuffle's result are two dimensions of its input each."""

    def run(m: Any, x: Any, r: Any) -> Any:
        moved = F.pixel_shuffle(x, 2)
        return moved @ r if side == "left" else r @ moved

    return example(run, (2, 4, 3, 3), (2, 1, 6, 6))


RULES = (
    _rule(
        "permute(reshape(x)) => rearrange(x)",
        _permutation(Call("reshape", X, name="split")),
        lambda: example(
            lambda m, x: m["b"](m["a"](x).flatten(2).transpose(1, 2)),
            (2, 6, 7, 5), a=nn.Conv2d(6, 8, 1), b=nn.Linear(8, 3),
        ),
    ),
    _rule(
        "reshape(permute(x)) => rearrange(x)",
        Call("reshape", _permutation(X), name="root"),
        lambda: example(
            lambda m, x: m["b"](m["a"](x).transpose(1, 2).reshape(x.shape[0], 8, 7, 5)),
            (2, 35, 6), a=nn.Linear(6, 8), b=nn.Conv2d(8, 3, 1),
        ),
    ),
    _rule(
        "reshape(rearrange(x)) => rearrange(x)",
        Call("reshape", Call("rearrange", X, name="moved"), name="root"),
        lambda: example(
            lambda m, x: F.channel_shuffle(m["a"](x), 2).reshape(2, 2, 4, 35).sum(2),
            (2, 6, 7, 5), a=nn.Conv2d(6, 8, 1),
        ),
        (NearMiss(lambda: example(_cut_across, (2, 8, 4, 6)), "cut across dimensions"),),
    ),
    _rule(
        "permute(rearrange(x)) => rearrange(x)",
        Call("permute", Call("rearrange", X, name="moved"), name="root"),
        lambda: example(
            lambda m, x: F.pixel_shuffle(m["a"](x), 2).permute(0, 2, 3, 1),
            (2, 6, 7, 5), a=nn.Conv2d(6, 8, 1),
        ),
    ),
    *(
        Rule(
            f"bmm({name}(a), b) => bmm(a, b, {side})",
            Call("bmm", moved, Var("b"), name="root")
            if side == "left"
            else Call("bmm", Var("b"), moved, name="root"),
            partial(_read_permuted, side),
            partial(_attention, side, name),
            partial(_bmm_guard, side),
            (NearMiss(partial(_merged, side), "no single stride"),) if name == "rearrange" else (),
            label="rearrange",
        )
        for name in ("permute", "rearrange")
        for moved in [Call(name, X, name="moved")]
        for side in SIDES
    ),
)  # fmt: skip
