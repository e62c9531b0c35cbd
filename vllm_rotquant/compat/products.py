"""vLLM's GEMM of 8-bit integers (CUTLASS), for products of many tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant_kernels.cuda.scaled_mm import Provided

# Of torch.ops._C, with the arguments that they are called with.
PLAIN, SHIFTED = "cutlass_scaled_mm", "cutlass_scaled_mm_azp"
ARGUMENTS = {
    PLAIN: ["out", "a", "b", "a_scales", "b_scales", "bias"],
    SHIFTED: ["out", "a", "b", "a_scales", "b_scales", "azp_adj", "azp", "bias"],
}
CAPABILITIES = ((8, 0), (9, 0))  # first and last: newer GPUs' kernels multiply no 8-bit integers


def integer_products() -> Provided | None:
    """The GEMM, where this vLLM has it as it is called here and the GPU is one that it multiplies integers on."""
    low, high = CAPABILITIES
    if not torch.cuda.is_available() or not low <= torch.cuda.get_device_capability() <= high:
        return None
    return Provided("vLLM's CUTLASS", scaled_mm) if all(map(fits, ARGUMENTS)) else None


def fits(name: str) -> bool:
    """Whether vLLM has an op with these arguments."""
    op = getattr(torch.ops._C, name, None)
    return op is not None and [each.name for each in op.default._schema.arguments] == ARGUMENTS[name]


def scaled_mm(
    codes: Tensor, weight: Tensor, scale: Tensor, weight_scale: Tensor, dtype: torch.dtype,
    sums: Tensor | None, zero: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `rotquant_kernels.cuda.scaled_mm.ScaledMM`."""
    out = torch.empty((codes.shape[0], weight.shape[1]), dtype=dtype, device=codes.device)
    if sums is None:
        torch.ops._C.cutlass_scaled_mm(out, codes, weight, scale, weight_scale, None)
    else:
        torch.ops._C.cutlass_scaled_mm_azp(out, codes, weight, scale, weight_scale, sums, zero, None)
    return out
