"""Quantizes a model by a recipe of one's own, and says what it costs in perplexity.

python examples/own_recipe.py MODEL OUT --text heldout.txt [--recipe examples/own_recipe.yaml]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rotquant
from rotquant.measure.evaluate import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub id of a causal language model")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to measure on")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text")
    parser.add_argument("--recipe", default=str(Path(__file__).with_suffix(".yaml")))
    args = parser.parse_args()

    rotquant.quantize(args.model, args.out, recipe=args.recipe)
    for name in (args.model, str(args.out)):
        print(evaluate(name, args.text, tokens=args.tokens, seq_len=512))


if __name__ == "__main__":
    main()
