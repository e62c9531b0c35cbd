"""The examples, run as a user runs them, on the bundled model. Two more are the subject of other tests:
`two_ranks.py` of plugin/test_tensor_parallel.py, `measure_with_lm_eval.py` of whole/test_lm_eval.py."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from lora_adapters import write_adapter
from source_models import DATA, HELDOUT

pytestmark = pytest.mark.vllm
EXAMPLES = Path(__file__).parents[2] / "examples"
COVERED = {
    "quantize_and_serve.sh", "own_recipe.py", "in_transformers.py", "lora.py",
    "two_ranks.py", "measure_with_lm_eval.py",
}  # fmt: skip
# vLLM compiles small functions of its sampler even where the model runs eagerly.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def here(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs an example in this process, which has imported torch already."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_run_by_a_test() -> None:
    assert {file.name for file in EXAMPLES.iterdir() if file.suffix in (".py", ".sh")} == COVERED


@pytest.mark.skipif(not shutil.which("curl"), reason="the example asks with curl")
def test_quantize_and_serve(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | ENVIRONMENT | {"PORT": port, "SERVE_FLAGS": "--enforce-eager --max-model-len 512"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", EXAMPLES / "quantize_and_serve.sh", DATA / "demo", tmp_path / "out", "--recipe", "rtn"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "rotquant start-up check" in done.stdout + done.stderr
    assert re.search(r"^answer: \S", done.stdout, re.MULTILINE)


def test_own_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (DATA / "demo", tmp_path / "out", "--text", HELDOUT, "--tokens", 1024)
    here("own_recipe.py", *arguments, monkeypatch=monkeypatch)
    full, own = map(float, re.findall(r"perplexity ([\d.]+)", capsys.readouterr().out))
    assert full < own < 1.5 * full


def test_in_transformers(demo: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    here("in_transformers.py", demo.quarot, "def read_lines(path):", monkeypatch=monkeypatch)
    text, size = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert text.startswith("def read_lines(path):")
    assert len(text) > len("def read_lines(path):")
    original = (demo.hard / "model.safetensors").stat().st_size / 1e6
    assert float(size.split()[0]) < 0.8 * original


def test_lora(demo: Any, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", AutoModelForCausalLM.from_pretrained(demo.hard), size=0.7)
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    flags = ["--max-model-len", "256", "--enforce-eager"]
    command = [sys.executable, EXAMPLES / "lora.py", demo.quarot, adapter, "def read_lines(path):", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    said = dict(re.findall(r"^(with|without) the adapter: '(.*)'$", done.stdout, re.MULTILINE))
    assert said["with"] != said["without"]
