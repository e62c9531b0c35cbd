"""The CUDA kernels of the 4-bit KV cache where there is no GPU: their numbers in Triton's interpreter, the machine
code that every architecture gets, how a batch is cut up, and what is refused."""

import re

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from own_process import passes_interpreted  # noqa: E402
from rotquant_kernels import reference  # noqa: E402
from rotquant_kernels.cuda import kv4, kv4_decode, kv4_prefill, kv4_write  # noqa: E402

MMA, WGMMA = r"mma\.sync\S*m16n8k32\S*\.s32\.s8\.s8", r"wgmma\.mma_async\S*\.s32\.s8\.s8"
TCGEN05 = r"tcgen05\.mma\S*kind::i8"
H200 = kv4.Device(processors=132, least_rows=8)
TYPES = {
    "query": "*bf16", "out": "*bf16", "key": "*bf16", "value": "*bf16", "cache": "*u8", "query_start": "*i32",
    "seq_lens": "*i32", "table": "*i32", "partial": "*fp32", "state": "*fp32", "slots": "*i64", "factor": "fp32",
    "k_clip": "fp32", "v_clip": "fp32",
}  # fmt: skip
UNALIGNED = ("tokens", "sequences", "count")


def test_kernels_meet_the_specification_in_the_interpreter():
    passes_interpreted("kv4_interpreted.py")


def compiled(kernel, arch: int, constants: dict, **options) -> dict:
    """PTX and metadata of a kernel, as a launch with aligned pointers and strides compiles it."""
    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict.fromkeys(kernel.arg_names, "constexpr") | {name: TYPES.get(name, "i32") for name in names}
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in names
        if name not in UNALIGNED and signature[name] != "fp32"
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {"enable_fp_fusion": True} | options
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert done.asm["cubin"]  # ptxas accepted it
    return {"ptx": done.asm["ptx"], "shared": done.metadata.shared}


def attention_constants(rows: int, splits: int) -> dict:
    return kv4.common(128, 16, 128, False) | {
        "HEADS": 32, "GROUP": 4, "ROWS": rows, "SPLITS": splits, "ASSEMBLER": True,
    }  # fmt: skip


@pytest.mark.parametrize(("arch", "instruction"), [(80, MMA), (89, MMA), (90, WGMMA), (100, TCGEN05), (120, MMA)])
def test_decoding_runs_on_the_integer_matrix_unit(arch, instruction):
    rows = 16 if arch == 100 else 8
    made = compiled(kv4_decode.decode, arch, attention_constants(rows, 8), num_warps=4, num_stages=3)
    assert re.search(instruction, made["ptx"])
    assert "cp.async.cg" in made["ptx"]  # pages are fetched ahead, 16 bytes a thread
    assert "0x0f0f0f0f" in made["ptx"]  # four nibbles with one instruction
    assert made["shared"] <= 48 << 10  # several programs on a processor


def test_prefill_runs_on_the_integer_matrix_unit():
    made = compiled(kv4_prefill.prefill, 90, attention_constants(64, 1), num_warps=4, num_stages=2)
    assert re.search(WGMMA, made["ptx"])
    assert made["shared"] <= 100 << 10


def test_writing_divides_exactly_and_fuses_nothing():
    constants = kv4.common(128, 16, 128, False) | {"TOKENS": kv4.WRITE_TOKENS}
    ptx = compiled(kv4_write.write, 90, constants, num_warps=4, enable_fp_fusion=False)["ptx"]
    assert "div.rn.f32" in ptx
    assert not re.search(r"div\.(full|approx)|fma\.rn\.f32", ptx)
    assert re.search(r"(atom|red)\S*\.xor\.b32", ptx)


def test_decoding_fills_the_device_and_prefill_does_not_split():
    for sequences in (1, 8, 64, 512):
        rows, splits = kv4.plan(sequences, sequences, 4, 8, 32768, H200)
        assert rows == 8
        assert splits == 1 or 8 * sequences * splits <= 4 * 132
        assert 8 * sequences * splits * 2 > 4 * 132 or splits == kv4.MOST_SPLITS
    assert kv4.plan(1, 1, 4, 8, 512, H200).splits == 2  # a short context is not cut finely
    assert kv4.plan(4096, 1, 4, 8, 4096, H200) == kv4.Plan(64, 1)
    assert kv4.plan(4, 4, 71, 1, 4096, H200).rows == 128  # a group larger than any other block of rows
    assert kv4.plan(1, 1, 4, 8, 512, kv4.Device(148, 16)).rows == 16


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("heads of 24", {"query": torch.zeros(2, 4, 24)}),
        ("heads of 512", {"query": torch.zeros(2, 4, 512)}),
        ("rotate 48", {"rotate": 48}),
        ("cache", {"cache": torch.zeros(4, 2, 16, 68, dtype=torch.uint8)}),
        ("cache", {"cache": torch.zeros(4, 2, 8, 69, dtype=torch.uint8)}),
        ("cache", {"cache": torch.zeros(4, 2, 16, 69)}),
        ("contiguous", {"cache": torch.zeros(4, 16, 2, 69, dtype=torch.uint8).transpose(1, 2)}),
        ("block_table", {"block_table": torch.tensor([[0, 1]])}),
        ("query_start", {"query_start": torch.tensor([0, 1, 2], dtype=torch.int32)}),
        ("out", {"out": torch.zeros(2, 4, 64, dtype=torch.float16)}),
        ("3 query heads", {"query": torch.zeros(2, 3, 64)}),
    ],
)
def test_wrong_arguments_are_named(name, changes):
    arguments = {
        "query": torch.ones(2, 4, 64), "cache": torch.zeros(4, 2, 16, 69, dtype=torch.uint8),
        "query_start": torch.tensor([0, 2], dtype=torch.int32), "seq_lens": torch.tensor([20], dtype=torch.int32),
        "block_table": torch.tensor([[0, 1]], dtype=torch.int32), "out": torch.zeros(2, 4, 64), "scale": 0.125,
        "rotate": 64, "symmetric": False,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=f"rotquant: .*{name}"):
        kv4.attention(**arguments | changes)
    key = torch.ones(2, 2, 64)
    for where, wrong in (("slots", {"slots": torch.arange(4)}), ("value", {"value": key.half()})):
        good = {"key": key, "value": key, "cache": arguments["cache"], "slots": torch.arange(2)}
        with pytest.raises(RuntimeError, match=f"rotquant: .*{where}"):
            kv4.write(**good | wrong, rotate=64, symmetric=False, k_clip=1.0, v_clip=1.0)
    assert reference.kv_token_bytes(64, False) == 69
