"""`rotquant quantize` as a user runs it: what it writes, that it repeats, and that nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rotquant
from rotquant.checkpoint.format import CheckpointFormat
from rotquant.checkpoint.journal import Journal
from rotquant.checkpoint.source import Source
from rotquant.common.devices import Devices
from rotquant.errors import RotQuantError
from rotquant.pipeline import quantize
from rotquant.recipes.schemes import target_settings
from rotquant.run import Settings, prepare
from source_models import HELDOUT, KINDS, file_hashes, source_model

QUICK = {"recipe": "quarot", "calibration": str(HELDOUT), "samples": 4, "seq_len": 64}


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits_reproduce_the_original(tmp_path, kind):
    """Where rounding is fine, only a wrong fold, bias or op could move the logits far (by 1 or more)."""
    folder = source_model(tmp_path / "m", kind, hardened=True)
    fine = ["weights.bits=8", "activations.bits=8", "activations.clip=1", "kv.bits=16", "lm_head.bits=8"]
    model = rotquant.load(quantize(str(folder), tmp_path / "out", settings=fine, **QUICK))
    ids = torch.arange(5, 60)[None]
    expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert (model(ids).logits - expected).norm() / expected.norm() < 0.06


def test_the_output_is_a_complete_model_folder(tmp_path):
    folder = source_model(tmp_path / "m", "qwen2", dtype=torch.bfloat16)
    (folder / "code.py").write_text("print('never copied')")
    out = quantize(str(folder), tmp_path / "out", settings=["lm_head.bits=8"], **QUICK)
    names = set(os.listdir(out))
    shards = {f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)}
    assert names == shards | {
        "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "README.md", "rotquant_basis.safetensors",
    }  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert not config["tie_word_embeddings"]
    parsed = CheckpointFormat(config["quantization_config"], config["rotquant"], 32)
    assert parsed.kv is not None
    assert parsed.kv.rotate == 32
    down = parsed.linear("model.layers.1.mlp.down_proj")
    assert ([(t.kind, t.block) for t in down.transforms], down.rows.clip) == ([("hadamard", 16)], 0.9)
    assert parsed.linear("lm_head").weights.bits == 8
    card = (out / "README.md").read_text()
    assert "vllm serve out --quantization rotquant" in card
    assert "W4A4KV4" in card
    assert "`quarot`" in card
    source = Source(out)
    assert source.dtypes["model.embed_tokens.weight"] == "BF16"
    assert "model.layers.0.mlp.down_proj.R4_input.weight" in source.files
    assert {file.name for file in source.files.values()} == shards  # the basis is no weight


def test_a_target_s_lm_head_stays_where_vllm_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(source_model(tmp_path / "source", "gemma2"))
    settings = target_settings("cpu", None)
    assert prepare(folder, Settings("rtn", settings)).recipe.lm_head.bits == 16
    assert "lm_head stays in 16 bits" in capsys.readouterr().err
    with pytest.raises(RotQuantError, match=r"has no lm_head but the embedding: quantize with --set lm_head\.bits=16"):
        prepare(folder, Settings("rtn", ["lm_head.bits=8"]))


def test_portable_loads_in_plain_transformers(tmp_path):
    folder = source_model(tmp_path / "m", "llama", initializer_range=0.02)
    out = quantize(str(folder), tmp_path / "out", profile="portable", **QUICK)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "kv_cache_scheme" not in config
    assert "transform_config" not in config
    ids = torch.arange(5, 60)[None]
    theirs = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    ours = rotquant.load(out)(ids).logits
    # absmax / 7.5 puts the extreme of each row on the tie at ±7.5, where the last bit of a sum decides.
    assert (ours - theirs).norm() / theirs.norm() < 0.1


def test_one_seed_gives_one_set_of_files(tmp_path):
    folder = source_model(tmp_path / "m", "qwen3")
    first, second = (quantize(str(folder), tmp_path / f"{n}" / "out", seed=5, **QUICK) for n in (1, 2))
    assert file_hashes(first) == file_hashes(second)
    other = quantize(str(folder), tmp_path / "3" / "out", seed=6, **QUICK)
    assert (
        file_hashes(first)["model-00002-of-00004.safetensors"] != file_hashes(other)["model-00002-of-00004.safetensors"]
    )


def start(folder: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rotquant", "quantize", str(folder), "-o", str(out), "--recipe", "quarot"]
    command += ["--calibration", str(HELDOUT), "--samples", "4", "--seq-len", "64", *more]
    # A shell starts background jobs with SIGINT ignored, which would be inherited.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)


def steps_done(out: Path) -> int:
    try:
        return len(json.loads((out.with_name(out.name + ".partial") / "journal.json").read_text())["steps"])
    except (OSError, ValueError):
        return 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A model of ten layers, and what becomes of it in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    source = source_model(folder / "m", "llama", layers=10)
    return source, quantize(str(source), folder / "out", **QUICK)


KILLS = [(signal.SIGKILL, 5), (signal.SIGINT, 4), pytest.param(signal.SIGKILL, 2, marks=pytest.mark.release)]


@pytest.mark.parametrize(("kill", "steps"), KILLS)
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, uninterrupted, kill, steps):
    """Killed after so many steps: the gate, the embedding, then layers; enough are left to be killed in."""
    folder, whole = uninterrupted
    out = tmp_path / "killed" / "out"
    process = start(folder, out)
    while steps_done(out) < steps and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(kill)
    errors = process.communicate()[1]
    assert process.returncode == (-9 if kill == signal.SIGKILL else 130), errors
    assert not out.exists()
    assert steps <= steps_done(out) < 13
    if kill == signal.SIGINT:
        assert "--resume" in errors
    resumed = start(folder, out, "--resume")
    errors = resumed.communicate()[1]
    assert "equivalence gate" not in errors, "finished steps were done again"
    assert resumed.returncode == 0
    assert file_hashes(out) == file_hashes(whole)
    assert not out.with_name("out.partial").exists()


def test_an_unfinished_run_is_only_continued_by_its_own_settings(tmp_path, monkeypatch):
    folder, out = source_model(tmp_path / "m", "llama", layers=3), tmp_path / "out"
    real = Journal.finish

    def interrupted(self, step, *arguments, **facts):
        real(self, step, *arguments, **facts)
        if step == "layer 1":
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(str(folder), out, **QUICK)
    monkeypatch.setattr(Journal, "finish", real)
    with pytest.raises(RotQuantError, match="unfinished run; add --resume"):
        quantize(str(folder), out, **QUICK)
    with pytest.raises(RotQuantError, match="differs in seed"):
        quantize(str(folder), out, resume=True, seed=3, **QUICK)
    shard = next((tmp_path / "out.partial").glob("model-00002-*"))
    good = shard.read_bytes()
    shard.write_bytes(good[:-1])
    with pytest.raises(RotQuantError, match="changed since step layer 0"):
        quantize(str(folder), out, resume=True, **QUICK)
    shard.write_bytes(good)
    quantize(str(folder), out, resume=True, **QUICK)
    assert quantize(str(folder), out, resume=True, **QUICK) == out  # finished: nothing to do
    with pytest.raises(RotQuantError, match="output folder exists"):
        quantize(str(folder), out, resume=True, seed=3, **QUICK)


def test_memory_holds_two_layers_at_most(tmp_path, monkeypatch):
    """When a layer is read, of all those before it only the last one may still be there."""
    import gc
    import weakref

    alive: list[list[weakref.ref]] = []
    real = Source.layer

    def watched(self, prefix):
        gc.collect()
        assert not [ref for layer in alive[:-1] for ref in layer if ref() is not None], prefix
        tensors = real(self, prefix)
        alive.append([weakref.ref(t) for t in tensors.values()])
        return tensors

    monkeypatch.setattr(Source, "layer", watched)
    quantize(str(source_model(tmp_path / "m", "llama", layers=4)), tmp_path / "out", **QUICK)
    assert len(alive) == 8


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


LEARNED = {
    "recipe": "kurtail",
    "settings": ["learn.surrogate.steps=5", "weights.attention_weight=0.9", "weights.refit=false"],
}


@pytest.mark.parametrize("changes", [{}, LEARNED], ids=["quarot", "learned"])
def test_two_devices_share_the_windows(tmp_path, monkeypatch, changes):
    """Learning and quantizing are spread over both; what differs from one device is the rounding of two sums."""
    used = set()
    run = Devices._run

    def spy(self, work, worker, indices, stores, stop):
        used.add((worker, len(indices)))
        return run(self, work, worker, indices, stores, stop)

    monkeypatch.setattr(Devices, "_run", spy)
    folder = source_model(tmp_path / "m", "llama")
    one = quantize(str(folder), tmp_path / "one", device="cpu", **QUICK | changes)
    assert used == {(0, 4)}
    used.clear()
    two = quantize(str(folder), tmp_path / "two", device="cpu,cpu", **QUICK | changes)
    assert used == {(0, 2), (1, 2)}
    a, b = tensors_of(one), tensors_of(two)
    assert a.keys() == b.keys()
    for name in a:
        if name.endswith("weight_packed"):
            different = sum(((a[name] ^ b[name]) >> 4 * i & 15 != 0).double().mean() for i in range(8)) / 8
            assert different < 0.03, (name, different)
        else:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=name)
