"""Online transforms of linear inputs: where they are legal, and the matrices that the checkpoint stores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rotquant.errors import RotQuantError
from rotquant.format import Transform
from rotquant_kernels import reference


def check_shard(prefix: str, transform: Transform, inputs: int, tp_size: int) -> None:
    """Refuses a transform whose block does not divide the inputs that one rank sees.

    Args:
        inputs: width of the layer's input on this rank.
    """
    if transform.kind != "none" and inputs % transform.block:
        raise RotQuantError(
            f"{prefix}: the online transform {transform.name} works on blocks of {transform.block} inputs, which do "
            f"not divide the {inputs} inputs of a rank at --tensor-parallel-size {tp_size}: use a smaller one, or "
            "quantize again with --tp-max"
        )


def hadamard_matrix(block: int) -> Tensor:
    """H / sqrt(block), float32 [block, block]."""
    return reference.hadamard(torch.eye(block, dtype=torch.float32, device="cpu"), block)


class StoredMatrix(torch.nn.Module):
    """Receives the tensor `<module>.<transform name>_input.weight` while a checkpoint loads.

    A "dense" matrix is kept. The one of a "hadamard" is only a marker, there to make engines fail that
    do not know the transform: it is compared with the real one and not kept.
    """

    def __init__(self, where: str, transform: Transform) -> None:
        super().__init__()
        self.where, self.transform = where, transform
        self.matrix: Tensor | None = None
        # Empty until loaded: a large model has a marker in one layer and should not pay for all of them.
        self.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        self.weight.weight_loader = self.load  # type: ignore[attr-defined]

    def load(self, parameter: Tensor, loaded: Tensor, shard: Any = None) -> None:
        """vLLM's weight loader; called once for each part of a fused layer.

        Args:
            loaded: float [block, block].
        """
        block = self.transform.block
        if loaded.shape != (block, block):
            raise RotQuantError(f"{self.where} is {list(loaded.shape)}, the config says [{block}, {block}]")
        matrix = loaded.detach().float().cpu()
        if self.transform.kind == "hadamard":
            if not torch.allclose(matrix, hadamard_matrix(block), rtol=torch.finfo(loaded.dtype).eps, atol=0):
                raise RotQuantError(f"{self.where} is not the Hadamard matrix that config.json declares")
        elif self.matrix is not None and not torch.equal(self.matrix, matrix):
            raise RotQuantError(f"{self.where}: the parts of this fused layer store different matrices")
        else:
            self.matrix = matrix.clone()


def expect_matrix(layer: torch.nn.Module, prefix: str, transform: Transform) -> None:
    """Makes `layer` accept the matrix of its transform from the checkpoint."""
    if transform.kind != "none":
        name = f"{transform.name}_input"
        layer.add_module(name, StoredMatrix(f"{prefix}.{name}.weight", transform))


def take_matrix(layer: torch.nn.Module, transform: Transform, device: torch.device) -> Tensor | None:
    """The loaded matrix of a "dense" transform, float32 [block, block]; else None. Removes the receiver."""
    if transform.kind == "none":
        return None
    name = f"{transform.name}_input"
    stored = layer.get_submodule(name)
    assert isinstance(stored, StoredMatrix)
    delattr(layer, name)
    if transform.kind == "hadamard":
        return None
    if stored.matrix is None:
        raise RotQuantError(f"{stored.where} is missing from the checkpoint")
    return stored.matrix.to(device)
