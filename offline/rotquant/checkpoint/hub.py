"""A model as a local folder, from the Hugging Face hub where need be: each weight once, and what travels with it."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from rotquant.checkpoint.companions import travelling
from rotquant.checkpoint.source import INDEX, read_weight_map, weight_files
from rotquant.common.json_files import short
from rotquant.errors import RotQuantError


def fetch(model: str) -> Path:
    """The local folder of a model: itself, or a snapshot of the hub id.

    Raises:
        RotQuantError: neither a folder nor a hub id that can be had.
    """
    if Path(model).is_dir():
        return Path(model)
    if Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise RotQuantError(f"{model}: no such folder")
    return download(model)


def download(model: str) -> Path:
    """A snapshot of a hub id, or what of it is in the cache where the hub cannot be reached.

    Many repositories hold their weights twice or more (original/, consolidated.safetensors, variants, .bin, GGUF): the
    files are chosen by name, and by the index of shards, before anything large is loaded.

    Raises:
        RotQuantError: no such model, no safetensors, or two sets of weights.
    """
    import huggingface_hub

    try:
        info: Any = huggingface_hub.HfApi().model_info(model)
    except Exception as error:  # the hub's many exceptions all mean: not to be had
        return _cached(model, error)
    try:
        wanted = chosen(model, [file.rfilename for file in info.siblings], info.sha)
        patterns = [glob.escape(name) for name in wanted]
        return Path(huggingface_hub.snapshot_download(model, revision=info.sha, allow_patterns=patterns))
    except RotQuantError:
        raise
    except Exception as error:
        raise RotQuantError(f"{model}: the hub does not give it: {short(error, 200)}") from error


def chosen(model: str, names: list[str], revision: str) -> list[str]:
    """Names of the files to load, of all that the repository has."""
    from huggingface_hub import hf_hub_download

    index = [INDEX] if INDEX in names else []
    weight_map = read_weight_map(Path(hf_hub_download(model, INDEX, revision=revision))) if index else None
    present = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    return ["config.json", *index, *weight_files(model, present, weight_map), *travelling(names)]


def _cached(model: str, reason: Exception) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except Exception as error:
        raise RotQuantError(
            f"{model}: no local folder of that name, and the hub does not give it: {short(reason, 200)}"
        ) from error
