"""Where 4-bit K and V lie as numbers of 16 bits (`kv4_dense`), and what reads them there. Imports no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

PAGE = 128  # tokens


class Workspace(NamedTuple):
    """How the sequences of a launch lie in it; made once a step, for all layers.

    first: int32 [B], each sequence's first page; table: int32 [B, P], all of its pages; pages, longest: how many there
    are, and the tokens of the longest sequence at most.
    """

    first: Tensor
    table: Tensor
    pages: int
    longest: int


class Dense(Protocol):
    """Causal attention over pages of 16-bit K and V [pages, PAGE, KV heads, d]."""

    def __call__(
        self, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, query_start: Tensor, seq_lens: Tensor,
        table: Tensor, most_new: int, longest: int, scale: float,
    ) -> object: ...  # fmt: skip


def workspace(lens: Sequence[int], device: torch.device) -> Workspace:
    """Room for sequences of at most `lens` tokens."""
    counts = torch.tensor([-(-length // PAGE) for length in lens])
    first = counts.cumsum(0) - counts
    table = first[:, None] + torch.arange(int(counts.max()))
    table = table.clamp(max=int(counts.sum()) - 1)  # of the shorter ones nothing reads the rest
    first, table = (x.to(device, torch.int32, non_blocking=True) for x in (first, table))
    return Workspace(first, table, int(counts.sum()), max(lens))
