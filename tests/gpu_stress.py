"""What is asked of single kernels on a device beyond the op's contract: that sums split among
programs are repeatable ten thousand times, what eight warps do to a loop flattened over filter
taps, and whether the interpreter says what the device says."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from convloom.errors import ConvloomError
from convloom.kernels import registry
from convloom.kernels.contract import tolerance
from convloom.kernels.contract.op import Attributes, Config, Op, Problem, Ref
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.devices import execute
from convloom.kernels.products.linear import Linear
from convloom.kernels.tile.conv_geometry import Conv2d

from . import harness
from .gpu_checks import drawn, problem_of
from .gpu_device import Gpu
from .harness import Interpreter

LAUNCHES = 10_000
DISTURBED = 16
"""Every so many launches something else is started beside them."""
SPLITS = 4
"""Configurations that are stressed of each problem."""


@dataclass(frozen=True)
class Layer:
    """One product: an image (N, C, H, W) or a matrix (N, C), and its weight."""

    op: str
    x: tuple[int, ...]
    w: tuple[int, ...]
    attributes: Attributes

    def problem(self, dtype: torch.dtype) -> Problem:
        """The problem in that dtype."""
        layout = Layout.NHWC if len(self.x) == 4 else Layout.DENSE
        specs = TensorSpec(self.x, dtype, layout), TensorSpec(self.w, dtype)
        return harness.problem_for(registry.get(self.op), self.attributes, specs)

    def tensors(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Seeded inputs."""
        specs = (operand.spec for operand in self.problem(dtype).inputs)
        return tuple(harness.make_tensor(spec, at, -1.0, 1.0) for at, spec in enumerate(specs))


SAME = Conv2d(padding=(1, 1, 1, 1))
SPLIT_LAYERS = (
    Layer("conv2d", (1, 256, 14, 14), (64, 256, 3, 3), SAME),
    Layer("conv2d", (2, 1024, 7, 7), (128, 1024, 1, 1), Conv2d()),
    Layer("linear", (48, 2048), (256, 2048), Linear()),
    Layer("linear", (1, 4096), (1000, 4096), Linear()),
)
"""Products of few output tiles and long sums: one of each kernel that shares them."""


SMALL_SPLIT = Layer("conv2d", (1, 128, 6, 6), (32, 128, 3, 3), SAME)


def exchanging(op: Op, problem: Problem, device: Interpreter, most: int) -> list[Config]:
    """Configurations whose programs meet at a semaphore, from all over the space."""
    found = [
        tile
        for tile in op.configs(problem, device.target)
        if any(s.zeroed for each in op.launches(problem, tile, device.target) for s in each.scratch)
    ]
    return random.Random(0).sample(found, min(most, len(found)))


def check_repeatable(
    device: Gpu, layer: Layer, dtype: torch.dtype, times: int = LAUNCHES, most: int = SPLITS
) -> list[str]:
    """Launches each such configuration so often, every time with the same bits, as the reference
    has them, and with the semaphores back at zero. The configurations, as text."""
    op, problem, tensors = registry.get(layer.op), layer.problem(dtype), layer.tensors(dtype)
    tiles = exchanging(op, problem, device, most)
    assert tiles, f"no configuration of {layer} shares its sums"
    for tile in tiles:
        harness.compare(op, problem, _repeated(device, op, problem, tensors, tile, times), tensors)
    return [str(tile) for tile in tiles]


def _repeated(
    device: Gpu, op: Op, problem: Problem, tensors: tuple[torch.Tensor, ...], tile: Config,
    times: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The results, which have come out alike so many times."""
    made = harness.buffers_for(op, problem, tensors)
    buffers = {ref: tensor.to(device.place) for ref, tensor in made.items()}
    actions, semaphores = [], []
    for launch in op.launches(problem, tile, device.target):
        own = execute.scratch(launch, device.place)
        semaphores += [own[Ref("scratch", at)] for at, s in enumerate(launch.scratch) if s.zeroed]
        actions.append(device.bound(launch, {**buffers, **own}.__getitem__, 1))
    output = buffers[Ref("output", 0)]
    untouched = output.clone()
    first: torch.Tensor | None = None
    wrong = torch.zeros((), dtype=torch.int64, device=device.place)
    for at in range(times):
        output.copy_(untouched)
        if at % DISTURBED == 0:
            device.disturb()
        for action in actions:
            action()
        bits = output.view(torch.uint8)
        if first is None:
            first = bits.clone()
        wrong += (bits != first).any()
    device.wait()
    assert int(wrong) == 0, f"{op.name} by {tile}: {int(wrong)} of {times} launches differ"
    left = [int(each.abs().max()) for each in semaphores]
    assert not any(left), f"{op.name} by {tile}: semaphores are left at {left}"
    return (harness.written(op, problem.output, output.cpu()),)


# Eight warps over filter taps.

TAPPED_LAYERS = (
    Layer("conv2d", (2, 64, 28, 28), (128, 64, 3, 3), SAME),
    Layer("conv2d", (2, 128, 14, 14), (128, 128, 3, 3), SAME),
    Layer("conv2d", (1, 32, 28, 28), (64, 32, 5, 5), Conv2d(padding=(2, 2, 2, 2))),
)
WARPS = 8


def eight_warps(
    device: Interpreter, layer: Layer, dtype: torch.dtype, most: int = 6
) -> Iterator[dict[str, Any]]:
    """What configurations of two groups of warps give: {layer, dtype, configuration, right, said}.
    Nothing is asserted, so that all of them are told."""
    op, problem, tensors = registry.get(layer.op), layer.problem(dtype), layer.tensors(dtype)
    tiles = [
        tile for tile in op.configs(problem, device.target) if tile.num_warps == WARPS
    ]
    for tile in random.Random(0).sample(tiles, min(most, len(tiles))):
        said = None
        try:
            harness.compare(op, problem, harness.run_on(device, op, problem, tensors, tile=tile),
                            tensors)  # fmt: skip
        except (AssertionError, ConvloomError) as error:
            said = str(error)
        yield {
            "layer": f"{layer.op} {layer.x} {layer.w}", "dtype": str(dtype).removeprefix("torch."),
            "configuration": str(tile), "right": said is None, "said": said,
        }  # fmt: skip


# The interpreter against the device.


def interpreter_fails() -> str | None:
    """Why nothing can be interpreted here, or None (Triton 3.6 cannot with numpy 2.4)."""
    op = registry.get("relu")
    case = drawn(op, "float32", 1, 0)[0]
    problem, tensors = problem_of(case, "float32"), case.tensors()
    try:
        harness.compare(op, problem, harness.run_interpreted(op, problem, tensors), tensors)
    except Exception as error:  # whatever an unknown pair of versions comes up with
        return f"{type(error).__name__}: {error}"
    return None


def check_against_interpreter(device: Interpreter, name: str, precision: str) -> None:
    """The same configuration in the interpreter: whole numbers bit for bit, others within what is
    allowed of each other."""
    op = registry.get(name)
    case = drawn(op, precision)[0]
    problem = problem_of(case, precision)
    tile = op.default(problem, device.target)
    low, high = op.input_range
    whole = op.prepare(
        case.attributes,
        tuple(harness.make_integers(spec, at, low, high) for at, spec in enumerate(case.specs)),
    )
    for tensors in (case.tensors(), whole):
        here = harness.run_on(device, op, problem, tensors, tile=tile)
        there = harness.run_on(_like(device), op, problem, tensors, tile=tile)
        exact = harness.expected(op, problem, tensors)
        depth = harness.reduction_length(op, problem)
        for got, told, truth in zip(here, there, exact, strict=True):
            report = tolerance.compare(got, told.double(), told, depth)
            assert report is None, f"{name}: the interpreter says otherwise: {report}"
            if tensors is whole and torch.equal(truth, told.double()):
                assert torch.equal(got, told), f"{name}: whole numbers differ"


def _like(device: Interpreter) -> Interpreter:
    """The interpreter, with the device's choices."""
    made = Interpreter()
    made.target = device.target
    return made


