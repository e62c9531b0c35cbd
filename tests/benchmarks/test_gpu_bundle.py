"""Which device code a bundle for a GPU machine keeps."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_bundle

HEAD = ("_ZN7cutlass13device_kernelIN5flash20enable_sm90_or_laterINS1_16FlashAttnFwdSm90INS1_25"
        "CollectiveMainloopFwdSm90ILi2EN4cute5tupleIJNS5_1CILi1EEES8_S8_EEENS6_IJNS7_ILi{m}EEENS7_ILi96EEENS7_ILi{k}"
        "EEEEEELi{v}ENS_{type}fNS_4arch4Sm90ELb0ELb1ELb{cap}ELb1ELb0ELb0ELb0ELb0ELb1ELb1ELb1ELb1ELb0ENS_10bfloat16_tELi1EEEEEEEEEvNT_"
        "6ParamsE")  # fmt: skip


def kernel(k: int, v: int, kind: str = "10bfloat16_tE", cap: int = 0) -> bytes:
    """The name of an attention kernel as its device code holds it; the tile's rows differ from k, or it would be
    abbreviated."""
    return b"\0.text." + HEAD.format(m=k + 64, k=k, v=v, type=kind, cap=cap).encode() + b"\0"


def piece(kind: int, arch: int, code: bytes) -> bytes:
    return struct.pack("<HHIQ12xI", kind, 1, 64, len(code), arch).ljust(64, b"\0") + code


def library(*pieces: bytes) -> bytes:
    body = b"".join(pieces)
    return b"host code" + b"\x50\xed\x55\xba\x01\x00\x10\x00" + struct.pack("<Q", len(body)) + body + b"more of it"


def left(image: bytes, arch: int, flash: bool = False) -> bytes:
    kept = bytearray(image)
    for first, last in gpu_bundle.useless(image, arch, flash):
        kept[first:last] = bytes(last - first)
    assert len(kept) == len(image)
    return bytes(kept)


def test_code_of_other_gpus_is_zeroed_in_place():
    image = library(piece(2, 80, b"for 80"), piece(2, 90, b"for 90"), piece(1, 90, b"text of 90"))
    kept = left(image, 90)
    assert b"for 90" in kept
    assert b"for 80" not in kept
    assert b"text" not in kept  # a binary is there
    assert kept.startswith(b"host code")
    assert kept.endswith(b"more of it")
    older = left(library(piece(2, 80, b"for 80"), piece(1, 80, b"text of 80"), piece(1, 100, b"text of 100")), 90)
    assert b"text of 80" in older  # which the driver compiles
    assert b"for 80" not in older
    assert b"text of 100" not in older


def test_of_flash_attention_heads_of_128_in_bfloat16_stay():
    try:
        subprocess.run(["c++filt", "--version"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no c++filt")
    kinds = {
        "wanted": kernel(128, 128), "small": kernel(64, 64), "wide": kernel(192, 128),
        "capped": kernel(128, 128, cap=1), "eight": kernel(128, 128, "12float_e4m3_tE"),
        "for all": b"\0.text._ZN5flash7combineEv\0",
    }  # fmt: skip
    kept = left(library(*(piece(2, 90, name.encode() + code) for name, code in kinds.items())), 90, flash=True)
    assert [name for name in kinds if name.encode() in kept] == ["wanted", "for all"]
