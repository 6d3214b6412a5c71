"""What an example of a rule is, and how examples are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Make = Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]
"""A module and its inputs."""


@dataclass(frozen=True)
class NearMiss:
    """A module on which a rule must refuse, and a part of the reason it must give."""

    make: Make
    reason: str


@dataclass(frozen=True)
class Example:
    """A module and inputs on which a rule fires, and those on which it must refuse."""

    make: Make
    near_misses: tuple[NearMiss, ...] = ()


class _Net(nn.Module):
    """An example network from a function of its layers and inputs."""

    def __init__(self, function: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.function(self.layers, *inputs)
        return result


def example(function: Any, *shapes: tuple[int, ...], **layers: nn.Module) -> Any:
    """A seeded module and inputs of the given shapes."""
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    return _Net(function, **layers).eval(), inputs


IMAGE = (2, 6, 7, 5)
