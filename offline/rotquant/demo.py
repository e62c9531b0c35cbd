"""`rotquant demo`: the bundled model is made as hard as a large one, quantized, served, and talked to.

The bundled model is hardened (outlier channels written in without changing its function, see
`rotquant.harden`), so that plain rounding breaks it and rotations have something to mend. Everything
slow is kept in a folder of the user's cache, named after what decides its content.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path

from rotquant.errors import RotQuantError
from rotquant.progress import say
from rotquant.server import Answer, Server
from rotquant.signals import terminated_like_interrupted

DATA = Path(__file__).parent / "data"
SERVED = "best"
ROWS = {"hardened": "full precision"} | {recipe: f"W4A4KV4, {recipe}" for recipe in ("rtn", "quarot", SERVED)}
# Little calibration, to be quick: for this model 8 and 24 windows differ by half a percent in perplexity.
SAMPLES, SCORED_TOKENS, WINDOW = 16, 4096, 512
PROMPT = "def read_lines(path):\n    "
QUESTION = "What does os.path.join do?"
ANSWER_TOKENS = 48


def demo(*, once: bool = False, port: int = 0, keep: Path | None = None) -> int:
    """Runs the demo; returns when the user presses Ctrl-C, or after the answers if `once`.

    Args:
        port: of the server, 0 for a free one.
        keep: folder to work in, None for one in the user's cache.
    Raises:
        RotQuantError: vLLM missing, the server failing, or an empty answer.
    """
    folder = keep or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with terminated_like_interrupted():
        say(f"demo: working in {folder}")
        source = hardened(folder)
        served = quantized(folder, source, SERVED)
        with Server(served, port, folder / "server.log") as server:
            scores = perplexities(folder, source)  # while the server starts
            server.wait()
            show_answers(server)
            print(kv_report(served) + "\n" + "\n".join(server.proof()))
            print("\n" + table(scores))
            print("\n" + how_to_ask(server), flush=True)
            if not once:
                say("serving until Ctrl-C")
                with suppress(KeyboardInterrupt):
                    server.join()
        say(f"demo: server stopped, its log is {server.log}")
    return 0


# ---- what is made once ------------------------------------------------------------------------------


def cache_folder() -> Path:
    """A folder for everything that this version of rotquant makes of this bundled model."""
    import rotquant_kernels
    from rotquant_kernels.native import cache_root

    total = hashlib.sha256()
    for package in (Path(__file__).parent, Path(rotquant_kernels.__file__).parent):
        for file in sorted(package.rglob("*")):
            if file.suffix in (".py", ".yaml", ".txt", ".json", ".safetensors"):
                total.update(f"{file.relative_to(package)}:".encode() + file.read_bytes())
    return cache_root() / f"demo-{total.hexdigest()[:12]}"


def hardened(folder: Path) -> Path:
    """The bundled model with outliers; the same function."""
    output, partial = folder / "hardened", folder / "hardened.partial"
    if not output.exists():
        from rotquant.harden import harden_folder

        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "hardened.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another demo may have begun, too
            if not output.exists():
                say("demo: writing outlier channels into the bundled model (its function stays the same)")
                shutil.rmtree(partial, ignore_errors=True)
                harden_folder(DATA / "demo", partial)
                partial.rename(output)
    return output


def quantized(folder: Path, source: Path, recipe: str) -> Path:
    """The model quantized with a shipped recipe; goes on where an interrupted run stopped."""
    output = folder / recipe
    if not output.exists():
        from rotquant.pipeline import quantize

        say(f"demo: quantizing to 4-bit weights, activations and KV cache, recipe {recipe}")
        text = str(DATA / "calibration.txt")
        quantize(str(source), output, recipe=recipe, calibration=text, samples=SAMPLES, seq_len=WINDOW, resume=True)
    return output


def perplexities(folder: Path, source: Path) -> dict[str, float]:
    """Perplexity on held-out text of the original and of each recipe, by the name of its folder in `folder`."""
    kept = folder / "perplexity.json"
    scores: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    for name in ROWS:
        if name in scores:
            continue
        from rotquant.evaluate import evaluate

        model = source if name == source.name else quantized(folder, source, name)
        scores[name] = evaluate(str(model), DATA / "heldout.txt", tokens=SCORED_TOKENS, seq_len=WINDOW).perplexity
        partial = kept.with_suffix(".partial")
        partial.write_text(json.dumps(scores))
        partial.replace(kept)
    return scores


# ---- what is shown ----------------------------------------------------------------------------------


def show_answers(server: Server) -> None:
    """One completion, printed as it comes, and one chat answer."""
    print(f"\ncompletion of {PROMPT!r}:\n{PROMPT}", end="", flush=True)
    body = {"prompt": PROMPT, "max_tokens": ANSWER_TOKENS, "temperature": 0}
    first = server.ask("/v1/completions", body, lambda text: print(text, end="", flush=True))
    print(f"\n\nchat: {QUESTION}")
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": ANSWER_TOKENS, "temperature": 0}
    second = server.ask("/v1/chat/completions", body, lambda text: print(text, end="", flush=True))
    print(f"\n\nspeed: {speed(first)} (completion), {speed(second)} (chat)")
    if not first.text.strip() or not second.text.strip():
        raise RotQuantError(f"the server gave an empty answer; its log is {server.log}")


def speed(answer: Answer) -> str:
    return f"{answer.tokens_per_second:.0f} tokens/s" if answer.tokens > 1 else "one token"


def kv_report(checkpoint: Path) -> str:
    """Bytes that the KV cache takes for a token, against bfloat16."""
    from rotquant_kernels.reference import kv_token_bytes

    config = json.loads((checkpoint / "config.json").read_text())
    heads, dim = config["num_key_value_heads"] * config["num_hidden_layers"], config["head_dim"]
    symmetric = config["quantization_config"]["kv_cache_scheme"]["symmetric"]
    ours, theirs = heads * kv_token_bytes(dim, symmetric), heads * dim * 4
    return f"KV cache: {ours} bytes a token, {theirs} in bfloat16 ({theirs / ours:.2f}x as many tokens)"


def table(scores: dict[str, float]) -> str:
    """Perplexities and their ratios to full precision."""
    best = scores["hardened"]
    lines = [f"perplexity on {SCORED_TOKENS} held-out tokens:"]
    lines += [f"  {label:<18}{scores[name]:>10.2f}{scores[name] / best:>9.2f}x" for name, label in ROWS.items()]
    return "\n".join(lines)


def how_to_ask(server: Server) -> str:
    body = json.dumps({"model": server.model, "prompt": PROMPT, "max_tokens": ANSWER_TOKENS})
    return (
        f"OpenAI API at {server.url}/v1, model {server.model}; ask with\n"
        f"  curl {server.url}/v1/completions -H 'Content-Type: application/json' -d '{body}'"
    )
