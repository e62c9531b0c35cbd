"""The vLLM plugin: what it claims, refuses, computes and proves.

Every `LLM(...)` runs in one child process, so that vLLM is imported once and this process stays clean.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import rotquant
import vllm_serving as serving
from checkpoints import (
    Spec,
    edit_tensors,
    edited,
    normalized_hadamard,
    prompts,
    quantization_config,
    without,
    write_checkpoint,
    write_plain,
)
from child import Child
from float_model import expected_logprobs
from lora_adapters import edit_adapter, merged, write_adapter
from online_extras import GATE_UP, Extras, everything
from rotquant.basis.turn_adapter import turn_folder
from rotquant.checkpoint import stored
from rotquant.checkpoint.format import Transform
from rotquant.errors import RotQuantError
from rotquant.pipeline import quantize
from rotquant_kernels import online_stage
from served_adapters import read_as_served, serve_with
from source_models import source_model
from vllm_rotquant.rotation import StoredInput, check_shard

pytestmark = pytest.mark.vllm

BASE = Spec()
WIDE = (  # activations of 8 bits
    *(f"model.layers.1.{name}_proj" for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.down")),
    *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")),
)
MIXED = Spec(kv=False, r3=False, r4="", wide=WIDE, wide_weights=WIDE[3:])  # of down, gate and up weights as well
PROMPTS = prompts((7, 33, 70))
# The native attention kernel is within 1% of exact arithmetic, which random models turn into other activation
# codes. Tests that compare with float64 leave it out; test_kv4_native holds it to its own bound.
EXACT = "exact attention"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "base", BASE)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with everything that only the key `rotquant` of config.json can say, and a stored R4."""
    spec = replace(BASE, r4="dense", extras=everything())
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "extended", spec)


@pytest.fixture(scope="module")
def served(child: Child, base: Path) -> serving.Served:
    """The base checkpoint, served without prefix caching and in one chunk."""
    return child(serving.serve, base, PROMPTS, enable_prefix_caching=False, max_num_batched_tokens=256)


def alike(ours: Tensor, theirs: Tensor) -> None:
    """The same to 1e-6, but where one activation code falls on the other side of a tie: that moves a token by 1e-3 to
    0.14. Ties differ by the processor, whose float32 products are summed in another order."""
    difference = (ours - theirs).abs()
    assert difference.median() < 1e-5
    assert difference.max() < 3e-1


def agrees(got: serving.Served, folder: Path, spec: Spec) -> None:
    expected = expected_logprobs(folder, spec, PROMPTS)
    for prompt, tokens, logprobs, rows in zip(PROMPTS, got.tokens, got.prompt_logprobs, expected, strict=True):
        alike(logprobs, rows[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0])
        assert tokens[0] == rows[-1].argmax()


def test_logprobs_are_those_of_float_arithmetic(child: Child, base: Path) -> None:
    agrees(child(serving.serve, base, PROMPTS, swap=EXACT), base, BASE)


@pytest.mark.parametrize(
    "spec",
    [
        replace(BASE, architecture="qwen3", group=64, r3=False, int8_head=True, extras=everything()),
        MIXED,
    ],
    ids=["qwen3, groups, int8 lm_head, no R3, everything else", "no KV scheme, no transforms, three schemes"],
)
def test_other_formats(child: Child, tmp_path: Path, spec: Spec) -> None:
    folder = write_checkpoint(tmp_path / "model", spec)
    got = child(serving.serve, folder, PROMPTS, swap=EXACT)
    agrees(got, folder, spec)
    assert ("KV cache: not quantized" in got.log) is not spec.kv
    for text in ("R4 hadamard 128 + K1 kronecker 32 + S2 shift + P3 permutation 128", "W4 A4 g64 rank 5"):
        assert (text in got.log) is bool(spec.r4)
    if spec.wide:  # each kind of layer has a row for each scheme, and `rotquant.load` computes the same
        proof = got.log[got.log.index("rotquant start-up check") :].splitlines()[2:]
        found = (re.search(r"^ *(\w+) +(\d) .* (W\d A\d)", line) for line in proof)
        kinds = {"qkv_proj": "W4 A8", "gate_up_proj": "W8 A8", "down_proj": "W8 A8"}
        mixed = {(kind, "1", bits) for kind, wide in kinds.items() for bits in ("W4 A4", wide)}
        assert {row.groups() for row in found if row} == mixed | {("o_proj", "2", "W4 A4")}
        model = rotquant.load(folder)
        for prompt, logprobs in zip(PROMPTS, got.prompt_logprobs, strict=True):
            with torch.inference_mode():
                own = model(torch.tensor([prompt])).logits[0, :-1].double().log_softmax(-1)
            assert (own.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0] - logprobs).abs().median() < 1e-5


def test_compiled(child: Child, tmp_path: Path) -> None:
    """torch.compile, with biases, asymmetric activations and KV, heads of 128, a stored matrix, an int8 head, and
    chains of every transform, low rank and ratios by layer."""
    spec = replace(
        BASE, architecture="qwen2", symmetric=False, r4="dense", head_dim=128, heads=2, kv_heads=1, int8_head=True,
        extras=everything(),
    )  # fmt: skip
    folder = write_checkpoint(tmp_path / "model", spec)
    got = child(serving.serve, folder, PROMPTS, enforce_eager=False, swap=EXACT)
    agrees(got, folder, spec)
    assert "Warming up model for the compilation" in got.log


def test_norms_quantize(child: Child, tmp_path: Path) -> None:
    """Where the GEMM reads quantized rows, as on a GPU: norms hand on integers, through torch.compile too, and of one
    layer less a shift."""
    spec = replace(BASE, architecture="qwen2", symmetric=False, extras=Extras([("S0", "shift", 0, GATE_UP)]))
    folder = write_checkpoint(tmp_path / "model", spec)
    got = child(serving.serve, folder, PROMPTS, enforce_eager=False, swap="norms quantize")
    agrees(got, folder, spec)
    rows = {line.split()[0]: line for line in got.log[got.log.index("rotquant start-up check") :].splitlines()[2:6]}
    in_front = {name: line.split(" A4 ")[1].split()[0] for name, line in rows.items()}
    assert in_front == {"qkv_proj": "rms_norm", "o_proj": "-", "gate_up_proj": "rms_norm", "down_proj": "silu_mul"}
    assert "Warming up model for the compilation" in got.log


def test_lora_keeps_separate_ops(child: Child, base: Path, served: serving.Served) -> None:
    """An adapter of down_proj reads the product of gate and up."""
    # No log-probabilities: vLLM's LoRA on CPUs fails where it scores several prompts in one step.
    got = child(serving.serve, base, PROMPTS, logprobs=False, enable_lora=True, max_lora_rank=8)
    down = next(line for line in got.log.splitlines() if line.strip().startswith("down_proj"))
    assert re.search(r"W4 A4 +- +R4 hadamard 128", down)
    assert got.tokens == served.tokens


def test_lora_of_the_original(child: Child, tmp_path: Path) -> None:
    """Turned as it is loaded, or before: what the merged original computes. Others are refused, the engine lives on."""
    folder = source_model(tmp_path / "m", "qwen2", hidden_size=128, intermediate_size=256, head_dim=32)
    fine = ["weights.bits=8", "activations.bits=8", "activations.clip=1", "kv.bits=16", "lm_head.bits=8"]
    scales = ["scales.norms=smooth", "scales.values=smooth", "scales.up=smooth", "scales.order=true"]
    out = quantize(str(folder), tmp_path / "out", recipe="quarot", settings=fine + scales, samples=4, seq_len=64)
    original = AutoModelForCausalLM.from_pretrained(folder).eval()
    patterns = {"use_rslora": True, "rank_pattern": {"k_proj": 6}, "alpha_pattern": {"up_proj": 3}}
    own = write_adapter(tmp_path / "own", original, size=0.5, **patterns)
    turned = turn_folder(own, out, tmp_path / "turned")
    for name, config in (("other", {"rotquant_basis": "0" * 64}), ("dora", {"use_dora": True})):
        edit_adapter(shutil.copytree(turned, tmp_path / name), config=config)
    large = write_adapter(tmp_path / "large", original, r=16)
    adapters = [None, own, tmp_path / "other", tmp_path / "dora", large, turned, None]
    before, first, other, dora, rank, second, after = child(serve_with, out, adapters, PROMPTS)
    assert "other/adapter_config.json: rotquant_basis: this adapter was turned for another checkpoint" in other
    assert "use_dora is True" in dora
    assert "has rank 16, and the server takes up to 8: serve with --max-lora-rank 16" in rank
    logprobs = []
    for model in (original, merged(original, own)):
        logits = [model(torch.tensor([prompt])).logits[0, :-1].double().log_softmax(-1) for prompt in PROMPTS]
        logprobs.append([x.gather(1, torch.tensor(p[1:])[:, None])[:, 0] for p, x in zip(PROMPTS, logits, strict=True)])
    plain, adapted = (torch.cat(found).detach() for found in logprobs)
    apart = (adapted - plain).norm()
    for found, expected in ((before, plain), (first, adapted), (second, adapted), (after, plain)):
        assert (torch.cat(found) - expected).norm() < 0.1 * apart
    assert (torch.cat(first) - torch.cat(second)).norm() < 1e-2 * apart


def test_lora_without_a_basis(child: Child, tmp_path: Path, base: Path) -> None:
    """A checkpoint that keeps no basis refuses adapters; those of other models are vLLM's own business."""
    with pytest.raises(RotQuantError, match=r"rotquant.basis is missing: .* quantize the original again"):
        child(read_as_served, base, tmp_path)
    assert child(read_as_served, write_plain(tmp_path / "plain", BASE), tmp_path) is None


def test_stored_matrix_equals_hadamard(child: Child, tmp_path: Path, base: Path) -> None:
    def stored(config: dict[str, Any]) -> None:
        config["quantization_config"]["transform_config"]["config_groups"]["R4"]["type"] = "random-matrix"

    folder, matrix = edited(base, tmp_path / "dense", stored), normalized_hadamard(BASE.r4_block).to(BASE.dtype)
    names = [f"model.layers.{i}.mlp.down_proj.R4_input.weight" for i in range(BASE.layers)]
    edit_tensors(folder, lambda tensors: tensors.update({name: matrix.clone() for name in names}))
    got, expected = (child(serving.serve, path, PROMPTS, swap=EXACT) for path in (folder, base))
    assert got.tokens == expected.tokens
    for ours, theirs in zip(got.prompt_logprobs, expected.prompt_logprobs, strict=True):
        alike(ours, theirs)


def test_prefix_caching_and_chunked_prefill(child: Child, base: Path, served: serving.Served) -> None:
    got = child(
        serving.serve, base, PROMPTS, rounds=2, logprobs=False, enable_prefix_caching=True, max_num_batched_tokens=32
    )
    assert got.tokens == served.tokens
    assert got.cached_tokens == sum(len(prompt) // 32 * 32 for prompt in PROMPTS)


def test_preemption(child: Child, base: Path) -> None:
    """Six pages for three sequences that end up needing three each: some are evicted and start again."""
    requests = prompts((40, 41, 42), seed=1)
    page = 32 * 68 * BASE.kv_heads * BASE.layers
    options = {"max_tokens": 40, "logprobs": False, "enable_prefix_caching": False, "max_model_len": 96}
    roomy = child(serving.serve, base, requests, **options)
    # vLLM keeps one page for itself.
    tight = child(serving.serve, base, requests, kv_cache_memory_bytes=7 * page, **options)
    assert roomy.preemptions == 0 < tight.preemptions
    assert tight.tokens == roomy.tokens


@pytest.mark.parametrize(("head_dim", "ratio"), [(64, 3.7), pytest.param(128, 3.8, marks=pytest.mark.release)])
def test_cache_holds_more_tokens(child: Child, tmp_path: Path, head_dim: int, ratio: float) -> None:
    spec = replace(BASE, layers=1, head_dim=head_dim, heads=2, kv_heads=1, r4="", dtype=torch.bfloat16)
    options = {"max_tokens": 1, "dtype": "bfloat16", "logprobs": False}
    ours = child(serving.serve, write_checkpoint(tmp_path / "ours", spec), PROMPTS[:1], **options)
    theirs = child(serving.serve, write_plain(tmp_path / "theirs", spec), PROMPTS[:1], **options)
    assert ours.cache_tokens / theirs.cache_tokens >= ratio
    assert "rotquant start-up check" not in theirs.log


def test_proof_names_what_runs(served: serving.Served) -> None:
    block = served.log[served.log.index("rotquant start-up check") :].splitlines()
    rows = {line.split()[0]: line for line in block[2:9]}
    assert list(rows) == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "attention", "rotary", "decoder"]
    assert "W4 A4" in rows["qkv_proj"]
    assert re.search(r"W4 A4 +silu_mul +R4 hadamard 128", rows["down_proj"])
    assert "rms_norm" not in rows["qkv_proj"]  # the native GEMM does not read quantized rows
    assert "R3 hadamard 64" in rows["attention"]
    assert re.search(r"rotary +2 +vLLM +float32 +- +positions to 256 +0\.00%", block[7])
    assert block[9] == "  KV cache: 272 bytes a token, 1024 in bfloat16 (3.76x)"
    assert block[10] == "  not quantized: lm_head (1)"


@pytest.mark.parametrize(
    ("swap", "where"),
    [
        ("no transform", "down_proj"),
        ("no silu", "down_proj"),
        ("16-bit activations", "qkv_proj"),
        ("unrotated query", "attn"),
        ("norms quantize without residual", "qkv_proj"),
        ("norms quantize without shift", "gate_up_proj"),
    ],
)
def test_proof_catches_a_wrong_kernel(child: Child, base: Path, tmp_path: Path, swap: str, where: str) -> None:
    if "shift" in swap:
        base = write_checkpoint(tmp_path / "model", replace(BASE, extras=Extras([("S0", "shift", 0, GATE_UP)])))
    with pytest.raises(RotQuantError, match=rf"start-up check failed: model.layers.0.*{where}.*ROTQUANT_STRICT=0"):
        child(serving.serve, base, PROMPTS, swap=swap)


@pytest.mark.parametrize(
    ("swap", "where"),
    [
        ("no low rank", "qkv_proj"),
        ("no subtraction", "gate_up_proj"),
        ("no shift", "gate_up_proj"),
        ("no bias", "o_proj"),
        ("no key feedback", "attn"),
    ],
)
def test_proof_catches_what_is_left_out(child: Child, extended: Path, swap: str, where: str) -> None:
    with pytest.raises(RotQuantError, match=rf"start-up check failed: model.layers.0.*{where} on kernel"):
        child(serving.serve, extended, PROMPTS, swap=swap)


def test_rounded_float32_products_are_refused(child: Child, base: Path, extended: Path, served: serving.Served) -> None:
    """Where they serve: chains of transforms are plain torch; the base checkpoint has none of them."""
    with pytest.raises(RotQuantError, match=r"online transforms are float32 products.*FLOAT32_MATMUL_PRECISION"):
        child(serving.serve_with_rounded_products, extended, PROMPTS)
    got = child(serving.serve_with_rounded_products, base, PROMPTS, logprobs=False)
    assert len(got.tokens) == len(served.tokens)


def test_a_batch_changes_no_bit(child: Child, tmp_path: Path) -> None:
    """Logits of a prompt alone and among others, prefilled whole and beside sequences that decode."""
    folder = write_checkpoint(tmp_path / "model", replace(BASE, int8_head=True, extras=everything()))
    options = {"enable_prefix_caching": False, "logprobs_mode": "raw_logits", "max_num_batched_tokens": 256}
    together, alone = (child(serving.serve, folder, PROMPTS, max_num_seqs=n, **options) for n in (len(PROMPTS), 1))
    assert together.tokens == alone.tokens
    assert all(torch.equal(*pair) for pair in zip(together.prompt_logprobs, alone.prompt_logprobs, strict=True))


@pytest.mark.parametrize(("on_cpu", "why"), [(True, "written in Triton.*same bits in every batch"), (False, "on GPUs")])
def test_batch_invariant_mode_is_refused(child: Child, base: Path, on_cpu: bool, why: str) -> None:
    with pytest.raises(RotQuantError, match=f"^VLLM_BATCH_INVARIANT=1: .*{why}"):
        child(serving.quantization_with, {"VLLM_BATCH_INVARIANT": "1"}, base, on_cpu=on_cpu)
    assert child(serving.quantization_with, {"VLLM_BATCH_INVARIANT": "0"}, base, on_cpu=on_cpu) == "rotquant"


def test_dummy_weights(child: Child, extended: Path, tmp_path: Path) -> None:
    """--load-format dummy, as benchmarks use it: no tensor in the folder, random valid layers, a loud warning."""
    (tmp_path / "config.json").write_bytes((extended / "config.json").read_bytes())
    got = child(serving.serve, tmp_path, PROMPTS, load_format="dummy")
    assert "RANDOM WEIGHTS" in got.log
    assert "MISMATCH" not in got.log
    assert re.search(r"down_proj +2 +native \(\w+\)  ", got.log)  # a stage of every kind has a kernel
    assert all(logprobs.isfinite().all() for logprobs in got.prompt_logprobs)
    assert [len(tokens) for tokens in got.tokens] == [4] * len(PROMPTS)


def test_proof_not_strict(child: Child, base: Path, served: serving.Served) -> None:
    got = child(serving.serve_unstrict, base, PROMPTS[:1], max_tokens=1, swap="no transform")
    assert "MISMATCH" in got.log
    assert "start-up check failed" in got.log
    assert "MISMATCH" not in served.log


# ---- claims and refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", [None, "rotquant"])
def test_claims_its_checkpoints(child: Child, base: Path, flag: str | None) -> None:
    assert child(serving.quantization_of, base, flag) == "rotquant"


def test_leaves_the_choice_of_vllm_s_own_path(child: Child, base: Path) -> None:
    assert child(serving.quantization_of, base, "compressed-tensors") == "compressed-tensors"


def foreign(kind: str) -> dict[str, Any]:
    """quantization_config of a compressed-tensors checkpoint that is not ours."""
    config = quantization_config(replace(BASE, kv=False, r3=False, r4=""))
    group = config["config_groups"]["group_0"]
    if kind == "W4A16":
        group["input_activations"] = None
    else:
        group["weights"] |= {"num_bits": 8, "type": "float"}
        group["input_activations"] |= {"num_bits": 8, "type": "float"}
        group["format"] = config["format"] = "float-quantized"
    return config


def make_foreign(config: dict[str, Any], kind: str) -> None:
    """Turns config.json into that of another tool."""
    del config["rotquant"]
    config["quantization_config"] = foreign(kind)


@pytest.mark.parametrize("kind", ["W4A16", "FP8"])
def test_leaves_other_checkpoints_alone(child: Child, base: Path, tmp_path: Path, kind: str) -> None:
    folder = edited(base, tmp_path / "other", lambda config: make_foreign(config, kind))
    assert child(serving.quantization_of, folder, None) == "compressed-tensors"
    with pytest.raises(RotQuantError, match=r"--quantization rotquant: this checkpoint .quant_method 'compressed-ten"):
        child(serving.quantization_of, folder, "rotquant")


def test_flag_on_an_unquantized_model(child: Child, base: Path, tmp_path: Path) -> None:
    folder = edited(base, tmp_path / "bare", lambda config: config.pop("quantization_config"))
    assert child(serving.quantization_of, folder, None) is None
    with pytest.raises(RotQuantError, match=r"this checkpoint is not quantized.*rotquant quantize MODEL"):
        child(serving.quantization_of, folder, "rotquant")


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer format": (lambda c: c["rotquant"].update(format_version=2), "rotquant.format_version is 2"),
    "unknown feature": (lambda c: c["rotquant"].update(ternary={}), "rotquant.ternary"),
    "unknown transform": (
        lambda c: c["quantization_config"]["transform_config"]["config_groups"]["R4"].update(type="fourier"),
        "config_groups.R4.*type",
    ),
    "asymmetric weights": (
        lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(symmetric=False),
        "group_0.weights.symmetric is False",
    ),
    "KV of 2 bits": (
        lambda c: c["quantization_config"]["kv_cache_scheme"].update(num_bits=2),
        "kv_cache_scheme.num_bits is 2",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_refuses_by_field(child: Child, base: Path, tmp_path: Path, name: str) -> None:
    change, message = CHANGES[name]
    with pytest.raises(RotQuantError, match=message):
        child(serving.quantization_of, edited(base, tmp_path / "changed", change), None)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"logits_soft_cap": 30.0}, "a soft cap of 30.0 on scores, which is None in transformers"),
        ({"alibi_slopes": [0.5] * 4}, "ALiBi"),
        ({"sinks": torch.zeros(4)}, "attention sinks"),
        ({"attn_type": "encoder_only"}, "attention of type encoder_only"),
        ({"cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_refuses_attention(child: Child, base: Path, features: dict[str, Any], message: str) -> None:
    with pytest.raises(RotQuantError, match=f"self_attn.attn: .*{message}"):
        child(serving.build_attention, base, **features)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.self_attn.k_proj.weight_scale", r"1.self_attn.qkv_proj.weight_scale is missing.*128 of 512"),
        ("model.layers.1.mlp.down_proj.weight_packed", r"1.mlp.down_proj.weight_packed is missing.*256 of 256 rows"),
        ("model.layers.1.mlp.down_proj.R4_input.weight", r"1.mlp.down_proj.R4_input.weight is missing.*1 of 1"),
        ("model.layers.1.mlp.up_proj.S0_input.weight", r"1.mlp.gate_up_proj.S0_input.weight is missing.*1 of 2 parts"),
        ("model.layers.1.mlp.up_proj.S0_output.weight", r"1.mlp.gate_up_proj.S0_output.weight is missing"),
        ("model.layers.1.self_attn.k_proj.low_rank_up", r"1.self_attn.qkv_proj.low_rank_up is missing"),
    ],
)
def test_refuses_a_missing_tensor(child: Child, extended: Path, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(RotQuantError, match=message):
        child(serving.serve, without(extended, tmp_path / "cut", name), PROMPTS)


def test_marker_must_be_the_declared_hadamard() -> None:
    marker = StoredInput("down_proj.R4_input.weight", Transform("hadamard", 4, "R4"), 8, slice(0, 8), parts=1)
    marker.load(marker.weight, normalized_hadamard(4).bfloat16())
    assert marker.take(dummy=False) is None
    with pytest.raises(RotQuantError, match=r"down_proj.R4_input.weight is not the Hadamard matrix"):
        marker.load(marker.weight, torch.eye(4))


def test_parts_of_a_fused_layer_store_one_transform() -> None:
    receiver = StoredInput("qkv_proj.T0_input.weight", Transform("dense", 4, "T0"), 8, slice(0, 8), parts=3)
    receiver.load(receiver.weight, torch.eye(4), "q")
    with pytest.raises(RotQuantError, match=r"qkv_proj.T0_input.weight is missing.*2 of 3 parts"):
        receiver.take(dummy=False)
    with pytest.raises(RotQuantError, match=r"parts of this fused layer store different tensors"):
        receiver.load(receiver.weight, -torch.eye(4), "k")


@pytest.mark.parametrize(
    ("kind", "block", "most"),
    [("hadamard", 128, 2), ("dense", 64, 4), ("reflection", 128, 2), ("permutation", 128, 2), ("permutation", 0, 1),
     ("kronecker", 16, 1), ("shift", 0, 8)],
)  # fmt: skip
def test_a_rank_must_hold_all_that_a_transform_mixes(kind: str, block: int, most: int) -> None:
    """`most` ranks of a row-parallel layer of 256 inputs can run it."""
    transform = Transform(kind, block, "T0")
    check_shard("down_proj", transform, 256 // most, 256)
    message = rf"down_proj: the online transform T0 {kind}.*inputs of a rank at --tensor-parallel-size {2 * most}: use"
    if kind != "shift":
        with pytest.raises(RotQuantError, match=message):
            check_shard("down_proj", transform, 256 // most // 2, 256)


def factors(inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(inputs, 3), torch.randn(3, outputs)


def test_low_rank_of_ranks_is_that_of_the_whole(child: Child) -> None:
    """q of four heads over four ranks, k and v of two heads, each shared by two ranks; then a row-parallel layer."""
    x, parts = torch.randn(5, 6), {"q": factors(6, 8), "k": factors(6, 4), "v": factors(6, 4)}
    q, k, v = (x @ down @ up for down, up in parts.values())
    for rank in range(4):
        down, up = child(serving.factors_of_rank, rank, 4, slice(0, 6), [2, 2, 2], parts)
        head = slice(rank // 2 * 2, rank // 2 * 2 + 2)
        torch.testing.assert_close(x @ down @ up, torch.cat((q[:, 2 * rank : 2 * rank + 2], k[:, head], v[:, head]), 1))
    down, up = factors(6, 8)
    shards = [child(serving.factors_of_rank, i, 2, slice(3 * i, 3 * i + 3), [8], {"": (down, up)}) for i in range(2)]
    summed = sum(x[:, 3 * i : 3 * i + 3] @ d @ u for i, (d, u) in enumerate(shards))
    torch.testing.assert_close(summed, x @ down @ up)
    with pytest.raises(RotQuantError, match=r"layer.low_rank_up has shape \[3, 7\], config.json asks for \[3, 8\]"):
        child(serving.factors_of_rank, 0, 2, slice(0, 3), [8], {"": factors(6, 7)})


def test_directions_are_shared_by_parts_and_no_rank_crosses_them(child: Child) -> None:
    """What is taken off the inputs before they are rounded: once for q, k and v, and whole on every rank."""
    x, down = torch.randn(5, 6), torch.randn(6, 3)
    parts = {name: (down, torch.randn(3, width)) for name, width in (("q", 8), ("k", 4), ("v", 4))}
    got, up = child(serving.factors_of_rank, 1, 2, slice(0, 6), [4, 2, 2], parts, subtracts=True)
    assert torch.equal(got, down)
    q, k, v = (u for _, u in parts.values())
    assert torch.equal(up, torch.cat((q[:, 4:], k[:, 2:], v[:, 2:]), 1))
    with pytest.raises(RotQuantError, match=r"layer.low_rank_down: the parts of this fused layer store different dir"):
        child(serving.factors_of_rank, 0, 1, slice(0, 6), [8, 4, 4], parts | {"k": (down + 1, parts["k"][1])}, True)
    within = torch.block_diag(torch.randn(3, 1), torch.randn(3, 2))
    up = torch.randn(3, 8)
    shards = [slice(3 * i, 3 * i + 3) for i in range(2)]
    halves = [
        child(serving.factors_of_rank, i, 2, shard, [8], {"": (within, up)}, True) for i, shard in enumerate(shards)
    ]
    taken = [x[:, shard] @ d @ d.T for shard, (d, _) in zip(shards, halves, strict=True)]
    torch.testing.assert_close(torch.cat(taken, 1), x @ within @ within.T)
    with pytest.raises(
        RotQuantError, match=r"layer.low_rank_down: a direction that .* crosses.*or quantize .* --tp-max"
    ):
        child(serving.factors_of_rank, 0, 2, slice(0, 3), [8], {"": (down, up)}, True)


def test_feedback_of_ranks_is_that_of_their_keys(child: Child) -> None:
    """Two KV heads of 3 channels: whole, one a rank, and each shared by two ranks; q, k and v as one layer, or k."""
    whole = torch.randn(6, 3)
    for ranks, heads in ((1, [0, 1]), (2, [0]), (2, [1]), (4, [0]), (4, [1])):
        rank = 0 if ranks == 1 else heads[0] * ranks // 2 + ranks // 4
        width = 3 * len(heads)
        got = [child(serving.feedback_of_rank, rank, ranks, parts, whole) for parts in ([6, width, width], [width])]
        for found in got:
            assert torch.equal(found, whole.view(2, 3, 3)[heads])
    with pytest.raises(RotQuantError, match=r"layer.key_feedback has shape \[3, 3\], config.json asks for \[6, 3\]"):
        child(serving.feedback_of_rank, 0, 2, [6, 3, 3], torch.randn(3, 3))
    with pytest.raises(RotQuantError, match=r"layer.key_feedback is missing from the checkpoint"):
        child(serving.feedback_of_rank, 0, 1, [6, 6, 6], torch.full((6, 3), torch.nan))


@pytest.mark.parametrize("transform", [Transform("permutation", 4, "T0"), Transform("shift", 0, "T0")])
def test_ranks_run_their_part_of_a_stored_transform(transform: Transform) -> None:
    whole, x = stored.sample(transform, 16), torch.randn(3, 16)
    assert whole is not None
    parts = []
    for inputs in (slice(0, 8), slice(8, 16)):
        receiver = StoredInput("down_proj.T0_input.weight", transform, 16, inputs, parts=1)
        receiver.load(receiver.weight, whole)
        parts.append(online_stage(x[:, inputs], transform.kind, transform.block, receiver.take(dummy=False)))
    assert torch.equal(torch.cat(parts, 1), online_stage(x, transform.kind, transform.block, whole))


def test_fused_layers_need_one_format(child: Child, base: Path, tmp_path: Path) -> None:
    clip = {"default": 0.9, "model.layers.1.self_attn.k_proj": 0.5}
    folder = edited(base, tmp_path / "clip", lambda config: config["rotquant"].update(activation_clip=clip))
    assert child(serving.format_of, folder, "model.layers.0.self_attn.qkv_proj").rows.clip == 0.9
    with pytest.raises(RotQuantError, match=r"1.self_attn.qkv_proj: vLLM runs .* as one layer, but their formats"):
        child(serving.format_of, folder, "model.layers.1.self_attn.qkv_proj")


def test_follows_vllm_s_renaming(child: Child, base: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj"
    ours = {
        "activation_clip": {"default": 0.9, name: 0.5},
        "kv_clip": {"layers": {"model.layers.1.self_attn": {"key": 0.5}}},
        "input_transforms": [{"name": "T0", "kind": "shift", "targets": [name]}],
        "low_rank": [{"rank": 3, "targets": [name]}],
    }
    folder = edited(base, tmp_path / "clip", lambda config: config["rotquant"].update(ours))
    renaming = {"model.": "language.model."}
    renamed = child(serving.format_of, folder, f"language.{name}", renaming)
    assert (renamed.rows.clip, renamed.rank, renamed.transforms[-1].kind) == (0.5, 3, "shift")
    attention = child(serving.format_of, folder, "language.model.layers.1.self_attn", renaming, attention=True)
    assert (attention.k_clip, attention.v_clip) == (0.5, 1.0)


@pytest.mark.parametrize("version", ["0.27.1", "0.34.0"])
def test_other_vllm_versions(child: Child, base: Path, tmp_path: Path, version: str) -> None:
    with pytest.raises(RotQuantError, match=f"runs in vLLM 0.28 to 0.33, this is vLLM {version}"):
        child(serving.quantization_under, version, base, None)
    other = edited(base, tmp_path / "other", lambda config: make_foreign(config, "W4A16"))
    assert child(serving.quantization_under, version, other, None) == "compressed-tensors"
