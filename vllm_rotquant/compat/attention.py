"""Attention layers and the pages of their cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec


def opaque_pages(spec: AttentionSpec, token_bytes: int, blocks: int) -> AttentionSpec:
    """The layer's cache spec with `token_bytes` bytes for each (token, KV head) instead of K and V numbers, and pages
    of `blocks` times as many tokens; vLLM asks for the size of a page of one token as well."""
    tokens = spec.block_size * (blocks if spec.block_size > 1 else 1)
    return replace(spec, dtype=torch.uint8, state_content_bytes=token_bytes, block_size=tokens)


def head_major_layouts() -> Sequence[Any] | None:
    """The cache layouts that keep a (block, head) plane of a page contiguous; None before vLLM had a choice."""
    try:
        from vllm.v1.kv_cache_interface import KVCacheLayout
    except ImportError:
        return None
    return (KVCacheLayout.LBHNC,)


def step_lengths(common: CommonAttentionMetadata) -> tuple[list[int], list[int]]:
    """New tokens of each sequence of a step, and its tokens in the cache at most, without waiting for the device."""
    starts = common.query_start_loc_cpu.tolist()
    new = [after - before for before, after in pairwise(starts)]
    known = getattr(common, "seq_lens_cpu_upper_bound", None)  # later than vLLM 0.28
    return new, [common.max_seq_len] * len(new) if known is None else known.tolist()


def built_layers(vllm_config: Any, names: Sequence[str]) -> list[Any]:
    """The attention layers of these names in the model that this process has built."""
    return [vllm_config.compilation_config.static_forward_context[name] for name in names]


def bound_caches(layers: Sequence[Any]) -> list[Tensor]:
    """The caches of attention layers, once vLLM has made them."""
    return [cache if isinstance(cache, Tensor) else cache[0] for cache in (layer.kv_cache for layer in layers)]


def attention_refusals(layer: Attention, cap: float | None) -> dict[str, bool]:
    """What an attention layer asks for beyond causal attention whose scores have this soft cap: name of the feature,
    whether it is used.

    `layer.impl` is still vLLM's own implementation, which has kept the constructor's arguments.
    """
    impl: Any = layer.impl
    return {
        f"attention of type {layer.attn_type}": layer.attn_type != AttentionType.DECODER,
        "ALiBi": impl.alibi_slopes is not None,
        f"a soft cap of {impl.logits_soft_cap} on scores, which is {cap} in transformers": (
            (impl.logits_soft_cap or None) != cap
        ),
        "attention sinks": bool(layer.has_sink),
        "a KV cache shared between layers": layer.kv_sharing_target_layer_name is not None,
        "V heads of another size than K heads": layer.head_size_v != layer.head_size,
        f"--kv-cache-dtype {layer.kv_cache_dtype} (the checkpoint sets 4 bits; leave the flag out)": (
            layer.kv_cache_dtype != "auto"
        ),
        f"the attention layer {type(layer).__name__}": type(layer) is not Attention,
    }
