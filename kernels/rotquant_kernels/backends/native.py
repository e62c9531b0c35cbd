"""The C++ kernels of CPUs, in the tier that was chosen (`rotquant_kernels.native`)."""

from __future__ import annotations

from rotquant_kernels import native
from rotquant_kernels.backends.backend import Backend


class Native(Backend):
    name = "native"
    device = "cpu"
    reads_quantized = False  # its GEMM has no other way in than rows of floats

    def has(self, op: str) -> bool:
        return native.tier() != native.REFERENCE and super().has(op)

    def kernel(self, op: str) -> str:
        return f"native ({native.tier()})"

    def stages(self) -> tuple[str, ...]:
        return native.stages()
