"""What travels with a model besides its weights: all that serving may need, less what is known to be useless.

Tokenizer files of every kind, chat templates (a folder of them too), generation config, processor files, licence.
Left out: weights in any format, config.json and the model card (both are written anew), code (never run), adapters,
other programs' settings that vLLM would take for the checkpoint's, traces of training, pictures, hidden files; and
folders that hold weights, which are other models.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from rotquant.common.progress import say

LARGEST = 200 * 2**20  # bytes; a tokenizer of 256,000 tokens takes 35 MB
WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack",
    "*.npz", "*.npy", "*.ckpt", "*.pkl", "*.pickle", "*.ot", "*.mlmodel", "*.tflite", "*.pdparams", "*.nemo",
    "*.engine", "*.tar", "*.tar.gz", "*.zip",
)  # fmt: skip
LEFT_OUT = (
    "README*", "*.index.json", "params.json", "adapter_*", "quant*_config.json", "hf_quant_config.json",
    "recipe.yaml", "*.py", "*.pyc", "*.sh", "*.ipynb", "*.c", "*.cpp", "*.cu", "*.so", "*.log", "*.tmp", "*.lock",
    "*tfevents*", "trainer_*", "training_*", "all_results.json", "train_results.json", "eval_results.json",
    "model_index.json", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.pdf", "*.mp4", "journal.json",
    "lock", "chain-*", "*kept-*",
)  # fmt: skip
FOLDERS = (
    "original", "onnx", "openvino", "coreml", "runs", "logs", "wandb", "assets", "images", "figures", "docs",
    "checkpoint-*", "global_step*", "__pycache__",
)  # fmt: skip


def travelling(names: Iterable[str]) -> Iterator[str]:
    """Those of a folder's files (relative, with /) that go with the model."""
    paths = sorted(map(PurePosixPath, names))
    weights = {path.parent for path in paths if _is(path.name, WEIGHTS)}
    others = {folder for path in weights for folder in (path, *path.parents)} - {PurePosixPath(".")}
    for path in paths:
        if str(path) == "config.json":
            continue
        hidden = any(part.startswith(".") for part in path.parts)
        useless = _is(path.name, (*WEIGHTS, *LEFT_OUT)) or any(_is(folder, FOLDERS) for folder in path.parts[:-1])
        if not hidden and not useless and not others & {path.parent, *path.parents}:
            yield str(path)


def copy_companions(source: Path, folder: Path) -> None:
    """Copies what travels, and says what does not though it might have been meant to."""
    names = sorted(_files(source, folder))
    wanted = set(travelling(names))
    for name in sorted(wanted):
        if reason := _kept_back(source, source / name):
            say(f"{source / name}: not copied: {reason}")
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    known = ("config.json", "README*", "*.index.json", ".*", *WEIGHTS)
    if left := [name for name in names if name not in wanted and "/" not in name and not _is(name, known)]:
        say(f"{source}: not copied, as serving needs none of it: {', '.join(left[:8])}{' ...' if left[8:] else ''}")


def _files(source: Path, folder: Path) -> Iterator[str]:
    """Files below a folder, less those of the output; links to folders are not followed."""
    for file in source.rglob("*"):
        inside = folder.resolve() in (file.resolve(), *file.resolve().parents)
        if file.is_file() and not inside:
            yield file.relative_to(source).as_posix()


def _kept_back(source: Path, file: Path) -> str:
    """Why a file is not copied, "" where it is. A hub's cache links into its own `blobs`, and nothing else leaves."""
    blobs = source.resolve().parent.parent / "blobs" if source.resolve().parent.name == "snapshots" else None
    target = file.resolve()
    if not any(home and home in target.parents for home in (source.resolve(), blobs)):
        return f"it is a link to {target}, outside the model"
    return f"it is larger than {LARGEST >> 20} MiB" if file.stat().st_size > LARGEST else ""


def _is(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name.lower(), pattern.lower()) for pattern in patterns)
