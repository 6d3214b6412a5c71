"""Comparisons, logic and choices: scalar `@triton.jit` functions on fp32 values.

A boolean is 1 or 0 in a chain and one byte in memory. Whatever else stands where a condition is
asked for is true where it is not zero, as torch has it; NaN is true.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def equal(a, b):
    return tl.where(a == b, 1.0, 0.0)


@triton.jit
def not_equal(a, b):
    return tl.where(a != b, 1.0, 0.0)


@triton.jit
def less(a, b):
    return tl.where(a < b, 1.0, 0.0)


@triton.jit
def less_equal(a, b):
    return tl.where(a <= b, 1.0, 0.0)


@triton.jit
def greater(a, b):
    return tl.where(a > b, 1.0, 0.0)


@triton.jit
def greater_equal(a, b):
    return tl.where(a >= b, 1.0, 0.0)


@triton.jit
def logical_and(a, b):
    return tl.where(a == 0.0, 0.0, tl.where(b == 0.0, 0.0, 1.0))


@triton.jit
def logical_or(a, b):
    return tl.where(a == 0.0, tl.where(b == 0.0, 0.0, 1.0), 1.0)


@triton.jit
def logical_xor(a, b):
    other = tl.where(b == 0.0, 0.0, 1.0)
    return tl.where(a == 0.0, other, 1.0 - other)


@triton.jit
def logical_not(v):
    return tl.where(v == 0.0, 1.0, 0.0)


@triton.jit
def is_nan(v):
    return tl.where(v != v, 1.0, 0.0)


@triton.jit
def is_infinite(v):
    return tl.where(tl.abs(v) == float("inf"), 1.0, 0.0)


@triton.jit
def is_finite(v):
    return tl.where(tl.abs(v) < float("inf"), 1.0, 0.0)


@triton.jit
def choose(condition, first, second):
    return tl.where(condition != 0.0, first, second)


@triton.jit
def choose_first(first, condition, second):
    return tl.where(condition != 0.0, first, second)


@triton.jit
def choose_second(second, condition, first):
    return tl.where(condition != 0.0, first, second)
