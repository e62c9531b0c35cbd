"""Experts in vLLM without a server around them; runs in child processes like `vllm_serving` and `ranks`."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import ranks
import vllm_serving as serving
from rotquant_kernels import ops


def trial(tokens: int, hidden: int, experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, the experts of each and their weights."""
    random = torch.Generator().manual_seed(5)
    chosen = torch.stack([torch.randperm(experts, generator=random)[:top_k] for _ in range(tokens)])
    return torch.randn(tokens, hidden, generator=random), chosen, torch.rand(tokens, top_k, generator=random)


def part_of_rank(rank: int, folder: Path, **options: Any) -> tuple[Tensor, Tensor, str]:
    """What this rank's experts of layer 1 add for some rows, traced as for torch.compile, and for none; its log."""
    model, _, log = ranks.loaded(folder, **options)
    layer = next(m for name, m in model.named_modules() if name.endswith("layers.1.mlp.experts.routed_experts"))
    method = layer.quant_method
    x, chosen, weights = trial(40, method.hidden, method.block.count, method.block.top_k)
    traced = torch.compile(method.apply, backend="eager", fullgraph=True)
    with torch.inference_mode():
        return (
            traced(layer, x, weights, chosen, None, None),
            method.apply(layer, x[:0], weights[:0], chosen[:0], None, None),
            log,
        )


def loaded_with(folder: Path, how: str) -> None:
    """Loads a checkpoint with one thing wrong that still gives fluent text."""

    def no_r4(*arguments: Any) -> Tensor:
        return honest(*arguments[:9], 0, *arguments[10:])

    def next_expert(x: Tensor, chosen: Tensor, *rest: Any) -> Tensor:
        return honest(x, (chosen + 1) % len(rest[2]), *rest)

    def unnormalized(runner: Any, hidden: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        top = logits.softmax(-1).topk(2)
        return top.indices, top.values / top.values.sum(-1, keepdim=True)

    honest = ops.moe_experts
    wrong = {
        "no R4": ("rotquant_kernels.ops.moe_experts", no_r4),
        "another expert": ("rotquant_kernels.ops.moe_experts", next_expert),
        "weights that add up to 1": ("vllm_rotquant.compat.routed", unnormalized),
    }
    with mock.patch(*wrong[how]):
        serving.load_only(folder)


def refusals(change: dict[str, Any]) -> list[str]:
    """What is refused of a mixture that is plain but for `change`."""
    from types import SimpleNamespace

    from vllm_rotquant import compat

    parallel = SimpleNamespace(
        enable_eplb=False, dp_size=1, all2all_backend="deepep_low_latency", use_all2all_kernels=False
    )
    moe = SimpleNamespace(activation="silu", has_bias=False, moe_parallel_config=parallel)
    layer = SimpleNamespace(
        apply_router_weight_on_input=False, use_grouped_topk=False, scoring_func="softmax",
        e_score_correction_bias=None, swiglu_limit=None,
    )  # fmt: skip
    for name, value in change.items():
        owner, _, leaf = name.partition(".")
        setattr({"parallel": parallel, "moe": moe, "layer": layer}[owner], leaf, value)
    with mock.patch("vllm_rotquant.compat.experts.lora_is_on", return_value=False):
        found = compat.experts_refusals(layer, moe)  # type: ignore[arg-type]
    return [feature for feature, asked in found.items() if asked]
