"""The phases of the GPU benchmark at Hopper's shapes, without one: every launch passes through the host code that
serves, over tensors that have shapes only; nothing is compiled and nothing runs. Prints a phase's lines as JSON.

    ROTQUANT_GPU_DEVICE=meta python tests/support/gpu_rehearsal.py

Of `gathered` the pages are real, since it reads them; what its kernels would write stays as it was.
"""

# ruff: noqa: E402

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / part) for part in ("", "offline", "kernels", "benchmarks", "tests/support")]
os.environ |= {"ROTQUANT_GPU_DEVICE": "meta", "ROTQUANT_CPU_TIER": "reference"}

import triton

import gpu_checks
import gpu_kernels
import gpu_phases
from rotquant_kernels import cuda, ops, reference
from rotquant_kernels.cuda import layout, scaled_mm
from stand_in_gpu import stand_in


def server() -> dict[str, ModuleType]:
    """What the phases import of vLLM by way of the plugin: an attention and a product that leave things as they are."""
    compat, flash = ModuleType("vllm_rotquant.compat"), ModuleType("vllm_rotquant.compat.flash")
    vars(flash)["dense_attention"] = lambda: ("a stand-in", lambda *given: None)
    product = scaled_mm.Provided("a stand-in", lambda codes, weight, *scales: codes.new_empty(0))
    vars(compat).update(integer_products=lambda: product, flash=flash)
    return {module.__name__: module for module in (compat, flash)}


def implementations() -> dict[str, Any]:
    """What CUDA devices have in the place of the reference."""
    modules = [importlib.import_module(f"{cuda.__name__}.{info.name}") for info in pkgutil.iter_modules(cuda.__path__)]
    return {op: call for module in modules for op, call in getattr(module, "IMPLEMENTATIONS", {}).items()}


def gathered() -> dict[str, Any]:
    """As `right` runs it, with real pages."""
    with (
        mock.patch.object(gpu_phases, "DEVICE", "cpu"),
        mock.patch.object(reference, "kv4_attention"),
        mock.patch.object(gpu_checks, "compare", return_value=0.0) as compared,
    ):
        line = gpu_phases.gathered()
    assert compared.call_count == 1
    return line


def main() -> None:
    launched: list[str] = []
    real = implementations()

    def note(*given: Any, fn: Any = None, **rest: Any) -> bool:
        launched.append(getattr(fn, "name", ""))
        return True  # as if it were compiled

    def lines(name: str) -> None:
        for line in getattr(gpu_phases, name)():
            print(json.dumps({"phase": name} | line), flush=True)

    with (
        stand_in(90),
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", note),
        mock.patch.dict(sys.modules, server()),
    ):
        print(json.dumps({"phase": "gathered"} | gathered()), flush=True)
        patched = [mock.patch.object(ops, op, call) for op, call in real.items()]
        patched.append(mock.patch.object(ops, "prepare_weight", lambda *given: layout.pack_weight(*given, 1)))
        patched.append(mock.patch.object(gpu_phases, "SWEPT", gpu_phases.SWEPT[:2]))
        others = {name for kind in gpu_kernels.PEERS.values() for name in kind if not name.startswith("rotquant")}
        patched.append(mock.patch.object(gpu_phases, "SLOW_PEERS", others))  # what is not ours wants numbers
        for one in patched:
            one.start()
        for problem in gpu_phases.launches():
            print(json.dumps({"phase": "compile_all"} | gpu_phases.compile_one(problem)), flush=True)
        for name in ("layer", "times", "sweep"):
            lines(name)
    print(json.dumps({"phase": "launched"} | {name: launched.count(name) for name in sorted(set(launched))}))


if __name__ == "__main__":
    main()
