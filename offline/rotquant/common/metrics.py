"""How hard rows are to quantize, and how well quantization did: one formula each, for reports and for learning.

A row x of d numbers is what gets one scale: a token of a linear's input, or a (token, head) of the KV cache.
Per row, with gradients (`learn.objectives` makes losses of them, `inspection` means):

    peak to RMS    max|x| / sqrt(mean x²)        1 flat; sqrt(2 ln d) or so Gaussian; sqrt(d) one spike
    GSR            Δ / std(x)                    the quantizer's step over the row's standard deviation (FRTQ)
    rounding       Δ² / 12 / mean x²             the relative error that rounding makes; GSR² / 12 for a centred row
    kurtosis       mean (x - μ)⁴ / var(x)²       1.8 uniform, 3 Gaussian (KurTail aims at 1.8)
    error          ‖x - x̂‖² / ‖x‖²               SNR in dB is -10 log10 of its mean over rows

Over rows:

    difficulty     std of the channel norms over their RMS     0: all channels equal; near 1: few hold the energy
    QSUR           volume of the data's ellipsoid over that of the quantizer's cube (OSTQuant)
    massive        rows whose peak is far above the other rows' peaks

A row of zeros has no shape. Its figures are finite, as learning needs; means should leave it out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASSIVE = 10.0  # times the median peak


def mean_square(x: Tensor) -> Tensor:
    """mean x² of each row, at least the smallest normal number: float [..., d] to [...]."""
    return x.square().mean(-1).clamp(min=torch.finfo(x.dtype).tiny)


def rms(x: Tensor) -> Tensor:
    """Root mean square of each row: float [..., d] to [...]."""
    return mean_square(x).sqrt()


def unit_rows(x: Tensor) -> Tensor:
    """Rows scaled to RMS 1, float [..., d]; zeros stay."""
    return x / rms(x).unsqueeze(-1)


def peak_to_rms(x: Tensor) -> Tensor:
    """max|x| / rms(x) of each row: float [..., d] to [...], from 1 to sqrt(d)."""
    return x.abs().amax(-1) / rms(x)


def gsr(x: Tensor, steps: Tensor) -> Tensor:
    """Δ / std(x) of each row: FRTQ's grid-to-sigma ratio, float [..., d] and [...] to [...]. A Gaussian row of 4096 has
    0.48 at 4 bits."""
    return steps / x.std(-1, correction=0).clamp(min=torch.finfo(x.dtype).tiny)


def rounding_error(x: Tensor, steps: Tensor) -> Tensor:
    """Δ² / 12 / mean x² of each row, the relative error of rounding to steps Δ: float [..., d] and [...] to [...].

    mean x² and not GSR's variance: a rotation can lower the variance by moving energy into the row's mean, which
    helps an asymmetric quantizer and must count as a gain. Saturation is not in it.
    """
    return steps.square() / (12 * mean_square(x))


def kurtosis(x: Tensor) -> Tensor:
    """mean (x - μ)⁴ / var(x)² of each row (KurTail): float [..., d] to [...]."""
    square = (x - x.mean(-1, keepdim=True)).square()
    return square.square().mean(-1) / square.mean(-1).square().clamp(min=torch.finfo(x.dtype).tiny)


def relative_error(x: Tensor, quantized: Tensor) -> Tensor:
    """‖x - x̂‖² / ‖x‖² of each row: float [..., d] twice to [...]."""
    return (x - quantized).square().sum(-1) / x.square().sum(-1).clamp(min=torch.finfo(x.dtype).tiny)


def snr_db(error: float) -> float:
    """-10 log10 of a relative squared error; infinite for 0.

    Of a mean of `relative_error` it is the SNR in which every row counts the same, however large.
    """
    return -10 * math.log10(error) if error > 0 else math.inf


def difficulty(channel_norms: Tensor) -> Tensor:
    """Quantization difficulty by channel magnitudes, after Czakó et al. (arXiv 2506.01967).

    Our reading: the standard deviation of the channels' norms. It is divided by their RMS here, so that a scale common
    to all channels does not matter: 0 where all are equal, sqrt(1 - 1/d) where one channel holds everything.

    Args:
        channel_norms: float [..., d], sqrt(sum or mean over rows of x_j²).
    Returns:
        float [...].
    """
    return channel_norms.std(-1, correction=0) / rms(channel_norms)


def qsur(mean: Tensor, covariance: Tensor) -> Tensor:
    """Quantization space utilization rate (OSTQuant, arXiv 2501.13987), per dimension and relative to a ball.

    The rows' ellipsoid {(x-μ)ᵀ Σ⁻¹ (x-μ) <= c}, c the 99% quantile of chi² with d degrees of freedom, in the cube
    that one scale spans:

        V_X = π^(d/2) / Γ(d/2 + 1) c^(d/2) sqrt(det Σ)
        V_S = (max_j(μ_j + sqrt(c Σ_jj)) - min_j(μ_j - sqrt(c Σ_jj)))^d
        qsur = ((V_X / V_S) / (V_ball / V_cube))^(1/d),   V_ball / V_cube that of a ball in the smallest cube around it

    V_X / V_S itself is 1e-200 or so for a few hundred dimensions. 1: as round as can be. Eigenvalues of Σ below
    float32's resolution of the largest count as that.

    Args:
        mean: float [..., d]; covariance: float [..., d, d].
    Returns:
        float64 [...], in [0, 1].
    """
    d, sigma = mean.shape[-1], covariance.double()
    c = chi2_quantile(d)
    values = torch.linalg.eigvalsh(sigma)
    floor = torch.finfo(torch.float32).eps * values[..., -1:].clamp(min=torch.finfo(torch.float64).tiny)
    log_axis = torch.maximum(values, floor).log().mean(-1) / 2
    reach = (c * sigma.diagonal(dim1=-2, dim2=-1)).sqrt()
    extent = (mean + reach).amax(-1) - (mean - reach).amin(-1)
    return log_axis.exp() * math.sqrt(c) * 2 / extent


def chi2_quantile(d: int, z: float = 2.3263478740408408) -> float:
    """Quantile of chi² with d degrees of freedom at the normal quantile z (99%), by Wilson and Hilferty's cube."""
    return d * (1 - 2 / (9 * d) + z * math.sqrt(2 / (9 * d))) ** 3


def massive(peaks: Tensor, factor: float = MASSIVE) -> Tensor:
    """Which rows are massive: peak max|x| above `factor` times the median peak. Float [n] to int64 indices [m]."""
    return (peaks > factor * peaks.median()).nonzero().flatten()
