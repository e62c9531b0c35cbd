"""The Triton kernels of linear layers compiled for GPUs that are not here: which instructions they hold."""

import os
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")

import launch_gate
from rotquant_kernels.cuda import rows, tiles
from rotquant_kernels.cuda.device import Device
from stand_in_gpu import GPUS
from triton_compile import KNOWS_NEWER_UNITS, compiled, instructions, linear

# What an int8 product is made of; wgmma and tcgen05 want more than a few tokens to be worth their tiles.
MMA = "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"
WGMMA = "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8"
TCGEN05 = "tcgen05.mma.cta_group::1.kind::i8" if KNOWS_NEWER_UNITS else MMA
NIBBLES = "0xF0F0F0F0"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Compiles, whatever an earlier run left."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(("arch", "tokens", "expected"), [
    (80, 4097, MMA), (89, 1, MMA), (90, 1, MMA), (90, 4097, WGMMA), (100, 4097, TCGEN05), (120, 4097, MMA),
])  # fmt: skip
def test_products_run_on_int8_tensor_cores(arch, tokens, expected):
    kernel = linear(arch, tokens)
    found = instructions(kernel)
    assert found[expected] >= 4, found
    assert found["cp.async.cg.shared.global"] >= 4, "weights and codes are not copied ahead"
    assert not found["prmt.b32"], "nibbles are permuted, not only shifted and masked"
    assert kernel.asm["ptx"].count(NIBBLES) >= 2
    assert kernel.metadata.shared <= GPUS[arch][0] * 1024
    assert kernel.asm["cubin"][:4] == b"\x7fELF"
    assert not found["fma.rn.f32"], "the epilogue's products and sums are fused, which changes the last bit"
    assert found["cvt.rn.bf16x2.f32"] + found["cvt.rn.bf16.f32"] >= 1


@pytest.mark.parametrize("case", [{"groups": 32, "symmetric": False}, {"bits": 8}, {"rank": 32}])
def test_every_variant_keeps_the_tensor_cores_of_hopper(case):
    found = instructions(linear(90, 4097, **case))
    assert sum(count for name, count in found.items() if name.startswith("wgmma.mma_async.sync")) >= 4, found
    assert found["cp.async.cg.shared.global"] >= 4
    assert bool(found["fma.rn.f32"]) == ("rank" in case)  # the branch is a product in full precision


def test_registers_are_not_capped_where_codes_are_read_by_bytes():
    """Rows of 100 codes are not aligned: what puts them together would be spilled, 744 bytes a thread."""
    shape, hopper = tiles.Shape(100, 70, 1), Device(132, 8, 90)
    assert tiles.tiles(200, shape, hopper).registers == 0
    assert tiles.tiles(200, shape._replace(columns=112), hopper).registers == 128


def test_weights_reach_wgmma_through_registers():
    """The left operand is four registers, not a descriptor of shared memory: no unpacked weight is stored."""
    text = linear(90, 4097).asm["ptx"]
    calls = [line for line in text.splitlines() if WGMMA in line]
    assert calls
    assert all(line.count("{") >= 2 for line in calls), calls[0]


@pytest.mark.parametrize(
    ("source", "columns", "block"),
    [("plain", 4096, 0), ("silu_mul", 14336, 512), ("silu_mul", 18944, 512), ("rms_norm", 4096, 0)],
)
@pytest.mark.parametrize("arch", [80, 120])
def test_rows_are_quantized_in_ieee_arithmetic(source, columns, block, arch):
    launch = {
        "plain": lambda: launch_gate.quantize(3, columns, block, symmetric=arch == 80),
        "silu_mul": lambda: launch_gate.quantize(3, columns, block, True, symmetric=arch == 80),
        "rms_norm": lambda: launch_gate.norm(3, columns, symmetric=arch == 80),
    }[source]
    kernel = compiled(arch, launch)
    found = instructions(kernel)
    assert found["div.rn.f32"] >= 2
    assert not any(name.startswith(("div.full", "div.approx", "fma.rn.f32", "fma.rn.ftz")) for name in found), found
    assert kernel.metadata.shared <= GPUS[arch][0] * 1024
    if columns <= rows.LARGEST:  # numbers of a Hadamard change threads between groups of stages, not at each
        assert found["bar.sync"] <= 14, found
    assert kernel.metadata.num_warps == (16 if columns > rows.LARGEST else rows.warps(1 << (columns - 1).bit_length()))


def test_hopper_runs_the_int8_instruction(tmp_path):
    """In machine code, by the disassembler of Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not os.access(tool, os.X_OK):
        pytest.skip("this build of Triton has no cuobjdump")
    (tmp_path / "kernel.cubin").write_bytes(linear(90, 4097).asm["cubin"])
    text = subprocess.run([tool, "-sass", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    assert "IGMMA.64x128x32.S8.S8" in text
    assert "PRMT" not in text.split("IGMMA")[1]
