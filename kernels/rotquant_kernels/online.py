"""A chain of online transforms (`stages`) in front of a linear layer, and the layer behind it.

A stage that is `inside` runs within `int_linear` where it comes last, as most checkpoints want it; on CPUs any does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rotquant_kernels import calls
from rotquant_kernels.formats import RowFormat, WeightFormat
from rotquant_kernels.ops import online_stage
from rotquant_kernels.stages import KINDS, Stage


def split(stages: Sequence[Stage], device: torch.device | None = None) -> tuple[Sequence[Stage], Stage]:
    """What runs before `int_linear`, and the stage that runs inside: on a CPU one of any kind, else an `inside` one."""
    any_kind = device is not None and device.type == "cpu"
    runs_inside = stages and (any_kind or KINDS[stages[-1].kind].inside)
    return (stages[:-1], stages[-1]) if runs_inside else (stages, Stage("none", 0))


def transform(x: Tensor, stages: Sequence[Stage]) -> Tensor:
    """The rows after all stages: float [..., K] to float32 [..., K] (x itself where there is no stage)."""
    for stage in stages:
        x = online_stage(x, *stage)
    return x


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weights: WeightFormat,
    stages: Sequence[Stage],
    rows: RowFormat,
    low_rank_down: Tensor | None = None,
    low_rank_up: Tensor | None = None,
    silu_mul: bool = False,
    low_rank_subtracts: bool = False,
) -> Tensor:
    """`int_linear` behind a chain of stages; everything else as there. The low-rank branch reads transformed rows.

    Args:
        x: float [..., K]; if `silu_mul` [..., 2 K], and no stage runs before `int_linear` (`split`).
    Returns:
        [..., N] in x's dtype.
    """
    assert not (silu_mul and split(stages)[0])
    before, inside = split(stages, x.device)
    y = calls.int_linear(
        transform(x, before), weight, weight_scale, bias, weights, inside, rows, low_rank_down, low_rank_up, silu_mul,
        low_rank_subtracts,
    )  # fmt: skip
    return y.to(x.dtype) if before else y
