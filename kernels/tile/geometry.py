"""What kernels know of images, windows, tiles and outputs at compile time, as named tuples.

A named tuple is one compile-time argument; kernels read its fields by name (`IMAGE.H`), functions
that are fields are called (`OUTPUT.epilogue(acc, ...)`). A field that gives a shape, or the length
of a `tl.static_range`, is first bound to a local constant: `R: tl.constexpr = WINDOW.R`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..contract import epilogue as ep
from ..contract.op import Config, Launch, Operand, Problem, Ref, operand_refs
from ..contract.spec import rows_and_columns

ROWS = ("BLOCK_M", "BLOCK_ROWS", "BLOCK_OUTER", "ROWS")
COLUMNS = ("BLOCK_N", "BLOCK_COLUMNS", "BLOCK_GROUPS")
"""What configurations call the rows and the columns of a tile."""
CLUSTER = "CLUSTER"
"""What they call that the programs which share the sums of a tile are a cluster (`split_k.py`)."""


class Matrix(NamedTuple):
    """A tensor that is read as rows of its innermost dimension: how long they are, the elements
    from one to the next, and those before the first."""

    C: int
    row_stride: int
    offset: int

    @staticmethod
    def of(x: Operand) -> Matrix:
        """Of a tensor of any rank."""
        return Matrix(rows_and_columns(x.spec)[1], x.pitch, x.offset)


class Walked(NamedTuple):
    """A tensor that is read while others are walked: a function that gives the offset of a row, the
    elements from one place of a row to the next, and those before the first row."""

    row: Any
    step: int
    offset: int

    @staticmethod
    def of(x: Operand, sizes: tuple[int, ...], strides: tuple[int, ...], step: int) -> Walked:
        """Along rows whose number is made of `sizes`, with these strides in x."""
        return Walked(ep.row_offset_function(sizes, strides), step, x.offset)


class Image(NamedTuple):
    """An NHWC tensor that is read: its height, width and channels, the elements from one pixel to
    the next, and those before the first."""

    H: int
    W: int
    C: int
    row_stride: int
    offset: int

    @staticmethod
    def of(x: Operand) -> Image:
        """Of a tensor (N, C, H, W)."""
        _, c, h, w = x.shape
        return Image(h, w, c, x.pitch, x.offset)


class Window(NamedTuple):
    """Which pixels an output pixel sees: R x S of them, from (p·stride_h − top, q·stride_w − left)
    on, each `dilation` from the one before."""

    R: int
    S: int
    stride_h: int = 1
    stride_w: int = 1
    top: int = 0
    left: int = 0
    dilation_h: int = 1
    dilation_w: int = 1

    @staticmethod
    def of(size: tuple[int, ...], attributes: Any) -> Window:
        """Of a filter or pooling window of that size, with the stride, padding and dilation of
        `attributes`; its padding is (top, left) or (top, bottom, left, right)."""
        padding = attributes.padding
        top, left = padding if len(padding) == 2 else (padding[0], padding[2])
        (r, s), (sh, sw), (dh, dw) = size, attributes.stride, attributes.dilation
        return Window(r, s, sh, sw, top, left, dh, dw)


class Tile(NamedTuple):
    """What one program computes: M rows (pixels) by N columns (channels), and K terms of their sums
    in a step, 0 where nothing is summed up.

    GROUP_M: tiles of rows that share the same columns one after the other. precision: of fp32
    products, as Triton names it. wide: whether offsets need 64 bits. rolled: from how many steps on
    the compiler is kept from unrolling the loop over them; 0 for never. cluster: whether programs
    that share sums are a cluster.
    """

    M: int
    N: int
    K: int = 0
    GROUP_M: int = 1
    precision: str = "ieee"
    wide: bool = False
    rolled: int = 0
    cluster: bool = False

    @staticmethod
    def of(problem: Problem, tile: Config, precision: str = "ieee") -> Tile:
        """Of a configuration with one of ROWS and one of COLUMNS, 1 where it has none. A band of
        TILE_ROWS rows of BLOCK_M is one tile; poolings have a tile of BLOCK_ROWS for each row."""
        sizes = dict(tile.blocks)
        m, n = (
            next((sizes[name] for name in names if name in sizes), 1) for names in (ROWS, COLUMNS)
        )
        m *= sizes.get("TILE_ROWS", 1) if "BLOCK_M" in sizes else 1
        k, group = sizes.get("BLOCK_K", 0), sizes.get("GROUP_M", 1)
        in_cluster = bool(sizes.get(CLUSTER, 0))
        return Tile(m, n, k, group, precision, problem.is_wide, cluster=in_cluster)


class Output(NamedTuple):
    """A tensor that is written as rows of its innermost dimension, of images pixels of channels:
    the height, width and channels, the elements from one row to the next and those before the
    first, and what is applied to a tile before it is stored (`contract/epilogue.py`)."""

    P: int
    Q: int
    K: int
    row_stride: int
    offset: int
    epilogue: Any

    @staticmethod
    def of(y: Operand, epilogue: Any) -> Output:
        """Of a tensor of any rank; P and Q are those of images."""
        *_, p, q = (1, 1, *y.shape[2:])
        return Output(p, q, rows_and_columns(y.spec)[1], y.pitch, y.offset, epilogue)


def own_pointers(kernel: Any, problem: Problem) -> dict[str, Ref]:
    """What the pointers stand for that a kernel takes in front of `extras`: the first inputs, then
    all outputs."""
    names = kernel.arg_names[: kernel.arg_names.index("extras")]
    read = len(names) - len(problem.outputs)
    refs = [Ref("input", at) if at < read else Ref("output", at - read) for at in range(len(names))]
    return dict(zip(names, refs, strict=True))


def tile_launch(
    problem: Problem,
    tile: Config,
    kernel: Any,
    *,
    constexprs: Mapping[str, Any],
    precision: str = "ieee",
    before: ep.Epilogue = (),
    output: Output | None = None,
    rolled: int = 0,
    pointers: Mapping[str, Ref] | None = None,
    extras: tuple[Ref, ...] = (),
    rows: int | None = None,
    columns: int | None = None,
    block_rows: int | None = None,
    groups: int = 1,
    programs: int = 1,
    **modelled: Any,
) -> Launch:
    """A launch of one program per tile of the output, whose kernel takes TILE and OUTPUT beside
    `constexprs`.

    pointers: those of the kernel, where they are others than `own_pointers`.
    before: stages in front of the epilogue; output: in place of the problem's first one and of
    both. extras: more tensors that the kernel reads, behind those of the epilogue and the prologue.
    rows: what `m` counts, by default the output's rows, of which a tile has `block_rows`; columns:
    what is cut into tiles of N, its channels by default. groups: of channels, which share no tile;
    programs: how many there are for each tile of M by N.
    modelled: what the cost model asks of a `Launch`.
    """
    out = problem.output
    if output is None:
        stages = (*before, *problem.epilogue)
        output = Output.of(out, ep.for_output(stages, problem.operands, out.spec))
    sizes = Tile.of(problem, tile, precision)._replace(rolled=rolled)
    prologue = (Ref("prologue", index) for index in range(len(problem.prologue_operands)))
    return Launch(
        kernel=kernel,
        pointers=own_pointers(kernel, problem) if pointers is None else pointers,
        extras=(*operand_refs(problem), *prologue, *extras),
        rows=rows_and_columns(out.spec)[0] if rows is None else rows,
        batch=out.spec.batch,
        block_rows=sizes.M if block_rows is None else block_rows,
        columns=-(-((columns or output.K) // groups) // sizes.N) * groups * programs,
        constexprs={"TILE": sizes, "OUTPUT": output, **constexprs},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **modelled,
    )
