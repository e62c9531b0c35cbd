"""The original's folder: one reading of it, transformers' own, and what travels with the checkpoint."""

import json
import os
import shutil
from fnmatch import fnmatch
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rotquant
from checkpoints import edit_config, edit_tensors
from rotquant import gate
from rotquant.checkpoint import hub
from rotquant.checkpoint.companions import copy_companions, travelling
from rotquant.checkpoint.original import original_model, read_original
from rotquant.checkpoint.source import INDEX, SINGLE, Source
from rotquant.errors import RotQuantError
from rotquant.learn.initial import initial_transforms
from rotquant.measure.evaluate import evaluate, text_windows
from rotquant.pipeline import quantize
from rotquant.recipes import load_recipe
from rotquant.transforms.fold import Fold
from source_models import HELDOUT, VOCABULARY, source_model

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
TOKENS = torch.arange(3, 35)
FINE = ["weights.bits=8", "activations.bits=8", "activations.clip=1", "kv.bits=16"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A Llama with tied embeddings in one file."""
    return source_model(tmp_path_factory.mktemp("good") / "m", "llama", shard_size="1GB")


@pytest.fixture
def model(good, tmp_path):
    return shutil.copytree(good, tmp_path / "m")


def pass_gate(folder):
    arch, source = read_original(folder)
    transforms = initial_transforms(load_recipe("quarot"), arch, 1, seed=1)
    return gate.check_equivalence(source, arch, Fold(arch, transforms), TOKENS, lambda _: None)


# ---- the output layer -------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", ["own", "equal", "none"])
def test_which_head_counts(model, tmp_path, tied, stored):
    """A stored lm_head, as in transformers; the embedding where it is tied and none is stored; else a refusal."""
    edit_config(model, "tie_word_embeddings", value=tied)
    if stored != "none":
        own = torch.randn(VOCABULARY, 96) * 0.1
        edit_tensors(model, lambda t: t.update({HEAD: own if stored == "own" else t[EMBED].clone()}))
    if stored == "none" and not tied:
        with pytest.raises(RotQuantError, match=r"tensor lm_head.weight is missing"):
            read_original(model)
        return
    assert pass_gate(model) < 1e-4
    made = rotquant.load(quantize(str(model), tmp_path / "out", recipe="rtn", settings=FINE))
    expected = AutoModelForCausalLM.from_pretrained(model)(TOKENS[None]).logits
    assert (made(TOKENS[None]).logits - expected).norm() / expected.norm() < 0.06


def test_a_head_of_another_shape(model):
    edit_tensors(model, lambda t: t.update({HEAD: torch.randn(VOCABULARY + 8, 96)}))
    with pytest.raises(RotQuantError, match=r"lm_head.weight has shape \[2064, 96\], config.json asks for"):
        read_original(model)


# ---- transformers' own model ------------------------------------------------------------------------


def test_what_only_transformers_computes_fails_the_gate(model, monkeypatch):
    """A model class that scales its logits, or its embeddings, as some config field may ask it to."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaForCausalLM.forward

    def scaled(self, *arguments, **options):
        out = forward(self, *arguments, **options)
        out.logits = out.logits * 0.5
        return out

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", scaled)
        with pytest.raises(
            RotQuantError, match=r"logits of the folded model differs .* transformers computes something"
        ):
            pass_gate(model)
    inner = LlamaModel.forward

    def multiplied(self, input_ids=None, **options):
        return inner(self, **(options | {"inputs_embeds": self.embed_tokens(input_ids) * 2}))

    monkeypatch.setattr(LlamaModel, "forward", multiplied)
    with pytest.raises(RotQuantError, match="layer 0 of the folded model differs"):
        pass_gate(model)


def test_the_original_stays_in_its_files(tmp_path):
    """Parameters are what the files hold, without copies, and float32 only while their module runs."""
    folder = source_model(tmp_path / "m", "qwen3", dtype=torch.bfloat16, layers=3)
    widened = []
    _, source = read_original(folder)
    with original_model(source) as model:
        parameters = list(model.parameters())
        assert {p.dtype for p in parameters} == {torch.bfloat16}
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}
        assert sum(storages.values()) <= sum(f.stat().st_size for f in folder.glob("*.safetensors"))  # mapped whole
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(
                lambda *_: widened.append(sum(p.dtype == torch.float32 for p in model.parameters()))
            )
        logits = model(TOKENS[None]).logits
    assert logits.dtype == torch.float32
    assert widened == [0, 0, 0]  # between modules none is wide
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS[None]).logits
    assert torch.allclose(logits, exact, atol=1e-5)


def test_tensors_of_several_dtypes(tmp_path):
    folder = source_model(tmp_path / "m", "llama", dtype=torch.bfloat16, shard_size="1GB")
    edit_tensors(folder, lambda t: t.update({k: v.float() + 1e-4 for k, v in t.items() if "norm" in k}))
    assert pass_gate(folder) < 1e-4


# ---- weights ----------------------------------------------------------------------------------------


def test_two_sets_of_weights(tmp_path):
    folder = source_model(tmp_path / "m", "llama")
    assert (folder / INDEX).exists()
    before = Source(folder).digest()
    save_file({"x": torch.ones(1)}, folder / "consolidated.safetensors")
    save_file({"x": torch.ones(1)}, folder / "model.fp16.safetensors")
    (folder / "original").mkdir()
    shutil.copy(folder / "consolidated.safetensors", folder / "original")
    assert Source(folder).digest() == before  # neither transformers nor vLLM reads them beside an index
    shutil.copy(folder / "consolidated.safetensors", folder / SINGLE)
    with pytest.raises(RotQuantError, match=r"two sets of weights: model.safetensors, which .*; remove one"):
        read_original(folder)


def test_an_index_of_one_file(model):
    names = list(load_file(model / SINGLE))
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))
    assert sorted(Source(model).files) == sorted(names)


def test_layers_that_config_json_does_not_count(model):
    edit_config(model, "num_hidden_layers", value=1)
    with pytest.raises(RotQuantError, match="num_hidden_layers is 1, but the weights are of 2 layers"):
        read_original(model)
    shutil.copy(model / "config.json", model / "adapter_config.json")
    edit_config(model, "num_hidden_layers", value=2)
    with pytest.raises(RotQuantError, match=r"adapter_config.json: the folder holds an adapter"):
        read_original(model)


# ---- the tokenizer ----------------------------------------------------------------------------------


def test_tokens_beyond_the_vocabulary(tmp_path):
    model = source_model(tmp_path / "m", "llama", vocab_size=2048)
    read_original(model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": 2048, "content": "class Test", **flags})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = tmp_path / "text.txt"
    text.write_text("class Test: pass\n" * 400)
    message = "tokenizer.json: token 'class Test' has id 2048, but vocab_size of config.json is 2048"
    with pytest.raises(RotQuantError, match=message):
        quantize(str(model), tmp_path / "o", recipe="rtn")
    with pytest.raises(RotQuantError, match=message):
        evaluate(str(model), text, seq_len=64)


@pytest.mark.parametrize("prefix", ["4", "x\ny"])
def test_a_tokenizer_that_its_library_dies_of(model, prefix):
    edit = json.loads((model / "tokenizer.json").read_text())
    edit["model"]["continuing_subword_prefix"] = prefix
    (model / "tokenizer.json").write_text(json.dumps(edit))
    with pytest.raises(RotQuantError, match=r"tokenizer.json: model.continuing_subword_prefix is"):
        read_original(model)


def test_faults_that_show_when_text_is_read(model):
    edit = json.loads((model / "tokenizer.json").read_text())
    edit["post_processor"]["single"] = [{"SpecialToken": {"id": "<none>", "type_id": 0}}]
    (model / "tokenizer.json").write_text(json.dumps(edit))
    with pytest.raises(RotQuantError, match="no tokenizer that transformers can read"):
        read_original(model)


def test_sizes_are_checked_before_the_tokenizer_is_read(tmp_path):
    """Its reader parses config.json too, and Qwen's config class makes a list of num_hidden_layers."""
    folder = source_model(tmp_path / "m", "qwen3")
    edit_config(folder, "num_hidden_layers", value=10**12)
    with pytest.raises(RotQuantError, match="num_hidden_layers is 1000000000000, expected is"):
        text_windows(HELDOUT, folder, 64)


def test_eval_of_settings_that_transformers_cannot_run(model):
    edit_config(model, "rope_parameters", value={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    edit_config(model, "partial_rotary_factor", value=0.5)
    with pytest.raises(RotQuantError, match="transformers cannot run this model"):
        evaluate(str(model), HELDOUT, tokens=200, seq_len=64)


# ---- what travels -----------------------------------------------------------------------------------

TRAVELS = (
    "LICENSE", "NOTICE.txt", "USE_POLICY.md", "added_tokens.json", "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja", "chat_template.json", "generation_config.json", "merges.txt", "preprocessor_config.json",
    "processor_config.json", "qwen.tiktoken", "special_tokens_map.json", "tekken.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "1_Pooling/config.json", "modules.json",
)  # fmt: skip
STAYS = (
    ".gitattributes", ".git/config", ".cache/huggingface/x", "README.md", "config.json", "consolidated.safetensors",
    "params.json", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf",
    "original/params.json", "original/tokenizer.model", "onnx/model.onnx", "onnx/config.json", "modeling_x.py",
    "trainer_state.json", "training_args.bin", "runs/events.out.tfevents.1", "logo.png", "adapter_config.json",
    "checkpoint-500/tokenizer.json", "quantize_config.json", "inner/config.json", "inner/model.safetensors",
    "journal.json", "2_Dense/model.safetensors", "2_Dense/config.json",
)  # fmt: skip


def test_what_serving_needs_travels():
    assert sorted(travelling(TRAVELS + STAYS)) == sorted(TRAVELS)


def test_copies_stay_inside_the_model(tmp_path, capsys):
    source, out = tmp_path / "m", tmp_path / "m" / "OUT.partial"
    for name in (*TRAVELS, *STAYS):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("x")
    os.symlink(tmp_path / "secret" / "key", source / "tokenizer_extra.json")
    os.symlink(tmp_path / "secret", source / "more_templates")
    out.mkdir()
    (out / "tokenizer.json").write_text("of the output")
    copy_companions(source, out)
    copied = {str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()}
    assert copied == set(TRAVELS)
    assert (out / "tokenizer.json").read_text() == "tokenizer.json"
    said = capsys.readouterr().err
    assert "tokenizer_extra.json: not copied: it is a link to" in said
    assert "logo.png" in said


def test_links_of_a_hub_cache_are_followed(tmp_path):
    snapshot, out = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "out"
    snapshot.mkdir(parents=True)
    out.mkdir()
    (tmp_path / "models--x" / "blobs").mkdir()
    (tmp_path / "models--x" / "blobs" / "123").write_text("{}")
    os.symlink("../../blobs/123", snapshot / "tokenizer.json")
    copy_companions(snapshot, out)
    assert os.listdir(out) == ["tokenizer.json"]
    assert not (out / "tokenizer.json").is_symlink()


# ---- the hub ----------------------------------------------------------------------------------------


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A hub of one repository; what is asked of it is kept."""
    import huggingface_hub

    asked = SimpleNamespace(names=[], weight_map={}, loaded=None)

    def load(model, name, revision):
        assert (name, revision) == (INDEX, "sha")
        (tmp_path / "index.json").write_text(json.dumps({"weight_map": asked.weight_map}))
        return str(tmp_path / "index.json")

    def snapshot(model, revision, allow_patterns):
        asked.loaded = [name for name in asked.names if any(fnmatch(name, p) for p in allow_patterns)]
        return str(tmp_path)

    info = lambda self, model: SimpleNamespace(  # noqa: E731
        sha="sha", siblings=[SimpleNamespace(rfilename=name) for name in asked.names]
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", load)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked


SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def test_each_weight_is_loaded_once(repository):
    repository.names = [
        "config.json",
        INDEX,
        *SHARDS,
        *TRAVELS,
        *STAYS,
        "model.fp16.safetensors",
        "old-00001.safetensors",
    ]
    repository.weight_map = {"a": SHARDS[0], "b": SHARDS[1]}
    hub.download("org/model")
    assert sorted(set(repository.loaded)) == sorted({"config.json", INDEX, *SHARDS, *TRAVELS})
    repository.names = ["config.json", SINGLE, "model.fp16.safetensors", "consolidated.safetensors", *TRAVELS]
    hub.download("org/model")
    assert sorted(repository.loaded) == sorted(["config.json", SINGLE, *TRAVELS])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([INDEX, SINGLE, *SHARDS], "org/model: two sets of weights"),
        (["pytorch_model.bin"], "org/model: neither model.safetensors nor"),
        ([INDEX, SHARDS[0]], "model-00002-of-00002.safetensors: shard named by .* is missing"),
    ],
)
def test_repositories_that_are_refused_before_anything_is_loaded(repository, names, message):
    repository.names, repository.weight_map = ["config.json", *names], {"a": SHARDS[0], "b": SHARDS[1]}
    with pytest.raises(RotQuantError, match=message):
        hub.download("org/model")
    assert repository.loaded is None


# ---- evaluation of originals ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "transformers finds no tensor model.norm.weight"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "logits are not finite"),
    ],
)
def test_eval_refuses_what_it_cannot_measure(model, change, message):
    edit_tensors(model, change)
    with pytest.raises(RotQuantError, match=message):
        evaluate(str(model), HELDOUT, tokens=200, seq_len=64)
