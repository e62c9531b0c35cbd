"""Start-up proof: what really runs, checked on the loaded weights before the first request.

A quantized model that runs at the wrong precision, or without one of its rotations, still writes fluent
text. So every worker checks one layer of each kind against arithmetic in plain float64, through the
same methods that will serve, and logs one table. ROTQUANT_STRICT=0 serves in spite of a mismatch.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotquant.errors import RotQuantError
from rotquant.format import KVFormat, LinearFormat, Transform
from rotquant_kernels import convention, ops, reference
from vllm_rotquant import compat
from vllm_rotquant.kv_cache import KV4Metadata
from vllm_rotquant.rotation import hadamard_matrix

ROWS = 9  # tokens of a trial input; also run one by one, since kernels treat a single token apart
PAGE = 16  # tokens of a trial page
STEPS = ((20, 0), (17, 20), (1, 1))  # new tokens of two sequences: a first chunk, a mixed step, a decode step


class Proof:
    """Collects the quantized layers of one model while it is built and loaded; the last one runs the check."""

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.pending: set[int] = set()
        self.unquantized: set[str] = set()
        self.packed: dict[tuple[str, LinearFormat], tuple[Any, Tensor]] = {}
        self.done = False

    def expect(self, layer: Any) -> None:
        """`layer` was built and will be loaded."""
        self.layers.append(layer)
        self.pending.add(id(layer))

    def keep(self, layer: Any, packed: Tensor) -> None:
        """Remembers the checkpoint's packed weights, int32 [N, words], of the first layer of each kind."""
        key = (kind_of(layer), layer.quant_method.format)
        if key not in self.packed and not self.done:
            self.packed[key] = (layer, packed.clone())

    def loaded(self, layer: Any) -> None:
        """`layer` is ready to run. Runs the check when all are."""
        self.pending.discard(id(layer))
        if not self.pending and not self.done:
            self.done = True
            try:
                run_checks(self)
            finally:
                self.layers, self.packed = [], {}


@dataclass
class Row:
    """One line of the report."""

    kind: str
    layers: int
    kernel: str
    bits: str
    transform: str
    error: float
    limit: float
    where: str

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # False for NaN

    def __str__(self) -> str:
        verdict = f"{self.error:.2%}" if self.passed else f"{self.error:.2%} MISMATCH"
        return f"  {self.kind:<14}{self.layers:>6}  {self.kernel:<20}{self.bits:<14}{self.transform:<26}{verdict}"


@torch.inference_mode()
def run_checks(proof: Proof) -> None:
    """Checks one layer of each kind and logs the report.

    Raises:
        RotQuantError: on a mismatch, unless ROTQUANT_STRICT=0.
    """
    counts = Counter((kind_of(layer), layer.quant_method.format) for layer in proof.layers)
    attention = [layer for layer in proof.layers if isinstance(layer, compat.Attention)]
    rows = [linear_row(layer, packed, counts[key]) for key, (layer, packed) in proof.packed.items()]
    rows += [attention_row(attention[0], len(attention))] if attention else []
    log_report(rows, attention, proof.unquantized)
    for row in rows:
        if not row.passed:
            message = (
                f"rotquant's start-up check failed: {row.where} on kernel {row.kernel} is {row.error:.1%} away from "
                f"the reference (limit {row.limit:.1%}), so the model would write wrong text. Please report it with "
                "the table above; ROTQUANT_STRICT=0 serves all the same"
            )
            if os.environ.get("ROTQUANT_STRICT", "1") != "0":
                raise RotQuantError(message)
            compat.logger.error(message)


def log_report(rows: list[Row], attention: list[Any], unquantized: set[str]) -> None:
    """One block in the log: a line for each kind of layer, then the KV cache."""
    head = f"  {'layer':<14}{'count':>6}  {'kernel':<20}{'bits':<14}{'online transform':<26}distance from reference"
    lines = [f"rotquant start-up check, tensor-parallel rank {compat.get_tensor_model_parallel_rank()}", head]
    lines += [str(row) for row in rows]
    if attention:
        symmetric = attention[0].quant_method.format.symmetric
        ours = sum(reference.kv_token_bytes(a.head_size, symmetric) * a.num_kv_heads for a in attention)
        theirs = sum(4 * a.head_size * a.num_kv_heads for a in attention)
        lines.append(f"  KV cache: {ours} bytes a token, {theirs} in bfloat16 ({theirs / ours:.2f}x)")
    else:
        lines.append("  KV cache: not quantized (the checkpoint has no kv_cache_scheme)")
    kinds = Counter(name.rpartition(".")[2] for name in unquantized)
    lines.append("  not quantized: " + (", ".join(f"{k} ({n})" for k, n in sorted(kinds.items())) or "no linear layer"))
    compat.logger.info("\n".join(lines))


def kind_of(layer: Any) -> str:
    """Last part of the layer's name, such as qkv_proj; "attention" for the KV cache."""
    return "attention" if isinstance(layer, compat.Attention) else str(layer.quant_method.prefix).rpartition(".")[2]


def distance(got: Tensor, expected: Tensor) -> float:
    """Size of the difference relative to the size of what was expected."""
    return float((got.double() - expected).norm() / expected.norm())


def limit(dtype: torch.dtype, bits: int) -> float:
    """Largest distance that rounding explains: the output's own, and codes that fall on the other side of a tie.

    Far below the distance to a layer that left its inputs unquantized (about 10% at 4 bits, 0.7% at 8).
    """
    return torch.finfo(dtype).eps / 2 + (0.02 if bits == 4 else 0.002)


def trial(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)


def transformed(x: Tensor, transform: Transform, matrix: Tensor | None) -> Tensor:
    """x (I ⊗ T) by dense products in float64."""
    if transform.kind == "none":
        return x.double()
    dense = hadamard_matrix(transform.block).to(x.device) if matrix is None else matrix
    return (x.double().unflatten(-1, (-1, transform.block)) @ dense.double()).flatten(-2)


def sign_of_extreme(x: Tensor) -> Tensor:
    """±1 for each row: the sign of its largest magnitude.

    A row whose extreme is negative puts it at -7.5 steps, a tie that the last bit of a sum decides.
    Trial rows are multiplied by this sign, so that kernel and reference need not agree on that bit.
    """
    return x.gather(-1, x.abs().argmax(-1, keepdim=True)).sign()


def linear_row(layer: Any, packed: Tensor, count: int) -> Row:
    """Runs the layer's own `apply` and compares.

    Args:
        packed: int32 [N, words] as in the checkpoint.
    """
    linear, inputs = layer.quant_method.format, layer.quant_method.inputs
    x = trial(ROWS, inputs, dtype=layer.quant_method.dtype, device=packed.device)
    x = x * sign_of_extreme(transformed(x, linear.transform, layer.online_matrix)).to(x.dtype)
    bias = getattr(layer, "bias", None)
    together = layer.quant_method.apply(layer, x, bias)
    alone = torch.cat([layer.quant_method.apply(layer, row, bias) for row in x.split(1)])

    y = transformed(x, linear.transform, layer.online_matrix)
    scale, zero = convention.qparams(y, linear.act_bits, linear.act_symmetric, linear.act_clip)
    y = convention.dequantize(convention.quantize(y, scale, zero, linear.act_bits), scale, zero)
    codes = convention.unpack_int32(packed, linear.weight_bits, inputs)
    scales = layer.weight_scale.repeat_interleave(inputs // layer.weight_scale.shape[1], dim=1)
    expected = y.double() @ (codes * scales).double().t() + (0 if bias is None else bias.double())
    return Row(
        kind_of(layer),
        count,
        ops.kernel_of("int_linear", packed.device.type),
        f"W{linear.weight_bits} A{linear.act_bits}" + (f" g{linear.group_size}" if linear.group_size else ""),
        f"{linear.transform.name} {linear.transform.kind} {linear.transform.block}"
        if linear.transform.name
        else "none",
        max(distance(together, expected), distance(alone, expected)),
        limit(x.dtype, linear.act_bits),
        layer.quant_method.prefix,
    )


def attention_row(layer: Any, count: int) -> Row:
    """Writes two sequences into trial pages through the layer's implementation, reads them, compares."""
    kv, heads, dim = layer.quant_method.format, layer.num_kv_heads, layer.head_size
    device = next(iter(layer.buffers())).device
    lengths = [sum(new) for new in zip(*STEPS, strict=True)]
    query, key, value = (
        [trial(n, h, dim, dtype=layer.dtype, device=device, seed=seed + i) for i, n in enumerate(lengths)]
        for seed, h in ((1, layer.num_heads), (3, heads), (5, heads))
    )
    rotation = Transform("hadamard", kv.rotate, "R3") if kv.rotate else Transform()
    key = [k * sign_of_extreme(transformed(k, rotation, None)).to(k.dtype) for k in key]
    value = [v * sign_of_extreme(v).to(v.dtype) for v in value]
    got = torch.cat(served_attention(layer, query, key, value))
    expected = torch.cat(
        [float_attention(q, k, v, layer.impl.scale, kv) for q, k, v in zip(query, key, value, strict=True)]
    )
    kernels = {ops.kernel_of(op, device.type) for op in ("kv4_write", "kv4_attention")}
    name = f"R3 hadamard {kv.rotate}" if kv.rotate else "none"
    error, most = distance(got, expected), limit(layer.dtype, 4)
    return Row("attention", count, " + ".join(sorted(kernels)), "KV4", name, error, most, layer.quant_method.prefix)


def served_attention(layer: Any, query: list[Tensor], key: list[Tensor], value: list[Tensor]) -> list[Tensor]:
    """Attention of two sequences as served: a prefill in chunks, a mixed step, a decode step.

    Args:
        query: for each sequence [T, heads, d] in the model's dtype; key, value: [T, KV heads, d].
    Returns:
        For each sequence [T, heads, d].
    """
    device, heads, token = query[0].device, layer.num_kv_heads, reference.kv_token_bytes
    spaces = -(-max(len(q) for q in query) // PAGE)  # pages a sequence
    table = torch.arange(len(query) * spaces, dtype=torch.int32, device=device).flip(0).view(len(query), spaces)
    symmetric = layer.quant_method.format.symmetric
    shape = (table.numel(), heads, PAGE, token(layer.head_size, symmetric))
    cache = torch.zeros(shape, dtype=torch.uint8, device=device)
    out = [torch.empty_like(q) for q in query]
    ends = [0] * len(query)
    for step in STEPS:
        active = [s for s, new in enumerate(step) if new]
        spans = [slice(ends[s], ends[s] + step[s]) for s in active]
        ends = [end + new for end, new in zip(ends, step, strict=True)]
        q, k, v = (torch.cat([x[s][span] for s, span in zip(active, spans, strict=True)]) for x in (query, key, value))
        slots = [
            table[s, p // PAGE] * PAGE + p % PAGE
            for s, span in zip(active, spans, strict=True)
            for p in range(span.start, span.stop)
        ]
        starts = torch.tensor([0, *(step[s] for s in active)], device=device).cumsum(0).to(torch.int32)
        lens = torch.tensor([ends[s] for s in active], dtype=torch.int32, device=device)
        metadata = KV4Metadata(starts, lens, table[active])
        layer.impl.do_kv_cache_update(layer, k, v, cache, torch.stack(slots).long())
        result = layer.impl.forward(layer, q, k, v, cache, metadata, torch.empty_like(q))
        for s, span, part in zip(active, spans, result.split([step[s] for s in active]), strict=True):
            out[s][span] = part
    return out


def float_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, kv: KVFormat) -> Tensor:
    """Causal attention in float64 over K and V as 4 bits give them back; shapes as in `served_attention`."""
    rotation = Transform("hadamard", kv.rotate, "R3") if kv.rotate else Transform()
    group = query.shape[1] // key.shape[1]
    k = convention.kv_fake_quantize(transformed(key, rotation, None), kv.symmetric, kv.k_clip).double()
    v = convention.kv_fake_quantize(value, kv.symmetric, kv.v_clip).double()
    k, v = (x.repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))
    scores = transformed(query, rotation, None).transpose(0, 1) @ k.mT * scale
    hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1)
