"""Folding and its gate: a folded model computes what the original does, and the gate notices when not."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drawn_transforms import everything
from rotquant.checkpoint.original import read_original
from rotquant.checkpoint.source import Source
from rotquant.errors import RotQuantError
from rotquant.gate import check_equivalence
from rotquant.learn.initial import initial_transforms
from rotquant.models import read_architecture
from rotquant.models.decoder import decoders
from rotquant.recipes import load_recipe
from rotquant.transforms import fold as fold_module
from rotquant.transforms.fold import Fold, fold_layer
from rotquant.transforms.space import LayerTransforms
from source_models import KINDS, source_model

TOKENS = torch.arange(3, 51)


def gate(folder, recipe="quarot", tp_max=1, change=lambda transforms: None):
    chosen = load_recipe(recipe)
    arch, source = read_original(folder)
    transforms = initial_transforms(chosen, arch, tp_max, seed=1)
    change(transforms)
    return check_equivalence(source, arch, Fold(arch, transforms), TOKENS, lambda _: None)


@pytest.mark.parametrize("hardened", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_folded_logits_equal_the_original(tmp_path, kind, hardened):
    assert gate(source_model(tmp_path / "m", kind, hardened=hardened)) < 1e-4


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_with_every_bias_and_tp_blocks(tmp_path, kind):
    extra = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    assert gate(source_model(tmp_path / "m", kind, **extra), tp_max=2) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_every_transform_at_once_changes_nothing(tmp_path, kind):
    extra = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    folder = source_model(tmp_path / "m", kind, **extra)
    arch, random = read_architecture(folder), torch.Generator().manual_seed(2)

    def change(transforms):
        transforms.layers = [everything(layer, random) for layer in arch.kinds]

    assert gate(folder, change=change) < 1e-4


PARTS = ("r2", "s_attn", "s_mlp", "s_ov", "s_ud", "s_qk", "order")


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    """Decoder and tensors of a layer, and an input, float32."""
    folder = source_model(tmp_path_factory.mktemp("one") / "m", "qwen2")
    arch = read_architecture(folder)
    tensors = Source(folder).layer(arch.layer_prefix(0))
    h = torch.randn(12, arch.hidden_size, generator=torch.Generator().manual_seed(1))
    return decoders(arch, 12)[0], tensors, h


@settings(max_examples=25, deadline=None)
@given(part=st.sampled_from([*PARTS, "attn", "o", "mlp", "down"]), seed=st.integers(0, 2**31))
def test_each_identity_alone(layer, part, seed):
    """The algebra in `fold`'s docstring, one line at a time."""
    decoder, tensors, h = layer
    full = everything(decoder.kind, torch.Generator().manual_seed(seed))
    one = LayerTransforms(**{part: getattr(full, part)}) if part in PARTS else LayerTransforms(
        inputs={part: full.inputs[part]}
    )  # fmt: skip
    expected = decoder.layer(tensors, h, decoder.float_linear(tensors))
    folded = fold_layer(tensors, one, decoder.kind)
    assert (
        decoder.layer(folded, h, decoder.float_linear(folded, one.inputs)) - expected
    ).norm() < 1e-4 * expected.norm()


def test_transforms_come_back_from_a_file(layer):
    made = everything(layer[0].kind, torch.Generator().manual_seed(3))
    made = replace(made, clips={"attn": 0.9, "key": 0.8}, weight_clips={"mlp.up_proj": torch.rand(3, 1)})
    back = LayerTransforms.from_tensors(made.tensors())
    assert back.clips == made.clips
    assert back.tensors().keys() == made.tensors().keys()
    assert all(torch.equal(t, made.tensors()[name]) for name, t in back.tensors().items())
    assert [s.kind for s in back.inputs["down"]] == ["hadamard", "shift", "permutation", "dense"]


def test_folding_passes_gradients(layer):
    decoder, tensors, _ = layer
    scale = torch.ones(decoder.kind.mlp.width, requires_grad=True)
    folded = fold_layer(tensors, LayerTransforms(s_ud=scale), decoder.kind)
    folded["mlp.down_proj.weight"].square().sum().backward()
    assert torch.allclose(scale.grad, -2 * tensors["mlp.down_proj.weight"].square().sum(0), rtol=1e-4)


@pytest.mark.parametrize("step", ["fold_r2", "fold_r1"])
def test_the_gate_refuses_a_wrong_fold(tmp_path, monkeypatch, step):
    right = getattr(fold_module, step)

    def wrong(tensors, *arguments):
        result = right(tensors, *arguments)
        changed = tensors if result is None else result
        changed["self_attn.v_proj.weight"] = changed["self_attn.v_proj.weight"] * 1.01
        return result

    monkeypatch.setattr(fold_module, step, wrong)
    with pytest.raises(RotQuantError, match="layer 0 of the folded model differs"):
        gate(source_model(tmp_path / "m", "llama"))


def test_embeddings_are_rotated_and_not_centred(tmp_path):
    folder = source_model(tmp_path / "m", "llama")
    arch, recipe = read_architecture(folder), load_recipe("quarot")
    fold = Fold(arch, initial_transforms(recipe, arch, 1, seed=1))
    weight = Source(folder).get(arch.names.embedding)
    rotation = fold.r1.rows(torch.eye(arch.hidden_size, dtype=torch.float64))
    assert torch.allclose(fold.embedding(weight) @ rotation.T, weight.double(), atol=1e-10)


def test_every_seed_has_rotations_of_its_own(tmp_path):
    arch, recipe = read_architecture(source_model(tmp_path / "m", "llama")), load_recipe("quarot")
    made = [initial_transforms(recipe, arch, 1, seed) for seed in (0, 1, 1)]
    eye = torch.eye(arch.hidden_size, dtype=torch.float64)
    assert not torch.equal(made[0].r1.rows(eye), made[1].r1.rows(eye))
    assert not torch.equal(made[0].layers[0].r2, made[1].layers[0].r2)
    assert not torch.equal(made[1].layers[0].r2, made[1].layers[1].r2)
    assert torch.equal(made[1].r1.rows(eye), made[2].r1.rows(eye))


def test_r4_block_divides_every_shard(tmp_path):
    arch = read_architecture(source_model(tmp_path / "m", "llama", intermediate_size=192))
    recipe = load_recipe("quarot")
    blocks = [initial_transforms(recipe, arch, tp, 0).shared_chain("down")[0].block for tp in (1, 2, 4, 3)]
    assert blocks == [64, 32, 16, 64]
    with pytest.raises(RotQuantError, match="tp-max 5 does not divide intermediate_size 192"):
        initial_transforms(recipe, arch, 5, 0)
