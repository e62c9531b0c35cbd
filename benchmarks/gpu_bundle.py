#!/usr/bin/env python3
"""Packs vLLM's CUDA wheel for a GPU machine without a network that takes few megabytes (`gpu.py --vllm-bundle`).

    python benchmarks/gpu_bundle.py --vllm 0.32.0 --out .gpu          .gpu/vllm.tar.xz, ignored by git

Needs pip, binutils' c++filt and xz, and no GPU; takes some minutes. Native code for other GPUs is zeroed where it
lies, so that nothing moves, and packs to nothing. Of FlashAttention 3 the kernels for bfloat16 heads of 128 stay,
without soft caps: what a Llama is compared with. FlashAttention 2, MLA's and DeepGEMM's kernels are left out.

The machine has Python 3.12, PyTorch, Triton, Transformers and what these need; PACKAGES are the rest.
"""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGES = [
    "annotated-types",
    "apache-tvm-ffi",
    "cachetools",
    "cbor2",
    "compressed-tensors",
    "distro",
    "fastapi",
    "httpcore2",
    "httpx2",
    "humming-kernels",
    "jiter",
    "jmespath",
    "llguidance",
    "loguru",
    "model-hosting-container-standards",
    "msgspec",
    "openai",
    "opentelemetry-api",
    "opentelemetry-sdk",
    "opentelemetry-semantic-conventions",
    "opentelemetry-semantic-conventions-ai",
    "orjson",
    "oss-harmony",
    "partial-json-parser",
    "prometheus-fastapi-instrumentator",
    "pybase64",
    "pydantic",
    "pydantic-core",
    "pyzmq",
    "setproctitle",
    "sniffio",
    "starlette",
    "truststore",
    "typing-inspection",
    "uvicorn",
    "watchfiles",
    "xgrammar",
]
PIP = ["--only-binary=:all:", "--python-version=3.12", "--platform=manylinux2014_x86_64"]
PIP += [f"--platform=manylinux_2_{minor}_x86_64" for minor in range(17, 40)]

FLASH = "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
TRIMMED = ("vllm/_C_stable_libtorch.abi3.so", "vllm/_moe_C_stable_libtorch.abi3.so", FLASH)
WHOLE = re.compile(r"vllm/(cumem_allocator|fs_io_C|spinloop)\.")  # native code that is not a GPU's
UNUSED = re.compile(r"vllm/third_party/(deep_gemm|fmha_|tml_)|vllm/vllm-rs$|.*\.dist-info/RECORD$")
CONTAINER = re.compile(rb"\x50\xed\x55\xba\x01\x00\x10\x00")  # of device code: magic, version, length of this header
ASSEMBLER, BINARY = 1, 2  # kinds of device code
# A kernel of FlashAttention 3: columns of K's heads and of V's, type, and behind causal and local the soft cap.
ATTENTION = re.compile(
    r"CollectiveMainloopFwdSm90<.*?cute::C<(\d+)> *>, (\d+), ([\w:]+), float, cutlass::arch::Sm90, "
    r"(?:\w+, ){2}(?P<cap>true|false)"
)


def download(names: list[str], folder: Path, constraints: set[str]) -> list[Path]:
    """Wheels for the machine, none of what they depend on."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "constraints.txt"
    listed.write_text("\n".join(sorted(constraints)))
    for old in folder.glob("*.whl"):
        old.unlink()
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *PIP, "-c", listed, "-d", folder, *names]
    subprocess.run(command, check=True)
    return sorted(folder.glob("*.whl"))


def requirements(wheel: Path) -> Iterator[Requirement]:
    """What a wheel's metadata asks for on the machine, extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    for line in re.findall(r"^Requires-Dist: (.+)$", text, re.M):
        need = Requirement(line)
        if need.marker is None or need.marker.evaluate({"python_version": "3.12", "extra": ""}):
            yield need


def agreeing(names: list[str], vllm: Path, folder: Path) -> list[Path]:
    """Wheels of `names` in versions that vLLM and they themselves accept: downloaded anew while one asks for more."""
    ours, constraints = {canonicalize_name(name) for name in names}, set[str]()
    wheels: list[Path] = []
    while True:
        needs = [need for wheel in (vllm, *wheels) for need in requirements(wheel)]
        found = {f"{n.name}{n.specifier}" for n in needs if n.specifier and canonicalize_name(n.name) in ours}
        if wheels and found <= constraints:
            return wheels
        constraints |= found
        wheels = download(names, folder, constraints)


def wanted(code: bytes) -> bool:
    """Whether device code of FlashAttention holds kernels for bfloat16 heads of 128, or such as all sizes need."""
    names = b"\n".join(set(re.findall(rb"\.text\.(_Z[\w$]+)", code)))
    text = subprocess.run(["c++filt"], input=names, capture_output=True, check=True).stdout.decode()
    kernels = [ATTENTION.search(line) for line in text.splitlines() if "CollectiveMainloop" in line]
    right = ("128", "128", "cutlass::bfloat16_t", "false")
    return not kernels or any(found is not None and found.groups() == right for found in kernels)


def useless(image: bytes, arch: int, flash: bool) -> Iterator[tuple[int, int]]:
    """Where in a library device code lies that this GPU never runs."""
    for found in CONTAINER.finditer(image):
        at = found.end() + 8
        end = at + struct.unpack_from("<Q", image, found.end())[0]
        pieces = []
        while at < end:
            kind, _, header, size, target = struct.unpack_from("<HHIQ12xI", image, at)
            pieces.append((kind, target, at + header, at + header + size))
            at += header + size
        native = any(kind == BINARY and target == arch for kind, target, *_ in pieces)
        for kind, target, first, last in pieces:
            runs = target == arch if kind == BINARY else not native and target <= arch
            if not runs or (flash and not wanted(image[first:last])):
                yield first, last


def unpack(wheel: Path, site: Path, arch: int) -> None:
    """A wheel's files, without what UNUSED names and without other GPUs' code."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            native = name.startswith("vllm/") and name.endswith(".so")
            left = native and name not in TRIMMED and not WHOLE.match(name)
            place = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", name)
            if name.endswith("/") or ".data/" in place or UNUSED.match(name) or left:
                continue
            data = archive.read(name)
            if name in TRIMMED:
                image, gone = bytearray(data), 0
                for first, last in useless(data, arch, name == FLASH):
                    image[first:last] = bytes(last - first)
                    gone += last - first
                if not gone:
                    raise SystemExit(f"{name}: no code of other GPUs was found; has the format changed?")
                print(f"{name}: {gone >> 20} of {len(data) >> 20} MiB zeroed", flush=True)
                data = bytes(image)
            (site / place).parent.mkdir(parents=True, exist_ok=True)
            (site / place).write_bytes(data)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--vllm", required=True, metavar="VERSION")
    ask.add_argument("--out", type=Path, required=True, metavar="DIR")
    ask.add_argument("--wheel", type=Path, metavar="FILE", help="vLLM's wheel, if it is here already")
    ask.add_argument("--arch", type=int, default=90, help="sm number (default: 90)")
    ask.add_argument("--limit", type=float, default=50, metavar="MIB", help="of the archive (default: 50)")
    args = ask.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        site, folder = Path(work, "site"), Path(work, "wheels")
        vllm = args.wheel or download([f"vllm=={args.vllm}"], folder / "vllm", set())[0]
        for wheel in (vllm, *agreeing(PACKAGES, vllm, folder / "others")):
            unpack(wheel, site, args.arch)
        archive = args.out / "vllm.tar.xz"
        same = ["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner"]
        subprocess.run(["tar", "-C", site, "-I", "xz -9 -T1", *same, "-cf", archive.resolve(), "."], check=True)
    size = archive.stat().st_size / 2**20
    print(f"{archive}: {size:.1f} MiB")
    if size > args.limit:
        raise SystemExit(f"more than {args.limit:g} MiB")


if __name__ == "__main__":
    main()
