"""Stands in for torchvision, which vLLM imports beside its vision models and no text needs.

Most wheels of it are built for CUDA, and their import fails beside a CPU torch. Every module and every name below
`torchvision` can be imported here; whatever calls one fails.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.28.0"


class _Names(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"torchvision stands in for nothing but its names: {cls.__name__} was called")


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith("torchvision.") else None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = lambda name: getattr(_Names("torchvision", (), {}), name)


sys.meta_path.insert(0, _Finder())
