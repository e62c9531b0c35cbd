"""One thread each: the tensors of tests are tiny, and barriers between threads cost more than they give."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from typing import TYPE_CHECKING

import pytest

# A file is one worker's: those of minutes go first, or the last one keeps a worker while the other is idle.
LONG = ("test_real_model.py", "test_plugin.py", "test_models.py", "test_pipeline.py", "test_sanitizers.py")
LONG += ("test_tensor_parallel.py", "test_compare.py", "test_serve.py", "test_accuracy.py", "test_claims.py")

if TYPE_CHECKING:
    from collections.abc import Iterator

    from child import Child
    from source_models import Demo


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="module")
def child() -> "Iterator[Child]":
    """Runs a function in a child process that has imported vLLM, one for all tests of a file."""
    import vllm_serving
    from child import child_process

    with child_process(vllm_serving.prepare) as run:
        yield run


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> "Demo":
    """Quantized once for all tests that need the trained model."""
    from rotquant.models.harden import harden_folder
    from rotquant.pipeline import quantize
    from source_models import DATA, SMALL, Demo

    folder = tmp_path_factory.mktemp("demo")
    harden_folder(DATA / "demo", folder / "hard")
    rtn, quarot = (quantize(str(folder / "hard"), folder / name, recipe=name, **SMALL) for name in ("rtn", "quarot"))
    portable = quantize(str(folder / "hard"), folder / "portable", recipe="quarot", profile="portable", **SMALL)
    return Demo(folder / "hard", rtn, quarot, portable)
