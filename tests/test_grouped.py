"""Grouped convolution by blocks of groups: what the generic tests of conv2d do not cover."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from convloom.kernels.contract.spec import FLOAT_DTYPES, Layout, TensorSpec
from convloom.kernels.contract.targets import parse
from convloom.kernels.convolution import conv2d, grouped
from convloom.kernels.tile.conv_geometry import Conv2d
from hypothesis import given
from hypothesis import strategies as st

from . import harness
from .test_offline import conv

SPECIAL = (float("nan"), float("inf"), float("-inf"))


def case(
    groups: int, c: int, k: int, dtype: torch.dtype, dilation: tuple[int, int]
) -> harness.Case:
    """A padded 3x3 convolution with c and k channels per group."""
    x = TensorSpec((2, groups * c, 5, 6), dtype, Layout.NHWC)
    w = TensorSpec((groups * k, c, 3, 3), dtype)
    return harness.Case(conv2d.OP, Conv2d((1, 1), (1,) * 4, dilation, groups), (x, w))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@given(
    groups=st.integers(2, 12),
    c=st.sampled_from((2, 4, 6, 8, 16)),
    k=st.sampled_from((1, 4, 8, 16)),
    where=st.integers(0, 10_000),
    value=st.sampled_from(SPECIAL),
    dilation=st.sampled_from(((1, 1), (1, 2), (2, 1))),
)
def test_what_is_not_finite_stays_in_its_group(
    dtype: torch.dtype,
    groups: int,
    c: int,
    k: int,
    where: int,
    value: float,
    dilation: tuple[int, int],
) -> None:
    """One such input among zeros of the packed weights: the other groups of the block are exact."""
    drawn = case(groups, c, k, dtype, dilation)
    x, w = drawn.tensors(where)
    channel = where % (groups * c)
    x[where % 2, channel, where % 5, where % 6] = value
    problem = harness.problem_for(conv2d.OP, drawn.attributes, drawn.specs, pad=3)
    assert conv2d.algorithm(problem).name == "grouped"
    (result,) = harness.run_interpreted(conv2d.OP, problem, (x, w))
    others = torch.arange(groups * k) // k != channel // c
    assert result[:, others].isfinite().all() and not result.isfinite().all()
    harness.compare(conv2d.OP, problem, (result,), (x, w))


def test_packed_weights_are_block_diagonal() -> None:
    """Three groups of 8 -> 4 channels: one block of 24 columns."""
    w = torch.arange(12.0 * 8 * 3).reshape(12, 8, 3, 1) + 1
    packed = grouped.pack(3, w).reshape(3, 4, 3, 3, 8)
    for group in range(3):
        for other in range(3):
            block = packed[group, :, :, other]
            expected = w[4 * group : 4 * group + 4, :, :, 0].permute(0, 2, 1)
            assert torch.equal(block, expected if other == group else torch.zeros_like(block))


@pytest.mark.parametrize(
    ("groups", "c", "k", "together"),
    [(32, 4, 4, 8), (32, 8, 8, 4), (32, 16, 16, 2), (32, 32, 32, 1), (2, 48, 128, 1), (3, 4, 8, 3)],
)
def test_groups_per_block(groups: int, c: int, k: int, together: int) -> None:
    assert grouped.groups_per_block(groups, c, k) == together
    applies = grouped.applies(Conv2d(groups=groups), (groups * k, c, 3, 3))
    assert applies is (together > 1)


def test_depthwise_is_not_grouped() -> None:
    assert not grouped.applies(Conv2d(groups=8), (8, 1, 3, 3))


def test_one_channel_in_one_group_is_a_product() -> None:
    assert conv2d.algorithm(conv(1, 20, 28, 5)).name != "depthwise"
    assert conv2d.algorithm(conv(8, 8, 28, 5, groups=8)).name == "depthwise"


def test_what_is_known_to_spill_is_no_default() -> None:
    sm_80, sm_90 = parse("cuda:sm_80"), parse("cuda:sm_90")
    problem = conv(128, 128, 56, 3, groups=32)
    tall = grouped.default(problem, sm_90)
    assert tall["BLOCK_M"] == 128 and grouped.legal(problem, tall, sm_90) is None
    assert grouped.default(problem, sm_80)["BLOCK_M"] == 64
    single = conv(128, 128, 56, 3, groups=32, dtype=torch.float32)
    assert grouped.default(single, sm_90)["BLOCK_M"] == 64


def test_what_does_not_fit_shared_memory_is_refused() -> None:
    problem, sm_90 = conv(128, 128, 56, 3, groups=32), parse("cuda:sm_90")
    deep = replace(grouped.default(problem, sm_90), num_stages=64)
    assert "shared memory" in str(grouped.legal(problem, deep, sm_90))
