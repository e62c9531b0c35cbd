"""bfloat16 products on CPUs that have no instructions for them, made of float32 ones: the same number, sooner.

    y = bf16(sum_j x_j w_j + b),    the sum in float32

is what a bfloat16 linear computes anywhere; only the order of the sum differs. Without AVX-512 BF16 torch takes five
times as long for it as for the float32 product, of the output layer above all. Weights are widened call by call, so
that a model takes no more memory than before, and few rows, which that would slow down, are left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rotquant.learn.stream import product_dtype

ROWS = 32  # from so many on the product takes longer than widening the weights


class FastProducts(TorchFunctionMode):
    """While it is entered, bfloat16 linears of many rows on such a CPU are float32 products, rounded once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        linear = func is torch.nn.functional.linear and not kwargs
        if linear and slow(args[0]):
            args = [x if x is None else x.float() for x in args]
            return func(*args).bfloat16()
        return func(*args, **(kwargs or {}))


def slow(x: torch.Tensor) -> bool:
    """Whether the product of such inputs [..., in] is emulated here."""
    emulated = x.device.type == "cpu" and product_dtype(x.dtype, x.device) != x.dtype
    return emulated and x.dtype == torch.bfloat16 and x.shape[:-1].numel() >= ROWS
