"""head: the end of a classifier in one kernel: [average of pixels ->] linear layers [-> softmax].

    s = mean of x over its pixels, or x itself
    t_i = F_i(t_{i-1} · w_iᵀ)       one to three links, t_0 = s
    y = E(softmax(t_last)), E(log_softmax(t_last)) or E(t_last)

x: (N, C, H, W) NHWC in memory where pixels are averaged, else (N, C) dense; w_i: (K_i, K_{i-1}),
constants; y: (N, K_last). fp32 accumulation; s and every t_i but the last are rounded to the dtype
of the tensors, as they would be between separate kernels.

A program owns BLOCK_M samples. Every t_i is a whole tile, which bounds the widths; the first
product walks its depth in blocks, the others take it at once. LeNet-5's 400 -> 120 -> 84 -> 10
(LeCun et al., 1998) is one launch instead of three or four, none of which fills a GPU. Pixels
are averaged straight into the operand of the first product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract.op import (
    Attributes,
    Config,
    Cost,
    Launch,
    Op,
    Problem,
    Ref,
    X,
    Y,
    config,
    operand_refs,
    power_of_two,
    tensor_bytes,
)
from ..contract.spec import Operand, TensorSpec
from ..contract.targets import Target
from ..tile import choice
from .head_kernel import head_kernel

MOST_LINKS = 3
SOFTMAX = ("", "softmax", "log_softmax")
MOST_WEIGHTS = 256
"""Bytes of a whole weight tile that a thread may hold on its way to shared memory: 64 registers."""


@dataclass(frozen=True)
class Head(Attributes):
    """Whether pixels are averaged first, the stages after each link, and what normalises the end
    ("", "softmax" or "log_softmax").

    Inputs: x, then for each link its weight and the operands of its stages.
    """

    links: tuple[ep.Epilogue, ...] = ((),)
    average: bool = False
    softmax: str = ""

    def parts(self, values: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
        """The inputs of each link: its weight first, then its operands."""
        parts, at = [], 1
        for stages in self.links:
            stop = at + 1 + ep.operand_count(stages)
            parts.append(values[at:stop])
            at = stop
        return tuple(parts)

    @property
    def inputs(self) -> int:
        """How many inputs there must be."""
        return 1 + len(self.links) + sum(ep.operand_count(stages) for stages in self.links)


def infer(attributes: Head, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """(N, K_last)."""
    if not 1 <= len(attributes.links) <= MOST_LINKS or attributes.softmax not in SOFTMAX:
        raise InvalidInputError(
            f"head: expected 1 to {MOST_LINKS} links and a softmax of {SOFTMAX}, got {attributes}"
        )
    if len(inputs) != attributes.inputs:
        raise InvalidInputError(f"head: expected {attributes.inputs} inputs, got {len(inputs)}")
    x, rank = inputs[0], 4 if attributes.average else 2
    if x.rank != rank or min(x.shape) < 1:
        wanted = "(N,C,H,W) with pixels" if attributes.average else "(N,C)"
        raise InvalidInputError(f"head: expected x {wanted}, got {x}")
    for t, part in zip(_tensors(attributes, inputs), attributes.parts(inputs), strict=True):
        for operand in part[1:]:
            if not ep.broadcasts(operand, t):
                raise InvalidInputError(f"head: {operand} does not broadcast to {t}")
    return (_tensors(attributes, inputs)[-1],)


def _tensors(attributes: Head, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The specs of t_1, t_2, ..."""
    x, width, found = inputs[0], inputs[0].shape[1], []
    for w, *_ in attributes.parts(inputs):
        if w.rank != 2 or w.shape[1] != width:
            raise InvalidInputError(f"head: expected a weight (K,{width}), got {w}")
        width = w.shape[0]
        found.append(TensorSpec((x.shape[0], width), x.dtype, batch=x.batch))
    return tuple(found)


def reference(attributes: Head, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    t = x.mean((2, 3)) if attributes.average else x
    for stages, (w, *operands) in zip(
        attributes.links, attributes.parts((x, *others)), strict=True
    ):
        t = ep.apply_reference(stages, F.linear(t, w), tuple(operands))
    if attributes.softmax:
        t = getattr(torch, attributes.softmax)(t, 1)
    return t


def _attributes(problem: Problem) -> Head:
    assert isinstance(problem.attributes, Head)
    return problem.attributes


def _parts(problem: Problem) -> tuple[tuple[Operand, ...], ...]:
    return _attributes(problem).parts(problem.inputs)


def widths(problem: Problem) -> tuple[int, ...]:
    """K_1, K_2, ..."""
    return tuple(part[0].shape[0] for part in _parts(problem))


def _pixels(problem: Problem) -> int:
    return math.prod(problem.inputs[0].shape[2:])


@dataclass(frozen=True)
class Links:
    """The products of a chain as a launch sees them: weights and constants by the names of the
    kernel's arguments, and all tensors that stages read."""

    weights: Mapping[str, Ref]
    constants: Mapping[str, Any]
    extras: tuple[Ref, ...]


def bind_links(
    attributes: Head,
    inputs: tuple[Operand, ...],
    x: TensorSpec,
    slot: int,
    extras: tuple[Ref, ...],
    tile: Config,
) -> Links:
    """x: what the first product reads. inputs: of the head, x itself among them. slot: of the first
    weight among the problem's inputs. extras: what the kernel reads beside."""
    specs = _tensors(attributes, (x, *(operand.spec for operand in inputs[1:])))
    refs, at = [*extras], slot
    weights: dict[str, Ref] = {}
    constants: dict[str, Any] = {}
    for number in range(1, MOST_LINKS + 1):
        # Absent links are compiled out; their pointers are never read.
        weights[f"w{number}"], constants[f"LINK{number}"] = Ref("input", slot), None
        constants |= {f"K{number}": 1, f"BLOCK_{number}": 1}
    parts = zip(attributes.links, attributes.parts(inputs), specs, strict=True)
    for number, (stages, (_, *operands), spec) in enumerate(parts, 1):
        weights[f"w{number}"] = Ref("input", at)
        reads = tuple(ep.access(operand, spec) for operand in operands)
        name = f"link{number}"
        constants |= {
            f"LINK{number}": ep.generate(stages, reads, ep.memory_sizes(spec), len(refs), name),
            f"K{number}": spec.shape[1],
            f"BLOCK_{number}": _block(spec.shape[1], tile["BLOCK_M"]),
        }
        refs += [Ref("input", at + 1 + index) for index in range(len(operands))]
        at += 1 + len(operands)
    return Links(weights, constants, tuple(refs))


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch; every program owns BLOCK_M samples."""
    attributes, x, y = _attributes(problem), problem.inputs[0], problem.output
    links = bind_links(attributes, problem.inputs, x.spec, 1, operand_refs(problem), tile)
    launch = Launch(
        kernel=head_kernel,
        pointers={"x": X, **links.weights, "y": Y},
        extras=links.extras,
        rows=y.shape[0],
        batch=y.spec.batch,
        block_rows=tile["BLOCK_M"],
        columns=1,
        constexprs={
            "C": x.shape[1], "PIXELS": _pixels(problem),
            "X_PITCH": x.pitch, "X_OFFSET": x.offset,
            "Y_PITCH": y.pitch, "Y_OFFSET": y.offset,
            "AVERAGE": attributes.average, "SOFTMAX": attributes.softmax,
            "EPILOGUE": ep.for_output(problem.epilogue, problem.operands, y.spec),
            "PRECISION": choice.dot_precision(problem, 16),
            "WIDE": problem.is_wide,
            **links.constants, **dict(tile.blocks),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        l2_bytes=_l2_bytes(problem, tile),
        instructions=_instructions(problem, tile),
        steps=_steps(problem, tile),
    )  # fmt: skip
    return (launch,)


def _block(width: int, rows: int) -> int:
    """The tile of that many columns, wider than it is high: the compiler splits chained products
    that are not among the warps by rows, of which there are too few, and every warp holds all of
    the weights: LeNet-5 takes 255 instead of 80 registers, 3,344 bytes of spills in fp32."""
    return max(2 * rows, power_of_two(width))


def _l2_bytes(problem: Problem, tile: Config) -> int:
    """A program reads its samples and all weights."""
    sample = math.prod(problem.inputs[0].shape[1:])
    weights: int = sum(
        math.prod(part[0].shape) for part in _attributes(problem).parts(problem.inputs)
    )
    return (tile["BLOCK_M"] * sample + weights) * problem.inputs[0].spec.dtype.itemsize


def _instructions(problem: Problem, tile: Config) -> int:
    """Averaging: conversion and addition per element; softmax: some 30 per class."""
    attributes = _attributes(problem)
    count = 2 * math.prod(problem.inputs[0].shape[1:]) if attributes.average else 0
    if attributes.softmax:
        count += 30 * _block(widths(problem)[-1], tile["BLOCK_M"])
    return tile["BLOCK_M"] * count


def _steps(problem: Problem, tile: Config) -> int:
    """Blocks of the first product's inputs, of pixels for each, and the other products."""
    blocks = -(-problem.inputs[0].shape[1] // tile["BLOCK_K"])
    pixels = -(-_pixels(problem) // tile["BLOCK_PIXELS"])
    return blocks * pixels + len(_attributes(problem).links) - 1


def _tile(problem: Problem, rows: int, depth: int, warps: int, stages: int) -> Config:
    """Up to 16 pixels at a time, as 64 elements per thread allow."""
    pixels = 1
    if _attributes(problem).average:
        pixels = min(_pixels(problem), 16, max(1, 2048 * warps // (rows * depth)))
        stages = 1
    return config(warps, stages, BLOCK_M=rows, BLOCK_K=depth, BLOCK_PIXELS=pixels)


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """16 or 32 samples, 16 to 128 inputs at a time."""
    deepest = max(16, power_of_two(problem.inputs[0].shape[1]))
    for warps in (4, 8, 16):
        for rows in (16, 32):
            for depth in (16, 32, 64, 128):
                for stages in (1,) if _attributes(problem).average else (2, 3, 4):
                    tile = _tile(problem, rows, depth, warps, stages)
                    if depth <= deepest and legal(problem, tile, target) is None:
                        yield tile


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    """Registers for the widest tile and for whole weights, and shared memory."""
    if target.name == "interpreter":
        return None
    x, rows, depth = problem.inputs[0], tile["BLOCK_M"], tile["BLOCK_K"]
    blocks, threads = [_block(width, rows) for width in widths(problem)], 32 * tile.num_warps
    accumulators = rows * max(blocks) // threads
    if accumulators > 64:
        return f"{max(blocks)} columns are {accumulators} accumulators per thread; over 64 spill"
    size = x.spec.dtype.itemsize
    whole = [before * after for before, after in pairwise(blocks)]
    held = size * max([blocks[0] * depth if tile.num_stages == 1 else 0, *whole]) // threads
    # 512 threads have 128 registers each, and tf32x3 keeps operands twice.
    crowded = tile.num_warps > 8 and x.spec.dtype is torch.float32
    most = MOST_WEIGHTS // 2 if crowded else MOST_WEIGHTS
    if held > most:
        return f"{held} bytes of weights per thread; more than {most} spill"
    pipelined = tile.num_stages * (rows + blocks[0]) * depth
    needed = size * max(pipelined, *(area + rows * max(blocks) for area in (0, *whole)))
    if needed > target.shared_bytes:
        return f"needs {needed} bytes of shared memory; {target.name} has {target.shared_bytes}"
    return None


def default(problem: Problem, target: Target) -> Config:
    """16 samples, the least a matrix product takes: heads have few, and more programs finish
    sooner. 64 inputs at a time (128 where pixels are averaged, 16 bytes for each thread), or as
    many as fit; 8 warps where tiles are wide."""
    depth = max(16, power_of_two(problem.inputs[0].shape[1]))
    if target.name == "interpreter":
        # Weights are at least twice as wide (`_block`), and Triton's largest tile is 2**20.
        rows = max(16, min(256, power_of_two(problem.output.shape[0])))
        return config(1, 1, BLOCK_M=rows, BLOCK_K=min(depth, 512), BLOCK_PIXELS=1)
    order = (4, 8, 16) if max(widths(problem)) <= 64 else (8, 16)
    tiles = [
        _tile(problem, 16, min(depth, block), warps, 3)
        for block in ((128, 64, 32, 16) if _attributes(problem).average else (64, 32, 16))
        for warps in order
    ]
    fitting = (tile for tile in tiles if legal(problem, tile, target) is None)
    return next(fitting, tiles[-1])


def cost(problem: Problem) -> Cost:
    """The products, the average, and five operations per class for a softmax."""
    attributes, n = _attributes(problem), problem.output.shape[0]
    per_sample = sum(2 * part[0].spec.numel for part in _parts(problem))
    if attributes.average:
        per_sample += math.prod(problem.inputs[0].shape[1:])
    if attributes.softmax:
        per_sample += 5 * problem.output.shape[1]
    read, written = tensor_bytes(problem)
    return Cost(n * per_sample, read, written)


def packs(attributes: Head) -> Mapping[int, Callable[[Any, torch.Tensor], torch.Tensor]]:
    """Every weight as it is, (K, C)."""
    slots = attributes.parts(tuple(range(attributes.inputs)))
    return {part[0]: lambda _, w: w.contiguous() for part in slots}


OP = Op(
    name="head",
    attributes=Head,
    infer=infer,
    reference=reference,
    launches=launches,
    configs=configs,
    default=default,
    legal=legal,
    cost=cost,
    # Small logits: a softmax turns their absolute error into a relative one, which with values
    # up to 1 and 130 inputs was larger than the tolerance (N=1, C=130, 100 classes).
    input_range=(-0.5, 0.5),
    packs=packs,
    images=True,
)  # fmt: skip
