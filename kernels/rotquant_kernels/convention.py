"""The numeric convention: how real numbers become integers and come back, for every user of the project.

It is compressed-tensors' arithmetic (`calculate_qparams`, `quantize`), so that Hugging Face's fake
quantization agrees with the served kernels. All of it runs in float32; b is the number of bits.

    symmetric    scale = absmax * clip / ((2^b - 1) / 2)                    zero = 0
    asymmetric   scale = (max - min) * clip / (2^b - 1)                     zero = round(-2^(b-1) - min * clip / scale)
                 (min <= 0 <= max, so that 0 is always exact)
    quantize     q = clamp(round_half_even(x / scale + zero), -2^(b-1), 2^(b-1) - 1)
    dequantize   x' = (q - zero) * scale

A row of zeros has scale 0; it is replaced by float32's epsilon, as compressed-tensors does. A row with NaN or
infinity has the scale NaN and the codes 0: whatever is made from it is NaN and never passes for a number.

    silu         x / (1 + exp(-x)), exp from sums and products in a fixed order, so that all kernels get its last bit
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = torch.finfo(torch.float32).eps
# Scales of the KV cache are stored as float16: this range keeps them normal numbers.
HALF_TINY, HALF_MAX = torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max


def int_range(bits: int) -> tuple[int, int]:
    """Smallest and largest value of a signed integer of `bits` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def qparams(x: Tensor, bits: int, symmetric: bool, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row.

    Args:
        x: float [..., K]; one scale and zero point for each row of K values.
        bits: 2 to 8.
        symmetric: zero point fixed at 0.
        clip: ratio in (0, 1] by which the range is shrunk; values outside saturate.
    Returns:
        scale float32 [..., 1], zero point float32 [..., 1] holding integers.
    """
    x = x.float()
    low, high = int_range(bits)
    if symmetric:
        scale = x.abs().amax(-1, keepdim=True) * clip / ((high - low) / 2)
        return usable(scale), torch.zeros_like(scale)
    smallest = x.amin(-1, keepdim=True).clamp(max=0) * clip
    largest = x.amax(-1, keepdim=True).clamp(min=0) * clip
    scale = usable((largest - smallest) / (high - low))
    return scale, zero_point(smallest, scale, bits)


def usable(scale: Tensor) -> Tensor:
    """Scale 0 becomes epsilon, infinity NaN."""
    return torch.where(scale == 0, EPSILON, torch.where(scale.isinf(), torch.nan, scale))


def zero_point(smallest: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Integer zero point (as float32) that maps `smallest` to the lowest code."""
    low, high = int_range(bits)
    return (low - smallest / scale).clamp(low, high).round().nan_to_num(0)


def quantize(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """int8 codes of x; shapes broadcast. torch.round rounds half to even."""
    return (x.float() / scale + zero).round().clamp(*int_range(bits)).nan_to_num(0).to(torch.int8)


def dequantize(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """float32 values of int8 codes; shapes broadcast."""
    return (q.float() - zero) * scale


def half(scale: Tensor) -> Tensor:
    """A usable scale as float16 holds it, in its own dtype."""
    return scale.clamp(HALF_TINY, HALF_MAX).half().to(scale.dtype)


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) * up of x = [gate, up], float [..., 2 K] to [..., K], each step rounded to x's dtype as in a model."""
    gate, up = x.chunk(2, dim=-1)
    gate = gate.float()
    return (gate / (1 + exp(-gate))).to(x.dtype) * up


LOG2_E = 1.44269504
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # their sum is ln 2; the first has few bits: its multiples are exact
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def exp(x: Tensor) -> Tensor:
    """exp(x) of float32, to 1e-7; below -80 as at -80 (1 + exp(x) is the same), infinity where float32 ends.

    exp(x) = 2^n exp(r), |r| <= ln 2 / 2, by a polynomial. No product is fused into a sum: that would change the last
    bit from one processor to another.
    """
    x = x.clamp(-80, 89)
    n = (x * LOG2_E).round()
    r = x - n * LN2_HIGH - n * LN2_LOW
    y = torch.full_like(r, EXP[0])
    for coefficient in EXP[1:]:
        y = y * r + coefficient
    y = y * (r * r) + r + 1
    return y * ((n.int() + 126) << 23).view(torch.float32) * 2  # 2^n as 2^(n - 1) * 2, since 2^128 is no float32


def pack_int32(q: Tensor, bits: int) -> Tensor:
    """Packs codes as compressed-tensors' `pack-quantized` does.

    Args:
        q: int8 [N, K] codes of 4 or 8 bits.
    Returns:
        int32 [N, ceil(K * bits / 32)]; code k sits at bit (k mod (32 / bits)) * bits, offset by 2^(bits-1).
    """
    per_word = 32 // bits
    padding = -q.shape[1] % per_word
    unsigned = torch.nn.functional.pad(q.to(torch.int16) + (1 << (bits - 1)), (0, padding)).to(torch.uint8)
    if bits == 4:
        unsigned = unsigned[:, 0::2] | unsigned[:, 1::2] << 4
    return unsigned.contiguous().view(torch.int32)


def unpack_int32(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_int32`: int32 [N, words] to int8 [N, columns]."""
    stored = packed.contiguous().view(torch.uint8)
    if bits == 4:
        stored = unpack_nibbles(stored)
    return (stored[:, :columns].to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def unpack_nibbles(stored: Tensor) -> Tensor:
    """uint8 [..., B] to uint8 [..., 2 B] of values 0..15; the low nibble comes first."""
    return torch.stack((stored & 15, stored >> 4), dim=-1).flatten(-2)
