"""`plan.json`: what runs, as plain frozen data that needs neither Triton nor a graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...errors import ArtifactError
from ...kernels.contract.spec import Operand
from ..graph.interface import CONSTANTS, Constant, Interface, Port, Structure
from ..graph.memory import Buffer
from ..graph.typed import Reader
from .maps import Map

FORMAT, VERSION = "convloom-executable", 5
DEEPEST, MOST_LEAVES = 16, 4096
READ, WRITE, SCRATCH, ROWS = "read", "write", "scratch", "rows"
UNTRIED = ("HOPPER", "CLUSTER")
"""Blocks of a configuration that no GPU has run (`kernels/hopper/core.py`)."""


@dataclass(frozen=True)
class Image:
    """One compiled kernel: its members, its entry point, and how it wants to be launched.

    signature: the types of its arguments in order (`box4*fp16` is a tensor map of four dimensions,
    behind which come its sizes and strides), without the two pointers of the compiler's own scratch
    that follow in Triton's calling convention. num_warps: with those that the compiler adds. ptx:
    for newer generations; else None.
    """

    entry: str
    cubin: str
    ptx: str | None
    signature: tuple[str, ...]
    num_warps: int
    num_ctas: int
    shared_bytes: int
    cooperative: bool
    programmatic: bool


@dataclass(frozen=True)
class Argument:
    """A pointer to the start of a buffer, or the number of rows.

    kind: "read", "write", "scratch" or "rows". operand: what the kernel touches of the buffer; None
    means all of it. map: where it is moved in boxes, how.
    """

    kind: str
    buffer: str = ""
    operand: Operand | None = None
    map: Map | None = None


@dataclass(frozen=True)
class Grid:
    """How many rows a kernel is told of, and how many programs are started, for any batch.

    `rows` are those of the largest batch, which is `batch`, or of any where that is None. most: of
    programs, where each may compute more than one tile; None where there is one for each.
    """

    rows: int
    block_rows: int
    columns: int
    batch: int | None
    most: int | None

    def rows_at(self, batch: int) -> int:
        return self.rows if self.batch is None else self.rows // self.batch * batch

    def programs_at(self, batch: int) -> int:
        tiles = -(-self.rows_at(batch) // self.block_rows) * self.columns
        return tiles if self.most is None else min(tiles, self.most)


@dataclass(frozen=True)
class Call:
    step: int
    image: int
    arguments: tuple[Argument, ...]
    grid: Grid


@dataclass(frozen=True)
class Tile:
    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    @property
    def is_untried(self) -> bool:
        """Whether it needs what no GPU has run: the Hopper core, or clusters."""
        return any(dict(self.blocks).get(name, 0) for name in UNTRIED)


@dataclass(frozen=True)
class ProgramStep:
    """One op application, for people, and its configuration; `line` is the plan's own line."""

    name: str
    op: str
    module_path: str
    origins: tuple[str, ...]
    tile: Tile
    chosen_by: str
    line: str


Literal = bool | int | float | str | None


@dataclass(frozen=True)
class Nest:
    """How tensors are nested: "tensor", or a "tuple", "list" or "dict" of `items` (and `keys`), or
    among arguments a "constant", whose only key is its value as JSON."""

    kind: str
    items: tuple[Nest, ...] = ()
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """One target and one range of batches.

    graph, account: positions in graph.json and ledger.json. constants: buffers and the tensors they
    hold. results: for each leaf of the result, an output's position or a literal. names: what
    the module takes by position or by name. streams: of each
    step, where independent ones may run side by side; how they wait for each other follows from
    what their calls touch. twins: of the launches of the Hopper core, in their order, those of the
    plain core that may stand for them (`twins.py`). summary: the counts of `Plan.summary`.
    """

    target: str
    batch: tuple[int, int] | None
    precision: str
    in_place: bool
    graph: int
    account: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    arguments: Nest
    result: Nest
    results: tuple[tuple[str, Literal], ...]
    names: tuple[str, ...]
    buffer_list: tuple[Buffer, ...]
    constants: tuple[tuple[str, str], ...]
    steps: tuple[ProgramStep, ...]
    images: tuple[Image, ...]
    calls: tuple[Call, ...]
    twins: tuple[Call, ...]
    streams: tuple[int, ...]
    summary: tuple[tuple[str, int], ...]

    @cached_property
    def buffers(self) -> Mapping[str, Buffer]:
        return {buffer.name: buffer for buffer in self.buffer_list}

    @property
    def batches(self) -> tuple[int, int]:
        """The range of batches; (1, 1) where there is no batch."""
        return self.batch or (1, 1)

    @property
    def architecture(self) -> int:
        """The compute capability times ten; 0 where there are no images."""
        number = self.target.partition("sm_")[2]
        return int(number) if number.isdigit() else 0

    @cached_property
    def interface(self) -> Interface:
        """What a call takes and gives."""
        structure = Structure(
            pytree.tree_structure(as_nested(self.arguments)),
            pytree.tree_structure(as_nested(self.result)),
            self.results,
            self.names,
            tuple(port.name for port in self.inputs if port.spec.dtype is torch.uint8),
        )
        return Interface(self.inputs, structure, self.batch)

    def to_text(self) -> str:
        """One line per step."""
        return "".join(f"{step.line}\n" for step in self.steps)


@dataclass(frozen=True)
class Document:
    """All of plan.json. graphs: sha256 of each graph of graph.json; model: what the file is of."""

    format: str
    version: int
    model: str
    versions: tuple[tuple[str, str], ...]
    graphs: tuple[str, ...]
    programs: tuple[Program, ...]


def read_document(data: Any, source: str) -> Document:
    """The document of a parsed plan.json.

    Raises: ArtifactError for another format or version, or wrong fields.
    """
    found = data if isinstance(data, dict) else {}
    if found.get("format") != FORMAT:
        raise ArtifactError(f'{source} is not a convloom plan: expected "format": "{FORMAT}"')
    if found.get("version") != VERSION:
        raise ArtifactError(
            f"{source} has format version {str(found.get('version'))[:20]}; this convloom reads "
            f"version {VERSION}. Build the file again, or load it with the convloom that wrote it"
        )
    try:
        document: Document = Reader(source).read(Document, data, "plan")
    except RecursionError as error:
        raise ArtifactError(f"{source} is damaged: it is nested too deeply") from error
    return document


# Nested arguments and results.


def nest_of(spec: pytree.TreeSpec) -> Nest:
    """The structure as data.

    Raises: ArtifactError for containers other than tuple, list and dict: named tuples and the like
    would have to be imported by name when the file is loaded.
    """
    return _nest(pytree.tree_unflatten([_LEAF] * spec.num_leaves, spec))


_LEAF = object()


def _nest(value: Any) -> Nest:
    if value is _LEAF:
        return Nest("tensor")
    if isinstance(value, Constant):
        return Nest("constant", keys=(json.dumps(value.value),))
    if type(value) in (tuple, list):
        return Nest(type(value).__name__, tuple(map(_nest, value)))
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return Nest("dict", tuple(map(_nest, value.values())), tuple(value))
    raise ArtifactError(
        "cannot save an executable whose inputs or outputs are nested in "
        f"{type(value).__name__}; expected tuple, list, or dict with names as keys"
    )


def as_nested(nest: Nest) -> Any:
    """Containers of the structure, with None where tensors go."""
    if nest.kind == "constant":
        return Constant(json.loads(*nest.keys))
    items = [as_nested(item) for item in nest.items]
    if nest.kind == "dict":
        return dict(zip(nest.keys, items, strict=True))
    return {"tuple": tuple, "list": list}[nest.kind](items) if nest.kind != "tensor" else None


def check_nest(nest: Nest, where: str, constants: bool = False, depth: int = 0) -> int:
    """The number of tensors in a structure, which may have constants or not.

    Raises: ArtifactError where it is none.
    """
    kinds = ("tensor", "tuple", "list", "dict") + ("constant",) * constants
    if depth > DEEPEST or nest.kind not in kinds:
        raise ArtifactError(f"{where} is not a structure of tuples, lists and dicts")
    if nest.kind == "constant":
        _check_constant(nest, where)
        return 0
    count = len(nest.items)
    wanted = count if nest.kind == "dict" else 0
    if len(set(nest.keys)) != wanted or len(nest.keys) != wanted:
        raise ArtifactError(f"{where} is a {nest.kind} with {len(nest.keys)} keys")
    if nest.kind == "tensor" and count:
        raise ArtifactError(f"{where} is a tensor with items")
    leaves = sum(check_nest(item, where, constants, depth + 1) for item in nest.items)
    leaves += nest.kind == "tensor"
    if leaves > MOST_LEAVES:
        raise ArtifactError(f"{where} has more than {MOST_LEAVES} tensors")
    return leaves


def _check_constant(nest: Nest, where: str) -> None:
    try:
        (text,) = nest.keys
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = ...
    if nest.items or not isinstance(value, CONSTANTS) or json.dumps(value) != text:
        raise ArtifactError(f"{where} has a constant that is not a bool, number, text or null")
