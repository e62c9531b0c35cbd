"""GPTQ (Frantar et al., arXiv 2210.17323): rounding that corrects the error of each column in the next ones.

Minimises tr((W - W') H (W - W')ᵀ), H = sum xᵀx over the calibration inputs (here: the quantized inputs, which
the served layer really sees). With U = chol(H⁻¹) upper, column j is rounded and its error e_j = (w_j - w'_j)
/ U_jj is spread over the columns that follow: w_k -= e_j U_jk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rotquant.errors import RotQuantError
from rotquant_kernels.formats import WeightFormat

BLOCK = 64


class Columns(NamedTuple):
    """What GPTQ takes from a Hessian, made once for all weights that read the same inputs."""

    order: Tensor  # int64 [K], the order in which the columns are rounded
    dead: Tensor  # bool [K], inputs that never fire
    upper: Tensor  # U, float32 [K, K], in that order


def columns(hessian: Tensor, damping: float = 0.01, act_order: bool = True) -> Columns:
    """Prepares `quantize`.

    Args:
        hessian: float [K, K].
        damping: share of the mean diagonal added to the diagonal.
        act_order: largest diagonal first; the scales stay where they are, so the format does not change.
    Raises:
        RotQuantError: a Hessian that stays singular after damping was raised three times.
    """
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    ascending = torch.arange(len(diagonal), device=hessian.device)
    order = diagonal.argsort(descending=True, stable=True) if act_order else ascending
    return Columns(order, dead, inverse_factor(hessian[order][:, order], damping))


def quantize(weight: Tensor, scale: Tensor, prepared: Columns, form: WeightFormat) -> Tensor:
    """Codes of a weight matrix.

    Args:
        weight: float [N, K]; scale: float32 [N, G] from `rtn.weight_scale`; prepared: from `columns`.
    Returns:
        int8 [N, K].
    """
    order, dead, upper = prepared
    size = weight.shape[1]
    rest = weight.float().masked_fill(dead, 0).mT[order].contiguous()  # transposed: a column is contiguous
    scales = scale.mT.repeat_interleave(size // scale.shape[1], dim=0)[order].contiguous()
    codes = torch.empty_like(rest)
    for start in range(0, size, BLOCK):
        end = min(start + BLOCK, size)
        block, corner = rest[start:end], upper[start:end, start:end]
        errors = torch.empty_like(block)
        for j, (column, s) in enumerate(zip(block, scales[start:end], strict=True)):
            q = form.rows.snap_(torch.div(column, s, out=codes[start + j]))
            torch.addcmul(column, q, s, value=-1, out=errors[j]).div_(corner[j, j])
            block[j + 1 :].addr_(corner[j, j + 1 :], errors[j], alpha=-1)
        rest[end:].addmm_(upper[start:end, end:].mT, errors, alpha=-1)
    return codes.nan_to_num_(0).mT[:, order.argsort()].to(torch.int8).contiguous()


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor U of (H + λI)⁻¹ = Uᵀ U, λ = damping * mean(diag H), raised tenfold if needed."""
    mean = hessian.diagonal().mean()
    eye = torch.eye(hessian.shape[0]).to(hessian)
    for attempt in range(4):
        damped = hessian + eye * (damping * 10**attempt * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if info == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if info == 0 and upper.isfinite().all():
                return upper
    raise RotQuantError("GPTQ: the Hessian of the inputs is singular; use more calibration text")


def factor(hessian: Tensor, damping: float) -> Tensor:
    """Lower Cholesky factor of H + λI, float64 [K, K]: for `refit` of all weights that read the same inputs.

    Args:
        hessian: H = E[x̂ᵀ x̂], float32 [K, K]; damping: λ as a share of the mean diagonal of H.
    Raises:
        RotQuantError: a Hessian that is not positive in spite of its damping.
    """
    damped = hessian.to(torch.float64, copy=True)
    damped.diagonal().add_(damping * damped.diagonal().mean())
    lower, info = torch.linalg.cholesky_ex(damped)
    if info:
        raise RotQuantError("GPTQ: the Hessian of the inputs is singular; use more calibration text")
    return lower


def refit(weight: Tensor, drift: Tensor, lower: Tensor) -> Tensor:
    """The weight that, applied to quantized inputs, comes nearest to W applied to the exact ones.

    argmin_V E‖x Wᵀ - x̂ Vᵀ‖² is V = W E[xᵀ x̂] (E[x̂ᵀ x̂])⁻¹; damped towards V = W, that is
    V = W + W D (H + λI)⁻¹ with D = E[(x - x̂)ᵀ x̂]. It takes back what quantization does to the same token every time:
    without it the error of the first token, to which most heads attend, is added to the output of all others.

    Args:
        weight: float32 [N, K]; drift: D, float32 [K, K]; lower: `factor` of H.
    Returns:
        float32 [N, K].
    """
    return weight + torch.cholesky_solve((weight @ drift).mT.double(), lower).mT.float()
