"""The CUDA kernels of linear layers where there is no GPU: their numbers in Triton's interpreter, their names."""

import os
import subprocess
import sys

import pytest
import torch

from own_process import passes_interpreted
from rotquant_kernels import convention, cuda, ops, reference

pytest.importorskip("triton")

from rotquant_kernels.backends import backend_of
from rotquant_kernels.cuda import humming


def test_kernels_meet_the_specification_in_the_interpreter():
    passes_interpreted("triton_interpreted.py")


def test_without_a_gpu_triton_is_not_even_imported():
    show = "import sys, rotquant_kernels as k; print('triton' in sys.modules, k.kernel_of('int_linear', 'cuda'))"
    done = subprocess.run(
        [sys.executable, "-c", show], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout == "False reference (torch)\n"


@pytest.fixture
def library():
    """A library in which kernels register, and leave again."""
    library = torch.library.Library("rotquant", "IMPL")
    yield library
    library._destroy()


def test_kernels_register_for_cuda_alone_and_are_named(library):
    before = ops.kernel_of("int_linear")
    cuda.register(library)
    for op in ("online_stage", "quantize_rows", "rms_norm_quantize", "quantized_linear"):
        assert ops.kernel_of(op, "cuda").startswith("triton")
    for op in ("int_linear", "moe_experts"):
        assert ops.kernel_of(op, "cuda") == "triton (int8 tensor cores)"
    assert ops.kernel_of("int_linear", "cpu") == before
    library._destroy()
    assert ops.kernel_of("int_linear", "cuda") == "reference (torch)"


def test_an_import_leaves_cuda_alone():
    """In a torch built for CUDA: the Triton kernels are there, but nothing asked the driver, so a fork may use it."""
    show = """
import torch
torch.version.cuda = "13.0"
def started(*arguments):
    raise SystemExit("CUDA was started")
for name in ("_cuda_getDeviceCount", "_cuda_init"):
    setattr(torch._C, name, started)
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = started
import rotquant, rotquant_kernels as k
print(k.kernel_of("int_linear", "cuda"), torch.cuda.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=False)
    assert done.stdout == "triton (int8 tensor cores) False\n", done.stderr


def test_a_gpu_without_triton_is_loud(monkeypatch, library):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "PYTORCH_NVML_BASED_CUDA_CHECK" in os.environ)
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match="Install triton"):
        cuda.load(library)
    assert ops.kernel_of("int_linear", "cuda") == "reference (torch)"


def test_humming_runs_where_it_is_installed_or_asked_for(monkeypatch, library):
    cuda.register(library)

    def choose(choice, found=None):
        monkeypatch.setenv("ROTQUANT_CUDA_LINEAR", choice)
        monkeypatch.setattr(humming, "installed", lambda: found)
        humming.wanted.cache_clear()
        humming.chosen.cache_clear()
        return ops.kernel_of("int_linear", "cuda")

    try:
        assert choose("triton") == "triton (int8 tensor cores)"
        assert choose("humming", "0.1.17") == "humming, triton where it does not fit"
        assert backend_of("int_linear", "cuda").name == "triton"
        for choice, found, word in (
            ("marlin", "0.1.17", "'marlin'"), ("humming", None, "pip install"), ("humming", "0.1.14", "not 0.1.14"),
            ("humming", "0.2.0", "not 0.2.0"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=word):
                choose(choice, found)
        for found, runs in ((None, False), ("0.1.14", False), ("0.1.17", True)):
            assert choose("auto", found).startswith("humming") == runs
    finally:
        humming.wanted.cache_clear()
        humming.chosen.cache_clear()


def test_fused_ops_hold_their_schemas_and_fakes():
    generator = torch.Generator().manual_seed(1)
    x, residual = torch.randn(3, 64, generator=generator), torch.randn(3, 64, generator=generator)
    checks = ("test_schema", "test_faketensor")
    codes = convention.quantize(residual[:, :32], torch.ones(3, 1), torch.zeros(3, 1), 4)
    packed, scale = convention.pack_int32(codes, 4), torch.rand(3, 1)
    silu, norm = (x, "hadamard", 32, None, 4, True, 0.9, True), (torch.ones(64), 1e-5, 4, False, 1.0)
    whole = (x, ops.prepare_weight(packed, 4, 32), scale, None, 4, *silu[1:-1], None, None, True)
    for op, arguments in (
        ("quantize_rows", silu), ("int_linear", whole), ("rms_norm_quantize", (x, residual, *norm)),
        ("rms_norm_quantize", (x, None, *norm)),
    ):  # fmt: skip
        torch.library.opcheck(getattr(torch.ops.rotquant, op).default, arguments, test_utils=checks)
    quantized = ops.quantize_rows(*silu)
    assert quantized[0].shape == (3, 32)
    linear = (*quantized, packed, scale, None, 4, True, torch.bfloat16)
    torch.library.opcheck(torch.ops.rotquant.quantized_linear.default, linear, test_utils=checks)
    with pytest.raises(ValueError, match="no native CPU kernel"):
        ops.quantized_linear(*quantized, packed.flatten(), scale, None, 4, True, torch.bfloat16)


def test_norm_is_that_of_a_model():
    """Against torch's own, in float64."""
    generator = torch.Generator().manual_seed(2)
    x, residual, weight = (torch.randn(shape, generator=generator) for shape in ((4, 96), (4, 96), (96,)))
    y = torch.nn.functional.rms_norm((x + residual).double(), (96,), weight.double(), 1e-6)
    codes, scale, zero, stream = reference.rms_norm_quantize(x, residual, weight, 1e-6, 8, False, 1.0)
    assert (convention.dequantize(codes, scale, zero) - y).abs().max() <= 0.51 * scale.max()
    assert torch.equal(stream, x + residual)
