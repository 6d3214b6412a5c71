"""A kernel whose warps do different things, as Triton compiles it for sm_90: right in the emulator,
and refused with each fault that is planted in it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from convloom.kernels.devices import emulator
from convloom.kernels.devices.emulator import FaultError
from convloom.kernels.devices.emulator.tma import TensorMap

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_box = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
ROWS, COLUMNS, DEPTH, STAGES = 128, 64, 64, 2


@gluon.jit
def produce(
    x_desc, w_desc, x_ring, w_ring, full, empty, tiles,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
    FAULT: gl.constexpr,
):  # fmt: skip
    """One warp asks for the operands of every step of every tile."""
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for step in range(STEPS):
            slot = count % STAGES
            if FAULT != "no wait for an empty slot":
                parity: gl.constexpr = 0 if FAULT == "wrong parity of the producer" else 1
                mbarrier.wait(empty.index(slot), count // STAGES % 2 ^ parity)
            more: gl.constexpr = 128 if FAULT == "more bytes announced" else 0
            size: gl.constexpr = x_desc.block_type.nbytes + w_desc.block_type.nbytes
            mbarrier.expect(full.index(slot), size + more)
            load_box(x_desc, [tile * M, step * K], full.index(slot), x_ring.index(slot))
            load_box(w_desc, [0, step * K], full.index(slot), w_ring.index(slot))
            count += 1


@gluon.jit
def consume(
    y_desc, x_ring, w_ring, out, full, empty, tiles,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
    FAULT: gl.constexpr,
):  # fmt: skip
    """A warpgroup multiplies out of the ring, with one product under way, and stores boxes."""
    sums: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16]
    )
    count = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        acc = gl.zeros([M, N], gl.float32, sums)
        for step in range(STEPS):
            slot = count % STAGES
            parity: gl.constexpr = 1 if FAULT == "wrong parity of the consumers" else 0
            mbarrier.wait(full.index(slot), count // STAGES % 2 ^ parity)
            acc = hopper.warpgroup_mma(
                x_ring.index(slot), w_ring.index(slot).permute((1, 0)), acc, is_async=True
            )
            if FAULT == "a slot released too early":
                mbarrier.arrive(empty.index(slot), count=1)
                acc = hopper.warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
            elif FAULT == "a slot never released":
                acc = hopper.warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
            else:
                acc = hopper.warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
                mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1, pred=step > 0)
            count += 1
        acc = hopper.warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        if (FAULT != "a slot released too early") & (FAULT != "a slot never released"):
            mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1)
        if FAULT != "no wait for the box before":
            tma.store_wait(pendings=0)
        out.store(acc.to(y_desc.dtype))
        hopper.fence_async_shared()
        store_box(y_desc, [tile * M, 0], out)
    if FAULT != "no wait for the last box":
        tma.store_wait(pendings=0)


@gluon.jit
def product_kernel(
    x_desc, w_desc, y_desc, tiles,
    M: gl.constexpr, N: gl.constexpr, K: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
    FAULT: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = x_desc.dtype
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, M, K], x_desc.layout)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES, N, K], w_desc.layout)
    out = gl.allocate_shared_memory(dtype, [M, N], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    hopper.fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (
                y_desc, x_ring, w_ring, out, full, empty, tiles, M, N, K, STEPS, STAGES, FAULT,
            )),
            (produce, (
                x_desc, w_desc, x_ring, w_ring, full, empty, tiles, M, N, K, STEPS, STAGES, FAULT,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


def described(box: tuple[int, int]) -> str:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return f"tensordesc<fp16[{box[0]},{box[1]}],{layout!r}>"


@lru_cache(maxsize=16)
def compiled(steps: int, fault: str) -> Any:
    """For sm_90, with no GPU."""
    given = {
        "M": ROWS, "N": COLUMNS, "K": DEPTH, "STEPS": steps, "STAGES": STAGES, "FAULT": fault,
        "num_warps": 4,
    }  # fmt: skip
    types = {
        "x_desc": described((ROWS, DEPTH)), "w_desc": described((COLUMNS, DEPTH)),
        "y_desc": described((ROWS, COLUMNS)), "tiles": "i32",
    }  # fmt: skip
    names = list(product_kernel.arg_names)
    source = GluonASTSource(
        fn=product_kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in given.items()},
        attrs={},
    )
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": 4})


def multiply(rows: int, depth: int, programs: int, fault: str = "") -> None:
    """Checks a product of small whole numbers, exactly."""
    made = compiled(-(-depth // DEPTH), fault)
    ptx = made.asm["ptx"]
    if fault == "no fence":  # The compiler adds one that the source forgets.
        ptx = ptx.replace("fence.proxy.async", "fence.acq_rel")
    generator = torch.Generator().manual_seed(rows + depth)
    x, w = (
        torch.randint(-2, 3, (count, depth), generator=generator).half()
        for count in (rows, COLUMNS)
    )
    y = torch.full((rows, COLUMNS), torch.nan).half()
    arguments = []
    for tensor, box in ((x, (ROWS, DEPTH)), (w, (COLUMNS, DEPTH)), (y, (ROWS, COLUMNS))):
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        arguments += [TensorMap(tensor.view(-1), shape, strides, box, 128), *shape, *strides]
    emulator.emulate(
        emulator.parse(ptx), [*arguments, -(-rows // ROWS)], programs,
        32 * made.metadata.num_warps, made.metadata.shared,
    )  # fmt: skip
    assert torch.equal(y.float(), x.float() @ w.float().T)


@pytest.mark.parametrize(
    ("rows", "depth", "programs"), [(128, 256, 1), (520, 256, 2), (300, 256, 3), (384, 200, 1)]
)
def test_warps_that_produce_and_warps_that_consume(rows: int, depth: int, programs: int) -> None:
    multiply(rows, depth, programs)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no wait for an empty slot", "more threads arrive at an mbarrier than it was made for"),
        ("wrong parity of the producer", "an mbarrier that nothing under way will end"),
        ("wrong parity of the consumers", "nothing was written to|before the copy into it"),
        ("more bytes announced", "an mbarrier that nothing under way will end"),
        ("a slot released too early", "that another warp read since|a product under way reads"),
        ("a slot never released", "an mbarrier that nothing under way will end"),
        ("no wait for the box before", "a product under way reads, or a copy"),
        ("no fence", r"no fence\.proxy\.async made visible"),
        ("no wait for the last box", "a block ends while its shared memory is copied"),
    ],
)
def test_planted_faults_are_seen(fault: str, message: str) -> None:
    with pytest.raises(FaultError, match=message):
        multiply(384, 256, 1, fault)
