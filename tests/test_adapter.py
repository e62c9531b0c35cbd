"""LoRA adapters: a turned adapter does to the folded model what it did to the original; all else is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from drawn_transforms import everything
from lora_adapters import NAMES, attach, changes, write_adapter
from rotquant.basis import FILE, Basis
from rotquant.checkpoint import Source
from rotquant.cli import main
from rotquant.decoder import Decoder, float_linear
from rotquant.errors import RotQuantError
from rotquant.fold import Fold
from rotquant.initial import random_orthogonal
from rotquant.models import read_architecture, read_config, rotary
from rotquant.peft_adapter import LoRAAdapter
from rotquant.pipeline import quantize
from rotquant.space import Transforms
from rotquant.transforms.dense import Dense
from rotquant.turn_adapter import turn
from source_models import source_model
from tiny_checkpoints import KINDS

ADAPTERS = [
    {},
    {"use_rslora": True, "rank_pattern": {"k_proj": 6}, "alpha_pattern": {"down_proj": 3, "v_proj": 0.5}},
    {"names": ["v_proj", "down_proj"], "layers_to_transform": [0, 1]},
    {"target_modules": r".*\.(q|k|v|o|gate|up|down)_proj"},
]


def linear_with(tensors, transforms, prefix, changed):
    """The linears of a layer with the adapter beside them: it reads what they are given."""
    plain = float_linear(tensors, transforms)

    def linear(name, x):
        b, a = (t.to(x) for t in changed.get(prefix + name, (torch.zeros(1, 1), torch.zeros(1, x.shape[-1]))))
        return plain(name, x) + x @ a.T @ b.T

    return linear


@pytest.mark.parametrize("config", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_turned_adapter_does_the_same(tmp_path, kind, config):
    """Every transform of the design space at once; the basis comes from its file."""
    extra = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    folder = source_model(tmp_path / "m", kind, **extra)
    arch, source, random = read_architecture(folder), Source(folder), torch.Generator().manual_seed(2)
    layers = [everything(arch, random, 1 if kind == "qwen3" else arch.kv_heads) for _ in range(arch.layers)]
    transforms = Transforms(Dense(random_orthogonal(arch.hidden_size, random)), 0, layers)
    stated = Basis.of(source, arch, transforms).write(tmp_path)
    arch.config.rotquant = {"basis": stated.model_dump()}
    basis = Basis.read(tmp_path, arch.config)
    adapter = write_adapter(tmp_path / "a", AutoModelForCausalLM.from_pretrained(folder), **config)
    turned = turn(LoRAAdapter.read(adapter, arch), basis)
    before, after = changes(adapter), {}
    for name, (b, a) in before.items():
        s = (b.norm() / LoRAAdapter.read(adapter, arch).factors[f"{name}.lora_B"].norm()).item()
        after[name] = s * turned.factors[f"{name}.lora_B"], turned.factors[f"{name}.lora_A"]
    cos, sin = rotary(arch.config, 12)
    decoder, fold = Decoder(arch, cos[0], sin[0]), Fold(arch, transforms)
    h = torch.randn(12, arch.hidden_size, generator=random)
    for index in range(arch.layers):
        prefix = arch.layer_prefix(index)
        tensors = source.layer(prefix)
        expected = decoder.layer(tensors, h, linear_with(tensors, None, prefix, before))
        plain = decoder.layer(tensors, h, float_linear(tensors))
        folded = {name: t.float() for name, t in fold.layer(tensors, index).items()}
        got = decoder.layer(folded, fold.r1.rows(h), linear_with(folded, layers[index], prefix, after))
        assert (got - fold.r1.rows(expected)).norm() < 1e-4 * expected.norm()
        assert (plain - expected).norm() > 0.05 * expected.norm()
