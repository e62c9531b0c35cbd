"""One format of `serve.py` as a server, and the load that it is put under."""

from __future__ import annotations

import asyncio
import io
import math
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from rotquant.service.server import HOST, Server

# Of vLLM's result file, what is kept: the lists of every single request would be most of it.
METRICS = re.compile(r"(mean|median|p99)_(ttft|tpot|itl|e2el)_ms|\w+_throughput|duration|completed|total_\w+_tokens")
# How stock vLLM's log names what computes; bf16 is not named there.
KERNEL = re.compile(r"(?:Selected|Using) (\w+Kernel)\b")


@dataclass(frozen=True)
class Load:
    """Requests of one shape.

    Args:
        inputs, outputs: tokens of each request; prompts: number of requests.
        rate: requests a second, inf for all at once; concurrency: most requests in flight, 0 for no limit.
    """

    inputs: int
    outputs: int
    prompts: int
    rate: float = math.inf
    concurrency: int = 0

    @classmethod
    def parse(cls, text: str) -> Load:
        fields = text.split(":")
        kinds = (int, int, int, float, int)
        return cls(*(kind(field) for kind, field in zip(kinds, fields, strict=False)))

    @property
    def name(self) -> str:
        kind = f"{self.rate:g}/s" if math.isfinite(self.rate) else "all at once"
        kind = "one at a time" if self.concurrency == 1 else kind
        limit = f", at most {self.concurrency}" if self.concurrency > 1 else ""
        return f"{self.inputs}/{self.outputs} {kind} x{self.prompts}{limit}"


class Candidate(Server):
    """One format, served."""

    model = "benchmark"

    def __init__(self, checkpoint: Path, log: Path, environment: dict[str, str], arguments: Sequence[str]) -> None:
        super().__init__(checkpoint, 0, log, arguments)
        self.environment = environment

    def command(self) -> list[str]:
        return [
            "env", *(f"{key}={value}" for key, value in self.environment.items()),
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(self.checkpoint), "--host", HOST,
            "--port", str(self.port), "--served-model-name", self.model, *self.arguments,
        ]  # fmt: skip

    def __enter__(self) -> Candidate:
        with redirect_stderr(io.StringIO()):  # it announces another command than the one above
            super().__enter__()
        return self

    def pause(self) -> None:
        """Stops its processes where they are."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resume()  # a stopped process does not end
        super().__exit__(kind, error, trace)

    def memory(self) -> dict[str, int]:
        """Bytes of all processes of the server: RSS counts a page that two of them share twice, PSS once."""
        top = psutil.Process(self.process.pid)
        infos = [process.memory_full_info() for process in [top, *top.children(recursive=True)]]
        return {"rss": sum(info.rss for info in infos), "pss": sum(getattr(info, "pss", 0) for info in infos)}

    def kv_tokens(self) -> int:
        """Tokens that fit into the KV cache, as vLLM logs them."""
        found = re.search(r"KV cache size: ([\d,]+) tokens", self.log.read_text(errors="replace"))
        return int(found[1].replace(",", "")) if found else 0

    def kernels(self, stock: bool) -> list[str]:
        """What computes, in the words of the log."""
        if not stock:
            return self.proof()[:-1]
        return list(dict.fromkeys(KERNEL.findall(self.log.read_text(errors="replace"))))


def bench(server: Candidate, load: Load, seed: int, timeout: float) -> dict[str, Any]:
    """`vllm bench serve` on the running server; called as a function, since the command takes 15 s to start.

    Returns:
        vLLM's metrics, and under "error" why there are none or why they do not count.
    """
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = FlexibleArgumentParser()
    add_cli_args(options)
    arguments = options.parse_args([
        "--host", HOST, "--port", str(server.port), "--model", server.model, "--tokenizer", str(server.checkpoint),
        "--dataset-name", "random", "--input-len", str(load.inputs), "--output-len", str(load.outputs),
        "--num-prompts", str(load.prompts), "--request-rate", str(load.rate), "--seed", str(seed),
        *(["--max-concurrency", str(load.concurrency)] if load.concurrency else []),
        "--ignore-eos", "--temperature", "0", "--percentile-metrics", "ttft,tpot,itl,e2el", "--disable-tqdm",
    ])  # fmt: skip
    try:
        with server.log.with_suffix(".client.log").open("a") as out, redirect_stdout(out), redirect_stderr(out):
            result = asyncio.run(asyncio.wait_for(main_async(arguments), timeout))
    except TimeoutError:
        return {"error": f"no result after {timeout:g} s (--timeout)"}
    except Exception as error:  # of the client, of any kind: other loads may still work
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    failed = load.prompts - result["completed"]
    kept = {key: value for key, value in result.items() if METRICS.fullmatch(key)}
    return kept | ({"error": f"{failed} of {load.prompts} requests failed"} if failed else {})
