"""What capture refuses, and why: the op, its module path, the user's line, and what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...errors import CaptureError, UnsupportedOpError
from ...kernels import registry
from ...kernels.contract.op import Arguments, Builder, Capture, Op
from ..graph.torch_call import BatchNumber
from .batch_numbers import Batch, Decision, follows_from_values
from .export import path_of, source_of


class Refused(Exception):
    """A call has no kernel; carries the reason."""


def module_in_words(path: str) -> str:
    """A module path."""
    return f"'{path}'" if path else "the top module"


def line_in_words(source: str) -> str:
    """The user's line, behind a name."""
    return f" at {source}" if source else ""


def called(node: Any) -> str:
    """The module, the call and the user's line of a node of an exported program."""
    return f"{module_in_words(path_of(node))}: {node.target}{line_in_words(source_of(node))}"


INSTEAD = {
    "scatter": "compare the indices with torch.arange and choose with torch.where",
    "scatter_add": "multiply by torch.nn.functional.one_hot of the indices, and sum",
    "bucketize": "compare with each boundary, and add up what is true as floats",
    "searchsorted": "compare with each boundary, and add up what is true as floats",
    "histc": "compare with each boundary, and add up what is true as floats",
    "median": "take the middle of torch.sort, of at most 64 elements",
    "kthvalue": "take one of torch.sort, of at most 64 elements",
    "unfold": "windows along the batch, or beside medians, are not taken; pass them as an input",
    "diagonal": "multiply by torch.eye, and sum",
    "_trilinear": "write it with torch.einsum",
}
"""What does the same as an ATen call without a kernel."""


def why_unknown(target: str) -> str:
    """Why an ATen call has no kernel, and which other overloads of it, or what else, have."""
    if target.startswith("aten.fft_"):
        return (
            "Fourier transforms are computed along dimensions of a fixed size (fft, ifft, rfft, "
            "irfft, in 1, 2 or n dimensions), where nothing but sums, products, absolute values, "
            "angles, parts and movements is made of complex tensors; compute anything else with "
            "their real and imaginary parts (torch.view_as_real)"
        )
    name = target.rpartition(".")[0]
    others = sorted(known for known in registry.CAPTURES if known.rpartition(".")[0] == name)
    way_out = INSTEAD.get(name.removeprefix("aten."))
    also = f", but for {', '.join(others)}" if others else ""
    return f"no kernel for this op{also}" + (f"; {way_out}" if way_out else "")


def results_of(value: Any) -> Sequence[torch.Tensor]:
    """The results of a call, one or several."""
    return value if isinstance(value, (list, tuple)) else [value]


def refuse_branches(module: torch.nn.Module, decisions: list[Decision], batch: Batch) -> None:
    """Raises: CaptureError for code that does something else for one sample, where the range holds
    1: torch.export has traced what it does for more."""
    if batch.lowest > 1:
        return
    for decision in decisions:
        if decision.differs_at_one(batch.symbol):
            example = "(2, 2)" if batch.highest < 2 else f"(2, {batch.highest})"
            raise CaptureError(
                f"{type(module).__name__} decides by the batch: {decision.question} at "
                f"{decision.line} (N is the batch) is not the same for a batch of 1, which "
                f"dynamic_batch=({batch.lowest}, {batch.highest}) allows, and for larger ones. "
                f"Compile it for one sample without dynamic_batch, or with dynamic_batch={example}"
            )


def refuse_numbers(a: Arguments, known: Sequence[str] = ()) -> None:
    """Raises: Refused for a call that needs a complex number, or, but for some arguments, one that
    depends on the batch."""
    for name, argument in a.given.items():
        for leaf in pytree.tree_leaves(argument):
            if isinstance(leaf, BatchNumber) and name not in known:
                raise Refused(
                    f"its argument '{name}' is {leaf} where N is the batch: no kernel is given the "
                    "batch of a call as a number. Compile for one batch (without dynamic_batch), "
                    "or pass what depends on it as an input"
                )
            if isinstance(leaf, complex):
                raise Refused(f"its argument '{name}' is {leaf}, and no kernel takes it")


def read_whole(function: Capture, g: Builder, a: Arguments) -> Any:
    """What a capture function makes of a call. Raises: Refused for a call with an argument that the
    function does not know, as another version of torch may add one."""
    result = function(g, a)
    for name in a.unread:
        raise Refused(f"its argument '{name}' is {a.given[name]!r}: only the default is known")
    return result


def refuse_unbatched(g: Builder, op: Op, target: str, a: Arguments) -> None:
    """Raises: Refused where an image, which the name of the call tells, has no batch."""
    image = re.search(r"(\d)d", target)
    if op.batched and image and g.spec(a.first).rank != int(image[1]) + 2:
        raise Refused(f"unbatched {op.batched}; pass a batch dimension")


def refuse_unbounded(node: Any, batch: Batch | None) -> None:
    """Raises: UnsupportedOpError for control flow, and for results whose size only the values of a
    tensor tell, or whose rank the batch does: what follows cannot be planned."""
    if not hasattr(node.target, "_schema"):
        raise UnsupportedOpError(
            f"{called(node)}: no kernel calls functions (control flow by the values of a tensor, "
            "checkpoints, regions of autocast or no_grad). Compute both sides and choose with "
            "torch.where, or leave the region out: executables have no gradients"
        )
    a = Arguments(node.target._schema, node.args, node.kwargs)
    x = a.first.meta.get("val") if isinstance(a.first, torch.fx.Node) else None
    if batch is not None and isinstance(x, torch.Tensor):
        dim = batch.may_drop(str(node.target), a, x.shape)
        if dim is not None:
            raise UnsupportedOpError(
                f"{called(node)}: it drops dimension {dim} where the batch is 1, which the "
                "range of dynamic_batch allows, and has another rank then. Name other "
                "dimensions to drop, such as squeeze(1) or flatten(1), or compile with "
                "dynamic_batch=(2, ...)"
            )
    for tensor in results_of(node.meta["val"]):
        sizes = tensor.shape if isinstance(tensor, torch.Tensor) else ()
        if any(follows_from_values(size, batch) for size in sizes):
            raise UnsupportedOpError(
                f"{called(node)}: how large its result is depends on the values of a tensor. "
                "Where that is a mask of booleans which never changes, keep the indices as a "
                "buffer instead (mask.nonzero().squeeze(1)); else mask with torch.where"
            )
