"""lm-eval: its vLLM backend on a checkpoint, and its transformers backend on `rotquant.load` (the example), agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import measure_with_lm_eval
from source_models import HELDOUT

pytestmark = pytest.mark.vllm

TASK = """
task: heldout
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{folder}/heldout.jsonl"}}, cache_dir: "{folder}/cache"}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list: [{{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
DOCUMENTS, SIZE = 10, 1200  # characters; a document fits one window, which the backends cut differently


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A folder with a task of local text; needs no hub."""
    folder, text = tmp_path / "task", HELDOUT.read_text()
    folder.mkdir()
    pages = [text[i * SIZE : (i + 1) * SIZE] for i in range(DOCUMENTS)]
    (folder / "heldout.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    (folder / "heldout.yaml").write_text(TASK.format(folder=folder))
    return folder


def with_vllm(checkpoint: Path, task: Path) -> tuple[dict[str, Any], str]:
    """By lm-eval's command line, as a user runs it; also its log."""
    arguments = f"pretrained={checkpoint},quantization=rotquant,max_model_len=1024,enforce_eager=True"
    small = ",kv_cache_memory_bytes=67108864"
    command = [sys.executable, "-m", "lm_eval", "--model", "vllm", "--model_args", arguments + small]
    command += ["--tasks", "heldout", "--include_path", str(task), "--output_path", str(task / "out")]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (task / "out").rglob("results_*.json")
    return json.loads(results.read_text())["results"]["heldout"], done.stdout + done.stderr


def test_backends_agree(demo: Any, task: Path) -> None:
    torch = measure_with_lm_eval.measure(str(demo.quarot), "heldout", include=str(task))
    served, log = with_vllm(demo.quarot, task)
    print(torch, served, sep="\n")
    assert "rotquant start-up check" in log
    # Leaving out the quantization would move the log-likelihood by 1%; other kernels in bfloat16 move it by 0.03%.
    assert served["bits_per_byte,none"] == pytest.approx(torch["bits_per_byte,none"], rel=0.002)
    assert served["byte_perplexity,none"] == pytest.approx(torch["byte_perplexity,none"], rel=0.005)
    assert 1 < torch["byte_perplexity,none"] < 5
