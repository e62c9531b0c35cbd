"""Tensors of a file that are never in memory together: they wait on disk for the others.

    file = length of the header, header (JSON: dtype, shape and place of each tensor), numbers, without gaps

The header comes first and says where everything lies, so what is made early waits in files of its own, one for each
size of numbers: the largest numbers come first, which keeps all of them at multiples of their size.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.int32: "I32", torch.float32: "F32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


class Spool:
    """The waiting part of one file.

    Args:
        folder: on whose disk it waits, in files without a name; prefix: of the names of what is put here.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix = folder, prefix
        self.parts: dict[int, tuple[BinaryIO, list[tuple[str, torch.dtype, torch.Size]]]] = {}  # by size of numbers

    def put(self, tensors: dict[str, Tensor]) -> None:
        """Writes tensors, by their names less the prefix."""
        for name, tensor in tensors.items():
            size = tensor.dtype.itemsize
            if size not in self.parts:
                self.parts[size] = tempfile.TemporaryFile(dir=self.folder), []  # noqa: SIM115 - closed with the spool
            file, held = self.parts[size]
            write(file, tensor)
            held.append((self.prefix + name, tensor.dtype, tensor.shape))

    def save(self, file: Path, tensors: dict[str, Tensor]) -> None:
        """Writes the safetensors file that holds these and what waited."""
        with file.open("wb") as out:
            header = json.dumps(self._header(tensors), separators=(",", ":")).encode()
            header += b" " * (-len(header) % 8)
            out.write(len(header).to_bytes(8, "little") + header)
            for size in self._sizes(tensors):
                for tensor in tensors.values():
                    if tensor.dtype.itemsize == size:
                        write(out, tensor)
                if size in self.parts:
                    waiting = self.parts[size][0]
                    waiting.seek(0)
                    shutil.copyfileobj(waiting, out)

    def _sizes(self, tensors: dict[str, Tensor]) -> list[int]:
        return sorted({t.dtype.itemsize for t in tensors.values()} | self.parts.keys(), reverse=True)

    def _header(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for size in self._sizes(tensors):
            here = [(name, t.dtype, t.shape) for name, t in tensors.items() if t.dtype.itemsize == size]
            for name, dtype, shape in here + (self.parts[size][1] if size in self.parts else []):
                start, end = end, end + size * shape.numel()
                header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        return header


def write(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
