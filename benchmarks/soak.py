"""Hours of mixed load on a served checkpoint: does memory grow, is an answer ever wrong?

    python benchmarks/soak.py                          30 minutes on the demo model's W4A4KV4 checkpoint
    python benchmarks/soak.py OUT --minutes 120 --clients 24

Clients send prompts of all lengths at once, streamed or not, sampled or greedy; some hang up in the
middle. Every probe, a greedy request among the others, is compared afterwards with the fake-quantized
model in transformers (`rotquant.load`): each served token must be its first choice or lose a near tie.
Serves in float32, where the two agree to rounding, with a cache that holds the longest requests of half the
clients: blocks are evicted all the time, and soon its pages are no new memory. Ends with exit code 1 if a
request failed, a probe is wrong, or the server's memory grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import torch
from transformers import AutoTokenizer

import rotquant
from rotquant.common.progress import say
from rotquant.data import DATA
from rotquant.service.demo import TOY, cache_folder, quantized
from rotquant.service.server import Server

# A 4-bit code that falls on the other side of a tie in one of the two engines moves logits by some tenths.
PROBE_TOKENS, NEAR_TIE, TIES, GROWTH = 24, 1.0, 0.02, 0.05
MOST_OUTPUT, BLOCK = 200, 128  # tokens
KINDS = {"probe": 2, "plain": 3, "stream": 3, "abort": 2}


@dataclass
class Record:
    """What a soak saw; memory in MiB of the server's processes, one number every ten seconds."""

    minutes: float = 0
    requests: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    tokens: int = 0
    failures: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    probes: list[tuple[list[int], list[int]]] = field(default_factory=list)

    def growth(self) -> float:
        """Memory at the end relative to memory after the first third."""
        n = len(self.memory)
        early, late = self.memory[n // 3 : n // 3 + max(1, n // 6)], self.memory[-max(1, n // 6) :]
        return statistics.median(late) / statistics.median(early) - 1


class Soak:
    """Clients of one server until a deadline."""

    def __init__(self, server: Server, ids: list[int], longest: int, seed: int) -> None:
        self.server, self.ids, self.longest = server, ids, longest
        self.random, self.record = random.Random(seed), Record()

    def body(self, kind: str) -> dict[str, Any]:
        """A request for a random piece of the text."""
        draw = self.random
        length = draw.choice([1, draw.randint(2, 60), draw.randint(60, self.longest)])
        start = draw.randrange(len(self.ids) - length)
        tokens = (
            PROBE_TOKENS if kind == "probe" else draw.choice([1, draw.randint(2, 40), draw.randint(40, MOST_OUTPUT)])
        )
        greedy = kind == "probe" or draw.random() < 0.5
        return {
            "model": self.server.model,
            "prompt": self.ids[start : start + length],
            "max_tokens": tokens,
            "temperature": 0 if greedy else 1.0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": kind in ("stream", "abort"),
        }

    async def client(self, session: aiohttp.ClientSession, deadline: float) -> None:
        while time.monotonic() < deadline:
            kind = self.random.choices(list(KINDS), list(KINDS.values()))[0]
            body = self.body(kind)
            try:
                await self.send(session, kind, body)
                self.record.requests[kind] += 1
            except (TimeoutError, aiohttp.ClientError, KeyError, ValueError) as error:
                self.record.failures.append(f"{kind}: {error!r}")
                await asyncio.sleep(1)

    async def send(self, session: aiohttp.ClientSession, kind: str, body: dict[str, Any]) -> None:
        async with session.post(self.server.url + "/v1/completions", json=body) as response:
            if response.status != 200:
                raise ValueError(f"status {response.status}: {await response.text()}")
            if body["stream"]:
                enough = self.random.randint(0, 20) if kind == "abort" else None
                events = 0
                async for line in response.content:
                    events += line.startswith(b"data: {")
                    if enough is not None and events >= enough:
                        return  # hangs up
                self.record.tokens += events
                return
            choice = json.loads(await response.read())["choices"][0]
        tokens = choice["token_ids"]
        if len(tokens) != body["max_tokens"]:
            raise ValueError(f"{len(tokens)} tokens instead of {body['max_tokens']}")
        self.record.tokens += len(tokens)
        if kind == "probe":
            self.record.probes.append((body["prompt"], tokens))

    async def watch(self, deadline: float) -> None:
        process = psutil.Process(self.server.process.pid)
        while time.monotonic() < deadline:
            tree = [process, *process.children(recursive=True)]
            self.record.memory.append(sum(p.memory_info().rss for p in tree if p.is_running()) / 2**20)
            left = (deadline - time.monotonic()) / 60
            if len(self.record.memory) % 6 == 1:
                done, failed = sum(self.record.requests.values()), len(self.record.failures)
                say(f"{left:.0f} min left: {done} requests, {failed} failed, {self.record.memory[-1]:.0f} MiB")
            await asyncio.sleep(10)

    async def run(self, minutes: float, clients: int) -> Record:
        deadline = time.monotonic() + 60 * minutes
        self.record.minutes = minutes
        timeout = aiohttp.ClientTimeout(total=600)
        # A kept connection may be closed by the server in the moment it is used again.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            await asyncio.gather(self.watch(deadline), *(self.client(session, deadline) for _ in range(clients)))
        return self.record


@torch.no_grad()
def wrong_tokens(checkpoint: Path, probes: list[tuple[list[int], list[int]]], most: int) -> dict[str, float]:
    """Compares the served tokens of up to `most` probes with the fake-quantized model in transformers."""
    model = rotquant.load(checkpoint, dtype=torch.float32)
    gaps: list[float] = []
    for prompt, served in random.Random(0).sample(probes, min(most, len(probes))):
        logits = model(torch.tensor([prompt + served])).logits[0, len(prompt) - 1 : -1].float()
        gaps += (logits.amax(-1) - logits.gather(1, torch.tensor(served)[:, None])[:, 0]).tolist()
    ties = sum(gap > 0 for gap in gaps)
    return {"compared": len(gaps), "not_first_choice": ties, "largest_gap": max(gaps, default=0.0)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, help="default: the demo model, made hard and quantized")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=12, help="requests at the same time (default: 12)")
    parser.add_argument("--longest", type=int, default=600, help="longest prompt in tokens (default: 600)")
    parser.add_argument("--compare", type=int, default=300, help="probes compared with transformers (default: 300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "soak.json")
    given = parser.parse_args()
    folder = cache_folder()
    checkpoint = given.checkpoint or quantized(folder, TOY, TOY.make(folder), "quarot")
    ids = AutoTokenizer.from_pretrained(checkpoint)((DATA / "heldout.txt").read_text())["input_ids"]
    log = Path(tempfile.mkdtemp()) / "server.log"
    context = given.longest + MOST_OUTPUT
    blocks = max(1, given.clients // 2) * -(-context // BLOCK)
    limits = ["--max-model-len", str(context), "--block-size", str(BLOCK), "--num-gpu-blocks-override", str(blocks)]
    with Server(checkpoint, 0, log, ["--dtype", "float32", *limits]) as server:
        server.wait()
        proof = server.proof()
        record = asyncio.run(Soak(server, ids, given.longest, given.seed).run(given.minutes, given.clients))
    verdict = wrong_tokens(checkpoint, record.probes, given.compare)
    summary = asdict(record) | {"probes": len(record.probes), "growth": record.growth(), "proof": proof} | verdict
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(summary, indent=1) + "\n")
    bad = {
        f"{len(record.failures)} requests failed, the first: {record.failures[:1]}": bool(record.failures),
        "no probe was answered": not record.probes,
        f"wrong tokens: {verdict}": verdict["largest_gap"] > NEAR_TIE
        or verdict["not_first_choice"] > TIES * verdict["compared"],
        f"memory grew by {record.growth():.1%}": record.growth() > GROWTH,
    }
    print(json.dumps({k: v for k, v in summary.items() if k not in ("memory", "proof")}, indent=1))
    for what, is_bad in bad.items():
        if is_bad:
            say(f"FAILED: {what}")
    return int(any(bad.values()))


if __name__ == "__main__":
    sys.exit(main())
