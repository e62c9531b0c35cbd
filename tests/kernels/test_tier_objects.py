"""A library of all tiers is loaded by every processor: nothing of a tier runs, or is called, before it is chosen."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rotquant_kernels import build


def shared_or_run(source: Path, folder: Path) -> list[str]:
    """Of the object of a tier: functions that the linker may take for another tier's, and what runs at loading."""
    made = folder / f"{source.stem}.o"
    flags = [*build.COMMON, *build.tiers().get(source.name, []), "-O0"]  # where the optimiser inlines nothing
    subprocess.run([build.compiler(), *flags, "-c", str(source), "-o", str(made)], check=True)
    symbols = subprocess.run(["nm", "-C", str(made)], capture_output=True, text=True, check=True).stdout.splitlines()
    kinds = (line[17:].split(" ", 1) for line in symbols)
    shared = [name for kind, name in kinds if kind in "WVu" and not name.startswith("DW.ref.")]
    sections = subprocess.run(["readelf", "-SW", str(made)], capture_output=True, text=True, check=True).stdout
    return [f"{source.name}: {name}" for name in shared + ["a constructor"] * (".init_array" in sections)]


def test_a_tier_neither_shares_functions_nor_runs_when_loaded(tmp_path: Path) -> None:
    """An initialiser that copied a table with AVX-512 ended every process of a processor without it."""
    try:
        build.compiler()
    except build.BuildError:
        pytest.skip("no C++ compiler here")
    sources = [source for source in build.sources() if source.name.startswith("tier_")]
    assert len(sources) > 1
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda source: shared_or_run(source, tmp_path), sources)
        assert not [name for names in found for name in names]
