"""Triton: x (I ⊗ T), a dense matrix for each block of a row, in float32 whatever torch's products may round to."""

# ruff: noqa: N803 (Triton's compile-time constants are upper case)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZE = (32, 64, 32)  # rows, columns and terms of a tile
WARPS = 4


@triton.jit
def dense_kernel(
    x, matrix, out, x_stride, rows, columns, block, TM: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr
):  # fmt: skip
    """A tile of out [rows, columns]: program (block of a row and tile of its columns, tile of rows)."""
    tiles = tl.cdiv(block, TN)
    first = tl.program_id(0) // tiles * block
    n = tl.program_id(0) % tiles * TN + tl.arange(0, TN)
    m = tl.program_id(1).to(tl.int64) * TM + tl.arange(0, TM)
    total = tl.zeros([TM, TN], tl.float32)
    for start in range(0, block, TK):
        k = start + tl.arange(0, TK)
        a = tl.load(x + m[:, None] * x_stride + (first + k)[None, :], (m < rows)[:, None] & (k < block)[None, :], 0)
        t = tl.load(matrix + k[:, None] * block + n[None, :], (k < block)[:, None] & (n < block)[None, :], 0)
        total = tl.dot(a.to(tl.float32), t, total, input_precision="ieee")
    tl.store(out + m[:, None] * columns + (first + n)[None, :], total, (m < rows)[:, None] & (n < block)[None, :])


def launch(x: Tensor, block: int, matrix: Tensor | None) -> Tensor:
    """x (I ⊗ T), float32 [M, K].

    Args:
        x: float [M, K] of 32 or 16 bits, its last dimension contiguous; block divides K.
        matrix: T, float32 [block, block].
    Raises:
        ValueError: another matrix, or a block that does not divide.
    """
    rows, columns = x.shape
    if block < 1 or columns % block:
        raise ValueError(f"transform block {block} does not divide {columns} columns")
    if matrix is None:
        raise ValueError("a dense transform needs its matrix")
    if matrix.dtype != torch.float32 or matrix.shape != (block, block):
        raise ValueError(f"a dense matrix must be float32 [{block}, {block}]")
    out = torch.empty((rows, columns), dtype=torch.float32, device=x.device)
    if rows:
        tm, tn, tk = SIZE
        dense_kernel[(columns // block * triton.cdiv(block, tn), triton.cdiv(rows, tm))](
            x, matrix.contiguous(), out, x.stride(0) if rows > 1 else 0, rows, columns, block,
            TM=tm, TN=tn, TK=tk, num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out
