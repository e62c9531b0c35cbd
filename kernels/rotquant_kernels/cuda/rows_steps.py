"""Triton: the steps that turn rows of activations into integers, for a row in registers (`rows`) or in parts
(`rows_long`). Each is the reference's bit for bit.

Extremes are taken over the bits of the floats as integers: of numbers >= 0 the order is the same, and a NaN is
larger than all, so that it reaches the scale without a test of its own. Division is IEEE's (`div_rn`, `divided`), and
products are never fused into sums (`EXACT`) but where that is the point: both would change the last bit.
"""

# ruff: noqa: N803, N806 (Triton's compile-time constants are upper case)
from __future__ import annotations

import triton
import triton.language as tl

from rotquant_kernels import convention

EXACT = {"enable_fp_fusion": False}
EPSILON = tl.constexpr(convention.EPSILON)
LOG2_E = tl.constexpr(convention.LOG2_E)
LN2_HIGH, LN2_LOW = tl.constexpr(convention.LN2_HIGH), tl.constexpr(convention.LN2_LOW)
EXP = tl.constexpr(convention.EXP)
CORRECTED = tl.constexpr(  # $0 = $1 / $2, $3 = 1 / $2
    "{ .reg .f32 n, q, e; neg.f32 n, $2; mul.rn.f32 q, $1, $3; fma.rn.f32 e, q, n, $1; fma.rn.f32 q, e, $3, q; "
    "fma.rn.f32 e, q, n, $1; fma.rn.f32 $0, e, $3, q; }"
)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no fraction, rounded half to even, in the lowest bits


def held(width: int, warps: int) -> int:
    """Logarithm of how many of `width` numbers (a power of two) a thread holds; 1 at least, as a sum takes two."""
    return max((width // (32 * warps)).bit_length() - 1, 1)


@triton.jit
def butterflies(y, WIDTH: tl.constexpr, LOG: tl.constexpr, HELD: tl.constexpr):
    """The sums and differences of `reference.hadamard` at strides 1, 2, ..., 2^(LOG - 1) of float32 [WIDTH].

    A thread holds 2^HELD numbers (`held`). Stages go in groups, FIRST of them and then HELD at a time, in which a
    thread has all that it adds: between groups, and there alone, numbers change threads.
    """
    for log in tl.static_range(LOG):
        y = stage(y, WIDTH, LOG, HELD, log)
    return y


@triton.jit
def stage(y, WIDTH: tl.constexpr, LOG: tl.constexpr, HELD: tl.constexpr, log: tl.constexpr):
    """Stride 2^log. The compiler puts the last dimension of what is split, and the first ones, into registers: here the
    numbers of a group in both, and so in the same place at each of its stages."""
    FIRST: tl.constexpr = HELD if HELD < 4 else 4  # 16 numbers side by side, as they are loaded: 16 bytes of codes
    START: tl.constexpr = 0 if log < FIRST else FIRST + (log - FIRST) // HELD * HELD
    MOST: tl.constexpr = FIRST if log < FIRST else START + HELD
    END: tl.constexpr = MOST if MOST < LOG else LOG
    y = tl.reshape(y, [WIDTH >> END, 1 << (END - 1 - log), 2, 1 << (log - START), 1 << START])
    a, b = tl.split(tl.permute(y, (1, 3, 0, 4, 2)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (2, 0, 4, 1, 3)), [WIDTH])


@triton.jit
def extremes(y, SYMMETRIC: tl.constexpr):
    """max(y, 0) and max(-y, 0) of float32 [WIDTH] as the bits of a float, int32: more than infinity's for NaN.

    Both are max |y| where SYMMETRIC. A NaN is seen by the one that its sign is for.
    """
    if SYMMETRIC:
        high = tl.max(tl.abs(y).to(tl.int32, bitcast=True), 0)
        low = high
    else:
        high = tl.maximum(tl.max(y.to(tl.int32, bitcast=True), 0), 0)
        low = tl.maximum(tl.max((-y).to(tl.int32, bitcast=True), 0), 0)
    return high, low


@triton.jit
def usable(scale):
    scale = tl.where(scale == 0, EPSILON, scale)
    return tl.where(scale == float("inf"), float("nan"), scale)


@triton.jit
def whole(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Rounds half to even into [LOW, HIGH]; NaN becomes 0. float32 to float32."""
    inside = tl.minimum(tl.maximum(x, LOW), HIGH)
    return tl.where(x == x, (inside + ROUND) - ROUND, 0.0)


@triton.jit
def qparams(high, low, clip, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """`convention.qparams` of a row from its `extremes`: scale and zero point, float32 scalars."""
    LOW: tl.constexpr = -(1 << (BITS - 1))
    HIGH: tl.constexpr = (1 << (BITS - 1)) - 1
    STEPS: tl.constexpr = HIGH - LOW
    if SYMMETRIC:
        scale = usable(tl.div_rn(high.to(tl.float32, bitcast=True) * clip, STEPS / 2.0))
        zero = 0.0
    else:
        smallest = -low.to(tl.float32, bitcast=True) * clip
        scale = usable(tl.div_rn(high.to(tl.float32, bitcast=True) * clip - smallest, STEPS * 1.0))
        zero = whole(LOW - tl.div_rn(smallest, scale), LOW, HIGH)
    return scale, zero


@triton.jit
def exp(x):
    """`convention.exp`."""
    x = tl.minimum(tl.maximum(x, -80.0), 89.0)
    whole_n = x * LOG2_E + ROUND
    n = whole_n - ROUND
    r = x - n * LN2_HIGH - n * LN2_LOW
    y = tl.full(x.shape, EXP[0], tl.float32)
    for i in tl.static_range(1, 6):
        y = y * r + EXP[i]
    y = y * (r * r) + r + 1.0
    # 2^(n - 1): n stands in the lowest bits of its sum with ROUND, whose others the shift drops.
    return y * ((whole_n.to(tl.int32, bitcast=True) + 126) << 23).to(tl.float32, bitcast=True) * 2.0


@triton.jit
def load_row(x, k, columns, SILU_MUL: tl.constexpr):
    """Columns k of the row at x as float32; silu(gate) * up of [gate, up], rounded as a model does, where SILU_MUL."""
    y = tl.load(x + k, k < columns, 0)
    if SILU_MUL:
        up = tl.load(x + columns + k, k < columns, 0)
        gate = y.to(tl.float32)
        y = (tl.div_rn(gate, 1.0 + exp(-gate)).to(up.dtype).to(tl.float32) * up.to(tl.float32)).to(up.dtype)
    return y.to(tl.float32)


@triton.jit
def divided(y, scale, ASM: tl.constexpr):
    """y / scale of a row, correctly rounded: five instructions a number instead of div.rn's dozen and its slow path.

    One inverse for the row, two corrections by exact remainders: q + (y - q scale) r. The first leaves q within a unit
    of the last place, from where the second rounds as division does (Markstein), if nothing over- or underflows: a row
    near either end of what floats hold is moved by a power of two. Where y is so small that a remainder underflows, q
    is too small to move a code. The interpreter has no fused product.
    """
    if ASM:
        if (scale < 1e-18) | (scale > 1e18):
            move = tl.where(scale < 1.0, 1.8446744073709552e19, 5.421010862427522e-20)  # 2^64, 2^-64
            y, scale = y * move, scale * move
        q = tl.inline_asm_elementwise(CORRECTED, "=f,f,f,f", [y, scale, tl.div_rn(1.0, scale)], tl.float32, True, 1)
    else:
        q = tl.div_rn(y, scale)
    return q


@triton.jit
def coded(q, scale, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Rounds q half to even into [LOW, HIGH], int8; 0 for all of a row whose scale is NaN, as it is where q can be NaN.

    The integer is read from the lowest bits of q + ROUND.
    """
    low, high = tl.where(scale == scale, LOW * 1.0, 0.0), tl.where(scale == scale, HIGH * 1.0, 0.0)
    return (tl.minimum(tl.maximum(q, low), high) + ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def store_codes(
    codes, y, scale, zero, first, columns, WIDTH: tl.constexpr, BITS: tl.constexpr, ORDER: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Quantizes float32 y [WIDTH], the columns from `first` of a row, to int8 codes in an ORDER (`rows`)."""
    q = coded(divided(y, scale, ASM) + zero, scale, -(1 << (BITS - 1)), (1 << (BITS - 1)) - 1)
    k = first + tl.arange(0, WIDTH)
    if ORDER == "natural":
        tl.store(codes + k, q, k < columns)
    else:  # columns % 32 == 0
        pairs = tl.permute(tl.reshape(q, [WIDTH // 32, 2, 16]), (0, 2, 1))
        if ORDER == "humming8":
            tl.store(codes + k, tl.reshape(pairs, [WIDTH]), k < columns)
        else:
            low, high = tl.split(pairs)
            byte = first // 2 + tl.arange(0, WIDTH // 2)
            packed = tl.reshape((low & 15) | (high << 4), [WIDTH // 2])
            tl.store(codes + byte, packed, byte < columns // 2)
