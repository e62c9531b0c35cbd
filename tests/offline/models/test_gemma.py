"""Norms behind what a block writes: what folds, what does not, and what recipes become."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rotquant
from drawn_transforms import random_orthogonal
from rotquant.basis.sidecar import FILE
from rotquant.checkpoint.source import Source
from rotquant.errors import RotQuantError
from rotquant.fitting import fitted
from rotquant.gate import check_equivalence
from rotquant.learn.initial import initial_transforms
from rotquant.models import read_architecture, rotary
from rotquant.models.harden import harden
from rotquant.pipeline import quantize
from rotquant.recipes import load_recipe
from rotquant.transforms.dense import Dense
from rotquant.transforms.fold import Fold
from rotquant.transforms.gains import with_gains_in_linears
from rotquant.transforms.space import LayerTransforms, Transforms
from rotquant_kernels import Stage
from source_models import all_candidates, source_model
from text_halves import quantized_alike

TOKENS = torch.arange(3, 83)
FINE = ["weights.bits=8", "activations.bits=8", "activations.clip=1.0", "kv.bits=16", "kv.key_feedback=false"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of bfloat16, in which the factor of the embeddings is 11.3125 and not 11.3137."""
    return source_model(tmp_path_factory.mktemp("gemma") / "source", "gemma3", dtype=torch.bfloat16, shard_size="1GB")


def test_a_recipe_online_changes_nothing_and_a_rotated_stream_would(source: Path) -> None:
    arch, random = read_architecture(source), torch.Generator().manual_seed(1)
    recipe = fitted(load_recipe("quarot"), arch)
    online = with_gains_in_linears(initial_transforms(recipe, arch, 1, 0), arch, Source(source))
    assert online.layers[0].inputs == {
        site: [Stage("hadamard", n)] for site, n in (("attn", 128), ("mlp", 128), ("down", 16))
    }
    assert check_equivalence(Source(source), arch, Fold(arch, online), TOKENS, lambda _: None) < 1e-5
    rotated = Transforms(Dense(random_orthogonal(128, random)), 0, [LayerTransforms() for _ in arch.kinds])
    with pytest.raises(RotQuantError, match="layer 0 of the folded model differs"):
        check_equivalence(Source(source), arch, Fold(arch, rotated), TOKENS, lambda _: None)


def test_recipes_become_what_the_model_has(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arch = read_architecture(source)
    spinquant = fitted(load_recipe("spinquant"), arch)
    assert "so that R1 is not folded: Hadamards run online in front of attn and mlp" in capsys.readouterr().err
    assert (spinquant.rotations.r1, spinquant.rotations.r2) == ("none", "hadamard")
    assert spinquant.learn.end_to_end is not None
    assert spinquant.learn.end_to_end.learns == ["r2"]
    assert (spinquant.online.attn, spinquant.online.o, spinquant.online.mlp) == (["hadamard"], [], ["hadamard"])
    learns = load_recipe("quarot", ["learn.surrogate={targets: [r1], objective: clip}"])
    assert fitted(learns, arch).learn.surrogate is None
    best = fitted(load_recipe("best"), arch)
    assert best.choose is not None
    assert best.choose.candidates.keys() == load_recipe("best").choose.candidates.keys() - {"learned R1"}  # type: ignore[union-attr]
    assert fitted(best, arch) == best
    assert not best.for_profile("portable").online.attn
    assert fitted(load_recipe("rtn"), arch) == load_recipe("rtn")


@pytest.mark.parametrize("recipe", ["quarot", "best", "flatquant"])
def test_every_way_of_learning_computes_the_same_function(source: Path, tmp_path: Path, recipe: str) -> None:
    """Where rounding is fine the checkpoint's logits are the model's; the embedding's factor is that of bfloat16."""
    short = {"flatquant": ["learn.blockwise.epochs=1"], "best": ["tune={steps: 2}"]}
    settings = [*all_candidates(recipe), *short.get(recipe, []), *FINE]
    out = quantize(str(source), tmp_path / "out", recipe=recipe, samples=4, seq_len=64, settings=settings)
    with torch.no_grad():
        got = rotquant.load(out)(TOKENS[None]).logits.float()
        expected = AutoModelForCausalLM.from_pretrained(source)(TOKENS[None]).logits.float()
    assert (got - expected).norm() < 0.1 * expected.norm()
    basis, stored, original = load_file(out / FILE), Source(out), Source(source)
    for site, norm in (
        ("attn", "input_layernorm"),
        ("mlp", "pre_feedforward_layernorm"),
    ):  # what adapters are divided by
        own, now = (1 + files.get(f"model.layers.1.{norm}.weight").double() for files in (original, stored))
        # What adapters are divided by.
        assert torch.allclose(own * basis[f"basis.layers.1.s_{site}"].double(), now, atol=0.02)
        if recipe == "quarot":  # no outlier that a gain makes is left in front of the Hadamard
            assert torch.equal(now, own.sign())
    config = json.loads((out / "config.json").read_text())
    assert config["layer_types"] == ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("older", [False, True])
def test_the_text_half_of_a_model_with_a_vision_tower(source: Path, tmp_path: Path, older: bool) -> None:
    """The same checkpoint comes out, however the files name its tensors."""
    whole = shutil.copytree(source, tmp_path / "whole")
    held = load_file(source / "model.safetensors")
    other = {"vision_tower.post_layernorm.weight": torch.ones(4), "multi_modal_projector.x": torch.ones(4)}
    first, model = ("language_model.model.", "") if older else ("model.language_model.", "model.")
    tensors = {first + n.removeprefix("model."): t for n, t in held.items()} | {model + n: t for n, t in other.items()}
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((source / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "torch_dtype": "bfloat16",
        "text_config": {name: value for name, value in text.items() if name != "architectures"}, "vision_config": {},
    }))  # fmt: skip
    half = quantized_alike(source, whole, tmp_path)
    assert json.loads((half / "config.json").read_text())["architectures"] == ["Gemma3ForCausalLM"]


def test_a_published_model_with_a_vision_tower(tmp_path: Path) -> None:
    """Its config.json says only what differs from the defaults."""
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "boi_token_index": 255999,
        "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "text_config": text, "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1152, "patch_size": 14},
    }))  # fmt: skip
    arch = read_architecture(tmp_path)
    kinds = [(own.window, own.rope, own.head_dim) for own in arch.attentions.values()]
    assert kinds == ([(1024, "sliding_attention", 256)] * 5 + [(None, "full_attention", 256)]) * 5 + kinds[:4]
    assert arch.embedding_factor(torch.bfloat16) == 50.5  # of 50.596
    local, far = (rotary(arch.config, 9, entry) for entry in ("sliding_attention", "full_attention"))
    assert local is not None
    assert far is not None
    assert torch.allclose(far[0][0, 8, 0], local[0][0, 1, 0])  # positions count an eighth


def test_a_window_that_holds_every_context_leaves_the_rotary_base(tmp_path: Path) -> None:
    """`layer_types` of a checkpoint choose the base as well."""
    arch = read_architecture(source_model(tmp_path / "m", "gemma3", sliding_window=512))
    assert [kind.attention.window for kind in arch.kinds] == [None, None]  # type: ignore[union-attr]
    assert arch.served["layer_types"] == ["sliding_attention", "full_attention"]


def test_hardening_keeps_the_function(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        before = model(TOKENS[None]).logits
        harden(model)
        after = model(TOKENS[None]).logits
    assert (after - before).norm() < 1e-4 * before.norm()
