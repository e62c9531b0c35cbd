"""What a model and its quantized checkpoints answer to the same questions, each served by vLLM, greedily.

    python benchmarks/answers.py MODEL --checkpoint quarot=OUT1 --checkpoint best=OUT2

The questions were written before anything had answered them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from rotquant.checkpoint.source import save_text
from rotquant.service.demo import ENDPOINTS, request
from serve_candidate import Candidate

QUESTIONS = (
    "What is the capital of France?",
    "How many days are in a week?",
    "Why is the sky blue?",
    "Write one sentence about the sea.",
    "Explain to a child what a library is.",
    "Name three fruits.",
)
TOKENS = 40
GREEDY = {"max_tokens": TOKENS, "temperature": 0}
ORIGINAL = "original"
QUANTIZED = ("--quantization", "rotquant")
ALWAYS = ("--max-model-len", "1024", "--max-num-seqs", "4", "--enforce-eager")
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def main(argv: Sequence[str] | None = None) -> int:
    add = (parser := argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])).add_argument
    add("model", type=Path, help="folder of the original")
    add("--checkpoint", action="append", default=[], metavar="LABEL=FOLDER", help="one of its quantized checkpoints")
    add("--output", type=Path, default=Path(__file__).parent / "results" / "answers-smollm2.json")
    args = parser.parse_args(argv)
    found = {ORIGINAL: answers(args.model, ())}
    for pair in args.checkpoint:
        label, folder = pair.split("=", 1)
        found[label] = answers(Path(folder), QUANTIZED)
    save_text(args.output, json.dumps({"tokens": TOKENS, "questions": QUESTIONS, "answers": found}, indent=1) + "\n")
    return 0


def answers(folder: Path, arguments: Sequence[str]) -> list[str]:
    """To each question the answer, at most TOKENS tokens."""
    with (
        TemporaryDirectory() as logs,
        Candidate(folder, Path(logs) / "log", ENVIRONMENT, [*ALWAYS, *arguments]) as server,
    ):
        server.wait()
        bodies = [GREEDY | request("chat", question) for question in QUESTIONS]
        return [server.ask(ENDPOINTS["chat"], body, lambda text: None).text for body in bodies]


if __name__ == "__main__":
    raise SystemExit(main())
