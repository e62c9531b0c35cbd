"""Perplexity of a model or checkpoint on a text, by the served ops in transformers or through vLLM.

Both engines score the same token windows: consecutive, not overlapping, each beginning with BOS where
the tokenizer adds one; every token but a window's first is predicted. log p is float32 log-softmax of
the engine's logits, and

    nll = -mean(log p),   perplexity = exp(nll).
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rotquant.checkpoint.format import claims
from rotquant.checkpoint.hub import fetch
from rotquant.checkpoint.original import load_transformers
from rotquant.common.json_files import short
from rotquant.common.progress import Progress
from rotquant.errors import RotQuantError
from rotquant.measure.products import FastProducts
from rotquant.models import read_config
from rotquant.text import check_tokens, read_tokenizer, windows

SEQ_LEN = 2048
BATCH_TOKENS = 2048  # tokens in one forward pass, so that logits of a large vocabulary fit in memory
LOGIT_ROWS = 512  # rows of logits made float32 at a time
VLLM_BATCH = 8  # windows that vLLM holds at a time
# In this process, quietly, with a small cache (GiB): a few windows are enough.
VLLM_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

Step = Callable[[], object]


@dataclass(frozen=True)
class Score:
    """Result of one evaluation; `tokens` counts the predicted ones."""

    model: str
    engine: str
    perplexity: float
    nll: float
    tokens: int
    windows: int
    seq_len: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.4f}  (nll {self.nll:.5f}, {self.tokens} tokens in {self.windows} windows of"
            f" {self.seq_len}, {self.engine}, {self.seconds:.1f} s)  {self.model}"
        )


def evaluate(
    model: str, text: Path, *, tokens: int | None = None, seq_len: int | None = None, engine: str = "torch",
    max_model_len: int | None = None, enforce_eager: bool = False,
) -> Score:  # fmt: skip
    """Perplexity of a checkpoint, or of any Hugging Face causal language model.

    Args:
        model: folder or hub id.
        text: UTF-8 file.
        tokens: use about this many tokens of the text, None for all.
        seq_len: tokens in a window; None: 2048, or one less than the model's longest context.
        engine: "torch" (the served ops in transformers; a GPU is used if there is one) or "vllm" (the served kernels).
        max_model_len, enforce_eager: the flags of `vllm serve` by these names, for the engine "vllm". For longer
            contexts it may build another rotary embedding; compiled code rounds less often between ops than eager.
    Raises:
        RotQuantError: no such model or text, text too short, window too long, vLLM missing or failing.
    """
    folder = fetch(model)
    config = read_config(folder)
    length = window_length(config, seq_len)
    batch = text_windows(text, folder, length, tokens)
    started = time.monotonic()
    with Progress(f"{engine}: window", len(batch), short=True) as progress:
        if engine == "vllm":
            losses = vllm_losses(folder, batch, progress.step, max_model_len, enforce_eager)
        else:
            losses = torch_losses(folder, batch, progress.step)
    if not losses.isfinite().all():
        raise RotQuantError(f"{folder}: the model's logits are not finite on this text")
    nll = losses.double().mean().item()
    seconds = round(time.monotonic() - started, 2)
    return Score(model, engine, safe_exp(nll), nll, losses.numel(), len(batch), length, seconds)


def window_length(config: PreTrainedConfig, seq_len: int | None, default: int = SEQ_LEN, spare: int = 1) -> int:
    """Tokens of a window: `seq_len`, or the default where the model takes that many.

    Args:
        spare: positions that stay free; vLLM adds one token to a prompt.
    Raises:
        RotQuantError: more than the model takes.
    """
    longest = getattr(config, "max_position_embeddings", None) or default + spare
    length = seq_len or min(default, longest - spare)
    if not 2 <= length <= longest - spare:
        most = f"{longest - spare}, as the model has {longest} positions"
        raise RotQuantError(f"--seq-len {length}: must be from 2 to {most}")
    return length


def torch_losses(folder: Path, batch: Tensor, step: Step | None = None) -> Tensor:
    """As `model_losses`, of the model in a folder.

    Raises:
        RotQuantError: a full-precision model that transformers cannot load or run.
    """
    model = load_any(folder)
    if claims(getattr(read_config(folder), "quantization_config", None)):
        return model_losses(model, batch, step)
    try:
        return model_losses(model, batch, step)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # settings that its own code does not expect
        raise RotQuantError(f"{folder}: transformers cannot run this model: {short(error)}") from error


def text_windows(text: Path, folder: Path, seq_len: int, tokens: int | None = None) -> Tensor:
    """Token windows int64 [n, seq_len] of a text, at most about `tokens` tokens.

    Raises:
        RotQuantError: naming the file that is missing, not UTF-8 or too short for a window; a token without embedding.
    """
    try:
        content = text.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RotQuantError(f"{text}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RotQuantError(f"{text}: not a readable UTF-8 text ({error})") from error
    vocab_size = read_config(folder).get_text_config().vocab_size  # first: the tokenizer's reader takes any config.json
    tokenizer = read_tokenizer(folder)
    found = windows(content, tokenizer, seq_len, str(text))
    check_tokens(found, tokenizer, folder, vocab_size)
    return found if tokens is None else found[: max(1, tokens // seq_len)]


def load_any(folder: Path) -> PreTrainedModel:
    """A model that runs: our checkpoint through `rotquant.load`, any other as transformers loads it."""
    from rotquant.checkpoint.loading import load

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if is_ours(folder):
        return load(folder, device=device)
    model, _ = load_transformers(folder, "auto")
    torch.nn.Module.to(model, device)
    return model


def perplexity(model: PreTrainedModel, batch: Tensor) -> float:
    """exp of the mean negative log likelihood of token windows int64 [n, seq_len]."""
    return safe_exp(model_losses(model, batch).double().mean().item())


def safe_exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


@torch.no_grad()
def model_losses(model: PreTrainedModel, batch: Tensor, step: Step | None = None) -> Tensor:
    """-log p of every token but the first of each window.

    Args:
        batch: int64 [n, seq_len].
        step: called after each window.
    Returns:
        float32 [n, seq_len - 1] on the CPU.
    """
    losses = []
    for ids in batch.split(max(1, BATCH_TOKENS // batch.shape[1])):
        ids = ids.to(model.device)
        with FastProducts():
            logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        pairs = zip(logits.split(LOGIT_ROWS), ids[:, 1:].flatten().split(LOGIT_ROWS), strict=True)
        part = [torch.nn.functional.cross_entropy(rows.float(), wanted, reduction="none") for rows, wanted in pairs]
        losses.append(torch.cat(part).view(len(ids), -1).cpu())
        for _ in ids if step else ():
            step()  # type: ignore[misc]
    return torch.cat(losses)


def vllm_losses(
    folder: Path, batch: Tensor, step: Step | None = None, max_model_len: int | None = None, enforce_eager: bool = False
) -> Tensor:
    """As `model_losses`, with the model served by an offline vLLM engine.

    Raises:
        RotQuantError: vLLM is not installed, or could not start with this model.
    """
    with _stdout_to_stderr(), _environment(VLLM_SETTINGS):
        engine = _vllm_engine(folder, batch.shape[1], max_model_len, enforce_eager)
        from vllm import SamplingParams

        ask = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        losses = []
        for ids in batch.split(VLLM_BATCH):
            prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
            for answer in engine.generate(prompts, ask, use_tqdm=False):
                losses.append(_prompt_losses(answer.prompt_logprobs, answer.prompt_token_ids))
                if step:
                    step()
        engine.llm_engine.engine_core.shutdown()
    return torch.stack(losses)


def _vllm_engine(folder: Path, seq_len: int, max_model_len: int | None, enforce_eager: bool) -> Any:
    """An offline engine in this process with the model that `vllm serve` would build.

    -1 is vLLM's "auto": the model is built for its whole context, as by default, and only then is the length that
    requests may have cut to what a small KV cache holds. The other settings change no number.
    """
    try:
        from vllm import LLM
    except ImportError as error:
        raise RotQuantError(f"--engine vllm needs vLLM ({error}); `rotquant doctor` tells how to install it") from error
    settings: dict[str, Any] = {
        "max_model_len": max_model_len or -1,
        "max_num_seqs": VLLM_BATCH,
        "enable_prefix_caching": False,  # a cached prefix has no log-probabilities
        "enforce_eager": enforce_eager,
    }
    if is_ours(folder):
        settings["quantization"] = "rotquant"
    try:
        engine = LLM(str(folder), **settings)
    except Exception as error:
        reason = " ".join(str(error).split())
        hint = "VLLM_LOGGING_LEVEL=INFO shows more"
        raise RotQuantError(f"vLLM could not start with {folder}: {reason} ({hint})") from error
    fits = engine.llm_engine.vllm_config.model_config.max_model_len
    if fits <= seq_len:  # vLLM adds one token to a prompt
        raise RotQuantError(
            f"--seq-len {seq_len}: the KV cache holds sequences of {fits} tokens; give it more room, on CPUs with "
            "VLLM_CPU_KVCACHE_SPACE (GiB)"
        )
    return engine


def is_ours(folder: Path) -> bool:
    config = read_config(folder)
    return claims(getattr(config, "quantization_config", None), getattr(config, "rotquant", None))


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Sets variables for a while, except those that the user has set."""
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """stdout is for the result; vLLM and its worker processes write there too."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _prompt_losses(logprobs: Any, ids: Any) -> Tensor:
    """-log p of a prompt's tokens from the second on, from vLLM's dict of candidates at each position."""
    return torch.tensor([-candidates[token].logprob for candidates, token in zip(logprobs[1:], ids[1:], strict=True)])
