"""R1 for the whole model and R2 for each layer from samples of the rows they rotate: no gradients through the model.

R1 rotates the residual stream; what is quantized is its RMS-normalised rows x / rms(x), whatever the norms' gains,
which are folded. So rows of every site count the same (FRTQ's uniform preconditioning holds by construction).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from rotquant.checkpoint.journal import Journal, Scope, Slot
from rotquant.common.progress import Progress
from rotquant.learn import objectives, orthogonal, procrustes, targets
from rotquant.learn.initial import generator
from rotquant.learn.options import Surrogate
from rotquant.learn.starts import usual_mean
from rotquant.learn.steps import ALONE, Loop
from rotquant.learn.stream import SAMPLED, Capture, Job, forward, product_dtype
from rotquant.models.attention import Attention
from rotquant.models.layer import Layer
from rotquant.recipe import Recipe
from rotquant.transforms.dense import Dense
from rotquant.transforms.fold import fold_gains
from rotquant.transforms.klt import covariance, equal_variances
from rotquant.weights.low_rank import directions, without
from rotquant_kernels.formats import RowFormat

BATCH = 2048
MORE = 4  # rows that tell leading directions for one that R1 is learned from: fewer would take too much of themselves
R1_STEPS = ROWS, STEPS = "rows of r1", "steps of r1"


def learn_r1(job: Job, journal: Journal | Scope) -> dict[str, Tensor]:
    """R1 as a matrix, {"r1": float64 [hidden, hidden]}, and sets it. What is found on the way is kept as R1_STEPS."""
    options = job.recipe.learn.surrogate
    eye = torch.eye(job.arch.hidden_size, dtype=torch.float64)
    assert job.transforms.r1 is not None
    r1 = job.transforms.r1.rows(eye)
    job.transforms.r1 = None  # rows and weights in the model's own basis
    if job.recipe.rotations.r1 == "klt":
        r1 = equal_variances(reading_covariance(job))
    if options is not None and "r1" in options.targets:
        rows = residual_rows(job, options, journal)
        slot = Slot(journal, STEPS)
        with Progress("R1: step", options.steps + options.polish, slot.done, short=True) as progress:
            loop = Loop(slot, progress.step)
            r1 = surrogate(rows.to(job.device), r1, options, job.recipe.activations.rows, loop)
    job.transforms.r1 = Dense(r1)
    return {"r1": r1}


def residual_rows(job: Job, options: Surrogate, journal: Journal | Scope) -> Tensor:
    """Normalised rows of the residual stream, float32 [n, hidden], from both norms of every layer, without what is
    taken off them before they are rounded."""
    if kept := journal.kept(ROWS):
        return kept["rows"]
    arch, found, more = job.arch, [], MORE if job.recipe.weights.subtracts else 1
    random, chain = generator(job.seed, "rows"), job.embedded(options.windows or len(job.tokens), SAMPLED)
    with Progress("R1: rows of layer", arch.layers, short=True) as progress:
        for index, decoder in enumerate(job.decoders()):
            kind = arch.kinds[index]
            seen = Capture(kind, more * options.rows // (2 * arch.layers), len(chain), chain.shape[1], random)
            compute = product_dtype(job.dtype, job.device)
            chain = forward(job.devices, decoder, fold_gains(job.layer(index), kind), chain, seen, compute)
            found += [as_rounded(seen.rows(site), site, kind, job.recipe)[::more] for site in kind.norms]
            progress.step()
    rows = torch.cat(found)
    journal.keep(ROWS, {"rows": rows})
    return rows


def as_rounded(x: Tensor, site: str, kind: Layer, recipe: Recipe) -> Tensor:
    """What a shift (`starts`) and a branch of the inputs (`weights.low_rank`) leave of rows [n, d] of a site."""
    if "shift" in recipe.online.of(site):
        x = x - usual_mean(x)
    if recipe.weights.subtracts and site in kind.branch_sites:
        x = without(x, directions(x.mT @ x, recipe.weights.rank, 1, torch.Generator().manual_seed(0)))
    return x


def reading_covariance(job: Job) -> Tensor:
    """Covariance of all weight rows that read the residual stream, gains folded (OSTQuant's start of R1)."""

    def rows() -> Iterator[Tensor]:
        for index, kind in enumerate(job.arch.kinds):
            tensors = fold_gains(job.layer(index), kind)
            yield from (tensors[f"{linear}.weight"].cpu() for site in kind.norms for linear in kind.sites[site])

    return covariance(rows())


def surrogate(rows: Tensor, rotation: Tensor, options: Surrogate, quantizer: RowFormat, loop: Loop = ALONE) -> Tensor:
    """A rotation, float64 [d, d] on the CPU, that makes an objective of rows [n, d] small; see `recipe.Surrogate`.

    Computed where the rows are.
    """
    rotation = rotation.to(rows.device)
    weights = partial(procrustes.token_weights, gamma=options.massive_weight) if options.massive_weight != 1 else None

    def batches() -> tuple[Tensor, ...]:
        return rows.split(BATCH)

    if options.optimiser == "procrustes":
        wanted = procrustes_targets(options, quantizer)
        return procrustes.alternate(batches, rotation, wanted, weights, loop=loop)[0].cpu()
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]  # a step sees rows of all sites
    objective = gradient_objective(options, quantizer)
    moved, _ = orthogonal.learn_rotation(
        batches, objective, rotation.float(), options.optimiser, options.steps, options.lr, weights, loop
    )
    return moved.cpu()


def procrustes_targets(options: Surrogate, quantizer: RowFormat) -> list[procrustes.Target]:
    symmetric, quantized = quantizer.symmetric, partial(targets.quantized_target, rows=quantizer)
    found: dict[str, Callable[[], list[procrustes.Target]]] = {
        "quantization_error": lambda: [quantized] * options.steps,
        "clip": lambda: procrustes.annealed_clip(options.steps, symmetric=symmetric),
        "corner": lambda: [targets.corner_target] * options.steps,
    }
    return found[options.objective]() + [quantized] * options.polish


def gradient_objective(options: Surrogate, quantizer: RowFormat) -> orthogonal.Objective:
    found: dict[str, orthogonal.Objective] = {
        "whip": objectives.whip,
        "kurtosis": objectives.kurtosis,
        "quantization_error": partial(objectives.quantization_error, rows=quantizer),
    }
    return found[options.objective]


def learn_r2(job: Job, index: int, values: Tensor, output: Tensor) -> Tensor:
    """R2 of a layer, float64 [kv_heads, d, d], from rows of its values [n, kv_heads * d] (S_ov folded).

    Args:
        output: weight [hidden, heads * d] of the output linear, as the layer was read.
    """
    options, start = job.recipe.learn.surrogate, job.transforms.layers[index].r2
    attention = job.arch.kinds[index].attends
    assert start is not None
    assert attention is not None
    heads = values.unflatten(1, (attention.kv_heads, -1)).unbind(1)
    if job.recipe.rotations.r2 == "klt":
        start = output_rotation(output, attention)
    if options is None or "r2" not in options.targets:
        return start
    quantizer = job.recipe.kv.values if job.recipe.kv.bits == 4 else job.recipe.activations.rows
    return torch.stack([surrogate(h.to(job.device), r, options, quantizer) for h, r in zip(heads, start, strict=True)])


def output_rotation(output: Tensor, attention: Attention) -> Tensor:
    """For each KV head R2 = U H of the output's covariance over the head's channels, float64 [kv_heads, d, d]."""
    weight = output.cpu().unflatten(1, (attention.kv_heads, -1, attention.head_dim))
    return torch.stack([equal_variances(covariance([w.flatten(0, 1)])) for w in weight.unbind(1)])
