"""Mixtures of experts in vLLM: what a layer of them asks for, which experts a rank holds, what its router chooses."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts

from rotquant_kernels.backends import REFERENCE, backend_of
from vllm_rotquant.compat.settings import lora_is_on, on_cpu


def experts_refusals(layer: RoutedExperts, moe: Any) -> dict[str, bool]:
    """What the experts of a layer, or a server of them, ask for beyond a weighted sum of gated MLPs."""
    parallel = moe.moe_parallel_config
    activation = getattr(moe.activation, "value", moe.activation)
    return {
        "--enable-eplb (experts that move between ranks)": parallel.enable_eplb,
        "mixtures of experts under data parallelism": parallel.dp_size > 1,
        f"--all2all-backend {parallel.all2all_backend} (experts that get their tokens by messages)": (
            parallel.use_all2all_kernels
        ),
        "experts under --enable-lora": lora_is_on(),
        "experts on a GPU without Triton": not on_cpu() and backend_of("moe_experts", "cuda") is REFERENCE,
        f"experts with the activation {activation}": activation != "silu",
        "experts with biases": moe.has_bias,
        "router weights on the experts' input": layer.apply_router_weight_on_input,
        "experts in groups, of which a router chooses first": layer.use_grouped_topk,
        f"a router of {layer.scoring_func}": layer.scoring_func != "softmax",
        "a router with a bias for each expert": layer.e_score_correction_bias is not None,
        "experts with limits": layer.swiglu_limit is not None,
    }


def experts_here(layer: RoutedExperts) -> dict[int, int]:
    """The experts that this rank holds, by their numbers in the model, and where in its tensors they are."""
    table = layer.expert_map
    if table is None:
        return {expert: expert for expert in range(layer.local_num_experts)}
    return {expert: place for expert, place in enumerate(map(int, table)) if place >= 0}


def experts_share(moe: Any) -> tuple[int, int]:
    """This rank's part of every expert's channels, and how many parts there are: one under expert parallelism."""
    return moe.moe_parallel_config.tp_rank, moe.moe_parallel_config.tp_size


def routed(runner: Any, hidden: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts that vLLM's router chooses by its logits [T, experts], and their weights; [T, top_k] each."""
    weights, chosen = runner.router.select_experts(hidden_states=hidden, router_logits=logits)
    return chosen, weights
