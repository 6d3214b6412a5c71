"""What networks write into slices: `y[:, :, 1:-1, 1:-1] = x`, temporal shift, pasting by hand.

Every write is captured as a concatenation of what lies before the slice, in it and behind it:

    slice(concat(a, b, c)) => slice(b)        where it lies within one part
    concat(slice(concat(a, b)), c) => concat(a, slice(b), c)
    concat(v, x, v) => pad(x, v)              where all other parts hold one number
    pad(pad(x, v), v) => pad(x, v)

so that the next write reads the parts, and zeros around an image become a border, which costs a
convolution nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...kernels.movement.movement import Concat, Slice
from ...kernels.movement.pad import MOST_DIMENSIONS, Pad
from ..graph.ir import Graph, Node, Value
from ..graph.ledger import Ledger
from .clean import eliminate_dead_nodes

SLICE = "slice(concat(a, b, c)) => slice(b)"
JOIN = "concat(slice(concat(a, b)), c) => concat(a, slice(b), c)"
PAD = "concat(v, x, v) => pad(x, v)"
MERGE = "pad(pad(x, v), v) => pad(x, v)"


def simplify_slice_writes(graph: Graph, ledger: Ledger) -> Graph:
    """Reads parts instead of what they are joined to, and pads instead of joining constants.

    After it no slice of a concatenation along the same dimension lies within one of its parts, or
    is a part of another one.
    """
    for node in graph.nodes():
        if isinstance(node.attributes, Slice):
            _read_part(graph, node, ledger)
        elif isinstance(node.attributes, Concat):
            _join_parts(graph, node, ledger)
    # Before pads hide the parts: what is read elsewhere now need not be joined.
    graph = eliminate_dead_nodes(graph, ledger)
    for node in graph.nodes():
        if isinstance(node.attributes, Concat):
            _pad(graph, node, ledger)
    return eliminate_dead_nodes(graph, ledger)


Piece = tuple[Value, Slice]
"""A part of a concatenation, and what of it a slice takes."""


def _pieces(graph: Graph, node: Node) -> list[Piece]:
    """What a slice of a concatenation takes of its parts; nothing for any other node."""
    cut = node.attributes
    if not isinstance(cut, Slice) or node.epilogue or cut.step != 1:
        return []
    source = graph.own_inputs(node)[0]
    return list(_cut(graph, source, cut)) if _joins(graph, source, cut.dim) else []


def _joins(graph: Graph, value: Value, dim: int) -> bool:
    node = graph.node(value.node)
    return node.attributes == Concat(dim) and not node.epilogue


def _cut(graph: Graph, value: Value, cut: Slice) -> Iterator[Piece]:
    """A slice of a value, by the parts of the concatenations that it is made of."""
    size = graph.spec(value).shape[cut.dim]
    if (cut.start, cut.stop) == (0, size) or not _joins(graph, value, cut.dim):
        yield value, cut
        return
    start = 0
    for part in graph.inputs(value.node):
        stop = start + graph.spec(part).shape[cut.dim]
        first, last = max(cut.start, start), min(cut.stop, stop)
        if first < last:
            yield from _cut(graph, part, Slice(cut.dim, first - start, last - start))
        start = stop


def _read(graph: Graph, piece: Piece, like: Node) -> Value:
    part, cut = piece
    spec = graph.spec(part)
    if (cut.start, cut.stop) == (0, spec.shape[cut.dim]):
        return part
    if not graph.is_constant(part):
        return graph.add("slice", (part,), cut, like=[like])
    kept = graph.constant(part).narrow(cut.dim, cut.start, cut.stop - cut.start)
    return graph.add_constant(kept, part.node, spec.dtype, spec.batch)


def _read_part(graph: Graph, node: Node, ledger: Ledger) -> None:
    pieces = _pieces(graph, node)
    if len(pieces) == 1:
        value = _read(graph, pieces[0], node)
        graph.redirect(Value(node.name), value)
        ledger.accept(SLICE, [node], value.node)
        graph.remove([node.name])


def _join_parts(graph: Graph, node: Node, ledger: Ledger) -> None:
    """Joins the parts of those concatenations that slices among the inputs are cut from."""
    dim = node.attributes
    parts: list[Value] = []
    replaced = []
    for value in graph.own_inputs(node):
        cut = graph.node(value.node)
        pieces = _pieces(graph, cut)
        if pieces and Concat(pieces[0][1].dim) == dim:
            parts += [_read(graph, piece, cut) for piece in pieces]
            replaced.append(cut)
        else:
            parts.append(value)
    if replaced:
        graph.set_inputs(node.name, (*parts, *graph.operands(node)))
        ledger.accept(JOIN, [*replaced, node], node.name)


def _pad(graph: Graph, node: Node, ledger: Ledger) -> None:
    dim, parts = node.attributes.expect(Concat).dim, graph.own_inputs(node)
    others = [part for part in parts if graph.is_constant(part)]
    numbers = [torch.unique(graph.constant(part).double()) for part in others]
    if dim == 0 or node.spec.rank > MOST_DIMENSIONS or len(parts) - len(others) != 1 or not others:
        return
    if any(number.numel() != 1 or not number.equal(numbers[0]) for number in numbers):
        return
    (x,) = (part for part in parts if part not in others)
    at, value = parts.index(x), numbers[0].item()
    before, after = [0] * node.spec.rank, [0] * node.spec.rank
    before[dim] = sum(graph.spec(part).shape[dim] for part in parts[:at])
    after[dim] = sum(graph.spec(part).shape[dim] for part in parts[at + 1 :])
    inner, replaced = graph.node(x.node), [node]
    if _continues(graph, inner, value):
        own = inner.attributes.expect(Pad)
        before = [a + b for a, b in zip(before, own.before, strict=True)]
        after = [a + b for a, b in zip(after, own.after, strict=True)]
        (x,), replaced = graph.own_inputs(inner), [inner, node]
    inputs = (x, *graph.operands(node))
    pad = Pad(tuple(before), tuple(after), value)
    padded = graph.add("pad", inputs, pad, epilogue=node.epilogue, like=replaced)
    graph.redirect(Value(node.name), padded)
    ledger.accept(PAD if len(replaced) == 1 else MERGE, replaced, padded.node)
    graph.remove([node.name])
    if len(replaced) > 1:
        graph.remove([inner.name])


def _continues(graph: Graph, inner: Node, value: float) -> bool:
    """Whether a value is padded already, with the same number and for nobody else."""
    pad = inner.attributes
    if not isinstance(pad, Pad) or inner.epilogue or len(graph.uses(Value(inner.name))) > 1:
        return False
    return pad.mode == "constant" and pad.value == value and min(*pad.before, *pad.after) >= 0
