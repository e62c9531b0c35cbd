"""How the experts of one layer are stored and run. One reader for `rotquant.load` and the vLLM plugin."""

from __future__ import annotations

from dataclasses import dataclass

from rotquant.checkpoint.format import CheckpointFormat, LinearFormat
from rotquant.errors import RotQuantError
from rotquant.models.mlp import Experts


@dataclass(frozen=True)
class ExpertsFormat:
    """Of all experts of a layer: `up` is how gate and up are stored and run, `block` R4's before down, 0 for none."""

    up: LinearFormat
    down: LinearFormat

    @property
    def block(self) -> int:
        return self.down.transforms[0].block if self.down.transforms else 0


def experts_format(checkpoint: CheckpointFormat, prefix: str, block: Experts) -> ExpertsFormat:
    """The format of the experts of a layer.

    Args:
        prefix: of the layer's names.
    Raises:
        RotQuantError: config.json gives them what the op of experts does not run.
    """
    found: dict[str, LinearFormat] = {}
    for mlp in block.routed:
        for kind, name in (("up", mlp.gate), ("up", mlp.up), ("down", mlp.down)):
            linear = checkpoint.linear(prefix + name)
            if linear is None:
                raise RotQuantError(
                    f"config.json: {prefix}{name} is not quantized: this build of rotquant runs quantized experts only"
                )
            if found.setdefault(kind, linear) != linear:
                raise RotQuantError(
                    f"config.json: {prefix}{name} has {linear}, other experts {found[kind]}: the experts of a layer are"
                    " run as one and must have one format"
                )
    made = ExpertsFormat(found["up"], found["down"])
    _check(f"config.json: {prefix}{block.files}.experts", made)
    return made


def _check(where: str, made: ExpertsFormat) -> None:
    up, down = made.up, made.down
    same = up.weights.bits == down.weights.bits and up.rows == down.rows.clipped(up.rows.clip)
    kinds = [transform.kind for transform in down.transforms]
    for what, there in (
        ("online transforms in front of gate and up", bool(up.transforms)),
        (f"{' + '.join(kinds)} in front of down", kinds not in ([], ["hadamard"])),
        ("a low-rank branch", bool(up.rank or down.rank)),
        ("gate and up of other bits than down", not same),
    ):
        if there:
            raise RotQuantError(f"{where}: this build of rotquant does not run {what} in a mixture of experts")
