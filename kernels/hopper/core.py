"""When and how conv2d, conv_pool, conv_mean and linear use the warp-specialised core of sm_90
(`kernel.py`, `halo.py`); conv_chain does too (`fused/chains/conv_chain_hopper.py`).

A configuration with the block `HOPPER` is this core's; its value says in which way. No GPU has run
it: it is neither a default nor in the tuning space unless `CONVLOOM_CORE=hopper` asks for it
(`settings.py`). Then it is taken where its conditions hold and the cost model expects it to be
faster than plain Triton's tiles; `CONVLOOM_CORE=plain` refuses it even where a file or a record
names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ... import settings
from ...errors import TargetUnavailableError
from ..contract import cost_model
from ..contract import epilogue as ep
from ..contract.op import Config, Launch, Problem, Ref, Target, TmaDescriptor, W, X, Y, config
from ..tile import choice
from ..tile.conv_geometry import Conv2d, is_product
from ..tile.geometry import Image, Output, Window, tile_launch
from . import boxes, gluon
from .boxes import Pixels, Pool
from .halo import halo_kernel
from .kernel import hopper_kernel

BLOCK = "HOPPER"
SHARED, IN_TURNS, HALO = 1, 2, 3
"""Ways: two groups of warps share each tile, or take tiles in turn; or they share tiles of 3x3
filters whose vertical taps are read once."""
CAPABILITY = 90
TILES = (
    (128, 256, SHARED), (256, 128, SHARED), (128, 128, SHARED), (256, 64, SHARED),
    (128, 64, SHARED), (128, 128, IN_TURNS), (128, 64, IN_TURNS), (256, 128, HALO), (256, 64, HALO),
    (256, 32, HALO),
)  # fmt: skip
"""Pixels, output channels and the way."""
DEPTHS = (64, 32)
"""Channels of a step in half precision: rows of 128 or 64 bytes; half as many in fp32."""
LEAST_CHANNELS = 32
MOST_STAGES = 8
END_BYTES = 17_408
"""Shared memory beside the ring where threads store results: what these go through, and
barriers."""
BARRIER_BYTES = 1_024
"""Beside the ring and the results where these are copied."""
LEAST_STAGES = 3
"""For whose sake results are not copied."""
STEP_INSTRUCTIONS = 48
"""Of a warp that multiplies, beside the products (41 to 54 from 128x256 to 256x128)."""
HALO_INSTRUCTIONS = 140
"""For three taps (104 where the weights stay)."""
END_INSTRUCTIONS = 2.5, 2.2
"""Of a thread for each of its results where these are copied, and for its residual (bias and relu:
2.4 to 2.5, and 4.6 to 4.7 with a residual, at 64 and 128 results)."""
GROUPED = boxes.GROUPED
CHECK_INSTRUCTIONS = 2 * 2 * GROUPED
"""Of each warp that multiplies several groups: whether there is NaN among the 32 sums of its
threads, by two groups of warps."""
HALO_STAGES, LEAST_SLOTS, HALO_SLOTS = (3, 2), 3, 8
"""Slots of pixels, and at least and at most of weights."""
SWIZZLE_PERIOD = 1_024
"""Bytes, of which a row of a halo's slot is a multiple."""
WARPS = 4
"""Of each of the two groups that multiply; the compiler adds a group for the warp that copies."""


class View(NamedTuple):
    """A problem as a convolution: what is read, the filter, and what is written."""

    image: Image
    window: Window
    output: Output
    images: int


def uses_core(tile: Config) -> bool:
    """Whether a configuration is this core's."""
    return bool(dict(tile.blocks).get(BLOCK, 0))


def is_untried(tile: Config) -> bool:
    """Whether a configuration needs what no GPU has run: this core, or clusters (`split_k.py`)."""
    return uses_core(tile) or choice.cluster_of(tile) > 1


def _way(tile: Config) -> int:
    return dict(tile.blocks).get(BLOCK, 0)


def unavailable(target: Target) -> str | None:
    """Why the core cannot run on a target, whatever the problem, or None."""
    if target.capability != CAPABILITY:
        return f"the Hopper core is made for sm_{CAPABILITY}, not for {target.name}"
    return gluon.MISSING


def is_asked(target: Target) -> bool:
    """Whether the core is asked for, and the target can have it."""
    return settings.core() == settings.HOPPER and unavailable(target) is None


def check_asked(target: Target) -> None:
    """Raises TargetUnavailableError where the core is asked for and the target, a GPU, cannot have
    it. (In the interpreter no kernel is that of a GPU.)"""
    asked = settings.core() == settings.HOPPER and target.is_gpu
    if asked and (reason := unavailable(target)) is not None:
        raise TargetUnavailableError(
            f"CONVLOOM_CORE=hopper: {reason}. Unset it to use the plain core"
        )


def refusal(problem: Problem, target: Target) -> str | None:
    """Why the core cannot compute a problem, whatever the tile, or None."""
    if (reason := unavailable(target)) is not None:
        return reason
    x, w, y = problem.inputs[0], problem.inputs[1], problem.output
    if problem.prologue or getattr(problem.attributes, "before", ()):
        return "TMA copies to shared memory; a prologue needs its elements in registers on the way"
    if x.spec.dtype is torch.float32 and problem.precision != "tf32":
        return "fp32 sums of fp32 accuracy take three tf32 products; the Hopper core has one"
    if x.spec.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the Hopper core multiplies fp16, bf16 and tf32, not {x.spec.dtype}"
    if not _is_product(problem) and (reason := boxes.refusal(problem)) is not None:
        return reason
    c = _channels(problem)
    if c < LEAST_CHANNELS:
        return f"{c} channels; the Hopper core is for {LEAST_CHANNELS} and more"
    if w.spec.numel == 0 or y.spec.numel == 0:
        return "a tensor is empty"
    return boxes.misaligned(x, _depth(problem))


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    """Why a configuration cannot compute the problem on the target, or None."""
    if settings.core() == settings.PLAIN:
        return "CONVLOOM_CORE=plain switches the Hopper core off"
    if (reason := refusal(problem, target)) is not None:
        return reason
    if (reason := splits_steps(problem, tile["BLOCK_K"])) is not None:
        return reason
    if math.prod(box := boxes.box_of(tile)) != tile["BLOCK_M"]:
        return f"the box does not hold BLOCK_M={tile['BLOCK_M']} pixels"
    if boxes.splits_windows(problem, box, _way(tile) == HALO):
        what = "windows of 2x2" if boxes.side(problem) else "images"
        return f"half a box of {box} pixels does not hold whole {what}"
    known = tile["BLOCK_M"], tile["BLOCK_N"], _way(tile)
    if known not in TILES or tile.num_warps != WARPS:
        return f"the Hopper core has no tile of {tile}"
    if _way(tile) == HALO and (reason := _no_halo(problem, tile)) is not None:
        return reason
    if bool(_group(problem)) != (tile["BLOCK_N"] == GROUPED):
        return f"tiles of {GROUPED} channels are for several groups, and only they"
    return target.shared_shortage(shared_bytes(problem, tile, target))


def splits_steps(problem: Problem, block_k: int) -> str | None:
    """Why steps of so many channels reach from one pixel into another, or None."""
    if _window(problem).stride_h == 2 and _channels(problem) % block_k:
        # Behind the channels of a pixel lie those of the next one, not zeros.
        return f"stride 2: {_channels(problem)} channels are not a multiple of {block_k}"
    return None


def _no_halo(problem: Problem, tile: Config) -> str | None:
    window = _window(problem)
    if window != Window(3, 3, 1, 1, window.top, window.left):
        return "a halo is for 3x3 filters of stride 1 without dilation"
    row = tile["BOX_N"] * tile["BOX_W"] * tile["BLOCK_K"] * problem.inputs[0].spec.dtype.itemsize
    if problem.inputs[0].shape[2] < 2 or tile["BOX_H"] < 2 or row % SWIZZLE_PERIOD:
        return f"a halo has two rows at least, of a multiple of {SWIZZLE_PERIOD} bytes"
    return gluon.SMALL_VIEWS


def shared_bytes(problem: Problem, tile: Config, target: Target) -> int:
    """Shared memory of a program: the ring, and what results go through."""
    slots = _weights(problem, tile, target)[0] if _way(tile) == HALO else 0
    ends = _copied_bytes(problem, tile, target) or END_BYTES
    return _ring_bytes(problem, tile, slots) + ends


def _ring_bytes(problem: Problem, tile: Config, slots: int = LEAST_SLOTS) -> int:
    """slots: of a halo's weights, by default as few as there can be."""
    dtype = problem.inputs[0].spec.dtype
    if _way(tile) == HALO:
        x_bytes, w_bytes = _halo_bytes(tile, dtype)
        return tile.num_stages * x_bytes + slots * w_bytes
    return tile.num_stages * _slot_bytes(tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"], dtype)


def _result_bytes(problem: Problem, block_m: int, block_n: int, way: int) -> int:
    """Of both groups' results, in turns of a tile each."""
    return (1 + (way == IN_TURNS)) * block_m * block_n * problem.output.spec.dtype.itemsize


def _copied_bytes(problem: Problem, tile: Config, target: Target) -> int:
    """Shared memory for a tile's results, and barriers, where the copy engine moves them and a
    residual; 0 where threads do: they are pooled, or not aligned, or there is not room enough."""
    if boxes.side(problem) != 1 or boxes.whole(problem.output, problem.operands) is None:
        return 0
    needed = _result_bytes(problem, tile["BLOCK_M"], tile["BLOCK_N"], _way(tile)) + BARRIER_BYTES
    return needed if _ring_bytes(problem, tile) + needed <= target.shared_bytes else 0


def _halo_bytes(tile: Config, dtype: torch.dtype) -> tuple[int, int]:
    """Of a slot of pixels, and of one of weights."""
    depth = tile["BLOCK_K"] * dtype.itemsize
    return (tile["BOX_H"] + 2) * tile["BOX_N"] * tile["BOX_W"] * depth, tile["BLOCK_N"] * depth


def _weights(problem: Problem, tile: Config, target: Target) -> tuple[int, bool]:
    """How many slots the weights of a halo have, at least three, and whether all of them stay."""
    x_bytes, w_bytes = _halo_bytes(tile, problem.inputs[0].spec.dtype)
    ends = _copied_bytes(problem, tile, target) or END_BYTES
    room = (target.shared_bytes - ends - tile.num_stages * x_bytes) // w_bytes
    every = 9 * -(-_depth(problem) // tile["BLOCK_K"])
    if every <= room and _columns(problem) <= tile["BLOCK_N"]:
        return every, True
    return max(LEAST_SLOTS, min(room, HALO_SLOTS)), False


def _slot_bytes(block_m: int, block_n: int, block_k: int, dtype: torch.dtype) -> int:
    return (block_m + block_n) * block_k * dtype.itemsize


def tiles(problem: Problem, target: Target) -> Iterator[Config]:
    """Every configuration that can compute the problem: of each tile size the boxes that pad least,
    and as many slots as there is memory for beside results, and without these."""
    if refusal(problem, target) is not None:
        return
    dtype, c = problem.inputs[0].spec.dtype, _depth(problem)
    depths = [depth * 2 // dtype.itemsize for depth in DEPTHS]
    block_k = min(depths, key=lambda depth: (-(-c // depth) * depth, -depth))
    columns = _columns(problem)
    for block_m, block_n, way in TILES:
        if block_n > max(64, columns + columns // 2):
            continue
        slot = _slot_bytes(block_m, block_n, block_k, dtype)
        results = _result_bytes(problem, block_m, block_n, way) + BARRIER_BYTES
        copied, most = ((target.shared_bytes - ends) // slot for ends in (results, END_BYTES))
        counts = (copied, most) if copied >= LEAST_STAGES else (most,)
        for n, h, w in _boxes(problem, block_m, way):
            sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
            sizes |= {"BOX_N": n, "BOX_H": h, "BOX_W": w, BLOCK: way}
            deep = HALO_STAGES if way == HALO else counts
            every = (config(WARPS, min(MOST_STAGES, count), **sizes) for count in deep)
            found = [each for each in every if not legal(problem, each, target)]
            # Of those whose results are copied and of all the one of most slots.
            moving = [each for each in found if _copied_bytes(problem, each, target)]
            yield from dict.fromkeys((*moving[:1], *sorted(found, key=lambda x: -x.num_stages)[:1]))


def _boxes(problem: Problem, pixels: int, way: int) -> list[tuple[int, int, int]]:
    if _is_product(problem):
        return [] if way == HALO else [(pixels, 1, 1)]
    return boxes.boxes(problem, pixels, by_rows=way == HALO)


USES: dict[str, tuple[Callable[[Problem, Target], str | None], Callable[..., Iterator[Config]]]] = (
    dict.fromkeys(("conv2d", "linear", "conv_pool", "conv_mean"), (refusal, tiles))
)
"""`refusal` and `tiles` of each op that the core computes."""


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """The core's part of the tuning space; empty unless it is asked for."""
    if is_asked(target):
        yield from tiles(problem, target)


def default(
    problem: Problem, target: Target, plain: Config, launch_of: Callable[[Config], Launch]
) -> Config:
    """The core's configuration of least modelled time, where it is asked for and that is less than
    the time of `plain`; else `plain`."""
    found = list(configs(problem, target))
    return faster(problem, target, plain, found, launch_of, _flops(problem) if found else 0)


def faster(
    problem: Problem, target: Target, plain: Config, found: Sequence[Config],
    launch_of: Callable[[Config], Launch], flops: int,
) -> Config:  # fmt: skip
    """That of the core's configurations of least modelled time, or `plain` if none takes less."""
    if not found:
        return plain
    gpu = cost_model.machine_for(target)
    work = choice.Work.of(problem, flops)

    def time_us(tile: Config) -> float:
        made = launch_of(tile)
        padded = flops * cost_model.padding(made, tile, problem)
        return cost_model.launch_us(gpu, made, padded, work.dtype, work.end_bytes)

    times = [time_us(tile) for tile in found]
    is_faster = min(times) < time_us(plain)
    return found[times.index(min(times))] if is_faster else plain


def note(problem: Problem, tile: Config, target: Target, launches: tuple[Launch, ...]) -> str:
    """Which core a configuration uses and, where it is not this one, why: in words for the plan.
    Empty where nobody asked for this one, and where the launches multiply nothing."""
    if not is_asked(target):
        return ""
    if uses_core(tile):
        return "Hopper core"
    if problem.op not in USES:
        multiplies = any(cost_model.block_of(launch) for launch in launches)
        return f"plain core: {problem.op} has no other" if multiplies else ""
    refused, fitting = USES[problem.op]
    reason = refused(problem, target)
    if reason is None and not any(fitting(problem, target)):
        reason = "no tile of the Hopper core fits"
    return f"plain core: {reason or 'it is ranked before the Hopper core'}"


def beside(plain: Mapping[str, Any], launch: Callable[..., Launch]) -> tuple[Any, Any, Any]:
    """`configs`, `default` and `legal` of an op with plain tiles, of whose configurations `launch`
    makes one launch, and with the core's where they are asked for."""

    def every(problem: Problem, target: Target) -> Iterator[Config]:
        yield from plain["configs"](problem, target)
        yield from configs(problem, target)

    def first(problem: Problem, target: Target) -> Config:
        usual = plain["default"](problem, target)
        return default(problem, target, usual, lambda tile: launch(problem, tile, target))

    def refused(problem: Problem, tile: Config, target: Target) -> str | None:
        return (legal if uses_core(tile) else plain["legal"])(problem, tile, target)

    return every, first, refused


def _group(problem: Problem) -> int:
    """Channels of each group, of which several are multiplied together; else 0."""
    return problem.inputs[1].shape[1] if boxes.groups(problem) > 1 else 0


def _depth(problem: Problem) -> int:
    """Terms of a tap: the channels, or those of several groups together."""
    return GROUPED if _group(problem) else _channels(problem)


def _is_product(problem: Problem) -> bool:
    """Whether the rows of the input, as they are in memory, are multiplied."""
    attributes = problem.attributes
    if isinstance(attributes, Conv2d):
        return is_product(attributes, problem.inputs[1].shape)
    return boxes.side(problem) == 1


def _channels(problem: Problem) -> int:
    return ep.memory_sizes(problem.inputs[0].spec)[-1]


def _flops(problem: Problem) -> int:
    w, y = problem.inputs[1].spec, problem.output.spec
    pixels = y.numel // _columns(problem) * boxes.side(problem) ** 2
    return 2 * w.numel * (pixels or math.prod(boxes.size(problem)))


def _columns(problem: Problem) -> int:
    return ep.memory_sizes(problem.output.spec)[-1]


def view_of(problem: Problem, before: ep.Epilogue = (), held: int | None = None) -> View:
    """The problem as a convolution; a matrix product is one of images of a single pixel. before:
    stages in front of its epilogue; held: the operand that the kernel has read when they begin."""
    x, y = problem.inputs[0], problem.output
    epilogue = ep.for_output((*before, *problem.epilogue), problem.operands, y.spec, held=held)
    if _is_product(problem):
        c, k = _channels(problem), _columns(problem)
        output = Output(1, 1, k, y.pitch, y.offset, epilogue)
        rows = y.spec.numel // k
        return View(Image(1, 1, c, x.pitch, x.offset), Window(1, 1), output, rows)
    image = Image.of(x)._replace(C=_depth(problem))
    return View(image, _window(problem), Output.of(y, epilogue), y.shape[0])


def _window(problem: Problem) -> Window:
    if _is_product(problem):
        return Window(1, 1)
    return Window.of(problem.inputs[1].shape[2:], boxes.filter_of(problem))


def _way_out(problem: Problem, tile: Config, view: View, by_rows: bool) -> dict[str, TmaDescriptor]:
    """y, and the residual if there is one, in boxes of as much as a group of warps finishes at a
    time."""
    n, h, w = box = boxes.box_of(tile)
    if _way(tile) != IN_TURNS:
        n, h, w = boxes.half(box, by_rows)
    out, size = view.output, (view.images, view.output.P, view.output.Q)
    columns = out.K, boxes.at_once(tile, 1, _way(tile) == IN_TURNS)
    moved = {"y": (Y, problem.output)}
    for at in boxes.whole(problem.output, problem.operands) or ():
        moved["residual"] = Ref("operand", at), problem.operands[at]
    return {
        name: boxes.described(*tensor, size, (n, h, w), columns, by_rows)
        for name, tensor in moved.items()
    }


def launch(
    problem: Problem, tile: Config, target: Target, pool: Pool | None = None,
    before: ep.Epilogue = (), extras: tuple[Ref, ...] = (),
) -> Launch:  # fmt: skip
    """As many programs as there are multiprocessors, each of which takes tile after tile.

    pool: what is made of windows of the result, which `extras` are read for; before: stages in
    front of the epilogue.
    """
    copied = bool(_copied_bytes(problem, tile, target))
    moved = boxes.whole(problem.output, problem.operands) if copied else None
    held = next(iter(moved or ()), None)
    view, way, box = view_of(problem, before, held), _way(tile), boxes.box_of(tile)
    side = boxes.side(problem)
    down, across = -(-side * view.output.P // box[1]) or 1, -(-side * view.output.Q // box[2]) or 1
    row = box[0] * box[2] if way == HALO else box[2]
    at_once = boxes.at_once(tile, side, way == IN_TURNS)
    pixels = Pixels(*box, row, down, across, side, pool, copied, at_once)
    way_out = _way_out(problem, tile, view, row != box[2]) if copied else {}
    c, taps, k = view.image.C, view.window.R * view.window.S, view.output.K
    block_m, block_n, block_k = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    dtype = problem.inputs[0].spec.dtype
    steps = taps * -(-c // block_k)
    plain = tile_launch(
        problem, tile, hopper_kernel,
        pointers={} if copied else {"y": Y},
        boxes={
            "x": boxes.described(
                X, problem.inputs[0], (view.images, 1, 1), box, (c, block_k), by_rows=False
            ) if _is_product(problem) else boxes.view(problem, box, block_k, way == HALO),
            "w": TmaDescriptor(W, (k, taps, c), (taps * c, c, 1), (block_n, 1, block_k)),
            **way_out,
        },
        constexprs={
            "IMAGE": view.image, "WINDOW": view.window, "PIXELS": pixels, "STAGES": tile.num_stages,
            **({} if "residual" in way_out else {"residual": None}),
        },
        precision="tf32" if dtype is torch.float32 else "ieee",
        output=view.output,
        rows=view.images,
        block_rows=pixels.N,
        programs=down * across,
        extras=extras,
        l2_bytes=steps * _slot_bytes(block_m, block_n, block_k, dtype),
        steps=steps,
        step_instructions=STEP_INSTRUCTIONS * (1 if way == IN_TURNS else 2),
        shared_held=shared_bytes(problem, tile, target),
        hides_ends=way == IN_TURNS,
        end_shared=len(way_out) * block_m * block_n * problem.output.spec.dtype.itemsize,
        end_instructions=round(sum(END_INSTRUCTIONS[: len(way_out)]) * block_m * block_n / 128),
        most_programs=cost_model.machine_for(target).multiprocessors,
    )  # fmt: skip
    if way == HALO:
        return _with_halo(plain, problem, tile, target)
    return replace(plain, constexprs={**plain.constexprs, "TURNS": way == IN_TURNS})


def _with_halo(made: Launch, problem: Problem, tile: Config, target: Target) -> Launch:
    """The launch with the vertical taps of a filter read once."""
    slots, stay = _weights(problem, tile, target)
    group = _group(problem)
    whole = {"x_all": X, "w_all": W}
    x, dtype = made.boxes["x"], problem.inputs[0].spec.dtype
    x_bytes, w_bytes = _halo_bytes(tile, dtype)
    copied = made.steps // 3 * x_bytes + (0 if stay else made.steps * w_bytes)
    block = cost_model.Block(tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"])
    ring = _slot_bytes(block.m, block.n, block.k, dtype)
    read = cost_model.product_traffic(block, 2 * WARPS, dtype) - ring
    return replace(
        made,
        kernel=halo_kernel,
        boxes={**made.boxes, "more": replace(x, box=(2, *x.box[1:]))},
        pointers={**made.pointers, **(whole if group else {})},
        constexprs={
            **made.constexprs, "SLOTS": slots, "RESIDENT": stay, "GROUP": group,
            **({} if group else dict.fromkeys(whole)),
        },
        end_instructions=made.end_instructions + bool(group) * CHECK_INSTRUCTIONS,
        l2_bytes=copied,
        shared_traffic=made.steps * read + copied,
        steps=made.steps // 3,
        step_instructions=2 * HALO_INSTRUCTIONS,
    )
