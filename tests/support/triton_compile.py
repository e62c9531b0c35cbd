"""Kernels as their launches compile them for GPUs that are not here, and what is in them."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import triton

import launch_gate
from stand_in_gpu import stand_in

# Triton 3.6 and 3.7 compile int8 for mma.sync, which every GPU has, where later ones take the matrix units of Hopper
# (for few rows) and of Blackwell (always).
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
KNOWS_NEWER_UNITS = VERSION >= (3, 8)


def compiled(arch: int, launch: Callable[[], Any]) -> Any:
    """The first kernel of a launch, for sm_`arch`."""
    with stand_in(arch) as found:
        launch()
    return found[0].kernel


def instructions(kernel: Any) -> Counter[str]:
    """How often each PTX instruction occurs."""
    return Counter(re.findall(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]+)", kernel.asm["ptx"], re.M))


def linear(arch: int, tokens: int, **settings: Any) -> Any:
    """The product of a layer of 4096 columns with a bias, symmetric unless `settings` (`launch_gate.linear`) say so."""
    return compiled(
        arch, lambda: launch_gate.linear(tokens, 4096, 4096, **{"symmetric": True, "bias": True} | settings)
    )
