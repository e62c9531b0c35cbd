"""Linear and gated attention in one model, served: what runs is what `rotquant.load` runs, and no page is wasted."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hybrid_serving
import ranks
import rotquant
import vllm_reload
import vllm_serving as serving
from checkpoints import without
from child import Child, child_process
from rotquant.errors import RotQuantError
from rotquant.pipeline import quantize
from source_models import VOCABULARY, source_model
from torch_engine import judged

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    """Runs a function in a child process that has imported vLLM, and forks ranks from it."""
    with child_process(hybrid_serving.prepare) as run:
        yield run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8-bit activations: bfloat16 makes 4-bit ones of a random model round otherwise too often to compare texts.

    Shifts and a branch of the inputs in front of linear attention, too: four parts of vLLM's layer, two of the file's.
    """
    folder = tmp_path_factory.mktemp("hybrid")
    source = source_model(folder / "source", "qwen3_5", dtype=torch.bfloat16)
    settings = ["activations.bits=8", "online.shift_norms=all", "weights.rank=8", "weights.branch=pca"]
    return quantize(str(source), folder / "out", recipe="quarot", samples=4, seq_len=128, settings=settings)


def own_logprobs(folder: Path, prompts: list[list[int]], **options: Any) -> torch.Tensor:
    """What `rotquant.load` says of each prompt's own tokens but the first, log p [prompts, tokens - 1]."""
    ids = torch.tensor(prompts)
    with torch.no_grad():
        logits = rotquant.load(folder, **options)(ids).logits[:, :-1].double()
    return logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)


def prompts_of(count: int, length: int) -> list[list[int]]:
    return [
        torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(count)
    ]


def rows(log: str) -> dict[str, list[str]]:
    """Lines of the start-up check by their first word."""
    lines = log[log.index("rotquant start-up check") :].splitlines()
    return {line.split()[0]: line.split() for line in lines[1:14] if line.startswith("  ")}


def test_both_kinds_of_layer_are_served_as_they_are_measured(child: Child, made: Path) -> None:
    """Two steps a prompt, so that states and pages are read again; both kinds of layer are in the start-up check."""
    prompts = prompts_of(8, 90)
    batches = {"max_num_batched_tokens": 64, "max_num_seqs": 4}
    served = child(serving.serve, made, prompts, max_tokens=1, **hybrid_serving.OPTIONS, **batches)
    own = own_logprobs(made, prompts)
    assert (torch.cat(served.prompt_logprobs).mean() - own.mean()).exp().sub(1).abs() < 0.005
    found = rows(served.log)
    assert {"in_proj_qkvz", "out_proj", "qkv_proj", "o_proj", "gate_up_proj", "down_proj"} <= found.keys()
    assert all(found[name][-4:-1] == ["R2", "hadamard", "128"] for name in ("out_proj", "o_proj"))
    assert "silu_mul" in found["down_proj"]
    assert "in_proj_ba (1), lm_head (1)" in served.log
    assert "linear attention in vLLM's own kernels, its state not quantized: 1" in served.log
    # A page of 4-bit codes holds a state by having more tokens: the least number of vLLM's blocks of 128 that does.
    block = int(re.search(r"Setting attention block size to (\d+) tokens", served.log)[1])  # type: ignore[index]
    number = 4 if torch.cpu._is_avx512_bf16_supported() else 2  # bytes; vLLM keeps heads in float32 or bfloat16
    state, token = 4 * 64 * 64 * number + 512 * 3 * 2, 2 * 37  # bytes: of heads and the convolution, of K and V
    assert block == 128 * math.ceil(state / (128 * token))


def test_at_4_bits_the_engines_differ_by_noise_alone(child: Child, made: Path, tmp_path: Path) -> None:
    """Where one code falls the other way all behind it does: vLLM may be as far from the torch engine as that is from
    itself in float32, token by token, and its mean no further than that many tokens tell apart."""
    for file in made.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((made / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"]["num_bits"] = 4
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompts = prompts_of(8, 250)
    served = child(serving.serve, tmp_path, prompts, max_tokens=1, **hybrid_serving.OPTIONS)
    own = own_logprobs(tmp_path, prompts)
    difference = torch.stack(served.prompt_logprobs) - own
    chaos = (own_logprobs(tmp_path, prompts, dtype=torch.float32) - own).std()
    assert "W4 A4" in " ".join(rows(served.log)["in_proj_qkvz"])
    assert difference.std() < 1.2 * chaos
    assert difference.mean().abs() < 4 * difference.std() / difference.numel() ** 0.5


@pytest.mark.release
def test_chunks_and_cached_pages_change_nothing(child: Child, tmp_path: Path) -> None:
    """A prompt of more than a page; the torch engine knows neither chunks nor pages."""
    source = source_model(tmp_path / "source", "qwen3_5", dtype=torch.bfloat16, max_position_embeddings=2048)
    settings = ["activations.bits=8", "weights.rank=4"]
    out = quantize(str(source), tmp_path / "out", recipe="quarot", samples=4, seq_len=128, settings=settings)
    options = {"max_num_batched_tokens": 256, "enable_prefix_caching": True, "again": True, "max_model_len": 2048}
    prompts = prompts_of(2, 1100)
    served = child(serving.serve, out, prompts, max_tokens=8, **hybrid_serving.OPTIONS | options)
    own, gaps = judged(out, prompts, served.tokens)
    assert (torch.cat(served.prompt_logprobs).mean() - own.mean()).exp().sub(1).abs() < 0.005
    for text_gaps in (gaps, judged(out, prompts, served.again)[1]):
        assert text_gaps.max() < 0.1  # the same tokens, but for near ties
    assert served.cached_tokens > 0


def test_a_stage_of_one_kind_of_layer(child: Child, made: Path) -> None:
    first, second = child(ranks.run, ranks.load_stage, made, "1,1", "bfloat16", pipeline=True)
    assert "in_proj_qkvz" in rows(first)
    assert "KV cache: not quantized (no attention on this rank)" in first
    assert "in_proj_qkvz" not in rows(second)
    assert "linear attention" not in second
    assert re.search(r"attention +1 .* KV4", second)


def test_a_module_that_is_loaded_in_part_is_missing_the_rest(child: Child, made: Path, tmp_path: Path) -> None:
    """vLLM makes its tensors anew for a reload and takes what memory held for the one that does not come."""
    name = "model.layers.0.linear_attn.dt_bias"
    cut = without(made, tmp_path / "cut", name)
    said = child(vllm_reload.refusal_of_reload, made, cut, **hybrid_serving.OPTIONS)
    assert f"{name} is missing from the checkpoint" in said


def test_what_would_end_the_server_at_its_first_request_is_refused(child: Child, made: Path) -> None:
    """Last: it leaves vLLM's groups in the process."""
    with pytest.raises(RotQuantError, match="--dtype float32: vLLM's linear attention runs in bfloat16 only on CPUs"):
        child(serving.load_only, made, dtype="float32")
