"""Two ranks that Ray starts, as on several nodes. Needs `pip install ray`, which the ordinary setup leaves out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_fixtures import Spec, prompts, write_checkpoint

pytest.importorskip("ray")

# vLLM's executor asks Ray for devices that its CPU platform does not have: processors are counted as GPUs.
PLATFORM = """
from vllm.platforms.cpu import CpuPlatform

class Platform(CpuPlatform):
    ray_device_key = "GPU"

    @classmethod
    def device_control_id_to_physical_device_id(cls, device_id):
        return int(device_id)
"""
SCRIPT = """
import json, os, sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

if __name__ == "__main__":
    import ray
    from vllm import LLM, SamplingParams

    folder, given, backend, tokens = sys.argv[1], *map(json.loads, sys.argv[2:5])
    nodes = {"env_vars": {"ROTQUANT_CPU_TIER": "scalar", "ROTQUANT_STRICT": "0"}}  # what Ray's workers find
    ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, object_store_memory=200 << 20, runtime_env=nodes)
    try:
        llm = LLM(
            folder, tensor_parallel_size=2, distributed_executor_backend=backend, skip_tokenizer_init=True,
            enforce_eager=True, dtype="float32", kv_cache_memory_bytes=1 << 23, max_model_len=256, block_size=32,
            additional_config=given,
        )
        greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, detokenize=False)
        out = llm.generate([{"prompt_token_ids": t} for t in tokens], greedy, use_tqdm=False)
        print("RESULT", json.dumps([list(o.outputs[0].token_ids) for o in out]), flush=True)
    finally:
        ray.shutdown()
"""


def served(folder: Path, work: Path, backend: str, **environment: str) -> tuple[list[list[int]], str]:
    """Tokens and log of two ranks."""
    info = work / "raycpu-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: raycpu\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.platform_plugins]\nraycpu = ray_cpu_plugin:plugin\n")
    (work / "ray_cpu_plugin.py").write_text('def plugin():\n    return "ray_cpu_platform.Platform"\n')
    (work / "ray_cpu_platform.py").write_text(PLATFORM)
    (work / "served.py").write_text(SCRIPT)
    path = os.pathsep.join([str(work), str(Path(__file__).parent), *sys.path])
    given, tokens = {"rotquant": {"strict": True}}, prompts((7, 33))
    arguments = [str(folder), json.dumps(given), json.dumps(backend), json.dumps(tokens)]
    done = subprocess.run(
        [sys.executable, work / "served.py", *arguments], env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True, text=True, timeout=1000, check=False,
    )  # fmt: skip
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-6000:]
    return json.loads(next(x for x in done.stdout.splitlines() if x.startswith("RESULT")).removeprefix("RESULT")), log


def test_two_ranks_of_ray(tmp_path):
    """They run what the first process was told, whatever variables they find, and write what two ranks always write."""
    folder = write_checkpoint(tmp_path / "model", Spec())
    tokens, log = served(folder, tmp_path, "ray", ROTQUANT_CPU_TIER="reference")
    expected, _ = served(folder, tmp_path, "mp", ROTQUANT_CPU_TIER="reference")
    assert tokens == expected
    assert "Ray" in log
    table = [line for line in log.splitlines() if " W4 A4 " in line]
    assert len(table) >= 4
    assert all("reference (torch)" in line for line in table)
