"""A GPU that is not there: every Triton launch compiles as the host code asks for it, and nothing runs.

The host code itself chooses each specialization, from CPU tensors: an integer argument that is 1 or a multiple of 16,
a pointer that is aligned, the tiles of a batch. What it chooses is what users compile.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from rotquant_kernels.cuda import device, gemm, kv4, rows_long

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# KiB of shared memory that a program may have, processors.
GPUS = {80: (163, 108), 86: (99, 84), 89: (99, 128), 90: (227, 132), 100: (227, 148), 120: (99, 170)}


class Compiled(NamedTuple):
    """A kernel as a launch wanted it."""

    name: str
    kernel: Any  # triton's CompiledKernel

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return int(self.kernel.metadata.shared)

    def spilled(self) -> int:
        """Bytes of stack of a thread, from the machine code: registers that did not suffice."""
        return self._uses("STACK")

    def registers(self) -> int:
        """Of a thread, from the machine code."""
        return self._uses("REG")

    def _uses(self, what: str) -> int:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            command = [CUOBJDUMP, "--dump-resource-usage", file.name]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return max(int(count) for count in re.findall(rf"{what}:(\d+)", said))


@contextmanager
def stand_in(arch: int) -> Iterator[list[Compiled]]:
    """Makes every launch compile for sm_`arch`; the list grows with each new variant of a kernel, never with a known
    one."""
    found: list[Compiled] = []
    seen: set[int] = set()
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            found.append(Compiled(self.fn.__name__, kernel))
        return kernel

    gpu = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,  # Triton keeps the kernels of each device apart
        get_current_stream=lambda index=None: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
        utils=SimpleNamespace(),
    )
    stood = device.Device(GPUS[arch][1], 16 if arch // 10 == 10 else 8, arch)
    with ExitStack() as patched:
        for module in (gemm, kv4, rows_long):
            patched.enter_context(mock.patch.object(module, "device_of", return_value=stood))
        patched.enter_context(mock.patch.object(kv4, "INTERPRETED", False))
        patched.enter_context(mock.patch.object(driver, "_active", gpu))
        patched.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        yield found
