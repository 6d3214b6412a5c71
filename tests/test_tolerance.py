"""The tolerance accepts what rounding explains and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from convloom.kernels.contract import tolerance
from convloom.kernels.contract.spec import FLOAT_DTYPES
from hypothesis import given
from hypothesis import strategies as st

every_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
DEPTH = 9 * 16


def convolution(dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's result of a 3x3 convolution in the dtype, and the exact one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 16, 9, 9, generator=generator).to(dtype)
    w = torch.randn(8, 16, 3, 3, generator=generator).to(dtype)
    return F.conv2d(x, w), F.conv2d(x.double(), w.double())


@every_dtype
@given(seed=st.integers(0, 1000))
def test_accepts_pytorch_itself(dtype: torch.dtype, seed: int) -> None:
    eager, exact = convolution(dtype, seed)
    assert tolerance.compare(eager, exact, eager, DEPTH) is None


@every_dtype
@given(seed=st.integers(0, 1000))
def test_accepts_the_exact_result_rounded_once(dtype: torch.dtype, seed: int) -> None:
    eager, exact = convolution(dtype, seed)
    assert tolerance.compare(exact.to(dtype), exact, eager, DEPTH) is None


@every_dtype
def test_accepts_an_overflow_that_rounding_explains(dtype: torch.dtype) -> None:
    exact = torch.tensor([1.0, 1e300], dtype=torch.float64)
    result = torch.tensor([1.0, float("inf")]).to(dtype)
    assert tolerance.compare(result, exact, result) is None


@every_dtype
@given(at=st.integers(0, 2 * 8 * 7 * 7 - 1))
def test_rejects_one_wrong_pixel(dtype: torch.dtype, at: int) -> None:
    """One element among 784 off by 300 roundings: invisible to a root-mean-square gate."""
    eager, exact = convolution(dtype)
    wrong = eager.clone()
    shift = 300 * tolerance.UNIT_ROUNDOFF[dtype] * exact.square().mean().sqrt().item()
    wrong.view(-1)[at] += shift if at % 2 else -shift
    report = tolerance.compare(wrong, exact, eager, DEPTH)
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), exact.shape))
    assert report is not None
    assert f"element {index}" in report
    assert "1 elements off" in report


@every_dtype
def test_rejects_two_swapped_channels(dtype: torch.dtype) -> None:
    eager, exact = convolution(dtype)
    swapped = eager[:, [1, 0, *range(2, 8)]]
    assert "elements off" in str(tolerance.compare(swapped, exact, eager, DEPTH))


@every_dtype
@pytest.mark.parametrize("name", ["NaN", "+Inf", "-Inf"])
def test_rejects_a_shifted_special_value(dtype: torch.dtype, name: str) -> None:
    value = float(name.lower())
    exact = torch.tensor([1.0, value, 3.0], dtype=torch.float64)
    right = exact.to(dtype)
    assert tolerance.compare(right, exact, right) is None
    shifted = right[[1, 0, 2]]
    report = tolerance.compare(shifted, exact, right)
    assert report == f"{name} pattern differs, first at (0,): got True"


@every_dtype
def test_rejects_a_missing_nan(dtype: torch.dtype) -> None:
    exact = torch.tensor([float("nan"), 2.0], dtype=torch.float64)
    report = tolerance.compare(torch.tensor([0.0, 2.0]).to(dtype), exact, exact.to(dtype))
    assert report == "NaN pattern differs, first at (0,): got False"


def test_rejects_another_shape_or_dtype() -> None:
    exact = torch.ones(2, 3, dtype=torch.float64)
    eager = exact.float()
    assert "shape (3, 2), expected (2, 3)" in str(tolerance.compare(eager.t(), exact, eager))
    report = tolerance.compare(eager.half(), exact, eager)
    assert report == "dtype torch.float16, expected torch.float32"


def test_rejects_anything_but_zero_where_everything_is_zero() -> None:
    exact = torch.zeros(4, dtype=torch.float64)
    eager = torch.zeros(4)
    assert tolerance.compare(eager, exact, eager) is None
    assert tolerance.compare(eager + 1e-30, exact, eager) is not None


def test_accepts_empty_and_all_nan_tensors() -> None:
    empty = torch.zeros(0, 3, dtype=torch.float64)
    assert tolerance.compare(empty.float(), empty, empty.float()) is None
    nan = torch.full((3,), float("nan"), dtype=torch.float64)
    assert tolerance.compare(nan.float(), nan, nan.float()) is None


def test_allowance_grows_with_depth_and_coarser_dtypes() -> None:
    depths = (1, 16, 1024, 65536)
    for dtype in FLOAT_DTYPES:
        allowed = [tolerance.bounds(dtype, depth)[1] for depth in depths]
        assert allowed == sorted(allowed)
    relative = [tolerance.bounds(dtype, 1)[0] for dtype in FLOAT_DTYPES]
    assert relative == sorted(relative)
