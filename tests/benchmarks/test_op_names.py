"""Benchmarks call ops by their names; a kernel whose op is not there would only be missing from a table."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from rotquant_kernels import native

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FILES = sorted(BENCHMARKS.glob("*.py"))
CALLS = sorted({name for file in FILES for name in re.findall(r"torch\.ops\.rotquant\.(\w+)", file.read_text())})


def test_benchmarks_call_ops_by_name():
    assert "large_pages_" in CALLS


@pytest.mark.skipif(bool(native.load()), reason="no native kernels here")
@pytest.mark.parametrize("name", CALLS)
def test_the_op_is_there(name):
    assert hasattr(torch.ops.rotquant, name)


def test_only_peers_may_be_skipped(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("kernels_benchmark", BENCHMARKS / "kernels.py")
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)
    spec.loader.exec_module(benchmark)
    peers = {"kernels": {"zentorch-bf16": {"skipped": "not installed"}, "rotquant-w4a4": {"cpu_us": 1.0}}}
    ours = {"kernels": {"rotquant-kv4": {"skipped": "no op of that name"}}}
    assert benchmark.own_skipped([peers]) == []
    assert benchmark.own_skipped([peers, ours, ours]) == ["rotquant-kv4 (no op of that name)"]
