"""One of the two models of an inspection: what it is, how its sites and weights are quantized, what is measured."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from rotquant.checkpoint.format import CheckpointFormat, claims
from rotquant.checkpoint.hub import fetch
from rotquant.checkpoint.source import Source
from rotquant.common import metrics
from rotquant.common.progress import Progress
from rotquant.errors import RotQuantError
from rotquant.measure.evaluate import load_any
from rotquant.measure.inspection.collect import Formats, Statistics, collect, watched_modules
from rotquant.measure.inspection.routing import Choices
from rotquant.measure.inspection.statistics import SiteFormat
from rotquant.models import Architecture, describe, read_config
from rotquant.recipe import Activations, KVCache
from rotquant.weights import rtn
from rotquant_kernels.formats import KVFormat, WeightFormat

WEIGHT_ROWS = 512  # of each matrix: the clip search on all of a large model would take longer than the model's run
SAME = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class Subject:
    """A model folder; `checkpoint` is None for a full-precision model."""

    name: str
    folder: Path
    config: PreTrainedConfig
    arch: Architecture
    checkpoint: CheckpointFormat | None

    @cached_property
    def quantized(self) -> dict[str, str]:
        """Of the routers that stand for the experts' inputs: name of an expert's linear, by the router's module."""
        return {
            f"{self.arch.layer_prefix(index)}{block.module}.gate": self.arch.layer_prefix(index) + block.routed[0].gate
            for index, block in self.arch.mixtures.items()
        }

    def modules(self) -> Iterator[tuple[int, str, str]]:
        """Layer, site and full name of the module of every site."""
        for layer, kind in enumerate(self.arch.kinds):
            for site, path in watched_modules(kind).items():
                yield layer, site, self.arch.layer_prefix(layer) + path


def read_subject(name: str) -> Subject:
    """Reads config.json of a local folder or hub id.

    Raises:
        RotQuantError: no such model, an architecture that is not supported, or another tool's quantization.
    """
    folder = fetch(name)
    config = read_config(folder)
    where = f"{folder}/config.json"
    arch = describe(config, where)
    quantization = getattr(config, "quantization_config", None)
    if quantization and not claims(quantization):
        raise RotQuantError(
            f"{where}: quantization_config: inspect reads full-precision models and rotquant checkpoints; this one is"
            " quantized by something else"
        )
    checkpoint = CheckpointFormat.of(config) if quantization else None
    return Subject(name, folder, config, arch, checkpoint)


def check_pair(one: Subject, other: Subject) -> None:
    """Refuses two models that cannot be compared layer by layer.

    Raises:
        RotQuantError: naming the field that differs.
    """
    for field in SAME:
        found, wanted = getattr(other.config, field), getattr(one.config, field)
        if found != wanted:
            raise RotQuantError(
                f"--against {other.name}: {field} is {found}, but {wanted} in {one.name}: not one model"
            )


def row_formats(subject: Subject, like: Subject | None = None) -> Formats:
    """Format of every (layer, site).

    A site that is not quantized is measured as if it were: in the format that it has in `like`, else 4 bits as
    recipes have them by default.
    """
    formats: Formats = {}
    for layer, site, name in subject.modules():
        own = _site_format(subject, site, name)
        other = _site_format(like, site, name) if like and own is None else None
        formats[layer, site] = own or _unrotated(other) or _default(site)
    return formats


def _site_format(subject: Subject, site: str, name: str) -> SiteFormat | None:
    if subject.checkpoint is None or site == "h":
        return None
    if site in ("k", "v"):
        kv = subject.checkpoint.attention(name)
        if kv is None:
            return None
        return _cached(kv, site)
    linear = subject.checkpoint.linear(subject.quantized.get(name, name))
    return SiteFormat(linear.rows) if linear else None


def _cached(kv: KVFormat, site: str) -> SiteFormat:
    return SiteFormat(kv.key, True, kv.rotate) if site == "k" else SiteFormat(kv.value, True)


def _unrotated(found: SiteFormat | None) -> SiteFormat | None:
    """Another model's quantizer, without its rotation."""
    return replace(found, rotate=0) if found else None


def _default(site: str) -> SiteFormat:
    kv = KVCache().form()
    assert kv is not None
    return SiteFormat() if site == "h" else _cached(kv, site) if site in ("k", "v") else SiteFormat(Activations().rows)


def measure(subject: Subject, formats: Formats, tokens: Tensor) -> tuple[Statistics, Choices]:
    """`collect` over token windows int64 [n, T]; the model is gone from memory afterwards."""
    model = load_any(subject.folder)
    with Progress(f"{subject.folder.name}: window", len(tokens), short=True) as progress:
        found = collect(model, subject.arch, formats, tokens, progress.step)
    del model
    gc.collect()
    return found


def weight_snr(subject: Subject, like: Subject | None = None) -> dict[tuple[int, str], float | None]:
    """SNR in dB of each linear's weights by `metrics.rounding_error`, every row counting the same.

    The noise of rounding alone, as a checkpoint knows its steps but not the weights before rounding: saturation, and
    errors that GPTQ trades between columns, are not in it. A checkpoint's stored grid; for full-precision weights the
    grid that round-to-nearest with clip search would take, in the format of `like`, else int4 per channel. At most
    WEIGHT_ROWS rows of a matrix, evenly spread, are looked at. None where the linear stays in 16 bits.
    """
    source = Source(subject.folder)
    found: dict[tuple[int, str], float | None] = {}
    arch = subject.arch
    with Progress(f"{subject.folder.name}: weights of layer", arch.layers, short=True) as progress:
        for layer, kind in enumerate(arch.kinds):
            for linear in kind.stored:
                found[layer, linear] = _linear_snr(source, arch.layer_prefix(layer) + linear, subject, like)
            progress.step()
    return found


def _linear_snr(source: Source, name: str, subject: Subject, like: Subject | None) -> float | None:
    own = subject.checkpoint.linear(name) if subject.checkpoint else None
    if own is not None:
        columns = int(source.get(f"{name}.weight_shape")[1])
        packed, scale = (_some_rows(source.get(f"{name}.{leaf}")) for leaf in ("weight_packed", "weight_scale"))
        scale = scale.float().view(len(scale), -1)
        weight = own.weights.dequantize(own.weights.unpack(packed, columns), scale)
    else:
        wanted = like.checkpoint.linear(name) if like and like.checkpoint else None
        if subject.checkpoint or (like and like.checkpoint and wanted is None):
            return None
        if f"{name}.weight" not in source.files:  # experts that a file holds in one tensor
            return None
        stored = _some_rows(source.get(f"{name}.weight"))
        weight = stored.float()
        form = wanted.weights if wanted else WeightFormat()
        scale = rtn.weight_scale(weight, form, stored.dtype, clip_search=True)
    steps = scale.square().mean(-1).sqrt()  # of each row; one step a group
    error = metrics.rounding_error(weight, steps)[weight.any(1)].mean().item()
    return round(metrics.snr_db(error), 2) if math.isfinite(error) else None


def _some_rows(matrix: Tensor) -> Tensor:
    return matrix[:: -(-len(matrix) // WEIGHT_ROWS)]


def token_texts(folder: Path, ids: set[int]) -> dict[int, str]:
    """How the tokenizer writes some tokens."""
    from rotquant.text import read_tokenizer

    tokenizer: Any = read_tokenizer(folder)
    return {token: str(tokenizer.convert_ids_to_tokens(token)) for token in ids}
