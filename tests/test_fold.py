"""Folding and its gate: a folded model computes what the original does, and the gate notices when not."""

import pytest
import torch

from rotquant import fold as fold_module
from rotquant.checkpoint import Source
from rotquant.errors import RotQuantError
from rotquant.fold import Fold, Online, online_transforms
from rotquant.gate import check_equivalence
from rotquant.models import EMBEDDING, LM_HEAD, expected_shapes, read_architecture
from rotquant.recipe import load_recipe
from source_models import source_model
from tiny_checkpoints import KINDS

TOKENS = torch.arange(3, 51)


def gate(folder, recipe="quarot", tp_max=1):
    arch, chosen = read_architecture(folder), load_recipe(recipe)
    source = Source(folder)
    source.check(expected_shapes(arch.config), [LM_HEAD])
    fold = Fold(chosen, arch, online_transforms(chosen, arch, tp_max), seed=1)
    return check_equivalence(source, arch, fold, TOKENS, lambda _: None)


@pytest.mark.parametrize("hardened", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_folded_logits_equal_the_original(tmp_path, kind, hardened):
    assert gate(source_model(tmp_path / "m", kind, hardened=hardened)) < 1e-4


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_with_every_bias_and_tp_blocks(tmp_path, kind):
    extra = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    assert gate(source_model(tmp_path / "m", kind, **extra), tp_max=2) < 1e-4


@pytest.mark.parametrize("step", ["_fold_gain", "_fold_r2"])
def test_the_gate_refuses_a_wrong_fold(tmp_path, monkeypatch, step):
    right = getattr(Fold, step)

    def wrong(self, out, *arguments):
        right(self, out, *arguments)
        out["self_attn.v_proj.weight"][0] *= 1.01

    monkeypatch.setattr(fold_module.Fold, step, wrong)
    with pytest.raises(RotQuantError, match="layer 0 of the folded model differs"):
        gate(source_model(tmp_path / "m", "llama"))


def test_embeddings_are_rotated_and_not_centred(tmp_path):
    folder = source_model(tmp_path / "m", "llama")
    arch, recipe = read_architecture(folder), load_recipe("quarot")
    fold = Fold(recipe, arch, Online(32, 16), seed=1)
    weight = Source(folder).get(EMBEDDING)
    rotation = fold.r1.rows(torch.eye(arch.hidden_size, dtype=torch.float64))
    assert torch.allclose(fold.embedding(weight) @ rotation.T, weight.double(), atol=1e-10)


def test_r4_block_divides_every_shard(tmp_path):
    arch = read_architecture(source_model(tmp_path / "m", "llama", intermediate_size=192))
    recipe = load_recipe("quarot")
    assert [online_transforms(recipe, arch, tp).r4 for tp in (1, 2, 4, 3)] == [64, 32, 16, 64]
    with pytest.raises(RotQuantError, match="tp-max 5 does not divide intermediate_size 192"):
        online_transforms(recipe, arch, 5)
