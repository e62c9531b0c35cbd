"""Turning a LoRA adapter of an original model into one of a checkpoint that was made from it.

Folding takes every linear's weight to W' = L W R (`fold`), hence W + s B A to W' + s (L B)(A R): the factors fold like
the weight. With the gain g of the norm before a linear, S_n and the other factors of `space` where there are any:

    q, k, gate, up   A' = A diag(g / s_n) R1     k: B' = diag(s_qk) B, q: B' = diag(1 / s_qk) B, unless the norms of
                                                 queries and keys took S_qk
    v                A' = A diag(g / s_n) R1     B' = R2ᵀ diag(s_ov) B, by KV head
    o                A' = A diag(1 / s_ov) R2    B' = R1ᵀ B, by query head
    up, down         B' = diag(s_ud) B (up)      A' = A diag(1 / s_ud), B' = R1ᵀ B (down)
    gate, up, down   rows p of B, rows p of B, columns p of A, p the `order` of the intermediate channels

Online transforms, R4 among them, and low-rank branches sit inside the linear: A reads the x before them. None of this
is written here: `fold` does it, on the factors and the norms that the basis sidecar keeps.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from rotquant.basis.peft_adapter import BASIS, CONFIG, WEIGHTS, LoRAAdapter, with_own_names
from rotquant.basis.sidecar import Basis
from rotquant.checkpoint.hub import fetch
from rotquant.checkpoint.source import save_tensors, save_text
from rotquant.errors import RotQuantError
from rotquant.models import read_config

HOW = "rotquant adapter ADAPTER --base OUT -o TURNED"


def turn(adapter: LoRAAdapter, basis: Basis) -> LoRAAdapter:
    """The adapter in the basis of a checkpoint, factors in float32; itself where it was turned for this one.

    Raises:
        RotQuantError: it was turned for another checkpoint.
    """
    if adapter.basis == basis.sha256:
        return adapter
    if adapter.basis is not None:
        raise RotQuantError(
            f"{adapter.where / CONFIG}: {BASIS}: this adapter was turned for another checkpoint; take the original"
            f" model's adapter, as it is or turned for this one: {HOW}"
        )
    fold = basis.fold
    factors: dict[str, Tensor] = {}
    names: dict[str, str] = {}  # of linears, those that the adapter's config calls them
    for index in range(basis.arch.layers):
        prefix, kind = basis.arch.layer_prefix(index), basis.arch.kinds[index]
        own = kind.split(adapter.layer(prefix))
        if own:
            folded = fold.layer(basis.norms[index] | own, index)
            turned = kind.join({name: folded[name].float() for name in own})
            factors |= {prefix + name: factor for name, factor in turned.items()}
            linears = {name.rpartition(".")[0] for name in turned}
            names |= {prefix + name: prefix + kind.copies.get(name, name) for name in linears}
    config = with_own_names(adapter.config, {name: names[name] for name in sorted(names)})
    return replace(adapter, config=config | {BASIS: basis.sha256}, factors=factors)


def turn_folder(adapter: str | Path, base: str | Path, output: str | Path) -> Path:
    """Turns the adapter in a folder for a checkpoint, and writes it to a new folder.

    Args:
        adapter: a PEFT LoRA adapter of the original model: local folder or hub id.
        base: the checkpoint that `rotquant quantize` made from that model: local folder or hub id.
        output: folder to make.
    Returns:
        the output folder.
    Raises:
        RotQuantError: bad input, or an adapter that cannot be turned exactly.
    """
    output = Path(output)
    if output.exists():
        raise RotQuantError(f"{output}: output folder exists; choose another -o or remove it")
    checkpoint = fetch(str(base))
    basis = Basis.read(checkpoint, read_config(checkpoint))
    found = LoRAAdapter.read(fetch(str(adapter)), basis.arch)
    if found.basis == basis.sha256:
        raise RotQuantError(f"{found.where / CONFIG}: {BASIS}: this adapter is already turned for {base}")
    turned = turn(found, basis)
    work = output.with_name(output.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        save_tensors(work / WEIGHTS, turned.tensors())
        config = turned.config | {"base_model_name_or_path": str(base)}
        save_text(work / CONFIG, json.dumps(config, indent=2) + "\n")
        work.rename(output)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return output
