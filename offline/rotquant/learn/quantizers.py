"""The numeric convention with gradients: what training sees is, bit for bit, what is served.

Forward values are `rotquant_kernels.convention`'s. Rounding passes gradients straight through, clamping does not.
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

from rotquant_kernels import convention

Clip = float | Tensor


def fake_quantize(x: Tensor, bits: int, symmetric: bool, clip: Clip = 1.0) -> Tensor:
    """x as it comes back from per-row quantization, `dequantize(quantize(x, *qparams(x)))` of the convention.

    Args:
        x: float [..., K]; one scale and zero point for each row of K values.
        bits: 2 to 8.
        clip: ratio in (0, 1] by which the range is shrunk; a number, or a tensor that broadcasts to [..., 1].
    Returns:
        float32 [..., K] (float64 if x is).
    """
    x = _wide(x)
    smallest, largest = _Extremes.apply(x)
    low, high = convention.int_range(bits)
    if symmetric:
        scale = torch.maximum(largest, -smallest) * clip / ((high - low) / 2)
        return _Round.apply(x, convention.usable(scale), None, bits)
    smallest, largest = smallest.clamp(max=0) * clip, largest.clamp(min=0) * clip
    scale = convention.usable((largest - smallest) / (high - low))
    return _Round.apply(x, scale, _zero_point(smallest, scale, bits), bits)


def fake_quantize_weight(
    weight: Tensor, bits: int, group_size: int = 0, clip: Clip = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A weight as it comes back from symmetric quantization per output channel or group, codes rounded to nearest.

    Args:
        weight: float [N, K].
        group_size: inputs that share a scale; 0 for the whole row.
        clip: as in `fake_quantize`; a tensor broadcasts to [N, G], G = K / group_size (LWC: one ratio a scale).
        dtype: in which the checkpoint stores scales; they are rounded to it, gradients pass straight through.
    Returns:
        float32 [N, K] (float64 if weight is): `weights.rtn`'s `dequantize(quantize(weight, scale), scale)`.
    """
    groups = _wide(weight).unflatten(1, (-1, group_size or weight.shape[1]))
    smallest, largest = _Extremes.apply(groups)
    low, high = convention.int_range(bits)
    ratio = clip.unsqueeze(-1) if isinstance(clip, Tensor) else clip
    scale = convention.usable(torch.maximum(largest, -smallest) * ratio / ((high - low) / 2))
    stored = scale.detach().to(dtype).to(scale.dtype).clamp(min=torch.finfo(dtype).tiny)
    return _Round.apply(groups, _straight_through(scale, stored), None, bits).flatten(1)


def fake_quantize_kv(x: Tensor, symmetric: bool, clip: Clip = 1.0) -> Tensor:
    """What the 4-bit KV cache gives back, `convention.kv_fake_quantize`; scales are rounded to float16.

    Args:
        x: float [..., head_dim], one scale for each token and head; after R3 for K, after R2 for V.
    Returns:
        float32 [..., head_dim] (float64 if x is).
    """
    x = _wide(x)
    smallest, largest = _Extremes.apply(x)
    low, high = convention.int_range(4)
    if symmetric:
        return _Round.apply(x, _half(torch.maximum(largest, -smallest) * clip / ((high - low) / 2)), None, 4)
    smallest, largest = smallest.clamp(max=0) * clip, largest.clamp(min=0) * clip
    scale = _half((largest - smallest) / (high - low))
    return _Round.apply(x, scale, _zero_point(smallest, scale, 4), 4)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` exactly, with the gradient of `value`."""
    return _StraightThrough.apply(value, rounded)


def _half(scale: Tensor) -> Tensor:
    stored = convention.usable(scale.detach()).clamp(convention.HALF_TINY, convention.HALF_MAX)
    return _straight_through(scale, stored.half().to(scale.dtype))


def _zero_point(smallest: Tensor, scale: Tensor, bits: int) -> Tensor:
    low, _ = convention.int_range(bits)
    rounded = convention.zero_point(smallest.detach(), scale.detach(), bits)
    return _straight_through(low - smallest / scale, rounded)


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
    """x' = (clamp(round(x / s + z)) - z) s with the gradients of the module's docstring; z None is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
        codes = x / scale
        if zero is not None:
            codes += zero
        codes.round_()
        low, high = convention.int_range(bits)
        out = codes.clamp(low, high)
        inside = out == codes
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
        grad_x = grad * inside
        grad_scale = grad_zero = None
        if ctx.needs_input_grad[1]:
            change = (grad * out).addcmul_(grad_x, x, value=-1)
            grad_scale = change.sum(-1, keepdim=True).div_(scale)
        if ctx.needs_input_grad[2]:
            grad_zero = (grad_x.sum(-1, keepdim=True) - grad.sum(-1, keepdim=True)) * scale
        return grad_x, grad_scale, grad_zero, None
