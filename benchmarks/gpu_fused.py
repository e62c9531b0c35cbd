"""What runs before a linear layer multiplies, on a CUDA device: our one launch, and the two it takes otherwise.

See `gpu_kernels.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_attention import DEVICE, Call
from rotquant_kernels import ops

FORMAT = (4, False, 0.9)  # bits, symmetric, clip


@dataclass(frozen=True)
class Silu:
    """M tokens' gate and up, K each: silu(gate) * up, a Hadamard of `block`, quantization; for down_proj."""

    k: int
    block: int
    m: int

    def __str__(self) -> str:
        return f"{self.k} block {self.block} M {self.m}"


@dataclass(frozen=True)
class Norm:
    """RMSNorm of x + residual, M tokens of K numbers, and quantization; for qkv_proj and gate_up_proj."""

    k: int
    m: int

    def __str__(self) -> str:
        return f"{self.k} M {self.m}"


def numbers(*shape: int, device: str = DEVICE) -> Tensor:
    return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_()


def silu(p: Silu, device: str = DEVICE) -> Call:
    x = numbers(p.m, 2 * p.k, device=device)
    return partial(ops.quantize_rows, x, "hadamard", p.block, None, *FORMAT, True)


def silu_apart(p: Silu) -> Call:
    import vllm._custom_ops  # noqa: F401

    x, y = numbers(p.m, 2 * p.k), numbers(p.m, p.k)

    def run() -> Any:
        torch.ops._C.silu_and_mul(y, x)
        return ops.quantize_rows(y, "hadamard", p.block, None, *FORMAT)

    return run


def norm(p: Norm, device: str = DEVICE) -> Call:
    x, residual, weight = (numbers(*shape, device=device) for shape in ((p.m, p.k), (p.m, p.k), (p.k,)))
    return partial(ops.rms_norm_quantize, x, residual, weight, 1e-5, *FORMAT)


def norm_apart(p: Norm) -> Call:
    import vllm._custom_ops  # noqa: F401

    x, residual, weight = numbers(p.m, p.k), numbers(p.m, p.k), numbers(p.k)

    def run() -> Any:
        torch.ops._C.fused_add_rms_norm(x, residual, weight, 1e-5)
        return ops.quantize_rows(x, "none", 0, None, *FORMAT)

    return run


PEERS: dict[type, dict[str, Callable[[Any], Call]]] = {
    Silu: {"rotquant": silu, "vLLM silu_and_mul, then rotquant": silu_apart},
    Norm: {"rotquant": norm, "vLLM fused_add_rms_norm, then rotquant": norm_apart},
}


def validate(p: Silu | Norm) -> str:
    """Our call with tensors that have shapes only."""
    made = silu(p, "meta") if isinstance(p, Silu) else norm(p, "meta")
    return f"codes {list(made()[0].shape)}"
