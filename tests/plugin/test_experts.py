"""Mixtures of experts in vLLM: what is served is what `rotquant.load` computes, on one rank and on two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import experts_serving
import ranks
import rotquant
import vllm_serving as serving
from checkpoints import prompts
from rotquant.checkpoint.source import Source
from rotquant.errors import RotQuantError
from rotquant.pipeline import quantize
from source_models import source_model

pytestmark = pytest.mark.vllm

PROMPTS = prompts((33, 7, 60))
DOWN = "model.layers.1.mlp.experts.2.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts, two for a token, and a shared one; a layer of one MLP in front; a branch of the inputs. For up to
    two ranks."""
    folder = tmp_path_factory.mktemp("experts")
    source = source_model(folder / "source", "qwen2_moe", mlp_only_layers=[0], shared_expert_intermediate_size=96)
    quick = ["weights.method=rtn", "kv.bits=16", "weights.rank=4", "weights.branch=pca"]
    return quantize(str(source), folder / "made", recipe="quarot", tp_max=2, settings=quick, samples=2, seq_len=64)


def edited(made: Path, folder: Path, name: str, change: Any) -> Path:
    """A copy of a checkpoint with one tensor changed, or left out where `change` gives None."""
    shutil.copytree(made, folder)
    shard = Source(made).files[name].name
    tensors = load_file(made / shard)
    tensor = change(tensors.pop(name))
    index = json.loads((made / "model.safetensors.index.json").read_text())
    if tensor is None:
        del index["weight_map"][name]
    else:
        tensors[name] = tensor.contiguous()
    save_file(tensors, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_what_is_served_is_what_load_computes(child: Any, made: Path) -> None:
    served = child(serving.serve, made, PROMPTS)
    model = rotquant.load(made)
    for prompt, got, first in zip(PROMPTS, served.prompt_logprobs, served.tokens, strict=True):
        with torch.no_grad():
            own = model(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
        assert (got - own[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]).abs().median() < 1e-5
        assert first[0] == own[-1].argmax()
    lines = {line.split()[0]: line.split() for line in served.log.splitlines() if line.startswith("  ")}
    assert lines["experts"][:2] == ["experts", "1"]
    assert lines["experts"][4:6] == ["W4", "A4"]
    assert "R4 hadamard 8; 4 of 4, top 2" in served.log
    assert lines["router"][-1] == "0.00%"


def test_ranks_add_up_to_the_layer(child: Any, made: Path) -> None:
    """Whole experts on each rank give the numbers of one; parts of each have scales of their own before down."""
    (whole, _, _) = child(ranks.run, experts_serving.part_of_rank, made, ranks=1)[0]
    options = {"tensor_parallel_size": 2}
    for more, most in (({"enable_expert_parallel": True}, 1e-6), ({}, 0.15)):
        parts = child(run_parts, made, options | more)
        added = parts[0][0] + parts[1][0]
        assert (added - whole).norm() < most * whole.norm()
        assert all(part[1].shape == (0, 128) for part in parts)
        held = "2 of 4, top 2" if more else "4 of 4, top 2"
        assert all(held in part[2] for part in parts)


def run_parts(folder: Path, options: dict[str, Any]) -> list[Any]:
    return ranks.run(of_rank, folder, options)


def of_rank(rank: int, folder: Path, options: dict[str, Any]) -> Any:
    return experts_serving.part_of_rank(rank, folder, **options)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight_packed", lambda t: None, r"experts\.2\.down_proj\.weight_packed is missing from the checkpoint"),
        ("weight_scale", lambda t: None, r"experts\.2\.down_proj\.weight_scale is missing from the checkpoint"),
        ("weight_packed", lambda t: t[:8], r"experts\.2\.down_proj\.weight_packed has shape \[8, 6\].* \[128, 6\]"),
        ("weight_scale", lambda t: t * float("nan"), r"experts\.2\.down_proj\.weight_scale holds NaN"),
        ("weight_shape", lambda t: t.flip(0), r"down_proj\.weight_shape is \[48, 128\], .* \[128, 48\]"),
    ],
)
def test_a_damaged_expert_is_refused_by_name(
    child: Any, made: Path, tmp_path: Path, name: str, change: Any, message: str
) -> None:
    folder = edited(made, tmp_path / "bad", f"{DOWN}.{name}", change)
    with pytest.raises(RotQuantError, match=message) as refused:
        child(serving.load_only, folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_lora": True}, "does not run experts under --enable-lora"),
        ({"load_format": "dummy"}, None),
        ({"dtype": "bfloat16"}, None),  # what checkpoints have; the rest is served in float32 to be compared exactly
    ],
)
def test_what_is_asked_of_experts(child: Any, made: Path, options: dict[str, Any], message: str | None) -> None:
    if message is None:
        child(serving.load_only, made, **options)
        return
    with pytest.raises(RotQuantError, match=message):
        child(serving.load_only, made, **options)


@pytest.mark.parametrize(
    ("how", "consequence"),
    [
        ("no R4", "write wrong text"),
        ("another expert", "write wrong text"),
        ("weights that add up to 1", "tokens would go to other experts"),
    ],
)
def test_the_start_up_check_sees_wrong_experts(child: Any, made: Path, how: str, consequence: str) -> None:
    with pytest.raises(RotQuantError, match=rf"start-up check failed: model\.layers\.1\.mlp\.experts .*{consequence}"):
        child(experts_serving.loaded_with, made, how)


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        ({"parallel.enable_eplb": True}, "--enable-eplb"),
        ({"parallel.use_all2all_kernels": True}, "--all2all-backend deepep_low_latency"),
        ({"parallel.dp_size": 2}, "data parallelism"),
        ({"moe.has_bias": True}, "biases"),
        ({"moe.activation": "gelu"}, "activation gelu"),
        ({"layer.scoring_func": "sigmoid"}, "a router of sigmoid"),
        ({"layer.use_grouped_topk": True}, "experts in groups"),
    ],
)
def test_features_of_mixtures_that_are_not_run_have_a_name(child: Any, change: dict[str, Any], feature: str) -> None:
    assert child(experts_serving.refusals, {}) == []
    (found,) = child(experts_serving.refusals, change)
    assert feature in found
