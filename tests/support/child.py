"""A process of its own for what a test does with vLLM, which changes a process for good."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

Child = Callable[..., Any]  # (function, *arguments, **options): what the function gives there


@contextmanager
def child_process(prepare: Callable[[], object]) -> Iterator[Child]:
    """Runs functions in one process that `prepare` has begun, and in which vLLM compiles anew."""
    os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=prepare) as pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()
