"""Runs launches, and any PTX, through the emulator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch

from .. import execute, offline
from ..op import Launch, Ref
from ..targets import Target
from . import source
from .machine import WARP, Machine
from .memory import Global

MOST_THREADS = 8_192
"""That advance together: more take more memory for little less time."""


def run(
    launch: Launch,
    tensor_of: Callable[[Ref], torch.Tensor],
    batch: int,
    target: Target,
    seed: int = 0,
) -> None:
    """Runs what the launch is compiled to for the target on CPU tensors, as `execute.interpret`.

    seed: of the order in which blocks begin and atomic operations happen.
    Raises: FaultError for what a device would fault at or might get wrong; UnsupportedPtxError.
    """
    wanted = offline.request(launch, lambda ref: tensor_of(ref).dtype, target)
    kernel, shared_bytes = _compiled(wanted)
    rows = launch.m_at(batch)
    refs = execute.parameters(launch)
    arguments = [rows if ref is None else tensor_of(ref) for ref in refs]
    blocks = launch.grid_at(batch)[0]
    emulate(kernel, arguments, blocks, WARP * launch.num_warps, shared_bytes, seed)


@lru_cache(maxsize=256)
def _compiled(wanted: offline.CompileRequest) -> tuple[source.Kernel, int]:
    """(kernel, bytes of shared memory)"""
    compiled = offline.compile_request(wanted)
    return source.parse(compiled.asm["ptx"]), compiled.metadata.shared


def emulate(
    kernel: source.Kernel,
    arguments: Sequence[torch.Tensor | int],
    blocks: int,
    threads: int,
    shared_bytes: int = 0,
    seed: int = 0,
) -> None:
    """Runs a kernel: tensors are passed by address and may be written, numbers have 32 bits.

    Parameters beyond the arguments are null: Triton adds pointers to scratch memory of its own,
    which our kernels do not use.
    """
    memory = Global([each for each in arguments if isinstance(each, torch.Tensor)])
    raw = [
        np.uint64(memory.address(each)).tobytes()
        if isinstance(each, torch.Tensor)
        else np.int32(each).tobytes()
        for each in arguments
    ]
    raw += [bytes(8)] * (len(kernel.parameters) - len(raw))
    order = np.random.default_rng(seed)
    numbers = order.permutation(blocks)
    together = max(1, MOST_THREADS // threads)
    with np.errstate(all="ignore"):
        for at in range(0, blocks, together):
            part = numbers[at : at + together].tolist()
            Machine(kernel, memory, raw, part, blocks, threads, shared_bytes, order).run()
    memory.copy_back()
