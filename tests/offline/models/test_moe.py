"""Mixtures of experts offline: read, folded, quantized an expert at a time, and refused where they are damaged."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import rotquant
from rotquant.checkpoint.layers import read_layer
from rotquant.checkpoint.original import read_original
from rotquant.checkpoint.source import Source
from rotquant.errors import RotQuantError
from rotquant.gate import Folded, check_equivalence
from rotquant.learn.initial import initial_transforms
from rotquant.measure.inspection import inspect
from rotquant.models import read_architecture
from rotquant.models.expert_tensors import each
from rotquant.pipeline import quantize
from rotquant.recipes import load_recipe
from rotquant.transforms.fold import Fold
from rotquant.transforms.space import LayerTransforms, Transforms
from rotquant.weights.experts import ExpertsQuantizer
from rotquant_kernels.formats import WeightFormat
from source_models import file_hashes, source_model

TOKENS = torch.arange(3, 83)
SMALL: dict[str, Any] = {"samples": 4, "seq_len": 128}
EXACT = ["weights.bits=8", "weights.clip_search=false", "activations.bits=8", "activations.clip=1.0", "kv.bits=16"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("moe")
    return {n: source_model(folder / n, n, shard_size="5GB") for n in ("qwen3_moe", "qwen2_moe", "mixtral")}


@pytest.fixture(scope="module")
def made(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A W4A4 checkpoint of the model with a shared expert, calibrated on 512 tokens."""
    return quantize(str(sources["qwen2_moe"]), tmp_path_factory.mktemp("made") / "out", recipe="quarot", **SMALL)


def rewritten(source: Path, folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of a model whose tensors are edited."""
    shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata={"format": "pt"})
    return folder


def with_config(source: Path, folder: Path, **fields: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def together(tensors: dict[str, Tensor]) -> None:
    """Experts as transformers' own models hold them: two tensors a layer, under transformers' names."""
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    found: dict[str, dict[int, Tensor]] = {}
    for name in list(tensors):
        plain = name.replace("block_sparse_moe", "mlp")
        if ".experts." in name:
            prefix, _, rest = plain.partition(".experts.")
            expert, leaf = rest.removesuffix(".weight").split(".")
            found.setdefault(f"{prefix}.experts.{names.get(leaf, leaf)}", {})[int(expert)] = tensors.pop(name)
        elif plain != name:
            tensors[plain] = tensors.pop(name)
    whole = {name: torch.stack([parts[j] for j in sorted(parts)]) for name, parts in found.items()}
    for name, stack in whole.items():
        if name.endswith("gate_proj"):
            both = torch.cat((stack, whole[name.replace("gate_proj", "up_proj")]), 1)
            tensors[name.replace("gate_proj", "gate_up_proj")] = both
        elif name.endswith("down_proj"):
            tensors[name] = stack


# ---- reading and the gate --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "mixtral"])
def test_experts_are_read_one_by_one_or_together(sources: dict[str, Path], tmp_path: Path, name: str) -> None:
    """As transformers reads both, and with its logits: gate and up, w1 and w3 in their places."""
    folder = rewritten(sources[name], tmp_path / "together", together)
    arch, apart = read_original(sources[name])
    both, whole = read_original(folder)
    assert arch.kinds == both.kinds
    assert len(whole.files) < len(apart.files)
    for index, kind in enumerate(arch.kinds):
        one, other = (read_layer(source, arch, index) for source in (apart, whole))
        assert all(torch.equal(one[f"{n}.weight"], other[f"{n}.weight"]) for n in kind.linears)
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(f)(TOKENS[None]).logits for f in (sources[name], folder)]
    assert torch.equal(*logits)
    nothing = Fold(arch, Transforms(None, 0, [LayerTransforms() for _ in arch.kinds]))
    assert check_equivalence(whole, arch, nothing, TOKENS, lambda _: None) < 1e-5


def test_the_gate_runs_what_transformers_loads(sources: dict[str, Path]) -> None:
    """Its model reads weights as they run; transformers' loader puts them together first."""
    from rotquant.checkpoint.original_mixture import original_mixture

    for folder in sources.values():
        arch, source = read_original(folder)
        with original_mixture(source, arch) as model:
            got = model(TOKENS[None], use_cache=False).logits
            assert all(parameter.is_meta for parameter in model.parameters())
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(folder)(TOKENS[None]).logits
        assert (got - expected).norm() < 1e-5 * expected.norm()


def test_the_gate_compares_the_chosen_experts(sources: dict[str, Path]) -> None:
    arch, source = read_original(sources["mixtral"])
    fold = Fold(arch, initial_transforms(load_recipe("quarot", []), arch, 1, 0))
    chosen = torch.stack([torch.randperm(4)[:2] for _ in TOKENS])
    with pytest.raises(
        RotQuantError, match=r"the router of layer 0 of the folded model chooses other experts than the"
    ):
        Folded(source, arch, fold, TOKENS).step(0, chosen)


def test_one_expert_is_in_memory_at_a_time(sources: dict[str, Path]) -> None:
    arch, source = read_original(sources["mixtral"])
    fold = Fold(arch, initial_transforms(load_recipe("quarot", []), arch, 1, 0))
    tensors = each(fold.layer(read_layer(source, arch, 0), 0), Tensor.float)
    gone = []
    for mlp in read_architecture(sources["mixtral"]).mixtures[0].routed:
        assert not [reference for reference in gone if reference() is not None][1:]
        gone += [weakref.ref(tensors[f"{name}.weight"]) for name in (mlp.gate, mlp.up, mlp.down)][:1]
    with pytest.raises(KeyError):
        tensors["block_sparse_moe.experts.4.w1.weight"]


def test_experts_that_are_done_leave_memory(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lives when an expert's turn comes is the same for each of a layer: none of those before it, in no form."""
    turn, alive = ExpertsQuantizer._expert, []
    weights = torch.int32, torch.uint8, torch.int8, torch.float64  # packed, as they run, codes, folded

    def tensors() -> list[Tensor]:
        return [found for found in gc.get_objects() if issubclass(type(found), Tensor)]

    others = tensors()  # left by other tests, some without memory; held, so that their ids stay theirs
    known = {id(tensor) for tensor in others}

    def counted(self: ExpertsQuantizer, index: int, *rest: Any) -> Any:
        own = [t for t in tensors() if id(t) not in known and t.dtype in weights and not t.is_meta]
        alive.append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}.values()))
        return turn(self, index, *rest)

    monkeypatch.setattr(ExpertsQuantizer, "_expert", counted)
    quantize(str(sources["qwen3_moe"]), tmp_path / "out", recipe="quarot", samples=2, seq_len=64)
    assert len(alive) == 6
    assert len(set(alive[1:])) == 1  # when the first one's turn comes nothing was read yet


# ---- quantizing -----------------------------------------------------------------------------------------------------


BRANCH = ["weights.rank=8", "weights.branch=pca"]


@pytest.mark.parametrize(
    ("name", "more"), [("qwen3_moe", []), ("qwen2_moe", []), ("mixtral", []), ("qwen2_moe", BRANCH)]
)
def test_at_eight_bits_it_is_nearly_the_original(
    sources: dict[str, Path], tmp_path: Path, name: str, more: list[str]
) -> None:
    """Every expert in its place with its own weights: one that was not would cost every token tens of percent. So does
    another choice of the router, but of a few tokens only."""
    out = quantize(str(sources[name]), tmp_path / "out", recipe="quarot", settings=[*EXACT, *more], **SMALL)
    branched = {n.rpartition(".low_rank")[0] for n in Source(out).files if "low_rank" in n}
    attention = {f"model.layers.{i}.self_attn.{linear}_proj" for i in range(2) for linear in "qkvo"}
    assert branched == (attention if more else set())  # a branch of the inputs is not at experts
    card = " ".join((out / "README.md").read_text().split())
    assert ("rank 8 branch at attention and in layers without experts" in card) is bool(more)
    with torch.no_grad():
        got, expected = (
            model(TOKENS[None]).logits
            for model in (rotquant.load(out), AutoModelForCausalLM.from_pretrained(sources[name]))
        )
    assert ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.06


def test_tokens_and_errors_of_experts_are_said(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = (made / "README.md").read_text()
    assert "| experts | 2 layers; largest rounding error 0." in card
    assert "with fewer than they have inputs, calibrated on other tokens too |" in card
    assert "of the choices are those of the original (first calibration window); least" in card
    ignore = json.loads((made / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignore == ["lm_head", "re:.*mlp.gate$", "re:.*mlp.shared_expert_gate$"]


def test_the_progress_line_names_experts_with_few_tokens(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(str(sources["mixtral"]), tmp_path / "out", recipe="quarot", samples=1, seq_len=64)
    assert "4 of 4 experts have few tokens" in capsys.readouterr().err


def test_routing_agreement_is_that_of_the_models(sources: dict[str, Path], made: Path) -> None:
    """`inspect` runs both models; nothing else tells it."""
    found = inspect(str(made), against=str(sources["qwen2_moe"]), tokens=256, seq_len=128)
    routing = found.as_dict()["routing"]
    assert [sum(layer["tokens"]) for layer in routing] == [512, 512]
    assert all(0.7 < layer["agreement"] < 1 for layer in routing)
    assert "of the choices are as before; least" in str(found)
    itself = inspect(str(made), against=str(made), tokens=256, seq_len=128).as_dict()["routing"]
    assert [layer["agreement"] for layer in itself] == [1, 1]


def test_a_stopped_run_goes_on_to_the_same_bytes(
    sources: dict[str, Path], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The full-precision window among them, which the routing is compared with."""
    call = ExpertsQuantizer.__call__

    def stopping(self: ExpertsQuantizer, index: int, *rest: Any) -> Any:
        if index:
            raise KeyboardInterrupt
        return call(self, index, *rest)

    options: dict[str, Any] = {"recipe": "quarot", **SMALL}
    with monkeypatch.context() as stopped:
        stopped.setattr(ExpertsQuantizer, "__call__", stopping)
        with pytest.raises(KeyboardInterrupt):
            quantize(str(sources["qwen2_moe"]), tmp_path / "out", **options)
    quantize(str(sources["qwen2_moe"]), tmp_path / "out", resume=True, **options)
    assert file_hashes(tmp_path / "out") == file_hashes(made)


def test_r4_serves_every_split(sources: dict[str, Path], tmp_path: Path) -> None:
    """Its block divides the channels of dense layers, experts and shared experts on each of the ranks."""
    arch = read_architecture(sources["qwen2_moe"])
    assert [arch.kinds[0].widths, initial_transforms(load_recipe("quarot", []), arch, 1, 0).r4_block] == [
        (80, 48, 48, 48, 48), 16
    ]  # fmt: skip
    assert initial_transforms(load_recipe("quarot", []), arch, 4, 0).r4_block == 4
    with pytest.raises(RotQuantError, match="--tp-max 5 does not divide moe_intermediate_size 48"):
        initial_transforms(load_recipe("quarot", []), arch, 5, 0)


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("svd", [], r"recipe svd: weights.rank is not supported in a mixture of experts"),
        ("quarot", ["scales.order=true"], r"scales.order is not supported .* --set scales.order=false"),
        ("quarot", ["online.mlp=[kronecker]"], r"online.mlp is not supported .* --set online.mlp=\[\]"),
    ],
)
def test_recipes_that_experts_do_not_run_are_refused(
    sources: dict[str, Path], tmp_path: Path, recipe: str, settings: list[str], message: str
) -> None:
    with pytest.raises(RotQuantError, match=message):
        quantize(str(sources["mixtral"]), tmp_path / "out", recipe=recipe, settings=settings, **SMALL)


@pytest.mark.parametrize("recipe", ["ostquant", "smoothrot", "dartquant"])
def test_learned_recipes_take_experts_for_what_they_are(sources: dict[str, Path], tmp_path: Path, recipe: str) -> None:
    quick = {"ostquant": ["learn.end_to_end.steps=1", "learn.end_to_end.batch=1"], "smoothrot": []}
    settings = quick.get(recipe, ["learn.surrogate.steps=2"])
    out = quantize(str(sources["mixtral"]), tmp_path / "out", recipe=recipe, settings=settings, samples=2, seq_len=64)
    with torch.no_grad():
        assert rotquant.load(out)(TOKENS[None]).logits.isfinite().all()


def test_transformers_reads_the_experts_of_the_portable_profile(sources: dict[str, Path], tmp_path: Path) -> None:
    """The weights to the last bit. It has no linear there whose input it could round, and the card says so."""
    out = quantize(str(sources["mixtral"]), tmp_path / "out", recipe="rtn", profile="portable")
    assert "transformers with compressed-tensors loads it as it is (its experts with 16-bit activations)" in (
        out / "README.md"
    ).read_text().replace("\n", " ")
    source, form = Source(out), WeightFormat()

    def stored(name: str) -> Tensor:
        packed, scale = (
            source.get(f"model.layers.1.block_sparse_moe.{name}.{leaf}") for leaf in ("weight_packed", "weight_scale")
        )
        return form.dequantize(form.unpack(packed, packed.shape[1] * 8), scale)

    experts = AutoModelForCausalLM.from_pretrained(out).model.layers[1].mlp.experts
    for j in range(4):
        both = torch.cat((stored(f"experts.{j}.w1"), stored(f"experts.{j}.w3")))
        assert torch.equal(experts.gate_up_proj[j], both)
        assert torch.equal(experts.down_proj[j], stored(f"experts.{j}.w2"))


# ---- bad input ------------------------------------------------------------------------------------------------------

UP = "model.layers.1.mlp.experts.3.up_proj.weight"
BAD_FILES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(UP), r"tensor model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight is missing"),
    "unequal": (
        lambda t: t.update({UP: t[UP][:40]}), r"experts\.3\.up_proj\.weight has shape \[40, 128\], .* for \[48, 128\]"
    ),
    "one more": (
        lambda t: t.update({UP.replace("3", "4"): t[UP].clone()}), r"experts\.4\.up_proj\.weight is not part of this"
    ),
    "no router": (lambda t: t.pop("model.layers.0.mlp.gate.weight"), r"layers\.0\.mlp\.gate\.weight is missing"),
    "router of fewer": (
        lambda t: t.update({"model.layers.0.mlp.gate.weight": t["model.layers.0.mlp.gate.weight"][:3]}),
        r"mlp\.gate\.weight has shape \[3, 128\], config\.json asks for \[4, 128\]",
    ),
    "NaN": (lambda t: t[UP].view(-1)[:1].fill_(float("nan")), r"experts\.3\.up_proj\.weight holds NaN"),
}  # fmt: skip
BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "top-k": ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, expected 1 to 4, the number of experts"),
    "none": ({"mlp_only_layers": [0, 1]}, "leave no layer with experts"),
    "layers": ({"mlp_only_layers": [-1]}, "mlp_only_layers is .-1., expected is a list of layers"),
    "biases": ({"qkv_bias": False}, "qkv_bias is False, expected is True"),
    "count": ({"num_experts": 2**40}, "num_experts is 1099511627776, expected is a whole number from 1 to 4096"),
    "fewer": ({"num_experts": 2}, r"mlp\.gate\.weight has shape \[4, 128\], config\.json asks for \[2, 128\]"),
    "two names": ({"num_local_experts": 3}, "num_experts is 4, but num_local_experts is 3; they mean one thing"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_damaged_files_are_refused_by_name(sources: dict[str, Path], tmp_path: Path, what: str) -> None:
    edit, message = BAD_FILES[what]
    folder = rewritten(sources["qwen2_moe"], tmp_path / "bad", edit)
    with pytest.raises(RotQuantError, match=message) as refused:
        quantize(str(folder), tmp_path / "out", recipe="rtn")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_configs_that_describe_no_mixture_are_refused(sources: dict[str, Path], tmp_path: Path, what: str) -> None:
    fields, message = BAD_CONFIGS[what]
    with pytest.raises(RotQuantError, match=message) as refused:
        quantize(str(with_config(sources["qwen2_moe"], tmp_path / "bad", **fields)), tmp_path / "out", recipe="rtn")
    assert "\n" not in str(refused.value)


PACKED = "model.layers.1.mlp.experts.2.down_proj.weight_packed"


def test_a_checkpoint_without_an_expert_is_refused_by_name(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "bad")
    shard = Source(made).files[PACKED].name
    tensors = load_file(made / shard)
    save_file({n: t for n, t in tensors.items() if n != PACKED}, tmp_path / "bad" / shard, metadata={"format": "pt"})
    index = tmp_path / "bad" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][PACKED]
    index.write_text(json.dumps(content))
    with pytest.raises(
        RotQuantError, match=r"tensor model\.layers\.1\.mlp\.experts\.2\.down_proj\.weight_packed is missing"
    ):
        rotquant.load(tmp_path / "bad")
    save_file(tensors | {PACKED: tensors[PACKED][:8].clone()}, tmp_path / "bad" / shard, metadata={"format": "pt"})
    index.write_text((made / "model.safetensors.index.json").read_text())
    with pytest.raises(RotQuantError, match=r"experts\.2\.down_proj\.weight_packed has shape \[8, 6\]"):
        rotquant.load(tmp_path / "bad")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda c: c["quantization_config"]["ignore"].append("re:.*experts.3.up.*"),
            "experts.3.up_proj is not quantized",
        ),
        (
            lambda c: c["rotquant"]["activation_clip"].update({PACKED.removesuffix(".weight_packed"): 0.5}),
            "the experts of a layer are run as one and must have one format",
        ),
        (lambda c: c["quantization_config"]["ignore"].remove("re:.*mlp.gate$"), None),
    ],
)
def test_formats_that_the_op_does_not_run_are_refused(
    made: Path, tmp_path: Path, edit: Callable[[Any], Any], message: str | None
) -> None:
    """A router is not a quantized linear whatever config.json says: it has no packed weight."""
    shutil.copytree(made, tmp_path / "bad")
    config = json.loads((made / "config.json").read_text())
    edit(config)
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    if message is None:
        rotquant.load(tmp_path / "bad")
        return
    with pytest.raises(RotQuantError, match=message):
        rotquant.load(tmp_path / "bad")
