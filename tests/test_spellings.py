"""Calls of the public API: those that become several ops, and the spellings of pointwise ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from . import nets

PLANE, CHANNEL, ROWS = (2, 6, 7, 5), (6, 1, 1), (3, 5, 8)
SPELLINGS: dict[str, Callable[..., torch.Tensor]] = {
    "addcmul": lambda m, x, a, b: torch.addcmul(x, a, b),
    "addcmul, value": lambda m, x, a, b: torch.addcmul(x, a, b, value=-0.5),
    "addcmul of a square": lambda m, x, a, b: torch.addcmul(x, a, a, value=0.5),
    "addcmul of silu": lambda m, x, a, b: torch.addcmul(x, a, a.sigmoid()),
    "addcmul, broadcast": lambda m, x, a, b: torch.addcmul(a, b, x, value=2.0),
    "addcdiv": lambda m, x, a, b: torch.addcdiv(x, a, b.abs() + 1.0, value=3.0),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("target", ["reference", "interpreter"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_calls_that_become_several_ops(name: str, target: str) -> None:
    function: Any = SPELLINGS[name]
    second = CHANNEL if "broadcast" in name else PLANE
    module, inputs = nets.make(function, PLANE, second, CHANNEL)
    exe = convloom.compile(module, inputs, target=target)
    assert exe.summary["torch_fallbacks"] == 0
    nets.check(exe(*inputs), module, inputs)


# By the scalar function that each is captured as: that, with or without stages, and nothing else.
POINTWISE: dict[str, tuple[Callable[..., torch.Tensor], ...]] = {
    "sin": (lambda m, x, y: torch.sin(x), lambda m, x, y: (x + 1).sin_()),
    "cos": (lambda m, x, y: torch.cos(x), lambda m, x, y: x.cos()),
    "atan": (lambda m, x, y: x.atan(), lambda m, x, y: torch.arctan(x)),
    "atan2": (lambda m, x, y: torch.atan2(x, y), lambda m, x, y: x.arctan2(y)),
    "erf": (lambda m, x, y: x.erf(), lambda m, x, y: torch.special.erf(x)),
    "log1p": (lambda m, x, y: x.abs().log1p(), lambda m, x, y: torch.special.log1p(x.abs())),
    "expm1": (lambda m, x, y: torch.expm1(x), lambda m, x, y: torch.special.expm1(x)),
    "floor": (lambda m, x, y: torch.floor(x * 4), lambda m, x, y: (x * 4).floor_()),
    "ceil": (lambda m, x, y: torch.ceil(x), lambda m, x, y: (x * 4).ceil()),
    "round": (
        lambda m, x, y: torch.round(x), lambda m, x, y: x.round(decimals=2),
        lambda m, x, y: torch.round(x * 100, decimals=-1), lambda m, x, y: torch.special.round(x),
        lambda m, x, y: x.round(decimals=0), lambda m, x, y: torch.special.round(x, decimals=1),
    ),
    "trunc": (lambda m, x, y: x.trunc(), lambda m, x, y: torch.fix(x * 3)),
    "fmod": (lambda m, x, y: torch.fmod(x, y), lambda m, x, y: x.fmod(0.75)),
    "remainder": (
        lambda m, x, y: torch.remainder(x, y), lambda m, x, y: x % 0.75, lambda m, x, y: 2.0 % x,
        lambda m, x, y: x % y,
    ),
    "log_sigmoid": (lambda m, x, y: F.logsigmoid(x), lambda m, x, y: nn.LogSigmoid()(x)),
    "threshold": (
        lambda m, x, y: F.threshold(x, 0.25, 20.0), lambda m, x, y: nn.Threshold(-0.5, -3.0)(x),
    ),
    "hardshrink": (lambda m, x, y: F.hardshrink(x), lambda m, x, y: nn.Hardshrink(1.0)(x)),
    "softshrink": (lambda m, x, y: F.softshrink(x, 0.25), lambda m, x, y: nn.Softshrink()(x)),
    "nan_to_num": (
        lambda m, x, y: torch.nan_to_num(x / 0.0, posinf=8.0, neginf=-0.0),
        lambda m, x, y: (x / 0.0).nan_to_num(1.0, 2.0, -7.0),
    ),
    "lerp": (lambda m, x, y: torch.lerp(x, y, 0.25), lambda m, x, y: x.lerp(y, 0.75)),
    "maximum": (lambda m, x, y: torch.max(x, y), lambda m, x, y: x.max(y)),
    "minimum": (lambda m, x, y: torch.min(x, y), lambda m, x, y: x.min(y)),
}  # fmt: skip
CASES = [
    pytest.param(name, function, id=f"{name}-{index}")
    for name, functions in POINTWISE.items()
    for index, function in enumerate(functions)
]


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "function"), CASES)
def test_pointwise_functions(name: str, function: Callable[..., torch.Tensor]) -> None:
    """One kernel for any batch, in any precision: its first spelling, which others become."""
    module, (x, y) = nets.make(function, ROWS, ROWS)
    x[0, 0, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    halves = (torch.float16, torch.bfloat16) if function is POINTWISE[name][0] else ()
    for dtype in (torch.float32, *halves):
        given = x.to(dtype), y.to(dtype)
        exe = convloom.compile(module, given, target="interpreter", dynamic_batch=(1, 3))
        (kernel,) = exe.kernels
        stages = [kernel.step.op, *(stage.name for stage in kernel.step.problem.epilogue)]
        assert name in stages
        nets.check(exe(*given), module, given)
        first = given[0][:1], given[1][:1]
        nets.check(exe(*first), module, first)


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_functions_are_fused(name: str) -> None:
    """Into the product that they read, and into the 1x1 convolution that reads them."""
    function, layers = POINTWISE[name][0], {"linear": nn.Linear(8, 8), "conv": nn.Conv2d(6, 6, 1)}
    module, inputs = nets.make(lambda m, x, y: function(m, m.linear(x), y), ROWS, ROWS, **layers)
    (kernel,) = convloom.compile(module, inputs, target="cuda:sm_90").kernels
    assert name in [stage.name for stage in kernel.step.problem.epilogue]
    module, inputs = nets.make(lambda m, x, y: m.conv(function(m, x, y)), PLANE, CHANNEL, **layers)
    kernels = convloom.compile(module, inputs, target="cuda:sm_90").kernels
    (conv,) = (kernel for kernel in kernels if kernel.step.op == "conv2d")
    assert name in [stage.name for stage in conv.step.problem.prologue]


@pytest.mark.interpreter
def test_what_infinities_become_follows_the_dtype() -> None:
    for function in (torch.nan_to_num, lambda x: torch.exp(x).nan_to_num()):
        module, (x,) = nets.make(lambda m, x, function=function: function(x), ROWS)
        for dtype in (torch.float16, torch.bfloat16):
            exe = convloom.compile(module, (x,), target="interpreter", dtype=dtype)
            assert exe(torch.full_like(x, torch.inf)).max() == torch.finfo(dtype).max


COMPOSITES: dict[str, Callable[..., Any]] = {
    "logsumexp": lambda m, x, y: x.logsumexp((2, 3)),
    "logsumexp, kept": lambda m, x, y: torch.logsumexp(x, -1, keepdim=True),
    "logsumexp, special": lambda m, x, y: torch.special.logsumexp(x * 50, 1),
    "var_mean": lambda m, x, y: torch.var_mean(x, (2, 3)),
    "var_mean, kept": lambda m, x, y: torch.var_mean(x, 1, correction=0, keepdim=True),
    "std_mean": lambda m, x, y: torch.std_mean(x, (1, 2), keepdim=True),
    "std_mean, biased": lambda m, x, y: torch.std_mean(x, -1, unbiased=False),
    "rot90": lambda m, x, y: torch.rot90(x, 1, (2, 3)),
    "rot90, thrice": lambda m, x, y: x.rot90(-1, (2, 3)),
    "rot90, twice": lambda m, x, y: x.rot90(2, (2, 3)) + x.rot90(4, (2, 3)),
    "rot90, channels": lambda m, x, y: x.rot90(3, (3, 1)),
    "cosine_similarity": lambda m, x, y: F.cosine_similarity(x, y),
    "cosine_similarity, last": lambda m, x, y: nn.CosineSimilarity(-1, 1e-3)(x, y * 1e-4),
    "cosine_similarity, pairs": lambda m, x, y: F.cosine_similarity(
        x.flatten(2).unsqueeze(1), y.flatten(2).unsqueeze(2), -1
    ),
    "pairwise_distance": lambda m, x, y: F.pairwise_distance(x.flatten(1), y.flatten(1)),
    "pairwise_distance, 1": lambda m, x, y: nn.PairwiseDistance(1.0, keepdim=True)(x, y),
    "pairwise_distance, most": lambda m, x, y: F.pairwise_distance(x, y, float("inf")),
    "cdist": lambda m, x, y: torch.cdist(x.flatten(2), y.flatten(2)),
    "cdist, near": lambda m, x, y: torch.cdist(x.flatten(2) + 100, x.flatten(2) + 100 + y.mean()),
    "einsum, product": lambda m, x, y: torch.einsum("nchw,nkhw->nck", x, y),
    "einsum, rows": lambda m, x, y: torch.einsum("nchw,nchw->nhw", x, y),
    "einsum, outer": lambda m, x, y: torch.einsum("nchw,ncpq->nhwpq", x, y),
    "einsum, gate": lambda m, x, y: torch.einsum("nchw,nc->nchw", x, y.mean((2, 3))),
    "einsum, one": lambda m, x, y: torch.einsum("nchw->nhwc", x),
    "einsum, three": lambda m, x, y: torch.einsum("nchw,nc,nhw->nw", x, y[:, :, 0, 0], y[:, 0]),
    "einsum, vertices": lambda m, x, y: torch.einsum("vk, nctv -> nctk", m.linear.weight, y),
    "einsum, filters": lambda m, x, y: torch.einsum(
        "nchw,khc->nwk", x, m.linear.weight.unsqueeze(1).expand(5, 7, 6)
    ),
    "einsum, vector": lambda m, x, y: torch.einsum("nchw,c->nhw", x, m.linear.weight[0]),
    "einsum, weights": lambda m, x, y: torch.einsum("nchw,kc->nkhw", x, m.linear.weight),
    "lerp": lambda m, x, y: torch.lerp(x, y, torch.sigmoid(x)),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", COMPOSITES)
def test_composites(name: str) -> None:
    """In any precision, for one batch and for any, fused and not."""
    module, inputs = nets.make(COMPOSITES[name], PLANE, PLANE, linear=nn.Linear(6, 5))
    ways: list[tuple[torch.dtype, dict[str, Any]]] = [(torch.float32, {})]
    if name != "cdist, near":
        ways += [(torch.float32, {"passes": "none"}), (torch.bfloat16, {})]
        ways += [(torch.float16, {"dynamic_batch": (1, 3)})]
    for dtype, more in ways:
        exe = convloom.compile(module, inputs, target="interpreter", dtype=dtype, **more)
        assert exe.summary["torch_fallbacks"] == 0
        nets.check(exe(*inputs), module, inputs, dtype)


@pytest.mark.interpreter
def test_logsumexp_of_infinities() -> None:
    module, (x,) = nets.make(lambda m, x: x.logsumexp(1), (4, 3))
    x[0], x[1, 0], x[2, 1], x[3] = -torch.inf, torch.inf, torch.nan, torch.finfo().max
    exe = convloom.compile(module, (x,), target="interpreter")
    assert torch.equal(exe(x).nan_to_num(nan=-1.0), module(x).nan_to_num(nan=-1.0))


def test_norms_that_have_no_kernel_are_refused() -> None:
    module, inputs = nets.make(lambda m, x, y: F.pairwise_distance(x, y, 3.0), ROWS, ROWS)
    with pytest.raises(convloom.UnsupportedOpError, match="only the 1-, 2- and maximum norm"):
        convloom.compile(module, inputs, target="reference")
