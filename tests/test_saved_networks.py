"""Small networks of the ops that other tests try in fp32: in halves, and out of a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import convloom
import pytest
import torch
from torch import Tensor, nn

from . import nets, test_fourier, test_joined_batches, test_tables

pytestmark = pytest.mark.interpreter
Made = tuple[nn.Module, tuple[Tensor, ...]]


def transformed(name: str) -> Made:
    function = test_fourier.CALLS[name]
    shapes = (test_fourier.SHAPE,) * (function.__code__.co_argcount - 1)
    module, inputs = nets.make(function, *shapes)
    module.register_buffer("weight", test_fourier.WEIGHT)
    return module, inputs


NETWORKS: dict[str, Callable[[], Made]] = {
    **{
        name: lambda function=function: test_tables.made(function, test_tables.SHAPE)
        for name, function in test_tables.FUNCTIONS.items()
    },
    **{name: lambda name=name: transformed(name) for name in test_fourier.CALLS},
    "siamese": lambda: test_joined_batches.made(test_joined_batches.siamese),
    "sliced": lambda: test_joined_batches.made(test_joined_batches.sliced),
    "hypot": lambda: nets.make(lambda m, x, y: torch.hypot(x * 1e3, y), (2, 3, 8), (2, 3, 8)),
}
QUICK = ("from the end", "one_hot", "addmm", "baddbmm", "windows", "affine_grid of volumes",
         "global filter", "siamese", "hypot")  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NETWORKS],
)
def test_in_bfloat16_and_from_a_file(name: str, tmp_path: Path) -> None:
    """As near to float64 as eager in bfloat16 is, and a loaded file gives the same bits."""
    module, inputs = NETWORKS[name]()
    # Rounded before, so that what is compared or chosen in halves is what float64 sees.
    inputs = tuple(x.bfloat16().float() for x in inputs)
    exe = convloom.compile(module, inputs, target="interpreter", dtype=torch.bfloat16)
    exe.save(tmp_path / "net.loom")
    results = nets.tensors_of(exe(*inputs))
    loaded = nets.tensors_of(convloom.load(tmp_path / "net.loom", "interpreter")(*inputs))
    assert all(torch.equal(*pair) for pair in zip(loaded, results, strict=True))
    exact = nets.run(module, inputs, torch.float64)
    # torch has no Fourier transforms of halves.
    eager = exact if name in test_fourier.CALLS else nets.run(module, inputs, torch.bfloat16)
    rounding = 0.05 if name in test_fourier.CALLS else 0.02
    for result, true, other in zip(results, exact, eager, strict=True):
        error, allowed = ((y.double() - true).square().mean().sqrt() for y in (result, other))
        assert error <= 2 * allowed + rounding * true.square().mean().sqrt()
