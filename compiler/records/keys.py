"""What a tuning result is about: one problem, one GPU generation, one Triton, one set of kernels.

Everything in a key is plain text, so that a record can be read by people and compared without the
program that wrote it. Where a tensor lies is reduced to what matters for speed: whether its rows
are aligned, and whether offsets need 64 bits.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from ... import extensions
from ...kernels import registry
from ...kernels.contract.epilogue import Epilogue
from ...kernels.contract.op import Problem
from ...kernels.contract.spec import Operand, TensorSpec
from ...kernels.contract.targets import GPU_TARGETS, INTERPRETER, Target
from ...kernels.devices import kernel_hash

ARCHITECTURES = {
    target.name.removeprefix("cuda:"): target for target in (*GPU_TARGETS, INTERPRETER)
}
"""What records are made for, by the name they carry."""
ALIGNMENT = 16
"""Bytes of the widest memory access of one thread."""
NEAR = 3.0
"""Farther records are no hint: a batch 4x as large is 2.8 away, one with twice the channels 1.4."""
OTHER_ATTRIBUTES = 1.5
"""What another stride, padding or filter adds to a distance."""
DIGEST_DIGITS = 24

_TENSOR = re.compile(r"(float32|float16|bfloat16|int64|int32|bool) (scalar|\d+(?:x\d+)*) (\w+)")


@dataclass(frozen=True)
class Key:
    """What a record is filed under.

    attributes: as the op prints them. inputs, outputs: "float16 8x64x56x56 nhwc", at the largest
    batch. epilogue, prologue: the kind of each stage, "add channel". precision: of fp32 products.
    aligned: whether rows start at multiples of 16 bytes. wide: 64-bit offsets. architecture:
    "sm_90", or "interpreter". triton: its version. source: the hash of the op's kernels, and what
    extensions it takes, "0123456789abcdef, name 1.0".
    """

    op: str
    attributes: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    epilogue: tuple[str, ...]
    prologue: tuple[str, ...]
    precision: str
    aligned: bool
    wide: bool
    architecture: str
    triton: str
    source: str

    @cached_property
    def digest(self) -> str:
        """The hash that names the record's file."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_DIGITS]

    @property
    def current(self) -> Key:
        """The same problem for the kernels and the Triton of this process.

        Raises: UnsupportedOpError where there is no such op.
        """
        source = kernel_hash.source_of(self.op, self._functions)
        return replace(self, triton=kernel_hash.TRITON_VERSION, source=source)

    @property
    def of_other_kernels(self) -> str | None:
        """Why a result for this key is about kernels that are not ours, or None."""
        versions = (each.partition(" ")[::2] for each in self.source.split(", ")[1:])
        if reason := next(extensions.missing(versions), None):
            return f"it was {reason}"
        if self.op not in registry.BY_NAME:
            return f"there is no op {self.op!r}"
        ours = kernel_hash.source_of(self.op, self._functions)
        if self.source != ours:
            return f"the kernels of {self.op} have changed since (source {self.source}, now {ours})"
        return None

    @property
    def _functions(self) -> set[str]:
        """The words among which the names of all stages are; "r" may stand before one."""
        if not registry.OWNERS:
            return set()
        text = " ".join((self.attributes, *self.epilogue, *self.prologue))
        words = re.findall(r"\w+(?![\w=])", text)
        return {*words, *(word.removeprefix("r") for word in words)}

    @property
    def stale(self) -> str | None:
        """Why a result for this key is not about the machine code of today, or None."""
        if (reason := self.of_other_kernels) is not None:
            return reason
        if self.triton != kernel_hash.TRITON_VERSION:
            return f"made with Triton {self.triton}, this is {kernel_hash.TRITON_VERSION}"
        return None

    def __str__(self) -> str:
        dtype = self.inputs[0].partition(" ")[0]
        read = " * ".join(each.split(" ")[1] for each in self.inputs[:2])
        written = ", ".join(each.split(" ")[1] for each in self.outputs)
        stages = f" [{', '.join(self.epilogue)}]" if self.epilogue else ""
        return f"{self.op} {dtype} {read} -> {written}{stages}"


def key_of(problem: Problem, target: Target) -> Key:
    dtype = _dtype(problem.inputs[0].spec)
    packed = registry.get(problem.op).packs(problem.attributes)
    placed = [o for slot, o in enumerate(problem.inputs) if slot not in packed]
    key = Key(
        op=problem.op,
        attributes=str(problem.attributes),
        inputs=tuple(described(operand.spec) for operand in problem.inputs),
        outputs=tuple(described(operand.spec) for operand in problem.outputs),
        epilogue=_kinds(problem.epilogue, problem.operands, problem.output.spec),
        prologue=_kinds(problem.prologue, problem.prologue_operands, problem.inputs[0].spec),
        precision=problem.precision if dtype == "float32" else "ieee",
        aligned=all(_is_aligned(operand) for operand in (*placed, *problem.outputs)),
        wide=problem.is_wide,
        architecture=target.compiled_as.removeprefix("cuda:"),
        triton=kernel_hash.TRITON_VERSION,
        source="",
    )
    return key.current


def described(spec: TensorSpec) -> str:
    """A tensor in one phrase: dtype, shape at the largest batch, layout."""
    shape = "x".join(map(str, spec.shape)) or "scalar"
    return f"{_dtype(spec)} {shape} {spec.layout.value}"


def _dtype(spec: TensorSpec) -> str:
    return str(spec.dtype).removeprefix("torch.")


def _is_aligned(operand: Operand) -> bool:
    size = operand.spec.dtype.itemsize
    return not (operand.pitch * size % ALIGNMENT or operand.offset * size % ALIGNMENT)


def _kinds(stages: Epilogue, operands: tuple[Operand, ...], output: TensorSpec) -> tuple[str, ...]:
    """The name of each stage, and how the tensor that it reads repeats over the output."""
    remaining = iter(operands)
    kinds = []
    for stage in stages:
        extent = [_extent(next(remaining).spec, output) for _ in range(stage.operands)]
        literal = ["literal"] if stage.literal is not None else []
        back = [] if stage.back is None else ["earlier"]
        kinds.append(" ".join([stage.name, *extent, *literal, *back]))
    return tuple(kinds)


def _extent(operand: TensorSpec, output: TensorSpec) -> str:
    """ "full", "channel" (a vector along the columns in memory), "scalar" or "part"."""
    shape = (*(1 for _ in range(output.rank - operand.rank)), *operand.shape)
    if shape == output.shape:
        return "full"
    kept = {dim for dim, size in enumerate(shape) if size != 1}
    if not kept:
        return "scalar"
    return "channel" if kept == {output.layout.order(output.rank)[-1]} else "part"


def shape_of(tensor: str) -> tuple[str, str, tuple[int, ...]] | None:
    """(dtype, layout, shape) of a described tensor; None for what is no description of one."""
    found = _TENSOR.fullmatch(tensor)
    if found is None:
        return None
    dtype, shape, layout = found.groups()
    return dtype, layout, () if shape == "scalar" else tuple(map(int, shape.split("x")))


def distance(a: Key, b: Key) -> float:
    """How unlike two problems of one op are, infinite where a result says nothing about the other.

    The square root of the summed squares of the binary logarithms of all extents' ratios: twice the
    channels is as far as half of them, whatever the size.
    """
    same = ("op", "epilogue", "prologue", "precision", "aligned", "wide", "architecture")
    if any(getattr(a, name) != getattr(b, name) for name in same):
        return math.inf
    if len(a.inputs) != len(b.inputs) or len(a.outputs) != len(b.outputs):
        return math.inf
    total = 0.0
    for one, other in zip((*a.inputs, *a.outputs), (*b.inputs, *b.outputs), strict=True):
        here, there = shape_of(one), shape_of(other)
        if here is None or there is None or here[:2] != there[:2]:
            return math.inf
        if len(here[2]) != len(there[2]):
            return math.inf
        pairs = zip(here[2], there[2], strict=True)
        total += sum(math.log2(max(x, 1) / max(y, 1)) ** 2 for x, y in pairs)
    return math.sqrt(total) + OTHER_ATTRIBUTES * (a.attributes != b.attributes)
