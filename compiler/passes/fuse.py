"""The fusions of several heavy ops into one kernel: their tables, and the pass that chooses among
what they propose (`partition.py`)."""

from __future__ import annotations

from .. import partition
from ..ir import Graph
from ..ledger import Ledger
from . import bottlenecks

RULES = (*bottlenecks.RULES,)
"""Every proposal; the order decides only between equal savings."""


def choose_partition(graph: Graph, ledger: Ledger) -> Graph:
    """Fuses heavy ops with their neighbours where that saves most on the goal's machine."""
    return partition.choose(graph, RULES, ledger)
