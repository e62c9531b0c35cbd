"""Switches of the plugin: the key `rotquant` of vLLM's `--additional-config`, which vLLM takes to every worker.

    vllm serve OUT --additional-config '{"rotquant": {"cpu_tier": "avx2"}}'

Environment variables are the defaults, as the server's first process has them: they are read there and travel with the
quantization config, since Ray's actors and other nodes have variables of their own. A worker reads none of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rotquant.errors import RotQuantError

KEY = "rotquant"


@dataclass(frozen=True)
class Settings:
    """Everything that a user can switch.

    strict      whether a failed start-up check ends the server; ROTQUANT_STRICT=0 or 1
    cpu_tier    the native kernels on CPUs, "reference" for none; ROTQUANT_CPU_TIER
    cuda_linear who multiplies integers on CUDA devices, "auto" for Humming where it is installed and the GPU has int4
                tensor cores; ROTQUANT_CUDA_LINEAR
    """

    strict: bool = True
    cpu_tier: str = "auto"
    cuda_linear: str = "auto"

    def use(self) -> None:
        """Chooses the kernels of this process, before weights are prepared for them.

        Raises:
            RotQuantError: this machine does not have them.
        """
        import torch

        from rotquant_kernels import ops
        from rotquant_kernels.cuda import humming

        try:
            ops.choose_cpu_tier(self.cpu_tier)
            if torch.cuda.is_available():
                humming.choose(self.cuda_linear)
        except (OSError, ValueError) as error:
            raise RotQuantError(f"{error} (setting of --additional-config or of the environment)") from error


CHOICES: dict[str, tuple[Any, ...]] = {
    "strict": (True, False),
    "cpu_tier": ("auto", "amx", "avx512", "avxvnni", "avx2", "i8mm", "neon", "scalar", "reference"),
    "cuda_linear": ("auto", "triton", "humming"),
}
VARIABLES = {"strict": "ROTQUANT_STRICT", "cpu_tier": "ROTQUANT_CPU_TIER", "cuda_linear": "ROTQUANT_CUDA_LINEAR"}


def from_environment() -> dict[str, Any]:
    """What the variables of this process set.

    Raises:
        RotQuantError: naming the variable and what it can be.
    """
    found: dict[str, Any] = {}
    for name, variable in VARIABLES.items():
        text = os.environ.get(variable)
        if not text:
            continue
        values = {{True: "1", False: "0"}.get(choice, choice): choice for choice in CHOICES[name]}
        if text not in values:
            raise RotQuantError(f"the environment variable {variable} is {text!r}: it can be {', '.join(values)}")
        found[name] = values[text]
    return found


def from_additional_config(given: Any, defaults: Mapping[str, Any]) -> Settings:
    """The settings of a server.

    Args:
        given: the key `rotquant` of `--additional-config`, None where there is none.
        defaults: what `from_environment` found in the first process.
    Raises:
        RotQuantError: naming the key and what it can be.
    """
    where = f"--additional-config: {KEY}"
    if not isinstance(given, dict | None):
        raise RotQuantError(f"{where} is {given!r}: it must be an object of settings, such as " + '{"strict": false}')
    for name, value in (given or {}).items():
        if name not in CHOICES:
            raise RotQuantError(f"{where}.{name} is not a setting of rotquant; they are {', '.join(CHOICES)}")
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in CHOICES[name]):
            choices = ", ".join(str(choice).lower() for choice in CHOICES[name])
            raise RotQuantError(f"{where}.{name} is {value!r}: it can be {choices}")
    return Settings(**{**defaults, **(given or {})})
