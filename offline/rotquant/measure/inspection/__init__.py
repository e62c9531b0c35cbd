"""`rotquant inspect`: how hard a model is to quantize, by layer and site, before and after.

    inspection = inspect("OUT", against="MODEL")
    print(inspection)                  the table
    inspection.as_dict()               JSON
    inspection.html()                  a report that needs nothing else

The JSON object:

    model, against       names as given; against is null where there is one model, and then so is every "before"
    text, tokens, windows, seq_len     what was run
    sites                one object for each layer and site, in order of computation:
        layer, site      site: h, attn_in, k, v, o_in, mlp_in, down_in (see `collect`)
        width, heads     numbers in a row; rows of a token
        format           {"bits", "symmetric", "clip", "rotate"} of the model's quantizer; bits 16 where there is none
        before, after    the figures of `against` and of `model`:
            peak_to_rms, gsr, kurtosis      means over rows
            difficulty                      of rows scaled to RMS 1
            common                          share of the energy that the mean over tokens holds, rows scaled to RMS 1
            qsur                            of rows scaled to RMS 1; null for rows wider than 1024 or too few tokens
            snr                             dB, every row counting the same; null where nothing is quantized
            heads                           K and V: SNR of each KV head
            massive     {"count", "positions": [[position in its window, how often], ...], "largest", "median",
                        "position", "token", "channel"}; the last three and `largest` tell of the largest peak
    linears              {"layer", "name", "before", "after"}: SNR of the weights in dB (`metrics.rounding_error`); null
                         where the linear stays in 16 bits
    routing              of each layer with experts {"layer", "tokens", "agreement"}: tokens that go to each expert of
                         `model`, and the share of the choices of `against` that it makes too, null without
    token_texts          how the tokenizer writes the tokens named above
    findings             the three sentences that the table and the report begin with

Memory: the model, and for each site sums over rows, channels, pairs of channels (up to 1024) and 64 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotquant.data import DATA
from rotquant.measure.evaluate import text_windows, window_length
from rotquant.measure.inspection.collect import Formats
from rotquant.measure.inspection.findings import findings
from rotquant.measure.inspection.routing import Choices, routing_facts
from rotquant.measure.inspection.subject import (
    Subject,
    check_pair,
    measure,
    read_subject,
    row_formats,
    token_texts,
    weight_snr,
)

TEXT = DATA / "heldout.txt"
TOKENS, SEQ_LEN = 4096, 512
WHEN = ("before", "after")

__all__ = ["Inspection", "inspect"]


@dataclass(frozen=True)
class Inspection:
    """The result.

    facts: the JSON object; landscapes: |x| over RMS, float [tokens, channels], of each (before or after, layer, site).
    """

    facts: dict[str, Any]
    landscapes: dict[tuple[str, int, str], Tensor] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        return self.facts

    def __str__(self) -> str:
        from rotquant.measure.inspection.table import render

        return render(self.facts)

    def html(self) -> str:
        """The report: one page, no file and no network needed beside it."""
        from rotquant.measure.inspection.html import page

        return page(self.facts, self.landscapes)


def inspect(
    model: str,
    *,
    against: str | None = None,
    text: Path | None = None,
    tokens: int = TOKENS,
    seq_len: int | None = None,
) -> Inspection:
    """Measures a model, and the one it came from.

    Args:
        model: a rotquant checkpoint, or any full-precision model of a supported kind; folder or hub id.
        against: the "before", usually the original model; None: `model` alone.
        text: UTF-8 file, None for bundled text that calibration does not use.
        tokens: about how many of its tokens; seq_len: tokens of a window, None: 512, or the model's limit.
    Raises:
        RotQuantError: no such model or text, not one model, text too short, window too long.
    """
    after = read_subject(model)
    before = read_subject(against) if against else None
    if before:
        check_pair(after, before)
    length = window_length(after.config, seq_len, SEQ_LEN, spare=0)
    batch = text_windows(text or TEXT, after.folder, length, tokens)
    shapes: dict[tuple[int, str], torch.Size] = {}
    figures: dict[str, dict[tuple[int, str], dict[str, Any]]] = {}
    landscapes: dict[tuple[str, int, str], Tensor] = {}
    weights: dict[str, dict[tuple[int, str], float | None]] = {}
    choices: dict[str, Choices] = {}
    for when, subject, other in (("before", before, after), ("after", after, before)):
        if subject is None:
            continue
        found, choices[when] = measure(subject, row_formats(subject, other), batch)
        shapes = {key: statistics.sums["first"].shape for key, statistics in found.items()}
        figures[when] = {key: statistics.summary(batch) for key, statistics in found.items()}
        landscapes |= {(when, *key): s.landscape for key, s in found.items() if s.landscape is not None}
        weights[when] = weight_snr(subject, other)
    facts: dict[str, Any] = {
        "model": model,
        "against": against,
        "text": (text or TEXT).name,
        "tokens": batch.numel(),
        "windows": len(batch),
        "seq_len": length,
        "sites": _sites(row_formats(after, before), shapes, figures),
        "linears": _linears(after, weights),
        "routing": routing_facts(after.arch, choices["after"], choices.get("before")),
    }
    named = {site[when]["massive"]["token"] for site in facts["sites"] for when in figures}
    facts["token_texts"] = {str(token): text for token, text in token_texts(after.folder, named).items()}
    facts["findings"] = findings(facts)
    return Inspection(facts, landscapes)


def _sites(
    formats: Formats,
    shapes: dict[tuple[int, str], torch.Size],
    figures: dict[str, dict[tuple[int, str], dict[str, Any]]],
) -> list[dict[str, Any]]:
    out = []
    for (layer, site), quantized in formats.items():
        heads, width = shapes[layer, site]
        both = {when: figures.get(when, {}).get((layer, site)) for when in WHEN}
        out.append({"layer": layer, "site": site, "width": width, "heads": heads, "format": quantized.facts(), **both})
    return out


def _linears(subject: Subject, weights: dict[str, dict[tuple[int, str], float | None]]) -> list[dict[str, Any]]:
    return [
        {"layer": layer, "name": name, **{when: weights.get(when, {}).get((layer, name)) for when in WHEN}}
        for layer, kind in enumerate(subject.arch.kinds)
        for name in kind.stored
    ]
