"""The zoo's networks, compiled as a whole and compared with fp64 PyTorch.

By default at the smallest resolution that keeps every layer, and with hidden linear layers of 64
units (the classifiers of AlexNet and VGG are nine tenths of their weights and none of their
structure); as published under `slow`. Weights and batch-norm statistics are random.
"""

from __future__ import annotations

from functools import cache

import convloom
import pytest
import torch
from convloom import zoo
from convloom.compiler.run.executable import Executable
from convloom.kernels.contract.tolerance import bounds
from torch import nn

from . import nets

# The side of a square input that the default run uses; None is the published size.
SIDES: dict[str, int | None] = {
    "lenet5": None,
    "cifar_convnet": None,
    "mlp": None,
    "alexnet": None,
    "alexnet_grouped": None,
    "alexnet_torchvision": 64,
    "zfnet": None,
    "vgg_a": 32,
    "vgg_a_lrn": 32,
    "vgg_b": 32,
    "vgg_c": 32,
    "vgg_d": 32,
    "vgg_e": 32,
    "googlenet": 64,
    "googlenet_paper": 64,
    "resnet18": None,
    "resnet34": 32,
    "resnet50": 32,
    "resnet101": 32,
    "resnet152": 32,
}
CONVS = {
    "lenet5": 2, "cifar_convnet": 1, "mlp": 0, "alexnet": 5, "alexnet_grouped": 5,
    "alexnet_torchvision": 5, "zfnet": 5, "vgg_a": 8, "vgg_a_lrn": 8, "vgg_b": 10, "vgg_c": 13,
    "vgg_d": 13, "vgg_e": 16, "googlenet": 57, "googlenet_paper": 57, "resnet18": 20,
    "resnet34": 36, "resnet50": 53, "resnet101": 104, "resnet152": 155,
}  # fmt: skip
"""Convolutions of each network, shortcuts included."""


def image_of(name: str, side: int | None, batch: int = 1) -> torch.Tensor:
    channels, height, _ = zoo.entry(name).input_shape
    return nets.inputs_of((batch, channels, side or height, side or height))[0]


def narrowed(module: nn.Module, width: int = 64) -> nn.Module:
    """The network with hidden linear layers of at most `width` units."""
    before: int | None = None
    for path, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            results = min(layer.out_features, width)
            module.set_submodule(path, nn.Linear(before or layer.in_features, results))
            before = results if results < layer.out_features else None
    return module


@cache
def small(name: str) -> nn.Module:
    module = zoo.build(name, num_classes=10)
    return nets.randomise(module if SIDES[name] is None and name == "mlp" else narrowed(module))


def check(exe: Executable, name: str, module: nn.Module, x: torch.Tensor) -> None:
    nets.check(exe(x), module, (x,))
    counts = exe.summary
    assert counts["convs"] == CONVS[name] and counts["torch_fallbacks"] == 0
    assert counts["arena_bytes"] < counts["activation_bytes"]
    assert not any(step.op == "batch_norm" for step in exe.plan.steps), "an unfolded batch norm"


LONG = (
    "alexnet_torchvision", "googlenet_paper", "resnet34", "resnet101", "resnet152", "vgg_a",
    "vgg_b", "vgg_c", "vgg_e", "zfnet",
)  # fmt: skip
"""Others are built alike: AlexNet, GoogLeNet, VGG-A with LRN and VGG-D, ResNet-18 and ResNet-50."""


@pytest.mark.untraced
@pytest.mark.interpreter
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in SIDES]
)
def test_network(name: str) -> None:
    x = image_of(name, SIDES[name])
    with nets.exporting_once():
        exe = convloom.compile(small(name), (x,), target="interpreter")
    check(exe, name, small(name), x)


def test_the_table_is_the_first_part_of_the_zoo() -> None:
    assert tuple(SIDES) == zoo.names()[: len(SIDES)]
    assert SIDES.keys() == CONVS.keys()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("lenet5", torch.float16),
        ("lenet5", torch.bfloat16),
        ("googlenet", torch.bfloat16),
        ("resnet50", torch.float16),
    ],
)
def test_network_in_half_precision(name: str, dtype: torch.dtype) -> None:
    x = image_of(name, SIDES[name])
    with nets.exporting_once():
        exe = convloom.compile(small(name), (x,), target="interpreter", dtype=dtype)
    result = exe(x)
    assert result.dtype is torch.float32
    nets.check(result, small(name), (x,), dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["lenet5", "resnet18"])
def test_network_with_a_dynamic_batch(name: str) -> None:
    side = 32 if name == "resnet18" else SIDES[name]
    exe = convloom.compile(
        small(name), (image_of(name, side),), target="interpreter", dynamic_batch=(1, 2)
    )
    for batch in (2, 1):
        x = image_of(name, side, batch)
        nets.check(exe(x), small(name), (x,))


@pytest.mark.interpreter
def test_without_passes() -> None:
    """What fusion must not change: the same network, one kernel per captured op."""
    x = image_of("resnet18", 32)
    with nets.exporting_once():
        plain = convloom.compile(small("resnet18"), (x,), target="interpreter", passes="none")
        fused = convloom.compile(small("resnet18"), (x,), target="interpreter")
    nets.check(plain(x), small("resnet18"), (x,))
    assert len(fused.kernels) * 2 < len(plain.kernels)
    assert sum(step.op == "batch_norm" for step in plain.plan.steps) == 20


@pytest.mark.interpreter
def test_each_step_of_resnet18_is_as_exact_as_eager() -> None:
    x = image_of("resnet18", 32)
    with nets.exporting_once():
        exe = convloom.compile(small("resnet18"), (x,), target="interpreter")
    _, allowed = bounds(torch.float32, nets.depth_of(small("resnet18")))
    rows = exe.errors(x)
    assert len(rows) == len(exe.plan.steps)
    for row in rows:
        assert row.compiled <= 2 * row.eager + 10 * allowed, row


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("name", SIDES)
def test_network_as_published(name: str) -> None:
    module, x = nets.randomise(zoo.build(name)), image_of(name, None)
    exe = convloom.compile(module, (x,), target="interpreter")
    check(exe, name, module, x)


OTHERS = [name for name in zoo.names() if name not in (*SIDES, "unet")]
"""The rest of the zoo, but for U-Net, whose smallest image is large."""


def half_case(name: str) -> tuple[nn.Module, torch.Tensor, nets.Truth]:
    """A network, small images for it, and what fp16 makes of them."""
    if name in SIDES:
        module, x = small(name), image_of(name, SIDES[name])
    else:
        module = nets.randomise(zoo.build(name, num_classes=10), seed=1)
        least = 188 if name == "unet" else 96
        x = image_of(name, min(zoo.entry(name).input_shape[1], least))
    module = nets.within_half(module, x)
    truth = nets.Truth(module, (x,), torch.float16)
    assert truth.eager[0].isfinite().all(), "these weights overflow in fp16"
    return module, x, truth


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("name", zoo.names())
def test_fused_in_half_precision(name: str) -> None:
    """Many fusions are for half types only: with and without them the network is the same."""
    module, x, truth = half_case(name)
    with nets.exporting_once():
        fused, plain = (
            convloom.compile(
                module, (x,), target="interpreter", dtype=torch.float16, passes=passes
            )
            for passes in ("default", "none")
        )
    assert len(fused.kernels) < len(plain.kernels)
    truth.check(fused(x))
    truth.check(plain(x))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["emulator:sm_80", "emulator:sm_90"])
@pytest.mark.parametrize("name", zoo.names())
def test_compiled_in_half_precision(name: str, target: str) -> None:
    """What a GPU would run."""
    module, x, truth = half_case(name)
    exe = convloom.compile(module, (x,), target=target, dtype=torch.float16, tuning="heuristic")
    truth.check(exe(x))


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("name", OTHERS)
def test_the_rest_of_the_zoo(name: str) -> None:
    # Seed 0 draws an EfficientNet-B0 that magnifies rounding ten thousand times, in eager too.
    module = nets.randomise(zoo.build(name, num_classes=10), seed=1)
    x = image_of(name, min(zoo.entry(name).input_shape[1], 96))
    exe = convloom.compile(module, (x,), target="interpreter")
    nets.check(exe(x), module, (x,))
    assert exe.summary["torch_fallbacks"] == 0


@pytest.mark.interpreter
def test_a_classifier_over_a_thousand_samples() -> None:
    """The interpreter takes many rows at a time, but no tile over Triton's 2**20 elements."""
    module, inputs = nets.make(
        lambda m, x: m.last(torch.relu(m.first(x))), (1030, 20),
        first=nn.Linear(20, 12), last=nn.Linear(12, 5),
    )  # fmt: skip
    exe = convloom.compile(module, inputs, target="interpreter", tuning="heuristic")
    assert [kernel.step.op for kernel in exe.kernels] == ["head"]
    nets.check(exe(*inputs), module, inputs)
