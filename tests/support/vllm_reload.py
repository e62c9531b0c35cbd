"""Reloads the weights of a served checkpoint in several ways and gives back plain data. Runs in a child process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rotquant.errors import RotQuantError
from vllm_serving import DEFAULTS, captured_log, own_logprobs, swapped, tear_down


@dataclass
class Story:
    """What was served after each step, and what was refused."""

    served: dict[str, list[Tensor]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    proofs: int = 0


class Teller:
    """A server in this process, and what happens to it."""

    def __init__(self, folder: Path, prompts: list[list[int]], **more: Any) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        options: Any = DEFAULTS | {"enable_prefix_caching": False} | more
        self.llm, self.prompts, self.story = LLM(str(folder), **options), prompts, Story()

    def serve(self, step: str) -> None:
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, detokenize=False, prompt_logprobs=0)
        requests: Any = [{"prompt_token_ids": p} for p in self.prompts]
        outputs = self.llm.generate(requests, parameters, use_tqdm=False)
        rows = [own_logprobs(p, o.prompt_logprobs) for p, o in zip(self.prompts, outputs, strict=True)]
        self.story.served[step] = rows

    def reload(self, **how: Any) -> None:
        self.llm.collective_rpc("reload_weights", kwargs=how)

    def on_model(self, act: Callable[[Any], Any]) -> None:
        self.llm.collective_rpc(lambda worker: act(worker.model_runner.get_model()))

    def refused(self, step: str, act: Callable[[], Any]) -> None:
        try:
            act()
        except RotQuantError as error:
            self.story.refused[step] = str(error)

    def tell(self, b: Path, other: Path, cut: dict[str, Path], tensors: dict[str, Tensor]) -> Story:
        self.serve("a")
        self.on_model(forget_weights)
        self.reload()
        self.serve("a after sleep")
        self.reload(weights_path=str(b))
        self.serve("b")
        self.refused("other settings", lambda: self.reload(weights_path=str(other)))
        self.refused("no reload", lambda: self.on_model(lambda model: model.load_weights(tensors.items())))
        self.serve("b still")
        for name, folder in cut.items():
            self.refused(name, partial(self.reload, weights_path=str(folder)))
        self.refused("a mixture", lambda: self.on_model(lambda model: model.compute_logits(None)))
        self.reload(weights_path=str(b))
        self.reload(weights_iterator=reversed(tensors.items()))
        self.serve("a by tensors")
        return self.story


def forget_weights(model: Any) -> None:
    """What sleep of level 2 leaves when it ends: parameters of any content; vLLM brings buffers back itself."""
    for parameter in model.parameters():
        parameter.data.fill_(0x55)


def reload_story(
    a: Path, b: Path, other: Path, cut: dict[str, Path], prompts: list[list[int]], swap: str = ""
) -> Story:
    """Serves `a`; reloads it, then `b` of the same settings; tries what must not work; ends with `a` once more.

    Args:
        other: of other settings; cut: each lacks the tensor that it is named after.
        swap: see `swapped`.
    """
    tensors = load_file(a / "model.safetensors")
    with captured_log() as log, swapped(swap), torch.compiler.set_stance("force_eager"):
        try:
            story = Teller(a, prompts).tell(b, other, cut, tensors)
        finally:
            tear_down()
    story.proofs = sum("rotquant start-up check" in line for line in log)
    return story


def refusal_of_reload(folder: Path, cut: Path, **options: Any) -> str:
    """What a server of `folder` says to a reload of `cut`."""
    with torch.compiler.set_stance("force_eager"):
        try:
            teller = Teller(folder, [], **options)
            teller.refused("cut", lambda: teller.reload(weights_path=str(cut)))
        finally:
            tear_down()
    return teller.story.refused.get("cut", "")


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """The plugin's, whose module imports vLLM."""
    from vllm_rotquant.reload import difference

    return difference(ours, theirs)
