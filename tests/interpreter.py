"""Tests that need Triton's interpreter. Triton decides at its import whether it interprets: a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path


def passes_interpreted(name: str) -> None:
    """Runs the tests of a file of this folder in the interpreter, on CPU tensors; all of them pass."""
    tests = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=tests.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^\d+ passed", done.stdout, re.M), done.stdout
