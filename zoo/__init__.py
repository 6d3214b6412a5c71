"""Classic convolutional networks as plain `torch.nn.Module`s, one file per family.

`zoo.names()` lists them, `zoo.entry(name)` describes one, and `zoo.resnet50()`, which is
`zoo.build("resnet50")`, makes it in training mode, as torch does: call `.eval()` to compile it. All
builders take `num_classes=` and `weights=` (a .safetensors or .pth file, nothing is downloaded).
Without weights the parameters are random, from torch's global generator (`torch.manual_seed`).

Where torchvision or timm has a model, the names of parameters and buffers are theirs, so that
published checkpoints load.

Listing names imports no torch; a family's file is imported when one of its models is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .registry import MODELS, ZooModel, build, builder, entry, names

if TYPE_CHECKING:
    from torch import nn

__all__ = ["MODELS", "ZooModel", "build", "builder", "entry", "names"]


def __getattr__(name: str) -> Callable[..., nn.Module]:
    if name not in names():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return builder(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *names()})
