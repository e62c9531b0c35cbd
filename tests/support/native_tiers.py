"""All tiers of the native CPU kernels in one process."""

import os
from collections.abc import Iterator

import pytest
import torch

from rotquant_kernels import native

EXAMPLES = int(os.environ.get("ROTQUANT_EXAMPLES", "100"))  # of each property, in each tier
TIERS = [tier for tier in native.TIERS if tier not in ("auto", native.REFERENCE)]


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on each tier of this machine."""
    best = torch.ops.rotquant.cpu_tier("")
    try:
        torch.ops.rotquant.cpu_tier(request.param)
    except RuntimeError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    torch.ops.rotquant.cpu_tier(best)
