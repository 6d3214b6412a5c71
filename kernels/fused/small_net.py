"""small_net: a whole small network in one kernel: convolutions with 2x2 pooling, then a classifier.

    t_i = pool2x2(F_i(conv2d(t_{i-1}, w_i)))      one to three layers, t_0 = x
    y = head(t_last as one row per image, in memory order)

x: (N, C, H, W) NHWC; w_i and the links of the head: constants packed as `conv_pool` and `head` pack
them; y: (N, classes). fp32 accumulation; every t_i is rounded to the dtype of the tensors, as it
would be between separate kernels.

A program computes one image from its pixels to its classes. The layers exchange their results
through global memory of the launch's own, which stays in the caches; a barrier stands between them,
and nothing leaves the multiprocessor. Networks like LeNet-5 (LeCun et al., 1998) have too little
work in a layer to fill a GPU, so that launches are most of their time; all their weights are read
again for each image, which is why only those that fit the L1 cache are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract.op import (
    Attributes,
    Config,
    Cost,
    Domain,
    Launch,
    Op,
    Problem,
    Ref,
    Scratch,
    X,
    Y,
    config,
    operand_refs,
    power_of_two,
    tensor_bytes,
)
from ..contract.spec import Layout, Operand, TensorSpec
from ..contract.targets import Target
from ..convolution import conv2d
from ..pooling.pool_window import AvgPool2d, MaxPool2d
from ..tile import choice, finish, source, space
from ..tile.conv_geometry import Conv2d
from ..tile.finish import Finish
from ..tile.geometry import Output, Tile
from . import conv_pool, conv_tile, head
from .conv_pool import ConvPool
from .head import Head
from .small_net_kernel import Layer, small_net_kernel

MOST_LAYERS = 3
MOST_CHANNELS = 64
"""Output channels of a layer: one tile has them all."""
MOST_WEIGHTS = 256 * 1024
"""Bytes of all weights: the L1 cache of one multiprocessor, of which shared memory is a part."""


@dataclass(frozen=True)
class SmallNet(Attributes):
    """The convolutions with their poolings, and the classifier.

    Inputs: x; for each convolution its weight and the operands of its stages; then those of the
    head but its x.
    """

    layers: tuple[ConvPool, ...] = (ConvPool(),)
    head: Head = field(default_factory=Head)

    def parts(self, values: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
        """The inputs of each layer but its x, and last those of the head."""
        parts, at = [], 1
        for layer in self.layers:
            stop = at + 1 + ep.operand_count(layer.stages)
            parts.append(values[at:stop])
            at = stop
        return (*parts, values[at:])


def unsupported(attributes: SmallNet, inputs: tuple[TensorSpec, ...]) -> str | None:
    """Why the kernel does not take a network, or None."""
    if not 1 <= len(attributes.layers) <= MOST_LAYERS:
        return f"{len(attributes.layers)} convolutions, not 1 to {MOST_LAYERS}"
    if any(layer.before for layer in attributes.layers):
        return "a convolution has stages before it"
    if attributes.head.average:
        return "the classifier averages pixels"
    *layers, last = attributes.parts(inputs)
    for part in layers:
        if part[0].shape[0] > MOST_CHANNELS:
            return f"{part[0].shape[0]} channels do not fit one tile (at most {MOST_CHANNELS})"
    weights = [part[0] for part in layers]
    weights += [part[0] for part in attributes.head.parts((inputs[0], *last))]
    size = sum(weight.size_bytes for weight in weights)
    if size > MOST_WEIGHTS:
        return f"{size} bytes of weights do not fit a multiprocessor's {MOST_WEIGHTS}"
    return None


def tensors(attributes: SmallNet, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The specs of t_0, t_1, ..., t_last."""
    found = [inputs[0]]
    for layer, part in zip(attributes.layers, attributes.parts(inputs), strict=False):
        found += conv_pool.infer(layer, (found[-1], *part))
    return tuple(found)


def _rows(spec: TensorSpec) -> TensorSpec:
    """Images as rows of all their numbers."""
    n, *rest = spec.shape
    return TensorSpec((n, math.prod(rest)), spec.dtype, batch=spec.batch)


def infer(attributes: SmallNet, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """(N, classes)."""
    wanted = 1 + sum(1 + ep.operand_count(layer.stages) for layer in attributes.layers)
    wanted += attributes.head.inputs - 1
    if len(inputs) != wanted:
        raise InvalidInputError(f"small_net: expected {wanted} inputs, got {len(inputs)}")
    if (reason := unsupported(attributes, inputs)) is not None:
        raise InvalidInputError(f"small_net: {reason}")
    last = tensors(attributes, inputs)[-1]
    return head.infer(attributes.head, (_rows(last), *attributes.parts(inputs)[-1]))


def reference(attributes: SmallNet, *values: torch.Tensor) -> torch.Tensor:
    t, (*layers, last) = values[0], attributes.parts(values)
    for layer, part in zip(attributes.layers, layers, strict=True):
        t = conv_pool.reference(layer, t, *part)
    return head.reference(attributes.head, t.permute(0, 2, 3, 1).flatten(1), *last)


def _attributes(problem: Problem) -> SmallNet:
    assert isinstance(problem.attributes, SmallNet)
    return problem.attributes


def _tensors(problem: Problem) -> tuple[TensorSpec, ...]:
    return tensors(_attributes(problem), tuple(operand.spec for operand in problem.inputs))


def _head_problem(problem: Problem) -> Problem:
    """The classifier alone, as its own kernel would see it."""
    attributes = _attributes(problem)
    x = Operand.dense(_rows(_tensors(problem)[-1]))
    return Problem(
        "head",
        attributes.head,
        (x, *attributes.parts(problem.inputs)[-1]),
        problem.outputs,
        problem.epilogue,
        problem.operands,
        precision=problem.precision,
    )


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch, one program per image."""
    attributes, y, specs = _attributes(problem), problem.output, _tensors(problem)
    extras = list(operand_refs(problem))
    weights: dict[str, Ref] = {}
    constants: dict[str, Any] = {}
    for number in range(1, MOST_LAYERS + 1):
        # Absent layers are compiled out; their pointers are never read.
        weights[f"v{number}"], constants[f"LAYER{number}"] = Ref("input", 1), None
    at, x, written = 1, problem.inputs[0], 0
    parts = attributes.parts(problem.inputs)
    precision = choice.dot_precision(problem, 16)
    wide = problem.is_wide or sum(spec.numel for spec in specs[1:]) >= 2**31
    for number, (each, part) in enumerate(zip(attributes.layers, parts, strict=False), 1):
        result = _result(each, x.spec, part)
        stay, move = conv_pool.split_stages(each)
        reads = tuple(ep.access(operand, result) for operand in part[1:])
        kept = ep.operand_count(stay)
        pooled = specs[number]
        moved = tuple(ep.access(operand, pooled) for operand in part[1 + kept :])
        first = len(extras)
        extras += [Ref("input", at + 1 + index) for index in range(len(part) - 1)]
        weights[f"v{number}"] = Ref("input", at)
        name = f"layer{number}"
        stages = ep.generate(stay, reads[:kept], ep.memory_sizes(result), first, f"{name}_stages")
        after = ep.generate(
            move, moved, ep.memory_sizes(pooled), first + kept, f"{name}_pooled"
        )
        pixels, depth = tile["BLOCK_PIXELS"], tile["BLOCK_DEPTH"]
        y_layer = Operand(pooled, pooled.shape[1], written)
        constants[f"LAYER{number}"] = Layer(
            space.of_windows(result, pixels, pooled),
            source.of_convolution(each.conv, x, part[0].shape),
            Finish(finish.pool_windows, stages, isinstance(each.pool, MaxPool2d)),
            Output.of(y_layer, after),
            Tile(pixels, max(16, power_of_two(pooled.shape[1])), depth, 1, precision, wide),
        )
        at += len(part)
        x = y_layer
        written += pooled.numel
    links = head.bind_links(
        attributes.head, (x, *parts[-1]), _rows(specs[-1]), at, tuple(extras), tile
    )
    launch = Launch(
        kernel=small_net_kernel,
        pointers={"x": X, **weights, **links.weights, "y": Y, "between": Ref("scratch", 0)},
        extras=links.extras,
        rows=y.shape[0],
        batch=y.spec.batch,
        block_rows=1,
        columns=1,
        constexprs={
            "C": math.prod(specs[-1].shape[1:]), "LAST_OFFSET": x.offset,
            "Y_PITCH": y.pitch, "Y_OFFSET": y.offset,
            "SOFTMAX": attributes.head.softmax,
            "EPILOGUE": ep.for_output(problem.epilogue, problem.operands, y.spec),
            "PRECISION": precision, "WIDE": wide,
            "BLOCK_M": tile["BLOCK_M"], "BLOCK_K": tile["BLOCK_K"],
            **constants, **links.constants,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        l2_bytes=_l2_bytes(problem),
        steps=_steps(problem, tile),
        scratch=(Scratch(problem.inputs[0].spec.dtype, written),),
    )  # fmt: skip
    return (launch,)


def _result(each: ConvPool, x: TensorSpec, part: tuple[Operand, ...]) -> TensorSpec:
    """What is pooled."""
    return conv_tile.result_of("small_net", each, (x, *(operand.spec for operand in part)))


def _l2_bytes(problem: Problem) -> int:
    """A program reads its image, all weights, and what its layers exchange twice: it is written to
    be read, R*S times but out of the L1 cache."""
    specs = _tensors(problem)
    images = sum(math.prod(spec.shape[1:]) for spec in specs) + sum(
        math.prod(spec.shape[1:]) for spec in specs[1:]
    )
    weights = sum(operand.spec.numel for operand in problem.inputs[1:])
    return (images + weights) * problem.inputs[0].spec.dtype.itemsize


def _depth(part: tuple[Operand, ...], block: int) -> int:
    """Steps of a convolution's sums."""
    _, c, r, s = part[0].shape
    return r * s * -(-c // block) if source.runs_by_tap(c, r * s) else -(-c * r * s // block)


def _steps(problem: Problem, tile: Config) -> int:
    """Tiles of each layer times the blocks of its sums, and those of the classifier."""
    specs, parts = _tensors(problem), _attributes(problem).parts(problem.inputs)
    count = 0
    for spec, part in zip(specs[1:], parts, strict=False):
        tiles = -(-4 * math.prod(spec.shape[2:]) // tile["BLOCK_PIXELS"])
        count += tiles * _depth(part, tile["BLOCK_DEPTH"])
    links = len(_attributes(problem).head.links)
    return count + -(-math.prod(specs[-1].shape[1:]) // tile["BLOCK_K"]) + links - 1


def _tile(problem: Problem, pixels: int, depth: int, warps: int, stages: int) -> Config:
    inner = max(16, power_of_two(math.prod(_tensors(problem)[-1].shape[1:])))
    return config(
        warps, stages, BLOCK_PIXELS=pixels, BLOCK_DEPTH=depth, BLOCK_M=16, BLOCK_K=min(inner, 64)
    )


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """Tiles of 32 to 256 pixels."""
    for warps in (4, 8):
        for pixels in (32, 64, 128, 256):
            for depth in (16, 32):
                for stages in (1, 2, 3):
                    tile = _tile(problem, pixels, depth, warps, stages)
                    if legal(problem, tile, target) is None:
                        yield tile


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    """What `head` allows, and accumulators for the widest layer."""
    if target.name == "interpreter":
        return None
    alone = _head_problem(problem)
    if (reason := head.legal(alone, tile, target)) is not None:
        return reason
    parts = _attributes(problem).parts(problem.inputs)[:-1]
    widest = max(max(16, power_of_two(p[0].shape[0])) for p in parts)
    # Gathered operands take registers for addresses and masks.
    elements = tile["BLOCK_PIXELS"] * max(widest, tile["BLOCK_DEPTH"]) // (32 * tile.num_warps)
    if elements > 64:
        return f"{elements} elements of a tile per thread; more than 64 spill"
    return None


def default(problem: Problem, target: Target) -> Config:
    """128 pixels at a time; more warps where the classifier is wide."""
    if target.name == "interpreter":
        pixels = 4 * max(math.prod(spec.shape[2:]) for spec in _tensors(problem)[1:])
        return _tile(problem, max(16, min(1024, power_of_two(pixels))), 512, 1, 1)
    tiles = [
        _tile(problem, pixels, 32, warps, 2)
        for warps in (4, 8)
        for pixels in (128, 64, 32)
    ]  # fmt: skip
    fitting = (tile for tile in tiles if legal(problem, tile, target) is None)
    return next(fitting, tiles[0])


def cost(problem: Problem) -> Cost:
    """The products of the convolutions and of the classifier."""
    flops = head.cost(_head_problem(problem)).flops
    specs, parts = _tensors(problem), _attributes(problem).parts(problem.inputs)
    for spec, part in zip(specs[1:], parts, strict=False):
        _, c, r, s = part[0].shape
        flops += 2 * 4 * spec.numel * c * r * s
    read, written = tensor_bytes(problem)
    return Cost(flops, read, written)


def _pack(conv: Conv2d, _: SmallNet, w: torch.Tensor) -> torch.Tensor:
    return conv2d.pack(conv, w)


def packs(attributes: SmallNet) -> Mapping[int, Callable[[Any, torch.Tensor], torch.Tensor]]:
    """Filters as conv2d packs them, the head's weights as they are."""
    slots = range(1 + sum(1 + ep.operand_count(each.stages) for each in attributes.layers))
    last = range(slots.stop, slots.stop + attributes.head.inputs - 1)
    parts = attributes.parts((*slots, *last))
    found: dict[int, Callable[[Any, torch.Tensor], torch.Tensor]] = {}
    for each, part in zip(attributes.layers, parts, strict=False):
        found[part[0]] = partial(_pack, each.conv)
    for part in attributes.head.parts((0, *parts[-1])):
        found[part[0]] = lambda _, w: w.contiguous()
    return found


BIASED = (ep.Stage("add"), ep.Stage("relu"))


def _build(draw: Mapping[str, Any]) -> tuple[SmallNet, tuple[TensorSpec, ...]] | None:
    n, (h, width), c = draw["N"], draw["image"], draw["C"]
    specs = [TensorSpec((n, c, h, width), torch.float32, Layout.NHWC)]
    layers, t = [], specs[0]
    for k in draw["filters"]:
        pool: MaxPool2d | AvgPool2d = MaxPool2d((2, 2), (2, 2), ceil_mode=draw["ceil"])
        if draw["average"]:
            pool = AvgPool2d((2, 2), (2, 2))
        stages = BIASED if draw["stages"] else ()
        each = ConvPool(Conv2d(padding=draw["padding"]), (), stages, pool)
        w = TensorSpec((k, t.shape[1], *draw["filter"]), torch.float32)
        part = [w, TensorSpec((k, 1, 1), torch.float32)] if stages else [w]
        try:
            (t,) = conv_pool.infer(each, (t, *part))
        except InvalidInputError:
            return None
        layers.append(each)
        specs += part
    inner = math.prod(t.shape[1:])
    links: list[ep.Epilogue] = []
    for out in draw["widths"]:
        specs.append(TensorSpec((out, inner), torch.float32))
        specs += [TensorSpec((out,), torch.float32)] if draw["stages"] else []
        links.append(BIASED if draw["stages"] else ())
        inner = out
    if links[-1]:
        links[-1] = BIASED[:1]
    return SmallNet(tuple(layers), Head(tuple(links), softmax=draw["softmax"])), tuple(specs)


LENET = {
    "N": 3, "image": (32, 32), "C": 1, "filters": (6, 16), "filter": (5, 5),
    "padding": (0, 0, 0, 0), "ceil": False, "average": False, "widths": (120, 84, 10),
    "softmax": "", "stages": True,
}  # fmt: skip
OP = Op(
    name="small_net",
    attributes=SmallNet,
    infer=infer,
    reference=reference,
    launches=launches,
    configs=configs,
    default=default,
    legal=legal,
    cost=cost,
    domain=Domain(
        ranges={
            "N": (1, 2, 3),
            "image": ((8, 8), (9, 7), (12, 10)),
            "C": (1, 3, 8, 32),
            "filters": ((6,), (8, 16), (5, 33), (4, 8, 8)),
            "filter": ((3, 3), (1, 1), (3, 2)),
            "padding": ((1, 1, 1, 1), (0, 0, 0, 0), (0, 1, 1, 2)),
            "ceil": (False, True),
            "average": (False, False, True),
            "widths": ((10,), (24, 10), (20, 16, 10)),
            "softmax": ("", "", "softmax"),
            "stages": (True, False),
        },
        build=_build,
        interesting=(LENET, {**LENET, "average": True, "softmax": "log_softmax"}),
        # Small logits, as for `head`.
        range=(-0.5, 0.5),
    ),
    packs=packs,
    images=True,
)
