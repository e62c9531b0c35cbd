"""The phases of `gpu_session.py`. Each yields lines, what matters most first, and stops by itself when it is late."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import gpu_checks
import gpu_kernels
from gpu_attention import DEVICE, Attention
from gpu_deadline import deadline, late
from gpu_fused import Norm, Silu
from gpu_kernels import Linear, Rows
from rotquant_kernels import ops, reference

Line = dict[str, Any]
REHEARSAL = DEVICE == "cpu"
SHAPES = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}  # Llama-3-8B
SMALL = {"qkv": (256, 384), "o": (256, 256), "gate_up": (256, 512), "down": (768, 256)}
SLOW_PEERS = ("Humming W4A16", "Marlin W4A16")  # the first compiles with nvcc, the second is Machete's elder
SWEPT = (("down", 128), ("o", 64), ("down", 64), ("gate_up", 256), ("o", 128), ("gate_up", 2048), ("down", 16))
GATHERED = "gathered prefill"
UNPACKED = (2048, 4096, 8192)  # tokens for which an unpacked weight is tried


def shapes() -> dict[str, tuple[int, int]]:
    return SMALL if REHEARSAL else SHAPES


# ---- A: facts, compilers, numbers ---------------------------------------------------------------------


def facts() -> Iterator[Line]:
    """Versions, and what the device can do at most."""
    yield {"device": "none: a rehearsal"} if REHEARSAL else gpu_kernels.environment()
    size = 256 if REHEARSAL else 8192
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=torch.bfloat16)
    codes = torch.randint(-8, 8, (size, size), device=DEVICE, dtype=torch.int8)
    copied = torch.empty_like(a)
    for name, call, work in (
        ("copy, GB/s", lambda: copied.copy_(a), 4e-9 * size**2),
        ("bf16, TFLOP/s", lambda: a @ b, 2e-12 * size**3),
        ("int8, TOP/s", lambda: torch._int_mm(codes, codes.t()), 2e-12 * size**3),
    ):
        yield {"ceiling": name, "value": work / (gpu_kernels.time_us(call)["us"] * 1e-6)}


def launches() -> list[Any]:
    """Problems that between them compile what a server of Llama-3-8B launches."""
    tokens = (1,) if REHEARSAL else (1, 17, 33, 65, 1025, 4097)
    found: list[Any] = [Linear(k, n, m) for k, n in shapes().values() for m in tokens]
    k, n = shapes()["down"]
    found += [Rows(n, n & -n, 1), Silu(k, k & -k, 1), Norm(n, 1)]
    if not REHEARSAL:  # a CPU has no pages of its own for these
        found += [Attention(b, c, s) for b, c, s in ((1, 4096, 1), (64, 200, 1), (2, 4096, 3), (1, 2048, 512))]
    return found


def compile_one(problem: Any) -> Line:
    """Launches our kernels of a problem once; what the compiler made of them."""
    started, found = time.perf_counter(), {}
    try:
        from triton.runtime.jit import JITFunction

        run = JITFunction.run

        def noted(self: Any, *given: Any, **options: Any) -> Any:
            made = run(self, *given, **options)
            found[self.fn.__name__] = (getattr(made, "n_regs", None), getattr(made, "n_spills", None))
            return made

        JITFunction.run = noted
    except ImportError:
        pass
    names = [name for name in gpu_kernels.PEERS[type(problem)] if name.startswith("rotquant") and "Flash" not in name]
    for name in names:
        gpu_kernels.PEERS[type(problem)][name](problem)()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return {"compiled": str(problem), "s": time.perf_counter() - started, "registers, spills": found}


def compile_all() -> Iterator[Line]:
    """All at once, so that the later phases find them in Triton's cache."""
    workers = 1 if REHEARSAL else 12
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        jobs = {pool.submit(compile_one, problem): problem for problem in launches()}
        for job in as_completed(jobs):
            error = job.exception()
            yield job.result() if error is None else {"compiled": str(jobs[job]), "error": f"{error!r}"[:300]}


def right() -> Iterator[Line]:
    """Every op against its specification, eager and replayed from a graph."""
    checks = {op: partial(gpu_checks.check, op, DEVICE, quick=REHEARSAL) for op in gpu_checks.CASES}
    for op, check in checks.items() if REHEARSAL else (checks | {GATHERED: gathered}).items():
        if late(8):
            yield {"op": op, "error": "no time was left"}
            continue
        try:
            yield {"op": op} | check()
        except Exception as error:  # of a kernel: the others are looked at all the same
            yield {"op": op, "error": f"{type(error).__name__}: {error}"[:400]}


def gathered() -> Line:
    """A long prefill over a workspace: K and V bit for bit, attention to a fifth of the error of four bits."""
    from rotquant_kernels.cuda import kv4_dense, workspace
    from vllm_rotquant.compat.flash import dense_attention

    steps, lens, found = [700, 300], [700, 1900], dense_attention()
    room, table = workspace.workspace(lens, torch.device(DEVICE)), torch.randperm(240).view(2, 120).int()
    cache = torch.zeros(240, 8, 16, reference.kv_token_bytes(128, False), dtype=torch.uint8, device=DEVICE)
    key, value = torch.randn(2, 240 * 16, 8, 128, device=DEVICE).bfloat16()
    ops.kv4_write(key, value, cache, torch.arange(240 * 16, device=DEVICE), 128, False, 1.0, 1.0)
    starts, ends = (torch.tensor(x, dtype=torch.int32) for x in ([0, steps[0], sum(steps)], lens))
    query = torch.randn(sum(steps), 32, 128).bfloat16()
    got = kv4_dense.gather(cache, table.to(DEVICE), ends.to(DEVICE), room, 128, torch.bfloat16, False)
    expected = reference.kv4_gather(cache.cpu(), table, ends, 128, False, workspace.PAGE, torch.bfloat16)
    same = all(torch.equal(one.cpu(), other) for one, other in zip(got, expected, strict=True))
    line: Line = {"kernel": found[0] if found else "none", "pages are equal": same}
    if found:
        out, wanted = torch.empty_like(query, device=DEVICE), torch.empty_like(query)
        step = (one.to(DEVICE) for one in (starts, ends, table))
        kv4_dense.attention(query.to(DEVICE), cache, *step, out, 128**-0.5, 128, False, room, max(steps), found[1])
        reference.kv4_attention(query, cache.cpu(), starts, ends, table, wanted, 128**-0.5, 128, False)
        line["worst"] = gpu_checks.compare(GATHERED, "kv4_attention", out.cpu(), wanted)
    return line


# ---- A, B: times --------------------------------------------------------------------------------------


def layer_calls(m: int) -> Iterator[tuple[str, Any]]:
    """The kernels of one decoder layer for m decoding tokens, in their order."""
    k, n = shapes()["down"]
    for name, build in (
        ("norm", lambda: gpu_kernels.PEERS[Norm]["rotquant"](Norm(n, m))),
        ("qkv", lambda: product_of("qkv", m)),
        (
            "attention",
            None if REHEARSAL else lambda: gpu_kernels.PEERS[Attention]["rotquant KV4"](Attention(m, 4096, 1)),
        ),
        (
            "quantize",
            lambda: partial(ops.quantize_rows, gpu_kernels.given(Linear(n, n, m)), "none", 0, None, 4, False, 0.9),
        ),
        ("o", lambda: product_of("o", m)),
        ("gate_up", lambda: product_of("gate_up", m)),
        ("silu", lambda: gpu_kernels.PEERS[Silu]["rotquant"](Silu(k, k & -k, m))),
        ("down", lambda: product_of("down", m)),
    ):
        if build is not None:
            yield name, build()


def product_of(name: str, m: int) -> Any:
    """The GEMM alone, of rows that are quantized already; on a CPU, which has no such op, with its quantization."""
    k, n = shapes()[name]
    words, scale = gpu_kernels.packed(Linear(k, n, m))
    x, weight = gpu_kernels.given(Linear(k, n, m)), ops.prepare_weight(words, 4, k)
    if REHEARSAL:
        return partial(ops.int_linear, x, weight, scale, None, 4, "none", 0, None, 4, False, 0.9)
    quantized = ops.quantize_rows(x, "none", 0, None, 4, False, 0.9)
    return partial(ops.quantized_linear, *quantized, weight, scale, None, 4, False, torch.bfloat16)


def layer() -> Iterator[Line]:
    """Where a decode step's time goes: each kernel alone, and all of them in one graph."""
    for m in (1, 16, 128):
        if late():
            return
        calls = dict(layer_calls(m))
        times = {name: gpu_kernels.time_us(call)["us"] for name, call in calls.items()}
        together = gpu_kernels.time_us(lambda calls=calls: [call() for call in calls.values()])["us"]
        yield {"tokens": m, "layer, us": together} | times


def problems() -> Iterator[Any]:
    """What is worth most first."""
    if REHEARSAL:
        yield from (Linear(*SMALL["o"], 1), Rows(256, 256, 2), Silu(768, 256, 2), Norm(256, 2))
        return
    for m in (1, 64, 128, 2048, 16, 256, 8192):
        yield from (Linear(k, n, m) for k, n in SHAPES.values())
        if m in (1, 2048):
            yield from gpu_kernels.PROBLEMS["attention"]
            yield from (Rows(4096, 4096, m), Silu(14336, 2048, m), Norm(4096, m))


def times() -> Iterator[Line]:
    """Our kernels against their peers."""
    for problem in problems():
        if late():
            return
        peers = gpu_kernels.PEERS[type(problem)]
        out = [name for name in peers if not name.startswith("rotquant")] if REHEARSAL else SLOW_PEERS
        found = gpu_kernels.measure(problem, out)["kernels"]
        yield {"problem": str(problem)} | {name: one.get("us", one.get("skipped")) for name, one in found.items()}


def sweep() -> Iterator[Line]:
    """Other cuts of the products that starve first; the best of each is a row for `tiles.json`, beside the results."""
    rows: list[dict[str, int]] = []
    yield from paged()
    yield from unpacked()
    for turn, (name, m) in enumerate(SWEPT):
        share = (deadline() - time.time()) / (len(SWEPT) - turn)
        k, n = shapes()[name]
        best: tuple[float, dict[str, int]] = (float("inf"), {})
        for line in cuts(name, m, time.time() + share):
            yield line
            if line.get("us", best[0]) < best[0]:
                best = line["us"], line["cut"]
        if best[1]:
            rows.append({"least_tokens": m // 2 + 1, "tokens": m, "columns": k, "channels": n} | best[1])
            folder = Path(os.environ.get("ROTQUANT_GPU_LINES", "lines")).parent
            (folder / "tiles-found.json").write_text(json.dumps(rows, indent=1) + "\n")


def paged() -> Iterator[Line]:
    """Decoding over pages of 64 and 128 tokens, in the place of vLLM's 16."""
    batch, context = (1, 40) if REHEARSAL else (16, 16384)
    for page in (16, 64, 128):
        call = gpu_kernels.PEERS[Attention]["rotquant KV4"](Attention(batch, context, 1, page))
        yield {"attention": f"batch {batch} context {context}", "page": page, "us": gpu_kernels.time_us(call)["us"]}


def unpacked() -> Iterator[Line]:
    """From how many tokens on the server's GEMM over an unpacked weight is faster: `least_tokens` in `tiles.json`."""
    name = "gate_up"
    if REHEARSAL:
        yield {"product": name, "unpacked": "not on a CPU"}
        return
    from rotquant_kernels.cuda import gemm, scaled_mm
    from vllm_rotquant.compat import integer_products

    scaled_mm.provide(found := integer_products())
    real = gemm.tiles
    try:
        for m in UNPACKED if found else ():
            call, line = product_of(name, m), {"product": name, "tokens": m}
            for whole in (False, True):
                gemm.tiles = lambda *given, w=whole: real(*given)._replace(unpacked=w)
                line |= {"unpacked, us" if whole else "us": gpu_kernels.time_us(call)["us"]}
            yield line
    except Exception as error:  # of a GEMM that is not ours
        yield {"product": name, "unpacked": f"{type(error).__name__}: {error}"[:300]}
    finally:
        gemm.tiles = real
        scaled_mm.provide(None)


def cuts(name: str, m: int, end: float) -> Iterator[Line]:
    """Times of one product cut up in other ways, until `end`; a new cut takes a second to compile."""
    call = product_of(name, m)
    yield {"product": name, "tokens": m, "cut": {}, "us": gpu_kernels.time_us(call)["us"]}
    if REHEARSAL:  # a CPU's product has no tiles
        return
    from rotquant_kernels.cuda import gemm

    real, tile = gemm.tiles, min(max(1 << (m - 1).bit_length(), 16), 128)
    try:
        for n, k, stages, programs in product((128, 64, 256, 32), (128, 256), (3, 4), (1, 2)):
            if time.time() + 2 > min(end, deadline()):
                return
            cut = {"n": n, "m": tile, "k": k, "warps": 8 if n * tile >= 8192 else 4, "stages": stages}
            cut["registers"] = 128 if n * tile == 128 * 128 else 0
            splits = max(programs * 132 // (-(-shapes()[name][1] // n) * -(-m // tile)), 1)
            gemm.tiles = lambda *given, c=cut, s=splits: real(*given)._replace(**c, splits=s)
            line: Line = {"product": name, "tokens": m, "cut": cut | {"programs": programs}}
            try:
                yield line | {"us": gpu_kernels.time_us(call)["us"]}
            except Exception as error:  # a cut that does not fit
                yield line | {"error": f"{type(error).__name__}: {error}"[:120]}
    finally:
        gemm.tiles = real


def serve(name: str, first: bool) -> Iterator[Line]:
    """vLLM in this process; first: does it start at all, eagerly and then with graphs?"""
    import gpu_serve

    if REHEARSAL:
        yield {"would start": str(gpu_serve.engine(name, Path("MODEL"), eager=first))}
        return
    yield from gpu_serve.loads(name, first)
