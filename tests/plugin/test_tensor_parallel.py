"""Two ranks serve one checkpoint as well as one does: R4's blocks lie within a shard (`--tp-max`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_serving
from rotquant.measure.evaluate import text_windows
from rotquant.models.harden import harden_folder
from rotquant.pipeline import quantize
from source_models import DATA, HELDOUT

pytestmark = pytest.mark.vllm
SUPPORT = str(Path(vllm_serving.__file__).parent)
SCRIPT = """
import json, sys
from pathlib import Path

from vllm_serving import serve

if __name__ == "__main__":  # ranks are started by importing this file again
    folder, ranks, prompts = Path(sys.argv[1]), int(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text())
    served = serve(folder, prompts, tensor_parallel_size=ranks, max_model_len=320, max_tokens=1)
    losses = [-value for window in served.prompt_logprobs for value in window.tolist()]
    print("\\nRESULT", json.dumps([len(losses), sum(losses) / len(losses)]))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    harden_folder(DATA / "demo", folder / "hard")
    return quantize(str(folder / "hard"), folder / "made", tp_max=2, recipe="quarot", settings=["weights.method=rtn"])


def served_loss(checkpoint: Path, ranks: int, work: Path) -> float:
    """Mean -log p of 765 tokens of held-out text, served by `ranks` ranks."""
    windows = text_windows(HELDOUT, checkpoint, 256, 768)
    (work / "prompts.json").write_text(json.dumps(windows.tolist()))
    (work / "served.py").write_text(SCRIPT)
    binding = "|".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0))[:ranks])
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": binding, "PYTHONPATH": os.pathsep.join([SUPPORT, *sys.path]),
    }  # fmt: skip
    command = [sys.executable, work / "served.py", checkpoint, str(ranks), work / "prompts.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1000, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    count, loss = json.loads(result.removeprefix("RESULT"))
    assert count == 765
    return loss


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two processors")
def test_two_ranks_are_as_good_as_one(checkpoint, tmp_path):
    blocks = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["transform_config"]
    r4 = blocks["config_groups"]["R4"]["head_dim"]
    assert (768 // 2) % r4 == 0
    one, two = (served_loss(checkpoint, ranks, tmp_path) for ranks in (1, 2))
    print(f"R4 block {r4}, mean loss {one:.4f} on one rank, {two:.4f} on two")
    assert one != two  # activation scales are per rank
    assert abs(two - one) < 0.03
