"""rotquant's ops: their schemas, their plain-torch specification and the kernels that implement them.

`ops` registers everything under `torch.ops.rotquant`; `reference` says what each op computes;
`convention` is the one place where numbers become integers. Knows nothing of quantizers or servers.
"""

from rotquant_kernels import convention, reference
from rotquant_kernels.experts import prepare_experts
from rotquant_kernels.online import Stage, linear, transform
from rotquant_kernels.ops import (
    OPS,
    int_linear,
    kernel_of,
    kv4_attention,
    kv4_write,
    moe_experts,
    online_stage,
    prepare_weight,
    quantize_rows,
    transform_rows,
)

__all__ = [
    "OPS",
    "Stage",
    "convention",
    "int_linear",
    "kernel_of",
    "kv4_attention",
    "kv4_write",
    "linear",
    "moe_experts",
    "online_stage",
    "prepare_experts",
    "prepare_weight",
    "quantize_rows",
    "reference",
    "transform",
    "transform_rows",
]
