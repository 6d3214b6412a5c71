"""The contenders: convloom, and what it is compared with, each set up at its best.

    eager              PyTorch as it is: NCHW, no graph
    eager-nhwc-graph   channels_last, cudnn.benchmark, recorded in a CUDA graph
    inductor           torch.compile with freezing, channels_last, recorded in a CUDA graph
    inductor-max       the same with max-autotune

Every contender answers a call with tensors of its own for inputs that lie on the device already:
what is recorded in a graph copies the inputs in and the results out, as convloom does. On
the CPU there are no graphs, and `eager-nhwc-graph` is not available.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import convloom
import torch
from convloom.compiler.artifact.load import LoadedExecutable
from convloom.compiler.run.executable import Executable
from convloom.errors import InvalidInputError, near_names
from torch import nn
from torch.utils import _pytree as pytree

from .devices import Call, Device, channels_last

OURS = "convloom"
WARM_UP = 3
REASON_LIMIT = 160


class UnavailableError(Exception):
    """A contender that does not exist on this machine; the message says why."""


@dataclass(frozen=True)
class Entrant:
    """A contender that is ready.

    compile_s: until its first results, everything compiled and recorded; tuning_s: what was spent
    on trying configurations, None where that is part of compile_s. kernels: launched by one call.
    """

    name: str
    call: Call
    compile_s: float
    tuning_s: float | None = None
    kernels: int | None = None
    peak_mb: float | None = None
    executable: Executable | None = None


@dataclass(frozen=True)
class Absentee:
    """A contender that cannot take part. status: "not available", "out of memory", "failed"."""

    name: str
    status: str
    reason: str


def enter(name: str, prepare: Callable[[], Entrant], device: Device) -> Entrant | Absentee:
    """The contender, or why there is none; whatever it held is freed then."""
    device.free()
    device.reset_peak()
    try:
        return prepare()
    except UnavailableError as error:
        found = Absentee(name, "not available", str(error))
    except torch.OutOfMemoryError as error:
        found = Absentee(name, "out of memory", one_line(error))
    except Exception as error:  # anything another compiler may raise
        found = Absentee(name, "failed", one_line(error))
    device.free()
    return found


def one_line(error: BaseException) -> str:
    """The kind of an error and the start of its message."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= REASON_LIMIT else text[: REASON_LIMIT - 3] + "..."


def check_names(names: Sequence[str]) -> None:
    """Raises: InvalidInputError for a peer nobody knows, or one that is named twice."""
    for name in names:
        if name not in PEERS:
            raise InvalidInputError(f"unknown peer {name!r}; {near_names(name, PEERS)}")
        if names.count(name) > 1:
            raise InvalidInputError(f"peer {name!r} is named {names.count(name)} times")


# Ours.


def ours(
    model: nn.Module, xs: Sequence[torch.Tensor], device: Device, target: str, tuning: str,
    precision: str, ready: LoadedExecutable | None = None,
) -> Entrant:  # fmt: skip
    """convloom for a target that runs on the device; `ready` where it is compiled already.

    With tuning="search" the search is timed apart: the second compilation finds its records.
    """
    tuning_s = None
    if ready is not None:
        arguments, keywords = ready.interface.placed(xs)
        ready(*arguments, **keywords)
        call, count = partial(ready, *arguments, **keywords), ready.summary["kernels"]
        return Entrant(OURS, call, 0.0, None, count, device.peak_mb())
    if tuning == "search":
        start = time.perf_counter()
        convloom.compile(model, tuple(xs), target=target, tuning="search", precision=precision)
        tuning_s, tuning = time.perf_counter() - start, "records"
    start = time.perf_counter()
    options: dict[str, Any] = {"tuning": tuning, "precision": precision}
    exe: Executable = convloom.compile(model, tuple(xs), target=target, **options)
    exe(*xs)
    compile_s = time.perf_counter() - start
    summary = exe.summary
    launched = summary["kernels"] + summary["torch_fallbacks"]
    return Entrant(
        OURS,
        lambda: exe(*xs),
        compile_s,
        tuning_s,
        launched if target != "reference" else None,
        device.peak_mb(),
        exe,
    )


# Peers.


def peer(name: str, model: nn.Module | None, xs: Sequence[torch.Tensor], device: Device) -> Entrant:
    """A peer by name, warmed up. model: None where a file is measured.

    Raises: UnavailableError where this machine has no such thing; anything it raises itself.
    """
    if model is None:
        raise UnavailableError("a saved executable holds no module that PyTorch could run")
    start = time.perf_counter()
    # Freezing and layouts change the module: each peer has its own.
    call = PEERS[name](copy.deepcopy(model), xs, device)
    for _ in range(WARM_UP):
        call()
    _synchronize(device)
    compile_s = time.perf_counter() - start
    peak_mb = device.peak_mb()
    return Entrant(name, call, compile_s, None, device.kernels_of(call), peak_mb)


def _synchronize(device: Device) -> None:
    if device.kind == "cuda":
        torch.cuda.synchronize()


def _eager(model: nn.Module, xs: Sequence[torch.Tensor], device: Device) -> Call:
    return _without_gradients(model, [x.contiguous() for x in xs])


def _without_gradients(model: Callable[..., Any], xs: Sequence[torch.Tensor]) -> Call:
    def call() -> Any:
        with torch.no_grad():
            return model(*xs)

    return call


def _eager_graph(model: nn.Module, xs: Sequence[torch.Tensor], device: Device) -> Call:
    if device.kind != "cuda":
        raise UnavailableError("CUDA graphs need a GPU")
    torch.backends.cudnn.benchmark = True
    model, xs = _in_channels_last(model, xs)
    return _graphed(model, xs)


def _inductor(
    model: nn.Module, xs: Sequence[torch.Tensor], device: Device, mode: str | None
) -> Call:
    try:
        from torch._inductor import config
    except ImportError as error:
        raise UnavailableError(f"not installed: {error}") from error
    torch._dynamo.reset()
    torch.backends.cudnn.benchmark = True
    model, xs = _in_channels_last(model, xs)
    # With its own graphs off: all contenders are recorded in the same way, by `_graphed`.
    compiled = torch.compile(model, mode=mode)
    with config.patch(freezing=True), torch.no_grad():
        for _ in range(WARM_UP):
            compiled(*xs)
    if device.kind == "cuda":
        return _graphed(compiled, xs)
    return _without_gradients(compiled, xs)


def _in_channels_last(
    model: nn.Module, xs: Sequence[torch.Tensor]
) -> tuple[nn.Module, Sequence[torch.Tensor]]:
    made: nn.Module = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return made, [*map(channels_last, xs)]


def _graphed(model: Callable[..., Any], xs: Sequence[torch.Tensor]) -> Call:
    """The model recorded in a CUDA graph: inputs copied in, results copied out."""
    static = [x.clone() for x in xs]
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            model(*static)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        result = model(*static)

    def call() -> Any:
        for own, x in zip(static, xs, strict=True):
            own.copy_(x)
        graph.replay()
        return pytree.tree_map_only(torch.Tensor, torch.clone, result)

    return call


PEERS: dict[str, Callable[[nn.Module, Sequence[torch.Tensor], Device], Call]] = {
    "eager": _eager,
    "eager-nhwc-graph": _eager_graph,
    "inductor": partial(_inductor, mode=None),
    "inductor-max": partial(_inductor, mode="max-autotune-no-cudagraphs"),
}
