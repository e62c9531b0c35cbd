"""Specification of the ops by which a norm hands integers to the linear layers behind it.

    rms_norm_quantize   quantize_rows(norm(x + residual)), in front of qkv_proj and gate_up_proj
    quantized_linear    int_linear behind its quantize_rows

A GPU runs the first in one launch, so that a token's activations are read once and written once, as integers. Each
step rounds to x's dtype where the separate ops of a model do; the mean of squares is float32 in no fixed order, so a
code may differ by one step where a value lies on a rounding tie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant_kernels.convention import unpack_int32
from rotquant_kernels.reference import quantize_rows, scaled_product


def rms_norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, bits: int, symmetric: bool, clip: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_rows` of y / sqrt(mean(y²) + eps) * weight, y = x + residual.

    Args:
        x: float [M, K].
        residual: float [M, K] in x's dtype, or None, then y = x.
        weight: float [K].
    Returns:
        codes int8 [M, K], scale float32 [M, 1], zero point int32 [M, 1]; y in x's dtype, a tensor of its own.
    """
    y = x.clone() if residual is None else x + residual
    normed = y.float() * (y.float().pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    rounded = (normed.to(x.dtype) * weight).to(x.dtype)
    return *quantize_rows(rounded, "none", 0, None, bits, symmetric, clip), y


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
