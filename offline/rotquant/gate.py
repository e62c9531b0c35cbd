"""The equivalence gate: before anything is quantized, the folded model must compute what the original does.

Both run over one short calibration sequence, streamed layer by layer in float32: the original as
transformers' own modules, the folded one as `decoder.Decoder` on the tensors that will be quantized. The
hidden states are compared after each layer (h R1 against h'), so that an error names its layer, and the
logits at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rotquant.checkpoint import Source
from rotquant.decoder import Decoder, float_linear
from rotquant.errors import RotQuantError
from rotquant.fold import Fold
from rotquant.models import EMBEDDING, FINAL_NORM, LM_HEAD, Architecture, rotary, skeleton

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
        RotQuantError: a distance above 1e-4, naming the layer; NaN or infinite weights.
    """
    model = skeleton(arch.config).eval()
    cos, sin = rotary(arch.config, len(tokens))
    decoder = Decoder(arch, cos[0], sin[0])
    embedding = source.get(EMBEDDING)[tokens]
    original = embedding.float()
    folded = fold.embedding(embedding).float()
    for index in range(arch.layers):
        tensors = source.layer(arch.layer_prefix(index))
        original = original_layer(model.model.layers[index], tensors, original, (cos, sin))
        equal = {name: tensor.float() for name, tensor in fold.layer(tensors, index).items()}
        folded = decoder.layer(equal, folded, float_linear(equal, fold.transforms.layers[index]))
        expected = fold.r1.rows(original.double()).float() if fold.r1 else original
        compare(f"layer {index}", expected, folded)
        layer_done(index)
    return compare_logits(source, arch, fold, decoder, original, folded)


def compare_logits(
    source: Source, arch: Architecture, fold: Fold, decoder: Decoder, original: Tensor, folded: Tensor
) -> float:
    """Relative distance of the logits; the head is folded in slices of the vocabulary to bound memory."""
    gain, head = source.get(FINAL_NORM), source.get(EMBEDDING if arch.tied else LM_HEAD)
    original = decoder.norm(original, gain.float())
    expected, actual = [], []
    for rows in head.split(8192):
        folded_rows, folded_gain = fold.head(rows, gain)
        expected.append(original @ rows.float().T)
        actual.append(decoder.norm(folded, folded_gain.float()) @ folded_rows.float().T)
    return compare("logits", torch.cat(expected, dim=1), torch.cat(actual, dim=1))


def original_layer(
    module: torch.nn.Module, tensors: dict[str, Tensor], h: Tensor, cos_sin: tuple[Tensor, Tensor]
) -> Tensor:
    """transformers' layer on h [T, hidden], float32, causal."""
    module.load_state_dict({k: v.float() for k, v in tensors.items()}, assign=True)
    with torch.no_grad():
        out = module(h[None], attention_mask=None, position_embeddings=cos_sin)
    module.to("meta")
    return (out[0] if isinstance(out, tuple) else out)[0]


def compare(what: str, expected: Tensor, actual: Tensor) -> float:
    distance = ((expected - actual).norm() / expected.norm()).item()
    if not distance <= TOLERANCE:  # NaN counts as different
        raise RotQuantError(
            f"equivalence gate: {what} of the folded model differs from the original by {distance:.2e} (limit"
            f" {TOLERANCE:.0e}): this architecture is not folded rightly; please report it. Nothing was written"
        )
    return distance
