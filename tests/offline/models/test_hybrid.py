"""Linear and gated attention: what folds, what does not, what stays as it is, and what recipes become."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import rotquant
from drawn_transforms import everything, random_orthogonal
from rotquant.checkpoint.source import Source
from rotquant.errors import RotQuantError
from rotquant.fitting import fitted
from rotquant.gate import check_equivalence
from rotquant.learn.initial import initial_transforms
from rotquant.models import read_architecture
from rotquant.models.delta import DeltaNet
from rotquant.models.harden import harden
from rotquant.pipeline import quantize
from rotquant.recipes import load_recipe
from rotquant.transforms.dense import Dense
from rotquant.transforms.fold import Fold
from rotquant.transforms.space import LayerTransforms, Transforms
from rotquant_kernels import Stage
from source_models import VOCABULARY, all_candidates, source_model

TOKENS = torch.arange(3, 83)
FINE = ["weights.bits=8", "activations.bits=8", "activations.clip=1.0", "kv.bits=16", "kv.key_feedback=false"]
QUICK: dict[str, Any] = {"samples": 4, "seq_len": 64}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of bfloat16 as published ones, but for float32 A_log, and with an MTP head."""
    folder = source_model(
        tmp_path_factory.mktemp("hybrid") / "source", "qwen3_5", dtype=torch.bfloat16, shard_size="1GB"
    )
    tensors = load_file(folder / "model.safetensors")
    slope = "model.layers.0.linear_attn.A_log"
    tensors[slope] = tensors[slope].float() + 1e-3
    tensors["mtp.fc.weight"] = torch.randn(8, 16, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def distance(source: Path, r1: Tensor | None, layers: list[LayerTransforms]) -> float:
    arch = read_architecture(source)
    fold = Fold(arch, Transforms(r1 if r1 is None else Dense(r1), 0, layers))
    return check_equivalence(Source(source), arch, fold, TOKENS, lambda _: None)


def test_each_fold_alone_changes_nothing(source: Path) -> None:
    """The gain of 1 + w and R1 into all that reads the stream, a and b among it; scales through the gate."""
    kinds, random = read_architecture(source).kinds, torch.Generator().manual_seed(1)
    drawn = [everything(kind, random) for kind in kinds]
    assert distance(source, random_orthogonal(96, random), [LayerTransforms() for _ in kinds]) < 1e-5
    for name in ("s_attn", "s_mlp", "s_ov", "s_qk", "s_ud", "inputs"):
        alone = [LayerTransforms(**{name: getattr(one, name)}) for one in drawn]
        assert any(getattr(one, name) is not None for one in alone)
        assert distance(source, None, alone) < 1e-4, name


def test_r2_behind_a_gate_is_no_identity(source: Path) -> None:
    a, random = read_architecture(source).kinds[1].attends, torch.Generator().manual_seed(1)
    assert a is not None
    r2 = random_orthogonal(a.head_dim, random).expand(a.kv_heads, -1, -1)
    with pytest.raises(RotQuantError, match="layer 1 of the folded model differs"):
        distance(source, None, [LayerTransforms(), LayerTransforms(r2=r2)])


def test_what_is_not_quantized_stays(source: Path, tmp_path: Path) -> None:
    """Bit for bit: also the gains, of which files hold the part above 1, where nothing is folded into them."""
    out = quantize(str(source), tmp_path / "out", recipe="rtn", **QUICK)
    original, made = Source(source), Source(out)
    arch = read_architecture(source)
    delta = arch.kinds[0].attention
    assert isinstance(delta, DeltaNet)
    kept = [f"model.layers.0.{name}" for name in delta.kept]
    kept += [arch.layer_prefix(i) + name for i, kind in enumerate(arch.kinds) for name in kind.gains]
    for name in (*kept, "model.norm.weight", "mtp.fc.weight"):
        assert torch.equal(made.get(name), original.get(name)), name
        assert made.get(name).dtype == original.get(name).dtype, name
    assert made.shapes["model.layers.0.linear_attn.in_proj_a.weight"] == (4, 96)
    assert rotquant.load(out).model.layers[0].linear_attn.A_log.dtype == torch.float32


def test_the_text_half_of_a_model_with_a_vision_tower(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files say `model.language_model.` and keep the text's config inside: the same checkpoint comes out."""
    whole = shutil.copytree(source, tmp_path / "whole")
    tensors = {n.replace("model.", "model.language_model.", 1) if n.startswith("model.") else n: t
               for n, t in load_file(source / "model.safetensors").items()}  # fmt: skip
    tensors["model.visual.patch_embed.proj.weight"] = torch.ones(4, 4)
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((source / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({
        "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "tie_word_embeddings": False,
        "text_config": {name: value for name, value in text.items() if name != "architectures"}, "vision_config": {},
    }))  # fmt: skip
    nearest = ["weights.method=rtn"]  # no calibration, whose text each model's own tokenizer would cut
    alone, half = (
        quantize(str(folder), tmp_path / f"{folder.name}-out", recipe="quarot", settings=nearest)
        for folder in (source, whole)
    )
    assert "left out, the result is a model of text: 1 tensors that begin with model.visual." in capsys.readouterr().err
    one, other = Source(alone), Source(half)
    assert one.files.keys() == other.files.keys()
    assert [name for name in one.files if not torch.equal(one.get(name), other.get(name))] == []
    configs = [json.loads((folder / "config.json").read_text()) for folder in (alone, half)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert configs[1]["architectures"] == ["Qwen3_5ForCausalLM"]
    assert configs[1]["model_type"] == "qwen3_5_text"


def test_recipes_become_what_the_model_has(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arch = read_architecture(source)
    learns_both = load_recipe("quarot", ["learn.surrogate={targets: [r1, r2], objective: clip}"])
    made = fitted(learns_both, arch)
    assert made.rotations.r2 == "none"
    assert made.learn.surrogate is not None
    assert made.learn.surrogate.targets == ["r1"]
    assert "R2 is not folded: a Hadamard runs online in front of o" in capsys.readouterr().err
    for index, layer in enumerate(initial_transforms(made, arch, 2, 0).layers):
        assert layer.inputs["o"] == [Stage("hadamard", 64)], index  # of 256 and 128 inputs, halves on two ranks
        assert layer.r2 is None
    assert not fitted(made.for_profile("portable"), arch).online.o
    llama = read_architecture(source_model(tmp_path / "llama", "llama"))
    assert fitted(learns_both, llama) is learns_both
    with pytest.raises(RotQuantError, match=r"online\.o is \['heads'\], which needs the same inputs .* 128 and 256"):
        fitted(load_recipe("flatquant"), arch)


@pytest.mark.parametrize("recipe", ["best", "flatquant", "spinquant"])
def test_every_way_of_learning_computes_the_same_function(source: Path, tmp_path: Path, recipe: str) -> None:
    """Where rounding is fine the checkpoint's logits are the model's: surrogate, tuning, blockwise, end to end."""
    short = {
        "flatquant": ["learn.blockwise.epochs=1", "online.o=[]"],
        "spinquant": ["learn.end_to_end.steps=2", "learn.end_to_end.batch=1"],
    }
    quick = ["learn.surrogate.steps=10"] if recipe.startswith("best") else []
    settings = [*all_candidates(recipe), *quick, *short.get(recipe, []), *FINE]
    out = quantize(str(source), tmp_path / "out", recipe=recipe, settings=settings, **QUICK)
    assert relative(rotquant.load(out), source) < 0.15  # above 1 where something is not undone


def test_the_portable_profile_is_transformers_own(source: Path, tmp_path: Path) -> None:
    out = quantize(str(source), tmp_path / "out", profile="portable", recipe="quarot", settings=FINE[:2], **QUICK)
    assert relative(AutoModelForCausalLM.from_pretrained(out), source) < 0.2  # above 1 where something is not undone


def test_hardening_changes_nothing(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        before = model(TOKENS[None]).logits
        gain = model.model.layers[0].input_layernorm.weight.clone()
        harden(model)
        after = model(TOKENS[None]).logits
        assert (model.model.layers[0].input_layernorm.weight - gain).abs().max() > 10
    assert (after - before).norm() < 1e-4 * before.norm()


def relative(model: Any, source: Path) -> float:
    """Distance of logits from those of the original."""
    tokens = torch.randint(VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(0))
    original = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        got, expected = (one(tokens).logits.float() for one in (model, original))
    return ((got - expected).norm() / expected.norm()).item()
