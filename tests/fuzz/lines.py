"""Single lines: every op of the registry that is captured as it stands, and how layers are used."""

from __future__ import annotations

import re
from pathlib import Path

from convloom.kernels import registry

from .builder import Builder, UnsuitableError

IMAGES = (3, 4, 5)


def _not_named_here() -> tuple[str, ...]:
    """Calls of the functions of one tensor that no line of this file names (neg is written as a
    minus), where every function is defined and none is steep."""
    words = re.findall("[a-z0-9]+", Path(__file__).read_text().replace("_", ""))
    return tuple(
        f"torch.ops.aten.{each.name}(torch.sigmoid({{0}}) + 0.6)"
        for each in registry.SCALARS
        if f"aten.{each.name}.default" in registry.CAPTURES and not each.boolean
        and (each.operands, each.parameters) == (1, ()) and each.name.replace("_", "") not in words
    )  # fmt: skip


UNARY = (
    "F.relu({0})", "F.relu6({0})", "F.hardtanh({0}, -0.5, 0.75)", "{0}.clamp(-0.5, 1.25)",
    "{0}.clamp(min=-0.25)", "{0}.clamp(max=0.5)", "F.leaky_relu({0}, 0.1)", "F.elu({0}, 0.7)",
    "F.selu({0})", "F.celu({0}, 1.5)", "torch.sigmoid({0})", "torch.tanh({0})", "F.silu({0})",
    "F.gelu({0})", "F.gelu({0}, approximate='tanh')", "F.hardsigmoid({0})", "F.hardswish({0})",
    "F.softplus({0})", "F.mish({0})", "{0}.square()", "({0}.abs() + 0.5).sqrt()",
    "({0}.abs() + 0.5).rsqrt()", "torch.exp(-{0}.abs())", "torch.log({0}.abs() + 0.5)",
    "{0}.abs()", "-{0}", "torch.sign({0})", "1.0 - {0}", "{0} * 0.5 + 0.25", "{0} / 4.0",
    "1.0 / ({0}.abs() + 0.5)", "({0}.abs() + 0.5).reciprocal()", "({0}.abs() + 0.5) ** 1.5",
    "2.0 ** -{0}.abs()", "{0} * torch.sigmoid({0})", "{0} * F.hardsigmoid({0})",
    "{0} * torch.tanh(F.softplus({0}))", "F.dropout({0}, 0.5, training=False)", "{0}.clone()",
    "{0}.detach().contiguous()", "torch.sin(torch.tanh({0}) * 3.0)",
    "torch.cos(torch.tanh({0}) * 3.0)", "torch.atan({0})", "F.threshold({0}, 0.25, 0.25)",
    "F.hardshrink({0}, 0.0)", "{0}.nan_to_num(0.5, 1.0, -1.0)",
    "torch.erf({0})", "torch.log1p({0}.abs())", "torch.expm1(-{0}.abs())", "F.logsigmoid({0})",
    "F.softshrink({0}, 0.25)", "torch.lerp({0}, {0} * 0.5, 0.75)",
    # Decisions whose sides meet where it is made.
    "torch.where({0} > 0.25, {0}, 0.25)", "{0}.masked_fill({0} < -0.25, -0.25)",
    "{0}.masked_fill(~({0} >= 0), 0.0)", "{0} * torch.where({0} <= 0, 0.5, 1.0)",
    "torch.where({0} == {0}, {0}, 0.5)", "torch.where({0} != {0}, 0.5, {0})",
    "{0}.masked_fill({0}.isnan(), 0.25)", "{0}.masked_fill({0}.isinf(), 0.25)",
    "torch.where({0}.isfinite(), {0}, 0.25)", "{0} * ({0} > 0).type_as({0})",
    # What jumps, as waves that do not: a last bit more or less would be another number.
    *(f"({x} - {wave} - 0.5).abs()".replace("x", "(torch.tanh({0}) * 2.0)") for x, wave in (
        ("x", "x.floor()"), ("x.ceil()", "x"), ("x.abs()", "x.abs().trunc()"),
        ("(x - x.round()).abs()", "0.0"), ("x.remainder(1.0)", "0.0"), ("x.abs().fmod(1.0)", "0.0"),
    )),
    *_not_named_here(),
)  # fmt: skip
BINARY = (
    "{0} + {1}", "{0} - {1}", "{0} * {1}", "torch.maximum({0}, {1})", "torch.minimum({0}, {1})",
    "{0} / ({1}.abs() + 0.5)", "({0}.abs() + 0.5) ** torch.tanh({1})",
    "torch.rsub({0}, {1})", "torch.add({0}, {1}, alpha=0.5)", "{0}.clamp(max={1})",
    "torch.atan2({0}, {1}.abs() + 0.5)", "torch.max({0}, {1})", "torch.lerp({0}, {1}, 0.25)",
    "torch.lerp({0}, {1}, torch.sigmoid({0}))", "torch.where({0} > {1}, {0}, {1})",
    # The product where the signs are equal.
    "({0} * {1}).masked_fill(({0} == {0}) ^ "
    "(({0} > 0) & ({1} > 0) | ({0} <= 0) & ({1} <= 0)), 0.0)",
)  # fmt: skip


def unary(b: Builder) -> None:
    """Functions one behind the other."""
    x = b.pick(2, *IMAGES)
    count = 3 if b.turn is not None else b.one(1, 2, 3)
    for at in range(count):
        x = b.let(b.alternative(*UNARY, of=count, at=at).format(x))


def binary(b: Builder) -> None:
    """A residual: another value of the same shape, perhaps the very same one."""
    first = b.pick(2, *IMAGES)
    pair = [first, b.like(first)]
    b.random.shuffle(pair)
    b.let(b.alternative(*BINARY).format(*pair))


def broadcast(b: Builder) -> None:
    """One number per sample and channel, or per pixel, beside the whole."""
    x = b.pick(4)
    y = b.let(b.one(f"{x}.mean((2, 3), keepdim=True)", f"{x}.amax(1, keepdim=True)"))
    b.let(b.alternative(f"{x} * torch.sigmoid({y})", f"{x} + {y}", f"{y} - {x}"))


def constants(b: Builder) -> None:
    """Numbers per channel that belong to the module."""
    x = b.pick(4)
    table = b.layer(f"nn.Parameter(torch.zeros(1, {b.shape(x)[1]}, 1, 1))")
    b.let(b.alternative(f"{x} + {table}", f"{table} - {x}", f"torch.relu({x} * {table})"))


def prelu(b: Builder) -> None:
    x = b.pick(2, *IMAGES)
    layer = b.layer(f"nn.PReLU({b.one(1, b.shape(x)[1])})")
    b.let(f"{layer}({x})")


def convolve(b: Builder) -> None:
    """A convolution of any kind; often of the layers that make up a normal network."""
    x = b.pick(*IMAGES)
    n = len(b.shape(x)) - 2
    c, r = b.shape(x)[1], b.one(1, 2, 3, 3, 5)
    groups = b.one(*(g for g in (1, 1, 1, 2, c) if c % g == 0))
    k, stride, dilation = groups * b.one(1, 2, 3, 8), b.one(1, 1, 2), b.one(1, 1, 1, 2)
    padding = b.alternative(0, r // 2 * dilation, 1, "'same'", r // 2 * dilation, 1)
    mode = b.alternative("zeros", "reflect", "zeros", "replicate", "zeros", "circular", "zeros")
    if padding == "'same'":
        stride = 1
    options = (f"stride={stride}, padding={padding}, dilation={dilation}, groups={groups}, "
               f"bias={b.chance(0.6)}, padding_mode='{mode}'")  # fmt: skip
    b.let(f"{b.layer(f'nn.Conv{n}d({c}, {k}, {r}, {options})')}({x})")


def convolve_back(b: Builder) -> None:
    x = b.pick(*IMAGES)
    n = len(b.shape(x)) - 2
    c, r, stride = b.shape(x)[1], b.one(1, 2, 3), b.one(1, 2)
    groups = b.one(*(g for g in (1, 1, 2) if c % g == 0))
    options = (f"stride={stride}, padding={b.one(0, r // 2)}, output_padding={b.one(0, stride - 1)}"
               f", groups={groups}, bias={b.chance(0.6)}")  # fmt: skip
    layer = b.layer(f"nn.ConvTranspose{n}d({c}, {groups * b.one(1, 3)}, {r}, {options})")
    b.let(f"{layer}({x})")


def share_a_layer(b: Builder) -> None:
    """A layer that already stands elsewhere, with the same weights."""
    if not b.layers:
        convolve(b)
    layers = [name for name, text in b.layers if not text.startswith("nn.Parameter")]
    if not layers:
        raise UnsuitableError("no layers yet")
    b.let(f"self.{b.one(*layers)}({b.pick(2, *IMAGES)})")


def linear(b: Builder) -> None:
    x = b.pick(2, 3)
    b.let(f"{b.layer(f'nn.Linear({b.shape(x)[-1]}, {b.one(1, 5, 8)}, bias={b.chance(0.7)})')}({x})")


def matmul(b: Builder) -> None:
    """The product with a matrix of the module, spelt without a layer."""
    x = b.pick(2)
    c, k = b.shape(x)[1], b.one(3, 8)
    weight = b.layer(f"nn.Parameter(torch.zeros({c}, {k}))")
    bias = b.layer(f"nn.Parameter(torch.zeros({k}))")
    spelt = f"torch.addmm({bias}, {x}, {weight})", f"F.linear({x}, {weight}.t(), {bias})"
    b.let(b.alternative(*spelt))


def attend(b: Builder) -> None:
    """Products of activations with each other: pixels compared, and mixed as they compare."""
    x = b.pick(3)
    scores = b.let(f"torch.bmm({x}.transpose(1, 2), {x})")
    if b.alternative(True, False):
        b.special = False
        scores = b.let(f"F.softmax({scores}, -1)")
    b.let(f"{x} @ {scores}")


def convolve_by_sample(b: Builder) -> None:
    """An image convolved with itself: each sample's channels are its filters."""
    x = b.pick(4)
    c = b.shape(x)[1]
    image = f"{x}.reshape(1, {x}.shape[0] * {c}, *{x}.shape[2:])"
    filters = f"{x}.mean((2, 3)).reshape({x}.shape[0] * {c}, 1, 1, 1)"
    b.let(f"F.conv2d({image}, {filters}, groups={x}.shape[0] * {c}).reshape({x}.shape)")


def batch_norm(b: Builder) -> None:
    x = b.pick(2, *IMAGES)
    n = max(1, len(b.shape(x)) - 2)
    c, affine, running = b.shape(x)[1], b.chance(0.8), b.chance(0.8)
    if not running:  # Statistics of all samples: NaN spreads, and another batch is refused.
        b.special = b.dynamic = False
    text = f"nn.BatchNorm{n}d({c}, affine={affine}, track_running_stats={running})"
    b.let(f"{b.layer(text)}({x})")


def normalise(b: Builder) -> None:
    """Norms over the values of one sample: their NaN and Inf spread over all of it."""
    b.special = False
    x = b.pick(*IMAGES)
    c, *size = b.shape(x)[1:]
    groups = b.one(*(g for g in (1, 2, c) if c % g == 0))
    text = b.alternative(
        f"nn.GroupNorm({groups}, {c})", f"nn.LayerNorm({[c, *size]})", f"nn.LayerNorm({size[-1]})",
        f"nn.RMSNorm({size[-1]})", f"nn.InstanceNorm{len(size)}d({c}, affine=True)",
    )  # fmt: skip
    b.let(f"{b.layer(text)}({x})")


def local_norm(b: Builder) -> None:
    b.let(f"F.local_response_norm({b.pick(4)}, {b.one(3, 5)}, 0.1, 0.75, 1.5)")


def softmax(b: Builder) -> None:
    x = b.pick(2, *IMAGES)
    dim = b.random.randrange(1, len(b.shape(x)))
    b.let(b.alternative(f"F.softmax({x}, {dim})", f"F.log_softmax({x}, {dim})"))


def reduce(b: Builder) -> None:
    x = b.pick(*IMAGES)
    last = len(b.shape(x)) - 1
    dims = b.one((1,), tuple(range(2, last + 1)), (last,))
    keep = b.one(True, False) if last == 3 or dims != (1,) else True
    text = b.alternative(
        "{x}.sum({d}, keepdim={k})", "{x}.mean({d}, keepdim={k})", "{x}.amax({d}, keepdim={k})",
        "{x}.amin({d}, keepdim={k})", "{x}.max({e}, keepdim={k}).values",
        "{x}.min({e}, keepdim={k}).values", "torch.linalg.vector_norm({x}, 2, {d}, {k})",
        "{x}.var({d}, correction=0, keepdim={k})", "({x}.std({d}, correction=0, keepdim={k}) + 1)",
        "{x}.norm(1, {d}, keepdim={k})",
    )  # fmt: skip
    b.let(text.format(x=x, d=dims, e=dims[0], k=keep))


def scan(b: Builder) -> None:
    """Sums and products so far, and elements by their size, along a dimension."""
    x = b.pick(*IMAGES)
    dim = b.random.randrange(1, len(b.shape(x)))
    b.let(b.alternative(
        f"{x}.cumsum({dim})", f"{x}.topk(1, {dim}).values", f"torch.tanh({x}).cumprod({dim})",
        f"{x}.sort({dim}).values", f"{x}.gather({dim}, {x}.argsort({dim}))",
    ))  # fmt: skip


def pool(b: Builder) -> None:
    x = b.pick(*IMAGES)
    n, r = len(b.shape(x)) - 2, b.one(2, 3)
    stride, padding, ceil = b.one(1, 2, 3), b.one(0, r // 2), b.chance(0.3)
    window = f"{x}, {r}, {stride}, {padding}, ceil_mode={ceil}"
    text = b.alternative(
        f"F.max_pool{n}d({window})", f"F.avg_pool{n}d({window})",
        f"F.avg_pool{n}d({window}, count_include_pad=False)",
        f"F.max_pool{n}d({x}, {r}, {stride}, {padding}, dilation=2)",
        *[f"F.adaptive_avg_pool{n}d({x}, {b.one(1, 2, 3)})"] * 2,
        *[f"F.adaptive_max_pool{n}d({x}, {b.one(1, 2, 3)})"] * 2,
    )  # fmt: skip
    b.let(text)


def power_pool(b: Builder) -> None:
    b.let(f"F.lp_pool2d({b.pick(4)}.abs() + 0.5, {b.one(2.0, 3.0)}, 2)")


def mixed_pool(b: Builder) -> None:
    """Part maximum, part average of one window."""
    x = b.pick(4)
    r = b.one(2, 3)
    window = f"({x}, {r}, {b.one(1, 2)}, {b.one(0, r // 2)})"
    first, second = b.alternative(("0.25 * ", "0.75 * "), ("0.5 * ", "0.5 * "))
    b.let(f"{first}F.max_pool2d{window} + {second}F.avg_pool2d{window}")


def median_pool(b: Builder) -> None:
    b.special = False
    x = b.pick(4)
    windows = f"{x}.unfold(2, 3, 1).unfold(3, 3, {b.one(1, 2)})"
    b.let(f"{windows}.flatten(-2).median(dim=-1).values")


def pool_and_back(b: Builder) -> None:
    """Max pooling that remembers where its maxima stood, and values put back there.

    Of an input: which of two computed values is the larger may be decided by their roundings.
    """
    images = [name for name, shape in b.inputs if len(shape) == 4]
    x = b.one(*images) if images else b.input(3, 6, 5)
    b.let(f"F.max_pool2d({x}, 2, 2, return_indices=True)", "yi")
    y, i = b.statements[-1].targets
    y = b.let(f"torch.tanh({y})")
    b.let(f"F.max_unpool2d({y}, {i}, 2, output_size={list(b.shape(x)[2:])})")


def join(b: Builder) -> None:
    x = b.pick(2, *IMAGES)
    rest = b.shape(x)[2:]
    near = [name for name in b.values if b.shape(name)[2:] == rest and name[0] != "i"]
    near = [name for name in near if len(b.shape(name)) == len(b.shape(x))]
    parts = [x, *(b.one(*near) for _ in range(b.one(1, 2)))]
    b.let(f"torch.cat([{', '.join(b.alternative(parts, [*parts, x]))}], 1)")


def cut(b: Builder) -> None:
    x = b.pick(2, *IMAGES)
    c, last = b.shape(x)[1], b.shape(x)[-1]
    start = b.random.randrange(c)
    text = b.alternative(
        f"{x}[:, {start}:{b.random.randint(start + 1, c)}]", f"{x}[..., ::2]", f"{x}[:, 1:]",
        f"{x}.chunk(2, 1)[{b.one(0, 1)}]", f"{x}.narrow(-1, {last // 2}, {last - last // 2})",
        f"F.glu({x}, 1)", f"{x}.split([1, {c - 1}], 1)[1]", f"{x}.select(-1, 0).unsqueeze(-1)",
        f"{x}.unbind(-1)[-1].unsqueeze(-1)", f"{x}.index_select(1, torch.tensor([{c - 1}, 0]))",
    )  # fmt: skip
    if "chunk" in text and c % 2:
        raise UnsuitableError("odd")
    b.let(text)


def move(b: Builder) -> None:
    """Movement that keeps four dimensions."""
    x = b.pick(4)
    c, h, w = b.shape(x)[1:]
    two = 2 if c % 2 == 0 else 1
    text = b.alternative(
        f"{x}.flip({b.one(1, 2, 3)})", f"{x}.roll({b.one(1, 2)}, {b.one(2, 3)})",
        f"{x}.transpose(2, 3)", f"{x}.permute(0, 3, 1, 2)", f"F.pixel_unshuffle({x}, 2)",
        f"F.pixel_shuffle({x}, 2)", f"F.channel_shuffle({x}, {two})",
        f"{x}.view(-1, {two}, {c // two}, {h}, {w}).transpose(1, 2).reshape(-1, {c}, {h}, {w})",
        f"{x}.repeat(1, 2, 1, 1)", f"{x}.repeat_interleave(2, 2)", f"{x}.tile(1, 1, 1, 2)",
        f"{x}.mean((2, 3), keepdim=True).expand(-1, -1, {h}, {w})",
        f"{x}.reshape(-1, {c}, {w}, {h})", f"torch.stack([{x}, {x}], 2).flatten(1, 2)",
    )  # fmt: skip
    b.let(text)


def columns(b: Builder) -> None:
    """Windows as columns, and back to an image."""
    x = b.pick(4)
    r, stride, padding = b.one(1, 2, 3), b.one(1, 2), b.one(0, 1)
    h, w = b.shape(x)[2:]
    y = b.let(f"F.unfold({x}, {r}, padding={padding}, stride={stride})")
    if b.alternative(True, False):
        b.let(f"F.fold({y}, ({h}, {w}), {r}, padding={padding}, stride={stride})")


def sample(b: Builder) -> None:
    """An image turned and stretched by what it shows itself; everywhere its border goes on, so that
    no place is a step."""
    b.special = False
    x = b.pick(4)
    c, h, w = b.shape(x)[1:]
    theta = f"{b.layer(f'nn.Linear({c}, 6)')}({x}.mean((2, 3))).tanh().view(-1, 2, 3)"
    corners = b.alternative(True, False)
    grid = b.let(f"F.affine_grid({theta}, [{x}.shape[0], {c}, {h + 1}, {w}], {corners})")
    border = b.one("border", "reflection")
    b.let(f"F.grid_sample({x}, {grid}, 'bilinear', '{border}', {corners})")


def write(b: Builder) -> None:
    """A part of one value in the place of a part of another."""
    x = b.pick(3, 4)
    y = b.like(x)
    dim = b.random.randrange(1, len(b.shape(x)))
    size = b.shape(x)[dim]
    start = b.random.randrange(size)
    stop = b.random.randint(start + 1, size)
    width = stop - start
    first = b.random.randint(0, size - width)
    part = f"{y}.narrow({dim}, {first}, {width})"
    b.let(b.alternative(
        f"torch.slice_scatter({x}, {part}, {dim}, {start}, {stop})",
        f"torch.select_scatter({x}, {y}.select({dim}, {first}), {dim}, {start})",
        f"torch.slice_scatter(torch.zeros_like({x}), {part}, {dim}, {start}, {stop})",
    ))  # fmt: skip


def flatten(b: Builder) -> None:
    x = b.pick(*IMAGES)
    b.let(b.alternative(f"{x}.flatten(1)", f"{x}.flatten(2)", f"{x}.flatten(2).transpose(1, 2)"))


def surround(b: Builder) -> None:
    x = b.pick(*IMAGES)
    n = len(b.shape(x)) - 2
    sides = [b.one(0, 1, 2) for _ in range(2 * n)]
    mode = b.alternative("constant", "reflect", "constant", "replicate", "circular")
    value = ", value=0.5" if mode == "constant" and b.chance(0.5) else ""
    b.let(f"F.pad({x}, {sides}, mode='{mode}'{value})")


def resize(b: Builder) -> None:
    x = b.pick(*IMAGES)
    linear = {3: "linear", 4: "bilinear", 5: "trilinear"}[len(b.shape(x))]
    size = [b.one(2, 3, 7, 2 * side) for side in b.shape(x)[2:]]
    if len(size) == 2 and b.chance(0.4):
        # Antialiased to a width of 1, torch 2.13 returns its first row everywhere.
        factor = 0.5 if b.shape(x)[-1] > 3 else 1.5
        b.let(b.one(
            f"F.interpolate({x}, size={size}, mode='bicubic', align_corners={b.chance(0.5)})",
            f"F.interpolate({x}, size={size}, mode='bilinear', antialias=True)",
            f"F.interpolate({x}, scale_factor={factor}, mode='bicubic', antialias=True)",
        ))  # fmt: skip
        return
    b.let(b.alternative(
        f"F.interpolate({x}, scale_factor=2, mode='nearest')",
        f"F.interpolate({x}, size={size}, mode='nearest-exact')",
        f"F.interpolate({x}, size={size}, mode='{linear}', align_corners={b.chance(0.5)})",
    ))  # fmt: skip


LINES = (
    convolve, convolve, convolve, unary, unary, unary, binary, binary, join, join, batch_norm,
    pool, pool, cut, cut, move, move, reduce, broadcast, constants, prelu, convolve_back,
    share_a_layer, linear, matmul, attend, normalise, local_norm, softmax,
    power_pool, mixed_pool, median_pool,
    pool_and_back, flatten, columns, sample, write, scan, surround, resize, convolve_by_sample,
)  # fmt: skip
