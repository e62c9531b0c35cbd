"""The two runs on a GPU, rehearsed without one: every phase is entered, keeps to its limit, leaves its lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_a_phase_that_is_stopped_costs_itself_alone(tmp_path):
    lines = tmp_path / "lines.jsonl"
    gpu_session.write(lines, {"phase": "facts", "value": 1.5})
    ended = gpu_session.run_phase("A", "right", 0.2, lines, tmp_path / "log", {"ROTQUANT_GPU_DEVICE": "cpu"})
    assert ended["error"].startswith("stopped after")
    gpu_session.write(lines, ended)
    said = gpu_session.report(lines)
    assert "1.5" in said
    assert "stopped after" in said
