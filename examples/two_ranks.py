"""Tensor parallelism: how well a checkpoint predicts a text, served by some ranks.

    rotquant quantize MODEL -o OUT --tp-max 2                  R4's blocks must divide every shard
    python examples/two_ranks.py OUT --text heldout.txt --ranks 2

On CPUs a rank takes the processors that VLLM_CPU_OMP_THREADS_BIND gives it: "0-3|4-7" for two ranks of four.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm import LLM, SamplingParams

from rotquant.measure.evaluate import text_windows

WINDOW = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="checkpoint that rotquant quantize --tp-max made")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--enforce-eager", action="store_true", help="starts faster, runs slower")
    args = parser.parse_args()

    windows = text_windows(args.text, args.out, WINDOW, args.tokens).tolist()
    llm = LLM(
        str(args.out),
        quantization="rotquant",
        tensor_parallel_size=args.ranks,
        max_model_len=WINDOW + 64,
        enforce_eager=args.enforce_eager,
    )
    scored = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": window} for window in windows], scored, use_tqdm=False)
    losses = [
        -entry[token].logprob
        for window, output in zip(windows, outputs, strict=True)
        for token, entry in zip(window[1:], output.prompt_logprobs[1:], strict=True)
    ]
    print(f"\n{args.ranks} ranks, {len(losses)} tokens, mean loss {sum(losses) / len(losses):.6f}")


if __name__ == "__main__":  # ranks are started by importing this file again
    main()
