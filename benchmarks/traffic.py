"""Which elements the programs of a kernel load and store, counted in the interpreter.

What a program loads twice comes out of its own caches the second time; what two programs load
crosses the L2 cache twice. `fetched` counts the second and not the first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from convloom.compiler.tuning.bench import Bench
from convloom.kernels import registry
from convloom.kernels.contract.op import Config, Problem, Ref
from convloom.kernels.contract.targets import Target
from convloom.kernels.devices import execute, interpreter
from triton.runtime import interpreter as upstream

READ, WRITE = "read", "write"


@dataclass(frozen=True)
class Touched:
    """Elements of one tensor. accesses: loads or stores of all lanes; fetched: distinct elements of
    each program, added up; distinct: of all programs together."""

    accesses: int
    fetched: int
    distinct: int
    itemsize: int


Traffic = dict[tuple[str, Ref], Touched]


def traffic(problem: Problem, tile: Config, target: Target) -> Traffic:
    """What the problem's kernels touch under a configuration, by direction and tensor."""
    op = registry.get(problem.op)
    bench = Bench(problem, torch.device("cpu"))
    buffers = bench.buffers()
    made: dict[tuple[str, Ref], list[np.ndarray[Any, Any]]] = defaultdict(list)
    accesses: dict[tuple[str, Ref], int] = defaultdict(int)
    with interpreter.interpreting():
        for launch, tensors in bench.arguments(op.launches(problem, tile, target), buffers):
            with _recorded() as seen:
                execute.interpret(launch, tensors.__getitem__, bench.batch)
            for (direction, _), pointers in seen.items():
                for ref, tensor in tensors.items():
                    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
                    mine = pointers[(pointers >= start) & (pointers < stop)]
                    if mine.size:
                        made[direction, ref].append(np.unique(mine))
                        accesses[direction, ref] += mine.size
    sizes = {ref: tensor.element_size() for ref, tensor in buffers.items()}
    return {
        key: Touched(
            accesses[key],
            sum(each.size for each in pieces),
            np.unique(np.concatenate(pieces)).size,
            sizes.get(key[1], 4),
        )
        for key, pieces in made.items()
    }


Seen = dict[tuple[str, tuple[int, ...]], np.ndarray[Any, Any]]


@contextmanager
def _recorded() -> Iterator[Seen]:
    """Inside the block the addresses of loads and stores are noted; they are there at its end, by
    direction and program."""
    builder = upstream.interpreter_builder
    noted: dict[tuple[str, tuple[int, ...]], list[np.ndarray[Any, Any]]] = defaultdict(list)

    def noting(direction: str, mask_at: int, call: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any) -> Any:
            pointers, mask = arguments[0].data, arguments[mask_at].data
            noted[direction, builder.grid_idx].append(np.atleast_1d(pointers)[np.atleast_1d(mask)])
            return call(*arguments)

        return record

    builder.create_masked_load = noting(READ, 1, builder.create_masked_load)
    builder.create_masked_store = noting(WRITE, 2, builder.create_masked_store)
    seen: Seen = {}
    try:
        yield seen
    finally:
        del builder.create_masked_load, builder.create_masked_store
        seen.update((key, np.concatenate(pieces)) for key, pieces in noted.items())


def fetched_bytes(touched: Traffic, direction: str) -> int:
    """Bytes that cross the L2 cache in one direction."""
    return sum(
        each.fetched * each.itemsize for (way, _), each in touched.items() if way == direction
    )
