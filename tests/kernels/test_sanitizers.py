"""The kernel tests once more, with kernels that check every access (address and undefined-behaviour sanitizers)."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FLAGS = "-O0 -fsanitize=address,undefined -fno-sanitize-recover=all"


def runtime(name: str) -> str | None:
    """Path of a sanitizer's runtime library, which must be loaded before Python."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or "g++"
    done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    path = Path(done.stdout.strip())
    return str(path) if path.is_absolute() and path.exists() else None


@pytest.mark.skipif(platform.system() != "Linux", reason="the runtimes are loaded with LD_PRELOAD")
def test_kernels_are_clean_under_sanitizers(tmp_path):
    libraries = [runtime("libasan.so"), runtime("libubsan.so")]
    if None in libraries:
        pytest.skip("the compiler has no sanitizer runtimes")
    environment = os.environ | {
        "CXXFLAGS": FLAGS,
        "XDG_CACHE_HOME": str(tmp_path),
        "LD_PRELOAD": " ".join(map(str, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaves memory behind
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "ROTQUANT_EXAMPLES": "8",
    }
    names = ("test_linear_native.py", "test_kv4_native.py", "test_experts.py", "test_stages.py")
    files = [str(HERE / name) for name in names]
    chosen = "not compiled_once and not undo_it and not what_is_named"  # a profiler, gradients: nothing native
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    built = list(tmp_path.glob("rotquant/kernels-*/*.so"))
    assert len(built) == 1
    assert b"__asan" in built[0].read_bytes()
