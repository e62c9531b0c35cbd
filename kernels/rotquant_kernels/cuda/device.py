"""What the kernels' launches need to know of a device."""

from __future__ import annotations

from functools import cache as once
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """What matters of a device: processors, the fewest rows that its matrix unit takes, its sm (80, 90, ...)."""

    processors: int
    least_rows: int
    sm: int = 0


@once
def device_of(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(1, 8)  # Triton's interpreter
    found = torch.cuda.get_device_properties(device)
    # tcgen05 has no layout for a second operand of 8 columns that lies by rows, as softmax weights do.
    return Device(found.multi_processor_count, 16 if found.major == 10 else 8, 10 * found.major + found.minor)
