"""Which nodes become one kernel: the choice among overlapping fusions of heavy ops.

Every rule that gives a `build` proposes what it matches, at every place. A proposal is worth the
modelled time it saves on the goal's machine: the kernels of the matched nodes one by one, against
the one fused kernel. Among proposals that share nodes the set that saves most in total is taken
(a maximum-weight set packing, solved exactly along the graph's order), not the first that fits.
Then the rewritten graph is searched again, until nothing is left to propose.

The tables of rules are collected in `passes/fuse.py`.

Off the GPU nothing is compared: there the fused kernels run to be verified, so the partition with
the fewest kernels is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import estimate, wishes
from .ir import Graph, Node
from .ledger import Ledger
from .pattern import Fused, Match, Rule, bytes_saved, match

FORCED_US = 1e9
"""What a forced proposal is worth: more than any that is not."""
MOST_STATES = 4096
"""Partial choices kept while proposals are walked; beyond it the best ones are."""


@dataclass(frozen=True)
class Proposal:
    """One match that a rule would rewrite, and what that is worth."""

    rule: Rule
    found: Match
    worth_us: float
    account: str

    @property
    def names(self) -> frozenset[str]:
        return frozenset(node.name for node in self.found.consumed)


def choose(graph: Graph, rules: tuple[Rule, ...], ledger: Ledger) -> Graph:
    """Rewrites the best set of disjoint proposals until there are none."""
    while proposals := propose(graph, rules, ledger):
        chosen = best_disjoint(
            [proposal.worth_us for proposal in proposals],
            [proposal.names for proposal in proposals],
        )
        made = 0
        for at, proposal in enumerate(proposals):
            if at in chosen:
                made += _make(graph, proposal, ledger)
            else:
                _refuse_loser(proposal, [proposals[other] for other in chosen], ledger)
        if not made:
            break
    return graph


def propose(graph: Graph, rules: tuple[Rule, ...], ledger: Ledger) -> list[Proposal]:
    """Every match worth making, in the graph's order; the others go to the ledger with a reason."""
    proposals = []
    times: dict[str, float] = {}
    for node in graph.nodes():
        for rule in rules:
            found = match(graph, node, rule.pattern)
            if found is None:
                continue
            wish = wishes.of(graph.goal, rule.label, found.consumed)
            reason = wish.refusal or rule.refusal(graph, found)
            if reason is None:
                assert rule.build is not None, rule.name
                proposal = _weigh(graph, rule, found, rule.build(graph, found), times)
                if wish.force is not None:
                    proposal = Proposal(rule, found, FORCED_US, f"forced by {wish.force!r}")
                if proposal.worth_us > 0:
                    proposals.append(proposal)
                    continue
                reason = proposal.account
            ledger.refuse(rule.name, found.consumed, reason)
    return proposals


def _weigh(
    graph: Graph, rule: Rule, found: Match, fused: Fused, times: dict[str, float]
) -> Proposal:
    if graph.goal is None or not graph.goal.target.is_gpu:
        return Proposal(rule, found, float(len(found.inner)), "")
    together_us = estimate.fused_time_us(graph, fused)
    apart_us = sum(_time_us(graph, node, times) for node in found.consumed)
    account = (
        f"modelled {together_us:.1f} us together, {apart_us:.1f} us apart "
        f"on {graph.goal.target.name}"
    )
    return Proposal(rule, found, apart_us - together_us, account)


def _time_us(graph: Graph, node: Node, times: dict[str, float]) -> float:
    if node.name not in times:
        times[node.name] = estimate.time_us(graph, node)
    return times[node.name]


def _make(graph: Graph, proposal: Proposal, ledger: Ledger) -> bool:
    """Rewrites a chosen proposal; its surroundings may have been rewritten since it was made."""
    root = proposal.found.root.name
    found = match(graph, graph.node(root), proposal.rule.pattern) if root in graph else None
    if found is None or proposal.rule.refusal(graph, found) is not None:
        return False
    saved, consumed = bytes_saved(found), found.consumed
    value = proposal.rule.apply(graph, found)
    ledger.accept(proposal.rule.name, consumed, value.node, saved)
    return True


def _refuse_loser(proposal: Proposal, winners: Sequence[Proposal], ledger: Ledger) -> None:
    rivals = [winner for winner in winners if winner.names & proposal.names]
    shown = ", ".join(f"{rival.rule.label} at {rival.found.root.name}" for rival in rivals)
    reason = f"another fusion of these nodes saves more: {shown}"
    ledger.refuse(proposal.rule.name, proposal.found.consumed, reason)


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
