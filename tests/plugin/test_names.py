"""Names of modules under the prefixes that vLLM puts in front, and names that no module has."""

from __future__ import annotations

from typing import Any

import pytest

from checkpoints import Spec, quantization_config
from rotquant.checkpoint.format import CheckpointFormat
from rotquant.errors import RotQuantError
from vllm_rotquant.names import Names, parts_of

DOWN = "model.layers.1.mlp.down_proj"


def names(extension: dict[str, Any] | None = None, **config: Any) -> Names:
    return Names(CheckpointFormat(quantization_config(Spec()) | config, extension or {}, 64))


@pytest.mark.parametrize("prefix", ["", "draft_model.", "language_model.", "thinker.text."])
def test_any_prefix_is_taken_away(prefix: str) -> None:
    found = names({"activation_clip": {"default": 0.9, DOWN: 0.5}})
    for name in (DOWN, "lm_head", "model.embed_tokens", "model.layers.0.self_attn"):
        assert found.own(prefix + name) == name


def test_a_prefix_that_config_json_uses_stays() -> None:
    ours = f"language_model.{DOWN}"
    for found in (
        names({"activation_clip": {ours: 0.5}}),
        names(ignore=["lm_head", r"re:language_model\.model\.layers\.0.*"]),
    ):
        assert found.own(ours) == ours
        assert found.own(f"draft_model.{ours}") == ours


def test_fused_layers_have_parts() -> None:
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert parts_of("model.layers.0.self_attn.qkv_proj", packed) == [
        f"model.layers.0.self_attn.{x}_proj" for x in "qkv"
    ]
    assert parts_of("lm_head", packed) == ["lm_head"]


def test_names_that_no_module_has() -> None:
    found = names({"activation_clip": {"default": 0.9, DOWN: 0.5}}, ignore=["lm_head", "re:.*visual.*"])
    found.built |= {"model.layers.0.mlp.down_proj"}
    with pytest.raises(RotQuantError, match=rf"rotquant.activation_clip: '{DOWN}' is no module of this model"):
        found.check_all_built(partly=False, layers=2)
    found.check_all_built(partly=True, layers=2)  # another pipeline stage has layer 1
    with pytest.raises(RotQuantError, match="is no module of this model"):
        found.check_all_built(partly=True, layers=1)
    found.built |= {DOWN}
    found.check_all_built(partly=False, layers=2)
