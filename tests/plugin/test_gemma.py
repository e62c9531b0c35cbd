"""Gemma 3 served: norms of what blocks write, Hadamards online, windows and rotary bases by layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import vllm_serving as serving
from child import Child, child_process
from rotquant.pipeline import quantize
from source_models import VOCABULARY, source_model
from torch_engine import check_text

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    """Runs a function of `vllm_serving` in a child process."""
    with child_process(serving.prepare) as run:
        yield run


def test_what_is_measured_is_served(child: Child, tmp_path: Path) -> None:
    """In chunks of 32 tokens, contexts of four windows; all that vLLM reads of config.json as transformers does.

    The text is that of the torch engine, which knows no chunks, and again where prefixes come from the cache.
    """
    out = quantize(
        str(source_model(tmp_path / "m", "gemma3")), tmp_path / "out", recipe="quarot", samples=4, seq_len=128
    )
    prompts = [torch.randint(VOCABULARY, (96,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(8)]
    options = {"max_num_batched_tokens": 32, "enable_prefix_caching": True, "again": True}
    served = child(serving.serve, out, prompts, max_tokens=12, **options)
    check_text(out, prompts, served)
    lines = served.log[served.log.index("rotquant start-up check") :].splitlines()
    rows = {" ".join(line.split()) for line in lines if line.startswith("  ")}
    for start in (
        "qkv_proj 2", "o_proj 2", "gate_up_proj 2", "down_proj 2", "attention 1 ", "attention, window 24 1 ",
        "rotary 1", "decoder layer 1",
    ):  # fmt: skip
        assert any(row.startswith(start) for row in rows), (start, rows)
    assert any(row.startswith("qkv_proj") and "hadamard 128" in row for row in rows)
