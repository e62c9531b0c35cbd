"""The model card: what the checkpoint is, what it cost, and the commands to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rotquant.checkpoint.journal import Journal
from rotquant.checkpoint.source import save_text
from rotquant.checkpoint.writer import HADAMARDS, input_transforms
from rotquant.models import Architecture
from rotquant.recipe import Recipe
from rotquant.recipes.schemes import SPEED, suits
from rotquant.text import Calibrated
from rotquant.transforms.space import Transforms
from rotquant_kernels.formats import KVFormat

CARD = """---
library_name: vllm
tags: [rotquant, compressed-tensors, {tag}]
---
# {name}

{bits}, made by rotquant with the recipe `{recipe}`: {description}

| | |
|---|---|
| weights | {weights}, {granularity}, {method}; mean relative rounding error {error:.4f} |
| activations | {rows} per token, {symmetry}, clip ratio {a_clip} |{wide}{target}
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

{speed}.

vLLM needs `pip install rotquant`. In transformers: `model = rotquant.load("{name}")`.{portable}
"""


def write_card(
    output: Path, journal: Journal, recipe: Recipe, arch: Architecture, transforms: Transforms, profile: str,
    calibrated: Calibrated | None, size: int, before: int, chosen: str = "",
) -> None:  # fmt: skip
    """README.md of the model: recipe, numbers, the commands to use it, and how the recipe was `chosen`, if it was."""
    errors = [e for i in range(arch.layers) for e in journal.facts(f"layer {i}")["errors"]]
    weights, act = recipe.weights, recipe.activations
    online = [f"R3: Hadamard {transforms.r3} on queries and keys"] if transforms.r3 else []
    for site, label in HADAMARDS.items():
        if block := transforms.hadamard(site):
            behind = dict.fromkeys(kind.sites[site][0].rpartition(".")[2] for kind in arch.kinds)
            online.append(f"{label}: block Hadamard {block} before {', '.join(behind)}")
    online += [
        f"{', '.join(t.removeprefix('re:.*').rstrip('$') for t in stage['targets'])}: {stage['kind']} {stage['block']}"
        for stage in input_transforms(arch, transforms)
    ]
    where = "attention and in layers without experts" if weights.subtracts and arch.mixtures else "every linear"
    of_inputs = ", of its inputs' leading directions, which are not rounded" if weights.subtracts else ""
    online += [f"rank {weights.rank} branch at {where}{of_inputs}"] if weights.rank else []
    there = " (its experts with 16-bit activations)" if arch.mixtures else ""
    also = weights.wide_bits not in (None, weights.bits)
    wide = wide_row(arch, transforms, also)
    mixed = f" ({f'W{weights.wide_bits}' if also else ''}A8 at some sites)" if wide else ""
    text = CARD.format(
        name=output.name,
        tag=f"w{weights.bits}a{act.bits}",
        bits=f"W{weights.bits}A{act.bits}" + ("KV4" if recipe.kv.form() else "") + mixed,
        recipe=recipe.name,
        description=recipe.description,
        weights=weights.form,
        granularity=f"groups of {weights.group_size}" if weights.group_size else "one scale per output channel",
        method=weights.method.upper() + (" with clip search" if weights.clip_search else ""),
        error=sum(errors) / len(errors),
        rows=act.rows,
        wide=wide,
        target=f"\n| made for | {suited} |" if (suited := suits(recipe)) else "",
        speed=SPEED,
        symmetry=act.rows.symmetry,
        a_clip="learned for each layer" if any(layer.clips.keys() - layer.bits for layer in transforms.layers)
        else act.clip,
        kv=cache_line(recipe.kv.form(), arch),
        online="; ".join(online) or "none",
        head=recipe.lm_head.form or "not quantized",
        calibration=f"{calibrated.tokens.shape[0]} windows of {calibrated.tokens.shape[1]} tokens from"
        f" `{calibrated.name}`" if calibrated else "none",
        experts=experts_rows([journal.facts(f"layer {i}").get("experts") for i in range(arch.layers)]),
        size=size / 1e6,
        before=before / 1e6,
        gate=journal.facts("gate")["distance"],
        portable="" if profile == "full" else "\nThis is the `portable` profile: transformers with compressed-tensors"
        f" loads it as it is{there}, and stock vLLM runs it with 16-bit activations.",
    )  # fmt: skip
    save_text(journal.folder / "README.md", text + (f"\n{chosen}" if chosen else ""))


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


def wide_row(arch: Architecture, transforms: Transforms, weights: bool) -> str:
    """The table's row of the sites whose activations, and `weights`, have other bits than the recipe says; or ""."""
    found: dict[str, list[int]] = {}
    for index, layer in enumerate(transforms.layers):
        for site in layer.bits:
            found.setdefault(site, []).append(index)
    if not found:
        return ""
    sites, layers = sum(len(kind.sites) for kind in arch.kinds), sum(map(len, found.values()))
    where = "; ".join(f"`{site}` of layers {', '.join(map(str, at))}" for site, at in found.items())
    what = "8-bit activations" + (" and weights" if weights else "")
    return f"\n| {what} | at {layers} of {sites} sites, where 4 bits did most damage: {where} |"


def cache_line(kv: KVFormat | None, arch: Architecture) -> str:
    """What a token's K and V of all layers take."""
    if kv is None:
        return "not quantized"
    ours = sum(own.kv_heads * kv.token_bytes(own.head_dim) for own in arch.attentions.values())
    theirs = sum(own.kv_heads * own.head_dim * 4 for own in arch.attentions.values())
    what = f"{kv.key} per token and head, {kv.key.symmetry}{', keys with error feedback' if kv.feedback else ''}"
    return f"{what}; {ours} bytes a token, {theirs} in bf16 ({theirs / ours:.2f}x)"
