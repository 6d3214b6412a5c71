"""Runs a launch of convloom through the emulator."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from .. import execute, offline
from ..op import Launch, Ref
from ..targets import Target
from . import source
from .machine import Machine
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
    compiled = offline.compile_request(wanted)
    kernel = source.parse(compiled.asm["ptx"])
    refs = execute.parameters(launch)
    tensors = [tensor_of(ref) for ref in refs if ref is not None]
    memory = Global(tensors)
    arguments = [
        np.int32(launch.m_at(batch)).tobytes()
        if ref is None
        else np.uint64(memory.address(tensor_of(ref))).tobytes()
        for ref in refs
    ]
    # Triton adds pointers to scratch memory of its own, which our kernels do not use.
    arguments += [bytes(8)] * (len(kernel.parameters) - len(arguments))
    blocks = launch.grid_at(batch)[0]
    threads = 32 * launch.num_warps
    order = np.random.default_rng(seed)
    numbers = order.permutation(blocks)
    together = max(1, MOST_THREADS // threads)
    with np.errstate(all="ignore"):
        for at in range(0, blocks, together):
            part = numbers[at : at + together].tolist()
            machine = Machine(
                kernel, memory, arguments, part, blocks, threads, compiled.metadata.shared, order
            )
            machine.run()
    memory.copy_back()
