"""What a token of one stream is made of: `python benchmarks/decode_step.py OUT`, a checkpoint of ours.

vLLM in this process on one thread decodes the same text several times: the median is a token's time. Once more under
torch's profiler, whose own times are given to

    linears      the native op of all quantized linears with their online stages, lm_head apart
    attention    the 4-bit cache, written and read, and vLLM's calls around it
    compiled     torch.compile's graph around these: norms, residuals, RoPE, and calling all ops
    vLLM         the scheduler, the step's inputs, the sampler: everything outside the model
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from machine import cpu_info

TOKENS, PROMPT, ROUNDS = 96, 64, 5
ATTENTION = ("rotquant::kv4_", "vllm::unified_")


def measure(folder: Path) -> dict[str, Any]:
    """Milliseconds of a token, of it those of each part, and how many calls of a native op there are."""
    from torch.profiler import ProfilerActivity, profile
    from vllm import LLM, SamplingParams

    llm = LLM(str(folder), max_model_len=2048, max_num_seqs=1, seed=0)
    prompt = {"prompt_token_ids": list(range(100, 100 + PROMPT))}

    def decode(tokens: int) -> float:
        """Seconds."""
        begin = time.perf_counter()
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - begin

    decode(TOKENS)
    rounds = [1000 * (decode(TOKENS) - decode(1)) / (TOKENS - 1) for _ in range(ROUNDS)]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        whole = decode(TOKENS)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    own = dict.fromkeys(("linears", "lm_head", "attention", "compiled"), 0.0)
    calls = 0
    for event in seen.key_averages(group_by_input_shape=True):
        part = part_of(event.key, event.input_shapes, vocabulary)
        calls += event.count if event.key.startswith("rotquant::") else 0
        if part:
            own[part] += event.self_cpu_time_total / 1e6
    own["vLLM"] = whole - sum(own.values())
    median = statistics.median(rounds)
    return {
        "machine": cpu_info().get("model name", ""), "ms": median, "rounds": rounds, "calls": calls / TOKENS,
        "parts": {part: median * seconds / whole for part, seconds in own.items()},
    }  # fmt: skip


def part_of(name: str, shapes: list[Any], vocabulary: int) -> str | None:
    """The part that an operator's own time belongs to; None for what runs outside the model."""
    if name.startswith("rotquant::int_linear") or name in ("aten::mm", "aten::addmm"):
        outputs = shapes[2] if "int_linear" in name else shapes[1][1:]  # of its scale, of the transposed weight
        return "lm_head" if math.prod(outputs) >= vocabulary else "linears"
    if name.startswith(ATTENTION):
        return "attention"
    return "compiled" if "Call CompiledFxGraph" in name or name == "Pregraph bytecode" else None


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("folder", type=Path, metavar="OUT")
    ask.add_argument("--label", help="what it is called in FILE.json (default: the folder's name)")
    ask.add_argument("--output", type=Path, metavar="FILE.json", help="adds to what is there")
    args = ask.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    found = measure(args.folder)
    print(json.dumps(found, indent=1))
    if args.output:
        known = json.loads(args.output.read_text()) if args.output.exists() else {}
        args.output.write_text(json.dumps(known | {args.label or args.folder.name: found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
