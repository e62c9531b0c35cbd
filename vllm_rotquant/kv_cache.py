"""The KV cache of 4 bits: an attention backend over pages of packed codes.

vLLM sees opaque bytes, [blocks, KV heads, block size, C]; the layout inside a (block, head) plane is
`rotquant_kernels.reference.kv_planes`. Each attention layer is given this backend when it is built,
so other models in the process keep vLLM's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from rotquant.errors import RotQuantError
from rotquant_kernels import calls
from rotquant_kernels.cuda.rope import Rope
from rotquant_kernels.formats import KVFormat
from rotquant_kernels.formats.kv import kv_token_bytes
from vllm_rotquant import compat, key_feedback, steps
from vllm_rotquant.collector import Collector
from vllm_rotquant.large_pages import enlarge
from vllm_rotquant.warmup import warm_attention

LARGEST_DENSE = 256  # channels of a head that FlashAttention takes
PAGE_TOKENS = 16  # a page holds a multiple of this, so that every part of a plane is aligned


@dataclass
class KV4Metadata:
    """One scheduler step as `rotquant_kernels.reference.kv4_attention` wants it.

    slots: int64 [T], where K and V of the step go if attention writes them itself.
    """

    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    parts: Sequence[steps.Part] = ()  # where it is more than one launch
    slots: Tensor | None = None


class KV4MetadataBuilder(compat.AttentionMetadataBuilder[KV4Metadata]):
    """Keeps three fields of what vLLM prepares for every step."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        kinds = {}
        layers = compat.built_layers(vllm_config, layer_names)
        self.small = layers if device.type == "cpu" else []  # whose pages of memory are still to be made large
        for layer in layers:
            shape = layer.num_heads, layer.num_kv_heads, layer.head_size, layer.dtype
            kinds[shape, layer.impl.kv.rotate, layer.impl.window, layer.impl.cap] = layer
        for layer in kinds.values():
            warm_attention(layer, kv_cache_spec.block_size, device)
        self.limits: steps.Limits | None = None
        if device.type == "cuda":
            self.limits = min((layer.impl.limits(kv_cache_spec.block_size) for layer in kinds.values()), default=None)
        if self.limits is not None:
            self.reorder_batch_threshold = max(steps.FEW_ROWS // self.limits.group, 1)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> compat.AttentionCGSupport:
        """Whole steps are captured where all sequences have equally many new tokens; others run piecewise.

        The ops are launched by shapes alone and read the step from vLLM's lasting buffers. But those shapes decide
        how a batch is cut up, which a mixed batch would want otherwise than the one that was captured.
        """
        return compat.AttentionCGSupport.UNIFORM_BATCH

    def build(
        self, common_prefix_len: int, common_attn_metadata: compat.CommonAttentionMetadata, fast_build: bool = False
    ) -> KV4Metadata:
        if common_attn_metadata.causal is not True:
            raise RotQuantError("this build of rotquant runs the 4-bit KV cache only with causal attention")
        if self.small:  # the first step: vLLM makes the caches after this object
            enlarge(compat.bound_caches(self.small))
            self.small = []
        step = (
            common_attn_metadata.query_start_loc,
            common_attn_metadata.seq_lens,
            common_attn_metadata.block_table_tensor,
        )
        slots = common_attn_metadata.slot_mapping
        if self.limits is None:
            return KV4Metadata(*step, slots=slots)
        parts = steps.parts(*compat.step_lengths(common_attn_metadata), *step, self.limits)
        return KV4Metadata(*step, parts, slots)


class KV4Impl(compat.AttentionImpl):
    """Writes K and V of a step to their pages and attends over the pages, both as one op.

    A plain object beside the layer: vLLM calls it inside its own opaque attention op.
    """

    def __init__(self, layer: compat.Attention, kv: KVFormat, key_maker: torch.nn.Module | None = None) -> None:
        """`key_maker`: the linear that makes keys, where these are rounded with error feedback."""
        previous: Any = layer.impl
        self.num_heads, self.num_kv_heads, self.head_size = layer.num_heads, layer.num_kv_heads, layer.head_size
        self.scale, self.kv_cache_dtype = float(previous.scale), layer.kv_cache_dtype
        self.kv, self.window, self.cap = kv, layer.sliding_window, previous.logits_soft_cap or None
        # Pages before a window may be gone; FlashAttention's soft cap has not been held against the reference.
        whole = layer.dtype == torch.bfloat16 and self.window is None and self.cap is None
        self.dense = compat.dense_attention() if whole and self.head_size <= LARGEST_DENSE else None
        self.key_maker = key_maker
        self.rope: Rope | None = None  # where it is not vLLM's to run: `positions`

    @property
    def feedback(self) -> Tensor | None:
        """F of keys that are rounded with error feedback."""
        return None if self.key_maker is None else key_feedback.of(self.key_maker)

    def limits(self, page: int) -> steps.Limits:
        """How a step over pages of so many tokens is cut up."""
        room = steps.workspace_tokens(self.num_kv_heads, self.head_size) if self.dense else 0
        return steps.Limits(self.num_heads // self.num_kv_heads, page, room)

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Stores the step's K and V, [T, KV heads, d], in the pages `kv_cache`; slot -1 is padding."""
        calls.kv_write(key, value, kv_cache, slot_mapping, self.kv, self.feedback)

    def store(
        self, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor, query_start: Tensor, seq_lens: Tensor
    ) -> None:
        """As `do_kv_cache_update`, of K that RoPE has not turned yet."""
        from rotquant_kernels.cuda import kv4  # imports Triton

        settings = self.kv.rotate, self.kv.symmetric, self.kv.k_clip, self.kv.v_clip
        kv4.write(key, value, cache, slots, *settings, self.feedback, self.rope, query_start, seq_lens)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: KV4Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Fills output [T, heads, d]. `attn_metadata` is None while vLLM measures memory: no pages yet."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("the 4-bit KV cache does not quantize its output")
        if attn_metadata is None:
            if self.dense:  # seen by vLLM, which leaves as much free
                query.new_empty(steps.WORKSPACE_BYTES, dtype=torch.uint8)
            return output.zero_()
        step = attn_metadata
        if self.rope is not None and step.slots is not None:
            self.store(key, value, kv_cache, step.slots, step.query_start, step.seq_lens)
        if not step.parts:
            self.attend(query, kv_cache, step.query_start, step.seq_lens, step.block_table, output)
        for part in step.parts:
            self.attend_part(query[part.rows], kv_cache, part, output[part.rows])
        if step.parts:
            output[step.parts[-1].rows.stop :].zero_()
        return output

    def attend_part(self, query: Tensor, cache: Tensor, part: steps.Part, output: Tensor) -> None:
        """Fills output, the rows of a part of a step."""
        given = query, cache, part.query_start, part.seq_lens, part.block_table, output
        if part.room is None or self.dense is None:
            self.attend(*given)
            return
        from rotquant_kernels.cuda import kv4_dense  # imports Triton

        settings = self.scale, self.kv.rotate, self.kv.symmetric
        kv4_dense.attention(*given, *settings, part.room, part.most_new, self.dense[1], self.rope)

    def attend(
        self, query: Tensor, cache: Tensor, query_start: Tensor, seq_lens: Tensor, block_table: Tensor, output: Tensor
    ) -> None:
        """Fills output [T, heads, d]; see `reference.kv4_attention`."""
        if self.rope is not None:
            from rotquant_kernels.cuda import kv4  # imports Triton

            given = query, cache, query_start, seq_lens, block_table, output, self.scale
            kv4.attention(*given, self.kv.rotate, self.kv.symmetric, self.window or 0, self.cap or 0.0, self.rope)
            return
        settings = self.scale, self.kv, self.window, self.cap
        calls.kv_attention(query, cache, query_start, seq_lens, block_table, output, *settings)


class KV4Backend(compat.AttentionBackend):
    """What vLLM asks about the cache: page size, layout, block sizes, the classes above."""

    forward_includes_kv_cache_update = False
    symmetric: ClassVar[bool]
    blocks: ClassVar[int] = 1  # of vLLM's block size, in a page (`pages`)
    with_rope: ClassVar[type[KV4Backend]]  # whose attention writes K and V itself

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks the name up in a closed enum

    @staticmethod
    def get_impl_cls() -> type[KV4Impl]:
        return KV4Impl

    @staticmethod
    def get_builder_cls() -> type[KV4MetadataBuilder]:
        return KV4MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | compat.MultipleOf]:
        return [compat.MultipleOf(PAGE_TOKENS)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        return compat.head_major_layouts()

    @classmethod
    def customize_spec(cls, spec: compat.AttentionSpec) -> compat.AttentionSpec:
        return compat.opaque_pages(spec, kv_token_bytes(spec.head_size, cls.symmetric), cls.blocks)

    @classmethod
    def get_kv_cache_shape(
        cls, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, *context: Any, **more: Any
    ) -> tuple[int, ...]:
        """Asked by vLLM 0.28; later versions take it from the spec."""
        return num_blocks, num_kv_heads, block_size, kv_token_bytes(head_size, cls.symmetric)


class SymmetricRopeKV4Backend(KV4Backend):
    symmetric = forward_includes_kv_cache_update = True


class AsymmetricRopeKV4Backend(KV4Backend):
    symmetric, forward_includes_kv_cache_update = False, True


class SymmetricKV4Backend(KV4Backend):
    symmetric, with_rope = True, SymmetricRopeKV4Backend


class AsymmetricKV4Backend(KV4Backend):
    symmetric, with_rope = False, AsymmetricRopeKV4Backend


@cache
def in_blocks(backend: type[KV4Backend], blocks: int) -> type[KV4Backend]:
    """The backend with pages of so many blocks."""
    if blocks == 1:
        return backend
    more = {"with_rope": in_blocks(backend.with_rope, blocks)} if hasattr(backend, "with_rope") else {}
    return type(f"{backend.__name__}In{blocks}", (backend,), {"blocks": blocks, **more})


class KVCacheMethod(compat.BaseKVCacheMethod):
    """Gives an attention layer the 4-bit backend at the end of its construction.

    Everything else (spec, groups, metadata builder, block size) vLLM derives from the layer later: of one with a window
    it keeps the pages that the window covers, or all where its manager of several kinds of layer is switched off.
    """

    def __init__(
        self, config: Any, kv: KVFormat, prefix: str, head_dim: int, window: int | None, cap: float | None,
        blocks: int, collector: Collector, key_maker: torch.nn.Module | None = None,
    ) -> None:  # fmt: skip
        """`config`: what vLLM's base class keeps; head_dim: what config.json says; window: from `Windows`; cap: on
        scores, as transformers reads config.json; blocks: of a page; key_maker: as of `KV4Impl`."""
        super().__init__(config)
        self.format, self.prefix, self.head_dim, self.collector = kv, prefix, head_dim, collector
        self.window, self.cap, self.blocks, self.key_maker = window, cap, blocks, key_maker

    def create_weights(self, layer: Any) -> None:
        super().create_weights(layer)
        for feature, used in compat.attention_refusals(layer, self.cap).items():
            if used:
                raise RotQuantError(
                    f"{self.prefix}: this build of rotquant does not run the 4-bit KV cache with {feature}"
                )
        if layer.head_size != self.head_dim:
            raise RotQuantError(
                f"{self.prefix}: heads of {layer.head_size}, config.json says {self.head_dim} (kv_cache_scheme)"
            )
        backend = SymmetricKV4Backend if self.format.symmetric else AsymmetricKV4Backend
        layer.attn_backend = in_blocks(backend, self.blocks)
        layer.sliding_window = self.window
        layer.impl = KV4Impl(layer, self.format, self.key_maker)
        self.collector.expect(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        self.collector.loaded(layer)
