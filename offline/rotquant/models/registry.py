"""The families that rotquant knows: each a file beside this one, with its line here."""

from __future__ import annotations

from rotquant.models.architecture import Family
from rotquant.models.llama import LLAMA, QWEN3

FAMILIES: tuple[Family, ...] = (LLAMA, QWEN3)
BY_CLASS = {name: family for family in FAMILIES for name in family.classes}
