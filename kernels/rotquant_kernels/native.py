"""Loads the native CPU kernels: the library of the installed package, else one compiled once and cached.

Without a compiler the plain-torch reference runs instead: the same numbers, far slower, with a warning.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rotquant_kernels import build

TIER = "ROTQUANT_CPU_TIER"  # what `choose` takes; "auto" if it is not set
REFERENCE = "reference"
TIERS = ("auto", "amx", "avx512", "avxvnni", "avx2", "i8mm", "neon", "scalar", REFERENCE)

_loaded = False
_hiding: torch.library.Library | None = None  # covers the native kernels with the reference while it lives


def cache_root() -> Path:
    """The user's folder for everything that rotquant makes once.

    Raises:
        OSError: this user has no home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rotquant"
    except RuntimeError as error:
        raise OSError("this user has no home folder: set XDG_CACHE_HOME to a folder that can be written") from error


def cache_folder() -> Path:
    """Where compiled libraries are kept, one folder for each state of the sources."""
    return cache_root() / f"kernels-{build.fingerprint()}"


def library() -> Path:
    """Path of the library, compiled first where there is none.

    Raises:
        build.BuildError: no compiler, or it failed, or the result cannot be written.
    """
    shipped = Path(__file__).with_name(build.NAME)
    return shipped if shipped.exists() else build.compile_once(cache_folder() / build.NAME)


@functools.cache
def load() -> str:
    """Registers the native kernels for torch's CPU key; why that is not possible, or nothing."""
    global _loaded
    try:
        torch.ops.load_library(str(library()))
    except (build.BuildError, OSError) as error:
        return str(error)
    _loaded = True
    return ""


def choose(tier: str, specification: Mapping[str, Callable[..., Any]]) -> None:
    """Makes the kernels of a tier run from now on. Weights that were prepared before keep the layout of their tier.

    Args:
        tier: "auto" for the best of this machine, one of TIERS, "reference" for none.
        specification: the functions in plain torch of the ops.
    Raises:
        OSError: this machine does not have the tier.
    """
    global _hiding
    if tier == REFERENCE:
        if _loaded and _hiding is None:
            _hiding = torch.library.Library("rotquant", "IMPL")
            with warnings.catch_warnings(action="ignore"):  # of torch, that a kernel is covered
                for op, function in specification.items():
                    if torch._C._dispatch_has_kernel_for_dispatch_key(f"rotquant::{op}", "CPU"):
                        _hiding.impl(op, function, "CPU", allow_override=True)
        return
    failure = load()
    if failure and tier != "auto":
        raise OSError(f"there are no native CPU kernels of the tier {tier!r} ({TIER}): {failure}")
    if failure:
        warnings.warn(
            "rotquant's native CPU kernels are not available, the plain-torch reference runs instead (the same "
            f"numbers, tens of times slower): {failure}",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    try:
        torch.ops.rotquant.cpu_tier(tier)
    except RuntimeError:
        raise OSError(
            f"this machine has no native CPU kernels of the tier {tier!r} ({TIER}): {', '.join(TIERS)}"
        ) from None
    if _hiding is not None:
        _hiding._destroy()
        _hiding = None


def tier() -> str:
    """The tier that runs, "reference" where none does."""
    return str(torch.ops.rotquant.cpu_tier("")) if _loaded and _hiding is None else REFERENCE


def stages() -> tuple[str, ...]:
    """Kinds of online transforms that the library has a kernel of; it is loaded."""
    return tuple(str(torch.ops.rotquant.native_stages()).split())
