"""Objectives: what a good rotation, scale or clip ratio makes small. Rows y = x R, [n, d], float32 or float64.

Losses return a scalar and take optional row weights w [n] (1 where None): those that are one number l_t a row give
Σ w_t l_t / Σ w_t, l_t a figure of `metrics`. A rotation keeps |y_t|, so dividing by it changes no minimiser; it makes
rows of any size, and sites and widths, comparable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant.common import metrics
from rotquant.learn.quantizers import Clip, fake_quantize
from rotquant_kernels.formats import RowFormat

UNIFORM_KURTOSIS = 1.8


def quantization_error(y: Tensor, rows: RowFormat, clip: Clip | None = None, weights: Tensor | None = None) -> Tensor:
    """Σ w_t |y_t - Q(y_t)|² / Σ w_t |y_t|², Q quantization per token (DFRot's loss, arXiv 2412.00648).

    Gradients are straight-through (`quantizers`): they follow how the error grows with each row's range, not which
    grid point happens to be near. `clip` as in `fake_quantize`.
    """
    error = (y - fake_quantize(y, rows, clip)).square().sum(-1)
    energy = y.square().sum(-1)
    if weights is not None:
        error, energy = error * weights, energy * weights
    return error.sum() / energy.sum().clamp(min=torch.finfo(y.dtype).tiny)


def gsr_loss(y: Tensor, rows: RowFormat, weights: Tensor | None = None) -> Tensor:
    """Mean of the relative rounding error that the range alone predicts: GSR² / 12 for rows of mean 0 (FRTQ)."""
    return _mean(metrics.rounding_error(y, rows.step(y)), weights)


def whip(y: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of exp(-|y_tj| / rms_t) over rows and columns: few small entries, hence few large ones.

    DartQuant's Whip is Σ exp(-|y|); its inputs come from RMSNorm, where rms = 1, as all rows have here.
    """
    return _mean(metrics.unit_rows(y).abs().neg().exp().mean(-1), weights)


def kurtosis(y: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of |κ_t - 1.8|, 1.8 the kurtosis of the uniform distribution (KurTail)."""
    return _mean((metrics.kurtosis(y) - UNIFORM_KURTOSIS).abs(), weights)


def kl_top(student_logits: Tensor, teacher_logits: Tensor, k: int = 1000) -> Tensor:
    """Σ_{i in I} p_i log(p_i / q_i), mean over tokens; I the k largest teacher logits (OSTQuant's KL-Top).

    p and q are softmaxes over the whole vocabulary, of which I is gathered, as the paper's scripts do: a partial
    sum, which can be negative, and which also punishes mass that the student puts outside I. The other reading,
    softmax over I alone, is a true divergence (>= 0) and blind to that mass.

    Args:
        student_logits, teacher_logits: float [..., vocab].
    """
    top, index = teacher_logits.detach().topk(min(k, teacher_logits.shape[-1]), dim=-1)
    log_p = top - teacher_logits.detach().logsumexp(-1, keepdim=True)
    log_q = student_logits.gather(-1, index) - student_logits.logsumexp(-1, keepdim=True)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _mean(loss: Tensor, weights: Tensor | None) -> Tensor:
    return loss.mean() if weights is None else (loss * weights).sum() / weights.sum()
