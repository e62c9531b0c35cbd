"""The families that rotquant knows: each a file beside this one, with its line here."""

from __future__ import annotations

from rotquant.models.architecture import Family
from rotquant.models.gemma import GEMMA2, GEMMA3
from rotquant.models.gemma4 import GEMMA4
from rotquant.models.granite import GRANITE, GRANITE4
from rotquant.models.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from rotquant.models.ministral import MINISTRAL, MINISTRAL3
from rotquant.models.moe import MIXTRAL, QWEN2_MOE, QWEN3_MOE
from rotquant.models.phi import PHI3
from rotquant.models.qwen35 import QWEN35
from rotquant.models.smollm3 import SMOLLM3

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    SMOLLM3,
    GRANITE,
    GRANITE4,
    PHI3,
    MINISTRAL,
    MINISTRAL3,
    QWEN3_MOE,
    QWEN2_MOE,
    MIXTRAL,
    QWEN35,
    GEMMA2,
    GEMMA3,
    GEMMA4,
)
BY_CLASS = {name: family for family in FAMILIES for name in family.classes}
KNOWN_BY_CLASS = {name: known for family in FAMILIES for name, known in family.classes.items()}
