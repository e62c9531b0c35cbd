"""The equivalence gate: before anything is quantized, the folded model must compute what the original does.

Both run over one short calibration sequence in float32, side by side: the original as transformers loads and runs it
from the files, its whole forward pass, the folded one as `models.decoder` on the tensors that will be quantized. The
hidden states are compared after each layer (h R1 against h'), so that an error names its layer, and the
logits at the end. What transformers honours and the decoder does not, in config.json or in the files, fails here.

The experts that tokens go to are compared too. Two that a router likes equally well are a matter of the last bit: there
the folded model follows the original's choice, and what they compute is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, cat, nn

from rotquant.checkpoint.layers import read_gain, read_layer
from rotquant.checkpoint.original import original_model
from rotquant.checkpoint.original_mixture import original_mixture
from rotquant.checkpoint.source import Source
from rotquant.errors import RotQuantError
from rotquant.models import Architecture
from rotquant.models.decoder import capped, decoders, rms_norm
from rotquant.models.expert_tensors import each
from rotquant.models.mlp import Experts
from rotquant.transforms.fold import VOCABULARY_ROWS, Fold

TOLERANCE = 1e-4
TIE = 1e-3  # relative difference of two experts' probabilities that counts as none


def check_equivalence(
    source: Source, arch: Architecture, fold: Fold, tokens: Tensor, layer_done: Callable[[int], None]
) -> float:
    """Compares the original with the folded model.

    Args:
        tokens: int64 [T] of one sequence; layer_done: called after each layer.
    Returns:
        relative distance of the logits, ‖a - b‖ / ‖a‖.
    Raises:
        RotQuantError: a distance above 1e-4, naming the layer; NaN or infinite weights; a model that transformers
            cannot load.
    """
    folded = Folded(source, arch, fold, tokens)
    chosen: dict[int, Tensor] = {}  # by layer, int64 [T, top_k]

    def follow(index: int, layer: nn.Module, output: Any) -> None:
        original = (output[0] if isinstance(output, tuple) else output)[0]
        expected = fold.r1.rows(original.double()).float() if fold.r1 else original
        compare(f"layer {index}", expected, folded.step(index, chosen.pop(index, None)))
        layer.to("meta")  # lets the mapped files go
        layer_done(index)

    def note(index: int, routed: Any) -> None:
        chosen[index] = routed[-1].view(len(tokens), -1)

    with original_mixture(source, arch) if arch.mixtures else original_model(source) as model:
        layers = model.get_decoder().layers
        for index, block in arch.mixtures.items():
            router = layers[index].get_submodule(f"{block.module}.gate")
            router.register_forward_hook(lambda router, _, output, index=index: note(index, output))
        for index, layer in enumerate(layers):
            layer.register_forward_hook(lambda layer, _, output, index=index: follow(index, layer, output))
        logits = model(tokens[None], use_cache=False).logits[0]
    return compare("logits", logits, folded.logits())


class Folded:
    """The folded model over one sequence of tokens [T], a layer at a time."""

    def __init__(self, source: Source, arch: Architecture, fold: Fold, tokens: Tensor) -> None:
        self.source, self.arch, self.fold = source, arch, fold
        self.decoders = decoders(arch, len(tokens))
        rows = source.get(arch.names.embedding)[tokens]
        self.hidden = fold.embedding(rows).float() * arch.embedding_factor(rows.dtype)

    def step(self, index: int, chosen: Tensor | None = None) -> Tensor:
        """float32 [T, hidden] after layer `index`; chosen: the original's experts of each token, int64 [T, top_k]."""
        decoder = self.decoders[index]
        equal = each(self.fold.layer(read_layer(self.source, self.arch, index), index), Tensor.float)
        linear = decoder.float_linear(equal, self.fold.transforms.layers[index].inputs)

        def watched(name: str, x: Tensor) -> Tensor:
            y = linear(name, x)
            if chosen is not None and isinstance(decoder.kind.mlp, Experts) and name == decoder.kind.mlp.router:
                compare_choice(f"layer {index}", chosen, y.softmax(-1))
            return y

        self.hidden = decoder.layer(equal, self.hidden, watched, chosen=chosen)
        return self.hidden

    def logits(self) -> Tensor:
        """float32 [T, vocab]; the head is folded in slices of the vocabulary to bound memory."""
        arch, names, found = self.arch, self.arch.names, []
        gain = read_gain(self.source, arch)
        for rows in self.source.get(names.embedding if arch.tied else names.head).split(VOCABULARY_ROWS):
            folded, folded_gain = self.fold.head(rows, gain)
            normed = rms_norm(self.hidden, folded_gain.float(), arch.eps) / arch.logits_divisor
            found.append(normed @ folded.float().T)
        return capped(cat(found, dim=1), arch.logits_cap)


def compare_choice(what: str, chosen: Tensor, p: Tensor) -> None:
    """Refuses experts that the folded router would not choose.

    Args:
        chosen: of the original, int64 [T, top_k]; p: probabilities in the folded model, [T, experts].
    """
    taken = torch.zeros_like(p, dtype=torch.bool).scatter(1, chosen, True)
    least, best = p.masked_fill(~taken, 2).amin(-1), p.masked_fill(taken, -1).amax(-1)
    wrong = ~(least >= best * (1 - TIE))
    if wrong.any():
        raise RotQuantError(
            f"equivalence gate: the router of {what} of the folded model chooses other experts than the original for"
            f" {int(wrong.sum())} of {len(p)} tokens: transformers computes something in this model that rotquant does"
            " not; please report its config.json. Nothing was written"
        )


def compare(what: str, expected: Tensor, actual: Tensor) -> float:
    if not expected.isfinite().all():
        raise RotQuantError(f"equivalence gate: the original itself computes NaN or infinite values ({what})")
    distance = ((expected - actual).norm() / expected.norm()).item() if expected.shape == actual.shape else float("inf")
    if not distance <= TOLERANCE:  # NaN counts as different
        raise RotQuantError(
            f"equivalence gate: {what} of the folded model differs from the original by {distance:.2e} (limit"
            f" {TOLERANCE:.0e}): transformers computes something in this model that rotquant does not; please report"
            " its config.json. Nothing was written"
        )
    return distance
