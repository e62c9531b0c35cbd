"""Each header of the C++ kernels includes what it uses: it compiles alone, in every tier in which it differs."""

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rotquant_kernels import build

HEADERS = sorted(build.SOURCES.glob("*.h"))
KINDS = ("vec", "tile", "kv4_dot")  # one header a tier
# What a tier defines besides its own name: it is one of these with other instructions for its products.
BASES = {"amx": "avx512", "avxvnni": "avx2", "i8mm": "neon"}
ARM_COMPILER = "aarch64-linux-gnu-g++"


def tiers() -> dict[str, tuple[str, list[str]]]:
    """Compiler and flags of each tier that can be compiled here."""
    found = {"scalar": (build.compiler(), list[str]())}
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    here = build.compiler() if x86 else None, shutil.which(ARM_COMPILER) if x86 else build.compiler()
    for compiler, files in zip(here, (build.X86, build.ARM), strict=True):
        if compiler:
            found |= {f.removesuffix(".cpp").removeprefix("tier_"): (compiler, flags) for f, flags in files.items()}
    return found


def is_for(header: Path, tier: str) -> bool:
    """Whether a header reads otherwise in a tier than in the others; the scalar one stands for all that do not."""
    for kind in KINDS:
        if header.stem.startswith(f"{kind}_"):
            return header.stem == f"{kind}_{tier}"
    text = header.read_text()
    return tier == "scalar" or f"RQ_{tier.upper()}" in text


def complaint(header: Path, tier: str, compiler: str, flags: list[str]) -> str:
    """What the compiler says about a file that includes nothing but a header."""
    torch = ["-isystem", str(build.torch_folder() / "include"), f"-DTORCH_TARGET_VERSION={build.TARGET_VERSION}"]
    includes = [f"-I{build.SOURCES}", *torch]
    isa = [f"-DRQ_{name.upper()}" for name in (tier, BASES.get(tier)) if name]
    defines = [*isa, "-DRQ_TIER=alone", f"-DRQ_TABLE=tier_{tier}", f'-DRQ_NAME="{tier}"']
    done = subprocess.run(
        [compiler, "-std=c++20", "-fsyntax-only", *flags, *includes, *defines, "-x", "c++", "-"],
        input=f'#include "{header.name}"\n', capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stderr if done.returncode else ""


def test_headers_compile_alone():
    try:
        build.compiler()
    except build.BuildError:
        pytest.skip("no C++ compiler here")
    runs = [(header, tier, *how) for header in HEADERS for tier, how in tiers().items() if is_for(header, tier)]
    assert len(HEADERS) > 10
    with ThreadPoolExecutor(2) as pool:
        said = pool.map(lambda run: complaint(*run), runs)
        found = {f"{header.name}, {tier}": text for (header, tier, *_), text in zip(runs, said, strict=True) if text}
    assert not found
