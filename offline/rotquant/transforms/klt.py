"""KLT (PCA) rotations: eigenvectors of a covariance, then Hadamard to make all variances equal.

    C = E[(x - μ)ᵀ (x - μ)] = U Λ Uᵀ,   cov(x U) = Λ
    R = U H / sqrt(d):                   cov(x R) = Hᵀ Λ H / d, all diagonal entries tr(C) / d

OSTQuant starts R1 there (its WOMI), with C of the rows of the stacked q, k, v, up and gate weights, and R2 with C of
W_o for each KV head: the weights that R multiplies then have columns of one variance. For activations as x the same R
makes all channels equally large, which no fixed rotation promises. Eigenvectors come largest first (QUAD and ResQ
keep the first r in more bits).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from rotquant.errors import RotQuantError
from rotquant.transforms.hadamard import hadamard_rows, largest_order
from rotquant.transforms.permutation import zigzag


def covariance(rows: Iterable[Tensor]) -> Tensor:
    """C float64 [d, d] of all rows, float [n, d] each; one pass.

    Raises:
        RotQuantError: no rows.
    """
    moment = total = torch.zeros((), dtype=torch.float64)
    count = 0
    for x in rows:
        x = x.double()
        moment, total, count = moment.to(x) + x.mT @ x, total.to(x) + x.sum(0), count + len(x)
    if not count:
        raise RotQuantError("no rows to take a covariance of")
    mean = total / count
    return moment / count - torch.outer(mean, mean)


def klt(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(U float64 [d, d], eigenvalues [d]) of a covariance [d, d], largest first.

    Each eigenvector's largest entry is positive, so that equal covariances give equal rotations.
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    values, vectors = values.flip(0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign(), values


def equal_variances(matrix: Tensor) -> Tensor:
    """R = U (I ⊗ H / sqrt(order)) float64 [d, d] of a covariance [d, d].

    Where no Hadamard matrix has order d, eigenvectors are dealt to the blocks in zigzag by their eigenvalue, so that
    blocks have nearly the same variance.
    """
    vectors, values = klt(matrix)
    order = largest_order(len(values))
    return hadamard_rows(vectors[:, zigzag(values, order)], order)
