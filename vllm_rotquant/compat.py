"""Every vLLM name that the plugin uses and that vLLM does not promise to keep. vLLM 0.28 to 0.33.

When a new vLLM moves something, this is the file to change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import PPMissingLayer, StageMissingLayer
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec

__all__ = [
    "MISSING_LAYERS",
    "Attention",
    "AttentionBackend",
    "AttentionCGSupport",
    "AttentionImpl",
    "AttentionLayerBase",
    "AttentionMetadataBuilder",
    "AttentionSpec",
    "BaseKVCacheMethod",
    "BasevLLMParameter",
    "ChannelQuantScaleParameter",
    "CommonAttentionMetadata",
    "GroupQuantScaleParameter",
    "LinearBase",
    "LinearMethodBase",
    "MultipleOf",
    "PackedvLLMParameter",
    "ParallelLMHead",
    "RoutedExperts",
    "UnquantizedLinearMethod",
    "VocabParallelEmbedding",
    "attention_refusals",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "has_final_norm",
    "head_major_layouts",
    "is_decoder",
    "logger",
    "logits_changed",
    "lora_is_on",
    "model_settings",
    "norm_before",
    "opaque_pages",
    "own_config",
    "register_weight_loader_v2_supported_method",
    "rotary_rows",
    "silu_mul_before",
    "tell_compiled_graphs_apart",
    "weights_are_dummy",
]

# Models whose forward is known. An MLP runs down_proj(act_fn(gate_up_proj(x))). A decoder layer passes the output of
# input_layernorm to its attention, which runs qkv_proj on it, and that of post_attention_layernorm to its MLP; nothing
# else reads them.
MODELS = "vllm.model_executor.models."
MLPS = ("llama.LlamaMLP", "mistral.MistralMLP", "qwen2.Qwen2MLP")
ATTENTIONS = ("llama.LlamaAttention", "mistral.MistralAttention", "qwen2.Qwen2Attention", "qwen3.Qwen3Attention")
DECODERS = (
    "llama.LlamaDecoderLayer",
    "mistral.MistralDecoderLayer",
    "qwen2.Qwen2DecoderLayer",
    "qwen3.Qwen3DecoderLayer",
)

# What stands in a pipeline stage for modules of the others.
MISSING_LAYERS = (PPMissingLayer, StageMissingLayer)

# vLLM shows only the loggers below its own name.
logger: Any = init_logger("vllm.rotquant")


def opaque_pages(spec: AttentionSpec, token_bytes: int) -> AttentionSpec:
    """The layer's cache spec with `token_bytes` bytes for each (token, KV head) instead of K and V numbers."""
    return replace(spec, dtype=torch.uint8, state_content_bytes=token_bytes)


def head_major_layouts() -> Sequence[Any] | None:
    """The cache layouts that keep a (block, head) plane of a page contiguous; None before vLLM had a choice."""
    try:
        from vllm.v1.kv_cache_interface import KVCacheLayout
    except ImportError:
        return None
    return (KVCacheLayout.LBHNC,)


def known(module: Any, names: Sequence[str]) -> bool:
    """Whether a module is of exactly one of these classes of vLLM's models."""
    return f"{type(module).__module__}.{type(module).__qualname__}" in [MODELS + name for name in names]


def silu_mul_before(layer: Any, mlp: Any) -> bool:
    """Whether `layer` is the down_proj of an MLP and reads silu(gate) * up, which its act_fn makes."""
    return known(mlp, MLPS) and mlp.down_proj is layer and type(mlp.act_fn) is SiluAndMul


def norm_before(layer: Any, decoder: Any) -> str | None:
    """Name of the RMSNorm in a decoder layer whose output `layer` reads and nothing else does."""
    if not known(decoder, DECODERS) or getattr(decoder, "ada_rms_norm_t_cond", None) is not None:
        return None
    attention, mlp = decoder.self_attn, decoder.mlp
    if known(attention, ATTENTIONS) and attention.qkv_proj is layer:
        name = "input_layernorm"
    elif known(mlp, MLPS) and mlp.gate_up_proj is layer:
        name = "post_attention_layernorm"
    else:
        return None
    norm = getattr(decoder, name)
    plain = type(norm) is RMSNorm and norm.has_weight and norm.variance_size_override is None
    return name if plain else None


def tell_compiled_graphs_apart(key: str, value: Any) -> None:
    """Makes `value`, which decides how a model runs, part of what vLLM's cache of compiled graphs goes by.

    To be called while a model is loaded.
    """
    extra = get_current_vllm_config().additional_config
    if isinstance(extra, dict):
        extra[key] = value


def lora_is_on() -> bool:
    """True under --enable-lora; to be asked while a model is built."""
    return get_current_vllm_config().lora_config is not None


def weights_are_dummy() -> bool:
    """True under --load-format dummy, which reads no file; to be asked while a model is built."""
    return get_current_vllm_config().load_config.load_format == "dummy"


def model_settings() -> Any:
    """vLLM's settings of the model that is being built: `max_model_len`, `dtype` and what `own_config` reads."""
    return get_current_vllm_config().model_config


def own_config(settings: Any) -> PreTrainedConfig:
    """transformers' own reading of the model's config.json, with the user's --hf-overrides; vLLM edits its copy.

    Args:
        settings: from `model_settings`.
    """
    if callable(settings.hf_overrides):
        return settings.hf_config
    folder = getattr(settings, "hf_config_path", None) or settings.model
    data, _ = PreTrainedConfig.get_config_dict(folder, revision=settings.revision)
    for key, value in settings.hf_overrides.items():
        both = isinstance(value, dict) and isinstance(data.get(key), dict)
        data[key] = data[key] | value if both else value
    return CONFIG_MAPPING[data["model_type"]].from_dict(data)


def rotary_rows(rotary: Any) -> int | None:
    """How many positions a rotary embedding has a table for; None where it computes them."""
    if (table := getattr(rotary, "long_short_cos_sin_cache", None)) is not None:
        short = rotary.original_max_position_embeddings
        return len(table) - short if rotary.use_long_rope else short
    table = getattr(rotary, "cos_sin_cache", None)
    return None if table is None else len(table)


def is_decoder(module: Any) -> bool:
    """Whether a module is a decoder layer whose forward is known: (positions, hidden, residual), with what it calls."""
    if not known(module, DECODERS) or getattr(module, "ada_rms_norm_t_cond", None) is not None:
        return False
    return known(module.self_attn, ATTENTIONS) and known(module.mlp, MLPS)


def has_final_norm(module: Any) -> bool:
    """Whether a module is a model up to lm_head that ends with an RMSNorm on this rank."""
    return hasattr(module, "embed_tokens") and type(getattr(module, "norm", None)) is RMSNorm


def logits_changed(model: Any) -> str:
    """What a causal language model does to its logits beyond the product with lm_head; "" for nothing."""
    logits = getattr(model, "logits_processor", None)
    scale, cap = getattr(logits, "scale", 1.0), getattr(logits, "soft_cap", None)
    return f"multiplies logits by {scale} (logit_scale)" if scale != 1 else f"caps logits at {cap}" if cap else ""


def attention_refusals(layer: Attention) -> dict[str, bool]:
    """What an attention layer asks for beyond plain causal attention: name of the feature, whether it is used.

    `layer.impl` is still vLLM's own implementation, which has kept the constructor's arguments.
    """
    impl: Any = layer.impl
    return {
        f"attention of type {layer.attn_type}": layer.attn_type != AttentionType.DECODER,
        "sliding window attention": layer.sliding_window is not None,
        "ALiBi": impl.alibi_slopes is not None,
        "a soft cap on attention logits": bool(impl.logits_soft_cap),
        "attention sinks": bool(layer.has_sink),
        "a KV cache shared between layers": layer.kv_sharing_target_layer_name is not None,
        "V heads of another size than K heads": layer.head_size_v != layer.head_size,
        f"--kv-cache-dtype {layer.kv_cache_dtype} (the checkpoint sets 4 bits; leave the flag out)": (
            layer.kv_cache_dtype != "auto"
        ),
        f"the attention layer {type(layer).__name__}": type(layer) is not Attention,
    }
