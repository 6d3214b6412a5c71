"""Where captured nodes ended, as a graph for people: kernels, and what needs none.

A place is a step of the plan, a view, a concatenation written in place, an input or the outputs.
Conversions and views that no captured node asked for, and constants, are no places of their own;
what was removed or folded is shown at its nearest place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ...kernels import registry
from ...kernels.contract import scalars
from ..graph.ir import CONSTANT, INPUT, OUTPUT, Graph, Node
from ..graph.ledger import Snapshot, op_name
from ..graph.text import stages_text
from ..plan.plan import Plan, Step, TorchStep
from . import account as acc
from .account import KernelNode

# Families of ops, for colours; an op belongs to the first whose word is in its name.
KINDS = (
    ("convolution", ("conv", "bottleneck", "depthwise")),
    ("pooling", ("pool", "unpool")),
    ("linear", ("linear", "matmul", "mm")),
    ("normalisation", ("norm", "softmax")),
    ("reduction", ("mean", "sum", "amax", "amin", "norm", "var", "std")),
    ("movement", ("reshape", "flatten", "permute", "expand", "slice", "concat", "relayout",
                  "cast", "pad", "upsample")),
)  # fmt: skip
POINTWISE, OTHER = "pointwise", "other"
RANK = {kind: at for at, (kind, _) in enumerate(KINDS)} | {POINTWISE: len(KINDS)}


@dataclass(frozen=True)
class Places:
    """drawn: every place; edges: pairs of names of places. By captured node: kernel_of, what
    computes it; place_of, where it is drawn; holder_of, the final node that stands for it ("" for
    none). steps_of: the steps of each final node."""

    drawn: tuple[KernelNode, ...]
    edges: tuple[tuple[str, str], ...]
    kernel_of: Mapping[str, str]
    place_of: Mapping[str, str]
    holder_of: Mapping[str, str]
    steps_of: Mapping[str, tuple[Step, ...]]


def kind_of(op: str) -> str:
    if op in scalars.BY_NAME:
        return POINTWISE
    for kind, words in KINDS:
        if any(word in op for word in words):
            return kind
    return OTHER


def find_places(snapshot: Snapshot, plan: Plan) -> Places:
    """The places of a plan and of every captured node."""
    captured, final = snapshot.captured, snapshot.final
    steps_of = _steps_by_node(final, plan)
    holders = {origin: node for node in final.nodes() for origin in node.origins}
    names = [node.name for node in captured.compute_nodes()]
    holder_of = {name: holders[name].name if name in holders else "" for name in names}
    kept = {
        node.name for node in final.nodes() if node.op != CONSTANT
        and (node.op in (INPUT, OUTPUT) or node.origins or node.name in steps_of)
    }  # fmt: skip
    place_of, kernel_of = {}, {}
    for name in names:
        holder = holders.get(name)
        if holder is not None and holder.name in kept:
            place_of[name] = holder.name
        kernel_of[name] = _kernel_of(holder, steps_of, snapshot.kernels)
    # Inputs and the output node are places under their own names.
    placed = {n.name: n.name for n in captured.nodes() if n.op in (INPUT, OUTPUT)} | place_of
    for name in names:
        if name not in place_of:
            place_of[name] = placed[name] = _nearest(captured, name, placed)
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(place_of[name], []).append(name)
    drawn = tuple(
        place
        for node in final.nodes()
        if node.name in kept
        for place in _places_of(captured, node, steps_of.get(node.name, ()), members, snapshot)
    )
    drawn += tuple(
        _step_place(step, None, (), kind_of(getattr(step, "op", "")))
        for name, steps in steps_of.items()
        if name not in final
        for step in steps
    )
    edges = tuple(dict.fromkeys(_edges(final, kept, steps_of)))
    return Places(drawn, edges, kernel_of, place_of, holder_of, steps_of)


def _steps_by_node(final: Graph, plan: Plan) -> dict[str, tuple[Step, ...]]:
    """The steps of each final node; a concatenation has one for each input that must be copied,
    named "node.input"."""
    by_node: dict[str, list[Step]] = {}
    for step in plan.steps:
        name = step.name if step.name in final else step.name.rpartition(".")[0]
        by_node.setdefault(name, []).append(step)
    return {name: tuple(steps) for name, steps in by_node.items()}


def _kernel_of(
    holder: Node | None, steps_of: Mapping[str, tuple[Step, ...]], kernels: Mapping[str, str]
) -> str:
    if holder is None:
        return acc.REMOVED
    if holder.op == CONSTANT:
        return acc.CONSTANT
    if steps := steps_of.get(holder.name):
        return steps[-1].name
    return kernels.get(holder.name, acc.VIEW)


def _nearest(captured: Graph, name: str, place_of: Mapping[str, str]) -> str:
    """The place of the closest node before, or else after, one that is computed nowhere."""
    for neighbours in (captured.net.pred, captured.net.succ):
        seen, front = {name}, [name]
        while front:
            front = [near for at in front for near in neighbours[at] if near not in seen]
            seen.update(front)
            for near in front:
                if near in place_of:
                    return place_of[near]
    return OUTPUT


def _places_of(
    captured: Graph,
    node: Node,
    steps: tuple[Step, ...],
    members: Mapping[str, list[str]],
    snapshot: Snapshot,
) -> Iterator[KernelNode]:
    """The node's own place, after those of the copies that a concatenation needs."""
    for step in steps:
        if step.name != node.name:
            yield _step_place(step, None, (), "movement")
    nodes = tuple(members.get(node.name, ()))
    kinds = [kind_of(op_name(captured.node(name))) for name in nodes if name in node.origins]
    kind = min(kinds, key=lambda k: RANK.get(k, len(RANK)), default=kind_of(node.op))
    own = next((step for step in steps if step.name == node.name), None)
    if own is not None:
        yield _step_place(own, node, nodes, kind)
        return
    what = {INPUT: acc.INPUT, OUTPUT: acc.OUTPUT}.get(node.op)
    if what is None:
        what = acc.IN_PLACE if steps else snapshot.kernels.get(node.name, acc.VIEW)
    kind = what if node.op in (INPUT, OUTPUT) else kind
    shown = ", ".join(map(str, node.outputs))
    yield KernelNode(node.name, what, kind, node.op, shown, node.module_path, nodes)


def _step_place(step: Step, node: Node | None, nodes: tuple[str, ...], kind: str) -> KernelNode:
    common = (step.module_path, nodes)
    if isinstance(step, TorchStep):
        shown = ", ".join(str(place.operand.spec) for place in step.outputs)
        return KernelNode(step.name, acc.FALLBACK, OTHER, str(step.call), shown, *common)
    stages = stages_text(node) if node else ""
    shown = ", ".join(str(operand.spec) for operand in step.problem.outputs)
    cost = registry.get(step.op).cost(step.problem)
    return KernelNode(
        step.name, acc.KERNEL, kind, step.op, f"{step.op}{stages} -> {shown}", *common,
        launches=len(step.launches), size_bytes=cost.size_bytes, flops=cost.flops,
        config=f"{step.config} ({step.chosen_by})",
    )


def _edges(
    final: Graph, kept: set[str], steps_of: Mapping[str, tuple[Step, ...]]
) -> Iterator[tuple[str, str]]:
    """Data flow between places; nodes that are none are passed through."""
    for node in final.nodes():
        if node.name not in kept:
            continue
        steps = {step.name for step in steps_of.get(node.name, ())}
        for value in final.inputs(node.name):
            for source in _kept_sources(final, value.node, kept):
                copy = f"{node.name}.{value.node}"
                if copy in steps:
                    yield source, copy
                    yield copy, node.name
                else:
                    yield source, node.name


def _kept_sources(final: Graph, name: str, kept: set[str]) -> Iterator[str]:
    if name in kept:
        yield name
        return
    for value in final.inputs(name):
        yield from _kept_sources(final, value.node, kept)
