"""What a domain of an op is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convloom.kernels.contract.op import Attributes
from convloom.kernels.contract.spec import TensorSpec


@dataclass(frozen=True)
class Domain:
    """Where an op's problems are drawn from, as plain data.

    ranges: a name and the values it may take; `build` turns one draw into attributes and input
    specs, or returns None where the draw is impossible. `interesting` lists draws that are always
    tried: past failures and the shapes guards are checked on.
    """

    ranges: Mapping[str, Sequence[Any]]
    build: Callable[[Mapping[str, Any]], tuple[Attributes, tuple[TensorSpec, ...]] | None]
    interesting: tuple[Mapping[str, Any], ...] = ()
