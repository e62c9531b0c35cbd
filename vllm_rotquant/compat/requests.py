"""What comes with a request: LoRA adapters and prompt embeddings, which pass through rotquant first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm.v1.worker.worker_base import WorkerWrapperBase


def load_adapters_with(reader: Callable[[Any], Callable[[Path, int], dict[str, torch.Tensor]] | None]) -> None:
    """Lets rotquant read the LoRA adapters of its models, at start and at run time; call it while a model is built.

    vLLM makes a manager of adapters for each model after that has been built, and asks it to load each adapter.

    Args:
        reader: asked once for each model. `reader(vllm_config)` is None where vLLM shall read the adapters itself, else
            `read(folder, max_rank)`, which gives an adapter's tensors under PEFT's names, their scaling in `lora_B`.
    """
    from vllm.lora.utils import get_adapter_absolute_path
    from vllm.lora.worker_manager import WorkerLoRAManager

    manager_class: Any = WorkerLoRAManager
    if hasattr(manager_class, "rotquant_read"):
        return
    make, load = manager_class.__init__, manager_class._load_adapter

    @functools.wraps(make)
    def made(manager: Any, vllm_config: Any, *arguments: Any, **options: Any) -> None:
        make(manager, vllm_config, *arguments, **options)
        manager.rotquant_read = reader(vllm_config)

    @functools.wraps(load)
    def loaded(manager: Any, request: Any) -> Any:
        folder, read = Path(get_adapter_absolute_path(request.lora_path)), manager.rotquant_read
        if read is None or not folder.is_dir():  # vLLM has its own words for an adapter that is not there
            return load(manager, request)
        tensors, kind = read(folder, manager.lora_config.max_lora_rank), manager._lora_model_cls
        manager._lora_model_cls = _holding(kind, tensors)
        try:
            return load(manager, request)
        finally:
            manager._lora_model_cls = kind

    manager_class.rotquant_read, manager_class.__init__, manager_class._load_adapter = None, made, loaded


def _holding(kind: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """vLLM's class of a loaded adapter, holding these tensors whatever the file has; `lora_B` scaled already."""
    taken = ("device", "dtype", "model_vocab_size", "weights_mapper", "skip_prefixes")

    class Held(kind):  # type: ignore[misc]
        @classmethod
        def from_local_checkpoint(
            cls, folder: str, expected: set[str], peft_helper: Any, *, lora_model_id: int, **options: Any
        ) -> Any:
            given = {name: options[name] for name in taken}
            adapter = kind.from_lora_tensors(lora_model_id, tensors, peft_helper, **given)
            for weights in adapter.loras.values():
                weights.scaling = 1.0
            return adapter

    return Held


def turn_prompt_embeds(model: Any, turn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """From now on, prompt embeddings [T, hidden] of requests for this loaded model pass through `turn`.

    They come to every kind of worker in `scheduler_output`, before a model runner, V1 or V2, mixes rows.
    """
    model.turn_prompt_embeds = turn
    worker: Any = WorkerWrapperBase
    execute = worker.execute_model
    if hasattr(execute, "__wrapped__"):
        return

    @functools.wraps(execute)
    def execute_model(wrapper: Any, scheduler_output: Any) -> Any:
        requests = [r for r in scheduler_output.scheduled_new_reqs if r.prompt_embeds is not None]
        turn = getattr(wrapper.worker.get_model(), "turn_prompt_embeds", None) if requests else None
        if turn is not None:
            for request in requests:
                request.prompt_embeds = turn(request.prompt_embeds)
        return execute(wrapper, scheduler_output)

    worker.execute_model = execute_model
