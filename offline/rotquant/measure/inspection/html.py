"""The inspection as one HTML page: template, style, script and data in a single file that needs no network.

The data are the JSON object of `rotquant.measure.inspection` and the landscapes. A landscape is |x| over RMS of the
first tokens (rows) and channels (columns, neighbours merged to their maximum), as bytes b with |x| = peak (b / 255)²:
the square keeps small values apart. Of a deep model only some layers have landscapes, to keep the page small.
"""

from __future__ import annotations

import base64
import json
import re
from importlib.resources import files
from typing import Any

from torch import Tensor

LAYERS_SHOWN = 12


def page(facts: dict[str, Any], landscapes: dict[tuple[str, int, str], Tensor]) -> str:
    """The HTML text."""
    layers = sorted({layer for _, layer, _ in landscapes})
    shown = set(layers if len(layers) <= LAYERS_SHOWN else spread(layers, LAYERS_SHOWN))
    encoded = {
        "/".join((when, str(layer), site)): encode(landscape)
        for (when, layer, site), landscape in landscapes.items()
        if layer in shown
    }
    parts = {
        "title": _escaped(f"rotquant inspect: {facts['model']}"),
        "findings": "".join(f"<li>{_escaped(line)}</li>" for line in facts["findings"]),
        "style": _resource("report.css"),
        "script": _resource("report.js") + _resource("landscape.js"),
        # In a script element only "</" and "<!--" could end the data early.
        "data": json.dumps({"facts": facts, "landscapes": encoded}).replace("<", "\\u003c"),
    }
    return re.sub(r"{{(\w+)}}", lambda marker: parts[marker[1]], _resource("report.html"))


def spread(layers: list[int], count: int) -> list[int]:
    """`count` of the layers, evenly, the first and the last among them."""
    return [layers[round(i * (len(layers) - 1) / (count - 1))] for i in range(count)]


def encode(landscape: Tensor) -> dict[str, Any]:
    """Float [rows, columns] of values >= 0 as {"rows", "columns", "peak", "data": base64 of bytes}."""
    peak = float(landscape.max()) or 1.0
    data = (landscape / peak).sqrt().mul(255).round().byte().numpy().tobytes()
    rows, columns = landscape.shape
    return {"rows": rows, "columns": columns, "peak": round(peak, 4), "data": base64.b64encode(data).decode()}


def _resource(name: str) -> str:
    return (files("rotquant.measure.inspection") / name).read_text(encoding="utf-8")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
