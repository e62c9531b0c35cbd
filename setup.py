"""Adds the native kernels to a wheel; everything else is in pyproject.toml.

The C++ sources always go in. They are compiled here if torch and a compiler can be seen (`pip install
--no-build-isolation .`), else on first use. torch is never downloaded for a build.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent


def load_build() -> ModuleType:
    """rotquant_kernels/build.py, without its package, which needs torch."""
    spec = importlib.util.spec_from_file_location("build_kernels", ROOT / "kernels/rotquant_kernels/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()


def why_not() -> str | None:
    """Why the kernels cannot be compiled now, None if they can."""
    try:
        build.torch_folder()
        build.compiler()
    except build.BuildError as error:
        return str(error)
    return None


class BuildPy(build_py):
    """Copies the sources and the library beside the Python files. A checkout (`-e`) compiles on first use."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "rotquant_kernels"
        shutil.copytree(ROOT / "kernels/csrc", package / "csrc", dirs_exist_ok=True)
        reason = why_not()
        if reason is None:
            build.compile_library(package / build.NAME)
        else:
            print(f"rotquant: the kernels will be compiled on first use ({reason})", file=sys.stderr)


class KernelDistribution(Distribution):
    """Not a pure-Python one if it will hold compiled kernels."""

    def has_ext_modules(self) -> bool:
        return why_not() is None


class Wheel(bdist_wheel):
    """With compiled kernels it is of one platform, for any Python: they use torch's stable ABI, not Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel}, distclass=KernelDistribution)
