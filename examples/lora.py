"""A LoRA adapter that was trained on the original, on its rotated checkpoint: vLLM with and without it.

    python examples/lora.py OUT ADAPTER "The sky is"

The plugin turns the adapter into the checkpoint's basis while vLLM loads it. `rotquant adapter ADAPTER --base OUT -o
TURNED` would do so once and for all; `vllm serve OUT --enable-lora --lora-modules mine=ADAPTER` serves it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="checkpoint that rotquant quantize made")
    parser.add_argument("adapter", type=Path, help="folder that PEFT wrote for the original model")
    parser.add_argument("prompt")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--enforce-eager", action="store_true", help="starts faster, runs slower")
    args = parser.parse_args()

    rank = json.loads((args.adapter / "adapter_config.json").read_text())["r"]
    allowed = next(size for size in (8, 16, 32, 64, 128, 256) if size >= rank)  # of vLLM
    llm = LLM(
        args.out,
        quantization="rotquant",
        enable_lora=True,
        max_lora_rank=allowed,
        max_model_len=args.max_model_len,
        enforce_eager=args.enforce_eager,
    )
    greedy = SamplingParams(temperature=0, max_tokens=16)
    for name, request in (("without", None), ("with", LoRARequest("mine", 1, str(args.adapter)))):
        (output,) = llm.generate([args.prompt], greedy, lora_request=request, use_tqdm=False)
        print(f"{name} the adapter: {output.outputs[0].text!r}")


if __name__ == "__main__":  # vLLM starts its engine by importing this file again
    main()
