"""What hands hidden states or embeddings in or out of a server, as plain data. Runs in a process of its own, as
`vllm_serving` does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

from vllm_serving import captured_log, tear_down


@contextlib.contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """An `LLM` of a checkpoint, small and in float32."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    defaults = {
        "skip_tokenizer_init": True, "enforce_eager": True, "dtype": "float32", "kv_cache_memory_bytes": 1 << 24,
        "max_model_len": 128, "block_size": 32, "disable_log_stats": False,
    }  # fmt: skip
    arguments: Any = defaults | options
    stance = torch.compiler.set_stance("force_eager" if arguments["enforce_eager"] else "default")
    with stance:
        try:
            llm = LLM(str(folder), **arguments)
            yield llm
            del llm
        finally:
            tear_down()


def start(folder: Path, **options: Any) -> None:
    """Starts and stops a server."""
    with engine(folder, **options):
        pass


def vectors(folder: Path, prompts: list[list[int]], task: str) -> Tensor:
    """Of each prompt its vector (task "embed"), or the vectors of all of their tokens ("token_embed"); [.., hidden]."""
    from vllm.config import PoolerConfig

    requests: Any = [{"prompt_token_ids": p} for p in prompts]
    options = {"pooler_config": PoolerConfig(task=task), "skip_tokenizer_init": False}
    with engine(folder, runner="pooling", convert="embed", **options) as llm:
        found = llm.encode(requests, pooling_task=task, use_tqdm=False)
    return torch.cat([torch.atleast_2d(o.outputs.data.float()) for o in found])


def classes(folder: Path, prompts: list[list[int]], words: list[str]) -> Tensor:
    """Scores of a classifier that is made of the rows of lm_head for some tokens [prompts, words]."""
    from vllm import PoolingParams

    overrides = {"classifier_from_token": words, "method": "no_post_processing"}
    requests: Any = [{"prompt_token_ids": p} for p in prompts]
    with engine(folder, runner="pooling", convert="classify", skip_tokenizer_init=False, hf_overrides=overrides) as llm:
        raw = PoolingParams(use_activation=False)
        found = llm.encode(requests, raw, pooling_task="classify", use_tqdm=False)
    return torch.stack([o.outputs.data.float() for o in found])


def from_embeddings(folder: Path, table: Path, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """log p [prompts, vocabulary] of the token after each prompt, given as tokens, and as rows of `table`'s embedding.

    Embeddings and tokens share a batch.
    """
    from vllm import SamplingParams

    shards = [load_file(file) for file in table.glob("*.safetensors")]
    rows = next(shard["model.embed_tokens.weight"] for shard in shards if "model.embed_tokens.weight" in shard)
    one = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False)
    requests: Any = [r for p in prompts for r in ({"prompt_token_ids": p}, {"prompt_embeds": rows[p]})]
    with engine(folder, enable_prompt_embeds=True, max_logprobs=-1) as llm:
        entries = [o.outputs[0].logprobs[0] for o in llm.generate(requests, one, use_tqdm=False)]
    found = torch.tensor([[entry[token].logprob for token in range(len(rows))] for entry in entries])
    return found[::2], found[1::2]


def drafted(folder: Path, prompts: list[list[int]], **speculative: Any) -> dict[str, Any]:
    """Greedy tokens with speculative decoding (or without, where nothing is given), and what became of the drafts.

    `states` are the rows [T, hidden] that an EAGLE3 draft makes of the target's in the first step, `clips` the
    activation clip ratios of the draft's layers in the order of its modules.
    """
    from vllm import SamplingParams
    from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM

    states: list[Tensor] = []
    combine: Any = Eagle3LlamaForCausalLM.combine_hidden_states

    def combined(draft: Any, rows: Tensor) -> Tensor:
        states.append(combine(draft, rows))
        return states[-1]

    greedy = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, detokenize=False)
    requests: Any = [{"prompt_token_ids": p} for p in prompts]
    options = {"speculative_config": speculative | {"num_speculative_tokens": 3}} if speculative else {}
    with (
        mock.patch.object(Eagle3LlamaForCausalLM, "combine_hidden_states", combined),
        captured_log() as log,
        engine(folder, **options) as llm,
    ):
        states.clear()  # of the profiling run
        tokens = [list(o.outputs[0].token_ids) for o in llm.generate(requests, greedy, use_tqdm=False)]
        counts = {m.name.rpartition("num_")[2]: m.value for m in llm.get_metrics() if hasattr(m, "value")}
        drafter = getattr(llm.llm_engine.model_executor.driver_worker.worker.model_runner, "drafter", None)
        layers = drafter.model.modules() if hasattr(drafter, "model") else []
        methods = [getattr(layer, "quant_method", None) for layer in layers]
    return {
        "tokens": tokens,
        "drafted": counts.get("draft_tokens", 0),
        "accepted": counts.get("accepted_tokens", 0),
        "states": states[0].clone() if states else None,
        "clips": [m.format.rows.clip for m in methods if hasattr(m, "format") and hasattr(m.format, "rows")],
        "log": "\n".join(log),
    }
