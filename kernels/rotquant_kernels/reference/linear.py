"""Specification of the linear layers on integers: from rows of floats, and from rows that are quantized already."""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant_kernels import convention
from rotquant_kernels.convention import unpack_int32
from rotquant_kernels.reference.rows import quantize_rows, turned


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact int32 a bᵀ of int8 a [M, K] and int8 b [N, K]."""
    if a.device.type == "cpu":
        return torch._int_mm(a, b.t())
    return (a.double() @ b.double().t()).to(torch.int32)


def scaled_product(
    q: Tensor, scale: Tensor, zero: Tensor, codes: Tensor, weight_scale: Tensor, symmetric: bool
) -> Tensor:
    """Product of quantized rows [M, K] and weight codes [N, K], scaled: float32 [M, N], see `int_linear`."""
    size = q.shape[1] // weight_scale.shape[1]
    total = torch.zeros(())
    for group, (q_group, w_group) in enumerate(zip(q.split(size, 1), codes.split(size, 1), strict=True)):
        acc = int_matmul(q_group.contiguous(), w_group.contiguous())
        if not symmetric:
            acc = acc - zero * w_group.sum(1, dtype=torch.int32)
        total = total + acc.float() * weight_scale[:, group]
    return total * scale


def pack_weight(packed: Tensor, bits: int, columns: int, groups: int) -> Tensor:
    """The reference reads the checkpoint's own layout, int32 [N, ceil(columns * bits / 32)], or [E, ...] of a stack."""
    return packed.clone()


def int_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    transform: str,
    block: int,
    matrix: Tensor | None,
    act_bits: int,
    act_symmetric: bool,
    act_clip: float,
    low_rank_down: Tensor | None = None,
    low_rank_up: Tensor | None = None,
    silu_mul: bool = False,
    low_rank_subtracts: bool = False,
) -> Tensor:
    """Linear layer on integers: y = s_x s_w (q_x - z_x) q_wᵀ + (x T) D U + bias, q_x from x T, x transformed online.

    Args:
        x: float [..., K]; if `silu_mul` [..., 2 K], gate then up, and `convention.silu_mul` of it stands for x.
        weight: int32 [N, ceil(K * weight_bits / 32)], packed codes (`prepare_weight`).
        weight_scale: float32 [N, G]; G = 1 per channel, else one scale per group of K / G inputs.
        bias: float [N] or None.
        weight_bits, act_bits: 4 or 8.
        transform, block, matrix: see `turned`.
        low_rank_down, low_rank_up: D float [K, r] and U float [r, N], a branch in full precision, or None.
        low_rank_subtracts: q_x is that of x T - (x T D) Dᵀ, what the branch's directions leave.
    Returns:
        [..., N] in x's dtype. Epilogue in float32: for each group acc * s_w, summed in the order of
        the groups, then * s_x, then + the low-rank branch, then + bias, then one rounding to x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    rows = convention.silu_mul(rows) if silu_mul else rows
    rows, branch = turned(rows, transform, block, matrix), None
    if low_rank_down is not None and low_rank_up is not None:
        z = rows @ low_rank_down.float()
        rows, branch = rows - z @ low_rank_down.float().T if low_rank_subtracts else rows, z @ low_rank_up.float()
    q, scale, zero = quantize_rows(rows, "none", 0, None, act_bits, act_symmetric, act_clip)
    y = scaled_product(q, scale, zero, unpack_int32(weight, weight_bits, rows.shape[1]), weight_scale, act_symmetric)
    y = y if branch is None else y + branch
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


def quantized_linear(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    act_symmetric: bool,
    dtype: torch.dtype,
) -> Tensor:
    """`int_linear` of rows that are quantized already, without a low-rank branch.

    Args:
        codes, scale, zero: as `quantize_rows` returns them.
        weight, weight_scale, bias, weight_bits, act_symmetric: as in `int_linear`.
    Returns:
        [M, N] in `dtype`.
    Raises:
        ValueError: weight is in the layout of a device that has no kernel of this op (CPUs).
    """
    if weight.dtype != torch.int32 or weight.dim() != 2:
        raise ValueError("quantized_linear has no native CPU kernel: call int_linear")
    y = scaled_product(
        codes, scale, zero, unpack_int32(weight, weight_bits, codes.shape[1]), weight_scale, act_symmetric
    )
    return (y if bias is None else y + bias.float()).to(dtype)
