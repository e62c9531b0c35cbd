"""A `vllm serve` process of our own: started, waited for, asked, and stopped in every case."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

from rotquant.common.progress import clock, say
from rotquant.errors import RotQuantError

HOST, START_SECONDS, STOP_SECONDS = "127.0.0.1", 600, 10
# The prefix of a line in vLLM's log: process, level, date, time, place.
PREFIX = re.compile(r"^(\([^)]*\) )*[A-Z]+ \d\d-\d\d [\d:.]+ \[[^\]]*\] ?")
# Even `kill -9` of this process must not leave a server behind; only Linux can promise that.
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1
# Without a proxy: the server is on this machine.
_open = build_opener(ProxyHandler({})).open


@dataclass
class Answer:
    """A streamed answer; the speed counts from the first token on."""

    text: str
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return (self.tokens - 1) / max(self.seconds, 1e-9)


class Server:
    """Serves a checkpoint; as a context manager, so that no way out leaves it running.

    Args:
        checkpoint: folder to serve with `--quantization rotquant`.
        port: 0 for a free one.
        log: file for everything that vLLM prints; arguments: more of them for `vllm serve`.
    """

    model = "rotquant-demo"

    def __init__(self, checkpoint: Path, port: int, log: Path, arguments: Sequence[str] = ()) -> None:
        self.checkpoint, self.log, self.arguments = checkpoint, log, arguments
        self.port = port or _free_port()
        self.url = f"http://{HOST}:{self.port}"

    def command(self) -> list[str]:
        return [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(self.checkpoint),
            "--quantization", "rotquant", "--host", HOST, "--port", str(self.port),
            "--served-model-name", self.model, "--max-model-len", "1024", "--max-num-seqs", "16",
            *self.arguments,
            "--enforce-eager",  # compiling takes a minute that so small a model never earns back
        ]  # fmt: skip

    def __enter__(self) -> Server:
        quiet = {
            "VLLM_LOGGING_LEVEL": "INFO",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "NO_COLOR": "1",
            "PYTHONUNBUFFERED": "1",
        }
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | dict(os.environ) | quiet
        say(f"starting vllm serve {self.checkpoint} --quantization rotquant --port {self.port} (log: {self.log})")
        self.started = time.monotonic()
        with self.log.open("wb") as output:
            # A session of its own: Ctrl-C reaches the demo only, which then stops the whole process group.
            self.process = subprocess.Popen(
                self.command(), stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
                preexec_fn=_end_with_parent if _libc else None,
            )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signal(signal.SIGTERM)
        try:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        finally:  # also after a second Ctrl-C; and workers may outlive their parent
            self._signal(signal.SIGKILL)
            self.process.wait()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def wait(self) -> None:
        """Returns when the server is healthy.

        Raises:
            RotQuantError: it ended, or took too long; with the last lines of its log.
        """
        shown = 0.0
        while not self._healthy():
            self._check_alive()
            spent = time.monotonic() - self.started
            if spent > START_SECONDS:
                raise RotQuantError(f"vLLM is not healthy after {clock(spent)}{self._last_lines()}")
            if sys.stderr.isatty():
                print(f"\rwaiting for the server {clock(spent)}", end="", file=sys.stderr, flush=True)
            elif spent - shown >= 10:
                shown = spent
                say(f"waiting for the server {clock(spent)}")
            time.sleep(0.5)
        ready = f"server is up after {clock(time.monotonic() - self.started)}"
        say(f"\r{ready}         " if sys.stderr.isatty() else ready)

    def join(self) -> None:
        """Returns never; raises KeyboardInterrupt on Ctrl-C, RotQuantError when the server dies."""
        while True:
            self._check_alive()
            time.sleep(1)

    def ask(self, path: str, body: dict[str, Any], show: Callable[[str], object]) -> Answer:
        """Streams an answer of the OpenAI API.

        Args:
            path: "/v1/completions" or "/v1/chat/completions"; body: the request without model and stream.
            show: gets each piece of text as it comes.
        """
        body = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}} | body
        request = Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        pieces: list[str] = []
        tokens, first, last = 0, 0.0, 0.0
        try:
            with _open(request, timeout=120) as response:
                for line in response:
                    if not line.startswith(b"data: {"):
                        continue
                    event = json.loads(line[6:])
                    tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                    for choice in event.get("choices", []):
                        last = time.monotonic()
                        first = first or last
                        pieces.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
                        show(pieces[-1])
        except (URLError, OSError, ValueError) as error:
            self._check_alive()
            raise RotQuantError(f"{self.url}{path}: {error}{self._last_lines()}") from error
        return Answer("".join(pieces), tokens, last - first)

    def proof(self) -> list[str]:
        """The lines of the log that say what really runs: the plugin's start-up check and the cache's size."""
        lines = [PREFIX.sub("", line) for line in self.log.read_text(errors="replace").splitlines()]
        block: list[str] = []
        for line in lines:
            if line.startswith("rotquant start-up check"):
                block = [line]
            elif block and line.startswith("  ") and len(block) < 40:
                block.append(line)
            elif block:
                break
        if not block:
            raise RotQuantError(f"{self.log}: no start-up check of the rotquant plugin; was it loaded?")
        return block + [line for line in lines if "KV cache size" in line][:1]

    def _healthy(self) -> bool:
        try:
            with _open(self.url + "/health", timeout=2) as response:
                return response.status == 200
        except (URLError, OSError):
            return False

    def _check_alive(self) -> None:
        code = self.process.poll()
        if code is not None:
            raise RotQuantError(f"vLLM ended with exit code {code}{self._last_lines()}")

    def _last_lines(self, count: int = 15) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-count:]
        return f"; the end of {self.log}:\n  " + "\n  ".join(lines)


def _end_with_parent() -> None:
    """Runs in the new process before vLLM: asks the kernel for SIGTERM when the parent dies."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # type: ignore[union-attr]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
