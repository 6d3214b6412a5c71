"""separable: depthwise convolution -> 1x1 convolution (-> the next 1x1 convolution) in one kernel.

    t = D(depthwise(x, w1))       never in memory
    y = E(t · w2ᵀ)                stored if somebody reads it; E may add the residual
    z = G(y · w3ᵀ)                optional; stored

x: (N, C, H, W) NHWC; w1: (C, 1, R, S); w2: (K, C, 1, 1); w3: (L, K, 1, 1); y: (N, K, P, Q);
z: (N, L, P, Q). fp32 accumulation; t and y are rounded to the dtype of the tensors, as they would
be between separate kernels.

y alone is the depthwise separable convolution of MobileNet (Howard et al., 2017). With z it is the
inverted residual of MobileNet v2 (Sandler et al., 2018), cut after the *next* block's expansion
instead of before it: depthwise, projection, residual, expansion. No pixel is computed twice, the
depthwise result is never stored, and the narrow y only where a residual needs it.

The kernels are in `separable_kernels.py`, their tile sizes and what they cost in
`separable_tiles.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from ....errors import InvalidInputError
from ...contract import epilogue as ep
from ...contract.op import Attributes, Config, Launch, Op, Problem, Ref, Target, X, Y, counted
from ...contract.spec import TensorSpec
from ...tile import choice, engine
from ...tile.conv_geometry import Conv2d
from ...tile.finish import Finish
from ...tile.geometry import Image, Output, Window, tile_launch
from ...tile.source import Source
from ...tile.space import of_bands
from .. import links
from ..links import Link
from . import separable_kernels as parts
from . import separable_tiles
from .separable_tiles import Block


@dataclass(frozen=True)
class Separable(Attributes):
    """The depthwise geometry and the pointwise stages after each part.

    keep: whether y is an output; always where there is no expansion. Inputs: x, w1, operands of
    `after_depthwise`, w2, operands of `after_project`, [w3, operands of `after_expand`]. Outputs:
    y if kept, then z if expanded.
    """

    depthwise: Conv2d = field(default_factory=Conv2d)
    after_depthwise: ep.Epilogue = ()
    after_project: ep.Epilogue = ()
    has_expand: bool = False
    after_expand: ep.Epilogue = ()
    keep: bool = True

    @property
    def links(self) -> tuple[Link, ...]:
        """The products, in order."""
        chain = (
            Link("depthwise", ("w1",), self.after_depthwise, self.depthwise),
            Link("project", ("w2",), self.after_project),
        )
        return (*chain, Link("expand", ("w3",), self.after_expand)) if self.has_expand else chain

    @property
    def stored(self) -> tuple[str, ...]:
        """The links whose results are outputs."""
        return ("project",) * self.keep + ("expand",) * self.has_expand


def infer(attributes: Separable, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """y where it is kept, and z where there is an expansion."""
    links.check_count("separable", attributes.links, inputs)
    if not attributes.stored:
        raise InvalidInputError("separable: without an expansion, expected keep=True")
    x, w1 = inputs[:2]
    if x.rank != 4 or w1.rank != 4 or w1.shape[0] != x.shape[1] or w1.shape[1] != 1:
        raise InvalidInputError(
            f"separable: expected x (N,C,H,W) and one filter per channel (C,1,R,S), got {x}, {w1}"
        )
    results = links.check("separable", attributes.links, inputs)
    return tuple(results[name] for name in attributes.stored)


def reference(attributes: Separable, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    results = links.reference(attributes.links, inputs)
    return tuple(results[name] for name in attributes.stored)


def _specs(problem: Problem) -> tuple[Separable, dict[str, TensorSpec]]:
    """The attributes, and the specs of t, y and z by the link that makes them."""
    attributes = problem.attributes.expect(Separable)
    inputs = tuple(operand.spec for operand in problem.inputs)
    return attributes, links.check("separable", attributes.links, inputs)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch; a program owns TILE_ROWS rows of BLOCK_M pixel columns."""
    attributes, results = _specs(problem)
    chain, x, w1 = attributes.links, problem.inputs[0], problem.inputs[1].shape
    own = {name: Ref("input", at) for name, at in links.slots(chain).tensors.items()}
    # In front of what the stages read; what is absent is compiled out.
    front = (own["w1"], own.get("w3", own["w2"]), Ref("output", len(problem.outputs) - 1))
    bound = links.bind(chain, problem.inputs, results, front)
    stages, z = bound.functions, problem.outputs[-1] if attributes.has_expand else None
    channels = results["project"].shape[1]
    source = Source(
        Image.of(x), Window.of(w1[2:], attributes.depthwise), parts.corner, parts.filtered, 1,
        x.shape[1], detail=parts.Depthwise(stages["depthwise"], 0),
    )  # fmt: skip
    expansion = parts.Expansion(
        attributes.keep, Output.of(z, stages["expand"]) if z else None, 1, 2,
        separable_tiles.BLOCK_LAST,
    )  # fmt: skip
    space = of_bands(results["project"], tile["BLOCK_M"], tile["TILE_ROWS"])
    block = _block(problem)
    shared: dict[str, Any] = {
        "output": Output.of(problem.outputs[0], stages["project"])._replace(K=channels),
        "extras": bound.extras,
        "precision": choice.dot_precision(problem, 16),
        "rows": x.shape[0] * space.down * space.across,
        "l2_bytes": separable_tiles.l2_bytes(block, tile),
        "instructions": separable_tiles.instructions(block, tile),
        "shared_traffic": separable_tiles.shared_traffic(block, tile),
        "shared_held": separable_tiles.shared_bytes(block, tile),
        "registers": separable_tiles.registers(block, tile),
    }
    if not tile["SPAN"]:
        finish = Finish(parts.expand, detail=expansion)
        pointers = {"w": own["w2"]}
        launch = engine.launch(
            problem, tile, target, space, source, finish=finish, pointers=pointers, **shared
        )
        return (launch,)
    launch = tile_launch(
        problem, tile, parts.resident_kernel,
        constexprs={"SPACE": space, "SOURCE": source, "SPAN": tile["SPAN"], "PDL": False},
        pointers={"x": X, "w": own["w2"], "y": Y},
        block_rows=space.per_tile,
        **shared,
    )  # fmt: skip
    return (replace(launch, columns=-(-channels // tile["SPAN"])),)


def _block(problem: Problem) -> Block:
    """The problem's sizes, as its tiles depend on them."""
    attributes, results = _specs(problem)
    y, where = results["project"], links.slots(attributes.links)
    widths, counts = [0, 0, 0], [0, 0, 0]
    for at, (name, spec) in enumerate(results.items()):
        operands = problem.inputs[where.operands[name]]
        widths[at] = spec.shape[1]
        counts[at] = sum(operand.shape == spec.shape for operand in operands)
    r, s = problem.inputs[1].shape[2:]
    return Block(
        attributes.depthwise,
        (r, s),
        (widths[0], widths[1], widths[2]),
        (counts[0], counts[1], counts[2]),
        y.numel // y.shape[1],
        problem.inputs[0].spec.dtype,
    )


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """Both algorithms over bands of 32 to 128 pixels."""
    block = _block(problem)
    for tile in (*separable_tiles.accumulating(block), *separable_tiles.resident(block)):
        if separable_tiles.legal(block, tile, target) is None:
            yield tile


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    return separable_tiles.legal(_block(problem), tile, target)


def crowded(problem: Problem, tile: Config, target: Target) -> str | None:
    return separable_tiles.crowded(_block(problem), tile, target)


@lru_cache(maxsize=4096)
def default(problem: Problem, target: Target) -> Config:
    """The legal configuration with the least modelled time; among equals the first with at most
    32 accumulators per thread, which leaves registers for a second program."""
    block = _block(problem)
    if target.name == "interpreter":
        return separable_tiles.interpreter_tile(block)

    def launch_of(tile: Config) -> Launch:
        (launch,) = launches(problem, tile, target)
        return launch

    def accumulators(tile: Config) -> int:
        area = tile["TILE_ROWS"] * tile["BLOCK_M"] * tile["BLOCK_N"]
        return max(area // (32 * tile.num_warps), 32)

    return choice.choose(
        configs(problem, target), launch_of, choice.Work.of(problem, cost(problem).flops), target,
        waste=accumulators,
        crowded=lambda tile: separable_tiles.crowded(block, tile, target),
        default=next(separable_tiles.accumulating(block)),  # `legal` tells why none can run.
    )  # fmt: skip


@counted
def cost(problem: Problem) -> int:
    """The products of all parts; t is neither written nor read, y is not read."""
    attributes, results = _specs(problem)
    own, y = links.tensors(attributes.links, problem.inputs), results["project"]
    products = sum(own[name].spec.numel for name in links.weights(attributes.links))
    return 2 * y.numel // y.shape[1] * products


OP = Op(
    "separable", Separable, infer, reference, launches, cost, configs, default, legal, crowded,
    packs=lambda separable: links.packs(separable.links), takes_epilogue=False,
)  # fmt: skip
