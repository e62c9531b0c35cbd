"""Transforms of the design space, drawn at random."""

import torch

from rotquant.transforms.space import LayerTransforms
from rotquant_kernels import Stage


def random_orthogonal(size: int, random: torch.Generator) -> torch.Tensor:
    """Uniformly drawn (Haar), float64: the Q of a Gaussian matrix, its signs fixed by diag(R) > 0 (Mezzadri 2007)."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=random))
    return q * r.diagonal().sign()


def everything(kind, random) -> LayerTransforms:
    """Every transform of the design space at once, drawn at random."""

    def factors(*size):
        return torch.exp(0.5 * torch.randn(*size, generator=random, dtype=torch.float64))

    def rotation(size):
        return random_orthogonal(size, random)

    def unit(size):
        return torch.nn.functional.normalize(torch.randn(size, generator=random, dtype=torch.float64), dim=0)

    hidden, wide, a = kind.hidden, sum(kind.widths), kind.attends
    starts = [sum(kind.widths[:i]) for i in range(len(kind.widths))]
    order = torch.cat([s + torch.randperm(w, generator=random) for s, w in zip(starts, kind.widths, strict=True)])
    down = [Stage("hadamard", 16), Stage("dense", 8, rotation(8))]
    if len(starts) == 1:  # the experts of a mixture share their transforms, whatever their widths
        permutation = torch.randperm(wide, generator=random)
        down[1:1] = [Stage("shift", wide, unit(wide)), Stage("permutation", wide, permutation)]
    kron = torch.cat([(rotation(n) * factors(n)).flatten() for n in (hidden // 8, 8)])
    size, count = kind.attention.channels_of_head, kind.attention.channels // kind.attention.channels_of_head
    heads = torch.cat([rotation(count).flatten(), torch.eye(size, dtype=torch.float64).flatten()])
    own = {} if a is None else {"s_qk": factors(1 if a.key_norm else a.kv_heads, a.qk_factors)}
    if a and not a.normed_values:
        own["s_ov"] = factors(a.kv_heads * a.head_dim)
    if a and not a.gated:
        own["r2"] = torch.stack([rotation(a.head_dim) for _ in range(a.kv_heads)])
    return LayerTransforms(
        s_attn=factors(hidden), s_mlp=factors(hidden), s_ud=factors(wide), order=order, **own,
        inputs={
            "attn": [Stage("kronecker", 8, kron), Stage("shift", hidden, unit(hidden))],
            "o": [Stage("hadamard", 16), Stage("kronecker", size, heads)],
            "mlp": [Stage("dense", 16, rotation(16) * factors(16)), Stage("reflection", hidden, unit(hidden))],
            "down": down,
        },
    )  # fmt: skip
