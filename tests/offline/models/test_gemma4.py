"""Heads of two sizes, values without a linear of their own, normed values, a factor behind each layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.gemma4_unified.modeling_gemma4_unified import Gemma4UnifiedForCausalLM

import rotquant
from drawn_transforms import everything
from rotquant.checkpoint.source import INDEX, Source
from rotquant.errors import RotQuantError
from rotquant.fitting import fitted
from rotquant.gate import check_equivalence
from rotquant.learn.initial import initial_transforms
from rotquant.models import read_architecture
from rotquant.models.harden import harden
from rotquant.pipeline import quantize
from rotquant.recipes import load_recipe
from rotquant.transforms.fold import Fold
from rotquant.transforms.gains import with_gains_in_linears
from rotquant.transforms.space import LayerTransforms, Transforms
from source_models import all_candidates, source_model
from text_halves import quantized_alike

TOKENS = torch.arange(3, 83)
FINE = ["weights.bits=8", "activations.bits=8", "activations.clip=1.0", "kv.bits=16", "kv.key_feedback=false"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer with a window and small heads, one that sees everything with heads twice as large and no v_proj."""
    folder = tmp_path_factory.mktemp("gemma4") / "source"
    return source_model(folder, "gemma4", dtype=torch.bfloat16, shard_size="1GB")


def gated(source: Path, transforms: Transforms) -> float:
    arch = read_architecture(source)
    return check_equivalence(Source(source), arch, Fold(arch, transforms), TOKENS, lambda _: None)


def test_what_folds_is_exact_and_scaled_values_would_not_be(source: Path) -> None:
    """R2 turns values in front of their norm, in the layer without v_proj as well; R3 is of what both sizes hold."""
    arch, random = read_architecture(source), torch.Generator().manual_seed(1)
    recipe = with_gains_in_linears(
        initial_transforms(fitted(load_recipe("quarot"), arch), arch, 1, 0), arch, Source(source)
    )
    assert [layer.r2.shape for layer in recipe.layers if layer.r2 is not None] == [(4, 32, 32), (1, 64, 64)]
    assert recipe.r3 == 32
    assert gated(source, recipe) < 1e-5
    assert gated(source, Transforms(None, 0, [everything(kind, random) for kind in arch.kinds])) < 1e-5
    scaled = [LayerTransforms(s_ov=torch.linspace(1, 2, a.kv_heads * a.head_dim)) for a in arch.attentions.values()]
    with pytest.raises(RotQuantError, match="layer 0 of the folded model differs"):
        gated(source, Transforms(None, 0, scaled))


@pytest.mark.parametrize("recipe", ["quarot", pytest.param("best", marks=pytest.mark.release)])
def test_every_way_of_learning_computes_the_same_function(source: Path, tmp_path: Path, recipe: str) -> None:
    settings = [*all_candidates(recipe), *(["tune={steps: 2}"] if recipe == "best" else []), *FINE]
    out = quantize(str(source), tmp_path / "out", recipe=recipe, samples=4, seq_len=64, settings=settings)
    with torch.no_grad():
        got = rotquant.load(out)(TOKENS[None]).logits.float()
        expected = AutoModelForCausalLM.from_pretrained(source)(TOKENS[None]).logits.float()
    assert (got - expected).norm() < 0.1 * expected.norm()
    stored, original = Source(out), Source(source)
    name = "model.layers.1.layer_scalar"
    assert torch.equal(stored.get(name), original.get(name))
    assert "model.layers.1.self_attn.v_proj.weight_packed" in stored.files  # turned by R2, as keys must not be
    config = json.loads((out / "config.json").read_text())
    assert not config["attention_k_eq_v"]
    assert config["per_layer_config"] == {"1": {"head_dim": 64, "num_key_value_heads": 1}}
    if recipe == "quarot":
        tensors, index = load_file(stored.files[name]), json.loads((out / INDEX).read_text())
        del tensors[name], index["weight_map"][name]
        save_file(tensors, stored.files[name], metadata={"format": "pt"})
        (out / INDEX).write_text(json.dumps(index))
        with pytest.raises(RotQuantError, match=rf"tensor {name} is missing"):
            rotquant.load(out)


def test_recipes_that_need_one_size_of_inputs_say_so(source: Path) -> None:
    with pytest.raises(RotQuantError, match=r"the same inputs of the output linear in every layer, .* has 128 and 256"):
        fitted(load_recipe("duquant"), read_architecture(source))


def test_the_text_half_of_a_unified_model(source: Path, tmp_path: Path) -> None:
    """It is this model: transformers computes the same by its own class, and the same checkpoint comes out."""
    whole, text = tmp_path / "whole", json.loads((source / "config.json").read_text())
    shutil.copytree(source, whole)
    held = load_file(source / "model.safetensors")
    tensors = {"model.language_model." + name.removeprefix("model."): t for name, t in held.items()}
    tensors |= {f"model.{part}.weight": torch.ones(4) for part in ("vision_embedder", "embed_vision", "embed_audio")}
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    text |= {"model_type": "gemma4_unified_text", "vocab_size_per_layer_input": 0}
    del text["hidden_size_per_layer_input"], text["architectures"]
    (whole / "config.json").write_text(json.dumps({
        "architectures": ["Gemma4UnifiedForConditionalGeneration"], "model_type": "gemma4_unified",
        "dtype": "bfloat16", "text_config": text, "vision_config": {}, "audio_config": None,
    }))  # fmt: skip
    half = quantized_alike(source, whole, tmp_path)
    assert "217 bytes a token, 768 in bf16" in (half / "README.md").read_text()  # 4 heads of 32, 1 of 64
    unified = Gemma4UnifiedForCausalLM.config_class.from_dict(text)
    assert (unified.max_position_embeddings, unified.sliding_window) == (512, 24)
    with torch.no_grad():
        own = Gemma4UnifiedForCausalLM(unified)
        own.load_state_dict(held | {"lm_head.weight": held["model.embed_tokens.weight"]})
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        assert torch.equal(own(TOKENS[None]).logits, plain(TOKENS[None]).logits)


def test_hardening_keeps_the_function(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        before = model(TOKENS[None]).logits
        harden(model)
        after = model(TOKENS[None]).logits
    assert (after - before).norm() < 1e-4 * before.norm()
