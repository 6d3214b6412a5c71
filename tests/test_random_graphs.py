"""Random convolutional networks, compiled and compared with fp64 PyTorch.

A network is made from its seed alone; a failure prints the seed and the program that the network
runs, one line per step.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from . import nets

QUICK = range(20)
MANY = range(20, 200)


class RandomNet(nn.Module):
    """A DAG of layers over a growing list of images, with several results.

    Each step reads earlier images, some of them more than once, and appends one. Steps whose result
    nobody reads are dead branches.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.layers = nn.ModuleList()
        self.program: list[str] = []
        self.steps: list[tuple[Callable[..., torch.Tensor], tuple[int, ...]]] = []
        self.shapes: list[tuple[int, int, int]] = []
        self.batch = self.random.randint(1, 3)
        first = (self.random.choice((1, 3, 5, 8)), self._odd(), self._odd())
        self.shapes.append(first)
        if self.random.random() < 0.3:
            self.shapes.append(first)
        self.inputs = len(self.shapes)
        for _ in range(self.random.randint(4, 14)):
            self.random.choice(STEPS)(self)
        last = len(self.shapes) - 1
        others = self.random.sample(range(last + 1), k=min(last + 1, self.random.randint(0, 2)))
        self.results = [last, *others]
        c, h, w = self.shapes[last]
        self.flat = self.random.random() < 0.5
        self.head = nn.Linear(c * h * w if self.flat else c, self.random.choice((5, 8, 10)))

    def _odd(self) -> int:
        return self.random.choice((4, 5, 7, 8, 11))

    def add(
        self,
        text: str,
        function: Callable[..., torch.Tensor],
        sources: tuple[int, ...],
        shape: tuple[int, int, int],
    ) -> None:
        """One more step; `shape` is (channels, height, width) of its result."""
        self.program.append(f"%{len(self.shapes)} = {text} of {sources} : {shape}")
        self.steps.append((function, sources))
        self.shapes.append(shape)

    def layer(self, layer: nn.Module) -> nn.Module:
        """Registers a layer."""
        self.layers.append(layer)
        return layer

    def image(self) -> int:
        """An earlier image, the latest ones more often."""
        return self.random.choice((len(self.shapes) - 1, self.random.randrange(len(self.shapes))))

    def like(self, source: int) -> int:
        """An image of the same shape, perhaps itself."""
        same = [at for at, shape in enumerate(self.shapes) if shape == self.shapes[source]]
        return self.random.choice(same)

    def forward(self, *images: torch.Tensor) -> Any:
        known = list(images)
        for function, sources in self.steps:
            known.append(function(*(known[at] for at in sources)))
        last = known[self.results[0]]
        pooled = last.flatten(1) if self.flat else last.mean((2, 3))
        return self.head(pooled), [known[at] for at in self.results]


def after_window(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def convolve(net: RandomNet) -> None:
    source = net.image()
    c, h, w = net.shapes[source]
    kernel = net.random.choice((1, 3, 5))
    stride, dilation = net.random.choice((1, 1, 2)), net.random.choice((1, 1, 2))
    padding = net.random.choice((0, kernel // 2 * dilation, 1))
    groups = net.random.choice([g for g in (1, 1, 2, c) if c % g == 0])
    k = groups * net.random.choice((1, 2, 3, 8))
    size = [after_window(x, kernel, stride, padding, dilation) for x in (h, w)]
    if min(size) < 1:
        return
    layer = net.layer(
        nn.Conv2d(c, k, kernel, stride, padding, dilation, groups, bias=net.random.random() < 0.5)
    )
    net.add(str(layer), layer, (source,), (k, *size))


def reuse_a_layer(net: RandomNet) -> None:
    """A convolution or batch norm that already stands elsewhere, with the same weights."""
    shared = [layer for layer in net.layers if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d))]
    source = net.image()
    c, h, w = net.shapes[source]
    for layer in net.random.sample(shared, len(shared)):
        if isinstance(layer, nn.BatchNorm2d) and layer.num_features == c:
            net.add(f"shared {layer}", layer, (source,), (c, h, w))
            return
        if isinstance(layer, nn.Conv2d) and layer.in_channels == c:
            window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            size = [after_window(*row) for row in zip((h, w), *window, strict=True)]
            if min(size) > 0:
                net.add(f"shared {layer}", layer, (source,), (layer.out_channels, *size))
                return


def normalise(net: RandomNet) -> None:
    source = net.image()
    shape = net.shapes[source]
    layer = net.layer(nn.BatchNorm2d(shape[0], affine=net.random.random() < 0.8))
    net.add("batch_norm", layer, (source,), shape)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "elu": F.elu,
    "abs": torch.abs,
    "negated": lambda x: -x,
    "1 - x": lambda x: 1.0 - x,
    "0.5 x": lambda x: x * 0.5,
    "by hand": lambda x: x * torch.sigmoid(x),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
}


def activate(net: RandomNet) -> None:
    source = net.image()
    for _ in range(net.random.randint(1, 3)):
        name = net.random.choice(list(ACTIVATIONS))
        net.add(name, ACTIVATIONS[name], (source,), net.shapes[source])
        source = len(net.shapes) - 1


def combine(net: RandomNet) -> None:
    """A residual: another image of the same shape, perhaps the very same one."""
    source = net.image()
    name = net.random.choice(("add", "sub", "mul", "maximum", "minimum"))
    pair = (source, net.like(source))
    pair = pair if net.random.random() < 0.5 else pair[::-1]
    net.add(name, getattr(torch, name), pair, net.shapes[source])


def scale_channels(net: RandomNet) -> None:
    """Squeeze and excitation: an image by a number per sample and channel."""
    source = net.image()
    function = lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True))  # noqa: E731
    net.add("squeeze-excite", function, (source,), net.shapes[source])


def join(net: RandomNet) -> None:
    source = net.image()
    size = net.shapes[source][1:]
    same = [at for at, shape in enumerate(net.shapes) if shape[1:] == size]
    sources = tuple(net.random.choice(same) for _ in range(net.random.randint(1, 3)))
    parts = (source, *sources)
    channels = sum(net.shapes[at][0] for at in parts)
    if channels <= 64:
        net.add("cat", lambda *images: torch.cat(images, 1), parts, (channels, *size))


def cut(net: RandomNet) -> None:
    source = net.image()
    c, h, w = net.shapes[source]
    if c < 2:
        return
    start = net.random.randrange(c - 1)
    stop = net.random.randint(start + 1, c)
    net.add(f"[:, {start}:{stop}]", lambda x: x[:, start:stop], (source,), (stop - start, h, w))


def shuffle(net: RandomNet) -> None:
    source = net.image()
    c, h, w = net.shapes[source]
    if c % 2:
        return

    def function(x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, 2, c // 2, h, w).transpose(1, 2).reshape(-1, c, h, w)

    net.add("shuffle", function, (source,), (c, h, w))


def pool(net: RandomNet) -> None:
    source = net.image()
    c, h, w = net.shapes[source]
    kernel, stride = net.random.choice((2, 3)), net.random.choice((1, 2))
    padding = net.random.choice((0, kernel // 2))
    size = tuple(after_window(x, kernel, stride, padding) for x in (h, w))
    if min(size) < 1:
        return
    layer: nn.Module = net.random.choice((nn.MaxPool2d, nn.AvgPool2d))(kernel, stride, padding)
    if net.random.random() < 0.5:
        size = (net.random.randint(1, 4), net.random.randint(1, 4))
        layer = net.random.choice((nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d))(size)
    net.add(str(layer), layer, (source,), (c, *size))


def branch_out(net: RandomNet) -> None:
    """Siblings of one image in widths that can be merged and joined in place, as in Inception."""
    source = net.image()
    c, h, w = net.shapes[source]
    kernel, act = net.random.choice((1, 3)), net.random.choice(("relu", "silu"))
    made = []
    for _ in range(net.random.randint(2, 4)):
        k = net.random.choice((8, 16))
        layer = net.layer(nn.Conv2d(c, k, kernel, padding=kernel // 2))
        net.add(str(layer), layer, (source,), (k, h, w))
        if net.random.random() < 0.8:
            net.add(act, ACTIVATIONS[act], (len(net.shapes) - 1,), (k, h, w))
        made.append(len(net.shapes) - 1)
    parts = tuple(net.random.sample(made, net.random.randint(2, len(made))))
    channels = sum(net.shapes[at][0] for at in parts)
    net.add("cat", lambda *images: torch.cat(images, 1), parts, (channels, h, w))


def bottleneck(net: RandomNet) -> None:
    """1x1, 3x3, 1x1 and the residual, wide enough to be one chain in half precision."""
    source = net.image()
    c, h, w = net.shapes[source]
    if c < 8:
        layer = net.layer(nn.Conv2d(c, 32, 1))
        net.add(str(layer), layer, (source,), (32, h, w))
        source, c = len(net.shapes) - 1, 32
    last = source
    for k, kernel in ((16, 1), (16, 3), (c, 1)):
        layer = net.layer(nn.Conv2d(net.shapes[last][0], k, kernel, padding=kernel // 2))
        net.add(str(layer), layer, (last,), (k, h, w))
        if kernel == 3 or net.random.random() < 0.8:
            net.add("relu", torch.relu, (len(net.shapes) - 1,), (k, h, w))
        last = len(net.shapes) - 1
    net.add("add", torch.add, (last, source), (c, h, w))
    net.add("relu", torch.relu, (last + 1,), (c, h, w))


STEPS: tuple[Callable[[RandomNet], None], ...] = (
    convolve, convolve, convolve, reuse_a_layer, normalise, normalise, activate, activate, combine,
    combine, join, join, scale_channels, cut, shuffle, pool, branch_out, bottleneck,
)  # fmt: skip


def make(seed: int) -> nets.Made:
    net = RandomNet(seed)
    nets.randomise(net, seed)
    shapes = ((net.batch, *net.shapes[at]) for at in range(net.inputs))
    return net, nets.inputs_of(*shapes, seed=seed)


def check(seed: int, net: nn.Module, inputs: Any, *results: Any, dtype: Any = None) -> None:
    truth = nets.Truth(net, inputs, dtype)
    for result in results:
        try:
            truth.check(result)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}\n" + "\n".join(net.program)) from error


def test_the_generator_reaches_what_it_is_for() -> None:
    programs = ["\n".join(RandomNet(seed).program) for seed in QUICK]
    everything = "\n".join(programs)
    wanted = ("groups=", "stride=(2, 2)", "dilation=(2, 2)", "shared Conv2d", "batch_norm",
              "shuffle", "cat", "squeeze", "MaxPool2d", "Adaptive", "[:, ",
              "by hand", "(32, 16,")  # fmt: skip
    assert [word for word in wanted if word not in everything] == []
    assert programs == ["\n".join(RandomNet(seed).program) for seed in QUICK], "seeds decide all"


@pytest.mark.interpreter
@pytest.mark.parametrize("seed", QUICK)
def test_random_network(seed: int) -> None:
    module, inputs = make(seed)
    with nets.exporting_once():
        fused = convloom.compile(module, inputs, target="interpreter")
        plain = convloom.compile(module, inputs, target="interpreter", passes="none")
    result = fused(*inputs)
    check(seed, module, inputs, result, plain(*inputs))
    # A returned image of one channel may cost a copy where its flattening no longer shares one.
    most = len(plain.plan.steps) + len(fused.plan.outputs)
    assert len(fused.plan.steps) <= most, "fusion made more kernels"
    again = fused(*inputs)
    assert all(map(torch.equal, nets.tensors_of(again), nets.tensors_of(result)))


HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.interpreter
@pytest.mark.parametrize("seed", [3, 8, 14])
@pytest.mark.parametrize("dtype", HALVES)
def test_random_network_in_half_precision(seed: int, dtype: torch.dtype) -> None:
    module, inputs = make(seed)
    exe = convloom.compile(module, inputs, target="interpreter", dtype=dtype)
    check(seed, module, inputs, exe(*inputs), dtype=dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("seed", [1, 5, 9, 13])
def test_random_network_with_a_dynamic_batch(seed: int) -> None:
    check_batches(seed)


def check_batches(seed: int) -> None:
    module, inputs = make(seed)
    exe = convloom.compile(module, inputs, target="interpreter", dynamic_batch=(1, 5))
    for batch in (3, 1, 5):
        shapes = ((batch, *x.shape[1:]) for x in inputs)
        images = nets.inputs_of(*shapes, seed=seed + batch)
        check(seed, module, images, exe(*images))


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("seed", MANY)
def test_more_random_networks(seed: int) -> None:
    test_random_network(seed)
    test_random_network_in_half_precision(seed, random.Random(seed).choice(HALVES))
    check_batches(seed)
