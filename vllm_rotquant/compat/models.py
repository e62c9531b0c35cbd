"""vLLM's models whose forward is known, and what it does around rotquant's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.mamba.abstract import MambaBase

# Models whose forward is known. An MLP runs down_proj(act_fn(gate_up_proj(x))). A decoder layer passes the output of
# input_layernorm to its attention, which runs qkv_proj on it, and that of post_attention_layernorm to its MLP; nothing
# else reads them.
MODELS = "vllm.model_executor.models."
MLPS = (
    "gemma2.Gemma2MLP",
    "gemma3.Gemma3MLP",
    "gemma4.Gemma4MLP",
    "granite.GraniteMLP",
    "llama.LlamaMLP",
    "mistral.MistralMLP",
    "qwen2.Qwen2MLP",
    "qwen2_moe.Qwen2MoeMLP",
)
ATTENTIONS = (
    "gemma2.Gemma2Attention",
    "gemma3.Gemma3Attention",
    "gemma4.Gemma4Attention",
    "granite.GraniteAttention",
    "llama.LlamaAttention",
    "mistral.MistralAttention",
    "qwen2.Qwen2Attention",
    "qwen3.Qwen3Attention",
    "qwen3_next.Qwen3NextAttention",
)
ROTATED = (  # those of them that run attn(*rotary_emb(positions, q, k), v)
    "gemma3.Gemma3Attention",
    "granite.GraniteAttention",
    "llama.LlamaAttention",
    "mistral.MistralAttention",
    "qwen2.Qwen2Attention",
    "qwen3.Qwen3Attention",
)
# Rotary embeddings that look cosines and sines up in one table, by a row's position alone.
ROTARY = "vllm.model_executor.layers.rotary_embedding."
TABLES = (
    "base.RotaryEmbedding",
    "dynamic_ntk_scaling_rope.DynamicNTKScalingRotaryEmbedding",
    "linear_scaling_rope.LinearScalingRotaryEmbedding",
    "llama3_rope.Llama3RotaryEmbedding",
    "ntk_scaling_rope.NTKScalingRotaryEmbedding",
    "yarn_scaling_rope.YaRNScalingRotaryEmbedding",
)
STREAMS = ("granite.GraniteDecoderLayer",)  # those whose blocks add to the residual stream themselves
MIXED = ("qwen3_5.Qwen3_5DecoderLayer",)  # those of models with two kinds of layer; other arguments
DECODERS = (
    "granite.GraniteDecoderLayer",
    "llama.LlamaDecoderLayer",
    "mistral.MistralDecoderLayer",
    "qwen2.Qwen2DecoderLayer",
    "qwen3.Qwen3DecoderLayer",
    "qwen3_5.Qwen3_5DecoderLayer",
)
# Decoder layers with a norm in front of and behind attention and MLP each, none of which can quantize.
SANDWICHES = ("gemma2.Gemma2DecoderLayer", "gemma3.Gemma3DecoderLayer", "gemma4.Gemma4DecoderLayer")
# Models that end in the RMSNorm `norm`, which everything but the next pipeline stage reads.
STACKS = ("granite.GraniteModel", "llama.LlamaModel", "mistral.MistralModel", "qwen2.Qwen2Model", "qwen3.Qwen3Model")


def known(module: Any, names: Sequence[str], prefix: str = MODELS) -> bool:
    """Whether a module is of exactly one of these classes, of vLLM's models where nothing else is said."""
    return f"{type(module).__module__}.{type(module).__qualname__}" in [prefix + name for name in names]


def silu_mul_before(layer: Any, mlp: Any) -> bool:
    """Whether `layer` is the down_proj of an MLP and reads silu(gate) * up, which its act_fn makes."""
    return known(mlp, MLPS) and mlp.down_proj is layer and type(mlp.act_fn) is SiluAndMul


def norm_before(layer: Any, decoder: Any) -> str | None:
    """Name of the RMSNorm in a decoder layer whose output `layer` reads and nothing else does."""
    if not known(decoder, DECODERS) or getattr(decoder, "ada_rms_norm_t_cond", None) is not None:
        return None
    attention: Any = getattr(decoder, "self_attn", None)
    mlp = decoder.mlp
    if known(attention, ATTENTIONS) and attention.qkv_proj is layer:
        name = "input_layernorm"
    elif known(mlp, MLPS) and mlp.gate_up_proj is layer:
        name = "post_attention_layernorm"
    else:
        return None
    norm = getattr(decoder, name)
    plain = type(norm) is RMSNorm and norm.has_weight and norm.variance_size_override is None
    return name if plain else None


def rotary_before(layer: Any, attention: Any) -> tuple[torch.Tensor, bool] | None:
    """RoPE that q and k of an attention layer come from, and nothing behind it: its table [positions, dims], cosines
    and then sines, and whether it turns neighbours; None where that is not known."""
    rotary = getattr(attention, "rotary_emb", None)
    if not known(attention, ROTATED) or attention.attn is not layer or not known(rotary, TABLES, ROTARY):
        return None
    if getattr(attention, "do_llama_4_scaling", False) or not getattr(attention, "use_rope", True):
        return None
    names = ("cos_sin_cache", "head_size", "rotary_dim", "is_neox_style", "use_flashinfer")
    table, size, dims, halves, elsewhere = (getattr(rotary, name, None) for name in names)
    if table is None or halves is None or elsewhere or size != layer.head_size or table.shape[1:] != (dims,):
        return None
    return table, not halves


def final_norm_holder(model: Any) -> Any:
    """The module of a causal language model whose `norm` is the final RMSNorm, None where that is not known."""
    return model.model if known(getattr(model, "model", None), STACKS) else None


def is_decoder(module: Any) -> bool:
    """Whether a module is a decoder layer that `decoder_output` runs, with what it calls."""
    if not known(module, DECODERS + SANDWICHES) or getattr(module, "ada_rms_norm_t_cond", None) is not None:
        return False
    return known(getattr(module, "self_attn", None), ATTENTIONS) and known(module.mlp, MLPS)


def is_recurrent(module: Any) -> bool:
    """Whether a module is linear attention or the like, with a state in the place of keys and values."""
    return isinstance(module, MambaBase)


def decoder_output(decoder: Any, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The residual stream [T, hidden] behind a decoder layer that `is_decoder`."""
    if known(decoder, STREAMS):
        return decoder(positions, hidden)
    if known(decoder, MIXED):
        out, residual = decoder(hidden_states=hidden, residual=None, positions=positions)
        return out + residual
    out, residual = decoder(positions, hidden, None)
    return out if residual is None else out + residual


def has_final_norm(module: Any) -> bool:
    """Whether a module is a model up to lm_head that ends with an RMSNorm on this rank."""
    return hasattr(module, "embed_tokens") and type(getattr(module, "norm", None)) in (RMSNorm, GemmaRMSNorm)


def logits_changed(model: Any, divisor: float, cap: float | None) -> str:
    """What a causal language model does to its logits beyond W h / divisor and this soft cap; "" for nothing."""
    logits = getattr(model, "logits_processor", None)
    if logits is None:
        return ""
    scale, own = getattr(logits, "scale", 1.0), getattr(logits, "soft_cap", None) or None
    if scale != 1 / divisor:
        return f"multiplies logits by {scale} (logit_scale)"
    return f"caps logits at {own} (final_logit_softcapping)" if own != cap else ""


def rotary_rows(rotary: Any) -> int | None:
    """How many positions a rotary embedding has a table for; None where it computes them."""
    if (table := getattr(rotary, "long_short_cos_sin_cache", None)) is not None:
        short = rotary.original_max_position_embeddings
        return len(table) - short if rotary.use_long_rope else short
    table = getattr(rotary, "cos_sin_cache", None)
    return None if table is None else len(table)
