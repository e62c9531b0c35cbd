"""The table of docs/gpu.md: what compilers make of the GPU kernels, from `gpu-launch-gate.json`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from docs_results import read, table

SHOWN = "sm_90"


def kernels() -> str:
    """A row a kernel on SHOWN, values of each Triton where they differ; the spills of all architectures behind."""
    tritons: dict[str, dict[str, list[dict[str, Any]]]] = read("gpu-launch-gate")["tritons"]
    versions = [version for version in sorted(tritons) if SHOWN in tritons[version]]
    by_name = {version: {named(one): one for one in tritons[version][SHOWN]} for version in versions}
    rows = []
    for name in by_name[versions[0]]:
        found = [by_name[version][name] for version in versions]
        cells = [several(found, key) for key in ("registers", "spilled bytes")]
        shared = several([one | {"KiB": -(-one["shared bytes"] // 1024)} for one in found], "KiB")
        rows.append([name, *cells, shared, several(found, "instructions of a step"), several(found, "barriers")])
    heads = [f"{SHOWN}, Triton {', '.join(versions)}", "registers", "spilled, bytes", "shared, KiB"]
    lines = [table([*heads, "instructions of a step", "barriers"], rows), "", spills(tritons)]
    return "\n".join(lines)


def named(one: dict[str, Any]) -> str:
    """What is launched, and with which kernel where that is several."""
    return f"{one['launch']}: `{one['kernel']}`"


def several(found: list[dict[str, Any]], key: str) -> str:
    """One value where all are the same, or all in the order of versions."""
    values = [str(one[key]) for one in found]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def spills(tritons: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """In a sentence each: what was compiled, what spills, how many variants serving meets."""
    count, spilled = 0, dict[str, list[int]]()
    for archs in tritons.values():
        for kernels_of in archs.values():
            for one in kernels_of:
                count += 1
                if one["spilled bytes"]:
                    spilled.setdefault(one["kernel"], []).append(one["spilled bytes"])
    where = ", ".join(f"{len(sizes)} of `{name}` (at most {max(sizes)} bytes a thread)" for name, sizes in
                      sorted(spilled.items()))  # fmt: skip
    archs = ", ".join(f"{version}: {', '.join(sorted(found))}" for version, found in sorted(tritons.items()))
    met = read("gpu-launch-gate")["variants of Llama-3-8B"]
    return (
        f"Compiled: {count} kernels ({archs}). Spilling: {where or 'none'}. A server of Llama-3-8B meets "
        f"{met['captured in graphs']} variants while it captures graphs and {met['besides, in traffic']} besides; it "
        "compiles all of them before its first request."
    )


BLOCKS: dict[str, Callable[[], str]] = {"gpu kernels": kernels}
