"""What a module's example inputs must be."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ...errors import InvalidInputError
from ...kernels.contract.spec import FLOAT_DTYPES
from ..graph.interface import CONSTANTS, with_tensors
from ..onnx import model as onnx
from . import pt2

EXPECTED = (
    "model: expected a torch.nn.Module, a torch.export.ExportedProgram or the path of an .onnx or "
    ".pt2 file"
)


def opened(
    model: Any, example: Any, keywords: Mapping[str, Any] | None
) -> tuple[Any, Any, Mapping[str, Any] | None]:
    """The module of an exported program or of a file, and its own example where none is given; any
    other model as it is."""
    if isinstance(model, (str, Path)):
        suffix = Path(model).suffix
        if suffix not in (".onnx", ".pt2"):
            raise InvalidInputError(f"{EXPECTED}, got '{model}'")
        if suffix == ".onnx":
            network = onnx.load(model)
            if isinstance(example, tuple) and not example and not keywords:
                example = network.example()
            return network, example, keywords
        model = pt2.load(Path(model))
    if not isinstance(model, ExportedProgram):
        return model, example, keywords
    if isinstance(example, tuple) and not example and not keywords and model.example_inputs:
        example, keywords = model.example_inputs
    module: Any = model.module()
    stacks = (node.meta.get("nn_module_stack") for node in model.graph.nodes)
    if stack := next(filter(None, stacks), None):
        _, owner = next(iter(stack.values()))
        # Every GraphModule has a class of its own; results and errors name the module by it.
        type(module).__name__ = str(getattr(owner, "__name__", owner)).rpartition(".")[2]
    return module, example, keywords


def arguments_of(
    module: torch.nn.Module, example: Any, keywords: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an example as the module's `forward` takes them: by position where it can,
    up to the first constant that is given by name, so that calls may name it too.

    A tensor or an array stands for a tuple of it.

    Raises: InvalidInputError for an example that is no tuple, or keywords that are no mapping.
    """
    if isinstance(example, (torch.Tensor, np.ndarray)):
        example = (example,)
    if not isinstance(example, (tuple, list)):
        raise InvalidInputError(
            f"example inputs: expected a tuple of tensors, got {type(example).__name__}"
        )
    given = {} if keywords is None else keywords
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise InvalidInputError(f"kwargs: expected a dict by name, got {keywords!r}")
    positional, named = with_tensors((tuple(example), dict(given)))
    # An exported program takes by name what it took by name.
    if not named or isinstance(module, torch.fx.GraphModule):
        return positional, named
    try:
        signature = inspect.signature(module.forward)
        bound = signature.bind(*positional, **named)
    except (TypeError, ValueError):
        return positional, named  # torch.export says what does not fit.
    stop = len(positional)
    while stop < len(bound.args) and not _holds_a_constant(bound.args[stop]):
        stop += 1
    rest = dict(zip(list(signature.parameters)[stop:], bound.args[stop:], strict=False))
    return bound.args[:stop], {**rest, **bound.kwargs}


def names_of(module: torch.nn.Module) -> tuple[str, ...]:
    """What `forward` takes by position or by name; none where it takes any number of things."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return ()
    return tuple(each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD)


def _holds_a_constant(argument: Any) -> bool:
    return any(isinstance(leaf, CONSTANTS) for leaf in pytree.tree_leaves(argument))


def check_example(arguments: Any, dynamic: bool = False) -> list[torch.Tensor]:
    """The tensors of an example's arguments. dynamic: the batch varies, and may be none.

    Raises: InvalidInputError where one is not a tensor of floats with elements, and no constant.
    """
    leaves = pytree.tree_leaves(arguments)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    for at, leaf in enumerate(leaves):
        if isinstance(leaf, CONSTANTS):
            continue
        if not isinstance(leaf, torch.Tensor):
            raise InvalidInputError(
                f"example input {at}: expected a tensor or a constant (bool, int, float, str, "
                f"None), got {type(leaf).__name__}"
            )
        if leaf.layout is not torch.strided or leaf.is_nested:
            kind = "a nested one" if leaf.is_nested else str(leaf.layout)
            raise InvalidInputError(f"example input {at}: expected a dense tensor, got {kind}")
        if leaf.dtype not in (*FLOAT_DTYPES, torch.uint8, torch.bool):
            both = "convert both, model.float() and x.float()"
            hint = both if leaf.dtype is torch.float64 else "convert it outside, x.float()"
            raise InvalidInputError(
                f"example input {at}: expected float32, float16 or bfloat16, got {leaf.dtype}; "
                f"{hint}"
            )
        samples = leaf.shape[1:] if dynamic else leaf.shape
        if 0 in samples:
            raise InvalidInputError(
                f"example input {at}: expected at least one element, got shape {tuple(leaf.shape)}"
                "; for empty batches pass dynamic_batch=(0, highest)"
            )
    if not tensors:
        raise InvalidInputError("example inputs: expected a tuple of tensors, got nothing")
    return tensors


def has_no_samples(arguments: Any) -> bool:
    """Whether each tensor of an example is an empty batch."""
    leaves = pytree.tree_leaves(arguments)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    shapes = [tensor.shape for tensor in tensors if not tensor.is_nested]
    same = len(shapes) == len(tensors)
    return bool(shapes) and same and all(shape[:1] == (0,) for shape in shapes)


def bounds_of(bounds: Any) -> tuple[int, int]:
    """The lowest and the highest batch of a range.

    Raises: InvalidInputError for what is no pair of whole numbers, or makes no sense.
    """
    pair = tuple(bounds) if isinstance(bounds, (tuple, list)) else ()
    whole = [value for value in pair if isinstance(value, Integral) and not isinstance(value, bool)]
    if len(pair) != 2 or len(whole) != 2:
        raise InvalidInputError(
            f"dynamic_batch: expected (lowest, highest), got {bounds!r}; both are whole numbers"
        )
    low, high = map(int, pair)
    if not 0 <= low <= high or high < 1:
        raise InvalidInputError(
            "dynamic_batch: expected 0 <= lowest <= highest and at least 1 as highest, got "
            f"{bounds}"
        )
    return low, high


def check_range(bounds: Any, leaves: list[torch.Tensor]) -> tuple[int, int]:
    """The range. Raises: InvalidInputError for one that makes no sense, or inputs without a
    batch."""
    found = bounds_of(bounds)
    for at, leaf in enumerate(leaves):
        if leaf.dim() == 0:
            raise InvalidInputError(f"example input {at}: a scalar has no batch dimension")
    return found


def place_of(module: torch.nn.Module, leaves: list[torch.Tensor]) -> torch.device:
    """Where torch.export is to find everything: beside the module's weights, wherever the example
    lies; beside the example where there are none."""
    held = itertools.chain(module.parameters(), module.buffers(), leaves)
    return next(held).device


def stand_in(x: torch.Tensor, place: torch.device) -> torch.Tensor:
    """What torch.export sees of the input: of a view, a tensor of its shape with memory of its own.
    For a view it would make up a base with symbolic strides, which takes 60 ms. What is larger than
    its memory (an expanded example of an absurd shape) stays as it is."""
    if x.device != place:
        return torch.empty(x.shape, dtype=x.dtype, device=place)
    is_plain = x.is_contiguous() and not x._is_view() and not x.is_inference()
    if is_plain or x.untyped_storage().nbytes() < x.numel() * x.element_size():
        return x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def two_samples(x: torch.Tensor, place: torch.device) -> torch.Tensor:
    """The input with a batch of two: torch.export specialises a dimension of size 1."""
    if x.shape[0] == 0:
        return torch.empty(2, *x.shape[1:], dtype=x.dtype, device=place)
    return x[:1].expand(2, *x.shape[1:]).contiguous().to(place)


def check_module(module: Any) -> None:
    """Raises: InvalidInputError."""
    if not isinstance(module, torch.nn.Module):
        raise InvalidInputError(f"{EXPECTED}, got {type(module).__name__}")
