"""The equivalence gate: before anything is quantized, the folded model must compute what the original does.

Both run over one short calibration sequence in float32, side by side: the original as transformers loads and runs it
from the files, its whole forward pass, the folded one as `models.decoder` on the tensors that will be quantized. The
hidden states are compared after each layer (h R1 against h'), so that an error names its layer, and the
logits at the end. What transformers honours and the decoder does not, in config.json or in the files, fails here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, cat, nn

from rotquant.checkpoint.original import original_model
from rotquant.checkpoint.source import Source
from rotquant.errors import RotQuantError
from rotquant.models import Architecture
from rotquant.models.decoder import decoders, rms_norm
from rotquant.transforms.fold import VOCABULARY_ROWS, Fold

TOLERANCE = 1e-4


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

    def follow(index: int, layer: nn.Module, output: Any) -> None:
        original = (output[0] if isinstance(output, tuple) else output)[0]
        compare(f"layer {index}", fold.r1.rows(original.double()).float() if fold.r1 else original, folded.step(index))
        layer.to("meta")  # lets the mapped files go
        layer_done(index)

    with original_model(source) as model:
        for index, layer in enumerate(model.get_decoder().layers):
            layer.register_forward_hook(lambda layer, _, output, index=index: follow(index, layer, output))
        logits = model(tokens[None], use_cache=False).logits[0]
    return compare("logits", logits, folded.logits())


class Folded:
    """The folded model over one sequence of tokens [T], a layer at a time."""

    def __init__(self, source: Source, arch: Architecture, fold: Fold, tokens: Tensor) -> None:
        self.source, self.arch, self.fold = source, arch, fold
        self.decoders = decoders(arch, len(tokens))
        self.hidden = fold.embedding(source.get(arch.names.embedding)[tokens]).float() * arch.embedding_scale

    def step(self, index: int) -> Tensor:
        """float32 [T, hidden] after layer `index`."""
        decoder = self.decoders[index]
        tensors = decoder.kind.split(self.source.layer(self.arch.layer_prefix(index)))
        equal = {name: tensor.float() for name, tensor in self.fold.layer(tensors, index).items()}
        linear = decoder.float_linear(equal, self.fold.transforms.layers[index].inputs)
        self.hidden = decoder.layer(equal, self.hidden, linear)
        return self.hidden

    def logits(self) -> Tensor:
        """float32 [T, vocab]; the head is folded in slices of the vocabulary to bound memory."""
        arch, names, found = self.arch, self.arch.names, []
        gain = self.source.get(names.norm)
        for rows in self.source.get(names.embedding if arch.tied else names.head).split(VOCABULARY_ROWS):
            folded, folded_gain = self.fold.head(rows, gain)
            normed = rms_norm(self.hidden, folded_gain.float(), arch.eps) / arch.logits_divisor
            found.append(normed @ folded.float().T)
        return cat(found, dim=1)


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
