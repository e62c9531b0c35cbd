"""The 4-bit KV cache on CUDA: `kv4_write` and `kv4_attention` in Triton, over the same pages as the CPU's.

vLLM's own `int4_per_token_head` is not used, since it keeps another convention: its scales are float32 with a
zero point in their four lowest bits, codes are rounded half up, there is no clip and no symmetric form, and Q, K
and V are all turned by a random Hadamard of its own in place of the checkpoint's R3. A checkpoint measured with
rotquant would be served with other numbers.

Everything a launch needs is known on the host (shapes and strides): nothing waits for the device, so both ops can
be captured in CUDA graphs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from rotquant_kernels.cuda import kv4_decode, kv4_prefill, kv4_write
from rotquant_kernels.cuda.device import Device, device_of
from rotquant_kernels.cuda.rope import Rope, constants
from rotquant_kernels.cuda.rows_steps import held
from rotquant_kernels.reference import kv_token_bytes

LOG2_E = 1.4426950408889634
WRITE_TOKENS, WRITE_WARPS = 1, 1  # of one program: a row in one warp changes threads without barriers
WARPS = 4
MOST_SPLITS = 64
RESIDENT = 3  # programs that a processor holds at once, by the registers of one that takes a part
MOST_REGISTERS = 168  # of a thread on Hopper, so that it does; Blackwell would spill
MERGED_TOGETHER = 8
DECODE_ROWS = 16  # of more, softmax along registers is worth more than codes in them
FOUR_WARPS = 64  # rows that four warps take, of heads of at most 128; in proportion fewer of larger ones
FOUR_WARPS_DIM = 256  # the largest heads of which four warps hold the sums
LEAST_SPLIT = 256  # tokens
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = not isinstance(kv4_write.write, triton.JITFunction)  # Triton's interpreter has no assembler


def check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"rotquant: {message}")


def check_pages(cache: Tensor, dim: int, symmetric: bool, rotate: int) -> Tensor:
    """The pages as uint8, after a look at everything that the kernels rely on."""
    check(dim % 16 == 0 and 16 <= dim <= 512, f"heads of {dim}: the CUDA kernels take multiples of 16 up to 512")
    check(rotate == 0 or (rotate & (rotate - 1) == 0 and dim % rotate == 0), f"rotate {rotate} does not fit heads")
    check(cache.dim() == 4 and cache.dtype in (torch.uint8, torch.int8), "cache must be bytes [blocks, heads, N, C]")
    page, token = cache.shape[2:]
    check(page % 16 == 0, f"cache: pages of {page} tokens, must be a multiple of 16")
    check(token == kv_token_bytes(dim, symmetric), f"cache: {token} bytes a token do not fit heads of {dim}")
    check(cache.stride()[2:] == (token, 1), "cache: a (block, head) plane must be contiguous")
    return cache.view(torch.uint8)


def strides(x: Tensor) -> tuple[int, int]:
    """Steps of the first two dimensions in elements; 0 where there is one entry, whose step may be any number and
    would only be a reason to compile anew."""
    first, second = (step if size > 1 else 0 for step, size in zip(x.stride()[:2], x.shape[:2], strict=True))
    return first, second


def table_of(rope: Rope | None, x: Tensor) -> Tensor | None:
    """The cosines and sines of RoPE, after a look at what the kernels rely on."""
    if rope is None:
        return None
    dims = rope.table.shape[1]
    check(dims % 2 == 0 and 0 < dims <= x.shape[2], f"rotary positions of {dims} numbers do not fit heads")
    check(rope.table.dtype == x.dtype and rope.table.is_contiguous(), "rotary table must have the dtype of q and k")
    return rope.table


def common(dim: int, page: int, rotate: int, symmetric: bool, rows: int, warps: int) -> dict[str, Any]:
    """Compile-time arguments of all kernels, whose programs turn so many rows in so many warps."""
    padded = max(triton.next_power_of_2(dim), 64)  # a product of 8-bit integers takes 32 columns, half of it
    return {
        "DIM": dim, "PADDED": padded, "PAGE": page, "BLOCK": rotate, "HELD": held(rows * padded, warps),
        "STAGES": max(rotate, 1).bit_length() - 1, "NORM": max(rotate, 1) ** -0.5, "SYMMETRIC": symmetric,
    }  # fmt: skip


def write(
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    slots: Tensor,
    rotate: int,
    symmetric: bool,
    k_clip: float,
    v_clip: float,
    key_feedback: Tensor | None = None,
    rope: Rope | None = None,
    query_start: Tensor | None = None,
    seq_lens: Tensor | None = None,
) -> None:
    """`reference.kv4_write`, the same bytes. Slots must differ from each other and lie inside the cache.

    Args:
        rope: turns K first, to its positions by query_start int32 [B + 1] and seq_lens int32 [B] of the step.

    Raises:
        RuntimeError: naming the argument whose shape, dtype or layout is not supported.
    """
    tokens, heads, dim = key.shape
    pages = check_pages(cache, dim, symmetric, rotate)
    check(heads == cache.shape[1], f"key has {heads} heads, cache {cache.shape[1]}")
    check(value.shape == key.shape and value.dtype == key.dtype, "value must have key's shape and dtype")
    check(key.dtype in FLOATS and key.stride(2) == value.stride(2) == 1, "key and value must be float rows")
    check(slots.dtype == torch.int64 and slots.shape[0] <= tokens, "slots must be int64, one for a token")
    if not slots.shape[0]:
        return
    cos_sin, sequences = table_of(rope, key), 0 if seq_lens is None else seq_lens.shape[0]
    check(rope is None or sequences > 0, "rotary positions need query_start and seq_lens")
    if key_feedback is not None:
        fits = key_feedback.shape == (heads, dim, dim) and key_feedback.is_contiguous()
        check(fits and key_feedback.dtype == torch.float32, f"key_feedback must be float32 [{heads}, {dim}, {dim}]")
    kv4_write.write[triton.cdiv(slots.shape[0], WRITE_TOKENS), heads](
        key, value, pages, slots, query_start, seq_lens, cos_sin, key_feedback, *strides(key), *strides(value),
        *strides(pages), slots.shape[0], sequences, k_clip, v_clip,
        **common(dim, cache.shape[2], rotate, symmetric, WRITE_TOKENS, WRITE_WARPS), **constants(rope),
        FEEDBACK=key_feedback is not None, TOKENS=WRITE_TOKENS, ASSEMBLER=not INTERPRETED, num_warps=WRITE_WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip


class Plan(NamedTuple):
    """How a batch is cut up: rows (token, query head) of a program, parts of a sequence's context."""

    rows: int
    splits: int


def plan(
    tokens: int,
    sequences: int,
    group: int,
    kv_heads: int,
    longest: int,
    device: Device,
    window: int = 0,
    dim: int = 128,
) -> Plan:
    """From numbers that the host knows. Parts of the context fill the device where rows alone do not.

    Args:
        tokens, sequences, longest: upper bounds, of the batch and of a sequence's length; window: 0 for none.
    """
    average = -(-tokens // sequences) * group
    most = FOUR_WARPS * 128 // max(triton.next_power_of_2(dim), 128)
    rows = min(max(triton.next_power_of_2(average), device.least_rows), most)
    rows = max(triton.next_power_of_2(group), rows)
    programs = kv_heads * max(sequences, tokens // (rows // group))
    longest = min(longest, window + rows // group) if window else longest
    wanted = min(RESIDENT * device.processors // programs, longest // LEAST_SPLIT, MOST_SPLITS)
    return Plan(rows, max(wanted, 1))


def distinct_batches(group: int, page: int) -> list[tuple[int, int]]:
    """Batches of one sequence, (new tokens, pages), that between them launch every kernel which any batch launches.

    A batch decides the rows of a program, and whether contexts are cut; nothing else of it is known to a compiler.
    """
    counts = sorted({1, *(rows // group + 1 for rows in (8, 16, 32))})
    return [(tokens, -(-longest // page)) for tokens in counts for longest in (1, 2 * LEAST_SPLIT)]


def attention(
    query: Tensor,
    cache: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    out: Tensor,
    scale: float,
    rotate: int,
    symmetric: bool,
    window: int = 0,
    cap: float = 0.0,
    rope: Rope | None = None,
) -> None:
    """`reference.kv4_attention` on integers, see `kv4_tiles`. Block numbers are not checked.

    Args:
        rope: turns the queries first, each to its position.

    Raises:
        RuntimeError: naming the argument whose shape, dtype or layout is not supported.
    """
    tokens, heads, dim = query.shape
    pages = check_pages(cache, dim, symmetric, rotate)
    kv_heads, page, sequences = cache.shape[1], cache.shape[2], seq_lens.shape[0]
    check(heads % kv_heads == 0, f"{heads} query heads do not share {kv_heads} KV heads")
    check(out.shape == query.shape and out.dtype == query.dtype, "out must have query's shape and dtype")
    check(query.dtype in FLOATS and query.stride(2) == out.stride(2) == 1, "query and out must be float rows")
    integers = (query_start, seq_lens, block_table)
    check(all(one.dtype == torch.int32 for one in integers), "query_start, seq_lens, block_table must be int32")
    check(query_start.shape[0] == sequences + 1, f"query_start must have {sequences + 1} entries")
    check(block_table.shape[0] >= sequences and block_table.stride(1) == 1, "block_table must have a row a sequence")
    check(window >= 0, f"window {window} must be positive, or 0 for none")
    check(0 <= cap < math.inf, f"cap {cap} must be positive, or 0 for none")
    if not tokens:
        return
    group, longest = heads // kv_heads, block_table.shape[1] * page
    device = device_of(query.device)
    rows, splits = plan(tokens, max(sequences, 1), group, kv_heads, longest, device, window, dim)
    few, warps = rows <= DECODE_ROWS, WARPS if rows <= FOUR_WARPS and dim <= FOUR_WARPS_DIM else 2 * WARPS
    shared = common(dim, page, rotate, symmetric, rows, warps)
    padded = shared["PADDED"]
    parts = tokens * heads * splits if splits > 1 else 0
    partial = query.new_empty(parts * padded, dtype=torch.float32)
    state = query.new_empty(2 * parts, dtype=torch.float32)
    grid = (tokens // (rows // group) + sequences + 1, kv_heads, splits)
    attend = kv4_decode.decode if few else kv4_prefill.prefill
    attend[grid](
        query, pages, query_start, seq_lens, block_table, table_of(rope, query), out, partial, state,
        *strides(query), *strides(pages), block_table.stride(0), *strides(out), tokens, sequences, splits, window,
        scale * LOG2_E, cap * LOG2_E, **shared, **constants(rope), HEADS=heads, GROUP=group, ROWS=rows,
        PARTS=splits > 1, WINDOWED=window > 0, CAPPED=cap > 0, ASSEMBLER=not INTERPRETED,
        num_warps=warps,
        num_stages=3 if few else 2, enable_fp_fusion=True,
        **({"maxnreg": MOST_REGISTERS} if few and warps == WARPS and device.sm == 90 else {}),
    )  # fmt: skip
    if splits > 1:
        kv4_decode.merge[tokens, heads](
            partial, state, out, *strides(out), tokens, splits, HEADS=heads, DIM=dim, PADDED=padded,
            MOST=MOST_SPLITS, TOGETHER=MERGED_TOGETHER, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


IMPLEMENTATIONS = {"kv4_write": write, "kv4_attention": attention}
