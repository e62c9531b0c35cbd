"""Gemma 4, the dense text model: a Gemma 3 whose layers of full attention have larger heads than those with a window.

Gains are as the files hold them, scores are not scaled, each head's values pass a norm without gain, and a number
multiplies the residual stream behind each layer. RoPE is of the proportional kind in full attention: of its pairs of
channels, half a head apart, some have frequency 0.

With `attention_k_eq_v` the layers of full attention have no linear of their own for values: v = norm(W_k x), while keys
pass another norm and RoPE. A checkpoint has two, W_v = R2ᵀ W_k and W_k: both readers of config.json build them where it
is off. They take the number of KV heads of those layers from `per_layer_config` then.

What is not there is refused by its field: embeddings for each layer and shared keys and values (E2B, E4B), experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from rotquant.errors import RotQuantError
from rotquant.models.architecture import Architecture, Family
from rotquant.models.config_rules import Known, Rule, boolean, exactly, one_of, whole
from rotquant.models.gemma import CAP, sandwich
from rotquant.models.layer import Layer
from rotquant.models.llama import attention, model, windowed
from rotquant.models.windows import FULL

LEFT = tuple(
    f"model.{part}." for part in ("vision_tower", "audio_tower", "vision_embedder", "embed_vision", "embed_audio")
)


def layer(config: PreTrainedConfig, kind: str) -> Layer:
    """A layer by the config that it has for itself."""
    heads = attention(
        config,
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
        scale=1.0,
        normed_values=True,
        rope=kind,
    )
    if heads.heads % heads.kv_heads:
        raise ValueError(
            f"num_attention_heads {heads.heads} is not divisible by the {heads.kv_heads} KV heads of {kind}"
        )
    plain = sandwich(config, heads)
    one_for_both = (config.attention_k_eq_v or getattr(config, "values_of_keys", False)) and kind == FULL
    return replace(plain, offset=0.0, factor="layer_scalar", copies={heads.value: heads.key} if one_for_both else {})


def describe(config: PreTrainedConfig) -> Architecture:
    if not hasattr(config, "per_layer_config"):
        raise RotQuantError("Gemma 4 needs transformers 5.15 or newer, which tells heads of two sizes apart")
    if width := config.hidden_size_per_layer_input:
        raise RotQuantError(f"config.json: hidden_size_per_layer_input is {width}, expected is {NO_EMBEDDINGS}")
    own = {kind: config.per_layer_config[kind] for kind in dict.fromkeys(config.layer_types)}
    of_kind = {kind: layer(one, kind) for kind, one in own.items()}
    return model(
        config,
        windowed(config, [of_kind[kind] for kind in config.layer_types], by_layer=True),
        embedding_scale=config.hidden_size**0.5,
        scale_rounded=True,
        logits_cap=config.final_logit_softcapping,
        left=LEFT,
        served={
            "layer_types": config.layer_types,  # they choose the rotary embedding, whatever the windows
            "per_layer_config": {
                str(index): {"head_dim": own[kind].head_dim, "num_key_value_heads": own[kind].num_key_value_heads}
                for index, kind in enumerate(config.layer_types)
                if kind == FULL
            },
            "attention_k_eq_v": False,
            "values_of_keys": bool(config.attention_k_eq_v),  # of the original, for its adapters
            "use_bidirectional_attention": None,  # of images
        },
    )


def without(what: str, off: Any) -> Rule:
    """A field that stands for something that is not supported, with the value that leaves it out."""
    return lambda value: None if value in (off,) else f"{off}: {what} are not supported"


def sizes(value: Any) -> str | None:
    """Of `per_layer_config`: by a layer's number what differs from the other layers."""
    known = {"head_dim": whole(2, 1024), "num_key_value_heads": whole(1, 1024)}
    fine = isinstance(value, dict) and all(
        name.isdecimal() and isinstance(own, dict) and own.keys() <= known.keys()
        and not any(known[field](one) for field, one in own.items())
        for name, own in value.items()
    )  # fmt: skip
    return None if fine else "an object of layer numbers, each with head_dim and num_key_value_heads alone"


NO_EMBEDDINGS = "0: embeddings for each layer are not supported"  # also where troubleshooting is written from
GEMMA4 = Family(
    {
        "Gemma4ForCausalLM": Known(
            "gemma4_text",
            attention_bias=(False,),
            windows="layers",
            activation=("hidden_activation", "gelu_pytorch_tanh"),
            rope_by_layer=True,
            rope_types=("proportional",),
            fields={
                "hidden_activation": one_of("gelu_pytorch_tanh"),
                "global_head_dim": whole(2, 1024),
                "num_global_key_value_heads": whole(1, 1024, null=True),
                "per_layer_config": sizes,
                "attention_k_eq_v": boolean,
                "final_logit_softcapping": CAP,
                "use_bidirectional_attention": exactly(None, "vision"),
                "hidden_size_per_layer_input": without("embeddings for each layer", 0),
                "num_kv_shared_layers": without("layers that share keys and values", 0),
                "enable_moe_block": without("mixtures of experts beside the MLP", False),
                "num_experts": without("mixtures of experts beside the MLP", None),  # by this vLLM goes
            },
            harmless=frozenset(
                ("use_double_wide_mlp", "vocab_size_per_layer_input", "top_k_experts", "moe_intermediate_size")
            ),
        )
    },
    describe,
)
