"""The ops as models call them, with formats in the place of plain numbers.

Here, and nowhere else, a format becomes the plain arguments of a torch op; a family whose ops differ from the
integers' is told apart here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant_kernels import ops
from rotquant_kernels.formats import KVFormat, RowFormat, WeightFormat

Quantized = tuple[Tensor, Tensor, Tensor]  # codes, scale and zero point of rows


def plain(rows: RowFormat) -> tuple[int, bool, float]:
    return rows.bits, rows.symmetric, rows.clip


def quantize(x: Tensor, rows: RowFormat) -> Quantized:
    """`quantize_rows` of float [M, K] as they are."""
    return ops.quantize_rows(x, "none", 0, None, *plain(rows))


def norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, rows: RowFormat, shift: Tensor | None = None
) -> tuple[Quantized, Tensor]:
    """`rms_norm_quantize`: the quantized rows, and x + residual."""
    *quantized, stream = ops.rms_norm_quantize(x, residual, weight, eps, *plain(rows), shift)
    return tuple(quantized), stream


def int_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, weights: WeightFormat,
    stage: tuple[str, int, Tensor | None], rows: RowFormat, low_rank_down: Tensor | None, low_rank_up: Tensor | None,
    silu_mul: bool, low_rank_subtracts: bool,
) -> Tensor:  # fmt: skip
    """`int_linear` behind one online transform, (kind, block, tensor)."""
    return ops.int_linear(
        x, weight, weight_scale, bias, weights.bits, *stage, *plain(rows), low_rank_down, low_rank_up, silu_mul,
        low_rank_subtracts,
    )  # fmt: skip


def quantized_linear(
    quantized: Quantized, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, weights: WeightFormat,
    rows: RowFormat, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`quantized_linear` of what `quantize` or `norm_quantize` gave."""
    return ops.quantized_linear(*quantized, weight, weight_scale, bias, weights.bits, rows.symmetric, dtype)


def experts(
    x: Tensor, chosen: Tensor, shares: Tensor, expert_map: Tensor | None, up: Tensor, up_scale: Tensor, down: Tensor,
    down_scale: Tensor, weights: WeightFormat, block: int, up_rows: RowFormat, down_rows: RowFormat,
) -> Tensor:  # fmt: skip
    """`moe_experts`; the rows before down differ from those before gate and up in their clip ratio alone."""
    settings = weights.bits, block, *plain(up_rows), down_rows.clip
    return ops.moe_experts(x, chosen, shares, expert_map, up, up_scale, down, down_scale, *settings)


def kv_write(
    key: Tensor, value: Tensor, cache: Tensor, slots: Tensor, kv: KVFormat, feedback: Tensor | None = None
) -> None:
    """`kv4_write`; feedback: F of keys, where the format has it."""
    assert kv.feedback == (feedback is not None), "key_feedback, and a format without it, or the other way round"
    ops.kv4_write(key, value, cache, slots, kv.rotate, kv.symmetric, kv.k_clip, kv.v_clip, feedback)


def kv_attention(
    query: Tensor, cache: Tensor, query_start: Tensor, seq_lens: Tensor, block_table: Tensor, out: Tensor, scale: float,
    kv: KVFormat, window: int | None = None, cap: float | None = None,
) -> None:  # fmt: skip
    """`kv4_attention`; no window and no cap are None here and 0 there."""
    settings = scale, kv.rotate, kv.symmetric, window or 0, cap or 0.0
    ops.kv4_attention(query, cache, query_start, seq_lens, block_table, out, *settings)
