"""rotquant: rotation-based W4A4KV4 quantization of Hugging Face checkpoints.

    rotquant.quantize(model, output, ...)    checkpoint in, checkpoint out (`rotquant.pipeline.quantize`)
    rotquant.load(output)                    the result as a transformers model (`rotquant.checkpoint.loading.load`)

Both are imported on first use: `import rotquant` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rotquant.checkpoint.loading import load
    from rotquant.pipeline import quantize

__all__ = ["__version__", "load", "quantize"]

_LAZY = {"load": "rotquant.checkpoint.loading", "quantize": "rotquant.pipeline"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("rotquant")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'rotquant' has no attribute {name!r}")
