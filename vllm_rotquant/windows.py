"""The sliding window of each attention layer, as transformers reads it in config.json: so it was measured.

vLLM reads the same file with code of its own, and some of its classes give no window to single layers (see
`rotquant.models.windows`). With the 4-bit cache a layer runs the window that it is given here, and vLLM keeps its pages
by it; with vLLM's own cache nothing but vLLM's reading counts, so the two must agree.
"""

from __future__ import annotations

from rotquant.errors import RotQuantError
from rotquant.models import Architecture


class Windows:
    """Which window a layer has."""

    def __init__(self, arch: Architecture | None, longest: int) -> None:
        """
        Args:
            arch: transformers' reading, None of a model that rotquant does not know; longest: tokens of a sequence that
                the server accepts.
        """
        self.longest = longest
        prefixes = [arch.layer_prefix(index) for index in range(arch.layers)] if arch else []
        kinds = [kind.attention for kind in arch.kinds] if arch else []
        self.own = {prefix + kind.module: kind.window for prefix, kind in zip(prefixes, kinds, strict=True)}

    def of(self, name: str, given: int | None, *, ours: bool) -> int | None:
        """Positions that a query of this layer sees at most, None for all.

        Args:
            name: of the module that calls attention, as the checkpoint has it.
            given: the window that vLLM gives the layer; ours: whether its cache is ours.
        Raises:
            RotQuantError: transformers gives it another, which it would not run with.
        """
        if name not in self.own and any(self.own.values()):
            raise RotQuantError(f"{name}: transformers knows no such attention layer, so its window is not known")
        given, own = self._felt(given), self._felt(self.own.get(name, given))
        if own != given and not (ours and given is None):
            raise RotQuantError(
                f"{name}: vLLM gives this layer {said(given)}, transformers {said(own)} (config.json: sliding_window,"
                " layer_types): make them say one thing, quantize with a 4-bit KV cache, or serve contexts that no"
                f" window cuts, --max-model-len {min(filter(None, (given, own)))}"
            )
        return own

    def _felt(self, window: int | None) -> int | None:
        """None for a window that holds every context."""
        return window if window is not None and window < self.longest else None


def said(window: int | None) -> str:
    return f"a window of {window}" if window else "no window"
