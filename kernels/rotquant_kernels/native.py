"""Loads the native CPU kernels: the library of the installed package, else one compiled once and cached.

Without a compiler the plain-torch reference runs instead: the same numbers, far slower, with a warning.
"""

from __future__ import annotations

import fcntl
import os
import sys
import warnings
from pathlib import Path

import torch

from rotquant_kernels import build

TIER = "ROTQUANT_CPU_TIER"  # avx512, avx2, scalar, or reference for none


def cache_root() -> Path:
    """The user's folder for everything that rotquant makes once."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rotquant"


def cache_folder() -> Path:
    """Where compiled libraries are kept, one folder for each state of the sources."""
    return cache_root() / f"kernels-{build.fingerprint()}"


def library() -> Path:
    """Path of the library, compiled first where there is none.

    Raises:
        build.BuildError: no compiler, or it failed.
    """
    shipped = Path(__file__).with_name(build.NAME)
    if shipped.exists():
        return shipped
    target = cache_folder() / build.NAME
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the ranks of a server start together
            if not target.exists():
                print("rotquant: compiling its CPU kernels (once, under a minute)", file=sys.stderr, flush=True)
                build.compile_library(target)
    return target


def load() -> None:
    """Registers the native kernels for torch's CPU key; warns where that is not possible."""
    if os.environ.get(TIER) == "reference":
        return
    try:
        torch.ops.load_library(str(library()))
    except (build.BuildError, OSError) as error:
        warnings.warn(
            "rotquant's native CPU kernels are not available, the plain-torch reference runs instead (the same "
            f"numbers, tens of times slower): {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    torch.ops.rotquant.cpu_tier("")  # an unknown ROTQUANT_CPU_TIER is an error now, not in the first request
