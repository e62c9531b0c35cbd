"""Where rows of the residual stream enter and leave a model whose stream is turned, in the basis of the original.

    prompt embeddings   a user's rows, E of the original, become E R1 before they meet rows of tokens, which are so
                        already: when a worker gets a request, so that no batch mixes the two
    pooling             the final norm hands on n(h) diag(g) again, from n(h') = n(h) R1; nothing else reads it there,
                        as a pooling model has no lm_head

One product with R1 each, in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rotquant.basis.sidecar import Basis
from rotquant.errors import RotQuantError
from vllm_rotquant import compat


class RestoringNorm(torch.nn.Module):
    """A final norm that hands its rows on as the original model would; keeps the name of the norm's weight."""

    def __init__(self, norm: Any, basis: Basis) -> None:
        super().__init__()
        assert basis.matrix is not None
        self.inverse: Tensor
        self.gain: Tensor
        self.norm = norm
        device = norm.weight.device
        self.register_buffer("inverse", basis.matrix.t().contiguous().to(device), persistent=False)
        self.register_buffer("gain", basis.gain.to(device), persistent=False)

    @property
    def weight(self) -> Any:
        return self.norm.weight

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """n(x) R1ᵀ diag(g); beside it x + residual if given, still turned."""
        if residual is None:
            return self._restored(self.norm(x))
        rows, stream = self.norm(x, residual)
        return self._restored(rows), stream

    def _restored(self, rows: Tensor) -> Tensor:
        return (rows.float() @ self.inverse * self.gain).to(rows.dtype)


def restore_outputs(model: Any, basis: Basis) -> None:
    """Makes a loaded pooling model hand on rows of the original's basis.

    Raises:
        RotQuantError: a model whose forward is not known.
    """
    if basis.matrix is None:
        return
    holder = compat.final_norm_holder(model)
    if holder is None:
        raise RotQuantError(
            f"--runner pooling: this build of rotquant does not know where the final norm of {type(model).__name__} is,"
            " behind which rows are turned back: serve it with --model-impl vllm"
        )
    if hasattr(holder.norm, "weight"):  # not on a pipeline stage before the last
        holder.norm = RestoringNorm(holder.norm, basis)


def turn_inputs(model: Any, basis: Basis) -> None:
    """From now on, prompt embeddings of requests for a loaded model are turned."""
    if basis.matrix is None:
        return
    device = next(model.parameters()).device
    matrix = basis.matrix.to(device)

    def turned(rows: Tensor) -> Tensor:
        return (rows.to(device, torch.float32) @ matrix).to(rows)

    compat.turn_prompt_embeds(model, turned)
