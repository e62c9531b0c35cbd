"""Benchmarks call ops by their names; a kernel whose op is not there would only be missing from a table."""

import re
from pathlib import Path

import pytest
import torch

from rotquant_kernels import native

FILES = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))
CALLS = sorted({name for file in FILES for name in re.findall(r"torch\.ops\.rotquant\.(\w+)", file.read_text())})


def test_benchmarks_call_ops_by_name():
    assert "large_pages_" in CALLS


@pytest.mark.skipif(bool(native.load()), reason="no native kernels here")
@pytest.mark.parametrize("name", CALLS)
def test_the_op_is_there(name):
    assert hasattr(torch.ops.rotquant, name)
