"""The original model: its folder checked before any work, and transformers' own model of it.

What the quantizer reads is names and tensors; what the equivalence gate compares with is neither: transformers builds
the model from the same files, with its own naming, tying and reading of config.json. The parameters of that model are
the files mapped into memory, and a module's are float32 while it runs only: memory does not grow with the model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from rotquant.checkpoint.layers import stored_shapes
from rotquant.checkpoint.source import DTYPES, Source
from rotquant.common.json_files import read_object, short
from rotquant.errors import RotQuantError
from rotquant.models import (
    Architecture,
    Names,
    describe,
    expected_shapes,
    is_known,
    read_architecture,
    read_config,
    torch_attention,
)
from rotquant.models.text_half import PREFIXES, has_text_half
from rotquant.text import check_tokenizer


def read_original(folder: Path) -> tuple[Architecture, Source]:
    """Checks a folder of a full-precision model: config.json, weights, tokenizer and generation config.

    A stored lm_head is used even where config.json ties it to the embedding, as transformers and vLLM do.

    Raises:
        RotQuantError: naming the file, and the field or tensor.
    """
    arch, source = read_architecture(folder), Source(folder)
    layer, names = re.compile(re.escape(arch.names.layers) + r"(\d+)\."), arch.names
    found = len({match[1] for name in source.files if (match := layer.match(name))})
    if found != arch.layers:
        raise RotQuantError(
            f"{folder}/config.json: num_hidden_layers is {arch.layers}, but the weights are of {found} layers"
        )
    arch = dataclasses.replace(arch, tied=arch.tied and names.head not in source.files)
    shapes = stored_shapes(arch, expected_shapes(arch.config), source.files)
    if not arch.tied:
        shapes[names.head] = (arch.vocab_size, arch.hidden_size)
    source.check(shapes, source.beginning(arch.beside + arch.left))
    if (folder / "adapter_config.json").exists():
        raise RotQuantError(f"{folder}/adapter_config.json: the folder holds an adapter too; merge it, or move it away")
    check_generation(folder)
    check_tokenizer(folder, arch.vocab_size)
    return arch, source


def check_generation(folder: Path) -> None:
    """Refuses a generation_config.json that no reader takes."""
    if (file := folder / "generation_config.json").exists():
        read_object(file)
        try:
            GenerationConfig.from_pretrained(folder)
        except Exception as error:  # of many kinds
            raise RotQuantError(f"{file}: {short(error)}") from error


def load_transformers(folder: Path, dtype: torch.dtype | str) -> tuple[PreTrainedModel, set[str]]:
    """A model as transformers loads it from a folder's safetensors, and the names of tensors that it does not use.

    Raises:
        RotQuantError: it cannot, or lacks tensors and would draw them at random.
    """
    Source(folder)  # names the file that is damaged, which transformers does not
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    half, left = _half(folder) if has_text_half(read_object(folder / "config.json")) else ({}, ())
    config = half.get("config") or read_config(folder)
    attention = torch_attention(describe(config)) if is_known(config) else "sdpa"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, **half, dtype=dtype, attn_implementation=attention, output_loading_info=True, use_safetensors=True,
            trust_remote_code=False, local_files_only=True,
        )  # fmt: skip
    except Exception as error:  # of many kinds
        raise RotQuantError(f"{folder}: transformers cannot load this model: {short(error)}") from error
    finally:
        if bar:
            logging.enable_progress_bar()
    model, info = loaded
    if missing := sorted(map(str, info["missing_keys"])):
        raise RotQuantError(f"{folder}: transformers finds no tensor {missing[0]}, and would draw it at random")
    return model.eval(), {name for name in map(str, info["unexpected_keys"]) if not (left and name.startswith(left))}


def _half(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """How transformers loads the text half of a model alone, and how the tensors begin that it is to leave out."""
    config = read_config(folder)
    renamed = {f"^{re.escape(prefix)}": own for prefix, own in PREFIXES.items()}
    return {"config": config, "key_mapping": renamed}, describe(config).left


@contextmanager
def original_model(source: Source) -> Iterator[PreTrainedModel]:
    """transformers' own model from the files, computing in float32.

    Raises:
        RotQuantError: transformers cannot load it, or does not take every tensor that the files hold.
    """
    dtype = DTYPES[source.dtypes[Names().embedding]]  # the files' own: then nothing is copied
    model, unused = load_transformers(source.folder, dtype)
    if unused:
        raise RotQuantError(f"{source.folder}: transformers does not use the tensor {min(unused)}; it would be lost")
    _unround(model, source)
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            _Widened(module)
        for child in module.children():
            if isinstance(child, nn.Conv1d):  # linear attention takes its weight and runs another function on it
                _Widened(child, while_running=module)
    with torch.no_grad():
        yield model


def _unround(model: PreTrainedModel, source: Source) -> None:
    """Gives parameters that are stored in another dtype than the embedding their stored values back."""
    for name, parameter in model.named_parameters():
        stored = DTYPES.get(source.dtypes.get(name, ""))
        if stored not in (None, parameter.dtype):
            tensor = source.get(name)
            if torch.equal(tensor.to(parameter.dtype), parameter):
                parameter.data = tensor


class _Widened:
    """Makes a module's own parameters float32 while it runs, or another does that reads them."""

    def __init__(self, module: nn.Module, while_running: nn.Module | None = None) -> None:
        self.module, runs = module, while_running or module
        self.stored: dict[str, torch.Tensor] = {}
        runs.register_forward_pre_hook(self.widen)
        runs.register_forward_hook(self.restore, always_call=True)

    def widen(self, *_: Any) -> None:
        for name, parameter in self.module.named_parameters(recurse=False):
            self.stored[name] = parameter.data
            parameter.data = parameter.data.float()

    def restore(self, *_: Any) -> None:
        for name, tensor in self.stored.items():
            getattr(self.module, name).data = tensor
        self.stored.clear()
