"""New weights for a served model: `reload_weights`, sleep and wake-up, and what is no reload."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vllm_reload
import vllm_serving as serving
from checkpoints import Spec, edited, prompts, without, write_checkpoint
from child import Child
from online_extras import everything

pytestmark = pytest.mark.vllm

PROMPTS = prompts((7, 33))
MISSING = "model.layers.0.mlp.down_proj.weight_packed"
SPECS = {
    # A stored R4, low rank, shifts, an int8 lm_head; then biases, and norms that quantize, as on a GPU.
    "everything": (
        Spec(r4="dense", extras=everything(), int8_head=True), "",
        {MISSING: f"{MISSING} is missing from the checkpoint .256 of 256 rows"},
    ),
    "norms quantize": (
        Spec(architecture="qwen2", symmetric=False, layers=1), "norms quantize",
        {
            MISSING: f"{MISSING} is missing from the checkpoint .256 of 256 rows",
            "model.norm.weight": "model.norm.weight is missing",
            "model.layers.0.input_layernorm.weight": "model.layers.0.input_layernorm.weight is missing",
            "model.layers.0.self_attn.k_proj.bias": "model.layers.0.self_attn.qkv_proj.bias is missing",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_reloads(child: Child, tmp_path: Path, name: str) -> None:
    spec, swap, missing = SPECS[name]
    a, b = (write_checkpoint(tmp_path / folder, replace(spec, seed=i)) for i, folder in enumerate("ab"))
    other = edited(b, tmp_path / "other", lambda config: config["rotquant"]["activation_clip"].update(default=0.5))
    cut = {tensor: without(b, tmp_path / tensor, tensor) for tensor in missing}
    fresh = child(serving.serve, b, PROMPTS, enable_prefix_caching=False, swap=swap).prompt_logprobs
    story = child(vllm_reload.reload_story, a, b, other, cut, PROMPTS, swap=swap)

    def equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
        return all(torch.equal(*pair) for pair in zip(got, expected, strict=True))

    served = story.served
    assert not equal(served["a"], served["b"])
    assert equal(served["b"], fresh)
    assert equal(served["b still"], served["b"])
    assert equal(served["a after sleep"], served["a"])
    assert equal(served["a by tensors"], served["a"])
    expected = {
        "other settings": r"other: rotquant.activation_clip.default of config.json is not .*old weights are still serv",
        "no reload": r"load_weights: rotquant's layers take new weights only in a reload.*collective_rpc",
        "a mixture": r"has not finished, so it is a mixture of two checkpoints: reload",
        **missing,
    }
    assert story.refused.keys() == expected.keys()
    assert all(re.search(message, story.refused[step]) for step, message in expected.items()), story.refused
    assert story.proofs == 5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"_name_or_path": "b", "transformers_version": "6"}, ""),
        ({"rotquant": {"kv_clip": {"key": 1.0}, "provenance": {"seed": 2}}}, ""),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"rotquant": {"kv_clip": {"key": 0.9}}}, "rotquant.kv_clip.key"),
        ({"rotquant": {}}, "rotquant.kv_clip"),
        ({"rope_scaling": {}}, "rope_scaling"),
    ],
)
def test_settings_that_differ(child: Child, change: dict[str, Any], expected: str) -> None:
    served = {"rms_norm_eps": 1e-6, "rotquant": {"kv_clip": {"key": 1.0}, "provenance": {"seed": 1}}}
    assert child(vllm_reload.difference, served, served | change) == expected
