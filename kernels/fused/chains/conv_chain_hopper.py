"""When and how `conv_chain` uses the warp-specialised core of sm_90 (`hopper/chain.py`): where it
is asked for, as for the other ops of `hopper/core.py`, for an expansion and a reduction.

Every program keeps the sums of z of its pixels, and both weights pass by in blocks of 64 wide
channels. What that leaves of shared memory goes to more slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .... import settings
from ...contract import cost_model
from ...contract import epilogue as ep
from ...contract.op import Config, Launch, Problem, Ref, Target, TmaDescriptor, config, power_of_two
from ...contract.spec import Operand
from ...hopper import boxes, core
from ...hopper.chain import chain_kernel
from ...tile.geometry import Output, tile_launch
from .. import links

WAY = 4
"""Beside those of `core.TILES`."""
PIXELS = 128
BLOCK = 64
"""Wide channels at a time: with 128 the sums of 256 to 1,024 to 256 channels spill."""
MOST_CHANNELS = 256
"""Of t and z: the sums of z are 128 registers of a thread."""
DEPTHS = ((2, 4, 3), (2, 3, 3), (2, 3, 2), (2, 2, 2), (1, 3, 2), (1, 2, 2))
"""Slots of t and of weights, and places of each group for results, the best first."""
MOST_WASTE = 1.5
BLOCK_INSTRUCTIONS = 80
"""Of a warp that multiplies, for each block beside its results (counted in the machine code)."""


class Parts(NamedTuple):
    """Of a chain: t, y and z, the weights, and the operands of both epilogues; padded: channels of
    t and z with those that fill them up."""

    t: Operand
    y: Operand
    z: Operand
    w2: int
    w3: int
    wide: slice
    narrow: slice
    padded: tuple[int, int]


def _parts(problem: Problem) -> Parts:
    chain, inputs = problem.attributes, problem.inputs
    where = links.slots(chain.links)
    y, z = problem.outputs
    padded = tuple(max(BLOCK, power_of_two(each.shape[1])) for each in (inputs[0], z))
    names, spans = where.tensors, where.operands
    return Parts(
        inputs[0], y, z, names["w2"], names["w3"], spans["expand"], spans["reduce"], padded
    )  # fmt: skip


def refusal(problem: Problem, target: Target) -> str | None:
    """Why the core cannot compute a chain, or None."""
    if (reason := core.unavailable(target)) is not None:
        return reason
    chain = problem.attributes
    if chain.front is not None or chain.shortcut is not None or not chain.has_reduce:
        return "the Hopper core chains an expansion and a reduction, and nothing beside them"
    t, y, z, *_, padded = _parts(problem)
    if t.spec.dtype not in (torch.float16, torch.bfloat16):
        return f"the Hopper core chains products of fp16 and bf16, not {t.spec.dtype}"
    channels = [each.shape[1] for each in (t, y, z)]
    if min(channels) < core.LEAST_CHANNELS or max(padded) > MOST_CHANNELS:
        return (
            f"{channels[0]} to {channels[2]} channels; the Hopper core chains "
            f"{core.LEAST_CHANNELS} to {MOST_CHANNELS}"
        )
    for what, each in (("y", y), ("z", z)):
        if boxes.whole(each, ()) is None:
            return f"TMA: {what} cannot be moved in boxes of pixels"
    if t.spec.numel == 0 or y.spec.numel == 0:
        return "a tensor is empty"
    return boxes.misaligned(t, channels[0]) or boxes.misaligned(t, channels[1])


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    """Why a configuration cannot compute the chain on the target, or None."""
    if settings.core() == settings.PLAIN:
        return "CONVLOOM_CORE=plain switches the Hopper core off"
    if (reason := refusal(problem, target)) is not None:
        return reason
    if tile not in (_tile(problem, *depths) for depths in DEPTHS):
        return f"the Hopper core has no tile of {tile}"
    return target.shared_shortage(shared_bytes(problem, tile))


def _tile(problem: Problem, t_slots: int, stages: int, places: int) -> Config:
    wide = -(-problem.output.shape[1] // BLOCK) * BLOCK
    sizes = {"BLOCK_M": PIXELS, "BLOCK_N": wide, "T_SLOTS": t_slots, "PLACES": places}
    return config(core.WARPS, stages, **sizes, **{core.BLOCK: WAY})


def shared_bytes(problem: Problem, tile: Config) -> int:
    """Shared memory of a program."""
    middle, narrow = _parts(problem).padded
    elements = tile["T_SLOTS"] * PIXELS * middle + tile.num_stages * BLOCK * (middle + narrow)
    elements += tile["PLACES"] * PIXELS * BLOCK
    return elements * problem.output.spec.dtype.itemsize + core.BARRIER_BYTES


def _waste(problem: Problem) -> float:
    """Products, those with zeros included, for each that there is."""
    t, y, z, *_, padded = _parts(problem)
    real = y.shape[1] * (t.shape[1] + z.shape[1])
    return -(-y.shape[1] // BLOCK) * BLOCK * sum(padded) / real


def tiles(problem: Problem, target: Target) -> Iterator[Config]:
    """The configuration of most slots, if there is one that wastes little."""
    if refusal(problem, target) is None and _waste(problem) <= MOST_WASTE:
        every = (_tile(problem, *depths) for depths in DEPTHS)
        yield from [each for each in every if legal(problem, each, target) is None][:1]


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """The core's part of the tuning space; empty unless it is asked for."""
    if core.is_asked(target):
        yield from tiles(problem, target)


def unfit(problem: Problem, target: Target) -> str | None:
    """As `core.unfit`."""
    if (reason := refusal(problem, target)) is not None:
        return reason
    if any(tiles(problem, target)):
        return None
    return f"with channels filled up a chain has {_waste(problem):.1f} times the products"


core.OPS["conv_chain"] = unfit


def launch(problem: Problem, tile: Config, target: Target) -> Launch:
    """As many programs as there are multiprocessors, each of which takes tile after tile."""
    chain, inputs, parts = problem.attributes, problem.inputs, _parts(problem)
    t, y, z = parts.t, parts.y, parts.z
    (middle, narrow), (c, wide, few) = parts.padded, (each.shape[1] for each in (t, y, z))
    rows, size = y.spec.numel // wide, y.spec.dtype.itemsize
    added, later = inputs[parts.wide], inputs[parts.narrow]
    held = next(iter(boxes.whole(y, added) or ()), None)

    def described(ref: Ref, tensor: Operand, pixels: int, columns: int) -> TmaDescriptor:
        channels = tensor.shape[1], columns
        return boxes.described(ref, tensor, (rows, 1, 1), (pixels, 1, 1), channels, by_rows=False)

    def output(tensor: Operand, epilogue: ep.GeneratedFunction) -> Output:
        return Output(1, 1, tensor.shape[1], tensor.pitch, tensor.offset, epilogue)

    moved = {"y": (Ref("output", 0), y), "z": (Ref("output", 1), z)}
    if held is not None:
        moved["residual"] = Ref("input", parts.wide.start + held), added[held]
    first, second = Ref("input", parts.w2), Ref("input", parts.w3)
    # Behind those of the reduction: what is held is the last.
    read = (each for span in (parts.narrow, parts.wide) for each in range(span.start, span.stop))
    blocks = tile["BLOCK_N"] // BLOCK
    weights, passing = BLOCK * (middle + narrow), (1 + (held is not None)) * PIXELS * BLOCK
    products = 2 * ((64 + BLOCK) * middle + (64 + narrow) * BLOCK)
    whole = sum(each.spec.numel == y.spec.numel for each in added)
    traffic = blocks * (products + weights + 2 * passing) + PIXELS * (middle + narrow)
    return tile_launch(
        problem, tile, chain_kernel,
        pointers={},
        boxes={
            "x": described(Ref("input", 0), t, PIXELS, middle),
            "w2": TmaDescriptor(first, (wide, c), (c, 1), (BLOCK, middle)),
            "w3": TmaDescriptor(second, (few, wide), (wide, 1), (narrow, BLOCK)),
            **{name: described(*each, PIXELS // 2, BLOCK) for name, each in moved.items()},
        },
        constexprs={
            "PIXELS": boxes.Pixels(PIXELS, 1, 1, 1, copied=True), "STAGES": tile.num_stages,
            "Z": output(z, ep.for_output(chain.after_reduce, later, z.spec)),
            "T_SLOTS": tile["T_SLOTS"], "PLACES": tile["PLACES"],
            **({} if held is not None else {"residual": None}),
        },
        output=output(y, ep.for_output(chain.after_expand, added, y.spec, len(later), held)),
        rows=rows,
        extras=tuple(Ref("input", at) for at in read),
        l2_bytes=size * (PIXELS * (c + whole * wide) + wide * (c + few)),
        steps=2 * blocks,
        step_instructions=BLOCK_INSTRUCTIONS,
        instructions=round(sum(core.END_INSTRUCTIONS[: len(moved) - 1]) * PIXELS * wide),
        shared_traffic=size * traffic,
        shared_held=shared_bytes(problem, tile),
        end_shared=size * PIXELS * narrow,
        end_instructions=round(core.END_INSTRUCTIONS[0] * PIXELS * narrow / 128),
        most_programs=cost_model.machine_for(target).multiprocessors,
    )  # fmt: skip
