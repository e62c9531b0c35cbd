"""vLLM's own attention over pages of 16-bit K and V: FlashAttention, or Triton's where that is missing."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from vllm.platforms import current_platform

from rotquant_kernels.cuda.workspace import Dense


def dense_attention() -> tuple[str, Dense] | None:
    """Its name for reports and the call, see `Dense`; None where vLLM has none (on CPUs)."""
    if not current_platform.is_cuda():
        return None
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported

        version = get_flash_attn_version()
        if version and is_fa_version_supported(version):
            return f"FlashAttention {version}", partial(_flash, version)
    except ImportError:  # builds without its kernels
        pass
    return "vLLM's Triton attention", _triton


def _flash(
    version: int, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, query_start: Tensor, seq_lens: Tensor,
    table: Tensor, most_new: int, longest: int, scale: float,
) -> None:  # fmt: skip
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    flash_attn_varlen_func(
        q=query, k=keys, v=values, out=out, cu_seqlens_q=query_start, max_seqlen_q=most_new, seqused_k=seq_lens,
        max_seqlen_k=longest, softmax_scale=scale, causal=True, block_table=table, fa_version=version,
    )  # fmt: skip


def _triton(
    query: Tensor, keys: Tensor, values: Tensor, out: Tensor, query_start: Tensor, seq_lens: Tensor, table: Tensor,
    most_new: int, longest: int, scale: float,
) -> None:  # fmt: skip
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    unified_attention(
        q=query, k=keys, v=values, out=out, cu_seqlens_q=query_start, max_seqlen_q=most_new, seqused_k=seq_lens,
        max_seqlen_k=longest, softmax_scale=scale, causal=True, window_size=(-1, -1), block_table=table, softcap=0,
        q_descale=None, k_descale=None, v_descale=None,
    )  # fmt: skip
