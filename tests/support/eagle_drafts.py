"""EAGLE3 drafts with random weights, and what one makes of the rows that it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

STATES = 3  # rows of the target that `fc` reads


def write_draft(folder: Path, target: Path, *, norm: str = "", own: bool = True, **config: Any) -> Path:
    """A one-layer EAGLE3 draft for the Llama model in `target`.

    Args:
        norm: the norm in front of fc, "fc_norm", "norm_before_fc" or none; own: with embed_tokens and lm_head.
    """
    original = json.loads((target / "config.json").read_text())
    hidden, wide, d = original["hidden_size"], original["intermediate_size"], original["head_dim"]
    heads, kv_heads, vocabulary = (
        original[key] for key in ("num_attention_heads", "num_key_value_heads", "vocab_size")
    )
    random = torch.Generator().manual_seed(5)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random) / shape[-1] ** 0.5

    def gain(size: int) -> Tensor:
        return 1 + 0.3 * torch.randn(size, generator=random)

    layer = "midlayer."
    tensors = {"fc.weight": weight(hidden, STATES * hidden), "norm.weight": gain(hidden)}
    tensors |= {f"{layer}{n}.weight": gain(hidden) for n in ("input_layernorm", "hidden_norm")}
    tensors[f"{layer}post_attention_layernorm.weight"] = gain(hidden)
    for name, rows in (("q", heads * d), ("k", kv_heads * d), ("v", kv_heads * d)):
        tensors[f"{layer}self_attn.{name}_proj.weight"] = weight(rows, 2 * hidden)
    tensors[f"{layer}self_attn.o_proj.weight"] = weight(hidden, heads * d)
    tensors |= {f"{layer}mlp.{name}_proj.weight": weight(wide, hidden) for name in ("gate", "up")}
    tensors[f"{layer}mlp.down_proj.weight"] = weight(hidden, wide)
    if norm == "fc_norm":
        tensors |= {f"fc_norm.{i}.weight": gain(hidden) for i in range(STATES)}
        config["fc_norm"] = True
    elif norm == "norm_before_fc":
        tensors["input_norm.weight"] = gain(STATES * hidden)
        config["norm_before_fc"] = True
    if own:
        tensors |= {"embed_tokens.weight": weight(vocabulary, hidden), "lm_head.weight": weight(vocabulary, hidden)}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = original | {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1} | config
    for key in ("quantization_config", "rotquant", "layer_types"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config | {"draft_vocab_size": vocabulary}))
    return folder


def combined(folder: Path, rows: Tensor) -> Tensor:
    """What a draft's layer gets of its target's rows [T, states, hidden], float64."""
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}

    def normed(x: Tensor) -> Tensor:
        return x * x.pow(2).mean(-1, keepdim=True).rsqrt()

    if "fc_norm.0.weight" in tensors:
        rows = normed(rows) * torch.stack([tensors[f"fc_norm.{i}.weight"] for i in range(STATES)])
    x = rows.flatten(1)
    if "input_norm.weight" in tensors:
        x = normed(x) * tensors["input_norm.weight"]
    return x @ tensors["fc.weight"].T
