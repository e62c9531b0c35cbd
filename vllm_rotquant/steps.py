"""A scheduler step on a GPU, cut into launches: what suits one token of a long context does not suit a long prompt.

    few     decodes, speculative tokens           the int8 kernel with the tile's long side along the context
    dense   prefills, if there is something       pages gathered as bfloat16, then vLLM's own attention
            that reads 16 bits
    some    other chunks                          the int8 kernel of long rows

Neighbours of one kind are one launch; vLLM puts decodes first (`reorder_batch_threshold`), but no result depends on
that. A step in which all are alike is not cut, so that what a CUDA graph captures is a plain call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from rotquant_kernels.cuda import workspace

FEW_ROWS = 16  # query rows (tokens times query heads of a KV head) of a sequence that count as a decode
DENSE_TOKENS = 64  # new tokens from which on gathering is worth its bytes
WORKSPACE_BYTES = 256 << 20  # of K and V of one layer; a longer context takes the int8 kernel


class Part(NamedTuple):
    """A launch: some sequences of the step and the rows of their new tokens.

    query_start counts from the part's first row; room is there where it is dense; most_new: tokens of a sequence.
    """

    rows: slice
    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    room: workspace.Workspace | None
    most_new: int


class Limits(NamedTuple):
    """What decides how a step is cut up.

    Args:
        group: query heads of a KV head; page: tokens of a page of the cache.
        room: tokens that fit into a workspace, 0 where nothing reads it; dense: fewest new tokens of a dense sequence.
    """

    group: int
    page: int
    room: int = 0
    dense: int = DENSE_TOKENS


def workspace_tokens(kv_heads: int, head_dim: int) -> int:
    """Tokens of a workspace of WORKSPACE_BYTES, whole pages."""
    return WORKSPACE_BYTES // (4 * kv_heads * head_dim) // workspace.PAGE * workspace.PAGE


def kind(new: int, length: int, limits: Limits) -> str:
    if new * limits.group <= FEW_ROWS and new < limits.dense:
        return "few"
    return "dense" if new >= limits.dense and padded(length) <= limits.room else "some"


def padded(length: int) -> int:
    """Tokens that a sequence takes of a workspace."""
    return -(-length // workspace.PAGE) * workspace.PAGE


def runs(new: Sequence[int], lens: Sequence[int], limits: Limits) -> Iterator[tuple[str, int, int]]:
    """Kind, first and last (exclusive) of each run of sequences that are launched together."""
    first, room, before = 0, 0, ""
    for s, (count, length) in enumerate(zip(new, lens, strict=True)):
        now = kind(count, length, limits)
        if s and (now != before or (now == "dense" and room + padded(length) > limits.room)):
            yield before, first, s
            first, room = s, 0
        before, room = now, room + padded(length)
    if new:
        yield before, first, len(new)


def parts(
    new: Sequence[int], lens: Sequence[int], query_start: Tensor, seq_lens: Tensor, block_table: Tensor, limits: Limits
) -> list[Part]:
    """The launches of a step; none where it need not be cut.

    Args:
        new, lens: of each sequence, as the host knows them: new tokens, and those in the cache at most.
        query_start: int32 [B + 1]; seq_lens: int32 [B]; block_table: int32 [B, P].
    """
    found = list(runs(new, lens, limits))
    if len(found) <= 1 and (not found or found[0][0] != "dense"):
        return []
    ends = [0, *accumulate(new)]
    made = []
    for name, first, last in found:
        longest = max(lens[first:last])
        table = block_table[first:last, : max(-(-longest // limits.page), 1)]  # of the lengths that are there
        room = workspace.workspace(lens[first:last], query_start.device) if name == "dense" else None
        start = query_start[first : last + 1] - query_start[first]
        rows = slice(ends[first], ends[last])
        made.append(Part(rows, start, seq_lens[first:last], table, room, max(new[first:last])))
    return made
