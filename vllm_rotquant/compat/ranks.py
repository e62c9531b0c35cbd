"""The ranks that serve one model, by vLLM's groups."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
    get_world_group,
    model_parallel_is_initialized,
)

__all__ = [
    "from_all",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "pipeline_stage",
    "ranks_of_model",
    "wait_for_all",
]


def ranks_of_model() -> Any:
    """The group of all ranks that load the model that is being built, None where this is the only one.

    The last pipeline stage alone loads a draft.
    """
    if not torch.distributed.is_initialized() or not model_parallel_is_initialized():
        return None
    draft = get_current_vllm_config().model_config.runner_type == "draft"
    group = get_tp_group() if draft else get_world_group()
    return group if group.world_size > 1 else None


def wait_for_all(group: Any, seconds: float) -> None:
    """Returns when all ranks have called it; raises RuntimeError, naming a missing one where it is known, if not.

    Under VLLM_DISTRIBUTED_USE_SPLIT_GROUP, whose groups have no such barrier, `from_all` is the first to wait.
    """
    if torch.distributed.get_backend(group.cpu_group) == "gloo":
        torch.distributed.monitored_barrier(group.cpu_group, timedelta(seconds=seconds), wait_all_ranks=True)


def from_all(group: Any, mine: Any) -> list[Any]:
    """The objects that the ranks of a group have brought, by rank."""
    answers: list[Any] = [None] * group.world_size
    with torch.device("cpu"):  # vLLM loads under its device
        torch.distributed.all_gather_object(answers, mine, group=group.cpu_group)
    return answers


def pipeline_stage() -> tuple[int, int]:
    """Pipeline stage of this rank and how many there are."""
    group = get_pp_group()
    return group.rank_in_group, group.world_size
