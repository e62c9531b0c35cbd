"""Every vLLM name that the plugin uses and that vLLM does not promise to keep. vLLM 0.28 to 0.33.

When a new vLLM moves something, this is the file to change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec

__all__ = [
    "Attention",
    "AttentionBackend",
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
    "head_major_layouts",
    "logger",
    "lora_is_on",
    "opaque_pages",
    "register_weight_loader_v2_supported_method",
    "weights_are_dummy",
]

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


def lora_is_on() -> bool:
    """True under --enable-lora; to be asked while a model is built."""
    return get_current_vllm_config().lora_config is not None


def weights_are_dummy() -> bool:
    """True under --load-format dummy, which reads no file; to be asked while a model is built."""
    return get_current_vllm_config().load_config.load_format == "dummy"


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
