"""Hardening keeps the function and makes activations hard to quantize, for every supported architecture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from rotquant.errors import RotQuantError
from rotquant.models.harden import harden, harden_folder

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The inputs that a hardened norm or up_proj feeds, and the outputs that the KV cache and the scores see.
SITES = ("q_proj.input", "gate_proj.input", "down_proj.input", "o_proj.input", "v_proj.output", "k_norm.output")


def tiny(family: str, *, tied: bool = False, **options: object) -> PreTrainedModel:
    """A random model with GQA, a width that is no power of two, and no two equal gains or biases."""
    settings: dict[str, object] = {
        "vocab_size": 128, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "head_dim": 16,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "tie_word_embeddings": tied, "initializer_range": 0.2, "attn_implementation": "eager",
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**{**settings, **options}), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens() -> torch.Tensor:
    return torch.randint(128, (2, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(tokens()).logits


def relative(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).norm() / before.norm())


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs and outputs of the modules inside the layers, as [tokens, width], by 'layer.path.input' and '.output'."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in model.get_decoder().layers.named_modules():
        if isinstance(module, nn.Linear) or name.endswith("_norm"):

            def keep(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor, name: str = name) -> None:
                seen[f"{name}.input"] = inputs[0].flatten(0, -2)
                seen[f"{name}.output"] = output.flatten(0, -2)

            handles.append(module.register_forward_hook(keep))
    yield seen
    for handle in handles:
        handle.remove()


def peakedness(model: PreTrainedModel) -> dict[str, float]:
    """Peak over median of the channels' absolute maxima, by site."""
    with recorded(model) as seen:
        logits(model)
    channels = {name: values.abs().amax(0) for name, values in seen.items()}
    return {name: float(c.max() / c.median()) for name, c in channels.items() if name.endswith(SITES)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_logits_stay_equal(family: str, tied: bool, dtype: torch.dtype, tolerance: float) -> None:
    model = tiny(family, tied=tied).to(dtype)
    before = logits(model)
    harden(model, pair_strength=8.0, channels=0.1)
    assert relative(before, logits(model)) < tolerance


def test_biases_take_part() -> None:
    """Qwen2 always has q, k, v biases; Llama can have biases everywhere."""
    for model in (tiny("qwen2"), tiny("llama", attention_bias=True, mlp_bias=True)):
        model.double()
        before = logits(model)
        biases = {name: p.clone() for name, p in model.named_parameters() if name.endswith("bias")}
        assert biases
        harden(model, channels=0.1)
        assert relative(before, logits(model)) < 1e-12
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias", "up_proj.bias")):
                assert not torch.equal(parameter, biases[name]), name


@pytest.mark.parametrize("family", CONFIGS)
def test_activations_become_peaked(family: str) -> None:
    model = tiny(family)
    before = peakedness(model)
    assert {name.split(".", 1)[1].split(".", 1)[-1] for name in before} >= set(SITES[:5])
    harden(model, strength=32.0, pair_strength=16.0)
    after = peakedness(model)
    for name, value in before.items():
        assert after[name] > 4 * value, f"{name}: {value:.1f} before, {after[name]:.1f} after"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_linear_changes(family: str) -> None:
    model = tiny(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    harden(model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert "lm_head.weight" in changed
    assert "model.norm.weight" in changed
    for index in range(3):
        touched = {name.rsplit(".", 2)[1] for name in changed if name.startswith(f"model.layers.{index}.")}
        assert touched >= {*LINEARS, "input_layernorm", "post_attention_layernorm"}


def test_keys_become_peaked_and_scores_stay() -> None:
    """The channels of a RoPE pair share one factor, so that the attention weights stay equal at every distance."""
    model = tiny("llama").double()
    with torch.no_grad():
        before = model(tokens(), output_attentions=True).attentions
        harden(model, channels=0.05, pair_strength=16.0)
        after = model(tokens(), output_attentions=True).attentions
    for old, new in zip(before, after, strict=True):
        assert torch.allclose(old, new, atol=1e-10)
    original = tiny("llama").double()
    for layer, untouched in zip(model.get_decoder().layers, original.get_decoder().layers, strict=True):
        ratio = (layer.self_attn.k_proj.weight / untouched.self_attn.k_proj.weight).abs()
        per_row = ratio.median(dim=1).values.view(2, 2, 8)  # kv head, half, pair
        assert torch.equal(per_row[:, 0], per_row[:, 1])
        assert per_row.amax() == 16.0


def test_tied_head_stays_tied_and_untouched() -> None:
    model = tiny("llama", tied=True)
    embedding = model.get_input_embeddings().weight.clone()
    gain = model.get_decoder().norm.weight.clone()
    harden(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert torch.equal(model.get_decoder().norm.weight, gain)


def test_seed_decides_the_channels() -> None:
    models = [tiny("llama") for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        harden(model, seed=seed)
    first, same, other = (m.state_dict()["model.layers.1.input_layernorm.weight"] for m in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_powers_of_two_are_exact_in_bf16() -> None:
    model = tiny("llama").bfloat16()
    before = {name: p.clone() for name, p in model.named_parameters()}
    harden(model, strength=30.0)
    for name, parameter in model.named_parameters():
        mantissa, _ = torch.frexp(parameter.float())
        assert torch.equal(mantissa, torch.frexp(before[name].float())[0]), name


def test_refuses_what_it_does_not_know() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16))
    with pytest.raises(RotQuantError, match="GPT2LMHeadModel"):
        harden(model)
    with pytest.raises(ValueError, match="positive"):
        harden(tiny("llama"), strength=0.0)


def test_folder(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    model = tiny("qwen2", tied=True).bfloat16()
    model.save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    harden_folder(source, target, strength=32.0)
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    harden(model, strength=32.0)
    assert loaded.dtype == torch.bfloat16
    assert (target / "tokenizer.json").read_text() == "{}"
    assert [p.name for p in target.glob("*.safetensors")] == ["model.safetensors"]
    for (name, old), new in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(old, new), name
    with pytest.raises(ValueError, match="folder of its own"):
        harden_folder(source, source)
