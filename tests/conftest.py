"""One thread each: the tensors of tests are tiny, and barriers between threads cost more than they give."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path
from typing import NamedTuple

import pytest


class Demo(NamedTuple):
    """The demo model made hard, and its checkpoints."""

    hard: Path
    rtn: Path
    quarot: Path
    portable: Path


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Quantized once for all tests that need the trained model."""
    from rotquant.harden import harden_folder
    from rotquant.pipeline import quantize
    from source_models import DATA, SMALL

    folder = tmp_path_factory.mktemp("demo")
    harden_folder(DATA / "demo", folder / "hard")
    rtn, quarot = (quantize(str(folder / "hard"), folder / name, recipe=name, **SMALL) for name in ("rtn", "quarot"))
    portable = quantize(str(folder / "hard"), folder / "portable", recipe="quarot", profile="portable", **SMALL)
    return Demo(folder / "hard", rtn, quarot, portable)
