"""Which nodes become one kernel: the choice among overlapping fusions of heavy ops.

A proposal is one place where several nodes could become one kernel. Rules that give a `build`
propose what they match, at every place; a proposer of another kind (siblings) brings its own. A
proposal is worth the modelled time it saves on the goal's machine: the kernels of the nodes one by
one, against the one fused kernel. Among proposals that share nodes the set that saves most in total
is taken (a maximum-weight set packing, solved exactly along the graph's order), not the first that
fits. Then the rewritten graph is searched again, until nothing is left to propose. Where tuning
records have timed all of the kernels that are compared, their times stand for the model's.

The tables of rules are collected in `passes/fuse.py`.

Off the GPU nothing is compared: there the fused kernels run to be verified, so the partition with
the fewest kernels is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ..kernels.op import Problem
from . import estimate, wishes
from .ir import Graph, Node
from .ledger import Ledger
from .pattern import Rule, by_root, bytes_saved, match, rules_for

FORCED_US = 1e9
"""What a forced proposal is worth: more than any that is not."""
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
        made = 0
        for at, proposal in enumerate(proposals):
            if at in chosen:
                made += proposal.make(graph, ledger)
            else:
                _refuse_loser(proposal, [proposals[other] for other in sorted(chosen)], ledger)
        if not made:
            break
    return graph


def propose_matches(rules: tuple[Rule, ...], graph: Graph, ledger: Ledger) -> list[Proposal]:
    """What the rules match, in the graph's order."""
    proposals = []
    index = by_root(rules)
    for node in graph.nodes():
        for rule in rules_for(node, index):
            found = match(graph, node, rule.pattern)
            if found is None:
                continue
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
            wish = wishes.of(graph.goal, proposal.label, proposal.nodes)
            worth_us, reason = _worth(graph, proposal)
            if wish.force is not None:
                worth_us, reason = FORCED_US, None
            reason = wish.refusal or reason
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
    machine = graph.goal.target.name
    return 0.0, f"{status} {together_us:.1f} us together, {apart_us:.1f} us apart on {machine}"


def _refuse_loser(proposal: Proposal, winners: Sequence[Proposal], ledger: Ledger) -> None:
    """Says which chosen proposals stood in the way, unless one of them is the same, only larger."""
    rivals = [winner for winner in winners if winner.names & proposal.names]
    if any(rival.label == proposal.label and rival.names > proposal.names for rival in rivals):
        return
    shown = ", ".join(f"{rival.label} at {rival.nodes[-1].name}" for rival in rivals)
    reason = f"another fusion of these nodes saves more: {shown}"
    ledger.refuse(proposal.rule, proposal.nodes, reason)


def best_disjoint(worths: Sequence[float], sets: Sequence[frozenset[str]]) -> frozenset[int]:
    """Indices of pairwise disjoint sets with the largest total worth.

    Walks the sets in order and keeps, for every set of names that later ones could still clash
    with, the best choice so far; equal totals keep the earlier choice. Exact while there are at
    most MOST_STATES such sets of names, which overlaps along a network do not exceed.
    """
    last = {name: at for at, names in enumerate(sets) for name in names}
    states: dict[frozenset[str], tuple[float, tuple[int, ...]]] = {frozenset(): (0.0, ())}
    for at, names in enumerate(sets):
        following: dict[frozenset[str], tuple[float, tuple[int, ...]]] = {}
        for taken, (worth, chosen) in states.items():
            options = [(taken, worth, chosen)]
            if not taken & names:
                options.insert(0, (taken | names, worth + worths[at], (*chosen, at)))
            for held, total, picks in options:
                open_names = frozenset(name for name in held if last[name] > at)
                if open_names not in following or total > following[open_names][0]:
                    following[open_names] = (total, picks)
        if len(following) > MOST_STATES:
            ranked = sorted(following.items(), key=lambda item: -item[1][0])
            following = dict(ranked[:MOST_STATES])
        states = following
    return frozenset(max(states.values(), key=lambda state: state[0])[1])
