"""vLLM without the plugin: `portable` loads, `full` is refused instead of served wrongly, as is the flag."""

import os
import platform
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.vllm

SCRIPT = """
import sys, torch
from vllm import LLM, SamplingParams
# On CPUs with AMX its attention wants tile registers, which only a product of oneDNN asks Linux for: here is none.
getattr(torch.cpu, "_init_amx", bool)()
options = {"quantization": sys.argv[2]} if sys.argv[2:] else {}
llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=128, kv_cache_memory_bytes=1 << 23, **options)
out = llm.generate(["def "], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
print("TOKENS", len(out[0].outputs[0].token_ids))
"""


def without_plugin(checkpoint, *flag):
    environment = os.environ | {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-c", SCRIPT, str(checkpoint), *flag]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.skipif(
    platform.machine() == "x86_64" and not torch.cpu._is_avx512_supported(),
    reason="vLLM's own products of 4-bit weights are not in its build for AVX2",
)
def test_portable_loads(demo):
    run = without_plugin(demo.portable)
    assert "TOKENS 4" in run.stdout, run.stderr[-2000:]
    assert "rotquant" not in run.stderr.replace(str(demo.portable), "")


def test_full_is_refused(demo):
    run = without_plugin(demo.quarot)
    assert run.returncode != 0
    assert "TOKENS" not in run.stdout
    assert "num_bits=4" in run.stderr  # vLLM names the KV scheme that it does not run


def test_the_flag_is_refused(demo):
    """As on a node without the plugin, or one whose VLLM_PLUGINS leaves it out."""
    run = without_plugin(demo.portable, "rotquant")
    assert run.returncode != 0
    assert "Quantization method" in run.stderr
    assert "`quantization` argument (rotquant)" in run.stderr
