"""Norm gains in the linears that read them, where there is no R1 to take them there: S_n of 1 / |g|.

    g' = g s = ±1;  W' = W diag(1/s) = W diag(|g|)

A Hadamard behind a norm spreads over all channels what stands in a few of them. With the gain in the norm that is what
the gain makes large as well. In the weights, the gain is spread by the Hadamard that these get.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant.checkpoint.source import Source
from rotquant.models import Architecture
from rotquant.transforms.space import Transforms


def norm_gains(source: Source, arch: Architecture, index: int) -> dict[str, Tensor]:
    """The gain of the norm that each site reads, float64 [hidden], as the original has it."""
    kind, prefix = arch.kinds[index], arch.layer_prefix(index)
    return {site: source.get(f"{prefix}{norm}.weight").double() + kind.offset for site, norm in kind.norms.items()}


def scale_to(wanted: Tensor, gain: Tensor) -> Tensor:
    """The S_n that makes a gain into another; 1 where a gain is 0, and stays so."""
    return torch.where(gain == 0, 1.0, wanted / gain)


def with_gains_in_linears(transforms: Transforms, arch: Architecture, source: Source) -> Transforms:
    """Sets S_n where a Hadamard runs behind a norm of a stream that does not rotate."""
    sites = [site for site in ("attn", "mlp") if not arch.rotates and transforms.hadamard(site)]
    for index, layer in enumerate(transforms.layers) if sites else ():
        for site, gain in norm_gains(source, arch, index).items():
            if site in sites:
                setattr(layer, f"s_{site}", scale_to(gain.sign(), gain))
    return transforms
