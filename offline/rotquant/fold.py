"""Folding: the algebra that turns a model into an equal one that is easier to quantize.

Row tokens, y = x Wᵀ, RMSNorm(x) = (x / rms(x)) diag(g). For orthogonal R, rms(x R) = rms(x), hence:

    gain   W' = W diag(g), g' = 1            (x/rms) diag(g) Wᵀ = (x/rms) W'ᵀ
    R1     E' = E R1;  W' = W R1 reading the residual stream;  W' = R1ᵀ W, b' = b R1 writing to it
                                              x R1 (W R1)ᵀ = x Wᵀ;  y (R1ᵀ W)ᵀ = (y Wᵀ) R1
    R2     per KV head: W_v' = R2ᵀ W_v, b_v' = b_v R2;  W_o[:, h]' = W_o[:, h] R2 for each query head h
                                              attention mixes tokens, not channels, so v R2 passes through it
    R4     W_down' = W_down R4, and the server computes x R4 before it:   x R4 (W R4)ᵀ = x Wᵀ
    R3     nothing to fold: q R3 (k R3)ᵀ = q kᵀ, both online after RoPE

All in float64. A layer is a dict of tensors named as in the checkpoint, less `model.layers.N.`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from rotquant.errors import RotQuantError
from rotquant.models import Architecture
from rotquant.recipe import Recipe
from rotquant.transforms.hadamard import RandomHadamard, is_power_of_two, power_of_two_factor
from rotquant_kernels.reference import hadamard

READS_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
READS_MLP = ("mlp.gate_proj", "mlp.up_proj")
WRITES = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Online:
    """Block sizes of the transforms that the server applies; 0 for none."""

    r3: int
    r4: int


def online_transforms(recipe: Recipe, arch: Architecture, tp_max: int) -> Online:
    """R3 over the whole head; R4 in the largest power-of-two block that divides intermediate_size / tp_max.

    Raises:
        RotQuantError: head size that is not a power of two, or tp_max that does not divide.
    """
    r3 = r4 = 0
    if recipe.rotations.r3 != "none" and recipe.kv.bits < 16:
        if not is_power_of_two(arch.head_dim):
            raise RotQuantError(
                f"config.json: head_dim is {arch.head_dim}, and R3 runs online as a Hadamard of a power of two:"
                " use --set rotations.r3=none"
            )
        r3 = arch.head_dim
    if arch.intermediate_size % tp_max:
        raise RotQuantError(f"--tp-max {tp_max} does not divide intermediate_size {arch.intermediate_size}")
    if recipe.rotations.r4 != "none":
        r4 = power_of_two_factor(arch.intermediate_size // tp_max)
    return Online(r3, r4)


def generator(seed: int, name: str) -> torch.Generator:
    """A random stream of its own for each rotation, so that no order of work or resume changes it."""
    return torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))


class Fold:
    """Folds norms and rotations into the tensors of one model.

    Args:
        recipe: says which rotations; seed: decides their signs; online: from `online_transforms`.
    """

    def __init__(self, recipe: Recipe, arch: Architecture, online: Online, seed: int) -> None:
        self.arch, self.online, self.seed = arch, online, seed
        self.r1 = RandomHadamard(arch.hidden_size, generator(seed, "r1")) if recipe.rotations.r1 != "none" else None
        self.use_r2 = recipe.rotations.r2 != "none"

    def embedding(self, weight: Tensor) -> Tensor:
        """E R1 for the rows of the embedding [vocab, hidden], in float64."""
        weight = weight.double()
        return self.r1.rows(weight) if self.r1 else weight

    def head(self, weight: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        """lm_head [vocab, hidden] and the final norm's gain [hidden] that stays outside."""
        weight, gain = weight.double(), gain.double()
        if not self.r1:
            return weight, gain
        return self.r1.rows(weight * gain), torch.ones_like(gain)

    def layer(self, tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        """The folded tensors of decoder layer `index`, float64."""
        out = {name: tensor.double() for name, tensor in tensors.items()}
        if self.r1:
            self._fold_gain(out, "input_layernorm", READS_ATTENTION)
            self._fold_gain(out, "post_attention_layernorm", READS_MLP)
            for linear in READS_ATTENTION + READS_MLP:
                out[f"{linear}.weight"] = self.r1.rows(out[f"{linear}.weight"])
            for linear in WRITES:
                out[f"{linear}.weight"] = self.r1.columns(out[f"{linear}.weight"])
                if f"{linear}.bias" in out:
                    out[f"{linear}.bias"] = self.r1.rows(out[f"{linear}.bias"])
        if self.use_r2:
            self._fold_r2(out, index)
        if self.online.r4:
            out["mlp.down_proj.weight"] = hadamard(out["mlp.down_proj.weight"], self.online.r4)
        return out

    def _fold_gain(self, out: dict[str, Tensor], norm: str, linears: tuple[str, ...]) -> None:
        gain = out[f"{norm}.weight"]
        for linear in linears:
            out[f"{linear}.weight"] = out[f"{linear}.weight"] * gain
        out[f"{norm}.weight"] = torch.ones_like(gain)

    def _fold_r2(self, out: dict[str, Tensor], index: int) -> None:
        size = self.arch.head_dim
        r2 = RandomHadamard(size, generator(self.seed, f"r2.{index}"))
        value = out["self_attn.v_proj.weight"]  # [kv_heads * d, hidden]
        out["self_attn.v_proj.weight"] = r2.rows(value.unflatten(0, (-1, size)).mT).mT.flatten(0, 1)
        if "self_attn.v_proj.bias" in out:
            out["self_attn.v_proj.bias"] = r2.rows(out["self_attn.v_proj.bias"].unflatten(0, (-1, size))).flatten()
        output = out["self_attn.o_proj.weight"]  # [hidden, heads * d]
        out["self_attn.o_proj.weight"] = r2.rows(output.unflatten(1, (-1, size))).flatten(1)
