"""What the online transforms of a checkpoint cost for one token, in multiply-adds.

Each kind of transform (`rotquant_kernels.stages`) knows its own; an addition counts as one multiply-add.
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
from rotquant.models import describe, read_config
from rotquant_kernels.stages import KINDS

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
    """
    return sum(KINDS[kind].cost(block, width) for kind, block, width in stages)


def online_cost(folder: Path) -> OnlineCost:
    """Cost of a checkpoint's online transforms, from its config.json alone.

    Raises:
        RotQuantError: a config.json that this build does not run.
    """
    config = read_config(folder)
    arch = describe(config, f"{folder}/config.json")
    checkpoint = CheckpointFormat.of(config)
    served: dict[tuple[str, tuple[Stage, ...]], Fraction] = {}
    gemm = total = Fraction(0)
    subtracted: set[tuple[int, str]] = set()  # sites whose linears share what a branch takes off their inputs
    for index, kind in enumerate(arch.kinds):
        for name, parts in kind.stored.items():
            linear = checkpoint.linear(arch.layer_prefix(index) + name)
            if linear is None:
                continue
            rows, width = kind.stored_shape(name)
            site, share = kind.site_of[parts[0]], kind.shares[parts[0]]
            gemm += rows * width * share
            shared = linear.subtracts and (index, site) in subtracted
            total += linear.rank * (rows + width * (0 if shared else 2 if linear.subtracts else 1))
            subtracted.add((index, site))
            place = name if site == "down" else site  # each expert has its own input there
            served[f"{index}.{place}", tuple(stages(linear, width))] = share if site == "down" else Fraction(1)
        if checkpoint.kv and checkpoint.kv.feedback and (attention := kind.attends):
            total += attention.kv_heads * attention.head_dim * (attention.head_dim - 1) // 2
        if checkpoint.kv and checkpoint.kv.rotate and (attention := kind.attends):
            numbers = (attention.heads + attention.kv_heads) * attention.head_dim
            total += multiply_adds([("hadamard", checkpoint.kv.rotate, numbers)])
    total += sum(multiply_adds(chain) * share for (_, chain), share in served.items())
    return OnlineCost(int(total), int(gemm))


def stages(linear: LinearFormat, width: int) -> list[Stage]:
    """The online transforms of a linear layer's input of `width` numbers."""
    return [(t.kind, t.block, width) for t in linear.transforms]
