"""Names of tensors where no dot may stand in them: in a ParameterDict."""

from __future__ import annotations


def key(name: str) -> str:
    """A tensor's name as a ParameterDict takes it."""
    return name.replace(".", "-")


def dotted(name: str) -> str:
    """Inverse of `key`."""
    return name.replace("-", ".")
