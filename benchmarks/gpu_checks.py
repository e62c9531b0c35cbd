"""Every op of rotquant on a device against its specification on the CPU.

Integers and pages must be equal; float results may differ in the last bits of float32; attention over the 4-bit
cache may add a fifth of the error that 4 bits made. The specification runs on the CPU, since torch on CUDA divides by
a constant by multiplying with its inverse, which moves some codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernels_report import table
from rotquant_kernels import OPS, convention, ops, reference, stages
from rotquant_kernels.backends import REFERENCE, backend_of

Case = tuple[str, tuple[Any, ...]]  # in words, arguments on the CPU
KINDS = [(4, True, 1.0), (4, False, 0.9), (8, True, 1.0), (8, False, 0.8)]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows of different sizes, a few outliers, one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x * 10.0 ** torch.randint(-2, 3, (*shape[:-1], 1), generator=generator)
    x[..., 3] *= 40
    x.view(-1, shape[-1])[0] = 0
    return x.to(dtype)


def rows(quick: bool) -> Iterator[tuple[str, Tensor, tuple[str, int, Tensor | None]]]:
    full = [(1, 4096, 4096), (33, 14336, 2048), (257, 4096, 0), (5, 4864, 256), (64, 96, 0)]
    for m, k, block in [(3, 96, 32)] if quick else full:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield f"{m} x {k} {dtype}", randn(m, k, seed=m, dtype=dtype), ("hadamard" if block else "none", block, None)


def online_stage(quick: bool) -> Iterator[Case]:
    for words, x, (transform, block, _) in rows(quick):
        if block:
            yield f"{words} {transform} {block}", (x, transform, block, None)
    x, random = randn(7, 96 if quick else 3584, seed=7), torch.Generator().manual_seed(7)
    for name, kind in stages.KINDS.items():
        yield name, (x, name, 32, kind.sample(32, x.shape[1], random))


def quantize_rows(quick: bool) -> Iterator[Case]:
    for words, x, settings in rows(quick):
        for kind in KINDS:
            yield f"{words} {settings[:2]} {kind}", (x, *settings, *kind)
        yield f"{words} {settings[:2]} silu", (torch.cat((x, x.flip(0)), -1), *settings, 4, True, 0.9, True)


def rms_norm_quantize(quick: bool) -> Iterator[Case]:
    for words, x, _ in rows(quick):
        gain = (1 + torch.randn(x.shape[1]) / 4).to(x.dtype)
        yield words, (x, x.flip(0).contiguous(), gain, 1e-5, 4, False, 0.9)


def linears(quick: bool) -> Iterator[tuple[str, Tensor, Tensor, Tensor, int]]:
    """In words, x, codes of the weight, its scales, its bits."""
    full = [(1, 4096, 4096, 1), (16, 4096, 6144, 1), (300, 1024, 3072, 1), (33, 2048, 520, 16), (65, 4096, 512, 1)]
    for m, k, n, groups in [(3, 64, 40, 1)] if quick else full:
        for bits in (4, 8):
            scale = convention.qparams(torch.randn(n, groups, k // groups), bits, True)[0].squeeze(-1)
            codes = torch.randint(*convention.int_range(bits), (n, k)).to(torch.int8)
            yield f"{m} x {k} x {n} W{bits} {groups} groups", randn(m, k, seed=m), codes, scale, bits


def int_linear(quick: bool) -> Iterator[Case]:
    for words, x, codes, scale, bits in linears(quick):
        for act_bits, symmetric, clip in KINDS:
            bias = torch.randn(codes.shape[0]).bfloat16()
            acts = (act_bits, symmetric, clip)
            packed = convention.pack_int32(codes, bits)
            yield f"{words} {acts}", (x, packed, scale, bias, bits, "hadamard", 32, None, *acts)
        low = torch.randn(codes.shape[1], 16).bfloat16() / 64, torch.randn(16, codes.shape[0]).bfloat16()
        yield f"{words} low rank", (x, packed, scale, None, bits, "hadamard", 32, None, 4, False, 0.9, *low)
        both = torch.cat((x, x.flip(0)), -1)
        yield f"{words} silu", (both, packed, scale, None, bits, "hadamard", 32, None, 4, False, 0.9, None, None, True)


def quantized_linear(quick: bool) -> Iterator[Case]:
    for words, x, codes, scale, bits in linears(quick):
        q = reference.quantize_rows(x, "none", 0, None, 4, False, 0.9)
        yield words, (*q, convention.pack_int32(codes, bits), scale, None, bits, False, torch.bfloat16)


def moe_experts(quick: bool) -> Iterator[Case]:
    """Some experts without tokens, and some of another rank; stacks as in a checkpoint."""
    full = [(1, 2048, 64, 768, 8, 1), (33, 2048, 64, 768, 8, 1), (700, 1024, 16, 512, 4, 1), (50, 512, 8, 256, 2, 4)]
    for tokens, hidden, experts, width, top, groups in [(9, 64, 5, 32, 2, 1)] if quick else full:
        for bits in (4, 8):
            stacks: list[Tensor] = []
            for n, k in ((2 * width, hidden), (hidden, width)):
                codes = torch.randint(*convention.int_range(bits), (experts * n, k)).to(torch.int8)
                scale = torch.rand(experts, n, groups) / k**0.5
                stacks += [convention.pack_int32(codes, bits).view(experts, n, -1), scale]
            chosen = (torch.randn(tokens, experts) + torch.arange(experts)).topk(top).indices
            table = torch.arange(experts, dtype=torch.int32).sub(1)
            for acts in KINDS:
                given = randn(tokens, hidden, seed=tokens), chosen, torch.rand(tokens, top)
                words = f"{tokens} of {hidden}, {experts} x {width}, W{bits} {acts}"
                yield words, (*given, None, *stacks, bits, width & -width, *acts, 1.0)
            yield f"{words}, some elsewhere", (*given, table, *stacks, bits, width & -width, *acts, 1.0)


def sequences(quick: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """In words; heads, KV heads, head size, page, R3, symmetric, lengths (two) and steps (two)."""
    yield "GQA 2 of 64", (4, 2, 64, 16, 64, False, 37, 21, 1, 21)
    if quick:
        return
    for symmetric in (True, False):
        yield "decode", (32, 8, 128, 16, 128, symmetric, 4097, 130, 1, 1)
        yield "prefill", (32, 8, 128, 16, 128, symmetric, 700, 300, 700, 1)
        yield "no power of two", (14, 2, 80, 32, 16, symmetric, 515, 80, 3, 80)
        yield "no rotation, 96", (12, 4, 96, 48, 0, symmetric, 100, 99, 1, 99)
        yield "256", (16, 1, 256, 16, 256, symmetric, 300, 20, 9, 20)


def kv4_write(quick: bool) -> Iterator[Case]:
    for words, (_, kv_heads, d, page, rotate, symmetric, *_rest) in sequences(quick):
        tokens = 5 if quick else 133
        key, value = randn(tokens, kv_heads, d, seed=1), randn(tokens, kv_heads, d, seed=2)
        slots = torch.randperm(16 * page)[: tokens - 1]
        slots[::5] = -1
        cache = torch.randint(0, 256, (16, kv_heads, page, reference.kv_token_bytes(d, symmetric))).to(torch.uint8)
        given = key, value, cache, slots, rotate, symmetric, 0.95, 1.0
        yield words, given
        yield f"{words}, key feedback", (*given, randn(kv_heads, d, d, seed=3).float() / d)


def kv4_attention(quick: bool) -> Iterator[Case]:
    for words, (heads, kv_heads, d, page, rotate, symmetric, *rest) in sequences(quick):
        lengths, steps = rest[:2], rest[2:]
        wide = -(-max(lengths) // page)
        cache = torch.zeros(2 * wide, kv_heads, page, reference.kv_token_bytes(d, symmetric), dtype=torch.uint8)
        table = torch.randperm(2 * wide).view(2, wide).int()
        for row, length in zip(table, lengths, strict=True):
            place = torch.arange(length)
            key, value = torch.randn(2, length, kv_heads, d).bfloat16()
            slots = row.long()[place // page] * page + place % page
            reference.kv4_write(key, value, cache, slots, rotate, symmetric, 1.0, 1.0)
        starts = torch.tensor([0, steps[0], sum(steps)], dtype=torch.int32)
        query = torch.randn(sum(steps) + 1, heads, d).bfloat16()
        lens = torch.tensor(lengths, dtype=torch.int32)
        yield words, (query, cache, starts, lens, table, torch.zeros_like(query), d**-0.5, rotate, symmetric)


CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    op: found for op in OPS if op != "pack_weight" and (found := globals().get(op)) is not None
}
WEIGHTS = {"int_linear": 1, "quantized_linear": 3}  # argument that is a packed weight
STACKS = {"moe_experts": (4, 6)}  # arguments that are packed weights of experts, their bits in the eighth
CHANGED = {"kv4_write": 2, "kv4_attention": 5}  # argument that an op changes in place
# Extremes of codes may lie on a rounding tie, which other float32 sums (of squares) decide otherwise.
TIES = ("rms_norm_quantize", "online_stage")
KV4_ERROR = 0.15  # of attention over Gaussian K and V, at least; a fifth of it is allowed


def on(device: str, arguments: tuple[Any, ...]) -> list[Any]:
    return [one.to(device, copy=True) if isinstance(one, Tensor) else one for one in arguments]


def check(op: str, device: str, quick: bool = False) -> dict[str, Any]:
    """Runs all cases of an op, on a GPU also as a replayed CUDA graph.

    Raises:
        AssertionError: naming the case that differs.
    """
    torch.manual_seed(0)
    worst, count = 0.0, 0
    for words, arguments in CASES[op](quick):
        given, expected_of = on(device, arguments), on("cpu", arguments)
        at = WEIGHTS.get(op, 0)
        if at and backend_of(op, device) is not REFERENCE:  # it has a layout of its own
            bits, groups = given[at + 3], given[at + 1].shape[1]
            columns = arguments[at].shape[1] * 32 // bits  # all of these layers fill their words
            given[at] = ops.prepare_weight(given[at], bits, columns, groups)
        for at in STACKS.get(op, ()):
            bits, groups = given[8], given[at + 1].shape[2]
            for side in (given, expected_of):  # the specification multiplies with `int_linear` of the CPU
                side[at] = ops.prepare_experts(side[at], bits, arguments[at].shape[2] * 32 // bits, groups)
        call = getattr(torch.ops.rotquant, op)
        outcomes = [replayed(call, given)] if device == "cuda" else []
        outcomes.append((call(*given), given))
        changed = [CHANGED[op]] if op in CHANGED else []
        expected = flat(ops.SPECIFICATION[op](*expected_of)) + [expected_of[index] for index in changed]
        for returned, used in outcomes:
            actual = flat(returned) + [used[index] for index in changed]
            for one, other in zip(actual, expected, strict=True):
                worst = max(worst, compare(f"{op}, {words}", op, one.cpu(), other))
        count += 1
    return {"kernel": ops.kernel_of(op, device), "cases": count, "worst": worst}


def replayed(call: Callable[..., Any], given: list[Any]) -> tuple[Any, list[Any]]:
    """What an op returns, and its arguments afterwards, when a CUDA graph captured on zeros is replayed on `given`."""
    static = [torch.zeros_like(one) if isinstance(one, Tensor) else one for one in given]
    call(*static)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = call(*static)
    for one, other in zip(static, given, strict=True):
        if isinstance(one, Tensor):
            one.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    return returned, static


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result or ())


def compare(where: str, op: str, one: Tensor, other: Tensor) -> float:
    """Largest relative difference of two results; raises where it is not allowed."""
    assert (one.shape, one.dtype) == (other.shape, other.dtype), f"{where}: {one.shape} {one.dtype}"
    if not one.is_floating_point():
        difference = (one.long() - other.long()).abs()
        share = (difference > 0).float().mean().item()
        allowed = 0.005 if op in TIES else 0.0
        assert share <= allowed, f"{where}: {share:.2%} of the integers differ"
        assert not share or difference.max() <= 1, f"{where}: integers differ by {difference.max()}"
        return share
    error = ((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30)).item()
    allowed = 0.2 * KV4_ERROR if op == "kv4_attention" else 2 * torch.finfo(one.dtype).eps
    allowed = max(allowed, 1e-5)
    assert error <= allowed, f"{where}: relative difference {error:.2e}, allowed {allowed:.2e}"
    return error


def report(steps: dict[str, dict[str, Any]]) -> str:
    found = [
        [name.removeprefix("check "), one["kernel"], str(one["cases"]), f"{one['worst']:.1e}"]
        for name, one in steps.items()
        if "error" not in one
    ]
    return table(["op, against its specification", "kernel", "cases", "largest difference"], found) if found else ""
