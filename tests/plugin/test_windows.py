"""Models with sliding windows, served: contexts much longer than the window, in one vLLM process."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import vllm_serving as serving
from checkpoints import Spec, model_config, prompts, write_checkpoint
from child import Child
from float_model import expected_logprobs
from rotquant.errors import RotQuantError
from rotquant.models import describe
from rotquant_kernels import calls
from rotquant_kernels.formats import KVFormat
from torch_engine import check_text, judged
from vllm_rotquant.window_proof import window_distance
from vllm_rotquant.windows import Windows
from vllm_rotquant.witness import limit

pytestmark = pytest.mark.vllm

WINDOW = 24
# vLLM's Qwen2 has no windows in single layers: the plugin gives them. Its Mistral has.
QWEN2 = Spec(
    architecture="qwen2",
    config={
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_window_layers": 2,
    },
)
MISTRAL = Spec(architecture="mistral", symmetric=False, config={"sliding_window": WINDOW})
PROMPTS = prompts((7, 61, 150))
OPTIONS = {"block_size": 16, "enable_prefix_caching": False}


@pytest.fixture(scope="module")
def interleaved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "qwen2", QWEN2)


@pytest.fixture(scope="module")
def served(child: Child, interleaved: Path) -> serving.Served:
    """In one chunk; the sequences grow by more than the window."""
    return child(serving.serve, interleaved, PROMPTS, max_tokens=40, **OPTIONS)


def kinds_of_attention(log: str) -> dict[str, str]:
    """The kinds of attention layer in the start-up proof, and how many layers of each there are."""
    return dict(re.findall(r"^  (attention(?:, window \d+)?) +(\d+)  ", log, re.M))


@pytest.mark.parametrize(
    "spec",
    [pytest.param(QWEN2, id="some layers"), pytest.param(MISTRAL, id="all layers", marks=pytest.mark.release)],
)
def test_logprobs_are_those_of_float_arithmetic(child: Child, tmp_path: Path, spec: Spec) -> None:
    folder = write_checkpoint(tmp_path / "model", spec)
    got = child(serving.serve, folder, PROMPTS, swap="exact attention", **OPTIONS)
    unlimited = {"sliding_window": None} if spec is MISTRAL else {"layer_types": ["full_attention"] * 2}
    ignored = replace(spec, config=spec.config | unlimited)
    for prompt, tokens, logprobs, rows, wrong in zip(
        PROMPTS, got.tokens, got.prompt_logprobs, expected_logprobs(folder, spec, PROMPTS),
        expected_logprobs(folder, ignored, PROMPTS), strict=True,
    ):  # fmt: skip
        own, other = (x[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0] for x in (rows, wrong))
        assert (logprobs - own).abs().median() < 1e-5
        assert (logprobs - own).abs().max() < 2e-2
        assert tokens[0] == rows[-1].argmax()
        if len(prompt) > 2 * WINDOW:
            assert (logprobs - other)[WINDOW:].abs().median() > 1e-3
    of_all = {f"attention, window {WINDOW}": "2"}
    assert kinds_of_attention(got.log) == (
        of_all if spec is MISTRAL else {"attention": "1", f"attention, window {WINDOW}": "1"}
    )


def test_both_engines_agree(served: serving.Served, interleaved: Path) -> None:
    """Served by the native kernels, over pages that vLLM frees behind the window, and in transformers' model."""
    own, gaps = judged(interleaved, PROMPTS, served.tokens)
    assert gaps.max() < 0.05  # the same tokens, but for near ties
    assert (torch.cat(served.prompt_logprobs).mean() - own.mean()).exp().sub(1).abs() < 0.005


def test_chunks_prefix_caching_and_freed_pages_change_nothing(
    child: Child, interleaved: Path, served: serving.Served
) -> None:
    """The layer with a window keeps few of a sequence's pages, so the cache holds more than if both kept all."""
    options = OPTIONS | {"enable_prefix_caching": True, "max_num_batched_tokens": 32}
    got = child(serving.serve, interleaved, PROMPTS, max_tokens=40, rounds=2, logprobs=False, **options)
    assert got.tokens == served.tokens
    assert got.cached_tokens > 0
    token = KVFormat(True, 1.0, 1.0, 0).token_bytes(QWEN2.head_dim) * QWEN2.kv_heads * QWEN2.layers
    assert got.cache_tokens > 1.3 * serving.DEFAULTS["kv_cache_memory_bytes"] / token


@pytest.mark.release
def test_a_window_in_all_layers(child: Child, tmp_path: Path) -> None:
    """In chunks and from the cache the text of the torch engine, which knows neither."""
    folder, same = write_checkpoint(tmp_path / "mistral", MISTRAL), prompts((150, 150, 150))
    options = {"block_size": 16, "enable_prefix_caching": True, "max_num_batched_tokens": 32, "again": True}
    served = child(serving.serve, folder, same, max_tokens=40, **options)
    check_text(folder, same, served)


def test_windows_without_vllm_s_manager_of_several_kinds_of_layer(
    child: Child, interleaved: Path, served: serving.Served
) -> None:
    """Every layer keeps all pages then, and sees what it should all the same."""
    options = OPTIONS | {"max_num_batched_tokens": 48, "disable_hybrid_kv_cache_manager": True}
    got = child(serving.serve, interleaved, PROMPTS, max_tokens=40, logprobs=False, **options)
    assert got.tokens == served.tokens


@pytest.mark.parametrize("swap", ["a window too long", "a window too short"])
def test_proof_catches_a_wrong_window(child: Child, interleaved: Path, swap: str) -> None:
    with pytest.raises(RotQuantError, match=r"start-up check failed: model.layers.0.self_attn.attn on kernel"):
        child(serving.serve, interleaved, PROMPTS, swap=swap, **OPTIONS)


def test_windows_that_vllm_would_not_give_its_own_cache(child: Child, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", replace(QWEN2, kv=False, r3=False))
    with pytest.raises(RotQuantError, match=r"layers.0.self_attn: vLLM gives this layer no window, transformers a wi"):
        child(serving.load_only, folder)


def test_a_layer_runs_the_window_that_transformers_reads() -> None:
    arch = describe(model_config(replace(QWEN2, layers=2)), class_name="Qwen2ForCausalLM")
    first, second = ("model.layers.0.self_attn", "model.layers.1.self_attn")
    windows = Windows(arch, longest=256)
    assert windows.of(first, None, ours=True) == windows.of(first, WINDOW, ours=False) == WINDOW
    assert windows.of(second, None, ours=True) is None
    for name, given, ours, message in (
        (first, None, False, "vLLM gives this layer no window, transformers a window of 24 .*--max-model-len 24"),
        (second, 32, True, "vLLM gives this layer a window of 32, transformers no window"),
        (first, 32, True, "a window of 32, transformers a window of 24"),
        ("model.layers.9.self_attn", None, True, "transformers knows no such attention layer"),
    ):
        with pytest.raises(RotQuantError, match=message):
            windows.of(name, given, ours=ours)
    short = Windows(arch, longest=WINDOW)  # no context is cut
    assert short.of(first, None, ours=False) is short.of(first, WINDOW, ours=True) is None
    assert Windows(None, longest=256).of("layers.0.attention", 32, ours=True) == 32  # a model that is not known


class Step(NamedTuple):
    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor


class Implementation:
    """`KV4Impl` as far as the proof calls it."""

    def __init__(self, kv: KVFormat, window: int) -> None:
        self.kv, self.window = kv, window

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        calls.kv_write(key, value, cache, slots, self.kv)

    def forward(
        self, layer: Any, query: Tensor, k: Tensor, v: Tensor, cache: Tensor, step: Step, out: Tensor
    ) -> Tensor:
        calls.kv_attention(query, cache, *step, out, 0.1, self.kv, self.window)
        return out


@pytest.mark.parametrize("window", [1, 17, 100, 2047, 131072])
def test_the_proof_sees_one_token_too_many_or_too_few(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    layer, kv = torch.nn.Module(), KVFormat(symmetric=False, k_clip=0.95, v_clip=0.9, rotate=64)
    layer.register_buffer("anything", torch.ones(1))
    layer.__dict__ |= {"num_heads": 6, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
    layer.__dict__ |= {"quant_method": SimpleNamespace(format=kv), "impl": Implementation(kv, window)}
    most = limit(torch.float32, 4)
    assert window_distance(layer, Step) < 0.6 * most
    run = calls.kv_attention
    for by in (1, -1)[: 1 if window == 1 else 2]:
        monkeypatch.setattr(calls, "kv_attention", lambda *given, by=by: run(*given[:-1], given[-1] + by))
        assert not window_distance(layer, Step) < 5 * most  # NaN where it is one too many
