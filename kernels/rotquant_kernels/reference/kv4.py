"""Specification of the 4-bit KV cache: its pages, writing them, attention over them."""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant_kernels.formats import KVFormat, feedback
from rotquant_kernels.stages.hadamard import hadamard


def kv_planes(cache: Tensor, head_dim: int, symmetric: bool) -> dict[str, Tensor]:
    """Views into the pages.

    Args:
        cache: uint8 or int8 [blocks, heads, N, C], C = kv_token_bytes, N and d multiples of 16; each
            (block, head) plane of N * C bytes is contiguous and holds, one after the other: K codes and
            V codes (`pack_codes`), N * d / 2 bytes each, K scale float16 [N], V scale float16 [N], and if
            asymmetric zero points + 8, uint8 [N]: K's in the low nibble, V's in the high nibble.
    Returns:
        k, v uint8 [blocks, heads, N * d / 2]; k_scale, v_scale float16 and zeros uint8 [blocks, heads, N].
    """
    n = cache.shape[2]
    plane = cache.view(torch.uint8).flatten(2)
    sizes = [n * head_dim // 2] * 2 + [2 * n] * 2 + ([] if symmetric else [n])
    parts = plane.split(sizes, dim=-1)
    views = {
        "k": parts[0],
        "v": parts[1],
        "k_scale": parts[2].view(torch.float16),
        "v_scale": parts[3].view(torch.float16),
    }
    if not symmetric:
        views["zeros"] = parts[4]
    return views


def pack_codes(codes: Tensor, name: str) -> Tensor:
    """Codes of whole planes as the page stores them: tiles of 16 channels x 16 steps, 128 bytes each.

    The integer dot products of attention run over steps, in fours, for 16 channels at a time: of K the channels
    are tokens and the steps dimensions, of V the other way round. Byte 64 s + 4 c + t of a tile holds channel c:
    step 8 s + t in the low nibble, step 8 s + 4 + t in the high nibble. Tiles of 16 tokens lie one after the
    other, in each by dimension.

    Args:
        codes: uint8 [..., N, d], the signed codes + 8.
        name: "k" or "v".
    Returns:
        uint8 [..., N * d / 2].
    """
    tiles = codes.unflatten(-1, (-1, 16)).unflatten(-3, (-1, 16)).transpose(-3, -2)  # [..., N/16, d/16, token, dim]
    tiles = tiles if name == "k" else tiles.mT  # [..., channel, step]
    nibbles = tiles.unflatten(-1, (2, 2, 4)).movedim(-4, -2)  # step 8 s + 4 high + t: [..., s, high, channel, t]
    return (nibbles.select(-3, 0) | nibbles.select(-3, 1) << 4).flatten(-5)


def unpack_codes(stored: Tensor, name: str, head_dim: int) -> Tensor:
    """Inverse of `pack_codes`: uint8 [..., N * d / 2] to uint8 [..., N, d]."""
    both = stored.unflatten(-1, (-1, head_dim // 16, 2, 16, 4))
    nibbles = torch.stack((both & 15, both >> 4), dim=-3)  # [..., N/16, d/16, s, high, channel, t]
    tiles = nibbles.movedim(-2, -4).flatten(-3)  # [..., channel, step]
    tiles = tiles if name == "k" else tiles.mT
    return tiles.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def kv4_write(
    key: Tensor,
    value: Tensor,
    cache: Tensor,
    slots: Tensor,
    rotate: int,
    symmetric: bool,
    k_clip: float,
    v_clip: float,
    key_feedback: Tensor | None = None,
) -> None:
    """Rotates K, quantizes K and V per (token, head) and stores them in their pages.

    A row with NaN or infinity is stored with the scale NaN, codes and zero point 0.

    Args:
        key, value: float [T, heads, d]; rows beyond len(slots) are padding.
        cache: pages, see `kv_planes`; changed in place.
        slots: int64 [T']; token t goes to block slots[t] // N, position slots[t] % N; -1 skips it.
        rotate: block of the Hadamard applied to K (R3), 0 for none.
        key_feedback: F float32 [heads, d, d] of keys that are rounded with error feedback (`formats.feedback`).
    """
    planes, form = kv_planes(cache, key.shape[-1], symmetric), KVFormat(symmetric, k_clip, v_clip, rotate)
    stored = slots >= 0
    blocks, offsets = slots[stored] // cache.shape[2], slots[stored] % cache.shape[2]
    touched, where = blocks.unique(return_inverse=True)
    zeros = {}
    for name, x, row, block in (("k", key, form.key, rotate), ("v", value, form.value, 0)):
        rows = x[: slots.shape[0]][stored].float()
        rows = hadamard(rows, block) if block else rows
        if name == "k" and key_feedback is not None:
            rounded, scale, zero = feedback.quantize(rows, row, key_feedback)
        else:
            scale, zero = row.qparams(rows)
            rounded = row.quantize(rows, scale, zero)
        codes = unpack_codes(planes[name][touched], name, key.shape[-1])
        codes[where, :, offsets] = (rounded + 8).to(torch.uint8)
        planes[name][touched] = pack_codes(codes, name)
        planes[f"{name}_scale"][blocks, :, offsets] = scale[..., 0].nan_to_num(torch.nan).half()  # one kind of NaN
        zeros[name] = (zero[..., 0].nan_to_num(0) + 8).to(torch.uint8)
    if not symmetric:
        planes["zeros"][blocks, :, offsets] = zeros["k"] | zeros["v"] << 4


def kv4_read(cache: Tensor, blocks: Tensor, head_dim: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Dequantized K (in the rotated basis) and V of whole blocks.

    Args:
        blocks: int [..., P] block numbers.
    Returns:
        K, V float32 [..., heads, P * N, d].
    """
    planes = kv_planes(cache, head_dim, symmetric)
    out = []
    for name, shift in (("k", 0), ("v", 4)):
        codes = unpack_codes(planes[name][blocks], name, head_dim).float()
        zero = 8 if symmetric else (planes["zeros"][blocks] >> shift & 15).float().unsqueeze(-1)
        x = (codes - zero) * planes[f"{name}_scale"][blocks].float().unsqueeze(-1)
        out.append(x.movedim(-3, -4).flatten(-3, -2))  # [..., P, heads, N, d] -> [..., heads, P * N, d]
    return out[0], out[1]


def kv4_gather(
    cache: Tensor, block_table: Tensor, seq_lens: Tensor, head_dim: int, symmetric: bool, page: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """K (in the rotated basis) and V of sequences, one behind the other in pages of `page` tokens.

    Zeros behind a sequence's end, up to the end of its last page. A NaN scale of V makes K NaN and V 0, so that it
    shows where the position is seen and nowhere else: 0 * NaN is NaN.

    Args:
        block_table: int32 [B, P]; seq_lens: int32 [B].
    Returns:
        [pages, page, heads, d] in `dtype`, each.
    """
    both: tuple[list[Tensor], list[Tensor]] = ([], [])
    for blocks, length in zip(block_table, seq_lens.tolist(), strict=True):
        used = blocks[: -(-length // cache.shape[2])].long()
        keys, values = (x[:, :length].transpose(0, 1) for x in kv4_read(cache, used, head_dim, symmetric))
        lost = values.isnan().any(-1, keepdim=True)
        for made, x in zip(both, (keys.masked_fill(lost, torch.nan), values.masked_fill(lost, 0)), strict=True):
            padded = torch.nn.functional.pad(x.to(dtype), (0, 0, 0, 0, 0, -length % page))
            made.append(padded.unflatten(0, (-1, page)))
    return torch.cat(both[0]), torch.cat(both[1])


def kv4_attention(
    query: Tensor,
    cache: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    out: Tensor,
    scale: float,
    rotate: int,
    symmetric: bool,
    window: int = 0,
    cap: float = 0.0,
) -> None:
    """Causal attention of a mixed batch (prefill chunks and decode steps) over 4-bit pages, in float32.

    softmax(scale * (q R)(K R)ᵀ) V = softmax(scale * q Kᵀ) V for the orthogonal R = I ⊗ H/sqrt(rotate).
    A NaN scale of a visible position makes the result NaN. A kernel may round the query and the weights, as long
    as that adds at most a fifth of the error that the 4 bits of K and V made.

    Args:
        query: float [T, heads, d]; query heads h share KV head h // (heads / kv_heads).
        query_start: int32 [B + 1], first row of each sequence; rows from query_start[B] on are padding.
        seq_lens: int32 [B], tokens in the cache, those of this step included.
        block_table: int32 [B, P]; pages that no row sees may have any number.
        out: [T, heads, d] in query's dtype, filled; 0 in padding rows.
        window: positions that a query sees at most, its own and those before it; 0 for all.
        cap: scores s become cap tanh(s / cap) before the softmax; 0 for none.
    """
    starts, lens = query_start.tolist(), seq_lens.tolist()
    out[starts[-1] :] = 0
    rotated = hadamard(query.float(), rotate) if rotate else query.float()
    decode = [b for b in range(len(lens)) if starts[b + 1] - starts[b] == 1]
    groups = [decode] if decode else []
    groups += [[b] for b in range(len(lens)) if starts[b + 1] - starts[b] > 1]
    for members in groups:  # all decode steps together, each prefill chunk alone
        rows = torch.tensor([list(range(starts[b], starts[b + 1])) for b in members])
        pages, skipped = seen_pages([lens[b] for b in members], rows.shape[1], window, block_table[members], cache)
        keys, values = kv4_read(cache, pages, query.shape[-1], symmetric)
        ends = torch.tensor([lens[b] for b in members]) - skipped
        out[rows] = attend(rotated[rows], keys, values, ends, scale, window, cap).to(query.dtype)


def seen_pages(lens: list[int], steps: int, window: int, table: Tensor, cache: Tensor) -> tuple[Tensor, int]:
    """Block numbers from the first page that any of the sequences sees to the last, and the positions before them.

    Pages of a sequence that only another one sees are block 0: their numbers may mean nothing.

    Args:
        lens: tokens of each sequence, of which the last `steps` are new; table: int32 [B, P].
    Returns:
        int64 [B, pages seen].
    """
    size = cache.shape[2]
    firsts = [max(0, n - steps - window + 1) // size if window else 0 for n in lens]
    first, last = min(firsts), max(-(-n // size) for n in lens)
    number = torch.arange(first, last, device=table.device)
    bounds = torch.tensor([firsts, [-(-n // size) for n in lens]], device=table.device)[:, :, None]
    seen = (number >= bounds[0]) & (number < bounds[1])
    return table[:, first:last].long().masked_fill(~seen, 0), first * size


def attend(
    query: Tensor, keys: Tensor, values: Tensor, ends: Tensor, scale: float, window: int = 0, cap: float = 0.0
) -> Tensor:
    """Causal grouped-query attention; query t of a sequence sees the first ends - T + t + 1 keys, or the last
    `window` of these.

    Args:
        query: float32 [B, T, heads, d]; keys, values: float32 [B, kv_heads, L, d]; ends: int [B].
    Returns:
        float32 [B, T, heads, d].
    """
    batch, steps, heads, dim = query.shape
    kv_heads, length = keys.shape[1:3]
    rows = heads // kv_heads * steps
    grouped = query.movedim(2, 1).reshape(batch, kv_heads, rows, dim)  # [B, kv_heads, group * T, d]
    scores = (grouped @ keys.mT * scale).view(batch, heads, steps, length)
    scores = (scores / cap).tanh() * cap if cap else scores
    last = ends[:, None] - steps + torch.arange(steps)  # [B, T], last visible position
    hidden = torch.arange(length) > last[:, :, None]
    if window:
        hidden |= torch.arange(length) <= last[:, :, None] - window
    weights = scores.masked_fill(hidden.unsqueeze(1).to(scores.device), float("-inf")).softmax(-1)
    # Positions that no query sees may hold anything, NaN included, and 0 * NaN is NaN.
    unseen = hidden.all(1)[:, None, :, None].to(values.device)
    mixed = weights.view(batch, kv_heads, rows, length) @ values.masked_fill(unseen, 0)
    return mixed.view(batch, heads, steps, dim).movedim(1, 2)
