"""Elementary functions that Triton lacks, or has less exactly than torch.

They are scalar `@triton.jit` functions on fp32 values, without branches, so that they can stand in
an epilogue, and of instructions that the interpreter and the emulator have too: libdevice's cannot
be interpreted.
"""

from __future__ import annotations

import triton
import triton.language as tl

NAN: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)
PI: tl.constexpr = tl.constexpr(3.141592653589793)
HALF_PI: tl.constexpr = tl.constexpr(1.5707963267948966)


@triton.jit
def with_sign_of(magnitude, v):
    # By its sign bit: -0 is not less than 0. And -x is 0 - x in Triton, +0 for +0.
    return tl.where(v.to(tl.int32, bitcast=True) < 0, magnitude * -1.0, magnitude)


@triton.jit
def clamp(v, low, high):
    return tl.minimum(tl.maximum(v, low, propagate_nan=NAN), high, propagate_nan=NAN)


@triton.jit
def exp(v):
    # A GPU computes 2^(v log2 e), where the rounding of a large product is a relative error of the
    # result. Here 2^n 2^r: with |r| <= 1/2 it is none, and v - n ln 2 is exact in two parts (Cody
    # and Waite), the first of which has few enough bits for every n.
    v = clamp(v, -104.0, 89.0)
    n = tl.floor(v * 1.4426950408889634 + 0.5)
    rest = v - n * 0.693145751953125 - n * 1.4286068203094172e-6
    # In two factors: 2^128 is no number, though results that it is a factor of are.
    return tl.exp2(rest * 1.4426950408889634) * tl.exp2(n - 1.0) * 2.0


@triton.jit
def expm1(v):
    # As `exp`, but 2^n (e^r - 1) + (2^n - 1): near zero e^v - 1 would cancel. |r| < 0.35, where
    # Taylor's polynomial is exact to fp32.
    v = clamp(v, -104.0, 89.0)
    n = tl.floor(v * 1.4426950408889634 + 0.5)
    rest = v - n * 0.693145751953125 - n * 1.4286068203094172e-6
    series = 1.0 / 120.0 + rest * (1.0 / 720.0 + rest * (1.0 / 5040.0))
    series = 0.5 + rest * (1.0 / 6.0 + rest * (1.0 / 24.0 + rest * series))
    series = rest * (1.0 + rest * series)
    half = tl.exp2(n - 1.0)
    return tl.where(n == 0.0, series, (half * series + (half - 0.5)) * 2.0)


@triton.jit
def log1p(v):
    # The rounding of 1 + v is known, v - ((1 + v) - 1), and made good in proportion (Kahan).
    sum = 1.0 + v
    seen = sum - 1.0
    result = tl.log(sum) * (v / tl.where(seen == 0.0, 1.0, seen))
    return tl.where(seen == 0.0, v, tl.where(sum == float("inf"), sum, result))


@triton.jit
def log1p_exp_of_negative(v):
    # log(1 + u) for u = e^-|v| in (0, 1]. A logarithm of 1 + u would lose the digits of a small u:
    # log(1 + u) = 2 atanh(s), s = u / (2 + u) <= 1/3, whose series is exact to fp32 after eight
    # terms.
    u = tl.exp(-tl.abs(v))
    s = u / (2.0 + u)
    square = s * s
    series = 1.0 / 13.0 + square * (1.0 / 15.0)
    series = 1.0 / 9.0 + square * (1.0 / 11.0 + square * series)
    series = 1.0 / 5.0 + square * (1.0 / 7.0 + square * series)
    series = 1.0 + square * (1.0 / 3.0 + square * series)
    return 2.0 * s * series


@triton.jit
def log1p_exp(v):
    # log(1 + e^v) without overflow.
    return tl.maximum(v, 0.0, propagate_nan=NAN) + log1p_exp_of_negative(v)


@triton.jit
def word_of_turns(index):
    # The 32 bits from the 32 (index - 1)-th on behind the binary point of 1 / (2 pi), index >= 0.
    word = tl.where(index == 1, 0x28BE60DB, tl.where(index == 2, 0x9391054A, 0))
    word = tl.where(index == 3, 0x7F09D5F4, tl.where(index == 4, 0x7D4D3770, word))
    word = tl.where(index == 5, 0x36D8A566, tl.where(index == 6, 0x4F10E410, word))
    return tl.where(index == 7, 0x7F9458EA, word).to(tl.uint64)


@triton.jit
def sine(v, quarter: tl.constexpr):
    # sin(|v| + quarter pi / 2), exact to fp32 however large v (Payne and Hanek): |v| = m 2^s with
    # whole m, so that of 1 / (2 pi) only 96 bits from the s-th on count in |v| as turns modulo 1.
    magnitude = tl.abs(v)
    bits = magnitude.to(tl.int32, bitcast=True)
    m = ((bits & 0x7FFFFF) | 0x800000).to(tl.uint64)
    start = tl.maximum((bits >> 23) - 150 + 32, 0)
    index, skipped = start >> 5, (start & 31).to(tl.uint64)
    high = (word_of_turns(index) << 32) | word_of_turns(index + 1)
    low = (word_of_turns(index + 2) << 32) | word_of_turns(index + 3)
    first = (high << skipped) | ((low >> 1) >> (63 - skipped))
    turns = first * m + ((((low << skipped) >> 32) * m) >> 32)
    quarters = (turns + (1 << 61)) >> 62
    rest = (turns - (quarters << 62)).to(tl.int64).to(tl.float32) * (HALF_PI * 2.0**-62)
    is_small = magnitude < 0.78
    rest = tl.where(is_small, magnitude, rest)
    quarters = tl.where(is_small, 0, quarters.to(tl.int32)) + quarter
    square = rest * rest
    odd = -1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4)
    odd = rest + rest * (square * odd)
    even = 4.166664568298827e-2 + square * (-1.388731625493765e-3 + square * 2.443315711809948e-5)
    even = 1.0 - 0.5 * square + square * square * even
    value = tl.where((quarters & 1) == 0, odd, even)
    value = tl.where((quarters & 2) == 0, value, value * -1.0)
    return tl.where(magnitude < float("inf"), value, v - v)


@triton.jit
def sin(v):
    return with_sign_of(sine(v, 0), v)


@triton.jit
def cos(v):
    return sine(v, 1)


@triton.jit
def arctangent_within_one(t):
    # A polynomial fitted to atan(t) / t for t^2 in [0, 1], to 3e-9. Odd: it keeps the sign of 0.
    square = t * t
    series = 0.05708956 + square * (-0.03035187 + square * (0.01048765 - square * 0.00170117))
    series = 0.10932342 + square * (-0.08349725 + square * series)
    series = 0.19998075 + square * (-0.14260016 + square * series)
    return t * (1.0 + square * (-0.33333276 + square * series))


@triton.jit
def atan(v):
    # atan(v) = +-pi/2 - atan(1/v).
    is_large = tl.abs(v) > 1.0
    angle = arctangent_within_one(tl.where(is_large, 1.0 / v, v))
    return tl.where(is_large, tl.where(v > 0, HALF_PI, -HALF_PI) - angle, angle)


@triton.jit
def atan2(y, x):
    # The angle of (|x|, |y|) below the diagonal, reflected there and at the axes. Scaled: a GPU's
    # division by more than 2^126 is 0.
    y, x = tl.broadcast(y, x)
    up, across = tl.abs(y) * 0.0625, tl.abs(x) * 0.0625
    is_small = (up < 1e-30) & (across < 1e-30)
    up = tl.where(is_small, tl.abs(y) * 1e30, up)
    across = tl.where(is_small, tl.abs(x) * 1e30, across)
    longest = tl.maximum(up, across)
    ratio = tl.minimum(up, across) / tl.where(longest == 0.0, 1.0, longest)
    # Infinities of both, too, are equal.
    ratio = tl.where((up == across) & (longest > 0.0), 1.0, ratio)
    angle = arctangent_within_one(ratio)
    angle = tl.where(up > across, HALF_PI - angle, angle)
    angle = tl.where(x.to(tl.int32, bitcast=True) < 0, PI - angle, angle)
    return with_sign_of(tl.where((x == x) & (y == y), angle, x + y), y)


@triton.jit
def round_half_even(v):
    # From 2^23 on fp32 has only whole numbers: adding it rounds.
    magnitude = tl.abs(v)
    rounded = (magnitude + 8388608.0) - 8388608.0
    return with_sign_of(tl.where(magnitude < 8388608.0, rounded, magnitude), v)


@triton.jit
def trunc(v):
    return tl.where(v < 0, tl.ceil(v), tl.floor(v))


@triton.jit
def fmod(a, b):
    # Long division in fp64, 28 bits of the quotient at a time. Each product of a digit and b has at
    # most 53 bits, so every remainder is exact; a digit may be one too large or too small, which
    # the next one makes good, and the last one is corrected.
    dividend, divisor = tl.broadcast(a, b)
    is_whole = (tl.abs(divisor) == float("inf")) & (tl.abs(dividend) != float("inf"))
    b = tl.abs(divisor).to(tl.float64)
    rest = tl.abs(dividend).to(tl.float64)
    inverse = 1.0 / b
    for step in tl.static_range(10):
        digit = tl.floor(rest * inverse * 2.0 ** (28 * (step - 9)))
        rest = rest - digit * (b * 2.0 ** (28 * (9 - step)))
    rest = tl.where(rest < 0.0, rest + b, rest)
    rest = tl.where(rest >= b, rest - b, rest).to(tl.float32)
    return with_sign_of(tl.where(is_whole, tl.abs(dividend), rest), dividend)


@triton.jit
def remainder(a, b):
    # With the sign of the divisor; a remainder of zero has that of the dividend.
    dividend, divisor = tl.broadcast(a, b)
    rest = fmod(dividend, divisor)
    differs = (rest != 0.0) & ((divisor < 0) != (rest < 0))
    return tl.where(differs, rest + divisor, rest)


@triton.jit
def divide(a, b):
    # Rounded as IEEE 754 has it, which a / b is not on a GPU: a quotient that is a whole number
    # comes out as one, for floor, comparisons and casts.
    return tl.div_rn(*tl.broadcast(a, b))


@triton.jit
def divide_by(a, b, inverse):
    # a / b by the rounded inverse of a number b, as IEEE 754 rounds it from 2^-100 on: what is
    # left of a corrects the product (P. Markstein, IBM J. Res. Dev. 34, 1990). Of zeros and of
    # infinite a nothing is.
    quotient = a * inverse
    rest = tl.fma(quotient, 0.0 - b, a)
    return tl.where(tl.abs(rest) > 0.0, tl.fma(rest, inverse, quotient), quotient)


@triton.jit
def trunc_divide(a, b):
    return trunc(divide(a, b))


@triton.jit
def floor_divide(a, b):
    # The fp64 quotient is no whole number unless the exact one is, up to 2^28.
    dividend, divisor = tl.broadcast(a, b)
    whole = tl.floor(dividend.to(tl.float64) / divisor.to(tl.float64)).to(tl.float32)
    below = ((dividend < 0.0) & (divisor > 0.0)) | ((dividend > 0.0) & (divisor < 0.0))
    whole = tl.where((tl.abs(divisor) == float("inf")) & below, -1.0, whole)
    return tl.where((tl.abs(dividend) == float("inf")) & (divisor != 0.0), float("nan"), whole)


@triton.jit
def power(a, b):
    # |a|^b through fp64 exp2(b log2|a|): the fp32 logarithm would lose b * log2|a| ulps.
    # The special values are those of IEEE 754 pow.
    base, exponent = tl.broadcast(a, b)
    magnitude = tl.exp2(exponent.to(tl.float64) * tl.log2(tl.abs(base).to(tl.float64)))
    magnitude = tl.where(tl.abs(base) == 1.0, 1.0, magnitude.to(tl.float32))
    whole = tl.floor(exponent) == exponent
    odd = whole & (tl.floor(exponent * 0.5) != exponent * 0.5)
    # By its sign bit: -0 is not less than 0. And -x is 0 - x in Triton, +0 for +0.
    is_negative = base.to(tl.int32, bitcast=True) < 0
    result = tl.where(is_negative & odd, magnitude * -1.0, magnitude)
    complex_root = (base < 0) & (tl.abs(base) != float("inf")) & (whole == 0)
    result = tl.where(complex_root, float("nan"), result)
    return tl.where((exponent == 0.0) | (base == 1.0), 1.0, result)
