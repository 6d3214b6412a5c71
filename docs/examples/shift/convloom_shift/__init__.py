"""Two functions for networks, as calls that torch.export keeps whole: `shift`, `bent_identity`.

Networks import this module; it needs torch alone. `extension.py` tells convloom what they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def bent_identity_of(x: torch.Tensor) -> torch.Tensor:
    """(sqrt(x² + 1) − 1) / 2 + x."""
    return (torch.sqrt(x * x + 1) - 1) / 2 + x


def shifted(x: torch.Tensor) -> torch.Tensor:
    """x: (N, C, H, W). Every channel moved by at most a pixel, in the direction c % 9 of the nine:
    y[n,c,p,q] = x[n, c, p + c % 9 // 3 - 1, q + c % 3 - 1], 0 outside (Wu et al., Shift, 2018)."""
    height, width = x.shape[2:]
    padded, y = F.pad(x, (1, 1, 1, 1)), torch.empty_like(x)
    for at in range(9):
        down, right = divmod(at, 3)
        y[:, at::9] = padded[:, at::9, down : down + height, right : right + width]
    return y


@torch.library.custom_op("convloom_shift::bent_identity", mutates_args=())
def bent_identity(x: torch.Tensor) -> torch.Tensor:
    return bent_identity_of(x)


@torch.library.custom_op("convloom_shift::shift", mutates_args=())
def shift(x: torch.Tensor) -> torch.Tensor:
    return shifted(x)


for function in (bent_identity, shift):
    function.register_fake(torch.empty_like)
