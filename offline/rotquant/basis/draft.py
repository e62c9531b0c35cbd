"""EAGLE3 drafts of the original model, turned so that they draft for a checkpoint made from it.

Such a draft reads what the residual stream of its target is before some layers: `fc` makes one row of three of them. A
checkpoint's residual stream is turned, h' = h R1, and nothing else on that way is, so that with g the gain of the norm
in front of `fc`, where there is one,

    fc' = fc diag(g) blockdiag(R1, R1, ...),  g' = 1          (h R1 / rms) (fc diag(g) R1)ᵀ = (h / rms) diag(g) fcᵀ

makes the same row of h' as `fc` made of h, exactly. The rest of a draft stays in its own basis. It must not share the
target's tables, though, which are turned as well: where it has no `embed_tokens` or `lm_head` of its own, it gets those
of the original, taken back out of the checkpoint (E = E' R1ᵀ, W = W' R1ᵀ diag(1/g_f)).

EAGLE-1, Medusa and MTP drafts read rows behind the final norm and multiply their own by the target's lm_head, which
holds the norm's gain: no weights make that equal, and they are refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotquant.basis.sidecar import Basis
from rotquant.checkpoint.hub import fetch
from rotquant.checkpoint.source import DTYPES, Source, save_tensors, save_text
from rotquant.errors import RotQuantError
from rotquant.models import read_config
from rotquant_kernels import convention

KEY = "rotquant_basis"  # in the config.json of a draft that was turned: sha256 of the basis it was turned for
FC, FC_NORMS, INPUT_NORM, MASK = "fc.weight", "fc_norm.", "input_norm.weight", "mask_hidden"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


def turn_draft(draft_model: str, base_model: str, output: Path) -> Path:
    """Writes an EAGLE3 draft, made for an original model, turned for its checkpoint.

    Args:
        draft_model, base_model: local folders or hub ids of the draft and of the checkpoint.
        output: folder to write, for vLLM as `model` in --speculative-config.
    Returns:
        `output`.
    Raises:
        RotQuantError: the folders are not what they should be, or the draft is one that does not turn.
    """
    if output.exists():
        raise RotQuantError(f"{output} exists; choose another -o, or remove it")
    draft, base = fetch(draft_model), fetch(base_model)
    basis = Basis.read(base, read_config(base))
    if basis.matrix is None:
        raise RotQuantError(f"{base}: its residual stream is not rotated: serve {draft} as it is")
    config, source = read_draft(draft, basis)
    tensors = {name: source.get(name) for name in source.files}
    turned = turn_tensors(tensors, basis.matrix, draft) | own_tables(tensors, basis, base)
    for place in (config, config.get("transformer_layer_config")):  # the latter is what vLLM reads of some drafts
        if isinstance(place, dict):
            place[KEY] = basis.sha256
    output.mkdir(parents=True)
    for file in sorted(draft.iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHTS) and file.name != "config.json":
            shutil.copyfile(file, output / file.name)
    save_tensors(output / "model.safetensors", turned)
    save_text(output / "config.json", json.dumps(config, indent=2) + "\n")
    return output


def read_draft(draft: Path, basis: Basis) -> tuple[dict[str, Any], Source]:
    """config.json and tensors of a draft, once it is clear that it is one that turns.

    Raises:
        RotQuantError: it is not.
    """
    file = draft / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RotQuantError(f"{file}: {' '.join(str(error).split())}; DRAFT must be the folder of a draft") from error
    if not isinstance(config, dict):
        raise RotQuantError(f"{file}: not a JSON object; DRAFT must be the folder of a draft")
    if KEY in config:
        raise RotQuantError(f"{file}: {KEY}: this draft is turned already; turn the one that it was made of")
    if config.get("quantization_config"):
        raise RotQuantError(f"{file}: quantization_config: a quantized draft cannot be turned; start from the original")
    source = Source(draft)
    names = set(source.files)
    if FC not in names or not any(n.endswith("hidden_norm.weight") and "layer" in n for n in names):
        raise RotQuantError(
            f"{draft}: not an EAGLE3 draft (no {FC}, or no layer with a hidden_norm): EAGLE-1, Medusa, MTP and other"
            " drafts that read hidden states do not turn exactly. Use an EAGLE3 draft, a draft model, or ngram"
        )
    eagle = config.get("eagle_config") or {}
    if not isinstance(eagle, dict):
        raise RotQuantError(f"{file}: eagle_config is no JSON object; DRAFT must be the folder of a draft")
    if eagle.get("use_aux_hidden_state", True) is not True:
        raise RotQuantError(
            f"{file}: eagle_config.use_aux_hidden_state is false: such a draft reads rows behind the final norm, which"
            " do not turn exactly"
        )
    hidden, width = basis.arch.hidden_size, source.shapes[FC][1]
    if source.dtypes[FC] not in DTYPES:
        raise RotQuantError(
            f"{source.files[FC]}: {FC} has dtype {source.dtypes[FC]}, supported are {', '.join(DTYPES)}"
        )
    if width % hidden:
        raise RotQuantError(
            f"{source.files[FC]}: {FC} reads {width} numbers, which are not rows of the checkpoint's hidden size"
            f" {hidden}: this draft is of another model"
        )
    sizes = config.get("transformer_layer_config")  # of drafts made by `speculators`
    vocabulary = (sizes if isinstance(sizes, dict) else config).get("vocab_size")
    if vocabulary != basis.arch.vocab_size:
        raise RotQuantError(
            f"{file}: vocab_size is {vocabulary}, the checkpoint's is {basis.arch.vocab_size}: this draft is of another"
            " model"
        )
    return config, source


def turn_tensors(tensors: dict[str, Tensor], r1: Tensor, draft: Path) -> dict[str, Tensor]:
    """The draft's tensors on rows h R1 instead of h.

    Args:
        tensors: `fc.weight` [n, blocks * hidden] among them, and the norm in front of it, where there is one.
        r1: [hidden, hidden].
    Raises:
        RotQuantError: a norm in front of `fc` whose gain has another size.
    """
    fc, r1 = tensors[FC].double(), r1.double()
    out = dict(tensors)
    norms = [INPUT_NORM] if INPUT_NORM in tensors else sorted(n for n in tensors if n.startswith(FC_NORMS))
    if norms:
        gain = torch.cat([tensors[name].double().flatten() for name in norms])
        if gain.shape[0] != fc.shape[1]:
            raise RotQuantError(f"{draft}: {norms[0]}: {gain.shape[0]} gains in front of {fc.shape[1]} inputs of {FC}")
        fc = fc * gain
        out |= {name: torch.ones_like(tensors[name]) for name in norms}
    out[FC] = blocks_times(fc, r1).to(tensors[FC].dtype)
    out |= {
        name: blocks_times(t.double().view(1, -1), r1).view_as(t).to(t.dtype)
        for name, t in tensors.items()
        if MASK in name  # a row in the place of the target's
    }
    return out


def blocks_times(rows: Tensor, r1: Tensor) -> Tensor:
    """rows blockdiag(R1, R1, ...) for rows [n, blocks * hidden]."""
    return (rows.unflatten(1, (-1, len(r1))) @ r1).flatten(1)


def own_tables(tensors: dict[str, Tensor], basis: Basis, base: Path) -> dict[str, Tensor]:
    """The original's tables that the draft lacks, in its dtype, out of the checkpoint."""
    assert basis.matrix is not None
    dtype, inverse = tensors[FC].dtype, basis.matrix.double().T
    source, out = Source(base), {}
    if not any("embed_tokens" in name for name in tensors):
        out["embed_tokens.weight"] = (source.get(basis.arch.names.embedding).double() @ inverse).to(dtype)
    if not any("lm_head" in name for name in tensors):
        gain = basis.gain.double()
        unscaled = torch.where(gain == 0, 0, 1 / gain)  # what a gain of 0 hid from lm_head cannot be had back
        weight = head(source, basis.arch.names.head) @ inverse * unscaled
        if "d2t" in tensors:  # a smaller vocabulary: how far each of its tokens is from the original's
            weight = weight[torch.arange(len(tensors["d2t"])) + tensors["d2t"]]
        out["lm_head.weight"] = weight.to(dtype)
    if out and tensors[FC].shape[0] != basis.arch.hidden_size:
        raise RotQuantError(
            f"the draft has no {' and no '.join(out)}, and its hidden size {tensors[FC].shape[0]} is not the"
            f" checkpoint's {basis.arch.hidden_size}: the original's would not fit"
        )
    return out


def head(source: Source, name: str) -> Tensor:
    """lm_head of a checkpoint, whose weight has this name where it is not packed; float64 [vocab, hidden]."""
    if name in source.files:
        return source.get(name).double()
    packed, scale = source.get(f"{name}_packed"), source.get(f"{name}_scale").double()
    return convention.unpack_int32(packed, 8, int(source.get(f"{name}_shape")[1])).double() * scale
