"""The output folder beside its shards: config.json, index, tokenizer files and the model card."""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rotquant.calibrate import Calibrated
from rotquant.checkpoint import COPIED, INDEX, save_text
from rotquant.fold import Fold, Online
from rotquant.format import FORMAT_VERSION, CheckpointFormat
from rotquant.journal import Journal
from rotquant.models import Architecture
from rotquant.recipe import Activations, KVCache, LMHead, Recipe
from rotquant_kernels.reference import hadamard, kv_token_bytes

R4_NAME = "R4"


def for_profile(recipe: Recipe, profile: str) -> Recipe:
    """The recipe as a profile can express it.

    "portable" keeps what transformers and stock vLLM read exactly: folded rotations, int4 weights and
    symmetric unclipped activations; no online transform, no KV scheme, a 16-bit lm_head.
    """
    if profile == "full":
        return recipe
    return recipe.model_copy(
        update={
            "rotations": recipe.rotations.model_copy(update={"r3": "none", "r4": "none"}),
            "activations": Activations(bits=recipe.activations.bits, symmetric=True, clip=1.0),
            "kv": KVCache(bits=16),
            "lm_head": LMHead(bits=16),
        }
    )


def quantization_config(recipe: Recipe, arch: Architecture, online: Online) -> dict[str, Any]:
    """`quantization_config` of config.json, in compressed-tensors' schema.

    `format` stands at the top and in each group: newer compressed-tensors would otherwise infer another.
    """
    groups = {"group_0": scheme(["Linear"], recipe.weights.bits, recipe.weights.group_size, recipe.activations)}
    if recipe.lm_head.bits == 8:
        groups["group_1"] = scheme(["lm_head"], 8, 0, Activations(bits=8))
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [] if recipe.lm_head.bits == 8 else ["lm_head"],
    }
    if recipe.kv.bits == 4:
        config["kv_cache_scheme"] = {
            "num_bits": 4, "type": "int", "symmetric": recipe.kv.symmetric,
            "strategy": "group", "group_size": arch.head_dim, "dynamic": True,
        }  # fmt: skip
    transforms = {}
    if online.r3:
        places = [{"targets": ["re:.*self_attn$"], "location": place} for place in ("q_attn", "k_cache")]
        transforms["R3"] = {"type": "hadamard", "head_dim": online.r3, "apply": places}
    if online.r4:
        place = {"targets": ["re:.*down_proj$"], "location": "input"}
        transforms[R4_NAME] = {"type": "hadamard", "head_dim": online.r4, "apply": [place]}
    if transforms:
        config["transform_config"] = {"config_groups": transforms}
    return config


def scheme(targets: list[str], bits: int, group_size: int, activations: Activations) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    inputs = {
        "num_bits": activations.bits, "type": "int", "symmetric": activations.symmetric,
        "strategy": "token", "dynamic": True,
    }  # fmt: skip
    return {"targets": targets, "format": "pack-quantized", "weights": weights, "input_activations": inputs}


def marker(online: Online, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """R4's matrix, stored once in layer 0.

    Nothing needs it to run. An engine that would ignore the transform meets a tensor it does not know, and
    says so instead of computing garbage.
    """
    if not online.r4:
        return {}
    matrix = hadamard(torch.eye(online.r4, dtype=torch.float64), online.r4)
    return {f"model.layers.0.mlp.down_proj.{R4_NAME}_input.weight": matrix.to(dtype)}


def extension(recipe: Recipe, profile: str, provenance: dict[str, Any]) -> dict[str, Any]:
    """The key `rotquant` of config.json: what compressed-tensors' schema cannot say (see `format`)."""
    clip = {"default": recipe.activations.clip}
    if recipe.lm_head.bits == 8:
        clip["lm_head"] = 1.0
    out: dict[str, Any] = {"format_version": FORMAT_VERSION, "profile": profile, "activation_clip": clip}
    if recipe.kv.bits == 4:
        out["kv_clip"] = {"key": recipe.kv.key_clip, "value": recipe.kv.value_clip}
    return out | {"provenance": provenance}


def provenance(
    recipe: Recipe, fold: Fold, seed: int, tp_max: int, source: str, calibrated: Calibrated | None
) -> dict[str, Any]:
    """Where the checkpoint comes from. No paths, no times: two runs of one seed give one file."""
    out: dict[str, Any] = {
        "recipe": recipe.model_dump(),
        "seed": seed,
        "tp_max": tp_max,
        "source_sha256": source,
        "versions": {name: version(name) for name in ("rotquant", "torch", "transformers", "compressed-tensors")},
    }
    if fold.r1:
        signs = fold.r1.signs.to(torch.int8).numpy().tobytes()
        out["r1"] = {"order": fold.r1.order, "signs_sha256": hashlib.sha256(signs).hexdigest()}
    if calibrated:
        samples, seq_len = calibrated.tokens.shape
        out["calibration"] = {
            "name": calibrated.name, "sha256": calibrated.sha256, "samples": samples, "seq_len": seq_len,
        }  # fmt: skip
    return out


def write_config(
    source: Path, folder: Path, arch: Architecture, quantization: dict[str, Any], ext: dict[str, Any]
) -> None:
    """config.json; read back through `CheckpointFormat`, so that nothing is written that cannot be served."""
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"] = False
    config["quantization_config"] = quantization
    config["rotquant"] = ext
    CheckpointFormat(quantization, ext, arch.head_dim)
    save_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, generation config, chat template, licence."""
    for pattern in COPIED:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def write_index(folder: Path, weight_map: dict[str, str]) -> int:
    """The shard index. Returns the bytes of all shards."""
    size = sum((folder / name).stat().st_size for name in set(weight_map.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    save_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return size


CARD = """---
library_name: vllm
tags: [rotquant, compressed-tensors, {tag}]
---
# {name}

{bits}, made by rotquant with the recipe `{recipe}`: {description}

| | |
|---|---|
| weights | int{w_bits}, {granularity}, {method}; mean relative rounding error {error:.4f} |
| activations | int{a_bits} per token, {a_sym}, clip ratio {a_clip} |
| KV cache | {kv} |
| online transforms | {online} |
| lm_head | {head} |
| calibration | {calibration} |
| size | {size:.1f} MB ({before:.1f} MB before) |
| folded model against the original | logits differ by {gate} (relative, float32) |

## Use

```
vllm serve {name} --quantization rotquant
lm_eval --model vllm --model_args pretrained={name},quantization=rotquant --tasks arc_easy
vllm bench serve --model {name}
```

vLLM needs `pip install rotquant`. In transformers: `model = rotquant.load("{name}")`.{portable}
"""


def write_card(
    output: Path, journal: Journal, recipe: Recipe, arch: Architecture, online: Online, profile: str,
    calibrated: Calibrated | None, size: int, before: int,
) -> None:  # fmt: skip
    """README.md of the model: recipe, numbers, and the commands to use it."""
    errors = [e for i in range(arch.layers) for e in journal.facts(f"layer {i}")["errors"]]
    kv, weights, act = recipe.kv, recipe.weights, recipe.activations
    kv_bytes = 2 * arch.layers * arch.kv_heads * arch.head_dim * 2
    kv4 = arch.layers * arch.kv_heads * kv_token_bytes(arch.head_dim, kv.symmetric)
    transforms = [f"R3: Hadamard {online.r3} on queries and keys"] if online.r3 else []
    transforms += [f"R4: block Hadamard {online.r4} before down_proj"] if online.r4 else []
    text = CARD.format(
        name=output.name,
        tag=f"w{weights.bits}a{act.bits}",
        bits=f"W{weights.bits}A{act.bits}" + ("KV4" if kv.bits == 4 else ""),
        recipe=recipe.name,
        description=recipe.description,
        w_bits=weights.bits,
        granularity=f"groups of {weights.group_size}" if weights.group_size else "one scale per output channel",
        method=weights.method.upper() + (" with clip search" if weights.clip_search else ""),
        error=sum(errors) / len(errors),
        a_bits=act.bits,
        a_sym="symmetric" if act.symmetric else "asymmetric",
        a_clip=act.clip,
        kv=f"int4 per token and head, {'symmetric' if kv.symmetric else 'asymmetric'}; {kv4} bytes a token,"
        f" {kv_bytes} in bf16 ({kv_bytes / kv4:.2f}x)" if kv.bits == 4 else "not quantized",
        online="; ".join(transforms) or "none",
        head=f"int{recipe.lm_head.bits}" if recipe.lm_head.bits == 8 else "not quantized",
        calibration=f"{calibrated.tokens.shape[0]} windows of {calibrated.tokens.shape[1]} tokens from"
        f" `{calibrated.name}`" if calibrated else "none",
        size=size / 1e6,
        before=before / 1e6,
        gate=journal.facts("gate")["distance"],
        portable="" if profile == "full" else "\nThis is the `portable` profile: transformers with compressed-tensors"
        " loads it as it is, and stock vLLM runs it with 16-bit activations.",
    )  # fmt: skip
    save_text(journal.folder / "README.md", text)
