"""Pooling in front of 1x1 convolutions, squeeze-and-excitation, classifier heads, and normalisation
beside pooling: what the generic tests of ops and rules do not ask."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import convloom
import pytest
import torch
from convloom.errors import InvalidInputError
from convloom.kernels import registry
from convloom.kernels.contract import targets
from convloom.kernels.contract.epilogue import Stage, apply_reference
from convloom.kernels.contract.op import Attributes, Problem, Ref, config
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.contract.targets import Target
from convloom.kernels.devices import offline
from convloom.kernels.fused.head import Head
from convloom.kernels.fused.lrn_pool import LrnPool
from convloom.kernels.fused.pool_conv import PoolConv
from convloom.kernels.fused.squeeze_excite import SqueezeExcite
from convloom.kernels.pooling.pool_window import AvgPool2d, MaxPool2d
from convloom.kernels.tile.conv_geometry import Conv2d
from torch import Tensor, nn

from . import harness, nets
from .test_offline import GENERATIONS, by_generation

HALF, FLOAT = torch.float16, torch.float32
BIAS = (Stage("add"), Stage("relu"))
SM_90 = targets.parse("cuda:sm_90")


def image(*shape: int, dtype: torch.dtype = FLOAT) -> TensorSpec:
    return TensorSpec(shape, dtype, Layout.NHWC)


def dense(*shape: int, dtype: torch.dtype = FLOAT) -> TensorSpec:
    return TensorSpec(shape, dtype)


# Bad input.

X, PROJECTION = image(2, 16, 8, 6), dense(24, 16, 1, 1)
MESSAGES: tuple[tuple[str, Attributes, tuple[TensorSpec, ...], str], ...] = (
    ("pool_conv", PoolConv(after_pool=BIAS), (X, PROJECTION), "expected 3 inputs, got 2"),
    ("pool_conv", PoolConv(), (X, dense(24, 16, 3, 3)), "expected w (K,C,1,1)"),
    ("pool_conv", PoolConv(before_conv=BIAS), (X, PROJECTION, dense(5, 1, 1)), "not broadcast"),
    ("squeeze_excite", SqueezeExcite(BIAS), (X, X, X), "expected 4 inputs, got 3"),
    (
        "squeeze_excite",
        SqueezeExcite(),
        (dense(2, 16), dense(4, 16), dense(16, 4)),
        "expected x (N,C,H,W) with pixels",
    ),
    (
        "squeeze_excite",
        SqueezeExcite(),
        (X, dense(4, 16), dense(24, 4)),
        "expected w1 (D,16[,1,1]) and w2 (16,D[,1,1])",
    ),
    (
        "squeeze_excite",
        SqueezeExcite(BIAS),
        (X, dense(4, 16), dense(16, 4), dense(16)),
        "read after w1, does not broadcast",
    ),
    ("head", Head(()), (dense(2, 16),), "expected 1 to 3 links"),
    ("head", Head(softmax="max"), (dense(2, 16), dense(10, 16)), "a softmax of"),
    ("head", Head((BIAS,)), (dense(2, 16), dense(10, 16)), "expected 3 inputs, got 2"),
    ("head", Head(average=True), (dense(2, 16), dense(10, 16)), "expected x (N,C,H,W) with pixels"),
    ("head", Head(), (X, dense(10, 16)), "expected x (N,C)"),
    ("head", Head(((), ())), (dense(2, 16), dense(10, 16), dense(5, 9)), "a weight (K,10)"),
    ("head", Head((BIAS,)), (dense(2, 16), dense(10, 16), dense(9)), "does not broadcast"),
    ("lrn_pool", LrnPool(), (X, X), "expected 1 input, got 2"),
)


@pytest.mark.parametrize(("name", "attributes", "specs", "message"), MESSAGES)
def test_impossible_inputs_are_named(
    name: str, attributes: Attributes, specs: tuple[TensorSpec, ...], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)) as raised:
        registry.get(name).infer(attributes, specs)
    assert str(raised.value).startswith(f"{name}: ")


def test_what_does_not_fit_a_tile_is_refused() -> None:
    """By every configuration: the fusion is then not made, and says why."""
    wide = harness.problem_for(
        registry.get("head"), Head(((), ())), (dense(8, 64), dense(1024, 64), dense(1024, 1024))
    )
    gate = harness.problem_for(
        registry.get("squeeze_excite"),
        SqueezeExcite(),
        (image(1, 8192, 7, 7), dense(8, 8192), dense(8192, 8)),
    )
    window = harness.problem_for(
        registry.get("pool_conv"),
        PoolConv(MaxPool2d((9, 9))),
        (image(1, 64, 9, 9), dense(64, 64, 1, 1)),
    )
    reasons = "bytes of shared memory", "at most 4096", "more than"
    for problem, reason in zip((wide, gate, window), reasons, strict=True):
        op = registry.get(problem.op)
        asked = problem, op.default(problem, SM_90), SM_90
        assert reason in str(op.legal(*asked) or op.crowded(*asked))


def test_few_columns_of_a_pooled_product_are_refused_where_they_spill() -> None:
    op = registry.get("pool_conv")
    problem = harness.problem_for(
        op,
        PoolConv(MaxPool2d((3, 3))),
        (image(1, 64, 9, 9, dtype=HALF), dense(16, 64, 1, 1, dtype=HALF)),
    )
    tile = config(8, 1, BLOCK_M=64, BLOCK_N=16, BLOCK_K=64)
    assert "144 loads per thread and block of channels; more than 72 spill" in str(
        op.crowded(problem, tile, SM_90)
    )
    wide = config(4, 1, BLOCK_M=16, BLOCK_N=256, BLOCK_K=64)
    assert "256 bytes of weights per thread; more than 128 spill" in str(
        op.crowded(problem, wide, SM_90)
    )


# One number per image and channel in a prologue.


@pytest.mark.interpreter
@pytest.mark.parametrize("batch", [3, 2])
@pytest.mark.parametrize("pad", [0, 3])
def test_a_prologue_may_read_one_number_per_image_and_channel(batch: int, pad: int) -> None:
    op = registry.get("conv2d")
    x = replace(image(3, 20, 5, 7), batch=3)
    gate = replace(image(3, 20, 1, 1), batch=3)
    plain = harness.problem_for(op, Conv2d(), (x, dense(33, 20, 1, 1)), pad=pad)
    stages = (Stage("mul", reverse=True), Stage("relu"))
    problem = replace(plain, prologue=stages, prologue_operands=(harness.place(gate, pad),))
    tensors = tuple(
        harness.make_tensor(operand.spec, at, -1, 1) for at, operand in enumerate(plain.inputs)
    )
    before = harness.make_tensor(gate, 9, -1, 1)
    for tile in (None, *list(op.configs(problem, SM_90))[:3]):
        (y,) = harness.run_interpreted(
            op, problem, tensors, tile=tile, batch=batch, before=(before,)
        )
        scaled = apply_reference(stages, tensors[0], (before,))
        harness.compare(op, plain, (y[:batch],), (scaled[:batch], tensors[1]))
        assert y[batch:].isnan().all()


class Gated(nn.Module):
    """A depthwise convolution, its squeeze-and-excitation, and the projection that reads both."""

    def __init__(self, *, gate_first: bool, linear: bool = False) -> None:
        super().__init__()
        self.wide = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        layer: Any = nn.Linear if linear else lambda c, k: nn.Conv2d(c, k, 1)
        self.down, self.up = layer(16, 6), layer(6, 16)
        self.project = nn.Conv2d(16, 24, 1)
        self.gate_first, self.linear = gate_first, linear

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(x))
        s = x.mean((2, 3), keepdim=not self.linear)
        gate = torch.sigmoid(self.up(torch.relu(self.down(s))))
        gate = gate.view(*gate.shape[:2], 1, 1)
        scaled = gate * x if self.gate_first else x * gate
        result: Tensor = self.project(scaled)
        return result


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("linear", [True, False])
def test_a_gated_block_is_three_kernels(dtype: torch.dtype, gate_first: bool, linear: bool) -> None:
    """The scaling is the projection's prologue: no kernel of its own, nothing written."""
    module = nets.randomise(Gated(gate_first=gate_first, linear=linear)).to(dtype)
    inputs = tuple(x.to(dtype) for x in nets.inputs_of((3, 16, 7, 6)))
    exe = convloom.compile(module, inputs, target="interpreter")
    nets.check(exe(*inputs), module, inputs)
    ops = [step.op for step in exe.plan.steps if step.op != "relayout"]
    assert ops == ["conv2d", "squeeze_excite", "conv2d"]


@pytest.mark.interpreter
def test_a_gated_projection_may_be_pooled() -> None:
    """Kernels that hold a convolution and more take the gate along."""
    for pool in (nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(2)):
        module = nets.randomise(nn.Sequential(Gated(gate_first=True), nn.ReLU(), pool))
        inputs = nets.inputs_of((2, 16, 8, 6))
        exe = convloom.compile(module, inputs, target="interpreter")
        nets.check(exe(*inputs), module, inputs)
        assert not any(step.op == "mul" for step in exe.plan.steps)


# What becomes one kernel.


def ops_of(module: nn.Module, *shapes: tuple[int, ...]) -> Counter[str]:
    """The kernels of the module in the interpreter, whose results are checked."""
    module, inputs = nets.randomise(module), nets.inputs_of(*shapes)
    exe = convloom.compile(module, inputs, target="interpreter")
    nets.check(exe(*inputs), module, inputs)
    return Counter(step.op for step in exe.plan.steps if step.op != "relayout")


def perceptron(*widths: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for pair in pairwise(widths):
        layers += [nn.Linear(*pair), nn.Tanh()]
    return layers[:-1]


@pytest.mark.interpreter
def test_chains_of_linear_layers_grow_at_their_end() -> None:
    assert ops_of(nn.Sequential(*perceptron(40, 24, 16, 10)), (5, 40)) == {"head": 1}
    # Four layers are two kernels; a softmax joins the last one.
    assert ops_of(nn.Sequential(*perceptron(40, 24, 20, 16, 10)), (5, 40)).total() == 2
    ended = nn.Sequential(*perceptron(40, 24, 16, 10), nn.LogSoftmax(1))
    assert ops_of(ended, (5, 40)) == {"head": 1}


@pytest.mark.interpreter
def test_a_small_classifier_ends_in_one_kernel() -> None:
    layers = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10), nn.Softmax(1))
    assert ops_of(nn.Sequential(*layers), (3, 16, 8, 8)) == {"head": 1}


class Branches(nn.Module):
    """A stage's pooling, read by a projection and by the pooling branch of the next block."""

    def __init__(self) -> None:
        super().__init__()
        self.stage, self.same = nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(3, 1, 1)
        self.first, self.last = nn.Conv2d(16, 24, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        t = self.stage(x)
        return torch.cat([self.first(t).relu(), self.last(self.same(t)).relu()], 1)


@pytest.mark.interpreter
def test_a_stage_of_an_inception_network_is_two_kernels() -> None:
    """Both poolings disappear, and the branches are written into their concatenation."""
    assert ops_of(Branches(), (2, 16, 10, 9)) == {"pool_conv": 2}


@pytest.mark.interpreter
def test_the_kept_tensor_is_written_once_per_pixel() -> None:
    """By the programs of the first tile of output channels, whatever the others see."""
    op = registry.get("pool_conv")
    attributes = PoolConv(MaxPool2d((3, 3), (2, 2), (1, 1)), keep=True)
    problem = harness.problem_for(op, attributes, (image(2, 24, 9, 9), dense(80, 24, 1, 1)), pad=3)
    tensors = tuple(
        harness.make_tensor(operand.spec, at, -1, 1) for at, operand in enumerate(problem.inputs)
    )
    tiles = [tile for tile in op.configs(problem, SM_90) if tile["BLOCK_N"] == 32]
    assert tiles
    _, t = harness.run_interpreted(op, problem, tensors, tile=tiles[0])
    assert torch.equal(t, pooled(tensors[0]))


def pooled(x: Tensor) -> Tensor:
    return nn.functional.max_pool2d(x, 3, 2, 1)


# What the compiler makes of them.


def problem_of(
    op: str, attributes: Attributes, specs: tuple[TensorSpec, ...], bias: TensorSpec | None = None
) -> Problem:
    stages, operands = (BIAS, (bias,)) if bias else ((), ())
    return harness.problem_for(registry.get(op), attributes, specs, stages, operands)


def pool_conv(n: int, c: int, k: int, size: int, window: Any, **more: Any) -> Problem:
    dtype = more.pop("dtype", HALF)
    specs = (image(n, c, size, size, dtype=dtype), dense(k, c, 1, 1, dtype=dtype))
    if "before_conv" in more:
        specs += (dense(c, 1, 1), dense(c, 1, 1))
    return problem_of("pool_conv", PoolConv(window, **more), specs, dense(k, 1, 1))


def head(n: int, c: int, *widths: int, size: int = 0, **more: Any) -> Problem:
    dtype = more.pop("dtype", HALF)
    specs = [image(n, c, size, size, dtype=dtype) if size else dense(n, c, dtype=dtype)]
    for width in widths:
        specs += [dense(width, c, dtype=dtype), dense(width)]
        c = width
    attributes = Head((BIAS,) * len(widths), average=bool(size), **more)
    return problem_of("head", attributes, tuple(specs))


def gate(n: int, c: int, d: int, size: int) -> Problem:
    specs = image(n, c, size, size, dtype=HALF), dense(d, c, dtype=HALF), dense(c, d, dtype=HALF)
    return problem_of("squeeze_excite", SqueezeExcite(BIAS), (*specs, dense(d)), dense(c))


SAME, STAGE = MaxPool2d((3, 3), (1, 1), (1, 1)), MaxPool2d((3, 3), (2, 2), ceil_mode=True)
NORMALISED = (Stage("mul"), Stage("add"), Stage("relu"))
COMPILED = {
    "googlenet 3a pool branch": pool_conv(32, 192, 32, 28, SAME),
    "googlenet 5a pool branch": pool_conv(32, 832, 128, 7, SAME),
    "googlenet pool1 conv2": pool_conv(8, 64, 64, 112, STAGE),
    "googlenet stage 3, merged": pool_conv(32, 192, 176, 56, STAGE, keep=True),
    "resnet50 stem": pool_conv(8, 64, 64, 112, MaxPool2d((3, 3), (2, 2), (1, 1)), keep=True),
    "inception average": pool_conv(8, 768, 192, 17, AvgPool2d((3, 3), padding=(1, 1))),
    "densenet transition": pool_conv(
        8, 128, 128, 56, AvgPool2d((2, 2), (2, 2)), before_conv=NORMALISED, keep=True
    ),
    "pool branch, fp32": pool_conv(8, 192, 176, 28, SAME, dtype=FLOAT),
    "lenet5": head(32, 400, 120, 84, 10, softmax="softmax"),
    "lenet5, fp32": head(32, 400, 120, 84, 10, dtype=FLOAT),
    "cifar": head(256, 64, 10, size=8),
    "hundred classes": head(32, 512, 128, 100, size=4, softmax="log_softmax"),
    "thousand classes": head(32, 512, 1000, size=7, softmax="softmax"),
    "gate 72": gate(32, 72, 24, 28),
    "gate 1152": gate(32, 1152, 48, 7),
    "alexnet norm1 pool1": problem_of(
        "lrn_pool", LrnPool(pool=MaxPool2d((3, 3), (2, 2))), (image(8, 96, 55, 55, dtype=HALF),)
    ),
    "googlenet pool1 norm1": problem_of(
        "lrn_pool",
        LrnPool(pool=MaxPool2d((3, 3), (2, 2), ceil_mode=True), lrn_first=False),
        (image(8, 64, 112, 112, dtype=HALF),),
    ),
}


def request_of(problem: Problem, target: Target) -> offline.CompileRequest:
    """The default configuration's kernel."""
    op = registry.get(problem.op)
    tile = op.default(problem, target)
    assert op.legal(problem, tile, target) is None

    def dtype_of(ref: Ref) -> torch.dtype:
        group = {"input": problem.inputs, "output": problem.outputs}.get(ref.kind, problem.operands)
        return group[ref.index].spec.dtype

    (launch,) = op.launches(problem, tile, target)
    return offline.request(launch, dtype_of, target)


@pytest.fixture(scope="module")
def compiled() -> None:
    """Everything below, by worker processes: one after the other takes twice as long."""
    requests = [request_of(each, at) for each in COMPILED.values() for at in GENERATIONS[:2]]
    offline.compile_all(requests, kind=offline.KernelReport)


needs_compiler = pytest.mark.usefixtures("compiled")


def report_of(name: str, target: Target) -> offline.KernelReport:
    return offline.report(request_of(COMPILED[name], target))


@needs_compiler
@by_generation
@pytest.mark.parametrize("name", COMPILED)
def test_real_shapes_compile_without_spills(name: str, target: Target) -> None:
    report = report_of(name, target)
    assert report.spill_bytes == 0
    assert report.shared_bytes <= target.shared_bytes
    assert report.registers <= target.registers_per_thread
    assert report.count("LDG.128") + report.count("LDGSTS.128"), report.instructions
    assert not report.count("LDG.U16") and sum(report.instructions.values()) > 100


@needs_compiler
@by_generation
def test_taps_are_not_converted_one_by_one(target: Target) -> None:
    """The pooled block goes to the product's operand once: 4 barriers instead of 22 on sm_90."""
    report = report_of("googlenet 3a pool branch", target)
    assert report.count("BAR") <= 14
    assert report.registers <= 128


@needs_compiler
@by_generation
def test_chained_products_share_their_weights_among_the_warps(target: Target) -> None:
    """Tiles as wide as they are high would make every warp hold all of them: 255 registers."""
    assert report_of("lenet5", target).registers <= 96
