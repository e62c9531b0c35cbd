"""What the online transforms of a checkpoint cost for one token, in multiply-adds.

Each kind of transform (`rotquant_kernels.stages`) knows its own; an addition counts as one multiply-add.
R3 transforms the queries and keys of a layer: a hadamard of head_dim on (heads + kv_heads) head_dim numbers.
A transform is counted once where one linear is served for several projections of the same input (q, k and v;
gate and up). The quantized GEMMs of the decoder layers take the sum of N K multiply-adds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
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
    served: set[tuple[str, tuple[Stage, ...]]] = set()
    gemm = total = 0
    for index, kind in enumerate(arch.kinds):
        for name, parts in kind.stored.items():
            linear = checkpoint.linear(arch.layer_prefix(index) + name)
            if linear is None:
                continue
            rows, width = kind.stored_shape(name)
            gemm += rows * width
            total += linear.rank * (rows + width)
            served.add((f"{index}.{kind.site_of[parts[0]]}", tuple(stages(linear, width))))
        if checkpoint.kv and checkpoint.kv.rotate:
            attention = kind.attention
            numbers = (attention.heads + attention.kv_heads) * attention.head_dim
            total += multiply_adds([("hadamard", checkpoint.kv.rotate, numbers)])
    total += sum(multiply_adds(chain) for _, chain in served)
    return OnlineCost(total, gemm)


def stages(linear: LinearFormat, width: int) -> list[Stage]:
    """The online transforms of a linear layer's input of `width` numbers."""
    return [(t.kind, t.block, width) for t in linear.transforms]
