"""Settings of a server that reach into rotquant's arithmetic from outside: which work, and which are refused."""

from __future__ import annotations

import os

import torch

from rotquant.errors import RotQuantError


def refuse_batch_invariance() -> None:
    """To be asked before anything is loaded.

    Raises:
        RotQuantError: under VLLM_BATCH_INVARIANT=1 where vLLM or rotquant's kernels do not keep that promise.
    """
    from vllm_rotquant import compat  # imports vLLM, which the rest of this module does not need

    if os.environ.get("VLLM_BATCH_INVARIANT", "0") == "0":
        return
    if not compat.on_cpu():
        raise RotQuantError(
            "VLLM_BATCH_INVARIANT=1: on GPUs rotquant's attention cuts its work up by the size of the batch, so that "
            "the last bits of a token depend on it: unset VLLM_BATCH_INVARIANT"
        )
    if not compat.HAS_TRITON:
        raise RotQuantError(
            "VLLM_BATCH_INVARIANT=1: vLLM's kernels for it are written in Triton, which does not run on this CPU, so "
            "that no model starts: unset VLLM_BATCH_INVARIANT (rotquant's CPU kernels give a token the same bits in "
            "every batch without it)"
        )


def refuse_rounded_products(where: str, device: torch.device) -> None:
    """To be asked where torch's float32 products serve: transforms that are ops of their own, the low-rank branch.

    What a float32 product is depends on switches of torch, of vLLM and of the libraries below; so one is made. The
    numbers have one bit more than TensorFloat-32 keeps, and four more than bfloat16.

    Args:
        where: the layer.
    Raises:
        RotQuantError: if products are rounded to fewer bits.
    """
    size = 64  # from here on libraries take their fast ways
    x = torch.full((size, size), 1 + 2**-11, dtype=torch.float32, device=device)
    if not torch.equal(x @ torch.eye(size, dtype=torch.float32, device=device), x):
        raise RotQuantError(
            f"{where}: its online transforms are float32 products, which this server rounds to fewer bits: leave "
            "VLLM_FLOAT32_MATMUL_PRECISION at highest, and TORCH_ALLOW_TF32_CUBLAS_OVERRIDE unset"
        )
