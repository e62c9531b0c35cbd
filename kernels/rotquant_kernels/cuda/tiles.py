"""How a product is cut up: the table `tiles.json`, which `benchmarks/gpu.py` writes anew from a sweep on a GPU.

A list of rows for each architecture ("90"), and one for "any". The first row that a layer fits is taken, the
architecture's own before those for any; a row without a condition fits all.

    conditions   tokens: most; least_tokens, least_channels; columns, channels: exactly; grouped: scales by group or not
    n, m, k      channels, tokens and columns of a step; k is the most: groups of scales may ask for less
    programs     wanted on each processor: where tiles are fewer, the columns are split among more (`splits`)
    registers    most of a thread, 0 for what the compiler wants
    unpacked     1: the weight is unpacked for the server's own GEMM where that takes the layer (`scaled_mm`)
"""

from __future__ import annotations

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from rotquant_kernels.cuda import layout
from rotquant_kernels.cuda.device import Device

TABLE = Path(__file__).with_name("tiles.json")
OPERANDS = 3  # times the bytes of its sums that a part of the columns reads at least
MOST_TOKENS = 4096  # of a product whose columns are split
CANDIDATES = (1, *(1 + (1 << i) for i in range(13)))  # of numbers of tokens: behind each power of two, MOST_TOKENS too


class Tiles(NamedTuple):
    """Sizes of one program: output channels, tokens, columns a step; its warps and its pipeline's depth; the most
    registers of a thread; into how many parts the columns are split; whether to prefer an unpacked weight."""

    n: int
    m: int
    k: int
    warps: int
    stages: int
    registers: int
    splits: int
    unpacked: bool = False


class Shape(NamedTuple):
    """What decides how a layer is cut up, but for the number of tokens; groups: scales of a channel."""

    columns: int
    channels: int
    groups: int


@cache
def table() -> dict[str, list[dict[str, int]]]:
    found: dict[str, list[dict[str, int]]] = json.loads(TABLE.read_text())
    return found


def fits(row: dict[str, int], tokens: int, shape: Shape) -> bool:
    return (
        row.get("least_tokens", 0) <= tokens <= row.get("tokens", tokens)
        and shape.channels >= row.get("least_channels", 0)
        and row.get("grouped", shape.groups > 1) == (shape.groups > 1)
        and all(getattr(shape, name) == row.get(name, getattr(shape, name)) for name in ("columns", "channels"))
    )


@lru_cache(maxsize=1 << 14)
def tiles(tokens: int, shape: Shape, device: Device) -> Tiles:
    """The cut of a product. Its results do not depend on it: parts are sums of integers."""
    rows = table().get(str(device.sm), []) + table()["any"]
    row = next(row for row in rows if fits(row, tokens, shape))
    size = layout.multiple(shape.columns, layout.COLUMNS) if shape.groups == 1 else shape.columns // shape.groups
    k = max(k for k in (32, 64, 128, 256) if k <= row["k"] and size % k == 0)
    n, m = row["n"], row["m"]
    if layout.multiple(shape.channels, layout.CHANNELS) % n:  # no tile reads past the end
        n = layout.CHANNELS
    splits = 1
    if shape.groups == 1 and tokens <= MOST_TOKENS:  # sums over groups are floats, whose order counts
        programs = -(-shape.channels // n) * -(-tokens // m)
        # Sums are written and read, 8 bytes each; a column of operands is a byte a token and half of one a channel.
        least = OPERANDS * 8 * n * m // (n // 2 + m)
        splits = min(row["programs"] * device.processors // programs, shape.columns // least)
    most = 0 if shape.columns % 16 else row["registers"]  # codes that are read by bytes take registers to put together
    cut = Tiles(n, m, k, row["warps"], row["stages"], most, max(splits, 1))
    return cut._replace(unpacked=bool(row.get("unpacked")))


def distinct_tokens(shape: Shape, device: Device) -> tuple[int, ...]:
    """Numbers of tokens that between them compile every kernel which a layer of this shape launches."""
    found: dict[Any, int] = {}
    for tokens in CANDIDATES:
        cut = tiles(tokens, shape, device)
        found.setdefault(cut._replace(splits=min(cut.splits, 2)), tokens)
    return tuple(found.values())
