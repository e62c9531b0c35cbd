"""Compiles csrc into one shared library, against torch's stable ABI: any torch from 2.10 on loads it.

Run by setup.py where torch is already installed, else once on first use into the user's cache. Uses the
standard library only; torch is asked for its headers and is never installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "csrc" if (HERE / "csrc").exists() else HERE.parent / "csrc"  # installed, in a checkout
TARGET_VERSION = "0x020a000000000000"  # torch 2.10, the first with a stable parallel_for
COMMON = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
X86 = {
    "tier_avx2.cpp": AVX2,
    "tier_avx512.cpp": [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"],
}
NAME = "librotquant_cpu.so"


class BuildError(RuntimeError):
    """The compiler is missing or failed; the message says which and what it printed."""


def compiler() -> str:
    """Path of $CXX, c++, g++ or clang++."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("no C++ compiler found (c++, g++ or clang++): install one, or set CXX")


def torch_folder() -> Path:
    """Folder of the installed torch, found without importing it."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed")
    return Path(spec.origin).parent


def sources() -> list[Path]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [f for f in sorted(SOURCES.glob("*.cpp")) if x86 or f.name not in X86]


def fingerprint() -> str:
    """Changes with the sources, the flags, the compiler and the processor's architecture."""
    state = hashlib.sha256(repr((COMMON, X86, TARGET_VERSION, compiler(), platform.machine())).encode())
    state.update(os.environ.get("CXXFLAGS", "").encode())
    for file in sorted(SOURCES.glob("*")):
        state.update(file.name.encode() + file.read_bytes())
    return state.hexdigest()[:16]


def compile_library(target: Path) -> Path:
    """Compiles to `target`, which appears only when complete.

    Raises:
        BuildError: with the compiler's message.
    """
    torch, cxx = torch_folder(), compiler()
    extra = os.environ.get("CXXFLAGS", "").split()
    includes = ["-isystem", str(torch / "include"), f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:

        def build(source: Path) -> str:
            made = str(Path(folder) / f"{source.stem}.o")
            call([cxx, *COMMON, *X86.get(source.name, []), *includes, *extra, "-c", str(source), "-o", made])
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(build, sources()))
        made = Path(folder) / NAME
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch"]
        call([cxx, "-shared", *extra, *objects, *libraries, "-o", str(made)])
        os.replace(made, target)
    return target


def call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr.strip()}")
