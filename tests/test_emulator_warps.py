"""What the emulator sees of warps that do different things: who waits for whom, and who has seen
what."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import convloom
import pytest
import torch
from convloom.kernels.devices import emulator
from convloom.kernels.devices.emulator import FaultError, UnsupportedPtxError, launch
from convloom.kernels.devices.emulator.tma import TensorMap

from .test_emulator import (
    ARRIVED,
    BOX,
    HEAD,
    OPERANDS,
    PRODUCT,
    SEEN,
    STARTED,
    TAKEN,
    THREADS,
    TOLD,
    WAITED,
    copied,
    emulate,
    store,
)

FIRST_WARP = "setp.lt.u32 %p1, %r2, 32; setp.ge.u32 %p2, %r2, 32;"
# ------------------------------------------------------------------------------- partitions

PARTS = f"""
  shr.u32 %r4, %r2, 5;
  $parts: .branchtargets
    $first,
    $second;
  brx.idx %r4, $parts;
  $second: mov.b32 %r9, 20; bra.uni $end;
  $first: mov.b32 %r9, 10;
  $end: {store()}
"""


def test_a_branch_chooses_a_label_by_number() -> None:
    assert emulate(PARTS).tolist() == [10] * 32 + [20] * 32


def test_a_branch_to_no_label_is_seen() -> None:
    with pytest.raises(FaultError, match="a branch to a label outside its table of 2"):
        emulate(PARTS.replace("%r2, 5", "%r2, 4"))


LOOP_WITH_ITS_END_IN_FRONT = f"""
  mov.b32 %r8, 0; mov.b32 %r4, 1; bra.uni $body;
  $last: redux.sync.add.s32 %r9, %r4, -1;
  add.s32 %r8, %r8, 1; setp.eq.s32 %p2, %r8, 2; @%p2 bra $out;
  $body: setp.lt.u32 %p1, %r2, 7; @%p1 bra $last;
  bra.uni $last;
  $out: {store()}
"""


def test_threads_meet_at_the_end_of_a_loop_that_stands_in_front_of_it() -> None:
    """Compilers lay loops out so; whoever branches there first waits for those still behind."""
    assert emulate(LOOP_WITH_ITS_END_IN_FRONT).tolist() == [32] * THREADS


def test_scopes_behind_lines_of_a_source_are_read() -> None:
    body = ".loc 1 2 3\n { .reg .pred own; setp.eq.u32 own, %r2, 7; selp.b32 %r9, 1, 0, own; }"
    assert emulate(f"{body} {store()}").tolist() == [i == 7 for i in range(THREADS)]


def test_a_block_has_the_threads_that_the_compiler_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """It adds warps to those that a kernel was asked for with."""
    compile_request = launch.offline.compile_request
    asked: list[int] = []
    threads: list[int] = []

    def compiled(wanted: Any) -> Any:
        found = compile_request(wanted)
        asked.append(wanted.num_warps)
        metadata = SimpleNamespace(
            shared=found.metadata.shared, num_warps=wanted.num_warps + 8, tensordesc_meta=[]
        )
        return SimpleNamespace(asm=found.asm, metadata=metadata, name=found.name)

    monkeypatch.setattr(launch.offline, "compile_request", compiled)
    monkeypatch.setattr(launch, "emulate", lambda *given: threads.append(given[3]))
    launch._compiled.cache_clear()
    layer, x = torch.nn.ReLU(), torch.randn(1, 8, 4, 4)
    exe = convloom.compile(layer, (x,), target="emulator:sm_90")
    exe(x)
    launch._compiled.cache_clear()
    # Where nobody knows yet what kernels need, each is compiled once more for its report.
    assert threads and set(threads) == {32 * (warps + 8) for warps in asked}


# ------------------------------------------------------------------- barriers of a part of a block

# Each two of four warps exchange words behind a barrier of their own.
PAIRS = """
  setp.lt.u32 %p1, %r2, 64; st.shared.b32 [%r3], %r2; xor.b32 %r4, %r3, 128;
  @%p1 bra $one; bar.sync 2, 64; bra.uni $both; $one: bar.sync 1, 64;
  $both: ld.shared.b32 %r9, [%r4];
"""


def test_a_part_of_a_block_meets() -> None:
    assert emulate(PAIRS + store(), threads=128).tolist() == [i ^ 32 for i in range(128)]


def test_threads_of_a_warp_may_meet_at_different_instructions_that_are_not_aligned() -> None:
    body = """
      setp.eq.u32 %p1, %r2, 5; @%p1 bra $one; barrier.sync 1; bra.uni $end; $one: barrier.sync 1;
      $end:
    """
    assert emulate(body + store("%r2")).tolist() == list(range(THREADS))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (PAIRS.replace("%r3, 128", "%r3, 256"), "another warp wrote since the last barrier"),
        (PAIRS.replace("sync 2, 64", "sync 2, 32"), "more threads than 32 meet"),
        (PAIRS.replace("sync 2, 64", "sync 2, 128"), "a barrier that other threads of their"),
        (PAIRS.replace("sync 2, 64", "sync 1, 128"), "for different numbers of them"),
        (PAIRS.replace("1, 64", "1, 48"), "no barrier 1 for 48 of 128 threads"),
        (PAIRS.replace("1, 64", "16, 64"), "no barrier 16 for 64 of 128 threads"),
        (PAIRS.replace("1, 64", "1, 160"), "no barrier 1 for 160 of 128 threads"),
    ],
)
def test_faults_of_barriers_are_seen(body: str, message: str) -> None:
    with pytest.raises(FaultError, match=message):
        emulate(body, threads=128)


# ------------------------------------------------------------------------------- mbarriers


def wait(place: int, parity: int = 0) -> str:
    return f"""
      {{ .reg .pred complete;
      waitLoop: mbarrier.try_wait.parity.shared::cta.b64 complete, [%r{place}], {parity};
      @!complete bra.uni waitLoop; }}
    """


def arrive(place: int, guard: str = "") -> str:
    return f"{guard} mbarrier.arrive.shared::cta.b64 _, [%r{place}];"


# The first warp sends words, the second one takes them and says so. Barriers: %r20 (sent), %r21
# (taken), for 32 arrivals each.
MADE = f"""
  {FIRST_WARP} mov.b32 %r20, 1024; mov.b32 %r21, 1032; and.b32 %r4, %r3, 127;
  setp.eq.u32 %p3, %r2, 0;
  @%p3 mbarrier.init.shared::cta.b64 [%r20], 32; @%p3 mbarrier.init.shared::cta.b64 [%r21], 32;
"""
SYNC = "bar.sync 0;"
TAKE = f"@%p1 bra $send; {wait(20)} ld.shared.b32 %r9, [%r4]; {arrive(21)} {store()}"
SEND = f"bra.uni $end; $send: st.shared.b32 [%r4], %r2; {arrive(20)}"
AGAIN = f"{wait(21)} st.shared.b32 [%r4], %r2; $end:"
RING = MADE + SYNC + TAKE + SEND + AGAIN


def test_warps_wait_for_each_other_at_mbarriers() -> None:
    """The one that waits comes first in the text, and lets the other one go on."""
    assert emulate(RING).tolist() == [0] * 32 + list(range(32))


EARLY = f"{wait(20)} {arrive(21)} ld.shared.b32 %r9, [%r4];"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (RING.replace(wait(20), ""), "nothing was written to"),
        (RING.replace(wait(20), wait(20, 1)), "nothing was written to"),
        (RING.replace(wait(20), wait(21, 1) + "bar.warp.sync -1;"), "nothing was written to"),
        (RING.replace(wait(21), ""), "read of what another warp wrote"),
        (RING.replace(wait(21), wait(21, 1)), "read of what another warp wrote"),
        (MADE + SYNC + f"@%p1 bra $send; {EARLY}" + SEND + AGAIN,
         "overwritten that another warp read"),
        (RING.replace(f"[%r4], %r2; {arrive(20)}", f"[%r4], %r2; {arrive(20, '@%p3')}"),
         "a wait at an mbarrier that nothing under way will end"),
        (RING.replace(arrive(21), arrive(21).replace("];", "], 33;")),
         "more threads arrive at an mbarrier than"),
        (RING.replace(SYNC, ""), "no mbarrier was made here|another warp wrote"),
        (MADE + arrive(20, "@%p2"), "another warp wrote since the last barrier"),
        (MADE + SYNC + arrive(20, "@%p2") + "@%p3 mbarrier.inval.shared::cta.b64 [%r20];",
         "overwritten that another warp read"),
        (MADE + SYNC + "@%p3 mbarrier.inval.shared::cta.b64 [%r20];" + SYNC + arrive(20),
         "no mbarrier was made here"),
    ],
)  # fmt: skip
def test_faults_of_mbarriers_are_seen(body: str, message: str) -> None:
    with pytest.raises(FaultError, match=message):
        emulate(body)


# Of three warps, the first one sends to the second, which sends to the third.
PASSED = f"""
  {MADE} {SYNC} setp.lt.u32 %p4, %r2, 64;
  @%p1 bra $one; @%p4 bra $two;
  {wait(21)} ld.shared.b32 %r9, [%r4]; {store()} bra.uni $end;
  $one: st.shared.b32 [%r4], %r2; {arrive(20)} bra.uni $end;
  $two: {wait(20)} {arrive(21)}
  $end:
"""


def test_what_a_warp_has_seen_it_passes_on() -> None:
    assert emulate(PASSED, threads=96).tolist() == [0] * 64 + list(range(32))
    # The second warp tells the third one before it has seen what the first one did.
    early = PASSED.replace(wait(20) + " " + arrive(21), arrive(21) + wait(20))
    assert early != PASSED
    with pytest.raises(FaultError, match="read of what another warp wrote"):
        emulate(early, threads=96)


def test_only_phases_that_have_ended_tell_anything() -> None:
    """The first warp arrives, writes and arrives again, but for one thread."""
    body = f"""
      {MADE} {SYNC} setp.eq.u32 %p4, %r2, 1;
      @%p2 bra $second; {arrive(20)} st.shared.b32 [%r4], %r2; {arrive(20, "@!%p4")} bra.uni $end;
      $second: {wait(20)} ld.shared.b32 %r9, [%r4];
      $end:
    """
    with pytest.raises(FaultError, match="read of what another warp wrote"):
        emulate(body)


def test_a_barrier_of_one_block_tells_nothing_to_another() -> None:
    """In both blocks that advance together, all is as in one."""
    x, y = torch.arange(THREADS, dtype=torch.int32), torch.zeros(THREADS, dtype=torch.int32)
    kernel = emulator.parse(f"{HEAD} {RING} ret; }}")
    emulator.emulate(kernel, [x, y, 0], 5, THREADS, 4096)
    assert y.tolist() == [0] * 32 + list(range(32))


def test_what_waits_is_named() -> None:
    """The instruction, the block and its warps."""
    expected = r"^tried: mbarrier\.try_wait\S* .* \(block 0, warps 1, 2\)$"
    with pytest.raises(FaultError, match=expected):
        emulate(f"{MADE} {SYNC} @%p1 bra $end; {wait(21)} $end:", threads=96)


# ------------------------------------------------------------------- boxes to shared memory

ONLY_FIRST = f"{FIRST_WARP} @%p2 bra $arrived; {ARRIVED} $arrived:"
SECOND_TAKES = "and.b32 %r4, %r3, 63; @%p2 ld.shared.b32 %r9, [%r4];"
EXPECTED = "@first mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r20], 64;"


def test_a_copy_may_begin_before_it_is_announced() -> None:
    for body in (STARTED + TOLD, EXPECTED + STARTED + "@first " + arrive(20)):
        found = copied(BOX + body + ARRIVED + TAKEN)
        assert found[:6].tolist() == [25, 26, 27, 28, 29, 30]


def test_a_barrier_passes_on_that_a_copy_has_arrived() -> None:
    copied(f"{BOX} {TOLD} {STARTED} {ONLY_FIRST} bar.sync 0; {SECOND_TAKES}")


# A second box, told of by a barrier of its own.
OTHER = """
  mov.b32 %r24, 1032; mov.b32 %r25, 256; @first mbarrier.init.shared::cta.b64 [%r24], 1;
  bar.sync 0; @first mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r24], 64;
"""
OTHER_STARTED = STARTED.replace("[%r21]", "[%r25]").replace("[%r20]", "[%r24]")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (BOX + TOLD + STARTED + ONLY_FIRST + SECOND_TAKES,
         "what a copy wrote that this warp has not waited for"),
        # The second warp waits for the second copy, and takes what the first one brought.
        (BOX + OTHER + TOLD + STARTED + OTHER_STARTED + ONLY_FIRST
         + ARRIVED.replace("%r20", "%r24") + SECOND_TAKES,
         "what a copy wrote that this warp has not waited for"),
        # All bytes are announced to one barrier, the other one tells of half of them.
        (BOX + OTHER + TOLD + STARTED + OTHER_STARTED.replace("[%r24]", "[%r20]") + ARRIVED,
         "more bytes are copied than an mbarrier was told of"),
        (BOX + TOLD + STARTED + ARRIVED + EXPECTED, "a block ends in front of bytes that"),
        (BOX + OTHER + TOLD + STARTED.replace("[%r20]", "[%r24]") + ARRIVED,
         "a wait at an mbarrier that nothing under way will end"),
        (BOX + EXPECTED + TOLD + STARTED + ARRIVED, "that nothing under way will end"),
        (BOX + TOLD + STARTED, "a block ends while its shared memory is copied"),
        (f"{BOX} {FIRST_WARP} @%p2 st.shared.b32 [%r3+-128], %r2;" + TOLD + STARTED,
         "overwritten what another warp wrote"),
        (f"{BOX} @first st.shared.b32 [%r3], %r2; bar.sync 0; {FIRST_WARP} and.b32 %r4, %r3, 0;"
         "@%p2 ld.shared.b32 %r9, [%r4];" + TOLD + STARTED,
         "overwritten that another warp read"),
    ],
)  # fmt: skip
def test_faults_of_boxes_and_warps_are_seen(body: str, message: str) -> None:
    with pytest.raises(FaultError, match=message):
        copied(body)


# --------------------------------------------------------------------- boxes to global memory

# The second warp writes 16 words, which the first thread stores as the box of 2 x 8 at (1, 4).
LAID = f"""
  {FIRST_WARP} setp.eq.u32 %p3, %r2, 0; mov.b64 %rd6, p0; cvta.param.u64 %rd7, %rd6;
  mov.b32 %r20, 0; mov.b32 %r22, 4; mov.b32 %r23, 1;
  setp.ge.u32 %p4, %r2, 48; @%p4 st.shared.b32 [%r3+-192], %r2;
"""
FENCED = "fence.proxy.async.shared::cta;"
LEFT = """
  @%p3 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd7, {%r22, %r23}], [%r20];
"""
COMMIT = "cp.async.bulk.commit_group;"
READ, GONE = "cp.async.bulk.wait_group.read 0;", "cp.async.bulk.wait_group 0;"
STORED = LAID + FENCED + SYNC + LEFT + COMMIT
BACK = "@%p3 ld.global.b32 %r9, [%rd2+56];"


def stored(body: str) -> torch.Tensor:
    """A tensor of 3 x 10 words, which a kernel knows by a map and by its address."""
    x = torch.zeros(30, dtype=torch.int32)
    head = HEAD.replace("ld.param.b64 %rd1, [p0];", "mov.b64 %rd1, 0;")
    kernel = emulator.parse(f"{head} {body} ret; }}")
    box = TensorMap(x, (3, 10), (10, 1), (2, 8), 16)
    emulator.emulate(kernel, [box, x, 0], 1, THREADS, 2048)
    return x.reshape(3, 10)


@pytest.mark.parametrize("waited", [READ, GONE, GONE + BACK, READ + GONE + BACK])
def test_boxes_are_stored_but_for_what_lies_outside(waited: str) -> None:
    expected = torch.zeros(3, 10, dtype=torch.int32)
    expected[1:, 4:] = torch.arange(48, 64).reshape(2, 8)[:, :6]
    assert torch.equal(stored(STORED + waited), expected)


def test_memory_is_used_again_when_its_box_was_read() -> None:
    again = "@%p4 st.shared.b32 [%r3+-192], %r2;" + FENCED
    stored(STORED + READ + SYNC + again)
    stored(STORED + READ + SYNC + again + SYNC + LEFT + COMMIT + READ)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (STORED.replace(FENCED, "") + READ, "no fence.proxy.async made visible"),
        # A fence of those who have not seen what is written.
        (STORED.replace(FENCED, "@%p1 " + FENCED) + READ, "no fence.proxy.async made visible"),
        (STORED.replace(SYNC, "") + READ, "read of what another warp wrote"),
        (STORED, "a block ends while its shared memory is copied"),
        (STORED.replace(COMMIT, "") + READ, "a block ends while its shared memory is copied"),
        (STORED + READ.replace("0;", "1;"), "a block ends while its shared memory is copied"),
        (STORED + "@%p4 " + READ, "a block ends while its shared memory is copied"),
        (STORED + SYNC + "@%p4 st.shared.b32 [%r3+-192], %r2;", "a product under way reads, or a"),
        (STORED + READ + "@%p4 st.shared.b32 [%r3+-192], %r2;",
         "overwritten that another warp read"),
        (STORED + READ + BACK, "that a box is copied to which was not waited for"),
        (STORED + GONE + BACK.replace("@%p3", "@%p4"), "global memory is read that another warp"),
        (STORED.replace("mov.b32 %r20, 0", "mov.b32 %r20, 64"), "not a multiple of 128"),
    ],
)  # fmt: skip
def test_faults_of_stored_boxes_are_seen(body: str, message: str) -> None:
    with pytest.raises(FaultError, match=message):
        stored(body)


def test_a_fence_may_stand_behind_the_barrier() -> None:
    """With the one that asks for the copy."""
    stored(LAID + SYNC + "@%p3 " + FENCED + LEFT + COMMIT + READ)


# ------------------------------------------------------------------------------- registers

# Two groups of four warps with 64 registers a thread: one gives back 40, the other takes them.
REGISTERS = """
  setp.ge.u32 %p1, %r2, 128; @%p1 bra $give;
  setmaxnreg.inc.sync.aligned.u32 104; bra.uni $end;
  $give: setmaxnreg.dec.sync.aligned.u32 24;
  $end: bar.sync 0;
"""


HELD = HEAD.replace(".reqntid 64", ".reqntid 256\n.maxnreg 64")


def registers(body: str, head: str = HELD) -> torch.Tensor:
    y = torch.zeros(256, dtype=torch.int32)
    kernel = emulator.parse(f"{head} {body} {store('%r2')} ret; }}")
    emulator.emulate(kernel, [y, y, 0], 3, 256, 16)
    return y


def test_registers_move_from_warps_to_warps() -> None:
    assert registers(REGISTERS).tolist() == list(range(256))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (REGISTERS.replace("u32 104", "u32 112"), "a wait for registers that no warp gives back"),
        (REGISTERS.replace("u32 24", "u32 32"), "a wait for registers that no warp gives back"),
        (REGISTERS.replace("u32 104", "u32 56"), "gives back more registers than it has, or asks"),
        (REGISTERS.replace("u32 24", "u32 72"), "gives back more registers than it has, or asks"),
        (REGISTERS.replace("u32 24", "u32 28"), "counted in eights, from 24 to 256"),
        (REGISTERS.replace("u32 24", "u32 16"), "counted in eights, from 24 to 256"),
        (REGISTERS.replace("u32 104", "u32 264"), "counted in eights, from 24 to 256"),
        (
            REGISTERS.replace("$give:", "$give: setp.ge.u32 %p2, %r2, 192; @%p2 bra $more;")
            + "bra.uni $out; $more: setmaxnreg.dec.sync.aligned.u32 32; bar.sync 0; $out:",
            "of a warpgroup ask for different numbers",
        ),
    ],
)
def test_faults_of_registers_are_seen(body: str, message: str) -> None:
    with pytest.raises(FaultError, match=message):
        registers(body)


def test_registers_of_nobody_knows_how_many_are_refused() -> None:
    with pytest.raises(UnsupportedPtxError, match=r"no \.maxnreg says how many registers there"):
        registers(REGISTERS, HEAD)


# ------------------------------------------------------------------------------- warpgroups

# The first warp waits for the fifth one on its way to a product of the first four.
LATE = f"""
  setp.lt.u32 %p3, %r2, 32; setp.lt.u32 %p4, %r2, 128; mov.b32 %r20, 3072;
  setp.eq.u32 %p5, %r2, 0; @%p5 mbarrier.init.shared::cta.b64 [%r20], 32;
  {
    OPERANDS.replace(
        "setp.lt.u32 %p1, %r2, 64;", "setp.lt.u32 %p1, %r2, 64; @!%p4 bra $laid;"
    ).replace("shl.b32 %r4", "@!%p4 bra $laid; shl.b32 %r4")
} $laid: {SEEN}
  @!%p4 bra $fifth; @!%p3 bra $product; {wait(20)} $product: {PRODUCT}
"""
REST = f"bra.uni $end; $fifth: {arrive(20)} $end:"


@pytest.mark.parametrize("meet", ["", "bar.sync 1, 64;"])
def test_a_product_waits_for_all_warps_of_its_group(meet: str) -> None:
    """However the first one is held up."""
    body = f"{LATE} {WAITED} {store('%r13')} {REST}"
    if meet:
        body = body.replace(wait(20), meet).replace(arrive(20), meet)
    got = emulate(body, threads=160).view(torch.float32)
    assert (got[:128] == 16 * 2).all() and (got[128:] == 0).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"{LATE.replace('@!%p3 bra $product;', '@%p3 bra $end;')} {REST}",
         "not all 128 threads take part"),
        # Only the first warp has waited for its part of the product.
        (f"{LATE} @%p3 {WAITED} @%p3 st.shared.b32 [%r3], %r2; {REST}",
         "a product under way reads"),
        (f"{LATE} {WAITED} @%p3 st.shared.b32 [%r3], %r2; {REST}",
         "overwritten that another warp read"),
        (f"{LATE} @%p5 {WAITED} {REST}", "not all 32 threads take part"),
    ],
)  # fmt: skip
def test_faults_of_warpgroups_are_seen(body: str, message: str) -> None:
    with pytest.raises(FaultError, match=message):
        emulate(body, threads=160)
