"""What the emulator sees of memory: bounds, stack frames, NaN, and who reads what others write."""

from __future__ import annotations

from typing import Any

import convloom
import pytest
import torch
from convloom.kernels.devices import emulator
from convloom.kernels.devices.emulator import FaultError
from convloom.kernels.devices.emulator.memory import Bounded, alike, alike_by_width
from torch import nn

from . import nets
from .test_emulator import HEAD, THREADS, emulate, store

# ----------------------------------------------------------------------------- stack frames

FRAME = """
  .local .align 8 .b8 __local_depot0[16]; .reg .b64 %SP; .reg .b64 %SPL;
  mov.b64 %SPL, __local_depot0; cvta.local.u64 %SP, %SPL;
  mul.wide.u32 %rd6, %r2, 0; add.u64 %rd7, %SPL, %rd6;
"""


@pytest.mark.parametrize(
    "body",
    [
        "st.local.b32 [%SPL+4], %r2; ld.local.b32 %r9, [%SPL+4];",
        "st.local.b32 [%rd7], %r2; ld.b32 %r9, [%SP];",
        "st.b32 [%SP+8], %r2; cvta.to.local.u64 %rd6, %SP; ld.local.b32 %r9, [%rd6+8];",
        "st.local.b32 [__local_depot0+12], %r2; ld.local.b32 %r9, [%SPL+12];",
        "mov.b32 {%rs1, %rs2}, %r2; st.local.v2.b16 [%SPL+4], {%rs1, %rs2};"
        "ld.local.b32 %r9, [%SPL+4];",
    ],
)
def test_every_thread_has_a_stack_of_its_own(body: str) -> None:
    assert emulate(f"{FRAME} {body} {store()}").tolist() == list(range(THREADS))


def test_bytes_of_a_stack_make_a_word() -> None:
    """As a kernel that reduces pairs of conditions has it."""
    body = "cvt.u16.u32 %rs1, %r2; st.b8 [%SP+1], %rs1; st.b8 [%SP], 7; ld.b16 %rs2, [%SP];"
    got = emulate(f"{FRAME} {body} cvt.u32.u16 %r9, %rs2; {store()}")
    assert got.tolist() == [256 * thread + 7 for thread in range(THREADS)]


def test_addresses_without_a_space_lead_to_the_stack_and_to_tensors() -> None:
    """In the same instruction, as where a pointer is chosen by a condition."""
    got = emulate(f"""{FRAME}
      st.local.b32 [%SPL], 1000; setp.lt.u32 %p1, %r2, 9; selp.b64 %rd6, %SP, %rd4, %p1;
      ld.b32 %r9, [%rd6]; {store()}""")
    assert got.tolist() == [1000] * 9 + list(range(9, THREADS))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.local.b32 %r9, [%SPL];", "local memory is read that nothing was written to"),
        ("st.b8 [%SP], %rs1; ld.b16 %rs2, [%SP];", "local memory is read that nothing was written"),
        ("st.local.b32 [%SPL+16], %r2;", "an access of 4 bytes at 16 of 16 local bytes"),
        ("st.b32 [%SP+4096], %r2;", "at 4096 of 16 local bytes"),
        ("ld.local.b32 %r9, [%SPL+-4];", "at -4 of 16 local bytes"),
        ("st.local.b32 [%SPL+2], %r2;", "a misaligned access of"),
        ("cvt.u64.u32 %rd6, %r2; ld.b32 %r9, [%rd6];", "outside every tensor"),
    ],
)
def test_faults_of_stacks_are_seen(body: str, message: str) -> None:
    with pytest.raises(FaultError, match=message):
        emulate(f"{FRAME} {body}")


# ------------------------------------------------------------------- what is asked for ahead

ASK = "cp.async.bulk.prefetch.L2.global [%rd1+{}], {}; mov.u32 %r9, 7;"


def test_bytes_of_a_tensor_may_be_asked_for() -> None:
    assert emulate(f"{ASK.format(16, 240)} {store()}").tolist() == [7] * THREADS


@pytest.mark.parametrize(
    ("at", "size", "message"),
    [
        (0, 272, "outside every tensor"),
        (256, 16, "outside every tensor"),
        (8, 16, "a misaligned access of 16 bytes"),
        (0, 24, "a misaligned access of 16 bytes"),
    ],
)
def test_other_bytes_may_not_be_asked_for(at: int, size: int, message: str) -> None:
    with pytest.raises(FaultError, match=message):
        emulate(ASK.format(at, size))


# ------------------------------------------------------------------------------------- NaN

# Half of the threads have one NaN, half of them the other one; the last word is no NaN.
NANS = "setp.lt.u32 %p1, %r2, 9; selp.b32 %r9, {}, {}, %p1;"
WORDS = NANS.format("0x7FC00000", "0xFFC00001")
HALVES = NANS.format("0x3C007E00", "0x3C00FE01")


def shared_by_all(values: str, dtype: torch.dtype) -> torch.Tensor:
    """What a tensor holds after all threads have written a word to its beginning at once."""
    y = torch.zeros(THREADS * 4 // dtype.itemsize, dtype=dtype)
    kernel = emulator.parse(f"{HEAD} {values} st.global.b32 [%rd2], %r9; ret; }}")
    emulator.emulate(kernel, [torch.zeros(THREADS), y, 0], 1, THREADS)
    return y


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (WORDS, torch.float32),
        (HALVES, torch.float16),
        (NANS.format("0x3F80FFC0", "0x3F807FC1"), torch.bfloat16),
    ],
)
def test_which_nan_a_place_keeps_does_not_matter(values: str, dtype: torch.dtype) -> None:
    assert shared_by_all(values, dtype)[0].isnan()
    got = emulate(f"{values} st.shared.b32 [global_smem], %r9;")
    assert got.sum() == 0


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (WORDS, torch.int32),
        (WORDS, torch.bfloat16),
        (NANS.format("0x7FC00000", "0x3F800000"), torch.float32),
        (NANS.format("0x3C007E00", "0x3C01FE00"), torch.float16),
        (NANS.format("0x3F807E00", "0x3F807E01"), torch.bfloat16),
        (NANS.format("0x80000000", "0x00000000"), torch.float32),
    ],
)
def test_all_other_values_differ(values: str, dtype: torch.dtype) -> None:
    with pytest.raises(FaultError, match="different values to the same place"):
        shared_by_all(values, dtype)


def test_values_of_shared_memory_that_are_no_nan_differ() -> None:
    for values in (NANS.format("0x7FC00000", "0x3F800000"), NANS.format("0x7E00", "0xFC00")):
        with pytest.raises(FaultError, match="different values to the same place"):
            emulate(f"{values} st.shared.b32 [global_smem], %r9;")


def test_nan_of_two_words() -> None:
    first, second = (
        torch.tensor([bits], dtype=torch.int64).numpy().view("u8")
        for bits in (0x7FF8_0000_0000_0000, 0x7FF8_0000_0000_0001)
    )
    assert alike(first, second, torch.float64).all() and alike_by_width(first, second).all()
    assert not alike(first, second, torch.float32).any()


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.amax((2, 3)),
        lambda x: x.amin((2, 3)),
        lambda x: nn.functional.max_pool2d(x, 2),
        lambda x: nn.functional.adaptive_max_pool2d(x, 2),
        lambda x: nn.functional.interpolate(torch.relu(x).clamp(-1.0, 2.0), scale_factor=2.0),
        lambda x: torch.maximum(x, -x) + torch.minimum(x.flip(3), x),
        lambda x: x.softmax(1),
    ],
)
def test_what_the_compiler_makes_of_extremes_keeps_nan(compute: Any) -> None:
    """A GPU's own maximum drops NaN; the interpreter's does not."""
    module, (x,) = nets.make(lambda m, x: compute(x), (2, 3, 4, 4))
    x[0, 0, 1, 2], x[1, 2, 3, 3], x[1, 1, 0, 0] = torch.nan, torch.inf, -torch.inf
    exe = convloom.compile(module, (x,), target="emulator:sm_80", tuning="heuristic")
    nets.check(exe(x), module, (x,))


# ---------------------------------------------------------------------------------- bounds


def touched(body: str, x: Bounded, y: Bounded) -> None:
    kernel = emulator.parse(f"{HEAD} {body} ret; }}")
    emulator.emulate(kernel, [x.tensor, y.tensor, 0], 1, THREADS, bounds=[x, y])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r9, [%rd1+16];", None),
        ("st.global.b32 [%rd2+16], 1;", None),
        ("ld.global.b32 %r9, [%rd2+16];", None),
        ("ld.global.b32 %r9, [%rd1+12];", "outside every tensor: byte 12 of memory of 512 bytes"),
        ("ld.global.b64 %rd6, [%rd1+24];", "outside every tensor"),
        ("st.global.b32 [%rd2+32], 1;", "outside every tensor"),
        ("st.global.b32 [%rd1+16], 1;", "a write to what the launch may only read"),
        ("red.global.gpu.relaxed.add.u32 [%rd1+16], 1;", "a write to what the launch may only"),
        ("cp.async.ca.shared.global [%r3], [%rd1], 4;", "outside every tensor"),
    ],
)
def test_a_launch_touches_its_own_part_of_a_buffer(body: str, message: str | None) -> None:
    """Two tensors in neighbouring words of one arena, of which each has words 4 to 7."""
    arena = torch.zeros(4 * THREADS, dtype=torch.int32)
    own = torch.zeros(2 * THREADS, dtype=torch.bool)
    own[4:7] = True
    x = Bounded(arena[: 2 * THREADS], own.numpy(), writable=False)
    y = Bounded(arena[2 * THREADS :], own.numpy(), writable=True)
    if message is None:
        touched(body, x, y)
        return
    with pytest.raises(FaultError, match=message):
        touched(body, x, y)


# ------------------------------------------------------- what one thread writes and another reads

OTHER = "xor.b32 %r4, %r2, 63; mul.wide.u32 %rd6, %r4, 4; add.s64 %rd6, %rd2, %rd6;"
"""The word of a thread of the other warp."""


def test_warps_exchange_words_behind_a_barrier() -> None:
    body = f"{OTHER} {store('%r2')} bar.sync 0; ld.global.b32 %r9, [%rd6]; bar.sync 0; {store()}"
    assert emulate(body).tolist() == list(reversed(range(THREADS)))
    with pytest.raises(FaultError, match="another warp wrote since the last barrier"):
        emulate(body.replace("bar.sync 0;", "", 1))


def test_copies_and_vectors_are_looked_at_too() -> None:
    for read in (
        "cp.async.ca.shared.global [%r3], [%rd6], 4;",
        "and.b64 %rd6, %rd6, -8; ld.global.v2.b32 {%r5, %r6}, [%rd6];",
    ):
        with pytest.raises(FaultError, match="another warp wrote since the last barrier"):
            emulate(f"{OTHER} {store('%r2')} {read}")


# Every thread of a block writes a word, one takes a ticket; the last block adds up the words.
WRITTEN = """
  mov.u32 %r10, %ctaid.x; shl.b32 %r10, %r10, 6; add.u32 %r10, %r10, %r2;
  mul.wide.u32 %rd6, %r10, 4; add.s64 %rd6, %rd2, %rd6; add.s32 %r11, %r10, 1;
  st.global.b32 [%rd6], %r11;
"""
TICKET = """
  setp.eq.u32 %p1, %r2, 40; mov.b32 %r12, 0;
  @%p1 atom.global.gpu.acq_rel.add.u32 %r12, [%rd1], 1;
  @%p1 st.shared.b32 [global_smem], %r12;
"""
TOLD = "bar.sync 0;"
READ = """
  ld.shared.b32 %r13, [global_smem]; setp.ne.u32 %p2, %r13, 2; @%p2 bra $end;
  mov.b32 %r14, 0; mov.b32 %r15, 0;
  $next: shl.b32 %r16, %r15, 6; add.u32 %r16, %r16, %r2; mul.wide.u32 %rd7, %r16, 4;
  add.s64 %rd7, %rd2, %rd7; ld.global.b32 %r17, [%rd7]; add.s32 %r14, %r14, %r17;
  add.u32 %r15, %r15, 1; setp.lt.u32 %p3, %r15, 3; @%p3 bra $next;
  bar.sync 0; add.s64 %rd8, %rd2, %rd3; st.global.b32 [%rd8+768], %r14;
  $end:
"""


def launched(body: str, blocks: int, seed: int = 0) -> torch.Tensor:
    """The words that several blocks leave, beside the tickets that they take."""
    tickets, words = torch.zeros(4, dtype=torch.int32), torch.zeros(4 * THREADS, dtype=torch.int32)
    kernel = emulator.parse(f"{HEAD} {body} ret; }}")
    emulator.emulate(kernel, [tickets, words, 0], blocks, THREADS, 16, seed)
    return words


ODD = {
    "depthwise": nn.Conv2d(5, 5, 3, padding=1, groups=5),
    "grouped": nn.Conv2d(9, 6, 3, padding=1, groups=3),
    "transposed": nn.ConvTranspose2d(5, 3, 3, 2, 1),
    "transposed depthwise": nn.ConvTranspose2d(5, 5, 3, 2, 1, groups=5),
    "transposed, few channels": nn.ConvTranspose2d(6, 6, 4, 2, groups=2),
    "pooled": nn.MaxPool2d(3, 2, 1),
    "pooled by powers": nn.LPPool2d(4, 2),
    "upsampled": nn.Upsample(scale_factor=2, mode="bilinear"),
    "normalised": nn.InstanceNorm2d(5),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_no_kernel_reads_beside_channels_that_fill_no_tile(name: str) -> None:
    layer = ODD[name].eval()
    x = torch.randn(1, getattr(layer, "in_channels", 5), 4, 5)
    exe = convloom.compile(layer, (x,), target="emulator:sm_80", tuning="heuristic")
    with torch.no_grad():
        torch.testing.assert_close(exe(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_the_last_of_several_blocks_reads_what_all_wrote(seed: int) -> None:
    got = launched(f"{WRITTEN} bar.sync 0; {TICKET} {TOLD} {READ}", 3, seed)[3 * THREADS :]
    assert got.tolist() == [3 * (thread + 1) + 3 * THREADS for thread in range(THREADS)]


@pytest.mark.parametrize(
    ("barrier", "ticket"),
    [
        ("", TICKET),
        ("bar.sync 0;", TICKET.replace("acq_rel", "relaxed")),
        ("bar.sync 0;", TICKET.replace("acq_rel", "acquire")),
        ("bar.sync 0;", TICKET.replace("acq_rel", "release")),
        ("bar.sync 0;", TICKET.replace("gpu", "cta")),
    ],
)
def test_words_of_other_blocks_need_more_than_a_ticket(barrier: str, ticket: str) -> None:
    with pytest.raises(FaultError, match="and no release and acquire lie between"):
        launched(f"{WRITTEN} {barrier} {ticket} {TOLD} {READ}", 3)


@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""])
def test_a_ticket_tells_only_its_own_warp_before_a_barrier(barrier: str) -> None:
    """The first block writes and releases, a thread of the second acquires, its first one reads."""
    body = f"""
      mov.u32 %r10, %ctaid.x; shl.b32 %r10, %r10, 6; add.u32 %r10, %r10, %r2;
      setp.eq.u32 %p2, %r10, 0; setp.eq.u32 %p3, %r10, {THREADS + 40};
      setp.eq.u32 %p4, %r10, {THREADS};
      @%p2 st.global.b32 [%rd2], 7; @%p2 atom.global.gpu.release.add.u32 %r11, [%rd1], 1;
      @%p3 atom.global.gpu.acquire.add.u32 %r11, [%rd1], 1; {barrier}
      @%p4 ld.global.b32 %r9, [%rd2]; @%p4 st.global.b32 [%rd2+4], %r9;
    """
    if barrier:
        assert launched(body, 2)[:2].tolist() == [7, 7]
        return
    with pytest.raises(FaultError, match="and no release and acquire lie between"):
        launched(body, 2)


def test_what_a_block_has_seen_it_passes_on() -> None:
    """The first writes and releases, the second acquires and releases, the third reads."""
    body = """
      mov.u32 %r10, %ctaid.x; setp.ne.u32 %p1, %r2, 0; @%p1 bra $end;
      setp.eq.u32 %p2, %r10, 0; @%p2 st.global.b32 [%rd2], 7;
      @%p2 atom.global.gpu.release.add.u32 %r11, [%rd1], 1;
      setp.eq.u32 %p3, %r10, 1; @%p3 atom.global.gpu.acquire.add.u32 %r11, [%rd1], 1;
      @%p3 atom.global.gpu.release.add.u32 %r11, [%rd1+4], 1;
      setp.eq.u32 %p4, %r10, 2; @%p4 atom.global.gpu.acquire.add.u32 %r11, [%rd1+4], 1;
      @%p4 ld.global.b32 %r9, [%rd2]; @%p4 st.global.b32 [%rd2+4], %r9;
      $end:
    """
    assert launched(body, 3)[:2].tolist() == [7, 7]
