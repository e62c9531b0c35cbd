"""Hadamard matrices that Paley's constructions do not give: orders 52, 92, 100, 116, 156 and 172.

Four circulant matrices A, B, C, D of order n, entries ±1, with A Aᵀ + B Bᵀ + C Cᵀ + D Dᵀ = 4 n I make one of order
4 n (Goethals and Seidel 1970), R the exchange matrix:

    [   A    B R    C R    D R  ]
    [ -B R    A    Dᵀ R  -Cᵀ R  ]
    [ -C R  -Dᵀ R    A    Bᵀ R  ]
    [ -D R   Cᵀ R  -Bᵀ R    A   ]

The condition says that the four first rows' periodic autocorrelations sum to 0 at every shift but 0. For n = 13, 23,
25, 29 and 43 the rows are symmetric (Williamson 1944), found by search: rows whose power spectrum stays below 4 n, so
paired that spectra sum to 4 n. Those of 39 are built from those of 13 (Cooper and Wallis 1972): A, B, C, D laid along
the three unit sequences, in four arrangements.

With Sylvester's doubling these and Paley's give every multiple of 4 up to 256 but 188, 236 and 244. They matter for
sizes m 2^k with m = 13 (6656), 23, 25 (6400), 29, 39 and 43 (11008).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Bit i of a number is set where entry i of the first row is -1.
FIRST_ROWS = {
    13: (0xAD4, 0x330, 0x6D8, 0x10C2),
    23: (0x1CA538, 0x498192, 0x117E88, 0x3BA5DC),
    25: (0x5733A8, 0x19F87E6, 0x11EFDE2, 0x129B652),
    29: (0xA25E914, 0x5C210E8, 0x18CBF4C6, 0x8D3F2C4),
    39: (0xFE1D28250, 0x731958D0D9, 0x2D9977BC15, 0x5165FDCE9D),
    43: (0x14D42F42B28, 0x730A26450CE, 0x207AC935E04, 0x385B3FCDA1C),
}


@functools.cache
def williamson(order: int) -> Tensor | None:
    """Hadamard matrix float64 [order, order] of ±1; None where the table has none."""
    n, rest = divmod(order, 4)
    if rest or n not in FIRST_ROWS:
        return None
    index = torch.arange(n)
    a, b, c, d = (_row(bits, n)[(index[None, :] - index[:, None]) % n] for bits in FIRST_ROWS[n])
    r = torch.eye(n, dtype=torch.float64).flip(0)
    rows = [
        [a, b @ r, c @ r, d @ r],
        [-b @ r, a, d.T @ r, -c.T @ r],
        [-c @ r, -d.T @ r, a, b.T @ r],
        [-d @ r, c.T @ r, -b.T @ r, a],
    ]
    return torch.cat([torch.cat(row, dim=1) for row in rows])


def _row(bits: int, n: int) -> Tensor:
    return torch.tensor([-1.0 if bits >> i & 1 else 1.0 for i in range(n)], dtype=torch.float64)
