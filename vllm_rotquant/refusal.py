"""What is registered as "rotquant" where rotquant cannot run: refuses its checkpoints, and only these.

Without it vLLM would take a W4A4 checkpoint for its own and serve 16-bit activations without a word.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from rotquant.checkpoint.claim import claims
from rotquant.errors import RotQuantError


def refusing_config(reason: str) -> type[QuantizationConfig]:
    """A quantization config class that raises RotQuantError(reason) when a checkpoint asks for rotquant."""

    class RefusingConfig(QuantizationConfig):
        def __init__(self) -> None:
            raise RotQuantError(reason)

        @classmethod
        def override_quantization_method(
            cls, hf_quant_cfg: dict[str, Any] | None, user_quant: str | None, hf_config: Any = None
        ) -> None:
            wanted = user_quant != "compressed-tensors" and claims(hf_quant_cfg, getattr(hf_config, "rotquant", None))
            if wanted or user_quant == "rotquant":
                raise RotQuantError(reason)

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> NoReturn:
            raise RotQuantError(reason)

        def get_name(self) -> Any:
            return "rotquant"

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return []

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> NoReturn:
            raise RotQuantError(reason)

    return RefusingConfig
