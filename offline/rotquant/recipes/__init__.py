"""The recipes that come with rotquant, one YAML file each, and the reader of these and of a user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rotquant.common.faults import first_error
from rotquant.common.json_files import short
from rotquant.errors import RotQuantError
from rotquant.recipe import Recipe

SHIPPED = Path(__file__).parent
BASE = "base"  # of a recipe: another's name, from which it differs by what it says


def shipped() -> list[tuple[str, str]]:
    """Name and description of every recipe in the package."""
    return [(name, load_recipe(name).description) for name in names()]


def names() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_recipe(recipe: str, settings: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and applies `key=value` settings to it.

    Args:
        recipe: name of a shipped recipe, or a path ending in .yaml.
        settings: e.g. ["weights.method=rtn", "kv.bits=16"]; values are read as YAML.
    Raises:
        RotQuantError: unknown recipe, unknown key, or a value that the key does not take.
    """
    if recipe.endswith((".yaml", ".yml")):
        source, where = Path(recipe), recipe
    else:
        source, where = SHIPPED / f"{Path(recipe).name}.yaml", f"recipe {recipe}"
    if not source.is_file():
        known = ", ".join(names())
        raise RotQuantError(f"unknown recipe {recipe!r}: take one of {known}, or give the path of a .yaml file")
    data = _read(source, where)
    if BASE in data:
        data = _on_base(data, where)
    for setting in settings:
        _set(data, setting)
    try:
        found = Recipe.model_validate(data).check_learning()
    except ValidationError as error:
        raise RotQuantError(f"{where}: {first_error(error, unknown='no such key')}") from error
    return found.without_choices_of([setting.partition("=")[0].strip() for setting in settings])


def _read(source: Path, where: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise RotQuantError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise RotQuantError(f"{where}: a recipe is a YAML mapping")
    return data


def _on_base(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The shipped recipe that `base` names, with what differs; only one that has no base itself."""
    name = data[BASE]
    if not isinstance(name, str) or name not in names():
        raise RotQuantError(
            f"{where}: base: {short(repr(name), 60)} is no shipped recipe: take one of {', '.join(names())}"
        )
    base = _read(SHIPPED / f"{name}.yaml", f"recipe {name}")
    if BASE in base:
        raise RotQuantError(f"{where}: base: {name} has itself the base {base[BASE]}; name that, and what differs")
    return _merged(base, {key: value for key, value in data.items() if key != BASE})


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`one` with the values of `other`; mappings that both have are merged alike."""
    found = dict(one)
    for key, value in other.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _merged(found[key], value) if both else value
    return found


def _set(data: dict[str, Any], setting: str) -> None:
    key, equals, value = setting.partition("=")
    if not equals:
        raise RotQuantError(f"--set {setting}: write it as key=value, e.g. weights.method=rtn")
    *parents, last = key.strip().split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise RotQuantError(f"--set {setting}: {parent} has no keys below it")
    try:
        data[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RotQuantError(f"--set {setting}: the value is not valid YAML: {short(error, 100)}") from error
