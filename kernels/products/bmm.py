"""bmm: y[..., i, j] = sum_k a[..., i, k] b[..., k, j], products of pairs of activations.

a: (..., M, K), b: (..., K, N) -> y: (..., M, N), dense; fp32 sums. Leading dimensions are equal, or
1 in a factor that is the same all along it: a learned matrix for every sample.
Attributes rearrange the factors first, so that heads of attention and transposed factors are read
where they lie, in any layout: the kernel takes one stride for each dimension of a product, and for
each part that the products' number is made of.

One program computes one tile of one product; fp32 is as exact as in `linear.py`. Attention is
bmm, softmax, bmm: correct, but its matrix of scores goes through memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract.aten import Arguments, Builder
from ..contract.epilogue import Stage
from ..contract.op import Attributes, Config, Launch, Op, Problem, Target, counted
from ..contract.spec import Layout, Operand, TensorSpec
from ..movement.movement import Permute
from ..movement.pointwise import Pointwise
from ..movement.rearrange import infer_rearrange, rearrange
from ..movement.rearrangement import Expand, Rearrange, Reshape, parts_of
from ..normalisation.softmax import Softmax
from ..tile import choice, space
from ..tile.finish import put
from ..tile.geometry import tile_launch


@dataclass(frozen=True)
class Bmm(Attributes):
    """What is done to the factors before they are multiplied; None leaves them alone.

    wide: products stay fp32, whatever the factors are: scores of attention in half precision would
    overflow, and torch never stores them.
    """

    left: Rearrange | None = None
    right: Rearrange | None = None
    wide: bool = False


def factor(attributes: Rearrange | None, spec: TensorSpec) -> TensorSpec:
    """A factor as it is multiplied."""
    return spec if attributes is None else infer_rearrange(attributes, (spec,))[0]


@dataclass(frozen=True)
class Factor:
    """How a factor is read: sizes and strides of the parts of its leading dimensions, and strides
    of its rows and columns."""

    sizes: tuple[int, ...]
    leading: tuple[int, ...]
    rows: int
    columns: int


def factor_of(
    attributes: Rearrange | None, operand: Operand, leading: tuple[int, ...] | None = None
) -> Factor | None:
    """How a factor is read, or None where its rows or columns have no single stride.

    leading: the product's leading dimensions, where a factor of 1 is read again and again.
    """
    if attributes is None:
        *steps, rows, columns = operand.strides
        sizes = operand.shape[:-2]
        return _repeated(Factor(sizes, tuple(steps), rows, columns), sizes, leading)
    out = infer_rearrange(attributes, (operand.spec,))[0].with_(layout=Layout.DENSE)
    parts = parts_of(attributes, operand, out)
    single = []
    for taken in parts.groups[-2:]:
        steps = [parts.read[part] for part in taken if attributes.parts[part] != 1]
        if len(steps) > 1:
            return None
        single.append(steps[0] if steps else 0)
    count = sum(len(taken) for taken in parts.groups[:-2])
    read = Factor(parts.sizes[:count], parts.read[:count], single[0], single[1])
    return _repeated(read, out.shape[:-2], leading)


def _repeated(read: Factor, own: tuple[int, ...], leading: tuple[int, ...] | None) -> Factor:
    """The factor read along leading dimensions, some of which it has not."""
    if leading in (None, own):
        return read
    assert leading is not None
    if math.prod(own) == 1:
        return replace(read, sizes=leading, leading=(0,) * len(leading))
    # Parts of one element tell nothing; of the others each dimension has those that fill it.
    parts = [part for part in zip(read.sizes, read.leading, strict=True) if part[0] != 1]
    sizes: list[int] = []
    steps: list[int] = []
    for size, wanted in zip(own, leading, strict=True):
        if size == 1:
            sizes.append(wanted)
            steps.append(0)
        while size > 1:
            part, step = parts.pop(0)
            size //= part
            sizes.append(part)
            steps.append(step)
    return replace(read, sizes=tuple(sizes), leading=tuple(steps))


def infer(attributes: Bmm, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """(..., M, K) and (..., K, N) give (..., M, N)."""
    a, b = inputs
    left, right = factor(attributes.left, a).shape, factor(attributes.right, b).shape
    agree = (
        len(left) == len(right) > 1
        and left[-1] == right[-2]
        and all(m == n or 1 in (m, n) for m, n in zip(left[:-2], right[:-2], strict=True))
    )
    if not agree:
        raise InvalidInputError(
            f"bmm: expected (..., M, K) and (..., K, N), got {left} and {right} of {a} and {b}"
        )
    leading = tuple(map(max, left[:-2], right[:-2]))
    batch = a.batch or b.batch
    firsts = [shape[0] for spec, shape in ((a, left), (b, right)) if spec.batch is None]
    shared = all(first == 1 for first in firsts)
    apart = not shared or (not firsts and left[0] != right[0])
    if batch is not None and (len(left) < 3 or apart):
        raise InvalidInputError(
            "bmm: both factors of each product must belong to one sample of the batch, or one of "
            f"them to all, got {a} and {b}"
        )
    dtype = torch.float32 if attributes.wide else a.dtype
    return (TensorSpec((*leading, left[-2], right[-1]), dtype, batch=batch),)


def reference(attributes: Bmm, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if attributes.wide and a.dtype is not torch.float64:
        a, b = a.float(), b.float()
    a = a if attributes.left is None else rearrange(attributes.left, a)
    return a @ (b if attributes.right is None else rearrange(attributes.right, b))


class Strides(NamedTuple):
    """Of a factor: a function that finds the first element of a product's matrix, the elements
    before all of them, and the strides of its rows and columns."""

    start: Any
    offset: int
    rows: int
    columns: int

    @staticmethod
    def of(attributes: Rearrange | None, operand: Operand, leading: tuple[int, ...]) -> Strides:
        """Of a factor of products with these leading dimensions."""
        read = factor_of(attributes, operand, leading)
        assert read is not None
        start = ep.row_offset_function(read.sizes, read.leading)
        return Strides(start, operand.offset, read.rows, read.columns)


@triton.jit
def bmm_kernel(
    x, w, y, extras, m, HEIGHT: tl.constexpr, DEPTH: tl.constexpr, X: tl.constexpr,
    W: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # m counts products; the tiles of one are neighbours, and share its factors in L2.
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    row_tiles: tl.constexpr = (HEIGHT + BLOCK_M - 1) // BLOCK_M
    column_tiles: tl.constexpr = (OUTPUT.K + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    matrix = program // (row_tiles * column_tiles)
    row_tile, column_tile = space.tile_index(
        program % (row_tiles * column_tiles), row_tiles, column_tiles, TILE.GROUP_M
    )
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    row_mask = rows < HEIGHT
    column_mask = columns < OUTPUT.K
    if TILE.wide:
        matrix = matrix.to(tl.int64)
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
        depth = depth.to(tl.int64)
    x_rows = x + X.offset + X.start(matrix) + (rows * X.rows)[:, None]
    w_columns = w + W.offset + W.start(matrix) + (columns * W.columns)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        at = depth + start
        inside = at < DEPTH
        a_mask = row_mask[:, None] & inside[None, :]
        b_mask = inside[:, None] & column_mask[None, :]
        a = tl.load(x_rows + (at * X.columns)[None, :], mask=a_mask, other=0.0)
        b = tl.load(w_columns + (at * W.rows)[:, None], mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=TILE.precision)
    rows = matrix * HEIGHT + rows
    put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


def size_of(problem: Problem) -> choice.Size:
    """The rows of one product, its columns and depth, and the products side by side."""
    attributes, a, out = problem.attributes.expect(Bmm), problem.inputs[0], problem.output
    *leading, rows, columns = out.shape
    depth = factor(attributes.left, a.spec).shape[-1]
    return choice.Size(rows, columns, depth, a.spec.dtype, groups=math.prod(leading))


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    attributes, (a, b), size = problem.attributes.expect(Bmm), problem.inputs, size_of(problem)
    leading = problem.output.shape[:-2]
    launch = tile_launch(
        problem, tile, bmm_kernel,
        constexprs={
            "HEIGHT": size.rows, "DEPTH": size.depth,
            "X": Strides.of(attributes.left, a, leading),
            "W": Strides.of(attributes.right, b, leading),
        },
        precision=choice.dot_precision(problem, size.depth),
        rows=size.groups,
        block_rows=1,
        programs=-(-size.rows // tile["BLOCK_M"]),
        l2_bytes=choice.l2_bytes(problem, tile, size.depth),
        steps=size.steps(tile["BLOCK_K"]),
        step_instructions=choice.step_instructions(tile, size.dtype, taps=1),
    )  # fmt: skip
    return (launch,)


def multiplied(
    g: Builder, a: Any, b: Any, stages: ep.Epilogue = (), *operands: Any, wide: bool = False
) -> Any:
    """The product of factors whose leading dimensions broadcast; a constant factor is a weight."""
    left, right = g.spec(a), g.spec(b)
    if left.rank < 2 or right.rank < 2:
        return g.refuse("products with vectors; unsqueeze them to matrices")
    if right.rank == 2 and g.constant(b) is not None:
        weight = g.apply("permute", (b,), Permute((1, 0)))
        return g.apply("linear", (a, weight, *operands), epilogue=stages)
    if right.rank == 2 < left.rank and left.batch is right.batch is None:
        rows = g.apply("reshape", (a,), Reshape((math.prod(left.shape[:-1]), left.shape[-1])))
        y = multiplied(g, rows, b, stages, *operands, wide=wide)
        return g.apply("reshape", (y,), Reshape((*left.shape[:-1], right.shape[-1])))
    if (left.batch is None) != (right.batch is None):
        # What all samples share is read again for each; the batch is not expanded to.
        if left.batch is not None and left.rank == 2:
            depth = left.shape[1]
            rows = g.apply(
                "reshape", (a,), Reshape((left.batch, left.shape[0] // left.batch, depth))
            )
            y = multiplied(g, rows, b, stages, *operands, wide=wide)
            return g.apply("reshape", (y,), Reshape((left.shape[0], right.shape[-1])))
        rank = max(left.rank, right.rank)
        a, b = (_of_rank(g, value, rank) for value in (a, b))
        return g.apply("bmm", (a, b, *operands), Bmm(wide=wide), stages)
    leading = tuple(torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]))
    factors = []
    for value, spec in ((a, left), (b, right)):
        if spec.shape[:-2] != leading:
            kept = spec.rank == len(leading) + 2
            old = spec.shape[:-2] if kept else (None,) * len(leading)
            new = [-1 if one == size else size for one, size in zip(old, leading, strict=True)]
            tail = spec.shape[-2:] if not kept else (-1, -1)
            value = g.apply("expand", (value,), Expand((*new, *tail)))
        factors.append(value)
    return g.apply("bmm", (*factors, *operands), Bmm(wide=wide), stages)


def _of_rank(g: Builder, x: Any, rank: int) -> Any:
    """A tensor with leading dimensions of 1 up to a rank."""
    shape = g.spec(x).shape
    missing = rank - len(shape)
    return g.apply("reshape", (x,), Reshape((*(1,) * missing, *shape))) if missing else x


def scaled(g: Builder, x: Any, factor: float) -> Any:
    """factor · x; None for nothing, whatever x has."""
    if factor in (0, 1):
        return x if factor else None
    return g.apply("mul", (x,), Pointwise(literal=float(factor)))


def _capture_baddbmm(g: Builder, a: Arguments) -> Any:
    """beta · c + alpha · a b."""
    scale = (Stage("mul", literal=float(a.alpha)),) if a.alpha != 1 else ()
    if (added := scaled(g, a.self, a.beta)) is None:
        return multiplied(g, a.batch1, a.batch2, scale)
    return multiplied(g, a.batch1, a.batch2, (*scale, Stage("add")), added)


def _added(g: Builder, seen: torch.Tensor, dtype: torch.dtype) -> Any:
    """A mask of what is seen as the numbers to add to scores: 0, or minus infinity."""
    return g.add_constant(torch.zeros(seen.shape).masked_fill(~seen, -math.inf), dtype)


def _capture_attention(g: Builder, a: Arguments) -> Any:
    """softmax(q kᵀ · scale + mask) v."""
    q, k, v, mask = a.query, a.key, a.value, a.attn_mask
    spec = g.spec(q)
    if a.dropout_p or a.enable_gqa:
        return g.refuse("attention with dropout or enable_gqa")
    if not spec.rank == g.spec(k).rank == g.spec(v).rank >= 3:
        return g.refuse("attention of factors of different ranks, or without leading dimensions")
    dims = tuple(range(spec.rank))
    keys = g.apply("permute", (k,), Permute((*dims[:-2], dims[-1], dims[-2])))
    factor = 1 / math.sqrt(spec.shape[-1]) if a.scale is None else float(a.scale)
    stages: ep.Epilogue = (Stage("mul", literal=factor),)
    if a.is_causal:
        triangle = torch.ones(spec.shape[-2], g.spec(k).shape[-2], dtype=torch.bool).tril()
        mask = _added(g, triangle, spec.dtype)
    elif mask is not None and g.spec(mask).dtype is torch.bool:
        if (seen := g.constant(mask)) is None:
            return g.refuse("attention with a mask of booleans that is computed; make it a buffer")
        mask = _added(g, seen, spec.dtype)
    added = () if mask is None else (mask,)
    stages = (*stages, Stage("add")) if added else stages
    scores = multiplied(g, q, keys, stages, *added, wide=True)
    weights = g.apply("softmax", (scores,), Softmax(dims[-1], spec.dtype))
    return multiplied(g, weights, v)


OP = Op(
    "bmm", Bmm, infer, reference, launches, counted(lambda problem: size_of(problem).flops),
    **choice.of_product(size_of),
    aten={
        "aten.bmm.default": lambda g, a: multiplied(g, a.self, a.mat2),
        "aten.mm.default": lambda g, a: multiplied(g, a.self, a.mat2),
        "aten.matmul.default": lambda g, a: multiplied(g, a.self, a.other),
        "aten.baddbmm.default": _capture_baddbmm,
        "aten.scaled_dot_product_attention.default": _capture_attention,
    },
    images=False, follows=True, factors=(0, 1),
)  # fmt: skip
