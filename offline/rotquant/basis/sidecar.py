"""The basis sidecar: what turns between the bases of the original model and those of a checkpoint made from it.

What was made for the original (LoRA adapters, prompt embeddings, drafts) or is expected as the original makes it
(embeddings of texts) meets another basis in the folded model. With h the residual stream and x the rows that the final
norm hands on, both as rows,

    h' = h R1                     x' = x diag(1/g) R1          x = (x' R1ᵀ) diag(g)

where g is the final norm's gain, which lm_head takes. Without R1 nothing changes there. Inside a layer the folding
identities of `fold` hold, for what they need beside the weights is kept: transforms that fold, and the norms' gains as
they were. The file `rotquant_basis.safetensors`, float32 but for `order` (int32), tensors by name:

    basis.r1                                      [hidden, hidden], left out where there is no R1
    basis.norm.weight                             [hidden], the final norm's gain
    basis.layers.N.{input_layernorm,...}.weight   every norm of layer N
    basis.layers.N.{r2,s_attn,...,order}          see `space`; left out where there is none. r2 is [1, d, d] where all
                                                  KV heads share it

It is not weights: no index lists it, and no loader that goes by the index reads it. config.json names it in
`rotquant.basis` with the sha256 of its bytes, which also identifies the basis: what was turned for a checkpoint carries
it along.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig

from rotquant.checkpoint.extension import BasisFile, read_extension
from rotquant.checkpoint.layers import read_gain
from rotquant.checkpoint.source import Source, file_digest, save_tensors
from rotquant.errors import RotQuantError
from rotquant.models import Architecture, Layer, Tensors, describe
from rotquant.transforms.dense import Dense
from rotquant.transforms.fold import Fold
from rotquant.transforms.space import LayerTransforms, Transforms

FILE = "rotquant_basis.safetensors"
PREFIX = "basis."  # no tensor of a model begins so: a loader that reads every file of the folder stops there
FOLDED = tuple(f.name for f in fields(LayerTransforms) if f.name not in ("inputs", "clips", "weight_clips"))


@dataclass(frozen=True)
class Basis:
    """The transforms of a checkpoint that were folded, and the original's norms.

    `norms` holds for each layer `{"input_layernorm.weight": [hidden], ...}`; `gain` is the final norm's [hidden].
    `sha256` is that of the file, "" where it has not been written.
    """

    arch: Architecture
    transforms: Transforms
    norms: list[Tensors]
    gain: Tensor
    sha256: str = field(default="", compare=False)

    @property
    def matrix(self) -> Tensor | None:
        """R1 itself, float32 [hidden, hidden]; None where the residual stream keeps its basis."""
        return self.transforms.r1.matrix if isinstance(self.transforms.r1, Dense) else None

    @property
    def fold(self) -> Fold:
        """Folds what belongs to the original as its weights were folded, in float64."""
        r1 = None if self.matrix is None else Dense(self.matrix.double())
        return Fold(self.arch, replace(self.transforms, r1=r1))

    def to_rotated(self, hidden: Tensor) -> Tensor:
        """Embeddings or rows of the residual stream [..., hidden] as the checkpoint has them, in their dtype."""
        if self.matrix is None:
            return hidden
        return (hidden.float() @ self.matrix.to(hidden.device)).to(hidden.dtype)

    def to_original(self, hidden: Tensor) -> Tensor:
        """What the checkpoint's final norm hands on [..., hidden] as the original's would, in its dtype."""
        if self.matrix is None:
            return hidden
        rows = hidden.float() @ self.matrix.to(hidden.device).T
        return (rows * self.gain.to(rows.device)).to(hidden.dtype)

    # ---- the file -------------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, source: Source, arch: Architecture, transforms: Transforms) -> Basis:
        """The basis that `transforms` make of an original."""
        r1 = transforms.r1 and Dense(transforms.r1.rows(torch.eye(arch.hidden_size, dtype=torch.float64)).float())
        layers = [replace(layer, inputs={}, clips={}, weight_clips={}) for layer in transforms.layers]
        norms = []
        for index in range(arch.layers):
            prefix, names = arch.layer_prefix(index), norm_shapes(arch.kinds[index])
            held = arch.kinds[index].split({name: source.get(prefix + name) for name in names})
            norms.append({name: gain.float() for name, gain in held.items()})
        return cls(arch, Transforms(r1, 0, layers), norms, read_gain(source, arch).float())

    def write(self, folder: Path) -> BasisFile:
        """Writes the file, and returns what config.json says of it."""
        tensors = {"norm.weight": self.gain}
        if self.matrix is not None:
            tensors["r1"] = self.matrix
        for index, (layer, norms) in enumerate(zip(self.transforms.layers, self.norms, strict=True)):
            tensors |= {f"layers.{index}.{name}": tensor for name, tensor in (norms | compact(layer)).items()}
        save_tensors(folder / FILE, {PREFIX + name: tensor for name, tensor in tensors.items()})
        return BasisFile(file=FILE, sha256=file_digest(folder / FILE))

    @classmethod
    def read(cls, folder: Path, config: PreTrainedConfig) -> Basis:
        """The basis of a checkpoint.

        Args:
            folder: local folder of the checkpoint; config: its config.json as transformers reads it.
        Raises:
            RotQuantError: the checkpoint has none, or not the one that config.json names.
        """
        stated = read_extension(getattr(config, "rotquant", None) or {}).basis
        if stated is None:
            raise RotQuantError(
                f"{folder}/config.json: rotquant.basis is missing: a version of rotquant made this checkpoint that kept"
                " no basis; quantize the original again to get one: rotquant quantize MODEL -o OUT"
            )
        file = folder / stated.file
        if not file.is_file():
            raise RotQuantError(f"{file}: no such file, and config.json names it in rotquant.basis; download it again")
        if file_digest(file) != stated.sha256:
            raise RotQuantError(
                f"{file}: not the file that rotquant.basis.sha256 in config.json was made with; download both again"
            )
        try:
            stored = load_file(file)
        except (SafetensorError, OSError) as error:
            raise RotQuantError(f"{file}: not a safetensors file ({error}); download it again") from error
        return replace(from_tensors(file, stored, describe(config)), sha256=stated.sha256)


def compact(layer: LayerTransforms) -> Tensors:
    """The transforms of a layer as the file holds them."""
    out = {n: t.to(torch.int32 if n == "order" else torch.float32).contiguous() for n, t in layer.tensors().items()}
    if layer.r2 is not None and bool((out["r2"] == out["r2"][:1]).all()):
        out["r2"] = out["r2"][:1].clone()
    return out


def from_tensors(file: Path, stored: Tensors, arch: Architecture) -> Basis:
    """The inverse of `Basis.write`, checked against the sizes in config.json.

    Raises:
        RotQuantError: a tensor that is missing, unknown, of a wrong shape or dtype, or not finite.
    """
    allowed = shapes(arch)
    for name, tensor in stored.items():
        if name not in allowed:
            raise RotQuantError(f"{file}: {name} is not a tensor of a basis of this model")
        if tuple(tensor.shape) not in allowed[name]:
            wanted = " or ".join(str(list(shape)) for shape in allowed[name])
            raise RotQuantError(f"{file}: {name} has shape {list(tensor.shape)}, config.json asks for {wanted}")
        if tensor.dtype != (torch.int32 if name.endswith(".order") else torch.float32) or not tensor.isfinite().all():
            raise RotQuantError(f"{file}: {name} holds NaN or infinite values, or is not of the dtype of a basis")
    for name in allowed:
        if name.endswith(".weight") and name not in stored:
            raise RotQuantError(f"{file}: {name} is missing")
    matrix, layers, norms = stored.get(f"{PREFIX}r1"), [], []
    for index in range(arch.layers):
        prefix = f"{PREFIX}layers.{index}."
        own = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
        norms.append({name: tensor for name, tensor in own.items() if name.endswith(".weight")})
        layer = LayerTransforms.from_tensors({name: tensor for name, tensor in own.items() if name in FOLDED})
        attention = arch.kinds[index].attends
        if layer.r2 is not None and attention:
            layer.r2 = layer.r2.expand(attention.kv_heads, -1, -1)
        if layer.order is not None:
            layer.order = check_order(f"{file}: {prefix}order", layer.order.long())
        layers.append(layer)
    r1 = None if matrix is None else Dense(check_orthogonal(f"{file}: {PREFIX}r1", matrix))
    return Basis(arch, Transforms(r1, 0, layers), norms, stored[FINAL])


FINAL = f"{PREFIX}norm.weight"


def shapes(arch: Architecture) -> dict[str, list[tuple[int, ...]]]:
    """Every tensor that a basis of a model may hold, with its shapes. Those that end in `.weight` it must hold."""
    hidden = arch.hidden_size
    found: dict[str, list[tuple[int, ...]]] = {f"{PREFIX}r1": [(hidden, hidden)], FINAL: [(hidden,)]}
    for index, kind in enumerate(arch.kinds):
        own = norm_shapes(kind) | transform_shapes(kind)
        found |= {f"{PREFIX}layers.{index}.{name}": shape for name, shape in own.items()}
    return found


def norm_shapes(kind: Layer) -> dict[str, list[tuple[int, ...]]]:
    found: dict[str, list[tuple[int, ...]]] = {f"{norm}.weight": [(kind.hidden,)] for norm in kind.norms.values()}
    return found | {f"{norm}.weight": [(kind.attends.head_dim,)] for norm in kind.attention.head_norms if kind.attends}


def transform_shapes(kind: Layer) -> dict[str, list[tuple[int, ...]]]:
    found: dict[str, list[tuple[int, ...]]] = {
        "s_attn": [(kind.hidden,)],
        "s_mlp": [(kind.hidden,)],
        "s_ud": [(sum(kind.widths),)],
        "order": [(sum(kind.widths),)],
    }
    if (a := kind.attends) is None:
        return found
    d = a.head_dim
    return found | {
        "r2": [(1, d, d), (a.kv_heads, d, d)],
        "s_ov": [(a.kv_heads * d,)],
        "s_qk": [(1, a.qk_factors), (a.kv_heads, a.qk_factors)],
    }


def check_order(where: str, order: Tensor) -> Tensor:
    if not torch.equal(order.sort().values, torch.arange(len(order))):
        raise RotQuantError(f"{where} is not a permutation")
    return order


def check_orthogonal(where: str, matrix: Tensor) -> Tensor:
    """Looks at one product only: n² numbers instead of n³ for a file whose hash is right."""
    probe = torch.ones(1, len(matrix), dtype=torch.float64)
    probe[:, ::3] = -2.0
    turned = probe @ matrix.double()
    if not torch.allclose(turned @ matrix.double().T, probe, atol=1e-4):
        raise RotQuantError(f"{where} is not orthogonal")
    return matrix
