"""What every op computes, in plain torch: the specification that each kernel must meet.

Integers (codes, accumulators) must match bit for bit; the float32 epilogue in the order written here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotquant_kernels import convention
from rotquant_kernels.convention import unpack_int32
from rotquant_kernels.formats import KVFormat, RowFormat
from rotquant_kernels.formats.kv import kv_token_bytes as kv_token_bytes
from rotquant_kernels.stages import KINDS, Stage
from rotquant_kernels.stages.hadamard import hadamard as hadamard


def online_stage(x: Tensor, kind: str, block: int, tensor: Tensor | None) -> Tensor:
    """One stage of a chain of online transforms; `stages` has the kinds and their tensors.

    Args:
        x: float [..., K].
    Returns:
        float32 [..., K].
    """
    return stage_rows(x.float(), kind, block, tensor)


def stage_rows(x: Tensor, kind: str, block: int, tensor: Tensor | None) -> Tensor:
    """`online_stage` in x's dtype, float32 or float64: folding needs more digits than serving.

    Raises:
        ValueError: an unknown kind, or one without the tensor that it needs.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown online transform {kind!r}")
    return KINDS[kind].rows(x, Stage(kind, block, tensor))


def turned(x: Tensor, transform: str, block: int, matrix: Tensor | None) -> Tensor:
    """What `quantize_rows` and `int_linear` read: the rows after the transform that runs inside them.

    Args:
        x: float [..., K], block divides K.
        transform: "none", or a stage that is `inside`: "hadamard", "dense" with its matrix float [block, block].
    Returns:
        float32 [..., K].
    """
    return x.float() if transform == "none" else online_stage(x, transform, block, matrix)


def quantize_rows(
    x: Tensor,
    transform: str,
    block: int,
    matrix: Tensor | None,
    bits: int,
    symmetric: bool,
    clip: float,
    silu_mul: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Transforms and quantizes activations per token.

    Args:
        x: float [M, K]; if `silu_mul` [M, 2 K], gate then up: the activations are `convention.silu_mul` of it.
        bits, symmetric, clip: see `RowFormat`.
    Returns:
        codes int8 [M, K], scale float32 [M, 1], zero point int32 [M, 1].
    """
    y = turned(convention.silu_mul(x) if silu_mul else x, transform, block, matrix)
    rows = RowFormat(bits, symmetric, clip)
    scale, zero = rows.qparams(y)
    return rows.quantize(y, scale, zero), scale, zero.to(torch.int32)


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact int32 a bᵀ of int8 a [M, K] and int8 b [N, K]."""
    if a.device.type == "cpu":
        return torch._int_mm(a, b.t())
    return (a.double() @ b.double().t()).to(torch.int32)


def scaled_product(
    q: Tensor, scale: Tensor, zero: Tensor, codes: Tensor, weight_scale: Tensor, symmetric: bool
) -> Tensor:
    """Product of quantized rows [M, K] and weight codes [N, K], scaled: float32 [M, N], see `int_linear`."""
    size = q.shape[1] // weight_scale.shape[1]
    total = torch.zeros(())
    for group, (q_group, w_group) in enumerate(zip(q.split(size, 1), codes.split(size, 1), strict=True)):
        acc = int_matmul(q_group.contiguous(), w_group.contiguous())
        if not symmetric:
            acc = acc - zero * w_group.sum(1, dtype=torch.int32)
        total = total + acc.float() * weight_scale[:, group]
    return total * scale


def pack_weight(packed: Tensor, bits: int, columns: int, groups: int) -> Tensor:
    """The reference reads the checkpoint's own layout, int32 [N, ceil(columns * bits / 32)]."""
    return packed.clone()


def int_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    transform: str,
    block: int,
    matrix: Tensor | None,
    act_bits: int,
    act_symmetric: bool,
    act_clip: float,
    low_rank_down: Tensor | None = None,
    low_rank_up: Tensor | None = None,
    silu_mul: bool = False,
) -> Tensor:
    """Linear layer on integers: y = s_x s_w (q_x - z_x) q_wᵀ + (x T) D U + bias, q_x from x T, x transformed online.

    Args:
        x: float [..., K]; if `silu_mul` [..., 2 K], gate then up, and `convention.silu_mul` of it stands for x.
        weight: int32 [N, ceil(K * weight_bits / 32)], packed codes (`prepare_weight`).
        weight_scale: float32 [N, G]; G = 1 per channel, else one scale per group of K / G inputs.
        bias: float [N] or None.
        weight_bits, act_bits: 4 or 8.
        transform, block, matrix: see `turned`.
        low_rank_down, low_rank_up: D float [K, r] and U float [r, N], a branch in full precision, or None.
    Returns:
        [..., N] in x's dtype. Epilogue in float32: for each group acc * s_w, summed in the order of
        the groups, then * s_x, then + the low-rank branch, then + bias, then one rounding to x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    rows = convention.silu_mul(rows) if silu_mul else rows
    q, scale, zero = quantize_rows(rows, transform, block, matrix, act_bits, act_symmetric, act_clip)
    codes = unpack_int32(weight, weight_bits, rows.shape[1])
    y = scaled_product(q, scale, zero, codes, weight_scale, act_symmetric)
    if low_rank_down is not None and low_rank_up is not None:
        y = y + turned(rows, transform, block, matrix) @ low_rank_down.float() @ low_rank_up.float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


# ---- KV cache of 4 bits -------------------------------------------------------------------------------


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
) -> None:
    """Rotates K, quantizes K and V per (token, head) and stores them in their pages.

    A row with NaN or infinity is stored with the scale NaN, codes and zero point 0.

    Args:
        key, value: float [T, heads, d]; rows beyond len(slots) are padding.
        cache: pages, see `kv_planes`; changed in place.
        slots: int64 [T']; token t goes to block slots[t] // N, position slots[t] % N; -1 skips it.
        rotate: block of the Hadamard applied to K (R3), 0 for none.
    """
    planes, form = kv_planes(cache, key.shape[-1], symmetric), KVFormat(symmetric, k_clip, v_clip, rotate)
    stored = slots >= 0
    blocks, offsets = slots[stored] // cache.shape[2], slots[stored] % cache.shape[2]
    touched, where = blocks.unique(return_inverse=True)
    zeros = {}
    for name, x, row, block in (("k", key, form.key, rotate), ("v", value, form.value, 0)):
        rows = x[: slots.shape[0]][stored].float()
        rows = hadamard(rows, block) if block else rows
        scale, zero = row.qparams(rows)
        codes = unpack_codes(planes[name][touched], name, key.shape[-1])
        codes[where, :, offsets] = (row.quantize(rows, scale, zero) + 8).to(torch.uint8)
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
) -> None:
    """Causal attention of a mixed batch (prefill chunks and decode steps) over 4-bit pages, in float32.

    softmax(scale * (q R)(K R)ᵀ) V = softmax(scale * q Kᵀ) V for the orthogonal R = I ⊗ H/sqrt(rotate).
    A NaN scale of a visible position makes the result NaN. A kernel may round the query and the weights, as long
    as that adds at most a fifth of the error that the 4 bits of K and V made.

    Args:
        query: float [T, heads, d]; query heads h share KV head h // (heads / kv_heads).
        query_start: int32 [B + 1], first row of each sequence; rows from query_start[B] on are padding.
        seq_lens: int32 [B], tokens in the cache, those of this step included.
        block_table: int32 [B, P].
        out: [T, heads, d] in query's dtype, filled; 0 in padding rows.
    """
    starts, lens = query_start.tolist(), seq_lens.tolist()
    out[starts[-1] :] = 0
    rotated = hadamard(query.float(), rotate) if rotate else query.float()
    decode = [b for b in range(len(lens)) if starts[b + 1] - starts[b] == 1]
    groups = [decode] if decode else []
    groups += [[b] for b in range(len(lens)) if starts[b + 1] - starts[b] > 1]
    for members in groups:  # all decode steps together, each prefill chunk alone
        rows = torch.tensor([list(range(starts[b], starts[b + 1])) for b in members])
        longest = max(lens[b] for b in members)
        pages = block_table[members, : -(-longest // cache.shape[2])].long()
        keys, values = kv4_read(cache, pages, query.shape[-1], symmetric)
        ends = torch.tensor([lens[b] for b in members])
        out[rows] = attend(rotated[rows], keys, values, ends, scale).to(query.dtype)


def attend(query: Tensor, keys: Tensor, values: Tensor, ends: Tensor, scale: float) -> Tensor:
    """Causal grouped-query attention; query t of a sequence sees the first ends - T + t + 1 keys.

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
    last = ends[:, None] - steps + torch.arange(steps)  # [B, T], last visible position
    hidden = torch.arange(length) > last[:, :, None]
    weights = scores.masked_fill(hidden.unsqueeze(1).to(scores.device), float("-inf")).softmax(-1)
    # Positions past the end may hold anything, NaN included, and 0 * NaN is NaN.
    unwritten = (torch.arange(length) >= ends[:, None])[:, None, :, None].to(values.device)
    mixed = weights.view(batch, kv_heads, rows, length) @ values.masked_fill(unwritten, 0)
    return mixed.view(batch, heads, steps, dim).movedim(1, 2)
