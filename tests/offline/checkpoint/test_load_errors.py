"""Files and configs that `rotquant.load` must refuse, each with a line that names what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rotquant
from checkpoints import HEAD, edit_config, edit_tensors, tiny, write_checkpoint
from rotquant.errors import RotQuantError

FULL: dict[str, Any] = {"kv": True, "r3": True, "r4": "hadamard", "symmetric": False}
UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        (f"{UP}.weight_packed", lambda t: t.pop(f"{UP}.weight_packed")),
        (f"{UP}.weight_packed", lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"][:, 1:]})),
        (f"{UP}.weight_packed", lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"].long()})),
        (f"{UP}.weight_scale", lambda t: t[f"{UP}.weight_scale"].fill_(float("nan"))),
        (f"{UP}.weight_shape", lambda t: t.update({f"{UP}.weight_shape": torch.tensor([1, 2])})),
        ("model.norm.weight", lambda t: t.pop("model.norm.weight")),
        (f"{UP}.lowrank_up", lambda t: t.update({f"{UP}.lowrank_up": torch.ones(2)})),
        (f"{DOWN}.R4_input.weight", lambda t: t[f"{DOWN}.R4_input.weight"].neg_()),
        (f"{DOWN}.R4_input.weight", lambda t: t.update({f"{DOWN}.R4_input.weight": torch.eye(16)})),
    ],
    ids=["missing", "shape", "dtype", "nan", "weight_shape", "norm", "extra", "marker", "marker shape"],
)
def test_bad_tensors_are_named(name: str, edit: Callable[[dict[str, Tensor]], Any], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "out", tiny(**FULL))
    edit_tensors(folder, edit)
    with pytest.raises(RotQuantError, match=rf"{re.escape(str(folder))}.*{re.escape(name)}"):
        rotquant.load(folder)


def test_missing_dense_matrix_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "out", tiny(r4="dense"))
    edit_tensors(folder, lambda tensors: tensors.pop(f"{DOWN}.R4_input.weight"))
    with pytest.raises(RotQuantError, match=re.escape(f"{DOWN}.R4_input.weight")):
        rotquant.load(folder)


def test_a_transform_left_out_of_the_config_is_noticed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "out", tiny(r4="hadamard"))
    edit_config(folder, "quantization_config", "transform_config", value=None)
    with pytest.raises(RotQuantError, match=r"R4_input\.weight is not part of this model"):
        rotquant.load(folder)


def test_bad_shards_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "out", tiny(shards=3))
    shard, index = folder / "model-00002-of-00003.safetensors", folder / "model.safetensors.index.json"
    content, listing = shard.read_bytes(), json.loads(index.read_text())
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(RotQuantError, match=shard.name):
        rotquant.load(folder)
    shard.unlink()
    with pytest.raises(RotQuantError, match=shard.name):
        rotquant.load(folder)
    shard.write_bytes(content)
    listing["weight_map"]["model.ghost"] = shard.name
    index.write_text(json.dumps(listing))
    with pytest.raises(RotQuantError, match=r"model\.ghost"):
        rotquant.load(folder)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("rotquant", "format_version"), 99, "update rotquant"),
        (("rotquant", "lowrank"), {"rank": 4}, "rotquant.lowrank"),
        (("quantization_config",), {}, "not a rotquant checkpoint"),
        (("quantization_config", "kv_cache_scheme", "group_size"), 2 * HEAD, "group_size"),
        (("quantization_config", "transform_config", "config_groups", "R4", "head_dim"), 64, "transform blocks of 64"),
        (("model_type",), "unheard-of", "config.json"),
    ],
    ids=lambda part: str(part)[:30],
)
def test_bad_configs_are_refused(keys: tuple[str, ...], value: Any, message: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "out", tiny(**FULL))
    edit_config(folder, *keys, value=value)
    with pytest.raises(RotQuantError, match=message):
        rotquant.load(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RotQuantError, match="nowhere"):
        rotquant.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RotQuantError, match=re.escape("config.json")):
        rotquant.load(tmp_path / "empty")
