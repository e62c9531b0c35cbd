"""Mixtures of experts: Qwen3-MoE, Qwen2-MoE, which has a shared expert, and Mixtral, whose files have older names.

What they are behind the attention of Qwen3, Qwen2 and Mistral: layers of experts, and in the Qwen models some of one
MLP, those in `mlp_only_layers` and those that `decoder_sparse_step` passes over.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from rotquant.errors import RotQuantError
from rotquant.models.architecture import Architecture, Family
from rotquant.models.attention import Attention
from rotquant.models.config_rules import Known, boolean, exactly, whole
from rotquant.models.layer import Layer
from rotquant.models.llama import attention, layer, model, windowed
from rotquant.models.mlp import Experts, GatedMLP

MOST_EXPERTS = 2**12


def experts(config: PreTrainedConfig, **differences: Any) -> Experts:
    count, top_k = config.num_experts, config.num_experts_per_tok  # num_local_experts by another name
    if not 0 < count <= MOST_EXPERTS:
        raise RotQuantError(f"config.json: the number of experts is {count}, expected 1 to {MOST_EXPERTS}")
    if not 0 < top_k <= count:
        raise RotQuantError(
            f"config.json: num_experts_per_tok is {top_k}, expected 1 to {count}, the number of experts"
        )
    plain = Experts(
        norm="post_attention_layernorm",
        module="mlp",
        files="mlp",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        count=count,
        top_k=top_k,
        width=getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
        activation=config.hidden_act,
        normed=getattr(config, "norm_topk_prob", True),
    )
    return replace(plain, **differences)


def sparse_layers(config: PreTrainedConfig) -> list[bool]:
    """Which layers have experts."""
    step, dense = config.decoder_sparse_step, config.mlp_only_layers
    return [i not in dense and (i + 1) % step == 0 for i in range(config.num_hidden_layers)]


def qwen(config: PreTrainedConfig, attention: Attention, block: Experts, *, by_layer: bool) -> Architecture:
    """vLLM knows that gate and up are one linear in layers of one MLP only where `mlp_only_layers` names some."""
    dense, sparse = layer(config, attention), sparse_layers(config)
    if not any(sparse):
        raise RotQuantError("config.json: mlp_only_layers and decoder_sparse_step leave no layer with experts")
    layers: list[Layer] = [replace(dense, mlp=block) if mixed else dense for mixed in sparse]
    layers = windowed(config, layers, by_layer=by_layer)
    served: dict[str, Any] = {
        "mlp_only_layers": [i for i, mixed in enumerate(sparse) if not mixed], "decoder_sparse_step": 1,
    }  # fmt: skip
    if not any(kind.attention.window for kind in layers):
        served["sliding_window"] = None
    return model(config, layers, served=served)


def qwen3_moe(config: PreTrainedConfig) -> Architecture:
    heads = attention(config, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
    return qwen(config, heads, experts(config), by_layer=False)


def qwen2_moe(config: PreTrainedConfig) -> Architecture:
    names = {name: f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    width = config.shared_expert_intermediate_size
    shared = GatedMLP("post_attention_layernorm", **names, width=width, activation=config.hidden_act)
    block = experts(config, shared=shared, shared_gate="mlp.shared_expert_gate")
    return qwen(config, attention(config), block, by_layer=True)


def mixtral(config: PreTrainedConfig) -> Architecture:
    block = experts(config, files="block_sparse_moe", gate="w1", up="w3", down="w2")
    kind = replace(layer(config, attention(config)), mlp=block)
    return model(config, windowed(config, [kind] * config.num_hidden_layers, by_layer=False))


def layer_numbers(value: Any) -> str | None:
    fine = value is None or (isinstance(value, list) and all(type(one) is int and one >= 0 for one in value))
    return None if fine else "a list of layers, or null"


COUNT, WIDTH = whole(1, MOST_EXPERTS), whole(2, 2**20)
OF_TRAINING = frozenset(("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"))
EXPERTS = {"num_experts": COUNT, "num_local_experts": COUNT}
QWEN = EXPERTS | {
    "num_experts_per_tok": COUNT,
    "moe_intermediate_size": WIDTH,
    "norm_topk_prob": boolean,
    "decoder_sparse_step": whole(1, 1024),
    "mlp_only_layers": layer_numbers,
}
QWEN3_MOE = Family(
    {
        "Qwen3MoeForCausalLM": Known(
            "qwen3_moe",
            attention_bias=(False,),
            window_switch=True,
            windows="all",
            fields=QWEN,
            harmless=OF_TRAINING,
            synonyms=(("num_experts", "num_local_experts"),),
        )
    },
    qwen3_moe,
)
QWEN2_MOE = Family(
    {
        "Qwen2MoeForCausalLM": Known(
            "qwen2_moe",
            attention_bias=(False, True),
            own_head_dim=False,
            window_switch=True,
            windows="layers",
            windows_of_plugin=True,
            fields=QWEN | {"shared_expert_intermediate_size": WIDTH, "qkv_bias": exactly(True)},
            harmless=OF_TRAINING,
            synonyms=(("num_experts", "num_local_experts"),),
        )
    },
    qwen2_moe,
)
MIXTRAL = Family(
    {
        "MixtralForCausalLM": Known(
            "mixtral",
            attention_bias=(False,),
            windows="all",
            fields=EXPERTS | {"num_experts_per_tok": COUNT},
            harmless=OF_TRAINING,
            synonyms=(("num_experts", "num_local_experts"),),
        )
    },
    mixtral,
)
