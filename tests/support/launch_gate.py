#!/usr/bin/env python3
"""Compiles every Triton kernel as servers launch it, for GPUs that are not there: does it compile, does it fit?

    python tests/support/launch_gate.py                       the core list, all architectures, the installed Triton
    python tests/support/launch_gate.py --full --arch 89,90   every op, model, tensor-parallel size and kind of batch
    PYTHONPATH=DIR python tests/support/launch_gate.py        another Triton: pip install --target DIR

Each launch goes through the host code that serves (`stand_in_gpu`). A failure is one line; the last line counts. A
kernel must fit the shared memory of the architecture and spill at most SPILLED bytes of registers a thread.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2] / part) for part in ("kernels", "tests/support")]
    os.environ.setdefault("ROTQUANT_CPU_TIER", "reference")

import torch
import triton

from rotquant_kernels.cuda import experts, gemm, kv4, kv4_dense, layout, rows, unpack, workspace
from rotquant_kernels.cuda.rope import Rope
from rotquant_kernels.reference import kv_token_bytes
from stand_in_gpu import GPUS, Compiled, stand_in

Launch = tuple[str, Callable[[], Any]]  # in words, the call
# Bytes of registers of a thread that may lie in memory. Prefill keeps a block of sums besides its tile; 8-bit weights
# in large groups keep two. Decode leaves room for three programs a multiprocessor: 160 on sm_100 under Triton 3.8.
SPILLED = {"prefill": 640, "linear_kernel": 288, "decode": 160}
SPILLED_ELSE = 128
BATCHES = (1, 2, 16, 33)  # numbers that Triton tells apart: 1, multiples of 16, others


class Model(NamedTuple):
    """The shape of a model."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    bias: bool = False


MODELS = {
    "demo": Model(256, 768, 4, 2, 64, 2048),
    "SmolLM2-135M": Model(576, 1536, 9, 3, 64, 49152),
    "Qwen2.5-0.5B": Model(896, 4864, 14, 2, 64, 151936, True),
    "Qwen2.5-7B": Model(3584, 18944, 28, 4, 128, 152064, True),
    "Qwen2.5-14B": Model(5120, 13824, 40, 8, 128, 152064, True),
    "Qwen2.5-32B": Model(5120, 27648, 40, 8, 128, 152064, True),
    "Qwen3-8B": Model(4096, 12288, 32, 8, 128, 151936),
    "Qwen3-14B": Model(5120, 17408, 40, 8, 128, 151936),
    "Qwen3-32B": Model(5120, 25600, 64, 8, 128, 151936),
    "Llama-3-8B": Model(4096, 14336, 32, 8, 128, 128256),
    "Llama-3-70B": Model(8192, 28672, 64, 8, 128, 128256),
}
RANKS = (1, 2, 4, 8)


def linear(
    m: int, k: int, n: int, bits: int = 4, groups: int = 1, rank: int = 0, symmetric: bool = False, bias: bool = False,
    dtype: torch.dtype = torch.bfloat16, act_bits: int = 4,
) -> None:  # fmt: skip
    """A layer [n, k] of m tokens, behind its quantization."""
    codes = torch.empty(m, k, dtype=torch.int8)
    quantized = codes, torch.empty(m, 1), torch.empty(m, 1, dtype=torch.int32)
    rows_padded, columns = layout.multiple(n, layout.CHANNELS), layout.multiple(k, layout.COLUMNS)
    words = torch.empty(columns * bits // 32 * rows_padded + groups * rows_padded, dtype=torch.int32)
    branch = (torch.empty(m, rank), torch.empty(rank, n, dtype=dtype)) if rank else (None, None)
    gemm.product(
        quantized, words, torch.empty(n, groups), torch.empty(n, dtype=dtype) if bias else None, bits, symmetric,
        dtype, *branch,
    )  # fmt: skip


def unpacked(n: int, k: int, bits: int = 4) -> None:
    """The weight of a layer [n, k] for a GEMM of the server's."""
    shape = layout.multiple(k, layout.COLUMNS) * bits // 128, layout.multiple(n, layout.CHANNELS), layout.CHUNK
    unpack.unpacked(torch.empty(shape, dtype=torch.int8), bits, k, n)


def mixture(
    tokens: int, count: int = 8, k: int = 2048, n: int = 1536, top: int = 2, bits: int = 4, groups: int = 1,
    symmetric: bool = False, dtype: torch.dtype = torch.bfloat16,
) -> None:  # fmt: skip
    """A product of all experts, and their sum."""
    pairs = experts.sorted_pairs(torch.zeros(tokens, top, dtype=torch.int64), None, count)
    quantized = torch.empty(tokens, k, dtype=torch.int8), torch.empty(tokens, 1), torch.empty(tokens, 1).int()
    rows_padded, columns = layout.multiple(n, layout.CHANNELS), layout.multiple(k, layout.COLUMNS)
    words = torch.empty(count, columns * bits // 32 * rows_padded + groups * rows_padded, dtype=torch.int32)
    scale, weights = torch.empty(count, n, groups), torch.empty(tokens, top)
    y = experts.product(quantized, pairs.token, pairs, words, scale, bits, symmetric, dtype)
    experts.added(y, pairs.place, weights, torch.empty(tokens, n, dtype=dtype))


def quantize(
    m: int, k: int, block: int = 0, silu: bool = False, bits: int = 4, symmetric: bool = False,
    dtype: torch.dtype = torch.bfloat16, order: str = "natural", shift: bool = False,
) -> None:  # fmt: skip
    """Rows of k numbers, a Hadamard of `block` or a shift in front."""
    x = torch.empty(m, 2 * k if silu else k, dtype=dtype)
    turn = ("shift", 0, torch.empty(k)) if shift else ("hadamard" if block else "none", block, None)
    rows.quantize_rows(x, *turn, bits, symmetric, 0.9, silu, order)


def turn(m: int, k: int, kind: str, block: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """A stage of online transforms that runs before a layer."""
    matrix = torch.empty(block, block) if kind == "dense" else None
    rows.online_stage(torch.empty(m, k, dtype=dtype), kind, block, matrix)


def turn_silu(m: int, k: int, block: int) -> None:
    """A Hadamard alone, in front of a low-rank branch."""
    rows.turned(torch.empty(m, 2 * k, dtype=torch.bfloat16), "hadamard", block, None, True)


def norm(
    m: int, k: int, residual: bool = True, symmetric: bool = False, dtype: torch.dtype = torch.bfloat16,
    shift: bool = False,
) -> None:  # fmt: skip
    x, by = torch.empty(m, k, dtype=dtype), torch.empty(k) if shift else None
    rows.rms_norm_quantize(x, x if residual else None, torch.empty(k, dtype=dtype), 1e-5, 4, symmetric, 0.9, by)


def rope_of(dim: int, rope: bool, dtype: torch.dtype = torch.bfloat16) -> Rope | None:
    """RoPE as models have it, if any; the heads of a Qwen3-Next or GPT-J would turn in part, or by pairs."""
    return Rope(torch.empty(8, dim, dtype=dtype), False) if rope else None


def write(
    tokens: int, heads: int, dim: int, rotate: int, page: int = 16, symmetric: bool = False, rope: bool = False,
    fed_back: bool = False,
) -> None:  # fmt: skip
    qkv = torch.empty(tokens, 3 * heads * dim, dtype=torch.bfloat16)  # K and V are views, as in a model
    key, value = qkv.view(tokens, 3 * heads, dim).split(heads, 1)[1:]
    pages = torch.empty(4, heads, page, kv_token_bytes(dim, symmetric), dtype=torch.uint8)
    step = torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    slots = torch.zeros(tokens, dtype=torch.int64)
    feedback = torch.empty(heads, dim, dim) if fed_back else None
    kv4.write(key, value, pages, slots, rotate, symmetric, 1.0, 1.0, feedback, rope_of(dim, rope), *step)


def attend(
    tokens: int, sequences: int, heads: int = 32, kv_heads: int = 8, dim: int = 128, rotate: int = 128,
    page: int = 16, symmetric: bool = False, longest: int = 16384, dtype: torch.dtype = torch.bfloat16,
    window: int = 0, cap: float = 0.0, rope: bool = False,
) -> None:  # fmt: skip
    """A step of so many new tokens, over pages of sequences of at most `longest`."""
    query = torch.empty(tokens, heads, dim, dtype=dtype)
    pages = torch.empty(4, kv_heads, page, kv_token_bytes(dim, symmetric), dtype=torch.uint8)
    starts, lens = (torch.zeros(count, dtype=torch.int32) for count in (sequences + 1, sequences))
    table = torch.zeros(sequences, -(-longest // page), dtype=torch.int32)
    settings = 0.1, rotate, symmetric, window, cap, rope_of(dim, rope, dtype)
    kv4.attention(query, pages, starts, lens, table, torch.empty_like(query), *settings)


def attend_dense(
    tokens: int, sequences: int, heads: int = 32, kv_heads: int = 8, dim: int = 128, rotate: int = 128,
    page: int = 16, symmetric: bool = False, dtype: torch.dtype = torch.bfloat16, rope: bool = False,
) -> None:  # fmt: skip
    """A long prefill by way of a workspace; what computes it is not ours."""
    query = torch.empty(tokens, heads, dim, dtype=dtype)
    pages = torch.empty(4, kv_heads, page, kv_token_bytes(dim, symmetric), dtype=torch.uint8)
    starts, lens = (torch.zeros(count, dtype=torch.int32) for count in (sequences + 1, sequences))
    table = torch.zeros(sequences, -(-tokens // page), dtype=torch.int32)
    room = workspace.workspace([tokens] * sequences, torch.device("cpu"))
    kv4_dense.attention(
        query, pages, starts, lens, table, torch.empty_like(query), 0.1, rotate, symmetric, room, tokens,
        lambda *given: None, rope_of(dim, rope, dtype),
    )  # fmt: skip


def core() -> Iterator[Launch]:
    """One of each kernel in the form that is hardest to compile: a few seconds an architecture."""
    yield "decode, 1 sequence", lambda: attend(1, 1, rope=True)
    yield "KV write, 1 token", lambda: write(1, 8, 128, 128, rope=True)
    yield "KV write with feedback, 1 token", lambda: write(1, 8, 128, 128, rope=True, fed_back=True)
    yield "silu, Hadamard 512, 18944 inputs", lambda: quantize(2, 18944, 512, silu=True)
    yield "silu, Hadamard 2048, 14336 inputs", lambda: quantize(1, 14336, 2048, silu=True)
    yield "Hadamard 512 before a layer", lambda: turn(1, 18944, "hadamard", 512)
    yield "dense 128 before a layer", lambda: turn(1, 4096, "dense", 128)
    yield "norm, 4096 inputs", lambda: norm(1, 4096)
    yield "norm and shift, 4096 inputs", lambda: norm(1, 4096, shift=True)
    yield "shift, 4096 inputs", lambda: quantize(1, 4096, shift=True)
    yield "linear, 1 token", lambda: linear(1, 4096, 512)  # its columns among programs, whose parts are added up
    yield "linear, 4097 tokens", lambda: linear(4097, 4096, 512)
    yield "linear, groups of 32", lambda: linear(20, 96, 512, groups=3)
    yield "a weight unpacked", lambda: unpacked(512, 4096)
    yield "experts, 64 rows each", lambda: mixture(256)
    yield "prefill, 1 sequence", lambda: attend(700, 1, rope=True)
    yield "prefill by a workspace", lambda: attend_dense(700, 1, rope=True)


def of_model(name: str, model: Model, ranks: int) -> Iterator[Launch]:
    """What one rank of a server of this model launches."""
    heads, kv_heads = model.heads // ranks, max(model.kv_heads // ranks, 1)
    inner, q, kv = model.intermediate // ranks, heads * model.head_dim, kv_heads * model.head_dim
    where = f"{name}, TP {ranks}:"
    layers = {
        "qkv": (model.hidden, q + 2 * kv, model.bias), "o": (q, model.hidden, False),
        "gate_up": (model.hidden, 2 * inner, False), "down": (inner, model.hidden, False),
        "lm_head": (model.hidden, -(-model.vocabulary // ranks), False),
    }  # fmt: skip
    for m in (*BATCHES, 65, 256, 4097):
        for layer, (k, n, bias) in layers.items():
            bits = 8 if layer == "lm_head" else 4
            yield f"{where} {layer}, {m} tokens", lambda m=m, k=k, n=n, b=bias, w=bits: linear(m, k, n, w, bias=b)
    for symmetric in (False, True):
        for residual in (False, True):
            for by in (False, True):
                yield f"{where} norm", lambda s=symmetric, r=residual, b=by: norm(3, model.hidden, r, s, shift=b)
        for by in (False, True):
            yield f"{where} rows of o", lambda s=symmetric, b=by: quantize(3, q, symmetric=s, shift=b)
        for most in (ranks_ for ranks_ in RANKS if ranks_ >= ranks):  # --tp-max it was quantized with
            block = (found := model.intermediate // most) & -found
            yield f"{where} down, R4 {block}", lambda b=block, s=symmetric: quantize(3, inner, b, True, symmetric=s)
    shape = {"heads": heads, "kv_heads": kv_heads, "dim": model.head_dim, "rotate": model.head_dim, "rope": True}
    for m in BATCHES:
        for by in (False, True):
            head = kv_heads, model.head_dim, model.head_dim
            yield f"{where} KV write, {m} tokens", lambda m=m, h=head, b=by: write(m, *h, rope=True, fed_back=b)
        for longest in (16, 16384):
            yield f"{where} decode, {m} x {longest}", lambda m=m, n=longest: attend(m, m, **shape, longest=n)
    for tokens, sequences in ((6, 2), (8, 1), (700, 1), (4096, 16)):
        yield f"{where} {tokens} tokens of {sequences}", lambda t=tokens, s=sequences: attend(t, s, **shape)
    yield f"{where} prefill by a workspace", lambda: attend_dense(300, 2, **shape)


def odd() -> Iterator[Launch]:
    """Shapes and settings of no particular model."""
    for m in (1, 20, 64, 200):
        yield f"odd linear, {m}", lambda m=m: linear(m, 100, 70, symmetric=True)
        yield f"unpacked, {m}", lambda m=m: unpacked(16 * m, 112, 8)
        yield f"one column, {m}", lambda m=m: linear(m, 1, 1)
        for size in (32, 64, 96, 128, 160, 256, 1024):
            for bits in (4, 8):
                yield f"W{bits} g{size}, {m}", lambda m=m, g=size, w=bits: linear(m, 3 * g, 512, w, groups=3)
        for rank in (1, 20, 64, 96):
            yield f"rank {rank}, {m}", lambda m=m, r=rank: linear(m, 4096, 512, rank=r, bias=True)
        for dtype in (torch.float16, torch.float32):
            yield f"linear {dtype}, {m}", lambda m=m, d=dtype: linear(m, 4096, 512, dtype=d)
    for tokens in (1, 20, 33, 80, 300):
        for size in (0, 32, 64, 128, 256):
            for bits in (4, 8):
                shape = {"k": 3 * size or 768, "groups": 3 if size else 1, "bits": bits}
                yield f"experts W{bits} g{size}, {tokens}", lambda t=tokens, s=shape: mixture(t, **s)
    for k in (1, 7, 100, 4096, 16384, 18944, 32768, 53248, 65536):
        block = k & -k
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield f"rows of {k}, {dtype}", lambda k=k, b=block, d=dtype: quantize(3, k, b, bits=8, dtype=d)
        yield f"rows of {k} turned", lambda k=k, b=block: turn(3, k, "hadamard", b)
        yield f"silu, rows of {k} turned", lambda k=k, b=block: turn_silu(1, k, b)
        yield f"silu, rows of {k}, no Hadamard", lambda k=k: quantize(1, k, silu=True)
        yield f"rows of {k}, shift", lambda k=k: quantize(1, k, shift=True)
        if k <= rows.LONGEST_NORM:
            yield f"norm of {k}", lambda k=k: norm(1, k)
            yield f"norm of {k}, shift", lambda k=k: norm(1, k, shift=True)
    for block in (1, 24, 64, 128, 4096):
        for dtype in (torch.bfloat16, torch.float32):
            for m in BATCHES:
                yield f"dense {block}, {dtype}, {m}", lambda m=m, b=block, d=dtype: turn(m, 3 * b, "dense", b, d)
    for order in ("humming8", "humming4"):
        for k in (4096, 18944):
            yield f"{order}, {k}", lambda o=order, k=k: quantize(3, k, k & -k, True, symmetric=True, order=o)
    for shape in (
        (2, 2, 14, 2, 64, 64), (1, 1, 28, 4, 128, 128), (40, 1, 28, 4, 128, 128), (3, 1, 8, 1, 256, 256),
        (300, 1, 8, 1, 256, 256), (5, 5, 12, 12, 96, 32, 32), (300, 2, 14, 2, 80, 16, 16), (8, 8, 71, 1, 64, 64),
        (9, 3, 32, 32, 128, 0), (1, 1, 16, 1, 16, 16, 64), (64, 4, 8, 8, 128, 128, 128), (300, 1, 32, 4, 512, 256),
    ):  # fmt: skip
        for symmetric in (False, True):
            yield f"attention {shape}", lambda a=shape, s=symmetric: attend(*a, symmetric=s)
            yield f"workspace {shape}", lambda a=shape, s=symmetric: attend_dense(*a, symmetric=s)
    for tokens in (1, 700):
        yield f"attention of {tokens}, soft cap", lambda t=tokens: attend(t, 1, cap=50.0)
    for tokens, window in ((1, 128), (1, 4096), (700, 128), (700, 4096)):
        yield f"attention of {tokens}, window {window}", lambda t=tokens, w=window: attend(t, 1, window=w)
    for dim in (16, 64, 80, 96, 256):
        for by in (False, True):
            yield f"KV write, heads of {dim}", lambda d=dim, b=by: write(1, 1, d, d & -d, 48, True, fed_back=b)


def full() -> Iterator[Launch]:
    yield from core()
    for name, model in MODELS.items():
        for ranks in RANKS:
            if model.heads % ranks == 0 and model.intermediate % ranks == 0:
                yield from of_model(name, model, ranks)
    yield from odd()


def faults(arch: int, made: Compiled) -> Iterator[str]:
    """What is wrong with a kernel on an architecture."""
    most = GPUS[arch][0] * 1024
    if made.shared > most:
        yield f"{made.name} wants {made.shared} bytes of shared memory, sm_{arch} allows {most}"
    allowed = SPILLED.get(made.name, SPILLED_ELSE)
    if (spilled := made.spilled()) > allowed:
        yield f"{made.name} spills {spilled} bytes of registers a thread, {allowed} are allowed"


def check(arch: int, launches: Iterator[Launch], tell: Callable[[str], object] = print) -> tuple[int, int, int]:
    """Compiles the launches for an architecture; a line for each that fails.

    Returns: numbers of launches, of distinct kernels and of failures.
    """
    total, failed = 0, 0
    with stand_in(arch) as found:
        for what, launch in launches:
            total, known, wrong = total + 1, len(found), []
            try:
                launch()
            except Exception as error:  # of the compiler: the others are compiled all the same
                wrong.append(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:200]}")
            wrong += [fault for made in found[known:] for fault in faults(arch, made)]
            failed += bool(wrong)
            for fault in wrong:
                tell(f"sm_{arch} {what}: {fault}")
    return total, len(found), failed


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--arch", default=",".join(map(str, GPUS)), help="sm numbers (default: all)")
    ask.add_argument("--full", action="store_true", help="every shape: 5 to 10 minutes an architecture")
    args = ask.parse_args()
    total = failed = 0
    for arch in map(int, args.arch.split(",")):
        started = sum(os.times()[:4])
        counts = check(arch, full() if args.full else core(), lambda line: print(line, flush=True))
        total, failed = total + counts[0], failed + counts[2]
        print(f"sm_{arch}: {counts[0]} launches, {counts[1]} kernels, {counts[2]} failed, "
              f"{sum(os.times()[:4]) - started:.0f} s of CPU", flush=True)  # fmt: skip
    print(f"triton {triton.__version__}: {total} launches, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
