"""Every Triton kernel compiles as servers launch it, on every architecture and under every Triton that users have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import gate_record  # noqa: E402
import launch_gate  # noqa: E402
from rotquant_kernels.cuda import kv4_decode, rows  # noqa: E402
from stand_in_gpu import GPUS  # noqa: E402

APART = Path(sys.prefix) / "tritons"  # where run.py puts them
LONG = pytest.mark.release
# Every architecture once, under one of the compilers that users have; all of them under each before a release.
OFTEN = {"3.6.0": (80, 89), "3.7.1": (86, 120), "3.8.0": (90, 100)}
RARELY = {version: tuple(arch for arch in GPUS if arch not in often) for version, often in OFTEN.items()}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=LONG) for arch in GPUS if arch != 90)])
def test_every_kernel_compiles_and_fits(arch):
    lines = []
    launches, kernels, failed = launch_gate.check(arch, launch_gate.core(), lines.append)
    assert (failed, lines) == (0, [])
    # Each a kernel of its own; decoding, a product in parts and experts put those together, a workspace has turned
    # queries.
    assert kernels == launches + 4


@pytest.mark.parametrize(
    ("version", "archs"),
    [*OFTEN.items(), *(pytest.param(version, archs, marks=LONG) for version, archs in RARELY.items())],
)
def test_under_the_tritons_of_users(version, archs):
    folder = APART / version
    if not folder.exists():
        pytest.skip(f"run.py test installs Triton {version} to {folder}")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, launch_gate.__file__, "--arch", ",".join(map(str, archs))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    launches = len(archs) * len(list(launch_gate.core()))
    assert done.stdout.endswith(f"triton {version}: {launches} launches, 0 failed\n"), done.stdout + done.stderr


def test_the_gate_sees_what_it_is_for(monkeypatch):
    """A kernel that wants too much memory, one that spills, one that does not compile for a single token."""
    lines = []
    monkeypatch.setattr(rows, "LARGEST", 1 << 16)
    long = ("long row", lambda: launch_gate.quantize(2, 18944, 512, silu=True))
    assert launch_gate.check(89, iter([long]), lines.append)[2] == 1
    assert "wants 131072 bytes of shared memory, sm_89 allows 101376" in lines[0]
    monkeypatch.setattr(launch_gate, "SPILLED_ELSE", -1)
    assert launch_gate.check(90, iter([("norm", lambda: launch_gate.norm(1, 4096))]), lines.append)[2] == 1
    assert "spills 0 bytes" in lines[-1]
    specialized = triton.jit(kv4_decode.merge.fn)  # as it was without do_not_specialize
    monkeypatch.setattr(kv4_decode, "merge", specialized)
    monkeypatch.setattr(launch_gate, "SPILLED_ELSE", 1000)
    decode = ("decode", lambda: launch_gate.attend(1, 1))
    assert launch_gate.check(90, iter([decode]), lines.append)[2] == 1
    assert "'int' object has no attribute 'to'" in lines[-1]


def test_traffic_meets_few_kernels_that_graphs_did_not():
    """As a compiler tells them apart, over decodes, chunks and prompts of many lengths."""
    captured, besides = gate_record.variants()
    assert captured >= 10
    assert 1 <= besides <= 12


def test_the_record_counts_the_steps_of_loops_and_whole_kernels():
    with launch_gate.stand_in(90) as found:
        launch_gate.linear(4097, 4096, 512)
        launch_gate.quantize(3, 4096)
    product, row = (gate_record.measured("", made) for made in found)
    assert 60 < product["instructions of a step"] < product["instructions"] / 2
    assert row["instructions of a step"] == row["instructions"] < 30 * 32  # 30 of them a number at most
    assert product["registers"] > row["registers"] > 30
    assert row["spilled bytes"] == 0
