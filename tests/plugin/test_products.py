"""vLLM's GEMM of integers, where it is there as the plugin calls it; a stand-in in torch takes its place."""

import pytest
import torch

from rotquant_kernels import ops
from rotquant_kernels.cuda import humming, register, scaled_mm
from vllm_rotquant.compat import products

PLAIN = "(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias) -> ()"
SHIFTED = PLAIN.replace("Tensor? bias", "Tensor azp_adj, Tensor? azp, Tensor? bias")


def product(out, a, b, a_scales, b_scales, *shift_and_bias):
    assert shift_and_bias[-1] is None
    acc = a.double() @ b.double()
    if len(shift_and_bias) > 1:
        acc -= shift_and_bias[1].double() * shift_and_bias[0]
    out.copy_(acc.float() * b_scales.t() * a_scales)


@pytest.fixture
def gpu(monkeypatch):
    """Says that there is a GPU, and gives ops to vLLM's library; both leave again."""
    library = torch.library.Library("_C", "FRAGMENT")

    def make(capability, *schemas):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        for name, schema in zip((products.PLAIN, products.SHIFTED), schemas, strict=False):
            library.define(name + schema)
            library.impl(name, product, "CPU")
        return products.integer_products()

    yield make
    library._destroy()


@pytest.mark.parametrize(
    ("capability", "schemas"),
    [
        ((9, 0), ()), ((9, 0), (PLAIN,)), ((10, 0), (PLAIN, SHIFTED)), ((7, 5), (PLAIN, SHIFTED)),
        ((9, 0), (PLAIN, SHIFTED.replace("azp_adj", "azp_sums"))),
    ],
)  # fmt: skip
def test_a_vllm_without_it_leaves_everything_to_triton(gpu, capability, schemas):
    assert gpu(capability, *schemas) is None


def test_it_is_called_as_its_schema_says(gpu, monkeypatch):
    found = gpu((9, 0), PLAIN, SHIFTED)
    codes, weight = torch.randint(-8, 8, (5, 32)).to(torch.int8), torch.randint(-8, 8, (16, 32)).to(torch.int8).t()
    scales, zero, sums = (
        (torch.rand(5, 1), torch.rand(16, 1)),
        torch.arange(5)[:, None].int(),
        weight.sum(0)[None].int(),
    )
    for shift in ((None, None), (sums, zero)):
        y = found.call(codes, weight, *scales, torch.bfloat16, *shift)
        acc = codes.double() @ weight.double() - (0 if shift[0] is None else zero.double() * sums)
        assert torch.equal(y, (acc.float() * scales[1].t() * scales[0]).bfloat16())
    monkeypatch.setattr(scaled_mm, "_provided", found)
    library = torch.library.Library("rotquant", "IMPL")
    try:  # reports name it
        register(library)
        assert ops.kernel_of("int_linear", "cuda") == "triton (int8 tensor cores), vLLM's CUTLASS for many tokens"
        monkeypatch.setattr(humming, "_choice", "triton")  # who asks for Triton gets nothing else
        humming.wanted.cache_clear()
        assert scaled_mm.provided() is None
    finally:
        library._destroy()
        humming.wanted.cache_clear()
