"""Specification of the op that runs the experts of a layer.

An expert is a gated MLP; a router has chosen for each token some experts and their weights. Rows go through the same
steps as in linear layers, `int_linear` for gate and up as one matrix and `int_linear` with `silu_mul` for down, so that
an expert computes what an MLP of the same weights would. What experts add up to does not depend on what other tokens
are in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def moe_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    expert_map: Tensor | None,
    up: Tensor,
    up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    weight_bits: int,
    block: int,
    act_bits: int,
    act_symmetric: bool,
    up_clip: float,
    down_clip: float,
) -> Tensor:
    """Σ_i weights[t, i] expert_{chosen[t, i]}(x_t), expert(x) = int_linear(silu_mul(int_linear(x)) H).

    Args:
        x: float [T, hidden]; T may be 0.
        chosen: int32 or int64 [T, k], negative for none; weights: float32 [T, k].
        expert_map: int32 [all experts], each expert's place in `up` and `down` or -1 for one that another process has;
            None where all are here.
        up: [E, ...], gate over up of each expert from `ops.prepare_experts`; up_scale: float32 [E, 2 width, G].
        down: [E, ...]; down_scale: float32 [E, hidden, G'].
        block: of the Hadamard before down, 0 for none.
        weight_bits, act_bits, act_symmetric, up_clip, down_clip: see `linear.int_linear`.
    Returns:
        [T, hidden] in x's dtype. Each expert's output is rounded to it; weighted and added in float32, in the order of
        `chosen`, and rounded once more.
    """
    linear = torch.ops.rotquant.int_linear
    local = chosen.long()
    if expert_map is not None:
        local = torch.where(local < 0, -1, expert_map.long()[local.clamp(min=0)])
    settings = act_bits, act_symmetric
    parts = x.new_zeros(*chosen.shape, x.shape[-1])
    for expert in local[local >= 0].unique().tolist():
        tokens, place = (local == expert).nonzero(as_tuple=True)
        gate_up = linear(
            x[tokens], up[expert], up_scale[expert], None, weight_bits, "none", 0, None, *settings, up_clip
        )
        parts[tokens, place] = linear(
            gate_up, down[expert], down_scale[expert], None, weight_bits, "hadamard" if block else "none", block, None,
            *settings, down_clip, None, None, True,
        )  # fmt: skip
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for place in range(chosen.shape[1]):
        total = total + parts[:, place].float() * weights[:, place, None]
    return total.to(x.dtype)
