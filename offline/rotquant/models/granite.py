"""Granite (dense): a Llama with four scalars, on embeddings, attention scores, what blocks write, and logits.

Granite 4's dense models are built by the class of its hybrid ones, without experts and with attention in every layer.
Their checkpoints hold gate and up in one tensor, and some have no rotary embedding.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from rotquant.errors import RotQuantError
from rotquant.models.architecture import Architecture, Family, Layer
from rotquant.models.llama import attention, layer, model


def granite(config: PreTrainedConfig) -> Architecture:
    scaled = layer(config, attention(config, scale=config.attention_multiplier), residual=config.residual_multiplier)
    return scaled_model(config, scaled)


def granite4(config: PreTrainedConfig) -> Architecture:
    if config.num_local_experts:
        raise RotQuantError(f"config.json: num_local_experts is {config.num_local_experts}, supported is 0")
    turned = attention(config, scale=config.attention_multiplier)
    if config.position_embedding_type != "rope":
        turned = replace(turned, rotary=0)
    plain = layer(config, turned, residual=config.residual_multiplier)
    mlp = replace(
        plain.mlp, gate="shared_mlp.gate", up="shared_mlp.up", down="shared_mlp.output_linear",
        width=config.shared_intermediate_size,
    )  # fmt: skip
    return scaled_model(config, replace(plain, mlp=mlp, fused={"shared_mlp.input_linear": (mlp.gate, mlp.up)}))


def scaled_model(config: PreTrainedConfig, kind: Layer) -> Architecture:
    return model(
        config,
        [kind] * config.num_hidden_layers,
        embedding_scale=config.embedding_multiplier,
        logits_divisor=config.logits_scaling,
    )


GRANITE = Family(("GraniteForCausalLM",), granite)
GRANITE4 = Family(("GraniteMoeHybridForCausalLM",), granite4)
