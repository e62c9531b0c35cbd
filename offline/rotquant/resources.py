"""What a run will need of disk and memory, estimated from sizes alone: one that cannot fit stops before any work.

Memory is the largest of four phases, which do not overlap:

    quantizing           a layer in float64 and its copies, GPTQ's Hessians, the chain of calibration windows
    learning by layer    a layer in float64 and float32, the float32 chain; blockwise: what gradients of a layer hold
    tuning               all layers' codes as products take them, activations of one layer or of all
    end to end           all layers and the vocabulary in float32, gradients of a layer and of the logits of one window
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from rotquant.errors import RotQuantError
from rotquant.models import Architecture, Layer
from rotquant.models.mlp import Experts
from rotquant.recipe import Recipe

Windows = tuple[int, ...]  # calibration samples, tokens of each
PROCESS = 600_000_000  # bytes of Python and its libraries
HESSIANS = 8  # square float32 arrays: two moments, and what GPTQ factorises
GRADIENT_BYTES = 24  # a weight of a layer under training: its folded and its rounded values, and gradients of both
KEPT_BYTES = 6_000_000_000  # activations of all layers, for tuning's backward pass: more are computed anew
TUNED_BYTES = 4 + 1  # a weight under tuning: its code as products take it, at most, and as it is packed
LOGITS = 5  # arrays of tokens x vocabulary: student, teacher, softmax, gradients


def check_disk(recipe: Recipe, arch: Architecture, windows: Windows, dtype: torch.dtype, output: Path) -> None:
    """Refuses a checkpoint that the disk cannot hold."""
    chain = windows[0] * windows[1] * arch.hidden_size * dtype.itemsize
    tunes = recipe.tune or (recipe.choose and recipe.choose.tuning)
    copies = 3 if tunes else 1  # of the layers: as GPTQ made them, tuned, and written
    layer = packed_bytes(recipe, layer_weights(arch))
    need = 2 * vocabulary(arch) * dtype.itemsize + copies * arch.layers * layer
    need += 2 * chain + 4 * arch.hidden_size**2  # and R1, in the basis sidecar
    need += layer if arch.mixtures else 0  # experts that wait for their file
    home = next(p for p in output.absolute().parents if p.exists())
    free = shutil.disk_usage(home).free
    if free < need:
        raise RotQuantError(f"{home}: disk full: {need / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


def check_memory(recipe: Recipe, arch: Architecture, windows: Windows, dtype: torch.dtype, allowed: float) -> None:
    """Refuses a run that is estimated to need more than `allowed` GB.

    Raises:
        RotQuantError: which phase needs how much, and what lowers it.
    """
    phases = {
        "quantizing": (quantizing(recipe, arch, windows, dtype), "lower --samples or --seq-len, or use --recipe rtn"),
        "learning layer by layer": (by_layer(recipe, arch, windows, dtype), "lower --samples or --seq-len"),
        "learning end to end, which holds the whole model in float32,": (
            end_to_end(recipe, arch, windows),
            "lower --seq-len, or take a recipe that works layer by layer, such as best",
        ),
        "tuning, which holds the whole model,": (
            tuning(recipe, arch, windows, dtype),
            "lower --seq-len, or --set tune=null",
        ),
    }
    name, (most, remedy) = max(phases.items(), key=lambda phase: phase[1][0])
    need = PROCESS + most
    if need > allowed * 1e9:
        raise RotQuantError(f"--max-memory {allowed}: {name} needs about {need / 1e9:.1f} GB; {remedy}")


def memory_of_tuning(recipe: Recipe, arch: Architecture, windows: Windows, dtype: torch.dtype) -> int:
    """Bytes that a run needs while it tunes."""
    return PROCESS + tuning(recipe, arch, windows, dtype)


def quantizing(recipe: Recipe, arch: Architecture, windows: Windows, dtype: torch.dtype) -> int:
    """Bytes."""
    widest = max(inputs for _, (_, inputs) in arch.linears())
    hessians = HESSIANS * 4 * widest**2 if recipe.weights.needs_inputs else 0
    chain = windows[0] * windows[1] * arch.hidden_size * dtype.itemsize
    tables = 3 * vocabulary(arch) * dtype.itemsize  # as read, folded, and folded in one piece
    beside = max(max(kind.shapes[name][1] for name in kind.writes) for kind in arch.kinds)  # inputs of o or down
    chains = 2 * chain + chain * beside // arch.hidden_size
    held = arch.mixtures and (recipe.tune or recipe.chooses)  # else experts wait on disk (`checkpoint.spool`)
    packed = 2 * packed_bytes(recipe, layer_weights(arch)) if held else 0  # as stored and as they run
    return tables + weights_at_once(arch) * (8 + 4 + dtype.itemsize) + packed + hessians + chains


def by_layer(recipe: Recipe, arch: Architecture, windows: Windows, dtype: torch.dtype) -> int:
    """Bytes of R1's and the layers' learning; 0 where there is none."""
    if not (recipe.learns_r1 or recipe.learns_layers):
        return 0
    chains = 3 * windows[0] * windows[1] * arch.hidden_size * 4
    rows = recipe.learn.surrogate.rows if recipe.learn.surrogate else 0
    r1 = 6 * 8 * arch.hidden_size**2 + 3 * 4 * rows * arch.hidden_size if recipe.learns_r1 else 0
    need = vocabulary(arch) * dtype.itemsize + weights_at_once(arch) * (2 * 8 + 4) + chains + r1
    block = recipe.learn.blockwise
    return need + (gradients(arch, block.batch * windows[1]) if block else 0)


def end_to_end(recipe: Recipe, arch: Architecture, windows: Windows) -> int:
    """Bytes; 0 where nothing is learned end to end. Windows pass one at a time, whatever the batch."""
    if not recipe.learn.end_to_end:
        return 0
    weights = arch.layers * layer_weights(arch) + vocabulary(arch) * (1 if arch.tied else 2)
    r1 = 8 * arch.hidden_size**2  # itself, gradient, moments and what its optimiser computes with
    between = arch.layers * windows[1] * arch.hidden_size  # what enters each layer, kept for the backward pass
    logits = LOGITS * windows[1] * arch.vocab_size
    return 4 * (weights + r1 + between + logits) + gradients(arch, windows[1])


def tuning(recipe: Recipe, arch: Architecture, windows: Windows, dtype: torch.dtype) -> int:
    """Bytes of `learn.tune`; 0 where nothing is tuned."""
    if not recipe.tune:
        return 0
    tokens = recipe.tune.windows(windows[1]) * recipe.tune.length(windows[1])
    held = TUNED_BYTES * arch.layers * layer_weights(arch)
    if arch.mixtures and not recipe.weights.group_size:  # of routed experts one is unpacked at a time
        packed = arch.layers * packed_bytes(recipe, layer_weights(arch) - weights_at_once(arch))
        held = TUNED_BYTES * arch.layers * weights_at_once(arch) + packed
    vocabularies = 4 * vocabulary(arch) * dtype.itemsize  # as read and folded, embedding and head
    each = 4 * tokens * sum(map(tuned_numbers, arch.kinds))
    kept = each if each <= KEPT_BYTES else 4 * tokens * arch.layers * arch.hidden_size + each // arch.layers
    wanted = recipe.tune.steps * tokens * arch.hidden_size * (4 + dtype.itemsize)  # at most
    if arch.mixtures:
        wanted += recipe.tune.steps * tokens * 2 * sum(block.count for block in arch.mixtures.values())
    return held + vocabularies + kept + wanted + 2 * 4 * 512 * arch.vocab_size


def packed_bytes(recipe: Recipe, weights: int) -> int:
    """What so many weights take as they are stored, at the most bits that any may have; without scales."""
    return weights * recipe.weights.most_bits // 8


def gradients(arch: Architecture, tokens: int) -> int:
    """Bytes that the backward pass through one layer needs, beside the layer itself."""

    return GRADIENT_BYTES * layer_weights(arch) + 4 * tokens * max(map(activation_numbers, arch.kinds))


def tuned_numbers(kind: Layer) -> int:
    """Numbers of one token that the backward pass through a `learn.tuned_layer` needs."""
    return written(kind) + 14 * kind.hidden + between(kind, 8) + 8 * kind.attention.numbers


def activation_numbers(kind: Layer) -> int:
    """Numbers of one token that the backward pass through a layer needs."""
    return written(kind) + 8 * kind.hidden + between(kind, 6) + 4 * kind.attention.numbers


def between(kind: Layer, each: int) -> int:
    """Of these those in the MLP, `each` for a channel; a token has inputs and outputs of its own in every expert."""
    chosen = kind.mlp.top_k if isinstance(kind.mlp, Experts) else 0
    channels = int(sum(m.width * kind.shares[m.down] for m in kind.mlp.gated))
    return each * channels + 4 * kind.hidden * chosen


def written(kind: Layer) -> int:
    """Of these the numbers of the norms behind what blocks write."""
    return 3 * kind.hidden * len(kind.output_norms)


def layer_weights(arch: Architecture) -> int:
    """Weights of the largest layer."""
    return max(sum(rows * columns for rows, columns in kind.shapes.values()) for kind in arch.kinds)


def weights_at_once(arch: Architecture) -> int:
    """Weights of a layer that are there in full precision together: of a mixture one of its experts."""

    def of(kind: Layer) -> int:
        waiting = kind.mlp.routed[1:] if isinstance(kind.mlp, Experts) else ()
        left_out = {name for expert in waiting for name in (expert.gate, expert.up, expert.down)}
        return sum(rows * columns for name, (rows, columns) in kind.shapes.items() if name not in left_out)

    return max(map(of, arch.kinds))


def vocabulary(arch: Architecture) -> int:
    """Numbers in the embedding, or in the head."""
    return arch.vocab_size * arch.hidden_size
