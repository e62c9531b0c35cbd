"""Tiers of other processors: cross-compiled, without torch, and run under an emulator (tier_calls.cpp)."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rotquant_kernels import build, ops

CALLS = ("quantize", "linear", "kv_write", "kv_attend", "add_rows")  # in the order of tier_calls.cpp
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STAGES = ("none", *ops.native.stages())
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def program(folder: Path) -> Path:
    """tier_calls with every tier of aarch64; skips the test where it cannot be made or run."""
    for name in (COMPILER, EMULATOR):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")
    files = [f for f in build.sources("aarch64") if f.name.startswith("tier_")]
    files.append(Path(__file__).with_name("tier_calls.cpp"))

    flags = ["-O1", *os.environ.get("CXXFLAGS", "").split()]  # those of sanitizers, for instance

    def compiled(source: Path) -> str:
        made = str(folder / f"{source.stem}.o")
        own = build.tiers("aarch64").get(source.name, [])
        build.call([COMPILER, *build.COMMON, *own, *flags, f"-I{build.SOURCES}", "-c", str(source), "-o", made])
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, files))
    made = folder / "tier_calls"
    build.call([COMPILER, *flags, *objects, "-o", str(made)])
    return made


class Calls:
    """Calls one after the other and how many bytes each gives back; all of them run in one process."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.sizes: list[int] = []

    def add(self, name: str, size: int, *arguments: int | float | torch.Tensor | None) -> int:
        """Number of the call; its result has `size` bytes. An array goes with its size, none as one of size 0."""
        self.sent += struct.pack("<q", CALLS.index(name))
        for value in arguments:
            if isinstance(value, torch.Tensor) or value is None:
                data = b"" if value is None else value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                self.sent += struct.pack("<q", len(data)) + data
            else:
                self.sent += struct.pack("<d" if isinstance(value, float) else "<q", value)
        self.sizes.append(size)
        return len(self.sizes) - 1

    def run(self, tool: Path, processor: str, tier: str = "") -> tuple[str, list[bytes]]:
        """The tier that ran, and the result of each call."""
        command = [EMULATOR, "-L", "/usr/aarch64-linux-gnu", "-cpu", processor, str(tool), tier]
        # Leaks are looked for by tracing the process; a library to preload (vLLM sets its own) is of another processor.
        environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": ""}
        done = subprocess.run(command, input=bytes(self.sent), env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()[-4000:]
        assert len(done.stdout) == sum(self.sizes)
        results, at = [], 0
        for size in self.sizes:
            results.append(done.stdout[at : at + size])
            at += size
        return done.stderr.decode(), results


def rows(x: torch.Tensor, stage: tuple[str, int, torch.Tensor | None], bits: int, symmetric: bool, clip: float,
         silu_mul: bool) -> list[int | float | torch.Tensor | None]:  # fmt: skip
    """Arguments of `quantize`, the first ones of `linear`."""
    name, block, tensor = stage
    columns = x.shape[1] // 2 if silu_mul else x.shape[1]
    return [DTYPES.index(x.dtype), len(x), columns, int(silu_mul), STAGES.index(name), block, bits, int(symmetric),
            clip, x, tensor]  # fmt: skip


def numbers(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)
