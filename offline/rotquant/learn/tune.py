"""Tuning: the quantized model, whole, towards the original's distribution of the next token, after GPTQ and all else.

    quantized layers, as stored  ->  `tuned_layer`s  ->  Adam on `distill.divergence`  ->  the same tensors, moved

GPTQ makes each linear's output right; this makes the model's: errors of one layer are taken back by others, and scales,
norms and clips settle where 4-bit activations leave them. Codes and format do not change. All layers are in memory as
products take them, and their activations where they are small; else those of a layer are computed anew.

Codes are left alone because moving them did not pay: an optimiser that measures steps by the gradient's sign brings all
of a kind to the edge of their cells at once, and a thousandth of them moved in a run that did not fall over it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rotquant.checkpoint.journal import Slot
from rotquant.checkpoint.layers import read_gain
from rotquant.common.progress import Progress
from rotquant.learn.distill import divergence, routing_divergence, token_kl
from rotquant.learn.initial import generator
from rotquant.learn.options import Tuning
from rotquant.learn.steps import Steps
from rotquant.learn.stream import Job, forward, product, product_dtype
from rotquant.learn.tuned_layer import TunedLayer, as_stored
from rotquant.models import Tensors
from rotquant.models.decoder import Decoder, rms_norm
from rotquant.models.expert_tensors import each
from rotquant.models.layer import gain_as_stored
from rotquant.models.mlp import Experts
from rotquant.resources import KEPT_BYTES, tuned_numbers
from rotquant.transforms.fold import Fold, by_rows

BETAS = (0.9, 0.95)
AS_STORED = Tuning(learns=["scales"])  # clips as they are, up to 1
CLIPS, NORM = "clips.", "norm"  # in what `tune` returns: of a layer; the final norm's gain
BEFORE, AFTER = "before", "after"  # there, too: KL of judged tokens


class ServedModel:
    """The student: embeddings and head in full precision, as they are served."""

    def __init__(self, job: Job, quantized: list[Tensors], options: Tuning) -> None:
        self.job, arch, names = job, job.arch, job.arch.names
        self.compute = product_dtype(job.dtype, job.device)
        fold, source = Fold(arch, job.transforms), job.source
        embedding, gain = source.get(names.embedding), read_gain(source, arch)
        head = embedding if arch.tied else source.get(names.head)
        self.embedding = by_rows(embedding, lambda rows: fold.embedding(rows).to(job.dtype)).to(job.device)
        self.head = by_rows(head, lambda rows: fold.head(rows, gain)[0].to(self.compute)).to(job.device)
        self.gain = nn.Parameter(fold.head(head[:1], gain)[1].float().to(job.device), "gains" in options.learns)
        self.layers = []
        for decoder, transforms, tensors in zip(job.decoders(), job.transforms.layers, quantized, strict=True):
            placed, learns = {name: t.to(job.device) for name, t in tensors.items()}, options.learns
            layer = TunedLayer(
                decoder, transforms, job.transforms.r3, placed, job.recipe, learns, job.dtype, self.compute
            )
            self.layers.append(layer.to(job.device))
        tokens = options.windows(job.tokens.shape[1]) * job.tokens.shape[1]
        self.keeps = 4 * tokens * sum(map(tuned_numbers, arch.kinds)) <= KEPT_BYTES

    def __call__(self, tokens: Tensor) -> Tensor:
        """What the head reads, float32 [n, hidden], of tokens [B, T]."""
        return self.heard(tokens)[0]

    def heard(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the head reads, and what the routers say: float32 [n, experts] of each mixture."""
        arch, routers = self.job.arch, []
        h = self.embedding[tokens].float() * arch.embedding_factor(self.job.dtype)
        for layer in self.layers:
            h, router = layer(h) if self.keeps else checkpoint(layer, h, use_reentrant=False)
            routers += [] if router is None else [router]
        gain = as_stored(self.gain, gain_as_stored(self.gain.detach(), arch.offset, self.job.dtype))
        return (rms_norm(h, gain, arch.eps) / arch.logits_divisor).flatten(0, 1), routers

    def optimiser(self, options: Tuning) -> torch.optim.Optimizer:
        rates = {
            "scales": options.scale_lr, "gains": options.gain_lr, "branch": options.gain_lr,
            "clips": options.clip_lr,
        }  # fmt: skip
        groups = [
            {"params": [p for layer in self.layers for p in getattr(layer, name).values()], "lr": lr}
            for name, lr in rates.items()
            if name in options.learns
        ]
        if self.gain.requires_grad:
            groups.append({"params": [self.gain], "lr": options.gain_lr})
        return torch.optim.Adam([group for group in groups if group["params"]], betas=BETAS, fused=True)


def tune(job: Job, quantized: list[Tensors], slot: Slot | None = None, aside: Tensor | None = None) -> Tensors:
    """Tunes what `recipe.tune.learns` names.

    Args:
        quantized: of each layer the tensors that `LayerQuantizer` made; slot: of the snapshots.
        aside: windows int64 [n, T] to judge by.
    Returns:
        what `layer_of` reads, and NORM; with windows to judge by the KL of each of their tokens BEFORE and AFTER,
        float32.
    """
    options = job.recipe.tune
    assert options is not None
    judge = None if aside is None else Held(job, aside)
    found = {} if judge is None else {BEFORE: judge(ServedModel(job, quantized, AS_STORED))}
    model = ServedModel(job, quantized, options)
    wanted, choices = targets(job, job.tokens, model.compute)
    windows = order(job.tokens, options, generator(job.seed, "tune"))
    steps = Steps(options.steps, [model.optimiser(options)], slot)
    with Progress("tuning: step", options.steps, steps.done, short=True) as progress:
        for step in steps:
            chosen = windows[step]
            student, routers = model.heard(job.tokens[chosen].to(job.device))
            cap = job.arch.logits_cap
            loss = divergence(student, wanted[chosen].flatten(0, 1).to(job.device), model.head, cap)
            note = f"KL {loss.item():.4f}"
            if routers:
                pairs = zip(routers, choices, strict=True)
                of_routers = torch.stack([routing_divergence(r, c[chosen].flatten(0, 1)) for r, c in pairs]).mean()
                loss, note = loss + options.routing * of_routers, f"{note}, of routers {of_routers.item():.4f}"
            loss.backward()
            steps.advance()
            progress.step(note)
    found |= {} if judge is None else {AFTER: judge(model)}
    found |= flat([layer.result(tensors) for layer, tensors in zip(model.layers, quantized, strict=True)])
    return found | {NORM: model.gain.detach().cpu()}


class Held:
    """Windows that nothing learned from, int64 [n, T], and what the original makes of them."""

    def __init__(self, job: Job, windows: Tensor) -> None:
        self.windows, self.wanted = windows, targets(job, windows, product_dtype(job.dtype, job.device))[0]

    @torch.no_grad()
    def __call__(self, model: ServedModel) -> Tensor:
        """KL float32 [n (T - 1)] of each predicted token."""
        device, cap = model.job.device, model.job.arch.logits_cap
        pairs = zip(self.windows, self.wanted, strict=True)
        found = [token_kl(model(ids[None].to(device)), t.to(device), model.head, cap)[:-1].cpu() for ids, t in pairs]
        return torch.cat(found)


def flat(layers: list[tuple[Tensors, dict[str, float]]]) -> Tensors:
    """The tensors and clips of all layers as one dict, for a file; `layer_of` is its inverse."""
    found = {f"{i}.{name}": t for i, (tensors, _) in enumerate(layers) for name, t in tensors.items()}
    for i, (_, clips) in enumerate(layers):
        found |= {f"{i}.{CLIPS}{name}": torch.tensor(clip, dtype=torch.float64) for name, clip in clips.items()}
    return found


def layer_of(tuned: Tensors, index: int) -> tuple[Tensors, dict[str, float]]:
    """Tensors and clip ratios of one layer."""
    own = {name.removeprefix(f"{index}."): t for name, t in tuned.items() if name.startswith(f"{index}.")}
    clips = {name.removeprefix(CLIPS): own.pop(name).item() for name in list(own) if name.startswith(CLIPS)}
    return own, clips


@torch.no_grad()
def targets(job: Job, tokens: Tensor, compute: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """What the original says of int64 [n, T], on the CPU.

    Returns:
        what its head reads in the folded head's basis, [n, T, hidden]; of each mixture the logarithms of the router's
        probabilities, float16 [n, T, experts].
    """
    arch, names, routers = job.arch, job.arch.names, []
    chain = job.source.get(names.embedding)[tokens].float() * arch.embedding_factor(job.dtype)
    with Progress("tuning: original's layer", arch.layers, short=True) as progress:
        for index, decoder in enumerate(job.decoders()):
            if isinstance(decoder.kind.mlp, Experts):
                chain, router = through_mixture(job, index, decoder, chain)
                routers.append(router)
            else:
                tensors = {name: t.to(job.device) for name, t in job.read(index).items()}
                linear = product(tensors, compute)
                for i, h in enumerate(chain):
                    chain[i] = decoder.layer(tensors, h.to(job.device), linear).cpu()
            progress.step()
    gain, r1 = read_gain(job.source, arch).float(), job.transforms.r1
    found = [rms_norm(h, torch.ones_like(gain) if r1 else gain, arch.eps) / arch.logits_divisor for h in chain]
    return torch.stack([(r1.rows(x) if r1 else x).to(compute) for x in found]), routers


def through_mixture(job: Job, index: int, decoder: Decoder, chain: Tensor) -> tuple[Tensor, Tensor]:
    """The original's chain [n, T, hidden] after a layer with experts, and the router's of `targets`."""
    said: list[Tensor] = []
    tensors = each(job.read(index), lambda tensor: tensor.float().to(job.device))
    after = forward(job.devices, decoder, tensors, chain, routed=said)
    return after, torch.cat(said).log_softmax(-1).half().view(*chain.shape[:2], -1)


def order(tokens: Tensor, options: Tuning, random: torch.Generator) -> list[Tensor]:
    """Indices of the windows of each step, of int64 [n, T]: every window once before one comes again."""
    count, batch = len(tokens), min(len(tokens), options.windows(tokens.shape[1]))
    epochs = -(-options.steps * batch // count)
    drawn = torch.cat([torch.randperm(count, generator=random) for _ in range(epochs)])
    return list(drawn[: options.steps * batch].split(batch))
