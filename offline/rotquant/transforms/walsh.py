"""Walsh rotation: Hadamard's rows in the order of their sign changes (sequency), in blocks.

    R = I ⊗ W,  W = H_G[order] / sqrt(G),  order[s] = bitreverse(s xor (s >> 1)):  row s changes sign s times

W is symmetric, so W W = I, and x W is the fast Hadamard transform of x with its entries put in this order.
GSR (arXiv 2505.03810) takes the weight's group size for G: neighbours in a group then have similar sequency,
and a group's range its own scale.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rotquant.common.numbers import is_power_of_two
from rotquant.errors import RotQuantError
from rotquant_kernels.reference import hadamard


@functools.cache
def sequency_order(block: int) -> Tensor:
    """int64 [block]: the Sylvester row that has s sign changes, for s = 0 .. block - 1.

    Raises:
        RotQuantError: block is not a power of two.
    """
    if not is_power_of_two(block):
        raise RotQuantError(f"a Walsh matrix has an order that is a power of two, not {block}")
    bits = block.bit_length() - 1
    gray = torch.arange(block)
    gray = gray ^ (gray >> 1)
    return sum((((gray >> i) & 1) << (bits - 1 - i) for i in range(bits)), torch.zeros_like(gray))


def walsh_rows(x: Tensor, block: int) -> Tensor:
    """x (I ⊗ W) for x [..., K], block dividing K, in float32 or float64 as x is; its own inverse."""
    order = sequency_order(block).to(x.device)
    return hadamard(x, block).unflatten(-1, (-1, block))[..., order].flatten(-2)
