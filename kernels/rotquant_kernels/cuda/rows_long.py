"""Triton: rows that are too long for one program to hold, in parts of SPAN columns; the same numbers as `rows`.

    1. each part: source, butterflies of stride 1 .. SPAN / 2, as float32 into scratch; the row's extremes
    2. butterflies of larger strides, which join whole parts number by number
    3. each part again: codes

A program takes row after row, so that scratch is a row for each program and stays in the L2 cache, and each thread
reads the numbers that it wrote. What bounds a row in `rows` is shared memory, through which butterflies exchange it.
"""

# ruff: noqa: N803, N806 (Triton's compile-time constants are upper case)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rotquant_kernels.cuda.device import device_of
from rotquant_kernels.cuda.rows_steps import EXACT, butterflies, extremes, held, load_row, qparams, store_codes

LOG_SPAN = 13  # of the columns of a part: 32 KiB to exchange
WARPS = 16
PROGRAMS = 2  # for each processor


@triton.jit
def joined(at, STRIDE: tl.constexpr, NORM: tl.constexpr):
    """Butterflies of two whole parts, STRIDE numbers apart in scratch, times NORM; in their place, and as they are."""
    a, b = tl.load(at), tl.load(at + STRIDE)
    a, b = (a + b) * NORM, (a - b) * NORM
    tl.store(at, a)
    tl.store(at + STRIDE, b)
    return a, b


@triton.jit(do_not_specialize=["rows"])
def quantize_long_kernel(
    x, scratch, shift, codes, scales, zeros, x_stride, columns, clip, rows, LOG_SPAN: tl.constexpr, HELD: tl.constexpr,
    SOURCE: tl.constexpr, BLOCK: tl.constexpr, LOG: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
    ORDER: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Rows program, program + programs, ...; scratch float32 [programs, columns]. For BITS = 0 `codes` is scratch."""
    SPAN: tl.constexpr = 1 << LOG_SPAN
    INNER: tl.constexpr = LOG if LOG < LOG_SPAN else LOG_SPAN
    place, program = tl.arange(0, SPAN), tl.program_id(0).to(tl.int64)
    for turn in range(tl.cdiv(rows - tl.program_id(0), tl.num_programs(0))):
        row = program + turn * tl.num_programs(0)
        turned = scratch + (row if BITS == 0 else program) * columns
        high, low = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
        tl.debug_barrier()  # all threads are done with the row before
        for first in range(0, columns, SPAN):
            y = load_row(x + row * x_stride, first + place, columns, SOURCE == "silu_mul")
            if shift is not None:
                y -= tl.load(shift + first + place, first + place < columns, 0)
            if LOG > 0:
                y = butterflies(y, SPAN, INNER, HELD)
            if INNER == LOG:
                y = y * tl.constexpr(BLOCK**-0.5)
                part = extremes(y, SYMMETRIC)
                high, low = tl.maximum(high, part[0]), tl.maximum(low, part[1])
            tl.store(turned + first + place, y, first + place < columns)
        for log in tl.static_range(INNER, LOG):
            tl.debug_barrier()
            for first in range(0, columns, SPAN):
                if (first >> log) & 1 == 0:
                    a, b = joined(turned + first + place, 1 << log, BLOCK**-0.5 if log == LOG - 1 else 1.0)
                    if log == LOG - 1:
                        one, other = extremes(a, SYMMETRIC), extremes(b, SYMMETRIC)
                        high = tl.maximum(high, tl.maximum(one[0], other[0]))
                        low = tl.maximum(low, tl.maximum(one[1], other[1]))
        if BITS > 0:
            scale, zero = qparams(high, low, clip, BITS, SYMMETRIC)
            tl.store(scales + row, scale)
            tl.store(zeros + row, zero.to(tl.int32))
            tl.debug_barrier()
            length = columns // 2 if ORDER == "humming4" else columns
            for first in range(0, columns, SPAN):
                y = tl.load(turned + first + place, first + place < columns, 0)
                store_codes(codes + row * length, y, scale, zero, first, columns, SPAN, BITS, ORDER, ASM)


def launch(
    x: Tensor, shift: Tensor | None, codes: Tensor, scale: Tensor, zero: Tensor, step: int, columns: int, clip: float,
    settings: dict[str, Any],
) -> None:  # fmt: skip
    """Fills codes, scale and zero (see `rows.launch`) from the rows of x, `step` numbers apart; shift: [K] or None."""
    rows = x.shape[0]
    programs = min(rows, PROGRAMS * device_of(x.device).processors)
    direct = settings["BITS"] == 0
    scratch = codes if direct else torch.empty((programs, columns), dtype=torch.float32, device=x.device)
    quantize_long_kernel[(programs,)](
        x, scratch, shift, codes, scale, zero, step, columns, clip, rows, **settings, LOG_SPAN=LOG_SPAN,
        HELD=held(1 << LOG_SPAN, WARPS), num_warps=WARPS, num_stages=1, **EXACT,
    )  # fmt: skip
