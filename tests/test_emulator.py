"""The emulator by itself: that it computes what the instructions say, and sees what is wrong."""

from __future__ import annotations

from pathlib import Path

import convloom
import numpy as np
import pytest
import torch
from convloom.benchmarks import profile
from convloom.errors import KernelError, TargetUnavailableError
from convloom.kernels.devices import emulator
from convloom.kernels.devices.emulator import FaultError, UnsupportedPtxError
from convloom.kernels.devices.emulator.products import (
    Descriptor,
    fragment_a,
    fragment_b,
    fragment_c,
)
from convloom.kernels.devices.emulator.tma import TensorMap
from hypothesis import given
from hypothesis import strategies as st

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry tried(.param .u64 .ptr .global .align 1 p0, .param .u64 .ptr .global .align 1 p1,
    .param .u32 p2)
.reqntid 64
{
  .reg .pred %p<9>;
  .reg .b16 %rs<9>;
  .reg .b32 %r<99>;
  .reg .b64 %rd<9>;
  ld.param.b64 %rd1, [p0];
  ld.param.b64 %rd2, [p1];
  ld.param.b32 %r1, [p2];
  mov.u32 %r2, %tid.x;       // This thread
  shl.b32 %r3, %r2, 2;       // and its word: in shared memory,
  mul.wide.u32 %rd3, %r2, 4; // in the first tensor
  add.s64 %rd4, %rd1, %rd3;
  add.s64 %rd5, %rd2, %rd3;  // and in the second one.
"""
THREADS = 64


def emulate(
    body: str,
    x: torch.Tensor | None = None,
    number: int = 0,
    blocks: int = 1,
    threads: int = THREADS,
    shared_bytes: int = 4096,
) -> torch.Tensor:
    """What a kernel of this body leaves in the second tensor: a word per thread, zero before."""
    x = torch.arange(threads, dtype=torch.int32) if x is None else x
    y = torch.zeros(threads, dtype=torch.int32)
    kernel = emulator.parse(f"{HEAD}{body}\n ret;\n}}")
    emulator.emulate(kernel, [x, y, number], blocks, threads, shared_bytes)
    return y


def store(register: str = "%r9") -> str:
    return f"st.global.b32 [%rd5], {register};"


# -------------------------------------------------------------------------------- computing


def floats(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).repeat(THREADS)[:THREADS]


words = st.integers(-(2**31), 2**31 - 1)


@given(a=words, b=words)
def test_integer_arithmetic(a: int, b: int) -> None:
    x = torch.full((THREADS,), a, dtype=torch.int32)
    wide = {
        "add.s32": a + b, "sub.s32": a - b, "mul.lo.s32": a * b, "mul.hi.s32": a * b >> 32,
        "mul.hi.u32": (a % 2**32) * (b % 2**32) >> 32, "and.b32": a & b, "or.b32": a | b,
        "xor.b32": a ^ b, "min.s32": min(a, b), "max.u32": max(a % 2**32, b % 2**32),
        "shl.b32": a << (b % 2**32) if b % 2**32 < 32 else 0,
        "shr.s32": a >> min(b % 2**32, 31),
        "shr.u32": (a % 2**32) >> min(b % 2**32, 32),
        "div.s32": int(abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1) if b else None,
        "rem.s32": int(np.fmod(a, b)) if b else None,
    }  # fmt: skip
    for opcode, expected in wide.items():
        if expected is None:
            continue
        got = emulate(f"ld.global.b32 %r4, [%rd4]; {opcode} %r9, %r4, %r1; {store()}", x, b)
        assert int(got[0]) % 2**32 == expected % 2**32, opcode


@given(a=st.floats(width=32), b=st.floats(width=32))
def test_float_arithmetic(a: float, b: float) -> None:
    bits = int(torch.tensor(b, dtype=torch.float32).view(torch.int32))
    ours, theirs = torch.tensor(a), torch.tensor(b)
    nan = torch.isnan(ours) | torch.isnan(theirs)
    expected = {
        "add.rn.f32": ours + theirs, "mul.f32": ours * theirs, "div.rn.f32": ours / theirs,
        "max.NaN.f32": torch.maximum(ours, theirs), "min.f32": torch.fmin(ours, theirs),
    }  # fmt: skip
    for opcode, value in expected.items():
        got = emulate(f"ld.global.b32 %r4, [%rd4]; {opcode} %r9, %r4, %r1; {store()}",
                      floats(a), bits)  # fmt: skip
        result = got.view(torch.float32)[0]
        assert torch.equal(result.nan_to_num(7.0), value.nan_to_num(7.0)), opcode
    for compare, truth in (("lt", ours < theirs), ("neu", (ours != theirs) | nan), ("nan", nan)):
        got = emulate(
            f"ld.global.b32 %r4, [%rd4]; setp.{compare}.f32 %p1, %r4, %r1; "
            f"selp.b32 %r9, 1, 0, %p1; {store()}",
            floats(a), bits,
        )  # fmt: skip
        assert bool(got[0]) == bool(truth), compare


@given(value=st.floats(width=32))
def test_conversions_round_as_torch_does(value: float) -> None:
    x = floats(value)
    for kind, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        got = emulate(
            f"ld.global.b32 %r4, [%rd4]; cvt.rn.{kind}.f32 %rs1, %r4; cvt.f32.{kind} %r9, %rs1; "
            f"{store()}",
            x,
        ).view(torch.float32)
        assert torch.equal(got.nan_to_num(7.0), x.to(dtype).float().nan_to_num(7.0))
    whole = emulate(f"ld.global.b32 %r4, [%rd4]; cvt.rzi.s32.f32 %r9, %r4; {store()}", x)
    limited = min(max(value, -(2.0**31)), 2.0**31 - 1) if value == value else 0.0
    assert int(whole[0]) == int(limited)


@given(value=st.floats(min_value=-80, max_value=80, width=32))
def test_approximate_functions_are_as_inexact_as_they_may_be(value: float) -> None:
    x = floats(value)
    got = emulate(f"ld.global.b32 %r4, [%rd4]; ex2.approx.f32 %r9, %r4; {store()}", x)
    exact = 2.0 ** float(x[0])
    assert abs(float(got.view(torch.float32)[0]) - exact) <= 2**-21.5 * exact
    assert (got == got[0]).all()


def test_exact_results_of_approximate_functions_stay_exact() -> None:
    got = emulate(f"ld.global.b32 %r4, [%rd4]; rcp.approx.f32 %r9, %r4; {store()}", floats(4.0))
    assert float(got.view(torch.float32)[0]) == 0.25


def test_halves_of_registers() -> None:
    body = """
      ld.global.b32 %r4, [%rd4];
      mov.b32 {%rs1, %rs2}, %r4;
      mov.b32 %r5, {%rs2, %rs1};
      add.f16x2 %r9, %r4, %r5;
    """
    x = torch.tensor([1.5, -0.25] * THREADS, dtype=torch.float16).view(torch.int32)
    assert (emulate(body + store(), x).view(torch.float16) == 1.25).all()


def test_bits() -> None:
    body = """
      bfe.u32 %r4, %r2, 1, 3;  bfe.s32 %r5, %r2, 0, 2;  popc.b32 %r6, %r2;
      shl.b32 %r4, %r4, 8;     and.b32 %r5, %r5, 15;    shl.b32 %r5, %r5, 4;
      or.b32 %r9, %r4, %r5;    or.b32 %r9, %r9, %r6;
    """
    expected = [
        (i >> 1 & 7) << 8 | ((i & 3) - 4 * (i >> 1 & 1) & 15) << 4 | i.bit_count()
        for i in range(THREADS)
    ]
    assert emulate(body + store()).tolist() == expected
    got = emulate(f"prmt.b32 %r9, 0x44332211, 0x08776655, 0x7502; {store()}")
    assert got.tolist() == [0x08661133] * THREADS


def test_branches_come_together_again() -> None:
    """A loop with as many rounds as the thread's number, in which odd ones take a longer way."""
    body = """
      mov.b32 %r9, 0; mov.b32 %r5, 0;
      $loop:
      setp.ge.u32 %p1, %r5, %r2;
      @%p1 bra $end;
      and.b32 %r6, %r5, 1;
      setp.eq.b32 %p2, %r6, 0;
      @%p2 bra $even;
      add.s32 %r9, %r9, 100;
      $even:
      add.s32 %r9, %r9, 1;
      add.s32 %r5, %r5, 1;
      bra.uni $loop;
      $end:
      bar.sync 0;
    """
    expected = [i + 100 * (i // 2) for i in range(THREADS)]
    assert emulate(body + store()).tolist() == expected


def test_sums_of_warps() -> None:
    got = emulate(f"redux.sync.add.s32 %r9, %r2, -1; {store()}").tolist()
    assert got == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


def test_shuffles() -> None:
    body = "shfl.sync.bfly.b32 %r4, %r2, 5, 31, -1; shfl.sync.idx.b32 %r5, %r2, 3, 31, -1;"
    got = emulate(f"{body} mad.lo.s32 %r9, %r5, 1000, %r4; {store()}")
    assert got.tolist() == [(i // 32 * 32 + 3) * 1000 + (i ^ 5) for i in range(THREADS)]


def test_atomics_count_every_thread_of_every_block() -> None:
    """And each sees a value of its own."""
    x = torch.zeros(THREADS, dtype=torch.int32)
    kernel = emulator.parse(f"""{HEAD}
      atom.global.gpu.acq_rel.add.u32 %r4, [%rd1], 1;
      mul.wide.u32 %rd6, %r4, 4; add.s64 %rd6, %rd2, %rd6;
      st.global.b32 [%rd6], 1;
      ret; }}""")
    y = torch.zeros(3 * THREADS, dtype=torch.int32)
    emulator.emulate(kernel, [x, y, 0], 3, THREADS)
    assert int(x[0]) == 3 * THREADS and (y == 1).all()


def test_fragments_hold_every_element_once() -> None:
    for depth, pack in ((16, 2), (8, 2), (8, 1)):
        for rows, columns, shape in (
            (*fragment_a(depth, pack), (16, depth)),
            (*fragment_b(depth, pack), (depth, 8)),
        ):
            counted = np.zeros(shape, int)
            np.add.at(counted, (rows, columns), 1)
            assert (counted == 1).all()
    counted = np.zeros((16, 64), int)
    np.add.at(counted, fragment_c(64), 1)
    assert (counted == 1).all()


@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_matrix_layouts_place_every_element_once(width: int) -> None:
    """64 rows of 16 halves; the pattern repeats every 8 rows."""
    found = Descriptor(start=0, leading=64 * 16, stride=8 * width, width=width)
    at = found.places(np.arange(64)[:, None], np.arange(16)[None, :], 2, transposed=False)
    assert np.unique(at).size == at.size and (at % 2 == 0).all()
    if width > 16:
        assert set((at // width).ravel()) == set(range(64))


# -------------------------------------------------------------------------------- what is wrong

COPY = "cp.async.ca.shared.global [%r3], [%rd4], 4; cp.async.commit_group;"
LATER = "add.s32 %r4, %r3, 128; and.b32 %r4, %r4, 255;"
FAULTS = {
    "reads behind a tensor": ("ld.global.b32 %r9, [%rd4+256];", "every tensor: byte 256 of"),
    "writes in front of one": ("st.global.b32 [%rd5+-4], %r2;", "outside every tensor"),
    "an address of 32 bits": (
        "cvt.u32.u64 %r4, %rd4; cvt.u64.u32 %rd6, %r4; ld.global.b32 %r9, [%rd6];",
        "outside every tensor",
    ),
    "misaligned": ("ld.global.v2.b32 {%r4, %r5}, [%rd1+4];", "a misaligned access of"),
    "beyond shared memory": ("st.shared.b32 [%r3+4096], %r2;", "of 4096 shared bytes"),
    "misaligned shared": ("st.shared.b16 [%r3+1], %rs1;", "a misaligned access of"),
    "nothing was written": ("ld.shared.b32 %r9, [%r3];", "nothing was written to"),
    "read behind a write": (
        f"st.shared.b32 [%r3], %r2; {LATER} ld.shared.b32 %r9, [%r4];",
        "read of what another warp wrote since",
    ),
    "write behind a read": (
        f"st.shared.b32 [%r3], %r2; bar.sync 0; ld.shared.b32 %r9, [%r3]; {LATER} "
        "st.shared.b32 [%r4], %r2;",
        "overwritten that another warp read since",
    ),
    "write behind a write": (
        f"st.shared.b32 [%r3], %r2; {LATER} st.shared.b32 [%r4], %r2;",
        "overwritten what another warp wrote since",
    ),
    "two values at once": ("st.shared.b32 [global_smem], %r2;", "different values"),
    "two values in a tensor": ("st.global.b32 [%rd2], %r2;", "different values"),
    "a copy not waited for": (
        f"{COPY} bar.sync 0; ld.shared.b32 %r9, [%r3];",
        "before the copy into it was waited for",
    ),
    "too few copies waited for": (
        f"{COPY} cp.async.wait_group 1; bar.sync 0; ld.shared.b32 %r9, [%r3];",
        "before the copy into it was waited for",
    ),
    "a copy over what is copied": (f"{COPY} {COPY}", "while a copy into it is under way"),
    "a copy of nothing from far away": (
        "mov.b32 %r5, -4; mul.wide.u32 %rd6, %r5, 4; add.s64 %rd6, %rd1, %rd6; mov.b32 %r6, 0;"
        "cp.async.ca.shared.global [%r3], [%rd6], 4, %r6;",
        "outside every tensor",
    ),
    "waited, but no barrier": (
        f"{COPY} cp.async.wait_group 0; {LATER} ld.shared.b32 %r9, [%r4];",
        "another warp wrote since the last barrier",
    ),
    "a barrier some never reach": (
        "setp.eq.b32 %p1, %r2, 5; @%p1 bra $end; bar.sync 0; $end:",
        "a barrier that other threads of their block never reach",
    ),
    "two barriers at once": (
        "setp.eq.b32 %p1, %r2, 5; @%p1 bra $one; bar.sync 0; bra.uni $end; $one: bar.sync 0; $end:",
        "at different barriers",
    ),
    "a shuffle without all": (
        "setp.gt.u32 %p1, %r2, 3; @%p1 shfl.sync.bfly.b32 %r9, %r2, 1, 31, -1;"
        "@!%p1 bra $end; shfl.sync.idx.b32 %r9, %r2, 0, 31, -1; $end:",
        "does not take part",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_seen(name: str) -> None:
    body, message = FAULTS[name]
    with pytest.raises(FaultError, match=message) as caught:
        emulate(body)
    assert str(caught.value).startswith("tried: ")  # The kernel, then the instruction.


# 64 x 16 ones by 16 x 8 twos; the second matrix lies behind the first one.
OPERANDS = """
  shl.b32 %r4, %r2, 4; mov.b32 %r5, 0x3C003C00; mov.b32 %r6, 0x40004000;
  st.shared.v4.b32 [%r4], {%r5, %r5, %r5, %r5};
  setp.lt.u32 %p1, %r2, 64;
  @%p1 st.shared.b32 [%r3+2048], %r6;
  mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r13, 0;
  mov.b64 %rd6, 0x0000000800400000; mov.b64 %rd7, 0x0000000800080080; mov.pred %p2, -1;
"""
SEEN = "fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;"
PRODUCT = """
  wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r10, %r11, %r12, %r13}, %rd6, %rd7, %p2, 1, 1,
    0, 0;
  wgmma.commit_group.sync.aligned;
"""
WAITED = "wgmma.wait_group.sync.aligned 0;"


def test_products_of_warpgroups() -> None:
    body = f"{OPERANDS} {SEEN} {PRODUCT} {PRODUCT} {WAITED} {store('%r13')}"
    assert (emulate(body, threads=128).view(torch.float32) == 2 * 16 * 2).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"{OPERANDS} bar.sync 0; {PRODUCT}", "no fence.proxy.async made visible"),
        (f"{OPERANDS} fence.proxy.async; {PRODUCT}", "another warp wrote since"),
        (f"{OPERANDS} {SEEN} {PRODUCT} {store('%r10')}", "%r10 is used before the product"),
        (f"{OPERANDS} {SEEN} {PRODUCT} bar.sync 0; st.shared.b32 [%r3], %r5;",
         "a product under way reads"),
        (f"{OPERANDS} {SEEN} @%p1 {PRODUCT}", "not all 128 threads take part"),
        ("setp.gt.u32 %p1, %r2, 15; setp.lt.u32 %p2, %r2, 48; and.pred %p1, %p1, %p2;"
         "@%p1 redux.sync.add.s32 %r9, %r2, -1;", "not all 32 threads take part"),
    ],
)  # fmt: skip
def test_faults_of_products_are_seen(body: str, message: str) -> None:
    with pytest.raises(FaultError, match=message):
        emulate(body, threads=128)


# A box of 2 x 8 words of a tensor of 3 x 10 of them, from (2, 4) on, to the beginning of shared
# memory; its barrier lies at 1024.
BOX = """
  .reg .pred first; setp.eq.u32 first, %r2, 0; mov.b32 %r20, 1024; mov.b32 %r21, 0;
  mov.b64 %rd6, p0; cvta.param.u64 %rd7, %rd6; mov.b32 %r22, 4; mov.b32 %r23, 2;
  @first mbarrier.init.shared::cta.b64 [%r20], 1;
  bar.sync 0;
"""
TOLD = "@first mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 64;"
STARTED = """
  @first cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes
    [%r21], [%rd7, {%r22, %r23}], [%r20];
"""
ARRIVED = """
  { .reg .pred complete;
  waitLoop: mbarrier.try_wait.parity.shared::cta.b64 complete, [%r20], 0;
  @!complete bra.uni waitLoop; }
"""
TAKEN = "setp.lt.u32 %p1, %r2, 16; @%p1 ld.shared.b32 %r9, [%r3]; @%p1 st.global.b32 [%rd5], %r9;"


def copied(body: str) -> torch.Tensor:
    """What a kernel makes of the tensor map, a word per thread."""
    x = torch.arange(30, dtype=torch.int32).reshape(3, 10) + 1
    y = torch.zeros(THREADS, dtype=torch.int32)
    head = HEAD.replace("ld.param.b64 %rd1, [p0];", "mov.b64 %rd1, 0;")
    kernel = emulator.parse(f"{head} {body} ret; }}")
    box = TensorMap(x.view(-1), (3, 10), (10, 1), (2, 8), 16)
    emulator.emulate(kernel, [box, y, 0], 1, THREADS, 2048)
    return y


def test_boxes_are_copied_with_zeros_around() -> None:
    found = copied(BOX + TOLD + STARTED + ARRIVED + TAKEN)[:16].reshape(2, 8)
    assert found.tolist() == [[25, 26, 27, 28, 29, 30, 0, 0], [0] * 8]


def test_boxes_of_maps_whose_addresses_are_of_32_bits() -> None:
    """Triton 3.9 keeps addresses of parameters in half a register pair."""
    whole = "mov.b64 %rd6, p0; cvta.param.u64 %rd7, %rd6;"
    half = "mov.b32 %r24, p0; cvt.u64.u32 %rd6, %r24; cvta.param.u64 %rd7, %rd6;"
    for new, is_map in ((half, True), ("mov.b64 %rd7, p0;", False)):
        body = BOX.replace(whole, new) + TOLD + STARTED + ARRIVED + TAKEN
        if is_map:
            assert copied(body)[:6].tolist() == [25, 26, 27, 28, 29, 30]
        else:  # In the space of parameters, where generic addresses are expected.
            with pytest.raises(FaultError, match="a box of what is not a tensor map"):
                copied(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (BOX + TOLD + STARTED + TAKEN, "before the copy into it was waited for"),
        (BOX + TOLD + ARRIVED, "nothing under way will end"),
        (BOX + TOLD.replace("64;", "128;") + STARTED + ARRIVED, "nothing under way will end"),
        (BOX + TOLD.replace("64;", "32;") + STARTED + ARRIVED, "more bytes are copied"),
        (BOX + TOLD + TOLD, "more threads arrive"),
        (TOLD.replace("@first ", "mov.b32 %r20, 8; "), "no mbarrier was made here"),
        (BOX + TOLD + STARTED.replace("[%r21]", "[%r22]"), "not a multiple of 128"),
        (BOX + TOLD + STARTED.replace("[%rd7,", "[%rd6+256,"), "what is not a tensor map"),
    ],
)  # fmt: skip
def test_faults_of_boxes_are_seen(body: str, message: str) -> None:
    with pytest.raises(FaultError, match=message):
        copied(body)


@pytest.mark.parametrize(
    "body",
    [
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r9}, {%r9}, {%r9}, {%r9};",
        "sad.u32 %r9, %r2, %r2, %r2;",
        "add.rz.f32 %r9, %r2, %r2;",
        "mov.u32 %r9, %clock;",
        "bar.arrive 1, 64;",
        "bar.sync %r2, 64;",
        "mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r3], 0;",
        "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r3], [%rd1], 64, [%r3];",
        "cp.async.bulk.tensor.2d.global.shared::cta.im2col.bulk_group [%rd1, {%r2}], [%r3];",
        "ld.tensor.b32 %r9, [%rd1];",
    ],
)
def test_what_is_not_known_is_refused_by_name(body: str) -> None:
    with pytest.raises(UnsupportedPtxError, match="the emulator does not know `"):
        emulate(body)


def test_functions_are_refused() -> None:
    with pytest.raises(KernelError, match="one entry without functions"):
        emulator.parse(".func f() { ret; }")


def test_the_target_is_compiled_for_and_run_on_the_cpu() -> None:
    layer = torch.nn.Conv2d(16, 32, 3, padding=1)
    x = torch.randn(2, 16, 9, 7)
    found = convloom.compile(layer, (x,), target="emulator:sm_90", dtype=torch.float16)
    assert found.target.name == "emulator:sm_90" and found.has_steps
    assert "mma" in "".join(kernel.ptx() for kernel in found.kernels)
    assert torch.allclose(found(x), layer(x), atol=2e-2)
    timed = profile.measured("layer", 2, found, found.plan, ((x,), {}), repeats=1)
    assert timed.timed_on == "the emulator, not a GPU"
    assert {line.of_bound for line in timed.lines} == {None}
    assert all(step.compiled < 1e-2 for step in found.errors(x))
    with pytest.raises(TargetUnavailableError, match="emulator:sm_90"):
        convloom.compile(layer, (x,), target="emulator:sm_100")


def test_what_is_for_another_machine_says_how_to_run_it() -> None:
    layer = torch.nn.Conv2d(3, 8, 1)
    x = torch.randn(1, 3, 4, 4)
    with pytest.raises(TargetUnavailableError, match="emulator:sm_80"):
        convloom.compile(layer, (x,), target="cuda:sm_80")(x)
    with pytest.raises(TargetUnavailableError, match=r"on the CPU$"):
        convloom.compile(layer, (x,), target="cuda:sm_100")(x)


def test_a_file_is_run_by_the_emulator(tmp_path: Path) -> None:
    layer = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 1), torch.nn.ReLU())
    x = torch.randn(2, 8, 5, 5)
    convloom.compile(layer, (x,), target="cuda:sm_80").save(tmp_path / "a.loom")
    loaded = convloom.load(tmp_path / "a.loom", "emulator:sm_80")
    assert torch.allclose(loaded(x), layer(x), atol=1e-5)
    emulated = loaded.executables[0]
    emulated.save(tmp_path / "b.loom")
    again = convloom.load(tmp_path / "b.loom", "emulator:sm_80")
    assert again.plan.target == "cuda:sm_80", "the machine code is a GPU's"
    assert again.plan == loaded.plan and torch.equal(again(x), loaded(x))
