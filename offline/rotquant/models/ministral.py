"""Ministral: a Mistral some of whose layers have a window. vLLM builds it by its class of Mistral's, which reads
`layer_types` as well.

Ministral 3: a Llama whose queries grow with their position, for contexts longer than those of pretraining. transformers
reads the two numbers among the rotary ones, vLLM from a field `llama_4_scaling`, without which it leaves the scaling
out: a checkpoint has both.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from rotquant.models.architecture import Architecture, Family
from rotquant.models.attention import PositionScale
from rotquant.models.config_rules import Known, number, whole
from rotquant.models.llama import attention, layer, model, plain_windowed, windowed


def ministral(config: PreTrainedConfig) -> Architecture:
    return replace(plain_windowed(config), served={"architectures": ["MistralForCausalLM"]})


def ministral3(config: PreTrainedConfig) -> Architecture:
    rope = config.rope_parameters
    scale = PositionScale(rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"])
    kinds = [layer(config, attention(config, position_scale=scale))] * config.num_hidden_layers
    return model(
        config,
        windowed(config, kinds, by_layer=False),
        served={"llama_4_scaling": {"original_max_position_embeddings": scale.period, "beta": scale.beta}},
    )


ROPE = {"llama_4_scaling_beta": number(0, 10), "max_position_embeddings": whole(2, 2**25)}
MINISTRAL = Family(
    {"MinistralForCausalLM": Known("ministral", attention_bias=(False,), windows="layers", always_masks=True)},
    ministral,
)
MINISTRAL3 = Family(
    {"Ministral3ForCausalLM": Known("ministral3", attention_bias=(False,), windows="all", rope=ROPE)}, ministral3
)
