"""Learning through the whole model: where its tensors are, and what its memory is estimated at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rotquant.common.devices import Devices
from rotquant.learn.end_to_end import QuantizedModel, loss_of
from rotquant.learn.stream import Job
from rotquant.models import read_architecture
from rotquant.recipes import load_recipe
from rotquant.resources import end_to_end
from rotquant.run import Settings, prepare
from source_models import source_model

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OneDevice(TorchDispatchMode):
    """Refuses an op that mixes devices; numbers without a dimension and indices may lie anywhere, as on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim and t.is_floating_point()]
        devices = {t.device.type for t in tensors}
        assert len(devices) < 2 or func in COPIES, f"{func} mixes {devices}"
        return func(*args, **(kwargs or {}))


def job_of(folder: Path, recipe: str, device: str) -> Job:
    run = prepare(str(folder), Settings(recipe, samples=2, seq_len=32, device="cpu"))
    assert run.calibrated
    return Job(
        run.recipe, run.arch, run.source, run.calibrated.tokens, run.transforms, run.dtype, 0, Devices(device), 1
    )


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("recipe", ["spinquant", "ostquant"])
def test_everything_is_on_the_device_of_the_job(kind: str, recipe: str, tmp_path: Path) -> None:
    """On PyTorch's meta device, which computes shapes only, in place of a GPU."""
    job = job_of(source_model(tmp_path / "model", kind), recipe, "meta")
    options = job.recipe.learn.end_to_end
    assert options
    with OneDevice():
        model = QuantizedModel(job, options)
        loss = loss_of(model, job.tokens[:1].to("meta"), options)
        loss.backward()
    assert loss.device.type == "meta"
    learned = [model.r1, *(p for layer in model.layers for p in layer.parameters.parameters())]
    assert all(p is not None and p.grad is not None and p.grad.device.type == "meta" for p in learned)


def test_the_memory_estimate_holds_all_layers(tmp_path: Path) -> None:
    """In float32, as these models are stored."""
    needs, sizes = [], []
    for layers in (2, 6):
        folder = source_model(tmp_path / str(layers), "llama", layers=layers)
        needs.append(end_to_end(load_recipe("spinquant"), read_architecture(folder), (8, 64)))
        sizes.append(sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    assert needs[0] > sizes[0]
    assert sizes[1] - sizes[0] < needs[1] - needs[0] < 1.2 * (sizes[1] - sizes[0])
