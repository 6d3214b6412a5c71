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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from ....errors import InvalidInputError
from ...contract import cost_model
from ...contract import epilogue as ep
from ...contract.op import Attributes, Config, Cost, Launch, Op, Problem, Ref, tensor_bytes
from ...contract.spec import TensorSpec
from ...contract.targets import Target
from ...convolution import depthwise
from ...tile import choice, conv_geometry, taps
from ...tile.conv_geometry import Conv2d
from ...tile.torch_convolution import convolve
from . import separable_kernels, separable_tiles
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
    def slots(self) -> dict[str, int]:
        """Where each weight and each group of operands starts among the inputs."""
        slots = {"x": 0, "w1": 1, "depthwise": 2}
        slots["w2"] = 2 + ep.operand_count(self.after_depthwise)
        slots["project"] = slots["w2"] + 1
        end = slots["project"] + ep.operand_count(self.after_project)
        if self.has_expand:
            slots |= {"w3": end, "expand": end + 1}
            end += 1 + ep.operand_count(self.after_expand)
        return slots | {"end": end}

    @property
    def parts(self) -> tuple[str, ...]:
        """The products, in order, that pointwise stages may follow."""
        return ("depthwise", "project", "expand")[: 3 if self.has_expand else 2]

    def operands(self, part: str, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inputs that the stages after one part read."""
        start = self.slots[part]
        return inputs[start : start + ep.operand_count(getattr(self, f"after_{part}"))]


def results(attributes: Separable, inputs: tuple[TensorSpec, ...]) -> dict[str, TensorSpec]:
    """The specs of t, y and z by the part that makes them."""
    slots, x, w1 = attributes.slots, inputs[0], inputs[1]
    if x.rank != 4 or w1.rank != 4 or w1.shape[0] != x.shape[1] or w1.shape[1] != 1:
        raise InvalidInputError(
            f"separable: expected x (N,C,H,W) and one filter per channel (C,1,R,S), got {x}, {w1}"
        )
    made = {"depthwise": conv_geometry.infer(attributes.depthwise, (x, w1))[0]}
    for before, part, weight in (("depthwise", "project", "w2"), ("project", "expand", "w3")):
        if part in attributes.parts:
            made[part] = conv_geometry.infer(Conv2d(), (made[before], inputs[slots[weight]]))[0]
    return made


def infer(attributes: Separable, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """y where it is kept, and z where there is an expansion."""
    slots = attributes.slots
    if len(inputs) != slots["end"]:
        raise InvalidInputError(f"separable: expected {slots['end']} inputs, got {len(inputs)}")
    if not (attributes.keep or attributes.has_expand):
        raise InvalidInputError("separable: without an expansion, expected keep=True")
    made = results(attributes, inputs)
    for part, result in made.items():
        for operand in attributes.operands(part, inputs):
            if not ep.broadcasts(operand, result):
                raise InvalidInputError(
                    f"separable: {operand}, read after {part}, does not broadcast to {result}"
                )
    for weight in ("w2", "w3")[: len(made) - 1]:
        if inputs[slots[weight]].shape[2:] != (1, 1):
            raise InvalidInputError(
                f"separable: expected a 1x1 filter as {weight}, got {inputs[slots[weight]]}"
            )
    kept = made["project"] if attributes.keep else None
    return tuple(spec for spec in (kept, made.get("expand")) if spec is not None)


def reference(
    attributes: Separable, *tensors: torch.Tensor
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    slots = attributes.slots
    value = conv_geometry.reference(attributes.depthwise, tensors[0], tensors[1])
    value = ep.apply_reference(
        attributes.after_depthwise, value, attributes.operands("depthwise", tensors)
    )
    made = []
    for part, weight in (("project", "w2"), ("expand", "w3"))[: len(attributes.parts) - 1]:
        stages = getattr(attributes, f"after_{part}")
        value = convolve(value, tensors[slots[weight]])
        value = ep.apply_reference(stages, value, attributes.operands(part, tensors))
        made.append(value)
    return tuple(made if attributes.keep else made[1:])


def _specs(problem: Problem) -> tuple[Separable, dict[str, TensorSpec]]:
    """The attributes, and the specs of t, y and z."""
    attributes = problem.attributes
    assert isinstance(attributes, Separable)
    return attributes, results(attributes, tuple(operand.spec for operand in problem.inputs))


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch; a program owns TILE_ROWS rows of BLOCK_M pixel columns."""
    attributes, made = _specs(problem)
    slots, x, y = attributes.slots, problem.inputs[0], made["project"]
    w1 = problem.inputs[1].spec
    refs: list[Ref] = []
    functions: dict[str, Any] = {"EXPAND": None}
    for part, spec in made.items():
        operands = attributes.operands(part, problem.inputs)
        reads = tuple(ep.access(operand, spec) for operand in operands)
        stages = getattr(attributes, f"after_{part}")
        sizes = ep.memory_sizes(spec)
        functions[part.upper()] = ep.generate(stages, reads, sizes, len(refs), part)
        refs += [Ref("input", slots[part] + index) for index in range(len(operands))]
    kept = problem.outputs[0]
    constexprs = {
        "GEOMETRY": taps.geometry(attributes.depthwise, x, w1, made["depthwise"]),
        "K": y.shape[1],
        "Y_PITCH": kept.pitch, "Y_OFFSET": kept.offset,
        "DEPTHWISE": functions["DEPTHWISE"], "PROJECT": functions["PROJECT"],
        "PRECISION": choice.dot_precision(problem, 16),
        "WIDE": problem.is_wide,
        **{name: size for name, size in tile.blocks if name != "SPAN"},
    }  # fmt: skip
    pointers = {
        "x": Ref("input", 0),
        "w1": Ref("input", 1),
        "w2": Ref("input", slots["w2"]),
        "y": Ref("output", 0),
    }
    if tile["SPAN"]:
        kernel: Any = separable_kernels.resident_kernel
        constexprs["SPAN"] = tile["SPAN"]
    else:
        kernel = separable_kernels.accumulate_kernel
        last = problem.outputs[-1]
        # Absent parts are compiled out; their pointers are never read.
        pointers |= {
            "w3": Ref("input", slots.get("w3", slots["w2"])),
            "z": Ref("output", len(problem.outputs) - 1),
        }
        constexprs |= {
            "EXPAND": functions["EXPAND"], "KEEP": attributes.keep,
            "LAST": last.shape[1], "BLOCK_LAST": separable_tiles.BLOCK_LAST,
            "Z_PITCH": last.pitch, "Z_OFFSET": last.offset,
        }  # fmt: skip
    n, k, p, q = y.shape
    block = _block(problem)
    launch = Launch(
        kernel=kernel,
        pointers=pointers,
        extras=tuple(refs),
        rows=n * -(-p // tile["TILE_ROWS"]) * q,
        batch=y.batch,
        block_rows=tile["BLOCK_M"],
        columns=-(-k // (tile["SPAN"] or tile["BLOCK_N"])),
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        l2_bytes=separable_tiles.l2_bytes(block, tile),
        instructions=separable_tiles.instructions(block, tile),
        shared_traffic=separable_tiles.shared_traffic(block, tile),
        shared_held=separable_tiles.shared_bytes(block, tile),
        registers=separable_tiles.registers(block, tile),
    )
    return (launch,)


def _block(problem: Problem) -> Block:
    """The problem's sizes, as its tiles depend on them."""
    attributes, made = _specs(problem)
    y, widths, counts = made["project"], [0, 0, 0], [0, 0, 0]
    for at, (part, spec) in enumerate(made.items()):
        operands = attributes.operands(part, problem.inputs)
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


@lru_cache(maxsize=4096)
def default(problem: Problem, target: Target) -> Config:
    """The legal configuration with the least modelled time; among equals the first with at most
    32 accumulators per thread, which leaves registers for a second program."""
    block = _block(problem)
    if target.name == "interpreter":
        return separable_tiles.interpreter_tile(block)
    tiles = tuple(configs(problem, target))
    if not tiles:  # `legal` tells why.
        return next(separable_tiles.accumulating(block))

    def rank(tile: Config) -> tuple[float, int]:
        area = tile["TILE_ROWS"] * tile["BLOCK_M"] * tile["BLOCK_N"]
        return time_us(problem, tile, target), max(area // (32 * tile.num_warps), 32)

    return min(tiles, key=rank)


def time_us(problem: Problem, tile: Config, target: Target) -> float:
    """Modelled time of a configuration, memory and launch aside: they are the same for all."""
    (launch,) = launches(problem, tile, target)
    flops, dtype = cost(problem).flops, problem.inputs[0].spec.dtype
    gpu, ends = cost_model.machine_for(target), cost_model.end_bytes(problem)
    return cost_model.launch_us(gpu, launch, flops, dtype, ends)


def cost(problem: Problem) -> Cost:
    """The products of all parts; t is neither written nor read, y is not read."""
    attributes, made = _specs(problem)
    r, s = problem.inputs[1].shape[2:]
    n, k, p, q = made["project"].shape
    c = problem.inputs[0].shape[1]
    products = c * (r * s + k)
    if attributes.has_expand:
        products += k * made["expand"].shape[1]
    read, written = tensor_bytes(problem)
    return Cost(2 * n * p * q * products, read, written)


def packs(attributes: Separable) -> Mapping[int, Callable[[Any, torch.Tensor], torch.Tensor]]:
    """The depthwise filter as the depthwise kernel has it, the 1x1 weights K-major."""
    slots = attributes.slots
    pointwise = {slots[name]: _pack_pointwise for name in ("w2", "w3") if name in slots}
    return {slots["w1"]: _pack_depthwise} | pointwise


def _pack_depthwise(attributes: Separable, w: torch.Tensor) -> torch.Tensor:
    return depthwise.pack(w)


def _pack_pointwise(attributes: Separable, w: torch.Tensor) -> torch.Tensor:
    return w.reshape(w.shape[0], -1).contiguous()


OP = Op(
    name="separable",
    attributes=Separable,
    infer=infer,
    reference=reference,
    launches=launches,
    configs=configs,
    default=default,
    legal=legal,
    cost=cost,
    packs=packs,
    takes_epilogue=False,
)
