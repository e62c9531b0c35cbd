"""The model card: what the checkpoint is, what it cost, and the commands to use it."""

from __future__ import annotations

from pathlib import Path

from rotquant.checkpoint.journal import Journal
from rotquant.checkpoint.source import save_text
from rotquant.checkpoint.writer import input_transforms
from rotquant.models import Architecture
from rotquant.recipe import Recipe
from rotquant.text import Calibrated
from rotquant.transforms.space import Transforms
from rotquant_kernels.reference import kv_token_bytes

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
    output: Path, journal: Journal, recipe: Recipe, arch: Architecture, transforms: Transforms, profile: str,
    calibrated: Calibrated | None, size: int, before: int,
) -> None:  # fmt: skip
    """README.md of the model: recipe, numbers, and the commands to use it."""
    errors = [e for i in range(arch.layers) for e in journal.facts(f"layer {i}")["errors"]]
    kv, weights, act = recipe.kv, recipe.weights, recipe.activations
    heads = sum(kind.attention.kv_heads for kind in arch.kinds)
    kv_bytes, kv4 = 2 * heads * arch.head_dim * 2, heads * kv_token_bytes(arch.head_dim, kv.symmetric)
    online = [f"R3: Hadamard {transforms.r3} on queries and keys"] if transforms.r3 else []
    down = arch.kinds[0].mlp.down.rpartition(".")[2]
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
        size=size / 1e6,
        before=before / 1e6,
        gate=journal.facts("gate")["distance"],
        portable="" if profile == "full" else "\nThis is the `portable` profile: transformers with compressed-tensors"
        " loads it as it is, and stock vLLM runs it with 16-bit activations.",
    )  # fmt: skip
    save_text(journal.folder / "README.md", text)
