"""LoRA adapters: a turned adapter does to the folded model what it did to the original; all else is refused."""

import json
import shutil
from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from drawn_transforms import everything, random_orthogonal
from lora_adapters import NAMES, changes, edit_adapter, write_adapter
from rotquant.basis.peft_adapter import LoRAAdapter, targeted
from rotquant.basis.sidecar import FILE, Basis
from rotquant.basis.turn_adapter import turn
from rotquant.checkpoint.source import Source, file_digest
from rotquant.cli import main
from rotquant.errors import RotQuantError
from rotquant.models import read_architecture, read_config
from rotquant.models.decoder import decoders
from rotquant.pipeline import quantize
from rotquant.transforms.dense import Dense
from rotquant.transforms.fold import Fold
from rotquant.transforms.space import LayerTransforms, Transforms
from source_models import KINDS, source_model

ADAPTERS = [
    {},
    {"use_rslora": True, "rank_pattern": {"k_proj": 6}, "alpha_pattern": {"down_proj": 3, "v_proj": 0.5}},
    {"names": ["v_proj", "down_proj"], "layers_to_transform": [0, 1]},
    {"target_modules": r".*\.(q|k|v|o|gate|up|down)_proj"},
]


def linear_with(decoder, tensors, transforms, prefix, changed):
    """The linears of a layer with the adapter beside them: it reads what they are given."""
    plain = decoder.float_linear(tensors, transforms and transforms.inputs)
    own = {name.removeprefix(prefix): factors for name, factors in changed.items() if name.startswith(prefix)}
    factors = decoder.kind.split({f"{n}.lora_{x}": f for n, ba in own.items() for x, f in zip("BA", ba, strict=True)})

    def linear(name, x):
        if f"{name}.lora_A" not in factors:
            return plain(name, x)
        return plain(name, x) + x @ factors[f"{name}.lora_A"].to(x).T @ factors[f"{name}.lora_B"].to(x).T

    return linear


HYBRID = {"names": [*NAMES, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]}
FUSED = {"names": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}


OTHERS = [
    ("phi3", FUSED),
    ("gemma3", {}),
    ("gemma4", {"names": ["q_proj", "k_proj", "down_proj"]}),
    ("qwen3_5", HYBRID),
]


@pytest.mark.parametrize(("kind", "config"), [*product(KINDS, ADAPTERS), *OTHERS])
def test_a_turned_adapter_does_the_same(tmp_path, kind, config):
    """Every transform of the design space at once; the basis comes from its file."""
    extra = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    folder = source_model(tmp_path / "m", kind, **extra)
    arch, source, random = read_architecture(folder), Source(folder), torch.Generator().manual_seed(2)
    layers = [everything(layer, random) for layer in arch.kinds]
    r1 = Dense(random_orthogonal(arch.hidden_size, random)) if arch.rotates else None
    transforms = Transforms(r1, 0, layers)
    stated = Basis.of(source, arch, transforms).write(tmp_path)
    arch.config.rotquant = {"basis": stated.model_dump()}
    basis = Basis.read(tmp_path, arch.config)
    adapter = write_adapter(tmp_path / "a", AutoModelForCausalLM.from_pretrained(folder), **config)
    turned = turn(LoRAAdapter.read(adapter, arch), basis)
    before, prefixes = changes(adapter), map(arch.layer_prefix, range(arch.layers))
    for prefix, kind in zip(prefixes, arch.kinds, strict=True):  # what changes keys changes values made by their linear
        before |= {prefix + value: before[prefix + key] for value, key in kind.copies.items()}
    assert {name for name in before if targeted(turned.config, name)} == before.keys()
    after = {
        name: (turned.scaling(name) * turned.factors[f"{name}.lora_B"], turned.factors[f"{name}.lora_A"])
        for name in before
    }
    fold, h = Fold(arch, transforms), torch.randn(12, arch.hidden_size, generator=random)
    stream = r1.rows if r1 else lambda rows: rows
    for index, decoder in enumerate(decoders(arch, 12)):
        prefix = arch.layer_prefix(index)
        tensors = decoder.kind.split(source.layer(prefix))
        expected = decoder.layer(tensors, h, linear_with(decoder, tensors, None, prefix, before))
        plain = decoder.layer(tensors, h, decoder.float_linear(tensors))
        folded = {name: t.float() for name, t in fold.layer(tensors, index).items()}
        got = decoder.layer(folded, stream(h), linear_with(decoder, folded, layers[index], prefix, after))
        assert (got - stream(expected)).norm() < 1e-4 * expected.norm()
        assert (plain - expected).norm() > 0.05 * expected.norm()


WHOLE = {
    "r": 4, "rank_pattern": {r"language_model\.(model\.)?layers\.1\.self_attn\.k_proj": 6},
    "alpha_pattern": {"v_proj": 3},
    "target_modules": r".*language_model.*\.(q|k|v|o)_proj",
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_an_adapter_of_a_whole_model_is_one_of_its_text_half(tmp_path, prefix):
    """As the same factors under the text half's names; none of another part."""
    folder = source_model(tmp_path / "m", "gemma3")
    arch, model = read_architecture(folder), AutoModelForCausalLM.from_pretrained(folder)
    plain = write_adapter(tmp_path / "plain", model, names=["q_proj", "k_proj", "v_proj", "o_proj"])
    whole = shutil.copytree(plain, tmp_path / "whole")

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("base_model.model.model.", f"base_model.model.{prefix}")] = tensors.pop(name)
        for factor, shape in (("A", (6, 128)), ("B", (64, 6))):
            name = f"base_model.model.{prefix}layers.1.self_attn.k_proj.lora_{factor}.weight"
            tensors[name] = torch.ones(shape)

    edit_adapter(whole, WHOLE, rename)
    read, expected = LoRAAdapter.read(whole, arch), LoRAAdapter.read(plain, arch)
    assert read.factors.keys() == expected.factors.keys()
    same = "model.layers.0.mlp.", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
    assert all(torch.equal(read.factors[n], t) for n, t in expected.factors.items() if n.startswith(same))
    names = [f"model.layers.1.self_attn.{x}_proj" for x in "qkv"]
    assert [read.scaling(name) for name in names] == [2.0, 8 / 6, 3 / 4]
    basis = Basis(arch, Transforms(None, 0, [LayerTransforms() for _ in arch.kinds]), [{}, {}], torch.ones(128), "x")
    turned = turn(read, basis)
    save_file({n: t.contiguous() for n, t in turned.tensors().items()}, whole / "adapter_model.safetensors")
    (whole / "adapter_config.json").write_text(json.dumps(turned.config))
    again = LoRAAdapter.read(whole, arch)
    assert turn(again, basis) is again
    assert [again.scaling(name) for name in names] == [2.0, 8 / 6, 3 / 4]
    tower = "base_model.model.model.vision_tower.layers.0.self_attn.q_proj.lora_A.weight"
    every = {"target_modules": [f"{x}_proj" for x in "qkvo"]}
    edit_adapter(whole, every, lambda tensors: tensors.update({tower: torch.ones(4, 8)}))
    with pytest.raises(RotQuantError, match=r"vision_tower.* adapts a part of the model that is left out: train with"):
        LoRAAdapter.read(whole, arch)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An original with an adapter of it, and its checkpoint."""
    folder = tmp_path_factory.mktemp("adapter")
    source_model(folder / "m", "llama")
    write_adapter(folder / "a", AutoModelForCausalLM.from_pretrained(folder / "m"), size=0.5)
    quantize(str(folder / "m"), folder / "out", recipe="quarot", settings=["weights.method=rtn"])
    return folder


def test_the_command_turns_it_for_one_checkpoint(made, tmp_path, capsys):
    base = ["--base", str(made / "out"), "-o"]
    assert main(["adapter", str(made / "a"), *base, str(tmp_path / "t")]) == 0
    assert f"--lora-modules NAME={tmp_path / 't'}" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.rglob("*.*")) == ["adapter_config.json", "adapter_model.safetensors"]
    before, after = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (made / "a", tmp_path / "t")
    )
    basis = Basis.read(made / "out", read_config(made / "out"))
    assert after == before | {"rotquant_basis": basis.sha256, "base_model_name_or_path": str(made / "out")}
    assert (
        load_file(tmp_path / "t" / "adapter_model.safetensors").keys()
        == load_file(made / "a" / "adapter_model.safetensors").keys()
    )
    turned = LoRAAdapter.read(tmp_path / "t", basis.arch)
    assert turn(turned, basis) is turned
    for again, message in (
        (
            ["adapter", str(tmp_path / "t"), "--base", str(made / "out"), "-o", str(tmp_path / "u")],
            "already turned for",
        ),
        (["adapter", str(made / "a"), *base, str(tmp_path / "t")], "output folder exists"),
    ):
        assert main(again) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(RotQuantError, match="was turned for another checkpoint; take the original model's adapter"):
        turn(turned, replace(basis, sha256="0" * 64))


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
HEAD = "base_model.model.lm_head.lora_A.weight"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', only LORA"),
        ({"use_dora": True}, "use_dora is True: DoRA scales"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is ['lm_head']: it replaces whole modules"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which also changes the base"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is [[0, 2], [1, 2]]"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is [3]"),
        ({"use_quantum": True}, "use_quantum is True, which this build of rotquant does not know"),
        ({"r": 0}, "r is 0, not a positive integer"),
        ({"r": True}, "r is True, not a positive integer"),
        ({"r": 8}, "has shape [4, 176], adapter_config.json and the model ask for [8, 176]"),
        ({"rank_pattern": {"q_proj": 2}}, "has shape [4, 96], adapter_config.json and the model ask for [2, 96]"),
        ({"rank_pattern": [2]}, "rank_pattern is [2], not an object"),
        ({"lora_alpha": None}, "lora_alpha is None, not a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, not a number"),
        ({"alpha_pattern": {"q_proj": "16"}}, "alpha_pattern.q_proj is '16', not a number"),
        ({"alpha_pattern": {"q_(proj": 16}}, "alpha_pattern: 'q_(proj' is not a regular expression"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', not a bool"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": ["v_proj"]}, "down_proj.lora_A.weight belongs to a linear that adapter_config.json does"),
        ({"target_modules": "[q"}, "target_modules: '[q' is not a regular expression"),
        ({"exclude_modules": ["down_proj"]}, "down_proj.lora_A.weight belongs to a linear that"),
        ({"layers_to_transform": 0}, "model.layers.1."),
        ({"layers_to_transform": ["0"]}, "layers_to_transform is ['0'], not a list of numbers"),
        ({"layers_pattern": "layers"}, "layers_pattern is 'layers' without layers_to_transform"),
        ({"layers_to_transform": [0, 1], "layers_pattern": "blocks"}, "belongs to a linear that"),
        ({"rotquant_basis": 5}, "rotquant_basis is 5, not a str"),
    ],
)
def test_configs_that_are_refused(made, tmp_path, config, message):
    shutil.copytree(made / "a", tmp_path / "a")
    edit_adapter(tmp_path / "a", config=config)
    refused(made, tmp_path / "a", message)


def nan(tensors):
    tensors[FIRST][0, 0] = torch.nan


def renamed(new):
    return lambda tensors: tensors.__setitem__(new, tensors.pop(FIRST))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nan, f"{FIRST} holds NaN or infinite values"),
        (lambda tensors: tensors.__setitem__(FIRST, tensors[FIRST].double()), "has dtype torch.float64"),
        (lambda tensors: tensors.__setitem__(FIRST, tensors[FIRST][:, :-1]), "has shape [4, 95]"),
        (lambda tensors: tensors.pop(FIRST), f"{FIRST} is missing"),
        (lambda tensors: tensors.clear(), "holds no tensor"),
        (renamed(HEAD), f"{HEAD} adapts the output layer, which is not turned: train with LoRA on the linears"),
        (renamed("base_model.model.model.embed_tokens.lora_embedding_A"), "adapts the embeddings"),
        (renamed("base_model.model.model.norm.weight"), "adapts a norm"),
        (renamed(FIRST.replace("lora_A", "lora_magnitude_vector")), "is DoRA's magnitude"),
        (renamed(FIRST.replace("layers.0", "layers.2")), "is not a factor of a linear of this model"),
        (renamed(FIRST.replace("q_proj", "qkv_proj")), "is not a factor of a linear of this model"),
    ],
)
def test_factors_that_are_refused(made, tmp_path, change, message):
    shutil.copytree(made / "a", tmp_path / "a")
    edit_adapter(tmp_path / "a", tensors=change)
    refused(made, tmp_path / "a", message)


def refused(made, adapter, message):
    basis = Basis.read(made / "out", read_config(made / "out"))
    with pytest.raises(RotQuantError) as error:
        LoRAAdapter.read(adapter, basis.arch)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_refused(made, tmp_path, capsys):
    def run(*left_out, base="out", **written):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        shutil.copytree(made / "a", tmp_path / "a", ignore=shutil.ignore_patterns(*left_out))
        for name, text in written.items():
            (tmp_path / "a" / name.replace("__", ".")).write_text(text)
        assert main(["adapter", str(tmp_path / "a"), "--base", str(made / base), "-o", str(tmp_path / "t")]) == 2
        assert not [file for file in tmp_path.iterdir() if file.name != "a"]
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    assert "adapter_config.json: not there or no valid JSON" in run("adapter_config.json")
    assert "adapter_config.json: not there or no valid JSON" in run(adapter_config__json="{")
    assert "adapter_config.json: not a JSON object" in run(adapter_config__json="[]")
    assert "adapter_model.safetensors: no such file\n" in run("*.safetensors")
    assert "adapter_model.bin may run code when it is read" in run("*.safetensors", adapter_model__bin="x")
    assert "truncated or not a safetensors file" in run(adapter_model__safetensors="x")
    assert "rotquant.basis is missing" in run(base="m")


def test_a_basis_that_is_not_the_checkpoints_is_refused(made, tmp_path):
    def change(edit, file=FILE, stated=None):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(made / "out", tmp_path / "out")
        tensors = load_file(tmp_path / "out" / FILE)
        edit(tensors)
        save_file(tensors, tmp_path / "out" / FILE)
        config = read_config(tmp_path / "out")
        if stated is not None:
            config.rotquant["basis"] = {"file": FILE, "sha256": file_digest(tmp_path / "out" / FILE)} | stated
        with pytest.raises(RotQuantError) as error:
            Basis.read(tmp_path / "out", config)
        return str(error.value)

    def put(name, tensor):
        return lambda tensors: tensors.__setitem__(f"basis.{name}", tensor)

    def same(tensors):
        pass

    assert "not the file that rotquant.basis.sha256" in change(put("norm.weight", torch.ones(96) * 2))
    assert "no such file" in change(same, stated={"file": "other.safetensors"})
    for name in ("../out/" + FILE, "a\\b.safetensors", "model.bin"):
        assert "rotquant.basis.file" in change(same, stated={"file": name})
    assert "rotquant.basis.sha256" in change(same, stated={"sha256": "no"})
    own = {"stated": {}}
    assert "basis.r1 has shape [95, 96], config.json asks for [96, 96]" in change(put("r1", torch.eye(96)[1:]), **own)
    assert "basis.r1 is not orthogonal" in change(put("r1", 2 * torch.eye(96)), **own)
    assert "basis.layers.0.r2 holds NaN" in change(put("layers.0.r2", torch.full((1, 32, 32), torch.nan)), **own)
    assert "basis.layers.2.r2 is not a tensor of a basis" in change(put("layers.2.r2", torch.eye(32)[None]), **own)
    order = torch.zeros(176, dtype=torch.int32)
    assert "basis.layers.1.order is not a permutation" in change(put("layers.1.order", order), **own)
    assert "basis.norm.weight is missing" in change(lambda tensors: tensors.pop("basis.norm.weight"), **own)
    assert "_layernorm.weight is missing" in change(
        lambda tensors: tensors.pop("basis.layers.1.input_layernorm.weight"), **own
    )
