#!/usr/bin/env python3
"""What linear layers would take on an H100, by arithmetic: nothing here was measured. `docs/gpu.md` has the result.

    python benchmarks/gpu_estimates.py

A product takes as long as the slowest of three: weights from memory, operands and sums from the second cache level,
steps of tiles on the multiprocessors. To that come START for each launch, and a second launch where columns are split.
"""

from __future__ import annotations

import sys
from pathlib import Path

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


def main() -> None:
    heads = ["tokens", "before, no cache counted, µs", "before, µs", "now, µs", "times faster"]
    print(table(heads, layers()), table(["tokens", "layer", "before, µs", "now, µs", "cut"], rows()), sep="\n\n")


if __name__ == "__main__":
    main()
