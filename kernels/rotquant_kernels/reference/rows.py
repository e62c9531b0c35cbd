"""Specification of the ops on rows of activations: online transforms, quantization, a norm that quantizes.

A GPU runs `rms_norm_quantize`, which stands in front of qkv_proj and gate_up_proj, in one launch, so that a token's
activations are read once and written once, as integers. Each step rounds to x's dtype where the separate ops of a model
do; the mean of squares is float32 in no fixed order, so a code may differ by one step where a value lies on a tie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant_kernels import convention
from rotquant_kernels.formats import RowFormat
from rotquant_kernels.stages import KINDS, Stage


def online_stage(x: Tensor, kind: str, block: int, tensor: Tensor | None) -> Tensor:
    """One stage of a chain of online transforms; `stages` has the kinds and their tensors.

    Args:
        x: float [..., K].
    Returns:
        float32 [..., K].
    """
    return stage_rows(x.float(), kind, block, tensor)


def stage_rows(x: Tensor, kind: str, block: int, tensor: Tensor | None) -> Tensor:
    """`online_stage` in x's dtype, float32 or float64: folding needs more digits than serving.

    Raises:
        ValueError: an unknown kind, or one without the tensor that it needs.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown online transform {kind!r}")
    return KINDS[kind].rows(x, Stage(kind, block, tensor))


def turned(x: Tensor, transform: str, block: int, matrix: Tensor | None) -> Tensor:
    """What `quantize_rows` and `int_linear` read: the rows after the transform that runs inside them.

    Args:
        x: float [..., K], block divides K.
        transform: "none", or a stage that is `inside`: "hadamard", "dense" with its matrix float [block, block],
            "shift" with its vector float32 [K].
    Returns:
        float32 [..., K].
    """
    return x.float() if transform == "none" else online_stage(x, transform, block, matrix)


def quantize_rows(
    x: Tensor,
    transform: str,
    block: int,
    matrix: Tensor | None,
    bits: int,
    symmetric: bool,
    clip: float,
    silu_mul: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Transforms and quantizes activations per token.

    Args:
        x: float [M, K]; if `silu_mul` [M, 2 K], gate then up: the activations are `convention.silu_mul` of it.
        bits, symmetric, clip: see `RowFormat`.
    Returns:
        codes int8 [M, K], scale float32 [M, 1], zero point int32 [M, 1].
    """
    y = turned(convention.silu_mul(x) if silu_mul else x, transform, block, matrix)
    rows = RowFormat(bits, symmetric, clip)
    scale, zero = rows.qparams(y)
    return rows.quantize(y, scale, zero), scale, zero.to(torch.int32)


def rms_norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, bits: int, symmetric: bool, clip: float,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`quantize_rows` of y / sqrt(mean(y²) + eps) * weight - shift, y = x + residual.

    Args:
        x: float [M, K].
        residual: float [M, K] in x's dtype, or None, then y = x.
        weight: float [K]; shift: float32 [K], the stage of that name, or None for 0.
    Returns:
        codes int8 [M, K], scale float32 [M, 1], zero point int32 [M, 1]; y in x's dtype, a tensor of its own.
    """
    y = x.clone() if residual is None else x + residual
    normed = y.float() * (y.float().pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    rounded = (normed.to(x.dtype) * weight).to(x.dtype)
    turn = "none" if shift is None else "shift"
    return *quantize_rows(rounded, turn, 0, shift, bits, symmetric, clip), y
