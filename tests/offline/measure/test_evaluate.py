"""Perplexity: equal to a computation by hand, and equal in both engines."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import rotquant
from checkpoints import VOCAB, random_model, tiny, write_checkpoint
from rotquant.data import DATA
from rotquant.errors import RotQuantError
from rotquant.measure import evaluate as ev

BOS, SEQ_LEN = 1, 16


def write_tokenizer(folder: Path, bos: bool = True) -> None:
    """One token for each ASCII character that a tiny model has an embedding for; everything else is token 0."""
    words = {"<unk>": 0, "<s>": BOS} | {chr(i): i for i in range(2, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>" if bos else None).save_pretrained(folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = write_checkpoint(
        tmp_path / "out", tiny(r4="hadamard", r3=True, kv=True, kv_symmetric=False, act_clip=0.9, kv_clip=0.9)
    )
    write_tokenizer(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(33 + i * i % 90) for i in range(200)))
    return file


@torch.no_grad()
def by_hand(model: Any, windows: list[list[int]]) -> tuple[float, int]:
    """Perplexity and number of predictions, one token after the other in float64."""
    losses = []
    for window in windows:
        logits = model(torch.tensor([window])).logits[0].double()
        for position, token in enumerate(window[1:]):
            losses.append(-(logits[position, token] - logits[position].logsumexp(0)).item())
    return math.exp(sum(losses) / len(losses)), len(losses)


def test_equals_a_computation_by_hand(checkpoint: Path, text: Path) -> None:
    ids = [ord(c) for c in text.read_text()]
    step = SEQ_LEN - 1
    windows = [[BOS, *ids[i : i + step]] for i in range(0, len(ids) - step + 1, step)]
    expected, count = by_hand(rotquant.load(checkpoint), windows)
    score = ev.evaluate(str(checkpoint), text, seq_len=SEQ_LEN)
    assert score.perplexity == pytest.approx(expected, rel=1e-5)
    assert score.nll == pytest.approx(math.log(expected), rel=1e-5)
    assert (score.tokens, score.windows, score.seq_len) == (count, len(windows), SEQ_LEN)
    assert ev.perplexity(rotquant.load(checkpoint), torch.tensor(windows)) == pytest.approx(expected, rel=1e-5)
    # The test can fail: a window more or less moves the result by more than the tolerance.
    assert by_hand(rotquant.load(checkpoint), windows[1:])[0] != pytest.approx(expected, rel=1e-4)


def test_plain_model_without_bos(tmp_path: Path, text: Path) -> None:
    model = random_model(tiny("qwen2"))
    model.save_pretrained(tmp_path / "plain")
    write_tokenizer(tmp_path / "plain", bos=False)
    ids = [ord(c) for c in text.read_text()]
    windows = [ids[i : i + SEQ_LEN] for i in range(0, 4 * SEQ_LEN, SEQ_LEN)]
    expected, count = by_hand(model, windows)
    score = ev.evaluate(str(tmp_path / "plain"), text, seq_len=SEQ_LEN, tokens=4 * SEQ_LEN)
    assert score.perplexity == pytest.approx(expected, rel=1e-5)
    assert score.tokens == count


def test_default_window_fits_the_model(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("a few words " * 100)
    assert ev.evaluate(str(checkpoint), file).seq_len == 255  # one less than the positions: vLLM adds a token


def test_an_overflow_is_infinite() -> None:
    assert ev.safe_exp(1e4) == math.inf


def test_bad_input_is_named(checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("")
    latin.write_bytes(b"caf\xe9 " * 100)
    for file, settings, message in [
        (tmp_path / "none.txt", {}, r"none\.txt: no such file"),
        (empty, {}, r"empty\.txt.*too few"),
        (latin, {}, r"latin\.txt.*UTF-8"),
        (text, {"seq_len": 250}, r"text\.txt.*too few"),
        (text, {"seq_len": 256}, "--seq-len 256"),
        (text, {"seq_len": 1}, "--seq-len 1"),
    ]:
        with pytest.raises(RotQuantError, match=message):
            ev.evaluate(str(checkpoint), file, **settings)
    with pytest.raises(RotQuantError, match="no such folder"):
        ev.evaluate(str(tmp_path / "nowhere"), text)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RotQuantError, match="needs vLLM"):
        ev.evaluate(str(checkpoint), text, seq_len=SEQ_LEN, engine="vllm")


@pytest.mark.parametrize("fits", [512, 16])
def test_vllm_builds_what_a_server_would(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, fits: int) -> None:
    """The model for its whole context, compiled; only requests are cut to what the cache holds."""
    settings: dict[str, Any] = {}

    def engine(model: str, **given: Any) -> Any:
        settings.update(given)
        config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=fits))
        return SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=engine))  # type: ignore[arg-type]
    if fits <= SEQ_LEN:
        with pytest.raises(RotQuantError, match="--seq-len 16: the KV cache holds sequences of 16 tokens"):
            ev._vllm_engine(checkpoint, SEQ_LEN, None, False)
    else:
        ev._vllm_engine(checkpoint, SEQ_LEN, None, False)
    assert settings.pop("max_num_seqs") == ev.VLLM_BATCH
    assert settings == {
        "max_model_len": -1, "enable_prefix_caching": False, "enforce_eager": False, "quantization": "rotquant",
    }  # fmt: skip
    monkeypatch.undo()


def assert_engines_agree(checkpoint: Path, text: Path, tolerance: float = 0.005) -> None:
    """`rotquant eval` gives the same perplexity with the reference and through vLLM; stdout is JSON alone."""
    scores = {}
    for engine in ("torch", "vllm"):
        command = [sys.executable, "-m", "rotquant", "eval", str(checkpoint), "--text", str(text), "--engine", engine]
        command += ["--enforce-eager"]  # compiling takes longer than the evaluation
        done = subprocess.run(
            [*command, "--tokens", "6000", "--seq-len", "512", "--json"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        scores[engine] = json.loads(done.stdout)
    print(scores)
    assert scores["vllm"]["tokens"] == scores["torch"]["tokens"]
    assert scores["vllm"]["perplexity"] == pytest.approx(scores["torch"]["perplexity"], rel=tolerance)


def test_engines_agree(demo: Any) -> None:
    """On the trained model with every online transform and a 4-bit cache."""
    assert_engines_agree(demo.quarot, DATA / "heldout.txt")
