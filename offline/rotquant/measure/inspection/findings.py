"""An inspection in three sentences: what became of activations, of the KV cache, and where the worst is now."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, median
from typing import Any

Site = dict[str, Any]
LINEAR = {
    "attn_in": "input of q, k and v", "o_in": "input of o", "mlp_in": "input of gate and up",
    "down_in": "input of down",
}  # fmt: skip
CACHE = {"k": "K cache", "v": "V cache"}
NAMES = LINEAR | CACHE
CLEAR = 0.5  # dB
UNEVEN = 5.0  # peak over RMS


def findings(facts: dict[str, Any]) -> list[str]:
    """The three sentences.

    Args:
        facts: the JSON object of an inspection.
    """
    both = facts["against"] is not None
    return [_activations(facts["sites"], both), _cache(facts["sites"], both), _worst(facts["sites"])]


def _activations(sites: list[Site], both: bool) -> str:
    peak = [_mean(sites, LINEAR, when, "peak_to_rms") for when in ("before", "after")]
    snr = [_mean(sites, LINEAR, when, "snr") for when in ("before", "after")]
    if not both:
        said = f"Activations: the largest number of a token is {_number(peak[1])} times its RMS, on average"
        return f"{said}; {_hardness(peak[1])}."
    was, now = map(_number, peak)
    text = f"Activations: the largest number of a token was {was} times its RMS, and is now {now}"
    return f"{text}{_noise(*snr)}."


def _cache(sites: list[Site], both: bool) -> str:
    found = {site: [_mean(sites, [site], when, "snr") for when in ("before", "after")] for site in CACHE}
    parts = []
    for site, (before, after) in found.items():
        if after is None:
            continue
        change = f"{before:.1f} → {after:.1f} dB" if both and before is not None else f"{after:.1f} dB"
        parts.append(f"{site.upper()} {change}")
    if not parts:
        return "KV cache: not quantized."
    return f"KV cache, signal to noise: {', '.join(parts)}."


def _worst(sites: list[Site]) -> str:
    known = [s for s in sites if s["site"] in NAMES and s["after"] and s["after"]["snr"] is not None]
    worst = min(known, key=lambda s: s["after"]["snr"])
    usual = median(s["after"]["snr"] for s in known)
    text = f"Weakest place: {NAMES[worst['site']]} of layer {worst['layer']}, {worst['after']['snr']:.1f} dB"
    return f"{text}; the median place has {usual:.1f} dB."


def _noise(before: float | None, after: float | None) -> str:
    """How the energy of rounding noise changed, as a factor, from signal to noise in dB."""
    if before is None or after is None:
        return ""
    if abs(after - before) < CLEAR:
        return f"; rounding noise is about the same ({before:.1f} → {after:.1f} dB)"
    way, factor = "fell" if after > before else "rose", 10 ** (abs(after - before) / 10)
    return f"; rounding noise {way} by a factor of {factor:.1f} ({before:.1f} → {after:.1f} dB)"


def _hardness(peak: float | None) -> str:
    uneven = peak is not None and peak > UNEVEN
    return "hard to round to 4 bits: Gaussian rows have 3" if uneven else "about as even as Gaussian rows, which have 3"


def _mean(sites: list[Site], names: Iterable[str], when: str, figure: str) -> float | None:
    wanted = set(names)
    known = [s[when][figure] for s in sites if s["site"] in wanted and s[when] and s[when][figure] is not None]
    return fmean(known) if known else None


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"
