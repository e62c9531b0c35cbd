"""LoRA adapters of models with norms behind their blocks or linear attention: what the merged original says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hybrid_serving
from child import Child, child_process
from lora_adapters import NAMES, merged, write_adapter
from rotquant.pipeline import quantize
from served_adapters import serve_with
from source_models import VOCABULARY, source_model

pytestmark = [pytest.mark.vllm, pytest.mark.release]
LINEAR_ATTENTION = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]
FINE = ["weights.bits=8", "activations.bits=8", "activations.clip=1", "kv.bits=16"]


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    """Runs a function in a child process that has imported vLLM."""
    with child_process(hybrid_serving.prepare) as run:
        yield run


@pytest.mark.parametrize(
    ("kind", "names", "options"),
    [("gemma3", NAMES, {}), ("qwen3_5", NAMES + LINEAR_ATTENTION, hybrid_serving.OPTIONS)],
)
def test_an_adapter_of_the_original(
    child: Child, tmp_path: Path, kind: str, names: list[str], options: dict[str, Any]
) -> None:
    dtype = torch.bfloat16 if options else torch.float32
    source = source_model(tmp_path / "m", kind, dtype=dtype)
    out = quantize(str(source), tmp_path / "out", recipe="quarot", settings=FINE, samples=4, seq_len=64)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    adapter = write_adapter(tmp_path / "adapter", original, size=0.5, names=names)
    prompts = [
        torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (7, 61, 90)
    ]
    found = child(serve_with, out, [None, adapter, None], prompts, **options)
    expected = []
    for model in (original, merged(original, adapter)):
        with torch.no_grad():
            logprobs = [model(torch.tensor([p])).logits[0, :-1].double().log_softmax(-1) for p in prompts]
        own = [x.gather(1, torch.tensor(p[1:])[:, None])[:, 0] for p, x in zip(prompts, logprobs, strict=True)]
        expected.append(torch.cat(own))
    plain, adapted = expected
    for served, wanted in zip(found, (plain, adapted, plain), strict=True):
        assert (torch.cat(served) - wanted).norm() < 0.1 * (adapted - plain).norm()
