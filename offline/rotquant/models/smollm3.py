"""SmolLM3: a Llama whose every fourth layer has no rotary embedding."""

from __future__ import annotations

from transformers import PreTrainedConfig

from rotquant.models.architecture import Architecture, Family
from rotquant.models.llama import attention, layer, model


def describe(config: PreTrainedConfig) -> Architecture:
    turned, still = (layer(config, a) for a in (attention(config), attention(config, rotary=0)))
    return model(config, [turned if rope else still for rope in config.no_rope_layers[: config.num_hidden_layers]])


SMOLLM3 = Family(("SmolLM3ForCausalLM",), describe)
