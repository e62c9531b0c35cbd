"""What can learn what: the optimisers of rotations, and the objectives that each of them serves.

procrustes   alternates between a target for each row and the rotation that comes nearest to all of them: for objectives
             that have a target (`targets`)
qr, cayley, adam   steps of a gradient on the orthogonal matrices: for objectives that have one (`objectives`)

quantization_error has both. Data alone, so that recipes are checked when they are read.
"""

from __future__ import annotations

PROCRUSTES = ("quantization_error", "clip", "corner", "uniform")
GRADIENT = ("quantization_error", "whip", "kurtosis", "variance", "gsr")
SERVES: dict[str, tuple[str, ...]] = {"procrustes": PROCRUSTES} | dict.fromkeys(("qr", "cayley", "adam"), GRADIENT)


def optimisers(objective: str) -> list[str]:
    """Those that serve an objective."""
    return [name for name, objectives in SERVES.items() if objective in objectives]
