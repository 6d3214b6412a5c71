"""Motifs of attention: products of activations, and what moves their factors about.

Heads are split, permuted and merged in every spelling that networks use; besides, chains of moves
that nobody would write, since rewrites put them together whatever they are.
"""

from __future__ import annotations

import math

from .builder import Builder, UnsuitableError
from .motifs import linear

TOKENS, WIDTH, DEPTH = (4, 6, 9), (8, 12), 4
MOST_MOVES = 4


def _tokens(b: Builder) -> str:
    """A sequence (N, L, C): one that is there, or an input."""
    try:
        return b.pick(3, where=lambda shape: shape[1] >= 2 and 4 <= shape[2] <= 16)
    except UnsuitableError:
        return b.input(b.one(*TOKENS), b.one(*WIDTH))


def _moved(b: Builder, x: str) -> str:
    """One move of a value of which dimension 0 stays the batch."""
    shape = b.shape(x)
    rank = len(shape)
    dim = b.random.randrange(1, rank)
    size = shape[dim]
    half = max(1, size // 2)
    at = b.random.randrange(size)
    order = ", ".join(map(str, b.random.sample(range(1, rank), rank - 1)))
    end = f"{x}.narrow({dim}, {half}, {size - half})"
    moves = [
        f"{x}.permute(0, {order})",
        f"{x}.transpose({dim}, {b.random.randrange(1, rank)})",
        f"{x}.flip({dim})",
        f"torch.roll({x}, {at}, {dim})",
        f"{x}.narrow({dim}, {at // 2}, {half})",
        f"{x}.chunk(2, {dim})[{min(at, 1)}]",
        f"{x}.split([{half}, {size - half}], {dim})[0]",
        f"torch.cat([{end}, {x}.narrow({dim}, 0, {half})], {dim})",
        f"{x}.flatten({max(1, dim - 1)}, {dim})",
        *(f"{x}.unflatten({dim}, ({part}, -1))" for part in (2, 3) if size % part == 0),
    ]
    if rank > 3:
        moves += [f"{x}.select({dim}, {at})", f"{x}.unbind({dim})[{at}]"]
    else:
        moves.append(f"torch.stack([{x}, {x}.flip({dim})], {dim})")
    inner = math.prod(shape[1:])
    for part in (2, 3, 4):
        if inner % part == 0:
            sides = b.random.sample((part, inner // part), 2)
            moves.append(f"{x}.reshape(-1, {sides[0]}, {sides[1]})")
    return b.let(b.random.choice(moves))


def moved_product(b: Builder) -> None:
    """A product whose factors have been moved about at random, and its own result, too."""
    x = _tokens(b)
    y = linear(b, x, b.one(12, 16, 24)) if b.chance(0.7) else x
    left, right = y, y
    for _ in range(b.random.randint(1, MOST_MOVES)):
        left = _moved(b, left)
    for _ in range(b.random.randint(0, MOST_MOVES)):
        right = _moved(b, right)
    y = _product(b, left, right)
    if b.chance(0.5):
        y = b.let(f"F.softmax({y}, -1)")
    for _ in range(b.random.randint(0, 2)):
        y = _moved(b, y)
    if b.chance(0.5):
        _product(b, y, b.one(left, right, y))


def _product(b: Builder, left: str, right: str) -> str:
    """The product in whichever way the shapes allow; of the left factor with itself, if in none."""
    if len(b.shape(left)) != len(b.shape(right)) or len(b.shape(left)) < 3:
        right = left  # Else dimension 0 of one might be taken for a row of the other.
    if len(b.shape(left)) < 3:
        b.dynamic = False  # Rows are samples, which the product with itself joins.
    texts = [f"{left} @ {right}", f"{left} @ {right}.transpose(-2, -1)",
             f"{left}.transpose(-2, -1) @ {right}", f"{right} @ {left}"]  # fmt: skip
    b.random.shuffle(texts)
    for text in (*texts, f"{left} @ {left}.transpose(-2, -1)"):
        try:
            return b.let(text)
        except UnsuitableError:
            continue
    raise UnsuitableError("no product of these shapes")


def attention(b: Builder) -> None:
    """Heads as networks write them, and what is done with them, in turn."""
    x = _tokens(b)
    length, width = b.shape(x)[1:]
    heads = b.one(1, 2)
    q, k, v = _heads(b, x, heads)
    form = b.alternative("scaled", "fused", "linear", "channels", "biased", "masked")
    if form == "linear":
        y = b.let(f"torch.relu({q}) @ (torch.relu({k}).transpose(-2, -1) @ {v})")
    elif form == "channels":
        scores = b.let(f"F.normalize({q}, dim=-2).transpose(-2, -1) @ F.normalize({k}, dim=-2)")
        y = b.let(f"{v} @ F.softmax({scores}, -1).transpose(-2, -1)")
    elif form == "fused":
        y = b.let(f"F.scaled_dot_product_attention({q}, {k}, {v}, is_causal={b.chance(0.5)})")
    elif form == "masked":
        mask = b.layer(f"nn.Parameter(torch.randn({length}, {length}))")
        y = b.let(f"F.scaled_dot_product_attention({q}, {k}, {v}, attn_mask={mask}, scale=0.3)")
    else:
        scores = b.let(f"({q} * {DEPTH}**-0.5) @ {k}.transpose(-2, -1)")
        if form == "biased":
            table = b.layer(f"nn.Parameter(torch.randn({heads}, {length}, {length}))")
            scores = b.let(f"{scores} + {table}")
        y = b.let(f"F.softmax({scores}, -1) @ {v}")
    shape = f"(-1, {length}, {heads * DEPTH})"
    merged = b.one(f"{y}.transpose(1, 2).reshape{shape}", f"{y}.permute(0, 2, 1, 3).flatten(2)")
    linear(b, b.let(merged), width)


def _heads(b: Builder, x: str, heads: int) -> list[str]:
    """Queries, keys and values, (N, heads, L, DEPTH) each."""
    length, wide = b.shape(x)[1], heads * DEPTH
    view = f".view(-1, {length}, {heads}, {DEPTH}).transpose(1, 2)"
    form = b.alternative("apart", "unbind", "chunk", "split", "windows")
    if form == "apart":
        return [b.let(f"{linear(b, x, wide)}{view}") for _ in range(3)]
    y = linear(b, x, 3 * wide)
    if form == "windows":
        y = b.let(f"torch.roll({y}, 1, 1)")
    parts = {
        "unbind": f"{y}.reshape(-1, {length}, 3, {heads}, {DEPTH}).unbind(2)[{{0}}]"
        ".transpose(1, 2)",
        "windows": f"{y}.view(-1, {length}, {heads}, 3, {DEPTH}).select(3, {{0}}).transpose(1, 2)",
        "chunk": f"{y}.chunk(3, -1)[{{0}}]{view}",
        "split": f"{y}.view(-1, {length}, {heads}, {3 * DEPTH}).split([{DEPTH}] * 3, dim=3)[{{0}}]"
        ".permute(0, 2, 1, 3)",
    }[form]
    return [b.let(parts.format(at)) for at in range(3)]


MOTIFS = (attention, moved_product, moved_product)
