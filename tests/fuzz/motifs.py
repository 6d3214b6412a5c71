"""Groups of lines in the shapes that several fusions are made of, so that each of them is reached;
widths, activations and what else reads the inner values vary."""

from __future__ import annotations

import torch

from .builder import Builder

ACTIVATIONS = ("torch.relu({0})", "F.relu6({0})", "F.silu({0})", "F.hardswish({0})", "{0}")


def _conv(b: Builder, x: str, k: int, r: int = 1, **options: int) -> str:
    settings = "".join(f", {name}={value}" for name, value in options.items())
    padding = f", padding={r // 2}" if r > 1 else ""
    return f"{b.layer(f'nn.Conv2d({b.shape(x)[1]}, {k}, {r}{padding}{settings})')}({x})"


def _conv_act(b: Builder, x: str, k: int, r: int = 1, act: str = "", **options: int) -> str:
    act = act or b.one(*ACTIVATIONS)
    y = b.let(_conv(b, x, k, r, **options))
    return y if act == "{0}" else b.let(act.format(y))


def linear(b: Builder, x: str, k: int) -> str:
    return b.let(f"{b.layer(f'nn.Linear({b.shape(x)[-1]}, {k})')}({x})")


def _image(b: Builder, channels: int) -> str:
    """An image of so many channels: one that is there, an input, or a projection."""
    x = b.pick(4)
    if b.shape(x)[1] == channels:
        return x
    if not b.statements:
        h, w = b.shape(x)[2:]
        return b.input(channels, h, w)
    return b.let(_conv(b, x, channels))


def _also_read(b: Builder, *names: str) -> None:
    """Sometimes an inner value is a result, which most fusions must not hide."""
    if b.chance(0.2):
        b.results.append(b.one(*names))


def bottleneck(b: Builder) -> None:
    """3x3, 1x1, residual and the next block's 1x1, in half precision where chains pay."""
    b.dtype = b.one(torch.float16, torch.float16, torch.bfloat16)
    x = _image(b, 32)
    t = _conv_act(b, x, 16, 1, "torch.relu({0})")
    t = _conv_act(b, t, 16, 3, "torch.relu({0})")
    y = b.let(f"torch.relu({b.let(_conv(b, t, 32))} + {x})")
    _conv_act(b, y, 16, 1, "torch.relu({0})")
    b.results += [y, b.statements[-1].targets[0]] if b.chance(0.5) else []
    _also_read(b, t)


def separable(b: Builder) -> None:
    x = _image(b, 16)
    t = _conv_act(b, x, 16, 3, groups=16)
    y = _conv_act(b, t, 24)
    if b.chance(0.5):
        _conv_act(b, y, 40)
    _also_read(b, t, y)


def shortcut(b: Builder) -> None:
    """The first block of a stage: the shortcut is a convolution, too."""
    x = _image(b, b.one(6, 8))
    stride = b.one(1, 2)
    # Of the very same image, the two would be one convolution.
    inner = _conv_act(b, x, 6, 1, "torch.relu({0})") if b.alternative(True, False) else x
    a = b.let(_conv(b, inner, 12, 3, stride=stride))
    s = b.let(_conv(b, x, 12, 1, stride=stride))
    terms = [a, s]
    b.random.shuffle(terms)
    b.let(f"torch.relu({terms[0]} + {terms[1]})")
    _also_read(b, a, s)


def pooled_conv(b: Builder) -> None:
    y = _conv_act(b, _image(b, b.one(4, 16)), b.one(8, 24), 3, "torch.relu({0})")
    h, w = b.shape(y)[2:]
    text = b.one(f"F.max_pool2d({y}, 2)", f"F.avg_pool2d({y}, 2)", f"{y}.mean((2, 3))",
                 f"F.adaptive_avg_pool2d({y}, 1)", f"F.avg_pool2d({y}, ({h}, {w}))")  # fmt: skip
    b.let(text)
    _also_read(b, y)


def conv_mean(b: Builder) -> None:
    y = _conv_act(b, _image(b, 16), 24, 3, "torch.relu({0})")
    b.let(f"F.adaptive_avg_pool2d({y}, 1)")


def conv_pool(b: Builder) -> None:
    y = _conv_act(b, _image(b, 16), 24, 3, "torch.relu({0})")
    b.let(f"F.max_pool2d({y}, 2)")


def pool_conv(b: Builder) -> None:
    x = _image(b, 16)
    t = b.let(b.one(f"F.max_pool2d({x}, 3, 1, 1)", f"F.avg_pool2d({x}, 3, 1, 1)"))
    _conv_act(b, t, 24)
    _also_read(b, t)


def averaged_branch(b: Builder) -> None:
    """A pooling branch beside convolutions of the same image, joined: an Inception block."""
    x = _image(b, 16)
    t = b.let(f"F.avg_pool2d({x}, 3, 1, 1)")
    parts = [_conv_act(b, t, 8, 1, "torch.relu({0})")]
    parts += [_conv_act(b, x, b.one(8, 16), b.one(1, 1, 3), "torch.relu({0})") for _ in range(2)]
    b.random.shuffle(parts)
    b.let(f"torch.cat([{', '.join(parts)}], 1)")
    _also_read(b, *parts)


def dense_block(b: Builder) -> None:
    """Every layer joins the results before it anew."""
    parts = [_image(b, 8)]
    for _ in range(2):
        y = b.let(f"torch.cat([{', '.join(parts)}], 1)")
        parts.append(_conv_act(b, y, 8, 3, "torch.relu({0})"))
    b.let(f"torch.cat([{', '.join(parts)}], 1)")


def squeeze_excite(b: Builder) -> None:
    x = _image(b, 16)
    if b.chance(0.5):
        s = b.let(f"{x}.mean((2, 3), keepdim=True)")
        t = _conv_act(b, s, 6, 1, "torch.relu({0})")
        gate = b.let(f"torch.sigmoid({b.let(_conv(b, t, 16))})")
    else:
        s = b.let(f"{x}.mean((2, 3))")
        t = b.let(f"torch.relu({linear(b, s, 6)})")
        gate = b.let(f"torch.sigmoid({linear(b, t, 16)}).view(-1, 16, 1, 1)")
    b.let(f"{x} * {gate}")
    _also_read(b, s)


def lrn_pool(b: Builder) -> None:
    lines = ["F.local_response_norm({0}, 5, 0.01)", "F.max_pool2d({0}, 3, 2)"]
    x = _image(b, b.one(3, 16))
    b.random.shuffle(lines)
    for line in lines:
        x = b.let(line.format(x))
    b.let(f"torch.relu({x})")


def head(b: Builder) -> None:
    """Linear layers one behind the other, behind an average or a flattening, with a softmax."""
    x = b.pick(2, 4)
    if len(b.shape(x)) == 4:
        ends = (f"{x}.mean((2, 3))", f"F.max_pool2d({x}, 2, 1).flatten(1)", f"{x}.flatten(1)")
        x = b.let(b.alternative(*ends))
    for k in b.one((24, 16, 10), (16, 10), (10,)):
        x = b.let(f"torch.relu({linear(b, x, k)})")
    x = linear(b, x, 5)
    if b.chance(0.5):
        b.let(b.one(f"F.softmax({x}, 1)", f"F.log_softmax({x}, 1)"))


def small_net(b: Builder) -> None:
    """LeNet-like: convolutions with their poolings, and a classifier. Starts from an input."""
    x = b.input(1, 8, 8)
    for _ in range(b.one(1, 2)):
        y = b.let(f"torch.relu({b.let(_conv(b, x, 4, 3))})")
        x = b.let(f"F.max_pool2d({y}, 2)")
    x = linear(b, b.let(f"{x}.flatten(1)"), 12)
    linear(b, b.let(f"torch.relu({x})"), 10)
    b.special = False


def stem(b: Builder) -> None:
    """A normalised image as the first convolution sees it."""
    x = b.input(3, b.one(8, 9), b.one(8, 12))
    if b.chance(0.7):
        mean = b.layer("nn.Parameter(torch.zeros(3, 1, 1))")
        x = b.let(f"({x} - {mean}) / 0.25")
    y = b.let(_conv(b, x, 8, b.one(1, 3, 3, 5), stride=b.one(1, 2)))
    y = b.let(f"torch.relu({y})")


def rows_of_a_stem(b: Builder) -> None:
    """Filter rows that start at multiples of 128 bits, too many terms to be loaded one by one: the
    image is padded and read in rows."""
    b.dtype = torch.float16
    x = b.input(3, 10, 10)
    text = f"nn.Conv2d(3, 16, 11, stride=2, padding=5, bias={b.chance(0.5)})"
    y = b.let(f"{b.layer(text)}({x})")
    b.let(f"torch.relu({y})")


def volume(b: Builder) -> None:
    """Pooling of three dimensions, in turn."""
    x = b.input(b.one(1, 4), 4, b.one(3, 5), b.one(2, 4))
    pools = ("F.max_pool3d({0}, 2, 1)", "F.avg_pool3d({0}, 2, 2)", "F.adaptive_avg_pool3d({0}, 2)",
             "F.adaptive_max_pool3d({0}, 2)")  # fmt: skip
    b.let(b.alternative(*pools).format(x))


def padded_conv(b: Builder) -> None:
    x = _image(b, b.one(4, 8))
    mode = b.alternative("constant", "reflect", "replicate", "circular")
    y = b.let(f"F.pad({x}, {b.one([1, 1, 1, 1], [0, 1, 2, 1], [1, 0, 0, 2])}, mode='{mode}')")
    b.let(f"{b.layer(f'nn.Conv2d({b.shape(x)[1]}, 8, 3)')}({y})")


def normalised_conv(b: Builder) -> None:
    """Convolution, batch normalisation and activation, once or twice, with a residual."""
    x = _image(b, b.one(5, 8))
    y = x
    for _ in range(b.one(1, 2)):
        y = b.let(_conv(b, y, b.shape(x)[1], 3))
        y = b.let(f"{b.layer(f'nn.BatchNorm2d({b.shape(x)[1]})')}({y})")
        y = b.let(f"torch.relu({y})")
    b.let(f"torch.relu({y} + {x})")


def sub_pixel(b: Builder) -> None:
    """A convolution whose channels become pixels."""
    x, act = _image(b, b.one(4, 8)), b.one("torch.relu({0})", "{0}")
    y = _conv_act(b, x, 4 * b.one(2, 8), b.one(1, 3), act)
    b.let(f"F.pixel_shuffle({y}, 2)")


def parallel(b: Builder) -> None:
    """Branches of one image that are added up, most of them linear."""
    x = _image(b, 6)
    stride, groups = b.one(1, 1, 2), b.one(1, 1, 2, 6)
    branches = []
    for r in b.one((3, 1), (3, 1, 1), (5, 3, 1), (3, 3)):
        y = b.let(_conv(b, x, 6, r, stride=stride, groups=groups))
        if b.chance(0.5):
            y = b.let(f"{b.layer('nn.BatchNorm2d(6)')}({y})")
        branches.append(y)
    if stride == 1 and b.chance(0.7):
        branches.append(b.let(f"{b.layer('nn.BatchNorm2d(6)')}({x})"))
    b.random.shuffle(branches)
    b.let(f"torch.relu({' + '.join(branches)})")
    _also_read(b, *branches)


def preactivation(b: Builder) -> None:
    x = _image(b, b.one(6, 8))
    y = b.let(f"{b.layer(f'nn.BatchNorm2d({b.shape(x)[1]})')}({x})")
    y = b.let(f"torch.relu({y} + 0.5)")
    b.let(_conv(b, y, 8, b.one(1, 1, 3)))
    _also_read(b, x, y)


MOTIFS = (
    bottleneck, separable, shortcut, pooled_conv, conv_mean, conv_pool, pool_conv, averaged_branch,
    dense_block, squeeze_excite, lrn_pool, head, small_net, stem, rows_of_a_stem, volume,
    padded_conv, normalised_conv, preactivation, parallel,
    sub_pixel,
)  # fmt: skip
