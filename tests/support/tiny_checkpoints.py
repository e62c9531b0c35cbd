"""Tiny random models, and checkpoints of them written by hand: no code of the quantizer takes part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rotquant_kernels import convention, reference

HEAD, INTERMEDIATE, BLOCK, VOCAB = 16, 96, 32, 128
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": False, "head_dim": HEAD}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": HEAD}),
}


def tiny_model(kind: str) -> PreTrainedModel:
    """Random float32 model with grouped-query attention whose biases and norm gains matter too."""
    config_class, model_class, extra = KINDS[kind]
    torch.manual_seed(1)
    model = model_class(
        config_class(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=INTERMEDIATE, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
            bos_token_id=1, eos_token_id=None, pad_token_id=0, **extra,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def write_checkpoint(
    folder: Path,
    kind: str = "llama",
    *,
    act_bits: int = 4,
    act_symmetric: bool = True,
    group: int = 0,
    clip: float = 1.0,
    kv: str = "none",
    r3: bool = False,
    r4: str = "none",
    lm_head: bool = False,
    shards: int = 1,
) -> Path:
    """A checkpoint in rotquant's format.

    Args:
        act_bits, act_symmetric, clip: of the linears' inputs; clip of the KV cache too.
        group: inputs that share a weight scale, 0 for one scale per output channel.
        kv: "none", "symmetric" or "asymmetric".
        r3: Hadamard on queries and keys.
        r4: transform before down_proj: "none", "hadamard" or "dense".
        lm_head: 8-bit output layer.
    """
    model = tiny_model(kind)
    matrix = torch.linalg.qr(torch.randn(BLOCK, BLOCK)).Q
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or (name == "lm_head" and not lm_head):
            continue
        weight = tensors.pop(f"{name}.weight")
        if name.endswith("down_proj") and r4 != "none":  # x T (W T)ᵀ = x Wᵀ for an orthogonal T
            weight = reference.online_stage(weight, r4, BLOCK, matrix)
            marker = reference.hadamard(torch.eye(BLOCK), BLOCK)
            tensors[f"{name}.R4_input.weight"] = (matrix if r4 == "dense" else marker).clone()
        tensors |= pack(name, weight, 8 if name == "lm_head" else 4, group)
    config = model.config.to_dict() | {"tie_word_embeddings": False, "dtype": "float32"}
    config["architectures"] = [type(model).__name__]
    config["quantization_config"] = quantization_config(act_bits, act_symmetric, group, kv, r3, r4, lm_head)
    config["rotquant"] = {
        "format_version": 1,
        "activation_clip": {"default": clip},
        "kv_clip": {"key": clip, "value": clip},
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_shards(folder, tensors, shards)
    return folder


def pack(name: str, weight: Tensor, bits: int, group: int) -> dict[str, Tensor]:
    """Round-to-nearest weight [N, K] as compressed-tensors stores it."""
    rows = weight.unflatten(1, (-1, group or weight.shape[1]))
    scale, zero = convention.qparams(rows, bits, symmetric=True)
    codes = convention.quantize(rows, scale, zero, bits).flatten(1)
    return {
        f"{name}.weight_packed": convention.pack_int32(codes, bits),
        f"{name}.weight_scale": scale.squeeze(-1),
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }


def quantization_config(
    act_bits: int, act_symmetric: bool, group: int, kv: str, r3: bool, r4: str, lm_head: bool
) -> dict[str, Any]:
    def scheme(target: str, weight_bits: int, input_bits: int) -> dict[str, Any]:
        strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
        return {
            "targets": [target],
            "format": "pack-quantized",
            "weights": {"num_bits": weight_bits, "type": "int", "symmetric": True, **strategy},
            "input_activations": {
                "num_bits": input_bits, "type": "int", "symmetric": act_symmetric, "strategy": "token", "dynamic": True,
            },
        }  # fmt: skip

    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme("Linear", 4, act_bits)},
        "ignore": [] if lm_head else ["lm_head"],
    }
    if lm_head:
        config["config_groups"]["group_1"] = scheme("lm_head", 8, 8)
    if kv != "none":
        config["kv_cache_scheme"] = {
            "num_bits": 4, "type": "int", "symmetric": kv == "symmetric", "strategy": "group", "group_size": HEAD,
            "dynamic": True,
        }  # fmt: skip
    transforms: dict[str, Any] = {}
    if r4 != "none":
        kind = "hadamard" if r4 == "hadamard" else "random-matrix"
        apply = [{"targets": ["re:.*down_proj$"], "location": "input"}]
        transforms["R4"] = {"type": kind, "head_dim": BLOCK, "apply": apply}
    if r3:
        apply = [{"targets": ["re:.*self_attn$"], "location": where} for where in ("q_attn", "k_cache")]
        transforms["R3"] = {"type": "hadamard", "head_dim": HEAD, "apply": apply}
    if transforms:
        config["transform_config"] = {"config_groups": transforms}
    return config


def save_shards(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """model.safetensors, or shards with an index."""
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        part = {name: t for name, t in tensors.items() if weight_map[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_config(folder: Path, *keys: str, value: Any) -> None:
    """Sets one field of config.json, named by the keys that lead to it."""
    config = json.loads((folder / "config.json").read_text())
    place = config
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changes the tensors of model.safetensors in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
