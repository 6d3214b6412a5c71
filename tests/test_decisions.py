"""any, all and prod; masks of booleans as inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom.errors import InvalidInputError

from . import nets

SHAPE = (2, 6, 5, 4)
CALLS: dict[str, Callable[..., Any]] = {
    "any": lambda m, x, mask: (x > 1).any(1).float(),
    "any, dims": lambda m, x, mask: (x > 1.5).any(dim=(2, 3)),
    "any, of numbers": lambda m, x, mask: x.relu().trunc().any(-1, keepdim=True) * x,
    "all": lambda m, x, mask: torch.all(x > -1, dim=1, keepdim=True) * x,
    "all, of a mask": lambda m, x, mask: mask.all(3).logical_or(x[..., 0] > 0),
    "prod": lambda m, x, mask: x.prod(1),
    "prod, kept": lambda m, x, mask: torch.prod(x, -1, keepdim=True),
    "masked_fill": lambda m, x, mask: x.masked_fill(mask, -1.0),
    "where": lambda m, x, mask: torch.where(mask & (x > 0), x, x.mean(1, keepdim=True)),
    "number": lambda m, x, mask: m.conv(x * mask) * mask,
}


def made(name: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    module, (x,) = nets.make(CALLS[name], SHAPE, conv=torch.nn.Conv2d(6, 1, 1))
    return module, (x, x[:, :1].sin() > 0)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CALLS)
def test_decisions_and_masks(name: str) -> None:
    """For any batch; in half precision, too, where a convolution follows."""
    module, inputs = made(name)
    exe = convloom.compile(module, inputs, target="interpreter", dynamic_batch=(1, 2))
    assert exe.summary["torch_fallbacks"] == 0
    for batch in (1, 2):
        given = tuple(x[:batch] for x in inputs)
        nets.check(exe(*given), module, given)
    if name == "number":
        exe = convloom.compile(module, inputs, target="interpreter", dtype=torch.float16)
        nets.check(exe(*inputs), module, inputs, torch.float16)


@pytest.mark.interpreter
def test_all_and_any_of_everything() -> None:
    module, (x,) = nets.make(lambda m, x: ((x > -9).all(), (x > 9).any(), x.prod()), (3, 4))
    exe = convloom.compile(module, (x,), target="interpreter")
    least, most, product = exe(x)
    assert (bool(least), bool(most)) == (True, False)
    assert torch.allclose(product, x.double().prod().float())


@pytest.mark.interpreter
def test_masks_are_held_to_their_dtype_and_saved(tmp_path: Path) -> None:
    module, (x, mask) = made("masked_fill")
    exe = convloom.compile(module, (x, mask), target="interpreter")
    with pytest.raises(InvalidInputError, match=r"expected dtype torch\.bool, got torch\.float32"):
        exe(x, x[:, :1])
    exe.save(tmp_path / "masked.convloom")
    loaded = convloom.load(tmp_path / "masked.convloom")
    assert torch.equal(loaded(x, mask), exe(x, mask))
