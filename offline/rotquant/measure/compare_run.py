"""One run of a comparison, in a process of its own: quantize, then measure against full precision.

    python -m rotquant.measure.compare_run JOB.json RESULT.json

For each predicted token, p the full-precision and q the quantized model's distribution on the same window:

    nll = -mean(log q(token)),   perplexity = exp(nll),   KL = mean(sum(p (log p - log q))) in nats,
    top-1 agreement = share of tokens where argmax p = argmax q,
    greedy tokens = how many of full precision's CONTINUED greedy tokens come before q's first other choice, mean over
                    PROMPTS windows' first PROMPT_TOKENS tokens,
    routing agreement = share of the experts that full precision chooses which q chooses too, mean over layers; of a
                    mixture of experts only.

Both models run in their own dtype, as they are served; all of the above is float32 (sums over tokens
float64). Both are in memory, the logits of a few windows at a time.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rotquant.checkpoint.hub import fetch
from rotquant.checkpoint.loading import load
from rotquant.checkpoint.source import save_text
from rotquant.common.progress import Progress, peak_memory
from rotquant.common.signals import ctrl_c_remembered
from rotquant.errors import RotQuantError
from rotquant.measure.evaluate import BATCH_TOKENS, LOGIT_ROWS, load_any, safe_exp, text_windows
from rotquant.measure.inspection.routing import choices_watched, routing_facts
from rotquant.measure.online_cost import online_cost
from rotquant.measure.products import FastProducts
from rotquant.models import read_architecture
from rotquant.pipeline import quantize

PROMPTS, PROMPT_TOKENS, CONTINUED = 50, 32, 32


@dataclass(frozen=True)
class Distance:
    """Means over all predicted tokens; see the module's formulas."""

    nll: float
    full_nll: float
    kl: float
    agreement: float
    tokens: int


@torch.no_grad()
def measure(
    full: PreTrainedModel, quantized: PreTrainedModel, batch: Tensor, step: Callable[[], object] = lambda: None
) -> Distance:
    """Distance of a quantized model from the full-precision one.

    Args:
        batch: token windows int64 [n, seq_len]; every token but a window's first is predicted.
        step: called after each window.
    Raises:
        RotQuantError: logits that are not finite.
    """
    total, count = torch.zeros(4, dtype=torch.float64), 0
    for ids in batch.split(max(1, BATCH_TOKENS // batch.shape[1])):
        wanted = ids[:, 1:].flatten()
        both = [
            model(ids.to(model.device), use_cache=False).logits[:, :-1].flatten(0, 1) for model in (full, quantized)
        ]
        for p, q, tokens in zip(*(x.split(LOGIT_ROWS) for x in (*both, wanted)), strict=True):
            total += token_sums(p, q, tokens)
        count += len(wanted)
        for _ in ids:
            step()
    if not total.isfinite().all():
        raise RotQuantError("the quantized model's logits are not finite")
    nll, full_nll, kl, agreement = (total / count).tolist()
    return Distance(nll, full_nll, kl, agreement, count)


@torch.no_grad()
def greedy_tokens(full: PreTrainedModel, quantized: PreTrainedModel, batch: Tensor) -> float:
    """How long greedy answers stay the same, see above. The quantized model reads the other's answers: until its first
    other choice they are its own.

    Args:
        batch: token windows int64 [n, seq_len], all of which begin with text that is answered.
    """
    parts = max(1, -(-PROMPTS // len(batch)))  # of short texts: prompts from within the windows
    size = batch.shape[1] // parts
    prompts = batch[:, : parts * size].reshape(-1, size)[:PROMPTS, :PROMPT_TOKENS].to(full.device)
    answered, cache, last = prompts, None, prompts
    for _ in range(CONTINUED):
        found = full(last, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, last = found.past_key_values, found.logits[:, -1:].argmax(-1)
        answered = torch.cat((answered, last), 1)
    same = []
    for ids in answered.split(max(1, BATCH_TOKENS // answered.shape[1])):
        chosen = quantized(ids.to(quantized.device), use_cache=False).logits[:, prompts.shape[1] - 1 : -1].argmax(-1)
        same.append((chosen.to(ids.device) == ids[:, prompts.shape[1] :]).long().cumprod(1).sum(1))
    return torch.cat(same).double().mean().item()


def token_sums(full: Tensor, quantized: Tensor, tokens: Tensor) -> Tensor:
    """float64 [4]: -log q, -log p, KL(p || q) and top-1 agreement, each summed over the rows.

    Args:
        full, quantized: logits [n, vocabulary]; tokens: the right ones, int64 [n].
    """
    p, q = full.float().log_softmax(-1), quantized.to(full.device).float().log_softmax(-1)
    chosen = tokens.to(full.device)[:, None]
    rows = (
        -q.gather(1, chosen)[:, 0],
        -p.gather(1, chosen)[:, 0],
        (p.exp() * (p - q)).sum(-1),
        p.argmax(-1) == q.argmax(-1),
    )
    return torch.stack([row.double().sum() for row in rows]).cpu()


# ---- the process ------------------------------------------------------------------------------------


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Quantizes as `job` says and measures the result; gives back the numbers of a finished run."""
    checkpoint = Path(job["checkpoint"])
    with stopwatch(checkpoint) as spent:
        quantize(job["model"], checkpoint, resume=True, **job["quantize"])
    folder = fetch(job["model"])
    batch = text_windows(Path(job["text"]), folder, job["seq_len"], job["tokens"])
    full = load_any(folder)
    quantized, arch = load(checkpoint, device=full.device), read_architecture(folder)
    with FastProducts():
        with (
            Progress(f"{job['label']}: window", len(batch)) as progress,
            choices_watched(full, arch) as before,
            choices_watched(quantized, arch) as after,
        ):
            distance = measure(full, quantized, batch, progress.step)
        greedy = greedy_tokens(full, quantized, batch)
    routing = [layer["agreement"] for layer in routing_facts(arch, after, before)]
    cost = online_cost(checkpoint)
    return asdict(distance) | {
        "perplexity": safe_exp(distance.nll),
        "full_perplexity": safe_exp(distance.full_nll),
        "quantize_seconds": spent.get("seconds"),
        "quantize_peak_gb": spent.get("peak_gb"),
        "greedy_tokens": greedy,
        "routing_agreement": sum(routing) / len(routing) if routing else None,
        "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.glob("model-*.safetensors")),
        "online_multiply_adds": cost.online,
        "online_share": cost.online / cost.gemm,
    }


@contextmanager
def stopwatch(checkpoint: Path) -> Iterator[dict[str, float]]:
    """Fills `seconds` and `peak_gb` of the quantization, the interrupted attempts before this one included.

    They are kept in `<checkpoint>.time.json`. An attempt that was killed leaves none: the dict then stays
    empty, for what it took is not known.
    """
    file = checkpoint.with_name(checkpoint.name + ".time.json")
    ready = checkpoint.exists()
    begun = ready or checkpoint.with_name(checkpoint.name + ".partial").exists()
    before = json.loads(file.read_text()) if file.exists() else {} if begun else {"seconds": 0.0, "peak_gb": 0.0}
    if not ready:
        file.unlink(missing_ok=True)
    spent: dict[str, float] = dict(before)
    started = time.monotonic()
    try:
        yield spent
    finally:
        if before and not ready:
            spent["seconds"] += time.monotonic() - started
            spent["peak_gb"] = max(spent["peak_gb"], own_peak())
            save_text(file, json.dumps(spent))


def own_peak() -> float:
    """Peak resident memory of this process in GB.

    Linux hands ru_maxrss on from a process to the programs that it starts; VmHWM is this program's own.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM:")]
    return found[0] if found else peak_memory()


def main(job_file: str, result_file: str) -> int:
    """Runs the job and writes its numbers, or `{"error": line}`; 0 if all went well."""
    try:
        with ctrl_c_remembered():
            result = run(json.loads(Path(job_file).read_text()))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        line = " ".join(str(error).split())
        if not isinstance(error, RotQuantError):
            traceback.print_exc()
            line = f"{type(error).__name__}: {line}"
        result = {"error": line}
    save_text(Path(result_file), json.dumps(result))
    return 1 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
