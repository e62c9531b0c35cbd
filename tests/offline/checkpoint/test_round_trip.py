"""What is written of a recipe and its transforms, read again: the same values, field by field and tensor by tensor."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rotquant.checkpoint import stored, writer
from rotquant.checkpoint.extension import BasisFile
from rotquant.checkpoint.format import CheckpointFormat, LinearFormat
from rotquant.checkpoint.packed import PackedLinear, pack
from rotquant.checkpoint.source import Source, save_tensors
from rotquant.checkpoint.targets import check_targets
from rotquant.models import Architecture, Layer, Tensors, describe, read_config
from rotquant.recipe import Activations, KVCache, LMHead, Recipe, Weights
from rotquant.transforms.space import LayerTransforms, Transforms
from rotquant_kernels import Stage, convention
from rotquant_kernels.formats import RowFormat, WeightFormat
from source_models import FAMILIES, KINDS

SIZES = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128,
}  # fmt: skip
KINDS_OF_STAGES = ("dense", "kronecker", "permutation", "reflection", "shift")
BASIS = BasisFile(file="rotquant_basis.safetensors", sha256="0" * 64)
PROVENANCE = {"recipe": {"name": "drawn"}, "seed": 5}


class Drawn(NamedTuple):
    recipe: Recipe
    transforms: Transforms
    profile: str


@cache
def architecture(kind: str) -> Architecture:
    config_class, model_class, extra = (KINDS | FAMILIES)[kind]
    config = config_class(**(SIZES | extra))
    config.architectures = [model_class.__name__]
    return describe(config)


ratios = st.floats(0.01, 1.0)
recipes = st.builds(
    Recipe,
    name=st.just("drawn"),
    description=st.just(""),
    weights=st.builds(
        Weights, bits=st.sampled_from((4, 8)), group_size=st.sampled_from((0, 16, 64)), rank=st.sampled_from((0, 3))
    ),
    activations=st.builds(Activations, bits=st.sampled_from((4, 8)), symmetric=st.booleans(), clip=ratios),
    kv=st.builds(KVCache, bits=st.sampled_from((4, 16)), symmetric=st.booleans(), key_clip=ratios, value_clip=ratios),
    lm_head=st.builds(LMHead, bits=st.sampled_from((8, 16))),
)


@st.composite
def drawn(draw: Any, arch: Architecture) -> Drawn:
    recipe: Recipe = draw(recipes)
    profile = draw(st.sampled_from(("full", "full", "portable")))
    recipe = recipe.for_profile(profile)
    full, random = profile == "full", torch.Generator().manual_seed(draw(st.integers(0, 99)))
    chains = {site: draw(st.lists(st.sampled_from(KINDS_OF_STAGES), max_size=3, unique=True)) for site in SITES}
    r4, clipped = full and draw(st.booleans()), set(draw(st.lists(st.sampled_from((*SITES, "key", "value")))))
    layers = []
    for kind in arch.kinds:
        made = LayerTransforms()
        for site in SITES:
            first = [Stage("hadamard", 16)] if r4 and site == "down" else []
            own = [stage_of(name, kind.shapes[kind.sites[site][0]][1], random) for name in chains[site]]
            made.inputs[site] = first + (own if full else [])
        if full:
            made.clips = {name: draw(ratios) for name in sorted(clipped)}
        layers.append(made)
    r3 = arch.head_dim if recipe.kv.bits == 4 and draw(st.booleans()) else 0
    return Drawn(recipe, Transforms(None, r3, layers), profile)


SITES = ("attn", "o", "mlp", "down")


def stage_of(kind: str, width: int, random: torch.Generator) -> Stage:
    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64)

    match kind:
        case "dense":
            return Stage(kind, 16, normal(16, 16))
        case "kronecker":
            return Stage(kind, 8, normal((width // 8) ** 2 + 64))
        case "permutation":
            return Stage(kind, width, torch.randperm(width, generator=random))
        case "reflection":
            return Stage(kind, width, torch.nn.functional.normalize(normal(width), dim=0))
    return Stage(kind, width, normal(width))


def quantized(recipe: Recipe, kind: Layer, transforms: LayerTransforms, index: int) -> Tensors:
    """A layer as the quantizer hands it on: drawn codes, scales and factors, shifts beside the linears."""
    random = torch.Generator().manual_seed(index)
    others = {f"{norm}.weight": torch.randn(kind.hidden, generator=random) for norm in kind.norms.values()}
    low, high = convention.int_range(recipe.weights.bits)
    parts = {}
    for linear, (rows, width) in kind.shapes.items():
        codes = torch.randint(low, high + 1, (rows, width), generator=random).to(torch.int8)
        scale = torch.rand(rows, width // (recipe.weights.group_size or width), generator=random) + 0.1
        rank = recipe.weights.rank
        factors = [torch.randn(*size, generator=random) for size in ((width, rank), (rank, rows))] if rank else []
        parts[linear] = pack(codes, scale, recipe.weights.form, *factors)
        if any(stage.kind == "shift" for stage in transforms.inputs[kind.site_of[linear]]):
            others[f"{linear}.shift"] = torch.randn(rows, generator=random)
    out = kind.join(others)
    for name, held in kind.stored.items():
        out |= PackedLinear.stacked([parts[part] for part in held]).tensors(name, torch.float32)
    return out


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_written_is_what_is_read(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    arch = architecture(kind)
    recipe, transforms, profile = data.draw(drawn(arch))
    layers = [quantized(recipe, layer, transforms.layers[i], i) for i, layer in enumerate(arch.kinds)]
    arch.config.save_pretrained(tmp_path)
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    writer.write_config(
        tmp_path, out, arch, writer.quantization_config(recipe, arch, transforms),
        writer.extension(recipe, arch, transforms, profile, BASIS, PROVENANCE),
    )  # fmt: skip
    written = {
        arch.layer_prefix(i) + name: tensor
        for i, layer in enumerate(arch.kinds)
        for name, tensor in writer.layer_tensors(layers[i], layer, transforms, i).items()
    }
    save_tensors(out / "model.safetensors", written)

    form, source = CheckpointFormat.of(read_config(out)), Source(out)
    check_targets(form, arch)
    extension = form.extension
    assert (extension.profile, extension.basis, extension.provenance) == (profile, BASIS, PROVENANCE)
    head, act = form.linear("lm_head"), recipe.activations
    assert head == (LinearFormat(WeightFormat(8), RowFormat(8)) if recipe.lm_head.bits == 8 else None)
    taken: set[str] = set()
    for index, layer in enumerate(arch.kinds):
        prefix, found = arch.layer_prefix(index), transforms.layers[index]
        kv, clips = form.attention(prefix + layer.attention.module), found.clips
        if recipe.kv.bits == 16:
            assert kv is None
        else:
            wanted = clips.get("key", recipe.kv.key_clip), clips.get("value", recipe.kv.value_clip)
            assert kv is not None
            assert (kv.symmetric, kv.k_clip, kv.v_clip, kv.rotate) == (recipe.kv.symmetric, *wanted, transforms.r3)
        for name, parts in layer.stored.items():
            site, full_name = layer.site_of[parts[0]], prefix + name
            linear = form.linear(full_name)
            assert linear is not None
            assert linear.weights == WeightFormat(recipe.weights.bits, recipe.weights.group_size)
            assert linear.rows == RowFormat(act.bits, act.symmetric, clips.get(site, act.clip))
            assert linear.rank == recipe.weights.rank * len(parts)
            assert len(linear.transforms) == len(found.inputs[site])
            for transform, stage in zip(linear.transforms, found.inputs[site], strict=True):
                assert transform.kind == stage.kind
                width = layer.stored_shape(name)[1]
                if stage.kind != "shift":
                    assert transform.block == stage.block
                if stage.tensor is None:
                    continue
                where = f"{full_name}.{transform.name}_input.weight"
                assert torch.equal(stored.check(where, transform, source.get(where), width), exact(stage.tensor))
                taken.add(where)
                if stage.kind == "shift":
                    where = f"{full_name}.{transform.name}_output.weight"
                    assert torch.equal(source.get(where), layers[index][f"{name}.shift"])
                    taken.add(where)
        same = {prefix + name: tensor for name, tensor in layers[index].items() if not name.endswith(".shift")}
        for name, tensor in same.items():
            assert torch.equal(source.get(name), tensor), name
        taken |= same.keys()
    marker = {f"{arch.layer_prefix(0)}{arch.kinds[0].mlp.down}.R4_input.weight"} if transforms.r4_block else set()
    assert source.files.keys() == taken | marker


def exact(tensor: Tensor) -> Tensor:
    return tensor.int() if tensor.dtype == torch.int64 else tensor.float()
