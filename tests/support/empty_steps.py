"""Calls of every op without rows: steps in which a rank has no token, or none but padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rotquant_kernels import KINDS, convention, reference

K, N, DIM = 128, 64, 64
TRANSFORMS = (("none", 0, None), ("hadamard", 64, None), ("dense", 64, torch.eye(64)))
STAGES = [(name, 64, kind.sample(64, K, torch.Generator().manual_seed(0))) for name, kind in KINDS.items()]


def calls(pack: Callable[..., Tensor], dtype: torch.dtype) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Name and arguments.

    Args:
        pack: `pack_weight` of the kernels that are called.
    """
    x, both = torch.empty(0, K, dtype=dtype), torch.empty(0, 2 * K, dtype=dtype)
    packed = convention.pack_int32(torch.randint(-8, 8, (N, K)).to(torch.int8), 4)
    scale, bias = torch.rand(N, 1), torch.rand(N).to(dtype)
    weight, low_rank = pack(packed, 4, K, 1), (torch.rand(K, 4).to(dtype), torch.rand(4, N).to(dtype))
    for transform in TRANSFORMS:
        for silu_mul in (False, True):
            rows = both if silu_mul else x
            yield "quantize_rows", (rows, *transform, 4, False, 0.9, silu_mul)
            yield "int_linear", (rows, weight, scale, None, 4, *transform, 4, False, 0.9, None, None, silu_mul)
        yield "int_linear", (x, weight, scale, bias, 4, *transform, 4, True, 0.9, *low_rank)
        yield "int_linear", (x[None], weight, scale, bias, 4, *transform, 8, True, 0.9)
    for stage in STAGES:
        yield "online_stage", (x, *stage)
    for residual in (None, x.clone()):
        yield "rms_norm_quantize", (x, residual, torch.ones(K, dtype=dtype), 1e-6, 4, False, 0.9)
    codes = torch.empty(0, K, dtype=torch.int8), torch.empty(0, 1), torch.empty(0, 1, dtype=torch.int32)
    yield "quantized_linear", (*codes, weight, scale, bias, 4, False, dtype)
    up, down = (convention.pack_int32(torch.randint(-8, 8, shape).to(torch.int8), 4) for shape in ((2 * N, K), (K, N)))
    stacks = pack(up, 4, K, 1)[None], torch.rand(1, 2 * N, 1), pack(down, 4, N, 1)[None], torch.rand(1, K, 1)
    nothing = torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)
    yield "moe_experts", (x, *nothing, None, *stacks, 4, 64, 4, False, 0.9, 0.9)


def cache_calls(dtype: torch.dtype, symmetric: bool) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The same for the ops of the KV cache; attention fills `out`, its sixth argument, which holds NaN before."""
    cache = torch.zeros(3, 2, 16, reference.kv_token_bytes(DIM, symmetric), dtype=torch.uint8)

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    for tokens in (0, 3):
        key, query = torch.rand(tokens, 2, DIM).to(dtype), torch.rand(tokens, 4, DIM).to(dtype)
        yield "kv4_write", (key, key, cache, torch.full((tokens,), -1), DIM, symmetric, 0.9, 0.9)
        for sequences in (1, 2):  # which have nothing new; tokens are padding
            step = ints(*[0] * (sequences + 1)), ints(*[0] * sequences), torch.zeros(sequences, 1, dtype=torch.int32)
            yield "kv4_attention", (query, cache, *step, torch.full_like(query, torch.nan), 0.1, DIM, symmetric)
    none = ints(0), ints(), torch.empty(0, 1, dtype=torch.int32)
    query = torch.rand(0, 4, DIM).to(dtype)
    yield "kv4_attention", (query, cache, *none, query.clone(), 0.1, DIM, symmetric)


def shapes(result: Any) -> list[tuple[torch.Size, torch.dtype]]:
    return [(part.shape, part.dtype) for part in (result if isinstance(result, tuple) else (result,))]


def check(kernels: dict[str, Callable[..., Any]], dtype: torch.dtype, without: tuple[str, ...] = ()) -> set[str]:
    """Runs the calls and compares with what the fakes promise; names of the ops that ran."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    ran = set()
    for op, arguments in calls(kernels.get("pack_weight", reference.pack_weight), dtype):
        if op in kernels and op not in without:
            ran.add(op)
            got = shapes(kernels[op](*arguments))
            mode = FakeTensorMode()
            fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments]
            with mode:
                assert got == shapes(getattr(torch.ops.rotquant, op)(*fakes)), op
    for symmetric in (True, False):
        for op, arguments in cache_calls(dtype, symmetric):
            if op in kernels:
                ran.add(op)
                kernels[op](*arguments)
                if op == "kv4_write":
                    assert not arguments[2].any()
                else:
                    assert (arguments[5] == 0).all()
    return ran
