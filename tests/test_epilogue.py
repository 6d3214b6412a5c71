"""Epilogues as generated source: addresses, merging of dimensions, the text itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from convloom.kernels import registry
from convloom.kernels.contract import epilogue as ep
from convloom.kernels.contract.epilogue import Access, Stage
from convloom.kernels.contract.spec import Layout, Operand, TensorSpec
from convloom.kernels.movement.pointwise import Pointwise
from hypothesis import assume, given
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import harness

extents = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)


@st.composite
def walks(draw: Any, count: int = 1) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Extents, and strides as tensors have them: dense, padded, broadcast or arbitrary."""
    sizes = draw(extents)
    result = []
    for _ in range(count):
        step, strides = draw(st.sampled_from((0, 1, 1, 2))), []
        for size in reversed(sizes):
            strides.append(draw(st.sampled_from((step, step, step, 0, step + 3))))
            step = max(strides[-1], 1) * size
        result.append(tuple(reversed(strides)))
    return sizes, tuple(result)


def offsets(sizes: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The offset of every point of the space, in order."""
    grid = np.indices(sizes).reshape(len(sizes), -1)
    return np.asarray(strides) @ grid


def evaluate(expression: str, count: int) -> np.ndarray[Any, Any]:
    """A row address for rows 0 to `count`."""
    rows = np.arange(count)
    return rows * 0 + eval(expression or "0", {"rows": rows})


@given(walk=walks())
def test_row_address_is_the_offset_of_the_row(walk: Any) -> None:
    sizes, (strides,) = walk
    address = evaluate(ep.row_address(sizes, strides), math.prod(sizes))
    np.testing.assert_array_equal(address, offsets(sizes, strides))


@given(walk=walks(), longer=st.integers(1, 7))
def test_row_address_goes_on_beyond_the_first_extent(walk: Any, longer: int) -> None:
    """The first extent may be the batch: the address holds for any number of samples."""
    sizes, (strides,) = walk
    assume(math.prod(sizes[1:]) > 1 or len(sizes) == 1)
    more = (sizes[0] + longer, *sizes[1:])
    assume(sizes[0] > 1)
    address = evaluate(ep.row_address(sizes, strides), math.prod(more))
    np.testing.assert_array_equal(address, offsets(more, strides))


@pytest.mark.parametrize(
    ("sizes", "strides", "expected"),
    [
        ((), (), ""),
        ((6,), (0,), ""),
        ((6,), (1,), "(rows)"),
        ((2, 5, 7), (35, 7, 1), "(rows)"),
        ((2, 5, 7), (35 * 8, 7 * 8, 8), "(rows) * 8"),
        ((2, 5, 7), (8, 0, 0), "(rows // 35) * 8"),
        ((2, 5, 7), (0, 7, 1), "((rows) % 35)"),
        ((2, 5, 7), (0, 3, 0), "((rows // 7) % 5) * 3"),
        ((2, 5, 7), (100, 7, 1), "(rows // 35) * 100 + ((rows) % 35)"),
    ],
)
def test_row_address_is_simple(
    sizes: tuple[int, ...], strides: tuple[int, ...], expected: str
) -> None:
    assert ep.row_address(sizes, strides) == expected


@given(walk=walks(count=3), keep_first=st.booleans())
def test_collapse_keeps_every_walk(walk: Any, keep_first: bool) -> None:
    sizes, strides = walk
    merged, kept = ep.collapse(sizes, strides, keep_first)
    assert len(merged) <= len(sizes)
    assert math.prod(merged) == math.prod(sizes)
    if keep_first:
        assert merged[0] == sizes[0]
    for before, after in zip(strides, kept, strict=True):
        np.testing.assert_array_equal(offsets(merged, after), offsets(sizes, before))


@given(sizes=extents)
def test_collapse_makes_a_dense_walk_one_dimension(sizes: tuple[int, ...]) -> None:
    assume(all(size > 1 for size in sizes))
    strides = tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes)))
    assert ep.collapse(sizes, (strides, strides), keep_first=False)[0] == (math.prod(sizes),)
    kept, _ = ep.collapse(sizes, (strides, strides), keep_first=True)
    assert kept == (sizes[0], *([math.prod(sizes[1:])] if len(sizes) > 1 else []))


@st.composite
def outputs(draw: Any) -> TensorSpec:
    shape = draw(st.lists(st.integers(1, 5), min_size=2, max_size=5).map(tuple))
    nhwc = len(shape) == 4 and draw(st.booleans())
    return TensorSpec(shape, torch.float32, Layout.NHWC if nhwc else Layout.DENSE)


@given(output=outputs(), data=st.data(), pad=harness.pads)
def test_access_reads_what_torch_broadcasts(
    output: TensorSpec, data: st.DataObject, pad: int
) -> None:
    operand = harness.place(data.draw(harness.operand_specs(output)), pad)
    logical = harness.make_tensor(operand.spec, 0, -1.0, 1.0)
    buffer = harness.buffer_for(operand, logical)
    read = ep.access(operand, output)
    sizes = ep.memory_sizes(output)
    got = buffer[torch.from_numpy(offsets(sizes, read.strides)) + read.offset]
    order = output.layout.order(output.rank)
    want = torch.broadcast_to(logical, output.shape).permute(order).reshape(-1)
    assert torch.equal(got, want)


GOLDEN = """\
@triton.jit
def epilogue(acc, rows, columns, row_mask, column_mask, extras):
    # add float32[2, 8, 3, 5] nhwc
    operand1 = tl.load(extras[1] + 4 + ((rows) * 12)[:, None] + (columns)[None, :], \
mask=row_mask[:, None] & column_mask[None, :], other=0.0).to(tl.float32)
    acc = add(acc, operand1)
    # add float32[8, 1, 1]
    operand0 = tl.load(extras[0] + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    acc = add(acc, operand0)
    acc = clamp(acc, 0.0, float("inf"))
    # mul float32[2, 1, 1, 1]
    operand2 = tl.load(extras[2] + (rows // 15), mask=row_mask, other=0.0)\
.to(tl.float32)[:, None]
    acc = multiply(acc, operand2)
    acc = subtract(tl.cast(1.5, tl.float32), acc)
    return acc
"""


def test_generated_source() -> None:
    """Bias, strided residual, activation, scale per sample, literal: the residual goes first."""
    output = TensorSpec((2, 8, 3, 5), torch.float32, Layout.NHWC)
    bias = Operand.dense(TensorSpec((8, 1, 1), torch.float32))
    residual = Operand(output, pitch=12, offset=4)
    scale = Operand.dense(TensorSpec((2, 1, 1, 1), torch.float32))
    stages = (
        Stage("add"),
        Stage("add"),
        Stage("clamp", (0.0, float("inf"))),
        Stage("mul"),
        Stage("sub", literal=1.5, reverse=True),
    )
    generated = ep.for_output(stages, (bias, residual, scale), output)
    assert str(generated) == GOLDEN
    assert generated.symbols == ("add", "clamp", "multiply", "subtract")


def test_generated_functions_are_made_once() -> None:
    first = ep.row_offset_function((2, 3), (10, 1))
    second = ep.row_offset_function((2, 3), (10, 1))
    assert first == second
    assert first.resolve() is second.resolve()
    assert first.resolve() is not ep.row_offset_function((2, 3), (20, 1)).resolve()


def test_only_runs_of_additions_are_reordered() -> None:
    full, channel = Access((8, 1), 0, "full"), Access((0, 1), 0, "channel")
    stages = (Stage("add"), Stage("relu"), Stage("add"), Stage("add"))
    source = ep.generate(stages, (channel, channel, full), (4, 8)).source
    order = [line.split()[2] for line in source.splitlines() if line.strip().startswith("# add")]
    assert order == ["channel", "full", "channel"]


@pytest.mark.parametrize(
    ("literal", "text"),
    [
        (4.0, "multiply(acc, tl.cast(0.25, tl.float32))"),
        (-0.125, "multiply(acc, tl.cast(-8.0, tl.float32))"),
        (3.0, "divide_by(acc, tl.cast(3.0, tl.float32), tl.cast(0.3333333432674408, tl.float32))"),
        (0.75, "divide(acc, tl.cast(0.75, tl.float32))"),
        (2.0**-127, f"divide(acc, tl.cast({2.0**-127!r}, tl.float32))"),
        (2.0**127, f"divide(acc, tl.cast({2.0**127!r}, tl.float32))"),
        (1e30, "divide(acc, tl.cast(1e+30, tl.float32))"),
        (0.0, "divide(acc, tl.cast(0.0, tl.float32))"),
        (math.inf, 'divide(acc, tl.cast(float("inf"), tl.float32))'),
        (math.nan, 'divide(acc, tl.cast(float("nan"), tl.float32))'),
    ],
)  # fmt: skip
def test_most_numbers_divide_by_products(literal: float, text: str) -> None:
    source = ep.generate((Stage("div", literal=literal),), (), (4, 8)).source
    assert f"    acc = {text}\n" in source
    reverse = ep.generate((Stage("div", literal=literal, reverse=True),), (), (4, 8)).source
    assert "acc = divide(" in reverse


SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 3.4028235e38, -3.4028235e38, 1.17549435e-38)
POWERS = [2.0**exponent for exponent in (-125, -3, 1, 2, 6, 124)]


@pytest.mark.interpreter
@pytest.mark.parametrize("literal", [*POWERS, 3.0, -7.0, 9.0, 49.0, 255.0, 1.1, 1e6, 1.8e19])
def test_quotients_by_numbers_are_rounded_as_quotients_are(literal: float) -> None:
    """Bit by bit: by powers of two everywhere, by others from 2^-100 on."""
    bits = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32).view(np.float32)
    whole = (torch.arange(2.0**12) * literal).numpy()
    values = torch.from_numpy(np.concatenate([bits, whole, np.array(SPECIAL, np.float32)]))
    if literal not in POWERS:
        values = values[(values.abs() >= 2.0**-100) | (values == 0) | values.isnan()]
    op, spec = registry.get("div"), TensorSpec(tuple(values.shape), values.dtype)
    problem = harness.problem_for(op, Pointwise(literal=literal), (spec,))
    (result,) = harness.run_interpreted(op, problem, (values,))
    expected = values / torch.tensor(literal)
    assert torch.equal(result.isnan(), expected.isnan())
    same = result.view(torch.int32) == expected.view(torch.int32)
    assert bool((same | expected.isnan()).all()), values[~same][:5]


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        (Stage("relu"), "relu"),
        (Stage("clamp", (0.0, 6.0)), "clamp(0, 6)"),
        (Stage("sub", literal=1.0, reverse=True), "rsub(1)"),
        (Stage("leaky_relu", (0.01,)), "leaky_relu(0.01)"),
    ],
)
def test_stage_text(stage: Stage, text: str) -> None:
    assert str(stage) == text


@triton.jit
def two_functions(y, FIRST: tl.constexpr, SECOND: tl.constexpr):
    rows = tl.arange(0, 16)
    tl.store(y + FIRST(rows), SECOND(rows))


def test_generated_functions_of_one_name_stay_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Triton knows a function by module and name; the interpreter would not notice a mix-up."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    functions = [ep.row_offset_function((16,), (stride,)).resolve() for stride in (17, 23)]
    source = ASTSource(
        fn=two_functions,
        signature={"y": "*i32", "FIRST": "constexpr", "SECOND": "constexpr"},
        constexprs={(1,): functions[0], (2,): functions[1]},
    )
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    assert "dense<17>" in text
    assert "dense<23>" in text
