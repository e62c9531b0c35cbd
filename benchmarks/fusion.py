"""What it is worth on this CPU to run SiLU and product inside down_proj's op: `python benchmarks/fusion.py`.

The op on [gate, up], bfloat16, against the separate steps, as vLLM runs them eagerly (torch's silu, then the product)
and as torch.compile makes one loop of them; and against the op alone on rows that are there already, the floor. One
thread; kernels take turns, the result is the median CPU time of a call. Weights rotate through copies that are larger
than the processor's cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from kernels_linear import Problem, prepared
from kernels_report import table
from rotquant_kernels import ops

SHAPES = "4864x896,8192x2048,14336x4096"  # down_proj of Qwen2.5-0.5B, Llama-3.2-1B, Llama-3-8B
COLD_BYTES = 128 << 20


def silu_mul(x: Tensor) -> Tensor:
    """As vLLM's SiluAndMul on a CPU."""
    width = x.shape[-1] // 2
    return torch.nn.functional.silu(x[..., :width]) * x[..., width:]


def calls(k: int, n: int, m: int, compiled: Callable[[Tensor], Tensor]) -> dict[str, Callable[[], Tensor]]:
    weight, scale = prepared(Problem(k, n), 0)
    copies = itertools.cycle([weight.clone() for _ in range(-(-COLD_BYTES // weight.numel()))])
    x = torch.randn(m, 2 * k, generator=torch.Generator().manual_seed(m)).bfloat16()
    ready = silu_mul(x)
    settings = (scale, None, 4, "hadamard", k & -k, None, 4, True, 1.0, None, None)

    def linear(rows: Tensor, fused: bool) -> Tensor:
        return ops.int_linear(rows, next(copies), *settings, fused)

    return {
        "fused": partial(linear, x, True),
        "eager": lambda: linear(silu_mul(x), False),
        "compiled": lambda: linear(compiled(x), False),
        "linear alone": partial(linear, ready, False),
    }


def turn(call: Callable[[], Tensor], seconds: float) -> float:
    """CPU seconds of a call, repeated for at least so long."""
    count, begin = 0, time.process_time()
    while True:
        call()
        count += 1
        passed = time.process_time() - begin
        if passed >= seconds:
            return passed / count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--shapes", default=SHAPES, help="K x N of down_proj (default: %(default)s)")
    parser.add_argument("--rows", default="1,16,256", help="M, tokens at once (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    compiled = torch.compile(silu_mul, dynamic=True)
    found = []
    for shape in args.shapes.split(","):
        k, _, n = shape.partition("x")
        for m in map(int, args.rows.split(",")):
            by_name = calls(int(k), int(n), m, compiled)
            for call in by_name.values():
                call()
            rounds = [{name: turn(call, 0.02) for name, call in by_name.items()} for _ in range(args.rounds)]
            times = {name: median(one[name] for one in rounds) * 1e6 for name in by_name}
            found.append({"shape": shape, "rows": m, "microseconds": times})
    if args.json:
        print(json.dumps(found, indent=1))
        return
    rows = [
        [f["shape"], str(f["rows"]), *(f"{us:.0f} ({us / f['microseconds']['fused']:.2f}x)"
         for us in f["microseconds"].values())]
        for f in found
    ]  # fmt: skip
    print(table(["KxN", "M", *found[0]["microseconds"]], rows))


if __name__ == "__main__":
    main()
