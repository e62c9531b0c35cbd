"""How `pack_weight` lays 4- and 8-bit weights out for the GPU: chunks of 16 bytes of a channel, channel by channel.

    words [chunk][channel][4]    a chunk is 32 columns at 4 bits, 16 at 8 bits; then int32 [group][channel], row sums

Codes are signed. At 4 bits byte b of a chunk holds column b in its low and column 16 + b in its high nibble, so that
both halves of a byte meet activations that lie 16 bytes apart and in order. Channels and columns are filled up to a
multiple of 128 with codes 0, so that no tile reads past the end. The row sums take asymmetric activations' zero points
off. Humming reads the same words; behind the sums of a layer that it runs lie the scales in its own order: `humming`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 16  # bytes
CHANNELS, COLUMNS = 128, 128  # a layout's multiples: those of the largest tile


def multiple(size: int, of: int) -> int:
    """size rounded up to a multiple."""
    return -(-size // of) * of


class Weight(NamedTuple):
    """The parts of a packed weight; views of it."""

    words: Tensor  # int8 [chunks, channels, 16]
    sums: Tensor  # int32 [groups, channels]
    scales: Tensor | None  # bfloat16 [channels], as Humming reads them, where it is to run the layer


def misfit(columns: int, groups: int) -> str:
    """Why the kernels cannot read a weight of so many scales a row, or nothing."""
    size = columns // groups
    if groups == 1 or size % 32 == 0:
        return ""
    return (
        f"the CUDA kernels read weight groups of a multiple of 32 inputs, not of {size}: quantize again with "
        "another weights.group_size"
    )


def pack_weight(packed: Tensor, bits: int, columns: int, groups: int) -> Tensor:
    """See `ops.prepare_weight`.

    Args:
        packed: int32 [N, ceil(columns * bits / 32)], codes + 2^(bits - 1); or a stack of such weights [E, ...].
    Returns:
        int32 [words], [E, words] of a stack: the layout above.
    Raises:
        ValueError: columns, bits or groups that the CUDA kernels do not read.
    """
    if packed.dim() == 3:
        first = pack_weight(packed[0], bits, columns, groups)
        out = first.new_empty(len(packed), *first.shape)
        for place, one in zip(out, packed, strict=True):  # one after the other: two copies of all would be too many
            place.copy_(pack_weight(one, bits, columns, groups))
        return out
    size = columns // groups
    if bits not in (4, 8) or packed.shape[1] != -(-columns * bits // 32) or columns % groups:
        raise ValueError(
            f"{list(packed.shape)} words of {bits}-bit codes do not hold {columns} columns in {groups} groups"
        )
    if why := misfit(columns, groups):
        raise ValueError(why)
    stored = packed.contiguous().view(torch.int8) ^ (0x88 - 256 if bits == 4 else 0x80 - 256)  # unsigned to signed
    codes = torch.stack((stored << 4 >> 4, stored >> 4), -1).flatten(1) if bits == 4 else stored
    codes = codes[:, :columns]
    sums = codes.unflatten(1, (groups, size)).sum(-1, dtype=torch.int32)
    rows = multiple(len(packed), CHANNELS)
    codes = pad(codes, (0, -columns % COLUMNS, 0, rows - len(packed)))
    if bits == 4:
        halves = codes.view(rows, -1, 2, CHUNK)
        codes = (halves[:, :, 0] & 15) | (halves[:, :, 1] << 4)
    words = codes.view(rows, -1, CHUNK).transpose(0, 1).contiguous().view(torch.int32).flatten()
    return torch.cat((words, pad(sums, (0, 0, 0, rows - len(packed))).t().flatten()))


def unpack(weight: Tensor, bits: int, columns: int, channels: int, groups: int) -> Weight:
    """Views of what `pack_weight` made.

    Raises:
        ValueError: weight is not of that shape, or not prepared for CUDA.
    """
    chunks, rows = multiple(columns, COLUMNS) * bits // (8 * CHUNK), multiple(channels, CHANNELS)
    words = chunks * rows * CHUNK // 4
    end = words + groups * rows
    if weight.dtype != torch.int32 or weight.dim() != 1 or weight.numel() not in (end, end + rows // 2):
        raise ValueError(
            f"weight {weight.dtype} {list(weight.shape)} was not made by prepare_weight for {channels} x {columns} "
            f"codes of {bits} bits in {groups} groups on CUDA"
        )
    scales = weight[end:].view(torch.bfloat16) if weight.numel() > end else None
    codes = weight[:words].view(torch.int8).view(chunks, rows, CHUNK)
    return Weight(codes, weight[words:end].view(groups, rows), scales)
