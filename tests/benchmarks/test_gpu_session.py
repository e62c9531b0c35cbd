"""The two runs on a GPU, rehearsed without one: every phase is entered, keeps to its limit, leaves its lines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_session  # noqa: E402


def test_the_limits_of_a_part_fit_the_time_that_a_gpu_is_held():
    for phases in gpu_session.PARTS.values():
        assert sum(phase.seconds for phase in phases.values()) <= 340


def rehearse(part: str, out: Path) -> list[dict]:
    command = [sys.executable, BENCHMARKS / "gpu.py", "--part", part, "--rehearse", "--work", out / "work"]
    done = subprocess.run(command, env=os.environ | {"OUT": str(out)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith((out / f"gpu-{part}.md").read_text() + "\n")
    return [json.loads(line) for line in (out / f"gpu-{part}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("part", ["A", "B"])
def test_every_phase_is_entered_and_leaves_lines(tmp_path, part):
    lines = rehearse(part, tmp_path)
    for name, phase in gpu_session.PARTS[part].items():
        own = [line for line in lines if line["phase"] == name]
        assert len(own) >= 2, name
        assert own[-1]["seconds"] <= phase.seconds
        assert not [line for line in own if "error" in line], own
    assert {line["op"] for line in lines if "op" in line} >= {"int_linear", "kv4_attention"}
    assert any("rotquant W4A4" in line for line in lines)


def test_a_phase_that_is_stopped_costs_itself_alone(tmp_path):
    lines = tmp_path / "lines.jsonl"
    gpu_session.write(lines, {"phase": "facts", "value": 1.5})
    ended = gpu_session.run_phase("A", "right", 0.2, lines, tmp_path / "log", {"ROTQUANT_GPU_DEVICE": "cpu"})
    assert ended["error"].startswith("stopped after")
    gpu_session.write(lines, ended)
    said = gpu_session.report(lines)
    assert "1.5" in said
    assert "stopped after" in said
