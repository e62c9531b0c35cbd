"""Serves a checkpoint and gives back plain data. Runs in a process of its own: vLLM binds threads and
replaces functions of torch."""

from __future__ import annotations

import contextlib
import gc
import inspect
import logging
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rotquant_kernels import backends, calls, convention, online, ops, reference

DEFAULTS = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "float32",
    "kv_cache_memory_bytes": 1 << 23,
    "max_model_len": 256,
    "block_size": 32,
    "disable_log_stats": False,
}


@dataclass
class Served:
    """What one `LLM(...)` gave back, as plain data."""

    tokens: list[list[int]]
    prompt_logprobs: list[Tensor]  # of each prompt's own tokens but the first
    log: str
    cached_tokens: int
    preemptions: int
    again: list[list[int]] = field(default_factory=list)  # the tokens where prefixes may come from the cache

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache holds, from vLLM's own log line."""
        found = re.search(r"KV cache size: ([\d,]+) tokens", self.log)
        assert found, self.log
        return int(found[1].replace(",", ""))


def prepare() -> None:
    """Imports vLLM before any test and keeps its many objects out of every later garbage collection.

    What a class of models can do vLLM asks a new process, which imports all of it again; here this one answers.
    """
    from vllm import LLM  # noqa: F401
    from vllm.model_executor.models import registry

    mock.patch.object(registry, "_run_in_subprocess", lambda answer: answer()).start()
    gc.freeze()


def serve(
    folder: Path,
    prompts: list[list[int]],
    max_tokens: int = 4,
    rounds: int = 1,
    logprobs: bool = True,
    swap: str = "",
    again: bool = False,
    **options: Any,
) -> Served:
    """Serves a checkpoint in this process, greedily; the prompts `rounds` times, the last round counts.

    Log-probabilities of a prompt keep vLLM from taking its pages from the cache: with `again` it is asked once more,
    without them, and `cached_tokens` are those of that time.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    arguments: Any = DEFAULTS | options
    parameters = SamplingParams(
        max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False, prompt_logprobs=0 if logprobs else None
    )
    requests: Any = [{"prompt_token_ids": p} for p in prompts]
    # vLLM compiles small functions of its sampler even where the model runs eagerly.
    stance = torch.compiler.set_stance("force_eager" if arguments["enforce_eager"] else "default")
    with captured_log() as log, swapped(swap), stance:
        try:
            llm = LLM(str(folder), **arguments)
            for _ in range(rounds):
                outputs = llm.generate(requests, parameters, use_tqdm=False)
            cached = outputs
            if again:
                plain = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False)
                cached = llm.generate(requests, plain, use_tqdm=False)
            counters = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
            del llm
        finally:
            tear_down()
    return Served(
        [list(o.outputs[0].token_ids) for o in outputs],
        [own_logprobs(p, o.prompt_logprobs) for p, o in zip(prompts, outputs, strict=True)] if logprobs else [],
        "\n".join(log),
        sum(o.num_cached_tokens or 0 for o in cached),
        int(counters["vllm:num_preemptions"]),
        [list(o.outputs[0].token_ids) for o in cached] if again else [],
    )


def own_logprobs(prompt: list[int], entries: Any) -> Tensor:
    rows = zip(entries[1:], prompt[1:], strict=True)
    return torch.tensor([entry[token].logprob for entry, token in rows], dtype=torch.float64)


def tear_down() -> None:
    """Frees what vLLM keeps in a process, so that the next `LLM` can start."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


@contextlib.contextmanager
def captured_log() -> Iterator[list[str]]:
    """The messages of vLLM's loggers; taken from the loggers, since vLLM replaces its handlers on the way."""
    lines: list[str] = []
    handle = logging.Logger.handle

    def keep(logger: logging.Logger, record: logging.LogRecord) -> None:
        if record.name.startswith("vllm"):
            lines.append(record.getMessage())
        handle(logger, record)

    with mock.patch.object(logging.Logger, "handle", keep):
        yield lines


Kernels = dict[tuple[Any, str], Callable[..., Any]]


def changed(function: Callable[..., Any], **others: Any) -> Callable[..., Any]:
    """The function with other values for some of its parameters, whatever it is given."""
    signature = inspect.signature(function)

    def call(*given: Any) -> Any:
        bound = signature.bind(*given)
        bound.arguments |= others
        return function(*bound.args)

    return call


@contextlib.contextmanager
def swapped(how: str) -> Iterator[None]:
    """Runs with another kernel: attention in exact arithmetic, or one wrong in a way that still gives fluent text."""

    def sixteen_bit_activations(
        x: Tensor, weight: Tensor, scale: Tensor, bias: Any, weights: Any, stage: Any, rows: Any, down: Any, up: Any,
        silu_mul: bool, low_rank_subtracts: bool,
    ) -> Tensor:  # fmt: skip
        y = reference.turned(convention.silu_mul(x) if silu_mul else x, *stage)
        codes = weights.unpack(weight, y.shape[-1])
        return (y @ weights.dequantize(codes, scale).t() + (0 if bias is None else bias)).to(x.dtype)

    def unrotated_query(
        query: Tensor, cache: Tensor, starts: Tensor, lens: Tensor, table: Tensor, out: Tensor, scale: float, kv: Any,
        window: int | None, cap: float | None,
    ) -> None:  # fmt: skip
        attention(query, cache, starts, lens, table, out, scale, replace(kv, rotate=0), window, cap)

    def window_changed(by: int) -> Callable[..., None]:
        return lambda *given: attention(*given[:-2], given[-2] and given[-2] + by, given[-1])

    def no_silu(x: Tensor, *rest: Any) -> Tensor:
        *others, silu_mul, subtracts = rest
        gate, up = x.chunk(2, -1) if silu_mul else (1, x)
        return linear(gate * up, *others, False, subtracts)

    def no_residual(x: Tensor, residual: Any, *rest: Any) -> Any:
        return *reference.rms_norm_quantize(x, None, *rest)[:3], x + residual

    def no_shift_of_norms(*given: Any) -> Any:
        return reference.rms_norm_quantize(*given[:-1], None)

    def no_shift(x: Tensor, kind: str, block: int, tensor: Any) -> Tensor:
        return x.float() if kind == "shift" else ops.online_stage(x, kind, block, tensor)

    linear, attention = calls.int_linear, calls.kv_attention
    # What runs on a device whose GEMM reads quantized rows, as GPUs do: norms quantize.
    norms: Kernels = {
        (ops, "prepare_linear"): lambda packed, *_: ops.Prepared(packed.clone(), backends.REFERENCE, "reference"),
        (ops, "int_linear"): reference.int_linear,
        (ops, "kv4_attention"): reference.kv4_attention,
    }
    wrong: dict[str, Kernels] = {
        "": {},
        "norms quantize": norms,
        "norms quantize without residual": norms | {(ops, "rms_norm_quantize"): no_residual},
        "norms quantize without shift": norms | {(ops, "rms_norm_quantize"): no_shift_of_norms},
        "exact attention": {(ops, "kv4_attention"): reference.kv4_attention},
        "no transform": {(calls, "int_linear"): changed(linear, stage=("none", 0, None))},
        "16-bit activations": {
            (calls, "int_linear"): sixteen_bit_activations,
            (backends.Backend, "prepare"): lambda self, packed, *_: packed,
        },
        "no bias": {(calls, "int_linear"): changed(linear, bias=None)},
        "no low rank": {(calls, "int_linear"): changed(linear, low_rank_down=None, low_rank_up=None)},
        "no subtraction": {(calls, "int_linear"): changed(linear, low_rank_subtracts=False)},
        "no silu": {(calls, "int_linear"): no_silu},
        "no shift": {(online, "online_stage"): no_shift},
        "no key feedback": {(ops, "kv4_write"): changed(reference.kv4_write, key_feedback=None)},
        "unrotated query": {(calls, "kv_attention"): unrotated_query},
        "a window too long": {(calls, "kv_attention"): window_changed(1)},
        "a window too short": {(calls, "kv_attention"): window_changed(-1)},
    }
    with contextlib.ExitStack() as stack:
        for (owner, name), kernel in wrong[how].items():
            stack.enter_context(mock.patch.object(owner, name, kernel))
        yield


def engine_config(folder: Path, **options: Any) -> Any:
    """vLLM's whole configuration for a checkpoint; parses, loads nothing."""
    from vllm.engine.arg_utils import EngineArgs

    defaults = {"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 256}
    return EngineArgs(str(folder), **(defaults | options)).create_engine_config()


def load_only(folder: Path, **options: Any) -> None:
    """Builds and loads the model as a worker does, start-up check included, without an engine around it."""
    loaded_log(folder, **options)


@contextlib.contextmanager
def empty_is_nan() -> Iterator[None]:
    """Memory that nobody filled holds NaN, as it does now and then anyway."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # which is what fills it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def loaded_log(folder: Path, **options: Any) -> str:
    """`load_only`; gives vLLM's log."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.model_executor.model_loader import get_model

    config = engine_config(folder, **options)
    # vLLM's CPU worker replaces what needs an accelerator.
    cache = mock.patch.object(torch.accelerator, "empty_cache")
    with captured_log() as log, set_current_vllm_config(config), cache, empty_is_nan():
        if not torch.distributed.is_initialized():
            store = Path(tempfile.mkdtemp()) / "store"
            init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
        get_model(vllm_config=config)
    return "\n".join(log)


def loaded_with_eps(folder: Path, eps: float) -> None:
    """`load_only` of a vLLM whose norms take another epsilon than config.json's."""
    from vllm.model_executor.layers.layernorm import RMSNorm

    build = RMSNorm.__init__

    def other(self: Any, hidden: int, eps_of_config: float = 0, *args: Any, **more: Any) -> None:
        build(self, hidden, *args, **more | {"eps": eps})

    with mock.patch.object(RMSNorm, "__init__", other):
        load_only(folder)


def of_first_stage(folder: Path) -> dict[str, bool]:
    """For names of a checkpoint, whether the first of two pipeline stages leaves them to the other."""
    from vllm_rotquant import compat, intake

    stage, missing = torch.nn.Module(), compat.MISSING_LAYERS[0]()
    stage.model, stage.lm_head = torch.nn.Module(), missing
    stage.model.layers = torch.nn.ModuleList([torch.nn.Module(), missing])
    names = ("model.layers.0.norm.weight", "model.layers.1.norm.weight", "lm_head.weight")
    return {name: intake.in_another_stage(stage, name) for name in names}


def quantization_of(folder: Path, flag: str | None) -> str | None:
    """The method that `vllm serve FOLDER [--quantization FLAG]` chooses."""
    return engine_config(folder, quantization=flag).model_config.quantization


def build_attention(folder: Path, cache_dtype: str = "auto", **features: Any) -> None:
    """Builds one attention layer of the checkpoint with features that its own model does not use."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention import Attention

    config = EngineArgs(
        str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=256
    ).create_engine_config()
    config.cache_config.cache_dtype = cache_dtype
    with set_current_vllm_config(config):
        Attention(
            4,
            64,
            0.125,
            num_kv_heads=2,
            cache_config=config.cache_config,
            quant_config=config.quant_config,
            prefix="model.layers.0.self_attn.attn",
            **features,
        )


def serve_unstrict(*arguments: Any, **options: Any) -> Served:
    """`serve` with ROTQUANT_STRICT=0."""
    with mock.patch.dict(os.environ, ROTQUANT_STRICT="0"):
        return serve(*arguments, **options)


def format_of(folder: Path, prefix: str, renamed: dict[str, str] | None = None, attention: bool = False) -> Any:
    """Format of one layer as a worker sees it: from the pickled config, in a model that vLLM may have renamed."""
    from vllm.model_executor.models.utils import WeightsMapper

    config = pickle.loads(pickle.dumps(engine_config(folder).quant_config))
    config.packed_modules_mapping |= {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    if renamed:
        config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix=renamed))
    return config.format.attention(prefix) if attention else config.linear_format(prefix)


def quantization_with(environment: dict[str, str], folder: Path, on_cpu: bool = True) -> str | None:
    """`quantization_of` with environment variables, as a GPU would see it or not."""
    from vllm_rotquant import compat

    with mock.patch.dict(os.environ, environment), mock.patch.object(compat, "on_cpu", return_value=on_cpu):
        return quantization_of(folder, None)


def serve_with_rounded_products(*arguments: Any, **options: Any) -> Served:
    """`serve` where float32 products of matrices keep 8 bits, as under VLLM_FLOAT32_MATMUL_PRECISION=medium."""
    honest = torch.Tensor.__matmul__

    def rounding(a: Tensor, b: Tensor) -> Tensor:
        return honest(*(x.bfloat16().float() if x.dtype == torch.float32 else x for x in (a, b)))

    with mock.patch.object(torch.Tensor, "__matmul__", rounding):
        return serve(*arguments, **options)


def quantization_under(version: str, folder: Path, flag: str | None) -> str | None:
    """`quantization_of` where vLLM has another version."""
    import vllm

    import vllm_rotquant

    engine_config(folder, quantization="compressed-tensors")  # vLLM loads plugins with the first configuration
    try:
        with mock.patch.object(vllm, "__version__", version):
            vllm_rotquant.register()
        return quantization_of(folder, flag)
    finally:
        vllm_rotquant.register()


def factors_of_rank(
    rank: int,
    ranks: int,
    span: slice,
    outputs: list[int],
    loaded: dict[str, tuple[Tensor, Tensor]],
    subtracts: bool = False,
) -> tuple[Tensor, Tensor]:
    """D and U of one rank of a layer after vLLM's loader has passed the checkpoint's factors of each part."""
    from vllm_rotquant import compat, low_rank

    layer, (down, _) = torch.nn.Module(), next(iter(loaded.values()))
    with (
        mock.patch.object(compat, "get_tensor_model_parallel_rank", return_value=rank),
        mock.patch.object(compat, "get_tensor_model_parallel_world_size", return_value=ranks),
    ):
        low_rank.expect_factors(
            layer, "layer", down.shape[1], down.shape[0], span, outputs, len(outputs), torch.float32, subtracts
        )
        for part, factors in loaded.items():
            for name, factor in zip(low_rank.NAMES, factors, strict=True):
                parameter = layer.get_parameter(name)
                parameter.weight_loader(parameter, factor, *([part] if part else []))
    low_rank.check_loaded(layer, "layer")
    return layer.low_rank_down.detach(), layer.low_rank_up.detach()


def feedback_of_rank(rank: int, ranks: int, parts: list[int], loaded: Tensor) -> Tensor:
    """F, of two KV heads of 3 channels, of one rank of a layer of so many outputs there, after vLLM's loader has passed
    the checkpoint's."""
    from vllm_rotquant import compat, key_feedback

    layer = torch.nn.Module()
    with (
        mock.patch.object(compat, "get_tensor_model_parallel_rank", return_value=rank),
        mock.patch.object(compat, "get_tensor_model_parallel_world_size", return_value=ranks),
    ):
        key_feedback.expect(layer, "layer", key_feedback.Keys(2, 3), parts)
        parameter = layer.get_parameter(key_feedback.NAME)
        parameter.weight_loader(parameter, loaded, *(["k"] if len(parts) > 1 else []))
    key_feedback.check_loaded(layer, "layer")
    return key_feedback.of(layer)
