"""Every kernel compiles for every supported GPU generation, and the compiler's output is what makes
kernels fast: no spills, 128-bit asynchronous copies, tensor-core instructions. No GPU is needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from convloom.compiler.records import rank
from convloom.errors import KernelError
from convloom.kernels import registry
from convloom.kernels.contract import targets
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.op import Attributes, Problem, config
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.contract.targets import Target
from convloom.kernels.devices import barriers, offline
from convloom.kernels.fused.chains.conv_chain import ConvChain
from convloom.kernels.products.linear import Linear
from convloom.kernels.tile import choice
from convloom.kernels.tile.conv_geometry import Conv2d

from . import harness
from .domains import domain_of
from .properties.compiled import (
    SPILLING_DEFAULTS,
    assert_gives_way,
    assert_healthy,
    launch_requests,
    reports,
    samples,
    spilled,
)

HALF = torch.float16
BIAS = (Stage("add"), Stage("relu"))
RESIDUAL = (Stage("add"), Stage("add"), Stage("relu"))
TENSOR_CORES = ("HGMMA", "HMMA", "UTCHMMA")


def image(n: int, c: int, size: int, dtype: torch.dtype = HALF) -> TensorSpec:
    return TensorSpec((n, c, size, size), dtype, Layout.NHWC)


def channels(k: int) -> TensorSpec:
    return TensorSpec((k, 1, 1), torch.float32)


def residual_problem(
    op: str, attributes: Attributes, x: TensorSpec, w: TensorSpec, trailing: bool = True
) -> Problem:
    """A convolution or linear layer with bias, residual and ReLU."""
    definition = registry.get(op)
    (y,) = definition.infer(attributes, (x, w))
    bias = channels(w.shape[0]) if trailing else TensorSpec((w.shape[0],), torch.float32)
    return harness.problem_for(definition, attributes, (x, w), RESIDUAL, (bias, y))


def conv(c: int, k: int, size: int, r: int, stride: int = 1, n: int = 8, **more: object) -> Problem:
    """A square convolution of a zoo model."""
    groups = int(str(more.get("groups", 1)))
    dtype = more.get("dtype", HALF)
    assert isinstance(dtype, torch.dtype)
    attributes = Conv2d((stride, stride), (r // 2,) * 4, (1, 1), groups)
    w = TensorSpec((k, c // groups, r, r), dtype)
    return residual_problem("conv2d", attributes, image(n, c, size, dtype), w)


def chain(mid: int, wide: int, narrow: int, size: int, front: bool) -> Problem:
    """A rotated bottleneck, or its tail without the 3x3."""
    attributes = ConvChain(
        Conv2d((1, 1), (1,) * 4) if front else None, BIAS if front else (), RESIDUAL, True, BIAS
    )
    specs = [image(8, mid, size)]
    if front:
        specs += [TensorSpec((mid, mid, 3, 3), HALF), channels(mid)]
    specs += [TensorSpec((wide, mid, 1, 1), HALF), channels(wide), image(8, wide, size)]
    specs += [TensorSpec((narrow, wide, 1, 1), HALF), channels(narrow)]
    return harness.problem_for(registry.get("conv_chain"), attributes, tuple(specs))


PRODUCTS = {
    "conv 3x3 c64": conv(64, 64, 56, 3),
    "conv 3x3 c128": conv(128, 128, 28, 3),
    "conv 3x3 c512 batch 1": conv(512, 512, 7, 3, n=1),
    "conv 3x3 stride 2": conv(128, 128, 56, 3, 2),
    "conv 5x5 c32": conv(32, 96, 28, 5),
    "conv 1x1 c256": conv(256, 128, 28, 1),
    "conv 1x1 stride 2": conv(256, 512, 56, 1, 2),
    "conv grouped c256": conv(256, 384, 13, 3, groups=2),
    "linear 4096": residual_problem(
        "linear",
        Linear(),
        TensorSpec((8, 4096), HALF),
        TensorSpec((1000, 4096), HALF),
        trailing=False,
    ),
    "chain 64-256-64": chain(64, 256, 64, 56, front=True),
    "chain 128-512-128": chain(128, 512, 128, 28, front=True),
}
OTHERS = {
    "conv fp32 c128": conv(128, 128, 28, 3, dtype=torch.float32),
    "conv 7x7 c3": conv(3, 64, 224, 7, 2),
    "conv 7x7 c4": conv(4, 64, 224, 7, 2),
    "conv 11x11 c3": conv(3, 96, 227, 11, 4),
    "depthwise 3x3": conv(96, 96, 56, 3, groups=96),
    "depthwise 3x3 stride 2": conv(96, 96, 56, 3, 2, groups=96),
    "depthwise 5x5": conv(240, 240, 28, 5, groups=240),
    "conv grouped c4": conv(128, 128, 56, 3, groups=32),
    "chain 256-1024-256": chain(256, 1024, 256, 14, front=False),
}


GENERATIONS = tuple(target for target in targets.GPU_TARGETS if target.capability % 10 == 0)
"""One target per kind of tensor core; sm_86 and sm_89 share sm_80's, with less shared memory."""
by_generation = pytest.mark.parametrize(
    "target",
    [
        pytest.param(each, id=each.name, marks=pytest.mark.slow if each.capability > 90 else ())
        for each in GENERATIONS
    ],
)
"""For kernels beside those of this file, whose machine code on sm_100 is seldom looked at."""


@pytest.fixture(scope="module", autouse=True)
def compiled_in_parallel() -> None:
    """Everything this file names, by worker processes: one after the other takes twice as long."""
    requests = []
    for problem in (*PRODUCTS.values(), *OTHERS.values()):
        definition = registry.get(problem.op)
        for target in GENERATIONS:
            if definition.legal(problem, definition.default(problem, target), target) is None:
                requests += [wanted for _, wanted in launch_requests(problem, target)]
    offline.compile_all(requests, kind=offline.KernelReport)


@pytest.mark.parametrize("target", GENERATIONS, ids=lambda target: target.name)
@pytest.mark.parametrize("name", PRODUCTS)
def test_matrix_products_are_vectorised(name: str, target: Target) -> None:
    """With channels in multiples of 8: tensor cores, and no element-wise or spilled access."""
    problem = PRODUCTS[name]
    definition = registry.get(problem.op)
    tile = definition.default(problem, target)
    if (reason := definition.legal(problem, tile, target)) is not None:
        assert "shared memory" in reason, reason
        return
    (report,) = assert_healthy(problem, target)
    assert any(report.count(opcode) for opcode in TENSOR_CORES), report.instructions
    # A loop of one step has nothing to pipeline: its operands are loaded directly, 128 bits wide.
    wide = report.count("LDGSTS.128") + report.count("LDG.128")
    assert wide, report.instructions
    assert not report.count("LDGSTS.32") and not report.count("LDG.U16"), report.instructions


@pytest.mark.parametrize("name", ["conv 3x3 c64", "conv 3x3 c128", "conv 1x1 c256", "linear 4096"])
@pytest.mark.parametrize("target", GENERATIONS, ids=lambda target: target.name)
def test_operands_are_copied_asynchronously(name: str, target: Target) -> None:
    (report,) = reports(PRODUCTS[name], target)
    assert report.count("LDGSTS.128"), report.instructions


@pytest.mark.parametrize("target", GENERATIONS, ids=lambda target: target.name)
@pytest.mark.parametrize("name", OTHERS)
def test_special_convolutions_do_not_spill(name: str, target: Target) -> None:
    problem = OTHERS[name]
    definition = registry.get(problem.op)
    reason = definition.legal(problem, definition.default(problem, target), target)
    if reason is not None:
        assert "shared memory" in reason, reason
        return
    if name == "conv 7x7 c4" and SPILLING_DEFAULTS and spilled(problem, target):
        assert_gives_way(problem, target)
        return
    assert_healthy(problem, target)


def sample_problems(dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[str, Problem]]:
    """One problem of every op's domain for each dtype."""
    for op in registry.OPS:
        yield from ((op.name, problem) for problem in samples(op, domain_of(op), dtypes))


COMPILED = [
    pytest.param(targets.parse(f"cuda:{name}"), dtypes, id=f"{name}-{len(dtypes)}", marks=marks)
    for name, dtypes, marks in (
        ("sm_80", (HALF, torch.float32), ()), ("sm_86", (HALF,), ()),
        ("sm_89", (HALF,), pytest.mark.slow), ("sm_90", (HALF, torch.float32), ()),
        ("sm_100", (HALF,), ()), ("sm_100", (HALF, torch.float32), pytest.mark.slow),
    )
]  # fmt: skip
"""sm_89 holds as much as sm_86, and its products are the same instructions."""


@pytest.mark.parametrize(("target", "dtypes"), COMPILED)
def test_every_op_compiles(target: Target, dtypes: tuple[torch.dtype, ...]) -> None:
    """Also the ops nobody named here: the registry is the list."""
    problems = list(sample_problems(dtypes))
    assert {name for name, _ in problems} == set(registry.BY_NAME)
    requests = [wanted for _, problem in problems for _, wanted in launch_requests(problem, target)]
    offline.compile_all(requests, kind=offline.KernelReport)
    spilling = [problem for _, problem in problems if spilled(problem, target)]
    assert len(spilling) <= SPILLING_DEFAULTS, [problem.op for problem in spilling]
    for _, problem in problems:
        (assert_gives_way if problem in spilling else assert_healthy)(problem, target)


def test_a_kernel_that_does_not_compile_names_itself() -> None:
    (_, wanted), *_ = launch_requests(PRODUCTS["conv 1x1 c256"], targets.parse("cuda:sm_90"))
    tile: Any = dict(wanted.constexprs)["TILE"]
    constants = dict(wanted.constexprs) | {"TILE": tile._replace(M=48)}
    broken = replace(wanted, constexprs=tuple(sorted(constants.items(), key=lambda item: item[0])))
    with pytest.raises(KernelError, match=r"gemm_kernel does not compile for sm_90.*warps"):
        offline.compile_request(broken)


def test_missing_and_unknown_arguments_are_named() -> None:
    (_, wanted), *_ = launch_requests(PRODUCTS["conv 1x1 c256"], targets.parse("cuda:sm_90"))
    constants = dict(wanted.constexprs)
    constants["TIEL"] = constants.pop("TILE")
    broken = replace(wanted, constexprs=tuple(sorted(constants.items(), key=lambda item: item[0])))
    with pytest.raises(KernelError, match=r"missing arguments \['TILE'\], unknown \['TIEL'\]"):
        offline.compile_request(broken)


def test_a_damaged_report_is_read_from_the_machine_code_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(tmp_path))
    (_, wanted), *_ = launch_requests(PRODUCTS["linear 4096"], targets.parse("cuda:sm_90"))
    offline.report.cache_clear()
    first = offline.report(wanted)
    path = offline._path_of(offline.KernelReport, wanted)
    assert json.loads(path.read_text())["data"]["registers"] == first.registers
    assert offline.known_resources(wanted) == offline.resources(wanted), "a report tells them too"
    path.write_text(path.read_text()[:20])
    offline.report.cache_clear()
    assert offline.report(wanted) == first


def test_legality_counts_shared_memory_and_nothing_else() -> None:
    """Registers are the compiler's to count: 128 accumulators per thread are legal."""
    sm_86 = targets.parse("cuda:sm_86")
    tile = config(8, 4, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8)
    assert "needs 131072 bytes of shared memory" in str(choice.legal_tile(HALF, tile, sm_86))
    tile = config(4, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, GROUP_M=8)
    assert choice.legal_tile(HALF, tile, sm_86) is None


def test_eight_warps_over_taps_are_refused_for_short_fp32_sums_alone() -> None:
    """Those are FMAs; half precision, and fp32 sums long enough for tensor cores, may have them."""
    op, target = registry.get("conv2d"), targets.parse("cuda:sm_90")
    tile = config(8, 3, BLOCK_M=64, BLOCK_N=32, BLOCK_K=16, GROUP_M=8, SPLIT=1)
    short = conv(1, 64, 28, 3, dtype=torch.float32)
    assert "issue 173068" in str(op.legal(short, tile, target))
    assert "issue 173068" not in str(op.legal(short, replace(tile, num_warps=4), target))
    for other in (conv(2, 64, 28, 3, dtype=torch.float32), conv(1, 64, 28, 3)):
        assert op.legal(other, tile, target) is None
    assert all(tile.num_warps <= 4 for tile in op.configs(short, target))
    assert any(tile.num_warps == 8 for tile in op.configs(conv(128, 128, 28, 3), target))


# What must stand between a wait for products and the next write to shared memory.

HEAD = """
mov.b32 %r1, global_smem;
mov.u32 %r2, %tid.x;
shl.b32 %r3, %r2, 4;
add.s32 %r4, %r1, %r3;
add.s32 %r5, %r4, 32768;
bfe.u32 %r6, %r1, 4, 14;
cvt.u64.u32 %rd1, %r6;
or.b64 %rd2, %rd1, 4611686293305294848;
"""
"""Of 256 threads, %r4 points into the first 4,096 bytes, %r5 behind the 128 rows of 128 bytes that
a product reads by %rd2."""
PRODUCT = "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%f1,%f2}, {%r8,%r9}, %rd2, 1, 1, 1;"
WAIT, BARRIER = "wgmma.wait_group.sync.aligned 0;", "bar.sync 0;"
WAIT_FOR_SOME = "wgmma.wait_group.sync.aligned 1;"
STORE = "st.shared.v4.b32 [ %r4 + 0 ], {...};"
COPY = "@%p1 cp.async.cg.shared.global [ %r4 + 0 ], ..."
LOOP, BACK = "$L1: // Loop", "@%p2 bra $L1;"


@pytest.mark.parametrize(
    ("lines", "write"),
    [
        ((PRODUCT, WAIT, BARRIER, STORE), None),
        ((PRODUCT, WAIT, STORE), "st.shared"),
        ((PRODUCT, WAIT, COPY), "cp.async"),
        ((PRODUCT, WAIT, "stmatrix.sync.aligned.x4 [%r4], {...};"), "stmatrix"),
        # What products do not read, or nobody waits for, may be written.
        ((PRODUCT, WAIT, STORE.replace("%r4", "%r5")), None),
        ((PRODUCT, WAIT, STORE.replace("+ 0", "+ 16384")), None),
        ((PRODUCT, WAIT, STORE.replace("+ 0", "+ 12288")), "st.shared"),
        ((STORE, PRODUCT, WAIT), None),
        # An address of unknown origin may lie anywhere.
        ((PRODUCT, WAIT, STORE.replace("%r4", "%r77")), "st.shared"),
        # Around a loop the write stands before the wait in the text.
        ((LOOP, STORE, PRODUCT, WAIT, BACK, "ret;"), "st.shared"),
        ((LOOP, BARRIER, STORE, PRODUCT, WAIT, BACK, "ret;"), None),
        # A wait for some leaves products under way, which the next one waits for.
        ((LOOP, PRODUCT, WAIT_FOR_SOME, BARRIER, COPY, BACK, WAIT, STORE), "st.shared"),
        ((LOOP, PRODUCT, WAIT_FOR_SOME, BARRIER, COPY, BACK, WAIT, BARRIER, STORE), None),
        # A barrier that some threads jump over; code that nothing reaches.
        ((PRODUCT, WAIT, "@%p1 bra $L2;", BARRIER, "$L2:", STORE), "st.shared"),
        ((PRODUCT, WAIT, "bra $L2;", STORE, "$L2:", BARRIER, STORE), None),
        ((PRODUCT, WAIT, "ret;", STORE), None),
    ],
)
def test_a_write_behind_a_wait_needs_a_barrier(lines: tuple[str, ...], write: str | None) -> None:
    found = barriers.unordered_write(HEAD + "\n".join(lines), 256)
    assert found is None if write is None else str(found).startswith(write)


def test_a_kernel_without_its_barrier_is_refused() -> None:
    """A real one with 8 warps: each barrier that stands behind a wait is needed, and found
    missing."""
    op, target = registry.get("conv2d"), targets.parse("cuda:sm_90")
    asked = conv(128, 128, 28, 3, n=32)
    tile = config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8, SPLIT=1)
    (wanted,) = rank.requests(op, asked, op.launches(asked, tile, target), target)
    lines = str(offline.compile_request(wanted).asm["ptx"]).splitlines()
    offline.check_barriers(wanted, "\n".join(lines))
    waits = [at for at, line in enumerate(lines) if "wgmma.wait_group" in line]
    assert len(waits) == 2
    for at in waits:
        behind = next(n for n in range(at, len(lines)) if "bar.sync" in lines[n])
        text = "\n".join((*lines[:behind], *lines[behind + 1 :]))
        with pytest.raises(KernelError, match=r"tile_kernel for sm_90, 8 warps: .*use 4 warps"):
            offline.check_barriers(wanted, text)
        offline.check_barriers(replace(wanted, num_warps=4), text)


def test_an_unwritable_cache_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    (_, wanted), *_ = launch_requests(PRODUCTS["linear 4096"], targets.parse("cuda:sm_90"))
    with pytest.raises(KernelError, match=r"cannot be written: .*Set CONVLOOM_CACHE_DIR"):
        offline.compile_request(wanted)


def test_accumulators_beyond_the_tensor_memory_are_refused() -> None:
    """Triton would compile them to a kernel without instructions that looks free of spills."""
    wanted = offline.CompileRequest("m:f_kernel", (), (), (), 4, 3, 100)
    offline.check_tensor_memory(wanted, 512)
    with pytest.raises(KernelError, match=r"1024 columns .* on sm_100, which has 512"):
        offline.check_tensor_memory(wanted, 1024)


RING = """
mov.b32 %r1, global_smem;
mov.u32 %r2, %tid.x;
mov.b32 %r9, -1;
$L1:
add.s32 %r10, %r9, 1;
setp.gt.s32 %p3, %r10, 2;
selp.b32 %r9, 0, %r10, %p3;
shl.b32 %r11, %r9, 12;
add.s32 %r14, %r1, {ring};
add.s32 %r12, %r14, %r11;
bfe.u32 %r6, %r12, 4, 14;
cvt.u64.u32 %rd1, %r6;
or.b64 %rd2, %rd1, 4611686293305294848;
shl.b32 %r3, %r2, 4;
add.s32 %r13, %r1, {write};
add.s32 %r4, %r13, %r3;
"""
"""A product reads one of three places of 4,096 bytes by %rd2; %r4 points to others as large."""


@pytest.mark.parametrize(
    ("ring", "write", "is_refused"),
    # The counter is -1 before the loop counts it on; that is no place.
    [(0, 12288, False), (0, 8192, True), (4096, 0, False), (4096, 16, True)],
)
def test_a_write_beside_a_ring_needs_no_barrier(ring: int, write: int, is_refused: bool) -> None:
    product = PRODUCT.replace("m64n128", "m64n32")
    lines = (product, WAIT, STORE, BARRIER, BACK)
    text = RING.format(ring=ring, write=write) + "\n".join(lines)
    assert bool(barriers.unordered_write(text, 256)) == is_refused


SWIZZLED = """
mov.b32 %r1, global_smem;
mov.u32 %r2, %tid.x;
and.b32 %r3, %r2, 7;
shl.b32 %r5, %r3, 4;
and.b32 %r6, %r2, 24;
shl.b32 %r7, %r6, 5;
xor.b32 %r8, %r5, %r7;
add.s32 %r9, %r1, %r8;
add.s32 %r4, %r9, 128;
add.s32 %r10, %r1, {product};
bfe.u32 %r11, %r10, 4, 14;
cvt.u64.u32 %rd1, %r11;
or.b64 %rd2, %rd1, 4611686293305294848;
"""
"""%r4 points to the upper halves of 4 rows of 256 bytes: the bit for 128 is set once."""


@pytest.mark.parametrize(("product", "is_refused"), [(1024, False), (768, True)])
def test_bits_that_no_address_has_are_known(product: int, is_refused: bool) -> None:
    text = SWIZZLED.format(product=product) + "\n".join((PRODUCT, WAIT, STORE))
    assert bool(barriers.unordered_write(text, 256)) == is_refused
