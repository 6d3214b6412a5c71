"""The fusions of several heavy ops into one kernel: their tables, and the pass that chooses among
what they propose (`partition.py`)."""

from __future__ import annotations

from ...fusion import extension_rules, partition
from ...fusion.declaration import Fusion
from ...fusion.pattern import apply_rules
from ...graph.ir import Graph
from ...graph.ledger import Ledger
from .. import pads
from . import bottlenecks, heads, pool_fusions, pooled_convs, separables, shortcuts
from .siblings import propose_siblings

FUSIONS: tuple[Fusion, ...] = (
    *bottlenecks.FUSIONS,
    *separables.FUSIONS,
    *shortcuts.FUSIONS,
    *pooled_convs.FUSIONS,
    *pool_fusions.FUSIONS,
    *heads.FUSIONS,
    *pads.FUSIONS,
)
"""Every proposal of ours; the order decides only between equal savings."""
RULES = tuple(rule for fusion in FUSIONS for rule in fusion.rules)


def choose_partition(graph: Graph, ledger: Ledger) -> Graph:
    """Fuses heavy ops with their neighbours where that saves most on the goal's machine."""
    # Zeros around an image cost a convolution nothing: there is nothing to choose.
    graph = apply_rules(graph, pads.ZERO_RULES, ledger)
    rules = (*RULES, *extension_rules.PROPOSALS)
    return partition.choose(graph, rules, ledger, (propose_siblings,))
