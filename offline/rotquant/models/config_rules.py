"""What can be expected of a field of config.json, and what the config of one architecture has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Rule = Callable[[Any], str | None]  # what is expected of a value, None where it is as expected


@dataclass(frozen=True)
class Known:
    """What transformers' and vLLM's classes of one architecture share.

    biases: the values of attention_bias and mlp_bias that mean the same in both. Llama: biases at q, k, v and o, and at
        gate, up and down. Mistral: vLLM's class would make them, transformers' has none. Qwen2: q, k and v always,
        whatever the field. Qwen3: vLLM's o_proj has none, and the stored one would be dropped.
    own_head_dim: False where vLLM takes hidden_size / num_attention_heads whatever head_dim says.
    window_switch: the config class clears sliding_window unless use_sliding_window is true.
    windows: which layers transformers' class gives `sliding_window`: none, all, or those that `layer_types` names.
    always_masks: transformers' class makes a mask of `sliding_window` even if `layer_types` names no layer with it.
    windows_of_plugin: vLLM's class gives no window to single layers, and with a 4-bit KV cache the plugin does.
    attention_layers: what `layer_types` calls layers of attention to everything before.
    activation: the field that names the MLP's activation, and what it says.
    rope_by_layer: `rope_parameters` has an entry for each kind of layer; a `rope_scaling` is that of full attention.
    rope_types: further types of rotary embedding.
    fields: further fields that this architecture knows, and what is expected of them; rope: such among the rotary ones.
    harmless: fields of parts that a supported model of this architecture does not have.
    synonyms: fields that mean one thing, of which readers take one or the other.
    """

    model_type: str
    attention_bias: tuple[bool, ...]
    mlp_bias: tuple[bool, ...] = (False,)
    own_head_dim: bool = True
    window_switch: bool = False
    windows: Literal["none", "all", "layers"] = "none"
    always_masks: bool = False
    windows_of_plugin: bool = False
    attention_layers: tuple[str, ...] = ("full_attention",)
    activation: tuple[str, str] = ("hidden_act", "silu")
    rope_by_layer: bool = False
    rope_types: tuple[str, ...] = ()
    fields: Mapping[str, Rule] = field(default_factory=dict)
    rope: Mapping[str, Rule] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    synonyms: tuple[tuple[str, str], ...] = ()


def whole(low: int, high: int, *, null: bool = False) -> Rule:
    def rule(value: Any) -> str | None:
        if (value is None and null) or (type(value) is int and low <= value <= high):
            return None
        return f"a whole number from {low} to {high}" + (" or null" if null else "")

    return rule


def number(low: float, high: float, *, null: bool = False, above: bool = False) -> Rule:
    """low <= value <= high, or low < value where `above`."""

    def rule(value: Any) -> str | None:
        if value is None and null:
            return None
        if type(value) in (int, float) and math.isfinite(value) and low <= value <= high and (value > low or not above):
            return None
        return f"a number {'above' if above else 'from'} {low:g} {'and up ' if above else ''}to {high:g}"

    return rule


def boolean(value: Any) -> str | None:
    return None if type(value) is bool else "true or false"


def one_of(*values: str) -> Rule:
    def rule(value: Any) -> str | None:
        return None if isinstance(value, str) and value in values else " or ".join(map(repr, values))

    return rule


def texts(value: Any) -> str | None:
    fine = value is None or (isinstance(value, list) and all(isinstance(one, str) for one in value))
    return None if fine else "a list of strings, or null"


def tokens(value: Any) -> str | None:
    listed = value if isinstance(value, list) else [value]
    fine = value is None or all(type(one) is int and one >= -1 for one in listed)
    return None if fine else "a token id, a list of them, or null"


def exactly(*values: Any) -> Rule:
    def rule(value: Any) -> str | None:
        return None if value in values else " or ".join(map(repr, values))

    return rule
