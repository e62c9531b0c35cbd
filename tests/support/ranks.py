"""Several ranks of one model without a server: forks of one process that has imported vLLM, joined by gloo."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import vllm_serving as serving


def run(function: Callable[..., Any], *arguments: Any, ranks: int = 2, pipeline: bool = False) -> list[Any]:
    """What `function(rank, *arguments)` returns on each rank, or the exception that it raises there.

    Called in a child process (see `test_ranks`), which it forks: tensor parallelism of two ranks, or two stages.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    readers, processes = [], []
    for rank in range(ranks):
        reader, writer = os.pipe()
        readers.append(reader)
        process = os.fork()
        if not process:
            os.close(reader)
            with os.fdopen(writer, "wb") as pipe:
                try:
                    with joined(rank, ranks, port, pipeline):
                        result = function(rank, *arguments)
                except Exception as error:
                    traceback.print_exc()
                    result = error
                pipe.write(pickle.dumps(result))
            os._exit(0)
        os.close(writer)
        processes.append(process)
    results = []
    for reader, process in zip(readers, processes, strict=True):
        with os.fdopen(reader, "rb") as pipe:
            results.append(pickle.loads(pipe.read()))
        os.waitpid(process, 0)
    return results


@contextlib.contextmanager
def joined(rank: int, ranks: int, port: int, pipeline: bool) -> Iterator[None]:
    """This process is a rank: vLLM's groups exist."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    os.environ["VLLM_DIST_IDENT"] = str(port)  # names the shared memory of a server's ranks on CPUs
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(ranks, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
        initialize_model_parallel(*((1, ranks) if pipeline else (ranks, 1)))
        yield


def loaded(folder: Path, **options: Any) -> tuple[Any, Any, str]:
    """The model of a checkpoint as a worker loads it, its configuration, and the log."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    config = serving.engine_config(folder, **options)
    config.compilation_config.mode = 0
    # What vLLM's CPU worker does away with.
    quiet = mock.patch.object(torch.accelerator, "empty_cache")
    with set_current_vllm_config(config), serving.captured_log() as log, quiet:
        model = get_model(vllm_config=config)
    return model, config, "\n".join(log)


def refused(rank: int, folder: Path, second: dict[str, Any]) -> None:
    """Loads a checkpoint on every rank; rank 1 differs by `second`: its folder, environment, options for vLLM, kernels
    (`swap` of `vllm_serving`) or names of `vllm_rotquant.agreement`. Raises what vLLM would stop with."""
    own = second if rank else {}
    with (
        mock.patch.dict(os.environ, own.get("environment", {})),
        mock.patch.multiple("vllm_rotquant.agreement", **own.get("names", {"SAMPLES": 16})),
        serving.swapped(own.get("swap", "")),
    ):
        loaded(own.get("folder", folder), **own.get("options", {}))


def without_plugin(rank: int, folder: Path) -> None:
    """Rank 1 loads the checkpoint without rotquant, and waits for the others in a collective of vLLM's."""
    from vllm.distributed import get_world_group

    if rank:
        get_world_group().barrier()
    else:
        with mock.patch("vllm_rotquant.agreement.ROLL_CALL_SECONDS", 1.0):
            loaded(folder)


def hidden_states(rank: int, folder: Path, tokens: list[int], partition: str, swap: str) -> tuple[torch.Tensor, str]:
    """Hidden states [T, hidden] in front of lm_head, computed by the pipeline stages of vLLM's model one after the
    other, and this rank's log. No page exists yet, so attention gives zeros, as when vLLM measures memory."""
    from vllm.distributed import get_pp_group
    from vllm.forward_context import set_forward_context
    from vllm.sequence import IntermediateTensors

    stage = get_pp_group()
    with (
        mock.patch.dict(os.environ, {"VLLM_PP_LAYER_PARTITION": partition} if partition else {}),
        serving.swapped(swap),
    ):
        model, config, log = loaded(folder)
        given = None if stage.is_first_rank else IntermediateTensors(stage.recv_tensor_dict())
        with set_forward_context(None, config, num_tokens=len(tokens)), torch.inference_mode():
            out = model(torch.tensor(tokens), torch.arange(len(tokens)), given)
    if not stage.is_last_rank:
        stage.send_tensor_dict(out.tensors)
        out = torch.empty(0)
    return out.clone(), log


def load_stage(rank: int, folder: Path, partition: str, dtype: str = "float32") -> str:
    """The log of a pipeline stage that is loaded and runs nothing."""
    with mock.patch.dict(os.environ, VLLM_PP_LAYER_PARTITION=partition):
        return loaded(folder, dtype=dtype)[2]


def kernels_in_worker(folder: Path, first: dict[str, str], worker: dict[str, str], given: Any) -> tuple[str, Any]:
    """The kernel of `int_linear` in a worker, and its `--additional-config` once the model is built; the environments
    are those of the server's first process and of the worker, `given` what the user gave as `--additional-config`."""
    from vllm.config import set_current_vllm_config

    from rotquant_kernels import ops
    from vllm_rotquant.startup import Startup

    with mock.patch.dict(os.environ, first):
        sent = pickle.dumps(serving.engine_config(folder, **({"additional_config": given} if given else {})))
    with mock.patch.dict(os.environ, worker):
        config = pickle.loads(sent)
        with set_current_vllm_config(config):
            start = Startup()
            start.begin(config.quant_config.defaults)
            try:
                return ops.kernel_of("int_linear"), config.additional_config | {"strict": start.strict}
            finally:
                ops.choose_cpu_tier("auto")


def check_device(kind: str) -> None:
    from vllm_rotquant import agreement

    agreement.check_device(kind)


def copies(folder: Path) -> list[Any]:
    """The format of a layer in copies of the quantization config, as vLLM, Ray and data parallelism make them."""
    import copy

    import cloudpickle

    config = serving.engine_config(folder).quant_config
    config.packed_modules_mapping |= {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    made = [pickle.loads(pickle.dumps(config)), cloudpickle.loads(cloudpickle.dumps(config)), copy.deepcopy(config)]
    assert all(each.startup is not config.startup and each.defaults == config.defaults for each in made)
    return [each.linear_format("model.layers.0.self_attn.qkv_proj") for each in [config, *made]]


def unpickled(folder: Path, version: str = "", failure: str = "") -> None:
    """Unpickles a server's configuration in a worker with another rotquant, or one of whose modules does not import."""
    import sys

    sent = pickle.dumps(serving.engine_config(folder))
    if version:
        with mock.patch("vllm_rotquant.version", return_value=version):
            pickle.loads(sent)
    with mock.patch.dict(sys.modules, {failure: None}):
        sys.modules.pop("vllm_rotquant.config", None)
        pickle.loads(sent)


def other_version() -> str:
    return "9.9"


def other_kernel(op: str, device: str) -> str:
    return "old"
