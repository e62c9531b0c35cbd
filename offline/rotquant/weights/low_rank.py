"""Low-rank branch beside quantized weights: W = L + (W - L), L in 16 bits and of rank r, W - L in 4.

    y = x Wᵀ ≈ (x D) U + x Q(W - L)ᵀ,   L = (D U)ᵀ,   D [K, r], U [r, N]
    error    tr(E H Eᵀ) / tr(W H Wᵀ),   E = W - L - Q(W - L),   H = E[xᵀ x], the identity where it is not known

SVDQuant (arXiv 2411.05007) alternates L ← SVD_r(W - Q(W - L)). With H = S Sᵀ the step here is SVD_r(. S) S⁻¹, which is
the L of least output error. FRTQ's step in the row maxima may follow, which the row's 4-bit grid hangs on: with V = Dᵀ
of orthonormal rows, W - L = e, and a limit τ_i falling below max|e_i|,

    u_i ← u_i + (e_i - clip(e_i, ±τ_i)) Vᵀ     a projected step against what exceeds the limit

The L of least error is kept: neither step need lower it. Factors are rounded to their stored dtype first, so that
the quantized weights make up for that too.

A branch of the inputs instead spares their rounding what the leading directions of x hold, which ResQ (arXiv
2412.14363) keeps at 8 bits for the same reason. With D of any columns,

    z = x D,   x Wᵀ = (x - z Dᵀ)(W - W D Dᵀ)ᵀ + z U,   U = (2 I - Dᵀ D) Dᵀ Wᵀ

and what is left of x is rounded. D are the principal directions, Dᵀ D = I but for their stored dtype: W D Dᵀ then
multiplies nothing but the rounding error, and its absence makes W's rows smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rotquant.errors import RotQuantError

OVERSAMPLING, POWER_STEPS = 8, 4
LIMITS = (0.95, 0.9, 0.85, 0.8)


def directions(moment: Tensor, rank: int, shards: int, generator: torch.Generator) -> Tensor:
    """The leading directions of inputs, D float32 [K, rank] with orthonormal columns.

    Args:
        moment: E[xᵀ x], float [K, K].
        shards: parts of K, one a tensor-parallel rank, that no direction crosses; each has rank / shards of them.
        generator: a CPU generator.
    Raises:
        RotQuantError: a rank that the shards cannot have.
    """
    size, each = len(moment) // shards, rank // shards
    if rank % shards or not 0 < each <= size:
        raise RotQuantError(f"low-rank branch: rank {rank} for {shards} tensor-parallel ranks of {size} inputs")
    blocks = (moment[s : s + size, s : s + size].float() for s in range(0, len(moment), size))
    return torch.block_diag(*(truncated(block, each, generator)[1].mT for block in blocks))


def without(x: Tensor, down: Tensor) -> Tensor:
    """x - x D Dᵀ, what the directions D [K, r] leave of rows [..., K] to be rounded; float32."""
    x, down = x.float(), down.float()
    return x - x @ down @ down.mT


def beside(weight: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """U [r, N] of a branch of the inputs, and the weight float32 [N, K] for what these directions D [K, r] leave."""
    weight, down = weight.float(), down.float()
    along = down.mT @ weight.mT
    return 2 * along - (down.mT @ down) @ along, weight - (down @ along).mT


class LowRank(NamedTuple):
    """down D [K, r] and up U [r, N] float32, residual W - (D U)ᵀ float32 [N, K], the relative error of each L tried."""

    down: Tensor
    up: Tensor
    residual: Tensor
    errors: list[float]


def low_rank(
    weight: Tensor,
    rank: int,
    quantize: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    hessian: Tensor | None = None,
    iterations: int = 10,
    row_maxima: bool = False,
    dtype: torch.dtype = torch.float32,
    damping: float = 0.01,
) -> LowRank:
    """Splits a weight.

    Args:
        weight: float [N, K]; rank: r, at most min(N, K).
        quantize: float [N, K] to its dequantized values, e.g. RTN.
        generator: a CPU generator, for the start of the truncated SVD.
        hessian: mean of xᵀ x over the inputs as they are served, float [K, K].
        iterations: of SVDQuant's alternation; row_maxima: adds FRTQ's step to each.
        dtype: of the stored factors.
        damping: share of H's mean diagonal that is added to it.
    Raises:
        RotQuantError: a rank that the weight cannot have, a weight that is not finite, a Hessian that is not positive.
    """
    if not 0 < rank <= min(weight.shape):
        raise RotQuantError(f"low-rank branch: rank {rank} is not within 1 .. {min(weight.shape)}")
    if not weight.isfinite().all():
        raise RotQuantError("low-rank branch: the weight holds values that are not finite")
    weight = weight.float()
    root = None if hessian is None else _root(hessian.to(weight), damping)
    energy = _output(weight, root).square().sum()
    best: tuple[Tensor, Tensor] | None = None
    errors: list[float] = []
    least, target = float("inf"), weight
    for _ in range(iterations):
        up, down = truncated(target, rank, generator, root)
        for limit in (None, *LIMITS) if row_maxima else (None,):
            if limit is not None:
                up = _lower_maxima(weight, up, down, limit)
            stored = up.to(dtype).float(), down.to(dtype).float()
            residual = weight - stored[0] @ stored[1]
            quantized = quantize(residual)
            errors.append((_output(residual - quantized, root).square().sum() / energy).item())
            if errors[-1] < least:
                least, best, target = errors[-1], stored, weight - quantized
            elif limit is None:
                target = weight - quantized
    assert best is not None, "quantize() gave no numbers"
    up, down = best
    return LowRank(down.mT.contiguous(), up.mT.contiguous(), weight - up @ down, errors)


def truncated(
    matrix: Tensor, rank: int, generator: torch.Generator, root: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(U [N, r], V [r, K]), V of orthonormal rows: the U V of rank r with the least |(matrix - U V) S|.

    Randomized subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061), as full SVDs of large weights take
    minutes.

    Args:
        root: S [K, K], lower triangular; None for the identity.
    """
    a = _output(matrix, root)
    sample = torch.randn(a.shape[1], min(rank + OVERSAMPLING, *a.shape), generator=generator).to(a)
    basis = torch.linalg.qr(a @ sample).Q
    for _ in range(POWER_STEPS):
        basis = torch.linalg.qr(a @ torch.linalg.qr(a.mT @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.mT @ a, full_matrices=False)
    u, v = (basis @ left[:, :rank]) * values[:rank], right[:rank]
    if root is not None:
        v = torch.linalg.solve_triangular(root.mT, v.mT, upper=True).mT
    q, r = torch.linalg.qr(v.mT)
    return u @ r.mT, q.mT


def _lower_maxima(weight: Tensor, up: Tensor, down: Tensor, limit: float) -> Tensor:
    error = weight - up @ down
    tau = limit * error.abs().amax(1, keepdim=True)
    return up + (error - error.clamp(-tau, tau)) @ down.mT


def _root(hessian: Tensor, damping: float) -> Tensor:
    """S, lower triangular, of the damped H = S Sᵀ."""
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    root, info = torch.linalg.cholesky_ex(hessian + damping * hessian.diagonal().mean() * eye)
    if info.item() or not root.isfinite().all():
        raise RotQuantError("low-rank branch: the Hessian of its inputs is not positive; raise the damping")
    return root


def _output(matrix: Tensor, root: Tensor | None) -> Tensor:
    """M S: tr(M H Mᵀ) = |M S|²."""
    return matrix if root is None else matrix @ root
