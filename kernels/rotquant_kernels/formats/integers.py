"""Integers of b bits, one scale a row: the formats of activations and of weights. Arithmetic: `convention`.

What other code calls on a format is what a family has to have. Learning, which needs gradients of the same numbers,
builds them from parts that are differentiable in the row's extremes and in the clip ratio:

    range_of(min, max, clip)   the scale, and from where the zero point counts
    stored(scale)              that scale as it is held
    zero_of, stored_zero       the zero point as a formula, and as it is held
    nearest(x / scale + zero)  the codes, and which of them did not saturate
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rotquant_kernels import convention

Clip = float | Tensor


@dataclass(frozen=True)
class RowFormat:
    """Rows of numbers as integers: one scale and one zero point for each row [..., K] of values.

    Args:
        bits: 2 to 8; symmetric: the zero point is 0.
        clip: ratio in (0, 1] by which the row's range is shrunk; values outside saturate.
        scale_dtype: what scales are held in: float32 beside activations, float16 in the KV cache.
    """

    bits: int = 4
    symmetric: bool = True
    clip: float = 1.0
    scale_dtype: torch.dtype = torch.float32

    def clipped(self, clip: float | None) -> RowFormat:
        """The same with another clip ratio, itself for None."""
        return self if clip is None else replace(self, clip=clip)

    @property
    def bounds(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return convention.int_range(self.bits)

    @property
    def symmetry(self) -> str:
        """In words."""
        return "symmetric" if self.symmetric else "asymmetric"

    def qparams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, float32 [..., 1] each, of x float [..., K]; the zero point goes with the held scale."""
        scale, zero = convention.qparams(x, self.bits, self.symmetric, self.clip)
        if self.scale_dtype == torch.float16:
            scale = convention.half(scale)
            if not self.symmetric:
                zero = self.stored_zero(x.float().amin(-1, keepdim=True).clamp(max=0) * self.clip, scale)
        return scale, zero

    def quantize(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """int8 codes of x; shapes broadcast."""
        return convention.quantize(x, scale, zero, self.bits)

    def dequantize(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """float32 values of codes; shapes broadcast."""
        return convention.dequantize(codes, scale, zero)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """x float [..., K] as it comes back, float32; `rotquant.learn.quantizers` has the same with gradients."""
        scale, zero = self.qparams(x)
        return self.dequantize(self.quantize(x, scale, zero), scale, zero)

    def step(self, x: Tensor) -> Tensor:
        """Distance of two neighbouring codes in each row where nothing is clipped, [...] in x's dtype."""
        return self.range_of(x.amin(-1), x.amax(-1), 1.0)[0]

    def range_of(self, smallest: Tensor, largest: Tensor, clip: Clip) -> tuple[Tensor, Tensor | None]:
        """The scale of rows by their extremes, and the clipped smallest value; None where the zero point is 0."""
        low, high = self.bounds
        if self.symmetric:
            return torch.maximum(largest, -smallest) * clip / ((high - low) / 2), None
        smallest, largest = smallest.clamp(max=0) * clip, largest.clamp(min=0) * clip
        return (largest - smallest) / (high - low), smallest

    def stored(self, scale: Tensor) -> Tensor:
        """A scale as it is held, in its own dtype: never 0, NaN for infinity."""
        scale = convention.usable(scale)
        return convention.half(scale) if self.scale_dtype == torch.float16 else scale

    def zero_of(self, smallest: Tensor, scale: Tensor) -> Tensor:
        """The zero point before it is rounded: it maps `smallest` to the lowest code."""
        return self.bounds[0] - smallest / scale

    def stored_zero(self, smallest: Tensor, scale: Tensor) -> Tensor:
        """The zero point as it is held: an integer, as a float."""
        return convention.zero_point(smallest, scale, self.bits)

    def nearest(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of y = x / scale + zero, as floats, and which of them did not saturate; y is overwritten."""
        codes = y.round_().clamp(*self.bounds)
        return codes, codes == y

    def snap_(self, y: Tensor) -> Tensor:
        """Codes of y as of `nearest`, in place; NaN stays."""
        return y.round_().clamp_(*self.bounds)

    def __str__(self) -> str:
        return f"int{self.bits}"


@dataclass(frozen=True)
class WeightFormat:
    """Weight matrices [N, K] as symmetric integers, a scale for each row, or for each `group_size` inputs of a row.

    Args:
        bits: 4 or 8; group_size: inputs that share a scale, 0 for the whole row.
    """

    bits: int = 4
    group_size: int = 0

    @property
    def rows(self) -> RowFormat:
        """The format of values that share one scale."""
        return RowFormat(self.bits)

    @property
    def per_word(self) -> int:
        """Codes in an int32 of a packed weight."""
        return 32 // self.bits

    def words(self, columns: int) -> int:
        """int32 words of a packed row."""
        return -(-columns // self.per_word)

    def groups(self, columns: int) -> int:
        """Scales of a row, G."""
        return columns // (self.group_size or columns)

    def grouped(self, weight: Tensor) -> Tensor:
        """[N, K] as [N, G, K / G]."""
        return weight.unflatten(1, (-1, self.group_size or weight.shape[1]))

    def scale(self, values: Tensor, clip: float = 1.0) -> Tensor:
        """Scale float32 [..., 1] of values [..., K] that share one, their range shrunk by `clip`."""
        return self.rows.clipped(clip).qparams(values)[0]

    def round(self, values: Tensor, scale: Tensor) -> Tensor:
        """int8 codes of values; shapes broadcast."""
        return self.rows.quantize(values, scale, torch.zeros(()).to(scale))

    def quantize(self, weight: Tensor, scale: Tensor) -> Tensor:
        """int8 codes [N, K] of weight float [N, K] with scale float32 [N, G]."""
        return self.round(by_scale(weight, scale), scale.unsqueeze(-1)).flatten(1)

    def dequantize(self, codes: Tensor, scale: Tensor) -> Tensor:
        """float32 weight [N, K] of codes [N, K] with scale [N, G]."""
        return (by_scale(codes, scale).float() * scale.unsqueeze(-1)).flatten(1)

    def pack(self, codes: Tensor) -> Tensor:
        """int32 [N, words] of int8 [N, K], as checkpoints store them."""
        return convention.pack_int32(codes, self.bits)

    def unpack(self, packed: Tensor, columns: int) -> Tensor:
        """Inverse of `pack`: int8 [N, columns]."""
        return convention.unpack_int32(packed, self.bits, columns)

    def __str__(self) -> str:
        return f"int{self.bits}"


def by_scale(matrix: Tensor, scale: Tensor) -> Tensor:
    """[N, K] as [N, G, K / G], G the scales of a row."""
    return matrix.unflatten(1, (-1, matrix.shape[1] // scale.shape[1]))
