"""What each arithmetic instruction computes, thread by thread.

`function_of` gives for an opcode the types of its operands and result and a function of arrays.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ....errors import KernelError
from .clocks import Array
from .values import BITS, FLOATS, NUMPY, rounded_tf32

Function = Callable[..., Array]
KNOWN = {
    "rn", "approx", "full", "ftz", "lo", "hi", "wide", "NaN", "uni", "clamp", "wrap", "l", "r",
    "rna", "rzi", "rmi", "rpi", "rni", "sat",
}  # fmt: skip


class UnsupportedPtxError(KernelError):
    """An instruction, or a form of it, that the emulator does not know."""


@dataclass(frozen=True)
class Meaning:
    """kinds: of the operands; result: of the result; function: of the operands."""

    kinds: tuple[str, ...]
    result: str
    function: Function


def function_of(opcode: tuple[str, ...], operands: int) -> Meaning:
    """What an instruction with so many operands, the result included, computes.

    Raises: UnsupportedPtxError.
    """
    root, *modifiers = opcode
    kinds = [word for word in modifiers if word in BITS]
    rest = [word for word in modifiers if word not in BITS]
    if root == "setp":
        return _setp(rest, kinds, operands)
    if unknown := [word for word in rest if word not in KNOWN]:
        raise UnsupportedPtxError(", ".join(unknown))
    if root == "cvt":
        return _cvt(rest, kinds)
    if not kinds:
        raise UnsupportedPtxError("this operation")
    kind = kinds[-1]
    if root in ("mul", "mad") and kind not in FLOATS:
        return _product(root, rest, kind)
    if root == "shf":
        return Meaning(("b32", "b32", "u32"), "b32", _funnel(rest))
    if root == "prmt" and rest:
        raise UnsupportedPtxError(", ".join(rest))
    if root in _BITWISE:
        listed, result, function = _BITWISE[root]
        own = tuple(kind if each == "own" else each for each in listed.split())
        return Meaning(own, kind if result == "own" else result, function)
    return _plain(root, rest, kind, operands)


def _plain(root: str, rest: list[str], kind: str, operands: int) -> Meaning:
    """Operands and result of one type, but for a condition or a number of places."""
    if root in ("min", "max"):
        drops_nan = kind in FLOATS and "NaN" not in rest
        return Meaning((kind, kind), kind, getattr(np, f"f{root}" if drops_nan else f"{root}imum"))
    if root == "selp":
        return Meaning((kind, kind, "pred"), kind, _select)
    if root in ("fma", "mad"):
        return Meaning((kind,) * 3, kind, _single(lambda a, b, c: a * b + c))
    table: Mapping[str, Function] = _FLOAT if kind in FLOATS else _INTEGER
    if root not in table:
        raise UnsupportedPtxError("this operation")
    function = table[root]
    if root in _INEXACT and kind in FLOATS:
        inexact = kind == "f32" and ("approx" in rest or "full" in rest)
        function = _approximate(root, function) if inexact else _single(function)
    if "sat" in rest:
        function = _saturated(function)
    return Meaning((kind,) * (operands - 1), kind, function)


def _select(a: Array, b: Array, condition: Array) -> Array:
    """Values may be pairs; a condition is one for both."""
    return np.where(condition[:, None] if a.ndim == 2 else condition, a, b)


def _saturated(function: Function) -> Function:
    def saturated(*values: Array) -> Array:
        found = function(*values)
        return np.asarray(np.where(np.isnan(found), 0, np.clip(found, 0, 1)), found.dtype)

    return saturated


def _single(function: Function) -> Function:
    """Computed in a wider type and rounded once: as exact as the instruction or better."""

    def rounded(*values: Array) -> Array:
        dtype = values[0].dtype
        wide = np.longdouble if dtype == np.float64 else np.float64
        return np.asarray(function(*(value.astype(wide) for value in values)).astype(dtype))

    return rounded


def _divide(a: Array, b: Array) -> Array:
    """Towards zero; by zero anything."""
    wide: Any = object if a.itemsize == 8 else np.int64
    top, bottom = a.astype(wide), np.where(b == 0, 1, b).astype(wide)
    quotient = abs(top) // abs(bottom)
    return np.asarray(np.where((top < 0) == (bottom < 0), quotient, -quotient).astype(a.dtype))


# Largest errors of the approximate functions, by the manual: relative, and absolute.
_INEXACT: Mapping[str, tuple[float, float]] = {
    "ex2": (2**-22, 0.0), "lg2": (2**-22, 2**-22), "rcp": (2**-23, 0.0), "sqrt": (2**-23, 0.0),
    "rsqrt": (2**-22.4, 0.0), "sin": (0.0, 2**-20.5), "cos": (0.0, 2**-20.5),
    "tanh": (2**-11, 0.0), "div": (2**-22, 0.0),
}  # fmt: skip


def _approximate(root: str, function: Function) -> Function:
    """The function with errors as large as a device's may be: a kernel that is right with them is
    right with the device's. What float32 holds exactly stays exact, but for quotients, unless
    they are zero: of whole numbers too they are a product with an inexact inverse."""
    relative, absolute = _INEXACT[root]

    def approximate(*values: Array) -> Array:
        exact = function(*(value.astype(np.float64) for value in values))
        nearest = exact.astype(np.float32)
        # Between -1 and 1, different for neighbouring values, the same in every run.
        bits = nearest.view(np.uint32) * np.uint32(2654435761)
        wrong = bits.astype(np.float64) / 2**31 - 1
        off = exact + wrong * (np.abs(exact) * relative + absolute)
        stays = ~np.isfinite(exact) | ((exact == nearest) & ((root != "div") | (exact == 0)))
        return np.where(stays, nearest, off).astype(np.float32)

    return approximate


_INTEGER: Mapping[str, Function] = {
    "add": operator.add, "sub": operator.sub, "and": operator.and_, "or": operator.or_,
    "xor": operator.xor, "not": operator.invert, "neg": lambda a: (-a).astype(a.dtype),
    "abs": np.abs, "mov": lambda a: a, "div": _divide, "rem": lambda a, b: a - _divide(a, b) * b,
}  # fmt: skip
_FLOAT: Mapping[str, Function] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "neg": operator.neg, "abs": np.abs, "mov": lambda a: a,
    "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "rcp": lambda a: 1 / a,
    "rsqrt": lambda a: 1 / np.sqrt(a), "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    "copysign": lambda a, b: np.copysign(b, a),
}  # fmt: skip


def _product(root: str, rest: list[str], kind: str) -> Meaning:
    bits = BITS[kind]
    dtype = NUMPY[kind]
    if "wide" in rest:
        result = f"{kind[0]}{2 * bits}"
        wide = NUMPY[result]

        def widely(a: Array, b: Array, c: Array | int = 0) -> Array:
            return np.asarray(a.astype(wide) * b.astype(wide) + c)

        return Meaning((kind, kind, *((result,) if root == "mad" else ())), result, widely)
    if "hi" in rest:
        big: Any = object if bits == 64 else np.dtype(f"{dtype.kind}{bits // 4}")

        def highly(a: Array, b: Array, c: Array | int = 0) -> Array:
            high = (a.astype(big) * b.astype(big)) >> (bits if big is object else big.type(bits))
            if big is object:
                high = np.array([h & (2**64 - 1) for h in high.ravel()], np.uint64).view(dtype)
            return np.asarray(high.astype(dtype) + c)

        return Meaning((kind,) * (3 if root == "mad" else 2), kind, highly)
    if root == "mad":
        return Meaning((kind,) * 3, kind, lambda a, b, c: a * b + c)
    return Meaning((kind, kind), kind, operator.mul)


def _shift_left(a: Array, by: Array) -> Array:
    bits = 8 * a.itemsize
    return np.where(by >= bits, 0, a << np.minimum(by, bits - 1).astype(a.dtype)).astype(a.dtype)


def _shift_right(a: Array, by: Array) -> Array:
    """The sign fills a signed number; shifting by one less than its width leaves only that."""
    bits = 8 * a.itemsize
    moved = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return moved if a.dtype.kind == "i" else np.where(by >= bits, 0, moved).astype(a.dtype)


def _extract(a: Array, position: Array, length: Array) -> Array:
    bits = 8 * a.itemsize
    if int(length.max()) + int(position.max()) > bits or (length == 0).any():
        raise UnsupportedPtxError("beyond the register")
    up = (bits - position - length).astype(a.dtype)
    return np.asarray((a << up) >> (bits - length).astype(a.dtype))


def _insert(a: Array, b: Array, position: Array, length: Array) -> Array:
    mask = ((1 << length.astype(np.uint64)) - 1).astype(a.dtype)
    at = position.astype(a.dtype)
    return np.asarray((b & ~(mask << at)) | ((a & mask) << at))


def _funnel(rest: list[str]) -> Function:
    def funnel(low: Array, high: Array, by: Array) -> Array:
        amount = (np.minimum(by, 32) if "clamp" in rest else by & 31).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        moved = (both << amount) >> np.uint64(32) if "l" in rest else both >> amount
        return moved.astype(np.uint32)

    return funnel


def _leading_zeros(a: Array) -> Array:
    return np.array([8 * a.itemsize - int(value).bit_length() for value in a], np.uint32)


def _permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    result = np.zeros(np.broadcast_shapes(both.shape, selector.shape), np.uint32)
    for index in range(4):
        pick = (selector >> np.uint32(4 * index)) & np.uint32(15)
        byte = (both >> (np.uint64(8) * (pick & np.uint32(7)).astype(np.uint64))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint32(255), np.uint32(0))
        chosen = np.where(pick & np.uint32(8), sign, byte.astype(np.uint32))
        result |= chosen << np.uint32(8 * index)
    return result


def _lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    wanted = int(table[0])
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for index in range(8):
        if wanted >> index & 1:
            term = a if index & 4 else ~a
            term = term & (b if index & 2 else ~b)
            result |= term & (c if index & 1 else ~c)
    return result


_BITWISE: Mapping[str, tuple[str, str, Function]] = {
    "bfe": ("own u32 u32", "own", _extract), "bfi": ("own own u32 u32", "own", _insert),
    "popc": ("own", "u32", lambda a: np.bitwise_count(a).astype(np.uint32)),
    "clz": ("own", "u32", _leading_zeros), "prmt": ("b32 b32 b32", "b32", _permute_bytes),
    "lop3": ("b32 b32 b32 b32", "b32", _lop3), "shl": ("own u32", "own", _shift_left),
    "shr": ("own u32", "own", _shift_right),
}  # fmt: skip
"""Kinds of the operands and of the result, "own" that of the instruction, and the function."""


_COMPARE: Mapping[str, Function] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge, "lo": operator.lt, "ls": operator.le,
    "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip
_COMBINE: Mapping[str, Function] = {
    "and": operator.and_, "or": operator.or_, "xor": operator.xor,
}  # fmt: skip


def _setp(rest: list[str], kinds: list[str], operands: int) -> Meaning:
    rest = [word for word in rest if word != "ftz"]
    compare, kind = rest[0], kinds[-1]
    combine = _COMBINE[rest[1]] if len(rest) > 1 else None
    if (operands == 4) != (combine is not None):
        raise UnsupportedPtxError(f"{operands - 1} operands")

    def decide(a: Array, b: Array, *third: Array) -> Array:
        by = partial(_compare_floats, compare) if kind in FLOATS else _COMPARE[compare]
        found = by(a, b)
        return combine(found, *third) if combine else found

    return Meaning((kind, kind, *(("pred",) if combine else ())), "pred", decide)


def _compare_floats(compare: str, a: Array, b: Array) -> Array:
    unordered = np.isnan(a) | np.isnan(b)
    if compare in ("nan", "num"):
        return unordered if compare == "nan" else ~unordered
    if compare in _COMPARE:
        return np.asarray(_COMPARE[compare](a, b) & ~unordered)
    return np.asarray(_COMPARE[compare.removesuffix("u")](a, b) | unordered)


_ROUND: Mapping[str, Function] = {
    "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint,
}  # fmt: skip


def _cvt(rest: list[str], kinds: list[str]) -> Meaning:
    to, source = kinds
    if to.endswith("x2"):
        # The first operand is the upper half.
        return Meaning((source, source), to, lambda a, b: _rounded(np.stack([b, a], 1), to))
    if to == "tf32":
        if "rna" not in rest:
            raise UnsupportedPtxError("this rounding")
        return Meaning((source,), "f32", rounded_tf32)
    integral = next((_ROUND[word] for word in rest if word in _ROUND), None)

    def convert(a: Array) -> Array:
        if to in FLOATS:
            value = _rounded(integral(a) if integral else a, to)
            return np.clip(value, 0, 1) if "sat" in rest else value
        if source in FLOATS:
            return _to_integer(a if integral is None else integral(a), NUMPY[to])
        if "sat" in rest:
            limits = np.iinfo(NUMPY[to])
            return np.clip(a.astype(np.int64), limits.min, limits.max).astype(NUMPY[to])
        return a.astype(NUMPY[to])

    return Meaning((source,), to, convert)


def _rounded(value: Array, to: str) -> Array:
    if to.startswith("bf16"):
        return value.astype(np.float32)
    return value.astype(NUMPY[to.removesuffix("x2")])


def _to_integer(value: Array, dtype: np.dtype[Any]) -> Array:
    """Out of range becomes the nearest, NaN zero."""
    limits = np.iinfo(dtype)
    wide = np.nan_to_num(value.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
    clipped = np.clip(wide, float(limits.min), float(limits.max))
    top = wide >= float(limits.max)
    return np.where(top, limits.max, np.where(top, 0, clipped).astype(dtype)).astype(dtype)

