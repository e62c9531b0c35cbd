"""Attention over a KV cache, and writing to it: our 4-bit cache, vLLM's bf16 and fp8 caches, torch's SDPA.

Keys and values are Gaussian, so attention is nearly uniform and outputs nearly cancel: relative errors look larger
here than in a model. They compare kernels and formats with each other and say nothing about accuracy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels_lanes import Call, Peer, SkippedError, evenly, relative
from rotquant_kernels import ops, reference

PEERS: dict[str, Peer] = {}
PAGE = 128  # tokens in a block, vLLM's default on CPUs
LARGE = 2 << 20  # bytes of a large page of memory
SYMMETRIC = False  # as in the default recipe
CHECKED = 4  # queries of the first sequence that are compared


class Problem:
    """A batch of sequences of one length.

    Args:
        work: "decode" (one new token each), "prefill" (all tokens new) or "write" (`context` tokens go to the cache).
    """

    def __init__(self, work: str, heads: int, kv_heads: int, dim: int, context: int, batch: int) -> None:
        self.work, self.heads, self.kv_heads, self.dim = work, heads, kv_heads, dim
        self.context, self.batch = context, batch
        generator = torch.Generator().manual_seed(context)
        shape = (2, batch * context, kv_heads, dim)
        self.key, self.value = torch.randn(shape, generator=generator, dtype=torch.bfloat16)
        self.queries = context if work == "prefill" else 1
        self.query_start = torch.arange(batch + 1, dtype=torch.int32) * self.queries
        self.lengths = torch.full((batch,), context, dtype=torch.int32)
        pages = -(-context // PAGE)
        self.table = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages)
        self.slots = (torch.arange(batch)[:, None] * pages * PAGE + torch.arange(context)).flatten()

    def input(self, rows: int) -> Tensor:
        """Queries, bf16 [batch * queries, heads, dim]; rows is not used, the problem knows them."""
        generator = torch.Generator().manual_seed(rows)
        return torch.randn(self.batch * self.queries, self.heads, self.dim, generator=generator).bfloat16()

    def pages(self, channels: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.table.numel(), self.kv_heads, PAGE, channels, dtype=dtype)


def exact(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """float64 attention of one query [heads, d] over keys and values [L, kv_heads, d]."""
    grouped = q.double().view(keys.shape[1], -1, q.shape[-1])
    scores = torch.einsum("hgd,lhd->hgl", grouped, keys.double()) * q.shape[-1] ** -0.5
    return torch.einsum("hgl,lhd->hgd", scores.softmax(-1), values.double()).flatten(0, 1)


def as_given(problem: Problem) -> tuple[Tensor, Tensor]:
    """K and V of the first sequence."""
    return problem.key[: problem.context], problem.value[: problem.context]


def check(
    stored: Callable[[Problem], tuple[Tensor, Tensor]], rotated: bool, problem: Problem, q: Tensor, y: Any
) -> dict:
    """error: against float64 over the numbers in the cache. cache_error: those numbers against the original ones."""
    if problem.work == "write":
        return {}
    keys, values = stored(problem)
    rows = evenly(problem.queries, CHECKED).tolist()
    seen = [problem.context - problem.queries + row + 1 for row in rows]
    turned = reference.hadamard(q.double(), problem.dim) if rotated else q
    cached = torch.stack([exact(turned[row], keys[:n], values[:n]) for row, n in zip(rows, seen, strict=True)])
    original = torch.stack(
        [exact(q[row], problem.key[:n], problem.value[:n]) for row, n in zip(rows, seen, strict=True)]
    )
    return {"error": relative(y[rows], cached), "cache_error": relative(cached, original)}


def cache_bytes(per_value: float, problem: Problem) -> float:
    """Bytes of K and V that a decode step reads; prefill and writing are timed on one copy, 0."""
    tokens = problem.batch * problem.context * problem.kv_heads
    return 2 * per_value * problem.dim * tokens if problem.work == "decode" else 0


# ---- ours ---------------------------------------------------------------------------------------------


def kv4_write(problem: Problem, pages: Tensor, *ignored: Tensor) -> None:
    ops.kv4_write(problem.key, problem.value, pages, problem.slots, problem.dim, SYMMETRIC, 1.0, 1.0)


def kv4_attention(problem: Problem, pages: Tensor, query: Tensor) -> Tensor:
    out = torch.empty_like(query)
    starts, lengths, scale = problem.query_start, problem.lengths, problem.dim**-0.5
    ops.kv4_attention(query, pages, starts, lengths, problem.table, out, scale, problem.dim, SYMMETRIC)
    return out


def kv4_pages(problem: Problem) -> Tensor:
    pages = problem.pages(reference.kv_token_bytes(problem.dim, SYMMETRIC), torch.uint8)
    kv4_write(problem, pages)
    return pages


def kv4_stored(problem: Problem) -> tuple[Tensor, Tensor]:
    """K (rotated) and V of the first sequence as the pages hold them, [L, kv_heads, d]."""
    first = copy.copy(problem)
    first.key, first.value = as_given(problem)
    first.slots, first.table = problem.slots[: problem.context], problem.table[:1]
    keys, values = reference.kv4_read(kv4_pages(first), first.table[0].long(), problem.dim, SYMMETRIC)
    return keys.movedim(0, 1), values.movedim(0, 1)


def in_large_pages(pages: Tensor) -> Tensor:
    """A copy of a cache in memory pages of 2 MiB, where our server moves it, as far as the system has any."""
    room = torch.zeros(pages.numel() // LARGE * LARGE + 2 * LARGE, dtype=torch.uint8)
    mine = room[-room.data_ptr() % LARGE :][: pages.numel()].view(pages.shape).copy_(pages)
    torch.ops.rotquant.large_pages_(room)
    return mine


def ours(problem: Problem) -> Iterator[Call]:
    pages = kv4_pages(problem)
    while True:
        mine = in_large_pages(pages)
        if problem.work == "write":
            yield partial(kv4_write, problem, mine)
        else:
            yield partial(kv4_attention, problem, mine)


def kv4_bytes(problem: Problem) -> float:
    return cache_bytes(reference.kv_token_bytes(problem.dim, SYMMETRIC) / problem.dim / 2, problem)


PEERS["rotquant-kv4"] = Peer("rotquant-kv4", "KV4", "rotquant", ours, kv4_bytes, partial(check, kv4_stored, True))


# ---- vLLM, called as its CPU_ATTN backend does --------------------------------------------------------


def vllm(dtype: str, storage: torch.dtype, problem: Problem) -> Iterator[Call]:
    """The plan (scheduler metadata) is made once a step for all layers, so it is not timed."""
    from vllm import _custom_ops as vllm_ops
    from vllm import envs
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(torch.bfloat16, PAGE, problem.dim, dtype)
    plan = vllm_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=problem.batch,
        num_heads=problem.heads,
        num_kv_heads=problem.kv_heads,
        head_dim=problem.dim,
        seq_lens=problem.lengths,
        dtype=torch.bfloat16,
        query_start_loc=problem.query_start,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        kv_cache_dtype=dtype,
    )

    def halves(pages: Tensor) -> tuple[Tensor, ...]:
        return pages.view(pages.shape[0], pages.shape[1], 2 * PAGE, -1).chunk(2, dim=2)

    def write(pages: Tensor, *ignored: Tensor) -> None:
        keys, values = halves(pages)
        arguments = (problem.key, problem.value, keys, values, problem.slots, isa)
        vllm_ops.cpu_attn_reshape_and_cache(*arguments, kv_cache_dtype=dtype)

    def attend(pages: Tensor, query: Tensor) -> Tensor:
        keys, values = halves(pages)
        output = torch.empty_like(query)
        vllm_ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=keys,
            value_cache=values,
            output=output,
            query_start_loc=problem.query_start,
            seq_lens=problem.lengths,
            scale=problem.dim**-0.5,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=problem.table,
            softcap=0,
            scheduler_metadata=plan,
            s_aux=None,
            kv_cache_dtype=dtype,
        )
        return output

    pages = problem.pages(2 * problem.dim, storage)
    write(pages)
    while True:
        yield partial(write if problem.work == "write" else attend, pages.clone())


def as_fp8(problem: Problem) -> tuple[Tensor, Tensor]:
    """Rounded to nearest. vLLM's build for AVX512 without BF16 truncates, which its error shows."""
    keys, values = (one.to(torch.float8_e4m3fn).float() for one in as_given(problem))
    return keys, values


for _name, _format, _dtype, _storage, _width, _stored in (
    ("vllm-bf16", "bf16", "auto", torch.bfloat16, 2, as_given),
    ("vllm-fp8", "KV fp8", "fp8", torch.uint8, 1, as_fp8),
):
    _check, _build = partial(check, _stored, False), partial(vllm, _dtype, _storage)
    PEERS[_name] = Peer(_name, _format, "vllm", _build, partial(cache_bytes, _width), _check)


# ---- torch --------------------------------------------------------------------------------------------


def sdpa(problem: Problem) -> Iterator[Call]:
    """Over contiguous K and V, which no server with a paged cache has: an advantage.

    While decoding, the query heads that share a KV head are the rows of one product: several times faster here than
    `enable_gqa`.
    """
    if problem.work == "write":
        raise SkippedError("has no cache")
    product = torch.nn.functional.scaled_dot_product_attention

    def split(x: Tensor, length: int) -> Tensor:  # [B * length, heads, d] -> [B, heads, length, d]
        return x.unflatten(0, (problem.batch, length)).transpose(1, 2)

    def decode(keys: Tensor, values: Tensor, query: Tensor) -> Tensor:
        return product(query.unflatten(1, (problem.kv_heads, -1)), keys, values).flatten(1, 2)

    def prefill(keys: Tensor, values: Tensor, query: Tensor) -> Tensor:
        out = product(split(query, problem.queries), keys, values, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    while True:
        keys, values = (split(x, problem.context).contiguous().clone() for x in (problem.key, problem.value))
        yield partial(decode if problem.work == "decode" else prefill, keys, values)


PEERS["torch-sdpa"] = Peer(
    "torch-sdpa", "bf16", "torch", sdpa, partial(cache_bytes, 2), partial(check, as_given, False)
)
