"""Programmatic dependent launch (sm_90 and later): a kernel starts while the one before it ends.

Before such a kernel reads or writes anything of another one it waits until its predecessor is
complete and its results are visible (`grid_dependency_wait`); the predecessor waited in the same
way, so that everything earlier is complete too. Right behind its wait it lets its own successor
start, which the GPU does as soon as every program has come so far or ended: all of them have their
places then, and the successor, which takes what is free beside them, starts up and asks for its
weights while they compute. No more than two kernels are under way at a time.

The wait stands before the main loop: loads are hoisted out of a pipelined loop, above a wait that
stands inside it (triton issue 11905). In front of it weights are asked for (`ask_ahead`), most of
what small batches read, so that they leave DRAM while the predecessor still computes.

`PDL` is a compile-time constant of the kernels that take part, and compiles out; it is off unless
`settings.py` says otherwise: its value is not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ... import settings
from .op import Launch
from .targets import Target

FLAG = "PDL"
LEAST_CAPABILITY = 90


@triton.jit
def grid_dependency_wait(PDL: tl.constexpr):
    """Everything that earlier kernels wrote is visible behind this line; the next kernel may start,
    and sees nothing of this one before this one is complete."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def ask_ahead(pointers, size_bytes):
    """As many bytes from each pointer on, sixteens of both, are on their way to the L2 cache.
    Nothing is read yet: who has written them in the meantime is not missed."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [pointers, size_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


def is_programmatic(constexprs: Mapping[str, Any]) -> bool:
    """Whether a kernel with these compile-time constants must be launched programmatically."""
    return bool(constexprs.get(FLAG, False))


def _can(launch: Launch, target: Target) -> bool:
    return FLAG in launch.constexprs and target.capability >= LEAST_CAPABILITY


def is_early(launch: Launch, target: Target) -> bool:
    """Whether such launches are asked for, and the kernel and the target can."""
    return settings.PROGRAMMATIC in settings.launch() and _can(launch, target)


def programmatic(launch: Launch, target: Target) -> Launch:
    """The launch as a programmatic one, where its kernel and the target can; else as it is."""
    if not _can(launch, target):
        return launch
    return replace(launch, constexprs={**launch.constexprs, FLAG: True})
