"""Two ranks serve one checkpoint as well as one does: R4's blocks lie within a shard (`--tp-max`). Runs the example."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rotquant.models.harden import harden_folder
from rotquant.pipeline import quantize
from source_models import DATA, HELDOUT

pytestmark = pytest.mark.vllm
EXAMPLE = Path(__file__).parents[2] / "examples" / "two_ranks.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    harden_folder(DATA / "demo", folder / "hard")
    return quantize(str(folder / "hard"), folder / "made", tp_max=2, recipe="quarot", settings=["weights.method=rtn"])


def served_loss(checkpoint: Path, ranks: int) -> float:
    """Mean -log p of 765 tokens of held-out text, served by `ranks` ranks."""
    binding = "|".join(str(cpu) for cpu in sorted(os.sched_getaffinity(0))[:ranks])
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": binding, "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    command = [sys.executable, EXAMPLE, checkpoint, "--text", HELDOUT, "--tokens", "768", "--ranks", ranks]
    command = [*map(str, command), "--enforce-eager"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1000, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = re.search(rf"^{ranks} ranks, 765 tokens, mean loss ([\d.]+)$", done.stdout, re.MULTILINE)
    assert found, done.stdout[-1000:]
    return float(found[1])


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two processors")
def test_two_ranks_are_as_good_as_one(checkpoint):
    blocks = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["transform_config"]
    r4 = blocks["config_groups"]["R4"]["head_dim"]
    assert (768 // 2) % r4 == 0
    one, two = (served_loss(checkpoint, ranks) for ranks in (1, 2))
    print(f"R4 block {r4}, mean loss {one:.4f} on one rank, {two:.4f} on two")
    assert one != two  # activation scales are per rank
    assert abs(two - one) < 0.03
