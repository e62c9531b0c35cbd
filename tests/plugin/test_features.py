"""The table of refused features: each line refuses what it names, and nothing that is right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rotquant.basis.draft import KEY
from rotquant.errors import RotQuantError
from vllm_rotquant.features import FILES, REFUSED, TOKENS_ONLY, Asked, Checkpoint, check

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
ROTATED = Checkpoint(rotated=lambda: True, basis_sha256="1" * 64, kv4=True)
PLAIN = Checkpoint(rotated=lambda: False, kv4=True)
TURNED = {KEY: "1" * 64}

# What is asked, of which checkpoint, and the line that refuses it.
CASES = {
    "extract_hidden_states": (Asked(speculative="extract_hidden_states"), ROTATED, 0),
    "medusa": (Asked(speculative="medusa"), ROTATED, 1),
    "mtp": (Asked(speculative="mtp"), ROTATED, 1),
    "a method of a later vLLM": (Asked(speculative="clairvoyance", draft=TURNED), ROTATED, 1),
    "a draft of the original": (Asked(speculative="eagle3"), ROTATED, 2),
    "a hash that is none": (Asked(speculative="eagle3", draft={KEY: 7}), ROTATED, 2),
    "a draft for another": (Asked(speculative="eagle3", draft={KEY: "2" * 64}), ROTATED, 3),
    "a turned draft on a plain one": (Asked(speculative="eagle3", draft=TURNED), PLAIN, 3),
    "no head": (Asked(pools=True, classifies=True), PLAIN, 4),
    "packed head": (
        Asked(pools=True, classifies=True, classifier_tokens=True), Checkpoint(lambda: False, packed_head=True), 5,
    ),
    "a load format": (Asked(load_format="tensorizer"), PLAIN, 6),
    "a load format of a later vLLM": (Asked(load_format="telepathy"), PLAIN, 6),
    "weights from a trainer": (Asked(weight_transfer="nccl"), PLAIN, 7),
    "a KV connector": (Asked(kv_connector="NixlConnector"), PLAIN, 8),
    "a draft that reads caches": (Asked(speculative="mtp", draft={"model_type": "gemma4_assistant"}), PLAIN, 9),
}  # fmt: skip

RIGHT = [
    *((Asked(speculative=method), ROTATED) for method in TOKENS_ONLY),
    *((Asked(load_format=name), ROTATED) for name in FILES),
    (Asked(speculative="eagle3", draft=TURNED), ROTATED),
    (Asked(speculative="eagle3"), PLAIN),
    (Asked(speculative="medusa"), PLAIN),
    (Asked(speculative="mtp", draft={"model_type": "qwen3_5_text"}), PLAIN),
    (Asked(speculative="eagle3", is_draft=True), ROTATED),  # it is the draft itself, in whatever way its target uses it
    (Asked(pools=True, prompt_embeds=True), ROTATED),
    (Asked(pools=True, classifies=True, classifier_tokens=True), ROTATED),
    (Asked(kv_connector="NixlConnector"), Checkpoint(lambda: True, kv4=False)),
]


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str) -> None:
    asked, checkpoint, index = CASES[case]
    with pytest.raises(RotQuantError) as caught:
        check(asked, checkpoint)
    assert str(caught.value) == REFUSED[index].line(asked)


def test_every_line_has_a_case() -> None:
    assert {index for _, _, index in CASES.values()} == set(range(len(REFUSED)))


@pytest.mark.parametrize("index", range(len(RIGHT)))
def test_right(index: int) -> None:
    check(*RIGHT[index])


def test_the_page_quotes_every_refusal() -> None:
    page = re.sub(r"\s+", " ", PAGE.read_text())
    for refusal in REFUSED:
        assert refusal.reason in page
        assert refusal.remedy in page
