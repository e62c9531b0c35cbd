"""Serving models with linear attention: what vLLM's CPU build asks of a process for them."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import vllm_serving as serving

STAND_INS = str(Path(__file__).parent / "stand_ins")
OPTIONS = {"dtype": "bfloat16", "block_size": None}  # its kernels take nothing else; vLLM chooses the block


def prepare() -> None:
    """As `vllm_serving.prepare`, with stand-ins for what the CPU build leaves out."""
    if find_spec("torchvision") is None:
        sys.path.append(STAND_INS)
    serving.prepare()
