"""The architectures that rotquant knows, and what it must know about them.

Llama, Mistral, Qwen2 and Qwen3 are one shape: pre-norm decoder layers, RMSNorm, rotary grouped-query
attention, SiLU-gated MLP; they differ in biases and in Qwen3's norms on queries and keys.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rotquant.config_fields import ARCHITECTURES as ARCHITECTURES
from rotquant.config_fields import NO_WINDOW, check_fields, check_values
from rotquant.errors import RotQuantError
from rotquant.json_files import read_object, short

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
EMBEDDING, FINAL_NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model, and the config they come from.

    tied: lm_head is the embedding: config.json says so, and the files hold no lm_head of their own (see `original`).
    """

    config: PreTrainedConfig
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    eps: float
    tied: bool

    def layer_prefix(self, index: int) -> str:
        return f"model.layers.{index}."


def read_config(folder: Path) -> PreTrainedConfig:
    """config.json of a local folder, as transformers reads it.

    Raises:
        RotQuantError: no config.json, or one that transformers cannot read.
    """
    if not (folder / "config.json").is_file():
        raise RotQuantError(f"{folder}/config.json: no such file; MODEL must be a Hugging Face model folder or hub id")
    _check_values(folder / "config.json")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a config class makes of a wrong value
        raise RotQuantError(f"{folder}/config.json: {short(error)}") from error


def _check_values(file: Path) -> None:
    """Before transformers sees them: it may take long or much memory to fail, or name no field."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RotQuantError(f"{file}: no valid JSON: {short(error)}") from error
    names = raw.get("architectures") if isinstance(raw, dict) else None
    if isinstance(names, list) and names[:1] and names[0] in list(ARCHITECTURES):
        check_values(str(file), raw)


def read_architecture(folder: Path) -> Architecture:
    """Checks that the model is one that can be quantized here.

    Raises:
        RotQuantError: naming the field of config.json that stands in the way.
    """
    where = f"{folder}/config.json"
    if (folder / "config.json").is_file():
        check_fields(where, read_object(folder / "config.json"))
    config = read_config(folder)
    if uses_sliding_window(config):
        raise RotQuantError(f"{where}: sliding_window is {config.sliding_window}, {NO_WINDOW}")
    return architecture(config)


def architecture(config: PreTrainedConfig) -> Architecture:
    """The sizes that a config names; checks nothing."""
    heads = config.num_attention_heads
    return Architecture(
        config=config,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        eps=config.rms_norm_eps,
        tied=bool(config.tie_word_embeddings),
    )


def uses_sliding_window(config: PreTrainedConfig) -> bool:
    """True where some layer attends to a window only: also by a default that config.json does not show."""
    kinds = getattr(config, "layer_types", None) or []
    return bool(getattr(config, "sliding_window", None)) or any(kind != "full_attention" for kind in kinds)


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """transformers' own model without weights: parameters on the meta device."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
    except Exception as error:  # of many kinds
        raise RotQuantError(f"config.json: transformers cannot build this model: {short(error)}") from error


def expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config must hold."""
    model = skeleton(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop(LM_HEAD, None)
    return shapes


def rotary(config: PreTrainedConfig, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of transformers' own rotary embedding (all its scaling variants), float32 [1, positions, d]."""
    kind: Any = type(skeleton(config).model.rotary_emb)
    embedding = kind(config=config)
    return embedding(torch.zeros(1, dtype=torch.float32), torch.arange(positions)[None])
