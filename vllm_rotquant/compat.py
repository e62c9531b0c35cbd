"""Every vLLM name that the plugin uses and that vLLM does not promise to keep. vLLM 0.28 to 0.33.

When a new vLLM moves something, this is the file to change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
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
from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)
from vllm.platforms import current_platform
from vllm.triton_utils import HAS_TRITON
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
    "HAS_TRITON",
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
    "checkpoint",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "head_major_layouts",
    "logger",
    "lora_is_on",
    "norm_before",
    "on_cpu",
    "opaque_pages",
    "outermost",
    "register_weight_loader_v2_supported_method",
    "silu_mul_before",
    "stays_out_of_reloads",
    "tell_compiled_graphs_apart",
    "watch_reloads",
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


def checkpoint() -> Callable[[], str]:
    """Where the weights of the model being built come from; a reload from elsewhere changes the answer.

    To be called while a model is loaded.
    """
    config = get_current_vllm_config().model_config
    return lambda: str(config.model)


def lora_is_on() -> bool:
    """True under --enable-lora; to be asked while a model is built."""
    return get_current_vllm_config().lora_config is not None


def on_cpu() -> bool:
    """True where models run on the CPU."""
    return bool(current_platform.is_cpu())


def weights_are_dummy() -> bool:
    """True under --load-format dummy, which reads no file; to be asked while a model is built."""
    return get_current_vllm_config().load_config.load_format == "dummy"


class _StaysOut(LayerReloadingInfo):
    """What vLLM knows about a module in a reload: taken apart already, nothing to process."""

    def can_load(self) -> bool:
        return True

    def reset(self) -> None:
        pass


def stays_out_of_reloads(module: torch.nn.Module) -> None:
    """Has vLLM's reload of weights pass over the module: its tensors stay and are loaded by their own loaders."""
    LAYERWISE_INFO[module] = _StaysOut(({}, {}), torch.device("cpu"), load_numel=1, load_numel_total=1)


def outermost(module: torch.nn.Module) -> torch.nn.Module | None:
    """The model that a module is part of; vLLM notes all modules of a model, it first, before it loads them."""
    return next((model for model in LAYERWISE_INFO if any(part is module for part in model.modules())), None)


def watch_reloads(model: torch.nn.Module, begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Has vLLM call `begin` before it takes a model apart to reload its weights, and `end` when it is done.

    vLLM goes through all modules twice, the model itself first: to ask whether they are taken apart already, and to
    put them together, attention last.
    """

    class First(LayerReloadingInfo):
        def can_load(self) -> bool:
            if not super().can_load():
                begin()
            return super().can_load()

    class Last(LayerReloadingInfo):
        def reset(self) -> None:
            super().reset()
            end()

    attention = [module for module in model.modules() if isinstance(module, AttentionLayerBase)]
    for module, kind in ((model, First), (attention[-1], Last)) if attention else ():
        known = LAYERWISE_INFO[module]
        LAYERWISE_INFO[module] = kind(known.restore_metadata, known.restore_device)


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
