"""The specification as a backend: plain torch, everywhere, for everything."""

from __future__ import annotations

from rotquant_kernels.backends.backend import Backend


class Reference(Backend):
    name = "reference (torch)"

    def has(self, op: str) -> bool:
        return True
