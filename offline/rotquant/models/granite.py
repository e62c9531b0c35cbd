"""Granite (dense): a Llama with four scalars, on embeddings, attention scores, what blocks write, and logits."""

from __future__ import annotations

from transformers import PreTrainedConfig

from rotquant.models.architecture import Architecture, Family
from rotquant.models.llama import attention, layer, model


def describe(config: PreTrainedConfig) -> Architecture:
    scaled = layer(config, attention(config, scale=config.attention_multiplier), residual=config.residual_multiplier)
    return model(
        config,
        [scaled] * config.num_hidden_layers,
        embedding_scale=config.embedding_multiplier,
        logits_divisor=config.logits_scaling,
    )


GRANITE = Family(("GraniteForCausalLM",), describe)
