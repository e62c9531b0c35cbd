"""transformers' own model of a mixture of experts, its weights read when they run and dropped behind it.

transformers would put the experts of every layer together in memory before the first of them runs. Here its modules are
built without weights; each gets its own from the files, in float32, when it is called, and an expert when it is asked
for: what is in memory does not grow with the number of experts. How files name and hold experts (`layers`) is then our
reading and not transformers'; the tests hold it to transformers' for each family and each way of holding them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rotquant.checkpoint.layers import in_files, read_layer
from rotquant.checkpoint.source import Source
from rotquant.common.json_files import short
from rotquant.errors import RotQuantError
from rotquant.models import Architecture, Tensors


@contextmanager
def original_mixture(source: Source, arch: Architecture) -> Iterator[PreTrainedModel]:
    """The model of a checked source, computing in float32.

    Raises:
        RotQuantError: transformers cannot build it.
    """
    config = copy.deepcopy(arch.config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa", experts_implementation="eager", dtype=torch.float32,
                trust_remote_code=False,
            )  # fmt: skip
    except Exception as error:  # of many kinds
        raise RotQuantError(f"config.json: transformers cannot build this model: {short(error)}") from error
    decoder: Any = model.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=config)  # its table, which no file holds
    for index, block in arch.mixtures.items():
        _read_experts(decoder.layers[index].get_submodule(f"{block.module}.experts"), source, arch, index)
    for name, module in model.named_modules():
        _ReadWhenRun(name, module, source, arch)
    with torch.no_grad():
        yield model.eval()


class _ReadWhenRun:
    """Gives a module its own parameters while it runs."""

    def __init__(self, name: str, module: nn.Module, source: Source, arch: Architecture) -> None:
        self.source = source
        self.files = {leaf: self._file(f"{name}.{leaf}", arch) for leaf, _ in module.named_parameters(recurse=False)}
        if self.files:
            module.register_forward_pre_hook(self.read)
            module.register_forward_hook(self.drop, always_call=True)

    def _file(self, name: str, arch: Architecture) -> str:
        """The tensor of the files that a parameter is."""
        if name == arch.names.head and arch.tied:
            return arch.names.embedding
        return name if name in self.source.files else in_files(arch, name)

    def read(self, module: nn.Module, _: Any) -> None:
        for leaf, file in self.files.items():
            setattr(module, leaf, nn.Parameter(self.source.get(file).float(), requires_grad=False))

    def drop(self, module: nn.Module, *_: Any) -> None:
        for leaf in self.files:
            setattr(module, leaf, nn.Parameter(getattr(module, leaf).to("meta"), requires_grad=False))


def _read_experts(module: nn.Module, source: Source, arch: Architecture, index: int) -> None:
    """Puts in the place of the tensors of all experts of a layer what reads one of them."""
    tensors, block = read_layer(source, arch, index), arch.mixtures[index]
    for leaf, parts in {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.items():
        del module._parameters[leaf]
        names = [[f"{getattr(mlp, part)}.weight" for part in parts] for mlp in block.routed]
        module.__dict__[leaf] = _ByExpert(tensors, names)


class _ByExpert:
    """Stands for a tensor [experts, ...]: `[j]` reads that of expert j."""

    def __init__(self, tensors: Tensors, names: list[list[str]]) -> None:
        self.tensors, self.names = tensors, names

    def __getitem__(self, expert: Any) -> Tensor:
        return torch.cat([self.tensors[name].float() for name in self.names[int(expert)]])
