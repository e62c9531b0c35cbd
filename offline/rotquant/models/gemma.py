"""Gemma 2 and Gemma 3, the text models.

Four norms a layer, their gains 1 + w: one in front of attention and of the MLP each, and one behind, on what the block
writes. So the residual stream does not rotate, and R1 becomes an online Hadamard (`rotquant.fitting`). Embeddings are
multiplied by the square root of their size, a number of the model's dtype. The MLP's activation is the tanh form of
GELU: nothing here depends on which it is, but the plugin has no op that begins with it.

Gemma 2 has soft caps on the scores of attention and on the logits. Gemma 3 has norms of queries and keys in their
place, and another rotary base in layers with a window; of a model with a vision tower (`text_half`) that is left out.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from rotquant.models.architecture import Architecture, Family
from rotquant.models.attention import Attention
from rotquant.models.config_rules import Known, exactly, number, one_of, whole
from rotquant.models.layer import Layer
from rotquant.models.llama import attention, model, windowed
from rotquant.models.mlp import GatedMLP
from rotquant.models.windows import FULL, SLIDING

LEFT = tuple(f"{prefix}{part}." for prefix in ("", "model.") for part in ("vision_tower", "multi_modal_projector"))


def sandwich(config: PreTrainedConfig, heads: Attention) -> Layer:
    if not config.sliding_window:
        raise ValueError(f"sliding_window is {config.sliding_window}, and transformers makes a mask of it")
    mlp = GatedMLP(
        norm="pre_feedforward_layernorm",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
        width=config.intermediate_size,
        activation=config.hidden_activation,
    )
    return Layer(
        heads,
        mlp,
        hidden=config.hidden_size,
        eps=config.rms_norm_eps,
        offset=1.0,
        output_norms={heads.output: "post_attention_layernorm", mlp.down: "post_feedforward_layernorm"},
    )


def describe2(config: PreTrainedConfig) -> Architecture:
    heads = attention(config, scale=config.query_pre_attn_scalar**-0.5, cap=config.attn_logit_softcapping)
    return model(
        config,
        windowed(config, [sandwich(config, heads)] * config.num_hidden_layers, by_layer=True),
        embedding_scale=config.hidden_size**0.5,
        scale_rounded=True,
        logits_cap=config.final_logit_softcapping,
        stays_tied=True,
    )


def describe3(config: PreTrainedConfig) -> Architecture:
    heads = attention(
        config,
        query_norm="self_attn.q_norm",
        key_norm="self_attn.k_norm",
        scale=config.query_pre_attn_scalar**-0.5,
    )
    plain = sandwich(config, heads)
    of_kind = {kind: replace(plain, attention=replace(heads, rope=kind)) for kind in (FULL, SLIDING)}
    return model(
        config,
        windowed(config, [of_kind[kind] for kind in config.layer_types], by_layer=True),
        embedding_scale=config.hidden_size**0.5,
        scale_rounded=True,
        left=LEFT,
        served={"layer_types": config.layer_types},  # they choose the rotary base, whatever the windows
    )


DTYPE = one_of("float32", "bfloat16", "torch.float32", "torch.bfloat16")  # vLLM serves no float16 of them
CAP = number(0, 1e6, above=True, null=True)
FIELDS = {
    "query_pre_attn_scalar": number(0, 2**20, above=True),
    "hidden_activation": one_of("gelu_pytorch_tanh"),
    "dtype": DTYPE,
    "torch_dtype": DTYPE,
}
HARMLESS = frozenset(("cache_implementation",))
GEMMA2 = Family(
    {
        "Gemma2ForCausalLM": Known(
            "gemma2",
            attention_bias=(False,),
            windows="layers",
            activation=("hidden_activation", "gelu_pytorch_tanh"),
            fields=FIELDS
            | {
                "attn_logit_softcapping": CAP,
                "final_logit_softcapping": CAP,
                "sliding_window_size": whole(1, 2**31),
                "tie_word_embeddings": exactly(True),  # whatever it says, vLLM's class has no lm_head
            },
            harmless=HARMLESS,
            synonyms=(("sliding_window", "sliding_window_size"),),
        )
    },
    describe2,
)
GEMMA3 = Family(
    {
        "Gemma3ForCausalLM": Known(
            "gemma3_text",
            attention_bias=(False,),
            windows="layers",
            activation=("hidden_activation", "gelu_pytorch_tanh"),
            rope_by_layer=True,
            fields=FIELDS
            | {
                "rope_local_base_freq": number(2, 1e15),
                "sliding_window_pattern": whole(1, 1024),
                "_sliding_window_pattern": whole(1, 1024),
            },
            harmless=HARMLESS,
        )
    },
    describe3,
)
