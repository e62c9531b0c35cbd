"""What a server may be asked to do with a checkpoint besides generating text, and what is refused.

Features of vLLM that hand hidden states, embeddings or weights in or out meet a model whose residual stream is turned
(h' = h R1), whose final norm has lost its gain to lm_head, and whose weights and KV pages are packed. Those that are
right all the same, or are made so at the `boundary`, need no line here. One that is refused is one line of `REFUSED`.
Where a feature has names that vLLM may add to (speculative methods, load formats), what is known to be right is listed
instead, and anything else is refused.

docs/serving.md has the whole list, with the reasons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rotquant.basis.draft import KEY
from rotquant.errors import RotQuantError

TOKENS_ONLY = ("ngram", "ngram_gpu", "suffix", "draft_model")  # drafts that see no hidden state of the target
TURNED = ("eagle3",)  # drafts that `rotquant draft` turns
READ_CACHES = ("gemma4_mtp", "gemma4_assistant", "gemma4_unified_assistant")  # drafts, by the type of their model
FILES = ("auto", "hf", "safetensors", "fastsafetensors", "dummy")  # load formats that read the checkpoint as it is


@dataclass(frozen=True)
class Asked:
    """What vLLM's configuration asks of a model, in plain values."""

    speculative: str | None = None  # method, None without speculative decoding
    draft: dict[str, Any] = field(default_factory=dict)  # config.json of the draft
    pools: bool = False  # the pooling runner
    prompt_embeds: bool = False
    classifies: bool = False  # the pooling runner with a classification head
    classifier_tokens: bool = False  # whose weights are rows of lm_head
    load_format: str = "auto"
    weight_transfer: str | None = None
    kv_connector: str | None = None
    is_draft: bool = False  # the model itself is the draft of another


@dataclass(frozen=True)
class Checkpoint:
    """What of a checkpoint decides whether it can be done."""

    rotated: Callable[[], bool]  # whether its residual stream is; reads the basis
    basis_sha256: str | None = None
    kv4: bool = False
    packed_head: bool = False


@dataclass(frozen=True)
class Refusal:
    """One feature that is refused: when, what to call it, why, and what to do."""

    holds: Callable[[Asked, Checkpoint], bool]
    feature: str
    reason: str
    remedy: str

    def line(self, asked: Asked) -> str:
        return f"{self.feature.format(asked=asked)}: {self.reason}; {self.remedy}"


def reads_states(asked: Asked, checkpoint: Checkpoint) -> bool:
    """Whether a draft reads hidden states of a rotated model."""
    drafts = asked.speculative is not None and not asked.is_draft
    return drafts and asked.speculative not in TOKENS_ONLY and checkpoint.rotated()


def turned_for(asked: Asked) -> str | None:
    """sha256 of the basis that a draft was turned to."""
    found = asked.draft.get(KEY)
    return found if isinstance(found, str) else None


REFUSED = (
    Refusal(
        lambda a, c: a.speculative == "extract_hidden_states" and reads_states(a, c),
        "speculative method extract_hidden_states",
        "the hidden states of this checkpoint are rotated, not those of the original",
        "take them from the original model",
    ),
    Refusal(
        lambda a, c: a.speculative not in TURNED and reads_states(a, c),
        "speculative method {asked.speculative}",
        "its draft reads hidden states of the original, which this checkpoint has rotated",
        f"use one of {', '.join((*TOKENS_ONLY, *TURNED))}",
    ),
    Refusal(
        lambda a, c: a.speculative in TURNED and turned_for(a) is None and reads_states(a, c),
        "speculative method {asked.speculative}",
        "this draft reads hidden states of the original, which this checkpoint has rotated",
        "turn it: rotquant draft DRAFT --base OUT -o TURNED",
    ),
    Refusal(
        lambda a, c: a.speculative in TURNED and turned_for(a) not in (None, c.basis_sha256),
        "speculative method {asked.speculative}",
        f"this draft was turned for another checkpoint ({KEY} in its config.json)",
        "turn the original draft for this one: rotquant draft DRAFT --base OUT -o TURNED",
    ),
    Refusal(
        lambda a, c: a.classifies and not a.classifier_tokens,
        "a classification head",
        "the checkpoint has none: rotquant quantizes causal language models",
        "name the tokens that it is made of (classifier_from_token and method in --hf-overrides), or embed the texts",
    ),
    Refusal(
        lambda a, c: a.classifier_tokens and c.packed_head,
        "a classifier made of rows of lm_head",
        "lm_head of this checkpoint is quantized, and vLLM wants it in full precision here",
        "quantize again with --set lm_head.bits=16",
    ),
    Refusal(
        lambda a, c: a.load_format not in FILES,
        "--load-format {asked.load_format}",
        "rotquant loads packed weights from the checkpoint's own safetensors files only",
        f"leave the flag out (or one of {', '.join(FILES)})",
    ),
    Refusal(
        lambda a, c: a.weight_transfer is not None,
        "--weight-transfer-config ({asked.weight_transfer})",
        "the weights that a trainer sends are not packed and not rotated",
        "quantize the new weights and start a server with them",
    ),
    Refusal(
        lambda a, c: a.kv_connector is not None and c.kv4,
        "KV transfer or offloading ({asked.kv_connector})",
        "no KV connector of vLLM is tested with pages of packed 4-bit codes",
        "leave it out, or quantize again with --set kv.bits=16",
    ),
    Refusal(
        lambda a, c: a.draft.get("model_type") in READ_CACHES and not a.is_draft,
        "speculative method {asked.speculative} with a Gemma 4 assistant",
        "its layers read keys and values of the original, which this checkpoint has turned",
        f"use one of {', '.join(TOKENS_ONLY)}",
    ),
)  # fmt: skip


def check(asked: Asked, checkpoint: Checkpoint) -> None:
    """Refuses what cannot be served rightly.

    Raises:
        RotQuantError: naming the feature, the reason and the remedy.
    """
    for refusal in REFUSED:
        if refusal.holds(asked, checkpoint):
            raise RotQuantError(refusal.line(asked))
