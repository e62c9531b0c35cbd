"""Two readers of one checkpoint: what the plugin refuses because vLLM makes something else of it than transformers.

Models are loaded as a worker loads them, without an engine, in one child process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vllm_serving as serving
from checkpoints import Spec, edited, write_checkpoint
from child import Child
from rotquant.errors import RotQuantError

pytestmark = pytest.mark.vllm

SMALL: dict[str, Any] = {"hidden": 64, "intermediate": 128, "head_dim": 16, "r4_block": 32}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "base", Spec(**SMALL))


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


LONG = {"factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 256}
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=256)
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128)


@pytest.mark.parametrize(
    ("architecture", "config", "options"),
    [
        ("llama", rope("linear", factor=2.0), {"max_model_len": 2000}),
        ("qwen2", YARN, {"max_model_len": 1000, "dtype": "bfloat16"}),
        ("qwen3", LLAMA3, {"max_model_len": 1024, "dtype": "float16"}),
        ("llama", rope("longrope", **LONG), {}),
        ("mistral", {"sliding_window": None}, {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}, {}),
    ],
    ids=["linear", "yarn bf16", "llama3 fp16", "longrope, short", "mistral", "biases, large eps"],
)
def test_alike(
    child: Child, tmp_path: Path, architecture: str, config: dict[str, Any], options: dict[str, Any]
) -> None:
    folder = write_checkpoint(tmp_path / "model", Spec(**SMALL, layers=1, architecture=architecture, config=config))
    log = child(serving.loaded_log, folder, **options)
    assert "  rotary" in log
    assert "  decoder layer" in log
    assert "MISMATCH" not in log


ROTARY = r"layers.0.self_attn.rotary_emb.*away.*read config.json differently \(rope_parameters"


@pytest.mark.parametrize(
    ("architecture", "config", "options", "message"),
    [
        ("llama", {"partial_rotary_factor": 0.5}, {}, ROTARY),
        ("llama", rope("default", rope_dim=8), {}, ROTARY),
        ("llama", rope("dynamic", factor=2.0), {"max_model_len": 2000}, "rotary table of 1024 positions.*-len 1024"),
        ("llama", rope("longrope", **LONG), {"max_model_len": 1000}, f"rotary table|{ROTARY}"),
        ("mistral", {"sliding_window": None, "llama_4_scaling": {"original_max_position_embeddings": 64, "beta": 0.1}},
         {}, "model.layers.0 on kernel vLLM.*some field of config.json differently"),
        ("llama", {"logit_scale": 0.5}, {}, "vLLM multiplies logits by 0.5"),
        ("llama", {"qkv_bias": True}, {}, r"layers.0.self_attn.qkv_proj.bias is missing from the checkpoint"),
        ("mistral", {"sliding_window": None, "attention_bias": True}, {}, "qkv_proj.bias is missing"),
        ("qwen3", {"attention_bias": True}, {}, r"layers.0.self_attn.o_proj.bias of the checkpoint was not taken"),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 512}}, {}, "dual_chunk_attention_config"),
    ],
    ids=["partial", "rope_dim", "dynamic, long", "longrope, long", "llama 4 scaling", "logit scale", "qkv_bias",
         "attention_bias", "o_proj.bias", "dual chunk"],
)  # fmt: skip
def test_refused(
    child: Child, tmp_path: Path, architecture: str, config: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    folder = write_checkpoint(tmp_path / "model", Spec(**SMALL, layers=1, architecture=architecture, config=config))
    with pytest.raises(RotQuantError, match=message):
        child(serving.load_only, folder, **options)


def changed(base: Path, folder: Path, **tensors: torch.Tensor | None) -> Path:
    edited(base, folder, lambda config: None)
    file = folder / "model.safetensors"
    kept = {name: t for name, t in (load_file(file) | tensors).items() if t is not None}
    save_file({name: t.contiguous() for name, t in kept.items()}, file, metadata={"format": "pt"})
    return folder


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.layers.1.mlp.down_proj.bias": torch.ones(64)}, r"down_proj.bias of the checkpoint was not taken"),
        ({"model.norm.weight": None}, "model.norm.weight is missing"),
        ({"model.embed_tokens.weight": None}, "model.embed_tokens.weight is missing"),
        ({"model.norm.weight": torch.full((64,), torch.inf)}, "model.norm.weight holds NaN or infinite"),
        ({f"{UP}.weight_scale": -torch.ones(128, 1)}, "up_proj.weight_scale holds a scale that is not positive"),
        ({f"{UP}.weight_packed": torch.ones(128, 8, dtype=torch.int64)}, "up_proj.weight_packed has dtype torch.int64"),
        (
            {f"{UP}.weight_packed": torch.ones(128, 9, dtype=torch.int32)},
            r"up_proj.weight_packed \[128, 9\] does not fit",
        ),
        (
            {f"{UP}.weight_shape": torch.tensor([128, 63])},
            "gate_up_proj: weight_shape is .128, 63., config.json asks for 64",
        ),
        ({"model.layers.2.input_layernorm.weight": torch.ones(64)}, "layers.2.input_layernorm.weight.*does not fit"),
    ],
    ids=lambda part: next(iter(part))[-30:] if isinstance(part, dict) else "",
)
def test_tensors(
    child: Child, base: Path, tmp_path: Path, tensors: dict[str, torch.Tensor | None], message: str
) -> None:
    with pytest.raises(RotQuantError, match=message):
        child(serving.load_only, changed(base, tmp_path / "changed", **tensors))


def test_a_computed_table_may_lie_in_the_file(child: Child, base: Path, tmp_path: Path) -> None:
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    child(serving.load_only, changed(base, tmp_path / "changed", **table))


def test_pipeline_stages_leave_the_layers_of_others(child: Child, base: Path) -> None:
    taken = child(serving.of_first_stage, base)
    assert taken == {"model.layers.0.norm.weight": False, "model.layers.1.norm.weight": True, "lm_head.weight": True}


def test_epsilons_are_compared(child: Child, base: Path) -> None:
    with pytest.raises(RotQuantError, match=r"model.layers.0 on kernel vLLM is .* away"):
        child(serving.loaded_with_eps, base, 1e-4)


def test_broken_groups_are_ours_all_the_same(child: Child, base: Path, tmp_path: Path) -> None:
    """A typo must not hand the checkpoint to vLLM's own path, which reads past it and leaves out the rotations."""
    group = ("quantization_config", "config_groups", "group_0", "weights")
    folder = edited(base, tmp_path / "bits", lambda c: c[group[0]][group[1]][group[2]][group[3]].update(num_bits="4"))
    with pytest.raises(RotQuantError, match=r"group_0\.weights\.num_bits is '4'"):
        child(serving.quantization_of, folder, None)
