"""`rotquant compare`: recipes side by side on one model, each over several seeds.

Every (recipe, seed) is a process of its own (`compare_run`), so that its memory is its own and its failure
stops nobody else. Finished runs are kept in a JSON file under a key that covers everything which decides
their numbers; the same comparison, started again, goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rotquant.checkpoint.hub import fetch
from rotquant.checkpoint.source import Source, save_text
from rotquant.common.progress import clock, say
from rotquant.common.signals import terminated_like_interrupted
from rotquant.data import DATA
from rotquant.errors import RotQuantError
from rotquant.measure.compare_table import Comparison
from rotquant.measure.evaluate import text_windows, window_length
from rotquant.models import read_architecture
from rotquant.recipe import Recipe
from rotquant.recipes import load_recipe, shipped
from rotquant.text import read_text

STOP_SECONDS = 30  # an interrupted run notes what it has done
COMMA = re.compile(r",(?![^\[{]*[\]}])")  # but not those of a YAML list or mapping


def compare(
    model: str,
    recipes: str,
    *,
    text: Path | None = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    samples: int | None = None,
    calibration: str | None = None,
    calibration_seq_len: int | None = None,
    seeds: int = 3,
    settings: Sequence[str] = (),
    output: Path | None = None,
    results: Path | None = None,
    profile: str = "full",
) -> Comparison:
    """Quantizes a model with each recipe and seed and measures every result against full precision.

    Args:
        model: local folder or hub id, as for `quantize`.
        recipes: "rtn,quarot" or "all"; each may be `[label@]name-or-file.yaml[:key=value,key=value]`.
        text, tokens, seq_len: what is scored, as for `evaluate`; None: the bundled held-out text.
        samples, calibration, calibration_seq_len, profile: as for `quantize`.
        seeds: seeds 0 to seeds - 1 for each recipe.
        settings: `key=value` changes to all recipes; a recipe's own come after them.
        output: folder that keeps the checkpoints and results.json; None: checkpoints are removed.
        results: JSON file of the finished runs; None: output/results.json, if there is an output.
    Returns:
        The runs of this comparison, failed ones included.
    Raises:
        RotQuantError: bad input; one line. A recipe that fails later is a failed run instead.
    """
    folder, text = fetch(model), text or DATA / "heldout.txt"
    scored = {"text": str(text), "tokens": tokens, "seq_len": window_length(read_architecture(folder).config, seq_len)}
    quantize = {"calibration": calibration, "samples": samples, "seq_len": calibration_seq_len, "profile": profile}
    job = {"model": model, **scored, "quantize": quantize}
    planned = plan(job, read_variants(recipes, settings), range(seeds), folder)
    store = Results(results or (output / "results.json" if output else None))
    with ExitStack() as stack:
        stack.enter_context(terminated_like_interrupted())
        home = output or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rotquant-compare-")))
        home.mkdir(parents=True, exist_ok=True)
        run_all(planned, store, home)
    return Comparison([store.runs[run.key] | run.names for run in planned])


# ---- what to run ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A row of the comparison: a recipe, the changes to it, and the name to show."""

    label: str
    recipe: str
    settings: tuple[str, ...]
    loaded: Recipe


@dataclass(frozen=True)
class Planned:
    """One run: `key` covers what decides its numbers, `checkpoint` its files, `names` is what it is shown under."""

    key: str
    checkpoint: str
    folder: str
    names: dict[str, Any]
    job: dict[str, Any]


def read_variants(recipes: str, settings: Sequence[str]) -> list[Variant]:
    """`[label@]recipe[:key=value,key=value]`, separated by commas; a piece that is only key=value goes on.

    Raises:
        RotQuantError: an unknown recipe or key, or two variants of one label.
    """
    if recipes == "all":
        recipes = ",".join(name for name, _ in shipped())
    specs: list[str] = []
    for piece in COMMA.split(recipes):
        if specs and "=" in piece.partition(":")[0]:
            specs[-1] += f",{piece}"
        else:
            specs.append(piece.strip())
    variants = [_read_variant(spec, settings) for spec in specs]
    folders = [folder_name(variant.label) for variant in variants]
    for folder in folders:
        if folders.count(folder) > 1:
            raise RotQuantError(f"--recipes {recipes}: {folder} is there twice; name them apart with LABEL@RECIPE")
    return variants


def _read_variant(spec: str, settings: Sequence[str]) -> Variant:
    label, at, rest = spec.rpartition("@")
    recipe, _, changes = rest.partition(":")
    own = tuple(COMMA.split(changes)) if changes else ()
    every = (*settings, *own)
    name = Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe
    return Variant(
        label if at else name + (f":{changes}" if changes else ""), recipe, every, load_recipe(recipe, every)
    )


def folder_name(label: str) -> str:
    return re.sub(r"[^\w.+=-]+", "-", label).strip("-.")


def plan(job: dict[str, Any], variants: Sequence[Variant], seeds: Sequence[int], folder: Path) -> list[Planned]:
    """The runs of every variant and seed. `job` is what `compare_run` needs, less what differs between runs."""
    windows = text_windows(Path(job["text"]), folder, job["seq_len"], job["tokens"])
    common = {
        "version": version("rotquant"),
        "model": Source(folder).digest(),
        "config": json.loads((folder / "config.json").read_text()),
        "profile": job["quantize"]["profile"],
    }
    scored = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    calibrated = [job["quantize"]["samples"], job["quantize"]["seq_len"]]
    if any(variant.loaded.needs_calibration for variant in variants):
        calibrated.append(hashlib.sha256(read_text(job["quantize"]["calibration"])[1].encode()).hexdigest())
    planned = []
    for variant in variants:
        recipe = {"recipe": variant.loaded.model_dump(), "calibrated": variant.loaded.needs_calibration and calibrated}
        for seed in seeds:
            checkpoint, key = digest(common, recipe, seed), digest(common, scored, recipe, seed)
            label = f"{folder_name(variant.label)}-{seed}"
            quantize = job["quantize"] | {"recipe": variant.recipe, "settings": variant.settings, "seed": seed}
            names = {"label": variant.label, "recipe": variant.loaded.name, "seed": seed}
            planned.append(Planned(key, checkpoint, label, names, job | {"label": label, "quantize": quantize}))
    return planned


def digest(*decides: Any) -> str:
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


# ---- running ----------------------------------------------------------------------------------------


class Results:
    """Runs by their key, in a JSON file that is written anew, whole, after each of them.

    Args:
        file: None keeps the runs in memory only.
    Raises:
        RotQuantError: the file holds something else.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.runs: dict[str, dict[str, Any]] = {}
        if file and file.exists():
            try:
                self.runs = {run["key"]: run for run in json.loads(file.read_text())["runs"]}
            except (ValueError, KeyError, TypeError) as error:
                raise RotQuantError(f"{file}: not the results of a comparison; choose another file") from error
        self.save()  # a place that cannot be written shows before any work

    def done(self, key: str) -> bool:
        return key in self.runs and "error" not in self.runs[key]

    def outdated(self, run: Planned) -> list[dict[str, Any]]:
        """Runs of this name whose checkpoint was another one's: of another recipe, model or calibration."""
        name = run.names["label"], run.names["seed"]
        return [
            one
            for one in self.runs.values()
            if (one["label"], one["seed"]) == name and one.get("checkpoint") not in (run.checkpoint, "replaced")
        ]

    def add(self, run: dict[str, Any]) -> None:
        self.runs[run["key"]] = run
        self.save()

    def save(self) -> None:
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            save_text(self.file, json.dumps({"runs": list(self.runs.values())}, indent=1) + "\n")


def run_all(planned: Sequence[Planned], store: Results, home: Path) -> None:
    """Runs what the store does not hold yet; checkpoints go into `home`."""
    todo = [run for run in planned if not store.done(run.key)]
    if len(todo) < len(planned):
        say(f"compare: {len(planned) - len(todo)} of {len(planned)} runs are finished already")
    started = time.monotonic()
    for number, run in enumerate(todo):
        spent = time.monotonic() - started
        eta = f" · eta {clock(spent / number * (len(todo) - number))}" if number else ""
        say(f"compare: run {number + 1}/{len(todo)} · {clock(spent)}{eta} · {run.folder}")
        make_room(run, store, home)
        result = run_alone(run.job | {"checkpoint": str(home / run.folder)})
        if "error" in result:
            say(f"compare: {run.folder} failed: {result['error']}")
        store.add({"key": run.key, "checkpoint": run.checkpoint, **run.names, **result})


def make_room(run: Planned, store: Results, home: Path) -> None:
    """Removes what outdated runs of this name left in `home`; their numbers stay."""
    outdated = store.outdated(run)
    if not outdated:
        return
    for folder in (home / run.folder, home / f"{run.folder}.partial"):
        if folder.exists():
            say(f"compare: {folder} has other settings and is removed")
            shutil.rmtree(folder)
    (home / f"{run.folder}.time.json").unlink(missing_ok=True)
    for one in outdated:
        one["checkpoint"] = "replaced"
    store.save()  # only now: where this was interrupted, it begins again


def run_alone(job: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one job, or `{"error": line}`, from a process of its own."""
    with tempfile.TemporaryDirectory(prefix="rotquant-run-") as folder:
        job_file, result_file = Path(folder, "job.json"), Path(folder, "result.json")
        job_file.write_text(json.dumps(job))
        command = [sys.executable, "-m", "rotquant.measure.compare_run", str(job_file), str(result_file)]
        # A session of its own, so that a Ctrl-C reaches it once, from here, and it can note the time it took.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True)
        try:
            code = process.wait()
        except BaseException:
            stop(process)
            raise
        if result_file.exists():
            return json.loads(result_file.read_text())
        reason = f"signal {-code}, perhaps for lack of memory" if code < 0 else f"exit code {code}"
        return {"error": f"the process ended with {reason}"}


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a run: politely, then for certain."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
