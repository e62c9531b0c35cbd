"""What hands hidden states, embeddings or weights in or out of a served checkpoint: right, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch.nn.functional import cosine_similarity

import boundary_serving as serving
from checkpoints import Spec, edited, prompts, write_checkpoint
from child import Child
from eagle_drafts import write_draft
from rotquant.basis.draft import turn_draft
from rotquant.errors import RotQuantError
from rotquant.pipeline import quantize
from source_models import source_model

pytestmark = pytest.mark.vllm

PROMPTS = prompts((5, 17, 30))
EIGHT = ["weights.method=rtn", "weights.bits=8", "activations.bits=8"]  # close to the original, so that bases show


class Folders(NamedTuple):
    """An original, checkpoints of it, and EAGLE3 drafts: for the original, and turned for `out`."""

    original: Path
    out: Path
    portable: Path
    draft: Path
    turned: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    work = tmp_path_factory.mktemp("boundary")
    original = source_model(work / "original", "llama", hidden_size=128, layers=3, tie_word_embeddings=False)
    out = quantize(str(original), work / "out", recipe="quarot", settings=[*EIGHT, "kv.bits=16"])
    portable = quantize(str(original), work / "portable", recipe="quarot", settings=EIGHT, profile="portable")
    draft = write_draft(work / "draft", original, eagle_aux_hidden_state_layer_ids=[0, 1, 2])
    return Folders(original, out, portable, draft, turn_draft(str(draft), str(out), work / "turned"))


# ---- pooling and prompt embeddings --------------------------------------------------------------------------------


@pytest.mark.parametrize(("profile", "task"), [("portable", "embed"), ("out", "token_embed")])
def test_pooled_vectors_are_the_original_s(child: Child, folders: Folders, profile: str, task: str) -> None:
    expected = child(serving.vectors, folders.original, PROMPTS, task)
    got = child(serving.vectors, getattr(folders, profile), PROMPTS, task)
    assert got.shape == expected.shape
    alike = cosine_similarity(got, expected, dim=-1)  # 0 in the checkpoint's own basis
    assert alike.mean() > 0.98
    assert alike.min() > 0.9


def test_a_classifier_of_lm_head_s_rows_reads_turned_rows(child: Child, folders: Folders) -> None:
    words = ["import", "def", "class"]
    expected, got = (child(serving.classes, folder, PROMPTS, words) for folder in (folders.original, folders.out))
    assert got.shape == (len(PROMPTS), len(words))
    assert (got - expected).norm() < 0.3 * expected.norm()  # above 1 for rows of another basis


def test_prompt_embeddings_are_the_original_s(child: Child, folders: Folders) -> None:
    """What follows is what follows the tokens, in one batch with them; rows of another basis mean something else."""
    by_tokens, by_rows = child(serving.from_embeddings, folders.out, folders.original, PROMPTS)
    assert (by_rows - by_tokens).abs().max() < 0.1
    by_tokens, by_rows = child(serving.from_embeddings, folders.out, folders.out, PROMPTS)
    assert (by_rows - by_tokens).abs().max() > 1


# ---- drafts -------------------------------------------------------------------------------------------------------


def test_a_rotquant_checkpoint_drafts(child: Child, tmp_path: Path) -> None:
    """Under vLLM's prefix for draft models: each layer has its own format, and every draft is accepted."""
    folder = write_checkpoint(tmp_path / "model", Spec(int8_head=True))
    own = {f"model.layers.{i}.mlp.down_proj": 0.5 + 0.1 * i for i in range(2)}
    folder = edited(
        folder,
        tmp_path / "clips",
        lambda c: c["rotquant"].update(activation_clip={"default": 0.9, "lm_head": 1.0} | own),
    )
    alone = child(serving.drafted, folder, PROMPTS)
    got = child(serving.drafted, folder, PROMPTS, method="draft_model", model=str(folder))
    assert got["tokens"] == alone["tokens"]
    assert got["drafted"] == got["accepted"] > 20
    assert got["clips"] == [0.9, 0.9, 0.9, 0.5, 0.9, 0.9, 0.9, 0.6, 1.0]
    assert "rotquant start-up check, tensor-parallel rank 0" in got["log"]
    assert "rotquant start-up check of the draft model, tensor-parallel rank 0" in got["log"]


@pytest.fixture(scope="module")
def alone(child: Child, folders: Folders) -> Any:
    """Tokens without a draft."""
    return child(serving.drafted, folders.out, PROMPTS)["tokens"]


def test_an_ordinary_draft_model_keeps_working(child: Child, folders: Folders, alone: Any) -> None:
    got = child(serving.drafted, folders.out, PROMPTS, method="draft_model", model=str(folders.original))
    assert got["tokens"] == alone
    assert got["accepted"] > 0.25 * got["drafted"] > 0  # of some 2000 tokens, the original guesses the right one


def test_a_turned_draft_sees_what_it_saw(child: Child, folders: Folders, alone: Any) -> None:
    expected = child(serving.drafted, folders.original, PROMPTS, method="eagle3", model=str(folders.draft))["states"]
    got = child(serving.drafted, folders.out, PROMPTS, method="eagle3", model=str(folders.turned))
    assert got["tokens"] == alone
    alike = cosine_similarity(got["states"], expected, dim=-1)  # 0 for the draft as it was
    assert alike.mean() > 0.99
    assert alike.min() > 0.95


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_a_draft_that_was_not_turned_is_refused(child: Child, folders: Folders) -> None:
    with pytest.raises(RotQuantError, match=r"method eagle3: this draft .*; turn it: rotquant draft DRAFT --base OUT"):
        child(serving.drafted, folders.out, PROMPTS, method="eagle3", model=str(folders.draft))


def test_a_classification_head_that_is_not_there_is_refused(child: Child, folders: Folders) -> None:
    with pytest.raises(RotQuantError, match="a classification head: the checkpoint has none"):
        child(serving.start, folders.out, runner="pooling", convert="classify")


def test_other_ways_to_load_weights_are_refused(child: Child, folders: Folders) -> None:
    with pytest.raises(RotQuantError, match="--load-format sharded_state: rotquant loads packed weights"):
        child(serving.start, folders.out, load_format="sharded_state")


# ---- last: vLLM's ngram proposer imports numba, beside which vLLM 0.32 starts no further engine in a process --------


def test_ngram_keeps_working(child: Child, folders: Folders, alone: Any) -> None:
    got = child(serving.drafted, folders.out, PROMPTS, method="ngram", prompt_lookup_max=2, prompt_lookup_min=1)
    assert got["tokens"] == alone
