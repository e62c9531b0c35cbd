#!/usr/bin/env python3
"""What Llama-3-8B would take on an H100, by arithmetic: nothing here was measured. `docs/gpu.md` has the result.

    python benchmarks/gpu_estimates.py

A product takes as long as the slowest of three: weights from memory, operands and sums from the second cache level,
steps of tiles on the multiprocessors. To that come START for each launch, and a second launch where columns are split.
Rows and attention take as long as the slower of two: bytes from memory, and instructions, counted in machine code.
Row kernels are taken to issue one a clock on each of four schedulers, attention, which waits for more, one in two.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(Path(__file__).parent)]

from kernels_report import table  # noqa: E402
from rotquant_kernels.cuda.device import Device  # noqa: E402
from rotquant_kernels.cuda.tiles import Shape, Tiles, tiles  # noqa: E402

H100 = Device(132, 8, 90)
MEMORY, CACHE, CLOCK, MACS = 3.0e12, 5.5e12, 1.755e9, 4096  # bytes/s, bytes/s, 1/s, int8 a clock and multiprocessor
START, SECOND = 1.5e-6, 2.0e-6
CUTLASS = 1.35e15  # int8 operations/s of vLLM's GEMM for many tokens, as it is known to reach
# Clocks of a step besides its products, where nothing else runs: loads, barriers, unpacking.
OVERHEAD = {4: 390, 8: 200}
LAYER = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 28672), "down": (14336, 4096)}
TOKENS = (1, 16, 64, 128, 256, 2048, 8192)


def before(tokens: int) -> Tiles:
    """The cut that was there first: no splits."""
    if tokens <= 32:
        return Tiles(32, 16 if tokens <= 16 else 32, 128, 4, 6, 0, 1)
    return Tiles(64, 64, 128, 4, 4, 0, 1) if tokens <= 64 else Tiles(128, 128, 128, 8, 3, 0, 1)


def resident(cut: Tiles) -> int:
    """Programs that a multiprocessor holds, by registers: 194 a thread for the first cut of 128 x 128."""
    registers = cut.registers or {256 * 128: 255, 128 * 128: 194, 128 * 64: 106}.get(cut.n * cut.m, 80)
    return max(65536 // (registers * 32 * cut.warps), 1)


def seconds(k: int, n: int, m: int, cut: Tiles, cache: bool = True) -> float:
    """Of a product; cache: whether the second cache level's rate counts."""
    if cut.unpacked:  # 4 bits in and 8 out, then the server's product
        return 1.5 * k * n / MEMORY + 2.0 * m * n * k / CUTLASS + 2 * START
    across = -(-n // cut.n) * -(-m // cut.m)
    programs, steps = across * cut.splits, -(-k // (cut.k * cut.splits))
    parts = 4.0 * cut.splits * m * n if cut.splits > 1 else 0.0
    together = min(-(-programs // H100.processors), resident(cut))
    products = cut.n * cut.m * cut.k / MACS
    clocks = max(1.1 * products, (products + OVERHEAD[cut.warps]) / together)
    busy = -(-programs // H100.processors) * steps * clocks / CLOCK
    memory = (k * n / 2 + k * m + 2 * m * n) / MEMORY
    fed = (across * k * (cut.n / 2 + min(cut.m, m)) + parts) / CACHE if cache else 0.0
    return max(memory, fed, busy) + START + (SECOND + parts / CACHE if parts else 0.0)


def rows() -> list[list[str]]:
    found = []
    for m in TOKENS:
        for name, (k, n) in LAYER.items():
            cut = tiles(m, Shape(k, n, 1), H100)
            old, new = (1e6 * seconds(k, n, m, one) for one in (before(m), cut))
            size = f"{cut.n} x {cut.m} x {cut.k}" + (f", {cut.splits} parts" if cut.splits > 1 else "")
            size = "unpacked, CUTLASS" if cut.unpacked else size
            found.append([str(m), name, f"{old:.0f}", f"{new:.0f}", size])
    return found


def layers() -> list[list[str]]:
    found = []
    for m in TOKENS:
        plain = sum(seconds(k, n, m, before(m), cache=False) for k, n in LAYER.values())
        old = sum(seconds(k, n, m, before(m)) for k, n in LAYER.values())
        new = sum(seconds(k, n, m, tiles(m, Shape(k, n, 1), H100)) for k, n in LAYER.values())
        found.append([str(m), *(f"{1e6 * each:.0f}" for each in (plain, old, new)), f"{old / new:.2f}"])
    return found


# ---- rows and attention -------------------------------------------------------------------------------

SCHEDULERS, HALF = 132 * 4 * CLOCK, 0.5  # instructions a second at best, and the share that attention reaches
WARPS = 4  # of an attention program
HEADS, KV_HEADS, DIM, LAYERS = 32, 8, 128, 32
TOKEN = 133  # bytes of K and V of a token and head
FLASH = 550e12  # operations/s of FlashAttention 3 in bf16, as it is known to reach
DECODE, PREFILL = 765, 2760  # instructions of a warp for a tile of 128 tokens; PREFILL before alone
ALONE = 3  # clocks of an instruction of a warp that has its scheduler for itself
# Programs a multiprocessor that fit, and that were made before; tokens of a part at least.
RESIDENT, WANTED, SPLIT = 3, 4, 256


class Row(NamedTuple):
    """A row kernel. Args: bytes: a number's; before, now: instructions of a thread for a number."""

    columns: int
    bytes: int
    before: int
    now: int


ROWS = {
    "quantize 4096": Row(4096, 3, 48, 23),
    "norm and quantize 4096": Row(4096, 7, 64, 34),
    "Hadamard 4096 and quantize": Row(4096, 3, 73, 42),
    "SiLU, Hadamard 2048 and quantize 14336": Row(14336, 5, 140, 100),
}


def row(kernel: Row, tokens: int, instructions: int) -> float:
    numbers = tokens * kernel.columns
    return max(numbers * kernel.bytes / MEMORY, numbers * instructions / 32 / SCHEDULERS) + START


def row_table() -> list[list[str]]:
    found = []
    for name, kernel in ROWS.items():
        floor = 2048 * kernel.columns * kernel.bytes / MEMORY
        times = floor, row(kernel, 2048, kernel.before), row(kernel, 2048, kernel.now)
        found.append([name, str(kernel.before), str(kernel.now), *(f"{1e6 * each:.0f}" for each in times)])
    return found


def decode(batch: int, context: int, programs: int) -> float:
    """Of a layer, where at most `programs` a multiprocessor are made; all that do not fit at once wait for a second."""
    splits = max(min(programs * H100.processors // (KV_HEADS * batch), context // SPLIT), 1)
    made = KV_HEADS * batch * splits
    waves = -(-made // (RESIDENT * H100.processors))
    together = min(-(-made // H100.processors), RESIDENT)
    steps = -(-context // (128 * splits))
    issued = waves * steps * DECODE * max(together / HALF, ALONE) / CLOCK  # on the fullest scheduler
    memory = batch * context * KV_HEADS * TOKEN / MEMORY
    return max(memory, issued) + START + (SECOND + START if splits > 1 else 0)


def plain_decode(batch: int, context: int) -> float:
    """bf16."""
    return batch * context * KV_HEADS * DIM * 4 / 2.8e12 + 2 * START + SECOND


def flash(tokens: int) -> float:
    """A layer's attention over a prompt, in bf16."""
    return 2.0 * tokens**2 * DIM * HEADS / FLASH


def prefill(tokens: int) -> tuple[float, float]:
    """A layer's attention over a prompt, before and now: pages gathered as bf16, queries turned, FlashAttention."""
    tiles = KV_HEADS * (tokens // 16) * (tokens // 128) / 2
    gathered = tokens * KV_HEADS * (TOKEN + 4 * DIM) / MEMORY + 4 * tokens * HEADS * DIM / MEMORY + 2 * START
    return tiles * WARPS * PREFILL / (SCHEDULERS * HALF), flash(tokens) + gathered


def first_token(tokens: int) -> tuple[float, float, float]:
    """Seconds of a prompt: before, now, bf16."""
    order = ("norm and quantize 4096", "norm and quantize 4096", "quantize 4096", list(ROWS)[-1])
    old, new = (sum(row(ROWS[n], tokens, getattr(ROWS[n], which)) for n in order) for which in ("before", "now"))
    dense = [sum(seconds(k, n, tokens, cut(k, n)) for k, n in LAYER.values()) for cut in (
        lambda k, n: before(tokens), lambda k, n: tiles(tokens, Shape(k, n, 1), H100))]  # fmt: skip
    attention = prefill(tokens)
    bf16 = 2.0 * tokens * sum(k * n for k, n in LAYER.values()) / 700e12 + 0.37e-3 * tokens / 8192 + flash(tokens)
    return LAYERS * (dense[0] + old + attention[0]), LAYERS * (dense[1] + new + attention[1]), LAYERS * bf16


def attention_table() -> list[list[str]]:
    found = []
    for batch, context in ((1, 4096), (16, 4096), (1, 16384), (16, 16384)):
        times = decode(batch, context, WANTED), decode(batch, context, RESIDENT), plain_decode(batch, context)
        found.append([f"decode, {batch} x {context}, a layer, µs", *(f"{1e6 * each:.0f}" for each in times)])
    for tokens in (8192, 32768):
        times = *(LAYERS * each for each in prefill(tokens)), LAYERS * flash(tokens)
        found.append([f"attention of a prompt of {tokens}, ms", *(f"{1e3 * each:.0f}" for each in times)])
        found.append([f"first token of a prompt of {tokens}, ms", *(f"{1e3 * e:.0f}" for e in first_token(tokens))])
    return found


def main() -> None:
    heads = ["tokens", "before, no cache counted, µs", "before, µs", "now, µs", "times faster"]
    print(table(heads, layers()), table(["tokens", "layer", "before, µs", "now, µs", "cut"], rows()), sep="\n\n")
    heads = ["rows, 2048 tokens", "instructions a number, before", "now", "bytes alone, µs", "before, µs", "now, µs"]
    print("", table(heads, row_table()), table(["attention", "before", "now", "bf16"], attention_table()), sep="\n\n")


if __name__ == "__main__":
    main()
