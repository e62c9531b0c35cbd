"""Hadamard matrices of many orders, and the randomized Hadamard rotation that is folded into weights.

A Hadamard matrix H of order n has entries ±1 and H Hᵀ = n I, so H / sqrt(n) is a rotation that spreads
one large coordinate over all. Orders: powers of two (Sylvester), q + 1 for a prime q = 3 mod 4 and
2 (q + 1) for a prime q = 1 mod 4 (Paley 1933), 52, 92, 100, 116, 156, 172 (Williamson 1944), and Kronecker products
of these with powers of two: 12, 20, 28, 36, 44, ...
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rotquant.transforms.williamson import williamson
from rotquant_kernels.stages.hadamard import inner, products, sylvester


def power_of_two_factor(n: int) -> int:
    """Largest power of two that divides n."""
    return n & -n


@functools.cache
def paley(order: int) -> Tensor | None:
    """Paley's Hadamard matrix, float64 [order, order] of ±1; None where neither construction gives it.

    With χ the quadratic character mod q and Q_ij = χ(i - j): for q = order - 1 = 3 mod 4,
    H = I + [[0, 1], [-1, Q]]; for q = order/2 - 1 = 1 mod 4, C = [[0, 1], [1, Q]] and
    H = C ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]].
    """
    for q, sign in ((order - 1, -1.0), (order // 2 - 1, 1.0)):
        if q < 3 or (sign > 0 and order % 2) or q % 4 != (3 if sign < 0 else 1) or not _is_prime(q):
            continue
        squares = {x * x % q for x in range(1, q)}
        chi = torch.tensor([0.0] + [1.0 if x in squares else -1.0 for x in range(1, q)], dtype=torch.float64)
        index = torch.arange(q)
        core = torch.zeros(q + 1, q + 1, dtype=torch.float64)
        core[0, 1:], core[1:, 0] = 1.0, sign
        core[1:, 1:] = chi[(index[:, None] - index[None, :]) % q]
        eye = torch.eye(q + 1, dtype=torch.float64)
        if sign < 0:
            return eye + core
        one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        two = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(core, one) + torch.kron(eye, two)
    return None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def base(order: int) -> Tensor | None:
    """The Hadamard matrix of an order by Paley or Williamson, float64 of ±1; None where neither has one."""
    found = paley(order)
    return williamson(order) if found is None else found


@functools.cache
def split_order(n: int) -> tuple[int, int] | None:
    """(m, p) with n = m p, p a power of two and m = 1 or an order of `base`; None where there is none."""
    odd, power = n // power_of_two_factor(n), power_of_two_factor(n)
    if odd == 1:
        return 1, n
    factor = 4
    while factor <= power:
        if base(odd * factor) is not None:
            return odd * factor, power // factor
        factor *= 2
    return None


def largest_order(n: int) -> int:
    """Largest Hadamard order that divides n (at least its power-of-two part)."""
    return next(d for d in sorted((d for d in range(1, n + 1) if n % d == 0), reverse=True) if split_order(d))


def hadamard_rows(x: Tensor, order: int) -> Tensor:
    """x (I ⊗ H / sqrt(order)) along the last dimension; H = H_a ⊗ H_b of `factors`."""
    return products(x, *(matrix.to(x) for matrix in factors(order)))


def undone_rows(x: Tensor, order: int) -> Tensor:
    """x (I ⊗ Hᵀ / sqrt(order)), which `hadamard_rows` turns into x."""
    return products(x, *(matrix.mT.to(x) for matrix in factors(order)))


@functools.cache
def factors(order: int) -> tuple[Tensor, Tensor]:
    """Rotations H_a / sqrt(a) and H_b / sqrt(b), float64, with H_a ⊗ H_b of this order, as nearly square as can be."""
    parts = split_order(order)
    assert parts is not None, f"no Hadamard matrix of order {order}"
    m, p = parts
    b = inner(order, p)
    matrix = base(m) if m > 1 else torch.ones(1, 1, dtype=torch.float64)
    assert matrix is not None
    return torch.kron(matrix / m**0.5, sylvester(p // b)), sylvester(b)


class RandomHadamard:
    """The rotation R = diag(s) (I ⊗ H / sqrt(order)), s of random signs: R Rᵀ = diag(s) diag(s) = I.

    Args:
        size: rows of R.
        generator: source of the signs, so that a seed gives one rotation.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.order = largest_order(size)
        bits = torch.randint(0, 2, (size,), generator=generator)
        self.signs = (bits * 2 - 1).to(torch.float64)

    def rows(self, x: Tensor) -> Tensor:
        """x R for x [..., size], in x's dtype."""
        return hadamard_rows(x * self.signs.to(x), self.order)

    def columns(self, w: Tensor) -> Tensor:
        """Rᵀ w for w [size, ...]."""
        return self.rows(w.movedim(0, -1)).movedim(-1, 0)
