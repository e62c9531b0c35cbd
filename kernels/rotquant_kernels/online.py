"""Online transforms of a linear layer's input as a chain of stages, and the linear layer behind it.

Stages run in their order, in float32, on the rows x of K numbers:

    hadamard     x (I ⊗ H / sqrt(block))                              no tensor
    dense        x (I ⊗ T)                                            T float [block, block]
    kronecker    x (P ⊗ Q): rows as matrices X [K / block, block], Pᵀ X Q    float [(K / block)² + block²], P then Q
    permutation  x[..., p]                                            p int [K]
    reflection   x (I ⊗ (I - 2 vᵀv)), v a unit row                     v float [block]
    shift        x - b (x W'ᵀ then lacks b Wᵀ, which the caller adds as a bias)    b float [K]

A hadamard or dense stage that comes last runs inside `int_linear`, as most checkpoints want it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from rotquant_kernels import calls
from rotquant_kernels.formats import RowFormat, WeightFormat
from rotquant_kernels.ops import online_stage

INSIDE = ("hadamard", "dense")
KINDS = (*INSIDE, "kronecker", "permutation", "reflection", "shift")


class Stage(NamedTuple):
    """One step of a chain; see the table above."""

    kind: str
    block: int
    tensor: Tensor | None = None


def split(stages: Sequence[Stage]) -> tuple[Sequence[Stage], Stage]:
    """What runs before `int_linear`, and the stage that runs inside."""
    return (stages[:-1], stages[-1]) if stages and stages[-1].kind in INSIDE else (stages, Stage("none", 0))


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
) -> Tensor:
    """`int_linear` behind a chain of stages; everything else as there. The low-rank branch reads transformed rows.

    Args:
        x: float [..., K]; if `silu_mul` [..., 2 K], and no stage runs before `int_linear` (`split`).
    Returns:
        [..., N] in x's dtype.
    """
    before, inside = split(stages)
    assert not (before and silu_mul)
    y = calls.int_linear(
        transform(x, before), weight, weight_scale, bias, weights, inside, rows, low_rank_down, low_rank_up, silu_mul
    )
    return y.to(x.dtype) if before else y
