"""What the Triton kernels of the 4-bit KV cache share: nibble order, rounding, rotary positions, the rotation R3.

A byte of a page holds step 8 s + t in its low nibble and step 8 s + 4 + t in its high one
(`reference.pack_codes`); `halves` brings a row of codes into the same two orders.
"""
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from rotquant_kernels.cuda.rows_steps import butterflies

# Arguments that change from step to step. Triton compiles an integer anew where it is 1 (then a constant, without an
# integer's methods) or a multiple of 16, and a pointer where it is aligned: none of these is worth that.
PER_STEP = [
    "tokens", "sequences", "splits", "table_row", "query_start", "seq_lens", "table", "count", "slots", "window",
]  # fmt: skip
SEQUENCES = tl.constexpr(256)  # looked at together


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
def positions_of(query_start, seq_lens, token, sequences, TOKENS: tl.constexpr):
    """Where tokens of a step, int [TOKENS], stand in their sequences; of padding behind the last anything."""
    before = tl.zeros([TOKENS], tl.int32)
    for first in range(0, sequences, SEQUENCES):
        s = first + tl.arange(0, SEQUENCES)
        end = tl.load(query_start + 1 + s, mask=s < sequences, other=1 << 30)
        before += tl.sum((end[None, :] <= token[:, None]).to(tl.int32), 1)
    sequence = tl.minimum(before, sequences - 1)
    return token - tl.load(query_start + 1 + sequence) + tl.load(seq_lens + sequence)


@triton.jit
def load_rows(start, dim, inside, position, cos_sin, ROPE: tl.constexpr, PAIRS: tl.constexpr):
    """Heads from `start`, pointers [R], as float32 [R, DIM], turned to their positions [R] (`rope.turned`) if ROPE."""
    x = tl.load(start[:, None] + dim[None, :], mask=inside, other=0.0)
    if ROPE > 0:
        if PAIRS:
            partner, angle, first = dim ^ 1, dim // 2, dim % 2 == 0
        else:
            first = dim < ROPE // 2
            partner, angle = tl.where(first, dim + ROPE // 2, dim - ROPE // 2), dim % (ROPE // 2)
        there = inside & (dim < ROPE)[None, :]
        y = tl.load(start[:, None] + partner[None, :], mask=there, other=0.0)
        at = cos_sin + tl.maximum(position, 0).to(tl.int64)[:, None] * ROPE + angle[None, :]  # padding stands nowhere
        cos = tl.load(at, mask=there, other=0.0).to(tl.float32)
        sin = tl.load(at + ROPE // 2, mask=there, other=0.0).to(tl.float32)
        own = (x.to(tl.float32) * cos).to(x.dtype).to(tl.float32)
        other = (y.to(tl.float32) * sin).to(x.dtype).to(tl.float32)
        x = tl.where(there, tl.where(first[None, :], own - other, own + other).to(x.dtype), x)
    return x.to(tl.float32)


@triton.jit
def hadamard(
    x, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """`reference.hadamard` of rows [ROWS, DIM], its additions in its order (`rows_steps.butterflies`).

    BLOCK = 2^STAGES, NORM = BLOCK^-0.5; threads hold 2^HELD numbers.
    """
    x = butterflies(tl.reshape(x, [ROWS * DIM]), ROWS * DIM, STAGES, HELD)
    return tl.reshape(x, [ROWS, DIM]) * NORM


@triton.jit
def halves(x, ROWS: tl.constexpr, DIM: tl.constexpr):
    """The steps 8 s + t and the steps 8 s + 4 + t of rows [ROWS, DIM]: two of [ROWS, DIM / 2]."""
    low, high = tl.split(tl.permute(tl.reshape(x, [ROWS, DIM // 8, 2, 4]), (0, 1, 3, 2)))
    return tl.reshape(low, [ROWS, DIM // 2]), tl.reshape(high, [ROWS, DIM // 2])
