"""Pages of one size for attention layers whose tokens differ in theirs.

vLLM keeps all layers of a model in pages of one size, and fills up those of the smaller layers: where a token takes
half the bytes, half of the memory would lie idle. So such a layer's pages have more tokens, 2, 4 or 8 times vLLM's
block size, if that leaves less idle. For a Gemma 4 of 31B on one rank:

    window    16 KV heads of 261 bytes a token    N tokens    4176 N bytes
    full       4 KV heads of 517 bytes a token    2 N         4136 N, 1% idle; of N tokens it would be half

What is left idle is in the start-up check's report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from rotquant.errors import RotQuantError
from rotquant.models.attention import Attention
from rotquant_kernels.formats import KVFormat

COUNTS = (1, 2, 4, 8)
LITTLE = 0.1  # idle, for which pages do not become larger: a prefix is found again in whole pages


def by_layer(attentions: Mapping[str, Attention], kv: KVFormat, ranks: int, *, padded: bool) -> dict[str, int]:
    """Blocks of a page of each attention layer.

    Args:
        ranks: of tensor parallelism, among which KV heads are divided; padded: whether vLLM fills up pages.
    Raises:
        RotQuantError: it does not.
    """
    size = {name: kv.token_bytes(own.head_dim) * max(1, own.kv_heads // ranks) for name, own in attentions.items()}
    kinds = sorted(set(size.values()))
    if len(kinds) > 1 and not padded:
        raise RotQuantError(
            "attention layers of this model have heads of several sizes, and this vLLM does not keep a 4-bit cache of"
            " them: serve with vLLM 0.29 or newer, or quantize with --set kv.bits=16"
        )
    count = dict(zip(kinds, blocks(kinds), strict=True))
    return {name: count[own] for name, own in size.items()}


def blocks(token_bytes: Sequence[int]) -> tuple[int, ...]:
    """How many blocks of tokens a page of each kind of layer holds; token_bytes: of a token in all its KV heads."""

    def cost(counts: tuple[int, ...]) -> tuple[float, int]:
        left = idle([size * count for size, count in zip(token_bytes, counts, strict=True)])
        return (left if left > LITTLE else 0.0), sum(counts)

    return min(product(COUNTS, repeat=len(token_bytes)), key=cost)


def idle(pages: Sequence[int]) -> float:
    """The largest share of a page that nothing is stored in, by what each kind of layer stores in its own."""
    return 1 - min(pages) / max(pages) if pages else 0.0


def left_idle(layers: Sequence[Any]) -> str:
    """For the report, of attention layers with the 4-bit cache."""
    pages = [
        own.quant_method.format.token_bytes(own.head_size) * own.num_kv_heads * own.attn_backend.blocks
        for own in layers
    ]
    return f"; pages of one size leave up to {idle(pages):.1%} of one idle" if len(set(pages)) > 1 else ""
