"""Attention over a paged KV cache on a CUDA device: ours and its peers. See `gpu_kernels.py`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rotquant_kernels import ops, reference

Call = Callable[[], object]
HEADS, KV_HEADS, DIM = 32, 8, 128
DEVICE = os.environ.get("ROTQUANT_GPU_DEVICE", "cuda")  # "cpu" where a run is rehearsed, "meta" its launches alone
PAGE, SYMMETRIC = 16, False  # vLLM's default page on CUDA; the default recipe's KV cache


@dataclass(frozen=True)
class Attention:
    """Llama-3-8B's heads (32, 8 KV heads of 128), `batch` sequences of `context` tokens, `steps` new ones each; pages
    of `page` tokens."""

    batch: int
    context: int
    steps: int
    page: int = PAGE

    def __str__(self) -> str:
        said = f"batch {self.batch} context {self.context} new {self.steps}"
        return said if self.page == PAGE else f"{said} page {self.page}"


PEERS: dict[str, Callable[[Attention], Call]] = {}


def peer(name: str) -> Callable[[Callable[[Attention], Call]], Callable[[Attention], Call]]:
    def register(build: Callable[[Attention], Call]) -> Callable[[Attention], Call]:
        PEERS[name] = build
        return build

    return register


class Batch:
    """Tensors of one attention problem; pages of a sequence lie in random order."""

    def __init__(self, p: Attention) -> None:
        pages = -(-p.context // p.page)
        self.query = torch.randn(p.batch * p.steps, HEADS, DIM, device=DEVICE, dtype=torch.bfloat16)
        self.out, self.scale = torch.empty_like(self.query), DIM**-0.5
        self.starts = torch.arange(p.batch + 1, device=DEVICE, dtype=torch.int32) * p.steps
        self.lens = torch.full((p.batch,), p.context, device=DEVICE, dtype=torch.int32)
        self.table = torch.randperm(p.batch * pages, device=DEVICE).int().view(p.batch, pages)
        self.blocks = p.batch * pages

    def pages(self, *shape: int) -> Tensor:
        return torch.randn(self.blocks, *shape, device=DEVICE, dtype=torch.bfloat16)


@peer("rotquant KV4")
def _(p: Attention) -> Call:
    b = Batch(p)
    token = reference.kv_token_bytes(DIM, SYMMETRIC)
    cache = torch.empty(b.blocks, KV_HEADS, p.page, token, device=DEVICE, dtype=torch.uint8)
    slots = torch.arange(b.blocks * p.page, device=DEVICE)
    for part in slots.split(1 << 16):
        key, value = torch.randn(2, len(part), KV_HEADS, DIM, device=DEVICE, dtype=torch.bfloat16)
        ops.kv4_write(key, value, cache, part, DIM, SYMMETRIC, 1.0, 1.0)
    return partial(ops.kv4_attention, b.query, cache, b.starts, b.lens, b.table, b.out, b.scale, DIM, SYMMETRIC)


@peer("vLLM FlashAttention bf16")
def _(p: Attention) -> Call:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    b = Batch(p)
    keys, values = (b.pages(p.page, KV_HEADS, DIM) for _ in range(2))
    return partial(
        flash_attn_varlen_func, b.query, keys, values, p.steps, b.starts, p.context, seqused_k=b.lens,
        softmax_scale=b.scale, causal=True, block_table=b.table, out=b.out,
    )  # fmt: skip


def segments() -> dict[str, Any]:
    """What vLLM's backend gives its Triton kernels for splitting the context of few sequences."""
    parts = 16
    shape = (128 // KV_HEADS, HEADS, parts)
    return {
        "seq_threshold_3D": 128 // KV_HEADS, "num_par_softmax_segments": parts,
        "softmax_segm_output": torch.empty(*shape, DIM, device=DEVICE),
        "softmax_segm_max": torch.empty(shape, device=DEVICE), "softmax_segm_expsum": torch.empty(shape, device=DEVICE),
    }  # fmt: skip


@peer("vLLM Triton bf16")
def _(p: Attention) -> Call:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    b = Batch(p)
    return partial(
        unified_attention, q=b.query, k=b.pages(p.page, KV_HEADS, DIM), v=b.pages(p.page, KV_HEADS, DIM), out=b.out,
        cu_seqlens_q=b.starts, max_seqlen_q=p.steps, seqused_k=b.lens, max_seqlen_k=p.context, softmax_scale=b.scale,
        causal=True, window_size=(-1, -1), block_table=b.table, softcap=0, q_descale=None, k_descale=None,
        v_descale=None, **segments(),
    )  # fmt: skip


@peer("vLLM int4_per_token_head")
def _(p: Attention) -> Call:
    from vllm.v1.attention.ops.int4_per_token_head import unified_attention_int4

    b = Batch(p)
    codes = torch.randint(0, 256, (2, b.blocks, p.page, KV_HEADS, DIM // 2), device=DEVICE).to(torch.uint8)
    scales = torch.rand(2, b.blocks, p.page, KV_HEADS, device=DEVICE)
    return partial(
        unified_attention_int4, b.query, codes[0], codes[1], b.out, cu_seqlens_q=b.starts, max_seqlen_q=p.steps,
        seqused_k=b.lens, max_seqlen_k=p.context, softmax_scale=b.scale, window_size=(-1, -1), block_table=b.table,
        softcap=0, sinks=None, alibi_slopes=None, use_alibi_sqrt=False, qq_bias=None, output_scale=None,
        mm_prefix_range=None, k_scale_cache=scales[0], v_scale_cache=scales[1], **segments(),
    )  # fmt: skip


@peer("torch SDPA bf16, contiguous")
def _(p: Attention) -> Call:
    shape = (p.batch, KV_HEADS, p.context, DIM)
    keys, values = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    query = torch.randn(p.batch, HEADS, p.steps, DIM, device=DEVICE, dtype=torch.bfloat16)
    mask = None
    if 1 < p.steps < p.context:
        mask = torch.ones(p.steps, p.context, device=DEVICE, dtype=torch.bool).tril(p.context - p.steps)
    causal = p.steps == p.context
    product = torch.nn.functional.scaled_dot_product_attention
    return partial(product, query, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=True)


@peer("rotquant KV4, gathered for FlashAttention")
def _(p: Attention) -> Call:
    from rotquant_kernels.cuda import kv4_dense, workspace
    from vllm_rotquant.compat.flash import dense_attention

    if p.steps < 64:
        raise ValueError("a few tokens are not worth it")
    found = dense_attention()
    assert found, "vLLM has no attention here"
    b, call = Batch(p), PEERS["rotquant KV4"](p)
    cache = call.args[1]  # type: ignore[attr-defined]
    room = workspace.workspace([p.context] * p.batch, b.query.device)
    return partial(
        kv4_dense.attention, b.query, cache, b.starts, b.lens, b.table, b.out, b.scale, DIM, SYMMETRIC, room, p.steps,
        found[1],
    )  # fmt: skip


def validate(p: Attention) -> str:
    """How the decode and prefill kernels cut the problem up on an H200."""
    from rotquant_kernels.cuda import kv4

    assert p.steps <= p.context
    longest, h200 = -(-p.context // p.page) * p.page, kv4.Device(processors=132, least_rows=8)
    return str(kv4.plan(p.batch * p.steps, p.batch, HEADS // KV_HEADS, KV_HEADS, longest, h200))
