"""rotquant in vLLM: `vllm serve CHECKPOINT` runs 4-bit weights, activations and KV cache for real.

vLLM calls `register` through the entry point `vllm.general_plugins`, once in every process. This module
must import anywhere: vLLM only logs a plugin that fails to import, and would then serve a W4A4
checkpoint with 16-bit activations and without its rotations.
"""

from __future__ import annotations

import socket
from typing import Any

# From, up to and not including; `run.py` and `rotquant doctor` read it here. A version belongs in it when
# tests/plugin/test_vllm_api.py holds the plugin against its record (tools/record_vllm_api.py) and the plugin's tests
# pass in it: in its build for CPUs, or in its Python sources on the extensions of an older one (tools/graft_vllm.py).
# A patch release is taken to be like its release.
SUPPORTED_VLLM = ((0, 28), (0, 34))


def register() -> None:
    """Registers the quantization method "rotquant". May be called any number of times.

    Where rotquant cannot run (vLLM too old or too new, a broken installation) other models are left
    alone, but a checkpoint that asks for rotquant is refused with the reason.
    """
    from vllm.logger import init_logger
    from vllm.model_executor.layers.quantization import register_quantization_config

    # vLLM shows only the loggers below its own name.
    logger = init_logger("vllm.rotquant")
    reason = unsupported_vllm()
    if reason is None:
        try:
            from vllm_rotquant.config import RotQuantConfig as Config
        except Exception as error:  # vLLM would stop, whatever model it serves
            reason = broken(error)
    if reason is not None:
        from vllm_rotquant.refusal import refusing_config

        logger.error("%s. Checkpoints quantized by rotquant will be refused.", reason)
        register_quantization_config("rotquant")(refusing_config(reason))
        return
    register_quantization_config("rotquant")(Config)
    logger.info("rotquant %s is active: it runs compressed-tensors W4A4 checkpoints", version())


def unsupported_vllm() -> str | None:
    """Why this vLLM is not supported, None where it is."""
    import vllm
    from packaging.version import Version

    low, high = SUPPORTED_VLLM
    if low <= Version(vllm.__version__).release[:2] < high:
        return None
    return (
        f"rotquant {version()} runs in vLLM {low[0]}.{low[1]} to {high[0]}.{high[1] - 1}, this is vLLM "
        f"{vllm.__version__}: install a vLLM of that range, or another rotquant"
    )


def broken(error: Exception) -> str:
    """What a user is told where the plugin does not import."""
    line = " ".join(str(error).split())
    return f"rotquant's vLLM plugin does not import ({line}): reinstall rotquant; `rotquant doctor` examines it"


def restored(sender: str, state: dict[str, Any]) -> Any:
    """The quantization config of a server in one of its workers, from the pickle that vLLM sends there.

    Args:
        sender: version of rotquant that made it.
    Raises:
        RotQuantError: this process does not have the same rotquant, or it does not work.
    """
    from rotquant.errors import RotQuantError

    if sender != version():
        raise RotQuantError(
            f"this worker ({socket.gethostname()}) has rotquant {version()}, the server's first process has {sender}: "
            "install the same version on every node"
        )
    reason = unsupported_vllm()
    if reason is None:
        try:
            from vllm_rotquant.config import RotQuantConfig
        except Exception as error:
            reason = broken(error)
    if reason is not None:
        raise RotQuantError(f"worker on {socket.gethostname()}: {reason}")
    return RotQuantConfig.from_state(state)


def vllm_requirement() -> str:
    """The supported versions as pip wants them."""
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED_VLLM)
    return f"vllm>={low},<{high}"


def version() -> str:
    """Version of the installed rotquant."""
    from importlib.metadata import version as installed

    return installed("rotquant")
