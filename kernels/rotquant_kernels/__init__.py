"""rotquant's ops: their schemas, their plain-torch specification and the kernels that implement them.

`ops` registers everything under `torch.ops.rotquant`; `reference` says what each op computes;
`convention` is the one place where numbers become integers. Knows nothing of quantizers or servers.
"""

from rotquant_kernels import convention, reference
from rotquant_kernels.ops import (
    OPS,
    int_linear,
    kernel_of,
    kv4_attention,
    kv4_write,
    prepare_weight,
    quantize_rows,
    transform_rows,
)

__all__ = [
    "OPS",
    "convention",
    "int_linear",
    "kernel_of",
    "kv4_attention",
    "kv4_write",
    "prepare_weight",
    "quantize_rows",
    "reference",
    "transform_rows",
]
