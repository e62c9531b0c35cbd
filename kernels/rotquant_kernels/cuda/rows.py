"""Triton: activations become integers in one launch, one program a row.

    source      plain: x;  silu_mul: silu(gate) * up of x = [gate, up];  rms_norm: norm(x + residual) * weight
    transform   hadamard: butterflies of stride 1, 2, 4, ... in float32, in the reference's order (it decides the last
                bit);  shift: x - b
    quantize    scale and zero point of the row, codes (`convention`), bit for bit

Rows that are too long for a program's registers and shared memory go through it in parts: `rows_long`.
"""

# ruff: noqa: N803 (Triton's compile-time constants are upper case)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rotquant_kernels import reference
from rotquant_kernels.cuda import rows_dense, rows_long
from rotquant_kernels.cuda.rows_steps import EXACT, butterflies, extremes, held, load_row, qparams, store_codes

# Columns that one program holds: the butterflies' exchange takes 4 bytes each of the 99 KiB of shared memory that the
# smallest GPUs have, and a norm, which exchanges nothing, has registers for no more than LONGEST_NORM.
LARGEST, LONGEST_NORM = 16384, 32768
STAGES = ("hadamard", "dense", "shift")  # online transforms that have a kernel; a dense product is a launch of its own


@triton.jit
def quantize_kernel(
    x, residual, norm, stream, shift, codes, scales, zeros, x_stride, columns, clip, eps,
    SOURCE: tl.constexpr, WIDTH: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr, LOG: tl.constexpr,
    BITS: tl.constexpr, SYMMETRIC: tl.constexpr, ORDER: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One row: see the module's docstring. ORDER of the codes: natural; humming8, humming4: `humming`."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, WIDTH)
    inside = k < columns
    if SOURCE == "rms_norm":
        y = tl.load(x + row * x_stride + k, inside, 0)
        if residual is not None:
            y = (y.to(tl.float32) + tl.load(residual + row * columns + k, inside, 0).to(tl.float32)).to(y.dtype)
        tl.store(stream + row * columns + k, y, inside)
        f = y.to(tl.float32)
        f = f * tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(f * f, 0), columns * 1.0) + eps))
        y = (f.to(y.dtype).to(tl.float32) * tl.load(norm + k, inside, 0).to(tl.float32)).to(y.dtype).to(tl.float32)
    else:
        y = load_row(x + row * x_stride, k, columns, SOURCE == "silu_mul")
    if shift is not None:
        y -= tl.load(shift + k, inside, 0)
    if LOG > 0:
        y = butterflies(y, WIDTH, LOG, HELD) * tl.constexpr(BLOCK**-0.5)
    if BITS == 0:
        tl.store(codes + row * columns + k, y, inside)
    else:
        high, low = extremes(y, SYMMETRIC)
        scale, zero = qparams(high, low, clip, BITS, SYMMETRIC)
        tl.store(scales + row, scale)
        tl.store(zeros + row, zero.to(tl.int32))
        length = columns // 2 if ORDER == "humming4" else columns
        store_codes(codes + row * length, y, scale, zero, 0, columns, WIDTH, BITS, ORDER, ASM)


def launch(
    source: str, x: Tensor, turn: tuple[str, int, Tensor | None], bits: int, symmetric: bool, clip: float,
    order: str = "natural", residual: Tensor | None = None, norm: Tensor | None = None, stream: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Runs `quantize_kernel` over the rows of x.

    Args:
        source: "plain", "silu_mul" or "rms_norm".
        x: float [M, K], for silu_mul [M, 2 K]; its last dimension contiguous.
        turn: transform ("none", "hadamard" or "shift"), block, float32 [K] of a shift.
        bits: 2 to 8, or 0 for the transform alone.
        order: of the codes, "natural", "humming8" or "humming4".
        residual, norm, stream, eps: for rms_norm; contiguous [M, K] or None, [K], contiguous [M, K], filled.
    Returns:
        codes int8 [M, K] ([M, K / 2] for humming4; float32 for bits = 0), scale float32 [M, 1], zero int32 [M, 1].
    Raises:
        ValueError: settings that the kernel does not know, naming them.
    """
    transform, block, shift = turn
    rows, columns = x.shape[0], x.shape[1] // (2 if source == "silu_mul" else 1)
    check(source, columns, transform, block, bits, clip)
    shift = check_shift(shift, columns) if transform == "shift" else None
    shape = (rows, columns // 2) if order == "humming4" else (rows, columns)
    codes = torch.empty(shape, dtype=torch.int8 if bits else torch.float32, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    zero = torch.empty((rows, 1), dtype=torch.int32, device=x.device)
    log = block.bit_length() - 1 if transform == "hadamard" else 0
    step = x.stride(0) if rows > 1 else 0  # of a single row any number, which would be a reason to compile anew
    width = max(triton.next_power_of_2(columns), 32)
    settings = {"SOURCE": source, "BLOCK": 1 << log, "LOG": log, "BITS": bits, "SYMMETRIC": symmetric, "ORDER": order}
    settings["ASM"] = not triton.knobs.runtime.interpret
    if rows and width > LARGEST and source != "rms_norm":
        rows_long.launch(x, shift, codes, scale, zero, step, columns, clip, settings)
    elif rows:
        quantize_kernel[(rows,)](
            x, residual, norm, stream, shift, codes, scale, zero, step, columns, clip, eps, **settings, WIDTH=width,
            HELD=held(width, warps(width)), num_warps=warps(width), **EXACT,
        )  # fmt: skip
    return codes, scale, zero


def warps(width: int) -> int:
    """Warps of a program: 32 numbers a thread, of which a number costs a seventh less than of 16 (fewer exchanges)."""
    return min(max(width // (32 * 32), 1), 32)


def check(source: str, columns: int, transform: str, block: int, bits: int, clip: float) -> None:
    """Refuses, by name, what the kernel would compute wrongly."""
    if transform not in ("none", "hadamard", "shift"):
        raise ValueError(f"the CUDA kernel has no transform {transform!r}")
    if transform == "hadamard" and (block < 1 or block & (block - 1) or columns % block):
        raise ValueError(f"Hadamard block {block} is no power of two or does not divide {columns} columns")
    if source == "rms_norm" and columns > LONGEST_NORM:
        raise ValueError(f"a norm of {columns} columns is longer than the CUDA kernel's {LONGEST_NORM}")
    if bits and not 2 <= bits <= 8:
        raise ValueError(f"activations of {bits} bits are not supported: 2 to 8")
    if not 0 < clip <= 1:
        raise ValueError(f"clip {clip} is not in (0, 1]")


def check_shift(shift: Tensor | None, columns: int) -> Tensor:
    """The vector float32 [columns] of a shift, after a look at what the kernel relies on."""
    if shift is None or shift.shape != (columns,) or shift.dtype != torch.float32:
        raise ValueError(f"a shift of {columns} columns needs float32 [{columns}]")
    return shift.contiguous()


def rows_of(x: Tensor) -> Tensor:
    """x as a matrix whose rows are contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def turned(x: Tensor, transform: str, block: int, matrix: Tensor | None, silu_mul: bool = False) -> Tensor:
    """See `reference.turned`; float32, of x [M, K], or [M, 2 K] for silu_mul."""
    inside = "none" if transform == "dense" else transform
    if silu_mul or inside != "none":
        x = launch("silu_mul" if silu_mul else "plain", x, (inside, block, matrix), 0, True, 1.0)[0]
    return rows_dense.launch(x, block, matrix) if transform == "dense" else x.float()


def online_stage(x: Tensor, kind: str, block: int, tensor: Tensor | None) -> Tensor:
    """See `reference.online_stage`, which runs what has no kernel here: a kind, or floats of another width."""
    if kind not in STAGES or x.dtype == torch.float64:
        return reference.online_stage(x, kind, block, tensor)
    return turned(rows_of(x), kind, block, tensor).view(x.shape)


def quantize_rows(
    x: Tensor, transform: str, block: int, matrix: Tensor | None, bits: int, symmetric: bool, clip: float,
    silu_mul: bool = False, order: str = "natural",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `reference.quantize_rows`."""
    rows = rows_of(x)
    if transform == "dense":
        rows, transform, silu_mul = turned(rows, transform, block, matrix, silu_mul), "none", False
    return launch("silu_mul" if silu_mul else "plain", rows, (transform, block, matrix), bits, symmetric, clip, order)


def rms_norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, bits: int, symmetric: bool, clip: float,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `reference.rms_norm_quantize`."""
    turn = ("none", 0, None) if shift is None else ("shift", 0, shift)
    if residual is not None and (residual.dtype, residual.shape) != (x.dtype, x.shape):
        raise ValueError("the residual stream must have the dtype and the shape of x")
    residual = None if residual is None else residual.contiguous()
    rows, stream, norm = rows_of(x), torch.empty(x.shape, dtype=x.dtype, device=x.device), weight.contiguous()
    extra: dict[str, Any] = {"residual": residual, "norm": norm, "stream": stream, "eps": eps}
    return *launch("rms_norm", rows, turn, bits, symmetric, clip, **extra), stream


IMPLEMENTATIONS: dict[str, Any] = {
    "online_stage": online_stage,
    "quantize_rows": quantize_rows,
    "rms_norm_quantize": rms_norm_quantize,
}
