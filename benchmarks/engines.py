"""How far vLLM is from the torch engine on checkpoints, beside how far that is from itself in another dtype.

    python benchmarks/engines.py LABEL=CHECKPOINT... --output benchmarks/results/engines-layers.json

With 4-bit activations, where one code falls the other way, all behind it does: token by token no two ways to add up
floats agree. What must hold: the difference is noise about 0, no larger than what another dtype makes of one engine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from rotquant.checkpoint.loading import load
from rotquant.data import DATA
from rotquant.measure.evaluate import model_losses, text_windows, torch_losses, vllm_losses


def compared(folder: Path, tokens: int, length: int) -> dict[str, float]:
    """Losses are in nats; `difference` is the mean of vLLM's less the torch engine's, `error` its standard error.

    `spread` and `chaos` are standard deviations over tokens: of that difference, and of the torch engine in float32
    less itself in the dtype of the checkpoint.
    """
    windows = text_windows(DATA / "heldout.txt", folder, length, tokens)
    own, exact = torch_losses(folder, windows), model_losses(load(folder, dtype=torch.float32), windows)
    apart = vllm_losses(folder, windows, max_model_len=2 * length, enforce_eager=True) - own
    return {
        "tokens": apart.numel(),
        "nll": own.mean().item(),
        "difference": apart.mean().item(),
        "error": (apart.std() / apart.numel() ** 0.5).item(),
        "spread": apart.std().item(),
        "chaos": (exact - own).std().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="LABEL=CHECKPOINT")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--output", type=Path, required=True, help="JSON file; runs of other labels in it stay")
    given = parser.parse_args()
    for label, folder in (text.split("=", 1) for text in given.checkpoints):
        runs = json.loads(given.output.read_text())["runs"] if given.output.exists() else []
        found = {"model": label} | compared(Path(folder), given.tokens, given.seq_len)
        print(found, flush=True)
        runs = [run for run in runs if run["model"] != label] + [found]
        given.output.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
