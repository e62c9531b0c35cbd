"""Files of tests that run in a process of their own, for what is decided when a package is first imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def passes(name: str, **environment: str) -> None:
    """Runs the tests of a file in kernels/own_process in this environment; all of them pass, none is skipped."""
    tests = ROOT / "tests/kernels/own_process" / name
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env=os.environ | environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed(?!.*skipped)", done.stdout, re.M), done.stdout


def passes_interpreted(name: str) -> None:
    """`passes` in Triton's interpreter, on CPU tensors: Triton decides at its import whether it interprets."""
    passes(name, TRITON_INTERPRET="1")
