"""Which experts the tokens of an inspection go to, and how many of the choices two models share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotquant.models import Architecture
from rotquant.models.mixture import agreement

Choices = dict[int, list[Tensor]]  # by layer, int64 [T, top_k] of each window


@contextmanager
def choices_watched(model: PreTrainedModel, arch: Architecture) -> Iterator[Choices]:
    """Notes the experts that the routers of a running model choose; they hand them on last."""
    found: Choices = {index: [] for index in arch.mixtures}

    def note(index: int, output: Any) -> None:
        found[index].append(output[-1].cpu())

    layers: Any = model.get_decoder().layers
    routers: dict[int, nn.Module] = {
        index: layers[index].get_submodule(f"{block.module}.gate") for index, block in arch.mixtures.items()
    }
    hooks = [
        router.register_forward_hook(lambda router, _, output, index=index: note(index, output))
        for index, router in routers.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def routing_facts(arch: Architecture, after: Choices, before: Choices | None) -> list[dict[str, Any]]:
    """For each layer with experts how many tokens go to each, and the share of choices that are those of `before`."""
    return [
        {
            "layer": index,
            "tokens": torch.cat(after[index]).flatten().bincount(minlength=block.count).tolist(),
            "agreement": agreement(torch.cat(before[index]), torch.cat(after[index])) if before else None,
        }
        for index, block in arch.mixtures.items()
    ]
