"""torch.export, and what its refusals mean: who decides by what, where, and what to do about it."""

from __future__ import annotations

import inspect
import logging
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.ao.quantization import FakeQuantize
from torch.export import Dim, ShapesCollection
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.jit._trace import TopLevelTracedModule
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ...errors import CaptureError
from .batch_numbers import LIBRARIES, Decision, watched
from .decompositions import decompose, trace_again

RANDOM = ("native_dropout", "bernoulli", "rand_like", "randn_like", "rand", "randn", "rrelu")
STATISTICS = "_native_batch_norm_legit_functional"


def export(
    module: torch.nn.Module,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    highest: int | None,
) -> tuple[Any, list[Decision]]:
    """The module as an exported program of functional ATen calls, and what its code decides by
    numbers that depend on the batch. highest: of a dynamic batch.

    Raises: CaptureError when torch.export fails, or the program has another result at every call.
    """
    with watched() as decisions:
        try:
            program = _program(module, arguments, keywords, highest)
        except Exception as error:
            reason = _reason(module, arguments, keywords, highest, error, decisions)
            raise CaptureError(reason) from error
    _refuse_changing(module, program)
    return program, decisions


@contextmanager
def uninterrupted() -> Iterator[None]:
    """An interruption (Ctrl-C) waits for the end of the block, a second one does not: torch.export,
    interrupted, may leave behind state that every later export of the process fails on."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []

    def wait(number: int, frame: FrameType | None) -> None:
        came.append((number, frame))
        if len(came) > 1:
            handler(number, frame)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if len(came) == 1:
            handler(*came[0])


@uninterrupted()
def _program(
    module: torch.nn.Module,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    highest: int | None,
) -> Any:
    # By tensor, not by argument: `forward(self, *images)` has one argument, a tuple.
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    if highest is not None:
        # To torch a batch is 2 or more; of a single one each tensor would have a symbol of its own.
        batch = Dim("batch", min=1, max=max(highest, 3))
        for leaf in pytree.tree_leaves((arguments, keywords)):
            if isinstance(leaf, torch.Tensor):
                shapes[leaf] = {0: batch}
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_quiet())
        stack.enter_context(_plain_tensors(module))
        stack.enter_context(_known_flags(module))
        stack.enter_context(_PartedBatches())
        program = torch.export.export(module, arguments, keywords, dynamic_shapes=shapes)
        decompose(program)
        return trace_again(program)


class _PartedBatches(TorchFunctionMode):
    """Inside the block `chunk` and `split` into whole batches are slices: how many parts there are
    torch computes with the batch as a number, and would fix it."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (torch.chunk, torch.Tensor.chunk, torch.split, torch.Tensor.split):
            chunks = function in (torch.chunk, torch.Tensor.chunk)
            named = [value for name, value in kwargs.items() if name != "dim"]
            x, given, *dims = (*args, *named)
            dim = dims[0] if dims else kwargs.get("dim", 0)
            parts = self._parts(chunks, x, given, dim)
            if parts is not None:
                return parts
        return function(*args, **kwargs)

    def _parts(self, chunks: bool, x: Any, given: Any, dim: int) -> Any:
        """The slices, or None where the parts are something else."""
        rows = _in_batches(x.shape[dim])
        length = rows / given if chunks and rows else _in_batches(given)
        if rows is None or length is None or not length.is_Integer or rows % length:
            return None
        count = int(rows / length)
        step = x.shape[dim] // count if chunks else given
        return tuple(x.narrow(dim, at * step, step) for at in range(count))


def _in_batches(size: Any) -> Any:
    """How many batches a size is, or None. To torch every input has a symbol of its own here."""
    if not isinstance(size, torch.SymInt):
        return None
    symbols = list(size.node.expr.free_symbols)
    if any(symbol.name.startswith("u") for symbol in symbols):
        return None  # It follows from values.
    count = size.node.expr.subs(dict.fromkeys(symbols, symbols[0])) / symbols[0]
    return count if count.is_Integer else None


@contextmanager
def _plain_tensors(module: torch.nn.Module) -> Iterator[None]:
    """Inside the block the module holds copies of those weights and buffers that were made under
    `torch.inference_mode`, which autograd, and so torch.export, refuses."""
    copies: dict[int, torch.Tensor] = {}
    replaced: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for child in module.modules():
        tables: tuple[dict[str, Any], ...] = (child._parameters, child._buffers)
        for held in tables:
            for name, tensor in held.items():
                if tensor is not None and tensor.is_inference():
                    replaced.append((held, name, tensor))
    with torch.inference_mode(False):
        for own, name, tensor in replaced:
            if id(tensor) not in copies:
                copy = tensor.detach().clone()
                is_weight = isinstance(tensor, torch.nn.Parameter)
                copies[id(tensor)] = torch.nn.Parameter(copy, False) if is_weight else copy
            own[name] = copies[id(tensor)]
        try:
            yield
        finally:
            for own, name, tensor in replaced:
                own[name] = tensor


@contextmanager
def _known_flags(module: torch.nn.Module) -> Iterator[None]:
    """Inside the block fake quantisations that decide in Python whether they observe, and quantise,
    know it as numbers: to torch.export the values of buffers are unknown."""
    replaced = []
    for child in module.modules():
        if type(child) is FakeQuantize:
            for name in ("observer_enabled", "fake_quant_enabled"):
                flags: Any = child._buffers.pop(name)
                child.__dict__[name] = tuple(map(int, flags.tolist()))
                replaced.append((child, name, flags))
    try:
        yield
    finally:
        for child, name, flags in replaced:
            del child.__dict__[name]
            child._buffers[name] = flags


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the graphs that torch prints and logs where it gives up: the error says why."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    printed, graph = StringIO(), ""
    try:
        with redirect_stderr(printed):
            yield
    except Exception as error:
        graph = str(getattr(error, "partial_fx_graph", ""))
        raise
    finally:
        logger.setLevel(level)
        text = printed.getvalue()
        if rest := text.replace(graph, "").strip() if graph else text:
            print(rest, file=sys.stderr)


def _reason(
    module: torch.nn.Module,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    highest: int | None,
    error: Exception,
    decisions: list[Decision],
) -> str:
    """Why a module could not be captured, where, and what to do."""
    name = type(module).__name__
    if (scripted := _scripted(module)) is not None:
        return (
            f"torch.export could not capture {name}: {_named(scripted)} is a scripted module "
            "(torch.jit.script), which it cannot look into; compile the module it was made from"
        )
    if isinstance(error, GuardOnDataDependentSymNode):
        return (
            f"torch.export could not capture {name}: its code decides by the values of a tensor at "
            f"{_line_of(error)}. Compute both sides and choose with torch.where, or decide outside "
            "the module"
        )
    if highest is not None and "Constraints violated" in str(error):
        asked = dict.fromkeys(f"{decision.question} at {decision.line}" for decision in decisions)
        why = f": {'; '.join(asked)} (N is the batch)" if asked else f": {_first_lines(error)}"
        return (
            f"{name} cannot be compiled with a dynamic batch: its code depends on the value of the "
            f"batch{why}. Compile it for one batch (without dynamic_batch), or write it for any"
        )
    if highest is not None and re.search("is invalid for input|Expected hidden", str(error)):
        return (
            f"{name} cannot be compiled with a dynamic batch: {_first_lines(error)}, at "
            f"{_line_of(error)}. Dimension 0 of every input is the batch, of any size: pass frames "
            "as (N, T, ...) and merge them in the module, x.flatten(0, 1); pass states as "
            "(N, layers, ...) and transpose them there; or compile for one batch (without "
            "dynamic_batch)"
        )
    if double := [name for name, held in module.named_parameters() if held.dtype is torch.float64]:
        return (
            f"{name} computes in float64 ('{double[0]}' and {len(double) - 1} more), which has no "
            "kernels; convert it, and the example: model.float(), x.float()"
        )
    hint = " (with a dynamic batch)" if highest is not None else ""
    return f"torch.export could not capture {name}{hint}: " + (
        _mismatch(module, arguments, keywords) or _first_lines(error)
    )


def _first_lines(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:3]) or repr(error)


def _scripted(module: torch.nn.Module) -> str | None:
    """The path of a submodule that torch.jit.script has made."""
    scripts = (
        path
        for path, child in module.named_modules()
        if isinstance(child, torch.jit.ScriptModule) and not isinstance(child, TopLevelTracedModule)
    )
    return next(scripts, None)


def _mismatch(
    module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> str | None:
    """Why `forward` cannot be called with the example, or None."""
    try:
        signature = inspect.signature(module.forward)
        signature.bind(*arguments, **keywords)
    except TypeError as error:
        return (
            f"forward{signature} cannot be called with the example's {len(arguments)} argument(s) "
            f"and keywords ({', '.join(keywords) or 'none'}): {error}. Keywords are passed as "
            "kwargs={...}"
        )
    except ValueError:
        return None
    return None


def _line_of(error: BaseException) -> str:
    """The last line of the user's code on the way to an error."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)]
    if not lines:
        return "an unknown line"
    return f"{Path(lines[-1].filename).name}:{lines[-1].lineno}: {lines[-1].line}"


def _named(path: str) -> str:
    return f"'{path}'" if path else "the module"


def path_of(node: Any) -> str:
    """The module path of a node of an exported program."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def source_of(node: Any) -> str:
    """The user's line that a node of an exported program comes from; "" where none is known."""
    trace = node.meta.get("stack_trace") or ""
    entries = re.findall(r'File "([^"]+)", line (\d+), in .*\n\s*(.*)', trace)
    lines = [entry for entry in entries if not entry[0].startswith(LIBRARIES)]
    if not lines:
        return ""
    file, line, text = lines[-1]
    return f"{Path(file).name}:{line}: {text.strip()}"


def _refuse_changing(module: torch.nn.Module, program: Any) -> None:
    """Raises: CaptureError for a program that draws random numbers, computes statistics for
    training, or writes buffers: an executable is a function of its inputs."""
    calls = []
    for node in program.graph.nodes:
        if node.op == "call_function" and hasattr(node.target, "_schema"):
            short = node.target._schema.name.rpartition("::")[2]
            if short in RANDOM or short == STATISTICS:
                calls.append((path_of(node), node))
    buffers = list(program.graph_signature.buffers_to_mutate.values())
    if not calls and not buffers:
        return
    name = type(module).__name__
    owners = {*(path for path, _ in calls), *(path.rpartition(".")[0] for path in buffers)}
    trains = any(_submodule(module, path).training for path in owners)
    if (observers := _observers(module)) and not trains:
        raise CaptureError(
            f"{name} is prepared for quantisation: the observers at {', '.join(observers)} write "
            "their buffers at every call, in evaluation mode too. Turn them off with "
            "model.apply(torch.ao.quantization.disable_observer), or compile the module as it was "
            "before it was prepared"
        )
    listed = [f"{path or 'the module'} ({node.target})" for path, node in calls] or buffers
    if trains:
        raise CaptureError(
            f"{name} would still train: batch statistics, active dropout or updated buffers at "
            f"{'; '.join(listed)}. Call .eval() on the module first"
        )
    lines = "; ".join(
        f"{_named(path)}: {node.target}" + (f" at {line}" if (line := source_of(node)) else "")
        for path, node in calls
    )
    if calls:
        raise CaptureError(
            f"{name} draws random numbers or computes statistics although it is in evaluation "
            f"mode: {lines}. An executable's result follows from its inputs alone: draw outside "
            "the module and pass the numbers in, or make the call depend on self.training"
        )
    raise CaptureError(
        f"{name} writes its buffers although it is in evaluation mode: {', '.join(buffers)}. "
        "An executable keeps no state between calls: return the new value instead, or write only "
        "where self.training"
    )


def _submodule(module: torch.nn.Module, path: str) -> torch.nn.Module:
    """The submodule at a path of torch.export, or the module itself where there is none."""
    children: dict[str, torch.nn.Module] = dict(module.named_modules(remove_duplicate=False))
    return children.get(path, module)


def _observers(module: torch.nn.Module) -> list[str]:
    """Paths of the observers and fake quantisations in a module."""
    kinds = (torch.ao.quantization.FakeQuantizeBase, torch.ao.quantization.ObserverBase)
    return [path for path, child in module.named_modules() if isinstance(child, kinds)]
