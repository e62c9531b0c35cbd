"""Every op is valid without rows: ranks that run in lockstep have steps without a token of their own."""

import pytest
import torch

from empty_steps import check
from native_tiers import tier  # noqa: F401
from rotquant_kernels import OPS, ops

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(dtype):
    assert check(ops.SPECIFICATION, dtype) == set(OPS) - {"pack_weight"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_native(tier, dtype):  # noqa: F811
    kernels = {op: getattr(torch.ops.rotquant, op) for op in OPS}
    # `quantized_linear` is not for weights in the layout of CPUs.
    assert check(kernels, dtype, without=("quantized_linear",)) == set(OPS) - {"pack_weight", "quantized_linear"}
