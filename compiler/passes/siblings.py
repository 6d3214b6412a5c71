"""Merges convolutions (or linear layers) that read the same tensor into one wide one.

The weights are joined along the output channels; the results are slices, that is views, of the wide
result. One reading of the input instead of N, one kernel instead of N.

Where one of the results is the first or last part of a concatenation (Inception), the whole wide
result is written into a widened concatenation buffer, and the concatenation becomes a view of it:
    c = concat(a, ...),  a, b = siblings(x)   =>   wide = concat([b a], ...),  c = wide[b:]
so that no copy is needed although b is not part of c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...kernels.conv2d import Conv2d
from ...kernels.movement import Concat, Slice
from ..ir import Graph, Node, Value
from ..ledger import Ledger

RULE = "conv(x, w1), conv(x, w2), ... => slices of conv(x, [w1 w2 ...])"
CONCAT_RULE = "concat(slice(wide), ...) => slice(concat(wide, ...))"
VECTOR = 8
"""Slices start at multiples of this many channels, so that 128-bit accesses stay possible."""


@dataclass(frozen=True)
class _Kind:
    """What siblings have in common."""

    x: Value
    op: str
    attributes: Any
    filter: tuple[int, ...]
    stages: tuple[Any, ...]


def merge_siblings(graph: Graph, ledger: Ledger) -> Graph:
    """Merges every group of at least two siblings.

    Refused where a weight is shared, a stage reads something other than one constant per channel,
    or the channels do not come in eights.
    """
    groups: dict[_Kind, list[Node]] = {}
    for node in graph.nodes():
        if node.op in ("conv2d", "linear") and (kind := _kind_of(graph, node)) is not None:
            groups.setdefault(kind, []).append(node)
    for members in groups.values():
        if len(members) < 2:
            continue
        allowed = []
        for node in members:
            reason = _why_not(graph, node)
            if reason is None:
                allowed.append(node)
            else:
                ledger.refuse(RULE, [node], reason)
        if len(allowed) >= 2:
            _merge(graph, allowed, ledger)
    return graph


def _kind_of(graph: Graph, node: Node) -> _Kind | None:
    x, weight = graph.own_inputs(node)
    grouped = isinstance(node.attributes, Conv2d) and node.attributes.groups != 1
    if grouped or node.prologue or not graph.is_constant(weight) or graph.is_constant(x):
        return None
    shape = graph.spec(weight).shape[1:]
    return _Kind(x, node.op, node.attributes, shape, node.epilogue)


def _why_not(graph: Graph, node: Node) -> str | None:
    weight = graph.own_inputs(node)[1]
    channels = graph.spec(weight).shape[0]
    if len(graph.uses(weight)) > 1:
        return f"the weight of {node.name} is shared"
    if node.op == "linear" and node.spec.rank != 2:
        return f"the channels of {node.name} are not its second dimension"
    if channels % VECTOR:
        return f"{node.name} has {channels} channels, not a multiple of {VECTOR}"
    per_channel = (channels, *(1 for _ in node.spec.shape[2:]))
    for value in graph.operands(node):
        if not graph.is_constant(value) or graph.spec(value).shape != per_channel:
            return f"{node.name} reads {value}, which is not one constant per channel"
    return None


def _joined(graph: Graph, values: list[Value], stem: str) -> Value:
    tensor = torch.cat([graph.constant(value).double() for value in values])
    return graph.add_constant(tensor, stem, graph.spec(values[0]).dtype)


def _merge(graph: Graph, members: list[Node], ledger: Ledger) -> None:
    concat, first = _find_concat(graph, members)
    if concat is not None:
        # The concatenation's own part goes to the side where the rest of it follows.
        partner = next(node for node in members if _feeds(graph, node, concat, first))
        others = [node for node in members if node is not partner]
        members = [*others, partner] if first else [partner, *others]
    x = graph.own_inputs(members[0])[0]
    weight = _joined(graph, [graph.own_inputs(node)[1] for node in members], "siblings_weight")
    columns = zip(*(graph.operands(node) for node in members), strict=True)
    operands = [_joined(graph, list(values), "siblings_operand") for values in columns]
    wide = graph.add(
        members[0].op,
        (x, weight, *operands),
        members[0].attributes,
        epilogue=members[0].epilogue,
        like=members,
        rule=RULE,
    )
    start = 0
    for node in members:
        stop = start + node.spec.shape[1]
        piece = graph.add("slice", (wide,), Slice(1, start, stop), name=None)
        graph.update(piece.node, module_path=node.module_path)
        graph.redirect(Value(node.name), piece)
        start = stop
    saved = (len(members) - 1) * graph.spec(x).size_bytes
    ledger.accept(RULE, members, wide.node, saved)
    graph.remove(node.name for node in members)
    if concat is not None:
        _widen_concat(graph, graph.node(concat.name), wide, first, ledger)


def _feeds(graph: Graph, node: Node, concat: Node, first: bool) -> bool:
    return graph.inputs(concat.name)[0 if first else -1] == Value(node.name)


def _find_concat(graph: Graph, members: list[Node]) -> tuple[Node | None, bool]:
    """A concatenation that begins (True) or ends (False) with a member and can be widened."""
    for node in members:
        for reader, _ in graph.uses(Value(node.name)):
            concat = graph.node(reader)
            if concat.attributes != Concat(1) or not _can_widen(graph, concat):
                continue
            for first in (True, False):
                if _feeds(graph, node, concat, first):
                    return concat, first
    return None, True


def _can_widen(graph: Graph, concat: Node) -> bool:
    """Its other parts lie at multiples of eight channels, and it is not itself joined elsewhere."""
    widths = [graph.spec(value).shape[1] for value in graph.inputs(concat.name)]
    readers = [graph.node(reader) for reader, _ in graph.uses(Value(concat.name))]
    nested = any(isinstance(reader.attributes, Concat) for reader in readers)
    returned = any(reader.op == "output" for reader in readers)
    return all(width % VECTOR == 0 for width in widths) and not nested and not returned


def _widen_concat(graph: Graph, concat: Node, wide: Value, first: bool, ledger: Ledger) -> None:
    inputs = list(graph.inputs(concat.name))
    inputs[0 if first else -1] = wide
    total = graph.spec(wide).shape[1] - _part(graph, concat, first)
    widened = graph.add("concat", inputs, Concat(1), like=[concat])
    start = total if first else 0
    view = graph.add("slice", (widened,), Slice(1, start, start + concat.spec.shape[1]))
    graph.update(view.node, module_path=concat.module_path)
    graph.redirect(Value(concat.name), view)
    ledger.accept(CONCAT_RULE, [concat], widened.node)
    graph.remove([concat.name])


def _part(graph: Graph, concat: Node, first: bool) -> int:
    """Channels of the concatenation's own part of the wide result."""
    return graph.spec(graph.inputs(concat.name)[0 if first else -1]).shape[1]
