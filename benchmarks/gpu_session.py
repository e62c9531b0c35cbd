"""Two runs on a GPU that is held for minutes: A, does it run, is it right, where does the time go; B, after mending.

A phase is a process of its own with a time limit. It writes what it finds line by line (JSON) to a file that the run
reads: a phase that hangs, and a run that is cut short, leave every line that there was. `gpu.py --part` runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gpu_phases
from kernels_report import table

Line = dict[str, Any]
DEADLINE = "ROTQUANT_GPU_DEADLINE"  # of a phase, seconds since 1970: what would end later is not begun
GRACE = 5  # seconds between a phase's deadline and its end by force


class Phase(NamedTuple):
    """Args: seconds: limit; run: yields lines; may end as early as it likes where `gpu_deadline.late` says so."""

    seconds: int
    run: Callable[[], Iterator[Line]]


def serving(name: str, seconds: int, first: bool = False) -> Phase:
    return Phase(seconds, lambda: gpu_phases.serve(name, first))


PARTS: dict[str, dict[str, Phase]] = {
    "A": {
        "facts": Phase(20, gpu_phases.facts),
        "compile": Phase(30, gpu_phases.compile_all),
        "right": Phase(45, gpu_phases.right),
        "layer": Phase(20, gpu_phases.layer),
        "times": Phase(70, gpu_phases.times),
        "sweep": Phase(60, gpu_phases.sweep),
        "serve rotquant": serving("rotquant", 80, first=True),
    },
    "B": {
        "compile": Phase(25, gpu_phases.compile_all),
        "right": Phase(30, gpu_phases.right),
        "times": Phase(45, gpu_phases.times),
        "serve rotquant": serving("rotquant", 60),
        "serve bf16": serving("bf16", 60),
        "serve fp8": serving("fp8", 60),
        "serve w4a16": serving("w4a16", 60),
    },
}


def run_phase(part: str, name: str, seconds: float, lines: Path, log: Path, variables: dict[str, str]) -> Line:
    """Runs a phase in its own process, which appends to `lines`; how it ended."""
    started = time.time()
    command = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--part", part, "--phase", name]
    known = variables | {DEADLINE: str(started + seconds - GRACE), "ROTQUANT_GPU_LINES": str(lines)}
    with log.open("w") as out:
        process = subprocess.Popen(command, env=os.environ | known, stdout=out, stderr=out, start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # the phase's own processes, vLLM's among them
            process.wait()
    took = round(time.time() - started, 1)
    ended: Line = {"phase": name, "seconds": took}
    if process.returncode:
        late = took >= seconds
        ended["error"] = f"stopped after {took} s" if late else f"ended with {process.returncode}"
        ended["log"] = log.read_text(errors="replace")[-3000:]
    return ended


def write(lines: Path, line: Line) -> None:
    """Appends one line, so that it is there whatever happens next."""
    with lines.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def phase(part: str, name: str) -> None:
    """One phase, in this process."""
    lines = Path(os.environ["ROTQUANT_GPU_LINES"])
    for line in PARTS[part][name].run():
        write(lines, {"phase": name} | line)
        print(json.dumps(line)[:300], flush=True)


def session(part: str, folder: Path, budget: float, variables: dict[str, str], patience: float = 1) -> int:
    """All phases of a part within `budget` seconds, each within its limit times `patience`; results in `folder`.

    Returns: how many phases failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines, failed, end = folder / f"gpu-{part}.jsonl", 0, time.time() + budget
    lines.unlink(missing_ok=True)
    for name, planned in PARTS[part].items():
        left = end - time.time()
        if left < 2 * GRACE:
            write(lines, {"phase": name, "error": "no time was left"})
            failed += 1
            continue
        log = folder / f"gpu-{part}-{name.replace(' ', '-')}.log"
        ended = run_phase(part, name, min(planned.seconds * patience, left), lines, log, variables)
        write(lines, ended)
        failed += "error" in ended
        (folder / f"gpu-{part}.md").write_text(report(lines))
        print(f"{name}: {ended.get('error', 'done')} ({ended['seconds']} s)", flush=True)
    (folder / f"gpu-{part}.md").write_text(report(lines))
    print(report(lines))
    return failed


def report(lines: Path) -> str:
    """Every phase's lines as a table, in Markdown."""
    found: dict[str, list[Line]] = {}
    for text in lines.read_text().splitlines():
        line = json.loads(text)
        found.setdefault(line.pop("phase"), []).append(line)
    parts = []
    for name, rows in found.items():
        heads = list(dict.fromkeys(key for row in rows for key in row if key != "log"))
        cells = [[_cell(row.get(key, "")) for key in heads] for row in rows]
        parts.append(f"## {name}\n\n{table(heads, cells)}")
    return "\n\n".join(parts) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "/").replace("\n", " ")[:160]
