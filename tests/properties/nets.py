"""Small networks, and how the result of a whole network is compared; for the compiler's tests.

A network is a function of its layers and inputs, so that a test reads as the computation it is
about:

    module, inputs = make(lambda m, x: torch.relu(m.conv(x)), IMAGE, conv=nn.Conv2d(6, 8, 3))
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from convloom.compiler import api
from convloom.compiler.capture.capture import capture
from convloom.compiler.evaluation.evaluate import evaluate
from convloom.compiler.graph.ir import INPUT, Graph, NoAttributes, Node, Value
from convloom.compiler.run.parity import as_numbers
from convloom.kernels.contract import tolerance
from convloom.kernels.contract.spec import TensorSpec
from convloom.kernels.tile.torch_convolution import SoundConvolutions
from torch import nn
from torch.utils import _pytree as pytree

IMAGE = (2, 6, 7, 5)
Made = tuple[nn.Module, tuple[torch.Tensor, ...]]


class Net(nn.Module):
    """A network from a function of itself and its inputs; its layers are its attributes."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def make(
    function: Callable[..., Any], *shapes: tuple[int, ...], seed: int = 0, **layers: nn.Module
) -> Made:
    """A seeded network in evaluation mode, and seeded inputs of the given shapes."""
    return randomise(Net(function, **layers), seed), inputs_of(*shapes, seed=seed)


def inputs_of(*shapes: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Normally distributed fp32 tensors."""
    generator = torch.Generator().manual_seed(seed + 1000)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in evaluation mode with seeded weights that keep the scale of activations, and
    batch-norm statistics far from 0 and 1, so that leaving one out shows."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        own = {**layer._parameters, **layer._buffers}
        for name, tensor in own.items():
            if tensor is not None and tensor.dtype.is_floating_point:
                _fill(name, tensor.detach(), generator)
    return module.eval()


def _fill(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    if tensor.dim() > 1:
        tensor.normal_(generator=generator).mul_(math.sqrt(2.0 / tensor[0].numel()))
    elif name in ("weight", "running_var"):
        tensor.uniform_(0.5, 1.5, generator=generator)
    else:
        tensor.normal_(std=0.3, generator=generator)


def run(
    module: nn.Module, inputs: Sequence[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    """The tensors that PyTorch returns when it computes in `dtype`; where it has no kernel for that
    dtype on the CPU, its fp32 results rounded."""
    twin = copy.deepcopy(module).to(dtype)
    try:
        with torch.no_grad(), SoundConvolutions():
            return tensors_of(twin(*as_numbers(inputs, dtype)))
    except NotImplementedError:
        return [tensor.to(dtype) for tensor in run(module, inputs, torch.float32)]


def tensors_of(result: Any) -> list[torch.Tensor]:
    """The tensors of a nested result, in order."""
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def depth_of(module: nn.Module) -> int:
    """How many terms lie behind one output: the reduction lengths of all layers, one after the
    other."""
    weights = (p for p in module.parameters() if p.dim() > 1)
    return sum(weight[0].numel() for weight in weights) or 1


def within_half(module: nn.Module, x: torch.Tensor) -> nn.Module:
    """The module, or where eager PyTorch overflows in float16 a copy whose normalisations make
    their results smaller: residual sums of random weights may leave the range."""
    if all(y.isfinite().all() for y in run(module, (x,), torch.float16)):
        return module
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data *= 0.7
    return module


class Truth:
    """What a module returns for some inputs in fp64, and in the dtype that it is compiled for."""

    def __init__(
        self,
        module: nn.Module,
        inputs: Sequence[torch.Tensor],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = dtype or inputs[0].dtype
        self.exact = run(module, inputs, torch.float64)
        self.eager = run(module, inputs, self.dtype)
        self.depth = depth_of(module)

    def check(self, result: Any) -> None:
        """Asserts that a result is the module's, within the tolerance of the dtype."""
        for got, exact, eager in zip(tensors_of(result), self.exact, self.eager, strict=True):
            mine = got.to(self.dtype) if got.dtype.is_floating_point else got
            report = tolerance.compare(mine, exact, eager, self.depth)
            assert report is None, report


def check(
    result: Any,
    module: nn.Module,
    inputs: Sequence[torch.Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Asserts that a result is the module's, within the tolerance of the dtype it computes in."""
    Truth(module, inputs, dtype).check(result)


_EXPORTED: dict[Any, tuple[nn.Module, Graph]] = {}


def captured(
    module: nn.Module,
    inputs: Sequence[Any],
    batch: tuple[int, int] | None = None,
    outputs: Sequence[str] | None = None,
    keywords: Any = None,
) -> Graph:
    """The captured graph of a module that no test changes: torch.export, which takes longer than
    everything else about a small network, runs once. The graph is the caller's own."""
    if keywords or not isinstance(inputs, (tuple, list)):
        return capture(module, inputs, batch, outputs, keywords)
    leaves = pytree.tree_leaves(tuple(inputs))
    described = ((getattr(x, "shape", x), getattr(x, "dtype", None)) for x in leaves)
    key = id(module), batch, tuple(described), None if outputs is None else tuple(outputs)
    if key not in _EXPORTED:
        _EXPORTED[key] = module, capture(module, inputs, batch, outputs)
    return _EXPORTED[key][1].copy()


def forget(module: nn.Module) -> None:
    """Drops what is kept of a module that will not be compiled again."""
    for key in [key for key in _EXPORTED if key[0] == id(module)]:
        del _EXPORTED[key]


@contextmanager
def exporting_once() -> Iterator[None]:
    """Inside the block `convloom.compile`, too, captures each module once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "capture", captured)
        yield


def meaning(graph: Graph, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The graph's outputs in fp64."""
    values = evaluate(graph, inputs, torch.float64)
    return [values[value] for value in graph.outputs()]


def assert_same_meaning(before: Graph, after: Graph, inputs: Sequence[torch.Tensor]) -> None:
    """Asserts that two graphs compute the same, but for the order of fp64 roundings."""
    pairs = zip(meaning(before, inputs), meaning(after, inputs), strict=True)
    for old, new in pairs:
        torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-9, equal_nan=True)


def add_input(graph: Graph, name: str, shape: tuple[int, ...]) -> Value:
    """Adds a graph input, as a test that builds graphs by hand needs it."""
    return graph.insert(Node(name, INPUT, NoAttributes(), (TensorSpec(shape, torch.float32),)))


def inputs_for(graph: Graph, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Tensors for the graph's inputs."""
    return inputs_of(*(node.spec.shape for node in graph.graph_inputs()), seed=seed)
