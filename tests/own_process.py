"""Files of tests that run in a process of their own, for what is decided when a package is first imported."""

import os
import re
import subprocess
import sys
from pathlib import Path


def passes(name: str, **environment: str) -> None:
    """Runs the tests of a file of this folder under these environment variables; all of them pass, none is skipped."""
    tests = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env=os.environ | environment, cwd=tests.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed(?!.*skipped)", done.stdout, re.M), done.stdout


def passes_interpreted(name: str) -> None:
    """`passes` in Triton's interpreter, on CPU tensors: Triton decides at its import whether it interprets."""
    passes(name, TRITON_INTERPRET="1")
