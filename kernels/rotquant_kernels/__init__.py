"""rotquant's ops: their schemas, their plain-torch specification and the kernels that implement them.

`ops` registers everything under `torch.ops.rotquant`; `reference` says what each op computes;
`convention` is the one place where numbers become integers; `stages` has the online transforms, a file each. Knows
nothing of quantizers or servers.

Names are imported on first use: whoever wants `stages` or `convention` alone loads, and compiles, no kernels.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rotquant_kernels import convention, reference
    from rotquant_kernels.online import linear, transform
    from rotquant_kernels.ops import (
        OPS,
        int_linear,
        kernel_of,
        kv4_attention,
        kv4_write,
        moe_experts,
        online_stage,
        prepare_experts,
        prepare_weight,
        quantize_rows,
    )
    from rotquant_kernels.stages import KINDS, Stage

__all__ = [
    "KINDS",
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
]

_MODULES = ("convention", "reference")
_FROM = {"KINDS": "stages", "Stage": "stages", "linear": "online", "transform": "online"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'rotquant_kernels' has no attribute {name!r}")
    if name in _MODULES:
        return import_module(f"rotquant_kernels.{name}")
    return getattr(import_module(f"rotquant_kernels.{_FROM.get(name, 'ops')}"), name)
