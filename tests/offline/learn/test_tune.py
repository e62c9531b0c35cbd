"""Tuning the quantized model: it sees what is served, moves the loss down, and goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import rotquant
from rotquant.basis.sidecar import Basis
from rotquant.data import DATA
from rotquant.learn import tune as tuning
from rotquant.learn.distill import divergence
from rotquant.learn.names import dotted, key
from rotquant.learn.quantizers import fake_quantize
from rotquant.learn.steps import Steps
from rotquant.learn.tuned_layer import Rounded, Unpacking, transformed, with_gains
from rotquant.measure.evaluate import load_any
from rotquant.models import read_architecture, read_config
from rotquant.models.decoder import capped
from rotquant.pipeline import quantize
from rotquant.run import Settings, prepare, tuner
from rotquant_kernels import Stage
from rotquant_kernels.formats import RowFormat, WeightFormat
from source_models import file_hashes, source_model

EVERYTHING = (
    "tune={steps: 6, gain_lr: 0.02}", "weights.group_size=16", "weights.rank=4", "rotations.r2=hadamard",
    "activations.budget=2", "weights.wide_bits=8",
    "online={attn: [shift, greedy], o: [heads], mlp: [kronecker], down: [shift], block: 8}",
)  # fmt: skip
MIXTURE = ("tune={steps: 6, gain_lr: 0.02, routing: 1}", "scales.up=smooth", *EVERYTHING[4:6])
WINDOWS = {"samples": 4, "seq_len": 32}


def logits(folder: Path, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return load_any(folder)(tokens, use_cache=False).logits.flatten(0, 1)


def kept_models(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that are tuned from here on."""
    models: list[Any] = []

    class Kept(tuning.ServedModel):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            models.append(self)

    monkeypatch.setattr(tuning, "ServedModel", Kept)
    return models


@pytest.mark.parametrize(
    ("kind", "branch", "kv", "limit"),
    [  # of qwen3 with a cache 0.14; without R3 0.26, without the cache 0.29
        ("phi3", "svd", 16, 1e-3), ("phi3", "pca", 16, 1e-3), ("qwen3", "pca", 16, 1e-3),
        ("qwen2_moe", "svd", 16, 1e-3), ("qwen3", "svd", 4, 0.2), ("phi3", "svd", 4, 0.2),
    ],
)  # fmt: skip
def test_what_was_tuned_is_what_is_served(
    kind: str, branch: str, kv: int, limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages, groups, branches, biases, fused linears, norms of queries and keys, and clips, after they have moved; and
    experts, one of them shared.

    The served attention over a 4-bit cache rounds queries and softmax weights as well.
    """
    models = kept_models(monkeypatch)
    source = source_model(tmp_path / "model", kind, layers=1)
    every = MIXTURE if kind == "qwen2_moe" else EVERYTHING
    settings = (*(every if kv == 16 else every[:1]), f"kv.bits={kv}", f"weights.branch={branch}")
    settings += ("kv.key_feedback=true",) if kind == "phi3" and kv == 4 else ()
    out = quantize(str(source), tmp_path / "out", recipe="quarot", settings=settings, **WINDOWS)
    run = prepare(str(source), Settings("quarot", settings, samples=4, seq_len=32))
    assert run.calibrated
    with torch.no_grad():
        learned = models[0](run.calibrated.tokens) @ models[0].head.mT
    served = logits(out, run.calibrated.tokens)
    distance = (learned - served).norm(dim=-1) / served.norm(dim=-1)
    assert distance.median() < limit
    assert rotquant.load(out).config.rotquant["activation_clip"].keys() > {"default"}


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])  # gains, and gains that files hold less one
def test_what_moves_counts_as_the_checkpoint_holds_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, whose steps are coarser than those of tuning: else what is judged is not what is served."""
    models = kept_models(monkeypatch)
    source = source_model(tmp_path / "model", kind, layers=1, dtype=torch.bfloat16)
    settings = ("tune={steps: 6}", "online.shift_norms=all", "weights.rank=4", "kv.bits=16")
    out = quantize(str(source), tmp_path / "out", recipe="quarot", settings=settings, **WINDOWS)
    held = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    model, own, tokens = models[0], "model.layers.0.", torch.arange(32)[None]
    (layer,), offset = model.layers, model.job.arch.offset
    with torch.no_grad():
        learned = model(tokens)
        for name, gain in layer.gains.items():
            gain.copy_(held[f"{own}{dotted(name)}.weight"].float() + offset)
        model.gain.copy_(held["model.norm.weight"].float() + offset)
        assert torch.equal(model(tokens), learned)
        up = key("mlp.down_proj.low_rank_up")
        assert torch.equal(layer._low(up).bfloat16().T, held[f"{own}mlp.down_proj.low_rank_up"].T)
        stages = with_gains(layer.stages, layer.decoder.kind, layer.before, layer._gains())
    for site, linear in (("attn", "self_attn.v_proj.Attn"), ("mlp", "mlp.up_proj.Mlp")):
        (place,) = [i for i, stage in enumerate(stages[site]) if stage.kind == "shift"]
        assert torch.equal(stages[site][place].held, held[f"{own}{linear}{place}_input.weight"])
        assert not torch.allclose(stages[site][place].held, layer.stages[site][place].held.float(), rtol=1e-4)


@pytest.mark.parametrize("turn", [[], [Stage("hadamard", 16)], [Stage("hadamard", 12)]])
def test_a_shift_goes_along_with_the_gain_in_front_of_it(turn: list[Stage]) -> None:
    """(x' T - m') = (r (x - m T⁻¹)) T, also where a gain was zero; what comes behind other stages stays."""
    random = torch.Generator().manual_seed(0)
    kind = read_architecture(DATA / "demo").kinds[0]
    normed, mean, old, now = (torch.randn(48, generator=random) for _ in range(4))
    old[0] = 0
    chains = {
        "attn": [*turn, Stage("shift", 48, transformed(mean, turn))],
        "mlp": [Stage("dense", 48), Stage("shift", 48)],
    }
    moved = with_gains(chains, kind, dict.fromkeys(kind.gains, old), dict.fromkeys(kind.gains, now))
    assert moved["mlp"] == chains["mlp"]
    assert moved["attn"][:-1] == turn
    ratio = torch.where(old == 0, 1, now / old)
    expected = ratio * (normed * old - mean) + normed * (now - ratio * old)
    got = transformed(normed * now, turn) - moved["attn"][-1].held
    assert torch.allclose(got, transformed(expected, turn), atol=1e-4)


def test_tuning_brings_the_model_nearer_to_the_original(tmp_path: Path) -> None:
    """Weights rounded to nearest, and hardly anything else: what tuning can take back, however random the model."""
    source = source_model(tmp_path / "model", "qwen3")
    plain = ("weights.method=rtn", "weights.clip_search=false", "activations.bits=8", "kv.bits=16")
    settings = (*plain, "tune={steps: 30}")
    run = prepare(str(source), Settings("quarot", settings, samples=4, seq_len=32))
    assert run.calibrated
    exact, found = logits(source, run.calibrated.tokens), []
    for name, chosen in (("plain", plain), ("tuned", settings)):
        out = quantize(str(source), tmp_path / name, recipe="quarot", settings=chosen, **WINDOWS)
        found.append(divergence(logits(out, run.calibrated.tokens), exact, torch.eye(exact.shape[1])).item())
    assert found[1] < 0.8 * found[0]


def test_a_step_takes_as_many_tokens_of_long_windows(tmp_path: Path) -> None:
    source = source_model(tmp_path / "model", "qwen3")
    for tokens, shape in ((64, (12, 32)), (32, (6, 32)), (8, (6, 8))):
        settings = (f"tune={{steps: 6, tokens: {tokens}}}",)
        run = prepare(str(source), Settings("quarot", settings, samples=4, seq_len=32))
        assert tuner(run).tokens.shape == shape


def test_long_windows_are_cut_into_windows_of_which_none_is_left_out(tmp_path: Path) -> None:
    source = source_model(tmp_path / "model", "qwen3")
    settings = ("tune={steps: 8, tokens: 16, window: 8}",)
    run = prepare(str(source), Settings("quarot", settings, samples=4, seq_len=32))
    assert run.calibrated is not None
    assert run.calibrated.more is None
    found, every = tuner(run).tokens.tolist(), run.calibrated.tokens.view(16, 8).tolist()
    assert sorted(found) == sorted(every)
    assert found != every


def test_adapters_are_turned_for_the_gains_as_they_were_tuned(tmp_path: Path) -> None:
    source = source_model(tmp_path / "model", "qwen3")
    settings = ("tune={steps: 2, learns: [gains], gain_lr: 0.2}", "weights.bits=8")
    out = quantize(str(source), tmp_path / "out", recipe="quarot", settings=settings, **WINDOWS)
    basis = Basis.read(out, read_config(out))
    stored = {name: t for file in out.glob("model*.safetensors") for name, t in load_file(file).items()}
    for index, layer in enumerate(basis.transforms.layers):
        for scale, norm in ((layer.s_attn, "input_layernorm"), (layer.s_mlp, "post_attention_layernorm")):
            assert torch.equal(scale.float(), stored[f"model.layers.{index}.{norm}.weight"].float())
            assert (scale - 1).abs().max() > 0.1


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_model(tmp_path / "model", "mixtral")
    options: dict[str, Any] = {"recipe": "quarot", "settings": ("tune={steps: 5}",), **WINDOWS}
    quantize(str(source), tmp_path / "straight", **options)
    monkeypatch.setattr("rotquant.checkpoint.journal.SNAPSHOT_SECONDS", 0)
    advance = Steps.advance

    def stops(self: Steps) -> None:
        if self.done == 3:
            raise KeyboardInterrupt
        advance(self)

    with monkeypatch.context() as broken:
        broken.setattr(Steps, "advance", stops)
        with pytest.raises(KeyboardInterrupt):
            quantize(str(source), tmp_path / "stopped", **options)
    monkeypatch.setattr(tuning, "KEPT_BYTES", 0)  # the rest with activations that are computed anew
    quantize(str(source), tmp_path / "stopped", resume=True, **options)
    one, other = (file_hashes(tmp_path / name) for name in ("straight", "stopped"))
    assert {n: h for n, h in one.items() if n != "README.md"} == {n: h for n, h in other.items() if n != "README.md"}


def test_codes_unpacked_twice_give_the_gradient_of_a_product() -> None:
    torch.manual_seed(0)
    form = WeightFormat()
    codes = torch.randint(-8, 8, (6, 16))
    packed, grads = form.pack(codes.to(torch.int8)), []
    for function in ("own", "torch"):
        x = torch.linspace(-1, 1, 48).view(3, 16).requires_grad_()
        unpack = lambda packed: form.unpack(packed, 16).float().unflatten(1, (1, -1))  # noqa: E731
        out = Unpacking.apply(x, packed, unpack) if function == "own" else x @ codes.float().T
        out.square().sum().backward()
        grads.append((out.detach(), x.grad))
    assert all(torch.allclose(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_gradients_are_those_of_the_quantizers_at_fixed_extremes(symmetric: bool, half: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(7, 32), torch.randn(7, 32)
    rows = RowFormat(4, symmetric, torch.tensor(0.7).item(), torch.float16 if half else torch.float32)
    grads = []
    for function in ("own", "quantizers"):
        y, clip = x.clone().requires_grad_(), torch.tensor(0.7, requires_grad=True)
        out = Rounded.apply(y, rows, clip) if function == "own" else fake_quantize(x, rows, clip)
        (out * weight).sum().backward()
        grads.append((out.detach(), clip.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.allclose(grads[0][1], grads[1][1], atol=0.01)  # scales in float16


@pytest.mark.parametrize("cap", [None, 2.0])
def test_divergence_is_its_definition_and_has_its_gradient(cap: float | None) -> None:
    student, teacher, head = torch.randn(300, 8, requires_grad=True), torch.randn(300, 8), torch.randn(40, 8)
    loss = divergence(student, teacher, head, cap)
    loss.backward()
    p, q = (capped(rows @ head.T, cap).log_softmax(-1) for rows in (teacher, student))
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    assert torch.allclose(loss, wanted, rtol=1e-5)
    assert torch.allclose(student.grad, torch.autograd.grad(wanted, student)[0], atol=1e-6)
