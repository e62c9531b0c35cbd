"""rotquant in vLLM: `vllm serve CHECKPOINT` runs 4-bit weights, activations and KV cache for real.

vLLM calls `register` through the entry point `vllm.general_plugins`, once in every process. This module
must import anywhere: vLLM only logs a plugin that fails to import, and would then serve a W4A4
checkpoint with 16-bit activations and without its rotations.
"""

from __future__ import annotations

import socket
from typing import Any

from vllm_rotquant.versions import SUPPORTED_VLLM, unsupported_vllm, version, vllm_requirement

__all__ = ["SUPPORTED_VLLM", "broken", "register", "restored", "unsupported_vllm", "version", "vllm_requirement"]


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
            Config = config_class()  # noqa: N806
        except Exception as error:  # vLLM would stop, whatever model it serves
            reason = broken(error)
    if reason is not None:
        from vllm_rotquant.refusal import refusing_config

        logger.error("%s. Checkpoints quantized by rotquant will be refused.", reason)
        register_quantization_config("rotquant")(refusing_config(reason))
        return
    register_quantization_config("rotquant")(Config)
    logger.info("rotquant %s is active: it runs compressed-tensors W4A4 checkpoints", version())


def config_class() -> Any:
    """The quantization config, which vLLM sends to its workers as a call of `restored`."""
    from vllm_rotquant.config import RotQuantConfig

    RotQuantConfig.restored = staticmethod(restored)
    return RotQuantConfig


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
            made: Any = config_class()
        except Exception as error:
            reason = broken(error)
    if reason is not None:
        raise RotQuantError(f"worker on {socket.gethostname()}: {reason}")
    return made.from_state(state)
