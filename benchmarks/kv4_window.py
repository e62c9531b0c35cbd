"""What a sliding window saves: native attention over the 4-bit KV cache within a window of a long context, against the
same window's worth of tokens alone, and against the whole context.

    python benchmarks/kv4_window.py [--window 1024] [--context 16384] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from rotquant_kernels import native, ops, reference

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 128
COPIES = 8  # of the pages, so that they come from memory
ROUNDS = 9


def attention(batch: int, steps: int, context: int, window: int) -> Callable[[int], None]:
    """`steps` new tokens of each of `batch` sequences of `context` tokens; the argument chooses the copy."""
    spaces = -(-context // PAGE)
    token = reference.kv_token_bytes(DIM, False)
    generator = torch.Generator().manual_seed(1)
    shape = (COPIES, batch * spaces, KV_HEADS, PAGE, token)
    pages = torch.randint(0, 100, shape, generator=generator, dtype=torch.uint8)  # finite scales
    table = torch.arange(batch * spaces, dtype=torch.int32).view(batch, spaces)
    query = torch.randn(batch * steps, HEADS, DIM, generator=generator).bfloat16()
    starts = torch.arange(batch + 1, dtype=torch.int32) * steps
    lens, out = torch.full((batch,), context, dtype=torch.int32), torch.empty_like(query)

    def run(copy: int) -> None:
        ops.kv4_attention(query, pages[copy], starts, lens, table, out, DIM**-0.5, DIM, False, window)

    return run


def milliseconds(runs: dict[str, Callable[[int], None]]) -> dict[str, float]:
    """Median of each, taken in turns."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            for copy in range(COPIES):
                run(copy)
            if turn:
                found[name].append((time.perf_counter() - begin) / COPIES * 1e3)
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"tier {native.tier()}, {given.threads} threads, heads {HEADS}/{KV_HEADS} of {DIM}, milliseconds")
    made = partial(attention, window=given.window)
    for name, batch, steps in (("decode, 1 sequence", 1, 1), ("decode, 4 sequences", 4, 1), ("chunk of 256", 1, 256)):
        runs = {
            "window": made(batch, steps, given.context),
            "alone": made(batch, steps, given.window + steps - 1),
            "whole": attention(batch, steps, given.context, 0),
        }
        ms = milliseconds(runs)
        print(
            f"{name:20}  window {given.window} of {given.context}: {ms['window']:.3f}   {given.window} tokens alone:"
            f" {ms['alone']:.3f} ({ms['window'] / ms['alone']:.2f}x)   no window: {ms['whole']:.3f}"
        )


if __name__ == "__main__":
    main()
