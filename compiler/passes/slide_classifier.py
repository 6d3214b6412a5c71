"""A classifier that slides over larger images in one run: its fully connected head becomes
convolutions.

A linear layer over flattened features (C, h, w) is a convolution with filters of h x w, without
padding and with stride 1; one over a vector is a 1x1 convolution; an average over the whole image
is a window of its size that moves by one pixel (J. Long, E. Shelhamer, T. Darrell, "Fully
convolutional networks", 2015; P. Sermanet et al., "OverFeat", 2013). All that the crops share is
then computed once.

The graph is captured at the size that the module was made for, where its code runs, and made again
for the larger one. Results per class become maps: (N, K) -> (N, K, P, Q).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NoReturn

from ...errors import InvalidInputError, UnsupportedOpError
from ...kernels.contract.op import Attributes
from ...kernels.contract.spec import TensorSpec
from ...kernels.movement.movement import Concat, Permute, Slice
from ...kernels.movement.pointwise import Pointwise
from ...kernels.movement.rearrangement import Expand, Reshape
from ...kernels.normalisation.normalize import Normalize
from ...kernels.normalisation.reduce import Reduce
from ...kernels.normalisation.softmax import Softmax
from ...kernels.pooling.pool_window import AdaptivePool2d, AvgPool2d, MaxPool2d
from ...kernels.pooling.upsample import CORNERS, Upsample, step_of
from ...kernels.tile.conv_geometry import Conv2d
from ..graph.ir import CONSTANT, INPUT, OUTPUT, Graph, Node, Value
from ..graph.ledger import Ledger
from .recognise import recognise_composites

SLIDING = frozenset((
    "conv2d", "border_conv2d", "conv_transpose2d", "max_pool2d", "avg_pool2d", "lp_pool2d",
    "median_pool2d", "max_pool2d_with_indices", "batch_norm", "local_response_norm", "pad",
))  # fmt: skip
"""Ops whose attributes do not depend on the size of the image."""
WHOLE_IMAGE = {
    "adaptive_avg_pool2d": AvgPool2d, "mean": AvgPool2d,
    "adaptive_max_pool2d": MaxPool2d, "amax": MaxPool2d,
}  # fmt: skip


@dataclass(frozen=True)
class _Slid:
    """A value of the new graph, and what it was. features: the (C, h, w) that a vector of the old
    graph held at every position; None where the new value is what the old one was."""

    value: Value
    features: tuple[int, int, int] | None = None


@dataclass
class _State:
    old: Graph
    new: Graph
    size: tuple[int, int]
    known: dict[Value, _Slid] = field(default_factory=dict)
    filters: dict[tuple[Value, tuple[int, ...]], Value] = field(default_factory=dict)


def slide_classifier(graph: Graph, size: tuple[int, int]) -> Graph:
    """The captured graph of a classifier, made again for images of `size` (height, width).

    Raises: InvalidInputError where `size` is no larger size of the module's one image;
    UnsupportedOpError naming the node whose meaning depends on the size of the image.
    """
    _check_size(graph, size)
    # Exported composites hold reshapes to the size of the image.
    old = recognise_composites(graph.copy(), Ledger())
    state = _State(old, Graph(output_tree=old.output_tree, name=old.name), size)
    for node in old.nodes():
        if node.op == OUTPUT:
            outputs = [state.known[value].value for value in old.outputs()]
            state.new.insert(node, outputs)
        elif node.op == INPUT:
            spec = node.spec.with_(shape=(*node.spec.shape[:2], *size))
            _know(state, node, state.new.insert(replace(node, outputs=(spec,))))
        elif node.op == CONSTANT:
            state.new.tensors[node.name] = old.tensors[node.name]
            _know(state, node, state.new.insert(node))
        else:
            _remake(state, node)
    state.new.remove_unread_constants()
    return state.new


def _check_size(graph: Graph, size: tuple[int, int]) -> None:
    pair = isinstance(size, (tuple, list)) and len(size) == 2
    if not pair or not all(isinstance(extent, int) for extent in size):
        raise InvalidInputError(f"slide: expected (height, width), got {size!r}")
    images = graph.graph_inputs()
    if len(images) != 1 or images[0].spec.rank != 4:
        listed = ", ".join(str(node.spec) for node in images)
        raise InvalidInputError(f"slide: expected a module of one image (N,C,H,W), got {listed}")
    least = images[0].spec.shape[2:]
    if size[0] < least[0] or size[1] < least[1]:
        raise InvalidInputError(
            f"slide: expected a size of at least {least}, that of the example; got {tuple(size)}"
        )


def _know(
    state: _State, node: Node, value: Value, features: tuple[int, int, int] | None = None
) -> None:
    """Notes what stands for the results of a node of the old graph."""
    for index in range(len(node.outputs)):
        state.known[Value(node.name, index)] = _Slid(Value(value.node, index), features)


def _refuse(node: Node, reason: str) -> NoReturn:
    where = f"'{node.module_path}'" if node.module_path else "the top module"
    raise UnsupportedOpError(f"slide: {where}: {node.op}({node.attributes}): {reason}")


def _add(
    state: _State, node: Node, op: str, inputs: list[Value], attributes: Attributes, *,
    whole: bool = True,
) -> Value:  # fmt: skip
    """One op of the new graph, for a node of the old one; `whole`: with its name and epilogue."""
    taken = not whole or node.name in state.new
    name = state.new.fresh_name(node.name) if taken else node.name
    epilogue = node.epilogue if whole else ()
    try:
        value = state.new.add(op, inputs, attributes, epilogue=epilogue, name=name)
    except InvalidInputError as error:
        _refuse(node, f"does not fit the larger image: {error}")
    state.new.update(value.node, module_path=node.module_path, origins=(value.node,))
    return value


def _remake(state: _State, node: Node) -> None:
    """The node as it is over larger images; UnsupportedOpError where it cannot be."""
    if not node.is_compute:
        _refuse(node, "no kernel for this op")
    given = [state.known[value] for value in state.old.inputs(node.name)]
    vector = next((slid.features for slid in given if slid.features is not None), None)
    make: Callable[[_State, Node, list[_Slid]], None]
    if all(state.new.is_constant(slid.value) or _follows(state, slid.value) for slid in given):
        make = _as_it_is
    elif vector is not None:
        make = _of_vectors
    else:
        make = _of_images
    make(state, node, given)


def _follows(state: _State, value: Value) -> bool:
    """Whether a value is computed from constants only."""
    node = state.new.node(value.node)
    if node.op in (INPUT, CONSTANT):
        return node.op == CONSTANT
    return all(_follows(state, source) for source in state.new.inputs(node.name))


def _as_it_is(state: _State, node: Node, given: list[_Slid]) -> None:
    inputs = [slid.value for slid in given]
    _know(state, node, _add(state, node, node.op, inputs, node.attributes))


# Images: (N, C, H, W).


def _of_images(state: _State, node: Node, given: list[_Slid]) -> None:
    attributes, x = node.attributes, state.old.spec(state.old.inputs(node.name)[0])
    across = isinstance(attributes, (Concat, Slice, Softmax)) and attributes.dim == 1
    if isinstance(attributes, Permute):  # Of the groups of a channel shuffle, say.
        across = attributes.dims[-2:] == (x.rank - 2, x.rank - 1)
    if isinstance(attributes, Normalize):  # Over the channels of every pixel.
        across = attributes.dims == (1,)
    if isinstance(attributes, Expand):
        across = attributes.shape[-2:] == (-1, -1)
    if isinstance(attributes, Reduce):
        across = attributes.dims == (1,) and attributes.keepdim
    if node.op in SLIDING or isinstance(attributes, Pointwise) or across:
        _as_it_is(state, node, given)
    elif isinstance(attributes, Upsample):
        _upsampled(state, node, given, x)
    elif isinstance(attributes, Normalize):
        _refuse(node, f"its statistics join pixels of the whole image {x}")
    elif isinstance(attributes, (AdaptivePool2d, Reduce)):
        _whole_image(state, node, given, x)
    elif isinstance(attributes, Reshape):
        _reshaped(state, node, given, x)
    else:
        _refuse(node, "its meaning depends on the size of the image")


def _upsampled(state: _State, node: Node, given: list[_Slid], x: TensorSpec) -> None:
    """Upsampling by a scale goes on by that scale, whose fp32 step a given size has as well."""
    attributes = node.attributes.expect(Upsample)
    if attributes.rule == CORNERS:
        _refuse(node, "align_corners looks for the corners of the whole image")
    size = []
    now = state.new.spec(given[0].value).shape[2:]
    for old, made, step, new in zip(
        x.shape[2:], attributes.size, attributes.steps, now, strict=True
    ):
        if step != step_of(old, made, None, attributes.rule) or new * made % old:
            _refuse(node, f"{new} pixels do not become a whole number as {old} become {made}")
        size.append(new * made // old)
    resized = replace(attributes, size=tuple(size))
    value = _add(state, node, node.op, [slid.value for slid in given], resized)
    _know(state, node, value)


def _whole_image(state: _State, node: Node, given: list[_Slid], x: TensorSpec) -> None:
    """A reduction of the whole image becomes that of a window as large as the image was."""
    window = (x.shape[2], x.shape[3])
    attributes, keeps = node.attributes, True
    if isinstance(attributes, AdaptivePool2d):
        if attributes.size == window:
            state.known[Value(node.name)] = given[0]
            return
        reduces = attributes.size == (1, 1)
    else:
        reduction = attributes.expect(Reduce)
        reduces, keeps = reduction.dims == (2, 3), reduction.keepdim
    if not reduces or node.op not in WHOLE_IMAGE:
        _refuse(node, f"only an average or maximum of the whole image slides, not one of {x}")
    make = WHOLE_IMAGE[node.op]
    op = "avg_pool2d" if make is AvgPool2d else "max_pool2d"
    value = _add(state, node, op, [slid.value for slid in given], make(kernel=window))
    _know(state, node, value, None if keeps else (x.shape[1], 1, 1))


def _reshaped(state: _State, node: Node, given: list[_Slid], x: TensorSpec) -> None:
    """Flattened features are looked at again when a linear layer reads them; a reshape that leaves
    the pixels alone (a channel shuffle) does so with more of them."""
    shape = node.spec.shape
    pixels = x.shape[-2:]
    if x.rank == 4 and shape == (x.shape[0], x.numel // x.shape[0]):
        features = (x.shape[1], x.shape[2], x.shape[3])
        state.known[Value(node.name)] = _Slid(given[0].value, features)
    elif len(shape) >= 3 and shape[-2:] == pixels:
        now = state.new.spec(given[0].value).shape[-2:]
        made = _add(state, node, "reshape", [given[0].value], Reshape((*shape[:-2], *now)))
        _know(state, node, made)
    else:
        _refuse(node, f"from {x} depends on the size of the image")


# Vectors: (N, C·h·w), each of them now a window of (N, C, H, W).


def _of_vectors(state: _State, node: Node, given: list[_Slid]) -> None:
    features = next(slid.features for slid in given if slid.features is not None)
    attributes = node.attributes
    if node.op == "linear" and given[0].features is not None:
        _convolve(state, node, given)
    elif isinstance(attributes, Pointwise) and len(given) == 1:
        value = _add(state, node, node.op, [given[0].value], attributes)
        _know(state, node, value, features)
    elif features[1:] != (1, 1):
        _refuse(node, f"reads features {features} that no linear layer has made a vector of")
    elif isinstance(attributes, Reshape):
        _unflatten(state, node, given[0], features)
    elif (
        isinstance(attributes, Pointwise)
        or node.op == "batch_norm"
        or (isinstance(attributes, (Concat, Slice, Softmax)) and attributes.dim == 1)
    ):
        inputs = [_per_channel(state, node, slid) for slid in given]
        value = _add(state, node, node.op, inputs, attributes)
        _know(state, node, value, (node.spec.shape[1], 1, 1))
    else:
        _refuse(node, "cannot be done at every position of a map")


def _unflatten(state: _State, node: Node, x: _Slid, features: tuple[int, int, int]) -> None:
    """(N, C) -> (N, C, 1, 1) is what the map is already; (N, C) -> (N, C) is nothing at all."""
    shape = node.spec.shape
    if shape[1:] not in ((features[0],), (features[0], 1, 1)):
        _refuse(node, f"takes a vector of {features[0]} features apart")
    state.known[Value(node.name)] = _Slid(x.value, features if len(shape) == 2 else None)


def _per_channel(state: _State, node: Node, slid: _Slid) -> Value:
    """An input of an op on vectors: constants of one number per feature become (C, 1, 1)."""
    spec = state.new.spec(slid.value)
    if slid.features is not None or node.op == "batch_norm" or spec.rank == 0:
        return slid.value
    if spec.rank == 1 and _follows(state, slid.value):
        shape = Reshape((*spec.shape, 1, 1))
        return _add(state, node, "reshape", [slid.value], shape, whole=False)
    _refuse(node, f"joins features with {spec}, which is no vector of this image")


def _convolve(state: _State, node: Node, given: list[_Slid]) -> None:
    """The linear layer as a convolution whose filters are as large as the features it reads."""
    x, w, *others = given
    features = x.features
    assert features is not None
    key = (w.value, features)
    if key not in state.filters:
        shape = Reshape((state.new.spec(w.value).shape[0], *features))
        if state.new.is_constant(w.value):
            tensor = state.new.constant(w.value).reshape(shape.shape)
            source = state.new.node(w.value.node)
            made = state.new.add_constant(tensor, source.module_path, source.spec.dtype)
        else:
            made = _add(state, node, "reshape", [w.value], shape, whole=False)
        state.filters[key] = made
    operands = [_per_channel(state, node, slid) for slid in others]
    inputs = [x.value, state.filters[key], *operands]
    value = _add(state, node, "conv2d", inputs, Conv2d())
    _know(state, node, value, (node.spec.shape[-1], 1, 1))
