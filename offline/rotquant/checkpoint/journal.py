"""The journal of a run: what is finished, kept so that a killed run goes on where it stopped.

A run works in `OUT.partial`. Each step writes its shard and the calibration chain whole (temporary file,
fsync, rename), then the journal the same way; only then does the step count as done. The chain is stored
verbatim: recomputing it on resume would not give the same bits. A loop of learning, which may take hours, leaves
snapshots in a `Slot`. At the end the folder is renamed to OUT, so OUT is complete or not there.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rotquant.checkpoint.source import file_digest, save_tensors, save_text
from rotquant.checkpoint.spool import Spool
from rotquant.common.signals import raise_dropped
from rotquant.errors import RotQuantError

SNAPSHOT_SECONDS = 60  # what a killed loop loses at most, unless writing it takes long
SNAPSHOT_SHARE = 0.05  # of the time, for snapshots of a large state


class Journal:
    """Opens or continues the work folder of a run.

    Args:
        output: the folder to make; must not exist.
        fingerprint: everything that decides the result; a resumed run must have the same.
        resume: continue an unfinished run.
    Raises:
        RotQuantError: output exists, another run is at work, an unfinished run without `resume`, or one with
            other settings.
    """

    def __init__(self, output: Path, fingerprint: dict[str, Any], resume: bool) -> None:
        self.output, self.folder = output, output.with_name(output.name + ".partial")
        self.file = self.folder / "journal.json"
        if output.exists():
            raise RotQuantError(f"{output}: output folder exists; choose another -o or remove it")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RotQuantError(f"{self.folder}: cannot make this folder: {error.strerror}") from error
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RotQuantError(f"{self.folder}: another run is at work there") from error
        self.state: dict[str, Any] = {"fingerprint": fingerprint, "steps": {}}
        if self.file.exists():
            self._continue(fingerprint, resume)

    def _continue(self, fingerprint: dict[str, Any], resume: bool) -> None:
        if not resume:
            raise RotQuantError(f"{self.folder}: an unfinished run; add --resume to go on, or remove the folder")
        try:
            state = json.loads(self.file.read_text())
            before = state["fingerprint"]
        except (ValueError, KeyError) as error:
            raise RotQuantError(f"{self.file}: damaged journal; remove {self.folder} and start again") from error
        changed = sorted(k for k in fingerprint.keys() | before.keys() if fingerprint.get(k) != before.get(k))
        if changed:
            raise RotQuantError(
                f"{self.folder}: the unfinished run differs in {', '.join(changed)}; repeat its settings or remove it"
            )
        for step, facts in state["steps"].items():
            for name, digest in (facts["files"] | facts.get("kept", {})).items():
                if not (self.folder / name).is_file() or file_digest(self.folder / name) != digest:
                    raise RotQuantError(f"{self.folder / name}: changed since step {step}; remove {self.folder}")
        self.state = state

    def done(self, step: str) -> bool:
        return step in self.state["steps"]

    def facts(self, step: str) -> dict[str, Any]:
        """What `finish` noted about a finished step."""
        return self.state["steps"][step]["facts"]

    def finish(
        self, step: str, shard: str | None = None, tensors: dict[str, Tensor] | None = None,
        spool: Spool | None = None, **facts: Any,
    ) -> None:  # fmt: skip
        """Writes the shard of a step, of these tensors and those in a spool, then counts the step as done."""
        raise_dropped()  # nobody knows what a step lacks that swallowed a Ctrl-C
        files = {}
        if shard and tensors is not None:
            save_tensors(self.folder / shard, tensors, spool)
            files[shard] = file_digest(self.folder / shard)
        self.state["steps"][step] = {"files": files, "facts": facts}
        save_text(self.file, json.dumps(self.state, indent=1))

    def keep(self, step: str, tensors: dict[str, Tensor], replaces: Sequence[str] = (), **facts: Any) -> None:
        """Counts a step as done whose tensors later steps need and the output does not hold; may do so again.

        replaces: kept steps that this one makes needless; their files go, as does its own older one.
        """
        raise_dropped()
        before = [name for one in (step, *replaces) for name in self._kept_files(one)]
        name = f"kept-{step.replace(' ', '-')}.safetensors"
        if name in before:  # the old file stays whole until the journal names the new one
            name = f"again-{name}"
        save_tensors(self.folder / name, tensors)
        for one in replaces:
            self.state["steps"].pop(one, None)
        self.state["steps"][step] = {"files": {}, "kept": {name: file_digest(self.folder / name)}, "facts": facts}
        save_text(self.file, json.dumps(self.state, indent=1))
        for old in before:
            (self.folder / old).unlink(missing_ok=True)

    def kept(self, step: str) -> dict[str, Tensor] | None:
        """The tensors of a step that `keep` finished, None where it is still to be done."""
        names = self._kept_files(step)
        return {k: t for name in names for k, t in load_file(self.folder / name).items()} if names else None

    def _kept_files(self, step: str) -> list[str]:
        return list(self.state["steps"].get(step, {}).get("kept", {}))

    def save_chain(self, index: int, chain: Tensor, exact: Tensor | None = None) -> None:
        """Stores the chain that enters layer `index`. Call before `finish`; older chains go after it.

        exact: the full-precision window beside it, where there is one.
        """
        save_tensors(self._chain(index), {"chain": chain} | ({} if exact is None else {"exact": exact}))

    def load_chain(self, index: int) -> tuple[Tensor, Tensor | None]:
        """The chain and the full-precision window that enter layer `index`."""
        found = load_file(self._chain(index))
        return found["chain"], found.get("exact")

    def drop_chain(self, index: int) -> None:
        self._chain(index).unlink(missing_ok=True)

    def _chain(self, index: int) -> Path:
        return self.folder / f"chain-{index:05d}.safetensors"

    def files(self) -> dict[str, str]:
        """Shard names of all finished steps with their sha256."""
        return {n: d for step in self.state["steps"].values() for n, d in step["files"].items()}

    def publish(self) -> None:
        """Renames the finished work folder to the output."""
        for leftover in (*self.folder.glob("chain-*"), *self._all_kept(), self.file, self.folder / "lock"):
            leftover.unlink(missing_ok=True)
        self.folder.rename(self.output)
        self._lock.close()

    def abandon(self) -> None:
        """Removes the work folder if no step was finished, so that a refused run leaves nothing behind."""
        self._lock.close()
        if self.folder.exists() and not self.files() and not any(self._all_kept()):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _all_kept(self) -> Iterator[Path]:
        return self.folder.glob("*kept-*")


class Scope:
    """The part of a journal where one of several candidates keeps its steps, under names of its own.

    Args:
        name: of the candidate, with letters and digits only.
    """

    def __init__(self, journal: Journal | Scope, name: str) -> None:
        self.journal, self.prefix = journal, f"{name} "

    def kept(self, step: str) -> dict[str, Tensor] | None:
        return self.journal.kept(self.prefix + step)

    def keep(self, step: str, tensors: dict[str, Tensor], replaces: Sequence[str] = ()) -> None:
        self.journal.keep(self.prefix + step, tensors, [self.prefix + one for one in replaces])


class Slot:
    """Where the loop of a long step leaves snapshots, at most one every SNAPSHOT_SECONDS, and finds the last one.

    Args:
        step: of the journal; when it is kept it replaces its snapshots, `Slot.name(step)`.
    """

    def __init__(self, journal: Journal | Scope, step: str) -> None:
        self.journal, self.step = journal, self.name(step)
        self.found = journal.kept(self.step)
        self.saved, self.pause = time.monotonic(), float(SNAPSHOT_SECONDS)

    @staticmethod
    def name(step: str) -> str:
        return f"{step} so far"

    @property
    def done(self) -> int:
        """How many passes of the loop the snapshot holds."""
        return int(self.found["done"]) if self.found else 0

    def save(self, done: int, tensors: Callable[[], dict[str, Tensor]]) -> None:
        """Keeps what the loop's next pass needs, if it is time."""
        started = time.monotonic()
        if started - self.saved >= self.pause:
            self.journal.keep(self.step, tensors() | {"done": torch.tensor(done)})
            self.saved = time.monotonic()
            self.pause = max(SNAPSHOT_SECONDS, (self.saved - started) / SNAPSHOT_SHARE)
