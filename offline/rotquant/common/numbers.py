"""What several parts ask of a number."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Ratio = Annotated[float, Field(gt=0, le=1)]  # such as a clip, the share of a range that is kept


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0
