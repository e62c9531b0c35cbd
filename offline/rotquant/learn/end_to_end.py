"""Rotations and scales by gradients of a loss of the logits, through the whole fake-quantized model.

    cross_entropy   -mean log q(next token)                                  (SpinQuant)
    kl_top          Σ p log(p / q) over the teacher's most likely tokens     (OSTQuant; `objectives.kl_top`)

p is the full-precision model, q the quantized one. Every layer's weights are in memory, in float32; a layer's
activations are computed anew for its gradients, so that those of one layer are kept at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rotquant.checkpoint.journal import Slot
from rotquant.checkpoint.layers import read_gain
from rotquant.common.progress import Progress
from rotquant.learn import objectives, procrustes
from rotquant.learn.blockwise import quantized_layer
from rotquant.learn.initial import generator
from rotquant.learn.options import EndToEnd
from rotquant.learn.orthogonal import CayleySGD, StiefelAdam
from rotquant.learn.steps import Steps
from rotquant.learn.stream import Job
from rotquant.models.decoder import capped, rms_norm
from rotquant.models.expert_tensors import each, whole
from rotquant.transforms.dense import Dense
from rotquant.transforms.fold import fold_r1


class QuantizedModel:
    """The whole model with quantization that gradients pass through; R1 is a parameter where it is learned."""

    def __init__(self, job: Job, options: EndToEnd) -> None:
        self.job, self.decoders, arch, source = job, job.decoders(), job.arch, job.source
        rotation = job.transforms.r1
        eye, self.r1 = torch.eye(arch.hidden_size, dtype=torch.float64), None
        if rotation:
            self.r1 = nn.Parameter(rotation.rows(eye).float().to(job.device), requires_grad="r1" in options.learns)
        names = arch.names
        self.embedding, self.gain = (
            t.float().to(job.device) for t in (source.get(names.embedding), read_gain(source, arch))
        )
        self.head = self.embedding if arch.tied else source.get(names.head).float().to(job.device)
        self.tensors, self.layers = [], []
        for index, decoder in enumerate(self.decoders):
            folded, start = job.layer(index), job.transforms.layers[index]
            learns: list[str] = [name for name in options.learns if name != "r1"]
            self.layers.append(quantized_layer(job, decoder, folded, start, learns, options.weight_bits))
            self.tensors.append(whole(each(job.read(index), lambda tensor: tensor.float().to(job.device))))

    def embedded(self, tokens: Tensor) -> Tensor:
        return self.embedding[tokens] * self.job.arch.embedding_factor(self.job.dtype)

    def logits(self, h: Tensor) -> Tensor:
        """Of the residual stream behind the last layer, in the model's own basis."""
        arch = self.job.arch
        return capped(rms_norm(h, self.gain, arch.eps) / arch.logits_divisor @ self.head.T, arch.logits_cap)

    def teacher(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocab] of the full-precision model."""
        h = self.embedded(tokens)
        for decoder, tensors in zip(self.decoders, self.tensors, strict=True):
            h = decoder.layer(tensors, h, decoder.float_linear(tensors))
        return self.logits(h)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocab] of the quantized model."""
        h = self.embedded(tokens)
        rotation = Dense(self.r1) if self.r1 is not None else None
        h = rotation.rows(h) if rotation else h
        for tensors, layer in zip(self.tensors, self.layers, strict=True):

            def run(h: Tensor, tensors=tensors, layer=layer) -> Tensor:  # type: ignore[no-untyped-def]
                return layer(fold_r1(tensors, rotation, layer.decoder.kind) if rotation else tensors, h)

            h = checkpoint(run, h, use_reentrant=False)
        return self.logits(h @ self.r1.T if self.r1 is not None else h)  # the head is not quantized


def learn_end_to_end(job: Job, slot: Slot | None = None) -> None:
    """Learns what `recipe.learn.end_to_end.learns` names, and puts it into job.transforms; snapshots go to the slot."""
    options = job.recipe.learn.end_to_end
    assert options is not None
    model = QuantizedModel(job, options)
    random = generator(job.seed, "end_to_end")
    chosen = [torch.randint(len(job.tokens), (options.batch,), generator=random) for _ in range(options.steps)]
    steps = Steps(options.steps, make_optimisers(model, options), slot)
    with Progress("end to end: step", options.steps, steps.done, short=True) as progress:
        for step in steps:
            total = 0.0
            for window in chosen[step].tolist():  # gradients add up over the batch
                tokens = job.tokens[window : window + 1].to(job.device)
                loss = loss_of(model, tokens, options) / options.batch
                loss.backward()
                total += loss.item()
            steps.advance()
            progress.step(f"loss {total:.4f}")
    job.transforms.layers = [layer.parameters.result() for layer in model.layers]
    if model.r1 is not None:
        job.transforms.r1 = Dense(procrustes.nearest_rotation(model.r1.detach().double()).cpu())


def loss_of(model: QuantizedModel, tokens: Tensor, options: EndToEnd) -> Tensor:
    logits = model(tokens)
    if options.objective == "cross_entropy":
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    with torch.no_grad():
        exact = model.teacher(tokens)
    return objectives.kl_top(logits.flatten(0, 1), exact.flatten(0, 1), options.top)


def make_optimisers(model: QuantizedModel, options: EndToEnd) -> list[torch.optim.Optimizer]:
    plain, rotations = [], []
    for layer in model.layers:
        groups = layer.parameters.groups(options.scale_lr, options.scale_lr, options.lr)
        plain += groups[0]
        rotations += groups[1]
    if model.r1 is not None and model.r1.requires_grad:
        rotations.append({"params": [model.r1], "lr": options.lr})
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(plain, weight_decay=0)] if plain else []
    if rotations:
        made.append((CayleySGD if options.optimiser == "cayley" else StiefelAdam)(rotations))
    return made
