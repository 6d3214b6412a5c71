"""Examples and near misses of the rules of `compiler/passes/rearrangements.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import nn

from ..properties.example import Example, NearMiss, example

SIDES = ("left", "right")


def _cut_across(m: Any, x: Any) -> Any:
    return F.channel_shuffle(x, 2).reshape(2, 8, 3, 8) * 2


def _attention(side: str, name: str) -> Any:
    """A product one of whose factors is permuted, or made by a channel shuffle."""

    def run(m: Any, x: Any, r: Any) -> Any:
        moved = x.transpose(2, 3) if name == "permute" else F.channel_shuffle(x, 2)
        return moved @ r if side == "left" else r @ moved

    return example(run, (2, 4, 6, 6), (2, 4, 6, 6))


def _merged(side: str) -> Any:
    """Rows and columns of a pixel shuffle's result are two dimensions of its input each."""

    def run(m: Any, x: Any, r: Any) -> Any:
        moved = F.pixel_shuffle(x, 2)
        return moved @ r if side == "left" else r @ moved

    return example(run, (2, 4, 3, 3), (2, 1, 6, 6))


EXAMPLES = {
    "permute(reshape(x)) => rearrange(x)": Example(
        lambda: example(
            lambda m, x: m["b"](m["a"](x).flatten(2).transpose(1, 2)),
            (2, 6, 7, 5),
            a=nn.Conv2d(6, 8, 1),
            b=nn.Linear(8, 3),
        )
    ),
    "reshape(permute(x)) => rearrange(x)": Example(
        lambda: example(
            lambda m, x: m["b"](m["a"](x).transpose(1, 2).reshape(x.shape[0], 8, 7, 5)),
            (2, 35, 6),
            a=nn.Linear(6, 8),
            b=nn.Conv2d(8, 3, 1),
        )
    ),
    "reshape(rearrange(x)) => rearrange(x)": Example(
        lambda: example(
            lambda m, x: F.channel_shuffle(m["a"](x), 2).reshape(2, 2, 4, 35).sum(2),
            (2, 6, 7, 5),
            a=nn.Conv2d(6, 8, 1),
        ),
        (NearMiss(lambda: example(_cut_across, (2, 8, 4, 6)), "cut across dimensions"),),
    ),
    "permute(rearrange(x)) => rearrange(x)": Example(
        lambda: example(
            lambda m, x: F.pixel_shuffle(m["a"](x), 2).permute(0, 2, 3, 1),
            (2, 6, 7, 5),
            a=nn.Conv2d(6, 8, 1),
        )
    ),
    **{
        f"bmm(permute(a), b) => bmm(a, b, {side})": Example(partial(_attention, side, "permute"))
        for side in SIDES
    },
    **{
        f"bmm(rearrange(a), b) => bmm(a, b, {side})": Example(
            partial(_attention, side, "rearrange"),
            (NearMiss(partial(_merged, side), "no single stride"),),
        )
        for side in SIDES
    },
}
