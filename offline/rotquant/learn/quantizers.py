"""The number formats with gradients: what training sees is, bit for bit, what is served.

Forward values are those of `rotquant_kernels.formats`. Rounding passes gradients straight through, clamping does not.
With s the scale, z the zero point, q the codes, e = x' - x the error and I the entries that did not saturate:

    dx'/dx = 1 in I, else 0        dx'/ds = (x' - x [I]) / s        dx'/dz = 0 in I, else -s

The second is LSQ's gradient (Esser et al., arXiv 1902.08153). The scale hangs on the row's extremes and on the
clip ratio, both with gradients, so that a clip ratio, or a transform of x, is learned through it: inside the range
d(e²)/ds = 2 e² / s, as rounding errors grow with the square of the scale.
Numbers are float32 (float64 if x is, for checks of gradients). All functions work on any device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rotquant_kernels.formats import RowFormat, WeightFormat
from rotquant_kernels.formats.integers import Clip as Clip


def fake_quantize(x: Tensor, rows: RowFormat, clip: Clip | None = None) -> Tensor:
    """x as it comes back from per-row quantization, `rows.fake_quantize`.

    Args:
        x: float [..., K]; one scale and zero point for each row of K values.
        clip: instead of the format's own: a number, or a tensor that broadcasts to [..., 1].
    Returns:
        float32 [..., K] (float64 if x is).
    """
    x = _wide(x)
    smallest, largest = _Extremes.apply(x)
    wanted, bottom = rows.range_of(smallest, largest, rows.clip if clip is None else clip)
    # A scale that is rounded has the gradient of the exact one.
    rounded = rows.scale_dtype != torch.float32
    scale = _straight_through(wanted, rows.stored(wanted.detach())) if rounded else rows.stored(wanted)
    if bottom is None:
        return _Round.apply(x, scale, None, rows)
    held = rows.stored_zero(bottom.detach(), scale.detach())
    return _Round.apply(x, scale, _straight_through(rows.zero_of(bottom, scale), held), rows)


def fake_quantize_weight(
    weight: Tensor, form: WeightFormat, clip: Clip = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A weight as it comes back from symmetric quantization per output channel or group, codes rounded to nearest.

    Args:
        weight: float [N, K].
        clip: as in `fake_quantize`; a tensor broadcasts to [N, G] (LWC: one ratio a scale).
        dtype: in which the checkpoint stores scales; they are rounded to it, gradients pass straight through.
    Returns:
        float32 [N, K] (float64 if weight is): `form.dequantize(form.quantize(weight, scale), scale)`.
    """
    groups, rows = form.grouped(_wide(weight)), form.rows
    ratio = clip.unsqueeze(-1) if isinstance(clip, Tensor) else clip
    smallest, largest = _Extremes.apply(groups)
    scale = rows.stored(rows.range_of(smallest, largest, ratio)[0])
    stored = scale.detach().to(dtype).to(scale.dtype).clamp(min=torch.finfo(dtype).tiny)
    return _Round.apply(groups, _straight_through(scale, stored), None, rows).flatten(1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` exactly, with the gradient of `value`."""
    return _StraightThrough.apply(value, rounded)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _Extremes(torch.autograd.Function):
    """Smallest and largest value of each row, [..., 1]; the gradient goes to the first entry that has it.

    `amin` and `amax` share gradients among ties, at the price of several tensors of x's size.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.save_for_backward(x)
        return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)  # twice as fast as aminmax

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        grad = torch.zeros_like(x)
        grad.scatter_add_(-1, x.argmin(-1, keepdim=True), grads[0])
        return grad.scatter_add_(-1, x.argmax(-1, keepdim=True), grads[1])


class _Round(torch.autograd.Function):
    """x' = (nearest(x / s + z) - z) s with the gradients of the module's docstring; z None is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | None, rows: RowFormat) -> Tensor:
        codes = x / scale
        if zero is not None:
            codes += zero
        out, inside = rows.nearest(codes)
        if zero is not None:
            out -= zero
        out *= scale
        ctx.save_for_backward(x, scale, out, inside)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, scale, out, inside = ctx.saved_tensors
        grad_x = torch.where(inside, grad, 0.0)  # a product with booleans takes three times as long
        grad_scale = grad_zero = None
        if ctx.needs_input_grad[1]:
            change = (grad * out).addcmul_(grad_x, x, value=-1)
            grad_scale = change.sum(-1, keepdim=True).div_(scale)
        if ctx.needs_input_grad[2]:
            grad_zero = (grad_x.sum(-1, keepdim=True) - grad.sum(-1, keepdim=True)) * scale
        return grad_x, grad_scale, grad_zero, None
