"""Division by one inverse and two corrections, as the row kernels of GPUs do it, against division itself."""

import ctypes
import ctypes.util

import pytest
import torch

rows_steps = pytest.importorskip("rotquant_kernels.cuda.rows_steps")

MATH = ctypes.CDLL(ctypes.util.find_library("m"))
MATH.fmaf.restype, MATH.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a b + c with one rounding, which torch does not promise on CPUs."""
    return torch.tensor([MATH.fmaf(*each) for each in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)])


def corrected(y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What the instructions of `rows_steps.CORRECTED` compute."""
    inverse = 1 / scale
    q = y * inverse
    for _ in range(2):
        q = fma(fma(q, -scale, y), inverse, q)
    return q


def test_the_quotient_is_rounded_as_division_rounds_it():
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(30000, generator=generator) * 10.0 ** torch.randint(-17, 18, (30000,), generator=generator)
    y = scale * (16 * torch.rand(30000, generator=generator) - 8)
    whole = torch.randint(-8, 9, (30000,), generator=generator) / 2
    for numerator in (y, scale * whole, torch.nextafter(scale * whole, y)):  # codes, ties, their neighbours
        large = numerator.abs() > 1e-30  # of a smaller one a remainder underflows, and no code moves
        assert large.sum() > 20000
        assert torch.equal(corrected(numerator, scale)[large], (numerator / scale)[large])
    hard = (torch.arange(1 << 23, (1 << 23) + 3000) / (1 << 23)).float()  # mantissas near 1, and near 2
    for divisor in (hard, hard.flip(0), 2 - hard / (1 << 23)):
        assert torch.equal(corrected(hard * 5, divisor), hard * 5 / divisor)


def test_heads_are_divided_by_scales_of_16_bits_as_they_are():
    """From the least normal one to the largest; K and V may be as large as floats are, since what is clipped may be."""
    generator = torch.Generator().manual_seed(3)
    scale = torch.tensor([2.0**-14, 65504.0]).half().float().repeat(2000)
    for factor in (16 * torch.rand(4000, generator=generator) - 8, torch.full((4000,), 5.0e33)):
        y = scale * factor
        assert y.isfinite().all()
        assert torch.equal(corrected(y, scale), y / scale)


def test_rows_near_either_end_of_floats_are_moved_first():
    """By 2^64, or 2^-64: what the first remainder needs is then a normal number, and the quotient is the same."""
    generator = torch.Generator().manual_seed(2)
    small = torch.rand(4000, generator=generator) * 10.0 ** -torch.randint(19, 38, (4000,), generator=generator)
    large = torch.rand(4000, generator=generator) * 10.0 ** torch.randint(19, 37, (4000,), generator=generator)
    for scale, move in ((small, 2.0**64), (large, 2.0**-64)):
        y = scale * (16 * torch.rand(4000, generator=generator) - 8)
        counts = (y / scale).abs() > 0.1
        assert torch.equal(corrected(y * move, scale * move)[counts], (y / scale)[counts])


def test_the_kernel_does_these_steps():
    steps = rows_steps.CORRECTED.value.strip("{} ;").split("; ")
    assert steps[1:] == [
        "neg.f32 n, $2", "mul.rn.f32 q, $1, $3", "fma.rn.f32 e, q, n, $1", "fma.rn.f32 q, e, $3, q",
        "fma.rn.f32 e, q, n, $1", "fma.rn.f32 $0, e, $3, q",
    ]  # fmt: skip
