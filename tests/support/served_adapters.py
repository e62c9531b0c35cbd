"""Serves a checkpoint with LoRA adapters, and gives back plain data; for the child process of the plugin's tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vllm_serving as serving
from rotquant.errors import RotQuantError


def serve_with(
    folder: Path, adapters: list[Path | None], prompts: list[list[int]], **options: Any
) -> list[list[Tensor] | str]:
    """One engine; for each adapter the log-probabilities of each prompt's own tokens, or why it was refused."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    parameters = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False, prompt_logprobs=0)
    served: Any = {"dtype": "float32", "block_size": 32} | options
    results: list[list[Tensor] | str] = []
    with torch.compiler.set_stance("force_eager"):
        llm = LLM(
            str(folder), skip_tokenizer_init=True, enforce_eager=True, max_model_len=128, kv_cache_memory_bytes=1 << 23,
            enable_lora=True, max_lora_rank=8, max_loras=2, **served,
        )  # fmt: skip
        try:
            for number, adapter in enumerate(adapters, 1):
                request = LoRARequest(f"adapter {number}", number, str(adapter)) if adapter else None
                try:
                    if request:
                        llm.llm_engine.add_lora(request)
                except RotQuantError as error:
                    results.append(str(error))
                    continue
                results.append([])
                for prompt in prompts:  # one by one: vLLM's LoRA on CPUs fails where it scores several in one step
                    given = [{"prompt_token_ids": prompt}]
                    (output,) = llm.generate(given, parameters, use_tqdm=False, lora_request=request)
                    results[-1].append(serving.own_logprobs(prompt, output.prompt_logprobs))
            del llm
        finally:
            serving.tear_down()
    return results


def read_as_served(folder: Path, adapter: Path) -> dict[str, Tensor] | None:
    """What vLLM would get of an adapter; None for a model whose adapters it reads itself. No engine."""
    from vllm_rotquant.adapters import reader

    read = reader(serving.engine_config(folder))
    return read and read(adapter, 8)
