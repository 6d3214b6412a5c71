"""What the emulator knows of blocks that are a cluster; each of its rules is broken once."""

from __future__ import annotations

import pytest
import torch
from convloom.kernels.devices import emulator
from convloom.kernels.devices.emulator import FaultError, UnsupportedPtxError

from .test_emulator import HEAD, THREADS, store

ARRIVE, WAIT = "barrier.cluster.arrive.release.aligned;", "barrier.cluster.wait.acquire.aligned;"
MEET = ARRIVE + WAIT
OTHER = (
    "mov.u32 %r5, %cluster_ctarank; xor.b32 %r6, %r5, 1; mapa.shared::cluster.u32 %r7, %r3, %r6;"
)
WRITE = "add.u32 %r8, %r2, 100; mad.lo.u32 %r8, %r5, 1000, %r8; st.shared.b32 [%r3], %r8;"
READ = "ld.shared::cluster.b32 %r9, [%r7];"
FIRST = f"setp.eq.u32 %p1, %r5, 0; @%p1 {store()}"


def together(body: str, blocks: int = 2, cluster: int = 2) -> torch.Tensor:
    """What the first block of a cluster leaves."""
    y = torch.zeros(THREADS, dtype=torch.int32)
    kernel = emulator.parse(f"{HEAD}{body}\n ret;\n}}")
    x = torch.zeros(THREADS, dtype=torch.int32)
    emulator.emulate(kernel, [x, y, 0], blocks, THREADS, 4096, cluster=cluster)
    return y


def test_a_block_reads_what_another_one_of_its_cluster_wrote() -> None:
    found = together(f"{OTHER}{WRITE}{MEET}{READ}{MEET}{FIRST}")
    assert found.tolist() == [1100 + i for i in range(THREADS)]


def test_blocks_know_how_much_memory_they_were_given() -> None:
    assert together(f"{OTHER} mov.u32 %r9, %dynamic_smem_size; {FIRST}").tolist() == [4096] * 64


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"{WRITE}{READ}{MEET}", "wrote since the last barrier of its cluster|nothing was written"),
        (f"{WRITE}{MEET}{READ}", "may end while another one of its cluster reads"),
        (f"{WRITE}{MEET}{WRITE}{READ}{MEET}", "wrote since the last barrier of its cluster"),
        (f"{WRITE}{ARRIVE}{READ}{WAIT}{MEET}", "between arriving at a barrier and its wait"),
        (f"{WRITE}{MEET}{READ}{WRITE}{MEET}", "that a block of the cluster still reads"),
        (f"{MEET}{READ}{MEET}", "nothing was written to"),
        (f"{WRITE}{ARRIVE}{ARRIVE}{WAIT}", "arrives twice"),
        (f"{WRITE}{WAIT}", "has not arrived"),
        (f"setp.eq.u32 %p1, %r5, 0; @%p1 bra $end; {MEET} $end:", "not all threads arrive at"),
        (f"{WRITE}{MEET} ld.shared::cluster.b32 %r9, [%r3]; {MEET}", "that no mapa made"),
        ("mapa.shared::cluster.u32 %r7, %r3, 2;", "rank 2 in a cluster of 2"),
        (f"{WRITE}{MEET} add.u32 %r7, %r7, 4096; {READ}{MEET}", "of 4096 shared bytes"),
        (f"{WRITE}{MEET} setp.eq.u32 %p1, %r5, 1; @%p1 bra $end; {READ}{READ} $end:",
         "that has ended|may end while"),
    ],
)  # fmt: skip
def test_a_broken_rule_of_clusters_is_seen(body: str, message: str) -> None:
    with pytest.raises(FaultError, match=message):
        together(f"{OTHER}{body}")


@pytest.mark.parametrize(
    "body",
    [
        "barrier.cluster.arrive.relaxed.aligned;", "barrier.cluster.wait.aligned;",
        "mapa.u64 %rd6, %rd4, 0;", f"{WRITE}{MEET} st.shared::cluster.b32 [%r7], %r8; {MEET}",
    ],
)  # fmt: skip
def test_other_forms_are_not_known(body: str) -> None:
    with pytest.raises(UnsupportedPtxError, match="does not know"):
        together(f"{OTHER}{body}")


def test_a_grid_is_whole_clusters() -> None:
    with pytest.raises(FaultError, match="3 blocks are not clusters of 2"):
        together(FIRST, blocks=3)
