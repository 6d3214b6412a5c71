"""Properties that every op of the registry has: an op is tested by being in the table."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from convloom.errors import InvalidInputError
from convloom.kernels import registry
from convloom.kernels.contract.op import Attributes
from convloom.kernels.contract.spec import FLOAT_DTYPES, Layout, TensorSpec
from convloom.kernels.movement.movement import Concat, Permute, Relayout, Slice
from convloom.kernels.movement.pointwise import Pointwise
from convloom.kernels.movement.rearrangement import Expand, Reshape
from convloom.kernels.normalisation.batch_norm import BatchNorm
from convloom.kernels.normalisation.reduce import Reduce
from convloom.kernels.normalisation.softmax import Softmax
from convloom.kernels.products.linear import Linear
from convloom.kernels.tile.conv_geometry import Conv2d

from .domains import domain_of
from .properties import ops
from .properties.ops import Subject, with_draws

SUBJECTS = [pytest.param(Subject(op, domain_of(op)), id=op.name) for op in registry.OPS]
INTERESTING = [
    pytest.param(subject, draw, id=f"{subject.op.name}-{index}")
    for (subject,) in (each.values for each in SUBJECTS)
    for index, draw in enumerate(subject.domain.interesting)
]
interpreter = pytest.mark.interpreter
# For coverage.py: other numbers on the way of `test_kernel_agrees_with_reference`.
untraced = pytest.mark.untraced
every_op = pytest.mark.parametrize("subject", SUBJECTS)
every_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
every_draw = pytest.mark.parametrize(("subject", "draw"), INTERESTING)
slow = pytest.mark.slow
# The random problems have every dtype.
most_dtypes = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, id=str(dtype), marks=slow if dtype is torch.bfloat16 else ())
        for dtype in FLOAT_DTYPES
    ],
)
# Half of the draws with either, all of them in the slow tests.
FIRST = ("negative", "positive")
WITH_FIRST = [
    pytest.param(*each.values, first, id=f"{first}-{each.id}", marks=() if at % 2 == way else slow)
    for way, first in enumerate(FIRST)
    for at, each in enumerate(INTERESTING)
]


def those(takes: str) -> Any:
    """The ops that take an epilogue, or a prologue."""
    kept = [each for each in SUBJECTS if getattr(each.values[0].op, takes)]
    return pytest.mark.parametrize("subject", kept)


test_infer_agrees_with_reference = every_op(with_draws(ops.infer_agrees_with_reference))
test_infer_refuses_what_the_reference_refuses = every_op(
    with_draws(ops.infer_refuses_what_the_reference_refuses)
)
test_kernel_agrees_with_reference = interpreter(
    every_dtype(every_op(with_draws(ops.kernel_agrees_with_reference)))
)
test_interesting_draws = untraced(interpreter(most_dtypes(every_draw(ops.interesting_draws))))
test_what_stands_for_no_element_is_not_seen = untraced(interpreter(
    pytest.mark.parametrize(("subject", "draw", "first"), WITH_FIRST)(
        ops.what_stands_for_no_element_is_not_seen
    )
))  # fmt: skip
test_gpu_configurations_agree_with_reference = interpreter(
    every_op(with_draws(ops.gpu_configurations_agree_with_reference))
)
test_configurations_are_legal = every_op(with_draws(ops.configurations_are_legal))
test_epilogue_equals_kernel_then_epilogue = interpreter(
    those("takes_epilogue")(with_draws(ops.epilogue_equals_kernel_then_epilogue))
)
test_prologue_equals_stages_then_kernel = interpreter(
    those("takes_prologue")(with_draws(ops.prologue_equals_stages_then_kernel))
)
test_nan_and_infinity = interpreter(every_op(with_draws(ops.nan_and_infinity)))
test_whole_numbers_are_exact = interpreter(every_op(with_draws(ops.whole_numbers_are_exact)))
test_wide_offsets_change_nothing = untraced(
    interpreter(every_op(with_draws(ops.wide_offsets_change_nothing)))
)
test_smaller_batch = untraced(interpreter(every_op(with_draws(ops.smaller_batch))))


def image(*shape: int, batch: int | None = None) -> TensorSpec:
    return TensorSpec(shape, torch.float32, Layout.NHWC, batch)


def dense(*shape: int, batch: int | None = None) -> TensorSpec:
    return TensorSpec(shape, torch.float32, batch=batch)


MESSAGES = (
    ("conv2d", Conv2d(), (dense(3, 8), dense(8, 8, 1, 1)), "expected x (N,C,H,W) and w"),
    ("conv2d", Conv2d(groups=3), (image(1, 8, 5, 5), dense(9, 2, 3, 3)), "into 3 groups"),
    ("conv2d", Conv2d(), (image(1, 8, 5, 5), dense(9, 8, 7, 7)), "does not fit dimension 2"),
    ("linear", Linear(), (dense(2, 5), dense(3, 4)), "expected x (..., C) and weight (K, C)"),
    ("relu", Pointwise(), (dense(2), dense(2)), "relu: expected 1 tensors, got 2"),
    ("add", Pointwise(), (dense(2, 3), dense(4)), "do not broadcast together"),
    ("reshape", Reshape((5,)), (dense(2, 3),), "has 6 elements"),
    ("reshape", Reshape((6,)), (dense(4, 3, batch=4),), "reshape: "),
    ("permute", Permute((0, 0)), (dense(2, 3),), "does not permute the dims"),
    ("expand", Expand((4, 3)), (dense(2, 3),), "does not broadcast to (4, 3)"),
    ("expand", Expand((4, 3)), (dense(4, 3, batch=4),), "the batch of float32[N, 3] must stay"),
    ("slice", Slice(2, 0, 1), (dense(2, 3),), "has no dimension 2"),
    ("slice", Slice(1, 0, 4), (dense(2, 3),), "0:4 is outside dimension 1"),
    ("slice", Slice(0, 0, 1), (dense(2, 3, batch=2),), "the batch dimension"),
    ("concat", Concat(1), (dense(2, 3), dense(3, 3)), "differ outside dimension 1"),
    ("concat", Concat(2), (dense(2, 3), dense(2, 3)), "has no dimension 2"),
    ("relayout", Relayout(Layout.NHWC), (dense(2, 3),), "only ranks 4 and 5 can be NHWC"),
    ("softmax", Softmax(2), (dense(2, 3),), "softmax: float32[2, 3] has no dimension 2"),
    ("log_softmax", Softmax(0), (dense(2, 3, batch=2),), "over the batch dimension"),
    ("mean", Reduce((1, 0)), (dense(2, 3),), "are not ascending dimensions"),
    ("sum", Reduce((0,)), (dense(2, 3, batch=2),), "its samples must stay apart"),
    ("batch_norm", BatchNorm(), (dense(2, 3),), "expected x, weight, bias, mean, var, got 1"),
    ("batch_norm", BatchNorm(), (dense(2), *[dense(2)] * 4), "expected x of rank 2 or more"),
    ("batch_norm", BatchNorm(), (dense(2, 3), *[dense(2)] * 4), "expected weight of shape (3,)"),
)


@pytest.mark.parametrize(("name", "attributes", "specs", "message"), MESSAGES)
def test_messages_of_impossible_geometry(
    name: str, attributes: Attributes, specs: tuple[TensorSpec, ...], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)) as raised:
        registry.get(name).infer(attributes, specs)
    assert str(raised.value).startswith(f"{name}: ")
