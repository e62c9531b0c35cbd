#!/usr/bin/env python3
"""Makes a vLLM of a release that has no build for CPUs yet, to run the plugin's tests in.

    python tools/graft_vllm.py 0.33.0 FOLDER
    PYTHONPATH=FOLDER:.:offline:kernels pytest tests/plugin/test_plugin.py tests/plugin/test_reload.py

FOLDER gets the release's Python sources and, beside them, the extension modules of the CPU build installed here, which
must be a near relative. That runs all of vLLM's Python with the plugin in it, on another release's kernels. With
`--runner-v2` the tests run on vLLM's Model Runner V2, which GPUs use; Triton's interpreter runs its kernels.
"""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

from record_vllm_api import download, unpack

# Model Runner V2 wants a Triton that runs on the CPU: the interpreter does, and needs no driver.
RUNNER_V2 = """
import os

from triton.backends import backends

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
backends["cpu"] = backends["nvidia"]
"""


def main(version: str, folder: Path, runner_v2: bool) -> None:
    installed = find_spec("vllm")
    if installed is None or installed.origin is None:
        sys.exit("graft_vllm.py: no vLLM is installed here to take extension modules from")
    wheel = folder / "wheel"
    wheel.mkdir(parents=True)
    unpack(download(version, wheel), folder)
    shutil.rmtree(wheel)
    for module in Path(installed.origin).parent.glob("*.so"):
        shutil.copy(module, folder / "vllm")
    for metadata in folder.glob("vllm-*.dist-info"):
        shutil.rmtree(metadata)
    metadata = folder / f"vllm-{version}+cpu.dist-info"  # "cpu" in the version makes vLLM choose that platform
    metadata.mkdir()
    requirements = "".join(f"Requires-Dist: {line}\n" for line in distribution("vllm").requires or ())
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n{requirements}")
    if runner_v2:
        (folder / "sitecustomize.py").write_text(RUNNER_V2)


if __name__ == "__main__":
    flags = [word for word in sys.argv[1:] if word.startswith("-")]
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    if len(words) != 2 or set(flags) - {"--runner-v2"}:
        sys.exit(__doc__)
    main(words[0], Path(words[1]), bool(flags))
