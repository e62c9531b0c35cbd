"""Ministral 3: a Llama whose queries grow with their position, for contexts longer than those of pretraining.

transformers reads the two numbers among the rotary ones, vLLM from a field `llama_4_scaling`, without which it leaves
the scaling out: a checkpoint has both.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from rotquant.models.architecture import Architecture, Family, PositionScale
from rotquant.models.config_rules import Known, number, whole
from rotquant.models.llama import attention, layer, model


def describe(config: PreTrainedConfig) -> Architecture:
    rope = config.rope_parameters
    scale = PositionScale(rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"])
    return model(
        config,
        [layer(config, attention(config, position_scale=scale))] * config.num_hidden_layers,
        served={"llama_4_scaling": {"original_max_position_embeddings": scale.period, "beta": scale.beta}},
    )


ROPE = {"llama_4_scaling_beta": number(0, 10), "max_position_embeddings": whole(2, 2**25)}
MINISTRAL3 = Family({"Ministral3ForCausalLM": Known("ministral3", attention_bias=(False,), rope=ROPE)}, describe)
