"""The two runs on a GPU, rehearsed without one: every phase is entered, keeps to its limit, leaves its lines."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import ClassVar

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
REHEARSAL = Path(__file__).parents[1] / "support" / "gpu_rehearsal.py"
sys.path.insert(0, str(BENCHMARKS))

import gpu_phases  # noqa: E402
import gpu_serve  # noqa: E402
import gpu_session  # noqa: E402


def test_the_limits_of_a_part_fit_the_time_that_a_gpu_is_held():
    for phases in gpu_session.PARTS.values():
        assert sum(phase.seconds for phase in phases.values()) <= 340


def test_every_phase_is_entered_and_leaves_lines(tmp_path):
    """Of part A; part B has the same phases, but for what it serves."""
    command = [sys.executable, BENCHMARKS / "gpu.py", "--part", "A", "--rehearse", "--work", tmp_path / "work"]
    done = subprocess.run(command, env=os.environ | {"OUT": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith((tmp_path / "gpu-A.md").read_text() + "\n")
    lines = [json.loads(line) for line in (tmp_path / "gpu-A.jsonl").read_text().splitlines()]
    assert {line["phase"] for line in lines} == set(gpu_session.PARTS["A"])
    for name in gpu_session.PARTS["A"]:
        own = [line for line in lines if line["phase"] == name]
        assert len(own) >= 2, name
        assert not [line for line in own if "error" in line], own
    assert {line["op"] for line in lines if "op" in line} >= {"int_linear", "kv4_attention"}
    assert any("rotquant W4A4" in line for line in lines)


# What a layer of Llama-3-8B launches on a GPU.
KERNELS = {"quantize_kernel", "linear_kernel", "sum_kernel", "unpack_kernel", "write", "decode", "merge", "prefill",
           "gather", "turn"}  # fmt: skip


def test_hoppers_shapes_pass_through_the_host_code_of_every_phase(tmp_path):
    """What a rehearsal on a CPU leaves out: every launch of the real shapes, short of its compilation."""
    pytest.importorskip("triton")
    known = os.environ | {"ROTQUANT_GPU_LINES": str(tmp_path / "lines")}  # where the sweep leaves what it found
    done = subprocess.run([sys.executable, REHEARSAL], env=known, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    phases = [line.pop("phase") for line in lines]
    assert set(phases) == {"gathered", "compile_all", "layer", "times", "sweep", "launched"}
    assert not [line for line in lines if "error" in line]
    names = {name.split(".")[-1] for name in lines[-1]}
    assert names == KERNELS
    for phase, line in zip(phases, lines, strict=True):
        if phase == "times":
            ours = {name: us for name, us in line.items() if name.startswith("rotquant") and us}
            assert ours
            assert all(isinstance(us, float) or "a few tokens" in us for us in ours.values()), line
    assert [line for line in lines if "unpacked, us" in line]
    assert {line["page"] for line in lines if "page" in line} == {16, 64, 128}


def test_part_b_serves_every_format(monkeypatch):
    monkeypatch.setattr(gpu_phases, "REHEARSAL", True)
    named = {name.removeprefix("serve ") for name in gpu_session.PARTS["B"] if name.startswith("serve ")}
    assert named == set(gpu_serve.FORMATS)
    said = {name: str(list(gpu_session.PARTS["B"][f"serve {name}"].run())) for name in named}
    assert all("FULL_DECODE_ONLY" in arguments for arguments in said.values())
    assert {name for name, arguments in said.items() if "'quantization'" in arguments} == {"fp8", "rotquant"}


class Engine:
    """In the place of vLLM's LLM: what it was asked for."""

    made: ClassVar[list["Engine"]] = []

    def __init__(self, **settings):
        assert settings["max_model_len"] == 8704
        self.settings, self.asked = settings, []
        self.made.append(self)

    def generate(self, prompts, sampling, use_tqdm):
        assert not use_tqdm
        assert all(len(one["prompt_token_ids"]) + sampling["max_tokens"] <= 8704 for one in prompts)
        self.asked.append((len(prompts), sampling["max_tokens"]))


@pytest.mark.parametrize("name", gpu_serve.FORMATS)
def test_each_load_of_a_format_leaves_a_line(monkeypatch, tmp_path, name):
    """What a rehearsal leaves out of serving: all but vLLM itself, which reads the config that is written for it."""
    monkeypatch.setattr(Engine, "made", [])
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=Engine, SamplingParams=dict, __spec__=None))
    monkeypatch.setattr(gpu_serve, "has_flash_attention", lambda: name != "bf16")
    monkeypatch.setenv("ROTQUANT_GPU_WORK", str(tmp_path))
    lines = list(gpu_serve.loads(name, False))
    assert [line["load"] for line in lines[1:]] == ["decode 1 x 128", "decode 64 x 64", "prefill 8192",
                                                    "128 requests 512 / 128"]  # fmt: skip
    assert all(line["seconds"] > 0 for line in lines)
    assert Engine.made[0].asked == [(1, 2), (1, 128), (1, 2), (64, 64), (1, 2), (1, 1), (1, 2), (128, 128)]
    config = json.loads((Path(Engine.made[0].settings["model"]) / "config.json").read_text())
    assert config["hidden_size"] == 4096
    assert ("quantization_config" in config) == (name in ("rotquant", "w4a16"))
    assert ("attention_backend" in Engine.made[0].settings) == (name == "bf16")
    monkeypatch.setenv("ROTQUANT_GPU_DEADLINE", "1")
    assert [line["load"] for line in gpu_serve.loads(name, True)] == ["start, eager"]  # then it was late


def test_the_first_start_is_eager_and_then_with_graphs(monkeypatch, tmp_path):
    monkeypatch.setattr(Engine, "made", [])
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=Engine, SamplingParams=dict, __spec__=None))
    monkeypatch.setattr(gpu_serve, "has_flash_attention", lambda: True)
    monkeypatch.setenv("ROTQUANT_GPU_WORK", str(tmp_path))
    lines = [line["load"] for line in gpu_serve.loads("rotquant", True)]
    assert lines == [*("start, eager", "1 x 16 tokens", "16 x 16 tokens"), "start", "1 x 16 tokens", "16 x 16 tokens"]
    assert [one.settings["enforce_eager"] for one in Engine.made] == [True, False]


def test_a_line_is_on_disk_before_the_next_is_measured(monkeypatch, tmp_path):
    file = tmp_path / "gpu-B.jsonl"

    def run():
        for number in range(3):
            yield {"value": number}
            assert [json.loads(line)["value"] for line in file.read_text().splitlines()] == list(range(number + 1))

    monkeypatch.setitem(gpu_session.PARTS["B"], "times", gpu_session.Phase(45, run))
    monkeypatch.setenv("ROTQUANT_GPU_LINES", str(file))
    gpu_session.phase("B", "times")
    assert len(file.read_text().splitlines()) == 3


def test_what_has_no_time_left_says_so(tmp_path):
    assert gpu_session.session("B", tmp_path / "out", 1, {}) == len(gpu_session.PARTS["B"])
    said = (tmp_path / "out" / "gpu-B.md").read_text()
    assert said.count("no time was left") == len(gpu_session.PARTS["B"])


def test_a_phase_that_is_stopped_costs_itself_alone(tmp_path):
    lines = tmp_path / "lines.jsonl"
    gpu_session.write(lines, {"phase": "facts", "value": 1.5})
    ended = gpu_session.run_phase("A", "right", 0.2, lines, tmp_path / "log", {"ROTQUANT_GPU_DEVICE": "cpu"})
    assert ended["error"].startswith("stopped after")
    gpu_session.write(lines, ended)
    said = gpu_session.report(lines)
    assert "1.5" in said
    assert "stopped after" in said
