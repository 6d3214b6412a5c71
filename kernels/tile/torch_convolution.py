"""PyTorch's convolutions on a CPU, where half precision is not to be trusted.

On processors with AVX-512 or AMX, oneDNN's half-precision convolutions read beyond narrow images:
a 1x1 filter over one padded pixel ends the process, a 5x5 over twelve gives wrong numbers (its
issue 5942, pytorch's 195394; torch 2.13). What others are measured against must be right, so there
half precision is computed in fp32 and rounded once, which is what those kernels promise too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

CONVOLVE: dict[int, Callable[..., torch.Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED: dict[int, Callable[..., torch.Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
_FUNCTIONS = frozenset((*CONVOLVE.values(), *TRANSPOSED.values()))
_HALF = (torch.float16, torch.bfloat16)


def convolve(x: torch.Tensor, w: torch.Tensor, **attributes: Any) -> torch.Tensor:
    """x (N, C, *sizes) with w (K, C/G, *filter); attributes as `F.conv2d` names them."""
    return _rounded(CONVOLVE[x.dim() - 2], (x, w), attributes)


def convolve_transposed(x: torch.Tensor, w: torch.Tensor, **attributes: Any) -> torch.Tensor:
    """x (N, C, *sizes) with w (C, K/G, *filter); attributes as `F.conv_transpose2d` names them."""
    return _rounded(TRANSPOSED[x.dim() - 2], (x, w), attributes)


class SoundConvolutions(TorchFunctionMode):
    """While it is entered, every module's half-precision convolutions on the CPU are sound."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _FUNCTIONS:
            return _rounded(function, args, kwargs or {})
        return function(*args, **(kwargs or {}))


def _rounded(
    function: Callable[..., torch.Tensor], args: tuple[Any, ...], attributes: dict[str, Any]
) -> torch.Tensor:
    x = args[0] if args else attributes["input"]
    if x.device.type != "cpu" or x.dtype not in _HALF:
        return function(*args, **attributes)
    wide = [_widened(arg) for arg in args]
    return function(*wide, **{name: _widened(arg) for name, arg in attributes.items()}).to(x.dtype)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _HALF else value
