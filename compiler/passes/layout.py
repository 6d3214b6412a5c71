"""Decides once, for the whole graph, which dtype and which memory layout every tensor has.

Inside, images (rank 4) and volumes (rank 5) are NHWC and everything is in one dtype; the module's
own dtypes and torch's dense layout exist only at the boundary. A rank-5 tensor is a volume where an
op on volumes makes or reads it; others, such as the groups of a channel shuffle, stay dense.
Conversions that turn out to move nothing (one channel, one pixel) become views in the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from ...kernels.contract.op import Attributes, Epilogue
from ...kernels.contract.spec import MEMORY_FORMATS, Layout, Operand, TensorSpec
from ...kernels.movement import movement
from ...kernels.movement.movement import Relayout
from ...kernels.movement.pointwise import Pointwise, stage_of
from ...kernels.normalisation.batch_norm import BatchNorm
from ...kernels.normalisation.softmax import Softmax
from ...kernels.products.bmm import Bmm
from ..graph.ir import CONSTANT, INPUT, OUTPUT, TORCH, Graph, Node, Value
from ..graph.ledger import Ledger


def choose_dtype(graph: Graph, dtype: torch.dtype | None) -> Graph:
    """Computes in `dtype`; inputs are cast after they enter and outputs back before they leave.

    Whole numbers stay what they are, and so do constants that kernels read as fp32 in any case:
    rounded, a large running variance would be infinite. None leaves the graph as it is.
    """
    if dtype is None or all(
        spec.dtype is dtype for node in graph.nodes() for spec in node.outputs if _is_float(spec)
    ):
        return graph
    outputs = [(value, graph.spec(value).dtype) for value in graph.outputs()]
    exact = _of_whole_numbers(graph)
    for node in graph.nodes():
        read_as_float = node.op == CONSTANT and _is_of_stages(graph, Value(node.name))
        if node.op == INPUT or read_as_float or node.name in exact:
            continue
        specs = tuple(s.with_(dtype=dtype) if _is_float(s) else s for s in node.outputs)
        if not (isinstance(node.attributes, Bmm) and node.attributes.wide):
            stages = {
                "epilogue": _stages_in(dtype, node, node.epilogue),
                "prologue": _stages_in(dtype, node, node.prologue),
            }
            attributes = _attributes_in(dtype, node)
            graph.update(node.name, outputs=specs, attributes=attributes, **stages)
    for node in graph.graph_inputs():
        if node.spec.dtype is not dtype:
            converter = Relayout(node.spec.layout, dtype)
            _convert_readers(graph, Value(node.name), converter, lambda reader, slot: True)
    for name in exact:
        converter = Relayout(graph.node(name).spec.layout, dtype)
        _convert_readers(graph, Value(name), converter, partial(_computes_in_halves, graph, exact))
    returned = []
    for value, original in outputs:
        spec = graph.spec(value)
        if spec.dtype is not original and _can_store_as(graph, value):
            graph.update(value.node, outputs=(spec.with_(dtype=original),))
        elif spec.dtype is not original:
            value = graph.add("relayout", (value,), Relayout(spec.layout, original))
        returned.append(value)
    graph.set_inputs(OUTPUT, returned)
    return graph


def _of_whole_numbers(graph: Graph) -> set[str]:
    """What makes floats of whole numbers, moves them, or is made whole numbers of: float32 holds
    them, where halves would round an index or a count to another one."""
    exact: set[str] = set()
    for node in [node for node in graph.nodes() if node.is_compute]:
        inputs = graph.inputs(node.name)
        moves = node.definition.integers and all(value.node in exact for value in inputs)
        converts = isinstance(node.attributes, Relayout) and _is_whole(graph.spec(inputs[0]))
        readers = [graph.node(reader) for reader, _ in graph.uses(Value(node.name))]
        counts = all(isinstance(r.attributes, Relayout) and _is_whole(r.spec) for r in readers)
        stores = counts and node.definition.takes_epilogue and len(node.outputs) == 1
        if _is_float(node.spec) and (converts or moves or stores):
            exact.add(node.name)
    return exact


def _computes_in_halves(graph: Graph, exact: set[str], reader: str, slot: int) -> bool:
    floats = _is_float(graph.node(reader).spec)
    return floats and reader not in exact and not _is_stage(graph, reader, slot)


def _is_of_stages(graph: Graph, constant: Value) -> bool:
    """Whether only pointwise stages and batch normalisations read a constant."""
    return all(_is_stage(graph, reader, slot) for reader, slot in graph.uses(constant))


def _is_stage(graph: Graph, reader: str, slot: int) -> bool:
    """Whether an input is read as fp32 in any case."""
    node = graph.node(reader)
    if not node.is_compute:
        return False
    pointwise = isinstance(node.attributes, Pointwise)
    statistic = isinstance(node.attributes, BatchNorm) and slot > 0
    return pointwise or statistic or slot >= len(graph.own_inputs(node))


def _attributes_in(dtype: torch.dtype, node: Node) -> Attributes:
    """The node's attributes where it computes in `dtype`."""
    attributes = node.attributes
    if isinstance(attributes, Relayout) and _is_float(node.spec):
        return Relayout(attributes.layout, dtype)
    if isinstance(attributes, Softmax) and attributes.dtype is not None:
        return replace(attributes, dtype=dtype)
    if isinstance(attributes, Pointwise):
        (stage,) = _stages_in(dtype, node, (stage_of(node.op, attributes),))
        return replace(attributes, parameters=stage.parameters)
    return attributes


def _stages_in(dtype: torch.dtype, node: Node, stages: Epilogue) -> Epilogue:
    """Stages where they compute in `dtype`: infinities become its largest numbers, not those of the
    node's dtype, where nan_to_num is not told what to make of them."""
    if not any(stage.name == "nan_to_num" for stage in stages):
        return stages
    largest, other = torch.finfo(node.spec.dtype).max, torch.finfo(dtype).max
    changed = {largest: other, -largest: -other}
    return tuple(
        replace(stage, parameters=tuple(changed.get(n, n) for n in stage.parameters))
        if stage.name == "nan_to_num" else stage
        for stage in stages
    )  # fmt: skip


def _is_float(spec: TensorSpec) -> bool:
    return spec.dtype.is_floating_point


def _is_whole(spec: TensorSpec) -> bool:
    return spec.dtype in (torch.int32, torch.int64)


def _can_store_as(graph: Graph, value: Value) -> bool:
    """Whether the kernel that computes a returned value may as well store it in another dtype.

    Images are converted to the dense layout on their way out anyhow, if not written so.
    """
    node = graph.node(value.node)
    single = len(node.outputs) == 1 and len(graph.uses(value)) == 1
    if not (node.is_compute and single):
        return False
    images = node.spec.rank == 4 or node.spec.layout is Layout.NHWC
    return node.definition.writes_any or (node.definition.takes_epilogue and not images)


def _convert_readers(
    graph: Graph, value: Value, attributes: Relayout, computes: Callable[[str, int], bool]
) -> None:
    """Converts a value for those that compute with it; returned as it is, it stays as it is."""
    readers = [use for use in graph.uses(value) if use[0] != OUTPUT and computes(*use)]
    if not readers:
        return
    converted = graph.add("relayout", (value,), attributes)
    for reader, slot in readers:
        graph.net.remove_edge(value.node, reader, key=slot)
        graph.net.add_edge(converted.node, reader, key=slot, index=converted.index)


def choose_layout(graph: Graph, ledger: Ledger) -> Graph:
    """Makes every rank-4 activation NHWC, and inserts conversions where an op wants dense memory.

    Postcondition: rank-4 results of compute nodes are NHWC unless their op works on dense memory,
    follows tensors that are dense or writes what its readers want, and so are rank-5 results
    computed from volumes; graph inputs and outputs are dense.
    """
    converted: dict[tuple[Value, Layout], Value] = {}
    for node in graph.nodes():
        if node.op == OUTPUT:
            values = [_as(graph, v, Layout.DENSE, converted) for v in graph.inputs(OUTPUT)]
            graph.set_inputs(OUTPUT, values)
        elif node.op not in (INPUT, CONSTANT):
            _lay_out(graph, node, converted)
    return graph


def _wanted(spec: TensorSpec, ranks: tuple[int, ...]) -> Layout:
    return Layout.NHWC if spec.rank in ranks else Layout.DENSE


def _image_ranks(graph: Graph, node: Node) -> tuple[int, ...]:
    """Ranks of the tensors that are NHWC for a node."""
    if not (node.is_compute and node.definition.images):
        return ()
    # Shape rules say NHWC for what ops on volumes compute, whatever they read.
    specs = (*node.outputs, *(graph.spec(value) for value in graph.inputs(node.name)))
    has_volumes = any(spec.rank == 5 and spec.layout is Layout.NHWC for spec in specs)
    return (4, 5) if has_volumes else (4,)


def _lay_out(graph: Graph, node: Node, converted: dict[tuple[Value, Layout], Value]) -> None:
    if isinstance(node.attributes, Relayout):
        # A cast: it may as well produce the layout its readers want.
        readers = [graph.node(reader) for reader, _ in graph.uses(Value(node.name))]
        wanted = tuple(rank for reader in readers for rank in _image_ranks(graph, reader))
        layout = _wanted(node.spec, wanted)
        graph.update(
            node.name,
            attributes=Relayout(layout, node.attributes.dtype),
            outputs=(node.spec.with_(layout=layout),),
        )
        return
    if node.is_compute and node.definition.follows and _lay_out_alike(graph, node, converted):
        return
    ranks = _image_ranks(graph, node)
    packed = () if node.op == TORCH else tuple(node.definition.packs(node.attributes))
    # Kernels that do not read any layout want theirs of constants too; epilogues read any.
    asks = node.op != TORCH and not (node.is_compute and node.definition.follows)
    own = range(len(graph.own_inputs(node))) if asks else ()
    values = []
    for slot, value in enumerate(graph.inputs(node.name)):
        keep = slot in packed or (graph.is_constant(value) and slot not in own)
        layout = _wanted(graph.spec(value), ranks)
        values.append(value if keep else _as(graph, value, layout, converted))
    graph.set_inputs(node.name, values)
    if node.is_compute and node.definition.writes_any:
        ranks = ranks if _layout_read(graph, node) is Layout.NHWC else ()
    outputs = tuple(spec.with_(layout=_wanted(spec, ranks)) for spec in node.outputs)
    graph.update(node.name, outputs=outputs)


def _lay_out_alike(graph: Graph, node: Node, converted: dict[tuple[Value, Layout], Value]) -> bool:
    """Lays out a node that reads its inputs as they lie; False where it is to be as all others.

    A permutation makes the layout in which it is a view, or the one its readers want; a product is
    dense; anything else is dense where all its inputs of rank 4 are (tokens, attention).
    """
    own = graph.own_inputs(node)
    if node.definition.writes_any:
        layout = _layout_of_permuted(graph, node, graph.spec(own[0]))
    elif not node.definition.images:
        layout = Layout.DENSE
    else:
        values = [value for value in graph.inputs(node.name) if not graph.is_constant(value)]
        images = [value for value in values if graph.spec(value).rank == node.spec.rank]
        inside = all(graph.node(value.node).op != INPUT for value in images)
        dense = all(graph.spec(value).layout is Layout.DENSE for value in images)
        if node.spec.rank != 4 or not (images and inside and dense):
            return False
        layout = Layout.DENSE
    others = [
        value
        if graph.is_constant(value) or graph.spec(value).rank != node.spec.rank
        else _as(graph, value, layout, converted)
        for value in graph.inputs(node.name)[len(own) :]
    ]
    graph.set_inputs(node.name, (*own, *others))
    outputs = tuple(spec.with_(layout=layout) for spec in node.outputs)
    graph.update(node.name, outputs=outputs)
    return True


def _layout_of_permuted(graph: Graph, node: Node, x: TensorSpec) -> Layout:
    """The layout of a permutation's result: where it is a view, else where it is read."""
    rank = node.spec.rank
    choices = (Layout.NHWC, Layout.DENSE) if rank in MEMORY_FORMATS else (Layout.DENSE,)
    source = Operand.dense(x)
    for layout in choices:
        if movement.view_of(node.attributes, source, node.spec.with_(layout=layout)) is not None:
            return layout
    return _layout_read(graph, node)


def _layout_read(graph: Graph, node: Node) -> Layout:
    """The layout in which some reader wants a node's result."""
    readers = [graph.node(reader) for reader, _ in graph.uses(Value(node.name))]
    is_image = any(node.spec.rank in _image_ranks(graph, reader) for reader in readers)
    return Layout.NHWC if is_image else Layout.DENSE


def _as(
    graph: Graph, value: Value, layout: Layout, converted: dict[tuple[Value, Layout], Value]
) -> Value:
    spec = graph.spec(value)
    if spec.layout is layout:
        return value
    key = (value, layout)
    if key not in converted:
        source = graph.node(value.node)
        made = graph.add("relayout", (value,), Relayout(layout, spec.dtype))
        graph.update(made.node, module_path=source.module_path)
        converted[key] = made
    return converted[key]
