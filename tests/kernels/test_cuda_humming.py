"""Humming, GEMMs for GPUs: our layouts and plans against its own preparation, on machines without a GPU too."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from own_process import passes

# Where run.py puts it, out of vLLM's sight: where vLLM finds it, on CPUs too, every engine first builds GPU launchers.
APART = Path(sys.prefix) / "humming-kernels"


@pytest.mark.skipif(not APART.exists() and not importlib.util.find_spec("humming"), reason="needs humming-kernels")
def test_we_agree_with_humming():
    paths = [str(APART), *filter(None, [os.environ.get("PYTHONPATH")])]
    passes("humming_checks.py", PYTHONPATH=os.pathsep.join(paths))
