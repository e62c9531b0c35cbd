"""Triton: activations become integers in one launch, one program a row.

    source      plain: x;  silu_mul: silu(gate) * up of x = [gate, up];  rms_norm: norm(x + residual) * weight
    transform   butterflies of stride 1, 2, 4, ... in float32, in the reference's order (it decides the last bit)
    quantize    scale and zero point of the row, codes (`convention`), bit for bit

Extremes are taken over the bits of the floats as integers: of numbers >= 0 the order is the same, and a NaN is
larger than all, so that it reaches the scale without a test of its own. Division is IEEE's (`div_rn`), and
products are never fused into sums (`EXACT`): both would change the last bit.
"""

# ruff: noqa: N803, N806 (Triton's compile-time constants are upper case)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rotquant_kernels import convention, reference

EXACT = {"enable_fp_fusion": False}
LARGEST = 65536  # columns of a row: what the registers of one program hold
EPSILON = tl.constexpr(convention.EPSILON)
LOG2_E = tl.constexpr(convention.LOG2_E)
LN2_HIGH, LN2_LOW = tl.constexpr(convention.LN2_HIGH), tl.constexpr(convention.LN2_LOW)
EXP = tl.constexpr(convention.EXP)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no fraction, rounded half to even


@triton.jit
def butterflies(y, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LOG: tl.constexpr):
    """`reference.hadamard` of float32 [WIDTH], BLOCK = 2^LOG."""
    for log in tl.static_range(LOG):
        pair = tl.permute(tl.reshape(y, [WIDTH >> (log + 1), 2, 1 << log]), (0, 2, 1))
        a, b = tl.split(pair)
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [WIDTH])
    return y * tl.constexpr(BLOCK**-0.5)


@triton.jit
def largest(y):
    """max(y, 0) of a row, or NaN if the row holds one with its sign bit clear."""
    return tl.maximum(tl.max(y.to(tl.int32, bitcast=True), 0), 0).to(tl.float32, bitcast=True)


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
def qparams(y, clip, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """`convention.qparams` of float32 [WIDTH]: scale and zero point, float32 scalars."""
    LOW: tl.constexpr = -(1 << (BITS - 1))
    HIGH: tl.constexpr = (1 << (BITS - 1)) - 1
    STEPS: tl.constexpr = HIGH - LOW
    if SYMMETRIC:
        scale = usable(tl.div_rn(largest(tl.abs(y)) * clip, STEPS / 2.0))
        zero = 0.0
    else:
        low = -largest(-y) * clip
        high = largest(y) * clip
        scale = usable(tl.div_rn(high - low, STEPS * 1.0))
        zero = whole(LOW - tl.div_rn(low, scale), LOW, HIGH)
    return scale, zero


@triton.jit
def exp(x):
    """`convention.exp`."""
    x = tl.minimum(tl.maximum(x, -80.0), 89.0)
    n = (x * LOG2_E + ROUND) - ROUND
    r = x - n * LN2_HIGH - n * LN2_LOW
    y = tl.full(x.shape, EXP[0], tl.float32)
    for i in tl.static_range(1, 6):
        y = y * r + EXP[i]
    y = y * (r * r) + r + 1.0
    return y * ((n.to(tl.int32) + 126) << 23).to(tl.float32, bitcast=True) * 2.0


@triton.jit
def quantize_kernel(
    x, residual, norm, stream, codes, scales, zeros, x_stride, columns, clip, eps,
    SOURCE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LOG: tl.constexpr,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """One row: see the module's docstring. ORDER of the codes: natural; humming8, humming4: `humming`."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDTH)
    inside = k < columns
    y = tl.load(x + row * x_stride + k, inside, 0)
    if SOURCE == "silu_mul":
        up = tl.load(x + row * x_stride + columns + k, inside, 0)
        gate = y.to(tl.float32)
        y = (tl.div_rn(gate, 1.0 + exp(-gate)).to(up.dtype).to(tl.float32) * up.to(tl.float32)).to(up.dtype)
    if SOURCE == "rms_norm":
        if residual is not None:
            y = (y.to(tl.float32) + tl.load(residual + row * columns + k, inside, 0).to(tl.float32)).to(y.dtype)
        tl.store(stream + row * columns + k, y, inside)
        f = y.to(tl.float32)
        f = f * tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(f * f, 0), columns.to(tl.float32)) + eps))
        y = (f.to(y.dtype).to(tl.float32) * tl.load(norm + k, inside, 0).to(tl.float32)).to(y.dtype)
    y = y.to(tl.float32)
    if LOG > 0:
        y = butterflies(y, WIDTH, BLOCK, LOG)
    if BITS == 0:
        tl.store(codes + row * columns + k, y, inside)
    else:
        scale, zero = qparams(y, clip, BITS, SYMMETRIC)
        q = whole(tl.div_rn(y, scale) + zero, -(1 << (BITS - 1)), (1 << (BITS - 1)) - 1).to(tl.int8)
        tl.store(scales + row, scale)
        tl.store(zeros + row, zero.to(tl.int32))
        if ORDER == "natural":
            tl.store(codes + row * columns + k, q, inside)
        else:  # columns % 32 == 0
            pairs = tl.permute(tl.reshape(q, [WIDTH // 32, 2, 16]), (0, 2, 1))
            if ORDER == "humming8":
                tl.store(codes + row * columns + k, tl.reshape(pairs, [WIDTH]), inside)
            else:
                low, high = tl.split(pairs)
                byte = tl.arange(0, WIDTH // 2)
                tl.store(
                    codes + row * (columns // 2) + byte,
                    tl.reshape((low & 15) | (high << 4), [WIDTH // 2]),
                    byte < columns // 2,
                )


def launch(
    source: str, x: Tensor, settings: tuple[str, int, Tensor | None], bits: int, symmetric: bool, clip: float,
    order: str = "natural", residual: Tensor | None = None, norm: Tensor | None = None, stream: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Runs `quantize_kernel` over the rows of x.

    Args:
        source: "plain", "silu_mul" or "rms_norm".
        x: float [M, K], for silu_mul [M, 2 K]; its last dimension contiguous.
        settings: transform ("none" or "hadamard"), block, None.
        bits: 2 to 8, or 0 for the transform alone.
        order: of the codes, "natural", "humming8" or "humming4".
        residual, norm, stream, eps: for rms_norm; contiguous [M, K] or None, [K], contiguous [M, K], filled.
    Returns:
        codes int8 [M, K] ([M, K / 2] for humming4; float32 for bits = 0), scale float32 [M, 1], zero int32 [M, 1].
    Raises:
        ValueError: settings that the kernel does not know, naming them.
    """
    transform, block, _ = settings
    rows, columns = x.shape[0], x.shape[1] // (2 if source == "silu_mul" else 1)
    check(columns, transform, block, bits, clip)
    width = max(triton.next_power_of_2(columns), 32)
    shape = (rows, columns // 2) if order == "humming4" else (rows, columns)
    codes = torch.empty(shape, dtype=torch.int8 if bits else torch.float32, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    zero = torch.empty((rows, 1), dtype=torch.int32, device=x.device)
    if rows:
        log = block.bit_length() - 1 if transform == "hadamard" else 0
        quantize_kernel[(rows,)](
            x, residual, norm, stream, codes, scale, zero, x.stride(0), columns, clip, eps,
            SOURCE=source, WIDTH=width, BLOCK=1 << log, LOG=log, BITS=bits, SYMMETRIC=symmetric, ORDER=order,
            num_warps=warps(width), **EXACT,
        )  # fmt: skip
    return codes, scale, zero


def warps(width: int) -> int:
    """Warps of a program: 16 numbers a thread, as far as there are threads."""
    return min(max(width // (16 * 32), 1), 32)


def check(columns: int, transform: str, block: int, bits: int, clip: float) -> None:
    """Refuses, by name, what the kernel would compute wrongly."""
    if transform not in ("none", "hadamard"):
        raise ValueError(f"the CUDA kernel has no transform {transform!r}")
    if transform == "hadamard" and (block < 1 or block & (block - 1) or columns % block):
        raise ValueError(f"Hadamard block {block} is no power of two or does not divide {columns} columns")
    if columns > LARGEST:
        raise ValueError(f"rows of {columns} columns are longer than the CUDA kernel's {LARGEST}")
    if bits and not 2 <= bits <= 8:
        raise ValueError(f"activations of {bits} bits are not supported: 2 to 8")
    if not 0 < clip <= 1:
        raise ValueError(f"clip {clip} is not in (0, 1]")


def rows_of(x: Tensor) -> Tensor:
    """x as a matrix whose rows are contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def transform_rows(x: Tensor, transform: str, block: int, matrix: Tensor | None, silu_mul: bool = False) -> Tensor:
    """See `reference.transform_rows`. Dense products are torch's; floats of another width are not the kernel's."""
    y = x
    if silu_mul or (transform == "hadamard" and x.dtype != torch.float64):
        inside = "none" if transform == "dense" else transform
        y = launch("silu_mul" if silu_mul else "plain", rows_of(x), (inside, block, None), 0, True, 1.0)[0]
        y, transform = y.view(*x.shape[:-1], y.shape[1]), transform if transform == "dense" else "none"
    return reference.transform_rows(y, transform, block, matrix)


def quantize_rows(
    x: Tensor, transform: str, block: int, matrix: Tensor | None, bits: int, symmetric: bool, clip: float,
    silu_mul: bool = False, order: str = "natural",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `reference.quantize_rows`."""
    rows = rows_of(x)
    if transform == "dense":
        rows, transform, silu_mul = transform_rows(rows, transform, block, matrix, silu_mul), "none", False
    return launch("silu_mul" if silu_mul else "plain", rows, (transform, block, None), bits, symmetric, clip, order)


def rms_norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, bits: int, symmetric: bool, clip: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `fused.rms_norm_quantize`."""
    if residual is not None and (residual.dtype, residual.shape) != (x.dtype, x.shape):
        raise ValueError("the residual stream must have the dtype and the shape of x")
    residual = None if residual is None else residual.contiguous()
    rows, stream, norm = rows_of(x), torch.empty(x.shape, dtype=x.dtype, device=x.device), weight.contiguous()
    extra: dict[str, Any] = {"residual": residual, "norm": norm, "stream": stream, "eps": eps}
    return *launch("rms_norm", rows, ("none", 0, None), bits, symmetric, clip, **extra), stream


IMPLEMENTATIONS: dict[str, Any] = {
    "transform_rows": transform_rows,
    "quantize_rows": quantize_rows,
    "rms_norm_quantize": rms_norm_quantize,
}
