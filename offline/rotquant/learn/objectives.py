"""Objectives: what a good rotation, scale or clip ratio makes small. Rows y = x R, [n, d], float32 or float64.

Loss functions return a scalar and take optional row weights w [n] (1 where None): losses that are one number
l_t a row give Σ w_t l_t / Σ w_t. A rotation keeps |y_t|, so dividing by it changes no minimiser; it makes rows
of any size, and sites and widths, comparable. Statistics (`gsr`, `qsur`, `difficulty`) are for reports.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rotquant.learn.quantizers import Clip, fake_quantize

UNIFORM_KURTOSIS = 1.8
TINY = 1e-12


def quantization_error(
    y: Tensor, bits: int, symmetric: bool, clip: Clip = 1.0, weights: Tensor | None = None
) -> Tensor:
    """Σ w_t |y_t - Q(y_t)|² / Σ w_t |y_t|², Q quantization per token (DFRot's loss, arXiv 2412.00648).

    Gradients are straight-through (`quantizers`): they follow how the error grows with each row's range, not which
    grid point happens to be near.
    """
    error = (y - fake_quantize(y, bits, symmetric, clip)).square().sum(-1)
    energy = y.square().sum(-1)
    if weights is not None:
        error, energy = error * weights, energy * weights
    return error.sum() / energy.sum().clamp(min=TINY)


def step_size(y: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Δ_t [n]: (max - min) / (2^b - 1), or 2 max|y| / (2^b - 1) if symmetric."""
    smallest, largest = y.amin(-1), y.amax(-1)
    extent = 2 * torch.maximum(largest, -smallest) if symmetric else largest.clamp(min=0) - smallest.clamp(max=0)
    return extent / (2**bits - 1)


def gsr(y: Tensor, bits: int = 4, symmetric: bool = False) -> Tensor:
    """rho_t = Δ_t / sigma_t [n], sigma_t the standard deviation about the token's mean (FRTQ's grid-to-sigma ratio).

    The rounding error is rho² / 12 of the token's variance. A Gaussian token of 4096 has rho near 0.48.
    """
    return step_size(y, bits, symmetric) / y.std(-1, correction=0).clamp(min=TINY)


def gsr_loss(y: Tensor, bits: int = 4, symmetric: bool = False, weights: Tensor | None = None) -> Tensor:
    """Mean of Δ_t² / (12 |y_t|² / d): the relative rounding error that the range alone predicts.

    |y_t|² / d takes the place of sigma_t² (equal for tokens of zero mean), because a rotation can lower sigma_t by
    moving energy into the token's mean, which helps an asymmetric quantizer and must count as a gain.
    """
    return _mean(step_size(y, bits, symmetric).square() / (12 * _mean_square(y)), weights)


def whip(y: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of exp(-|y_tj| / rms_t) over rows and columns: few small entries, hence few large ones.

    DartQuant's Whip is Σ exp(-|y|); its inputs come from RMSNorm, where rms = 1, as all rows have here.
    """
    return _mean((y / _mean_square(y).sqrt().unsqueeze(-1)).abs().neg().exp().mean(-1), weights)


def kurtosis(y: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of |κ_t - 1.8|, κ_t = mean((y - μ)⁴) / sigma⁴ of a token, 1.8 that of the uniform distribution (KurTail)."""
    square = (y - y.mean(-1, keepdim=True)).square()
    kappa = square.square().mean(-1) / square.mean(-1).square().clamp(min=TINY)
    return _mean((kappa - UNIFORM_KURTOSIS).abs(), weights)


def variance(y: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of Var_j |y_tj| / rms_t² = 1 - |y_t|₁² / (d |y_t|₂²): 0 at a corner of the cube, near 1 for one large entry.

    Our reading of the variance loss in DartQuant's ablation: the plain variance of a token is its norm, which no
    rotation changes.
    """
    return _mean(1 - y.abs().mean(-1).square() / _mean_square(y), weights)


def qsur(y: Tensor, confidence_z: float = 2.326) -> Tensor:
    """log(V_X / V_S) / d, OSTQuant's quantization space utilization rate in nats per dimension (larger is better).

        V_X = π^(d/2) / Γ(d/2 + 1) c^(d/2) sqrt(det Σ)
        V_S = (max_j(μ_j + sqrt(c Σ_jj)) - min_j(μ_j - sqrt(c Σ_jj)))^d

    c is the χ² quantile with d degrees of freedom (Wilson-Hilferty; z = 2.326 is 99%). The extents are those of the
    ellipsoid's bounding box. Σ is shrunk by 1e-6 of its mean diagonal, else n < d rows would have no volume.
    A diagnostic: it judges the distribution of all tokens, not each token's own range. At best -0.5 log(d) or so.
    """
    d = y.shape[-1]
    y = y.double()
    mean = y.mean(0)
    centred = y - mean
    covariance = centred.mT @ centred / len(y)
    diagonal = covariance.diagonal()
    ridge = 1e-6 * diagonal.mean() + TINY
    log_det = torch.linalg.slogdet(covariance + ridge * torch.eye(d, dtype=y.dtype, device=y.device)).logabsdet
    c = d * (1 - 2 / (9 * d) + confidence_z * math.sqrt(2 / (9 * d))) ** 3
    reach = (c * (diagonal + ridge)).sqrt()
    extent = (mean + reach).amax() - (mean - reach).amin()
    ball = 0.5 * d * math.log(math.pi * c) - math.lgamma(0.5 * d + 1)
    return (ball + 0.5 * log_det) / d - extent.log()


def difficulty(y: Tensor) -> Tensor:
    """Standard deviation over channels of the channels' rms, |Y_:j|₂ / sqrt(n).

    Our reading of the difficulty "based on channel magnitudes" (Czakó et al., arXiv 2506.01967), whose exact
    definition is not public; sqrt(n) makes samples of any length comparable.
    """
    return y.square().mean(0).sqrt().std(correction=0)


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


def block_mse(output: Tensor, target: Tensor) -> Tensor:
    """|output - target|² / |target|² of a decoder layer's outputs, so that one learning rate suits every layer."""
    return (output - target).square().sum() / target.square().sum().clamp(min=TINY)


def _mean(loss: Tensor, weights: Tensor | None) -> Tensor:
    return loss.mean() if weights is None else (loss * weights).sum() / weights.sum()


def _mean_square(y: Tensor) -> Tensor:
    return y.square().mean(-1).clamp(min=TINY)
