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
    try:
        data = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise RotQuantError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise RotQuantError(f"{where}: a recipe is a YAML mapping")
    for setting in settings:
        _set(data, setting)
    try:
        found = Recipe.model_validate(data).check_learning()
    except ValidationError as error:
        raise RotQuantError(f"{where}: {first_error(error, unknown='no such key')}") from error
    return found.without_choices_of([setting.partition("=")[0].strip() for setting in settings])


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
