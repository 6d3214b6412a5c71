"""The types of PTX as NumPy arrays: what a register's bits mean, and back."""

from __future__ import annotations

import re

import numpy as np

from .clocks import Array

NUMPY = {
    "pred": np.dtype(bool),
    "f16": np.dtype(np.float16), "f32": np.dtype(np.float32), "f64": np.dtype(np.float64),
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "ub" for bits in (8, 16, 32, 64)},
}  # fmt: skip
BITS = {
    **{kind: 8 * dtype.itemsize for kind, dtype in NUMPY.items()},
    "pred": 1, "bf16": 16, "tf32": 32, "f16x2": 32, "bf16x2": 32, "s16x2": 32,
    "u16x2": 32,
}  # fmt: skip
UNSIGNED = {1: np.dtype(bool), **{bits: np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)}}
FLOATS = ("f16", "f32", "f64", "bf16", "tf32", "f16x2", "bf16x2")
NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?|0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}")


def from_bits(bits: Array, kind: str) -> Array:
    """The values that registers hold; of a wider register its lower part.

    Pairs get a second dimension, the lower half first; bfloat16 becomes float32.
    """
    if (width := BITS[kind]) < 8 * bits.itemsize and width > 1:
        bits = bits.astype(UNSIGNED[width])
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == "tf32":
        # What a tensor core reads of a float32: the upper 19 bits.
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    if kind.endswith("x2"):
        halves = np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 2)
        return from_bits(halves, kind.removesuffix("x2"))
    return bits.view(NUMPY[kind])


def to_bits(value: Array, kind: str) -> Array:
    """The bits of values, in unsigned integers of the type's width."""
    if kind == "bf16":
        return rounded_bf16(np.asarray(value, np.float32))
    if kind.endswith("x2"):
        halves = to_bits(value, kind.removesuffix("x2"))
        return np.ascontiguousarray(halves).view(np.uint32).reshape(-1)
    if kind == "tf32":
        return np.asarray(value, np.float32).view(np.uint32)
    dtype = NUMPY[kind]
    return np.asarray(value).astype(dtype, copy=False).view(UNSIGNED[BITS[kind]])


def widened(bits: Array, kind: str, width: int) -> Array:
    """The bits of a value in a wider register: signed types keep their value."""
    if 8 * bits.itemsize == width or width == 1:
        return bits
    wide = UNSIGNED[width]
    if kind.startswith("s"):
        return bits.view(NUMPY[kind]).astype(f"i{width // 8}").view(wide)
    return bits.astype(wide)


def rounded_bf16(value: Array) -> Array:
    """To the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = value.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def rounded_tf32(value: Array) -> Array:
    """To the nearest TF32, ties away from zero."""
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(value), rounded, bits).view(np.float32)


def immediate(text: str, kind: str) -> Array:
    """A number of the source as an array of one value.

    Raises: ValueError for what is not a number.
    """
    if not NUMBER.fullmatch(text):
        raise ValueError(f"{text} is not a number")
    width = BITS[kind]
    if text[:2].lower() in ("0f", "0d"):
        raw = int(text[2:], 16)
        held = 32 if text[1] in "fF" else 64
        if width != held:
            raise ValueError(f"{text} is no {kind}")
        return from_bits(np.array([raw], UNSIGNED[held]), kind)
    raw = int(text.rstrip("U"), 0)
    if kind == "pred":
        return np.array([raw != 0])
    return from_bits(np.array([raw & ((1 << width) - 1)], UNSIGNED[width]), kind)
