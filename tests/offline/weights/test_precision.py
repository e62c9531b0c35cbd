"""The precision dial: fixed schemes, and sites at 8 bits that measuring chose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rotquant
from interruption import stop_at_call
from rotquant.checkpoint.format import CheckpointFormat
from rotquant.checkpoint.journal import Journal, Slot
from rotquant.checkpoint.quant_linear import QuantLinear
from rotquant.errors import RotQuantError
from rotquant.models.expert_tensors import ExpertTensors
from rotquant.pipeline import quantize
from rotquant.recipe import Activations
from rotquant.recipes import load_recipe, names
from rotquant.recipes.schemes import (
    INT4_TARGETS,
    SCHEMES,
    TARGETS,
    pays_on_cpu,
    pays_on_gpu,
    scheme_settings,
    suits,
    target_settings,
)
from rotquant.run import Settings, prepare
from rotquant.transforms.space import LayerTransforms
from rotquant.weights.layerwise import LayerQuantizer
from rotquant.weights.precision import DamageMeter
from rotquant_kernels.formats import WeightFormat
from source_models import HELDOUT, file_hashes, source_model

QUICK: dict[str, Any] = {"calibration": str(HELDOUT), "samples": 3, "seq_len": 32}
LAYERS, SITES = 3, 4
IDS = torch.arange(5, 60)[None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in whose layer 1 one channel before down is huge: at 4 bits little is left of the others."""
    folder = source_model(tmp_path_factory.mktemp("precision") / "model", "llama", layers=LAYERS, shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][7] *= 300
    tensors["model.layers.1.mlp.down_proj.weight"][:, 7] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def bits(folder: Path, of: str = "rows") -> dict[str, int]:
    """Bits of the activations, or `of` the "weights", of every linear, by what comes after `model.layers.`."""
    config = json.loads((folder / "config.json").read_text())
    form = CheckpointFormat(config["quantization_config"], config["rotquant"], 32)
    parts = {"self_attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
    found = {}
    for layer in range(LAYERS):
        for name in (f"{layer}.{block}.{part}_proj" for block, of in parts.items() for part in of):
            linear = form.linear(f"model.layers.{name}")
            assert linear is not None
            found[name] = getattr(linear, of).bits
    return found


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return rotquant.load(folder)(IDS).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def one(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One site at 8 bits; without R4, which would spread the channel."""
    out = tmp_path_factory.mktemp("precision") / "one"
    return quantize(str(model), out, recipe="rtn", scheme="auto", budget="1", target="sm_86", **QUICK)


def test_the_site_that_was_made_bad_is_the_one_that_gets_8_bits(model: Path, one: Path) -> None:
    found = bits(one)
    assert [name for name, width in found.items() if width == 8] == ["1.mlp.down_proj"]
    card = (one / "README.md").read_text()
    assert "| made for | sm_86: 4-bit activations on int4 tensor cores, with humming-kernels installed |" in card
    assert f"at 1 of {LAYERS * SITES} sites" in card
    assert "`down` of layers 1 |" in card
    assert "W4A4KV4 (A8 at some sites)" in card


def test_the_ops_of_a_mixed_checkpoint_get_the_bits_of_its_config(one: Path) -> None:
    """The ops of each layer get the bits of config.json, and 8 bits at the bad site bring the output nearer."""
    model, seen = rotquant.load(one), []
    modules = {id(m): name for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    for module in model.modules():
        if id(module) in modules:
            module.register_forward_hook(lambda m, *_: seen.append((modules[id(m)], m.format.rows.bits)))
    model(torch.arange(5, 20)[None])
    assert dict(seen) == {f"model.layers.{name}": width for name, width in bits(one).items()}


def test_eight_bits_at_the_bad_site_are_worth_something(model: Path, one: Path, tmp_path: Path) -> None:
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(model)(IDS).logits
    four, eight = (
        quantize(str(model), tmp_path / scheme, recipe="rtn", scheme=scheme, **QUICK)
        for scheme in ("w4a4kv4", "w4a8kv4")
    )
    assert set(bits(four).values()) == {4}
    assert set(bits(eight).values()) == {8}
    away = [float((logits(folder) - expected).norm() / expected.norm()) for folder in (four, one, eight)]
    assert away == sorted(away, reverse=True)
    assert away[1] < 0.9 * away[0]


def test_weights_of_the_widened_sites_may_have_8_bits(model: Path, one: Path, tmp_path: Path) -> None:
    """They are nearer to the original's by what four more bits are worth; all others are the same bytes."""
    settings: dict[str, Any] = {"recipe": "rtn", "scheme": "auto", "budget": "1", "target": "sm_86", **QUICK}
    out = quantize(str(model), tmp_path / "out", settings=["weights.wide_bits=8"], **settings)
    assert [name for name, width in bits(out, "weights").items() if width == 8] == ["1.mlp.down_proj"]
    assert "W4A4KV4 (W8A8 at some sites)" in (card := (out / "README.md").read_text())
    assert f"| 8-bit activations and weights | at 1 of {LAYERS * SITES} sites" in card
    before, after = (
        {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}
        for folder in (one, out)
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    site = "model.layers.1.mlp.down_proj"
    assert changed == {f"{site}.weight_packed", f"{site}.weight_scale"}
    weight, errors = load_file(model / "model.safetensors")[f"{site}.weight"].float(), []
    for tensors, width in ((before, 4), (after, 8)):
        form = WeightFormat(width)
        codes = form.unpack(tensors[f"{site}.weight_packed"], weight.shape[1])
        errors.append((form.dequantize(codes, tensors[f"{site}.weight_scale"].float()) - weight).norm())
    assert errors[1] < errors[0] / 8


@pytest.mark.parametrize(
    ("budget", "wide"), [("0", 0), ("25%", 3), ("33.4%", 4), ("5", 5), ("100%", 12), ("99", 12), ("0.5%", 0)]
)
def test_the_budget_is_kept(budget: str, wide: int) -> None:
    activations = Activations(budget=budget)
    assert activations.wide(LAYERS * SITES) == wide
    assert activations.mixed is (budget != "0")


@pytest.mark.parametrize("weights", [4, 8])
def test_stock_compressed_tensors_reads_a_mixed_checkpoint(
    weights: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share of the sites, portable: groups of the plain schema alone say it. What shares an input shares its bits,
    and its weights are fitted to inputs of these bits."""
    fitted, moments = [], LayerQuantizer._moments

    def seen(self: LayerQuantizer, site: str, *args: Any) -> Any:
        fitted.append(self.served[0].rows(site).bits)
        return moments(self, site, *args)

    monkeypatch.setattr(LayerQuantizer, "_moments", seen)
    source = source_model(tmp_path / "model", "llama", layers=LAYERS, initializer_range=0.02)
    out = quantize(
        str(source), tmp_path / "out", recipe="quarot", scheme="auto", budget="50%", profile="portable",
        settings=[f"weights.wide_bits={weights}"], **QUICK,
    )  # fmt: skip
    found = bits(out)
    assert bits(out, "weights") == {name: weights if width == 8 else 4 for name, width in found.items()}
    firsts = [name for name in found if name.endswith(("q_proj", "o_proj", "gate_proj", "down_proj"))]
    assert fitted == [found[name] for name in firsts]
    assert sum(found[name] == 8 for name in firsts) == LAYERS * SITES // 2
    for layer in range(LAYERS):
        assert len({found[f"{layer}.self_attn.{part}_proj"] for part in "qkv"}) == 1
        assert found[f"{layer}.mlp.gate_proj"] == found[f"{layer}.mlp.up_proj"]
    theirs = AutoModelForCausalLM.from_pretrained(out)
    for name, width in found.items():
        scheme = theirs.get_submodule(f"model.layers.{name}").quantization_scheme
        assert (scheme.input_activations.num_bits, scheme.weights.num_bits) == (width, weights if width == 8 else 4)
    with torch.inference_mode():
        expected = theirs(IDS).logits
    assert (logits(out) - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_a_mixture_is_measured_as_it_is_quantized(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert at a time in memory, whatever the files call them."""
    asked: list[int] = []
    expert = ExpertTensors.expert
    monkeypatch.setattr(ExpertTensors, "expert", lambda self, index: asked.append(index) or expert(self, index))
    source = source_model(tmp_path / "model", kind)
    run = prepare(str(source), Settings("rtn", ["activations.budget=25%"], **QUICK))
    assert run.calibrated
    meter = DamageMeter(run.recipe, run.arch, run.source, run.transforms, run.calibrated.tokens, run.dtype, run.devices)
    damage = meter(Slot(Journal(tmp_path / "out", {}, False), "precision"))
    assert len(damage) == 2 * SITES
    assert bool((damage > 0).all())
    (block, *_) = run.arch.mixtures.values()
    assert set(asked) == set(range(block.count))  # each was asked for by itself
    out = quantize(str(source), tmp_path / "out", recipe="rtn", scheme="auto", **QUICK)
    assert f"at 2 of {2 * SITES} sites" in (out / "README.md").read_text()


def test_all_sites_at_8_bits_are_one_group(model: Path, tmp_path: Path) -> None:
    out = quantize(str(model), tmp_path / "out", recipe="rtn", scheme="auto", budget="100%", **QUICK)
    assert set(bits(out).values()) == {8}
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["Linear"]]


def test_a_run_that_was_stopped_while_measuring_gives_the_same_bytes(
    model: Path, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = stop_at_call(monkeypatch, DamageMeter, "_layer", 3)
    settings: dict[str, Any] = {"recipe": "rtn", "scheme": "auto", "budget": "1", "target": "sm_86", **QUICK}
    with pytest.raises(KeyboardInterrupt):
        quantize(str(model), tmp_path / "one", **settings)
    out = quantize(str(model), tmp_path / "one", resume=True, **settings)
    assert measured == [0, 1, 2, 2]
    assert file_hashes(out) == file_hashes(one)


@pytest.mark.parametrize("recipe", names())
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_recipe_takes_every_scheme(recipe: str, scheme: str) -> None:
    activations = load_recipe(recipe, scheme_settings(scheme, None)).activations
    assert (activations.bits, activations.wide(100)) == {"w4a4kv4": (4, 0), "w4a8kv4": (8, 0), "auto": (4, 25)}[scheme]


@pytest.mark.parametrize("recipe", names())
def test_every_recipe_takes_every_target(recipe: str) -> None:
    for target in TARGETS:
        found = load_recipe(recipe, target_settings(target, None))
        assert found.target == target
        assert found.activations.bits == (4 if target in INT4_TARGETS else 8)
        assert found.lm_head.bits == (8 if target == "cpu" else 16)
        tried = found.choose.tried if found.choose else {}
        for one in (found, *(found.with_changes(changes) for changes in tried.values())):  # whatever `best` takes
            assert "int4 tensor cores, with humming" in suits(one) or target not in INT4_TARGETS


def test_what_is_set_by_hand_wins_over_the_target() -> None:
    def suited(target: str, scheme: str | None, *settings: str) -> str:
        return suits(load_recipe("rtn", [*target_settings(target, scheme), *scheme_settings(scheme, None), *settings]))

    assert suits(load_recipe("rtn")) == ""
    assert suited("sm_90", "w4a4kv4").endswith("--scheme w4a8kv4 costs little speed")
    assert suited("sm_90", None).endswith("in int8")
    assert suited("sm_86", "w4a8kv4").endswith("in int8")
    assert suited("sm_86", "auto", "activations.symmetric=false").endswith("do not take asymmetric activations")
    assert suited("sm_86", None, "weights.rank=8", "weights.group_size=64").endswith("group, a low-rank branch")
    assert pays_on_gpu(8, 6).startswith("w4a4kv4 or auto by --target sm_86")
    with pytest.raises(RotQuantError, match="--target sm_75: take cpu, sm_80"):
        quantize("nowhere", "out", target="sm_75")


@pytest.mark.parametrize(
    ("scheme", "budget", "line"),
    [
        ("auto", "150%", "budget 150% is more than all sites"),
        ("auto", "-3", "activations.budget"),
        ("auto", "many", "activations.budget"),
        ("auto", "5 KL", "activations.budget"),
        ("auto", "0% KL", "nothing quantized has a KL of 0"),
        ("w4a8kv4", "3", "goes with --scheme auto"),
        (None, "3", "goes with --scheme auto"),
        ("w2a2", None, "take w4a4kv4, w4a8kv4, auto"),
    ],
)
def test_bad_budgets_are_refused_in_one_line(scheme: str | None, budget: str | None, line: str, tmp_path: Path) -> None:
    with pytest.raises(RotQuantError, match=line) as refused:
        quantize("nowhere", tmp_path / "out", scheme=scheme, budget=budget)
    assert "\n" not in str(refused.value)


def test_a_budget_needs_sites_that_have_less(model: Path) -> None:
    settings = ["activations.bits=8", "activations.budget=3"]
    with pytest.raises(RotQuantError, match="all sites have 8 bits as it is"):
        prepare(str(model), Settings("rtn", settings))


def test_bits_of_a_site_survive_the_journal() -> None:
    layer = LayerTransforms(clips={"o": 0.8, "down": 0.7}).widened(["down"])
    read = LayerTransforms.from_tensors(layer.tensors())
    assert (read.bits, read.clips) == ({"down": 8}, {"o": 0.8, "down": 1.0})
    usual = Activations(clip=0.9).rows
    assert [(read.rows(s, usual).bits, read.rows(s, usual).clip) for s in ("attn", "o", "down")] == [
        (4, 0.9), (4, 0.8), (8, 1.0),
    ]  # fmt: skip


def test_what_pays_is_said_of_each_machine() -> None:
    for measured in ("avx2 avx512f avx512_vnni", "avx2"):
        assert pays_on_cpu(measured).startswith("w4a8kv4: more accurate; w4a4kv4 is served")
    assert "were measured" in pays_on_cpu("asimddp i8mm")
    assert "humming" in pays_on_gpu(8, 9)
    assert pays_on_gpu(9, 0).startswith("w4a8kv4")
