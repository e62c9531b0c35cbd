"""Every vLLM name that the plugin uses and that vLLM does not promise to keep. vLLM 0.28 to 0.33.

When a new vLLM moves something, this is the folder to change. Nothing else in the plugin imports vLLM's inner parts.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import PPMissingLayer, StageMissingLayer
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)
from vllm.triton_utils import HAS_TRITON
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_rotquant.compat.attention import (
    attention_refusals,
    bound_caches,
    built_layers,
    head_major_layouts,
    opaque_pages,
    step_lengths,
)
from vllm_rotquant.compat.experts import (
    experts_here,
    experts_refusals,
    experts_share,
    routed,
)
from vllm_rotquant.compat.flash import dense_attention
from vllm_rotquant.compat.models import (
    decoder_output,
    final_norm_holder,
    has_final_norm,
    is_decoder,
    is_recurrent,
    logits_changed,
    norm_before,
    rotary_before,
    rotary_rows,
    silu_mul_before,
)
from vllm_rotquant.compat.products import integer_products
from vllm_rotquant.compat.ranks import (
    from_all,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    pipeline_stage,
    ranks_of_model,
    wait_for_all,
)
from vllm_rotquant.compat.reloads import (
    can_be_reloaded,
    outermost,
    stays_out_of_reloads,
    watch_reloads,
)
from vllm_rotquant.compat.requests import (
    load_adapters_with,
    turn_prompt_embeds,
)
from vllm_rotquant.compat.settings import (
    additional_config,
    asked,
    device_type,
    holds_some_layers,
    let_attention_use_amx,
    lora_is_on,
    model_settings,
    on_cpu,
    origin,
    origin_of,
    own_config,
    tell_compiled_graphs_apart,
    vllm_config,
    weights_are_dummy,
)

__all__ = [
    "HAS_TRITON",
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
    "FusedMoEMethodBase",
    "GroupQuantScaleParameter",
    "LinearBase",
    "LinearMethodBase",
    "MultipleOf",
    "PackedvLLMParameter",
    "ParallelLMHead",
    "RoutedExperts",
    "UnquantizedEmbeddingMethod",
    "UnquantizedLinearMethod",
    "VocabParallelEmbedding",
    "additional_config",
    "asked",
    "attention_refusals",
    "bound_caches",
    "built_layers",
    "can_be_reloaded",
    "decoder_output",
    "dense_attention",
    "device_type",
    "experts_here",
    "experts_refusals",
    "experts_share",
    "final_norm_holder",
    "from_all",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "has_final_norm",
    "head_major_layouts",
    "holds_some_layers",
    "integer_products",
    "is_decoder",
    "is_recurrent",
    "let_attention_use_amx",
    "load_adapters_with",
    "logger",
    "logits_changed",
    "lora_is_on",
    "model_settings",
    "norm_before",
    "on_cpu",
    "opaque_pages",
    "origin",
    "origin_of",
    "outermost",
    "own_config",
    "pipeline_stage",
    "ranks_of_model",
    "register_weight_loader_v2_supported_method",
    "rotary_before",
    "rotary_rows",
    "routed",
    "silu_mul_before",
    "stays_out_of_reloads",
    "step_lengths",
    "tell_compiled_graphs_apart",
    "turn_prompt_embeds",
    "vllm_config",
    "wait_for_all",
    "watch_reloads",
    "weights_are_dummy",
]

# What stands in a pipeline stage for modules of the others.
MISSING_LAYERS = (PPMissingLayer, StageMissingLayer)

# vLLM shows only the loggers below its own name.
logger: Any = init_logger("vllm.rotquant")
