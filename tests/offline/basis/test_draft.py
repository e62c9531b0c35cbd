"""`rotquant draft`: an EAGLE3 draft of the original makes of a checkpoint's hidden states what it made of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle_drafts import STATES, combined, write_draft
from rotquant.basis.draft import KEY, turn_draft
from rotquant.basis.sidecar import Basis
from rotquant.cli import main
from rotquant.errors import RotQuantError
from rotquant.models import read_config
from rotquant.pipeline import quantize
from source_models import source_model

FAST = {"settings": ["weights.method=rtn"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An original, two checkpoints of it (one with an int8 lm_head), one that is not rotated, and a draft."""
    work = tmp_path_factory.mktemp("draft")
    original = source_model(work / "original", "llama", layers=1, tie_word_embeddings=False)
    made = {"original": original, "draft": write_draft(work / "draft", original)}
    made["out"] = quantize(str(original), work / "out", recipe="quarot", **FAST)
    eight = {"settings": [*FAST["settings"], "lm_head.bits=8"]}
    made["int8"] = quantize(str(original), work / "int8", recipe="quarot", **eight)
    made["rtn"] = quantize(str(original), work / "rtn", recipe="rtn", **FAST)
    return made


@pytest.mark.parametrize("norm", ["", "fc_norm", "norm_before_fc"])
def test_turned_on_turned_states_is_the_draft_on_its_own(folders: dict[str, Path], tmp_path: Path, norm: str) -> None:
    draft = write_draft(tmp_path / "draft", folders["original"], norm=norm)
    (draft / "tokenizer_config.json").write_text("{}")
    turned = turn_draft(str(draft), str(folders["out"]), tmp_path / "turned")
    basis = Basis.read(folders["out"], read_config(folders["out"]))
    rows = 3 * torch.randn(7, STATES, basis.arch.hidden_size, dtype=torch.float64)
    expected = combined(draft, rows)
    torch.testing.assert_close(combined(turned, rows @ basis.matrix.double()), expected, rtol=0, atol=1e-5)
    assert (combined(draft, rows @ basis.matrix.double()) - expected).abs().max() > 0.5
    assert json.loads((turned / "config.json").read_text())[KEY] == basis.sha256
    assert (turned / "tokenizer_config.json").is_file()


def test_a_masked_row_is_turned_as_well(folders: dict[str, Path], tmp_path: Path) -> None:
    """Parallel drafting: a stored row stands for those of positions that the target has not seen."""
    draft = write_draft(tmp_path / "draft", folders["original"])
    tensors = load_file(draft / "model.safetensors")
    width = tensors["fc.weight"].shape[1]
    tensors["mask_hidden"] = torch.randn(1, 1, width)
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    turned = load_file(turn_draft(str(draft), str(folders["out"]), tmp_path / "t") / "model.safetensors")
    assert turned["mask_hidden"].shape == (1, 1, width)
    torch.testing.assert_close(
        turned["mask_hidden"].flatten() @ turned["fc.weight"].T,
        tensors["mask_hidden"].flatten() @ tensors["fc.weight"].T,
    )


@pytest.mark.parametrize(("base", "limit"), [("out", 1e-5), ("int8", 2e-2)])
def test_it_gets_the_original_s_tables(folders: dict[str, Path], tmp_path: Path, base: str, limit: float) -> None:
    """A draft without tables of its own would share the target's, which are rotated."""
    draft = write_draft(tmp_path / "draft", folders["original"], own=False)
    turned = load_file(turn_draft(str(draft), str(folders[base]), tmp_path / "t") / "model.safetensors")
    shards = [load_file(f) for f in sorted(folders["original"].glob("*.safetensors"))]
    original = {name: tensor for shard in shards for name, tensor in shard.items()}
    for got, wanted in (("embed_tokens", "model.embed_tokens"), ("lm_head", "lm_head")):
        difference = turned[f"{got}.weight"] - original[f"{wanted}.weight"]
        assert difference.norm() < limit * original[f"{wanted}.weight"].norm()


def test_a_smaller_vocabulary_gets_its_rows_of_lm_head(folders: dict[str, Path], tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft", folders["original"])
    tensors = load_file(draft / "model.safetensors")
    own = torch.tensor([3, 10, 500, 2000])
    del tensors["lm_head.weight"]
    tensors["d2t"] = own - torch.arange(4)
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    turned = load_file(turn_draft(str(draft), str(folders["out"]), tmp_path / "t") / "model.safetensors")
    shards = [load_file(f) for f in sorted(folders["original"].glob("*.safetensors"))]
    head = next(shard["lm_head.weight"] for shard in shards if "lm_head.weight" in shard)
    torch.testing.assert_close(turned["lm_head.weight"], head[own], atol=1e-5, rtol=0)
    assert torch.equal(turned["d2t"], tensors["d2t"])


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if name not in n}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def stating(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def narrow(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["fc.weight"] = tensors["fc.weight"][:, 1:].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


REFUSED = {
    "EAGLE-1": (without("hidden_norm"), r"not an EAGLE3 draft .*: EAGLE-1, Medusa, MTP"),
    "no fc": (without("fc.weight"), "not an EAGLE3 draft"),
    "rows behind the norm": (stating(eagle_config={"use_aux_hidden_state": False}), "use_aux_hidden_state is false"),
    "turned already": (stating(**{KEY: "0" * 64}), f"config.json: {KEY}: this draft is turned already"),
    "quantized": (stating(quantization_config={"quant_method": "fp8"}), "config.json: quantization_config"),
    "another size": (narrow, r"fc.weight reads 287 numbers, which are not rows of the checkpoint's hidden size 96"),
    "another vocabulary": (stating(vocab_size=7), "vocab_size is 7, the checkpoint's is 2056"),
    "eagle_config no object": (stating(eagle_config=[1]), "eagle_config is no JSON object"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "DRAFT must be the folder of a draft"),
    "config no object": (lambda folder: (folder / "config.json").write_text("[]"), "DRAFT must be the folder"),
    "pickle": (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "only safetensors"),
    "gains": (lambda folder: add(folder, "fc_norm.0.weight", torch.ones(5)), "5 gains in front of 288 inputs"),
    "no layer": (without("midlayer"), "not an EAGLE3 draft"),
}  # fmt: skip


def add(folder: Path, name: str, tensor: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors") | {name: tensor}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("what", REFUSED)
def test_refused(folders: dict[str, Path], tmp_path: Path, what: str) -> None:
    change, message = REFUSED[what]
    shutil.copytree(folders["draft"], tmp_path / "draft")
    change(tmp_path / "draft")
    with pytest.raises(RotQuantError, match=message):
        turn_draft(str(tmp_path / "draft"), str(folders["out"]), tmp_path / "turned")
    assert not (tmp_path / "turned").exists()


def test_nothing_to_turn(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RotQuantError, match=r"its residual stream is not rotated: serve .* as it is"):
        turn_draft(str(folders["draft"]), str(folders["rtn"]), tmp_path / "turned")


def test_on_the_command_line(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["draft", str(folders["draft"]), "--base", str(folders["out"]), "-o", str(tmp_path / "turned")]
    assert main(arguments) == 0
    assert '"method": "eagle3"' in capsys.readouterr().out
    assert main(arguments) == 2
    assert capsys.readouterr().err.endswith("exists; choose another -o, or remove it\n")
