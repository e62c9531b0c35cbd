"""Compiling the native kernels: once for all processes, ahead of time, and where nothing can be written."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rotquant.cli import main
from rotquant_kernels import build, native

LIBRARY = native.library()
# A compiler that notes each call and takes its time; it links by copying a library that is there already.
COMPILER = """#!{python}
import os, pathlib, shutil, sys, time
made = sys.argv[sys.argv.index("-o") + 1]
with open({log!r}, "a") as log:
    log.write("link\\n" if "-shared" in sys.argv else "compile\\n")
time.sleep(float(os.environ.get("SLOW", "0")))
shutil.copy({library!r}, made) if "-shared" in sys.argv else pathlib.Path(made).touch()
"""
# As setup.py does: without the package, which imports torch.
SCRIPT = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("build_kernels", sys.argv[1])
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
build.LOCK_SECONDS = float(sys.argv[3])
print(build.compile_once(pathlib.Path(sys.argv[2])))
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Log of the calls of the compiler that is found."""
    log, program = tmp_path / "calls", tmp_path / "cxx"
    log.touch()
    program.write_text(COMPILER.format(python=sys.executable, log=str(log), library=str(LIBRARY)))
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    return log


def start(target: Path, seconds: float = 60, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, build.__file__, str(target), str(seconds)]
    return subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ends(process: subprocess.Popen, target: Path) -> str:
    """What it wrote to stderr."""
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out.strip()) == (0, str(target)), err
    assert target.stat().st_size == LIBRARY.stat().st_size
    return err


def until(happened) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_processes_that_start_together_compile_once(compiler, tmp_path):
    target = tmp_path / "cache" / build.NAME
    logs = [ends(process, target) for process in [start(target, SLOW="0.5") for _ in range(4)]]
    assert sorted(compiler.read_text().split()) == ["compile"] * len(build.sources()) + ["link"]
    assert sum("compiling its CPU kernels" in log for log in logs) == 1


def test_the_next_one_goes_on_where_the_first_was_killed(compiler, tmp_path):
    target = tmp_path / "cache" / build.NAME
    first = start(target, SLOW="60")
    until(lambda: compiler.read_text())
    second = start(target)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    ends(second, target)
    assert compiler.read_text().split().count("link") == 1


def test_a_process_that_hangs_is_not_waited_for_for_ever(compiler, tmp_path):
    target = tmp_path / "cache" / build.NAME
    target.parent.mkdir()
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process compiles the CPU kernels, waiting" in ends(start(target, seconds=0.3), target)


def test_without_a_compiler_what_was_built_ahead_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    target = native.cache_folder() / build.NAME
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler found"):
        build.compile_once(target)
    target.parent.mkdir(parents=True)
    target.touch()
    assert native.cache_folder() == target.parent
    assert build.compile_once(target) == target


def test_a_cache_that_cannot_be_written_is_named(compiler, tmp_path):
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "cache" / build.NAME  # root may write anywhere but here
    with pytest.raises(build.BuildError, match=r"file/cache.* cannot be written .*run `rotquant build` where it can"):
        build.compile_once(target)


def test_build_verb(monkeypatch, capsys, tmp_path):
    assert main(["build"]) == 0
    assert capsys.readouterr().out.strip() == str(LIBRARY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    assert main(["build"]) == 2
    assert capsys.readouterr().err.startswith("rotquant: compiling")
