"""A sample of `checkpoint_fuzz`'s single changes: each changes nothing, is refused in one line, or is a setting."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import rotquant
from checkpoint_fuzz import changes, checkpoints, edit, logits, outcome
from rotquant.errors import RotQuantError

SAMPLE = 40


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return checkpoints(tmp_path_factory.mktemp("originals"))


@pytest.mark.parametrize("kind", ["plain", "rich"])
def test_single_changes(kind: str, originals: dict[str, Path]) -> None:
    folder = originals[kind]
    expected = logits(folder)
    found = {c.what: outcome(folder, c, expected) for c in random.Random(7).sample(changes(folder), SAMPLE)}
    counts = Counter(found.values())
    assert not {what: result for what, result in found.items() if result.startswith("WRONG")}
    assert counts["refused"] > SAMPLE / 3
    assert counts["equal"] > 0


QUANTIZATION = "quantization_config"
GROUP = (QUANTIZATION, "config_groups", "group_0")
R3, R4 = ((QUANTIZATION, "transform_config", "config_groups", name) for name in ("R3", "R4"))
REFUSED = [
    (("rotquant", "format_version"), -1, "format_version is -1, expected 1"),
    (("rotquant", "format_version"), True, "format_version is True"),
    (("rotquant", "profile"), "fast", "profile is 'fast'"),
    (("rotquant", "profile"), "portable", "profile is 'portable', but the checkpoint has online transforms"),
    (("rotquant",), None, "rotquant is None, expected a dict"),
    (("rotquant", "activation_clip", "lm_head"), 0.5, "activation_clip.lm_head: this model has no quantized module"),
    ((*R3, "apply", 0, "targets"), ["re:.*attention$"], "transform_config.*'re:.*attention.' matches no module"),
    ((*R3, "apply", 1, "targets"), ["model.layers.0.self_attn"], "k_cache does not name model.layers.1.self_attn"),
    ((*R4, "apply", 0, "targets"), ["re:.*downproj$"], "online transform R4: targets: 're:.*downproj.' matches no"),
    ((*R4, "apply", 0, "target"), ["x"], "transform_config.config_groups.R4.apply.0.target: .*does not run"),
    ((*GROUP, "targets"), ["Lineer"], "config_groups.group_0.targets: 'Lineer' matches no module"),
    ((*GROUP, "weights", "num_bits"), "4", "group_0.weights.num_bits is '4'"),
    ((*GROUP, "weights", "scale"), 1, "group_0.weights.scale: .*does not run"),
    ((QUANTIZATION, "ignored"), [], "quantization_config.ignored: .*does not know"),
    ((QUANTIZATION, "ignore"), ["lm_heads"], "ignore: 'lm_heads' matches no module"),
    ((QUANTIZATION, "ignore"), ["re:.*proj$"], "group_0.targets|no layer is left|not quantized|quantizes no"),
    ((QUANTIZATION, "quantization_status"), "initialized", "quantization_status is 'initialized'"),
    ((QUANTIZATION, "quant_method"), "gptq", "quant_method is 'gptq'"),
    ((QUANTIZATION, "sparsity_config"), {"format": "2:4"}, "sparsity_config"),
    ((QUANTIZATION, "kv_cache_scheme", "symetric"), False, "kv_cache_scheme.symetric"),
    (("num_hidden_layers",), 1, "num_hidden_layers is 1, the tensors are made for 2"),
    (("num_hidden_layers",), 10**9, "num_hidden_layers is 1000000000, expected"),
    (("vocab_size",), 10**9, "vocab_size is 1000000000, expected"),
    (("rms_norm_eps",), 0.0, "rms_norm_eps is 0.0"),
    (("rope_parameters", "rope_theta"), float("nan"), "rope_theta is nan"),
    (("hidden_act",), "gelu", "hidden_act is 'gelu'"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=lambda part: str(part)[-40:])
def test_refused_by_name(
    path: tuple[Any, ...], value: object, message: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(originals["plain"], tmp_path / "changed")
    edit(path, value)(folder)
    with pytest.raises(RotQuantError, match=rf"config\.json: .*({message})"):
        rotquant.load(folder)
