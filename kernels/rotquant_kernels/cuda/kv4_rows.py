"""What the Triton kernels of the 4-bit KV cache share: nibble order, rounding, the rotation R3.

A byte of a page holds step 8 s + t in its low nibble and step 8 s + 4 + t in its high one
(`reference.pack_codes`); `halves` brings a row of codes into the same two orders.
"""
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

# Arguments that change from step to step. Triton compiles an integer anew where it is 1 (then a constant, without an
# integer's methods) or a multiple of 16, and a pointer where it is aligned: none of these is worth that.
PER_STEP = [
    "tokens", "sequences", "splits", "table_row", "query_start", "seq_lens", "table", "count", "slots", "window",
]  # fmt: skip


@triton.jit
def rint(x):
    """Rounds half to even; exact for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def largest_magnitude(x):
    """max |x| of each row; NaN where a row holds NaN or infinity. Compared as integers: there NaN is the largest."""
    most = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    return tl.where(most < 0x7F800000, most, 0x7FC00000).to(tl.float32, bitcast=True)


@triton.jit
def hadamard(x, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr):
    """`reference.hadamard` of rows [ROWS, DIM], its additions in its order. BLOCK = 2^STAGES, NORM = BLOCK^-0.5."""
    for stage in tl.static_range(STAGES):
        y = tl.reshape(x, [ROWS, DIM // (2 << stage), 2, 1 << stage])
        a, b = tl.split(tl.permute(y, (0, 1, 3, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), [ROWS, DIM])
    return x * NORM


@triton.jit
def halves(x, ROWS: tl.constexpr, DIM: tl.constexpr):
    """The steps 8 s + t and the steps 8 s + 4 + t of rows [ROWS, DIM]: two of [ROWS, DIM / 2]."""
    low, high = tl.split(tl.permute(tl.reshape(x, [ROWS, DIM // 8, 2, 4]), (0, 1, 3, 2)))
    return tl.reshape(low, [ROWS, DIM // 2]), tl.reshape(high, [ROWS, DIM // 2])
