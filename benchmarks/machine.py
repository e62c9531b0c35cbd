"""The limits of this machine: what the fastest possible kernel could reach. Beside them, what the machine is.

    python benchmarks/machine.py          measure and print, one thread and all of them

Memory: reading 512 MB once, with pages of 4 KiB and of 2 MiB (`madvise`), with and without prefetching; the best
counts, because a limit is what can be reached. Arithmetic: the int8 dot product (VNNI, else AVX2's multiply-add)
and the float32 multiply-add on registers only. machine.cpp is compiled each time with $CXX (default c++).
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("machine.cpp")
READ_BYTES, TIMES, AHEAD = 512 << 20, 5, 8192
# Flags of /proc/cpuinfo that decide which kernel a library picks.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")


def compiled(folder: Path) -> ctypes.CDLL:
    """machine.cpp as a library.

    Raises:
        OSError, subprocess.CalledProcessError: no compiler, or it failed.
    """
    library = folder / "machine.so"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O3", "-shared", "-fPIC", "-pthread"]
    subprocess.run([*command, str(SOURCE), "-o", str(library)], check=True, capture_output=True, text=True)
    loaded = ctypes.CDLL(str(library))
    loaded.read_memory.restype = loaded.multiply.restype = ctypes.c_double
    return loaded


def best(work: float, walls: list[float], cpus: list[float], threads: int) -> dict[str, float]:
    """Work per second by the wall, and by CPU time: what the threads would reach if nothing else ran."""
    return {"wall": work / min(walls), "cpu": work * threads / min(cpus)}


def read_rate(library: ctypes.CDLL, threads: int, huge: bool) -> dict[str, float]:
    """Bytes per second."""
    found = []
    for ahead in (0, AHEAD):
        walls, cpus = (ctypes.c_double * TIMES)(), (ctypes.c_double * TIMES)()
        arguments = (threads, ctypes.c_long(READ_BYTES), int(huge), ctypes.c_long(ahead), TIMES, walls, cpus)
        found.append(best(library.read_memory(*arguments), list(walls), list(cpus), threads))
    return {clock: max(one[clock] for one in found) for clock in ("wall", "cpu")}


def multiply_rate(library: ctypes.CDLL, threads: int, floats: bool) -> dict[str, Any]:
    """Operations per second and the unit that did them; {} where there is none."""
    unit, wall, cpu = ctypes.c_char_p(), ctypes.c_double(), ctypes.c_double()
    walls, cpus, work = [], [], 0.0
    for _ in range(TIMES):
        arguments = (threads, int(floats), ctypes.byref(unit), ctypes.byref(wall), ctypes.byref(cpu))
        work = library.multiply(*arguments)
        walls.append(wall.value)
        cpus.append(cpu.value)
    if not work:
        return {}
    return {**best(work, walls, cpus, threads), "unit": (unit.value or b"").decode()}


def limits(threads: int) -> dict[str, Any]:
    """All limits for a number of threads; {"missing": why} where they cannot be measured."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            library = compiled(Path(folder))
        except (OSError, subprocess.CalledProcessError) as error:
            return {"threads": threads, "missing": getattr(error, "stderr", "") or str(error)}
        return {
            "threads": threads,
            "read": read_rate(library, threads, huge=False),
            "read_huge": read_rate(library, threads, huge=True),
            "int8": multiply_rate(library, threads, floats=False),
            "float32": multiply_rate(library, threads, floats=True),
        }


def cpu_info() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo; {} elsewhere than on Linux."""
    try:
        block = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in block.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def cache_bytes() -> int:
    """The largest cache of the first processor; 0 where the system does not tell."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.rstrip("K")) << 10 for size in sizes), default=0)


def describe() -> dict[str, Any]:
    """What the machine is, as far as it matters for speed."""
    info = cpu_info()
    flags = info.get("flags", "").split()
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "family_model": f"{info.get('cpu family', '?')}-{info.get('model', '?')}",
        "cpus": len(os.sched_getaffinity(0)),
        "cache_mb": cache_bytes() / 2**20,
        "flags": [flag for flag in FLAGS if flag in flags],
        "huge_pages": pages.read_text().strip() if pages.exists() else "none",
        "system": platform.release(),
        "load": list(os.getloadavg()),
    }


def slug() -> str:
    """The machine's CPU as a part of a file name. Virtual machines hide the name, so family and model join it."""
    about = describe()
    words = re.sub(r"\((R|TM)\)|processor|cpu|@.*", " ", about["cpu"], flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", f"{words} {about['family_model']}".lower()).strip("-")


if __name__ == "__main__":
    print(json.dumps(describe(), indent=1))
    for count in sorted({1, len(os.sched_getaffinity(0))}):
        print(json.dumps(limits(count), indent=1))
