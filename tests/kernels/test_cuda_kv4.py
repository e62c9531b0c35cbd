"""The CUDA kernels of the 4-bit KV cache where there is no GPU: their numbers in Triton's interpreter, the machine
code that every architecture gets, how a batch is cut up, and what is refused."""

import re

import pytest
import torch

triton = pytest.importorskip("triton")

import launch_gate  # noqa: E402
from own_process import passes_interpreted  # noqa: E402
from rotquant_kernels import reference  # noqa: E402
from rotquant_kernels.cuda import kv4  # noqa: E402
from triton_compile import KNOWS_NEWER_UNITS, compiled  # noqa: E402

MMA, WGMMA = r"mma\.sync\S*m16n8k32\S*\.s32\.s8\.s8", r"wgmma\.mma_async\S*\.s32\.s8\.s8"
TCGEN05 = r"tcgen05\.mma\S*kind::i8"
DECODE_90, DECODE_100 = (WGMMA, TCGEN05) if KNOWS_NEWER_UNITS else (MMA, MMA)
H200 = kv4.Device(processors=132, least_rows=8)


def test_kernels_meet_the_specification_in_the_interpreter():
    passes_interpreted("kv4_interpreted.py")


@pytest.mark.parametrize(
    ("arch", "instruction"), [(80, MMA), (89, MMA), (90, DECODE_90), (100, DECODE_100), (120, MMA)]
)
def test_decoding_runs_on_the_integer_matrix_unit(arch, instruction):
    made = compiled(arch, lambda: launch_gate.attend(3, 3))
    assert re.search(instruction, made.asm["ptx"])
    assert "cp.async.cg" in made.asm["ptx"]  # pages are fetched ahead, 16 bytes a thread
    assert "0x0f0f0f0f" in made.asm["ptx"]  # four nibbles with one instruction
    assert made.metadata.shared <= 48 << 10  # several programs on a processor


@pytest.mark.parametrize("window", [0, 4096])
def test_prefill_runs_on_the_integer_matrix_unit(window):
    made = compiled(90, lambda: launch_gate.attend(700, 1, window=window))
    assert re.search(WGMMA, made.asm["ptx"])
    assert made.metadata.shared <= 100 << 10


def test_pages_of_a_window_are_fetched_as_all_others():
    made = compiled(90, lambda: launch_gate.attend(3, 3, window=4096))
    assert re.search(DECODE_90, made.asm["ptx"])
    assert "cp.async.cg" in made.asm["ptx"]
    assert made.metadata.shared <= 48 << 10


def test_writing_divides_exactly_and_fuses_nothing():
    ptx = compiled(90, lambda: launch_gate.write(3, 8, 128, 128)).asm["ptx"]
    assert "div.rn.f32" in ptx
    assert not re.search(r"div\.(full|approx)", ptx)
    assert not re.search(r"fma\.rn\.f32\s+\S+, (?![eq],)", ptx)  # but in `CORRECTED`, which divides
    assert ptx.count("bar.sync") <= 4  # a row is one warp's
    assert re.search(r"(atom|red)\S*\.xor\.b32", ptx)


def test_decoding_fills_the_device_and_prefill_does_not_split():
    for sequences in (1, 8, 64, 512):
        rows, splits = kv4.plan(sequences, sequences, 4, 8, 32768, H200)
        assert rows == 8
        assert splits == 1 or 8 * sequences * splits <= 3 * 132  # one wave, as full as can be
        assert 8 * sequences * (splits + 1) > 3 * 132 or splits == kv4.MOST_SPLITS
    assert kv4.plan(1, 1, 4, 8, 512, H200).splits == 2  # a short context is not cut finely
    assert kv4.plan(4096, 1, 4, 8, 4096, H200) == kv4.Plan(64, 1)
    assert kv4.plan(4096, 1, 4, 8, 4096, H200, dim=256).rows == 32  # whose sums are twice as many registers
    assert kv4.plan(4096, 1, 8, 4, 4096, H200, dim=512).rows == 16
    assert [kv4.plan(tokens, 1, 4, 8, 64, H200).rows for tokens in (1, 2, 3, 4, 5, 8, 9)] == [8, 8, 16, 16, 32, 32, 64]
    assert kv4.plan(1, 1, 4, 8, 32768, H200, window=1024).splits == kv4.plan(1, 1, 4, 8, 1024, H200).splits
    assert kv4.plan(4, 4, 71, 1, 4096, H200).rows == 128  # a group larger than any other block of rows
    assert kv4.plan(1, 1, 4, 8, 512, kv4.Device(148, 16)).rows == 16


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("heads of 24", {"query": torch.zeros(2, 4, 24)}),
        ("heads of 528", {"query": torch.zeros(2, 4, 528)}),
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
