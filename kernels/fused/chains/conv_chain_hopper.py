"""When and how `conv_chain` uses the warp-specialised core of sm_90 (`hopper/chain.py`): where it
is asked for, as for the other ops of `hopper/core.py`, for an expansion and a reduction, with or
without a convolution in front.

Every program keeps the sums of z of its pixels, and both weights pass by in blocks of 64 wide
channels. What that leaves of shared memory goes to more slots.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .... import settings
from ...contract import cost_model
from ...contract import epilogue as ep
from ...contract.op import Config, Launch, Problem, Ref, Target, TmaDescriptor, config, power_of_two
from ...contract.spec import Operand
from ...hopper import boxes, core
from ...hopper.chain import chain_kernel
from ...tile.geometry import Image, Output, Window, tile_launch
from .. import links

WAY = 4
"""Beside those of `core.TILES`."""
PIXELS = 128
BLOCK = 64
"""Wide channels at a time: with 128 the sums of 256 to 1,024 to 256 channels spill."""
MOST_CHANNELS = 256
"""Of t and z: the sums of z are 128 registers of a thread."""
MOST_WASTE = 1.5
BLOCK_INSTRUCTIONS = 80
"""Of a warp that multiplies, for each block beside its results (57 to 99)."""


class Parts(NamedTuple):
    """Of a chain: t, y and z, the numbers of both weights, and the inputs that the epilogues read;
    padded: channels of t and z with those that fill them up; front: the convolution that makes t,
    as a problem of its own."""

    t: Operand
    y: Operand
    z: Operand
    w2: int
    w3: int
    reads: dict[str, slice]
    padded: tuple[int, int]
    front: Problem | None


def _parts(problem: Problem) -> Parts:
    chain: Any = problem.attributes
    inputs, where = problem.inputs, links.slots(chain.links)
    t, front, (y, z) = inputs[0], None, problem.outputs
    if chain.front is not None:
        channels = inputs[where.tensors["w2"]].shape[1]
        n, _, p, q = y.shape
        t = Operand.dense(y.spec.with_(shape=(n, channels, p, q)))
        front = Problem("conv2d", chain.front, inputs[:2], (t,))
    c, few = (max(BLOCK, power_of_two(each.shape[1])) for each in (t, z))
    w2, w3 = where.tensors["w2"], where.tensors["w3"]
    return Parts(t, y, z, w2, w3, dict(where.operands), (c, few), front)


def refusal(problem: Problem, target: Target) -> str | None:
    if (reason := core.unavailable(target)) is not None:
        return reason
    chain: Any = problem.attributes
    if chain.shortcut is not None or not chain.has_reduce:
        what = "beside a shortcut" if chain.has_reduce else "without a reduction"
        return f"the Hopper core has no chain {what}"
    t, y, z, *_, padded, front = _parts(problem)
    if t.spec.dtype not in (torch.float16, torch.bfloat16):
        return f"the Hopper core chains products of fp16 and bf16, not {t.spec.dtype}"
    if front is not None and (reason := core.refusal(front, target)) is not None:
        return reason
    c, wide, few = (each.shape[1] for each in (t, y, z))
    if min(c, wide, few) < core.LEAST_CHANNELS or max(padded) > MOST_CHANNELS:
        least, most = core.LEAST_CHANNELS, MOST_CHANNELS
        return f"{c} to {wide} to {few} channels; the Hopper core chains {least} to {most}"
    products = -(-wide // BLOCK) * BLOCK * sum(padded)
    if (waste := products / wide / (c + few)) > MOST_WASTE:
        return f"with channels filled up a chain has {waste:.1f} times the products"
    for name, each in (("y", y), ("z", z)):
        if boxes.whole(each, ()) is None:
            return f"TMA: {name} cannot be moved in boxes of pixels"
    return boxes.misaligned(t, c) or boxes.misaligned(t, wide)


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    """Why a configuration cannot compute the chain on the target, or None."""
    if settings.core() == settings.PLAIN:
        return "CONVLOOM_CORE=plain switches the Hopper core off"
    if (reason := refusal(problem, target)) is not None:
        return reason
    sizes = dict(tile.blocks)
    box, front = (sizes["BOX_N"], sizes["BOX_H"], sizes["BOX_W"]), _parts(problem).front
    slots, stages, places = sizes["SLOTS"], tile.num_stages, sizes["PLACES"]
    known = slots > (front is not None) and min(stages, places) >= 2
    if not known or math.prod(box) != PIXELS or tile != _tile(problem, box, slots, stages, places):
        return f"the Hopper core has no tile of {tile}"
    if front is not None and (reason := core.splits_steps(front, BLOCK)) is not None:
        return reason
    return target.shared_shortage(shared_bytes(problem, tile))


def _tile(
    problem: Problem, box: tuple[int, int, int], slots: int, stages: int, places: int
) -> Config:
    wide = -(-problem.output.shape[1] // BLOCK) * BLOCK
    sizes = {"BLOCK_M": PIXELS, "BLOCK_N": wide, "BLOCK_K": BLOCK}
    sizes |= {"BOX_N": box[0], "BOX_H": box[1], "BOX_W": box[2], "SLOTS": slots, "PLACES": places}
    return config(core.WARPS, stages, **sizes, **{core.BLOCK: WAY})


def shared_bytes(problem: Problem, tile: Config) -> int:
    middle, narrow = _parts(problem).padded
    if _parts(problem).front is None:
        first = tile["SLOTS"] * PIXELS * middle
    else:
        first = tile["SLOTS"] * (PIXELS + middle) * BLOCK + PIXELS * middle
    elements = first + tile.num_stages * BLOCK * (middle + narrow) + tile["PLACES"] * PIXELS * BLOCK
    return elements * problem.output.spec.dtype.itemsize + core.BARRIER_BYTES


def tiles(problem: Problem, target: Target) -> Iterator[Config]:
    """Of each of the boxes that pad least the best configuration."""
    if refusal(problem, target) is not None:
        return
    front, blocks = _parts(problem).front, -(-problem.output.shape[1] // BLOCK)

    def worth(tile: Config) -> tuple[int, ...]:
        """Weights that stay, then taps under way, residuals, weights."""
        slots, stages = tile["SLOTS"], tile.num_stages
        return stages == blocks, min(slots, 3) * (front is not None), tile["PLACES"], stages, slots

    for box in [(PIXELS, 1, 1)] if front is None else boxes.boxes(front, PIXELS):
        depths = itertools.product((4, 3, 2) if front else (2, 1), (4, 3, 2), (3, 2))
        every = (_tile(problem, box, *each) for each in depths)
        fitting = [tile for tile in every if legal(problem, tile, target) is None]
        yield from sorted(fitting, key=worth)[-1:]


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """The core's part of the tuning space; empty unless it is asked for."""
    if core.is_asked(target):
        yield from tiles(problem, target)


core.USES["conv_chain"] = refusal, tiles


def launch(problem: Problem, tile: Config, target: Target) -> Launch:
    """As many programs as there are multiprocessors, each of which takes tile after tile."""
    chain: Any = problem.attributes
    inputs, parts, box = problem.inputs, _parts(problem), boxes.box_of(tile)
    y, z, front = parts.y, parts.z, parts.front
    n, _, p, q = y.shape
    n, p, q = (n * p * q, 1, 1) if front is None else (n, p, q)
    added = inputs[parts.reads["expand"]]
    held = next(iter(boxes.whole(y, added) or ()), None)
    moved = {"y": (Ref("output", 0), y), "z": (Ref("output", 1), z)}
    if held is not None:
        at = parts.reads["expand"].start + held
        moved["residual"] = Ref("input", at), inputs[at]
    # What is held is the last that a function reads.
    order: list[str] = [name for name in ("front", "reduce", "expand") if name in parts.reads]
    reads: dict[str, range] = {
        name: range(parts.reads[name].start, parts.reads[name].stop) for name in order
    }

    def output(name: str, tensor: Operand, stages: ep.Epilogue) -> Output:
        skipped = sum(len(reads[each]) for each in order[: order.index(name)])
        operands = tuple(inputs[each] for each in reads[name])
        function = ep.for_output(
            stages, operands, tensor.spec, skipped, held if name == "expand" else None
        )
        return Output(p, q, tensor.shape[1], tensor.pitch, tensor.offset, function)

    c, wide, few = (each.shape[1] for each in (parts.t, y, z))
    middle, narrow = parts.padded
    ref = [Ref("input", at) for at in range(len(inputs))]
    if front is None:
        x = boxes.described(ref[0], parts.t, (n, p, q), box, (c, middle), by_rows=False)
        read, view = {"x": x}, None
    else:
        _, depth, r, s = front.inputs[1].shape
        taps = (c, r * s, depth), (r * s * depth, depth, 1), (middle, 1, BLOCK)
        read = {"x": boxes.view(front, box, BLOCK), "w1": TmaDescriptor(ref[1], *taps)}
        view = core.View(
            Image.of(inputs[0]), Window.of((r, s), chain.front),
            output("front", parts.t, chain.after_front), 1,
        )  # fmt: skip
    half, down, across = boxes.half(box), -(-p // box[1]), -(-q // box[2])
    return tile_launch(
        problem, tile, chain_kernel,
        pointers={},
        boxes={
            **read,
            "w2": TmaDescriptor(ref[parts.w2], (wide, c), (c, 1), (BLOCK, middle)),
            "w3": TmaDescriptor(ref[parts.w3], (few, wide), (wide, 1), (narrow, BLOCK)),
            **{
                name: boxes.described(*each, (n, p, q), half, (each[1].shape[1], BLOCK), False)
                for name, each in moved.items()
            },
        },
        constexprs={
            "PIXELS": boxes.Pixels(*box, box[2], down, across, copied=True), "FRONT": view,
            "Z": output("reduce", z, chain.after_reduce), "STAGES": tile.num_stages,
            "SLOTS": tile["SLOTS"], "PLACES": tile["PLACES"],
            **({} if held is not None else {"residual": None}),
            **({} if front is not None else {"w1": None}),
        },
        output=output("expand", y, chain.after_expand),
        rows=n,
        block_rows=box[0],
        programs=down * across,
        extras=tuple(ref[each] for name in order for each in reads[name]),
        most_programs=cost_model.machine_for(target).multiprocessors,
        **_modelled(problem, tile, held is not None),
    )  # fmt: skip


def _modelled(problem: Problem, tile: Config, has_residual: bool) -> dict[str, Any]:
    """What the cost model asks of a launch. Weights of as many blocks as there are slots stay."""
    parts, size = _parts(problem), problem.output.spec.dtype.itemsize
    (middle, narrow), front = parts.padded, parts.front
    c, wide, few = (each.shape[1] for each in (parts.t, parts.y, parts.z))
    blocks, passing = tile["BLOCK_N"] // BLOCK, (1 + has_residual) * PIXELS * BLOCK
    stay = blocks == tile.num_stages
    weights = 0 if stay else BLOCK * (middle + narrow)
    products = 2 * ((64 + BLOCK) * middle + (64 + narrow) * BLOCK)
    traffic = blocks * (products + weights + 2 * passing) + PIXELS * (middle + narrow)
    added = problem.inputs[parts.reads["expand"]]
    residuals = sum(each.spec.numel == parts.y.spec.numel for each in added)
    read, steps, step_instructions = PIXELS * c, 2 * blocks, 2 * blocks * BLOCK_INSTRUCTIONS
    if front is not None:
        _, channels, r, s = front.inputs[1].shape
        taps = r * s * -(-channels // BLOCK)
        read = r * s * channels * (PIXELS + c)
        copied = (PIXELS + middle) * BLOCK
        traffic += taps * (copied + 2 * (64 + middle) * BLOCK) + PIXELS * middle
        steps += taps
        step_instructions += 2 * taps * core.STEP_INSTRUCTIONS
    results = sum(core.END_INSTRUCTIONS[: 1 + has_residual]) * PIXELS * wide
    return {
        "l2_bytes": size * (read + PIXELS * residuals * wide + (not stay) * wide * (c + few)),
        "steps": steps,
        "step_instructions": step_instructions // steps,
        "instructions": round(results),
        "shared_traffic": size * traffic,
        "shared_held": shared_bytes(problem, tile),
        "end_shared": size * PIXELS * narrow,
        "end_instructions": round(core.END_INSTRUCTIONS[0] * PIXELS * narrow / 128),
    }
