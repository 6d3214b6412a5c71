"""Interpreting and compiling kernels side by side, and what the interpreter does differently."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from convloom.errors import KernelError
from convloom.kernels.devices import interpreter
from hypothesis import given
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import core
from triton.runtime.interpreter import interpreter_builder
from triton.runtime.jit import JITFunction

pytestmark = pytest.mark.interpreter


@triton.jit
def twice(v):
    return v + v


@triton.jit
def four_times(v):
    return twice(twice(v))


@triton.jit
def row_sums_kernel(x, y, m, C: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, C)
    mask = (rows < m)[:, None]
    value = tl.load(x + rows[:, None] * C + columns[None, :], mask=mask, other=0.0)
    tl.store(y + rows, four_times(tl.sum(value.to(tl.float32), axis=1)), mask=rows < m)


@triton.jit
def copy_kernel(x, y, m, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < m, other=0.0)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=at < m)


@triton.jit
def product_kernel(a, b, y, N: tl.constexpr):
    at = tl.arange(0, N)
    grid = at[:, None] * N + at[None, :]
    acc = tl.zeros((N, N), tl.float32)
    tl.store(y + grid, tl.dot(tl.load(a + grid), tl.load(b + grid), acc))


@triton.jit
def chosen_kernel(x, y, extras, m, BLOCK: tl.constexpr):
    """The program's own of the extras, and as many of them as `x` has numbers that are not zero."""
    at = tl.arange(0, BLOCK)
    nonzero = tl.sum((tl.load(x + at, mask=at < m, other=0.0) != 0).to(tl.int32), axis=0)
    value = tl.load(extras[tl.program_id(0)])
    for each in range(nonzero):
        value += tl.load(extras[each])
    tl.store(y + tl.program_id(0), value)


@triton.jit
def failing_kernel(y, extras, m):
    # There are two extras: the third program fails.
    tl.store(y + tl.program_id(0), tl.load(extras[tl.program_id(0)]))


@triton.jit
def even_kernel(y, m, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    is_written = (at < m) & (tl.program_id(0) % 2 == 0)
    tl.store(y + tl.program_id(0) * BLOCK + at, (is_written == 1).to(tl.float32), mask=is_written)


def row_sums(x: torch.Tensor) -> torch.Tensor:
    """Four times the sum of each row, by the interpreted kernel."""
    y = torch.full((x.shape[0],), float("nan"))
    grid = (-(-x.shape[0] // 4), 1, 1)
    arguments = {"x": x, "y": y, "m": x.shape[0]}
    with interpreter.interpreting():
        interpreter.run(row_sums_kernel, grid, arguments, {"C": x.shape[1], "BLOCK": 4})
    return y


def copied(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in another dtype, by the interpreted kernel."""
    y = torch.empty(x.shape, dtype=dtype)
    arguments = {"x": x, "y": y, "m": x.numel()}
    with interpreter.interpreting():
        interpreter.run(copy_kernel, (-(-x.numel() // 8192), 1, 1), arguments, {"BLOCK": 8192})
    return y


def fail(y: torch.Tensor) -> None:
    """Runs four programs of which the third fails; call inside `interpreting()`."""
    extras = (torch.ones(1), torch.ones(1))
    interpreter.run(failing_kernel, (4, 1, 1), {"y": y, "extras": extras, "m": 4}, {})


def compiled_row_sums(columns: int) -> Any:
    """The kernel compiled for sm_90."""
    signature = {"x": "*fp32", "y": "*fp32", "m": "i32", "C": "constexpr", "BLOCK": "constexpr"}
    source = ASTSource(row_sums_kernel, signature, constexprs={(3,): columns, (4,): 4})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Nothing compiled earlier may stand in for a compilation that fails."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


def test_one_process_interprets_and_compiles() -> None:
    x = torch.randn(6, 8)
    for columns in (8, 16, 32):
        torch.testing.assert_close(row_sums(x), 4 * x.sum(1))
        assert "tt.reduce" in compiled_row_sums(columns).asm["ttir"]


def test_nested_functions_are_interpreted() -> None:
    """The kernel calls a function that calls another, and the standard library's sum."""
    x = torch.arange(12.0).reshape(3, 4)
    assert row_sums(x).tolist() == [24.0, 88.0, 152.0]


def test_functions_cannot_be_called_outside_the_block() -> None:
    row_sums(torch.ones(1, 4))
    with pytest.raises(RuntimeError, match="outside of the scope of a kernel"):
        twice(1)


@pytest.mark.filterwarnings("error")
def test_a_truth_value_that_is_spread_is_a_mask() -> None:
    y = torch.zeros(3, 4)
    with interpreter.interpreting():
        interpreter.run(even_kernel, (3, 1, 1), {"y": y.view(-1), "m": 3}, {"BLOCK": 4})
    assert y.tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]]


def test_scalars_are_indices() -> None:
    """Of tuples and of ranges: since 2.4 numpy converts an array of one dimension no more, and
    before it warned."""
    x, y = torch.tensor([3.0, 0.0, 2.0, 1.0]), torch.zeros(3)
    extras = tuple(torch.tensor([value]) for value in (1.0, 10.0, 100.0))
    arguments = {"x": x, "y": y, "extras": extras, "m": 4}
    with interpreter.interpreting():
        interpreter.run(chosen_kernel, (3, 1, 1), arguments, {"BLOCK": 8})
    assert y.tolist() == [112.0, 121.0, 211.0]


def language() -> dict[str, Any]:
    """Everything that interpreting may replace."""
    members = {f"{module.__name__}.{name}": value for module in (tl, core, tl.tensor)
               for name, value in vars(module).items()}  # fmt: skip
    rest = {"call": JITFunction.__call__, "options": interpreter_builder.options}
    return members | rest


def test_the_language_is_restored_after_an_exception() -> None:
    before = language()
    with pytest.raises(KernelError), interpreter.interpreting():
        fail(torch.zeros(4))
    after = language()
    assert before.keys() == after.keys()
    assert [name for name, value in before.items() if after[name] is not value] == []
    assert "tt.reduce" in compiled_row_sums(8).asm["ttir"]


def test_a_failure_names_kernel_and_program() -> None:
    y = torch.zeros(4)
    with (
        pytest.raises(KernelError, match=r"kernel failing_kernel, program \(2, 0, 0\) of \(4, 1"),
        interpreter.interpreting(),
    ):
        fail(y)
    assert y.tolist() == [1.0, 1.0, 0.0, 0.0], "tensors are written in place, program by program"


def test_wrong_arguments_are_named() -> None:
    with (
        pytest.raises(
            KernelError, match=r"failing_kernel: expected arguments \['y', 'extras', 'm'\], got"
        ),
        interpreter.interpreting(),
    ):
        interpreter.run(failing_kernel, (1, 1, 1), {"y": torch.zeros(1)}, {})


HARD_TO_ROUND = (0.0, -0.0, 1.00390625, 1.01171875, 3.3895e38, 1e-40, float("inf"), -float("inf"))


@given(values=st.lists(st.floats(width=32) | st.sampled_from(HARD_TO_ROUND), min_size=1))
def test_bfloat16_rounds_to_nearest_even(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    got, want = copied(x, torch.bfloat16), x.to(torch.bfloat16)
    assert torch.equal(got.isnan(), want.isnan())
    number = ~want.isnan()
    assert torch.equal(got[number].view(torch.int16), want[number].view(torch.int16))


def test_a_nan_of_any_bits_stays_one_in_bfloat16() -> None:
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1], dtype=torch.int32)
    assert copied(bits.view(torch.float32), torch.bfloat16).isnan().all()


def test_every_bfloat16_converts_exactly() -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        np.testing.assert_array_equal(copied(x, dtype).float().numpy(), x.float().numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_products_accumulate_in_fp32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).to(dtype) for _ in range(2))
    y = torch.zeros(16, 16)
    with interpreter.interpreting():
        interpreter.run(product_kernel, (1, 1, 1), {"a": a, "b": b, "y": y}, {"N": 16})
    torch.testing.assert_close(y, a.float() @ b.float(), rtol=1e-6, atol=1e-5)
