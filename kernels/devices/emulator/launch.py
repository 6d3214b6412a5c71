"""Runs launches, and any PTX, through the emulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ...contract.op import Launch, Operand, Ref, Target
from .. import execute, offline
from . import source
from .clocks import Array
from .machine import Machine
from .memory import Bounded, FaultError, Global
from .registers import WARP
from .tma import MAP_BYTES, PARAMETERS, SWIZZLE_BYTES, TensorMap

Argument = torch.Tensor | int | TensorMap

MOST_THREADS = 8_192
"""That advance together: more take more memory for little less time."""


def run(
    launch: Launch,
    tensor_of: Callable[[Ref], torch.Tensor],
    batch: int,
    target: Target,
    places: Mapping[Ref, Operand],
    seed: int = 0,
) -> None:
    """Runs what the launch is compiled to for the target on CPU tensors, as `execute.interpret`.

    places: where tensors lie in their buffers, of which the launch may touch nothing else; those
    that are not named are whole buffers. Outputs and scratch may be written. seed: of the order in
    which blocks begin and atomic operations happen.
    Raises: FaultError for what a device would fault at or might get wrong; UnsupportedPtxError.
    """
    wanted = offline.request(launch, lambda ref: tensor_of(ref).dtype, target)
    kernel, shared_bytes, warps, maps = _compiled(wanted)
    arguments = list(_arguments(launch, execute.bind(launch, tensor_of, batch), iter(maps)))
    bounds = [
        _bounded(ref, tensor_of(ref), places.get(ref), batch)
        for ref in dict.fromkeys(
            (*launch.pointers.values(), *(box.ref for box in launch.boxes.values()), *launch.extras)
        )
    ]
    blocks = launch.grid_at(batch)[0]
    emulate(kernel, arguments, blocks, WARP * warps, shared_bytes, seed, bounds, launch.cluster)


def _bounded(ref: Ref, buffer: torch.Tensor, place: Operand | None, batch: int) -> Bounded:
    """A buffer, of which the launch may touch the samples of this call at a place."""
    touchable: Array | None = None
    if place is not None:
        held = torch.zeros(buffer.numel(), dtype=torch.bool)
        shape = place.spec.at(batch)
        if 0 not in shape:
            torch.as_strided(held, shape, place.strides, place.offset).fill_(True)
        touchable = held.numpy()
    return Bounded(buffer, touchable, ref.kind in ("output", "scratch"))


@lru_cache(maxsize=256)
def _compiled(
    wanted: offline.CompileRequest,
) -> tuple[source.Kernel, int, int, list[dict[str, Any]]]:
    """(kernel, bytes of shared memory, warps with those that the compiler adds, what it says of
    every tensor map)"""
    compiled = offline.compile_request(wanted)
    metadata = compiled.metadata
    maps = list(getattr(metadata, "tensordesc_meta", None) or [])
    return source.parse(compiled.asm["ptx"]), metadata.shared, metadata.num_warps, maps


def _arguments(
    launch: Launch, bound: dict[str, Any], maps: Iterator[dict[str, Any]]
) -> Iterator[Argument]:
    """In the kernel's order: tensors, numbers, tensor maps with sizes and strides behind them."""
    for name in launch.kernel.arg_names:
        value = bound.get(name)
        if isinstance(value, TensorDescriptor):
            made = next(maps)
            shape, strides = tuple(value.shape), tuple(value.strides)
            box = tuple(made["block_size"])
            width = SWIZZLE_BYTES[made["swizzle"]]
            yield TensorMap(value.base, shape, strides, box, width)
            yield from (*shape, *strides)
        elif isinstance(value, tuple):
            yield from value
        elif value is not None:
            yield value


def emulate(
    kernel: source.Kernel,
    arguments: Sequence[Argument],
    blocks: int,
    threads: int,
    shared_bytes: int = 0,
    seed: int = 0,
    bounds: Sequence[Bounded] | None = None,
    cluster: int = 1,
) -> None:
    """Runs a kernel: tensors are passed by address.

    bounds: of all memory that the arguments lie in, what may be done to it; anything to the tensors
    themselves where there are none. cluster: blocks next to each other that are one.
    Parameters beyond the arguments are null: Triton adds pointers to scratch memory of its own,
    which our kernels do not use.
    """
    tensors = [each.tensor if isinstance(each, TensorMap) else each for each in arguments]
    if bounds is None:
        bounds = [Bounded(each) for each in tensors if isinstance(each, torch.Tensor)]
    memory = Global(bounds)
    maps: dict[int, TensorMap] = {}
    raw = []
    for argument, size in zip(arguments, kernel.parameters.values(), strict=False):
        if isinstance(argument, torch.Tensor):
            raw.append(np.uint64(memory.address(argument)).tobytes())
        elif isinstance(argument, TensorMap):
            raw.append(np.uint64(MAP_BYTES * len(maps)).tobytes())
            maps[PARAMETERS + MAP_BYTES * len(maps)] = argument
        else:
            raw.append(int(argument).to_bytes(size, "little", signed=True))
    raw += [bytes(8)] * (len(kernel.parameters) - len(raw))
    order = np.random.default_rng(seed)
    if blocks % cluster:
        raise FaultError(f"{kernel.name}: {blocks} blocks are not clusters of {cluster}")
    first = cluster * order.permutation(blocks // cluster)
    numbers = (first[:, None] + np.arange(cluster)).ravel()
    together = max(1, MOST_THREADS // (threads * cluster)) * cluster
    with np.errstate(all="ignore"):
        for at in range(0, blocks, together):
            part = numbers[at : at + together].tolist()
            machine = Machine(
                kernel, memory, raw, part, blocks, threads, shared_bytes, order, maps, cluster
            )
            machine.run()
    memory.copy_back()
