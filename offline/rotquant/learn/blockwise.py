"""AdamW on one decoder layer: scales, clips and online matrices that keep its quantized output near the exact one.

    loss = mean over tokens of |f_q(x_t) - f(h_t)|² / |f(h_t)|²

Relative per token, because the next norm divides every token by its size: a massive token must not hide the others.
x is the exact input h, or what the quantized layers before make of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rotquant.checkpoint.journal import Slot
from rotquant.common import metrics
from rotquant.learn.initial import generator
from rotquant.learn.options import Blockwise
from rotquant.learn.orthogonal import StiefelAdam
from rotquant.learn.quantized_layer import LayerParameters, QuantizedLayer
from rotquant.learn.steps import Steps
from rotquant.learn.stream import Job
from rotquant.models import Tensors
from rotquant.models.decoder import Decoder
from rotquant.transforms.space import LayerTransforms


def quantized_layer(
    job: Job, decoder: Decoder, tensors: Tensors, start: LayerTransforms, learns: list[str], weight_bits: int | None
) -> QuantizedLayer:
    """The layer with its quantizers, `start` being where the learned parts of its transforms begin.

    weight_bits: while it learns; None for those that the recipe rounds to.
    """
    parameters = LayerParameters(start, learns, job.recipe, decoder.kind).to(job.device)
    layer = QuantizedLayer(
        parameters, job.recipe, decoder, job.transforms.r3, weight_bits or job.recipe.weights.bits, job.dtype
    )
    layer.search_clips(tensors)
    return layer


def learn_blockwise(
    job: Job, decoder: Decoder, tensors: Tensors, start: LayerTransforms, inputs: Tensor, wanted: Tensor,
    index: int, slot: Slot, report: Callable[[float, str], object],
) -> LayerTransforms:  # fmt: skip
    """Learns what `recipe.learn.blockwise.learns` names.

    Args:
        tensors: of the layer, R1 folded, float32; start: where learning begins.
        inputs, wanted: [samples, T, hidden] before the layer, and after the exact layer.
        index: of the layer, for the order of the batches.
        slot: of the snapshots; report: called with the share that is done, and a note.
    """
    options = job.recipe.learn.blockwise
    assert options is not None
    layer = quantized_layer(job, decoder, tensors, start, list(options.learns), options.weight_bits)
    random = generator(job.seed, f"batches.{index}")
    order = batches(len(inputs), options, random)
    steps = Steps(len(order), make_optimisers(layer.parameters, options), slot)
    for step in steps:
        chosen = order[step]
        output = layer(tensors, inputs[chosen].to(job.device))
        loss = metrics.relative_error(wanted[chosen].to(job.device), output).mean()
        loss.backward()
        steps.advance()
        report(steps.done / steps.total, f"step {steps.done}/{steps.total}, loss {loss.item():.4f}")
    return layer.parameters.result()


def make_optimisers(parameters: LayerParameters, options: Blockwise) -> list[torch.optim.Optimizer]:
    plain, rotations = parameters.groups(options.lr, options.clip_lr, options.rotation_lr)
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(plain, weight_decay=0)] if plain else []
    return made + ([StiefelAdam(rotations)] if rotations else [])


def batches(count: int, options: Blockwise, random: torch.Generator) -> list[Tensor]:
    """Indices of the windows of each step."""
    orders = [torch.randperm(count, generator=random) for _ in range(options.epochs)]
    return [part for order in orders for part in order.split(options.batch)]
