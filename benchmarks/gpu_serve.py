"""vLLM end to end on a GPU: a model of Llama-3-8B's shape with random weights, in four formats, under `vllm bench`.

bf16 and fp8 get vLLM's dummy weights. W4A16 and rotquant's checkpoint are written with random codes, without the
quantizer, since packed integers have no dummy values and kernels run faster on zeros than on data.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels_report import table


@dataclass(frozen=True)
class Format:
    """Args: checkpoint: "dummy", "w4a16" or "rotquant"; arguments: of vLLM besides."""

    checkpoint: str
    arguments: tuple[str, ...] = ()


FORMATS = {
    "bf16": Format("dummy", ("--load-format", "dummy")),
    "fp8": Format("dummy", ("--load-format", "dummy", "--quantization", "fp8")),
    "w4a16": Format("w4a16"),
    "rotquant": Format("rotquant", ("--quantization", "rotquant")),
}
# `vllm bench` and its arguments; the number that counts in its results.
LOADS = {
    "decode 1": ("latency --batch-size 1 --input-len 128 --output-len 128 --num-iters 3", "avg_latency"),
    "decode 64": ("latency --batch-size 64 --input-len 1024 --output-len 128 --num-iters 2", "avg_latency"),
    "prefill 8192": ("latency --batch-size 1 --input-len 8192 --output-len 1 --num-iters 5", "avg_latency"),
    "throughput": (
        "throughput --dataset-name random --input-len 1024 --output-len 128 --num-prompts 256", "tokens_per_second",
    ),
}  # fmt: skip
COMMON_ARGUMENTS = ("--dtype", "bfloat16", "--max-model-len", "16384", "--no-enable-prefix-caching")


def work() -> Path:
    return Path(os.environ.get("ROTQUANT_GPU_WORK") or tempfile.gettempdir()) / "models"


def has_flash_attention() -> bool:
    """True where vLLM's compiled FlashAttention is there; bundles leave it out."""
    found = importlib.util.find_spec("vllm")
    folders = found.submodule_search_locations if found else None
    return any(list(Path(folder, "vllm_flash_attn").glob("_vllm_fa*.so")) for folder in folders or ())


def command(name: str, load: str, folder: Path, answer: Path) -> list[str]:
    """`vllm bench` for one format and load."""
    attention = () if has_flash_attention() else ("--attention-backend", "TRITON_ATTN")
    warm_up = ("--num-iters-warmup", "1") if LOADS[load][0].startswith("latency") else ()
    return [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", *LOADS[load][0].split(), *warm_up,
        "--model", str(folder), "--output-json", str(answer), *COMMON_ARGUMENTS, *attention, *FORMATS[name].arguments,
    ]  # fmt: skip


def measure(name: str, load: str) -> dict[str, Any]:
    """Runs it; vLLM's results and rotquant's start-up proof.

    Raises:
        RuntimeError: vLLM failed.
    """
    from gpu_models import write_model  # takes seconds to import, which most steps need not wait for

    checkpoint = FORMATS[name].checkpoint
    folder = write_model("llama-3-8b", checkpoint, work() / f"llama-3-8b-{checkpoint}")
    with tempfile.TemporaryDirectory() as answers:
        answer = Path(answers, "answer.json")
        done = subprocess.run(command(name, load, folder, answer), capture_output=True, text=True, check=False)
        if not answer.exists():
            raise RuntimeError(f"vLLM ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3500:]}")
        result = json.loads(answer.read_text())
    said = [line for line in (done.stdout + done.stderr).splitlines() if "rotquant" in line or "KV cache size" in line]
    return {"metric": LOADS[load][1], "value": result[LOADS[load][1]], "result": result, "log": said[-20:]}


def validate(name: str, load: str) -> str:
    """Builds the model's config, reads it as the server would, and for rotquant loads and runs a tiny sibling."""
    import torch

    from gpu_models import write_config, write_model
    from rotquant.checkpoint.format import claims
    from rotquant.models import read_config

    checkpoint = FORMATS[name].checkpoint
    with tempfile.TemporaryDirectory() as folder:
        write_config("llama-3-8b", checkpoint, Path(folder, "big"))
        config = read_config(Path(folder, "big"))
        claimed = claims(getattr(config, "quantization_config", None))
        assert claimed == (checkpoint == "rotquant")
        if claimed and load == next(iter(LOADS)):
            from rotquant.checkpoint.loading import load as load_model

            model = load_model(write_model("tiny", checkpoint, Path(folder, "tiny")))
            logits = model(torch.arange(3, 9)[None]).logits
            assert logits.isfinite().all()
        arguments = command(name, load, Path("MODEL"), Path("ANSWER"))
    return "vllm " + " ".join(arguments[3:])


def report(steps: dict[str, dict[str, Any]]) -> str:
    """Seconds of a batch (latency) or tokens a second (throughput)."""
    done = {step.removeprefix("serve "): one["value"] for step, one in steps.items() if "value" in one}
    rows = [
        [name, *(f"{done[f'{name} {load}']:.2f}" if f"{name} {load}" in done else "-" for load in LOADS)]
        for name in FORMATS
        if any(f"{name} {load}" in done for load in LOADS)
    ]
    heads = [f"{load}, {'tokens/s' if 'throughput' in load else 's'}" for load in LOADS]
    return table(["Llama-3-8B's shape", *heads], rows) if rows else ""


# ---- one process a format, for `gpu_session.py` -------------------------------------------------------


def engine(name: str, folder: Path, eager: bool) -> dict[str, Any]:
    """Arguments of vLLM's LLM: dummy weights of Llama-3-8B's shape, whole decode steps as CUDA graphs unless eager."""
    quantization = {"fp8": "fp8", "rotquant": "rotquant"}.get(name)
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 16, 64, 128]}
    return {
        "model": str(folder), "load_format": "dummy", "dtype": "bfloat16", "max_model_len": 8704,
        "enable_prefix_caching": False, "kv_cache_memory_bytes": int(20e9), "enforce_eager": eager,
    } | ({"quantization": quantization} if quantization else {}) | (
        {} if eager else {"compilation_config": graphs}
    ) | ({} if has_flash_attention() else {"attention_backend": "TRITON_ATTN"})  # fmt: skip


def loads(name: str, first: bool) -> Iterator[dict[str, Any]]:
    """Starts vLLM and runs the loads, a line each: the start, decoding alone and with others, a long prompt, many."""
    from vllm import LLM, SamplingParams

    from gpu_deadline import late
    from gpu_models import write_config

    folder = work() / f"config-{name}"
    write_config("llama-3-8b", FORMATS[name].checkpoint, folder)
    for eager in (True, False) if first else (False,):
        started = time.perf_counter()
        llm = LLM(**engine(name, folder, eager))
        yield {"format": name, "load": "start, eager" if eager else "start", "seconds": time.perf_counter() - started}
        wanted = (("1 x 16 tokens", 1, 32, 16), ("16 x 16 tokens", 16, 32, 16)) if first else (
            ("decode 1 x 128", 1, 128, 128), ("decode 64 x 64", 64, 1024, 64), ("prefill 8192", 1, 8192, 1),
            ("128 requests 512 / 128", 128, 512, 128),
        )  # fmt: skip
        for load, count, prompt, new in wanted:
            sampling = SamplingParams(max_tokens=new, ignore_eos=True, temperature=0.0, detokenize=False)
            prompts = [{"prompt_token_ids": [(7 * i + j) % 1000 + 3 for j in range(prompt)]} for i in range(count)]
            if late(5):
                return
            llm.generate(prompts[:1], SamplingParams(max_tokens=2, detokenize=False), use_tqdm=False)
            started = time.perf_counter()
            llm.generate(prompts, sampling, use_tqdm=False)
            seconds = time.perf_counter() - started
            yield {"format": name, "load": load, "seconds": seconds, "tokens a second": count * new / seconds}
        del llm
        gc.collect()
        if late(30):
            return
