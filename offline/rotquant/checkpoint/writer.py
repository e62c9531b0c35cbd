"""The output folder beside its shards: config.json, index, tokenizer files and the model card."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rotquant.checkpoint.extension import BasisFile
from rotquant.checkpoint.format import FORMAT_VERSION, CheckpointFormat
from rotquant.checkpoint.journal import Journal
from rotquant.checkpoint.source import INDEX, save_text
from rotquant.models import Architecture, Layer, Tensors
from rotquant.recipe import Activations, KVCache, LMHead, OnlineStages, Recipe
from rotquant.text import Calibrated
from rotquant.transforms.space import Transforms
from rotquant.weights.layerwise import stored_stage
from rotquant_kernels.reference import hadamard, kv_token_bytes

R4_NAME = "R4"


def for_profile(recipe: Recipe, profile: str) -> Recipe:
    """The recipe as a profile can express it.

    "portable" keeps what transformers and stock vLLM read exactly: folded rotations, int4 weights and
    symmetric unclipped activations; no online transform, no low-rank branch, no KV scheme, a 16-bit lm_head.
    """
    if profile == "full":
        return recipe
    return recipe.model_copy(
        update={
            "rotations": recipe.rotations.model_copy(update={"r3": "none", "r4": "none"}),
            "online": OnlineStages(),
            "learn": recipe.learn.without_clips(),
            "weights": recipe.weights.model_copy(update={"rank": 0}),
            "activations": Activations(bits=recipe.activations.bits, symmetric=True, clip=1.0),
            "kv": KVCache(bits=16),
            "lm_head": LMHead(bits=16),
        }
    )


def quantization_config(recipe: Recipe, arch: Architecture, transforms: Transforms) -> dict[str, Any]:
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
        "ignore": ([] if recipe.lm_head.bits == 8 else ["lm_head"])
        + patterns(name for kind in arch.kinds for names in kind.full_precision.values() for name in names),
    }
    if recipe.kv.bits == 4:
        config["kv_cache_scheme"] = {
            "num_bits": 4, "type": "int", "symmetric": recipe.kv.symmetric,
            "strategy": "group", "group_size": arch.head_dim, "dynamic": True,
        }  # fmt: skip
    declared = {}
    if transforms.r3:
        attention = patterns(kind.attention.module for kind in arch.kinds)
        places = [{"targets": attention, "location": place} for place in ("q_attn", "k_cache")]
        declared["R3"] = {"type": "hadamard", "head_dim": transforms.r3, "apply": places}
    if block := transforms.r4_block:
        place = {"targets": site_patterns(arch, "down"), "location": "input"}
        declared[R4_NAME] = {"type": "hadamard", "head_dim": block, "apply": [place]}
    if declared:
        config["transform_config"] = {"config_groups": declared}
    return config


def patterns(modules: Iterable[str]) -> list[str]:
    """Targets that match these modules in every layer, each once."""
    return [f"re:.*{module}$" for module in dict.fromkeys(modules)]


def site_patterns(arch: Architecture, site: str) -> list[str]:
    """Targets that match the linears of a site, by the last part of their names."""
    return patterns(name.rpartition(".")[2] for kind in arch.kinds for name in kind.stored_at(site))


def own_stages(transforms: Transforms, site: str) -> dict[str, int]:
    """Names of a site's stages in the checkpoint, and their places in the chain; R4 is not among them."""
    first = 1 if site == "down" and transforms.r4_block else 0
    return {f"{site.capitalize()}{i}": i for i in range(first, len(transforms.shared_chain(site)))}


def input_transforms(arch: Architecture, transforms: Transforms) -> list[dict[str, Any]]:
    """`rotquant.input_transforms`: the online stages, those of a site in their order."""
    found = []
    for site in arch.kinds[0].sites:
        targets = site_patterns(arch, site)
        for name, i in own_stages(transforms, site).items():
            stage = transforms.shared_chain(site)[i]
            found.append({"name": name, "kind": stage.kind, "block": stage.block, "targets": targets})
    return found


def layer_tensors(stored: Tensors, kind: Layer, transforms: Transforms, index: int) -> Tensors:
    """What a layer's shard holds: the quantizer's tensors under the checkpoint's names, and its online stages'."""
    out = {name: tensor for name, tensor in stored.items() if not name.endswith(".shift")}
    layer = transforms.layers[index]
    for linear, parts in kind.stored.items():
        site = kind.site_of[parts[0]]
        for name, i in own_stages(transforms, site).items():
            stage = layer.inputs[site][i]
            out[f"{linear}.{name}_input.weight"] = stored_stage(stage).clone()  # q, k and v have a copy each
            if stage.kind == "shift":
                out[f"{linear}.{name}_output.weight"] = stored[f"{linear}.shift"]
    if index == 0 and transforms.r4_block:
        out |= marker(kind.sites["down"][0], transforms.r4_block, out[f"{kind.mlp.norm}.weight"].dtype)
    return out


def scheme(targets: list[str], bits: int, group_size: int, activations: Activations) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    inputs = {
        "num_bits": activations.bits, "type": "int", "symmetric": activations.symmetric,
        "strategy": "token", "dynamic": True,
    }  # fmt: skip
    return {"targets": targets, "format": "pack-quantized", "weights": weights, "input_activations": inputs}


def marker(linear: str, block: int, dtype: torch.dtype) -> Tensors:
    """R4's matrix before a linear, stored once in layer 0.

    Nothing needs it to run. An engine that would ignore the transform meets a tensor it does not know, and
    says so instead of computing garbage.
    """
    matrix = hadamard(torch.eye(block, dtype=torch.float64), block)
    return {f"{linear}.{R4_NAME}_input.weight": matrix.to(dtype)}


def extension(
    recipe: Recipe, arch: Architecture, transforms: Transforms, profile: str, basis: BasisFile | None,
    provenance: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The key `rotquant` of config.json: what compressed-tensors' schema cannot say (see `format`)."""
    clip = {"default": recipe.activations.clip}
    if recipe.lm_head.bits == 8:
        clip["lm_head"] = 1.0
    for index, (kind, layer) in enumerate(zip(arch.kinds, transforms.layers, strict=True)):
        for linear, parts in kind.stored.items():
            if kind.site_of[parts[0]] in layer.clips:
                clip[arch.layer_prefix(index) + linear] = layer.clips[kind.site_of[parts[0]]]
    out: dict[str, Any] = {"format_version": FORMAT_VERSION, "profile": profile, "activation_clip": clip}
    if recipe.kv.bits == 4:
        out["kv_clip"] = kv_clip(recipe, arch, transforms)
    if stages := input_transforms(arch, transforms):
        out["input_transforms"] = stages
    if recipe.weights.rank:
        out["low_rank"] = low_rank(recipe.weights.rank, arch)
    return out | ({"basis": basis.model_dump()} if basis else {}) | {"provenance": provenance}


def low_rank(rank: int, arch: Architecture) -> list[dict[str, Any]]:
    """`rotquant.low_rank`: a linear that holds several has the branches of all of them."""
    names: dict[int, list[str]] = {}
    for kind in arch.kinds:
        for linear, parts in kind.stored.items():
            names.setdefault(rank * len(parts), []).append(linear)
    return [{"rank": total, "targets": patterns(linears)} for total, linears in names.items()]


def kv_clip(recipe: Recipe, arch: Architecture, transforms: Transforms) -> dict[str, Any]:
    """Clip ratios of keys and values, and of the layers that have their own."""
    defaults = {"key": recipe.kv.key_clip, "value": recipe.kv.value_clip}
    own = {
        arch.layer_prefix(index) + arch.kinds[index].attention.module: {
            name: layer.clips.get(name, defaults[name]) for name in defaults
        }
        for index, layer in enumerate(transforms.layers)
        if defaults.keys() & layer.clips.keys()
    }
    return defaults | ({"layers": own} if own else {})


def provenance(recipe: Recipe, seed: int, tp_max: int, source: str, calibrated: Calibrated | None) -> dict[str, Any]:
    """Where the checkpoint comes from. No paths, no times: two runs of one seed give one file."""
    out: dict[str, Any] = {
        "recipe": recipe.model_dump(),
        "seed": seed,
        "tp_max": tp_max,
        "source_sha256": source,
        "versions": {name: version(name) for name in ("rotquant", "torch", "transformers", "compressed-tensors")},
    }
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
    config.pop("auto_map", None)  # code of the original, which neither runs nor travels
    config |= arch.served
    config["tie_word_embeddings"] = False
    config["quantization_config"] = quantization
    config["rotquant"] = ext
    CheckpointFormat(quantization, ext, arch.head_dim)
    save_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


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
| calibration | {calibration} |{experts}
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


def experts_rows(layers: list[dict[str, Any] | None]) -> str:
    """Rows of the card's table about the experts of a mixture, "" where there are none."""
    found = {i: facts for i, facts in enumerate(layers) if facts}
    if not found:
        return ""
    error, layer, expert = max((e, i, j) for i, facts in found.items() for j, e in enumerate(facts["errors"]))
    rows = [f"experts | {len(found)} layers; largest rounding error {error:.4f}, expert {expert} of layer {layer}"]
    tokens = [n for facts in found.values() for n in facts["tokens"]]
    if tokens:
        few = sum(len(facts["pooled"]) for facts in found.values())
        share = (
            f"; {few} of {len(tokens)} with fewer than they have inputs, calibrated on other tokens too" if few else ""
        )
        rows.append(f"calibration tokens of an expert | {min(tokens)} to {max(tokens)}{share}")
    agreement = {i: facts["agreement"] for i, facts in found.items() if facts["agreement"] is not None}
    if agreement:
        worst = min(agreement, key=lambda i: agreement[i])
        mean = sum(agreement.values()) / len(agreement)
        rows.append(
            f"routing | {mean:.1%} of the choices are those of the original (first calibration window); least"
            f" {agreement[worst]:.1%}, layer {worst}"
        )
    return "".join(f"\n| {row} |" for row in rows)


def write_card(
    output: Path, journal: Journal, recipe: Recipe, arch: Architecture, transforms: Transforms, profile: str,
    calibrated: Calibrated | None, size: int, before: int,
) -> None:  # fmt: skip
    """README.md of the model: recipe, numbers, and the commands to use it."""
    errors = [e for i in range(arch.layers) for e in journal.facts(f"layer {i}")["errors"]]
    kv, weights, act = recipe.kv, recipe.weights, recipe.activations
    heads = sum(kind.attention.kv_heads for kind in arch.kinds)
    kv_bytes, kv4 = 2 * heads * arch.head_dim * 2, heads * kv_token_bytes(arch.head_dim, kv.symmetric)
    online = [f"R3: Hadamard {transforms.r3} on queries and keys"] if transforms.r3 else []
    down = arch.kinds[0].sites["down"][0].rpartition(".")[2]
    online += [f"R4: block Hadamard {block} before {down}"] if (block := transforms.r4_block) else []
    online += [
        f"{', '.join(t.removeprefix('re:.*').rstrip('$') for t in stage['targets'])}: {stage['kind']} {stage['block']}"
        for stage in input_transforms(arch, transforms)
    ]
    online += [f"rank {weights.rank} branch at every linear"] if weights.rank else []
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
        a_clip="learned for each layer" if any(layer.clips for layer in transforms.layers) else act.clip,
        kv=f"int4 per token and head, {'symmetric' if kv.symmetric else 'asymmetric'}; {kv4} bytes a token,"
        f" {kv_bytes} in bf16 ({kv_bytes / kv4:.2f}x)" if kv.bits == 4 else "not quantized",
        online="; ".join(online) or "none",
        head=f"int{recipe.lm_head.bits}" if recipe.lm_head.bits == 8 else "not quantized",
        calibration=f"{calibrated.tokens.shape[0]} windows of {calibrated.tokens.shape[1]} tokens from"
        f" `{calibrated.name}`" if calibrated else "none",
        experts=experts_rows([journal.facts(f"layer {i}").get("experts") for i in range(arch.layers)]),
        size=size / 1e6,
        before=before / 1e6,
        gate=journal.facts("gate")["distance"],
        portable="" if profile == "full" else "\nThis is the `portable` profile: transformers with compressed-tensors"
        " loads it as it is, and stock vLLM runs it with 16-bit activations.",
    )  # fmt: skip
    save_text(journal.folder / "README.md", text)
