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

import torch
from torch import Tensor
from transformers import AutoConfig

from kernels_report import table
from rotquant import export
from rotquant.checkpoint import save_tensors, save_text
from rotquant.demo import DATA
from rotquant.fold import online_transforms
from rotquant.models import LM_HEAD, expected_shapes, read_architecture, read_config
from rotquant.recipe import load_recipe
from serve_models import CHEAP, COMMON, LAYER, SHAPES

LLAMA_3_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 32768, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
ALL_SHAPES = SHAPES | {"llama-3-8b": LLAMA_3_8B}


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
    "decode 1": ("latency --batch-size 1 --input-len 128 --output-len 128 --num-iters-warmup 1 --num-iters 3", "avg_latency"),
    "decode 64": ("latency --batch-size 64 --input-len 1024 --output-len 128 --num-iters-warmup 1 --num-iters 2", "avg_latency"),
    "prefill 8192": ("latency --batch-size 1 --input-len 8192 --output-len 1 --num-iters-warmup 1 --num-iters 5", "avg_latency"),
    "throughput": ("throughput --dataset-name random --input-len 1024 --output-len 128 --num-prompts 256", "tokens_per_second"),
}  # fmt: skip
COMMON_ARGUMENTS = ("--dtype", "bfloat16", "--max-model-len", "16384", "--no-enable-prefix-caching")


def work() -> Path:
    return Path(os.environ.get("ROTQUANT_GPU_WORK") or tempfile.gettempdir()) / "models"


def recipe() -> Any:
    return load_recipe("quarot", CHEAP)


def write_config(shape: str, checkpoint: str, folder: Path) -> None:
    """Everything but the weights: config.json and the demo model's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    export.copy_companions(DATA / "demo", folder)
    AutoConfig.for_model(**(COMMON | ALL_SHAPES[shape])).save_pretrained(folder)
    if checkpoint == "dummy":
        return
    arch, chosen = read_architecture(folder), recipe()
    if checkpoint == "rotquant":
        quantization = export.quantization_config(chosen, arch, online_transforms(chosen, arch, 1))
        export.write_config(folder, folder, arch, quantization, export.extension(chosen, "full", {}))
        return
    config = json.loads((folder / "config.json").read_text())
    weights = export.scheme(["Linear"], 4, 0, chosen.activations) | {"input_activations": None}
    config["tie_word_embeddings"] = False
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": weights}, "ignore": ["lm_head"],
    }  # fmt: skip
    save_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def random_tensors(name: str, shape: tuple[int, ...], checkpoint: str) -> dict[str, Tensor]:
    """What the checkpoint holds for one tensor of the model."""
    head_bits = recipe().lm_head.bits if checkpoint == "rotquant" else 16
    bits = 4 if name.endswith("_proj.weight") else head_bits if name == LM_HEAD else 16
    if name.endswith("norm.weight"):
        return {name: torch.ones(shape, dtype=torch.bfloat16)}
    if bits == 16:
        return {name: torch.randn(shape, dtype=torch.bfloat16) / 50}
    words = torch.randint(-(2**31), 2**31, (shape[0], shape[1] * bits // 32), dtype=torch.int64).to(torch.int32)
    scale = torch.full((shape[0], 1), 0.02 / 2 ** (bits - 2), dtype=torch.bfloat16)
    return {f"{name}_packed": words, f"{name}_scale": scale, f"{name}_shape": torch.tensor(shape)}


def write_model(shape: str, checkpoint: str, folder: Path) -> Path:
    """A checkpoint with random weights, one file a layer; kept where it is complete."""
    if (folder / "config.json").exists() and (checkpoint == "dummy" or (folder / "model.safetensors.index.json").exists()):
        return folder
    write_config(shape, checkpoint, folder)
    if checkpoint == "dummy":
        return folder
    torch.manual_seed(0)
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in expected_shapes(read_config(folder)).items():
        found = LAYER.match(name)
        groups.setdefault(found[0] if found else "rest", {})[name] = size
    written: dict[str, str] = {}
    for number, sizes in enumerate(groups.values(), 1):
        tensors = {key: t for name, size in sizes.items() for key, t in random_tensors(name, size, checkpoint).items()}
        if checkpoint == "rotquant" and number == 1:
            tensors |= export.marker(online_of(shape), torch.bfloat16)
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_tensors(folder / file, tensors)
        written |= dict.fromkeys(tensors, file)
    export.write_index(folder, written)
    return folder


def online_of(shape: str) -> Any:
    """Online transforms of a shape; from a config that is not quantized yet, as the quantizer reads it."""
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(**(COMMON | ALL_SHAPES[shape])).save_pretrained(folder)
        return online_transforms(recipe(), read_architecture(Path(folder)), 1)


def has_flash_attention() -> bool:
    """True where vLLM's compiled FlashAttention is there; bundles leave it out."""
    found = importlib.util.find_spec("vllm")
    folders = found.submodule_search_locations if found else None
    return any(list(Path(folder, "vllm_flash_attn").glob("_vllm_fa*.so")) for folder in folders or ())


def command(name: str, load: str, folder: Path, answer: Path) -> list[str]:
    """`vllm bench` for one format and load."""
    attention = () if has_flash_attention() else ("--attention-backend", "TRITON_ATTN")
    return [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", *LOADS[load][0].split(), "--model", str(folder),
        "--output-json", str(answer), *COMMON_ARGUMENTS, *attention, *FORMATS[name].arguments,
    ]  # fmt: skip


def measure(name: str, load: str) -> dict[str, Any]:
    """Runs it; vLLM's results and rotquant's start-up proof.

    Raises:
        RuntimeError: vLLM failed.
    """
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
    from rotquant.format import claims

    checkpoint = FORMATS[name].checkpoint
    with tempfile.TemporaryDirectory() as folder:
        write_config("llama-3-8b", checkpoint, Path(folder, "big"))
        config = read_config(Path(folder, "big"))
        claimed = claims(getattr(config, "quantization_config", None))
        assert claimed == (checkpoint == "rotquant")
        if claimed and load == next(iter(LOADS)):
            from rotquant.loading import load as load_model

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
