"""All tiers of the native CPU kernels in one process."""

import os
from collections.abc import Iterator

import pytest
import torch

from rotquant_kernels import native

EXAMPLES = int(os.environ.get("ROTQUANT_EXAMPLES", "100"))  # of each property, in each tier
GEMM_TIERS = [tier for tier in native.TIERS if tier not in ("auto", native.REFERENCE)]
TIERS = [tier for tier in GEMM_TIERS if tier not in ("amx", "i8mm")]  # which are avx512 and neon in all else


def chosen(name: str) -> Iterator[str]:
    best = torch.ops.rotquant.cpu_tier("")
    try:
        torch.ops.rotquant.cpu_tier(name)
    except RuntimeError:
        pytest.skip(f"this machine has no {name}")
    yield name
    torch.ops.rotquant.cpu_tier(best)


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on each tier of this machine."""
    yield from chosen(request.param)


@pytest.fixture(params=GEMM_TIERS)
def gemm_tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on each GEMM of this machine."""
    yield from chosen(request.param)
