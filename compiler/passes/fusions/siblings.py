"""Merges convolutions (or linear layers) that read the same tensor into one wide one.

The weights are joined along the output channels; the results are slices, that is views, of the
wide result. One reading of the input instead of N, one kernel instead of N. Where their epilogues
differ, the stages after the common ones are limited to the columns of the convolutions they belong
to.

Where one of the results is the first or last part of a concatenation (Inception), the whole wide
result is written into a widened concatenation buffer, and the concatenation becomes a view of it:
    c = concat(a, ...),  a, b = siblings(x)   =>   wide = concat([b a], ...),  c = wide[b:]
so that no copy is needed although b is not part of c.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ....kernels.contract.epilogue import Epilogue, Stage, read_before
from ....kernels.contract.op import Problem
from ....kernels.contract.spec import TensorSpec
from ....kernels.movement.movement import Concat, Slice
from ....kernels.tile.conv_geometry import Conv2d
from ...fusion import estimate, overrides
from ...fusion.partition import Proposal
from ...graph.ir import Graph, Node, Value
from ...graph.ledger import Ledger

LABEL = "siblings"
RULE = "conv(x, w1), conv(x, w2), ... => slices of conv(x, [w1 w2 ...])"
CONCAT_RULE = "concat(slice(wide), ...) => slice(concat(wide, ...))"
BIAS = Stage("add")
VECTOR = 8
"""Slices start at multiples of this many channels, so that 128-bit accesses stay possible."""
MOST_STAGES = 32
"""Of the different chains that are merged, together: each is computed for all channels."""
LEAVE_OUT = 6
"""Groups of up to this many members are also proposed less one of them, which another fusion may
want. Of larger groups all or none are merged: what the others save weighs more than one member."""


def propose_siblings(graph: Graph, ledger: Ledger) -> list[Proposal]:
    """Every group of at least two siblings, and every small group less one of its members.

    Refused where a weight is shared, a stage reads something other than one constant per channel,
    the channels do not come in eights, or the user forbids it.
    """
    groups: dict[Any, list[Node]] = {}
    for node in graph.nodes():
        if node.op in ("conv2d", "linear") and (kind := _kind_of(graph, node)) is not None:
            groups.setdefault(kind, []).append(node)
    proposals = []
    for members in groups.values():
        allowed = []
        for node in members if len(members) > 1 else ():
            reason = overrides.of(graph.goal, LABEL, [node]).refusal or _why_not(graph, node)
            if reason is None:
                allowed.append(node)
            else:
                ledger.refuse(RULE, [node], reason)
        for subset in _with_few_ends(allowed, ledger):
            subsets = [subset]
            if 2 < len(subset) <= LEAVE_OUT:
                subsets += [[n for n in subset if n is not left_out] for left_out in subset]
            proposals += [_propose(graph, subset) for subset in subsets if len(subset) > 1]
    return proposals


def _with_few_ends(members: list[Node], ledger: Ledger) -> list[list[Node]]:
    """The members in groups of which each merges into a chain that is not too long."""
    groups: list[list[Node]] = [[]]
    ends: set[Epilogue] = set()
    for node in _by_end(members):
        if node.epilogue not in ends:
            stages = sum(map(len, ends)) + len(node.epilogue)
            if stages > MOST_STAGES and groups[-1]:
                reason = f"with its siblings' epilogues the merged one has {stages} stages"
                ledger.refuse(RULE, [node], f"{reason}, more than {MOST_STAGES}")
                groups.append([])
                ends.clear()
            ends.add(node.epilogue)
        groups[-1].append(node)
    return groups


def _by_end(members: list[Node]) -> list[Node]:
    """Members with equal chains side by side, in the order of the first of each: their stages are
    then one range of channels."""
    chains = [node.epilogue for node in members]
    return sorted(members, key=lambda node: chains.index(node.epilogue))


def _propose(graph: Graph, members: list[Node]) -> Proposal:
    make = partial(_make, [node.name for node in members])
    together = partial(_together, graph, members)
    return Proposal(RULE, LABEL, tuple(members), make, together)


def _make(names: list[str], graph: Graph, ledger: Ledger) -> bool:
    """Merges the members if they are all still there and still siblings."""
    if not all(name in graph for name in names):
        return False
    members = [graph.node(name) for name in names]
    kinds = {_kind_of(graph, node) for node in members}
    if len(kinds) > 1 or None in kinds or any(_why_not(graph, node) for node in members):
        return False
    _merge(graph, members, ledger)
    return True


def _together(graph: Graph, members: list[Node]) -> Problem:
    x, weight = graph.own_inputs(members[0])
    channels = sum(node.spec.shape[1] for node in members)
    spec = graph.spec(weight)
    wide = spec.with_(shape=(channels, *spec.shape[1:]))
    stages, values = _joint_epilogue(graph, members)
    operand = TensorSpec((channels, *(1 for _ in members[0].spec.shape[2:])), spec.dtype)
    op, attributes, specs = members[0].op, members[0].attributes, (graph.spec(x), wide)
    return estimate.problem(graph, op, attributes, stages, specs, [operand] * len(values))


def _kind_of(graph: Graph, node: Node) -> Any:
    """What siblings have in common, or None where the node is none."""
    x, weight = graph.own_inputs(node)
    grouped = isinstance(node.attributes, Conv2d) and node.attributes.groups != 1
    if grouped or node.prologue or not graph.is_constant(weight) or graph.is_constant(x):
        return None
    return x, node.op, node.attributes, graph.spec(weight).shape[1:]


def _why_not(graph: Graph, node: Node) -> str | None:
    weight = graph.own_inputs(node)[1]
    channels = graph.spec(weight).shape[0]
    if len(graph.uses(weight)) > 1:
        return f"the weight of {node.name} is shared; merged weights would hold it twice"
    if node.op == "linear" and node.spec.rank != 2:
        return f"{node.name} has rank {node.spec.rank}; linear layers are merged at rank 2"
    if channels % VECTOR:
        return f"{node.name} has {channels} channels, not a multiple of {VECTOR}, to be aligned"
    per_channel = (channels, *(1 for _ in node.spec.shape[2:]))
    for value in graph.operands(node):
        if not graph.is_constant(value) or graph.spec(value).shape != per_channel:
            return f"the epilogue of {node.name} reads {value}, not one constant per channel"
        if not graph.spec(value).dtype.is_floating_point:
            return f"the epilogue of {node.name} reads {value} {graph.spec(value)}, not numbers"
    return None


Part = tuple[Value | None, int]
"""A member's part of a joined constant (None: zeros), and its channels."""


def _joint_epilogue(graph: Graph, members: list[Node]) -> tuple[Epilogue, list[list[Part]]]:
    """One chain for all members, and the parts of each of its operands.

    What all begin with is done once (a missing bias is a bias of zeros); the rest of each chain is
    limited to the channels of the members it belongs to. Of a member that was merged before, stages
    are limited already: their channels move to where the member's lie.
    """
    widths = [node.spec.shape[1] for node in members]
    chains: list[list[tuple[Stage, tuple[Value | None, ...]]]] = [
        list(zip(node.epilogue, graph.stage_operands(node), strict=True)) for node in members
    ]
    biased = [bool(chain) and chain[0][0] == BIAS for chain in chains]
    if any(biased):
        pairs = zip(chains, biased, strict=True)
        chains = [chain if has else [(BIAS, (None,)), *chain] for chain, has in pairs]
    stages: list[Stage] = []
    parts: list[list[Part]] = []
    common = 0
    while all(len(chain) > common for chain in chains) and _is_common(
        [chain[common][0] for chain in chains]
    ):
        common += 1
    # What a stage reads again stays with it: between the rests of two chains stand others.
    while any(read_before(tuple(stage for stage, _ in chain), common) for chain in chains):
        common -= 1
    for _ in range(common):
        heads = [chain.pop(0) for chain in chains]
        stages.append(heads[0][0])
        columns = zip(*(values for _, values in heads), strict=True)
        parts += [list(zip(column, widths, strict=True)) for column in columns]
    bounds = [sum(widths[:at]) for at in range(len(widths) + 1)]
    for first, last in _runs([[stage for stage, _ in chain] for chain in chains]):
        for depth, (stage, _) in enumerate(chains[first]):
            start, stop = stage.channels or (0, bounds[last + 1] - bounds[first])
            channels = (bounds[first] + start, bounds[first] + stop)
            stages.append(replace(stage, channels=channels))
            for index in range(stage.operands):
                mine = [chain[depth][1][index] for chain in chains[first : last + 1]]
                values = [None] * first + mine + [None] * (len(members) - last - 1)
                parts.append(list(zip(values, widths, strict=True)))
    return tuple(stages), parts


def _is_common(stages: list[Stage]) -> bool:
    """Whether members' stages are one stage of all channels."""
    return stages[0].channels is None and all(stage == stages[0] for stage in stages)


def _runs(chains: list[list[Stage]]) -> list[tuple[int, int]]:
    """First and last index of every run of neighbours with equal chains, none of them limited to
    some channels."""
    runs: list[tuple[int, int]] = []
    for at, chain in enumerate(chains):
        limited = any(stage.channels for stage in chain)
        if runs and chains[runs[-1][0]] == chain and not limited:
            runs[-1] = (runs[-1][0], at)
        else:
            runs.append((at, at))
    return runs


def _joined(graph: Graph, parts: list[Part], like: torch.Tensor, stem: str) -> Value:
    """The parts as one constant, in the precision they are kept in."""
    rest = like.shape[1:]
    tensors = [
        torch.zeros(width, *rest, dtype=torch.float64)
        if value is None
        else graph.constant(value).double()
        for value, width in parts
    ]
    dtype = next(graph.spec(value).dtype for value, _ in parts if value is not None)
    return graph.add_constant(torch.cat(tensors), stem, dtype)


def _merge(graph: Graph, members: list[Node], ledger: Ledger) -> None:
    joint = _find_concat(graph, members)
    if joint is not None:
        # The concatenation's own part goes to the side where the rest of it follows.
        others = [node for node in members if node is not joint.partner]
        members = [*others, joint.partner] if joint.first else [joint.partner, *others]
    x = graph.own_inputs(members[0])[0]
    weights = [graph.own_inputs(node)[1] for node in members]
    widths = [node.spec.shape[1] for node in members]
    parts: list[Part] = list(zip(weights, widths, strict=True))
    weight = _joined(graph, parts, graph.constant(weights[0]), "siblings_weight")
    stages, columns = _joint_epilogue(graph, members)
    like = torch.empty(0, *(1 for _ in members[0].spec.shape[2:]))
    operands = [_joined(graph, column, like, "siblings_operand") for column in columns]
    wide = graph.add(
        members[0].op,
        (x, weight, *operands),
        members[0].attributes,
        epilogue=stages,
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
    if joint is not None:
        _widen_concat(graph, joint, wide, ledger)


@dataclass(frozen=True)
class _Joint:
    """A concatenation that begins (first) or ends with a member, its partner."""

    concat: Node
    partner: Node
    first: bool


def _find_concat(graph: Graph, members: list[Node]) -> _Joint | None:
    """The first concatenation that begins or ends with a member and can be widened."""
    partners = {node.name: node for node in members}
    for node in members:
        for reader, _ in graph.uses(Value(node.name)):
            concat = graph.node(reader)
            if concat.attributes != Concat(1) or not _can_widen(graph, concat):
                continue
            inputs = graph.inputs(reader)
            for value, first in ((inputs[0], True), (inputs[-1], False)):
                if value.node in partners:
                    return _Joint(concat, partners[value.node], first)
    return None


def _can_widen(graph: Graph, concat: Node) -> bool:
    """Its other parts lie at multiples of eight channels, and it is not itself joined elsewhere."""
    widths = [graph.spec(value).shape[1] for value in graph.inputs(concat.name)]
    readers = [graph.node(reader) for reader, _ in graph.uses(Value(concat.name))]
    nested = any(isinstance(reader.attributes, Concat) for reader in readers)
    returned = any(reader.op == "output" for reader in readers)
    return all(width % VECTOR == 0 for width in widths) and not nested and not returned


def _widen_concat(graph: Graph, joint: _Joint, wide: Value, ledger: Ledger) -> None:
    concat = joint.concat
    inputs = list(graph.inputs(concat.name))
    inputs[0 if joint.first else -1] = wide
    widened = graph.add("concat", inputs, Concat(1), like=[concat])
    others = graph.spec(wide).shape[1] - joint.partner.spec.shape[1]
    start = others if joint.first else 0
    view = graph.add("slice", (widened,), Slice(1, start, start + concat.spec.shape[1]))
    graph.update(view.node, module_path=concat.module_path)
    graph.redirect(Value(concat.name), view)
    ledger.accept(CONCAT_RULE, [concat], widened.node)
    graph.remove([concat.name])
