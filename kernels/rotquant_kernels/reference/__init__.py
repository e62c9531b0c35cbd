"""What every op computes, in plain torch: the specification that each kernel must meet.

Integers (codes, accumulators) must match bit for bit; the float32 epilogue in the order written here. A file for what
works on rows of activations, one for linear layers, one for mixtures of experts, one for the KV cache.
"""

from rotquant_kernels.formats.kv import kv_token_bytes
from rotquant_kernels.reference.experts import moe_experts
from rotquant_kernels.reference.kv4 import (
    attend,
    kv4_attention,
    kv4_gather,
    kv4_read,
    kv4_write,
    kv_planes,
    pack_codes,
    unpack_codes,
)
from rotquant_kernels.reference.linear import int_linear, int_matmul, pack_weight, quantized_linear, scaled_product
from rotquant_kernels.reference.rows import online_stage, quantize_rows, rms_norm_quantize, stage_rows, turned
from rotquant_kernels.stages.hadamard import hadamard

__all__ = [
    "attend",
    "hadamard",
    "int_linear",
    "int_matmul",
    "kv4_attention",
    "kv4_gather",
    "kv4_read",
    "kv4_write",
    "kv_planes",
    "kv_token_bytes",
    "moe_experts",
    "online_stage",
    "pack_codes",
    "pack_weight",
    "quantize_rows",
    "quantized_linear",
    "rms_norm_quantize",
    "scaled_product",
    "stage_rows",
    "turned",
    "unpack_codes",
]
