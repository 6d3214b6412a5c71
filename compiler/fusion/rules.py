"""The fusions of pointwise work into the ops around it, as a list of declarative rules.

Priority is position in the list. To add a fusion, add a `Rule`: the generic tests (it fires on its
example, keeps the meaning, leaves a valid graph, is idempotent, does not fire when an inner tensor
has another reader, refuses its near misses for the stated reason) run on it by themselves.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...kernels import registry
from ...kernels.contract.epilogue import Epilogue, Stage
from ...kernels.contract.spec import FLOAT_DTYPES, Layout, TensorSpec
from ...kernels.movement.movement import FlattenPixels
from ...kernels.movement.pointwise import Pointwise, stage_of
from ...kernels.tile.conv_geometry import Conv2d
from ..graph.ir import INPUT, Graph, Node, Value
from .pattern import Call, Constant, Match, Rule, Var, absorb

HEAVY = ("conv2d", "linear")
PRODUCTS = (*HEAVY, "conv3d", "conv_transpose2d", "conv_transpose3d")
"""Matrix products: what reads them is fused into them, not into what stands beside them."""
MOST_STAGES = 64
"""Of one epilogue: each may read a tensor, and a launch takes 4 kB of pointers and sizes."""
UNARY = tuple(s.name for s in registry.SCALARS if s.operands == 1)
"""Functions of one value; `identity` may be a chain of others."""
BINARY = tuple(s.name for s in registry.SCALARS if s.operands == 2)
WHERE = ("where", "where_first", "where_second")
"""The choice, as a stage of each of its operands."""
POINTWISE = (*UNARY, *BINARY, "where")


ANCHORS = tuple(op.name for op in registry.OPS if op.takes_epilogue)


def _same_output(graph: Graph, found: Match) -> str | None:
    """An epilogue may not enlarge its anchor's output, nor change its dtype."""
    anchor, root = found.nodes["anchor"], found.root
    if len(anchor.outputs) != 1:
        return f"{anchor.name} has several results; an epilogue changes a single one"
    if anchor.spec.shape != root.spec.shape:
        return f"{root.name} broadcasts {anchor.spec} to {root.spec}; epilogues keep the shape"
    kinds = (anchor.spec.dtype, root.spec.dtype)
    if kinds[0] is not kinds[1] and torch.bool not in kinds:
        return f"{root.name} changes the dtype, {anchor.spec.dtype}; epilogues keep it"
    if root.spec.dtype is torch.bool and not isinstance(anchor.attributes, Pointwise):
        return f"{root.name} makes booleans, which {anchor.op} does not store"
    if len(anchor.epilogue) + 1 + len(root.epilogue) > MOST_STAGES:
        return f"with {root.name} the epilogue of {anchor.name} has more than {MOST_STAGES} stages"
    return None


def stages_of(node: Node, at: int = 0) -> Epilogue:
    """A pointwise node, as a stage of its operand `at`, and its epilogue."""
    if node.op == "identity":
        return node.epilogue
    stage = stage_of(node.op, node.attributes.expect(Pointwise))
    if node.op == "where":
        stage = replace(stage, name=WHERE[at])
    elif at:
        stage = replace(stage, reverse=not stage.reverse)
    return (stage, *node.epilogue)


def _append(graph: Graph, found: Match, stages: Epilogue, others: tuple[Value, ...] = ()) -> Value:
    """The anchor with the root's stages, of which the first reads the others, after its own."""
    anchor, root = found.nodes["anchor"], found.root
    inputs = (
        *graph.own_inputs(anchor),
        *graph.operands(anchor),
        *others,
        *graph.operands(root),
        *graph.prologue_operands(anchor),
    )
    outputs = (anchor.spec.with_(dtype=root.spec.dtype),)
    epilogue = (*anchor.epilogue, *stages)
    return absorb(graph, found, anchor.name, inputs, epilogue=epilogue, outputs=outputs)


def append(graph: Graph, found: Match) -> Value:
    """Fuses a function of the anchor, whichever of its operands that is."""
    root, own = found.root, graph.own_inputs(found.root)
    at = own.index(Value(found.nodes["anchor"].name))
    return _append(graph, found, stages_of(root, at), (*own[:at], *own[at + 1 :]))


def append_cast(graph: Graph, found: Match) -> Value:
    """Fuses the conversion of booleans into numbers, which they are in a chain."""
    return _append(graph, found, (Stage("identity"), *found.root.epilogue))


def _cast_guard(graph: Graph, found: Match) -> str | None:
    anchor, root = found.nodes["anchor"], found.root
    if anchor.spec.dtype is not torch.bool:
        return f"{root.name} rounds {anchor.spec}, or lays it out anew"
    if root.spec.dtype not in FLOAT_DTYPES:
        return f"{root.name} makes whole numbers, which no chain of functions has"
    if anchor.spec.layout is not root.spec.layout:
        return f"{root.name} lays {anchor.spec} out anew"
    return _same_output(graph, found)


def _image(graph: Graph, before: Node) -> int | None:
    """Which input of a pointwise node is the image; the other one broadcasts."""
    shapes = [graph.spec(value).shape for value in graph.own_inputs(before)]
    return shapes.index(before.spec.shape) if before.spec.shape in shapes else None


def _per_channel(spec: TensorSpec, per_image: bool) -> bool:
    """Whether a tensor has one number per channel, or per image and channel where those may be."""
    ends = spec.rank in (3, 4) and spec.shape[-2:] == (1, 1)
    return spec.numel == 1 or (ends and (per_image or spec.rank == 3 or spec.shape[0] == 1))


def _prologue_guard(graph: Graph, found: Match) -> str | None:
    """A prologue runs once per tap and output tile: only a 1x1 filter reads each element once."""
    conv, root = found.root, found.nodes["before"]
    weight = graph.spec(graph.own_inputs(conv)[1])
    if conv.prologue:
        return f"{conv.name} already has a prologue, and its kernel applies one"
    if weight.shape[2:] != (1, 1):
        r, s = weight.shape[2:]
        return f"{conv.name}, which is not 1x1, would recompute {root.name} for {r}x{s} taps"
    if weight.shape[1] != root.spec.shape[1]:
        return f"{conv.name} is grouped; only convolutions with groups=1 have prologues"
    if (image := _image(graph, root)) is None:
        return f"{root.name} broadcasts its inputs: none of them has the shape of its result"
    if graph.spec(graph.own_inputs(root)[image]).dtype is not root.spec.dtype:
        return f"{root.name} makes {root.spec.dtype} of another type; {conv.name} multiplies one"
    # One number per image and channel needs rows of the product that are pixels of the image.
    in_place = conv.attributes == Conv2d()
    own = graph.own_inputs(root)
    for value in (*own[:image], *own[image + 1 :], *graph.operands(root)):
        spec = graph.spec(value)
        if not _per_channel(spec, in_place):
            per = "per channel" if not _per_channel(spec, True) else "per channel for all images"
            return f"{value} {spec}, which a prologue would read, is not one number {per}"
    return None


def sink_into_prologue(graph: Graph, found: Match) -> Value:
    """conv2d(f(x)) with f applied while x is read; the zero border stays zero after f."""
    conv, before = found.root, found.nodes["before"]
    image = _image(graph, before)
    assert image is not None
    own = graph.own_inputs(before)
    inputs = (
        own[image],
        *graph.own_inputs(conv)[1:],
        *graph.operands(conv),
        *own[:image],
        *own[image + 1 :],
        *graph.operands(before),
    )
    return absorb(graph, found, conv.name, inputs, prologue=stages_of(before, image))


def _epilogue_rules(kind: str, anchors: tuple[str, ...]) -> tuple[Rule, ...]:
    """Rules for a function of an op, and of an op and a number or other tensors."""
    anchor, a, b, c, r = Call(anchors, name="anchor"), *map(Var, "abcr")
    patterns = {
        f"f({kind}(x)) => {kind}(x, epilogue=[f])": Call(UNARY, anchor),
        f"f({kind}(x), literal) => {kind}(x, epilogue=[f literal])": Call(BINARY, anchor),
        f"f({kind}(x), r) => {kind}(x, epilogue=[f r])": Call(BINARY, anchor, r),
        f"f(r, {kind}(x)) => {kind}(x, epilogue=[reversed f r])": Call(BINARY, r, anchor),
        f"where(c, {kind}(x), b) => {kind}(x, epilogue=[where_first c b])": (
            Call("where", c, anchor, b)
        ),
        f"where(c, a, {kind}(x)) => {kind}(x, epilogue=[where_second c a])": (
            Call("where", c, a, anchor)
        ),
    }
    return tuple(
        Rule(name, pattern, append, _same_output, label="epilogue")
        for name, pattern in patterns.items()
    )


EPILOGUE_RULES = (
    *_epilogue_rules("heavy", PRODUCTS),
    *_epilogue_rules("op", ANCHORS),
    Rule(
        "where(op(x), a, b) => op(x, epilogue=[where a b])",
        Call("where", Call(ANCHORS, name="anchor"), Var("a"), Var("b")),
        append,
        _same_output,
        label="epilogue",
    ),
    Rule(
        "float(op(x)) => op(x, epilogue=[identity])",
        Call("relayout", Call(POINTWISE, name="anchor")),
        append_cast,
        _cast_guard,
        label="epilogue",
    ),
)


def _flatten_guard(graph: Graph, found: Match) -> str | None:
    """Permuting the weight's columns is free unless someone else reads them in the old order."""
    weight = found.values["w"]
    image = graph.spec(found.values["x"])
    if graph.node(found.values["x"].node).op == INPUT:
        return "the image is an input in NCHW order: flattening it is a view already"
    rows = (image.shape[0], image.numel // image.shape[0])
    is_image = image.rank == 4 or (image.rank == 5 and image.layout is Layout.NHWC)
    if not is_image or found.nodes["flat"].spec.shape != rows:
        return f"{found.nodes['flat'].name} does not flatten an image to one row per sample"
    if len(graph.uses(weight)) > 1:
        return f"the weight {weight} is shared; its columns can be permuted for one layer only"
    return None


def flatten_in_memory_order(graph: Graph, found: Match) -> Value:
    """linear over (H, W, C) columns: the flattening is then a view of an NHWC image."""
    root, image, weight = found.root, found.values["x"], found.values["w"]
    tensor = graph.constant(weight)
    pixels = tensor.reshape(-1, *graph.spec(image).shape[1:])
    columns = pixels.movedim(1, -1).reshape(tensor.shape)
    permuted = graph.add_constant(columns, weight.node, graph.spec(weight).dtype)
    flat = graph.add("flatten_pixels", (image,), FlattenPixels(), like=[found.nodes["flat"]])
    inputs = (flat, permuted, *graph.inputs(root.name)[2:])
    graph.set_inputs(root.name, inputs)
    graph.remove([found.nodes["flat"].name])
    return Value(root.name)


FLATTEN_RULES = (
    Rule(
        "linear(reshape(x), w) => linear(flatten_pixels(x), w with permuted columns)",
        Call("linear", Call("reshape", Var("x"), name="flat"), Constant("w")),
        flatten_in_memory_order,
        _flatten_guard,
        label="flatten",
    ),
)
PROLOGUE_RULES = (
    Rule(
        "conv2d(f(x), w) => conv2d(x, w, prologue=[f])",
        Call("conv2d", Call(POINTWISE, name="before"), Var("w")),
        sink_into_prologue,
        _prologue_guard,
        label="prologue",
    ),
)
