"""Safetensors folders: a source that is checked before anything is read, and files that are written whole.

Only safetensors are read, never pickle. Nothing is loaded but the tensor asked for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rotquant.checkpoint.spool import Spool
from rotquant.common.json_files import read_object, short
from rotquant.errors import RotQuantError
from rotquant.models.text_half import own_name

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Source:
    """The weights of a Hugging Face folder.

    Args:
        folder: local folder with model.safetensors, or model.safetensors.index.json and its shards.
    Raises:
        RotQuantError: naming the file, and the tensor where there is one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}  # tensor -> file
        self.stored: dict[str, str] = {}  # tensor -> what the file calls it
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.finite: set[str] = set()  # tensors that were read whole, once: a search reads them in each trial
        index = folder / INDEX
        present = [file.name for file in folder.glob("*.safetensors") if file.is_file()]
        weight_map = read_weight_map(index) if index.is_file() else None
        for name in weight_files(str(folder), present, weight_map):
            self._read_header(folder / name)
        for name, shard in (weight_map or {}).items():
            if self.files.get(own_name(name)) != folder / shard:
                raise RotQuantError(f"{index}: weight_map puts {short(name, 100)} into {shard}, but it is not there")

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as opened:
                for stored in opened.keys():  # noqa: SIM118 - not a dict
                    name = own_name(stored)
                    if name in self.files:
                        raise RotQuantError(f"{file}: {name} is in {self.files[name].name} too; one of them is wrong")
                    view = opened.get_slice(stored)
                    self.stored[name] = stored
                    self.files[name] = file
                    self.shapes[name] = tuple(view.get_shape())
                    self.dtypes[name] = view.get_dtype()
        except (SafetensorError, OSError, ValueError) as error:
            raise RotQuantError(
                f"{file}: truncated or not a safetensors file ({short(error)}); download it again"
            ) from error

    @staticmethod
    def names(file: Path) -> list[str]:
        """Names of the tensors in a safetensors file."""
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())

    def check(self, expected: dict[str, tuple[int, ...]], optional: Iterable[str] = ()) -> None:
        """Compares names, shapes and dtypes with those of the architecture.

        Raises:
            RotQuantError: on a missing tensor, one too many, a wrong shape or dtype.
        """
        for name, shape in expected.items():
            if name not in self.files:
                raise RotQuantError(f"{self.folder}: tensor {name} is missing; the config asks for it")
            if self.shapes[name] != shape:
                raise RotQuantError(
                    f"{self.files[name]}: {name} has shape {list(self.shapes[name])},"
                    f" config.json asks for {list(shape)}"
                )
        for name in self.files:
            if name not in expected and name not in optional and not name.endswith("rotary_emb.inv_freq"):
                raise RotQuantError(f"{self.files[name]}: {name} is not part of this architecture; it would be lost")
            if name in expected and self.dtypes[name] not in DTYPES:
                raise RotQuantError(
                    f"{self.files[name]}: {name} has dtype {self.dtypes[name]}, supported are {', '.join(DTYPES)}"
                )

    def get(self, name: str, part: tuple[int | slice, ...] | None = None) -> Tensor:
        """One tensor.

        Args:
            part: what of it is wanted, None for all; nothing else is read.
        Raises:
            RotQuantError: NaN or infinite values.
        """
        try:
            with safe_open(self.files[name], framework="pt") as opened:
                stored = self.stored[name]
                tensor = opened.get_tensor(stored) if part is None else opened.get_slice(stored)[part]
        except (SafetensorError, OSError, ValueError) as error:
            raise RotQuantError(f"{self.files[name]}: {name} cannot be read: {short(error)}") from error
        known = name in self.finite or tensor.dtype.itemsize == 1  # 8-bit numbers: not defined
        if not known and not torch.isfinite(tensor).all():
            raise RotQuantError(f"{self.files[name]}: {name} holds NaN or infinite values")
        if part is None:
            self.finite.add(name)
        return tensor

    def beginning(self, prefixes: tuple[str, ...]) -> list[str]:
        """Names of the tensors that begin with one of these."""
        return [name for name in self.files if name.startswith(prefixes)] if prefixes else []

    def layer(self, prefix: str) -> dict[str, Tensor]:
        """All tensors of a layer, by their names less the prefix."""
        names = [n for n in self.files if n.startswith(prefix) and not n.endswith("rotary_emb.inv_freq")]
        return {name[len(prefix) :]: self.get(name) for name in names}

    def digest(self) -> str:
        """sha256 over the names and bytes of all files; identifies the source in the journal and the card."""
        total = hashlib.sha256()
        for file in sorted(set(self.files.values())):
            total.update(f"{file.name}:{file_digest(file)};".encode())
        return total.hexdigest()


def file_digest(file: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, by an index of shards.

    Raises:
        RotQuantError: no such object in the file, or names of files that are none of its folder.
    """
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RotQuantError(f"{index}: no weight_map, the object that names the shard of each tensor")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise RotQuantError(
                f"{index}: weight_map names {short(repr(shard), 100)} for {short(name, 100)}, which is not a file of"
                " this folder"
            )
    return weight_map


def weight_files(where: str, present: Collection[str], weight_map: dict[str, str] | None) -> list[str]:
    """The files that hold the weights, where a folder or repository has more than those.

    transformers takes model.safetensors and leaves the index alone, vLLM takes what the index names: with both, two
    readers would read two models. Other files (consolidated.safetensors, model.fp16.safetensors) neither takes.

    Args:
        where: for messages; present: names of all its safetensors files; weight_map: of the index, None without one.
    Raises:
        RotQuantError: none, both, or a shard that is missing.
    """
    shards = sorted(set((weight_map or {}).values()))
    if SINGLE in present and shards not in ([], [SINGLE]):
        raise RotQuantError(
            f"{where}: two sets of weights: {SINGLE}, which transformers reads, and the shards of {INDEX}, which vLLM"
            " reads; remove one"
        )
    if SINGLE in present:
        return [SINGLE]
    if not shards:
        raise RotQuantError(f"{where}: neither {SINGLE} nor {INDEX}; only safetensors checkpoints are read")
    for shard in shards:
        if shard not in present:
            raise RotQuantError(f"{where}/{shard}: shard named by {INDEX} is missing; download it again")
    return shards


def save_tensors(file: Path, tensors: dict[str, Tensor], spool: Spool | None = None) -> None:
    """Writes a safetensors file, of these and what waits in a spool, so that it is there whole or not at all, power
    loss included."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask gives; save_file makes its files private
        if spool:
            spool.save(temporary, tensors)
        else:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)
        commit(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_text(file: Path, text: str) -> None:
    """Writes a text file so that it is there whole or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text)
    commit(temporary, file)


def commit(temporary: Path, file: Path) -> None:
    """Renames a finished temporary file onto its name, both on disk before this returns."""
    with temporary.open("rb") as opened:
        os.fsync(opened.fileno())
    temporary.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
