"""The links of a chain: products that feed each other inside one kernel, with stages behind each.

The inputs of a chain are x, then for each link its own tensors and what its stages read. That order
decides which input is whose, what shapes are expected, what torch computes, and which generated
functions and tensors a kernel takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract.op import Pack, Ref
from ..contract.spec import Layout, Operand, TensorSpec
from ..convolution import conv2d
from ..tile import conv_geometry
from ..tile.conv_geometry import Conv2d
from ..tile.torch_convolution import convolve

T = TypeVar("T")


@dataclass(frozen=True)
class Link:
    """A product and the stages on its result.

    name: of the link in messages, and of its generated function. tensors: the names of its own
    inputs, its weight first; none for stages that go on where the link before it has stopped.
    conv: None for a product over channels alone, by a weight (K, C, 1, 1) or (K, C). shortcut: a
    1x1 convolution whose result is added in front of the stages; its input and its weight are the
    last two tensors.
    """

    name: str
    tensors: tuple[str, ...]
    stages: ep.Epilogue = ()
    conv: Conv2d | None = None
    shortcut: Conv2d | None = None


@dataclass(frozen=True)
class Slots:
    """Where a chain's inputs are: x and the links' own tensors by their names, what the stages of a
    link read by its name, and how many inputs there are."""

    tensors: Mapping[str, int]
    operands: Mapping[str, slice]
    count: int


def slots(links: Sequence[Link]) -> Slots:
    """Where each input of the chain is."""
    tensors, operands, at = {"x": 0}, {}, 1
    for link in links:
        tensors |= {name: index for index, name in enumerate(link.tensors, at)}
        first = at + len(link.tensors)
        at = first + ep.operand_count(link.stages)
        operands[link.name] = slice(first, at)
    return Slots(tensors, operands, at)


def tensors(links: Sequence[Link], inputs: Sequence[T]) -> dict[str, T]:
    """x and the links' own tensors by their names."""
    return {name: inputs[at] for name, at in slots(links).tensors.items()}


def check_count(op: str, links: Sequence[Link], inputs: Sequence[TensorSpec]) -> None:
    """Raises: InvalidInputError for a wrong number of inputs."""
    if len(inputs) != (count := slots(links).count):
        raise InvalidInputError(f"{op}: expected {count} inputs, got {len(inputs)}")


def check(op: str, links: Sequence[Link], inputs: tuple[TensorSpec, ...]) -> dict[str, TensorSpec]:
    """The spec of each link's result, by its name.

    Raises: InvalidInputError for a wrong number of inputs, a weight or a shortcut that does not
    fit, or an operand that does not broadcast to the result it is read after.
    """
    check_count(op, links, inputs)
    where, value, results = slots(links), inputs[0], {}
    for link in links:
        own = [inputs[where.tensors[name]] for name in link.tensors]
        value = results[link.name] = _product(op, link, value, own[0])
        if link.shortcut is not None:
            _check_shortcut(op, link.shortcut, own[-2], own[-1], value)
        check_operands(op, link.name, inputs[where.operands[link.name]], value)
    return results


def check_operands(op: str, name: str, operands: Sequence[TensorSpec], result: TensorSpec) -> None:
    """Raises: InvalidInputError for an operand that does not broadcast to the link's result."""
    for operand in operands:
        if not ep.broadcasts(operand, result):
            raise InvalidInputError(
                f"{op}: {operand}, read after {name}, does not broadcast to {result}"
            )


def _product(op: str, link: Link, x: TensorSpec, w: TensorSpec) -> TensorSpec:
    if link.conv is not None:
        return conv_geometry.infer(link.conv, (x, w))[0]
    depth, ones = x.shape[1], tuple(1 for _ in x.shape[2:])
    if w.shape != (*w.shape[:1], depth, *ones):
        expected = ",".join(map(str, ("K", depth, *ones)))
        name = link.tensors[0]
        raise InvalidInputError(f"{op}: expected a weight ({expected}) as {name}, got {w}")
    layout = Layout.NHWC if ones else Layout.DENSE
    return TensorSpec((x.shape[0], w.shape[0], *x.shape[2:]), x.dtype, layout, x.batch)


def _check_shortcut(
    op: str, shortcut: Conv2d, s: TensorSpec, ws: TensorSpec, result: TensorSpec
) -> None:
    if shortcut.groups != 1 or any(shortcut.padding) or ws.shape[2:] != (1, 1):
        raise InvalidInputError(
            f"{op}: expected a shortcut that is 1x1 without padding or groups, got {shortcut} with "
            f"weight {ws}"
        )
    (other,) = conv_geometry.infer(shortcut, (s, ws))
    if other != result:
        raise InvalidInputError(f"{op}: the shortcut gives {other}, not {result}")


def reference(links: Sequence[Link], inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Each link's result after its stages by torch, by its name."""
    where, value, results = slots(links), inputs[0], {}
    for link in links:
        w, *beside = (inputs[where.tensors[name]] for name in link.tensors)
        if link.conv is not None:
            value = conv_geometry.reference(link.conv, value, w)
        else:
            value = convolve(value, w) if value.dim() == 4 else F.linear(value, w)
        if link.shortcut is not None:
            value = value + conv_geometry.reference(link.shortcut, *beside)
        value = ep.apply_reference(link.stages, value, inputs[where.operands[link.name]])
        results[link.name] = value
    return results


@dataclass(frozen=True)
class Bound:
    """What a launch takes of a chain: its own tensors by their names, the function of each link by
    its name, and the `extras` that the functions read."""

    tensors: Mapping[str, Ref]
    functions: Mapping[str, ep.GeneratedFunction]
    extras: tuple[Ref, ...]


def bind(
    links: Sequence[Link],
    inputs: tuple[Operand, ...],
    results: Mapping[str, TensorSpec],
    extras: tuple[Ref, ...] = (),
) -> Bound:
    """results: the spec of each link's result, whose pixels are rows. extras: what the kernel
    reads in front of the links' operands."""
    where, functions = slots(links), {}
    for link in links:
        span, spec = where.operands[link.name], results[link.name]
        reads = tuple(ep.access(operand, spec) for operand in inputs[span])
        functions[link.name] = ep.generate(
            link.stages, reads, ep.memory_sizes(spec), len(extras), link.name
        )
        extras += tuple(Ref("input", at) for at in range(span.start, span.stop))
    refs = {name: Ref("input", at) for name, at in where.tensors.items()}
    return Bound(refs, functions, extras)


def weights(links: Sequence[Link]) -> dict[str, Conv2d]:
    """The convolutions of the links and of their shortcuts, by the names of their weights."""
    convs = {link.tensors[0]: link.conv or Conv2d() for link in links if link.tensors}
    return convs | {link.tensors[-1]: link.shortcut for link in links if link.shortcut is not None}


def packs(links: Sequence[Link]) -> dict[int, Pack]:
    """Every weight as conv2d packs it, (K, R·S·C) or depthwise's own order; (K, C) as it is."""
    where = slots(links).tensors
    return {where[name]: partial(_pack, conv) for name, conv in weights(links).items()}


def _pack(conv: Conv2d, attributes: Any, w: torch.Tensor) -> torch.Tensor:
    return w.contiguous() if w.dim() == 2 else conv2d.pack(conv, w)


@triton.jit
def load_weights(
    w, columns, column_mask, depth, depth_mask, DEPTH: tl.constexpr, BLOCK: tl.constexpr
):
    """A tile of a packed (columns, DEPTH) weight; BLOCK: how many of its depth are in `depth`."""
    mask = column_mask[:, None]
    if DEPTH % BLOCK != 0:
        mask = mask & depth_mask[None, :]
    return tl.load(w + (columns * DEPTH)[:, None] + depth[None, :], mask=mask, other=0.0)
