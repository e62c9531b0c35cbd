"""What other libraries' errors mean, in words for one line."""

from __future__ import annotations

import errno
import re

from pydantic import ValidationError

from rotquant.common.json_files import short

NEWER = "this build of rotquant does not run this feature; a newer one may"


def first_error(error: ValidationError, where: str = "", unknown: str = NEWER) -> str:
    """The first fault that pydantic found: path of the field, the value where it is short, and the reason.

    Args:
        where: what the paths begin with; unknown: what is said of a field that the model does not have.
    """
    first = error.errors()[0]
    # pydantic puts the alternatives of a union into the path, such as "list[str]".
    parts = [str(part) for part in first["loc"] if not re.search(r"[\[(]", str(part))]
    path = ".".join([where, *parts] if where else parts)
    if first["type"] == "extra_forbidden":
        return f"{path}: {unknown}"
    found = f" is {short(repr(first['input']), 100)}" if isinstance(first["input"], str | int | float) else ""
    reason = short(first["msg"].removeprefix("Value error, "))
    return f"{path}{found}: {reason}" if path else reason


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of the system's or of safetensors' says that there is no space left."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
