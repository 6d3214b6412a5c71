"""`compile`: the straight road from an nn.Module to an executable."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from .. import settings
from ..errors import InvalidInputError
from ..kernels.contract import targets
from ..kernels.contract.spec import FLOAT_DTYPES
from ..kernels.contract.targets import REFERENCE, Target
from ..kernels.devices.language import forkable_lock
from .artifact.load import load_bytes
from .artifact.write import save
from .capture.capture import capture
from .capture.example_inputs import bounds_of, has_no_samples
from .evaluation.validate import Validation
from .explain import ablation
from .explain.ablation import Ablation
from .explain.account import Account
from .explain.report import Report
from .fusion import overrides
from .graph.ir import CompileTarget, Graph
from .graph.ledger import Ledger
from .passes import LABELS, run_passes, select
from .passes.slide_classifier import slide_classifier
from .plan.lower import Options, lower
from .plan.plan import Plan
from .records.choose import Chooser, Records, Timings, heuristic, local_device
from .run.executable import Executable
from .run.runtime import runner_for
from .tuning.fit import fitted
from .tuning.search import problems_of, search, works_for
from .tuning.self_check import SelfCheck

LOG = logging.getLogger("convloom")
PRECISIONS = ("ieee", "tf32")
TUNINGS = ("heuristic", "records", "search")
FALLBACKS = ("error", "torch")
CAPTURING = forkable_lock()
"""torch.export keeps state for the whole process; all else about a compilation is its own."""


def compile(
    module: torch.nn.Module | ExportedProgram | str | Path,
    example: Any = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    target: str = "cuda",
    dtype: torch.dtype | str | None = None,
    precision: str = "ieee",
    dynamic_batch: tuple[int, int] | None = None,
    tuning: str = "records",
    passes: str | tuple[str, ...] = "default",
    fallback: str = "error",
    force: Sequence[str] = (),
    forbid: Sequence[str] = (),
    slide: tuple[int, int] | None = None,
    outputs: Sequence[str] | None = None,
) -> Executable:
    """The module compiled for inputs like `example` (a tuple, or one tensor) and `kwargs`; of an
    `ExportedProgram`, or the path of an .onnx or .pt2 file, for the inputs that it names, where
    none is given.

    Tensors are of floats; NumPy's arrays stand for them. Constants among the arguments (bool, int,
    float, str, None) become part of the code, and every call must have the same.

    target: "cuda" (this machine's GPU), "cuda:sm_80|86|89|90|100" (compiled, not run),
    "interpreter" (the same kernels on the CPU), "emulator:sm_90" (what they are compiled to, on the
    CPU) or "reference" (torch ops, node by node).
    dtype: computes in float16 or bfloat16 (or "float16"); inputs and outputs keep the module's own.
    precision: fp32 products are fp32-accurate ("ieee") or "tf32". dynamic_batch: (lo, hi); (0, 1)
    for an example without samples.
    tuning: where configurations come from: "heuristic" (needs nothing, and is the same in every
    process), "records" (what was tuned before, else the heuristic), "search" (tunes what has no
    measured record first; minutes). passes: "default", "none", or names. fallback: "torch" runs
    unsupported nodes as torch ops, listed in the ledger.
    force, forbid: fusions to make although the cost model would not, or not to make, by label
    ("conv-pool"), module path ("layer1.*") or both ("conv-pool@layer1.*").
    slide: (height, width): the executable takes images of this size, larger than the example's, and
    returns maps: the classifier at every position, (N, K, P, Q) instead of (N, K). Linear layers
    become convolutions (`passes/slide_classifier.py`). One step of the map is as many pixels as the
    product of the strides before the head. A position is the module's result on the crop that
    begins there, except that convolutions with padding see the pixels beside the crop where the
    module sees its padding.
    outputs: module paths ("fc6", "layer3.1.relu"); the executable then returns a dict of what these
    modules return, by name, with "" for the model itself, and computes nothing beyond it. Of a
    module called several times it is the last call, "layer3.1.relu:0" is the first.

    Raises: InvalidInputError, TargetUnavailableError, CaptureError, UnsupportedOpError,
    KernelError.
    """
    return executable_for(
        module, example, kwargs=kwargs, target=target, dtype=dtype, precision=precision,
        dynamic_batch=dynamic_batch, tuning=tuning, passes=passes, fallback=fallback,
        force=force, forbid=forbid, slide=slide, outputs=outputs,
    )  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """What `plan` returns: everything about an executable but its machine code.

    graph: as it is fused; plan: its steps, buffers and configurations; ledger: why each op ended in
    which kernel.
    """

    graph: Graph
    plan: Plan
    ledger: Report

    @property
    def summary(self) -> dict[str, int]:
        """Counts: convs, kernels, torch_fallbacks, arena_bytes, activation_bytes."""
        return self.plan.summary()

    def account(self) -> Account:
        """What became of every captured node, with kernels, bytes and modelled times before and
        after."""
        return self.ledger.account()

    def explain(self) -> str:
        """The ledger as text, under the summary."""
        return self.ledger.explain(self.graph.name, self.summary)

    def __repr__(self) -> str:
        count = self.summary["kernels"]
        return f"<Plan of {self.graph.name} for {self.plan.target.name}: {count} kernel(s)>"


def plan(
    module: torch.nn.Module | ExportedProgram | str | Path,
    example: Any = (),
    *,
    target: str = "cuda",
    **options: Any,
) -> Planned:
    """The account of a module as `compile` would make it, without machine code: seconds where
    compiling takes minutes.

    The arguments are those of `compile`; `tuning` is "heuristic" unless it says otherwise. Where a
    configuration would spill or not fit, `compile` takes another one: only compiling shows that.
    The plan cannot be run, and its weights are the module's own.

    Raises: as `compile` does.
    """
    graph, made, ledger = lowered(module, example, target=target, **options)
    ledger.plan = made
    return Planned(graph, made, ledger)


def ablate(
    module: torch.nn.Module | ExportedProgram | str | Path,
    example: Any = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    fusions: str | Sequence[str] = "all",
    target: str = "cuda",
    dtype: torch.dtype | str | None = None,
    precision: str = "ieee",
    fallback: str = "error",
) -> Ablation:
    """What each fusion buys: kernels, bytes, and for a GPU the modelled time of the module with all
    fusions, with every op alone, without each of them, and with each alone beside the other passes.
    Nothing is compiled or run.

    fusions: "all" (each that the module has), labels, or families such as "separable*", which are
    left out as one. The other arguments are those of `compile`; configurations are the heuristic's.

    Raises: as `compile` does; InvalidInputError for a name of no fusion.
    """
    _check_choice("precision", precision, PRECISIONS)
    _check_choice("fallback", fallback, FALLBACKS)
    chosen, dtype = targets.parse(target), _dtype(dtype)
    with CAPTURING, uncollected():
        captured = capture(module, example, keywords=kwargs)

    def planned(forbid: tuple[str, ...], passes: str) -> tuple[Plan, Ledger]:
        captured.goal = CompileTarget(chosen, dtype, (), forbid, precision, None)
        graph, ledger = _optimised(captured, passes, fallback, None)
        options = Options(chosen, precision, dtype, elide_concats=passes != "none")
        return lower(graph, captured, options, ledger), ledger

    (first, *_) = captured.graph_inputs()
    batch = first.spec.shape[0] if first.spec.rank else 1
    computed = str(dtype or first.spec.dtype).removeprefix("torch.")
    rows = ablation.rows_of(captured.name, batch, chosen, fusions, planned)
    return Ablation(chosen.name, computed, tuple(rows))


def executable_for(
    module: torch.nn.Module | ExportedProgram | str | Path,
    example: Any,
    *,
    target: str,
    tuning: str = "records",
    validation: Validation | None = None,
    **options: Any,
) -> Executable:
    """What `compile` returns; `validation` watches the passes, `options` are those of `compile`."""
    graph, plan, ledger = lowered(
        module, example, target=target, tuning=tuning, validation=validation, compiled=True,
        **options,
    )  # fmt: skip
    runner = runner_for(graph, plan, plan.target, target)
    executable = Executable(graph, plan, ledger, runner, (save, load_bytes))
    if LOG.isEnabledFor(logging.INFO):  # What every op alone would launch is worked out for it.
        LOG.info("%s: %s", graph.name, executable.summary_line())
    _debug(executable)
    return executable


def lowered(
    module: torch.nn.Module | ExportedProgram | str | Path,
    example: Any,
    *,
    target: str,
    kwargs: Mapping[str, Any] | None = None,
    dtype: torch.dtype | str | None = None,
    precision: str = "ieee",
    dynamic_batch: tuple[int, int] | None = None,
    tuning: str = "heuristic",
    passes: str | tuple[str, ...] = "default",
    fallback: str = "error",
    force: Sequence[str] = (),
    forbid: Sequence[str] = (),
    slide: tuple[int, int] | None = None,
    known: Timings | None = None,
    outputs: Sequence[str] | None = None,
    compiled: bool = False,
    validation: Validation | None = None,
) -> tuple[Graph, Plan, Report]:
    """What `compile` makes before there is code: the optimised graph, its plan and the ledger.

    known: where the times of alternative fusions are looked up, and what is missing is kept;
    otherwise in the records, if `tuning` allows. compiled: the kernels for a GPU are compiled, and
    configurations that spill or do not fit give way to others (`tuning/fit.py`). validation:
    watches the passes.
    """
    _check_choice("precision", precision, PRECISIONS)
    _check_choice("tuning", tuning, TUNINGS)
    _check_choice("fallback", fallback, FALLBACKS)
    dtype = _dtype(dtype)
    chosen = targets.parse(target)
    select(passes)
    if dynamic_batch is None and has_no_samples((example, kwargs)):
        dynamic_batch = (0, 1)  # No plan has a batch of none alone.
    bounds = None if dynamic_batch is None else bounds_of(dynamic_batch)
    records = _records(tuning, chosen)
    with CAPTURING, uncollected():
        captured = capture(module, example, bounds, outputs, kwargs)
    if slide is not None:
        captured = slide_classifier(captured, slide)
    forced_and_forbidden = _names("force", force), _names("forbid", forbid)
    overrides.check(captured, *forced_and_forbidden, LABELS)
    if known is None and records and chosen.is_gpu:
        known = Timings(records, chosen)
    captured.goal = CompileTarget(chosen, dtype, *forced_and_forbidden, precision, known)
    options = Options(chosen, precision, dtype, elide_concats=passes != "none")
    optimise = partial(_optimised, captured, passes, fallback, validation)
    graph, ledger = optimise()
    if records and tuning == "search":
        # Fusions that are better than modelled show others, which must be timed in their turn.
        while known is not None and (works := works_for(known.new())):
            search(records, chosen, works)
            graph, ledger = optimise()
        search(records, chosen, works_for(problems_of(lower(graph, captured, options, Ledger()))))
    if compiled:
        _keep_weights(graph, captured)
    choose = records.choose if records else heuristic
    lowering = partial(_lowered_with, graph, captured, options, ledger)
    fits = compiled and chosen.is_gpu
    plan, ledger = fitted(lowering, choose, SelfCheck(chosen)) if fits else lowering(choose)
    overrides.check_forced(captured, captured.goal.force, ledger, LABELS)
    if bounds is not None:
        plan = replace(plan, batch=bounds)
    return graph, plan, ledger


@contextmanager
def uncollected() -> Iterator[None]:
    """No cyclic garbage is looked for, if it was: what torch.export makes lives on, and the search
    goes through all that torch holds, for a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _optimised(
    captured: Graph,
    passes: str | tuple[str, ...],
    fallback: str,
    validation: Validation | None,
) -> tuple[Graph, Report]:
    ledger = Report()
    return run_passes(captured, ledger, passes, fallback, validation), ledger


def _keep_weights(graph: Graph, captured: Graph) -> None:
    """Copies the weights that are still in the module's memory: it may go on training.

    Not all are: passes have made others of those that they fold or permute.
    """
    theirs = {tensor.untyped_storage().data_ptr() for tensor in captured.tensors.values()}
    for name, tensor in graph.tensors.items():
        if tensor.untyped_storage().data_ptr() in theirs:
            graph.tensors[name] = tensor.clone()


def _lowered_with(
    graph: Graph, captured: Graph, options: Options, ledger: Report, choose: Chooser
) -> tuple[Plan, Report]:
    """The plan by one chooser; the ledger of the passes stays as it is for the next one."""
    ledger = ledger.copy()
    return lower(graph, captured, replace(options, choose=choose), ledger), ledger


def _records(tuning: str, target: Target) -> Records | None:
    """What is known from tuning; the heuristic looks nothing up."""
    if tuning == "heuristic":
        return None
    if tuning == "search" and target is REFERENCE:
        raise InvalidInputError("tuning='search': target 'reference' runs no kernels to tune")
    return Records.here(device=local_device(target))


def _dtype(dtype: Any) -> torch.dtype | None:
    """The dtype to compute in, by itself or by name."""
    by_name = {str(known).removeprefix("torch."): known for known in FLOAT_DTYPES}
    chosen = by_name.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen in FLOAT_DTYPES:
        return chosen
    raise InvalidInputError(f"dtype: expected None, float32, float16 or bfloat16, got {dtype}")


def _names(argument: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise InvalidInputError(f"{argument}: expected a list of names, got {names!r}")
    return tuple(names)


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InvalidInputError(f"{name}: expected one of {', '.join(known)}; got {value!r}")


def _debug(executable: Executable) -> None:
    level = settings.read().debug
    if level >= 1:
        print(executable.plan.to_text())
    if level >= 2:
        refused = [event for event in executable.ledger.events if not event.accepted]
        for event in refused:
            print(f"refused {event.rule}: {', '.join(event.nodes)}: {event.reason}")
    if level >= 4:
        for kernel in executable.kernels:
            print(kernel.source())
