"""The tables that `write_docs.py` puts into README.md and docs/: one function for each block, by its name."""

from __future__ import annotations

from collections.abc import Callable

from docs_results import (
    ABSENT,
    BEST,
    BEST8,
    BF16,
    HEAD8,
    ONLINE,
    W4A4,
    W8A8,
    Compared,
    Served,
    four_digits,
    milliseconds,
    minutes,
    nats,
    percent,
    perplexity,
    read,
    table,
)

REAL = "compare-smollm2"

# label in compare-smollm2.json, the served format whose speed it has, when to take it
GLANCE = (
    ("full precision, bf16", "full precision", BF16, "you have the memory and the time"),
    ("`rtn`: to nearest, no rotation", "rtn", W4A4, "never: it shows what rotations repair"),
    ("`quarot`", "quarot", W4A4, "you want a result in minutes"),
    ("`best`, the default", "best", BEST, "4-bit activations: a little slower than `quarot`, closer to the original"),
    ("`best-online`", "best-online", ONLINE, "quality counts more than speed: thin 16-bit matrices join linears"),
    ("`best --scheme w4a8kv4`", "w4a8kv4", BEST8, "there are no int4 tensor cores: CPUs, H100 and later GPUs"),
)  # fmt: skip


def glance() -> str:
    """README's six rows: quality, cost and speed of the real model, when to take what."""
    real, served = Compared.of(REAL), Served.of()
    rows = []
    for name, label, form, when in GLANCE:
        quality = ["1", "0", ""]
        if label in real.groups:
            ratio = (real.median(label, "perplexity") or 0) / real.full
            shown = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2f}"
            quality = [shown, real.cell(label, "kl", nats), real.cell(label, "quantize_seconds", minutes)]
        elif label != "full precision":
            quality = [ABSENT] * 3
        rows.append([name, *quality, *_speed(served, form), when])
    cost = ["minutes to quantize, one core", "ms a token, one request", "tokens/s, 16 requests"]
    heads = ["", "perplexity, original = 1", "KL, nats", *cost, "tokens in 1 GiB of KV cache", "take it when"]
    return table(heads, rows)


def _speed(served: Served, form: str) -> list[str]:
    if form not in served.formats:
        return [ABSENT, ABSENT, f"{served.server(W4A4, 'kv_tokens'):,.0f}"]
    return [
        milliseconds(served.run("1024/32", form, "median_tpot_ms")).removesuffix(" ms"),
        f"{served.run('128/64 all', form, 'output_throughput'):.0f}",
        f"{served.server(form, 'kv_tokens'):,.0f}",
    ]


def headline() -> str:
    """The sentences under README's figure. vLLM's W8A8 has the better lm_head of its two, each time."""
    served = Served.of()

    def token(form: str) -> float:
        return served.run("1024/32", form, "median_tpot_ms")

    def together(form: str) -> float:
        return served.run("128/64 all", form, "output_throughput")

    eight = [form for form in (W8A8, HEAD8) if form in served.formats]
    alone = [milliseconds(value) for value in (token(BEST), min(map(token, eight)), token(BF16))]
    many = [together(BEST), max(map(together, eight)), together(BF16)]
    pages = served.server(BEST, "kv_tokens") / served.server(BF16, "kv_tokens")
    return (
        f"A token takes {alone[0]} in W4A4KV4, {alone[1]} in vLLM's W8A8 and {alone[2]} in bf16."
        f" Sixteen requests at once get\n{many[0]:.0f}, {many[1]:.0f} and {many[2]:.0f} tokens a second."
        f" The same memory caches {pages:.1f} times as many tokens as in bf16."
    )


def real_model() -> str:
    """All that is known of SmolLM2."""
    real = Compared.of(REAL)
    names = {
        "auto": "`best --scheme auto`, 8-bit activations at a quarter of the sites",
        "w4a8kv4": "`best --scheme w4a8kv4`",
        "quarot-w4a8kv4": "`quarot --scheme w4a8kv4`",
        "quarot-shifts-pca": "`quarot` with shifts and a branch of the inputs",
        "quarot-shifts-pca-fed": "`quarot` with shifts, a branch of the inputs, and error feedback of keys",
        "auto-online": "`best-online --scheme auto`, 8-bit activations at a quarter of the sites",
        "auto-w8": "`best --scheme auto --set weights.wide_bits=8`, at a quarter of the sites",
        "auto-w8-online": "`best-online --scheme auto --set weights.wide_bits=8`, at a quarter of the sites",
        "w4a8kv4-online": "`best-online --scheme w4a8kv4`",
        "gsr64": "`gsr` in groups of 64",
        "uncalibrated": "to nearest, block Hadamards in front of every linear, 16-bit KV cache; no calibration",
    }
    rows = [["full precision", perplexity(real.full), "", "", ""]]
    for label in sorted(real.groups, key=lambda label: -(real.median(label, "kl") or 0)):
        cells = [real.cell(label, k, w) for k, w in (("perplexity", perplexity), ("kl", nats), ("agreement", percent))]
        rows.append([names.get(label, f"`{label}`"), *cells, real.cell(label, "quantize_seconds", minutes)])
    return table(["SmolLM2-135M-Instruct", "perplexity", "KL, nats", "top-1", "minutes, one core"], rows)


# Labels of compare-llama.json and compare-qwen3.json, in the order of the table.
TOYS = (
    "quarot", "gsr", "smoothrot", "rrs", "dfrot", "kurtail", "dartquant", "spinquant (2 windows)",
    "ostquant (2 windows)", "best (fixed)", "best", "baseq", "flatquant", "frtq", "svd", "ruquant", "ruquant-ft",
    "best-online (fixed)", "best-online", "rtn",
)  # fmt: skip
PARTS = {
    "best (fixed)": "`best` (fixed)", "no R4": "no R4", "RTN": "weights to nearest instead of GPTQ",
    "random R1": "R1 a random Hadamard",
    "no attention weight": "GPTQ without attention weights", "gradients only": "R1 by gradients only",
    "Procrustes only": "R1 by Procrustes only", "no R2": "no R2", "symmetric activations": "symmetric activations",
    "symmetric KV": "symmetric KV", "KV clips 1": "KV clips 1", "activation clip 1": "activation clip 1",
}  # fmt: skip


def toys() -> str:
    """Every recipe on the two hardened models."""
    models = [Compared.of(f"compare-{name}") for name in ("llama", "qwen3")]
    rows = [["full precision", perplexity(models[0].full), "", "", perplexity(models[1].full), "", "", ""]]
    for label in TOYS:
        name, _, remark = label.partition(" ")
        cells = [f"`{name}`" + (f" {remark}" if remark else "")]
        for model in models:
            cells += [model.cell(label, "perplexity", perplexity, spread=True), model.cell(label, "kl", nats)]
            cells.append(model.cell(label, "agreement", percent))
        rows.append([*cells, models[0].cell(label, "online_share", percent)])
    each = ["perplexity", "KL, nats", "top-1"]
    heads = ["recipe", f"Llama: {each[0]}", *each[1:], f"Qwen3: {each[0]}", *each[1:], "online work"]
    return table(heads, rows)


def parts() -> str:
    """Each part of the fixed recipe taken out alone."""
    models = [Compared.of(f"compare-{name}") for name in ("llama", "qwen3")]
    rows = []
    for label, name in PARTS.items():
        cells = [name]
        for model in models:
            cells += [model.cell(label, "perplexity", perplexity, spread=True), model.cell(label, "kl", four_digits)]
        rows.append(cells)
    return table(["", "Llama: perplexity", "KL", "Qwen3: perplexity", "KL"], rows)


def claims() -> str:
    found = read("claims")["rows"]
    rows = []
    for row in found:
        change = [f"{low:g} → {high:g}" for low, high in (row["llama"], row["qwen3"])]
        others = [f"{value:g}" for value in row.get("quarot", [])]
        rows.append([row["claim"], row["where"], row["figure"], row["from"], *change, ", ".join(others)])
    return table(["claim", "where", "figure", "before", "Llama", "Qwen3", "`quarot` has"], rows)


def dominates() -> str:
    """What each quantizer alone costs SmolLM2."""
    rows = [[row["what"], f"{row['kl']:.4f}"] for row in read("error-smollm2")["alone"]]
    return table(["quantized", "KL, nats"], rows)


def noise() -> str:
    """Signal to noise of each site of SmolLM2, and what its rows have in common, as `rotquant inspect` has them."""
    found = read("error-smollm2")
    common = {row["site"]: f"{row['share']:.0%} ({row['least']:.0%} to {row['most']:.0%})" for row in found["common"]}
    rows = [[r["site"], f"{r['snr']:.1f} dB", f"{r['worst']:.1f} dB", common[r["site"]]] for r in found["snr"]]
    return table(["site", "signal to noise, mean over layers", "worst layer", "common to all tokens"], rows)


def shifts() -> str:
    """Noise of the inputs behind norms, with a shift and without, with a Hadamard and a learned R1."""
    found = read("error-smollm2")["shifts"]
    rows = [[row["what"], four_digits(row["symmetric"]), four_digits(row["asymmetric"])] for row in found]
    return table(["in front of rounding", "symmetric", "asymmetric"], rows)


def directions() -> str:
    """Noise of the inputs without their mean, and without their leading directions."""
    rows = [[row["site"], *map(four_digits, row["noise"])] for row in read("error-smollm2")["directions"]]
    return table(["", "as they are", "less the mean", *(f"less {r} directions" for r in (8, 16, 32, 64))], rows)


def released() -> str:
    ours = Compared.of("compare-llama")
    rows = []
    for row in read("released-code")["rows"]:
        theirs = " and ".join(map(perplexity, row["perplexity"]))
        mine = [ours.cell(row["ours"], "perplexity", perplexity), ours.cell(row["ours"], "kl", nats)]
        rows.append([row["method"], theirs, nats(row["kl"]), str(row["seeds"]), f"`{row['ours'].split()[0]}`", *mine])
    return table(["released code", "perplexity", "KL", "seeds", "recipe here", "perplexity", "KL"], rows)


def engines() -> str:
    found = read("engines")["percent"]
    rows = [[f"`{name}`", *(f"{v:+.2f}%" for v in both), *([""] * (2 - len(both)))] for name, both in found.items()]
    return table(["recipe", "one model", "the other"], rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "glance": glance, "headline": headline, "real model": real_model, "toys": toys, "parts": parts, "claims": claims,
    "released code": released, "engines": engines, "dominates": dominates, "noise": noise, "shifts": shifts,
    "directions": directions,
}  # fmt: skip
