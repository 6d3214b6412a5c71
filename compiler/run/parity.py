"""How far an executable is from the exact network: `convloom verify`.

The truth is fp64, the yardstick is what PyTorch's own rounding does in the same dtype, and what is
allowed is `kernels/contract/tolerance.py`, as for every test.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from ...errors import InvalidInputError
from ...kernels.contract import tolerance
from ...kernels.tile.torch_convolution import SoundConvolutions
from ..evaluation.evaluate import evaluate, relative_error
from ..evaluation.validate import Validation, agree
from ..graph.ir import Graph, Value
from ..plan.plan import Step

if TYPE_CHECKING:
    from .executable import Executable

TOP = 5
IMAGE_RANKS = (4, 5)
Truth = Callable[[Sequence[torch.Tensor]], tuple[list[torch.Tensor], list[torch.Tensor]]]
"""From inputs: the results in fp64, and PyTorch's own in the dtype that is computed in."""
Placing = Callable[[Sequence[torch.Tensor]], tuple[tuple[Any, ...], dict[str, Any]]]
"""From inputs: the arguments and keywords of a call with them."""


@dataclass(frozen=True)
class OutputParity:
    """One output. compiled, eager: largest errors against fp64, relative to the rms of the output;
    worst: its worst element, None where nothing is finite; problem: what is wrong, in words."""

    name: str
    compiled: float
    eager: float
    worst: tolerance.Worst | None
    problem: str | None


@dataclass(frozen=True)
class Layer:
    """What one call of a module inside of a network returned: in fp64, and in another dtype."""

    path: str
    exact: torch.Tensor
    eager: torch.Tensor


@dataclass(frozen=True)
class LayerParity:
    """One step, as `OutputParity` an output; layer: the module whose own result it was compared
    with, empty where no module returns what the step computes; border: whether the worst element
    lies on the border of the image."""

    step: str
    module_path: str
    layer: str
    compiled: float
    eager: float
    worst: tolerance.Worst | None
    border: bool
    problem: str | None


@dataclass
class Agreement:
    """How often two networks and fp64 give the same likeliest class, and one of fp64's five."""

    images: int = 0
    compiled_top1: int = 0
    compiled_top5: int = 0
    eager_top1: int = 0
    eager_top5: int = 0

    def add(self, got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
        """Counts a batch of scores, (N, classes) each."""
        best = exact.topk(min(TOP, exact.shape[1])).indices
        self.images += len(exact)
        for name, scores in (("compiled", got), ("eager", eager)):
            same = scores.argmax(1)[:, None] == best
            for top, counted in ((f"{name}_top1", same[:, 0]), (f"{name}_top5", same.any(1))):
                setattr(self, top, getattr(self, top) + int(counted.sum()))


def dtype_of(graph: Graph) -> torch.dtype:
    """The narrowest type that a graph computes in."""
    used = [node.spec.dtype for node in graph.nodes() if node.outputs]
    floats = [dtype for dtype in used if dtype in tolerance.UNIT_ROUNDOFF]
    return max(floats, key=tolerance.UNIT_ROUNDOFF.__getitem__, default=torch.float32)


def depth_of(graph: Graph) -> int:
    """How many terms lie behind one output: the reduction lengths of all weights, one after the
    other."""
    weights = (tensor for tensor in graph.tensors.values() if tensor.dim() > 1)
    return sum(weight[0].numel() for weight in weights) or 1


def as_numbers(inputs: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Inputs in `dtype`; masks stay booleans."""
    return [x if x.dtype is torch.bool else x.to(dtype) for x in inputs]


def by_position(inputs: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call that takes nothing but tensors."""
    return tuple(inputs), {}


def truth_of_module(
    module: torch.nn.Module, dtype: torch.dtype, placed: Placing = by_position
) -> Truth:
    """The module itself in fp64 and in `dtype`."""
    exact, eager = (copy.deepcopy(module).to(each) for each in (torch.float64, dtype))
    return lambda inputs: (
        _call(exact, inputs, torch.float64, placed), _call(eager, inputs, dtype, placed)
    )  # fmt: skip


def _call(
    module: torch.nn.Module, inputs: Sequence[torch.Tensor], dtype: torch.dtype, placed: Placing
) -> list[torch.Tensor]:
    """What a module that computes in `dtype` returns."""
    arguments, keywords = placed(as_numbers(inputs, dtype))
    with torch.no_grad(), SoundConvolutions():
        return tensors_of(module(*arguments, **keywords))


def layers_of(
    module: torch.nn.Module,
    dtype: torch.dtype,
    inputs: Sequence[torch.Tensor],
    placed: Placing,
) -> list[Layer]:
    """What the modules inside of a module return, call by call, inner ones first, in fp64 and in
    `dtype`."""

    def called(dtype: torch.dtype) -> list[tuple[str, torch.Tensor]]:
        results: list[tuple[str, torch.Tensor]] = []

        def note(path: str, _: Any, __: Any, result: Any) -> None:
            # Copies: what is returned may be changed in place later.
            results.extend((path, tensor.clone()) for tensor in tensors_of(result))

        model = copy.deepcopy(module).to(dtype)
        for path, layer in model.named_modules():
            if path:
                layer.register_forward_hook(partial(note, path))
        _call(model, inputs, dtype, placed)
        return results

    return [
        Layer(path, true, peer)
        for (path, true), (_, peer) in zip(called(torch.float64), called(dtype), strict=True)
        if true.shape == peer.shape
    ]


def layer_parity(
    executable: Executable,
    validation: Validation,
    layers: Sequence[Layer],
    inputs: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> list[LayerParity]:
    """Every step of a call compared with what the network had there before any pass: with a
    module's own result where one returns it.

    validation: has watched the passes, on `inputs`.
    """
    with torch.no_grad():
        peers = evaluate(executable.graph, inputs)
    depth, rows = depth_of(executable.graph), []

    def observe(step: Step, output: torch.Tensor) -> None:
        true = validation.truth(step.name)
        if true is None or true.shape != output.shape:
            return
        layer = next((one for one in layers if agree(one.exact, true)), None)
        path = layer.path if layer else ""
        exact, peer = (layer.exact, layer.eager) if layer else (true, peers[Value(step.name)])
        (row,) = parity((step.name,), [output], ([exact], [peer]), dtype, depth)
        border = row.worst is not None and is_on_border(row.worst.index, exact.shape)
        rows.append(LayerParity(step.name, step.module_path, path, row.compiled, row.eager,
                                row.worst, border, row.problem))  # fmt: skip

    arguments, keywords = executable.interface.placed(inputs)
    executable.watch(arguments, observe, keywords)
    return rows


def is_on_border(index: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether an element lies on the border of the image, (N, C, H, W) or (N, C, D, H, W)."""
    if len(shape) not in IMAGE_RANKS:
        return False
    return any(at in (0, size - 1) for at, size in zip(index[2:], shape[2:], strict=True))


def truth_of_graph(graph: Graph) -> Truth:
    """A graph by torch ops in fp64 and in its own types: for files, which hold no module."""

    def truth(inputs: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        with torch.no_grad():
            exact, eager = evaluate(graph, inputs, torch.float64), evaluate(graph, inputs)
        outputs = graph.outputs()
        return [exact[value] for value in outputs], [eager[value] for value in outputs]

    return truth


def tensors_of(result: Any) -> list[torch.Tensor]:
    """The tensors of a nested result, in order."""
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def parity(
    names: Sequence[str],
    results: Sequence[torch.Tensor],
    truth: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
    dtype: torch.dtype,
    depth: int,
) -> list[OutputParity]:
    """Every output of one call, compared.

    Raises: InvalidInputError where there are not as many results as true ones.
    """
    exact, eager = truth
    if not len(names) == len(results) == len(exact) == len(eager):
        raise InvalidInputError(
            f"outputs: expected {len(exact)} to compare, got {len(results)} for {len(names)} names"
        )
    rows = []
    for name, got, true, peer in zip(names, results, exact, eager, strict=True):
        whole = not got.dtype.is_floating_point
        mine = got if whole else got.to(dtype)
        theirs = peer if whole else peer.to(dtype)
        problem = tolerance.compare(mine, true, theirs, depth)
        same = mine.shape == true.shape
        found = tolerance.worst(mine, true, theirs, depth) if same and not whole else None
        errors = relative_error(mine, true), relative_error(theirs, true)
        rows.append(OutputParity(name, *errors, found, problem))
    return rows
