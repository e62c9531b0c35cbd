"""The start-up check of experts: what they compute and which of them the router chooses, against plain float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rotquant.models.mixture import route
from rotquant_kernels import Stage
from vllm_rotquant import compat
from vllm_rotquant.collector import Collector, Experts, KeptExperts
from vllm_rotquant.proof import Row
from vllm_rotquant.witness import distance, exact, float_linear, limit, sign_of_extreme, transformed, trial, trial_rows

ROWS = 9  # tokens of a trial input for each expert that is looked at
ROUTING, STEPS = 1e-4, 4  # of the weights of experts, and so many steps of the dtype, in which vLLM computes them


def experts_rows(collected: Collector) -> list[Row]:
    """Rows of the report, of the experts and of the router of the first mixture; none where there is none."""
    if collected.experts is None or collected.holders is None:
        return []
    layer, count = collected.experts.layer, len(collected.mixtures)
    method, runner = layer.quant_method, collected.holders.of(layer)
    form, block = method.form, method.block
    group = f" g{form.up.weights.group_size}" if form.up.weights.group_size else ""
    transform = " + ".join(str(transform) for transform in form.down.transforms) or "none"
    held = f"{transform}; {len(method.here)} of {block.count}, top {block.top_k}"
    bits = f"W{form.up.weights.bits} A{form.up.rows.bits}{group}"
    experts = Row(
        "experts", count, method.kernel, bits, "silu_mul", held, experts_distance(collected.experts),
        limit(method.dtype, form.up.rows.bits), method.prefix,
    )  # fmt: skip
    router = Row(
        "router", count, "vLLM", str(method.dtype).removeprefix("torch."), "-", f"top {block.top_k} of {block.count}",
        routing_distance(layer, runner), ROUTING + STEPS * torch.finfo(method.dtype).eps, method.prefix,
        "so tokens would go to other experts: config.json is read differently",
    )  # fmt: skip
    return [experts, router]


@torch.inference_mode()
def experts_distance(kept: KeptExperts) -> float:
    """Runs the layer's own `apply`, each expert alone and two together, and compares."""
    layer, method = kept.layer, kept.layer.quant_method
    worst, alone = [0.0], {}
    for expert, weights in kept.weights.items():
        x, expected = trial_of(method, weights)
        got = torch.cat([run(layer, rows, {expert: 1.0}) for rows in (x, x[:0])])
        one = torch.cat([run(layer, row, {expert: 1.0}) for row in x.split(1)])
        alone[expert] = x, expected
        worst += [distance(got, expected), distance(one, expected)]
    if len(alone) > 1:
        (first, (x, one)), (second, _) = alone.items()
        other = exact(run(layer, x, {second: 1.0}))
        worst.append(distance(run(layer, x, {first: 0.75, second: 0.5}), 0.75 * one + 0.5 * other))
    return max(worst)


def run(layer: Any, x: Tensor, shares: dict[int, float]) -> Tensor:
    """The experts of these numbers on x [T, hidden], with these weights for every token."""
    chosen = torch.tensor([list(shares)], device=x.device).expand(len(x), -1).contiguous()
    weights = torch.tensor([list(shares.values())], device=x.device).expand(len(x), -1).contiguous()
    out: Tensor = layer.quant_method.apply(layer, x, weights, chosen, None, None)
    return out


def trial_of(method: Any, weights: Experts) -> tuple[Tensor, Tensor]:
    """Rows [T, hidden] and what the expert makes of them in float64.

    Of random rows those are taken whose largest magnitude before down is positive: see `sign_of_extreme`.
    """
    up, up_scale, down, down_scale = weights
    form = method.form
    stages = [Stage("hadamard", form.block)] if form.block else []
    x = trial_rows(8 * ROWS, method.hidden, [], method.dtype, up.device)
    gate, value = float_linear(x, form.up, [], up, up_scale, (None, None), None).to(method.dtype).chunk(2, -1)
    silu = (gate.double() / (1 + (-gate.double()).exp())).to(method.dtype)
    between = silu * value
    good = sign_of_extreme(transformed(between, stages))[:, 0].argsort(descending=True, stable=True)[:ROWS]
    out = float_linear(between[good], form.down, stages, down, down_scale, (None, None), None)
    return x[good.to(x.device)], out


@torch.inference_mode()
def routing_distance(layer: Any, runner: Any) -> float:
    """Of the weights that vLLM's router gives to all experts, on logits in random order.

    Those of the first 256 are different numbers in every dtype: of two alike vLLM may choose the other one.
    """
    method = layer.quant_method
    block, dtype, device = method.block, method.dtype, layer.w13_weight_packed.device
    ranks = trial(ROWS, block.count, dtype=torch.float32, device=device, seed=11).argsort(-1).argsort(-1)
    logits = (ranks / -4).to(dtype)
    chosen, weights = compat.routed(runner, trial(ROWS, method.hidden, dtype=dtype, device=device, seed=12), logits)
    own = route(block, exact(logits))
    return distance(spread(chosen.cpu().long(), weights, block.count), spread(own.chosen, own.weights, block.count))


def spread(chosen: Tensor, weights: Tensor, experts: int) -> Tensor:
    """float64 [T, experts] with the weight of each expert, 0 where it is not chosen."""
    return torch.zeros(len(chosen), experts, dtype=torch.float64, device="cpu").scatter(1, chosen, exact(weights))
