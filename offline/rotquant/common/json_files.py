"""JSON files of a model folder, read strictly: what two readers could take differently is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from rotquant.errors import RotQuantError


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        RotQuantError: not readable, not JSON (NaN and Infinity are not), no object, or a key that stands twice.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, what is raised below
        raise RotQuantError(f"{file}: no valid JSON: {short(error)}") from error
    if not isinstance(data, dict):
        raise RotQuantError(f"{file}: a JSON object is expected, found {short(repr(data), 40)}")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{short(repr(key), 60)} stands twice")
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def short(what: object, length: int = 300) -> str:
    """A message or value on one line of at most `length` characters."""
    line = " ".join(str(what).split())
    return line if len(line) <= length else line[: length - 3] + "..."
