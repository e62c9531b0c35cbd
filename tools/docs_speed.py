"""The tables of speed, from what `serve.py`, `kernels.py` and `soak.py` measured: one function for each block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from docs_results import (
    BEST,
    BEST8,
    BF16,
    HEAD8,
    ONLINE,
    W4A4,
    W4A8,
    W8A8,
    Served,
    milliseconds,
    percent,
    rate,
    read,
    seconds,
    table,
)

FORMATS = {
    BF16: "bf16", "float32": "float32", "w4a16": "W4A16 (vLLM)", W8A8: "W8A8 (vLLM, oneDNN)",
    HEAD8: "W8A8 with int8 lm_head", W4A4: "**rotquant W4A4KV4**, `quarot`", W4A8: "**rotquant W4A8KV4**, `quarot`",
    BEST: "**rotquant W4A4KV4**, `best`", BEST8: "**rotquant W4A8KV4**, `best`",
    ONLINE: "**rotquant W4A4KV4**, `best-online`",
}  # fmt: skip


# start of a load's name, metric, how it is written, head of its column
LOADS = (
    ("1024/32", "median_ttft_ms", seconds, "1024-token prompt: first token"),
    ("1024/32", "median_tpot_ms", milliseconds, "one stream: ms a token"),
    ("128/64 all at once x16", "output_throughput", rate, "16 x 128/64 at once: tokens/s"),
    ("128/64 all at once x32", "output_throughput", rate, "32 x 128/64: tokens/s"),
    ("512/64 all", "output_throughput", rate, "16 x 512/64: tokens/s"),
    ("2048/32", "output_throughput", rate, "2 x 2048/32: tokens/s"),
    ("7680/64", "median_ttft_ms", seconds, "7680-token prompt: first token"),
    ("7680/64", "median_tpot_ms", milliseconds, "behind it: ms a token"),
    ("16384/64", "median_ttft_ms", seconds, "16,384-token prompt: first token"),
    ("16384/64", "median_tpot_ms", milliseconds, "behind it: ms a token"),
    ("128/64 1/s", "median_ttft_ms", seconds, "one 128/64 a second: first token"),
    ("128/64 1/s", "median_tpot_ms", milliseconds, "ms a token"),
)


def serving(name: str) -> str:
    """Every format under the loads that were run, on one machine."""
    served = Served.of(name)
    loads = [load for load in LOADS if served.load(load[0])]
    gib = int(served.data["settings"]["environment"]["VLLM_CPU_KVCACHE_SPACE"])
    rows = []
    for form, shown in FORMATS.items():
        if form not in served.formats:
            continue
        cells = [write(served.run(load, form, metric)) for load, metric, write, _ in loads]
        rows.append([shown, *cells, f"{served.server(form, 'kv_tokens') / gib:,.0f}"])
    return table(["format", *(head for *_, head in loads), "tokens in 1 GiB of KV cache"], rows)


PEERS = {
    "vllm-bf16": "vLLM bf16", "vllm-w8a8": "vLLM W8A8", "vllm-w4a8-sgl": "sgl W4A8 (in vLLM)",
    "ggml-q4_0": "llama.cpp Q4_0",
}  # fmt: skip
WITH_AMX = {peer: shown for peer, shown in PEERS.items() if peer != "ggml-q4_0"}
SLOW_BF16 = {"vllm-bf16": "vLLM bf16", "torch-float32": "torch float32", "vllm-w8a8": "vLLM W8A8"}


def kernels() -> str:
    """The linear layer at 4096 x 4096 on one thread and on two, and the peers in the same alternating run."""
    runs = [r for r in read("kernels-xeon-cascade-lake-2-threads")["runs"] if r["section"] == "linear"]
    found = {(r["threads"], r["rows"]): r["kernels"] for r in runs if r["case"] == {"k": 4096, "n": 4096}}
    rows = []
    for tokens in sorted({rows for _, rows in found}):
        one, two = found[1, tokens], found[2, tokens]
        ours = [at["rotquant-w4a4"]["wall_us"] for at in (one, two)]
        cells = [str(tokens), f"{ours[0] / 1000:.2f}, {ours[1] / 1000:.2f} ms"]
        cells += [
            ", ".join(f"{at[peer]['wall_us'] / own:.1f}x" for at, own in zip((one, two), ours, strict=True))
            for peer in PEERS
        ]
        rows.append(cells)
    return table(["tokens", "rotquant W4A4", *PEERS.values()], rows)


def attention() -> str:
    """Attention over the 4-bit cache against vLLM's bf16, same runs."""
    rows = []
    for run in read("kernels-xeon-cascade-lake-2-threads")["runs"]:
        if run["section"] == "attention":
            case, ours = run["case"], run["kernels"]["rotquant-kv4"]["wall_us"]
            theirs = run["kernels"]["vllm-bf16"]["wall_us"]
            what = [case["work"], str(case["batch"]), f"{case['context']:,}", str(run["threads"])]
            rows.append([*what, f"{ours / 1000:.2f} ms", f"{theirs / 1000:.2f} ms", f"{theirs / ours:.1f}x"])
    return table(["work", "sequences", "tokens", "threads", "rotquant KV4", "vLLM bf16", "times as fast"], rows)


def kernels_of(name: str, peers: dict[str, str]) -> str:
    """Linear layers and attention on one thread of one processor: its peers, and the share of reading."""
    found, rows = read(name), []
    most = max(limit[pages]["cpu"] for limit in found["limits"] for pages in ("read", "read_huge"))
    for run in found["runs"]:
        case, kernels = run["case"], run["kernels"]
        linear = run["section"] == "linear"
        ours = kernels["rotquant-w4a4" if linear else "rotquant-kv4"]
        what = f"{case['k']} x {case['n']}" if linear else case["work"]
        theirs = (kernels.get(peer, {}).get("cpu_us") for peer in peers)
        times = [f"{time / ours['cpu_us']:.2f}x" if time else "" for time in theirs]
        reads = run["rows"] <= 1 and ours["bytes"]
        share = percent(ours["bytes"] / ours["cpu_us"] * 1e6 / most) if reads else ""
        tokens = run["rows"] if linear else case["context"]
        rows.append([what, f"{tokens:,}", f"{ours['cpu_us'] / 1000:.2f} ms", *times, share])
    return table(["work", "tokens", "rotquant", *peers.values(), "of reading"], rows)


PARTS = {
    "linears": "linears, rounding and R4 in them", "lm_head": "`lm_head`",
    "attention": "the 4-bit cache, written and read",
    "compiled": "between them: norms, residuals, RoPE, calls", "vLLM": "outside the model: scheduler, inputs, sampler",
}  # fmt: skip


def decode_step() -> str:
    """What a token of one stream is made of."""
    found = read("decode-step-epyc-avx2")
    rows = [[shown, *(f"{run['parts'][part]:.1f}" for run in found.values())] for part, shown in PARTS.items()]
    rows.append(["a token", *(f"{run['ms']:.1f}" for run in found.values())])
    return table(["milliseconds", *found], rows)


def experts() -> str:
    """A layer of experts against vLLM's bf16, with the share of the machine's reading that a step reaches."""
    found, rows = read("kernels-experts-xeon-amx"), []
    for run in found["runs"]:
        threads = run["threads"]
        ours, theirs = (run["kernels"][name] for name in ("rotquant-w4a4", "vllm-bf16"))
        seconds = ours["cpu_us"] / threads * 1e-6
        limits = [limit for limit in found["limits"] if limit["threads"] == threads]
        most = max(limit[name]["cpu"] for limit in limits for name in ("read", "read_huge"))
        share = percent(ours["bytes"] / seconds / most) if run["rows"] < 100 else ""
        cells = [f"{run['rows']:,}", str(threads), f"{seconds * 1000:.2f} ms"]
        cells += [f"{theirs['cpu_us'] / threads / 1000:.2f} ms", f"{theirs['cpu_us'] / ours['cpu_us']:.1f}x", share]
        rows.append(cells)
    return table(["tokens", "threads", "rotquant W4A4", "vLLM bf16", "times as fast", "of reading"], rows)


def soak() -> str:
    found = read("soak")
    total = sum(found["requests"].values())
    rows = [
        ["requests", f"{total:,}"], ["of these aborted by the client", f"{found['requests']['abort']:,}"],
        ["failed", str(len(found["failures"]))], ["served tokens compared", f"{found['compared']:,}"],
        ["of these not the fake-quantized model's first choice", f"{found['not_first_choice']} (near ties)"],
        ["growth of memory", percent(found["growth"])],
    ]  # fmt: skip
    return table([f"{found['minutes']} minutes of mixed load", ""], rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "serving": partial(serving, "serve-xeon-cascade-lake"),
    "serving-smollm2": partial(serving, "serve-smollm2-xeon-amx"),
    "serving-amx": partial(serving, "serve-xeon-amx"),
    "kernels": kernels,
    "serving-avx2": partial(serving, "serve-smollm2-epyc-avx2"),
    "serving-16k": partial(serving, "serve-16k-epyc-avx2"),
    "kernels-amx": partial(kernels_of, "kernels-xeon-amx-1-thread", WITH_AMX),
    "kernels-avx2": partial(kernels_of, "kernels-epyc-avx2-1-thread", SLOW_BF16),
    "attention": attention,
    "experts": experts,
    "decode-step": decode_step,
    "soak": soak,
}
