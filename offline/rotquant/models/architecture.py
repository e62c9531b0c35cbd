"""What rotquant knows about an architecture, as data. A family of models says it in a file of its own beside this one.

A decoder layer is two blocks on the residual stream, attention and MLP. A block reads the output of its norm and writes
to the stream with one linear. In it stand the pairs that scale and rotate into each other (see `fold`):

    attention    values into the output linear, for each KV head; keys against queries, in the channels that RoPE allows
    gated        attention whose output is multiplied by sigmoid(gate x), each channel by its own: values still scale
                 into the output linear, but do not rotate into it, diag(g) R ≠ R diag(g)
    linear       attention by the gated delta rule (`delta`): neither
    gated MLP    up into down, for each channel; the order of the channels, rows of gate and up, columns of down
    experts      the same in each of them: an expert is a gated MLP; the router reads what they read
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from rotquant.models.attention import Attention, Shape
from rotquant.models.config_rules import Known
from rotquant.models.layer import Layer
from rotquant.models.mlp import Experts


def layer_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The config of each layer where layers differ, the one of all otherwise."""
    return list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]


def head_size(config: PreTrainedConfig) -> int:
    """Channels of an attention head, by config.json; where layers differ, the most that divides the heads of each."""
    sizes = (
        getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads for own in layer_configs(config)
    )
    return math.gcd(*sizes)


@dataclass(frozen=True)
class Names:
    """Tensors outside the layers, and how a layer's names begin."""

    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layers: str = "model.layers."


@dataclass(frozen=True)
class Architecture:
    """A whole model: h = embedding_scale E[token], its layers, logits = W norm(h) / logits_divisor.

    logits_cap: then logits z become cap tanh(z / cap).

    scale_rounded: embedding_scale is a number of the model's dtype.

    tied: lm_head is the embedding: config.json says so, and the files hold no lm_head of their own (see `original`).
    """

    config: PreTrainedConfig
    kinds: tuple[Layer, ...]  # the layers in their order
    vocab_size: int
    tied: bool
    embedding_scale: float = 1.0
    scale_rounded: bool = False
    logits_divisor: float = 1.0
    logits_cap: float | None = None
    names: Names = Names()
    stays_tied: bool = False  # vLLM's class has no lm_head, but the embedding in its place
    beside: tuple[str, ...] = ()  # how tensors begin that are no part of what is quantized, and are copied
    left: tuple[str, ...] = ()  # and that are left out
    served: Mapping[str, Any] = field(default_factory=dict)  # what a checkpoint's config.json says for vLLM besides

    @property
    def layers(self) -> int:
        return len(self.kinds)

    @property
    def hidden_size(self) -> int:
        return self.kinds[0].hidden

    @property
    def head_dim(self) -> int:
        return head_size(self.config)

    @property
    def attentions(self) -> dict[str, Attention]:
        """By their full names the modules of the layers that attend over keys and values."""
        own = ((self.layer_prefix(index), kind.attends) for index, kind in enumerate(self.kinds))
        return {prefix + attention.module: attention for prefix, attention in own if attention}

    @property
    def key_makers(self) -> dict[str, str]:
        """By these names the linears, as a checkpoint holds them, that make keys."""
        own = ((self.layer_prefix(index), kind) for index, kind in enumerate(self.kinds))
        return {
            prefix + kind.attends.module: prefix + kind.holder(kind.attends.key) for prefix, kind in own if kind.attends
        }

    @property
    def rotates(self) -> bool:
        """Whether R1 folds."""
        return not any(kind.output_norms for kind in self.kinds)

    def embedding_factor(self, dtype: torch.dtype) -> float:
        """`embedding_scale` as a model of that dtype multiplies by it."""
        return torch.tensor(self.embedding_scale).to(dtype).item() if self.scale_rounded else self.embedding_scale

    @property
    def offset(self) -> float:
        """The final norm's gain is this and what files hold for it, as those of the layers."""
        return self.kinds[0].offset

    @property
    def eps(self) -> float:
        """Of the final norm."""
        return self.kinds[0].eps

    @property
    def caps_scores(self) -> bool:
        """Whether attention has a soft cap."""
        return any(attention.cap is not None for attention in self.attentions.values())

    def layer_prefix(self, index: int) -> str:
        return f"{self.names.layers}{index}."

    def linears(self) -> Iterator[tuple[str, Shape]]:
        """Full name and shape of every linear in the layers, as a checkpoint holds them."""
        for index, layer in enumerate(self.kinds):
            for linear in layer.stored:
                yield self.layer_prefix(index) + linear, layer.stored_shape(linear)

    def adaptable(self) -> dict[str, Shape]:
        """`linears`, and those beside them that stay in full precision."""
        small = {
            self.layer_prefix(index) + linear: shape
            for index, kind in enumerate(self.kinds)
            for linear, shape in kind.attention.small_shapes(kind.hidden).items()
        }
        return dict(self.linears()) | small

    @property
    def mixtures(self) -> dict[int, Experts]:
        """The layers that have experts."""
        return {index: kind.mlp for index, kind in enumerate(self.kinds) if isinstance(kind.mlp, Experts)}


@dataclass(frozen=True)
class Family:
    """Models that one file describes.

    Args:
        classes: names of transformers' classes, as `architectures` of config.json gives them, with what their configs
            have.
        describe: reads a config of theirs.
    """

    classes: Mapping[str, Known]
    describe: Callable[[PreTrainedConfig], Architecture]
