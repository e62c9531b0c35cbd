"""What a checkpoint says and holds, from what was decided: config.json, the names of a layer's tensors, the index.

The other direction is `format` (config.json), `extension` (its key `rotquant`) and `stored` (tensors of transforms).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rotquant.checkpoint.extension import BasisFile
from rotquant.checkpoint.format import FORMAT_VERSION, CheckpointFormat
from rotquant.checkpoint.schemes import kv_scheme, linear_scheme
from rotquant.checkpoint.source import INDEX, save_text
from rotquant.checkpoint.stored import stored_stage
from rotquant.models import Architecture, Layer, Tensors
from rotquant.models.text_half import text_half
from rotquant.recipe import Recipe
from rotquant.text import Calibrated
from rotquant.transforms.space import Transforms
from rotquant_kernels import KINDS
from rotquant_kernels.formats import WeightFormat
from rotquant_kernels.reference import hadamard

HADAMARDS = {"attn": "HAttn", "o": "R2", "mlp": "HMlp", "down": "R4"}  # names of those that come first at a site


def quantization_config(recipe: Recipe, arch: Architecture, transforms: Transforms) -> dict[str, Any]:
    """`quantization_config` of config.json, in compressed-tensors' schema.

    `format` stands at the top and in each group: newer compressed-tensors would otherwise infer another.
    """
    schemes = linear_schemes(recipe, arch, transforms)
    if head := recipe.lm_head.form:
        schemes.append(linear_scheme(["lm_head"], head, recipe.lm_head.rows))
    groups = {f"group_{i}": scheme for i, scheme in enumerate(schemes)}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ([] if head else ["lm_head"])
        + patterns(name for kind in arch.kinds for names in kind.full_precision.values() for name in names),
    }
    if kv := recipe.kv.form():
        config["kv_cache_scheme"] = kv_scheme(kv, arch.head_dim)
    declared = {}
    if transforms.r3:
        attention = patterns(kind.attention.module for kind in arch.kinds if kind.attends)
        places = [{"targets": attention, "location": place} for place in ("q_attn", "k_cache")]
        declared["R3"] = {"type": "hadamard", "head_dim": transforms.r3, "apply": places}
    for site, name in HADAMARDS.items():
        if block := transforms.hadamard(site):
            place = {"targets": site_patterns(arch, site), "location": "input"}
            declared[name] = {"type": "hadamard", "head_dim": block, "apply": [place]}
    if declared:
        config["transform_config"] = {"config_groups": declared}
    return config


def linear_schemes(recipe: Recipe, arch: Architecture, transforms: Transforms) -> list[dict[str, Any]]:
    """The groups of the layers' linears: the class means those of the recipe, names the others."""
    usual, weights = recipe.activations.rows, recipe.weights
    named: dict[tuple[WeightFormat, int], list[str]] = {}
    for index, (kind, layer) in enumerate(zip(arch.kinds, transforms.layers, strict=True)):
        for linear, parts in kind.stored.items():
            site = kind.site_of[parts[0]]
            form = layer.weights(site, weights), layer.rows(site, usual).bits
            named.setdefault(form, []).append(arch.layer_prefix(index) + linear)
    most, *others = sorted(named, key=lambda form: form != (weights.form, usual.bits))
    targets = {most: ["Linear"]} | {form: named[form] for form in others}
    return [linear_scheme(names, form, replace(usual, bits=bits)) for (form, bits), names in targets.items()]


def patterns(modules: Iterable[str]) -> list[str]:
    """Targets that match these modules in every layer, each once."""
    return [f"re:.*{module}$" for module in dict.fromkeys(modules)]


def site_patterns(arch: Architecture, site: str) -> list[str]:
    """Targets that match the linears of a site, by the last part of their names."""
    return patterns(name.rpartition(".")[2] for kind in arch.kinds for name in kind.stored_at(site))


def own_stages(transforms: Transforms, site: str) -> dict[str, int]:
    """Names of a site's stages in the checkpoint, and their places in the chain; the Hadamard is not among them."""
    first = 1 if transforms.hadamard(site) else 0
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
            if KINDS[stage.kind].affine:
                out[f"{linear}.{name}_output.weight"] = stored[f"{linear}.shift"]
    for site, name in HADAMARDS.items() if index == 0 else ():
        if block := transforms.hadamard(site):
            out |= marker(f"{kind.stored_at(site)[0]}.{name}", block, out[f"{kind.mlp.norm}.weight"].dtype)
    return out


def marker(transform: str, block: int, dtype: torch.dtype) -> Tensors:
    """The matrix of a Hadamard before a linear, stored once in layer 0.

    Nothing needs it to run. An engine that would ignore the transform meets a tensor it does not know, and
    says so instead of computing garbage.
    """
    matrix = hadamard(torch.eye(block, dtype=torch.float64), block)
    return {f"{transform}_input.weight": matrix.to(dtype)}


def extension(
    recipe: Recipe, arch: Architecture, transforms: Transforms, profile: str, basis: BasisFile | None,
    provenance: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The key `rotquant` of config.json: what compressed-tensors' schema cannot say (see `extension`)."""
    clip = {"default": recipe.activations.clip}
    if recipe.lm_head.form:
        clip["lm_head"] = recipe.lm_head.rows.clip
    for index, (kind, layer) in enumerate(zip(arch.kinds, transforms.layers, strict=True)):
        for linear, parts in kind.stored.items():
            if kind.site_of[parts[0]] in layer.clips:
                clip[arch.layer_prefix(index) + linear] = layer.clips[kind.site_of[parts[0]]]
    out: dict[str, Any] = {"format_version": FORMAT_VERSION, "profile": profile, "activation_clip": clip}
    if recipe.kv.bits == 4:
        out["kv_clip"] = kv_clip(recipe, arch, transforms)
        out |= {"key_feedback": True} if recipe.kv.key_feedback else {}
    if stages := input_transforms(arch, transforms):
        out["input_transforms"] = stages
    if recipe.weights.rank:
        out["low_rank"] = low_rank(recipe.weights.rank, recipe.weights.subtracts, arch)
    return out | ({"basis": basis.model_dump()} if basis else {}) | {"provenance": provenance}


def low_rank(rank: int, subtracts: bool, arch: Architecture) -> list[dict[str, Any]]:
    """`rotquant.low_rank`: a linear that holds several has the branches of all of them, or the one that they share."""
    names: dict[int, list[str]] = {}
    for kind in arch.kinds:
        for linear, parts in kind.stored.items():
            if subtracts and kind.site_of[parts[0]] not in kind.branch_sites:
                continue
            names.setdefault(rank if subtracts else rank * len(parts), []).append(linear)
    kept = {"subtracts": True} if subtracts else {}
    return [{"rank": total, "targets": patterns(linears)} | kept for total, linears in names.items()]


def kv_clip(recipe: Recipe, arch: Architecture, transforms: Transforms) -> dict[str, Any]:
    """Clip ratios of keys and values, and of the layers that have their own."""
    defaults = {"key": recipe.kv.key_clip, "value": recipe.kv.value_clip}
    own = {
        arch.layer_prefix(index) + arch.kinds[index].attention.module: {
            name: layer.clips.get(name, defaults[name]) for name in defaults
        }
        for index, layer in enumerate(transforms.layers)
        if defaults.keys() & layer.clips.keys() and arch.kinds[index].attends
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
    config = text_half(json.loads((source / "config.json").read_text()))
    config.pop("auto_map", None)  # code of the original, which neither runs nor travels
    config |= arch.served
    config["tie_word_embeddings"] = arch.stays_tied
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
