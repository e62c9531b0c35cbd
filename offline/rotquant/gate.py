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
from rotquant.errors import RotQuantError
from rotquant.fold import Fold
from rotquant.models import Architecture, rotary, skeleton
from rotquant.models.decoder import decoders, rms_norm

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
    cos_sin = rotary(arch.config, len(tokens))
    embedding = source.get(arch.names.embedding)[tokens]
    original = embedding.float() * arch.embedding_scale
    folded = fold.embedding(embedding).float() * arch.embedding_scale
    for index, decoder in enumerate(decoders(arch, len(tokens))):
        tensors = source.layer(arch.layer_prefix(index))
        original = original_layer(model.get_decoder().layers[index], tensors, original, cos_sin)
        equal = {n: tensor.float() for n, tensor in fold.layer(arch.kinds[index].split(tensors), index).items()}
        folded = decoder.layer(equal, folded, decoder.float_linear(equal, fold.transforms.layers[index]))
        expected = fold.r1.rows(original.double()).float() if fold.r1 else original
        compare(f"layer {index}", expected, folded)
        layer_done(index)
    return compare_logits(source, arch, fold, original, folded)


def compare_logits(source: Source, arch: Architecture, fold: Fold, original: Tensor, folded: Tensor) -> float:
    """Relative distance of the logits; the head is folded in slices of the vocabulary to bound memory."""
    names = arch.names
    gain, head = source.get(names.norm), source.get(names.embedding if arch.tied else names.head)
    original = rms_norm(original, gain.float(), arch.eps)
    expected, actual = [], []
    for rows in head.split(8192):
        folded_rows, folded_gain = fold.head(rows, gain)
        expected.append(original @ rows.float().T)
        actual.append(rms_norm(folded, folded_gain.float(), arch.eps) @ folded_rows.float().T)
    return compare("logits", torch.cat(expected, dim=1), torch.cat(actual, dim=1))


def original_layer(
    module: torch.nn.Module, tensors: dict[str, Tensor], h: Tensor, cos_sin: tuple[Tensor, Tensor] | None
) -> Tensor:
    """transformers' layer on h [T, hidden], float32, causal."""
    module.load_state_dict({k: v.float() for k, v in tensors.items()}, assign=True)
    with torch.no_grad():
        positions = torch.arange(len(h))[None]
        out = module(h[None], attention_mask=None, position_ids=positions, position_embeddings=cos_sin)
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
