"""A checkpoint as a transformers model: the ops that vLLM would serve, weights packed. No vLLM needed.

python examples/in_transformers.py OUT "The sky is"
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoTokenizer

import rotquant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="checkpoint that rotquant quantize made")
    parser.add_argument("prompt")
    args = parser.parse_args()

    model, tokenizer = rotquant.load(args.out), AutoTokenizer.from_pretrained(args.out)
    ids = tokenizer(args.prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        written = model.generate(ids, max_new_tokens=16, do_sample=False)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    print(tokenizer.decode(written[0], skip_special_tokens=True))
    print(f"{held / 1e6:.1f} MB of tensors in memory")


if __name__ == "__main__":
    main()
