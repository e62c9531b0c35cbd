"""Compiles what serving will need before the first request: no step waits for a compiler, none is stopped by one.

Triton compiles a kernel when it is first launched with new types, constants or options. A backend names
the few batches that between them launch every variant (`distinct_tokens`, `distinct_batches`); they go through the
methods that serve, so that what is compiled is what is launched. Nothing to do where kernels are compiled already.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from rotquant_kernels.backends import backend_of
from vllm_rotquant import steps


@torch.inference_mode()
def warm_linears(layers: Iterable[Any]) -> None:
    """Runs linear layers, one of each sort, on rows of zeros, behind their norms with and without a residual."""
    for layer in layers:
        method, device = layer.quant_method, layer.weight_packed.device
        bias = getattr(layer, "bias", None) if method.adds_correction else None  # vLLM gives it to the first rank alone
        channels, groups = layer.weight_scale.shape
        backend = backend_of("quantized_linear", device)
        for tokens in backend.distinct_tokens(method.inputs, channels, groups, device):
            x = torch.zeros(tokens, method.inputs * (2 if method.silu_mul else 1), dtype=method.dtype, device=device)
            if method.norm is None:
                method.apply(layer, x, bias)
            else:
                method.norm(x)
                method.apply(layer, method.norm(x, x)[0], bias)


@torch.inference_mode()
def warm_experts(layers: Iterable[Any]) -> None:
    """Runs the experts of a layer on rows of zeros, as if tokens were evenly spread over those of this rank."""
    for layer in layers:
        method, device = layer.quant_method, layer.w13_weight_packed.device
        here, top = list(method.here), method.block.top_k
        groups = layer.w13_weight_scale.shape[2]
        shape = method.hidden, method.width, groups, len(here), top
        for tokens in backend_of("moe_experts", device).distinct_mixture_tokens(*shape, device):
            chosen = torch.tensor(here, device=device).repeat(-(-tokens * top // len(here)))[: tokens * top]
            x = torch.zeros(tokens, method.hidden, dtype=method.dtype, device=device)
            shares = torch.zeros(tokens, top, device=device)
            method.apply(layer, x, shares, chosen.view(tokens, top), None, None)


@torch.inference_mode()
def warm_attention(layer: Any, page: int, device: torch.device) -> None:
    """Runs an attention layer on zeros over one page of `page` tokens."""
    heads, kv_heads, dim = layer.num_heads, layer.num_kv_heads, layer.head_size
    cache = torch.zeros(1, kv_heads, page, layer.impl.kv.token_bytes(dim), dtype=torch.uint8, device=device)
    for tokens, pages in backend_of("kv4_attention", device).distinct_batches(heads // kv_heads, page):
        query, key = (torch.zeros(tokens, h, dim, dtype=layer.dtype, device=device) for h in (heads, kv_heads))
        nowhere = torch.full((tokens,), -1, dtype=torch.int64, device=device)
        starts, lens = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, tokens], [tokens]))
        table = torch.zeros(1, pages, dtype=torch.int32, device=device)
        if layer.impl.rope is None:
            layer.impl.do_kv_cache_update(layer, key, key, cache, nowhere)
        else:
            layer.impl.store(key, key, cache, nowhere, starts, lens)
        layer.impl.attend(query, cache, starts, lens, table, torch.empty_like(query))
    if layer.impl.dense:
        for part in steps.parts([1], [1], starts[:2], lens[:1], table, layer.impl.limits(page)._replace(dense=1)):
            layer.impl.attend_part(query[:1], cache, part, torch.empty_like(query[:1]))
