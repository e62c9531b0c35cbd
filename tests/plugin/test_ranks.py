"""Several ranks, pipeline stages and nodes: settings reach workers, ranks that differ refuse, stages compute what the
whole model computes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
from checkpoints import Spec, prompts, write_checkpoint
from rotquant.errors import RotQuantError

pytestmark = pytest.mark.vllm

BASE = Spec()
TOKENS = prompts((33,))[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "base", BASE)


# ---- settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "worker", "given", "kernel"),
    [
        ({"ROTQUANT_CPU_TIER": "scalar"}, {"ROTQUANT_CPU_TIER": ""}, None, "native (scalar)"),
        ({}, {"ROTQUANT_CPU_TIER": "scalar", "ROTQUANT_STRICT": "0"}, None, None),
        ({"ROTQUANT_CPU_TIER": "avx2"}, {}, {"rotquant": {"cpu_tier": "scalar"}}, "native (scalar)"),
        ({}, {}, {"rotquant": {"cpu_tier": "reference"}}, "reference (torch)"),
    ],
    ids=["of the first process", "not of the worker", "given ones win", "reference"],
)
def test_settings_travel(child: Any, base: Path, first: Any, worker: Any, given: Any, kernel: str | None) -> None:
    found, config = child(ranks.kernels_in_worker, base, first, worker, given)
    assert found == (kernel or child(ranks.kernels_in_worker, base, {}, {}, None)[0])
    assert config["strict"] is True
    assert set(config["rotquant"]) == {"strict", "cpu_tier", "cuda_linear"}  # compiled graphs are told apart by it


def test_strictness_travels(child: Any, base: Path) -> None:
    for first, given in (({"ROTQUANT_STRICT": "0"}, None), ({}, {"rotquant": {"strict": False}})):
        _, config = child(ranks.kernels_in_worker, base, first, {"ROTQUANT_STRICT": "1"}, given)
        assert config["strict"] is config["rotquant"]["strict"] is False


@pytest.mark.parametrize(
    ("first", "given", "message"),
    [
        ({}, {"rotquant": {"strickt": False}}, r"--additional-config: rotquant.strickt is not a setting.*strict, cpu_"),
        ({}, {"rotquant": {"strict": "false"}}, r"rotquant.strict is 'false': it can be true, false"),
        ({}, {"rotquant": {"strict": 0}}, r"rotquant.strict is 0: it can be true, false"),
        ({}, {"rotquant": {"cpu_tier": "sse9"}}, r"rotquant.cpu_tier is 'sse9': it can be auto, amx, avx512"),
        ({}, {"rotquant": {"cpu_tier": None}}, r"rotquant.cpu_tier is None"),
        ({}, {"rotquant": {"cuda_linear": ["triton"]}}, r"rotquant.cuda_linear is \['triton'\]"),
        ({}, {"rotquant": "strict"}, r"--additional-config: rotquant is 'strict': it must be an object"),
        ({"ROTQUANT_STRICT": "no"}, None, r"variable ROTQUANT_STRICT is 'no': it can be 1, 0"),
        (
            {"ROTQUANT_CUDA_LINEAR": "marlin"},
            None,
            r"ROTQUANT_CUDA_LINEAR is 'marlin': it can be auto, triton, humming",
        ),
    ],
)
def test_settings_are_checked(child: Any, base: Path, first: Any, given: Any, message: str) -> None:
    with pytest.raises(RotQuantError, match=message):
        child(ranks.kernels_in_worker, base, first, {}, given)


def test_the_config_is_copied_whole(child: Any, base: Path) -> None:
    original, *made = child(ranks.copies, base)
    assert original.rows.clip == BASE.act_clip
    assert made == [original] * 3


def test_a_worker_has_the_same_rotquant(child: Any, base: Path) -> None:
    with pytest.raises(RotQuantError, match=r"this worker \(.*\) has rotquant 9.9, the server's first process has"):
        child(ranks.unpickled, base, version="9.9")
    with pytest.raises(RotQuantError, match=r"worker on .*: rotquant's vLLM plugin does not import \(.*: reinstall"):
        child(ranks.unpickled, base, failure="rotquant.checkpoint.format")


# ---- agreement ------------------------------------------------------------------------------------------


def test_a_device_without_kernels_is_refused(child: Any) -> None:
    child(ranks.check_device, "cuda")
    with pytest.raises(RotQuantError, match="no kernels for the device 'xpu': it runs on cpu and cuda: start vLLM"):
        child(ranks.check_device, "xpu")


def test_like_ranks_agree(child: Any, base: Path) -> None:
    assert child(ranks.run, ranks.refused, base, {}) == [None, None]


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"names": {"version": ranks.other_version}}, "rotquant version: .* has 9.9, .* install the same"),
    "setting": ({"environment": {"ROTQUANT_STRICT": "0"}}, "setting strict: .* has False, .* has True"),
    "option": ({"options": {"additional_config": {"rotquant": {"cpu_tier": "scalar"}}}}, "setting cpu_tier: .*scalar"),
    "kernel": ({"names": {"kernel_of": ranks.other_kernel}}, "kernel of online_stage: .* has old, .* the tier"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_different_ranks_refuse(child: Any, base: Path, what: str) -> None:
    second, message = DIFFERENT[what]
    for error in child(ranks.run, ranks.refused, base, second):
        assert isinstance(error, RotQuantError)
        with pytest.raises(RotQuantError, match=rf"differ in {message}"):
            raise error
        assert "rank 1 (" in str(error)
        assert "rank 0 (" in str(error)


def test_a_different_checkpoint_refuses(child: Any, base: Path, tmp_path: Path) -> None:
    """The same shapes, sizes and config.json; other numbers."""
    other = write_checkpoint(tmp_path / "other", replace(BASE, seed=1))
    assert (other / "config.json").read_text() == (base / "config.json").read_text()
    for error in child(ranks.run, ranks.refused, base, {"folder": other}):
        assert "differ in checkpoint files: rank 1 (" in str(error)
        assert "copy the same checkpoint to every node" in str(error)


def test_all_ranks_learn_that_one_cannot_serve(child: Any, base: Path) -> None:
    first, second = child(ranks.run, ranks.refused, base, {"swap": "no transform"})
    assert "start-up check failed: model.layers.0.mlp.down_proj" in str(second)
    assert "rank 1 (" in str(first)
    assert f"cannot serve, so no rank does: {second}" in str(first)
    tier = {"options": {"additional_config": {"rotquant": {"cpu_tier": "sse9"}}}}
    first, second = child(ranks.run, ranks.refused, base, tier)
    assert str(second) in str(first)


def test_a_rank_without_the_plugin_stops_the_others(child: Any, base: Path) -> None:
    first, _ = child(ranks.run, ranks.without_plugin, base)
    assert isinstance(first, RotQuantError)
    assert "rank 0 (" in str(first)
    assert "not all 2 ranks of this server run rotquant" in str(first)
    assert "Install it on every node" in str(first)


# ---- pipeline stages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", ["", "norms quantize"])
def test_stages_compute_what_the_whole_model_computes(child: Any, base: Path, swap: str) -> None:
    """The norms of the second stage read a residual that the first one sent; on GPUs they quantize."""
    [(whole, _)] = child(ranks.run, ranks.hidden_states, base, TOKENS, "", swap, ranks=1)
    (_, first), (staged, second) = child(ranks.run, ranks.hidden_states, base, TOKENS, "1,1", swap, pipeline=True)
    assert torch.equal(staged, whole)
    front = "rms_norm" if swap else "-"
    for stage, log in enumerate((first, second)):
        block = log[log.index("rotquant start-up check") :].splitlines()
        assert f"pipeline stage {stage} (of 2): model.layers.{stage}.self_attn.qkv_proj to " in block[0]
        assert [line.split()[:2] for line in block[2:7]] == [
            [kind, "1"] for kind in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "attention")
        ]
        assert block[2].split(" A4 ")[1].split()[0] == front


@pytest.mark.parametrize(("partition", "empty"), [("2,0", 1), ("0,2", 0)])
def test_a_stage_without_layers(child: Any, base: Path, partition: str, empty: int) -> None:
    """It holds the embedding, or the last norm and lm_head; the others wait for its word all the same."""
    logs = child(ranks.run, ranks.load_stage, base, partition, pipeline=True)
    assert f"pipeline stage {empty} (of 2): no layer of rotquant" in logs[empty]
    assert re.search(r"down_proj +2 ", logs[1 - empty])
