"""Compiles csrc into one shared library, against torch's stable ABI: any torch from 2.10 on loads it.

Run by setup.py where torch is already installed, else once on first use into the user's cache. Uses the
standard library only; torch is asked for its headers and is never installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "csrc" if (HERE / "csrc").exists() else HERE.parent / "csrc"  # installed, in a checkout
TARGET_VERSION = "0x020a000000000000"  # torch 2.10, the first with a stable parallel_for
COMMON = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni"]
# Flags of the files that only one architecture has, by the names that it goes by.
X86 = {
    "tier_avx2.cpp": AVX2,
    "tier_avxvnni.cpp": [*AVX2, "-mavxvnni"],
    "tier_avx512.cpp": AVX512,
    "tier_amx.cpp": [*AVX512, "-mamx-tile", "-mamx-int8"],
}
ARM = {
    "tier_neon.cpp": ["-march=armv8.2-a+dotprod"],
    "tier_i8mm.cpp": ["-march=armv8.2-a+dotprod+i8mm"],
}
FLAGS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}
NAME = "librotquant_cpu.so"
LOCK_SECONDS = 600.0  # how long to wait for another process that compiles: ten times what it takes


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


def tiers(machine: str = "") -> dict[str, list[str]]:
    """Flags of each file that a machine, this one if it is not named, has and others have not."""
    return FLAGS.get((machine or platform.machine()).lower(), {})


def sources(machine: str = "") -> list[Path]:
    """The files that are compiled for a machine, this one if it is not named."""
    others = {name for flags in FLAGS.values() for name in flags} - tiers(machine).keys()
    return [f for f in sorted(SOURCES.glob("*.cpp")) if f.name not in others]


def fingerprint() -> str:
    """Changes with the sources, the flags, $CXX and the processor's architecture.

    Not with the compiler that is found: a machine without one finds what was compiled for it elsewhere.
    """
    state = hashlib.sha256(repr((COMMON, FLAGS, TARGET_VERSION, platform.machine())).encode())
    state.update(repr([os.environ.get(name, "") for name in ("CXX", "CXXFLAGS")]).encode())
    for file in sorted(SOURCES.glob("*")):
        state.update(file.name.encode() + file.read_bytes())
    return state.hexdigest()[:16]


def compile_once(target: Path) -> Path:
    """`compile_library` unless `target` is there; of processes that start together, the ranks of a server or the nodes
    that share a home, one compiles and the others wait for it.

    Raises:
        BuildError: `target` cannot be written, or as `compile_library`.
    """
    if target.exists():
        return target
    compiler()  # a machine without one need not wait
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(target.parent / "lock"):
            if not target.exists():
                print("rotquant: compiling its CPU kernels (once, under a minute)", file=sys.stderr, flush=True)
                compile_library(target)
    except OSError as error:
        raise BuildError(
            f"{target} is not there and cannot be written ({error.strerror or error}): run `rotquant build` where "
            "it can, or set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return target


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Holds the lock file `path`. A process that is killed lets go of it; one that hangs is not waited for for ever,
    nor is one on a file system without locks: then two compile, which costs time and is right all the same."""
    import fcntl  # not on Windows, where setup.py reads this file

    with open(path, "w") as file:
        until, told = time.monotonic() + LOCK_SECONDS, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    break
            except OSError:  # no locks here
                break
            if not told:
                print("rotquant: another process compiles the CPU kernels, waiting", file=sys.stderr, flush=True)
            told = True
            time.sleep(0.1)
        yield


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
            call([cxx, *COMMON, *tiers().get(source.name, []), *includes, *extra, "-c", str(source), "-o", made])
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
