"""The largest elements and their places, in the spellings that networks use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom.errors import InvalidInputError, UnsupportedOpError
from convloom.kernels import registry
from convloom.kernels.contract.spec import TensorSpec
from convloom.kernels.normalisation.topk import LONGEST, MOST_SELECTED, TopK
from torch import nn

from . import nets

SPELLINGS: dict[str, Callable[[torch.Tensor], Any]] = {
    "max": lambda x: x.max(1),
    "min": lambda x: x.min(-1, keepdim=True),
    "argmax": lambda x: x.argmax(1),
    "argmin": lambda x: x.argmin(2, keepdim=True),
    "topk": lambda x: x.topk(3, 1),
    "smallest": lambda x: torch.topk(x, 2, dim=-1, largest=False),
    "sort": lambda x: x.sort(1),
    "descending": lambda x: x.sort(-1, descending=True)[0],
    "stable": lambda x: x.sort(dim=1, stable=True)[1],
    "argsort": lambda x: x.argsort(-1),
    "of all pixels": lambda x: x.flatten(2).argmax(-1),
    "values": lambda x: x.max(1).values * 2,
}


def special(batch: int = 2) -> torch.Tensor:
    """Ties, infinities and NaN, a row of NaN alone among them."""
    (x,) = nets.inputs_of((batch, 6, 5, 7), seed=batch)
    x = (x * 2).round() / 2
    x[0, 1, 2, 3] = x[0, 4, 2, 3] = float("nan")
    x[0, 3, 0], x[0, :, 1, 1] = float("inf"), float("-inf")
    x[0, :, 4, 6] = float("nan")
    return x


def same(got: Any, expected: Any) -> None:
    for ours, theirs in zip(nets.tensors_of(got), nets.tensors_of(expected), strict=True):
        assert ours.dtype is theirs.dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", SPELLINGS)
def test_values_and_places_are_torchs(name: str) -> None:
    """Of equal elements the first: torch promises that of a stable sort and of max on a CPU only,
    so ties are left out where it does not."""
    function = SPELLINGS[name]
    module, _ = nets.make(lambda m, x: function(x), (1, 6, 5, 7))
    exe = convloom.compile(module, (special(),), target="interpreter", dynamic_batch=(1, 3))
    for batch in (1, 3):
        x = special(batch)
        if name in ("topk", "smallest", "sort", "descending", "argsort"):
            x = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(batch))
            x = x.view(batch, 6, 5, 7).float()
        same(exe(x), module(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_classes_of_a_network_in_half_precision(dtype: torch.dtype) -> None:
    module, inputs = nets.make(
        lambda m, x: m.conv(x).mean((2, 3)).argmax(1), (4, 3, 8, 8), conv=nn.Conv2d(3, 40, 3)
    )
    exe = convloom.compile(module, inputs, target="interpreter", dtype=dtype)
    assert torch.equal(exe(*inputs), module(*inputs))


def test_the_largest_of_all_elements() -> None:
    module, inputs = nets.make(lambda m, x: (x.argmax(), x.argmin(keepdim=True)), (2, 5, 4))
    exe = convloom.compile(module, inputs, target="interpreter")
    same(exe(*inputs), module(*inputs))


def test_values_alone_take_one_kernel() -> None:
    module, inputs = nets.make(lambda m, x: x.max(1)[0], (2, 5, 4))
    exe = convloom.compile(module, inputs, target="interpreter")
    assert [kernel.step.op for kernel in exe.kernels] == ["amax"]


@pytest.mark.parametrize(
    ("attributes", "shape", "message"),
    [
        (TopK(1, MOST_SELECTED + 1), (2, 100), f"at most {MOST_SELECTED} are found"),
        (TopK(1, 2), (2, LONGEST + 1), f"for k = 2 at most {LONGEST}"),
        (TopK(2, 1), (2, 100), "no 1 elements along dimension 2"),
        (TopK(1, 7), (2, 6), "no 7 elements along dimension 1"),
    ],
)
def test_limits_are_named(attributes: TopK, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        registry.get("topk").infer(attributes, (TensorSpec(shape, torch.float32),))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.argmax(), "the place of the largest of all samples; give a dimension"),
        (lambda x: x.topk(1, 0), "the batch dimension of"),
        (lambda x: x.max(0), "is not computed by convloom|reduced|batch"),
        (lambda x: x.flatten(1).sort(1)[0], "140 elements of"),
    ],
)
def test_searches_among_samples_and_long_sorts_are_refused(
    function: Callable[[torch.Tensor], Any], message: str
) -> None:
    module, inputs = nets.make(lambda m, x: function(x), (2, 4, 5, 7))
    with pytest.raises(UnsupportedOpError, match=message):
        convloom.compile(module, inputs, target="interpreter", dynamic_batch=(1, 4))


@pytest.mark.interpreter
def test_what_follows_a_selection_is_computed() -> None:
    """By another kernel: the selection's own stores numbers as they lie in x."""
    module, inputs = nets.make(lambda m, x: torch.relu(x.topk(2, 1)[0] * 3 - 1), (2, 6, 5, 7))
    exe = convloom.compile(module, inputs, target="interpreter")
    torch.testing.assert_close(exe(*inputs), module(*inputs))


def test_places_have_a_cost_and_go_into_files(tmp_path: Path) -> None:
    """Kernels that move whole numbers are modelled like others: for the ledger of a saved file."""
    module, inputs = nets.make(lambda m, x: tuple(x.max(1)), (2, 6, 5, 7))
    exe = convloom.compile(module, inputs, target="cuda:sm_90", dtype=torch.float16)
    exe.save(tmp_path / "net.loom")
    assert "topk" in {kernel.step.op for kernel in exe.kernels}
    (x,) = inputs
    loaded = convloom.load(tmp_path / "net.loom", device="interpreter")
    assert torch.equal(loaded(x)[1], module(x.half().float())[1])
