"""`rotquant.load` of chains of input transforms, low-rank branches and clip ratios by layer, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rotquant
from checkpoints import Spec, edit_config, edit_tensors, prompts, write_checkpoint
from float_model import expected_logprobs
from online_extras import DOWN, GATE_UP, QKV, Extras, everything
from rotquant.errors import RotQuantError
from rotquant_kernels import ops, reference

SMALL: dict[str, Any] = {"hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 2, "head_dim": 16, "r4_block": 32}
WIDER = SMALL | {"hidden": 128, "intermediate": 256}
PROMPTS = prompts((9, 33))


@pytest.fixture(autouse=True)
def exact_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """See test_load."""
    monkeypatch.setattr(ops, "kv4_attention", reference.kv4_attention)


def assert_agrees(folder: Path, spec: Spec) -> None:
    model = rotquant.load(folder)
    for prompt, expected in zip(PROMPTS, expected_logprobs(folder, spec, PROMPTS), strict=True):
        with torch.no_grad():
            got = model(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
        distance = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert distance.median() < 1e-5  # float32 sums; a code on the other side of a tie is the rare exception
        assert distance.max() < 1e-1


CASES = {
    "hadamard": Extras([("T0", "hadamard", 32, QKV)]),
    "dense": Extras([("T0", "dense", 16, GATE_UP)]),
    "kronecker": Extras([("T0", "kronecker", 8, DOWN)]),
    "permutation": Extras([("T0", "permutation", 0, DOWN)]),
    "block permutation": Extras([("T0", "permutation", 32, QKV)]),
    "reflection": Extras([("T0", "reflection", 64, GATE_UP)]),
    "shift": Extras([("T0", "shift", 0, DOWN)]),
    "low rank": Extras(low_rank=[(4, QKV, False), (1, DOWN, False)]),
    "low rank of the inputs": Extras(low_rank=[(4, QKV, True), (1, DOWN, True)]),
    "key feedback": Extras(key_feedback=True),
    "clips": Extras(activation_clip={"model.layers.1.mlp.down_proj": 0.6}, kv_layers=everything().kv_layers),
}


@pytest.mark.parametrize("case", CASES)
def test_each_feature_is_float_arithmetic_and_matters(case: str, tmp_path: Path) -> None:
    spec = Spec(**SMALL, extras=CASES[case])
    folder = write_checkpoint(tmp_path / "out", spec)
    assert_agrees(folder, spec)
    plain = rotquant.load(write_checkpoint(tmp_path / "plain", Spec(**SMALL)))(torch.tensor(PROMPTS[:1])).logits
    assert (rotquant.load(folder)(torch.tensor(PROMPTS[:1])).logits - plain).norm() > 0.01 * plain.norm()


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # qwen2's biases meet the shift's correction
def test_everything_together(architecture: str, tmp_path: Path) -> None:
    extras = everything()
    spec = Spec(
        **SMALL | {"hidden": 128, "intermediate": 256}, architecture=architecture, symmetric=False, extras=extras
    )
    assert_agrees(write_checkpoint(tmp_path / "out", spec), spec)


def test_bfloat16(tmp_path: Path) -> None:
    extras = replace(everything(), kv_layers={}, key_feedback=False)
    spec = Spec(**WIDER, extras=extras, act_bits=8, kv=False, r3=False)
    folder = write_checkpoint(tmp_path / "out", spec)
    ids = torch.tensor(PROMPTS[1:])
    exact, got = rotquant.load(folder)(ids).logits, rotquant.load(folder, dtype=torch.bfloat16)(ids).logits
    assert got.dtype == torch.bfloat16
    assert (got - exact).norm() < 0.02 * exact.norm()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    spec = Spec(**WIDER, extras=everything())
    return write_checkpoint(tmp_path / "out", spec)


def test_a_config_is_read_without_kernels(folder: Path) -> None:
    """They may need minutes to compile, or not compile at all where a config is only looked at."""
    script = """
import json, sys, torch
def load(path):
    sys.exit(f"{path} is loaded")
torch.ops.load_library = load
from rotquant.checkpoint.format import CheckpointFormat
config = json.load(open(sys.argv[1]))
read = CheckpointFormat(config["quantization_config"], config["rotquant"], config["head_dim"])
transforms = read.linear("model.layers.0.mlp.down_proj").transforms
print([str(t) for t in transforms], hasattr(torch.ops.rotquant, "int_linear"))
from rotquant_kernels import online_stage
"""
    command = [sys.executable, "-c", script, str(folder / "config.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    transforms = ["R4 hadamard 32", "K1 kronecker 32", "S2 shift", "P3 permutation 128"]
    assert done.stdout == f"{transforms} False\n", done.stderr
    assert "is loaded" in done.stderr  # what would have been seen


def setting(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


Q, GATE, DOWN_1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        (f"{Q}.P0_input.weight", lambda t: t.pop(f"{Q}.P0_input.weight"), "is missing"),
        (f"{Q}.P0_input.weight", setting(f"{Q}.P0_input.weight", lambda x: x * 0), "not a permutation"),
        (f"{DOWN_1}.P3_input.weight", setting(f"{DOWN_1}.P3_input.weight", lambda x: x.flip(0)), "in blocks of 128"),
        (f"{Q}.P0_input.weight", setting(f"{Q}.P0_input.weight", Tensor.long), "has dtype torch.int64"),
        (f"{Q}.K1_input.weight", setting(f"{Q}.K1_input.weight", lambda x: x[1:]), r"has shape \[319\]"),
        (f"{GATE}.V1_input.weight", setting(f"{GATE}.V1_input.weight", lambda x: 2 * x), "has length 2.000"),
        (f"{GATE}.S0_input.weight", setting(f"{GATE}.S0_input.weight", lambda x: x / 0), "finite|NaN"),
        (f"{GATE}.S0_output.weight", lambda t: t.pop(f"{GATE}.S0_output.weight"), "is missing"),
        (f"{DOWN_1}.low_rank_up", lambda t: t.pop(f"{DOWN_1}.low_rank_up"), "is missing"),
        (f"{DOWN_1}.low_rank_down", setting(f"{DOWN_1}.low_rank_down", lambda x: x[:, 1:]), "has shape"),
        (f"{Q}.K9_input.weight", lambda t: t.update({f"{Q}.K9_input.weight": torch.ones(2)}), "not part of this model"),
    ],
)  # fmt: skip
def test_bad_tensors_are_named(folder: Path, name: str, edit: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    edit_tensors(folder, edit)
    with pytest.raises(RotQuantError, match=rf"{re.escape(name)}.*({message})"):
        rotquant.load(folder)


def entry(**changes: Any) -> list[dict[str, Any]]:
    return [{"name": "T0", "kind": "dense", "block": 16, "targets": [DOWN]} | changes]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("input_transforms", entry(kind="fourier"), "input_transforms.0.kind is 'fourier': this build .* runs only"),
        ("input_transforms", entry(kind="hadamard", block=24), "a Hadamard block of 24 is not a power of two"),
        ("input_transforms", entry(block=0), "input_transforms.0: T0: kind 'dense' needs a block"),
        ("input_transforms", entry(block=-4), "input_transforms.0.block is -4"),
        ("input_transforms", entry(kind="kronecker", block=48), "down_proj: 128 inputs in transform blocks of 48"),
        ("input_transforms", entry(name="a.b"), "input_transforms.0.name is 'a.b'"),
        ("input_transforms", entry(inverse=True), "input_transforms.0.inverse: this build of rotquant does not run"),
        ("input_transforms", entry() + entry(), "two online transforms of .*down_proj have one name"),
        ("input_transforms", entry(targets=["lm_head"]), "online transforms of lm_head: .* not quantized"),
        ("low_rank", [{"rank": 0, "targets": [DOWN]}], "low_rank.0.rank is 0"),
        ("low_rank", [{"rank": 1, "targets": [DOWN]}] * 2, "low_rank: two entries name .*down_proj"),
        ("low_rank", [{"rank": 1, "targets": ["lm_head"]}], "low_rank: .*lm_head, which is not quantized"),
        ("activation_clip", {"model.layers.7.mlp.up_proj": 0.5}, "activation_clip.model.layers.7.mlp.up_proj: this"),
        ("kv_clip", {"layers": {"model.layers.0.self_attn": {"key": 1.5}}}, "layers.*0.self_attn.key is 1.5"),
        ("kv_clip", {"layers": {"model.layers.9.self_attn": {}}}, "kv_clip.layers.*9.self_attn: this model"),
    ],
)  # fmt: skip
def test_bad_configs_are_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    folder = write_checkpoint(tmp_path / "out", Spec(**SMALL, layers=1))
    edit_config(folder, "rotquant", key, value=value)
    with pytest.raises(RotQuantError, match=rf"config.json: .*{message}"):
        rotquant.load(folder)
