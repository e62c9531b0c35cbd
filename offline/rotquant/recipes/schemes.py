"""The precision dial, `rotquant quantize --scheme`, and what a device wants, `--target`, as settings of a recipe.

w4a4kv4   4-bit weights, activations and KV cache
w4a8kv4   8-bit activations, of which no range is clipped
auto      4-bit activations, and 8-bit ones at the sites where 4 bits do most damage: as many as --budget allows, a
          share of the model's (layer, site) pairs, "25%", or a number of them, "12"; or as few as bring the KL to full
          precision to what it allows, "5% KL", which is 0.05 nats a token
"""

from __future__ import annotations

from typing import get_args

from rotquant.errors import RotQuantError
from rotquant.recipe import Recipe, Target

TARGETS = get_args(Target)[1:]

BUDGET = "25%"
SCHEMES: dict[str, dict[str, str]] = {
    "w4a4kv4": {"weights.bits": "4", "activations.bits": "4", "activations.budget": "0", "kv.bits": "4"},
    "w4a8kv4": {
        "weights.bits": "4", "activations.bits": "8", "activations.clip": "1.0", "activations.budget": "0",
        "kv.bits": "4",
    },
    "auto": {"weights.bits": "4", "activations.bits": "4", "activations.budget": BUDGET, "kv.bits": "4"},
}  # fmt: skip


def scheme_settings(scheme: str | None, budget: str | None) -> list[str]:
    """`key=value` settings of a recipe; none without a scheme.

    Raises:
        RotQuantError: no such scheme, or a budget without something to spend it on.
    """
    if scheme is not None and scheme not in SCHEMES:
        raise RotQuantError(f"--scheme {scheme}: take {', '.join(SCHEMES)}")
    if budget is not None and scheme != "auto":
        raise RotQuantError(f"--budget {budget}: it goes with --scheme auto, which spends it")
    chosen = SCHEMES[scheme] if scheme else {}
    return [f"{key}={value}" for key, value in (chosen | ({"activations.budget": budget} if budget else {})).items()]


# ---- what pays where --------------------------------------------------------------------------------

INT4_CORES = ((8, 0), (8, 6), (8, 9))  # of GPUs that multiply 4-bit integers faster than 8-bit ones
INT4_TARGETS = tuple(f"sm_{major}{minor}" for major, minor in INT4_CORES)
# What the kernels of int4 tensor cores (humming-kernels) read; others run as int8.
INT4_SETTINGS = {"activations.symmetric": "true", "weights.group_size": "0", "weights.rank": "0"}
SPEED = (
    "8-bit activations cost little speed where the kernels multiply in int8 anyway: on CPUs 0 to 30%, as measured; on"
    " GPUs from sm_90 on nothing is expected; on sm_80, 86 and 89 4-bit ones are faster with humming-kernels installed"
)


def target_settings(target: str | None, scheme: str | None) -> list[str]:
    """What makes the best of a device, as `key=value` settings; --scheme and --set win over them.

    Where 4-bit integers multiply faster, what their kernels read; elsewhere w4a8kv4, which costs little speed there. On
    a CPU lm_head has 8 bits, too: in bf16 a small model reads it for as long as all its layers.

    Raises:
        RotQuantError: no such target.
    """
    if target is None:
        return []
    if target not in TARGETS:
        raise RotQuantError(f"--target {target}: take {', '.join(TARGETS)}")
    fits = SCHEMES["w4a8kv4"] if scheme is None else {}
    if target in INT4_TARGETS:
        fits = {} if scheme == "w4a8kv4" else INT4_SETTINGS
    if target == "cpu":
        fits = fits | {"lm_head.bits": "8"}
    return [f"target={target}", *(f"{key}={value}" for key, value in fits.items())]


def suits(recipe: Recipe) -> str:
    """How the activations of a recipe run on its target, for the model card; nothing without a target."""
    bits, target = recipe.activations.bits, recipe.target
    if target == "none":
        return ""
    if bits == 8:
        return f"{target}: activations are multiplied in int8"
    if target not in INT4_TARGETS:
        return f"{target}: 4-bit activations are multiplied in int8 there; --scheme w4a8kv4 costs little speed"
    wrong = {
        "asymmetric activations": not recipe.activations.symmetric,
        "scales by group": recipe.weights.group_size,
        "a low-rank branch": recipe.weights.rank,
    }
    if faults := [what for what, there in wrong.items() if there]:
        return f"{target}: runs in int8 there, since int4 tensor cores do not take {', '.join(faults)}"
    return f"{target}: 4-bit activations on int4 tensor cores, with humming-kernels installed"


def pays_on_cpu(instructions: str) -> str:
    """Which scheme to take on a CPU, by its instructions as `rotquant doctor` lists them."""
    if "avx2" in instructions.split():  # whatever has AVX-512 has it
        return "w4a8kv4: more accurate; w4a4kv4 is served 0 to 30% faster, since both multiply in int8"
    return "w4a8kv4: more accurate, and both multiply in int8; their speeds were measured on x86 alone"


def pays_on_gpu(major: int, minor: int) -> str:
    """Which scheme to take on a GPU, by its compute capability."""
    if (major, minor) in INT4_CORES:
        return (
            f"w4a4kv4 or auto by --target sm_{major}{minor}, served with humming-kernels installed, which uses int4"
            " tensor cores; else w4a8kv4, as fast as w4a4kv4 in int8"
        )
    return "w4a8kv4: no int4 tensor cores here, so that 4-bit activations are multiplied in int8, no faster"
