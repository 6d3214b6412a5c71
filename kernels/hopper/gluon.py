"""Gluon, the part of Triton in which kernels say what each warp does, and what its releases call
differently: the only file that knows of either.

Compiled with Triton 3.7.1, 3.8.0 and 3.9.0. Where there is no Gluon, `MISSING` says why, and
nothing may be compiled; where there are no views that are larger than a buffer, `SMALL_VIEWS`.
"""

from __future__ import annotations

from typing import Any

import triton
from triton import constexpr_function as constexpr_function

MISSING: str | None = None
try:
    from triton.experimental.gluon import jit as jit
    from triton.experimental.gluon import language
    from triton.experimental.gluon._runtime import GluonASTSource as GluonASTSource
    from triton.experimental.gluon.language._core import builtin
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared as fence_async_shared,
    )
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier as mbarrier
    from triton.experimental.gluon.language.nvidia.hopper import tma as tma
    from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma as warpgroup_mma
    from triton.experimental.gluon.language.nvidia.hopper import (
        warpgroup_mma_init as warpgroup_mma_init,
    )
    from triton.experimental.gluon.language.nvidia.hopper import (
        warpgroup_mma_wait as warpgroup_mma_wait,
    )
except ImportError as error:
    MISSING = f"this Triton has no Gluon for Hopper ({error})"

    def jit(function: Any) -> Any:
        """The function as it is: it is never compiled."""
        return function

    builtin = jit
    language = mbarrier = tma = None
    GluonASTSource = fence_async_shared = None
    warpgroup_mma = warpgroup_mma_init = warpgroup_mma_wait = None

gl: Any = language
SMALL_VIEWS: str | None = (
    f"Triton 3.8 and newer have no views that are larger than a buffer, and this is "
    f"{triton.__version__}"
    if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
    else None
)
# Called async_copy_* up to 3.8, async_load and async_store since.
load_box: Any = getattr(tma, "async_load", None) or getattr(
    tma, "async_copy_global_to_shared", None
)
store_box: Any = getattr(tma, "async_store", None) or getattr(
    tma, "async_copy_shared_to_global", None
)


@builtin
def seen_as(memory: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """Shared memory from the start of a buffer on, in another shape, which may be larger than the
    buffer unless there are only `SMALL_VIEWS`."""
    method = getattr(memory, "reinterpret", None) or memory._reinterpret
    return method(memory.dtype, shape, layout, _semantic=_semantic)


def descriptor_type(dtype: str, box: tuple[int, ...], itemsize: int) -> str:
    """The type of a tensor map argument, as Triton's compiler spells it.

    dtype: Triton's word; box: what is copied at a time, whose rows are of 32, 64 or 128 bytes: they
    are swizzled over so many. itemsize: bytes of an element.
    """
    layout = gl.NVMMASharedLayout(
        swizzle_byte_width=min(128, box[-1] * itemsize), element_bitwidth=8 * itemsize,
        rank=len(box),
    )  # fmt: skip
    return f"tensordesc<{dtype}[{','.join(map(str, box))}],{layout!r}>"


def is_gluon(kernel: Any) -> bool:
    return bool(getattr(kernel, "is_gluon", bool)())
