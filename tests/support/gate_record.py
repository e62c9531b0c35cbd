#!/usr/bin/env python3
"""What compilers make of each kernel of the launch gate's core list: registers, spills, memory, instructions.

    python tests/support/gate_record.py FILE [90,100]         all architectures or these, the installed Triton (JSON)
    PYTHONPATH=DIR python tests/support/gate_record.py FILE   another Triton beside it: pip install --target DIR

`benchmarks/results/gpu-launch-gate.json` is such a file; `tools/write_docs.py` makes a table of docs/gpu.md from it.
A step is the innermost loop that multiplies on tensor cores, or else the whole kernel.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2] / part) for part in ("kernels", "tests/support")]
    os.environ.setdefault("ROTQUANT_CPU_TIER", "reference")

import triton

import launch_gate
from launch_gate import attend, attend_dense, linear, norm, quantize, write
from stand_in_gpu import CUOBJDUMP, GPUS, Compiled, stand_in

CODE = re.compile(r"^\s*/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(?:.*?(0x[0-9a-f]+))?", re.M)
TENSOR = ("HMMA", "IMMA", "HGMMA", "IGMMA", "UTCIMMA", "UTCHMMA", "UTCQMMA")
CAPTURED = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16))  # batches of vLLM's CUDA graphs
STEPS = 60  # of traffic, drawn


def instructions(made: Compiled) -> list[tuple[int, str, int]]:
    """Address, name and, where there is one, first number of each instruction of the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.kernel.asm["cubin"])
        file.flush()
        said = subprocess.run([CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = [(int(at, 16), name, int(number or "0", 16)) for at, name, number in CODE.findall(said)]
    return [one for one in found if not one[1].startswith("NOP")]


def step(code: list[tuple[int, str, int]]) -> int:
    """Instructions of the smallest loop among those that hold the most products, or of all."""
    loops = []
    for at, name, target in code:
        if name.startswith("BRA") and target < at:
            body = [one for where, one, _ in code if target <= where <= at]
            loops.append((sum(one.split(".")[0] in TENSOR for one in body), -len(body)))
    products, length = max(loops, default=(0, 0))
    return -length if products else len(code)


def measured(what: str, made: Compiled) -> dict[str, Any]:
    code = instructions(made)
    return {
        "launch": what, "kernel": made.name, "registers": made.registers(), "spilled bytes": made.spilled(),
        "shared bytes": made.shared, "warps": made.kernel.metadata.num_warps, "instructions": len(code),
        "instructions of a step": step(code), "barriers": sum(name.startswith("BAR") for _, name, _ in code),
    }  # fmt: skip


def kernels(arch: int) -> Iterator[dict[str, Any]]:
    """Of the core list, in its order."""
    with stand_in(arch) as found:
        for what, launch in launch_gate.core():
            known = len(found)
            launch()
            yield from (measured(what, made) for made in found[known:])


# ---- variants -----------------------------------------------------------------------------------------


def layer(model: launch_gate.Model, tokens: int) -> None:
    """What a layer launches but for attention."""
    hidden, inner, kv = model.hidden, model.intermediate, model.kv_heads * model.head_dim
    norm(tokens, hidden)
    for k, n in ((hidden, hidden + 2 * kv), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)):
        linear(tokens, k, n)
    quantize(tokens, hidden)
    quantize(tokens, inner, inner & -inner, silu=True)
    write(tokens, model.kv_heads, model.head_dim, model.head_dim, rope=True)


def variants(name: str = "Llama-3-8B") -> tuple[int, int]:
    """Kernels, told apart as a compiler does, that capturing graphs asks for; and those that traffic asks for besides.

    Traffic: steps of decodes beside short chunks and long prefills, each sort a launch of its own. Nothing is compiled.
    """
    model, asked = launch_gate.MODELS[name], set()
    shape = {"heads": model.heads, "kv_heads": model.kv_heads, "dim": model.head_dim, "rotate": model.head_dim}
    draw = random.Random(1)

    def note(*given: Any, key: Any = None, fn: Any = None, **rest: Any) -> bool:
        asked.add((getattr(fn, "name", ""), str(key)))
        return True  # as if it were known: no compilation

    with stand_in(90), mock.patch.object(triton.knobs.runtime, "jit_cache_hook", note):
        for batch in CAPTURED:
            layer(model, batch)
            attend(batch, batch, **shape, rope=True)
        captured = len(asked)
        for _ in range(STEPS):
            decodes, chunk, prompt = (
                draw.choice((0, 1, 7, 40, 300)),
                draw.choice((0, 3, 30)),
                draw.choice((0, 90, 8000)),
            )
            layer(model, max(decodes + chunk + prompt, 1))
            for tokens, sequences in ((decodes, decodes), (chunk, 1), (chunk and 2 * chunk, 2)):
                if tokens:
                    attend(tokens, sequences, **shape, rope=True, longest=draw.choice((16, 500, 16384)))
            if prompt:
                attend_dense(prompt, 1, **shape, rope=True)
    return captured, len(asked) - captured


def main() -> int:
    file = Path(sys.argv[1])
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"tritons": {}}
    captured, besides = variants()
    kept["variants of Llama-3-8B"] = {"captured in graphs": captured, "besides, in traffic": besides}
    archs = kept["tritons"].setdefault(triton.__version__, {})
    for arch in map(int, sys.argv[2].split(",")) if sys.argv[2:] else GPUS:
        archs[f"sm_{arch}"] = list(kernels(arch))
        file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(f"triton {triton.__version__}, sm_{arch}: {len(archs[f'sm_{arch}'])} kernels", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
