"""Granite (dense): a Llama with four scalars, on embeddings, attention scores, what blocks write, and logits.

Granite 4's dense models are built by the class of its hybrid ones, without experts and with attention in every layer.
Their checkpoints hold gate and up in one tensor, and some have no rotary embedding.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from rotquant.models.architecture import Architecture, Family
from rotquant.models.config_rules import Known, exactly, number, whole
from rotquant.models.layer import Layer
from rotquant.models.llama import attention, layer, model


def granite(config: PreTrainedConfig) -> Architecture:
    scaled = layer(config, attention(config, scale=config.attention_multiplier), residual=config.residual_multiplier)
    return scaled_model(config, scaled)


def granite4(config: PreTrainedConfig) -> Architecture:
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


SCALARS = dict.fromkeys(
    ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
    number(0, 1e6, above=True),
)
DENSE = {
    "num_local_experts": exactly(0),
    "shared_intermediate_size": whole(2, 2**20),
    "position_embedding_type": exactly("rope", "nope", None),
    "normalization_function": exactly("rmsnorm"),
}
OF_MAMBA_AND_EXPERTS = """
    mamba_n_heads mamba_n_groups mamba_d_state mamba_d_head mamba_d_conv mamba_expand mamba_chunk_size mamba_conv_bias
    mamba_proj_bias time_step_limit num_experts_per_tok output_router_logits router_aux_loss_coef init_method
"""
GRANITE = Family(
    {"GraniteForCausalLM": Known("granite", attention_bias=(False, True), mlp_bias=(False, True), fields=SCALARS)},
    granite,
)
GRANITE4 = Family(
    {
        "GraniteMoeHybridForCausalLM": Known(
            "granitemoehybrid",
            attention_bias=(False,),
            own_head_dim=False,
            attention_layers=("full_attention", "attention"),
            fields=SCALARS | DENSE,
            harmless=frozenset(OF_MAMBA_AND_EXPERTS.split()),
        )
    },
    granite4,
)
