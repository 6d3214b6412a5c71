"""Examples and near misses of the rules of `compiler/passes/pads.py`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..properties.example import IMAGE, Example, NearMiss, example


def _padded(
    sides: tuple[int, ...],
    mode: str = "constant",
    value: float | None = None,
    between: Any = None,
    **options: Any,
) -> Any:
    """A 3x3 convolution of a padded image, with something between the two."""
    channels = IMAGE[1] + sum(sides[4:])
    conv = nn.Conv2d(channels, options.pop("k", 8), 3, **options)

    def run(m: Any, x: torch.Tensor) -> Any:
        y = F.pad(x, sides, mode, value)
        return torch.relu(m["conv"](between(y) if between else y))

    return example(run, IMAGE, conv=conv)


def _volume(mode: str) -> Any:
    def run(m: Any, x: torch.Tensor) -> Any:
        return torch.relu(m["conv"](F.pad(x, (1, 1, 2, 0, 0, 1), mode)))

    return example(run, (2, 4, 3, 5, 4), conv=nn.Conv3d(4, 8, 3))


GEOMETRY = (
    NearMiss(lambda: _padded((1, -1, 1, 1)), "crops"),
    NearMiss(lambda: _padded((1, 1, 1, 1, 1, 0)), "more than the image"),
    NearMiss(lambda: _padded((1, 1, 1, 1), between=torch.tanh), "stages of its own"),
)


EXAMPLES = {
    "conv2d(pad(x, 0), w) => conv2d(x, w, padding)": Example(
        lambda: _padded((0, 1, 2, 1), padding=1),
        (NearMiss(lambda: _padded((1, 1, 1, 1), value=1.0), "with 1;"), *GEOMETRY),
    ),
    "conv3d(pad(x, 0), w) => conv3d(x, w, padding)": Example(lambda: _volume("constant")),
    "conv2d(pad(x, border), w) => border_conv2d(x, w, padding, border)": Example(
        lambda: _padded((1, 1, 2, 0), "reflect"),
        (
            NearMiss(lambda: _padded((1, 1, 1, 1), "circular", padding=1), "once more"),
            NearMiss(lambda: _padded((1, 1, 1, 1), "reflect", k=6, groups=6), "is depthwise"),
            NearMiss(lambda: _padded((1, -1, 1, 1), "replicate"), "crops"),
        ),
    ),
    "conv3d(pad(x, border), w) => conv3d(x, w, padding, border)": Example(
        lambda: _volume("replicate")
    ),
}
