"""Calibration text to token windows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rotquant.common.json_files import read_object, short
from rotquant.data import DATA
from rotquant.errors import RotQuantError


@dataclass(frozen=True)
class Calibrated:
    """Token windows int64 [samples, seq_len] and where they come from, and others of the same text [n, seq_len], each
    window once: `aside`, from which nothing learns, and `more`, for what learns from many."""

    tokens: Tensor
    name: str
    sha256: str
    aside: Tensor | None = None
    more: Tensor | None = None


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        RotQuantError: none there, or one that cannot be read.
    """
    for file in tokenizer_files(folder):
        if file.suffix == ".json":
            _check_prefix(file, read_object(file))
    with _readable(folder):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer("a")  # some faults show only here
    return tokenizer


@contextmanager
def _readable(where: object) -> Iterator[None]:
    """Says in one line what a tokenizer dies of: many kinds; a panic of the tokenizers library is no Exception."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        reason = short(f"{type(error).__name__}: {error}", 200)
        raise RotQuantError(f"{where}: no tokenizer that transformers can read: {reason}") from error


TOKENIZER_FILES = ("tokenizer*", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "added_tokens.json")


def tokenizer_files(folder: Path) -> list[Path]:
    return sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """Refuses a tokenizer that cannot be read, or has ids that the model has no embedding for; none is fine.

    Raises:
        RotQuantError: naming the token and its file.
    """
    if tokenizer_files(folder):
        tokenizer: Any = read_tokenizer(folder)
        check_tokens(torch.tensor(list(tokenizer.get_vocab().values()) or [0]), tokenizer, folder, vocab_size)


def _check_prefix(file: Path, data: dict[str, Any]) -> None:
    """Refuses merges that lack the prefix that they are to have: the tokenizers library aborts the process there."""
    model = data.get("model")
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    if not prefix or not isinstance(model, dict):
        return
    for merge in model.get("merges") or []:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or not str(parts[-1]).startswith(str(prefix)):
            raise RotQuantError(
                f"{file}: model.continuing_subword_prefix is {short(repr(prefix), 60)}, which merges such as"
                f" {short(repr(merge), 60)} do not have"
            )


def check_tokens(ids: Tensor, tokenizer: Any, folder: Path, vocab_size: int) -> None:
    """Refuses token ids int64 that the model has no embedding for.

    Raises:
        RotQuantError: naming the token and its file.
    """
    largest = int(ids.max())
    if largest >= vocab_size:
        token = str(tokenizer.convert_ids_to_tokens(largest))
        raise RotQuantError(
            f"{_file_of(token, folder)}: token {short(repr(token), 60)} has id {largest}, but vocab_size of config.json"
            f" is {vocab_size}; remove the token, or give the model more embeddings"
        )


def _file_of(token: str, folder: Path) -> Path:
    """The file that a token stands in, the folder where it is in none."""
    spelled = json.dumps(token), json.dumps(token, ensure_ascii=False)
    files = [file for file in tokenizer_files(folder) if file.suffix == ".json"]
    texts = ((file, file.read_text(encoding="utf-8", errors="ignore")) for file in files)
    return next((file for file, text in texts if any(one in text for one in spelled)), folder)


def default_text() -> str:
    """Calibration text for whoever names none: part of the Python standard library's sources (bundled)."""
    return (DATA / "calibration.txt").read_text()


def read_text(calibration: str | None) -> tuple[str, str]:
    """(name, text) of `--calibration`: a .txt or .jsonl file, a Hugging Face dataset, or None for the default.

    Raises:
        RotQuantError: a file that is missing, empty or without a `text` field.
    """
    if calibration is None:
        return "default", default_text()
    path = Path(calibration)
    if path.is_file():
        try:
            text = path.read_text()
            if path.suffix == ".jsonl":
                text = "\n\n".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
        except UnicodeDecodeError as error:
            raise RotQuantError(f"{path}: calibration text must be UTF-8") from error
        except (ValueError, KeyError, TypeError) as error:
            raise RotQuantError(f"{path}: every line must be a JSON object with a field `text`") from error
        if not text.strip():
            raise RotQuantError(f"{path}: calibration text is empty")
        return path.name, text
    if path.suffix in (".txt", ".jsonl"):
        raise RotQuantError(f"{path}: no such calibration file")
    return calibration, _dataset_text(calibration)


def _dataset_text(name: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise RotQuantError(
            f"--calibration {name}: no such file, and `pip install datasets` is needed for a dataset"
        ) from error
    repository, _, subset = name.partition(":")
    rows = load_dataset(repository, subset or None, split="train", streaming=True)
    pieces, size = [], 0
    for row in rows:
        pieces.append(row["text"])
        size += len(row["text"])
        if size > 20_000_000:
            break
    return "\n\n".join(pieces)


def windows(text: str, tokenizer: PreTrainedTokenizerBase, seq_len: int, where: str) -> Tensor:
    """Non-overlapping windows int64 [n, seq_len]; each begins with BOS where the tokenizer has one.

    Raises:
        RotQuantError: fewer than seq_len tokens.
    """
    prefix = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    with _readable(where):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = seq_len - len(prefix)
    count = len(ids) // step
    if count == 0:
        raise RotQuantError(
            f"{where}: {len(ids)} tokens are too few, one window of {seq_len} is needed; give more text"
        )
    body = torch.tensor(ids[: count * step]).view(count, step)
    return torch.cat((torch.tensor(prefix).long().expand(count, -1), body), dim=1)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins every sequence with BOS (Llama does, Qwen does not)."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def calibration_tokens(
    calibration: str | None, tokenizer: PreTrainedTokenizerBase, samples: int, seq_len: int, seed: int, aside: int = 0,
    more: int = 0,
) -> Calibrated:  # fmt: skip
    """A random choice of windows, the same for the same text, tokenizer and seed.

    aside: windows wanted beside the samples. A short text gives fewer, at most a quarter of its windows where the
        samples would take them all, but one if it has two. A longer one leaves the samples as they are.
    more: windows wanted beside both, as far as the text has them.
    """
    name, text = read_text(calibration)
    every = windows(text, tokenizer, seq_len, name)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    spare = max(len(every) - samples, len(every) // 4, 1) if len(every) > 1 else 0
    kept = order[: min(samples, len(every) - min(aside, spare))]
    others = order[len(kept) :][: min(aside, spare)]
    rest = order[len(kept) + len(others) :][:more]
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    beside = (every[some.sort().values] if len(some) else None for some in (others, rest))
    return Calibrated(every[kept.sort().values], name, sha256, *beside)
