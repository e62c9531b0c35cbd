"""Start-up proof: what really runs, checked on the loaded weights before the first request.

A quantized model that runs at the wrong precision, or without one of its rotations, still writes fluent
text. So every worker checks one layer of each kind against arithmetic in plain float64, through the
same methods that will serve, and logs one table. ROTQUANT_STRICT=0 serves in spite of a mismatch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotquant.errors import RotQuantError
from rotquant.models import describe, is_known
from rotquant_kernels.backends import kernel_of, stages_of
from rotquant_kernels.cuda.rope import turned
from rotquant_kernels.online import split
from vllm_rotquant import compat, rotation, steps
from vllm_rotquant.collector import Collector, kind_of, sort_of
from vllm_rotquant.environment import refuse_rounded_products
from vllm_rotquant.kv_cache import KV4Metadata
from vllm_rotquant.pages import left_idle
from vllm_rotquant.reading import compare_readings, layer_number
from vllm_rotquant.window_proof import window_distance
from vllm_rotquant.witness import (
    distance,
    float_attention,
    float_linear,
    limit,
    r3,
    sign_of_extreme,
    transformed,
    trial,
    trial_gate_up,
    trial_rows,
    trial_stream,
)

ROWS = 9  # tokens of a trial input; also run one by one, since kernels treat a single token apart
PAGE = 16  # tokens of a trial page
STEPS = ((20, 0), (17, 20), (1, 1))  # new tokens of two sequences: a first chunk, a mixed step, a decode step


@dataclass
class Row:
    """One line of the report."""

    kind: str
    layers: int
    kernel: str
    bits: str
    front: str
    transform: str
    error: float
    limit: float
    where: str
    meaning: str = "so the model would write wrong text. Please report it with the table above"

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # False for NaN

    def cells(self) -> list[str]:
        verdict = f"{self.error:.2%}" if self.passed else f"{self.error:.2%} MISMATCH"
        return [self.kind, str(self.layers), self.kernel, self.bits, self.front, self.transform, verdict]


@torch.inference_mode()
def run_checks(collected: Collector, readings: list[Row], *, strict: bool, model: str) -> None:
    """Checks one layer of each kind and logs the report.

    Args:
        readings: from `reading_rows`, of the model before it was fused.
        strict: whether a mismatch ends the server; model: its name in the report, where it is not the only one.
    Raises:
        RotQuantError: on a mismatch, if strict.
    """
    attention = collected.attention
    counts = Counter(map(sort_of, collected.linears))
    rows = [linear_row(layer, packed, counts[key]) for key, (layer, packed) in collected.packed.items()]
    rows += [attention_row(layers[0], len(layers)) for layers in by_window(attention)]
    rows += readings
    log_report(rows, collected, model)
    for row in rows:
        if not row.passed:
            message = (
                f"rotquant's start-up check failed: {row.where} on kernel {row.kernel} is {row.error:.1%} away from "
                f"the reference (limit {row.limit:.1%}), {row.meaning}; ROTQUANT_STRICT=0 serves all the same"
            )
            if strict:
                raise RotQuantError(message)
            compat.logger.error(message)


@torch.inference_mode()
def reading_rows(modules: list[Any], settings: Any) -> list[Row]:
    """Compares vLLM's model code with transformers' on the checkpoint's config.json (`reading`).

    Args:
        modules: all that are around the quantized layers; settings: from `compat.model_settings`.
    Raises:
        RotQuantError: they build different layers.
    """
    config = compat.own_config(settings)
    known = is_known(config)
    decoders = [module for module in modules if known and compat.is_decoder(module)]
    decoders.sort(key=layer_number)
    arch = describe(config) if known else None
    divisor, cap = (arch.logits_divisor, arch.logits_cap) if arch else (1.0, None)
    for change in filter(None, (compat.logits_changed(module, divisor, cap) for module in modules)):
        raise RotQuantError(f"config.json: vLLM {change}, transformers does not: take the field out")
    rows = []
    norms = [module.norm for module in modules if compat.has_final_norm(module)]
    for reading in compare_readings(decoders, norms, config, settings.max_model_len, settings.dtype):
        rows.append(
            Row(
                reading.what, reading.layers, "vLLM", str(settings.dtype).removeprefix("torch."), "-",
                f"positions to {settings.max_model_len}", reading.error, reading.limit, reading.where, reading.meaning,
            )
        )  # fmt: skip
    return rows


def log_report(rows: list[Row], collected: Collector, model: str) -> None:
    """One block in the log: a line for each kind of layer, then the KV cache."""
    attention = collected.attention
    table = [["layer", "count", "kernel", "bits", "in front", "online transform", "distance from reference"]]
    table += [row.cells() for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    of = f" of {model}" if model else ""
    lines = [f"rotquant start-up check{of}, {rank_and_stage(collected.layers)}"]
    lines += ["  " + "  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
    if attention:
        ours = sum(a.quant_method.format.token_bytes(a.head_size) * a.num_kv_heads for a in attention)
        theirs = sum(4 * a.head_size * a.num_kv_heads for a in attention)
        line = f"  KV cache: {ours} bytes a token, {theirs} in bfloat16 ({theirs / ours:.2f}x)"
        lines.append(line + left_idle(attention))
    else:
        why = "the checkpoint has no kv_cache_scheme" if not collected.kv4 else "no attention on this rank"
        lines.append(f"  KV cache: not quantized ({why})")
    if collected.recurrent:
        lines.append(f"  linear attention in vLLM's own kernels, its state not quantized: {collected.recurrent}")
    kinds = Counter(name.rpartition(".")[2] for name in collected.unquantized)
    lines.append("  not quantized: " + (", ".join(f"{k} ({n})" for k, n in sorted(kinds.items())) or "no linear layer"))
    compat.logger.info("\n".join(lines))
    if collected.dummy:
        compat.logger.warning(
            "--load-format dummy: rotquant's layers hold RANDOM WEIGHTS, no file was read. Speed and memory are "
            "those of the real model, what it writes is noise"
        )


def rank_and_stage(layers: list[Any]) -> str:
    """Which part of the model this rank runs."""
    rank, (stage, stages) = compat.get_tensor_model_parallel_rank(), compat.pipeline_stage()
    names = [str(layer.quant_method.prefix) for layer in layers]
    held = f"{names[0]} to {names[-1]}" if names else "no layer of rotquant"
    return f"tensor-parallel rank {rank}" + (f", pipeline stage {stage} (of {stages}): {held}" if stages > 1 else "")


def linear_row(layer: Any, packed: Tensor, count: int) -> Row:
    """Runs the layer's own `apply` and compares.

    Args:
        packed: int32 [N, words] as in the checkpoint.
    """
    method = layer.quant_method
    linear, inputs = method.format, method.inputs
    stages = rotation.stages(layer, linear.transforms)
    bias, correction = getattr(layer, "bias", None), layer.shift_correction
    if linear.rank or split(stages)[0]:
        refuse_rounded_products(method.prefix, packed.device)
    taken = layer.low_rank_down if linear.subtracts else None
    if method.norm is not None:
        given, x = trial_stream(ROWS, method.norm.weight, method.norm.eps, stages)
    elif method.silu_mul:
        given, x = trial_gate_up(ROWS, inputs, stages, method.dtype, packed.device, taken)
    else:
        given = x = trial_rows(ROWS, inputs, stages, method.dtype, packed.device, taken)

    def run(rows: Any) -> Tensor:
        return method.apply(layer, rows if method.norm is None else method.norm(*rows.unbind(1))[0], bias)

    together, alone = run(given), torch.cat([run(row) for row in given.split(1)])
    if correction is not None:
        bias = correction if bias is None else bias.double() + correction
    factors = layer.low_rank_down, layer.low_rank_up
    expected = float_linear(x, linear, stages, packed, layer.weight_scale, factors, bias)
    used = ["int_linear"] if method.norm is None else ["rms_norm_quantize", "quantized_linear"]
    kernels = {method.kernel if op == "int_linear" else kernel_of(op, packed.device) for op in used}
    of_stages = stages_of((stage.kind for stage in split(stages, packed.device)[0]), packed.device)
    named = [f"{name} for {', '.join(kinds)}" for name, kinds in of_stages.items() if name not in kernels]
    group = f" g{linear.weights.group_size}" if linear.weights.group_size else ""
    rank = f" rank {linear.rank}{' of the inputs' if linear.subtracts else ''}" if linear.rank else ""
    return Row(
        kind_of(layer),
        count,
        " + ".join([*sorted(kernels), *named]),
        f"W{linear.weights.bits} A{linear.rows.bits}{group}{rank}",
        "silu_mul" if method.silu_mul else "rms_norm" if method.norm is not None else "-",
        " + ".join(str(transform) for transform in linear.transforms) or "none",
        max(distance(together, expected), distance(alone, expected)),
        limit(x.dtype, linear.rows.bits),
        method.prefix,
    )


def by_window(attention: list[Any]) -> list[list[Any]]:
    """The attention layers of each window and size of heads, those without a window first."""
    sorts: dict[tuple[int, int], list[Any]] = {}
    for layer in attention:
        sorts.setdefault((layer.impl.window or 0, layer.head_size), []).append(layer)
    return [sorts[kind] for kind in sorted(sorts)]


def attention_row(layer: Any, count: int) -> Row:
    """Writes two sequences into trial pages through the layer's implementation, reads them, compares."""
    window = layer.impl.window
    kv, heads, dim = layer.quant_method.format, layer.num_kv_heads, layer.head_size
    device = next(iter(layer.buffers())).device
    lengths = [sum(new) for new in zip(*STEPS, strict=True)]
    query, key, value = (
        [trial(n, h, dim, dtype=layer.dtype, device=device, seed=seed + i) for i, n in enumerate(lengths)]
        for seed, h in ((1, layer.num_heads), (3, heads), (5, heads))
    )
    key = [k * sign_of_extreme(transformed(placed(layer, k), r3(kv))).to(k) for k in key]
    value = [v * sign_of_extreme(v).to(v.dtype) for v in value]
    ways = [torch.cat(served_attention(layer, query, key, value))]
    kernels = {kernel_of(op, device) for op in ("kv4_write", "kv4_attention")}
    if layer.impl.dense:
        ways.append(torch.cat(served_attention(layer, query, key, value, dense=1)))
        kernels.add(f"{layer.impl.dense[0]} for prefills")
    scale, cap = layer.impl.scale, layer.impl.cap
    expected = torch.cat(
        [
            float_attention(placed(layer, q), placed(layer, k), v, scale, kv, window, cap, layer.impl.feedback)
            for q, k, v in zip(query, key, value, strict=True)
        ]
    )
    turns = [f"R3 hadamard {kv.rotate}"] if kv.rotate else []
    name = " + ".join(turns + (["key feedback"] if kv.feedback else [])) or "none"
    errors = [*(distance(way, expected) for way in ways), *([window_distance(layer, KV4Metadata)] if window else [])]
    error, most = float(torch.tensor(errors, dtype=torch.float64).max()), limit(layer.dtype, 4)
    kind, front = f"attention, window {window}" if window else "attention", "rope" if layer.impl.rope else "-"
    return Row(kind, count, " + ".join(sorted(kernels)), "KV4", front, name, error, most, layer.quant_method.prefix)


def placed(layer: Any, x: Tensor) -> Tensor:
    """q or k [T, heads, d] of a whole sequence at its positions, where the layer's launches see to that."""
    return x if layer.impl.rope is None else turned(x, torch.arange(len(x), device=x.device), layer.impl.rope)


def served_attention(
    layer: Any, query: list[Tensor], key: list[Tensor], value: list[Tensor], dense: int = steps.DENSE_TOKENS
) -> list[Tensor]:
    """Attention of two sequences as served: a prefill in chunks, a mixed step, a decode step.

    Args:
        query: for each sequence [T, heads, d] in the model's dtype; key, value: [T, KV heads, d].
        dense: new tokens from which on a sequence goes through a workspace, where there is one.
    Returns:
        For each sequence [T, heads, d].
    """
    device, heads = query[0].device, layer.num_kv_heads
    spaces = -(-max(len(q) for q in query) // PAGE)  # pages a sequence
    table = torch.arange(len(query) * spaces, dtype=torch.int32, device=device).flip(0).view(len(query), spaces)
    shape = (table.numel(), heads, PAGE, layer.quant_method.format.token_bytes(layer.head_size))
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
        given = starts, lens, table[active]
        parts: list[steps.Part] = []
        if device.type == "cuda":
            limits = layer.impl.limits(PAGE)._replace(dense=dense)
            parts = steps.parts([step[s] for s in active], [ends[s] for s in active], *given, limits)
        metadata = KV4Metadata(*given, parts, torch.stack(slots).long())
        if layer.impl.rope is None:  # else attention writes K and V itself
            layer.impl.do_kv_cache_update(layer, k, v, cache, metadata.slots)
        result = layer.impl.forward(layer, q, k, v, cache, metadata, torch.empty_like(q))
        for s, span, part in zip(active, spans, result.split([step[s] for s in active]), strict=True):
            out[s][span] = part
    return out
