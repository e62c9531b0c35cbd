"""Models for `serve.py`: one base model, and the same weights in every format that is served.

Speed does not depend on what the weights say, so the base model may be random: no download, any shape.
The formats of stock vLLM are written here by plain round-to-nearest, those of rotquant by its own
pipeline (rotations R1 to R4, so that the online ones are really run; weights round-to-nearest).
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from torch import Tensor

from rotquant.checkpoint.companions import copy_companions
from rotquant.checkpoint.hub import fetch
from rotquant.checkpoint.source import Source, save_tensors, save_text
from rotquant.checkpoint.writer import write_index
from rotquant.common.progress import Progress, say
from rotquant.data import DATA
from rotquant.models import Names, expected_shapes
from rotquant.pipeline import quantize
from rotquant.recipes import load_recipe
from rotquant.weights import rtn
from rotquant_kernels.formats import WeightFormat

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 2048, "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "max_position_embeddings": 4096,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "llama-3.2-1b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048,
        "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
}  # fmt: skip
COMMON: dict[str, Any] = {
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 4,
    "dtype": "bfloat16",
}
STANDARD_DEVIATION = 0.02
# rotquant's recipe, made cheap: GPTQ changes the values of the weights, not their speed.
CHEAP = ("weights.method=rtn", "weights.clip_search=false", "lm_head.bits=8")
# Of the candidates that recipes took on SmolLM2 those that cost time when served; learned R1, GPTQ and tuning do not.
BEST = ("shifts", "asymmetric activations", "keys with error feedback")
TAKEN = {"best": BEST, "best-online": (*BEST, "low-rank branch of the inputs")}
FEW: dict[str, Any] = {"samples": 2, "seq_len": 256}  # calibration changes values only, too
EMBEDDING, LM_HEAD = Names().embedding, Names().head
LM_HEAD_MODULE = LM_HEAD.removesuffix(".weight")
LAYER = re.compile(r"model\.layers\.\d+\.")


ROTQUANT = ("--quantization", "rotquant")


@dataclass(frozen=True)
class Format:
    """One way to serve the model: one variant of the model, and what `vllm serve` is told besides."""

    checkpoint: str
    arguments: tuple[str, ...] = ()

    @property
    def stock(self) -> bool:
        return not self.checkpoint.startswith("rotquant")


FORMATS = {
    "float32": Format("bf16", ("--dtype", "float32")),
    "bf16": Format("bf16"),
    "bf16-fp8kv": Format("bf16", ("--kv-cache-dtype", "fp8")),
    "w8a8": Format("w8a8"),
    "w8a8-head8": Format("w8a8-head8"),
    "w4a16": Format("w4a16"),
    "rotquant-w4a4kv4": Format("rotquant-w4a4kv4", ROTQUANT),
    "rotquant-w4a8kv4": Format("rotquant-w4a8kv4", ROTQUANT),
    "rotquant-w4a4kv4-best": Format("rotquant-w4a4kv4-best", ROTQUANT),
    "rotquant-w4a8kv4-best": Format("rotquant-w4a8kv4-best", ROTQUANT),
    "rotquant-w4a4kv4-best-online": Format("rotquant-w4a4kv4-best-online", ROTQUANT),
}
DEFAULT = ("bf16", "w8a8", "w4a16", "rotquant-w4a4kv4", "rotquant-w4a8kv4")


def prepare(work: Path, shape: str | None, model: str | None, variant: str) -> tuple[Path, float]:
    """The folder of one variant of the model, made where it is not there yet.

    Args:
        work: folder in which made models are kept, each under its own name once it is complete.
        shape: key of SHAPES for a random model; model: folder or hub id of a real one, which wins over `shape`.
        variant: bf16, a key of STOCK, rotquant-w4a4kv4 or rotquant-w4a8kv4, or one of these with a key of TAKEN behind.
    Returns:
        the folder, and the seconds it took to make it (of an earlier run, where it was there already).
    """
    if model and variant == "bf16":
        return fetch(model), 0.0
    name = Path(model).name if model else str(shape)
    output, note = work / name / variant, work / name / f"{variant}.seconds"
    if not output.exists():
        base = None if variant == "bf16" else prepare(work, shape, model, "bf16")[0]
        say(f"making {output}")
        started = time.monotonic()
        output.parent.mkdir(parents=True, exist_ok=True)
        if base is None:
            _renamed(output, lambda partial: write_random(SHAPES[str(shape)], partial))
        elif variant in STOCK:
            _renamed(output, lambda partial: write_rounded(base, variant, partial))
        else:
            bits = ("activations.bits=8", "activations.clip=1.0") if "w4a8" in variant else ("activations.bits=4",)
            settings = [*CHEAP, *bits, *taken(variant.partition("kv4-")[2])]
            quantize(str(base), output, recipe="quarot", settings=settings, resume=True, **FEW)
        note.write_text(f"{time.monotonic() - started:.1f}\n")
    return output, float(note.read_text()) if note.exists() else 0.0


def taken(recipe: str) -> list[str]:
    """What the candidates set that TAKEN names of a recipe, as `key=value`; nothing for a recipe that is not in it."""
    choose = load_recipe(recipe).choose if recipe in TAKEN else None
    return [f"{k}={v}" for name in TAKEN[recipe] for k, v in choose.candidates[name].items()] if choose else []


def size_on_disk(folder: Path) -> int:
    """Bytes of a model's safetensors files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _renamed(output: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder under another name first, so that a folder that is there is complete."""
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    partial.rename(output)


# ---- the random model -------------------------------------------------------------------------------


def write_random(shape: dict[str, Any], folder: Path) -> None:
    """A random bf16 model with the demo model's tokenizer, one file a layer."""
    from transformers import AutoConfig

    copy_companions(DATA / "demo", folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["model_max_length"] = shape["max_position_embeddings"]
    save_text(folder / "tokenizer_config.json", json.dumps(tokenizer, indent=2) + "\n")
    known = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    AutoConfig.for_model(**(COMMON | shape)).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    # Read back, so that the tensors are those of the config as vLLM will read it.
    shapes = expected_shapes(AutoConfig.from_pretrained(folder))

    def value(name: str) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shapes[name], dtype=torch.bfloat16)
        tensor = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, STANDARD_DEVIATION, generator=generator)
        if name == EMBEDDING:  # zero logits beyond the tokenizer's ids: every greedy token has a text
            tensor[max(known.values()) + 1 :] = 0
        return tensor

    _write_shards(folder, list(shapes), lambda name: {name: value(name)}, "random weights")


# ---- the formats that stock vLLM runs on a CPU ------------------------------------------------------

# Ours -> compressed-tensors' name of the scheme, its format, and whether lm_head is quantized too.
STOCK = {
    "w8a8": ("W8A8", "int-quantized", False),
    "w8a8-head8": ("W8A8", "int-quantized", True),
    "w4a16": ("W4A16", "pack-quantized", False),
}


def write_rounded(base: Path, variant: str, folder: Path) -> None:
    """A compressed-tensors checkpoint of `base` by round-to-nearest; the embeddings stay as they are."""
    preset, form, head = STOCK[variant]
    scheme = preset_name_to_scheme(preset, ["Linear", LM_HEAD_MODULE] if head else ["Linear"])
    source = Source(base)
    names = list(source.files)
    assert scheme.weights is not None
    if scheme.weights.group_size:  # 128, or what of it divides the inputs of every linear
        inputs = [source.shapes[name][1] for name in names if name.endswith("_proj.weight")]
        scheme.weights.group_size = math.gcd(scheme.weights.group_size, *inputs)
    quantization = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=[] if head else [LM_HEAD_MODULE], format=form,
        quantization_status="compressed",
    )  # fmt: skip
    if head and LM_HEAD not in names:  # tied to the embeddings
        names.append(LM_HEAD)

    def tensors(name: str) -> dict[str, Tensor]:
        weight = source.get(name if name in source.files else EMBEDDING)
        quantized = name.endswith("_proj.weight") or (head and name == LM_HEAD)
        return rounded(name, weight, scheme, form) if quantized else {name: weight}

    copy_companions(base, folder)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = quantization.model_dump(mode="json", exclude_none=True)
    config["tie_word_embeddings"] = config["tie_word_embeddings"] and not head
    save_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    _write_shards(folder, names, tensors, variant)


def rounded(name: str, weight: Tensor, scheme: QuantizationScheme, form: str) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds for one quantized weight."""
    assert scheme.weights is not None
    weights = WeightFormat(scheme.weights.num_bits, scheme.weights.group_size or 0)
    scale = rtn.weight_scale(weight, weights, weight.dtype)
    codes = weights.quantize(weight, scale)
    stored = {f"{name}_scale": scale.to(weight.dtype)}
    if form == "int-quantized":
        return stored | {name: codes}
    shape = torch.tensor(weight.shape)
    return stored | {f"{name}_packed": weights.pack(codes), f"{name}_shape": shape}


def _write_shards(folder: Path, names: list[str], tensors: Callable[[str], dict[str, Tensor]], title: str) -> None:
    """Writes what `tensors` gives for each name, one file a layer and one for the rest: a layer in memory at a time."""
    shards = list(_by_layer(names))
    written: dict[str, str] = {}
    with Progress(title, len(shards)) as progress:
        for number, group in enumerate(shards, start=1):
            made = {key: tensor for name in group for key, tensor in tensors(name).items()}
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_tensors(folder / file, made)
            written |= dict.fromkeys(made, file)
            progress.step()
    write_index(folder, written)


def _by_layer(names: list[str]) -> Iterator[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        found = LAYER.match(name)
        groups.setdefault(found[0] if found else "", []).append(name)
    yield from groups.values()
