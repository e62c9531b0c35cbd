"""The KV cache of 4 bits: K and V of a token and head as rows of integers with float16 scales.

Scales are rounded to float16 before zero points and codes are made, so nothing is lost in the page.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rotquant_kernels.formats.integers import RowFormat

BITS = 4


@dataclass(frozen=True)
class KVFormat:
    """4-bit KV cache, one scale per (token, head).

    Args:
        rotate: R3's Hadamard block, 0 for none; feedback: whether keys are rounded with error feedback (`feedback`),
            by a tensor F that each layer has.
    """

    symmetric: bool
    k_clip: float
    v_clip: float
    rotate: int
    feedback: bool = False

    @property
    def key(self) -> RowFormat:
        """Rows of K, behind R3."""
        return RowFormat(BITS, self.symmetric, self.k_clip, torch.float16)

    @property
    def value(self) -> RowFormat:
        """Rows of V."""
        return RowFormat(BITS, self.symmetric, self.v_clip, torch.float16)

    def token_bytes(self, head_dim: int) -> int:
        return kv_token_bytes(head_dim, self.symmetric)


def kv_token_bytes(head_dim: int, symmetric: bool) -> int:
    """Bytes for K and V of one token and head: two rows of nibbles, two float16 scales, a byte of two zero points."""
    return head_dim + (4 if symmetric else 5)
