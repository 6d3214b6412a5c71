"""A residual that is read before the loop, as initial value of the sums."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from convloom.compiler.records import rank
from convloom.kernels import registry
from convloom.kernels.contract import epilogue as ep
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.op import Config, Problem
from convloom.kernels.contract.spec import FLOAT_DTYPES, Layout, Operand, TensorSpec
from convloom.kernels.contract.targets import GPU_TARGETS, Target, parse
from convloom.kernels.devices import offline
from convloom.kernels.products.linear import Linear
from convloom.kernels.tile import residual
from convloom.kernels.tile.conv_geometry import Conv2d
from convloom.kernels.unmeasured import conv_tma, gemm_tma

from . import harness, machine_code
from .test_offline import GENERATIONS, conv, sums_of

SM_90 = parse("cuda:sm_90")
HALF = torch.float16
CHAIN = (Stage("add"), Stage("add"), Stage("relu"))


def problem(kind: str, dtype: torch.dtype = HALF, epilogue: tuple[Stage, ...] = CHAIN) -> Problem:
    """Bias, residual, ReLU; odd sizes that fill no tile, all tensors parts of wider buffers."""
    if kind == "linear":
        op, attributes = registry.get("linear"), Linear()
        x, w = TensorSpec((50, 72), dtype, batch=50), TensorSpec((40, 72), dtype)
        bias = TensorSpec((40,), torch.float32)
    else:
        filters = 3 if kind == "3x3" else 1
        op, attributes = registry.get("conv2d"), Conv2d(padding=(filters // 2,) * 4)
        channels = 3 if kind == "few channels" else 64
        x = TensorSpec((3, channels, 5, 6), dtype, Layout.NHWC, batch=3)
        w = TensorSpec((40, channels, filters, filters), dtype)
        bias = TensorSpec((40, 1, 1), torch.float32)
    (y,) = op.infer(attributes, (x, w))
    return harness.problem_for(op, attributes, (x, w), epilogue, (bias, y), pad=8)


def early(asked: Problem, target: Target = SM_90) -> list[Config]:
    """The configurations that read the residual first: of each kind the smallest and the largest
    tile."""
    found: dict[object, list[Config]] = {}
    for tile in registry.get(asked.op).configs(asked, target):
        if residual.comes_first(tile):
            kind = gemm_tma.uses_tma(tile), conv_tma.uses_boxes(tile)
            found.setdefault(kind, []).append(tile)
    ends = [(tiles[0], tiles[-1]) for tiles in found.values()]
    return list(dict.fromkeys(tile for pair in ends for tile in pair))


def tensors_of(asked: Problem, whole: bool = False) -> tuple[tuple[torch.Tensor, ...], ...]:
    """Inputs and operands."""
    make = harness.make_integers if whole else harness.make_tensor
    return tuple(
        tuple(make(operand.spec, 10 * at + seed, -2, 2) for at, operand in enumerate(group))
        for seed, group in enumerate((asked.inputs, asked.operands))
    )


KINDS = ("linear", "1x1", "3x3", "few channels")


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_agrees_with_the_reference(kind: str, dtype: torch.dtype) -> None:
    """In every algorithm; also of a smaller batch, which leaves the other samples alone."""
    asked = problem(kind, dtype)
    op, batch = registry.get(asked.op), asked.inputs[0].spec.batch or 1
    inputs, operands = tensors_of(asked)
    tiles = early(asked)
    assert tiles
    for tile in tiles:
        results = harness.run_interpreted(op, asked, inputs, operands, tile, batch)
        harness.compare(op, asked, results, inputs, operands)
        (fewer,) = harness.run_interpreted(op, asked, inputs, operands, tile, batch - 1)
        assert torch.equal(fewer[: batch - 1], results[0][: batch - 1])
        assert fewer[batch - 1 :].isnan().all()


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_and_special_values_at_wide_offsets(kind: str) -> None:
    asked = problem(kind, torch.float32)
    op, batch = registry.get(asked.op), asked.inputs[0].spec.batch or 1
    inputs, operands = tensors_of(asked, whole=True)
    special = tuple(harness.with_special_values(operand, 3) for operand in operands)
    (exact,) = harness.expected(op, asked, inputs, operands)
    for tile in early(asked):
        (result,) = harness.run_interpreted(op, asked, inputs, operands, tile, batch)
        assert torch.equal(result.double(), exact), tile
        results = harness.run_interpreted(op, asked, inputs, special, tile, batch, wide=True)
        harness.compare(op, asked, results, inputs, special)


def test_the_epilogue_does_without_it() -> None:
    """What is read first is not read again; the other operand keeps its place."""
    asked = problem("1x1")
    usual, tile = registry.get("conv2d").default(asked, SM_90), early(asked)[0]
    assert residual.output_of(asked, usual)[1] is None
    output, first = residual.output_of(asked, tile)
    assert first is not None and "extras[1]" in first.source and ".to(" not in first.source
    assert "extras[0]" in output.epilogue.source and "extras[1]" not in output.epilogue.source


def changed(asked: Problem, *stages: Stage, operands: tuple[int, ...] = (0, 1)) -> Problem:
    """The problem with another epilogue, which reads those of its operands."""
    return replace(asked, epilogue=stages, operands=tuple(asked.operands[at] for at in operands))


def test_it_is_refused_with_a_reason() -> None:
    asked, op = problem("1x1"), registry.get("conv2d")
    begin = early(asked)[0]
    add, relu = Stage("add"), Stage("relu")
    first = "the epilogue does not begin with additions"
    for other in (
        changed(asked, relu, add, operands=(1,)),
        changed(asked, Stage("mul"), add),
        changed(asked, replace(add, channels=(0, 8)), operands=(1,)),
        changed(asked, add, operands=(0,)),
        changed(asked),
    ):
        assert first in str(op.legal(other, begin, SM_90)) and not early(other)
    for other in (
        changed(asked, add, operands=(1,)),
        changed(asked, Stage("add", literal=1.0), add, relu, operands=(1,)),
    ):
        assert op.legal(other, begin, SM_90) is None and early(other)
    split = replace(begin, blocks=tuple({**dict(begin.blocks), "SPLIT": 4}.items()))
    assert "4 programs share each sum" in str(op.legal(asked, split, SM_90))
    assert any(residual.comes_first(tile) for tile in op.configs(problem("3x3"), SM_90))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", GPU_TARGETS, ids=lambda target: target.name)
def test_it_is_never_a_default(kind: str, target: Target) -> None:
    """The model cannot tell: it gives the same time, and the usual epilogue comes first."""
    asked = problem(kind)
    op = registry.get(asked.op)
    assert not residual.comes_first(op.default(asked, target))
    for tile in early(asked, target):
        plain = replace(tile, blocks=tile.blocks[:-1])
        times = [rank.modelled_us(op, asked, target, each) for each in (tile, plain)]
        assert times[0] == times[1]
    ranked = rank.rank(op, asked, target, rank.space(op, asked, target))
    tried = rank.varied(op, asked, target, ranked, 999)
    assert not residual.comes_first(tried[0]) and any(map(residual.comes_first, tried[:4]))


# Machine code.


def opcodes(asked: Problem, tile: Config, target: Target) -> list[str]:
    """The instructions, after asserting that none of them spills."""
    op = registry.get(asked.op)
    (wanted,) = rank.requests(op, asked, op.launches(asked, tile, target), target)
    assert offline.report(wanted).spill_bytes == 0, tile
    sass = offline.disassembly(offline.compile_request(wanted))
    return [found[2] for found in machine_code.INSTRUCTION.finditer(sass)]


def large_tiles(asked: Problem, target: Target) -> dict[bool, Config]:
    """For each kind of copies the configuration with most sums of a thread among those that the
    compiler is known to fit."""
    most = 32 if asked.output.spec.dtype is torch.float32 else 64
    most = 128 if most == 64 and target.capability == 90 else most
    found: dict[bool, Config] = {}
    for tile in registry.get(asked.op).configs(asked, target):
        if residual.comes_first(tile) and sums_of(tile) <= most and tile["BLOCK_K"] <= 64:
            kind = gemm_tma.uses_tma(tile) or conv_tma.uses_boxes(tile)
            best = found.setdefault(kind, tile)
            if _weight(tile) > _weight(best):
                found[kind] = tile
    return found


def _weight(tile: Config) -> tuple[int, int]:
    return tile["BLOCK_M"] * tile["BLOCK_N"] // tile.num_warps, tile["BLOCK_K"]


@pytest.mark.parametrize("filters", [1, 3])
def test_its_loads_stand_before_the_first_product(filters: int) -> None:
    """On sm_90: it is rearranged for the tensor cores before them."""
    channels, size = (512, 14) if filters == 1 else (128, 28)
    asked = conv(channels, channels, size, filters, n=32)
    tiles = large_tiles(asked, SM_90)
    assert len(tiles) == 2
    for tile in tiles.values():
        found = opcodes(asked, tile, SM_90)
        product = next(at for at, name in enumerate(found) if name.startswith("HGMMA"))
        loads = [at for at, name in enumerate(found) if name.startswith("LDG.E.128")]
        assert loads and max(loads) < product, tile
        assert any(name.startswith("STS") for name in found[:product]), tile


@pytest.mark.parametrize("target", GENERATIONS, ids=lambda target: target.name)
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_the_largest_tiles_do_not_spill(dtype: torch.dtype, target: Target) -> None:
    asked = conv(128, 128, 28, 3, n=32, dtype=dtype)
    for tile in large_tiles(asked, target).values():
        found = opcodes(asked, tile, target)
        copies = "UTMALDG" if conv_tma.uses_boxes(tile) else "LDGSTS.E.BYPASS.128"
        assert any(name.startswith(copies) for name in found), tile


def test_a_residual_of_one_image_is_added_before_the_bias() -> None:
    """A batch of one repeats nothing: residual before bias saves registers there as well."""
    asked = problem("1x1")
    image = Operand.dense(asked.output.spec.with_(shape=asked.output.spec.at(1), batch=1))
    one = replace(asked, outputs=(image,), operands=(asked.operands[0], image))
    source = ep.for_output(one.epilogue, one.operands, one.output.spec).source
    assert source.index("extras[1]") < source.index("extras[0]")
