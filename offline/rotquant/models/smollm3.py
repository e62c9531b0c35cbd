"""SmolLM3: a Llama whose every fourth layer has no rotary embedding."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from rotquant.models.architecture import Architecture, Family
from rotquant.models.config_rules import Known, whole
from rotquant.models.llama import attention, layer, model, windowed


def describe(config: PreTrainedConfig) -> Architecture:
    turned, still = (layer(config, a) for a in (attention(config), attention(config, rotary=0)))
    kinds = [turned if rope else still for rope in config.no_rope_layers[: config.num_hidden_layers]]
    return model(config, windowed(config, kinds, by_layer=True))


def switches(value: Any) -> str | None:
    fine = value is None or (isinstance(value, list) and all(one in (0, 1) for one in value))
    return None if fine else "a list of 0 and 1, or null"


FIELDS = {"no_rope_layers": switches, "no_rope_layer_interval": whole(1, 1024)}
BIASES = (False, True)
SMOLLM3 = Family(
    {"SmolLM3ForCausalLM": Known("smollm3", BIASES, BIASES, window_switch=True, windows="layers", fields=FIELDS)},
    describe,
)
