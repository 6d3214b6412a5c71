"""Two convolutions into one accumulator: what the generic tests of ops and rules do not cover."""

from __future__ import annotations

import re
from typing import Any

import convloom
import pytest
import torch
from convloom.compiler.fusion.pattern import apply_rules, match
from convloom.compiler.graph.ir import Graph, Node
from convloom.compiler.graph.ledger import Ledger
from convloom.compiler.graph.verify import verify
from convloom.compiler.passes import NAMES, PASSES
from convloom.compiler.passes.fusions import bottlenecks, shortcuts
from convloom.errors import InvalidInputError
from convloom.kernels import registry
from convloom.kernels.contract import targets
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.op import Attributes, Problem, config
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.fused import conv_sum
from convloom.kernels.fused.chains import conv_chain
from convloom.kernels.fused.chains import conv_chain_tiles as tiles
from convloom.kernels.fused.chains.conv_chain import ConvChain
from convloom.kernels.fused.conv_sum import ConvSum
from convloom.kernels.tile.conv_geometry import Conv2d
from convloom.zoo import resnets
from torch import nn

from . import harness, nets, test_offline
from .nets import Made, make

X, R = (2, 8, 5, 6), (2, 6, 10, 12)


def sum_of(function: Any, *shapes: tuple[int, ...], bias: bool = True, **layers: nn.Module) -> Made:
    """A network that ends in the sum of a 3x3 convolution of x and a strided 1x1 one of r."""
    return make(
        function,
        *(shapes or (X, R)),
        conv=nn.Conv2d(8, 12, 3, padding=1, bias=bias),
        shortcut=nn.Conv2d(6, 12, 1, stride=2, bias=bias),
        **layers,
    )


def prepared(made: Made) -> Graph:
    """The graph as it is when fusions of several heavy ops are chosen."""
    graph = nets.captured(*made)
    for step in PASSES[: NAMES.index("choose_partition")]:
        graph = step.run(graph, Ledger())
    return graph


def fused(made: Made) -> tuple[Graph, list[Node]]:
    """The graph after the rule, and its convolutions of any kind."""
    before = prepared(made)
    after = apply_rules(before.copy(), shortcuts.FUSIONS[0].rules, Ledger())
    verify(after)
    nets.assert_same_meaning(before, after, made[1])
    return after, [node for node in after.compute_nodes() if node.op.startswith("conv")]


def stages_of(node: Node) -> list[str]:
    return [str(stage) for stage in node.epilogue]


def test_biases_are_added_once_in_fp64() -> None:
    module, inputs = made = sum_of(lambda m, x, r: torch.relu(m.conv(x) + m.shortcut(r)))
    graph, (node,) = fused(made)
    assert node.op == "conv_sum" and stages_of(node) == ["add", "relu"]
    (bias,) = graph.operands(node)
    total = module.conv.bias.double() + module.shortcut.bias.double()
    assert torch.equal(graph.constant(bias).reshape(-1), total.detach())
    nets.check(convloom.compile(module, inputs, target="interpreter")(*inputs), module, inputs)


@pytest.mark.parametrize("order", ["branch first", "shortcut first"])
def test_either_convolution_may_do_the_adding(order: str) -> None:
    def function(m: Any, x: torch.Tensor, r: torch.Tensor) -> Any:
        branch, shortcut = m.conv(x), m.shortcut(r)
        return torch.relu(branch + shortcut if order == "branch first" else shortcut + branch)

    _, (node,) = fused(sum_of(function))
    assert node.op == "conv_sum" and stages_of(node) == ["add", "relu"]


def test_without_biases_nothing_is_added() -> None:
    made = sum_of(lambda m, x, r: torch.tanh(m.conv(x) + m.shortcut(r)), bias=False)
    _, (node,) = fused(made)
    assert node.op == "conv_sum" and stages_of(node) == ["tanh"]


def test_numbers_and_what_follows_the_sum_stay() -> None:
    def function(m: Any, x: torch.Tensor, r: torch.Tensor, y: torch.Tensor) -> Any:
        return torch.relu((m.conv(x) + 0.5) + (m.shortcut(r) + 0.25) - y).mul(y)

    graph, (node,) = fused(sum_of(function, X, R, (2, 12, 5, 6)))
    assert stages_of(node) == ["add", "add(0.5)", "add(0.25)", "sub", "relu", "mul"]
    assert len(graph.operands(node)) == 3


def test_the_same_tensor_may_feed_both() -> None:
    module, inputs = made = make(
        lambda m, x: torch.relu(m.one(x) + m.other(x)),
        X,
        one=nn.Conv2d(8, 12, 3, padding=1),
        # Within the 3x3 filter it would be added to it.
        other=nn.Conv2d(8, 12, (1, 5), padding=(0, 2)),
    )
    _, (node,) = fused(made)
    assert node.op == "conv_sum"
    exe = convloom.compile(module, inputs, target="interpreter")
    nets.check(exe(*inputs), module, inputs)


def test_a_sum_that_is_added_twice_is_read_twice() -> None:
    def function(m: Any, x: torch.Tensor, r: torch.Tensor) -> Any:
        s = m.shortcut(r)
        return m.conv(x) + s + s

    before = prepared(sum_of(function))
    (rule,) = shortcuts.FUSIONS[0].rules
    found = [match(before, node, rule.pattern) for node in before.nodes()]
    (reason,) = (rule.refusal(before, one) for one in found if one is not None)
    assert reason is not None and "reads again what it was before it added" in reason


def test_three_convolutions_are_two_kernels() -> None:
    """The sum of two is no convolution any more: the third is added as a tensor."""
    module, inputs = made = sum_of(
        lambda m, x, r: torch.relu(m.conv(x) + m.shortcut(r) + m.third(x)),
        third=nn.Conv2d(8, 12, (1, 5), padding=(0, 2)),
    )
    _, nodes = fused(made)
    assert sorted(node.op for node in nodes) == ["conv2d", "conv_sum"]
    nets.check(convloom.compile(module, inputs, target="interpreter")(*inputs), module, inputs)


def test_the_module_path_is_the_branchs() -> None:
    _, (node,) = fused(sum_of(lambda m, x, r: m.conv(x) + m.shortcut(r)))
    assert node.module_path == "conv"


@pytest.mark.interpreter
def test_a_smaller_batch_of_a_fused_block() -> None:
    module, inputs = sum_of(
        lambda m, x, r: torch.relu(m.conv(x) + m.shortcut(r)), (4, *X[1:]), (4, *R[1:])
    )
    exe = convloom.compile(module, inputs, target="interpreter", dynamic_batch=(1, 4))
    assert {step.op for step in exe.plan.steps} == {"relayout", "conv_sum"}
    for batch in (1, 3):
        some = tuple(x[:batch] for x in inputs)
        nets.check(exe(*some), module, some)


def small_resnet(block: Any, groups: int = 1) -> Made:
    """Two stages of a zoo ResNet, narrow: the second begins with a strided shortcut."""
    options = {"groups": groups, "width_factor": 2} if groups > 1 else {}
    wide = 16 * block.expansion
    first = block(16, wide, 1, **options)
    second = block(wide, 2 * wide, 2, **options)
    module = nets.randomise(nn.Sequential(first, second, block(2 * wide, 2 * wide, **options)))
    return module.half(), tuple(x.half() for x in nets.inputs_of((2, 16, 12, 10)))


CASES = {
    "basic": (small_resnet(resnets.BasicBlock), {"conv_sum": 1}),
    "bottleneck": (small_resnet(resnets.Bottleneck), {"conv_chain": 3}),
    "grouped bottleneck": (small_resnet(resnets.Bottleneck, 4), {"conv_chain": 2}),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CASES)
def test_stages_of_resnets(name: str) -> None:
    """Every shortcut of a stage's first block is part of another kernel."""
    (module, inputs), counts = CASES[name]
    exe = convloom.compile(module, inputs, target="interpreter")
    ops = [step.op for step in exe.plan.steps]
    assert {op: ops.count(op) for op in counts} == counts
    paths = [step.module_path for step in exe.plan.steps if step.op == "conv2d"]
    assert not [path for path in paths if "downsample" in path], paths
    nets.check(exe(*inputs), module, inputs)


# What the ops refuse.


def image(*shape: int) -> TensorSpec:
    return TensorSpec(shape, torch.float32, Layout.NHWC)


def weight(*shape: int) -> TensorSpec:
    return TensorSpec(shape, torch.float32)


W = weight(12, 8, 1, 1)
CHAIN = ConvChain(shortcut=Conv2d((2, 2)))
MESSAGES: tuple[tuple[str, Attributes, tuple[TensorSpec, ...], str], ...] = (
    (
        "conv_sum", ConvSum(Conv2d(groups=2)),
        (image(1, 8, 4, 4), weight(12, 4, 1, 1), image(1, 8, 4, 4), W), "without groups",
    ),
    (
        "conv_sum", ConvSum(second=Conv2d((2, 2))),
        (image(1, 8, 4, 4), W, image(1, 8, 4, 4), W), "expected equal results, got",
    ),
    (
        "conv_chain", CHAIN,
        (image(1, 8, 4, 4), W, image(1, 6, 8, 8), weight(12, 6, 3, 3)), "that is 1x1",
    ),
    (
        "conv_chain", CHAIN,
        (image(1, 8, 4, 4), W, image(1, 6, 4, 4), weight(12, 6, 1, 1)), "the shortcut gives",
    ),
    ("conv_chain", CHAIN, (image(1, 8, 4, 4), W), "expected 4 inputs, got 2"),
)  # fmt: skip


@pytest.mark.parametrize(("name", "attributes", "specs", "message"), MESSAGES)
def test_impossible_geometry_is_named(
    name: str, attributes: Attributes, specs: tuple[TensorSpec, ...], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)) as raised:
        registry.get(name).infer(attributes, specs)
    assert str(raised.value).startswith(f"{name}: ")


# What the compiler makes of them.

HALF = torch.float16
BIAS = (Stage("add"), Stage("relu"))


def half_image(c: int, size: int) -> TensorSpec:
    return TensorSpec((32, c, size, size), HALF, Layout.NHWC)


def half_weight(k: int, c: int, r: int = 1) -> TensorSpec:
    return TensorSpec((k, c, r, r), HALF)


def vector(k: int) -> TensorSpec:
    return TensorSpec((k, 1, 1), torch.float32)


def block_end(c: int, r: int, beside: int, stride: int, k: int, size: int) -> Problem:
    """The end of a block with a shortcut, with bias and activation."""
    attributes = ConvSum(Conv2d((1, 1), (r // 2,) * 4), Conv2d((stride, stride)))
    s = half_image(beside, size * stride)
    specs = (half_image(c, size), half_weight(k, c, r), s, half_weight(k, beside))
    return harness.problem_for(conv_sum.OP, attributes, specs, BIAS, (vector(k),))


def stage_start(mid: int, wide: int, beside: int, stride: int, size: int, front: bool) -> Problem:
    """A stage's first block and the next reduction."""
    first = Conv2d((stride, stride), (1,) * 4) if front else None
    attributes = ConvChain(first, BIAS if front else (), BIAS, True, BIAS, Conv2d((stride, stride)))
    specs = [half_image(mid, size * (stride if front else 1))]
    if front:
        specs += [half_weight(mid, mid, 3), vector(mid)]
    specs += [half_weight(wide, mid), half_image(beside, size * stride), half_weight(wide, beside)]
    specs += [vector(wide), half_weight(mid, wide), vector(mid)]
    return harness.problem_for(conv_chain.OP, attributes, tuple(specs))


COMPILED = {
    "resnet18 stage 2": block_end(128, 3, 64, 2, 128, 28),
    "resnet50 stage 1, apart": block_end(64, 1, 64, 1, 256, 56),
    "resnet50 stage 3": block_end(256, 1, 512, 2, 1024, 14),
    "resnet50 stage 1": stage_start(64, 256, 64, 1, 56, front=True),
    "resnet50 stage 2": stage_start(128, 512, 256, 2, 28, front=True),
    "resnext50 stage 1": stage_start(128, 256, 64, 1, 56, front=False),
}


@test_offline.by_generation
@pytest.mark.parametrize("name", COMPILED)
def test_second_products_do_not_spill(name: str, target: targets.Target) -> None:
    (report,) = test_offline.assert_healthy(COMPILED[name], target)
    assert any(report.count(opcode) for opcode in test_offline.TENSOR_CORES), report.instructions
    assert report.count("LDGSTS.128") and not report.count("LDG.U16"), report.instructions


def test_what_is_expected_to_spill_comes_last() -> None:
    sm_80, sm_90, sm_100 = (targets.parse(f"cuda:sm_{at}") for at in (80, 90, 100))

    def reason(name: str, target: targets.Target, warps: int, **blocks: int) -> str:
        tile = config(warps, 3, BLOCK_K=64, INNER_STAGES=1, **blocks)
        return str(conv_chain.crowded(COMPILED[name], tile, target))

    tall = {"BLOCK_M": 128, "BLOCK_SHORTCUT": 64}
    assert reason("resnet50 stage 1", sm_90, 4, BLOCK_N=32, **tall) == "None"
    assert "more than 128 spill" in reason("resnet50 stage 1", sm_90, 4, BLOCK_N=64, **tall)
    assert "more than 0 spill" in reason("resnet50 stage 1", sm_80, 4, BLOCK_N=32, **tall)
    assert "more than 96 spill" in reason("resnext50 stage 1", sm_80, 8, BLOCK_N=64, **tall)
    sizes = tiles.Sizes(6272, 256, 256, 256, 512, 0, HALF)
    square = config(4, 3, BLOCK_M=64, BLOCK_N=32, BLOCK_K=64, INNER_STAGES=1, BLOCK_SHORTCUT=64)
    assert "more than 192 spill" in str(tiles.crowded(sizes, square, sm_100))


def test_shared_memory_counts_the_shortcut() -> None:
    """128 -> 512 -> 128 channels with 256 beside them: the compiler takes 246,016 bytes."""
    sizes = tiles.Sizes(25088, 128, 128, 128, 256, 0, HALF)
    tile = config(8, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, INNER_STAGES=2, BLOCK_SHORTCUT=256)
    assert "245760 bytes" in str(tiles.legal(sizes, tile, targets.parse("cuda:sm_90")))


def test_the_rules_name_both_orders() -> None:
    """Each chain with a shortcut exists for either term of the sum."""
    names = [rule.name for rule in bottlenecks.FUSIONS[0].rules if "conv1x1(s)" in rule.name]
    assert len(names) == 6
