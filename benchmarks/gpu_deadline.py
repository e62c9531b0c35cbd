"""How long a phase of `gpu_session.py` still has."""

from __future__ import annotations

import os
import time


def late(seconds: float = 3) -> bool:
    """Whether something of so many seconds would end after this phase's deadline."""
    return time.time() + seconds > deadline()


def deadline() -> float:
    """Seconds since 1970."""
    return float(os.environ.get("ROTQUANT_GPU_DEADLINE", "inf"))
