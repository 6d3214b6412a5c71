"""The networks on which the tests of passes try each pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import nets
from .nets import IMAGE, Made, make


def conv(r: int = 3, c: int = 6, k: int = 6, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c, k, r, padding=options.pop("padding", r // 2), **options)


def norm(c: int = 6) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(c)


# One network per thing a pass is about. The graph a golden test starts from is the capture after
# the passes that come before.


def identities() -> Made:
    def function(m: Any, x: torch.Tensor) -> Any:
        y = m.drop(m.conv(x.detach()).clone())
        return y.reshape(IMAGE).permute(0, 1, 2, 3).expand(IMAGE).contiguous(), x.clone()

    return make(function, IMAGE, conv=conv(), drop=nn.Dropout())


def constants() -> Made:
    def function(m: Any, x: torch.Tensor) -> Any:
        weight = m.conv.weight
        scale = weight.square().sum((1, 2, 3), keepdim=True).add(1e-5).rsqrt()
        return F.conv2d(x, weight * scale, m.conv.bias, padding=1)

    return make(function, IMAGE, conv=conv())


def equal_nodes() -> Made:
    def function(m: Any, x: torch.Tensor, r: torch.Tensor) -> Any:
        a = m.conv(x).relu() + m.conv(x).sigmoid()
        return a + m.conv(r), torch.relu(m.conv(r)), (x - r, r - x, x - r)

    return make(function, IMAGE, IMAGE, conv=conv())


def dead_nodes() -> Made:
    def function(m: Any, x: torch.Tensor, unused: torch.Tensor) -> Any:
        _, second, _ = m.conv(x).chunk(3, 1)
        return second.relu()

    return make(function, IMAGE, IMAGE, conv=conv())


def normalised() -> Made:
    def function(m: Any, x: torch.Tensor) -> Any:
        images = m.norm(m.conv(x)).relu() + m.grouped_norm(m.grouped(x))
        return m.flat_norm(m.linear(images.mean((2, 3))))

    return make(
        function,
        IMAGE,
        conv=conv(bias=False),
        norm=norm(),
        grouped=conv(groups=3),
        grouped_norm=nn.BatchNorm2d(6, affine=False),
        linear=nn.Linear(6, 4),
        flat_norm=nn.BatchNorm1d(4),
    )


def unfoldable() -> Made:
    """Every reason not to fold: a shared result, a shared weight, a stage between, no layer, and
    channels that are not the last dimension, though there are as many."""

    def function(m: Any, x: torch.Tensor) -> Any:
        a = m.a(x)
        b = m.norm_b(m.b(x)) + m.b(x + 1.0)
        c = m.norm_c(m.c(x).relu())
        d = m.norm_d(m.d(x.flatten(2)))
        return m.norm_a(a) + a, b, c, d, m.norm_x(x)

    layers = {name: conv() for name in "abc"} | {f"norm_{name}": norm() for name in "abcx"}
    return make(function, IMAGE, **layers, d=nn.Linear(35, 6), norm_d=nn.BatchNorm1d(6))


def written_out() -> Made:
    """Activations by hand: one in another, one whose inner value is read again, one that takes two
    values at a time; and a sum with itself."""

    def function(m: Any, x: torch.Tensor) -> Any:
        a, b, c, d = m.a(x), m.b(x), m.c(x), m.d(x)
        half = torch.tanh(b)
        gelu = (0.5 * d) * (1 + torch.tanh(d + d * d * d))
        return a * (1 - (a + torch.exp(a))), b * half, half, c + c, gelu

    return make(function, IMAGE, **{name: conv() for name in "abcd"})


def residual_block() -> Made:
    def function(m: Any, x: torch.Tensor) -> Any:
        y = torch.relu(m.norm1(m.conv1(x)))
        return torch.relu(m.norm2(m.conv2(y)) + x)

    return make(function, IMAGE, conv1=conv(), norm1=norm(), conv2=conv(), norm2=norm())


def preactivation() -> Made:
    """A shifted ReLU of a batch norm before a padded 1x1, where it can sink, and a padded 3x3."""

    def function(m: Any, x: torch.Tensor) -> Any:
        sunk = m.small(torch.relu(m.norm1(x) + 0.5))
        kept = m.large(torch.relu(m.norm2(x) + 0.5))
        return sunk, kept

    return make(
        function, IMAGE, norm1=norm(), norm2=norm(), small=conv(1, padding=1), large=conv(3)
    )


def mixed_layouts() -> Made:
    def function(m: Any, x: torch.Tensor, r: torch.Tensor) -> Any:
        y = m.conv(x)
        shuffled = y.view(2, 2, 3, 7, 5).transpose(1, 2).reshape(2, 6, 7, 5)
        return m.conv(shuffled) + r.view(2, 6, 1, 1), y.flatten(1), r

    return make(function, IMAGE, (2, 6), conv=conv())


def classifier() -> Made:
    def function(m: Any, x: torch.Tensor) -> Any:
        return m.head(F.max_pool2d(torch.relu(m.norm(m.conv(x))), 2).flatten(1))

    return make(function, IMAGE, conv=conv(), norm=norm(), head=nn.Linear(36, 4))


def composites() -> Made:
    def function(m: Any, x: torch.Tensor) -> Any:
        y = F.local_response_norm(m.conv(x), 3, 1e-2)
        return F.lp_pool2d(y.abs() * torch.sigmoid(y.abs()), 3.0, 2)

    return make(function, IMAGE, conv=conv())


def siblings() -> Made:
    """The start of an Inception block, and siblings that may not be merged."""

    def function(m: Any, x: torch.Tensor) -> Any:
        a, b, c = (torch.relu(layer(x)) for layer in (m.a, m.b, m.c))
        block = torch.cat([a, m.d(b), m.e(c)], 1)
        return F.max_pool2d(block, 2), m.odd(x), m.wide(x) + m.shift, m.wide2(x) + m.shift2

    layers = {name: conv(1, k=k) for name, k in {"a": 16, "b": 8, "c": 8, "odd": 5}.items()}
    layers |= {"d": conv(3, 8, 8), "e": conv(5, 8, 16), "wide": conv(3, k=8), "wide2": conv(3, k=8)}
    module, inputs = make(function, (2, 6, 7, 8), **layers)
    # One number per column, not per channel, though there are as many.
    for name in ("shift", "shift2"):
        module.register_parameter(name, nn.Parameter(nets.inputs_of((8,), seed=len(name))[0]))
    return module, inputs


def small_network() -> Made:
    def function(m: Any, x: torch.Tensor) -> Any:
        for layer in (m.conv1, m.conv2):
            x = F.max_pool2d(torch.relu(layer(x)), 2)
        return m.fc2(torch.relu(m.fc1(x.flatten(1))))

    layers = {"conv1": conv(3, 3, 4), "conv2": conv(3, 4, 8)}
    return make(function, (2, 3, 8, 8), **layers, fc1=nn.Linear(32, 12), fc2=nn.Linear(12, 5))


def bottlenecks() -> Made:
    def block(m: Any, x: torch.Tensor, at: int) -> torch.Tensor:
        names = (f"reduce{at}", f"middle{at}", f"expand{at}")
        reduce, middle, expand = (getattr(m, name) for name in names)
        return torch.relu(expand(torch.relu(middle(torch.relu(reduce(x))))) + x)

    layers = {}
    for at in (1, 2):
        layers |= {f"reduce{at}": conv(1, 32, 16), f"middle{at}": conv(3, 16, 16)}
        layers |= {f"expand{at}": conv(1, 16, 32)}
    module, (x,) = make(lambda m, x: block(m, block(m, x, 1), 2), (2, 32, 5, 4), **layers)
    return module.half(), (x.half(),)


def dense_block() -> Made:
    """Every layer joins all the results before it anew, as torchvision's DenseNet does."""

    def function(m: Any, x: torch.Tensor) -> Any:
        results = [m.stem(x)]
        for layer in (m.a, m.b, m.c):
            results.append(torch.relu(layer(torch.cat(results, 1))))
        return torch.cat(results, 1), torch.cat(results[1:3], 1).amax((2, 3))

    layers = {name: conv(3, 8 * at, 8) for at, name in enumerate("abc", start=1)}
    return make(function, IMAGE, stem=conv(1, 6, 8), **layers)


def averaged_branch() -> Made:
    """The pooling branch of an Inception block, and one whose projection has nobody to join."""

    def function(m: Any, x: torch.Tensor) -> Any:
        branch = torch.relu(m.b(F.avg_pool2d(x, 3, 1, 1)))
        block = torch.cat([torch.relu(m.a(x)), branch], 1)
        return m.c(F.avg_pool2d(block, 3, 1, 1))

    return make(function, (2, 16, 7, 5), a=conv(1, 16), b=conv(1, 16), c=conv(1, 12))


def written_slices() -> Made:
    """An image pasted into zeros, and channels that are moved by a row (temporal shift)."""

    def function(m: Any, x: torch.Tensor) -> Any:
        image = m.conv(x)
        padded = image.new_zeros(2, 6, 9, 8)
        padded[:, :, 1:-1, 1:-2] = image
        shifted = torch.zeros_like(image)
        shifted[:, :2, 1:] = image[:, :2, :-1]
        shifted[:, 2:5] = image[:, 1:4] * 2
        shifted[:, 5] = 0.5
        return m.conv(padded), shifted

    return make(function, IMAGE, conv=conv())


def parallel_branches() -> Made:
    """A layer of RepVGG as it is trained, and what else is added to it."""

    def function(m: Any, x: torch.Tensor) -> Any:
        y = m.norm3(m.conv3(x)) + m.norm1(m.conv1(x)) + m.norm(x)
        return torch.relu(y + m.row(x) + torch.sigmoid(x))

    return make(
        function,
        IMAGE,
        conv3=conv(bias=False),
        norm3=norm(),
        conv1=conv(1, bias=False),
        norm1=norm(),
        norm=norm(),
        row=nn.Conv2d(6, 6, (1, 3), padding=(0, 1)),
    )


def normalised_image() -> Made:
    def function(m: Any, x: torch.Tensor) -> Any:
        return torch.relu(m.conv((x - m.mean) / m.std))

    module, inputs = make(function, (2, 3, 9, 8), conv=conv(3, 3, 8, stride=2))
    module.register_buffer("mean", torch.tensor([0.5, 0.25, 0.75]).view(3, 1, 1))
    module.register_buffer("std", torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1))
    return module, inputs
