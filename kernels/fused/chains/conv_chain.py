"""conv_chain: convolution -> 1x1 expansion -> 1x1 reduction in one kernel, without halo recompute.

    t = F(conv2d(x, w1))          all channels of t in one tile, kept in registers
    y = E(t · w2ᵀ + s · wsᵀ)      stored; E usually adds the residual and applies the activation
    z = G(y · w3ᵀ)                stored; the next block's 1x1 reduction, summed while y passes by

x: (N, C, H, W) NHWC; w1: (M, C, R, S); w2: (E, M, 1, 1); s: (N, D, H2, W2) read at a stride;
ws: (E, D, 1, 1); w3: (O, E, 1, 1); y: (N, E, P, Q); z: (N, O, P, Q). fp32 accumulation; t and y are
rounded to the dtype of the tensors, as they would be between separate kernels. The first
convolution and the last are optional, and so is s, the input of the 1x1 shortcut with which a stage
begins: a second product into the accumulator of y.

This is the "rotated bottleneck" of ResNet (He et al., 2016): cutting the net after the reduction
instead of before it puts the 3x3 first, so no pixel is computed twice, and the wide tensor y is
written once and never read back by the reduction. Back-to-back products whose intermediate stays in
registers: CUTLASS example 13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from ....errors import InvalidInputError
from ...contract import cost_model
from ...contract import epilogue as ep
from ...contract.op import Attributes, Config, Cost, Launch, Op, Problem, Ref, tensor_bytes
from ...contract.spec import Layout, Operand, TensorSpec
from ...contract.targets import Target
from ...tile import choice, conv_geometry, taps
from ...tile.conv_geometry import Conv2d
from ...tile.torch_convolution import convolve
from . import conv_chain_tiles as tiles
from .conv_chain_kernel import conv_chain_kernel


@dataclass(frozen=True)
class ConvChain(Attributes):
    """The links of the chain and the pointwise stages after each of them.

    front: None where x already is t; shortcut: the 1x1 convolution beside the expansion. Inputs:
    x, [w1, operands of `after_front`], w2, [s, ws], operands of `after_expand`, [w3, operands of
    `after_reduce`].
    """

    front: Conv2d | None = None
    after_front: ep.Epilogue = ()
    after_expand: ep.Epilogue = ()
    has_reduce: bool = False
    after_reduce: ep.Epilogue = ()
    shortcut: Conv2d | None = None

    @property
    def slots(self) -> dict[str, int]:
        """Where each weight and each group of operands starts among the inputs."""
        at, slots = 1, {"x": 0}
        if self.front is not None:
            slots |= {"w1": at, "front": at + 1}
            at += 1 + ep.operand_count(self.after_front)
        slots["w2"] = at
        at += 1
        if self.shortcut is not None:
            slots |= {"s": at, "ws": at + 1}
            at += 2
        slots["expand"] = at
        at += ep.operand_count(self.after_expand)
        if self.has_reduce:
            slots |= {"w3": at, "reduce": at + 1}
            at += 1 + ep.operand_count(self.after_reduce)
        return slots | {"end": at}


def _part(attributes: ConvChain, name: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs that the stages of one link read."""
    stages = getattr(attributes, f"after_{name}")
    if name not in attributes.slots:
        return ()
    start = attributes.slots[name]
    return values[start : start + ep.operand_count(stages)]


def middle(attributes: ConvChain, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
    """The spec of t."""
    if attributes.front is None:
        return inputs[0].with_(layout=Layout.NHWC)
    return conv_geometry.infer(attributes.front, (inputs[0], inputs[1]))[0]


def infer(attributes: ConvChain, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """y, and z where there is a reduction."""
    slots = attributes.slots
    if len(inputs) != slots["end"]:
        raise InvalidInputError(f"conv_chain: expected {slots['end']} inputs, got {len(inputs)}")
    t = middle(attributes, inputs)
    outputs = conv_geometry.infer(Conv2d(), (t, inputs[slots["w2"]]))
    if attributes.shortcut is not None:
        _check_shortcut(attributes.shortcut, inputs[slots["s"]], inputs[slots["ws"]], outputs)
    links = {"front": t, "expand": outputs[0]}
    if attributes.has_reduce:
        outputs += conv_geometry.infer(Conv2d(), (outputs[0], inputs[slots["w3"]]))
        links["reduce"] = outputs[1]
    for name, result in links.items():
        for operand in _part(attributes, name, inputs):
            if not ep.broadcasts(operand, result):
                raise InvalidInputError(
                    f"conv_chain: {operand}, read after {name}, does not broadcast to {result}"
                )
    return outputs


def _check_shortcut(
    shortcut: Conv2d, s: TensorSpec, ws: TensorSpec, outputs: tuple[TensorSpec, ...]
) -> None:
    if shortcut.groups != 1 or any(shortcut.padding) or ws.shape[2:] != (1, 1):
        raise InvalidInputError(
            f"conv_chain: expected a shortcut that is 1x1 without padding or groups, got "
            f"{shortcut} with weight {ws}"
        )
    if (made := conv_geometry.infer(shortcut, (s, ws))) != outputs:
        raise InvalidInputError(f"conv_chain: the shortcut gives {made[0]}, not {outputs[0]}")


def reference(
    attributes: ConvChain, *tensors: torch.Tensor
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    slots = attributes.slots
    t = tensors[0]
    if attributes.front is not None:
        t = conv_geometry.reference(attributes.front, t, tensors[slots["w1"]])
        t = ep.apply_reference(attributes.after_front, t, _part(attributes, "front", tensors))
    y = convolve(t, tensors[slots["w2"]])
    if attributes.shortcut is not None:
        s, ws = tensors[slots["s"]], tensors[slots["ws"]]
        y = y + conv_geometry.reference(attributes.shortcut, s, ws)
    y = ep.apply_reference(attributes.after_expand, y, _part(attributes, "expand", tensors))
    if not attributes.has_reduce:
        return y
    z = convolve(y, tensors[slots["w3"]])
    z = ep.apply_reference(attributes.after_reduce, z, _part(attributes, "reduce", tensors))
    return y, z


def _function(
    stages: ep.Epilogue, operands: tuple[Operand, ...], spec: TensorSpec, first: int, name: str
) -> ep.GeneratedFunction:
    reads = tuple(ep.access(operand, spec) for operand in operands)
    return ep.generate(stages, reads, ep.memory_sizes(spec), first, name)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch; every program owns BLOCK_M pixels and all their channels."""
    attributes = problem.attributes
    assert isinstance(attributes, ConvChain)
    slots, inputs = attributes.slots, problem.inputs
    t = middle(attributes, tuple(operand.spec for operand in inputs))
    x, y, z = inputs[0], problem.outputs[0], problem.outputs[-1]
    refs: list[Ref] = []
    functions: dict[str, ep.GeneratedFunction | None] = {}
    for name, spec in (("front", t), ("expand", y.spec), ("reduce", z.spec)):
        if name not in slots:
            functions[name] = None
            continue
        stages = getattr(attributes, f"after_{name}")
        operands = _part(attributes, name, inputs)
        functions[name] = _function(stages, operands, spec, len(refs), name)
        refs += [Ref("input", slots[name] + index) for index in range(len(operands))]
    last = attributes.has_reduce
    front, shortcut = _geometries(problem)
    sizes = _sizes(problem)
    launch = replace(
        outline(problem, tile),
        kernel=conv_chain_kernel,
        pointers={
            # Absent links are compiled out; their pointers are never read.
            **{
                name: Ref("input", slots.get(name, slots["w2"]))
                for name in ("x", "w1", "w2", "w3", "s", "ws")
            },
            "y": Ref("output", 0),
            "z": Ref("output", 1 if last else 0),
        },
        extras=tuple(refs),
        batch=y.spec.batch,
        constexprs={
            "GEOMETRY": front, "SHORTCUT": shortcut, "MIDDLE": t.shape[1],
            "WIDE_CHANNELS": y.shape[1], "NARROW": z.shape[1] if last else 1,
            "X_PITCH": x.pitch, "X_OFFSET": x.offset,
            "Y_PITCH": y.pitch, "Y_OFFSET": y.offset,
            "Z_PITCH": z.pitch, "Z_OFFSET": z.offset,
            "FRONT": functions["front"], "EXPAND": functions["expand"],
            "REDUCE": functions["reduce"],
            "PRECISION": choice.dot_precision(problem, 16),
            "WIDE": problem.is_wide,
            "BLOCK_MIDDLE": sizes.block_middle, "BLOCK_NARROW": sizes.block_narrow,
            "BLOCK_SHORTCUT": 16,
            **dict(tile.blocks),
        },
    )  # fmt: skip
    return (launch,)


def outline(problem: Problem, tile: Config) -> Launch:
    """What the cost model needs to know of the launch that a configuration would become."""
    wide = problem.outputs[0].shape[1]
    return tiles.outline(_sizes(problem), tile, wide, _l2_bytes(problem, tile))


def _l2_bytes(problem: Problem, tile: Config) -> int:
    """What one program reads: its pixels of every link, all weights, and the residual."""
    attributes, y = problem.attributes, problem.outputs[0]
    assert isinstance(attributes, ConvChain)
    slots, inputs, block_m = attributes.slots, problem.inputs, tile["BLOCK_M"]
    weights = sum(inputs[slots[n]].spec.numel for n in ("w1", "w2", "ws", "w3") if n in slots)
    _, c, r, s = inputs[slots.get("w1", slots["w2"])].shape
    channels = r * s * c
    if attributes.shortcut is not None:
        beside = inputs[slots["s"]].shape[1]
        steps = -(-y.shape[1] // tile["BLOCK_N"]) if beside > tile["BLOCK_SHORTCUT"] else 1
        channels += steps * beside
    residuals = _part(attributes, "expand", inputs)
    channels += sum(y.shape[1] for o in residuals if o.spec.numel == y.spec.numel)
    return (block_m * channels + weights) * inputs[0].spec.dtype.itemsize


def _geometries(problem: Problem) -> tuple[taps.Geometry | None, taps.Geometry | None]:
    """Of the first convolution and of the shortcut."""
    attributes, inputs, y = problem.attributes, problem.inputs, problem.outputs[0].spec
    assert isinstance(attributes, ConvChain)
    slots, found = attributes.slots, []
    for link, x, w in ((attributes.front, "x", "w1"), (attributes.shortcut, "s", "ws")):
        here = None
        if link is not None:
            here = taps.geometry(link, inputs[slots[x]], inputs[slots[w]].spec, y)
        found.append(here)
    return found[0], found[1]


def _sizes(problem: Problem) -> tiles.Sizes:
    attributes, inputs, y = problem.attributes, problem.inputs, problem.outputs[0]
    assert isinstance(attributes, ConvChain)
    slots, taps_of_front = attributes.slots, 0
    if attributes.front is not None:
        r, s = inputs[slots["w1"]].shape[2:]
        taps_of_front = r * s
    return tiles.Sizes(
        rows=y.spec.numel // y.shape[1],
        channels=inputs[0].shape[1],
        middle=inputs[slots["w2"]].shape[1],
        narrow=problem.outputs[1].shape[1] if attributes.has_reduce else 0,
        shortcut=inputs[slots["s"]].shape[1] if attributes.shortcut is not None else 0,
        taps=taps_of_front,
        dtype=inputs[0].spec.dtype,
    )


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    return tiles.configs(_sizes(problem), target)


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    return tiles.legal(_sizes(problem), tile, target)


@lru_cache(maxsize=4096)
def default(problem: Problem, target: Target) -> Config:
    """The fastest by the model; where none is legal any, of which `legal` tells why."""
    sizes = _sizes(problem)
    if target.name == "interpreter":
        return tiles.interpreter_tile(sizes)
    gpu, flops = cost_model.machine_for(target), cost(problem).flops
    dtype, ends = sizes.dtype, cost_model.end_bytes(problem)
    return min(
        tiles.configs(sizes, target),
        key=lambda tile: cost_model.launch_us(gpu, outline(problem, tile), flops, dtype, ends),
        default=tiles.any_tile(sizes),
    )


def cost(problem: Problem) -> Cost:
    """The products of all links; t is neither written nor read, y is not read."""
    attributes = problem.attributes
    assert isinstance(attributes, ConvChain)
    slots = attributes.slots
    y = problem.outputs[0]
    pixels = y.spec.numel // y.shape[1]
    products = y.shape[1] * problem.inputs[slots["w2"]].shape[1]
    if attributes.front is not None:
        k, per_group, r, s = problem.inputs[slots["w1"]].shape
        products += k * per_group * r * s
    if attributes.shortcut is not None:
        products += y.shape[1] * problem.inputs[slots["s"]].shape[1]
    if attributes.has_reduce:
        products += y.shape[1] * problem.outputs[1].shape[1]
    read, written = tensor_bytes(problem)
    return Cost(2 * pixels * products, read, written)


def packs(attributes: ConvChain) -> Mapping[int, Callable[[Any, torch.Tensor], torch.Tensor]]:
    """Every weight K-major, as conv2d packs it."""
    slots = attributes.slots
    return {slots[name]: _pack for name in ("w1", "w2", "ws", "w3") if name in slots}


def _pack(attributes: ConvChain, w: torch.Tensor) -> torch.Tensor:
    return w.permute(0, 2, 3, 1).reshape(w.shape[0], -1).contiguous()


OP = Op(
    name="conv_chain",
    attributes=ConvChain,
    infer=infer,
    reference=reference,
    launches=launches,
    configs=configs,
    default=default,
    legal=legal,
    cost=cost,
    # Mostly positive: an intermediate that is rounded to the other side, as the order of a sum
    # decides, means nothing beside a result that cancels.
    input_range=(-1.0, 3.0),
    packs=packs,
    takes_epilogue=False,
)
