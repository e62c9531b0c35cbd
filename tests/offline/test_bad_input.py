"""Bad input: one line that names file and field, and nothing left behind."""

import json
import os
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import rotquant
from rotquant.checkpoint import journal as journal_module
from rotquant.checkpoint.format import CheckpointFormat
from rotquant.errors import RotQuantError
from rotquant.pipeline import quantize
from source_models import HELDOUT, source_model

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00006.safetensors"
SETTINGS = {"recipe": "quarot", "calibration": str(HELDOUT), "samples": 2, "seq_len": 64}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = source_model(tmp_path_factory.mktemp("source") / "m", "llama")
    assert (folder / SHARD).is_file()
    return folder


@pytest.fixture
def model(good, tmp_path):
    return shutil.copytree(good, tmp_path / "m")


def edit_json(file, change):
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def edit_shard(folder, change, shard=SHARD):
    tensors = load_file(folder / shard)
    change(tensors)
    save_file(tensors, folder / shard, metadata={"format": "pt"})


def first_name(folder):
    return next(iter(load_file(folder / SHARD)))


def refused(model, pattern, **more):
    """Runs quantize; it must fail with one line and leave only what was there."""
    before = sorted(os.listdir(model.parent))
    with pytest.raises(RotQuantError, match=pattern) as caught:
        quantize(str(model), model.parent / "out", **(SETTINGS | more))
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(model.parent)) == before


def test_missing_shard(model):
    (model / SHARD).unlink()
    refused(model, f"{SHARD}: shard named by .* is missing")


def test_truncated_shard(model):
    data = (model / SHARD).read_bytes()
    (model / SHARD).write_bytes(data[: len(data) // 2])
    refused(model, f"{SHARD}: truncated")


def test_tensor_in_two_shards(model):
    name = first_name(model)
    tensor = load_file(model / SHARD)[name]
    edit_shard(model, lambda t: t.update({name: tensor}), "model-00003-of-00006.safetensors")
    refused(model, f"{name} is in .* too")


def test_index_names_a_tensor_that_is_not_there(model):
    name = first_name(model)
    edit_shard(model, lambda t: t.pop(name))
    refused(model, f"{INDEX}: weight_map puts {name} into {SHARD}, but it is not there")


def test_index_leaves_the_folder(model):
    edit_json(model / INDEX, lambda d: d["weight_map"].update(x="../secret.safetensors"))
    refused(model, "not a file of this folder")


def test_tensor_missing_everywhere(model):
    name = "model.layers.1.mlp.up_proj.weight"
    shard = json.loads((model / INDEX).read_text())["weight_map"][name]
    edit_json(model / INDEX, lambda d: d["weight_map"].pop(name))
    edit_shard(model, lambda t: t.pop(name), shard)
    refused(model, f"tensor {name} is missing")


def test_tensor_of_another_architecture(model):
    edit_shard(model, lambda t: t.update(extra=torch.zeros(2)))
    refused(model, f"{SHARD}: extra is not part of this architecture")


def test_wrong_shape(model):
    edit_json(model / "config.json", lambda d: d.update(intermediate_size=184))
    refused(model, r"has shape \[.*176.*\], config.json asks for \[.*184.*\]")


def test_wrong_dtype(model):
    name = first_name(model)
    edit_shard(model, lambda t: t.update({name: t[name].to(torch.float64)}))
    refused(model, f"{name} has dtype F64")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights(model, value):
    name = "model.layers.1.mlp.up_proj.weight"
    shard = json.loads((model / INDEX).read_text())["weight_map"][name]
    edit_shard(model, lambda t: t[name].view(-1)[7:8].fill_(value), shard)
    refused(model, f"{shard}: {name} holds NaN or infinite")


def test_unknown_architecture(model):
    edit_json(model / "config.json", lambda d: d.update(architectures=["GPT2LMHeadModel"]))
    refused(model, "config.json: architectures is .*GPT2LMHeadModel.*, supported are")


def test_already_quantized(model):
    edit_json(model / "config.json", lambda d: d.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    refused(model, "config.json: quantization_config: the model is already quantized")


def test_windows_that_only_the_plugin_gives_single_layers(tmp_path):
    mixed = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    model = source_model(tmp_path / "m", "qwen2", **mixed)
    refused(
        model, "config.json: layer_types: vLLM's Qwen2ForCausalLM gives no window to single layers", profile="portable"
    )


def test_head_size_without_a_hadamard(tmp_path):
    model = source_model(tmp_path / "m", "llama", head_dim=24)
    refused(model, "config.json: head_dim is 24, and R3")
    quantize(str(model), tmp_path / "out", **SETTINGS, settings=["rotations.r3=none"])


def test_no_model_and_only_pickle(model, tmp_path):
    refused(tmp_path / "nothing", "nothing: no such folder")
    for file in [*model.glob("*.safetensors"), model / INDEX]:
        file.unlink()
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    refused(model, "only safetensors")


@pytest.mark.parametrize(
    ("more", "pattern"),
    [
        ({"recipe": "nope"}, "unknown recipe 'nope': take one of .*quarot, rrs, rtn"),
        ({"settings": ["weights.bitz=4"]}, "recipe quarot: weights.bitz"),
        ({"settings": ["weights.bits=5"]}, "recipe quarot: weights.bits"),
        ({"settings": ["activations.clip=0"]}, "recipe quarot: activations.clip"),
        ({"settings": ["oops"]}, "write it as key=value"),
        ({"profile": "half"}, "--profile half"),
        ({"tp_max": 3}, "--tp-max 3 does not divide intermediate_size"),
        ({"max_memory": 1e-6}, "--max-memory 1e-06: quantizing needs about .*; lower --samples or --seq-len"),
        ({"max_memory": 1e-6, "recipe": "flatquant"}, "--max-memory 1e-06: learning layer by layer needs about"),
        (
            {"max_memory": 1e-6, "recipe": "spinquant"},
            "learning end to end, .* or take a recipe that works layer by",
        ),
        (
            {"max_memory": 1e-6, "settings": ["tune={tokens: 65536}"]},
            "--max-memory 1e-06: tuning, .* or --set tune=null",
        ),
        ({"settings": ["weights.group_size=40"]}, "not divisible by weights.group_size 40"),
        ({"calibration": "missing.txt"}, "missing.txt: no such calibration file"),
    ],
)
def test_bad_settings(model, more, pattern):
    refused(model, pattern, **more)


@pytest.mark.parametrize(
    ("name", "text", "pattern"),
    [
        ("empty.txt", "  \n", "empty.txt: calibration text is empty"),
        ("short.txt", "def f", "short.txt: .* tokens are too few, one window of 64"),
        ("bad.jsonl", '{"txt": 1}', "bad.jsonl: every line must be a JSON object with a field `text`"),
    ],
)
def test_bad_calibration_text(model, tmp_path, name, text, pattern):
    (tmp_path / name).write_text(text)
    refused(model, pattern, calibration=str(tmp_path / name))


def test_output_folder_exists(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("stays")
    refused(model, "out: output folder exists")


def test_disk_too_small_is_seen_before_any_work(model, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("rotquant.resources.shutil.disk_usage", lambda _: usage(1, 1, 1000))
    refused(model, "disk full: .* GB are needed, 0.00 GB are free")


def test_disk_full_in_the_middle_keeps_what_is_done(model, tmp_path, monkeypatch):
    real, calls = journal_module.save_tensors, []

    def full(file, *given):
        calls.append(file)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        real(file, *given)

    monkeypatch.setattr(journal_module, "save_tensors", full)
    with pytest.raises(RotQuantError, match="disk full; free some space and run again with --resume"):
        quantize(str(model), tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setattr(journal_module, "save_tensors", real)
    assert quantize(str(model), tmp_path / "out", resume=True, **SETTINGS).is_dir()


@pytest.fixture(scope="module")
def checkpoint(good, tmp_path_factory):
    return quantize(str(good), tmp_path_factory.mktemp("ours") / "out", **SETTINGS)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda d: d["rotquant"].update(format_version=2), "rotquant.format_version is 2, this build reads up to 1"),
        (lambda d: d["rotquant"].update(lowrank={"rank": 8}), "rotquant.lowrank"),
        (lambda d: d["rotquant"].update(kv_clip={"key": 2}), "rotquant.kv_clip.key is 2"),
        (lambda d: d["quantization_config"]["kv_cache_scheme"].update(num_bits=3), "kv_cache_scheme.num_bits is 3"),
        (lambda d: d["quantization_config"]["kv_cache_scheme"].update(group_size=16), "kv_cache_scheme.group_size"),
        (
            lambda d: d["quantization_config"]["transform_config"]["config_groups"]["R4"].update(type="kronecker"),
            "transform_config.config_groups.R4.type is 'kronecker', this build of rotquant runs only",
        ),
        (
            lambda d: d["quantization_config"]["transform_config"]["config_groups"]["R4"].update(randomize=True),
            "config_groups.R4.randomize",
        ),
        (
            lambda d: d["quantization_config"]["config_groups"]["group_0"]["weights"].update(symmetric=False),
            "config_groups.group_0.weights.symmetric is False",
        ),
        (
            lambda d: d["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=3),
            "config_groups.group_0.weights.num_bits is 3",
        ),
    ],
)
def test_checkpoints_that_ask_for_more_than_this_build_runs(checkpoint, change, pattern):
    config = json.loads((checkpoint / "config.json").read_text())
    CheckpointFormat(config["quantization_config"], config["rotquant"], 32)
    change(config)
    with pytest.raises(RotQuantError, match=pattern):
        CheckpointFormat(config["quantization_config"], config["rotquant"], 32)


def test_load_says_what_it_lacks(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "newer")
    edit_json(folder / "config.json", lambda d: d["rotquant"].update(format_version=9))
    with pytest.raises(RotQuantError, match="format_version is 9"):
        rotquant.load(folder)
