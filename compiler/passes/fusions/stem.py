"""Takes the boundary into the first convolution: change of layout, cast and normalisation of the
user's image.

    conv2d(normalise(relayout(x)), w) => stem(x, w)                 "stem-loads": in its loads
    conv2d(normalise(relayout(x)), w) => conv2d(stem_input(x), w)   "stem-rows": in one input kernel

where `normalise` is any chain of additions and multiplications of constants per channel: two
numbers per channel in the end. The input kernel of the second form also adds a channel of zeros and
the columns of the border, so that the convolution copies whole filter rows, 128 bits at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ....kernels.contract.epilogue import Epilogue, apply_reference, broadcasts
from ....kernels.contract.op import Attributes, Problem
from ....kernels.contract.spec import Operand, TensorSpec
from ....kernels.fused import stem
from ....kernels.fused.stem import Stem
from ....kernels.fused.stem_input import StemInput
from ....kernels.movement import movement
from ....kernels.movement.movement import Relayout
from ....kernels.movement.pointwise import Pointwise, stage_of
from ....kernels.tile.conv_geometry import Conv2d
from ...fusion import estimate, overrides
from ...fusion.pattern import read_by_others
from ...graph.ir import INPUT, Graph, Node, Value
from ...graph.ledger import Ledger

LOADS = "conv2d(normalise(relayout(x)), w) => stem(x, w)"
ROWS = "conv2d(normalise(relayout(x)), w) => conv2d(stem_input(x), w)"
LABELS = {LOADS: "stem-loads", ROWS: "stem-rows"}
CHANNELS = 4
"""Of an image; those of a tensor with more are copied in blocks."""
VECTOR_BYTES = 16
AFFINE = ("add", "sub", "mul", "div", "neg", "identity")


@dataclass(frozen=True)
class Entrance:
    """A convolution, the input of the graph that it reads, and the conversions and pointwise nodes
    between them, sources first."""

    conv: Node
    image: Value
    between: tuple[Node, ...]

    @property
    def nodes(self) -> list[Node]:
        return [*self.between, self.conv]


@dataclass(frozen=True)
class Normalisation:
    """(x - mean) * scale, one number per channel; empty where the image is taken as it is."""

    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()


@dataclass(frozen=True)
class Form:
    """One way to compute an entrance: its kernels, and how to make it."""

    rule: str
    problems: tuple[Problem, ...]
    make: Callable[[], Value]
    saved_bytes: int
    forced: bool = False


def fuse_stem(graph: Graph, ledger: Ledger) -> Graph:
    """Replaces the conversions at the boundary that only a convolution of few channels reads.

    Precondition: dtypes and layouts are chosen. Of the two forms and what stands there the one that
    takes least time is taken; off the GPU, where kernels run to be verified, the one with
    the fewest kernels, and rather a new form than the old.
    """
    for node in graph.nodes():
        if node.op == "conv2d" and (entrance := find_entrance(graph, node)) is not None:
            _fuse(graph, entrance, ledger)
    return graph


def find_entrance(graph: Graph, conv: Node) -> Entrance | None:
    """The way from an input of the graph to the convolution, or None where something else is
    computed before it."""
    value, weight = graph.own_inputs(conv)
    if not graph.is_constant(weight):
        return None
    between: list[Node] = []
    while (node := graph.node(value.node)).op != INPUT:
        computed = [v for v in graph.inputs(node.name) if not graph.is_constant(v)]
        if not isinstance(node.attributes, (Relayout, Pointwise)) or len(computed) != 1:
            return None
        between.insert(0, node)
        (value,) = computed
    return Entrance(conv, value, tuple(between)) if between else None


def _fuse(graph: Graph, entrance: Entrance, ledger: Ledger) -> None:
    found = _why_not(graph, entrance) or _normalisation(graph, entrance)
    forms = []
    for rule, why_not, build in ((LOADS, _why_no_loads, _loads), (ROWS, _why_no_rows, _rows)):
        override = overrides.of(graph.goal, LABELS[rule], entrance.nodes)
        if isinstance(found, str):
            ledger.refuse(rule, entrance.nodes, found)
        elif (reason := why_not(graph, entrance.conv) or override.refusal) is not None:
            ledger.refuse(rule, entrance.nodes, reason)
        else:
            form = build(graph, entrance, found)
            forms.append(replace(form, forced=override.force is not None))
    if forms:
        _choose(graph, entrance, forms, ledger)


def _why_not(graph: Graph, entrance: Entrance) -> str | None:
    """What both forms ask of the convolution and of the nodes before it."""
    conv, image = entrance.conv, graph.spec(entrance.image)
    if image.rank != 4 or image.shape[1] > CHANNELS:
        return f"{entrance.image} {image} is not an image of at most {CHANNELS} channels"
    if conv.attributes.expect(Conv2d).groups != 1:
        return f"{conv.name} is grouped; only a convolution with groups=1 reads the image itself"
    kept = (image.dtype, graph.spec(graph.own_inputs(conv)[1]).dtype, torch.float32)
    following = [*entrance.nodes[1:]]
    for node, reader in zip(entrance.between, following, strict=True):
        others = [name for name, _ in graph.uses(Value(node.name))]
        others.remove(reader.name)  # Once: its epilogue may read the image too.
        if others:
            return read_by_others(node, others[0], reader)
        if node.spec.shape != image.shape:
            return f"{node.name} broadcasts {image} to {node.spec}; the image has to keep its shape"
        if node.spec.dtype not in kept:
            return f"{node.name} rounds to {node.spec.dtype} on the way, which the kernel does not"
    return None


# The normalisation.


def _normalisation(graph: Graph, entrance: Entrance) -> Normalisation | str:
    """What is done to the image as two numbers per channel, or why it is not that.

    An affine function is known by its values at 0 and 1.
    """
    channels = graph.spec(entrance.image).shape[1]
    one = TensorSpec((1, channels, 1, 1), torch.float64)
    at_0 = torch.zeros(one.shape, dtype=one.dtype)
    at_1 = torch.ones(one.shape, dtype=one.dtype)
    changed = False
    for node in entrance.nodes:
        stages, operands = _stages(graph, node, entrance)
        for stage in stages:
            if stage.name not in AFFINE or (stage.name == "div" and stage.reverse):
                return f"{stage} of {node.name} is not an addition or multiplication of constants"
        for value in operands:
            if not broadcasts(graph.spec(value), one):
                return f"{value} {graph.spec(value)} is not one number per channel"
        constants = tuple(graph.constant(value).detach().double() for value in operands)
        at_0 = apply_reference(stages, at_0, constants)
        at_1 = apply_reference(stages, at_1, constants)
        changed = changed or bool(stages)
    if not changed:
        return Normalisation()
    shift, scale = at_0.flatten(), (at_1 - at_0).flatten()
    mean = 0.0 - shift / scale
    if not (mean.isfinite() & scale.isfinite()).all():
        return "the image's normalisation multiplies a channel by zero, infinity or NaN"
    return Normalisation(tuple(mean.tolist()), tuple(scale.tolist()))


def _stages(graph: Graph, node: Node, entrance: Entrance) -> tuple[Epilogue, tuple[Value, ...]]:
    """What a node does to the image before the convolution, and the constants it reads."""
    if node is entrance.conv:
        return node.prologue, graph.prologue_operands(node)
    operands = graph.operands(node)
    if not isinstance(node.attributes, Pointwise):
        return node.epilogue, operands
    stage = stage_of(node.op, node.attributes)
    own = graph.own_inputs(node)
    constants = tuple(value for value in own if graph.is_constant(value))
    if graph.is_constant(own[0]):
        stage = replace(stage, reverse=not stage.reverse)
    return (stage, *node.epilogue), (*constants, *operands)


# The two forms.


def _why_no_loads(graph: Graph, conv: Node) -> str | None:
    weight = graph.spec(graph.own_inputs(conv)[1])
    terms, most = stem.terms(weight), stem.MOST_TERMS[weight.dtype]
    if terms > most:
        return f"sums of {terms} terms, loaded one by one, do not fit registers (at most {most})"
    return None


def _loads(graph: Graph, entrance: Entrance, found: Normalisation) -> Form:
    conv, image = entrance.conv, entrance.image
    weight = graph.own_inputs(conv)[1]
    attributes = Stem(conv.attributes.expect(Conv2d), found.mean, found.scale)

    def make() -> Value:
        inputs = (image, weight, *graph.operands(conv))
        stages, replaced = conv.epilogue, [conv, *entrance.between]
        made = graph.add("stem", inputs, attributes, epilogue=stages, like=replaced, rule=LOADS)
        graph.redirect(Value(conv.name), made)
        graph.remove([conv.name])
        return made

    asked = _problem(graph, "stem", attributes, (graph.spec(image), graph.spec(weight)), conv)
    return Form(LOADS, (asked,), make, _moved(graph, entrance))


def _why_no_rows(graph: Graph, conv: Node) -> str | None:
    weight = graph.spec(graph.own_inputs(conv)[1])
    attributes = conv.attributes.expect(Conv2d)
    zeros = CHANNELS - weight.shape[1]
    if zeros > 1:
        return f"{zeros} of {CHANNELS} channels would be zeros; the image needs 3 or 4 channels"
    if weight.shape[3] == 1 or attributes.dilation[1] != 1:
        return "the filter has one column or is dilated: its pixels do not lie side by side"
    if attributes.stride[1] * CHANNELS * weight.dtype.itemsize % VECTOR_BYTES:
        stride = attributes.stride[1]
        return f"with stride {stride} filter rows do not start at multiples of 128 bits"
    return None


def padded_width(conv: Conv2d, weight: TensorSpec, columns: int) -> int:
    """The width from which a convolution without padding at the sides makes `columns`, in whole
    vectors. The rounding adds no column: where there is one, the stride is even."""
    vector = VECTOR_BYTES // (CHANNELS * weight.dtype.itemsize)
    width = (columns - 1) * conv.stride[1] + weight.shape[3]
    return -(-width // vector) * vector


def _rows(graph: Graph, entrance: Entrance, found: Normalisation) -> Form:
    conv, image = entrance.conv, entrance.image
    weight = graph.own_inputs(conv)[1]
    spec = graph.spec(weight)
    geometry = conv.attributes.expect(Conv2d)
    top, bottom, left, _ = geometry.padding
    width = padded_width(geometry, spec, conv.spec.shape[3])
    first = StemInput(spec.dtype, CHANNELS, left, width, found.mean, found.scale)
    then = replace(geometry, padding=(top, bottom, 0, 0))

    def make() -> Value:
        padded = graph.add("stem_input", (image,), first, like=entrance.between, rule=ROWS)
        inputs = (padded, _with_zeros(graph, weight), *graph.operands(conv))
        rules = (*conv.rules, ROWS)
        graph.update(conv.name, attributes=then, prologue=(), rules=rules)
        graph.set_inputs(conv.name, inputs)
        return Value(conv.name)

    asked = _problem(graph, "stem_input", first, (graph.spec(image),))
    filters = spec.with_(shape=(spec.shape[0], CHANNELS, *spec.shape[2:]))
    product = _problem(graph, "conv2d", then, (asked.output.spec, filters), conv)
    saved = _moved(graph, entrance) - 2 * asked.output.spec.size_bytes
    return Form(ROWS, (asked, product), make, saved)


def _with_zeros(graph: Graph, weight: Value) -> Value:
    """The weight with channels of zeros up to those of the padded image."""
    spec = graph.spec(weight)
    zeros = CHANNELS - spec.shape[1]
    if not zeros:
        return weight
    tensor = F.pad(graph.constant(weight).detach(), (0, 0, 0, 0, 0, zeros))
    return graph.add_constant(tensor, weight.node, spec.dtype)


# The choice.


def _choose(graph: Graph, entrance: Entrance, forms: list[Form], ledger: Ledger) -> None:
    """Makes the best form, of those that are forced if there are any; and what stands there is left
    alone where it is better."""
    on_gpu = graph.goal is not None and graph.goal.target.is_gpu
    alternatives = [*(form.problems for form in forms), _as_it_is(graph, entrance)]
    status, costs = "", [float(len(each)) for each in alternatives]
    if on_gpu:
        status, costs = estimate.times_us(graph, alternatives)
    eligible = [at for at, form in enumerate(forms) if form.forced] or list(range(len(forms)))
    best = min(eligible, key=lambda at: costs[at])
    forced = forms[best].forced
    stays = costs[best] >= costs[-1] if on_gpu else costs[best] > costs[-1]
    taken, rival = (-1, "unfused") if stays and not forced else (best, LABELS[forms[best].rule])
    for at, form in enumerate(forms):
        if at == taken:
            made = form.make()
            graph.remove(node.name for node in reversed(entrance.between))
            ledger.accept(form.rule, entrance.nodes, made.node, max(0, form.saved_bytes))
        else:
            reason = _dearer(graph, status, costs[at], rival, costs[taken])
            ledger.refuse(form.rule, entrance.nodes, f"{rival} is forced" if forced else reason)


def _dearer(graph: Graph, status: str, mine: float, rival: str, rivals: float) -> str:
    """That a form costs more than its rival: in kernels, or in microseconds known by `status`."""
    target = estimate.target_of(graph)
    if not status:
        return f"{mine:.0f} kernels, but {rival} {rivals:.0f}"
    if target.is_emulated:
        return f"{status} slower than {rival} on {target.compiled_as}"
    return f"{status} {mine:.1f} us, but {rival} {rivals:.1f} us on {target.name}"


def _as_it_is(graph: Graph, entrance: Entrance) -> list[Problem]:
    """The kernels that stand there."""
    problems = []
    for node in entrance.nodes:
        if not _is_view(graph, node):
            specs = tuple(graph.spec(value) for value in graph.own_inputs(node))
            problems.append(_problem(graph, node.op, node.attributes, specs, node))
    return problems


def _is_view(graph: Graph, node: Node) -> bool:
    """Whether a conversion moves nothing: one channel or one pixel in the same dtype."""
    if not isinstance(node.attributes, Relayout) or node.epilogue:
        return False
    source = Operand.dense(graph.spec(graph.own_inputs(node)[0]))
    return movement.view_of(node.attributes, source, node.spec) is not None


def _moved(graph: Graph, entrance: Entrance) -> int:
    """Bytes of the tensors between the image and the convolution, written and read."""
    kept = (node for node in entrance.between if not _is_view(graph, node))
    return 2 * sum(node.spec.size_bytes for node in kept)


def _problem(
    graph: Graph,
    op: str,
    attributes: Attributes,
    inputs: tuple[TensorSpec, ...],
    like: Node | None = None,
) -> Problem:
    """An application with the epilogue of `like`, every tensor in a buffer of its own."""
    stages, values = (like.epilogue, graph.operands(like)) if like is not None else ((), ())
    operands = [graph.spec(value) for value in values]
    return estimate.problem(graph, op, attributes, stages, inputs, operands, chosen=True)
