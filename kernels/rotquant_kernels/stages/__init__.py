"""Online transforms of a linear layer's input: a kind is one file here and one entry of `KINDS`.

Stages run in their order, in float32, on the rows x of K numbers:

    hadamard     x (I ⊗ H / sqrt(block))                               no tensor
    dense        x (I ⊗ T)                                             T [block, block]
    kronecker    x (P ⊗ Q): rows as matrices X [K / block, block], Pᵀ X Q      [(K / block)² + block²], P then Q
    permutation  x[..., p]                                             p [K]
    reflection   x (I ⊗ (I - 2 vᵀv)), v a row of length 1              v [block]
    shift        x - b                                                 b [K]

Whoever reads, folds, learns, measures, stores or serves a chain asks the kind (`kind.Kind`) and knows no names.
Importing this loads no kernels, so that a config.json can be read where they cannot be compiled.
"""

from __future__ import annotations

from rotquant_kernels.stages.dense import Dense
from rotquant_kernels.stages.hadamard import Hadamard
from rotquant_kernels.stages.kind import Kind, Stage
from rotquant_kernels.stages.kronecker import Kronecker
from rotquant_kernels.stages.permutation import Permutation
from rotquant_kernels.stages.reflection import Reflection
from rotquant_kernels.stages.shift import Shift

__all__ = ["KINDS", "Kind", "Stage"]

# By the name in config.json.
KINDS: dict[str, Kind] = {
    kind.name: kind for kind in (Hadamard(), Dense(), Kronecker(), Permutation(), Reflection(), Shift())
}
