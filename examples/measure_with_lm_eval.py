"""lm-eval on the ops that are served, inside transformers.

    python examples/measure_with_lm_eval.py OUT arc_easy [--limit 100] [--include FOLDER]

The same through vLLM, with lm-eval's own command line:

    lm_eval --model vllm --model_args pretrained=OUT,quantization=rotquant --tasks arc_easy
"""

from __future__ import annotations

import argparse
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

import rotquant


def measure(out: str, task: str, include: str | None = None, limit: int | None = None) -> dict[str, Any]:
    """What lm-eval says of a checkpoint.

    Args:
        out: the checkpoint; task: a task of lm-eval's, or of the folder `include`; limit: documents, all where None.
    """
    model = HFLM(rotquant.load(out), tokenizer=AutoTokenizer.from_pretrained(out))
    manager = TaskManager(include_path=include, include_defaults=include is None)
    found = lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0)
    return found["results"][task]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="checkpoint that rotquant quantize made")
    parser.add_argument("task")
    parser.add_argument("--include", help="folder with task files of your own")
    parser.add_argument("--limit", type=int, help="documents")
    args = parser.parse_args()
    for name, value in measure(args.out, args.task, args.include, args.limit).items():
        print(f"{name:<32} {value}")


if __name__ == "__main__":
    main()
