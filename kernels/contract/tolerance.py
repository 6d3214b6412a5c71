"""How far a kernel's result may be from the exact one: one rule for every test and for the tuner.

Elementwise against an fp64 reference:

    |y - ref| <= rtol * |ref| + a * rms(ref) + k * max|eager - ref|

rtol: one rounding to the output's dtype; a: accumulation error of a sum of `depth` terms in fp32
(and rounding of the inputs' products); the last term allows what PyTorch's own kernel does in the
same dtype. NaN and Inf must be where the reference (in the result's dtype) has them. Gates on the
root-mean-square error or on cosine similarity are not used: they accept a wrong pixel. Whole
numbers (indices) must be equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
EAGER_FACTOR = 2.0


def bounds(dtype: torch.dtype, depth: int) -> tuple[float, float]:
    """(rtol, a) for a result of `dtype` that sums `depth` terms in fp32."""
    unit = UNIT_ROUNDOFF[dtype]
    accumulation = 4.0 * math.sqrt(max(depth, 1)) * UNIT_ROUNDOFF[torch.float32]
    return 4.0 * unit, 2.0 * unit + accumulation


@dataclass(frozen=True)
class Worst:
    """The element of a result that is farthest off, measured by what is allowed there.

    peer_error: the largest error of eager; wrong: how many elements are farther off than allowed.
    """

    index: tuple[int, ...]
    got: float
    expected: float
    error: float
    allowed: float
    peer_error: float
    wrong: int


def compare(
    result: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, depth: int = 1
) -> str | None:
    """What is wrong with the result, in words, or None.

    exact: fp64, same shape; eager: PyTorch's own result in the result's dtype.
    """
    if result.shape != exact.shape:
        return f"shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    if result.dtype != eager.dtype:
        return f"dtype {result.dtype}, expected {eager.dtype}"
    if not result.dtype.is_floating_point:
        return _whole_numbers(result, exact)
    if (problem := special_values(result, exact)) is not None:
        return problem
    found = worst(result, exact, eager, depth)
    if found is None or not found.wrong:
        return None
    return (
        f"element {found.index}: got {found.got:.9g}, expected {found.expected:.9g}; "
        f"error {found.error:.3g} > {found.allowed:.3g} (eager's own worst "
        f"{found.peer_error:.3g}, depth {depth}, {found.wrong} elements off)"
    )


def worst(
    result: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, depth: int = 1
) -> Worst | None:
    """The worst element where the exact value is finite in the result's dtype; None where there is
    none."""
    finite = _rounded(exact, result).isfinite() & exact.isfinite()
    if not finite.any():
        return None
    value, truth, peer = result.double()[finite], exact[finite], eager.double()[finite]
    rtol, a = bounds(result.dtype, depth)
    peer_error = (peer - truth).abs().nan_to_num(0.0, 0.0, 0.0).max().item()
    rms = truth.square().mean().sqrt().item()
    smallest = torch.finfo(result.dtype).smallest_normal
    allowed = rtol * truth.abs() + a * rms + EAGER_FACTOR * peer_error + smallest
    error = (value - truth).abs().nan_to_num(torch.inf, torch.inf)
    at = int((error / allowed).argmax())
    return Worst(
        tuple(finite.nonzero()[at].tolist()), value[at].item(), truth[at].item(),
        error[at].item(), allowed[at].item(), peer_error, int((error > allowed).sum()),
    )  # fmt: skip


def _rounded(exact: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """The exact values as the result's dtype can hold them, in fp64."""
    return exact.to(result.dtype).double()


def _whole_numbers(result: torch.Tensor, exact: torch.Tensor) -> str | None:
    wrong = (result != exact).nonzero()
    if not len(wrong):
        return None
    where = tuple(wrong[0].tolist())
    return (
        f"element {where}: got {int(result[where])}, expected {int(exact[where])}; "
        f"{len(wrong)} elements off"
    )


NO_BOOLEAN = 0x7F
"""A byte that no kernel writes for true or false."""


def fill_untouched(tensor: torch.Tensor) -> torch.Tensor:
    """Fills memory to see later where nothing was written: with NaN, or the least whole number."""
    if tensor.dtype is torch.bool:
        tensor.view(torch.uint8).fill_(NO_BOOLEAN)
        return tensor
    is_float = tensor.dtype.is_floating_point
    return tensor.fill_(math.nan if is_float else torch.iinfo(tensor.dtype).min)


def is_untouched(tensor: torch.Tensor) -> torch.Tensor:
    """Where a tensor that `fill_untouched` has filled was not written."""
    if tensor.dtype.is_floating_point:
        return tensor.isnan()
    if tensor.dtype is torch.bool:
        return tensor.view(torch.uint8) == NO_BOOLEAN
    return tensor == torch.iinfo(tensor.dtype).min


def special_values(result: torch.Tensor, exact: torch.Tensor) -> str | None:
    """Where the result has NaN or infinities that the exact value, in its dtype, has not, or the
    other way round, in words; None where nowhere."""
    value, rounded = result.double(), _rounded(exact, result)
    for name, test in (("NaN", torch.isnan), ("+Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        got, want = test(value), test(rounded)
        if not torch.equal(got, want):
            where = tuple((got != want).nonzero()[0].tolist())
            return f"{name} pattern differs, first at {where}: got {bool(got[where])}"
    return None
