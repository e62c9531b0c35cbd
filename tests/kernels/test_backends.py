"""Backends say what they can do; who chooses, joins ops or reports goes by that and never by a name."""

import ast
from pathlib import Path

import pytest
import torch

from native_tiers import tier  # noqa: F401
from rotquant_kernels import backends, convention, ops
from rotquant_kernels.backends import BACKENDS, REFERENCE, Backend, Layer, backend_of, backends_of
from rotquant_kernels.backends.backend import KEYS
from rotquant_kernels.formats import RowFormat, WeightFormat

ROOT = Path(__file__).parents[2]
LAYER = Layer(64, 64, WeightFormat(), RowFormat(), False, False, torch.bfloat16)
PACKED = convention.pack_int32(torch.arange(-8, 8).repeat(64, 4).to(torch.int8), 4)


class Stub(Backend):
    """Runs int_linear, but for what `why` says."""

    reads_quantized = False

    def __init__(self, name: str, why: str = "", takes_any: bool = True):
        self.name, self.why, self.takes_any = name, why, takes_any

    def has(self, op):
        return op == "int_linear"

    def misfit(self, layer, device):
        return self.why


def test_every_type_of_device_has_a_key_and_ends_in_the_specification():
    assert BACKENDS.keys() == KEYS.keys()
    for device, found in BACKENDS.items():
        assert found[-1] is REFERENCE
        assert {backend.device for backend in found[:-1]} == {device}


def test_an_unknown_device_is_refused_and_not_taken_for_the_cpu():
    for run in (lambda: backends_of("xpu"), lambda: ops.kernel_of("int_linear", "meta:0"),
                lambda: ops.prepare_linear(PACKED.to("meta"), torch.ones(64, 1), LAYER)):  # fmt: skip
        with pytest.raises(ValueError, match=r"no kernels for the device '(xpu|meta)': it runs on cpu and cuda"):
            run()


def test_the_cpu_s_tier_decides_who_prepares_a_layer_and_whether_norms_may_quantize(tier):  # noqa: F811
    prepared = ops.prepare_linear(PACKED, torch.ones(64, 1), LAYER)
    assert torch.equal(prepared.weight, ops.prepare_weight(PACKED, 4, 64))
    assert prepared.kernel == ops.kernel_of("int_linear") == f"native ({tier})"
    assert not prepared.backend.reads_quantized
    assert backend_of("quantized_linear") is REFERENCE  # it has no native kernel


def test_without_native_kernels_the_specification_runs():
    before = ops.native.tier()
    ops.choose_cpu_tier("reference")
    try:
        prepared = ops.prepare_linear(PACKED, torch.ones(64, 1), LAYER)
        assert prepared.backend is REFERENCE
        assert REFERENCE.reads_quantized
        assert torch.equal(prepared.weight, PACKED)
        assert backends.stages_of(["hadamard", "shift"]) == {REFERENCE.name: ["hadamard", "shift"]}
    finally:
        ops.choose_cpu_tier(before)


def test_the_first_backend_that_fits_runs_a_layer_and_the_others_are_named(monkeypatch):
    def given(*found):
        monkeypatch.setitem(BACKENDS, "cpu", (*found, REFERENCE))
        backend, kernel = backends.choose(LAYER, torch.device("cpu"))
        return backend.name, kernel

    picky, broad = Stub("picky", takes_any=False), Stub("broad")
    assert given(picky, broad) == ("picky", "picky")
    assert ops.kernel_of("int_linear") == "picky, broad where it does not fit"
    picky.why = "too wide"
    assert given(picky, broad) == ("broad", "broad, not picky: too wide")
    assert given() == (REFERENCE.name, REFERENCE.name)
    broad.why = "too odd"  # it is there and refuses: nothing far slower runs in its place unsaid
    with pytest.raises(ValueError, match=r"^too odd$"):
        given(picky, broad)


def test_no_decision_compares_what_a_report_says():
    """No code outside of reports compares, cuts or searches the name of a kernel or a backend."""
    named = {"kernel", "kernel_of", "kernel_name", "name_of_kernel", "stages_of"}

    def names_a_kernel(node: ast.AST) -> bool:
        if isinstance(node, ast.Call):
            node = node.func
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        return name in named

    found = []
    folders = ("kernels/rotquant_kernels", "offline/rotquant", "vllm_rotquant", "benchmarks")
    for file in (file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                compared += [node.func.value] if node.func.attr in ("startswith", "endswith", "find", "split") else []
            found += [f"{file.relative_to(ROOT)}:{node.lineno}" for part in compared if names_a_kernel(part)]
    assert not found
