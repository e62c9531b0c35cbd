"""vLLM end to end on a GPU: a model of Llama-3-8B's shape with random weights, in four formats, under `vllm bench`.

bf16 and fp8 get vLLM's dummy weights. W4A16 and rotquant's checkpoint are written with random codes, without the
quantizer, since packed integers have no dummy values and kernels run faster on zeros than on data.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
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
