"""A linear layer from rows of floats, by the GEMM that its weight was prepared for (`backends`)."""

from __future__ import annotations

from torch import Tensor

from rotquant_kernels.cuda import gemm, humming, layout, rows


def int_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, weight_bits: int, transform: str, block: int,
    matrix: Tensor | None, act_bits: int, act_symmetric: bool, act_clip: float,
    low_rank_down: Tensor | None = None, low_rank_up: Tensor | None = None, silu_mul: bool = False,
    low_rank_subtracts: bool = False,
) -> Tensor:  # fmt: skip
    """See `reference.int_linear`. Scales in Humming's order behind a weight say that Humming is to run it."""
    turn, (channels, groups) = (transform, block, matrix), weight_scale.shape
    columns = x.shape[-1] // 2 if silu_mul else x.shape[-1]
    parts = layout.unpack(weight, weight_bits, columns, channels, groups)
    if parts.scales is None or not x.numel():
        return gemm.int_linear(
            x, weight, weight_scale, bias, weight_bits, *turn, act_bits, act_symmetric, act_clip, low_rank_down,
            low_rank_up, silu_mul, low_rank_subtracts,
        )  # fmt: skip
    layer = humming.Layer(channels, columns, weight_bits, act_bits, act_symmetric, bias is not None)
    y = humming.int_linear(rows.rows_of(x), parts, bias, layer, turn, act_clip, silu_mul)
    return y.view(*x.shape[:-1], channels)


IMPLEMENTATIONS = {"int_linear": int_linear}
