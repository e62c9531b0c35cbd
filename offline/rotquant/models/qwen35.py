"""Qwen3.5 (dense): three layers of linear attention, then one of gated attention, and so on.

A Qwen3 whose files hold norm gains less 1, whose attention is gated and turns a quarter of each head. The MTP head
(`mtp.`) is copied; of a model with a vision tower (`text_half`) that is left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from rotquant.models.architecture import Architecture, Family
from rotquant.models.config_rules import Known, boolean, exactly, number, one_of, whole
from rotquant.models.delta import DeltaNet
from rotquant.models.llama import attention, layer, model


def delta(config: PreTrainedConfig) -> DeltaNet:
    found = DeltaNet(
        module="linear_attn",
        norm="input_layernorm",
        mixed="linear_attn.in_proj_qkv",
        gate="linear_attn.in_proj_z",
        beta="linear_attn.in_proj_b",
        decay="linear_attn.in_proj_a",
        output="linear_attn.out_proj",
        key_heads=config.linear_num_key_heads,
        value_heads=config.linear_num_value_heads,
        key_dim=config.linear_key_head_dim,
        value_dim=config.linear_value_head_dim,
        width=config.linear_conv_kernel_dim,
    )
    if found.value_heads % found.key_heads:
        raise ValueError(f"linear_num_value_heads {found.value_heads} is no multiple of linear_num_key_heads")
    return found


def describe(config: PreTrainedConfig) -> Architecture:
    gated = attention(
        config,
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
        rotary=int(config.head_dim * config.rope_parameters["partial_rotary_factor"]),
        gated=True,
    )
    sections = config.rope_parameters.get("mrope_section")
    if sections is not None and sum(sections) != gated.rotary // 2:
        raise ValueError(f"mrope_section {sections} does not sum to {gated.rotary // 2}, the pairs that are turned")
    full = layer(config, gated, offset=1.0)
    linear = replace(full, attention=delta(config))
    layers = [full if kind == "full_attention" else linear for kind in config.layer_types]
    return model(config, layers, beside=("mtp.",), left=("model.visual.",))


def sections(value: Any) -> str | None:
    fine = isinstance(value, list) and len(value) == 3 and all(type(one) is int and one > 0 for one in value)
    return None if fine else "a list of three whole numbers above 0"


HEADS, SIZE = whole(1, 1024), whole(2, 1024)
PARTLY = {"partial_rotary_factor": number(0, 1, above=True)}
FIELDS = PARTLY | {
    "linear_num_key_heads": HEADS,
    "linear_num_value_heads": HEADS,
    "linear_key_head_dim": SIZE,
    "linear_value_head_dim": SIZE,
    "linear_conv_kernel_dim": whole(2, 64),
    "full_attention_interval": whole(1, 1024),
    "attn_output_gate": exactly(True),  # vLLM honours these, transformers' class is always so
    "output_gate_type": exactly("silu", "swish"),
    "layer_scale": exactly(False, None),
    "mlp_only_layers": exactly([], None),
    "mamba_ssm_dtype": one_of("float32", "bfloat16", "float16"),  # of vLLM's states, whatever the model's
    "mtp_num_hidden_layers": whole(0, 64),
    "mtp_use_dedicated_embeddings": boolean,
}
QWEN35 = Family(
    {
        "Qwen3_5ForCausalLM": Known(
            "qwen3_5_text",
            attention_bias=(False,),
            attention_layers=("full_attention", "linear_attention"),
            fields=FIELDS,
            rope=PARTLY | {"mrope_section": sections, "mrope_interleaved": exactly(True)},
        )
    },
    describe,
)
