"""An emulator of PTX: runs compiled kernels with no GPU, and checks what a GPU would not tell.

Triton's interpreter runs the source of a kernel; this runs what the compiler made of it: layouts,
software pipelines, asynchronous copies, matrix fragments, swizzled shared memory, barriers. All
threads of several blocks advance together, an instruction at a time, as arrays of NumPy; groups
that branched apart run one after the other. Beside computing, it looks for what goes wrong only
sometimes on a device: reads and writes outside what a launch may touch of a buffer, misaligned
addresses, stack frames read before they are written, races between the warps of a block, words read
that another block wrote and did not release, results of asynchronous copies and products used
before they have arrived, waits that nothing will end. Warps may do different things: whether one of
them has seen what another one did does not depend on the order in which they run here.

What it cannot show: races within a warp; blocks that write to one place after each other; writes to
the shared memory of another block of a cluster; whether a warp that gave registers back needs them
(the assembler tells); what a masked load without `other=` leaves in a register, where the compiler
makes a copy of it that fills zeros (`tests/test_loads.py` asks for `other=` instead); what the
assembler (ptxas) and the hardware make of the PTX; the exact rounding of matrix products and
approximate functions; time.
Source: NVIDIA, Parallel Thread Execution ISA.
"""

from __future__ import annotations

from .arithmetic import UnsupportedPtxError
from .launch import emulate, run
from .memory import FaultError
from .source import parse

__all__ = ["FaultError", "UnsupportedPtxError", "emulate", "parse", "run"]
