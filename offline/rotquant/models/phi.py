"""Phi-3 and Phi-4: a Llama whose checkpoints hold q, k, v in one tensor, and gate, up in another.

RoPE turns the first `partial_rotary_factor` of a head (Phi-4-mini: 3/4).
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from rotquant.models.architecture import Architecture, Family
from rotquant.models.config_rules import Known, number
from rotquant.models.llama import attention, layer, model, windowed


def describe(config: PreTrainedConfig) -> Architecture:
    whole = attention(config)
    a = attention(config, rotary=int(whole.head_dim * config.rope_parameters["partial_rotary_factor"]))
    separate = layer(config, a)
    fused = {
        "self_attn.qkv_proj": separate.sites["attn"],
        "mlp.gate_up_proj": separate.sites["mlp"],
    }
    kinds = [layer(config, a, fused=fused)] * config.num_hidden_layers
    return model(config, windowed(config, kinds, by_layer=False))


PARTLY = {"partial_rotary_factor": number(0, 1, above=True)}
PHI3 = Family(
    {"Phi3ForCausalLM": Known("phi3", attention_bias=(False,), windows="all", fields=PARTLY, rope=PARTLY)}, describe
)
