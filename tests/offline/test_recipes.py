"""Every shipped recipe, from the model to a checkpoint that loads; learning that resumes; what recipes refuse."""

import json
from contextlib import suppress
from functools import partial
from itertools import product
from typing import get_args
from zlib import crc32

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_adapters import attach, write_adapter
from rotquant import load
from rotquant.basis.turn_adapter import turn_folder
from rotquant.checkpoint.journal import Slot
from rotquant.errors import RotQuantError
from rotquant.learn import plan
from rotquant.learn.options import SERVES, Surrogate
from rotquant.learn.rotations import surrogate
from rotquant.pipeline import quantize
from rotquant.recipe import Activations, KVCache
from rotquant.recipes import load_recipe, shipped
from rotquant.text import read_tokenizer, windows
from source_models import HELDOUT, KINDS, all_candidates, file_hashes, source_model

QUICK = {"samples": 4, "seq_len": 64}
SHORT = ("learn.blockwise.epochs=1", "learn.end_to_end.steps=2", "learn.end_to_end.batch=1", "learn.surrogate.steps=5")
# 8-bit weights and activations: what is left to differ is a wrong fold, stage, shift or branch.
FINE = ("weights.bits=8", "activations.bits=8", "activations.clip=1.0", "kv.bits=16", "kv.key_feedback=false")
OBJECTIVES = get_args(Surrogate.model_fields["objective"].annotation)
RECIPES = [name for name, _ in shipped()]


def settings(recipe: str, *more: str) -> list[str]:
    """Shorter learning, where the recipe learns at all; of one that chooses all candidates."""
    taken = all_candidates(recipe)
    found = load_recipe(recipe, taken)
    short = [s for s in SHORT if getattr(found.learn, s.split(".")[1])]
    small = ["online.block=32"] if found.online.block == 128 else []
    return [*taken, *short, *small, *(["tune.steps=2"] if found.tune else []), *more]


def sized(kind: str, folder, **config):
    return source_model(folder, kind, hidden_size=128, intermediate_size=256, **config)


def logits(model, folder):
    ids = windows(HELDOUT.read_text(), read_tokenizer(folder), 48, "heldout")[:2]
    with torch.no_grad():
        return model(ids).logits


def original_logits(folder):
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), folder)


def relative(got, expected):
    return (got - expected).norm() / expected.norm()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_computes_the_same_function(tmp_path, recipe):
    """Where rounding is fine the checkpoint's logits are the model's: what is learned and folded is undone exactly.

    Also with a LoRA adapter of the model, turned by what the checkpoint keeps of its basis.
    """
    from transformers import AutoModelForCausalLM

    kind = list(KINDS)[crc32(recipe.encode()) % len(KINDS)]
    folder = sized(kind, tmp_path / "m", head_dim=32)
    changed = settings(recipe, *FINE, *(["weights.group_size=0"] if recipe == "gsr" else []))
    out = quantize(str(folder), tmp_path / "out", recipe=recipe, settings=changed, **QUICK)
    original, made = AutoModelForCausalLM.from_pretrained(folder).eval(), load(out)
    expected = logits(original, folder)
    distance = (logits(made, folder) - expected).norm() / expected.norm()
    assert distance < 0.1, distance  # above 1 where something is not undone
    adapter = write_adapter(tmp_path / "adapter", original, size=0.5)
    attach(original, adapter)
    attach(made, turn_folder(adapter, out, tmp_path / "turned"))
    adapted = logits(original, folder)
    distance = (logits(made, folder) - adapted).norm() / adapted.norm()
    assert distance < 0.15, distance  # the adapter adds no rounding, but moves what is rounded
    assert (adapted - expected).norm() > 0.3 * adapted.norm()


@pytest.mark.parametrize(("recipe", "kind"), [("ruquant-ft", "qwen2"), ("flatquant", "llama"), ("frtq", "qwen3")])
def test_four_bits_and_its_format(tmp_path, recipe, kind):
    folder = sized(kind, tmp_path / "m", head_dim=32)
    out = quantize(str(folder), tmp_path / "out", recipe=recipe, settings=settings(recipe), **QUICK)
    extension = json.loads((out / "config.json").read_text())["rotquant"]
    kinds = [stage["kind"] for stage in extension.get("input_transforms", [])]
    assert ("kronecker" in kinds) == (recipe == "flatquant")
    assert ("reflection" in kinds and "permutation" in kinds) == (recipe == "ruquant-ft")
    assert ("low_rank" in extension) == (recipe == "frtq")
    if recipe == "flatquant":  # clips were learned for every layer
        assert "model.layers.1.mlp.down_proj" in extension["activation_clip"]
        assert "model.layers.1.self_attn" in extension["kv_clip"]["layers"]
    distance = relative(logits(load(out), folder), original_logits(folder))
    assert distance < 0.9, distance  # rounding to 4 bits; 1.4 for logits of another model


def test_learning_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """R1, the layers and the training end to end are kept: the same bytes, nothing learned twice."""
    folder = sized("llama", tmp_path / "m", head_dim=32)
    all_kinds = [
        *("learn.surrogate.objective=clip", "learn.surrogate.steps=5", "learn.surrogate.targets=[r1,r2]"),
        *("learn.blockwise.epochs=1", "learn.end_to_end.steps=2", "learn.end_to_end.batch=1"),
    ]
    whole = quantize(str(folder), tmp_path / "whole", recipe="quarot", settings=all_kinds, **QUICK)
    original, learned = plan.LayerLearner.__call__, []

    def stopping(self, index, known, *loop):
        learned.append((index, known is None))
        if index == 1 and len(learned) == 2:
            raise KeyboardInterrupt
        return original(self, index, known, *loop)

    monkeypatch.setattr(plan.LayerLearner, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        quantize(str(folder), tmp_path / "cut", recipe="quarot", settings=all_kinds, **QUICK)
    cut = quantize(str(folder), tmp_path / "cut", recipe="quarot", settings=all_kinds, resume=True, **QUICK)
    assert learned == [(0, True), (1, True), (0, False), (1, True)]
    first, second = (file_hashes(folder) for folder in (cut, whole))
    assert first.pop("README.md") != second.pop("README.md")  # names its folder
    assert first == second


LOOPS = [
    # R1 by gradients, two layers, end to end; R1 by alternation.
    (
        *("learn.surrogate.optimiser=qr", "learn.surrogate.steps=5", "rotations.r2=klt"),
        *("learn.blockwise.epochs=2", "learn.blockwise.learns=[s_norms,act_clip,weight_clip,r2]"),
        *("learn.end_to_end.steps=4", "learn.end_to_end.batch=1", "learn.end_to_end.learns=[r1,s_ud,kv_clip]"),
    ),
    ("learn.surrogate.optimiser=procrustes", "learn.surrogate.steps=5", "learn.surrogate.polish=3"),
]


@pytest.mark.parametrize(("loops", "count"), [(LOOPS[0], 4), (LOOPS[1], 1)], ids=["gradients", "procrustes"])
def test_every_loop_goes_on_from_its_snapshot(tmp_path, monkeypatch, loops, count):
    """Stopped again and again inside its loops, a run does no pass twice and gives the same bytes."""
    folder = sized("llama", tmp_path / "m", head_dim=32)
    run = partial(quantize, str(folder), recipe="quarot", settings=loops, **QUICK)
    passes, stops, save = [], False, Slot.save

    def counted(self, done, tensors):
        save(self, done, tensors)
        passes.append((self.step, done))
        if stops and len(passes) % 3 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Slot, "save", counted)
    whole, expected = run(tmp_path / "whole"), list(passes)
    assert len({step for step, _ in expected}) == count
    monkeypatch.setattr("rotquant.checkpoint.journal.SNAPSHOT_SECONDS", 0)
    monkeypatch.setattr("rotquant.checkpoint.journal.SNAPSHOT_SHARE", float("inf"))
    passes.clear()
    stops, cut = True, tmp_path / "cut"
    for _ in expected:
        with suppress(KeyboardInterrupt):
            run(cut, resume=True)
    assert passes == expected
    first, second = (file_hashes(folder) for folder in (cut, whole))
    assert first.pop("README.md") != second.pop("README.md")  # names its folder
    assert first == second


@pytest.mark.parametrize("recipe", ["best-online", "baseq"])
def test_half_precision_with_biases(tmp_path, recipe):
    """As real checkpoints come: what learning and GPTQ compute in float32 meets biases in bfloat16."""
    folder = sized("qwen2", tmp_path / "m", head_dim=32, dtype=torch.bfloat16)
    out = quantize(str(folder), tmp_path / "out", recipe=recipe, settings=settings(recipe, *FINE), **QUICK)
    distance = relative(logits(load(out), folder), original_logits(folder))
    assert distance < 0.2, distance


def test_the_sink_counts_in_gptq(tmp_path):
    """attention_weight changes the codes, and only through the Hessians."""
    folder = sized("llama", tmp_path / "m", head_dim=32)
    one, two = (
        quantize(str(folder), tmp_path / f"w{w}", recipe="quarot", settings=[f"weights.attention_weight={w}"], **QUICK)
        for w in (0, 0.9)
    )
    a, b = file_hashes(one), file_hashes(two)
    same = {name for name in a if a[name] == b[name]}
    assert "model-00001-of-00004.safetensors" in same  # the embeddings
    assert "model-00002-of-00004.safetensors" not in same


PAIRS = list(product(OBJECTIVES, SERVES))


@pytest.mark.parametrize(("objective", "optimiser"), PAIRS)
@pytest.mark.parametrize("quantizer", [Activations().rows, KVCache().values])
def test_every_pair_of_objective_and_optimiser_learns_or_is_refused(objective, optimiser, quantizer):
    """At load, not after the rows were collected."""
    chosen = [f"learn.surrogate.{key}" for key in (f"objective={objective}", f"optimiser={optimiser}", "steps=2")]
    if objective not in SERVES[optimiser]:
        with pytest.raises(RotQuantError, match=f"optimiser {optimiser} cannot learn objective {objective}: take "):
            load_recipe("quarot", chosen)
        return
    if optimiser == "procrustes":
        chosen.append("learn.surrogate.polish=1")
    options = load_recipe("quarot", chosen).learn.surrogate
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    found = surrogate(rows, torch.eye(16, dtype=torch.float64), options, quantizer)
    assert torch.allclose(found.mT @ found, torch.eye(16, dtype=torch.float64), atol=1e-4)


def test_the_register_is_what_learning_has():
    """Every objective that recipes know is served, and by what the register says."""
    assert {name for served in SERVES.values() for name in served} == set(OBJECTIVES)
    assert set(SERVES["procrustes"]) - set(SERVES["qr"]) == {"clip", "corner"}


@pytest.mark.parametrize("weights", ["all", "one"])
def test_whose_weights_smoothing_looks_at(tmp_path, weights):
    """A large channel of k_proj changes the scales behind the first norm, unless only q_proj counts."""
    folder = sized("llama", tmp_path / "m", head_dim=32)
    name, scales = "model.layers.0.input_layernorm.weight", []
    changes = ["scales.norms=smooth", f"scales.weights={weights}", "kv.bits=16"]
    for out in ("before", "after"):
        quantize(str(folder), tmp_path / out, recipe="rtn", settings=changes, **QUICK)
        scales.append(load_file(tmp_path / out / "model-00002-of-00004.safetensors")[name])
        for shard in folder.glob("*.safetensors"):
            tensors = load_file(shard)
            if (key := "model.layers.0.self_attn.k_proj.weight") in tensors:
                tensors[key][:, 5] *= 50
                save_file(tensors, shard, metadata={"format": "pt"})
    assert torch.equal(*scales) == (weights == "one")


@pytest.mark.parametrize(
    ("recipe", "setting", "message"),
    [
        ("gsr", "rotations.walsh_block=96", "walsh_block 96 does not divide"),
        ("best", "learn.surrogate.objective=beauty", "learn.surrogate.objective"),
        ("best", "learn.surrogate.steps=0", "learn.surrogate.steps"),
        ("dfrot", "rotations.r1=none", "rotations.r1 is none, and the recipe learns it"),
        ("flatquant", "rotations.r2=none", "rotations.r2 is none, and the recipe learns it"),
        ("frtq", "weights.rank=4096", "weights.rank 4096 is above"),
        ("flatquant", "learn.blockwise.learns=[]", "learn.blockwise.learns is .*, and this recipe has none of these"),
        ("best", "learn.end_to_end={learns: [online]}", "learn.end_to_end.learns is .*none of these"),
        ("baseq", "online.attn=[shift, shift]", "attn has more than one shift"),
        ("baseq", "online.block=24", "online: block 24 is not a power of two"),
        ("best", "learn.surrogate.targets=[]", "learn.surrogate.targets"),
        (
            "best",
            "weights.wide_bits=8",
            "recipe best: weights.wide_bits is of the sites that activations.budget chooses",
        ),
        ("best", "weights=[", "--set weights=.: the value is not valid YAML"),
    ],
)
def test_refusals_name_the_key(tmp_path, recipe, setting, message):
    folder = sized("llama", tmp_path / "m", head_dim=32)
    more = ["weights.group_size=0"] if recipe == "gsr" else []
    with pytest.raises(RotQuantError, match=message):
        quantize(str(folder), tmp_path / "out", recipe=recipe, settings=[*more, setting], **QUICK)
