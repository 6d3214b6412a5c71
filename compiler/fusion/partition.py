"""Which nodes become one kernel: the choice among overlapping fusions of heavy ops.

A proposal is one place where several nodes could become one kernel. Rules that give a `build`
propose what they match, at every place; a proposer of another kind (siblings) brings its own. A
proposal is worth the modelled time it saves on the goal's machine: the kernels of the nodes one by
one, against the one fused kernel. Among proposals that share nodes the set that saves most in total
is taken (a maximum-weight set packing, solved exactly along the graph's order), not the first that
fits. Then the rewritten graph is searched again, until nothing is left to propose. Where tuning
records have timed all of the kernels that are compared, their times stand for the model's.

The tables of rules are collected in `passes/fusions/fuse.py`.

Off the GPU nothing is compared: there the fused kernels run to be verified, so the partition with
the fewest kernels is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ...kernels.contract.op import Problem
from ..graph.ir import Graph, Node
from ..graph.ledger import Ledger
from . import estimate, overrides
from .pattern import Rule, by_root, bytes_saved, match, matches

FORCED_US, FORCED_NODE_US = 1e12, 1e6
"""What a forced proposal is worth, and each of its nodes: more than any that is not forced, and of
two forced ones over the same nodes the larger more, whatever else could be made of the rest."""
MOST_STATES = 4096
"""Partial choices kept while proposals are walked; beyond it the best ones are."""


@dataclass(frozen=True)
class Proposal:
    """Nodes that could become one kernel, sources first.

    make: rewrites the graph and writes to the ledger, unless the surroundings were rewritten so
    that it no longer can; says whether it did. together: the one kernel's problem.
    """

    rule: str
    label: str
    nodes: tuple[Node, ...]
    make: Callable[[Graph, Ledger], bool]
    together: Callable[[], Problem]
    worth_us: float = 0.0

    @property
    def names(self) -> frozenset[str]:
        return frozenset(node.name for node in self.nodes)


Proposer = Callable[[Graph, Ledger], Iterable[Proposal]]
"""Proposes what its kernels can express; what they cannot goes to the ledger, with the reason."""


def choose(
    graph: Graph, rules: tuple[Rule, ...], ledger: Ledger, proposers: Sequence[Proposer] = ()
) -> Graph:
    """Makes the best set of disjoint proposals, again and again until there are none."""
    everyone: list[Proposer] = [partial(propose_matches, rules), *proposers]
    while proposals := _worthwhile(graph, everyone, ledger):
        worths = [proposal.worth_us for proposal in proposals]
        chosen = best_disjoint(worths, [proposal.names for proposal in proposals])
        winners = {name: at for at in chosen for name in proposals[at].names}
        made = 0
        for at, proposal in enumerate(proposals):
            if at in chosen:
                made += proposal.make(graph, ledger)
                continue
            rivals = sorted({winners[name] for name in proposal.names if name in winners})
            _refuse_loser(proposal, [proposals[other] for other in rivals], ledger)
        if not made:
            break
    return graph


def propose_matches(rules: tuple[Rule, ...], graph: Graph, ledger: Ledger) -> list[Proposal]:
    """What the rules match, in the graph's order."""
    proposals = []
    index = by_root(rules)
    for node in graph.nodes():
        for rule, found in matches(graph, node, index):
            reason = rule.refusal(graph, found)
            if reason is not None:
                ledger.refuse(rule.name, found.consumed, reason)
                continue
            assert rule.build is not None, rule.name
            together = partial(estimate.fused_problem, graph, rule.build(graph, found))
            make = partial(_rewrite, rule, node.name)
            nodes = tuple(found.consumed)
            proposals.append(Proposal(rule.name, rule.label, nodes, make, together))
    return proposals


def _rewrite(rule: Rule, root: str, graph: Graph, ledger: Ledger) -> bool:
    """Applies a rule where it matched when it was proposed."""
    found = match(graph, graph.node(root), rule.pattern) if root in graph else None
    if found is None or rule.refusal(graph, found) is not None:
        return False
    saved, consumed = bytes_saved(found), found.consumed
    value = rule.apply(graph, found)
    ledger.accept(rule.name, consumed, value.node, saved)
    return True


def _worthwhile(graph: Graph, everyone: Sequence[Proposer], ledger: Ledger) -> list[Proposal]:
    """The proposals that save time and are not forbidden; the others are refused."""
    position = {node.name: at for at, node in enumerate(graph.nodes())}
    kept = []
    for proposer in everyone:
        for proposal in proposer(graph, ledger):
            override = overrides.of(graph.goal, proposal.label, proposal.nodes)
            worth_us, reason = _worth(graph, proposal)
            if override.force is not None:
                worth_us, reason = FORCED_US + FORCED_NODE_US * len(proposal.nodes), None
            reason = override.refusal or reason
            if reason is not None:
                ledger.refuse(proposal.rule, proposal.nodes, reason)
                continue
            kept.append(replace(proposal, worth_us=worth_us))
    return sorted(kept, key=lambda proposal: max(position[name] for name in proposal.names))


def _worth(graph: Graph, proposal: Proposal) -> tuple[float, str | None]:
    """Microseconds saved, and the reason against it where there are none."""
    if graph.goal is None or not graph.goal.target.is_gpu:
        return float(len(proposal.nodes) - 1), None
    apart = [estimate.problem_of(graph, node) for node in proposal.nodes if node.is_compute]
    status, times = estimate.times_us(graph, [[proposal.together()], apart])
    together_us, apart_us = times
    if together_us < apart_us:
        return apart_us - together_us, None
    if (target := graph.goal.target).is_emulated:
        return 0.0, f"{status} slower together than apart on {target.compiled_as}"
    return 0.0, f"{status} {together_us:.1f} us together, {apart_us:.1f} us apart on {target.name}"


def _refuse_loser(proposal: Proposal, rivals: Sequence[Proposal], ledger: Ledger) -> None:
    """Says which chosen proposals stood in the way, unless one of them is the same, only larger."""
    if any(rival.label == proposal.label and rival.names > proposal.names for rival in rivals):
        return
    shown = ", ".join(f"{rival.label} at {rival.nodes[-1].name}" for rival in rivals)
    reason = f"another fusion of these nodes saves more: {shown}"
    ledger.refuse(proposal.rule, proposal.nodes, reason)


Picks = tuple[int, Any] | None
"""A chosen index and the picks before it, which other states share."""


def best_disjoint(worths: Sequence[float], sets: Sequence[frozenset[str]]) -> frozenset[int]:
    """Indices of pairwise disjoint sets with the largest total worth.

    Walks the sets in order and keeps, for every group of later sets that a choice rules out, the
    best choice so far; equal totals keep the earlier choice. Exact while there are at most
    MOST_STATES such groups, which overlaps along a network do not exceed.
    """
    # Bit i of a key says that the set i places further on is ruled out.
    states: dict[int, tuple[float, Picks]] = {0: (0.0, None)}
    for at, clashes in enumerate(_later_clashes(sets)):
        following: dict[int, tuple[float, Picks]] = {}
        for ruled_out, (worth, picks) in states.items():
            options = [(ruled_out >> 1, worth, picks)]
            if not ruled_out & 1:
                options.insert(0, (ruled_out >> 1 | clashes, worth + worths[at], (at, picks)))
            for key, total, chosen in options:
                if key not in following or total > following[key][0]:
                    following[key] = (total, chosen)
        if len(following) > MOST_STATES:
            ranked = sorted(following.items(), key=lambda item: -item[1][0])
            following = dict(ranked[:MOST_STATES])
        states = following
    best = max(states.values(), key=lambda state: state[0])[1]
    chosen_indices = []
    while best is not None:
        at, best = best
        chosen_indices.append(at)
    return frozenset(chosen_indices)


def _later_clashes(sets: Sequence[frozenset[str]]) -> list[int]:
    """For each set the later ones that share a name with it: bit i for the one i + 1 further on."""
    found = [0] * len(sets)
    holders: dict[str, int] = {}  # Of each name, the later sets that hold it, as bits.
    for at in reversed(range(len(sets))):
        clashes = 0
        for name in sets[at]:
            clashes |= holders.get(name, 0)
            holders[name] = holders.get(name, 0) | 1 << at
        found[at] = clashes >> at + 1
    return found
