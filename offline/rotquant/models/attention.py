"""Attention over keys and values: what a layer of it is. What it computes, `decoder` says."""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, int]  # outputs, inputs of a linear


@dataclass(frozen=True)
class PositionScale:
    """Queries at position p are multiplied by 1 + beta log(1 + floor(p / period)), behind RoPE."""

    beta: float
    period: int


@dataclass(frozen=True)
class Attention:
    """Causal grouped-query attention: softmax(scale q kᵀ) v with RoPE on queries and keys.

    cap: scores s become cap tanh(s / cap) before the softmax ("soft cap").
    gated: times sigmoid(gate x); the query linear gives of each head its query, then its gate.
    normed_values: values pass an RMSNorm without gain, each head for itself.
    """

    module: str  # that calls attention, as the KV cache's clips name it
    norm: str
    query: str
    key: str
    value: str
    output: str
    heads: int
    kv_heads: int
    head_dim: int
    rotary: int  # channels of a head that RoPE turns, the first ones; 0 for none
    scale: float
    query_norm: str | None = None  # RMSNorm of each head behind the projection
    key_norm: str | None = None
    position_scale: PositionScale | None = None
    gated: bool = False
    normed_values: bool = False
    window: int | None = None  # positions that a query sees at most, its own and those before it
    cap: float | None = None
    rope: str | None = None  # the entry of `rope_parameters` that holds here, where kinds of layer have their own

    @property
    def qk_factors(self) -> int:
        """Factors of S_qk for a head: one for each pair of channels that RoPE turns, one for each other channel."""
        return self.head_dim - self.rotary // 2

    @property
    def reads(self) -> tuple[str, ...]:
        """Linears that read the norm and are quantized."""
        return self.query, self.key, self.value

    @property
    def full_precision(self) -> tuple[str, ...]:
        """Linears that read the norm and are not quantized."""
        return ()

    @property
    def head_norms(self) -> tuple[str, ...]:
        """RMSNorms of queries and keys."""
        return tuple(filter(None, (self.query_norm, self.key_norm)))

    @property
    def kept(self) -> tuple[str, ...]:
        """Tensors that stay as the files have them, bit for bit."""
        return ()

    @property
    def channels_of_head(self) -> int:
        return self.head_dim

    @property
    def channels(self) -> int:
        """Of what the output linear reads."""
        return self.heads * self.head_dim

    @property
    def numbers(self) -> int:
        """Numbers of a token between the linears."""
        return self.channels * (2 if self.gated else 1) + 2 * self.kv_heads * self.head_dim

    def shapes(self, hidden: int) -> dict[str, Shape]:
        """Outputs and inputs of the quantized linears."""
        queries, values = self.channels * (2 if self.gated else 1), self.kv_heads * self.head_dim
        return {
            self.query: (queries, hidden), self.key: (values, hidden), self.value: (values, hidden),
            self.output: (hidden, self.channels),
        }  # fmt: skip

    def small_shapes(self, hidden: int) -> dict[str, Shape]:
        """Outputs and inputs of the linears in full precision; there is none."""
        return {}
