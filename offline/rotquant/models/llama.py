"""Llama, Mistral, Qwen2 and Qwen3: the shape that the other families state their differences from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from rotquant.models.architecture import Architecture, Family, head_size
from rotquant.models.attention import Attention
from rotquant.models.config_rules import Known
from rotquant.models.layer import Layer
from rotquant.models.mlp import GatedMLP
from rotquant.models.windows import windows


def attention(config: PreTrainedConfig, **differences: Any) -> Attention:
    heads = config.num_attention_heads
    size = head_size(config)
    plain = Attention(
        module="self_attn",
        norm="input_layernorm",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.o_proj",
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=size,
        rotary=size,
        scale=size**-0.5,
    )
    return replace(plain, **differences)


def layer(config: PreTrainedConfig, attention: Attention, **differences: Any) -> Layer:
    mlp = GatedMLP(
        norm="post_attention_layernorm",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
        width=config.intermediate_size,
        activation=config.hidden_act,
    )
    return Layer(attention, mlp, hidden=config.hidden_size, eps=config.rms_norm_eps, **differences)


def model(config: PreTrainedConfig, layers: list[Layer], **differences: Any) -> Architecture:
    return Architecture(
        config,
        tuple(layers),
        vocab_size=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        **differences,
    )


def windowed(config: PreTrainedConfig, kinds: list[Layer], *, by_layer: bool) -> list[Layer]:
    """The layers, each with its window (see `windows`); those that are alike stay one object."""
    found = windows(config, by_layer)
    made = {
        (id(kind), window): replace(kind, attention=replace(kind.attends, window=window))
        if window and kind.attends
        else kind
        for kind, window in zip(kinds, found, strict=True)
    }
    return [made[id(kind), window] for kind, window in zip(kinds, found, strict=True)]


def plain(config: PreTrainedConfig) -> Architecture:
    return model(config, [layer(config, attention(config))] * config.num_hidden_layers)


def plain_windowed(config: PreTrainedConfig) -> Architecture:
    kinds = [layer(config, attention(config))] * config.num_hidden_layers
    return model(config, windowed(config, kinds, by_layer=True))


def normed_heads(config: PreTrainedConfig) -> Architecture:
    heads = attention(config, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
    return model(config, windowed(config, [layer(config, heads)] * config.num_hidden_layers, by_layer=True))


LLAMA = Family(
    {"LlamaForCausalLM": Known("llama", attention_bias=(False, True), mlp_bias=(False, True))},
    plain,
)
# transformers reads a Mistral with `layer_types` as a Ministral, which is one whose layers differ in their windows.
MISTRAL = Family(
    {"MistralForCausalLM": Known("mistral", attention_bias=(False,), windows="layers", always_masks=True)},
    plain_windowed,
)
QWEN2 = Family(
    {
        "Qwen2ForCausalLM": Known(
            "qwen2",
            attention_bias=(False, True),
            own_head_dim=False,
            window_switch=True,
            windows="layers",
            windows_of_plugin=True,
        )
    },
    plain_windowed,
)
QWEN3 = Family(
    {
        "Qwen3ForCausalLM": Known(
            "qwen3", attention_bias=(False,), window_switch=True, windows="layers", windows_of_plugin=True
        )
    },
    normed_heads,
)
