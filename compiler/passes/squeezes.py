"""Keeps sequences (N, C, L) as the images (N, C, 1, L) that 1-d convolutions and poolings compute.

Capture writes every 1-d op as unsqueeze, 2-d op, squeeze. Here squeezes sink below the nodes that
read them, and pads in front of an unsqueeze follow it, until both meet and cancel: then epilogues,
batch normalisation and everything else fuse as they do in two dimensions, and channels stay
innermost in memory from the first op of a chain to the last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...kernels.contract.spec import TensorSpec
from ...kernels.movement.movement import Concat, Slice
from ...kernels.movement.pad import Pad
from ...kernels.movement.pointwise import Pointwise
from ...kernels.movement.rearrangement import Expand, Reshape
from ...kernels.normalisation.batch_norm import BatchNorm
from ...kernels.normalisation.normalize import Normalize
from ...kernels.normalisation.reduce import Reduce
from ...kernels.normalisation.softmax import Softmax
from ..graph.ir import Graph, Node, Value
from ..graph.ledger import Ledger

MERGE = "reshape(reshape(x)) => reshape(x)"
SINK = "f(squeeze(x)) => squeeze(f(x))"
LIFT = "unsqueeze(pad(x)) => pad(unsqueeze(x))"
ROW = 2
"""The dimension of size one that images of sequences have."""


def sink_squeezes(graph: Graph, ledger: Ledger) -> Graph:
    """Moves squeezes towards the outputs and unsqueezes towards the inputs.

    After it no reshape reads a reshape, and a 1-d network whose layers work on images has one
    unsqueeze per input and one squeeze per output.
    """
    changed = True
    while changed:
        changed = False
        for node in graph.nodes():
            if node.name in graph:
                moved = _merge(graph, node, ledger) or _lift(graph, node, ledger)
                changed = moved or _sink(graph, node, ledger) or changed
    return graph


def _is_reshape(node: Node) -> bool:
    return isinstance(node.attributes, Reshape)


def _with_row(sizes: tuple[int, ...], row: int) -> tuple[int, ...]:
    """Numbers of a sequence's dimensions as those of its image's."""
    return (*sizes[:ROW], row, *sizes[ROW:])


def _as_row(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of a sequence's image."""
    return _with_row(spec.shape, 1)


def _squeezed(graph: Graph, value: Value) -> Value | None:
    """The image behind a squeeze."""
    node = graph.node(value.node)
    if not _is_reshape(node) or node.spec.rank != 3:
        return None
    (image,) = graph.inputs(node.name)
    return image if graph.spec(image).shape == _as_row(node.spec) else None


def _unsqueezed(graph: Graph, value: Value) -> Value | None:
    """An image of the value that the graph already has."""
    for reader, _ in graph.uses(value):
        node = graph.node(reader)
        if _is_reshape(node) and node.spec.shape == _as_row(graph.spec(value)):
            return Value(reader)
    return None


def _drop_unused(graph: Graph, node: Node) -> None:
    if not graph.net.out_degree(node.name):
        graph.remove([node.name])


def _merge(graph: Graph, node: Node, ledger: Ledger) -> bool:
    if not _is_reshape(node):
        return False
    source = graph.node(graph.inputs(node.name)[0].node)
    if not _is_reshape(source):
        return False
    (x,) = graph.inputs(source.name)
    if graph.spec(x).shape == node.spec.shape:
        graph.redirect(Value(node.name), x)
        graph.remove([node.name])
        ledger.accept(MERGE, [source, node], x.node)
    else:
        graph.set_inputs(node.name, [x])
        ledger.accept(MERGE, [source, node], node.name)
    _drop_unused(graph, source)
    return True


def _lift(graph: Graph, node: Node, ledger: Ledger) -> bool:
    """Pads the image of a sequence where only that image of the padded sequence is read."""
    if not _is_reshape(node):
        return False
    (value,) = graph.inputs(node.name)
    pad = graph.node(value.node)
    if not isinstance(pad.attributes, Pad) or len(graph.uses(value)) != 1 or pad.epilogue:
        return False
    if pad.spec.rank != 3 or node.spec.shape != _as_row(pad.spec):
        return False
    (x,) = graph.inputs(pad.name)
    image = _unsqueezed(graph, x)
    if image is None:
        image = graph.add("reshape", (x,), Reshape(_as_row(graph.spec(x))), like=[node])
    made = graph.add("pad", (image,), _on_rows(pad.attributes), like=[pad])
    graph.redirect(Value(node.name), made)
    graph.remove([node.name, pad.name])
    ledger.accept(LIFT, [pad, node], made.node)
    return True


def _sink(graph: Graph, node: Node, ledger: Ledger) -> bool:
    """Applies a node to the images behind the squeezes it reads."""
    attributes = _on_rows(node.attributes)
    if attributes is None or node.prologue or node.spec.rank > 3:
        return False
    values = graph.inputs(node.name)
    if not any(_squeezed(graph, value) for value in values):
        return False
    images = [_image_of(graph, node, slot, value) for slot, value in enumerate(values)]
    if not all(images):
        return False
    squeezes = [graph.node(value.node) for value in values if _squeezed(graph, value)]
    inputs = [image() for image in images if image is not None]
    made = graph.add(node.op, inputs, attributes, epilogue=node.epilogue, like=[node])
    kept = made
    if node.spec.rank == 3:
        kept = graph.add("reshape", (made,), Reshape(node.spec.shape), like=squeezes[:1])
    graph.redirect(Value(node.name), kept)
    graph.remove([node.name])
    ledger.accept(SINK, [*squeezes, node], made.node)
    for squeeze in squeezes:
        if squeeze.name in graph:
            _drop_unused(graph, squeeze)
    return True


def _image_of(graph: Graph, node: Node, slot: int, value: Value) -> Callable[[], Value] | None:
    """How to get an input as part of an image, or None where that takes a transposition."""
    spec = graph.spec(value)
    if (image := _squeezed(graph, value) or (_unsqueezed(graph, value))) is not None:
        return lambda: image
    if isinstance(node.attributes, BatchNorm) and slot:
        return lambda: value  # One number per channel, whatever the rank.
    if spec.rank < 2 or spec.numel == 1:
        return lambda: value  # Broadcasts along the last dimension, which stays the last.
    if graph.is_constant(value):
        shape = (*spec.shape[:-1], 1, spec.shape[-1])
        tensor = graph.constant(value).reshape(shape)
        return lambda: graph.add_constant(tensor, value.node, spec.dtype, spec.batch)
    return None


def _dim(dim: int) -> int:
    return dim + 1 if dim >= ROW else dim


def _on_rows(attributes: Any) -> Any:
    """A node's attributes for images instead of sequences, or None where it has none."""
    if isinstance(attributes, (Pointwise, BatchNorm)):
        return attributes
    if isinstance(attributes, (Concat, Slice, Softmax)):
        return replace(attributes, dim=_dim(attributes.dim))
    if isinstance(attributes, Normalize):
        # A row of size one changes no statistics.
        return replace(attributes, dims=tuple(map(_dim, attributes.dims)))
    if isinstance(attributes, Reduce):
        over_length = ROW in attributes.dims
        dims = (*map(_dim, attributes.dims), *([ROW] if over_length else []))
        # What is left of an image without its row is no image.
        rows = over_length or attributes.keepdim
        return replace(attributes, dims=tuple(sorted(dims))) if rows else None
    if isinstance(attributes, Expand) and len(attributes.shape) == ROW + 1:
        return replace(attributes, shape=_with_row(attributes.shape, 1))
    if isinstance(attributes, Pad):
        before, after = (_with_row(each, 0) for each in (attributes.before, attributes.after))
        return replace(attributes, before=before, after=after)
    return None
