"""Every vLLM name that the plugin uses and that vLLM does not promise to keep. vLLM 0.28 to 0.33.

When a new vLLM moves something, this is the file to change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
    get_world_group,
    model_parallel_is_initialized,
)
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
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)
from vllm.platforms import current_platform
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
    "UnquantizedEmbeddingMethod",
    "UnquantizedLinearMethod",
    "VocabParallelEmbedding",
    "additional_config",
    "attention_refusals",
    "checkpoint_folder",
    "device_type",
    "from_all",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "head_major_layouts",
    "logger",
    "lora_is_on",
    "norm_before",
    "opaque_pages",
    "pipeline_stage",
    "ranks_of_model",
    "register_weight_loader_v2_supported_method",
    "silu_mul_before",
    "tell_compiled_graphs_apart",
    "wait_for_all",
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


def additional_config(key: str) -> Any:
    """A key of --additional-config, None where there is none; to be asked while a model is built."""
    extra = get_current_vllm_config().additional_config
    return extra.get(key) if isinstance(extra, dict) else None


def checkpoint_folder() -> Callable[[], Path | None]:
    """Finds the folder of the model that is being built, once it is loaded; None where vLLM keeps it elsewhere."""
    config = get_current_vllm_config()
    model, revision = config.model_config.model, config.model_config.revision
    cache = config.load_config.download_dir

    def find() -> Path | None:
        from huggingface_hub import snapshot_download

        if Path(model).is_dir():
            return Path(model)
        try:
            return Path(snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True))
        except Exception:  # it is not of the hub, or not in its cache
            return None

    return find


def device_type() -> str:
    """The device that vLLM serves on, in torch's words."""
    return str(current_platform.device_type)


def ranks_of_model() -> Any:
    """The group of all ranks that load the model that is being built, None where this is the only one.

    The last pipeline stage alone loads a draft.
    """
    if not torch.distributed.is_initialized() or not model_parallel_is_initialized():
        return None
    draft = get_current_vllm_config().model_config.runner_type == "draft"
    group = get_tp_group() if draft else get_world_group()
    return group if group.world_size > 1 else None


def wait_for_all(group: Any, seconds: float) -> None:
    """Returns when all ranks have called it; raises RuntimeError, naming a missing one where it is known, if not.

    Under VLLM_DISTRIBUTED_USE_SPLIT_GROUP, whose groups have no such barrier, `from_all` is the first to wait.
    """
    if torch.distributed.get_backend(group.cpu_group) == "gloo":
        torch.distributed.monitored_barrier(group.cpu_group, timedelta(seconds=seconds), wait_all_ranks=True)


def from_all(group: Any, mine: Any) -> list[Any]:
    """The objects that the ranks of a group have brought, by rank."""
    answers: list[Any] = [None] * group.world_size
    with torch.device("cpu"):  # vLLM loads under its device
        torch.distributed.all_gather_object(answers, mine, group=group.cpu_group)
    return answers


def pipeline_stage() -> tuple[int, int]:
    """Pipeline stage of this rank and how many there are."""
    group = get_pp_group()
    return group.rank_in_group, group.world_size


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
