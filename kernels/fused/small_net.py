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
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract import op
from ..contract.op import Attributes, Config, Launch, Op, Problem, Ref, Scratch, Target, X, Y
from ..contract.spec import Operand, TensorSpec
from ..pooling.pool_window import MaxPool2d
from ..tile import choice, finish, source, space
from ..tile.engine import compute_tile
from ..tile.finish import Finish
from ..tile.geometry import Image, Output, Tile
from ..tile.source import Source
from ..tile.space import Space
from . import conv_pool, conv_tile, head, links
from .conv_pool import ConvPool
from .head import Head
from .links import Link

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

    @property
    def links(self) -> tuple[Link, ...]:
        """Each convolution with the stages in front of its pooling, those behind it, and the links
        of the head."""
        chain: list[Link] = []
        for number, layer in enumerate(self.layers, 1):
            stay, move = conv_pool.split_stages(layer)
            chain.append(Link(f"layer{number}", (f"v{number}",), stay, layer.conv))
            chain.append(Link(f"pooled{number}", (), move))
        return (*chain, *self.head.chain)

    def parts(self, values: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
        """The inputs of each layer but its x, and last those of the head."""
        where = links.slots(self.links).tensors
        starts = [where[link.tensors[0]] for link in self.links if link.conv is not None]
        starts.append(1 + len(values) - links.slots(self.head.chain).count)
        return (*(values[start:stop] for start, stop in pairwise(starts)), values[starts[-1] :])


def unsupported(attributes: SmallNet, inputs: tuple[TensorSpec, ...]) -> str | None:
    """Why the kernel does not take a network, or None."""
    if not 1 <= len(attributes.layers) <= MOST_LAYERS:
        return f"{len(attributes.layers)} convolutions, not 1 to {MOST_LAYERS}"
    if any(layer.before for layer in attributes.layers):
        return "a convolution has stages before it; the kernel applies none"
    if attributes.head.average:
        return "the classifier averages pixels; the kernel takes them flattened"
    for part in attributes.parts(inputs)[:-1]:
        if part[0].shape[0] > MOST_CHANNELS:
            return f"{part[0].shape[0]} channels do not fit one tile (at most {MOST_CHANNELS})"
    own = links.tensors(attributes.links, inputs)
    size = sum(own[name].size_bytes for name in links.weights(attributes.links))
    if size > MOST_WEIGHTS:
        return f"{size} bytes of weights do not fit a multiprocessor (at most {MOST_WEIGHTS})"
    return None


def tensors(attributes: SmallNet, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The specs of t_0, t_1, ..., t_last."""
    specs = [inputs[0]]
    for layer, part in zip(attributes.layers, attributes.parts(inputs), strict=False):
        specs += conv_pool.infer(layer, (specs[-1], *part))
    return tuple(specs)


def _rows(spec: TensorSpec) -> TensorSpec:
    """Images as rows of all their numbers."""
    n, *rest = spec.shape
    return TensorSpec((n, math.prod(rest)), spec.dtype, batch=spec.batch)


def infer(attributes: SmallNet, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    links.check_count("small_net", attributes.links, inputs)
    if (reason := unsupported(attributes, inputs)) is not None:
        raise InvalidInputError(f"small_net: {reason}")
    last = tensors(attributes, inputs)[-1]
    return head.infer(attributes.head, (_rows(last), *attributes.parts(inputs)[-1]))


def reference(attributes: SmallNet, *values: torch.Tensor) -> torch.Tensor:
    t, (*layers, last) = values[0], attributes.parts(values)
    for layer, part in zip(attributes.layers, layers, strict=True):
        t = conv_pool.reference(layer, t, *part)
    return head.reference(attributes.head, t.permute(0, 2, 3, 1).flatten(1), *last)


class Layer(NamedTuple):
    """A convolution and its pooling, as the tile engine takes them; a tile has all channels."""

    space: Space
    source: Source
    finish: Finish
    output: Output
    tile: Tile


@triton.jit
def layer(x, w, y, image, extras, LAYER: tl.constexpr):
    """One convolution and its pooling for one image, to the end."""
    columns = tl.arange(0, LAYER.tile.N)
    units: tl.constexpr = LAYER.space.down * LAYER.space.across
    first = image * units
    for start in range(0, units, LAYER.space.per_tile):
        compute_tile(
            x, w, x, w, y, y, y, 0, 0, first + start, first + units, columns,
            columns < LAYER.output.K, extras, LAYER.space, LAYER.source, None, LAYER.finish,
            LAYER.output, LAYER.tile, 1, False,
        )  # fmt: skip
    # The next layer reads what other threads of this program wrote.
    tl.debug_barrier()


@triton.jit
def small_net_kernel(
    x, v1, v2, v3, y, between, extras, m, LAYER1: tl.constexpr, LAYER2: tl.constexpr,
    LAYER3: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    if WIDE:
        image = image.to(tl.int64)
    layer(x, v1, between, image, extras, LAYER1)
    if LAYER2 is not None:
        layer(between, v2, between, image, extras, LAYER2)
    if LAYER3 is not None:
        layer(between, v3, between, image, extras, LAYER3)
    # A matrix product takes 16 rows at least; this image is the first of them.
    index = tl.arange(0, HEAD.tile.M)
    head.classify(between, y, extras, image + index, index < 1, m, HEAD)


def _tensors(problem: Problem) -> tuple[TensorSpec, ...]:
    inputs = tuple(operand.spec for operand in problem.inputs)
    return tensors(problem.attributes.expect(SmallNet), inputs)


def _head_problem(problem: Problem) -> Problem:
    """The classifier alone, as its own kernel would see it."""
    attributes = problem.attributes.expect(SmallNet)
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
    """One launch, one program per image; made here for the reason that `head` gives."""
    attributes, y, specs = problem.attributes.expect(SmallNet), problem.output, _tensors(problem)
    inputs = tuple(operand.spec for operand in problem.inputs)
    parts, x, written = attributes.parts(problem.inputs), problem.inputs[0], 0
    chain = head.results(attributes.head, (_rows(specs[-1]), *attributes.parts(inputs)[-1]))
    for number, (layer, part) in enumerate(zip(attributes.layers, parts, strict=False), 1):
        read = (specs[number - 1], *(operand.spec for operand in part))
        chain[f"layer{number}"] = conv_tile.result_of("small_net", layer, read)
        chain[f"pooled{number}"] = specs[number]
    exchanged = sum(spec.numel for spec in specs[1:-1])
    inner = math.prod(specs[-1].shape[1:])
    image = Image(1, 1, inner, inner, exchanged)
    classifier, bound = head.bind(problem, attributes.head, attributes.links, chain, image, tile)
    weights: dict[str, Ref] = {}
    constants: dict[str, Any] = {}
    for number in range(1, MOST_LAYERS + 1):
        # Absent layers are compiled out; their pointers are never read.
        weights[f"v{number}"], constants[f"LAYER{number}"] = Ref("input", 1), None
    wide = problem.is_wide or sum(spec.numel for spec in specs[1:]) >= 2**31
    pixels, depth = tile["BLOCK_PIXELS"], tile["BLOCK_DEPTH"]
    precision = choice.dot_precision(problem, 16)
    for number, (each, part) in enumerate(zip(attributes.layers, parts, strict=False), 1):
        result, pooled = chain[f"layer{number}"], specs[number]
        weights[f"v{number}"] = bound.tensors[f"v{number}"]
        stages, after = bound.functions[f"layer{number}"], bound.functions[f"pooled{number}"]
        written_to = Operand(pooled, pooled.shape[1], written)
        constants[f"LAYER{number}"] = Layer(
            space.of_windows(result, pixels, pooled),
            source.of_convolution(each.conv, x, part[0].shape),
            Finish(finish.pool_windows, stages, isinstance(each.pool, MaxPool2d)),
            Output.of(written_to, after),
            Tile(pixels, max(16, op.power_of_two(pooled.shape[1])), depth, 1, precision, wide),
        )
        x = written_to
        written += pooled.numel
    launch = Launch(
        kernel=small_net_kernel,
        pointers={"x": X, **weights, "y": Y, "between": Ref("scratch", 0)},
        extras=bound.extras,
        rows=y.shape[0],
        batch=y.spec.batch,
        block_rows=1,
        columns=1,
        constexprs={"HEAD": classifier, "WIDE": wide, **constants},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        l2_bytes=_l2_bytes(problem),
        steps=_steps(problem, tile),
        scratch=(Scratch(problem.inputs[0].spec.dtype, written),),
    )  # fmt: skip
    return (launch,)


def _l2_bytes(problem: Problem) -> int:
    """A program reads its image, all weights, and what its layers exchange twice: it is written to
    be read, R*S times but out of the L1 cache."""
    image, *others = (math.prod(spec.shape[1:]) for spec in _tensors(problem))
    weights = sum(operand.spec.numel for operand in problem.inputs[1:])
    return (image + 2 * sum(others) + weights) * problem.inputs[0].spec.dtype.itemsize


def _depth(part: tuple[Operand, ...], block: int) -> int:
    """Steps of a convolution's sums."""
    _, c, r, s = part[0].shape
    return r * s * -(-c // block) if source.runs_by_tap(c, r * s) else -(-c * r * s // block)


def _steps(problem: Problem, tile: Config) -> int:
    """Tiles of each layer times the blocks of its sums, and those of the classifier."""
    specs, parts = _tensors(problem), problem.attributes.expect(SmallNet).parts(problem.inputs)
    count = 0
    for spec, part in zip(specs[1:], parts, strict=False):
        tiles = -(-4 * math.prod(spec.shape[2:]) // tile["BLOCK_PIXELS"])
        count += tiles * _depth(part, tile["BLOCK_DEPTH"])
    linked = len(problem.attributes.expect(SmallNet).head.links)
    return count + -(-math.prod(specs[-1].shape[1:]) // tile["BLOCK_K"]) + linked - 1


def _tile(problem: Problem, pixels: int, depth: int, warps: int, stages: int) -> Config:
    inner = max(16, op.power_of_two(math.prod(_tensors(problem)[-1].shape[1:])))
    return op.config(
        warps, stages, BLOCK_PIXELS=pixels, BLOCK_DEPTH=depth, BLOCK_M=16, BLOCK_K=min(inner, 64)
    )


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    for warps in (4, 8):
        for pixels in (32, 64, 128, 256):
            for depth in (16, 32):
                for stages in (1, 2, 3):
                    tile = _tile(problem, pixels, depth, warps, stages)
                    if legal(problem, tile, target) is None:
                        yield tile


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    return head.legal(_head_problem(problem), tile, target)


def crowded(problem: Problem, tile: Config, target: Target) -> str | None:
    """What the head's registers are too few for, and accumulators for the widest layer."""
    if target.name == "interpreter":
        return None
    if (reason := head.crowded(_head_problem(problem), tile, target)) is not None:
        return reason
    parts = problem.attributes.expect(SmallNet).parts(problem.inputs)[:-1]
    widest = max(max(16, op.power_of_two(p[0].shape[0])) for p in parts)
    # Gathered operands take registers for addresses and masks.
    elements = tile["BLOCK_PIXELS"] * max(widest, tile["BLOCK_DEPTH"]) // (32 * tile.num_warps)
    if elements > 64:
        return f"{elements} elements of a tile per thread; more than 64 spill"
    return None


def default(problem: Problem, target: Target) -> Config:
    """128 pixels at a time; more warps where the classifier is wide."""
    if target.name == "interpreter":
        pixels = 4 * max(math.prod(spec.shape[2:]) for spec in _tensors(problem)[1:])
        return _tile(problem, max(16, min(1024, op.power_of_two(pixels))), 512, 1, 1)
    tiles = [
        _tile(problem, pixels, 32, warps, 2)
        for warps in (4, 8)
        for pixels in (128, 64, 32)
    ]  # fmt: skip
    fitting = [tile for tile in tiles if legal(problem, tile, target) is None]
    roomy = (tile for tile in fitting if crowded(problem, tile, target) is None)
    return next(roomy, fitting[0] if fitting else tiles[0])


@op.counted
def cost(problem: Problem) -> int:
    """The products of the convolutions and of the classifier."""
    flops = head.cost(_head_problem(problem)).flops
    specs, parts = _tensors(problem), problem.attributes.expect(SmallNet).parts(problem.inputs)
    for spec, part in zip(specs[1:], parts, strict=False):
        _, c, r, s = part[0].shape
        flops += 2 * 4 * spec.numel * c * r * s
    return flops


OP = Op(
    "small_net", SmallNet, infer, reference, launches, cost, configs, default, legal, crowded,
    # Small logits, as for `head`.
    input_range=(-0.5, 0.5), packs=lambda net: links.packs(net.links), images=True,
)  # fmt: skip
