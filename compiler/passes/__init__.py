"""The compiler is this tuple of named passes, in this order, each with the line that says why it
stands there. A pass is a function (Graph, Ledger) -> Graph that owns the graph it is given."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ... import settings
from ...errors import GraphError, InvalidInputError, near_names
from ..capture.capture import refuse_unsupported
from ..evaluation.validate import Validation
from ..fusion import extension_rules
from ..fusion.overrides import CONCAT_LABEL, CONCAT_RULE, Labels
from ..fusion.pattern import Rule, apply_rules
from ..fusion.rules import EPILOGUE_RULES, FLATTEN_RULES, PROLOGUE_RULES
from ..graph import text
from ..graph.ir import Graph
from ..graph.ledger import Ledger
from ..graph.memory import on_cpu
from ..graph.verify import verify
from . import diamonds, parallel_convs, pool_order, rearrangements
from .clean import (
    drop_identities,
    eliminate_common_subexpressions,
    eliminate_dead_nodes,
    fold_constants,
)
from .concats import nest_concatenations
from .diamonds import fuse_diamonds
from .fold_batch_norm import fold_batch_norm, lower_batch_norm
from .fusions import fuse, siblings, small_nets, stem
from .fusions.fuse import choose_partition
from .fusions.small_nets import fuse_small_nets
from .fusions.stem import fuse_stem
from .layout import choose_dtype, choose_layout
from .parallel_convs import merge_parallel_convolutions
from .pool_order import project_before_averaging
from .recognise import recognise_composites
from .slice_writes import simplify_slice_writes


def fuse_epilogues(graph: Graph, ledger: Ledger) -> Graph:
    """Moves pointwise nodes into the op that produces their input, as stages of its epilogue."""
    return apply_rules(graph, EPILOGUE_RULES, ledger)


def sink_prologues(graph: Graph, ledger: Ledger) -> Graph:
    """Moves pointwise nodes into the convolution that alone reads them, as its prologue."""
    return apply_rules(graph, PROLOGUE_RULES, ledger)


def flatten_in_memory_order(graph: Graph, ledger: Ledger) -> Graph:
    """Lets linear layers read flattened images as they lie in memory, without a transposition, and
    makes permutations with the reshapes around them one copy or a view."""
    return apply_rules(graph, FLATTENED, ledger)


def labels(rules: Iterable[Rule]) -> dict[str, str]:
    """By which users force and forbid the rules, by the rules' names."""
    return {rule.name: rule.label for rule in rules}


@dataclass(frozen=True)
class Pass:
    """A named step of the compiler; `required` ones run whatever the user asks for. labels: of the
    fusions that it makes, by their equations."""

    run: Callable[[Graph, Ledger], Graph]
    why: str
    labels: Mapping[str, str] = field(default_factory=dict)
    required: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__


FLATTENED = (*FLATTEN_RULES, *rearrangements.RULES)
PASSES: tuple[Pass, ...] = (
    Pass(
        recognise_composites,
        "first: later passes would take the parts for something else; some have no kernel",
        required=True,
    ),
    Pass(fold_constants, "weights reshaped by the capture must be constants again", required=True),
    Pass(drop_identities, "dropout and clone would stand between a producer and its epilogue"),
    Pass(simplify_slice_writes, "before equal nodes are unified: what is written is read again"),
    Pass(eliminate_common_subexpressions, "before fusion: equal nodes fuse differently"),
    Pass(eliminate_dead_nodes, "a dead reader would forbid a fusion"),
    Pass(fold_batch_norm, "before epilogues: a folded scale costs nothing, a stage costs a load"),
    Pass(
        merge_parallel_convolutions,
        "between: a normalisation beside convolutions is still one node, their biases are folded",
        {parallel_convs.RULE: parallel_convs.LABEL},
    ),
    Pass(lower_batch_norm, "what could not be folded can still be fused as two stages"),
    Pass(fuse_diamonds, "before epilogues: a producer that is read twice could not take them",
         {diamonds.RULE: diamonds.LABEL}),
    Pass(fuse_epilogues, "the main fusion: whole pointwise chains into their producers",
         labels(EPILOGUE_RULES)),
    Pass(sink_prologues, "after epilogues: a chain goes to its producer when it can",
         labels(PROLOGUE_RULES)),
    Pass(project_before_averaging, "before siblings: the projection becomes one of them",
         labels(pool_order.RULES)),
    Pass(nest_concatenations, "before the partition: what is joined in place is free to fuse"),
    Pass(flatten_in_memory_order, "before the partition: a fused classifier hides its weight",
         labels(FLATTENED)),
    Pass(choose_partition, "after epilogues: residual and activation ride on the expansion",
         labels(fuse.RULES) | {siblings.RULE: siblings.LABEL}),
    Pass(fuse_small_nets, "after the partition: it joins what the partition has made",
         labels(small_nets.RULES)),
    Pass(choose_layout, "late: fusion does not look at memory, kernels do", required=True),
    Pass(fuse_stem, "after layouts: it is about the conversions that they put at the boundary",
         stem.LABELS),
)  # fmt: skip
NAMES = tuple(step.name for step in PASSES)
_OURS = {rule: label for step in PASSES for rule, label in step.labels.items()}
_OURS[CONCAT_RULE] = CONCAT_LABEL
extension_rules.check(_OURS, _OURS.values())
LABELS = Labels(
    all=_OURS | labels(extension_rules.PROPOSALS),
    heavy=frozenset(labels((*fuse.RULES, *small_nets.RULES, *extension_rules.PROPOSALS))),
)
"""The fusions that `force=` and `forbid=` may name."""


def select(passes: str | tuple[str, ...]) -> tuple[Pass, ...]:
    """The passes to run: "default", "none", or the required ones and those named.

    Raises: InvalidInputError for an unknown name.
    """
    if passes == "default":
        return PASSES
    if not isinstance(passes, (str, tuple, list)):
        raise InvalidInputError(f"passes: expected 'default', 'none' or names, got {passes!r}")
    wanted = () if passes == "none" else (passes,) if isinstance(passes, str) else tuple(passes)
    for name in map(str, wanted):
        if name not in NAMES:
            raise InvalidInputError(
                f"passes: unknown pass {name!r}; {near_names(name, (*NAMES, 'default', 'none'))}"
            )
    return tuple(step for step in PASSES if step.required or step.name in wanted)


def _begin(validation: Validation, graph: Graph, fallback: str) -> None:
    """Evaluates the captured graph. A call without a kernel that torch itself cannot run is refused
    as such, not as a fault of the check."""
    try:
        validation.begin(graph)
    except GraphError:
        if fallback == "error":
            refuse_unsupported(graph)
        raise


@on_cpu
def run_passes(
    graph: Graph,
    ledger: Ledger,
    passes: str | tuple[str, ...] = "default",
    fallback: str = "error",
    validation: Validation | None = None,
) -> Graph:
    """The optimised graph; the given one is not changed.

    The goal's dtype is chosen before the layout, so that one conversion at the boundary does both.
    validation: compares what the graph computes before and after every pass; one of its own where
    CONVLOOM_CHECK is 2.

    Raises: UnsupportedOpError when calls without a kernel are left and fallback is "error".
    """
    environment = settings.read()
    graph = graph.copy()
    if environment.check >= settings.LAWS:
        verify(graph)
    if validation is None and environment.check >= settings.MEANING:
        validation = Validation()
    if validation is not None:
        _begin(validation, graph, fallback)

    def run(name: str, rewrite: Callable[[Graph, Ledger], Graph]) -> Graph:
        started = time.perf_counter()
        result = rewrite(graph, ledger)
        elapsed_ms = (time.perf_counter() - started) * 1e3
        if validation is not None:
            validation.check(name, rewrite, result)
        elif environment.check >= settings.LAWS:
            verify(result)
        if environment.debug >= 3:
            print(f"# after {name} ({elapsed_ms:.1f} ms)\n{text.to_text(result, False)}")
        return result

    dtype = graph.goal.dtype if graph.goal else None
    for step in select(passes):
        if step.run is choose_layout:
            if fallback == "error":
                refuse_unsupported(graph)
            graph = run("choose_dtype", lambda graph, _: choose_dtype(graph, dtype))
        graph = run(step.name, step.run)
    return graph
