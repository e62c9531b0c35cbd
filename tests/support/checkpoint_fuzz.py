"""Single changes of a checkpoint, and what readers make of them: each key of config.json with wrong values, each tensor
broken in the ways that files break, index and file names.

    python tests/support/checkpoint_fuzz.py [--plugin] [--sample N]   runs them all (or N), counts, says what is wrong

A change must leave the result as it was, be refused in one line, or be a setting that means another computation and is
run as such (`MEANS`): then both engines read it in one place, `rotquant.format` or transformers' own config.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import rotquant
from checkpoints import Spec, prompts, save_shards, write_checkpoint
from online_extras import everything
from rotquant.errors import RotQuantError

MISSING = object()
VALUES: list[Any] = [
    None, "", "unheard-of", "4", -1, 0, 1, 10**9, 2.5, float("nan"), True, False, [], ["x"], {}, {"x": 1}, MISSING,
]  # fmt: skip
# Settings that mean another model: their values are read by transformers or by the format, alike in both engines.
MEANS = (
    r"rotquant(\.(activation_clip|kv_clip)\b.*)?$",
    r"rotquant\.(input_transforms|low_rank)(\.\d+)?$",
    r"quantization_config\.(kv_cache_scheme|config_groups\.\w+\.input_activations)\.(symmetric|num_bits)$",
    r"quantization_config\.(kv_cache_scheme|transform_config)\b",
    r"(rms_norm_eps|rope_theta|dtype|model_type|architectures(\.0)?|initializer_range)$",
    r"rope_parameters\b",
)
PROMPT = torch.tensor(prompts((19,)))
SMALL: dict[str, Any] = {"hidden": 128, "intermediate": 256, "heads": 4, "kv_heads": 2, "head_dim": 16, "r4_block": 32}


@dataclass
class Change:
    """One edit of a copy of the checkpoint folder."""

    what: str
    path: str  # of the key in config.json, "" for files
    make: Callable[[Path], object]


def checkpoints(folder: Path) -> dict[str, Path]:
    """A plain checkpoint, and one with everything that the key `rotquant` can say, in two shards."""
    plain = write_checkpoint(folder / "plain", Spec(**SMALL))
    rich = write_checkpoint(folder / "rich", Spec(**SMALL, int8_head=True, group=32, extras=everything()))
    file = rich / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    save_shards(rich, tensors, 2)
    return {"plain": plain, "rich": rich}


def keys(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every key of a JSON tree, of the first entry of every list."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree[:1]) if isinstance(tree, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from keys(value, (*path, key))


def config_changes(folder: Path) -> Iterator[Change]:
    config = json.loads((folder / "config.json").read_text())
    for path in keys(config):
        for value in [*VALUES, "typo"]:
            yield Change(f"{'.'.join(map(str, path))} = {shown(value)}", ".".join(map(str, path)), edit(path, value))


def shown(value: Any) -> str:
    return "missing" if value is MISSING else "(beside a misspelt key)" if value == "typo" else repr(value)


def edit(path: tuple[Any, ...], value: Any) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        place = config
        for key in path[:-1]:
            place = place[key]
        if value is MISSING:
            del place[path[-1]]
        elif value == "typo":
            old = place.pop(path[-1])
            if isinstance(place, dict):
                place[f"{path[-1]}s"] = old
        else:
            place[path[-1]] = copy.deepcopy(value)
        file.write_text(json.dumps(config))

    return make


def tensor_changes(folder: Path) -> Iterator[Change]:
    """One tensor of each name in a layer, broken; then files and index."""
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if "layers.1" in name and not name.endswith("R4_input.weight"):
                continue
            for how, broken in broken_tensors(name, tensor):
                yield Change(f"{name} {how}", "", with_tensor(file.name, name, broken))
        yield Change(f"{file.name} truncated", "", lambda f, n=file.name: cut(f / n, 0.5))
        yield Change(f"{file.name} header truncated", "", lambda f, n=file.name: cut(f / n, 0.001))
        yield Change(f"{file.name} empty", "", lambda f, n=file.name: (f / n).write_bytes(b""))
        yield Change(f"{file.name} garbage", "", lambda f, n=file.name: (f / n).write_bytes(b"\x00\xff" * 99))
        yield Change(f"{file.name} missing", "", lambda f, n=file.name: (f / n).unlink())
        yield Change(f"{file.name} a folder", "", lambda f, n=file.name: ((f / n).unlink(), (f / n).mkdir()))
        yield Change(f"{file.name} a symbolic link", "", lambda f, n=file.name: link(f, n))
    for name in ("model.extra.weight", "lm_head.bias", "model.layers.9.mlp.up_proj.weight_packed"):
        yield Change(f"{name} added", "", with_tensor(file.name, name, torch.ones(2)))
    yield from index_changes(folder)


def broken_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor | None]]:
    yield "missing", None
    yield "of no rows", tensor[:0]
    yield "a row longer", torch.cat((tensor, tensor[:1]))
    yield "flat", tensor.flatten()[None, None]
    other = torch.int64 if not tensor.is_floating_point() and tensor.dtype != torch.int64 else torch.int16
    yield f"as {other}", tensor.to(other)
    if tensor.is_floating_point():
        yield "in float8", tensor.to(torch.float8_e4m3fn)
        yield "complex", tensor.to(torch.complex64)
        for value in ("nan", "inf"):
            bad = tensor.clone()
            bad.flatten()[-1] = float(value)
            yield f"with {value}", bad
        yield "in float64", tensor.double()
    if name.endswith((".weight_shape", "P0_input.weight", "P3_input.weight", "V1_input.weight")):
        yield "doubled", tensor * 2
        yield "negative", -tensor
    if name.endswith((".weight_shape", "P0_input.weight")):
        yield "zero", torch.zeros_like(tensor)


def with_tensor(file: str, name: str, value: torch.Tensor | None) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        from safetensors.torch import save_file

        tensors = load_file(folder / file)
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value.contiguous().clone()
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return make


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def link(folder: Path, name: str) -> None:
    """The same bytes elsewhere, as in the hub's cache: nothing is wrong with it."""
    (folder / name).rename(folder / "blob")
    (folder / name).symlink_to(folder / "blob")


def index_changes(folder: Path) -> Iterator[Change]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    listing = json.loads(index.read_text())
    first, *_, last = sorted(listing["weight_map"])
    other = next(f for f in set(listing["weight_map"].values()) if f != listing["weight_map"][first])
    for value in ("../x.safetensors", "/etc/passwd", str(folder / other), other, "", 3, None, [], "model.safetensors"):
        yield Change(f"index: {first} in {value!r}", "", index_entry(first, value))
    for value in (None, [], {}, "x", 3, MISSING):
        yield Change(f"index: weight_map {shown(value)}", "", index_key("weight_map", value))
    yield Change(f"index: {last} left out", "", index_entry(last, MISSING))
    yield Change("index: ghost", "", index_entry("model.ghost", other))
    yield Change("index: no JSON", "", lambda f: (f / index.name).write_text("{"))
    yield Change("index: a list", "", lambda f: (f / index.name).write_text("[]"))
    yield Change("index: not UTF-8", "", lambda f: (f / index.name).write_bytes(b"\xff\xfe{"))


def index_key(key: str, value: Any) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        listing = json.loads(file.read_text())
        listing.pop(key)
        file.write_text(json.dumps(listing if value is MISSING else listing | {key: value}))

    return make


def index_entry(name: str, value: Any) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        listing = json.loads(file.read_text())
        listing["weight_map"].pop(name, None)
        if value is not MISSING:
            listing["weight_map"][name] = value
        file.write_text(json.dumps(listing))

    return make


def changes(folder: Path) -> list[Change]:
    return [*config_changes(folder), *tensor_changes(folder)]


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return rotquant.load(folder)(PROMPT).logits.float()


def outcome(original: Path, change: Change, expected: torch.Tensor, run: Callable[[Path], Any] = logits) -> str:
    """ "equal", "refused", "another setting", or what is wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "changed"
        shutil.copytree(original, folder)
        change.make(folder)
        try:
            got = run(folder)
        except RotQuantError as error:
            return "refused" if fine(str(error)) else f"WRONG: unclear refusal: {error}"
        except Exception as error:
            if run is not logits and not in_our_code(error):
                return "refused by vLLM"
            return f"WRONG: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if got is None:
        return "loaded"
    if got.shape == expected.shape and torch.equal(got, expected):
        return "equal"
    if any(re.match(pattern, change.path) for pattern in MEANS) and got.isfinite().all():
        return "another setting"
    return "WRONG: another result"


def in_our_code(error: BaseException) -> bool:
    """Whether an exception came through the plugin or the format, rather than from vLLM reading config.json itself."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return any("vllm_rotquant" in file or "offline/rotquant" in file for file in files)


def fine(message: str) -> bool:
    """One line that says where, and that blames nobody."""
    named = ("config.json", "safetensors", "tensor ", "model.layers", "lm_head", "generation_config")
    return "\n" not in message and len(message) < 900 and any(n in message for n in named) and "bug of" not in message


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plugin", action="store_true", help="load through vLLM's loader and the start-up check")
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        for kind, folder in checkpoints(Path(name)).items():
            cases, expected = changes(folder), logits(folder)
            if arguments.sample:
                cases = random.Random(arguments.seed).sample(cases, min(arguments.sample, len(cases)))
            run = logits
            if arguments.plugin:
                from vllm_serving import load_only

                run = load_only
            found: Counter[str] = Counter()
            for change in cases:
                result = outcome(folder, change, expected, run)
                if result == "loaded" and outcome(folder, change, expected) == "refused":
                    result = "WRONG: served, but `rotquant.load` refuses it"
                found[result.partition(":")[0]] += 1
                if result.startswith("WRONG"):
                    wrong += 1
                    print(f"{kind}: {change.what}: {result}", flush=True)
            print(f"{kind}: {len(cases)} changes: {dict(found)}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
