"""Operators over pixels: convolution, pooling, normalisation, resizing, rearranging."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .operator import Call, Value, enter_all, operator

Pads = tuple[list[int], list[int]]
"""Pixels before and behind, per spatial dimension."""


def _of_rank(call: Call, function: str, x: torch.Tensor) -> Any:
    """torch's function of that many spatial dimensions, which stand for the braces of its name."""
    rank = x.dim() - 2
    if not 1 <= rank <= 3:
        raise call.fail(f"an input of rank {x.dim()}; expected rank 3 to 5")
    return getattr(F, function.format(rank))


def _pads(call: Call, x: torch.Tensor, kernel: Sequence[int], strides: Sequence[int]) -> Pads:
    """Of a window over the spatial dimensions of x, from `pads` or `auto_pad`."""
    rank, auto = len(kernel), call.get("auto_pad", "NOTSET")
    if auto == "NOTSET":
        pads = call.get("pads", [0] * 2 * rank)
        return pads[:rank], pads[rank:]
    before, behind = [0] * rank, [0] * rank
    if auto == "VALID":
        return before, behind
    dilations = call.get("dilations", [1] * rank)
    for at, size in enumerate(x.shape[2:]):
        span = (kernel[at] - 1) * dilations[at] + 1
        total = max((-(-size // strides[at]) - 1) * strides[at] + span - size, 0)
        small, large = total // 2, total - total // 2
        before[at], behind[at] = (small, large) if auto == "SAME_UPPER" else (large, small)
    return before, behind


def _padded(x: torch.Tensor, pads: Pads, value: float = 0.0) -> torch.Tensor:
    """x with `value` around its spatial dimensions."""
    if not any(map(any, pads)):
        return x
    pairs = zip(*map(reversed, pads), strict=True)
    return F.pad(x, [size for pair in pairs for size in pair], value=value)


@operator("Conv")
def conv(call: Call, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> Any:
    rank = x.dim() - 2
    strides, dilations = call.get("strides", [1] * rank), call.get("dilations", [1] * rank)
    before, behind = _pads(call, x, w.shape[2:], strides)
    if before != behind:
        x, before = _padded(x, (before, behind)), [0] * rank
    convolve = _of_rank(call, "conv{}d", x)
    return convolve(x, w, b, strides, before, dilations, call.get("group", 1))


@operator("ConvTranspose")
def conv_transpose(
    call: Call, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None
) -> Any:
    rank = x.dim() - 2
    strides, dilations = call.get("strides", [1] * rank), call.get("dilations", [1] * rank)
    extra = call.get("output_padding", [0] * rank)
    spans = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    whole = [
        (size - 1) * stride + span + more
        for size, stride, span, more in zip(x.shape[2:], strides, spans, extra, strict=True)
    ]
    pads = call.get("pads", [0] * 2 * rank)
    before, behind = pads[:rank], pads[rank:]
    auto, wanted = call.get("auto_pad", "NOTSET"), call.get("output_shape")
    if wanted is None and auto.startswith("SAME"):
        wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    if wanted is not None:
        totals = [have - want for have, want in zip(whole, wanted[-rank:], strict=True)]
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        before, behind = (small, large) if auto == "SAME_UPPER" else (large, small)
        if min(totals) < 0:
            raise call.fail(f"output_shape {wanted} is larger than the whole result, {whole}")
    transpose = _of_rank(call, "conv_transpose{}d", x)
    if before == behind and not any(extra):
        return transpose(x, w, b, strides, before, 0, call.get("group", 1), dilations)
    # What is cut off differs: all of it, then the part that is wanted.
    outside = [max(e - after, 0) for e, after in zip(extra, behind, strict=True)]
    y = transpose(x, w, b, strides, 0, outside, call.get("group", 1), dilations)
    sizes = [all_of - cut - off for all_of, cut, off in zip(whole, before, behind, strict=True)]
    for at, (cut, size) in enumerate(zip(before, sizes, strict=True)):
        y = y.narrow(2 + at, cut, size)
    return y


@operator("MaxPool")
def max_pool(call: Call, x: torch.Tensor) -> Any:
    kernel = call.get("kernel_shape")
    strides, dilations = call.get("strides", [1] * len(kernel)), call.get("dilations", 1)
    before, behind = _pads(call, x, kernel, strides)
    if before != behind or any(2 * pad > size for pad, size in zip(before, kernel, strict=True)):
        x, before = _padded(x, (before, behind), -math.inf), [0] * len(kernel)
    ceil = bool(call.get("ceil_mode", 0))
    pool = _of_rank(call, "max_pool{}d", x)
    return pool(x, kernel, strides, before, dilations, ceil)


def _window(call: Call, pooling: str) -> tuple[list[int], list[int]]:
    """The sizes and strides of a window that is not dilated."""
    kernel = call.get("kernel_shape")
    if any(each != 1 for each in call.get("dilations", [1])):
        raise call.fail(f"dilations other than 1, which torch's {pooling} pooling does not have")
    return kernel, call.get("strides", [1] * len(kernel))


@operator("AveragePool")
def average_pool(call: Call, x: torch.Tensor) -> Any:
    kernel, strides = _window(call, "average")
    before, behind = _pads(call, x, kernel, strides)
    ceil, counts = bool(call.get("ceil_mode", 0)), bool(call.get("count_include_pad", 0))
    pool = _of_rank(call, "avg_pool{}d", x)
    if before == behind and all(2 * pad <= size for pad, size in zip(before, kernel, strict=True)):
        return pool(x, kernel, strides, before, ceil, counts)
    y: torch.Tensor = pool(_padded(x, (before, behind)), kernel, strides, 0, ceil)
    if counts:
        return y
    inside = _padded(torch.ones(1, 1, *x.shape[2:]), (before, behind))
    share = pool(inside, kernel, strides, 0, ceil)  # Of each window that lies in the image.
    return y / share.to(y.dtype)


@operator("LpPool")
def lp_pool(call: Call, x: torch.Tensor) -> Any:
    kernel, strides = _window(call, "power")
    x = _padded(x, _pads(call, x, kernel, strides)).abs()
    pool = _of_rank(call, "lp_pool{}d", x)
    return pool(x, call.get("p", 2), kernel, strides, bool(call.get("ceil_mode", 0)))


enter_all({
    "GlobalAveragePool": lambda call, x: _of_rank(call, "adaptive_avg_pool{}d", x)(x, 1),
    "GlobalMaxPool": lambda call, x: _of_rank(call, "adaptive_max_pool{}d", x)(x, 1),
    "GlobalLpPool": lambda call, x: (
        torch.linalg.vector_norm(x, call.get("p", 2), tuple(range(2, x.dim())), keepdim=True)
    ),
    "InstanceNormalization": lambda call, x, scale, bias: (
        F.instance_norm(x, weight=scale, bias=bias, eps=call.get("epsilon", 1e-5))
    ),
})  # fmt: skip


@operator("BatchNormalization")
def batch_normalization(
    call: Call, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor,
    variance: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    if call.get("training_mode", 0):
        raise call.fail("training_mode is 1; export the model in eval mode")
    epsilon = call.get("epsilon", 1e-5)
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)


@operator("GroupNormalization")
def group_normalization(
    call: Call, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    groups = call.get("num_groups")
    if call.opset < 21:  # There a group has one scale, now every channel has its own.
        scale, bias = (each.repeat_interleave(x.shape[1] // groups) for each in (scale, bias))
    return F.group_norm(x, groups, scale, bias, call.get("epsilon", 1e-5))


@operator("LayerNormalization")
def layer_normalization(
    call: Call, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    sizes = x.shape[call.get("axis", -1) % x.dim() :]
    scale, bias = scale.expand(sizes), None if bias is None else bias.expand(sizes)
    return F.layer_norm(x, sizes, scale, bias, call.get("epsilon", 1e-5))


@operator("LRN")
def lrn(call: Call, x: torch.Tensor) -> torch.Tensor:
    size = call.get("size")
    if size % 2 == 0:
        raise call.fail(f"a window of {size} channels, which torch centres elsewhere")
    alpha, beta = call.get("alpha", 1e-4), call.get("beta", 0.75)
    return F.local_response_norm(x, size, alpha, beta, call.get("bias", 1.0))


@operator("DepthToSpace")
def depth_to_space(call: Call, x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    block = call.get("blocksize")
    if call.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    parts = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // block**2, h * block, w * block)


@operator("SpaceToDepth")
def space_to_depth(call: Call, x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    block = call.get("blocksize")
    parts = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * block**2, h // block, w // block)


@operator("Upsample", known=(1,))
def upsample(call: Call, x: torch.Tensor, scales: Value = None) -> torch.Tensor:
    found = call.get("scales") if scales is None else call.numbers(scales, "scales")
    return _resized(call, x, found, None, "asymmetric")


@operator("Resize", known=(1, 2, 3))
def resize(call: Call, x: torch.Tensor, *known: Value) -> torch.Tensor:
    if call.opset < 11:  # (x, scales)
        return _resized(call, x, call.numbers(known[0], "scales"), None, "asymmetric")
    _, scales, sizes = (*known, None, None, None)[:3]  # The first is of one crop mode only.
    wanted = None if sizes is None or not sizes.size else call.numbers(sizes, "sizes")
    factors = None if wanted is not None else call.numbers(scales, "scales")
    axes = [axis % x.dim() for axis in call.get("axes", range(x.dim()))]
    if call.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise call.fail("keep_aspect_ratio_policy other than stretch; export it with fixed sizes")
    if factors is not None:
        table = dict(zip(axes, factors, strict=True))
        factors = [table.get(axis, 1.0) for axis in range(x.dim())]
    if wanted is not None:
        table = dict(zip(axes, wanted, strict=True))
        wanted = [table.get(axis, size) for axis, size in enumerate(x.shape)]
    how = call.get("coordinate_transformation_mode", "half_pixel")
    return _resized(call, x, factors, wanted, how)


def _resized(
    call: Call, x: torch.Tensor, factors: list[float] | None, wanted: list[int] | None, how: str
) -> torch.Tensor:
    """How ONNX and torch name the same resizing; what torch does not have is refused."""
    if wanted is None:
        assert factors is not None
        pairs = zip(x.shape, factors, strict=True)
        wanted = [size if f == 1 else math.floor(size * f) for size, f in pairs]
    if (factors and list(factors[:2]) != [1, 1]) or tuple(wanted[:2]) != tuple(x.shape[:2]):
        raise call.fail("resizing the batch or the channels")
    old, new = [int(size) for size in x.shape[2:]], [int(size) for size in wanted[2:]]
    if old == new:
        return x
    scales = [b / a for a, b in zip(old, new, strict=True)]
    if factors:
        scales = [float(f) for f in factors[2:]]
    mode = call.get("mode", "nearest")
    if mode == "nearest":
        return F.interpolate(x, new, mode=_nearest(call, old, new, scales, how))
    exact = all(n == o * s for n, o, s in zip(new, old, scales, strict=True))
    fits = how == "half_pixel" or (how == "pytorch_half_pixel" and min(new) > 1)
    if not (how == "align_corners" or (fits and exact)):
        raise call.fail(f"{mode} resizing with coordinates '{how}', which torch does not have")
    antialias = bool(call.get("antialias", 0))
    if mode == "cubic" and call.get("cubic_coeff_a", -0.75) != (-0.5 if antialias else -0.75):
        raise call.fail(f"cubic_coeff_a {call.get('cubic_coeff_a')}, which torch does not have")
    if call.get("exclude_outside", 0) != int(antialias):
        raise call.fail("exclude_outside, which torch does not have")
    names = {
        ("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear",
        ("cubic", 2): "bicubic",
    }  # fmt: skip
    if (name := names.get((mode, len(new)))) is None:
        raise call.fail(f"{mode} resizing of {len(new)} dimensions")
    corners = how == "align_corners"
    return F.interpolate(x, new, mode=name, align_corners=corners, antialias=antialias)


def _nearest(call: Call, old: list[int], new: list[int], scales: list[float], how: str) -> str:
    """The mode of torch that takes the same pixels."""
    rounding = call.get("nearest_mode", "round_prefer_floor") if call.opset >= 11 else "floor"
    for name, offset in (("nearest", 0.0), ("nearest-exact", 0.5)):
        same = True
        for size, count, scale in zip(old, new, scales, strict=True):
            at = np.arange(count, dtype=np.float64)
            # torch computes its places in float32 of the sizes' ratio.
            ours = np.floor((at + offset).astype(np.float32) * np.float32(size / count))
            wanted = _source_pixels(call, at, size, count, scale, how, rounding)
            same &= bool((np.minimum(ours, size - 1) == wanted).all())
        if same:
            return name
    raise call.fail(
        f"nearest resizing of {old} to {new} with coordinates '{how}' and rounding '{rounding}', "
        "which takes other pixels than torch does"
    )


def _source_pixels(
    call: Call, at: Any, size: int, count: int, scale: float, how: str, rounding: str
) -> Any:
    """The pixel that each result is taken from, as the standard defines it."""
    places = {
        "asymmetric": at / scale,
        "half_pixel": (at + 0.5) / scale - 0.5,
        "pytorch_half_pixel": (at + 0.5) / scale - 0.5 if count > 1 else 0 * at,
        "align_corners": at * (size - 1) / max(count - 1, 1),
    }.get(how)
    if places is None:
        raise call.fail(f"coordinates '{how}', which are not supported")
    rounded = {
        "round_prefer_floor": np.ceil(places - 0.5),
        "round_prefer_ceil": np.floor(places + 0.5),
        "floor": np.floor(places),
        "ceil": np.ceil(places),
    }[rounding]
    return np.clip(rounded, 0, size - 1)
