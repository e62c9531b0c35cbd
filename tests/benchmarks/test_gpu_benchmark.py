"""`benchmarks/gpu.py` where there is no GPU: the dry run, and that a step that fails or hangs costs only itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rotquant_kernels import OPS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*arguments, **environment):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_dry_run_validates_every_step():
    pytest.importorskip("triton")
    done = run("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    said = dict(re.findall(r"^(.+?)  \(at most \d+ s\): (.*)$", done.stdout, re.M))
    assert f"{len(said)} steps, 0 broken" in done.stdout
    for op in set(OPS) - {"pack_weight"}:  # the layout of weights is checked by what reads it
        assert re.search(r"'cases': [1-9]", said[f"check {op}"])
    assert said["linear 14336x4096 M 64"] == "output [64, 4096]"
    assert said["silu_mul 14336 block 2048 M 16"] == "codes [16, 14336]"
    assert said["rms_norm 4096 M 1"] == "codes [1, 4096]"
    assert said["attention batch 1 context 65536 new 1"] == "Plan(rows=8, splits=49)"
    for name in ("bf16", "fp8", "w4a16", "rotquant"):
        assert "bench throughput" in said[f"serve {name} throughput"]
    assert "--quantization rotquant" in said["serve rotquant decode 1"]


def test_a_check_sees_a_wrong_kernel():
    """One code of one row changed."""
    script = f"""
import sys
sys.path[:0] = [{str(SCRIPT.parent)!r}]
import gpu_checks
from rotquant_kernels import ops
honest = ops.SPECIFICATION["quantize_rows"]
def wrong(*arguments):
    codes, scale, zero = honest(*arguments)
    codes[-1, 5] += 1
    return codes, scale, zero
ops.SPECIFICATION["quantize_rows"] = wrong
try:
    gpu_checks.check("quantize_rows", "cpu", quick=True)
except AssertionError as error:
    print("SEEN", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "of the integers differ" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="steps work there")
def test_a_step_that_fails_leaves_its_reason_and_the_others(tmp_path):
    output = tmp_path / "gpu.json"
    done = run("--steps", "environment,check kv4_write", "--output", output, "--work", tmp_path / "work")
    assert done.returncode == 1
    steps = json.loads(output.read_text())["steps"]
    assert steps["environment"]["versions"]["torch"]
    assert "ended with 1" in steps["check kv4_write"]["error"]
    assert "CUDA" in steps["check kv4_write"]["log"]
    assert "check kv4_write" in output.with_suffix(".md").read_text()
    assert done.stdout == output.with_suffix(".md").read_text() + "\n"


def test_the_plugin_is_found_without_an_installation(tmp_path):
    """By the metadata that the script writes; -S leaves out what is installed."""
    write = "import gpu, pathlib, sys; gpu.write_metadata(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", write, str(tmp_path)], cwd=SCRIPT.parent, check=True)
    find = """
import sys
from importlib.metadata import entry_points, version
sys.path.insert(0, sys.argv[1])
print(version("rotquant"), [e.value for e in entry_points(group="vllm.general_plugins")])
"""
    command = [sys.executable, "-S", "-c", find, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split(" ", 1)[1].strip() == "['vllm_rotquant:register']"
