"""Folders of full-precision models with one thing wrong: each is read rightly, or refused in one line.

    python tests/support/fuzz_inputs.py --all            every case; prints the counts, and the cases that are neither
    python tests/support/fuzz_inputs.py --part config    one part: config, tokenizer, generation, index, header

A case is a good folder and one change. Right means that the whole preparation of `rotquant quantize` passes, and the
equivalence gate with it: transformers' own model computes what would be quantized. The readers of `rotquant eval` are
tried on the same folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from real_configs import CONFIGS
from rotquant.checkpoint.original import read_original
from rotquant.checkpoint.source import INDEX, SINGLE
from rotquant.errors import RotQuantError
from rotquant.gate import check_equivalence
from rotquant.learn.initial import initial_transforms
from rotquant.measure.evaluate import text_windows, torch_losses
from rotquant.models import expected_shapes, read_config
from rotquant.recipes import load_recipe
from rotquant.transforms.fold import Fold
from source_models import DATA

NAMES = (
    "Llama-2-7b-hf", "Llama-3.1-8B-Instruct", "Mistral-7B-Instruct-v0.3", "Qwen2.5-7B-Instruct, 128K", "Qwen3-8B",
)  # fmt: skip
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 2056, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
WRONG: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1.5, 1e-300, 10**12, float("nan"), float("inf"), "", "4", "x\ny", [], [1, None], {},
    {"a": {"b": [1]}},
)  # fmt: skip
TEXT = "import os\n\n\ndef read_lines(path):\n    return open(path).read()\n" * 8
TOKENS = torch.arange(3, 19)


@dataclass(frozen=True)
class Case:
    """One change of a good folder; `file` and `field` are what a refusal is to name."""

    part: str
    model: str
    what: str
    file: str
    field: str
    change: Callable[[Path], None]


# ---- good folders -----------------------------------------------------------------------------------


def tiny(folder: Path, name: str) -> Path:
    """A random model with the config.json of a published one, its sizes made small."""
    config = CONFIGS[name] | SIZES
    if "head_dim" in config:
        config["head_dim"] = 32
    if scaling := config.get("rope_scaling"):
        config["rope_scaling"] = scaling | {"original_max_position_embeddings": 128}
    if "pad_token_id" in config:
        config["pad_token_id"] = 4
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(0)
    tensors = {
        key: (torch.randn(shape, generator=random) * 0.1 + ("norm" in key)).bfloat16()
        for key, shape in expected_shapes(read_config(folder)).items()
    }
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        shutil.copy(DATA / "demo" / file, folder)
    return folder


# ---- changes ----------------------------------------------------------------------------------------


def edited(name: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        edit(data)
        (folder / name).write_text(json.dumps(data))

    return change


def written(name: str, content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content((folder / name).read_bytes())) and None


def keys_of(name: str, data: dict[str, Any], part: str, model: str) -> Iterator[Case]:
    """Each key of a JSON file, and those one level below, with each wrong value, and without it."""
    for key, value in data.items():
        for wrong in WRONG:
            what = f"{name}: {key} = {wrong!r}"
            yield Case(part, model, what, name, key, edited(name, lambda d, k=key, w=wrong: d.update({k: w})))
        yield Case(part, model, f"{name}: no {key}", name, key, edited(name, lambda d, k=key: d.pop(k, None)))
        for inner in value if isinstance(value, dict) else ():
            for wrong in WRONG:
                change = edited(name, lambda d, k=key, v=value, i=inner, w=wrong: d.update({k: v | {i: w}}))
                yield Case(part, model, f"{name}: {key}.{inner} = {wrong!r}", name, inner, change)


def whole_file(name: str, part: str, model: str) -> Iterator[Case]:
    """What can happen to a whole text file."""
    contents: dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda b: b"", "half": lambda b: b[: len(b) // 2], "binary": lambda b: bytes(range(256)),
        "a list": lambda b: b"[]", "null": lambda b: b"null", "text": lambda b: b'"x"',
        "BOM": lambda b: b"\xef\xbb\xbf" + b, "deep": lambda b: b"[" * 100_000,
        "twice": lambda b: b + b, "UTF-16": lambda b: b.decode().encode("utf-16"),
    }  # fmt: skip
    for what, content in contents.items():
        yield Case(part, model, f"{name}: {what}", name, "", written(name, content))


def config_cases() -> Iterator[Case]:
    for model in NAMES:
        data = json.loads((GOOD[model] / "config.json").read_text())
        extra = {"head_dim": 16, "rope_parameters": {"rope_type": "default"}, "layer_types": [], "dtype": "bfloat16",
                 "mlp_bias": False, "attention_bias": False, "partial_rotary_factor": 1.0}  # fmt: skip
        yield from keys_of("config.json", extra | data, "config", model)
    yield from whole_file("config.json", "config", NAMES[0])


def tokenizer_cases() -> Iterator[Case]:
    model = NAMES[0]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        yield from keys_of(name, json.loads((GOOD[model] / name).read_text()), "tokenizer", model)
        yield from whole_file(name, "tokenizer", model)
    beyond = {"id": 5000, "content": "def", "single_word": False, "lstrip": False, "rstrip": False}
    beyond |= {"normalized": False, "special": False}
    change = edited("tokenizer.json", lambda d: d["added_tokens"].append(beyond))
    yield Case("tokenizer", model, "a token beyond", "tokenizer.json", "def", change)


def generation_cases() -> Iterator[Case]:
    name = "generation_config.json"
    for model in (NAMES[0], NAMES[3]):
        yield from keys_of(name, json.loads((GOOD[model] / name).read_text()), "generation", model)
        yield from whole_file(name, "generation", model)


def index_cases() -> Iterator[Case]:
    model = NAMES[1]
    names = list(load_file(GOOD[model] / SINGLE))

    def sharded(folder: Path) -> None:
        tensors, parts = load_file(folder / SINGLE), (names[: len(names) // 2], names[len(names) // 2 :])
        (folder / SINGLE).unlink()
        files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for file, part in zip(files, parts, strict=True):
            save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        placed = {n: file for file, part in zip(files, parts, strict=True) for n in part}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))

    good: dict[str, Any] = {"metadata": {"total_size": 1}, "weight_map": {}}
    places = dict.fromkeys(names[:2], SINGLE) | {"nothing": "../x.safetensors"}
    for case in [*keys_of(INDEX, good | {"weight_map": places}, "index", model), *whole_file(INDEX, "index", model)]:

        def change(folder: Path, case: Case = case) -> None:
            sharded(folder)
            case.change(folder)

        yield Case("index", model, case.what, INDEX, "", change)
    yield Case("index", model, "right", INDEX, "", sharded)


def header_cases() -> Iterator[Case]:
    """The header of a safetensors file: u64 length, JSON, data."""
    model = NAMES[4]

    def header(edit: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
        def content(data: bytes) -> bytes:
            (length,) = struct.unpack("<Q", data[:8])
            fields = json.loads(data[8 : 8 + length])
            edited_ = edit(fields)
            text = (edited_ if isinstance(edited_, str) else json.dumps(fields)).encode()
            return struct.pack("<Q", len(text)) + text + data[8 + length :]

        return content

    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    tries: dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda b: b"", "7 bytes": lambda b: b[:7], "half": lambda b: b[: len(b) // 2],
        "no data": lambda b: b[:-1], "more data": lambda b: b + b"\0" * 64,
        "length 0": lambda b: struct.pack("<Q", 0) + b[8:],
        "length of an exabyte": lambda b: struct.pack("<Q", 2**60) + b[8:], "length -1": lambda b: b"\xff" * 8 + b[8:],
        "length + 1": lambda b: struct.pack("<Q", struct.unpack("<Q", b[:8])[0] + 1) + b[8:],
        "no UTF-8": lambda b: b[:9] + b"\xff\xfe" + b[11:], "pickle": lambda b: b"\x80\x04\x95" + b,
        "a list": header(lambda h: "[]"), "NaN": header(lambda h: "NaN"), "deep": header(lambda h: '{"a":' * 10_000),
        "name twice": header(lambda h: f'{json.dumps(h)[:-1]}, "{name}": {json.dumps(h[name])}}}'),
        "no tensors": header(lambda h: "{}"), "metadata a list": header(lambda h: h.update(__metadata__=[1])),
        "no metadata": header(lambda h: h.pop("__metadata__")),
        "metadata of another library": header(lambda h: h["__metadata__"].update(format="np")),
        "overlap": header(lambda h: h[name].update(data_offsets=h[other]["data_offsets"])),
        "name of ∞": header(lambda h: h.update({"∞\n": h.pop(name)})),
        "renamed": header(lambda h: h.update(x=h.pop(name))),
    }  # fmt: skip
    for key in ("dtype", "shape", "data_offsets"):
        values = (
            *WRONG,
            "I64",
            "F64",
            "F99",
            "F8_E4M3",
            "BOOL",
            "F16",
            [0, 10**15],
            [-1, 5],
            [64, 96],
            [96, 64, 1],
            [1],
        )
        for wrong in values:
            tries[f"{key} = {wrong!r}"] = header(lambda h, k=key, w=wrong: h[name].update({k: w}))
        tries[f"no {key}"] = header(lambda h, k=key: h[name].pop(k))
    for value in (float("nan"), float("inf")):
        tries[f"weights of {value}"] = lambda b, v=value: _filled(b, v)
    for what, content in tries.items():
        yield Case("header", model, what, SINGLE, "", written(SINGLE, content))


def _filled(data: bytes, value: float) -> bytes:
    """The last numbers of the file made `value`, bfloat16."""
    return data[:-64] + torch.full((32,), value).bfloat16().view(torch.uint8).numpy().tobytes()


PARTS: dict[str, Callable[[], Iterator[Case]]] = {
    "config": config_cases, "tokenizer": tokenizer_cases, "generation": generation_cases, "index": index_cases,
    "header": header_cases,
}  # fmt: skip
GOOD: dict[str, Path] = {}


def prepare(root: Path) -> None:
    """The good folders that all cases start from."""
    for number, name in enumerate(NAMES):
        GOOD[name] = tiny(root / f"good-{number}", name)


# ---- outcomes ---------------------------------------------------------------------------------------


def quantizing(folder: Path) -> None:
    """What `rotquant quantize` does before it quantizes."""
    arch, source = read_original(folder)
    transforms = initial_transforms(load_recipe("quarot", ["rotations.r3=none"]), arch, 1, seed=1)
    check_equivalence(source, arch, Fold(arch, transforms), TOKENS, lambda _: None)


def evaluating(folder: Path) -> None:
    """The readers of `rotquant eval`."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    torch_losses(folder, text_windows(text, folder, 32)[:1])


READERS = {"quantize": quantizing, "eval": evaluating}


def outcome(case: Case, root: Path, reader: str) -> str:
    """ "right", or the refusal's line; "ELSE: ..." for all that must not be."""
    folder = Path(shutil.copytree(GOOD[case.model], root / "case"))
    started = time.monotonic()
    try:
        case.change(folder)
        READERS[reader](folder)
        found = "right"
    except RotQuantError as error:
        found = str(error)
        if "\n" in found or not (case.file in found or str(folder) in found) or "please report" in found:
            found = f"ELSE: {found}"
    except Exception as error:
        found = f"ELSE: {type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder)
    return found if time.monotonic() - started < 60 else f"ELSE: took {time.monotonic() - started:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--part", choices=[*PARTS])
    parser.add_argument("--verbose", action="store_true", help="print every refusal")
    options = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        prepare(root)
        for part in PARTS if options.all else [options.part]:
            cases = list(PARTS[part]())
            for reader in READERS:
                counts: Counter[str] = Counter()
                for case in cases:
                    found = outcome(case, root, reader)
                    kind = "right" if found == "right" else "else" if found.startswith("ELSE") else "refused"
                    counts[kind] += 1
                    counts["refused, field named"] += kind == "refused" and case.field in found
                    if kind == "else" or options.verbose:
                        print(
                            f"{case.model}, {case.what} [{reader}]\n    {found.replace(str(root), '')[:400]}",
                            flush=True,
                        )
                bad += counts["else"]
                print(f"{part}, {reader}: {len(cases)} tried, {dict(counts)}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
