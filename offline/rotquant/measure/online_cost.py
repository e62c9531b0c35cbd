"""What the online transforms of a checkpoint cost for one token, in multiply-adds.

A transform of rows of K numbers (`rotquant_kernels.online`; an addition counts as one multiply-add):

    hadamard     K log2(block)                      fast Walsh-Hadamard
    dense        K block
    kronecker    K (K / block + block)              Pᵀ X Q
    reflection   2 K                                a dot product and an update
    shift        K
    permutation  0                                  moves only

R3 transforms the queries and keys of a layer: a hadamard of head_dim on (heads + kv_heads) head_dim numbers.
A transform is counted once where one linear is served for several projections of the same input (q, k and v;
gate and up). The quantized GEMMs of the decoder layers take the sum of N K multiply-adds. Of a mixture of experts as
many count as a token passes through.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias

from rotquant.checkpoint.format import CheckpointFormat, LinearFormat
from rotquant.errors import RotQuantError
from rotquant.models import describe, read_config

Stage: TypeAlias = tuple[str, int, int]  # kind, block, K


@dataclass(frozen=True)
class OnlineCost:
    """Multiply-adds for a token: of all online transforms, and of the decoder layers' quantized GEMMs."""

    online: int
    gemm: int


def multiply_adds(stages: Iterable[Stage]) -> int:
    """Multiply-adds of a chain of transforms for one token.

    Args:
        stages: (kind, block, K) of each.
    Raises:
        RotQuantError: a kind whose cost is not known here.
    """
    return sum(_stage_cost(*stage) for stage in stages)


def _stage_cost(kind: str, block: int, width: int) -> int:
    match kind:
        case "none" | "permutation":
            return 0
        case "hadamard":
            return width * (block.bit_length() - 1)
        case "dense":
            return width * block
        case "kronecker":
            return width * (width // block + block)
        case "reflection":
            return 2 * width
        case "shift":
            return width
    raise RotQuantError(f"online transform {kind!r}: its cost is not known")


def online_cost(folder: Path) -> OnlineCost:
    """Cost of a checkpoint's online transforms, from its config.json alone.

    Raises:
        RotQuantError: a config.json that this build does not run.
    """
    config = read_config(folder)
    arch = describe(config, f"{folder}/config.json")
    checkpoint = CheckpointFormat(config.quantization_config, getattr(config, "rotquant", {}), arch.head_dim)
    served: dict[tuple[str, tuple[Stage, ...]], Fraction] = {}
    gemm = total = Fraction(0)
    for index, kind in enumerate(arch.kinds):
        for name, parts in kind.stored.items():
            linear = checkpoint.linear(arch.layer_prefix(index) + name)
            if linear is None:
                continue
            rows, width = kind.stored_shape(name)
            site, share = kind.site_of[parts[0]], kind.shares[parts[0]]
            gemm += rows * width * share
            total += linear.rank * (rows + width)
            place = name if site == "down" else site  # each expert has its own input there
            served[f"{index}.{place}", tuple(stages(linear, width))] = share if site == "down" else Fraction(1)
        if checkpoint.kv and checkpoint.kv.rotate:
            attention = kind.attention
            numbers = (attention.heads + attention.kv_heads) * attention.head_dim
            total += multiply_adds([("hadamard", checkpoint.kv.rotate, numbers)])
    total += sum(multiply_adds(chain) * share for (_, chain), share in served.items())
    return OnlineCost(int(total), int(gemm))


def stages(linear: LinearFormat, width: int) -> list[Stage]:
    """The online transforms of a linear layer's input of `width` numbers."""
    return [(t.kind, t.block, width) for t in linear.transforms]
