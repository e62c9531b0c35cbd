"""Gemma 3 and 4 served: norms of what blocks write, Hadamards online, windows and rotary embeddings by layer.

Of Gemma 4 heads of two sizes too, in pages of one, a linear of values that the original does not have, a factor.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ranks
import vllm_serving as serving
from checkpoints import without
from child import Child
from rotquant.errors import RotQuantError
from rotquant.pipeline import quantize
from source_models import VOCABULARY, source_model
from torch_engine import check_text

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def gemma4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("gemma4"), "gemma4")


def made(folder: Path, kind: str) -> Path:
    return quantize(str(source_model(folder / "m", kind)), folder / "out", recipe="quarot", samples=4, seq_len=128)


def served_as_measured(child: Child, out: Path) -> serving.Served:
    """In chunks of 32 tokens, contexts of four windows; all that vLLM reads of config.json as transformers does.

    The text is that of the torch engine, which knows no chunks, and again where prefixes come from the cache.
    """
    prompts = [torch.randint(VOCABULARY, (96,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(8)]
    options = {"max_num_batched_tokens": 32, "enable_prefix_caching": True, "again": True}
    served = child(serving.serve, out, prompts, max_tokens=12, **options)
    check_text(out, prompts, served)
    found = rows(served.log)
    for start in (
        "qkv_proj 2", "o_proj 2", "gate_up_proj 2", "down_proj 2", "attention 1 ", "attention, window 24 1 ",
        "rotary 1", "decoder layer 1",
    ):  # fmt: skip
        assert any(row.startswith(start) for row in found), (start, found)
    assert any(row.startswith("qkv_proj") and "hadamard 128" in row for row in found)
    return served


def rows(log: str) -> set[str]:
    lines = log[log.index("rotquant start-up check") :].splitlines()
    return {" ".join(line.split()) for line in lines if line.startswith("  ")}


@pytest.mark.release
def test_gemma3_is_served_as_it_is_measured(child: Child, tmp_path: Path) -> None:
    served_as_measured(child, made(tmp_path, "gemma3"))


def test_gemma4_is_served_as_it_is_measured(child: Child, gemma4: Path) -> None:
    """A token takes 4 x 37 bytes in the layer with a window, 69 in the other: two blocks of it make one page."""
    served = served_as_measured(child, gemma4)
    assert "pages of one size leave up to 6.8% of one idle" in served.log
    assert "kv cache group sizes (32, 64)" in served.log


def test_a_stage_without_one_kind_of_attention(child: Child, gemma4: Path) -> None:
    """All layers of the first stage have a window, none of the second."""
    first, second = map(rows, child(ranks.run, ranks.load_stage, gemma4, "1,1", pipeline=True))
    for found, has, other in ((first, "attention, window 24 1 ", "attention 1 "), (second, "attention 1 ", "window")):
        assert any(row.startswith(has) for row in found)
        assert not any(other in row for row in found)
        assert any(row.startswith("decoder layer 1 ") for row in found)
    assert "KV cache: 148 bytes a token, 512 in bfloat16 (3.46x)" in first
    assert "KV cache: 69 bytes a token, 256 in bfloat16 (3.71x)" in second


def test_a_factor_is_not_left_at_one(child: Child, gemma4: Path, tmp_path: Path) -> None:
    """vLLM has it as a buffer, whose 1 would be served where the checkpoint has none.

    Last: it leaves vLLM's groups in the process.
    """
    name = "model.layers.1.layer_scalar"
    with pytest.raises(RotQuantError, match=f"{name} is missing from the checkpoint"):
        child(serving.load_only, without(gemma4, tmp_path / "cut", name))
