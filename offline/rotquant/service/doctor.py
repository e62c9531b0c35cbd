"""`rotquant doctor`: what this machine and environment can do, what is wrong, and how to mend it.

A problem keeps something that is installed from working; it makes the exit code 1. What is merely
absent, such as vLLM beside a quantizer, is a note.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

PACKAGES = ("rotquant", "torch", "transformers", "compressed-tensors", "safetensors", "vllm")
CPU_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "bf16")
CUDA_ONLY = (
    "torchvision",
    "torchaudio",
    "torchcodec",
)  # vLLM's CPU build pulls them in; beside a CPU torch they break it
LEAST_GB = 2.0


@dataclass
class Problem:
    """Something that does not work, and what to do about it."""

    what: str
    mend: str


@dataclass
class Report:
    """Facts by section, notes and problems. `str` is for people, `as_dict` for programs."""

    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def problem(self, what: str, mend: str) -> None:
        self.problems.append(Problem(what, mend))

    def __str__(self) -> str:
        lines = []
        width = max((len(name) for facts in self.facts.values() for name in facts), default=0)
        for section, facts in self.facts.items():
            lines += [section, *(f"  {name:<{width}} {value}" for name, value in facts.items())]
        lines += [f"note: {note}" for note in self.notes]
        for number, problem in enumerate(self.problems, 1):
            lines += [f"problem {number}: {problem.what}", f"  mend: {problem.mend}"]
        return "\n".join([*lines, "" if self.problems else "everything is in order"]).rstrip()


def examine() -> Report:
    """Looks at everything. Imports torch, and vLLM where it is installed; starts and changes nothing."""
    report = Report()
    for section, look in SECTIONS.items():
        try:
            report.facts[section] = look(report)
        except ImportError as error:  # what broken package this is, the versions section says
            report.facts[section] = {"not looked at": str(error)}
    return report


def version_of(package: str) -> str | None:
    """Installed version; None where there is none. vLLM's CPU build has a name of its own."""
    for name in (package, f"{package}-cpu") if package == "vllm" else (package,):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _versions(report: Report) -> dict[str, str]:
    facts = {"python": f"{platform.python_version()} ({sys.executable})", "system": platform.platform()}
    for package in PACKAGES:
        facts[package] = version_of(package) or "not installed"
    for module in ("torch", "transformers", "compressed_tensors", "rotquant.checkpoint.format"):
        reason = _import_error(module)
        if reason:
            report.problem(f"`import {module}` fails: {reason}", "pip install --force-reinstall rotquant")
    return facts


def _import_error(module: str) -> str | None:
    try:
        import_module(module)
    except Exception as error:  # a broken installation can raise anything
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _cpu(report: Report) -> dict[str, str]:
    words: set[str] = set()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        words = {w for line in lines if line.startswith(("flags", "Features")) for w in line.partition(":")[2].split()}
    found = [flag for flag in CPU_FLAGS if flag in words]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"machine": platform.machine(), "cores": str(cores), "instructions": " ".join(found) or "none of those used"}


def _gpus(report: Report) -> dict[str, str]:
    import torch

    facts = {}
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        facts[f"cuda:{i}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
    if not facts and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        if "GPU" in listed:
            mend = "install the torch build of your CUDA version (https://pytorch.org), then vllm"
            report.problem(f"there is an NVIDIA GPU, but torch {torch.__version__} does not see it", mend)
    return facts or {"CUDA": "none"}


def _schemes(report: Report) -> dict[str, str]:
    """Which `quantize --scheme` is the one to serve here."""
    import torch

    from rotquant.recipes.schemes import pays_on_cpu, pays_on_gpu

    gpus = {f"cuda:{i}": torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return {"cpu": pays_on_cpu(_cpu(report)["instructions"])} | {n: pays_on_gpu(*known) for n, known in gpus.items()}


def _kernels(report: Report) -> dict[str, str]:
    import torch

    from rotquant_kernels import OPS, kernel_of

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {f"{op} ({device})": kernel_of(op, device) for device in devices for op in OPS}


def _serving(report: Report) -> dict[str, str]:
    """Whether `vllm serve --quantization rotquant` can work here."""
    if version_of("vllm") is None:
        report.notes.append(
            'vLLM is not installed: quantizing works, serving does not. With a GPU: pip install "rotquant[serve]";'
            " without one `python run.py doctor` in rotquant's repository sets up the CPU build"
        )
        return {"vllm": "not installed"}
    for package in CUDA_ONLY:
        reason = _import_error(package) if version_of(package) else None
        if reason:
            report.problem(f"`import {package}` fails ({reason}) and takes vLLM with it", f"pip uninstall {package}")
    return {"platform": _vllm_platform(report), "plugin": _plugin(report)}


def _vllm_platform(report: Report) -> str:
    reason = _import_error("vllm.platforms")
    if reason:
        report.problem(
            f"`import vllm` fails: {reason}", "install vLLM anew; its torch and yours must be of one version"
        )
        return "broken"
    from vllm.platforms import current_platform

    kind = current_platform.device_type
    if not kind:
        mend = "with a CPU build: export VLLM_TARGET_DEVICE=cpu; with a GPU: check that nvidia-smi works"
        report.problem("vLLM recognizes no device here, every start would fail", mend)
    return kind or "none"


def _plugin(report: Report) -> str:
    """The plugin as vLLM finds it, by its entry point; asked whether it runs in this vLLM."""
    found = [e for e in metadata.entry_points(group="vllm.general_plugins") if e.name == "rotquant"]
    if not found:
        report.problem("vLLM does not know the rotquant plugin", "install the project: pip install rotquant")
        return "not registered"
    mend = "reinstall rotquant"
    try:
        found[0].load()
        plugin: Any = import_module(found[0].module)
        reason = plugin.unsupported_vllm()
        mend = f'pip install "{plugin.vllm_requirement()}", then reinstall rotquant'
    except Exception as error:  # whatever it is, vLLM would only log it and go on without the plugin
        reason = f"the plugin does not load: {type(error).__name__}: {' '.join(str(error).split())}"
    allowed = os.environ.get("VLLM_PLUGINS")
    if reason:
        report.problem(reason, mend)
    if allowed is not None and "rotquant" not in allowed.split(","):
        report.problem(
            f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading rotquant", "unset VLLM_PLUGINS, or add rotquant to it"
        )
    return f"{found[0].value}, loads" if not reason else "refused"


def _resources(report: Report) -> dict[str, str]:
    disk, memory = shutil.disk_usage(Path.cwd()).free / 1e9, _free_memory()
    if disk < LEAST_GB:
        report.problem(f"{disk:.1f} GB are free on the disk of {Path.cwd()}", "free some space, or work elsewhere")
    if memory is not None and memory < LEAST_GB:
        report.problem(f"{memory:.1f} GB of memory are free", "end other programs, or set VLLM_CPU_KVCACHE_SPACE=1")
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    for there, what, package in ((compiler, "C++ compiler", "g++"), (headers, "Python headers", "python3-dev")):
        if not there:
            mend = f"install them (Debian, Ubuntu: apt install {package}), or serve with --enforce-eager"
            report.problem(f"no {what}: vLLM compiles parts of each model at its start", mend)
    return {
        "free memory": f"{memory:.1f} GB" if memory is not None else "unknown",
        "free disk": f"{disk:.1f} GB ({Path.cwd()})",
        "C++ compiler": compiler or "none",
        "Python headers": "found" if headers else "none",
    }


def _free_memory() -> float | None:
    """GB that new programs can use; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("MemAvailable")), None)


SECTIONS: dict[str, Callable[[Report], dict[str, str]]] = {
    "versions": _versions,
    "cpu": _cpu,
    "gpu": _gpus,
    "scheme that pays": _schemes,
    "kernels": _kernels,
    "serving": _serving,
    "resources": _resources,
}
