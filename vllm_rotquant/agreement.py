"""The ranks that serve one model must be the same: rotquant, settings and kernels before the model is built, the
checkpoint's files and the start-up check once it is loaded. A rank that differs from rank 0, or fails, ends all of them
with one line; so does a rank on which vLLM runs the checkpoint without this plugin, which answers no roll call.

Ranks talk through vLLM's group for CPU tensors: of tensor and pipeline parallelism, and of data parallelism where vLLM
joins the replicas (replicas of a dense model are servers of their own and share nothing).
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rotquant.errors import RotQuantError
from rotquant_kernels import OPS
from rotquant_kernels.backends import backends_of, kernel_of
from vllm_rotquant import compat, settings
from vllm_rotquant.origin import Origin
from vllm_rotquant.versions import version

ROLL_CALL_SECONDS = 300.0  # ranks begin to build together; vLLM has just joined them
SAMPLES, SAMPLE_BYTES = 16, 4096  # of each file of weights
REMEDIES = {
    "rotquant": "install the same rotquant on every node",
    "kernel": "set the tier that all nodes have, such as "
    '--additional-config \'{"rotquant": {"cpu_tier": "avx2"}}\'; `rotquant doctor` tells what a node has',
    "setting": "give every node the same --additional-config and the same ROTQUANT_ variables",
    "checkpoint": "copy the same checkpoint to every node",
}


class Ranks:
    """The ranks of one model, seen from this one; all of them call the same methods in the same order."""

    def __init__(self, group: Any) -> None:
        """`group`: vLLM's coordinator of the ranks, None where there is one rank only."""
        self.group = group

    def roll_call(self) -> None:
        """Raises RotQuantError where a rank does not answer."""
        if self.group is None:
            return
        try:
            compat.wait_for_all(self.group, ROLL_CALL_SECONDS)
        except RuntimeError as error:
            raise RotQuantError(
                f"rank {self.group.rank} ({socket.gethostname()}): not all {self.group.world_size} ranks of this "
                f"server run rotquant ({' '.join(str(error).split())}). Install it on every node, let VLLM_PLUGINS "
                "name it where that is set, and give --quantization rotquant on every node"
            ) from error

    def compare(self, facts: Callable[[], dict[str, str]], failure: Exception | None = None) -> None:
        """Refuses where a rank differs from rank 0 or has failed; raises `failure` itself on the rank that has.

        Args:
            facts: makes values by name, the first word of which is in `REMEDIES`; not asked where there is one rank.
            failure: why this rank cannot serve.
        """
        mine: dict[str, str] = {}
        if self.group is not None and failure is None:
            try:
                mine = facts()
            except Exception as error:  # the others must learn of it
                failure = error
        named = [] if self.group is None else self._answers(mine, failure)
        if failure is not None:
            raise failure
        for name, _, why in named:
            if why:
                raise RotQuantError(f"{name} cannot serve, so no rank does: {why}")
        for name, found, _ in named[1:]:
            first, expected, _ = named[0]
            for what in expected | found:
                if expected.get(what) != found.get(what):
                    raise RotQuantError(
                        f"the ranks of this server differ in {what}: {name} has {found.get(what)}, {first} has "
                        f"{expected.get(what)}: {REMEDIES[what.split()[0]]}"
                    )

    def _answers(self, mine: dict[str, str], failure: Exception | None) -> list[tuple[str, dict[str, str], str]]:
        """Name, facts and failure of every rank."""
        kind = "" if isinstance(failure, RotQuantError) else f"{type(failure).__name__}: "
        why = "" if failure is None else kind + " ".join(str(failure).split())
        answers = compat.from_all(self.group, (socket.gethostname(), mine, why))
        return [(f"rank {rank} ({host})", *rest) for rank, (host, *rest) in zip(self.group.ranks, answers, strict=True)]

    @contextmanager
    def verdict(self, facts: Callable[[], dict[str, str]]) -> Iterator[None]:
        """`compare` at the end of a check, whether it ends well or not."""
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        self.compare(facts, failure)


def begin(defaults: Mapping[str, Any]) -> tuple[Ranks, settings.Settings]:
    """To be called before the first layer of a model is built: agrees on settings, uses them, compares kernels.

    Args:
        defaults: `settings.from_environment` of the server's first process.
    """
    ranks = Ranks(compat.ranks_of_model())
    ranks.roll_call()
    chosen: dict[str, Any] = {}

    def facts() -> dict[str, str]:
        device = compat.device_type()
        return (
            {"rotquant version": version()}
            | {f"setting {name}": str(value) for name, value in chosen.items()}
            | {f"kernel of {op}": kernel_of(op, device) for op in OPS}
        )

    with ranks.verdict(facts):
        found = settings.from_additional_config(compat.additional_config(settings.KEY), defaults)
        found.use()
        check_device(compat.device_type())
        chosen.update(asdict(found))
    compat.tell_compiled_graphs_apart(settings.KEY, chosen)
    return ranks, found


def check_device(device: str) -> None:
    """Refuses a type of device that rotquant has no kernels for."""
    try:
        backends_of(device)
    except ValueError as error:
        raise RotQuantError(f"{error}: start vLLM there") from None


def checkpoint_facts(origin: Callable[[], Origin]) -> Callable[[], dict[str, str]]:
    """What `Ranks.compare` wants of a loaded model, which came from there."""

    def facts() -> dict[str, str]:
        folder = origin().folder()
        return {"checkpoint files": "no local folder" if folder is None else fingerprint(folder)}

    return facts


def fingerprint(folder: Path) -> str:
    """Of the files that decide what a checkpoint computes, in a moment: config and index whole, of each file of weights
    its name, size, header and samples all over it."""
    state = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.index.json"), *folder.glob("*.safetensors")]):
        state.update(file.name.encode())
        with file.open("rb") as opened:
            if file.suffix == ".json":
                state.update(opened.read())
                continue
            size, header = file.stat().st_size, int.from_bytes(opened.read(8), "little")
            state.update(f"{size} {header}".encode() + opened.read(min(header, size)))
            for i in range(SAMPLES):
                opened.seek(max(size - SAMPLE_BYTES, 0) * i // (SAMPLES - 1))
                state.update(opened.read(SAMPLE_BYTES))
    return state.hexdigest()[:16]
