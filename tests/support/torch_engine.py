"""What the torch engine, which knows neither chunks nor pages, says of what was served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rotquant
from vllm_serving import Served


def judged(folder: Path, prompts: list[list[int]], tokens: list[list[int]], **options: Any) -> tuple[Tensor, Tensor]:
    """Scores prompts and the texts that a server wrote behind them.

    Args:
        folder: a checkpoint; options: of `rotquant.load`.
    Returns:
        of all prompts, one after the other: log p of their own tokens but the first, and by how many nats the model
        prefers another token to each that was served, 0 for its first choice.
    """
    model, own, gaps = rotquant.load(folder, **options), [], []
    for prompt, written in zip(prompts, tokens, strict=True):
        ids = torch.tensor([prompt + written])
        with torch.inference_mode():
            logprobs = model(ids).logits[0, :-1].double().log_softmax(-1)
        found = logprobs.gather(1, ids[0, 1:, None])[:, 0]
        own.append(found[: len(prompt) - 1])
        gaps.append((logprobs.amax(1) - found)[len(prompt) - 1 :])
    return torch.cat(own), torch.cat(gaps)


def check_text(folder: Path, prompts: list[list[int]], served: Served) -> None:
    """Asserts that probabilities and greedy text of a server are the torch engine's, and from cached prefixes, too."""
    own, gaps = judged(folder, prompts, served.tokens)
    assert (torch.cat(served.prompt_logprobs).mean() - own.mean()).exp().sub(1).abs() < 0.005
    assert gaps.max() < 0.05  # the same tokens, but for near ties
    assert served.again == served.tokens
    assert served.cached_tokens > 0
