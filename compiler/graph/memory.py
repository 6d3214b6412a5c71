"""Where tensors lie while a plan runs: buffers, places inside them, and the memory of one batch.

Sizes are those of the largest batch; buffers that hold a batch, and their place in the arena, scale
linearly with it. Nothing here knows of kernels, so that saved executables are run without Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, Protocol, TypeVar

import torch

from ... import settings
from ...kernels.contract.spec import Operand

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def on_cpu(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function whose new tensors are on the CPU, whatever the caller's default device is: only
    the user's own module is run with that."""

    @wraps(function)
    def run(*args: Arguments.args, **keywords: Arguments.kwargs) -> Result:
        if torch.get_default_device().type == "cpu":
            return function(*args, **keywords)
        with torch.device("cpu"):
            return function(*args, **keywords)

    return run


ALIGNMENT = 256
"""Bytes; CUDA's allocator gives the same, and 128-bit accesses need 16."""


@dataclass(frozen=True)
class Buffer:
    """A flat piece of memory.

    kind: "input", "output", "constant", "arena", "fixed" for arena buffers that do not scale with a
    dynamic batch, or "zeroed" for what kernels find and leave zero. size_bytes: at the largest
    batch; `batch` is that batch where the buffer scales with it. offset: in its arena, at the
    largest batch.
    """

    name: str
    kind: str
    dtype: torch.dtype
    size_bytes: int
    batch: int | None = None
    offset: int = 0

    def bytes_at(self, batch: int) -> int:
        """Its size when the batch is `batch`."""
        return self.size_bytes if self.batch is None else self.size_bytes // self.batch * batch

    def offset_at(self, batch: int) -> int:
        """Its offset when the batch is `batch`."""
        return self.offset if self.batch is None else self.offset // self.batch * batch


@dataclass(frozen=True)
class BufferSlice:
    """Where a value lies: a buffer, and the operand (shape, pitch, offset) inside it."""

    buffer: str
    operand: Operand


def arena_bytes_at(buffers: Mapping[str, Buffer], kind: str, batch: int) -> int:
    """Size of one of the arenas, "arena" or "fixed", when the batch is `batch`."""
    members = (buffer for buffer in buffers.values() if buffer.kind == kind)
    return max((b.offset_at(batch) + b.bytes_at(batch) for b in members), default=0)


class Buffered(Protocol):
    """What memory is made for: a plan, or the program of a saved executable."""

    @property
    def buffers(self) -> Mapping[str, Buffer]: ...


def _unwritten(size_bytes: int, device: torch.device | None) -> torch.Tensor:
    """New memory, in bytes; under CONVLOOM_CHECK a number that nobody has written is NaN, whatever
    was there before."""
    memory = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    return memory.fill_(0xFF) if settings.read().check else memory


class Memory:
    """Every buffer of a plan as a flat tensor, for one batch on one device.

    device: where it is, if there are no constants to tell.
    """

    def __init__(
        self,
        plan: Buffered,
        constants: Mapping[str, torch.Tensor],
        batch: int,
        device: torch.device | None = None,
    ) -> None:
        self.batch = batch
        device = next((tensor.device for tensor in constants.values()), device)
        self._flat: dict[str, torch.Tensor] = {}
        arenas = {
            kind: _unwritten(arena_bytes_at(plan.buffers, kind, batch), device)
            for kind in ("arena", "fixed")
        }
        for name, buffer in plan.buffers.items():
            if buffer.kind == "constant":
                self._flat[name] = constants[name]
            elif buffer.kind in arenas:
                start = buffer.offset_at(batch)
                piece = arenas[buffer.kind][start : start + buffer.bytes_at(batch)]
                self._flat[name] = piece.view(buffer.dtype)
            else:
                whole = _unwritten(buffer.bytes_at(batch), device).view(buffer.dtype)
                self._flat[name] = whole.zero_() if buffer.kind == "zeroed" else whole

    def flat(self, name: str) -> torch.Tensor:
        """The whole buffer."""
        return self._flat[name]

    def view(self, place: BufferSlice) -> torch.Tensor:
        """The logical tensor at a place."""
        operand = place.operand
        shape = operand.spec.at(self.batch)
        flat = self._flat[place.buffer]
        # An explicit storage offset counts from the start of the arena, not of the buffer.
        start = flat.storage_offset() + operand.offset
        return torch.as_strided(flat, shape, operand.strides, start)
