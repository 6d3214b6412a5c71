"""Ledger, graphs and plan -> `Account`: what every captured node costs alone and in its kernel.

"Alone" is the network without fusion: the required passes only, every op in a kernel of its own in
its default configuration. Both networks are modelled by the same machine
(`kernels/contract/cost_model.py`); where the target is not a GPU, or an emulated one, there are no
times: no machine would show them. A node is charged for the tensors it reads and writes; what it is
spared is what no kernel touches any more:

- its result, where every reader is computed in the same kernel;
- an input that its own kernel computes, or that another node of its kernel reads already;
- everything, where it needs no kernel.

The op that a kernel is named after gets what is left of the kernel's savings. So the savings of all
nodes add up to the difference of the two networks, but for conversions, which belong to no node.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import torch

from ...kernels import registry
from ...kernels.contract import cost_model
from ...kernels.contract.op import Problem
from ...kernels.contract.spec import Operand
from ...kernels.contract.targets import Target
from ...kernels.movement import movement
from ..graph.ir import CONSTANT, INPUT, OUTPUT, TORCH, Graph, Node, Value
from ..graph.ledger import Event, Ledger, Snapshot, op_name
from ..passes import LABELS, select
from ..passes.layout import choose_dtype, choose_layout
from ..plan.lower import is_movement
from ..plan.plan import KernelStep, Plan, Step
from . import account as acc
from .account import Account, KernelNode, Peaks, Record, Refusal, Totals
from .places import RANK, Places, find_places, kind_of


@dataclass(frozen=True)
class UnfusedOp:
    """One op of the network without fusion; views and torch fallbacks have no launches."""

    node: Node
    launches: int = 0
    size_bytes: int = 0
    us: float | None = 0.0
    is_view: bool = False


def make_account(ledger: Ledger, snapshot: Snapshot, plan: Plan) -> Account:
    captured = snapshot.captured
    dtype = captured.goal.dtype if captured.goal else None
    entering = (node.spec.dtype for node in captured.graph_inputs())
    computed_in = dtype or next(entering, torch.get_default_dtype())
    unfused = without_fusion(captured, dtype)
    alone = {a.node.name: a for a in _alone(unfused, plan.target, plan.precision)}
    places = find_places(snapshot, plan)
    steps_us = {step.name: step_time_us(step, plan.target) for step in plan.steps}
    machine = cost_model.machine_for(plan.target)
    rate = cost_model.product_rate(computed_in, plan.precision)
    account = Account(
        model=captured.name,
        target=plan.target.name,
        dtype=str(computed_in).removeprefix("torch."),
        batch=next((n.spec.batch or n.spec.shape[0] for n in captured.graph_inputs()
                    if n.spec.rank), None),
        machine=f"{machine.name} ({plan.target.name.removeprefix('cuda:')})",
        peaks=Peaks(machine.tensor_tflops * rate, machine.memory_gbps, machine.cache_gbps),
        measured_on="",
        totals=_totals(plan, list(alone.values()), steps_us),
        nodes=tuple(_records(ledger, snapshot, places, unfused, alone, steps_us)),
        places=tuple(_with_times(places.drawn, plan, steps_us)),
        edges=places.edges,
        events=tuple(replace(event, label=label_of(event)) for event in ledger.events),
    )  # fmt: skip
    return account if plan.target.has_times else _without_times(account)


def _without_times(account: Account) -> Account:
    """The account of a plan for no GPU: which kernels, and what they read and write."""
    unknown: dict[str, Any] = {"before": acc.UNKNOWN, "after": acc.UNKNOWN}
    return replace(
        account,
        machine="",
        peaks=None,
        totals=replace(account.totals, **unknown),
        nodes=tuple(replace(record, **unknown) for record in account.nodes),
        places=tuple(replace(p, modelled=acc.UNKNOWN, share=0.0) for p in account.places),
    )


def without_fusion(captured: Graph, dtype: torch.dtype | None) -> Graph:
    """The captured graph after the required passes only, without the values of its constants."""
    graph = captured.copy()
    graph.tensors = {
        node.name: torch.empty(node.spec.shape, dtype=node.spec.dtype, device="meta")
        for node in graph.nodes()
        if node.op == CONSTANT
    }
    unread = Ledger()
    for step in select("none"):
        if step.run is choose_layout:
            graph = choose_dtype(graph, dtype)
        graph = step.run(graph, unread)
    return graph


def _alone(graph: Graph, target: Target, precision: str) -> list[UnfusedOp]:
    """Every op of the graph by itself."""
    operands: dict[Value, Operand] = {}
    ops = []
    for node in graph.nodes():
        for index, spec in enumerate(node.outputs):
            operands[Value(node.name, index)] = Operand.dense(spec)
        if node.op in (INPUT, CONSTANT, OUTPUT):
            continue
        if node.op == TORCH:
            ops.append(UnfusedOp(node, us=None))
        elif (view := _view(graph, node, operands)) is not None:
            operands[Value(node.name)] = view
            ops.append(UnfusedOp(node, is_view=True))
        else:
            ops.append(_in_a_kernel(graph, node, operands, target, precision))
    return ops


def _view(graph: Graph, node: Node, operands: Mapping[Value, Operand]) -> Operand | None:
    """Where the node's result lies if it needs no kernel, as lowering decides it."""
    if not is_movement(node) or isinstance(node.attributes, movement.Concat):
        return None
    source = graph.inputs(node.name)[0]
    readers = [reader for reader, _ in graph.uses(Value(node.name))]
    if graph.is_constant(source) or readers == [OUTPUT]:
        return None
    return movement.view_of(node.attributes, operands[source], node.spec)


def _in_a_kernel(
    graph: Graph, node: Node, operands: Mapping[Value, Operand], target: Target, precision: str
) -> UnfusedOp:
    op = node.definition
    packed = op.packs(node.attributes)

    def read(value: Value, slot: int | None = None) -> Operand:
        # Constants stay fp32 unless their reader packs them, as in lowering.
        if graph.is_constant(value) and slot not in packed:
            return Operand.dense(graph.spec(value).with_(dtype=torch.float32))
        return operands[value]

    problem = Problem(
        node.op,
        node.attributes,
        tuple(read(value, slot) for slot, value in enumerate(graph.own_inputs(node))),
        tuple(map(Operand.dense, node.outputs)),
        node.epilogue,
        tuple(map(read, graph.operands(node))),
        precision=precision,
    )
    launches = op.launches(problem, op.default(problem, target), target)
    us = cost_model.problem_us(op, problem, target)
    return UnfusedOp(node, len(launches), op.cost(problem).size_bytes, us)


def step_time_us(step: Step, target: Target) -> float | None:
    """Modelled time of a step; None for a torch fallback, which has no model."""
    if not isinstance(step, KernelStep):
        return None
    return cost_model.problem_us(registry.get(step.op), step.problem, target)


def step_bytes(step: Step) -> int:
    """What a step reads and writes, each tensor once; 0 for a torch fallback."""
    if not isinstance(step, KernelStep):
        return 0
    return registry.get(step.op).cost(step.problem).size_bytes


def _totals(plan: Plan, alone: Sequence[UnfusedOp], steps_us: Mapping[str, float | None]) -> Totals:
    return Totals(
        kernels_before=sum(a.launches for a in alone),
        kernels_after=len(plan.kernels),
        bytes_before=sum(a.size_bytes for a in alone),
        bytes_after=sum(map(step_bytes, plan.steps)),
        before=acc.modelled(sum(a.us or 0.0 for a in alone)),
        after=acc.modelled(sum(us or 0.0 for us in steps_us.values())),
        measured=acc.UNKNOWN,
        torch_fallbacks=plan.torch_fallbacks,
    )


def _with_times(
    places: Sequence[KernelNode], plan: Plan, steps_us: Mapping[str, float | None]
) -> Iterator[KernelNode]:
    """The places, kernels with their modelled times and what these are mostly made of."""
    steps = {step.name: step for step in plan.steps if isinstance(step, KernelStep)}
    whole_us = sum(us or 0.0 for us in steps_us.values())
    for place in places:
        step = steps.get(place.name)
        if step is None or place.what != acc.KERNEL:
            yield place
            continue
        us, bound = steps_us[place.name], ""
        if plan.target.has_times:
            bound = cost_model.bound(registry.get(step.op), step.problem, plan.target)
        share = us / whole_us if us is not None and whole_us else 0.0
        yield replace(place, modelled=acc.modelled(us), share=share, bound=bound)


# Nodes.


NO_FIGURES: Mapping[str, Any] = {
    "bytes_before": 0, "bytes_saved": 0, "kernels_before": 0, "kernels_saved": 0,
    "before": acc.modelled(0.0), "after": acc.modelled(0.0),
}  # fmt: skip


def _records(
    ledger: Ledger,
    snapshot: Snapshot,
    places: Places,
    unfused: Graph,
    alone: Mapping[str, UnfusedOp],
    steps_us: Mapping[str, float | None],
) -> list[Record]:
    # A composite's figures stand at the last of the captured nodes it was put together from.
    order = {node.name: at for at, node in enumerate(snapshot.captured.nodes())}
    stands_at: dict[str, Mapping[str, Any]] = {}
    part_of: dict[str, str] = {}
    for name, figures in _figures(places, unfused, alone, steps_us).items():
        node = unfused.node(name)
        origins = [origin for origin in node.origins if origin in order]
        if not origins:
            continue
        last = max(origins, key=order.__getitem__)
        stands_at[last] = figures
        part_of |= {origin: node.op for origin in origins if origin != last}
    accepted, refused = ledger.by_node()
    return [
        Record(
            node=node.name,
            op=op_name(node),
            module_path=node.module_path,
            kernel=places.kernel_of[node.name],
            place=places.place_of[node.name],
            rules=tuple(dict.fromkeys(event.rule for event in accepted.get(node.name, ()))),
            refused=tuple(dict.fromkeys(map(_refusal, refused.get(node.name, ())))),
            part_of=part_of.get(node.name, ""),
            **stands_at.get(node.name, NO_FIGURES),
        )
        for node in snapshot.captured.compute_nodes()
    ]


def _refusal(event: Event) -> Refusal:
    return Refusal(event.rule, label_of(event), event.reason)


def label_of(event: Event) -> str:
    """The short name of the event's rule, or nothing where it has none."""
    return event.label or LABELS.all.get(event.rule, "")


def _figures(
    places: Places,
    unfused: Graph,
    alone: Mapping[str, UnfusedOp],
    steps_us: Mapping[str, float | None],
) -> dict[str, Mapping[str, Any]]:
    """What each node of the network without fusion costs and is spared, as fields of records."""
    # Nodes that were captured, by the final node that holds them; "" where none does.
    groups: dict[str, list[UnfusedOp]] = {}
    holders: dict[str, str] = {}
    for name, found in alone.items():
        origins = [origin for origin in found.node.origins if origin in places.holder_of]
        if origins:
            holders[name] = places.holder_of[origins[-1]]
            groups.setdefault(holders[name], []).append(found)
    saved = _bytes_saved(unfused, alone, holders, places.steps_of)
    figures: dict[str, Mapping[str, Any]] = {}
    for holder, members in groups.items():
        steps = places.steps_of.get(holder, ())
        launches = sum(len(s.launches) for s in steps if isinstance(s, KernelStep))
        times = [steps_us[step.name] for step in steps]
        us = None if None in times else sum(time for time in times if time is not None)
        whole = sum(member.us or 0.0 for member in members)
        # The op that a kernel is named after: a convolution before a normalisation.
        leader = min(members, key=lambda member: (
            RANK.get(kind_of(op_name(member.node)), len(RANK)), -(member.us or 0.0)
        ))  # fmt: skip
        # What no other node of the kernel is spared: parameters that were folded, operands that it
        # reads for them, and what rules save that change the op itself.
        others = sum(saved[member.node.name] for member in members if member is not leader)
        before = sum(member.size_bytes for member in members)
        saved[leader.node.name] = before - sum(map(step_bytes, steps)) - others
        for member in members:
            part = (member.us or 0.0) / whole if whole else 1.0 / len(members)
            figures[member.node.name] = {
                "bytes_before": member.size_bytes,
                "bytes_saved": saved[member.node.name],
                "kernels_before": member.launches,
                "kernels_saved": member.launches - (launches if member is leader else 0),
                "before": acc.modelled(member.us),
                "after": acc.modelled(None if us is None else us * part),
            }
    return figures


def _bytes_saved(
    graph: Graph,
    alone: Mapping[str, UnfusedOp],
    holders: Mapping[str, str],
    steps_of: Mapping[str, Sequence[Step]],
) -> dict[str, int]:
    """What each captured node of the graph without fusion is spared reading and writing."""
    # What moves nothing any more is looked through: its readers read its source.
    through = {
        name
        for name, found in alone.items()
        if found.is_view or (name in holders and not steps_of.get(holders[name]))
    }
    saved: dict[str, int] = {}
    already: set[tuple[str, Value]] = set()
    for name in nx.lexicographical_topological_sort(
        graph.net, key={name: at for at, name in enumerate(graph.net.nodes)}.__getitem__
    ):
        if name not in holders:
            continue
        holder, total = holders[name], 0
        copies = [step for step in steps_of.get(holder, ()) if step.name != holder]
        if name in through or copies:
            # Of a concatenation that is partly written in place, what is copied is not saved.
            saved[name] = alone[name].size_bytes - sum(map(step_bytes, copies))
            continue
        for value in dict.fromkeys(graph.inputs(name)):
            source = _source(graph, value, through)
            if graph.is_constant(source):
                continue
            if holders.get(source.node) == holder or (holder, source) in already:
                total += graph.spec(value).size_bytes
            already.add((holder, source))
        for index, spec in enumerate(graph.node(name).outputs):
            readers = _readers(graph, Value(name, index), through)
            if all(holders.get(reader) == holder for reader in readers):
                total += spec.size_bytes
        saved[name] = total
    return saved


def _source(graph: Graph, value: Value, through: set[str]) -> Value:
    """The value that is read in place of one that a vanished node would have made."""
    while value.node in through:
        inputs = graph.inputs(value.node)
        if len(inputs) != 1:
            break
        value = inputs[0]
    return value


def _readers(graph: Graph, value: Value, through: set[str]) -> set[str]:
    readers: set[str] = set()
    for reader, _ in graph.uses(value):
        if reader in through:
            for index in range(len(graph.node(reader).outputs)):
                readers |= _readers(graph, Value(reader, index), through)
        else:
            readers.add(reader)
    return readers
