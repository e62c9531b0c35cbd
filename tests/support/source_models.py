"""Full-precision model folders for the quantizer's tests, with the demo model's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from rotquant.data import DATA
from rotquant.models.harden import harden
from rotquant.recipes import load_recipe

HELDOUT = DATA / "heldout.txt"
SMALL = {"samples": 16, "seq_len": 512}  # calibration that is enough for the demo model
VOCABULARY = 2056  # 2048 of the demo model's tokenizer, one that transformers adds for Qwen2, and some of no token
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": False, "head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 16}),
}
# Families that differ from Llama in what a layer computes; sizes and scalars such that each difference matters.
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "smollm3": (
        SmolLM3Config,
        SmolLM3ForCausalLM,
        {"no_rope_layer_interval": 2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "granite": (
        GraniteConfig,
        GraniteForCausalLM,
        {
            "embedding_multiplier": 6.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
    ),
    "granite4": (
        GraniteMoeHybridConfig,
        GraniteMoeHybridForCausalLM,
        {
            "hidden_size": 128, "embedding_multiplier": 6.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3,
            "logits_scaling": 2.0, "num_local_experts": 0, "shared_intermediate_size": 176, "mamba_n_heads": 4,
            "position_embedding_type": "rope", "layer_types": ["attention", "attention"],
        },
    ),
    "phi3": (
        Phi3Config,
        Phi3ForCausalLM,
        {
            "hidden_size": 128, "pad_token_id": None, "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
        },
    ),
    "ministral": (
        MinistralConfig,
        MinistralForCausalLM,
        {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": False},
    ),
    "ministral3": (
        Ministral3Config,
        Ministral3ForCausalLM,
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 32,
                "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3,
            },
        },
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_topk_prob": True,
            "decoder_sparse_step": 2,
        },
    ),
    "qwen2_moe": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        {
            "hidden_size": 128, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
            "norm_topk_prob": False, "shared_expert_intermediate_size": 80,
        },
    ),
    "mixtral": (
        MixtralConfig,
        MixtralForCausalLM,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 112},
    ),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {
            "hidden_size": 128, "query_pre_attn_scalar": 20, "sliding_window": 24, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0, "pad_token_id": 0, "bos_token_id": 2,
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "hidden_size": 128, "query_pre_attn_scalar": 20, "sliding_window": 24, "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0, "bos_token_id": 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
            },
        },
    ),
    "gemma4": (  # two sizes of heads, other numbers of them, no linear for values in full attention
        Gemma4TextConfig,
        Gemma4ForCausalLM,
        {
            "hidden_size": 128, "sliding_window": 24, "tie_word_embeddings": True, "final_logit_softcapping": 3.0,
            "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0, "bos_token_id": 2,
            "global_head_dim": 64, "num_global_key_value_heads": 1, "num_key_value_heads": 4, "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
                "full_attention": {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            },
        },
    ),
    "qwen3_5": (  # vLLM's linear attention on CPUs takes heads of 64 and up
        Qwen3_5TextConfig,
        Qwen3_5ForCausalLM,
        {
            "linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2],
                "mrope_interleaved": True,
            },
        },
    ),
}  # fmt: skip


class Demo(NamedTuple):
    """The demo model made hard, and its checkpoints."""

    hard: Path
    rtn: Path
    quarot: Path
    portable: Path


def all_candidates(recipe: str) -> list[str]:
    """Settings with which a recipe that chooses takes all of its candidates, unseen; none for the others."""
    choose = load_recipe(recipe).choose
    if choose is None:
        return []
    taken = {key: value for changes in choose.candidates.values() for key, value in changes.items()}
    tune = ["tune={steps: 2}"] if choose.tune else []
    return ["choose=null", *(f"{key}={json.dumps(value)}" for key, value in taken.items()), *tune]


def source_model(
    folder: Path, kind: str, *, hardened: bool = False, shard_size: str = "200KB", dtype: torch.dtype = torch.float32,
    layers: int = 2, **config: Any,
) -> Path:  # fmt: skip
    """Saves a random model of KINDS or FAMILIES whose biases and norm gains matter."""
    config_class, model_class, extra = (KINDS | FAMILIES)[kind]
    torch.manual_seed(3)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 96, "intermediate_size": 176, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
        "initializer_range": 0.1,
    }  # fmt: skip
    if kind == "qwen2":  # vLLM's has heads of hidden_size / num_attention_heads, whatever head_dim says
        sizes["hidden_size"] = 128
    model = model_class(config_class(**(sizes | extra | config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
            if kind == "gemma4" and name.endswith("q_norm.weight"):
                parameter *= 0.2  # its scores are scaled by nothing else
        # A zero row, as of padding, would have nothing but rounding behind the norms of what blocks write.
        table = model.get_input_embeddings().weight
        table[table.eq(0).all(1)] = sizes["initializer_range"]
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
    if hardened:
        harden(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DATA / "demo" / file, folder)
    return folder


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    import hashlib

    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }
