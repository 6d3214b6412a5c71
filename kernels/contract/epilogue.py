"""Chains of pointwise stages as values: what a kernel does to its result before storing it.

A chain is a tuple of `Stage`s. For a given output it becomes the source of one `@triton.jit`
function, which a kernel receives as a `tl.constexpr` argument together with a tuple of pointers
(`extras`), one for each stage that reads a tensor:

    acc = EPILOGUE(acc, rows, columns, row_mask, column_mask, extras)

acc: fp32 [BLOCK_ROWS, BLOCK_COLUMNS], a tile of the output seen as a matrix whose columns are the
innermost dimension in memory; rows, columns: the tile's indices in that matrix. Operands broadcast
as torch tensors do and may be strided views; their addresses are derived from the row index.

The function is as fast as an epilogue written by hand: the machine code is the same.
"""

from __future__ import annotations

import hashlib
import importlib
import linecache
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from . import elementary, scalars
from .spec import Operand, TensorSpec


def same_numbers(
    ours: tuple[float | None, ...], theirs: tuple[float | None, ...]
) -> bool:
    """Whether two lists of numbers are equal, with the signs of zeros: x / 0.0 is not x / -0.0."""
    signs = [[math.copysign(1, x) for x in each if x is not None] for each in (ours, theirs)]
    return ours == theirs and signs[0] == signs[1]


@dataclass(frozen=True)
class Stage:
    """One application of a scalar function to the running value.

    A binary function's other argument is `literal` when given, what the running value was `back`
    stages ago (0: as it is), or the next tensor operand; `reverse` puts the running value on the
    right. A function of three reads the next two. A chain reads no value of before its first stage.
    channels: only the columns [start, stop) are changed, where convolutions with different
    activations were merged into a wide one; the columns are then dimension 1 of the output.
    """

    name: str
    parameters: tuple[float, ...] = ()
    literal: float | None = None
    reverse: bool = False
    channels: tuple[int, int] | None = None
    back: int | None = None

    def __eq__(self, other: object) -> bool:
        """Unlike numbers, zeros of different signs differ."""
        if not isinstance(other, Stage):
            return NotImplemented
        rest = (self.name, self.reverse, self.channels, self.back)
        return rest == (other.name, other.reverse, other.channels, other.back) and (
            same_numbers((*self.parameters, self.literal), (*other.parameters, other.literal))
        )

    @property
    def scalar(self) -> scalars.Scalar:
        return scalars.BY_NAME[self.name]

    @property
    def operands(self) -> int:
        """How many tensors it reads besides the running value."""
        reads_none = self.literal is not None or self.back is not None
        return 0 if reads_none else self.scalar.operands - 1

    def __str__(self) -> str:
        other = [] if self.literal is None else [f"{self.literal:g}"]
        other += [] if self.back is None else [f"^{self.back}"]
        arguments = [*other, *(f"{value:g}" for value in self.parameters)]
        name = f"r{self.name}" if self.reverse else self.name
        shown = f"{name}({', '.join(arguments)})" if arguments else name
        return f"{shown}[{self.channels[0]}:{self.channels[1]}]" if self.channels else shown


Epilogue = tuple[Stage, ...]


def operand_count(stages: Epilogue) -> int:
    """How many tensors the chain reads besides the running value."""
    return sum(stage.operands for stage in stages)


def makes_boolean(stages: Epilogue, dtype: torch.dtype) -> bool:
    """Whether a chain that begins with a value of a dtype ends in true and false."""
    return stages[-1].scalar.boolean if stages else dtype is torch.bool


def read_before(stages: Epilogue, position: int) -> bool:
    """Whether stages from `position` on read a value that the chain has had before it."""
    later = enumerate(stages[position:], position)
    return any(stage.back is not None and at - stage.back < position for at, stage in later)


def apply_reference(
    stages: Epilogue, value: torch.Tensor, operands: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """The chain by torch operations, in the value's dtype; what is computed with booleans, which
    are 0 and 1 then, is in that of the operands."""
    remaining = iter(operands)
    values: list[torch.Tensor] = []
    for at, stage in enumerate(stages):
        values.append(value)
        others: tuple[Any, ...] = tuple(next(remaining) for _ in range(stage.operands))
        if stage.back is not None:
            others = (values[at - stage.back],)
        elif stage.literal is not None:
            others = (stage.literal,)
        arguments = _as_numbers(stage, (value, *others))
        if stage.reverse:
            arguments.reverse()
        changed = stage.scalar.reference(*arguments, *stage.parameters)
        value = changed if stage.channels is None else _only(stage.channels, changed, value)
    return value


def _as_numbers(stage: Stage, arguments: tuple[Any, ...]) -> list[Any]:
    """The arguments, the booleans that a function computes with as floats."""
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    dtype = next((t.dtype for t in tensors if t.dtype.is_floating_point), torch.float32)
    last = len(arguments) - 1
    conditions = {last - at if stage.reverse else at for at in stage.scalar.conditions}
    return [
        a.to(dtype)
        if isinstance(a, torch.Tensor) and a.dtype is torch.bool and at not in conditions else a
        for at, a in enumerate(arguments)
    ]  # fmt: skip


def _only(channels: tuple[int, int], changed: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`changed` in the channels (dimension 1) from start to stop, `value` in the others."""
    result = value.clone()
    result[:, slice(*channels)] = changed[:, slice(*channels)]
    return result


@dataclass(frozen=True)
class GeneratedFunction:
    """Source of one jit function; equal sources are one function, also across processes.

    symbols: the functions that it calls, as `Scalar.symbol` names them.
    """

    name: str
    source: str
    symbols: tuple[str, ...] = ()

    def resolve(self) -> Any:
        return _compile_source(self)

    def __str__(self) -> str:
        return self.source


@cache
def _compile_source(generated: GeneratedFunction) -> Any:
    digest = hashlib.sha256(generated.source.encode()).hexdigest()[:16]
    filename = f"<convloom {generated.name} {digest}>"
    lines = generated.source.splitlines(keepends=True)
    # Triton reads the source back through inspect, which asks linecache.
    linecache.cache[filename] = (len(generated.source), None, lines, filename)
    # Triton tells functions apart by module and name only: two generated functions that share both
    # would silently become one inside a kernel that calls them.
    module = f"{__name__}.generated_{digest}"
    namespace: dict[str, Any] = {"tl": tl, "triton": triton, "__name__": module}
    for symbol in generated.symbols:
        place, _, known = symbol.rpartition(":")
        namespace[known] = getattr(importlib.import_module(place) if place else scalars, known)
    exec(compile(generated.source, filename, "exec"), namespace)
    return namespace[generated.name]


@dataclass(frozen=True)
class Access:
    """How a tensor is read while walking an iteration space: element strides and a start.

    strides follow the space's dimensions, 0 where the tensor repeats. through: the scalar function,
    and its parameters, that its elements go through before they are spread over rows or columns.
    held: its part of the tile is not read: the kernel passes it as the last of `extras`.
    """

    strides: tuple[int, ...]
    offset: int
    label: str = ""
    through: tuple[str, float] | None = None
    held: bool = False

    def is_full(self, sizes: tuple[int, ...]) -> bool:
        """Whether the tensor has an element of its own for every point of a space of those sizes:
        a dimension of one, such as the batch of a plan for single images, repeats nothing."""
        walked = zip(sizes, self.strides, strict=True)
        return all(stride or size == 1 for size, stride in walked)


def memory_sizes(output: TensorSpec) -> tuple[int, ...]:
    """The iteration space of a whole tensor: its extents in memory order; the last are columns."""
    return tuple(output.shape[dim] for dim in output.layout.order(output.rank)) or (1,)


def access(operand: Operand, output: TensorSpec) -> Access:
    """How an operand that broadcasts against `output` is read in the output's memory order."""
    missing = output.rank - operand.spec.rank
    strides = [0] * missing
    for size, stride in zip(operand.shape, operand.strides, strict=True):
        strides.append(0 if size == 1 else stride)
    ordered = tuple(strides[dim] for dim in output.layout.order(output.rank)) or (0,)
    return Access(ordered, operand.offset, str(operand.spec))


def broadcasts(operand: TensorSpec, output: TensorSpec) -> bool:
    """Whether an operand of an epilogue fits the output it is applied to."""
    missing = output.rank - operand.rank
    return missing >= 0 and all(
        size in (1, extent)
        for size, extent in zip(operand.shape, output.shape[missing:], strict=True)
    )


def collapse(
    sizes: tuple[int, ...], walks: tuple[tuple[int, ...], ...], keep_first: bool
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Merges neighbouring dimensions that every walk (a tuple of strides) crosses without a jump.

    keep_first leaves dimension 0 alone: its size may differ from call to call.
    """
    kept = [0]
    new_sizes = [sizes[0]]
    new_walks = [[walk[0]] for walk in walks]
    for dim in range(1, len(sizes)):
        if sizes[dim] == 1 and dim + 1 < len(sizes):
            continue
        joined = all(
            walk[-1] == sizes[dim] * strides[dim]
            for walk, strides in zip(new_walks, walks, strict=True)
        )
        mergeable = joined or new_sizes[-1] == 1
        if mergeable and not (keep_first and len(kept) == 1):
            new_sizes[-1] *= sizes[dim]
            for walk, strides in zip(new_walks, walks, strict=True):
                walk[-1] = strides[dim]
            continue
        kept.append(dim)
        new_sizes.append(sizes[dim])
        for walk, strides in zip(new_walks, walks, strict=True):
            walk.append(strides[dim])
    return tuple(new_sizes), tuple(tuple(walk) for walk in new_walks)


def row_address(sizes: tuple[int, ...], strides: tuple[int, ...]) -> str:
    """The offset of a row as an expression of `rows`, a mixed-radix number over `sizes`."""
    if not sizes:
        return ""
    merged, (walk,) = collapse(sizes, (strides,), keep_first=False)
    terms = []
    inner = 1
    for position, (size, stride) in reversed(list(enumerate(zip(merged, walk, strict=True)))):
        if stride:
            index = "rows" if inner == 1 else f"rows // {inner}"
            # The outermost digit is open-ended: its size may be the batch of this call.
            index = index if position == 0 else f"({index}) % {size}"
            terms.append(f"({index}) * {stride}" if stride != 1 else f"({index})")
        inner *= size
    return " + ".join(reversed(terms))


def row_offset_function(sizes: tuple[int, ...], strides: tuple[int, ...]) -> GeneratedFunction:
    """`row_address` as a function of the row indices."""
    expression = row_address(sizes, strides) or "rows * 0"
    source = f"@triton.jit\ndef row_offset(rows):\n    return {expression}\n"
    return GeneratedFunction("row_offset", source)


def load_source(pointer: str, sizes: tuple[int, ...], read: Access) -> str:
    """Triton source that loads a tensor's part of a tile as fp32.

    A result that does not depend on the rows (columns) has one row (column) and broadcasts.
    """
    row = row_address(sizes[:-1], read.strides[:-1])
    step = read.strides[-1]
    column = "" if step == 0 else "columns" if step == 1 else f"columns * {step}"
    base = f"{pointer} + {read.offset}" if read.offset else pointer
    spread = ""
    if row and column:
        address = f"{base} + ({row})[:, None] + ({column})[None, :]"
        mask = "row_mask[:, None] & column_mask[None, :]"
        load = f"tl.load({address}, mask={mask}, other=0.0).to(tl.float32)"
    elif column:
        load = f"tl.load({base} + {column}, mask=column_mask, other=0.0).to(tl.float32)"
        spread = "[None, :]"
    elif row:
        load = f"tl.load({base} + {row}, mask=row_mask, other=0.0).to(tl.float32)"
        spread = "[:, None]"
    else:
        load = f"tl.load({base}).to(tl.float32)"
    if read.through is not None:
        function, parameter = read.through
        load = f"{function}({load}, {_literal(parameter)})"
    return load + spread


def _literal(value: float) -> str:
    """A number; as a tensor where it is -0.0, of which Triton makes 0.0."""
    if value == 0 and math.copysign(1, value) < 0:
        return "tl.cast(-0x80000000, tl.int32).to(tl.float32, bitcast=True)"
    text = repr(float(value))
    return f'float("{text}")' if text.lstrip("-") in ("inf", "nan") else text


def _full(value: float) -> str:
    """A literal as a tensor of no dimensions, whose number is fp32 however large."""
    text = _literal(value)
    return text if text.startswith("tl.cast") else f"tl.cast({text}, tl.float32)"


_BY_INVERSE = f"{elementary.__name__}:divide_by"


def _without_division(stage: Stage) -> tuple[Stage, float | None]:
    """Of a division by a number, which takes 27 instructions: a product by the inverse where that
    is exact, as those of powers of two are; else with the inverse for `divide_by`."""
    if stage.name != "div" or stage.reverse or not stage.literal:
        return stage, None
    fraction, exponent = math.frexp(stage.literal)
    if abs(fraction) == 0.5 and abs(exponent) < 126:
        return replace(stage, name="mul", literal=1 / stage.literal), None
    # Its product must not overflow where the quotient does not.
    divisor = np.float32(stage.literal)
    return stage, float(1 / divisor) if 1 < abs(divisor) < 2.0**64 else None


def _values_read(stages: Epilogue) -> set[int]:
    """Before which stages the chain has values that later ones read."""
    return {at - stage.back for at, stage in enumerate(stages) if stage.back is not None}


def _ordered(
    stages: Epilogue, reads: tuple[Access, ...], sizes: tuple[int, ...]
) -> list[tuple[Stage, int | None]]:
    """Stages with the index of their first operand; in a run of additions of which no sum is read
    again, full tensors come first.

    Residual before bias costs 104 registers at 128x128 and 8 warps, bias before residual 128.
    """
    slots: list[tuple[Stage, int | None]] = []
    index = 0
    for stage in stages:
        slots.append((stage, index if stage.operands else None))
        index += stage.operands

    def adds(slot: tuple[Stage, int | None], full: bool) -> bool:
        stage, at = slot
        if stage.name != "add" or at is None or stage.channels is not None:
            return False
        return reads[at].is_full(sizes) is full

    read = _values_read(stages)
    for position in range(1, len(slots)):
        at = position
        while at and at not in read and adds(slots[at], True) and adds(slots[at - 1], False):
            slots[at - 1], slots[at] = slots[at], slots[at - 1]
            at -= 1
    return slots


def generate(
    stages: Epilogue,
    reads: tuple[Access, ...],
    sizes: tuple[int, ...],
    first: int = 0,
    name: str = "epilogue",
) -> GeneratedFunction:
    """The source of the chain over an iteration space; operand i is `extras[first + i]`."""
    lines = [
        "@triton.jit",
        f"def {name}(acc, rows, columns, row_mask, column_mask, extras):",
    ]
    symbols = []
    read = _values_read(stages)
    for position, (stage, at) in enumerate(_ordered(stages, reads, sizes)):
        if position in read:
            lines.append(f"    earlier{position} = acc")
        stage, inverse = _without_division(stage)
        function = stage.scalar.function if inverse is None else elementary.divide_by
        symbols.append(stage.scalar.symbol if inverse is None else _BY_INVERSE)
        arguments = ["acc"]
        for index in range(at or 0, (at or 0) + stage.operands):
            if reads[index].held:
                load = f"extras[{first + len(reads)}].to(tl.float32)"
            else:
                load = load_source(f"extras[{first + index}]", sizes, reads[index])
            if (through := reads[index].through) is not None:
                symbols.append(through[0])
            lines.append(f"    # {stage.name} {reads[index].label}")
            lines.append(f"    operand{index} = {load}")
            arguments.append(f"operand{index}")
        if stage.literal is not None:
            arguments.append(_full(stage.literal))
        elif stage.back is not None:
            arguments.append(f"earlier{position - stage.back}")
        if stage.reverse:
            arguments.reverse()
        arguments += [_literal(value) for value in stage.parameters]
        arguments += [] if inverse is None else [_full(inverse)]
        result = f"{function.fn.__name__}({', '.join(arguments)})"
        if stage.channels is not None:
            start, stop = stage.channels
            here = f"((columns >= {start}) & (columns < {stop}))[None, :]"
            result = f"tl.where({here}, {result}, acc)"
        lines.append(f"    acc = {result}")
    lines.append("    return acc")
    return GeneratedFunction(name, "\n".join(lines) + "\n", tuple(sorted(set(symbols))))


def for_output(
    stages: Epilogue, operands: tuple[Operand, ...], output: TensorSpec, first: int = 0,
    held: int | None = None,
) -> GeneratedFunction:  # fmt: skip
    """The epilogue of a kernel whose rows and columns are those of the output in memory. held:
    which operand the kernel passes as the last of `extras`."""
    reads = tuple(access(operand, output) for operand in operands)
    reads = tuple(replace(read, held=at == held) for at, read in enumerate(reads))
    return generate(stages, reads, memory_sizes(output), first)


@dataclass(frozen=True)
class FunctionName:
    """A jit function of a module by its name, which unlike the function can be sent to another
    process."""

    module: str
    name: str

    def resolve(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name)

    @property
    def source(self) -> str:
        """Its text."""
        return str(self.resolve().src)


def resolved(constexprs: Mapping[str, Any]) -> dict[str, Any]:
    """Compile-time arguments with generated sources and names turned into jit functions, those in
    tuples too."""
    sources = (GeneratedFunction, FunctionName)
    return {
        name: replaced(value, lambda leaf: leaf.resolve() if isinstance(leaf, sources) else leaf)
        for name, value in constexprs.items()
    }


def named(constexprs: Mapping[str, Any]) -> dict[str, Any]:
    """Compile-time arguments with the names of jit functions in their place."""

    def name_of(leaf: Any) -> Any:
        if isinstance(leaf, JITFunction):
            return FunctionName(leaf.fn.__module__, leaf.fn.__name__)
        return leaf

    return {name: replaced(value, name_of) for name, value in constexprs.items()}


def replaced(value: Any, change: Callable[[Any], Any]) -> Any:
    """A compile-time argument with every leaf of its tuples changed; named tuples stay of their
    kind."""
    if not isinstance(value, tuple):
        return change(value)
    members = (replaced(member, change) for member in value)
    return type(value)(*members) if hasattr(value, "_fields") else tuple(members)


def flat(constexprs: Mapping[str, Any]) -> dict[str, Any]:
    """Compile-time arguments, the members of tuples under names like `TILE.M`."""
    found: dict[str, Any] = {}
    for name, value in constexprs.items():
        if isinstance(value, tuple):
            fields = getattr(value, "_fields", range(len(value)))
            members = {f"{name}.{field}": x for field, x in zip(fields, value, strict=True)}
            found |= flat(members)
        else:
            found[name] = value
    return found
