"""Each header of the C++ kernels includes what it uses: it compiles alone, in every tier in which it differs."""

import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rotquant_kernels import build

HEADERS = sorted(build.SOURCES.glob("*.h"))
KINDS = ("vec", "tile")  # one header a tier


def tiers() -> dict[str, list[str]]:
    """Flags of each tier that this machine's compiler knows."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    of_x86 = {file.removesuffix(".cpp").removeprefix("tier_"): flags for file, flags in build.X86.items()}
    return {"scalar": []} | (of_x86 if x86 else {})


def is_for(header: Path, tier: str) -> bool:
    """Whether a header reads otherwise in a tier than in the others; the scalar one stands for all that do not."""
    kind, _, own = header.stem.partition("_")
    if kind in KINDS and own:
        return own == tier
    return tier == "scalar" or any(macro in header.read_text() for macro in ("RQ_AVX", "RQ_AMX"))


def complaint(header: Path, tier: str, flags: list[str]) -> str:
    """What the compiler says about a file that includes nothing but a header."""
    torch = ["-isystem", str(build.torch_folder() / "include"), f"-DTORCH_TARGET_VERSION={build.TARGET_VERSION}"]
    includes = [f"-I{build.SOURCES}", *torch]
    isa = ["-DRQ_AVX512", "-DRQ_AMX"] if tier == "amx" else [f"-DRQ_{tier.upper()}"]
    defines = [*isa, "-DRQ_TIER=alone", f"-DRQ_TABLE=tier_{tier}", f'-DRQ_NAME="{tier}"']
    done = subprocess.run(
        [build.compiler(), "-std=c++20", "-fsyntax-only", *flags, *includes, *defines, "-x", "c++", "-"],
        input=f'#include "{header.name}"\n', capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stderr if done.returncode else ""


def test_headers_compile_alone():
    try:
        build.compiler()
    except build.BuildError:
        pytest.skip("no C++ compiler here")
    runs = [(header, *tier) for header in HEADERS for tier in tiers().items() if is_for(header, tier[0])]
    assert len(HEADERS) > 10
    with ThreadPoolExecutor(2) as pool:
        said = pool.map(lambda run: complaint(*run), runs)
        found = {f"{header.name}, {tier}": text for (header, tier, _), text in zip(runs, said, strict=True) if text}
    assert not found
