"""The witness of the start-up proof: the same layers in float64, without the ops that serve.

It computes on the CPU, and its products are numpy's. What a server does to torch (functions replaced, float32 products
rounded to TF32 or bfloat16, default types and devices, as vLLM does on request) then changes what serves, which the
proof shall see, and not the witness.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rotquant.checkpoint.format import LinearFormat
from rotquant.errors import RotQuantError
from rotquant_kernels import KINDS, Stage, reference
from rotquant_kernels.formats import KVFormat, RowFormat
from rotquant_kernels.formats.feedback import LARGEST_ERROR

STRETCH = 1 << 24  # weights of a layer that are float64 at a time


def exact(x: Tensor) -> Tensor:
    """x in float64 on the CPU."""
    return x.detach().cpu().double()


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of float64 matrices, [..., M, K] and [..., K, N]."""
    return torch.from_numpy(np.matmul(a.numpy(), b.numpy()))


def inverse(matrix: Tensor) -> Tensor:
    return torch.from_numpy(np.linalg.inv(matrix.numpy()))


def distance(got: Tensor, expected: Tensor) -> float:
    """Size of the difference relative to the size of what was expected."""
    return float((exact(got) - expected).norm() / expected.norm())


def limit(dtype: torch.dtype, bits: int) -> float:
    """Largest distance that rounding explains: the output's own, and codes that fall on the other side of a tie.

    Far below the distance to a layer that left its inputs unquantized (about 10% at 4 bits, 0.7% at 8).
    """
    return torch.finfo(dtype).eps / 2 + (0.02 if bits == 4 else 0.002)


def trial(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)


def transformed(x: Tensor, stages: Sequence[Stage]) -> Tensor:
    """The rows after a chain of online transforms, by dense products; float64 on the CPU."""
    x = exact(x)
    for kind, block, tensor in stages:
        if kind in ("hadamard", "dense", "kronecker"):
            x = kronecker(x, *factors(kind, block, tensor, x.shape[-1]))
        else:
            x = elementary(x, kind, block, tensor, inverse=False)
    return x


def restored(x: Tensor, stages: Sequence[Stage]) -> Tensor:
    """Inverse of `transformed`."""
    for kind, block, tensor in reversed(stages):
        if kind in ("hadamard", "dense", "kronecker"):
            left, right = factors(kind, block, tensor, x.shape[-1])
            x = kronecker(x, None if left is None else inverse(left), inverse(right))
        else:
            x = elementary(x, kind, block, tensor, inverse=True)
    return x


def kronecker(x: Tensor, left: Tensor | None, right: Tensor) -> Tensor:
    """x (P ⊗ Q): each row as a matrix X [outer, block] becomes Pᵀ X Q. P is None for the unit matrix."""
    rows = product(x.unflatten(-1, (-1, len(right))), right)
    return (rows if left is None else product(left.T, rows)).flatten(-2)


def factors(kind: str, block: int, tensor: Tensor | None, inputs: int) -> tuple[Tensor | None, Tensor]:
    """P, None for the unit matrix, and Q of a stage that is x (P ⊗ Q); P is another matrix only for "kronecker"."""
    if kind == "hadamard":
        return None, exact(hadamard_matrix(block))
    assert tensor is not None
    if kind == "dense":
        return None, exact(tensor)
    outer = inputs // block
    left, right = exact(tensor).split((outer * outer, block * block))
    return left.view(outer, outer), right.view(block, block)


def elementary(x: Tensor, kind: str, block: int, tensor: Tensor | None, inverse: bool) -> Tensor:
    """A permutation, reflection or shift, or its inverse, of float64 rows."""
    assert tensor is not None
    if kind == "permutation":
        order = tensor.long().cpu()
        return x.index_select(-1, order.argsort() if inverse else order)
    if kind == "reflection":
        v, rows = exact(tensor), x.unflatten(-1, (-1, block))
        return (rows - 2 * (rows * v).sum(-1, keepdim=True) * v).flatten(-2)
    if kind == "shift":
        return x + exact(tensor) * (1 if inverse else -1)
    raise ValueError(f"the witness does not know the online transform {kind!r}")


def hadamard_matrix(block: int) -> Tensor:
    """H / sqrt(block), float32 [block, block]."""
    return reference.hadamard(torch.eye(block, dtype=torch.float32, device="cpu"), block)


def sign_of_extreme(x: Tensor) -> Tensor:
    """±1 for each row: the sign of its largest magnitude.

    A row whose extreme is negative puts it at -7.5 steps, a tie that the last bit of a sum decides.
    Trial rows are multiplied by this sign, so that kernel and reference need not agree on that bit.
    """
    return x.gather(-1, x.abs().argmax(-1, keepdim=True)).sign()


def left_by(down: Tensor | None, y: Tensor) -> Tensor:
    """y - y D Dᵀ [M, K], what a low-rank branch leaves to be rounded that subtracts D; y itself for None."""
    return y if down is None else y - product(product(y, exact(down)), exact(down).T)


def positive_first(x: Tensor, stages: Sequence[Stage], taken: Tensor | None = None) -> Tensor:
    """Indices of rows of x, those first whose largest magnitude is positive where they are rounded."""
    return sign_of_extreme(left_by(taken, transformed(x, stages)))[:, 0].argsort(descending=True, stable=True)


def trial_rows(
    rows: int, inputs: int, stages: Sequence[Stage], dtype: torch.dtype, device: torch.device,
    taken: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rows [rows, inputs] for a chain, random behind its shifts, whose largest magnitude there is positive.

    `taken`: D [K, r] of a branch that takes its directions off what the chain leaves, or None.

    A chain with shifts is affine, A(c + x) = x M where A(c) = 0: rows are random around c, as real ones are, and
    x takes the sign. Rounding to `dtype` may turn a sign back where c is large, so there are rows to choose from.
    """
    x = exact(trial(4 * rows, inputs, dtype=torch.float32, device=torch.device("cpu")))
    shifted = any(KINDS[stage.kind].affine for stage in stages)
    center = restored(torch.zeros_like(x[:1]), stages) if shifted else torch.zeros_like(x[:1])
    x = (center + x * sign_of_extreme(left_by(taken, transformed(center + x, stages)))).to(dtype)
    return x[positive_first(x, stages, taken)[:rows]].to(device)


def trial_gate_up(
    rows: int, inputs: int, stages: Sequence[Stage], dtype: torch.dtype, device: torch.device,
    taken: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gate and up [rows, 2 inputs] and silu(gate) * up as a model rounds it, whose extremes are as in `trial_rows`."""
    gate, up = (3 * trial(rows, inputs, dtype=dtype, device=device, seed=seed) for seed in (7, 8))
    silu = (gate.double() / (1 + (-gate.double()).exp())).to(dtype)
    up = up * sign_of_extreme(left_by(taken, transformed(silu * up, stages))).to(up)
    return torch.cat((gate, up), -1), silu * up


def trial_stream(rows: int, weight: Tensor, eps: float, stages: Sequence[Stage]) -> tuple[Tensor, Tensor]:
    """A layer's output and the residual [rows, 2, K] and the norm of their sum as a model rounds it, likewise: of the
    rows behind the stages.

    Args:
        weight: the norm's, [K] in the model's dtype.
    """
    x = trial(4 * rows, 2, weight.shape[0], dtype=weight.dtype, device=weight.device, seed=9)
    total = (x[:, 0] + x[:, 1]).double()
    mean = total.pow(2).sum(-1, keepdim=True) / weight.shape[0]
    normed = (total * (mean + eps).rsqrt()).to(weight.dtype) * weight
    sign = sign_of_extreme(transformed(normed, stages)).to(normed)
    x, normed = x * sign[:, None], normed * sign
    good = positive_first(normed, stages)[:rows]
    return x[good], normed[good]


def float_linear(
    x: Tensor,
    linear: LinearFormat,
    stages: Sequence[Stage],
    packed: Tensor,
    scales: Tensor,
    low_rank: tuple[Tensor | None, Tensor | None],
    bias: Tensor | None,
) -> Tensor:
    """A quantized linear layer in float64.

    Args:
        x: [M, K]; packed: int32 [N, words] as in the checkpoint; scales: [N, G]; low_rank: D [K, r] and U [r, N].
        bias: [N], the correction of shifts in it.
    Returns:
        [M, N].
    """
    y = transformed(x, stages)
    down, up = low_rank
    rounded = exact(linear.rows.fake_quantize(left_by(down if linear.subtracts else None, y)))
    at_once, inputs = max(1, STRETCH // x.shape[1]), x.shape[1]
    parts = []
    for words, scale in zip(packed.split(at_once), scales.split(at_once), strict=True):
        codes = linear.weights.unpack(words, inputs)
        parts.append(product(rounded, (exact(codes) * exact(scale).repeat_interleave(inputs // scale.shape[1], 1)).T))
    out = torch.cat(parts, 1)
    if down is not None and up is not None:
        out = out + product(product(y, exact(down)), exact(up))
    return out if bias is None else out + exact(bias)


def r3(kv: KVFormat) -> list[Stage]:
    """The chain of queries and keys."""
    return [Stage("hadamard", kv.rotate)] if kv.rotate else []


def fed_back(x: Tensor, rows: RowFormat, feedback: Tensor) -> Tensor:
    """Keys [T, heads, d] as they come back where each channel's error is taken from those behind it, in float64."""
    scale, zero = (exact(t).squeeze(-1) for t in rows.qparams(x))
    passed, most = exact(feedback), LARGEST_ERROR * scale
    back: list[Tensor] = []
    errors: list[Tensor] = []
    for j, channel in enumerate(x.unbind(-1)):
        value = channel.clone()
        for i, error in enumerate(errors):
            value -= error * passed[:, i, j]
        code = (value / scale + zero).round().clamp(*rows.bounds)
        back.append((code - zero) * scale)
        errors.append((value - back[j]).clamp(-most, most))
    return torch.stack(back, -1)


def float_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, kv: KVFormat, window: int | None, cap: float | None = None,
    key_feedback: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention in float64 over K and V as 4 bits give them back.

    Args:
        query: [T, heads, d]; key, value: [T, KV heads, d]; window: positions that a query sees at most, None for all;
            cap: on scores; key_feedback: F [KV heads, d, d] of keys that are rounded with error feedback.
    Returns:
        [T, heads, d].
    """
    rotation = r3(kv)
    group = query.shape[1] // key.shape[1]
    turned = transformed(key, rotation)
    if kv.feedback != (key_feedback is not None):
        raise RotQuantError("the format of the 4-bit KV cache and its layers differ in key_feedback")
    k = exact(kv.key.fake_quantize(turned) if key_feedback is None else fed_back(turned, kv.key, key_feedback))
    v = exact(kv.value.fake_quantize(exact(value)))
    k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    scores = product(transformed(query, rotation).transpose(0, 1), k.mT) * scale
    scores = scores if cap is None else (scores / cap).tanh() * cap
    hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    if window:
        hidden |= torch.ones_like(hidden).tril(-window)
    weights = (scores - scores.amax(-1, keepdim=True)).masked_fill(hidden, float("-inf")).exp()
    return product(weights / weights.sum(-1, keepdim=True), v).transpose(0, 1)
