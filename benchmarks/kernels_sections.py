"""The sections of the CPU benchmark: the problem of each, and who solves it."""

from __future__ import annotations

import kernels_attention
import kernels_experts
import kernels_linear
import kernels_optional
from kernels_lanes import Section


def sections() -> dict[str, Section]:
    """Problem and peers of every section. A new peer registers itself in the module of its section."""
    linear = kernels_linear.PEERS | kernels_optional.PEERS
    return {
        "linear": (kernels_linear.Problem, linear),
        "attention": (kernels_attention.Problem, kernels_attention.PEERS),
        "experts": (kernels_experts.Problem, kernels_experts.PEERS),
    }
