"""Building on a CPU: the native library where it can run the model, else torch operations."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import psutil
import torch

from aphrodite.config import EngineConfig
from aphrodite.cores import computing_threads, usable_cores
from aphrodite.engine.build_order import (
    DTYPES,
    KV_DTYPES,
    BuildOrder,
    Built,
    LoadingProgress,
    StepLimits,
    limits_of,
    not_for_foreign,
    weights_of,
)
from aphrodite.errors import ConfigError
from aphrodite.layers.dense import short_name
from aphrodite.loading.checkpoint import Checkpoint
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import RawTensor
from aphrodite.runner.executor import ModelExecutor
from aphrodite.runner.memory import HOST_SHARE, plan_memory
from aphrodite.runner.native import KvDtype, NativeExecutor
from aphrodite.runner.runner import Runner
from aphrodite.runner.torch_executor import TorchExecutor

if TYPE_CHECKING:
    from aphrodite.models.foreign import ForeignLoader

logger = logging.getLogger(__name__)

# On a CPU the host and the kernels share the cores: planning ahead would only cost wasted tokens. And a step of 512
# tokens may take seconds there, for which answers would stand still; with 128, prompts take a fifth longer.
HOST_DEFAULTS = StepLimits(max_num_seqs=64, max_num_batched_tokens=512, prompt_tokens_beside_answers=128, async_depth=0)


def build_on_host(order: BuildOrder) -> Built:
    """An executor on the CPU, the memory's division, and the runner of both.

    Raises:
        AphroditeError: the configuration cannot be served here; the message says why.
    """
    config = order.config
    limits = limits_of(config, HOST_DEFAULTS)
    executor = _executor(order)
    memory = plan_memory(
        weight_bytes=executor.weight_bytes,
        kv_bytes_per_block=executor.kv_bytes_per_block,
        block_size=config.block_size,
        wanted_model_len=order.wanted_model_len,
        fixed_model_len=config.max_model_len is not None,
        max_num_seqs=limits.max_num_seqs,
        budget=config.kv_cache_memory or int(psutil.virtual_memory().available * HOST_SHARE),
    )
    runner = Runner(
        executor,
        num_rows=limits.max_num_seqs,
        num_blocks=memory.num_blocks,
        max_model_len=memory.max_model_len,
        eos_token_ids=order.eos_token_ids,
        async_depth=limits.async_depth,
        tokenizer=order.tokenizer,
    )
    return Built(runner, memory, limits)


def _executor(order: BuildOrder) -> ModelExecutor:
    """The native library where it can run this model, else torch; an explicit choice is never replaced."""
    config, checkpoint = order.config, order.checkpoint
    if config.executor == "triton":
        raise ConfigError("--executor triton runs on GPUs; leave --executor at auto on a CPU")
    if config.cpu_offload_gb:
        raise ConfigError("--cpu-offload-gb is for GPUs; on a CPU all weights are in its memory")
    if config.quantization in ("fp8", "bitsandbytes"):
        raise ConfigError(f"--quantization {config.quantization} is for GPUs; a CPU has int4 and int8")
    threads = config.threads or computing_threads()
    if threads > usable_cores():
        logger.warning("--threads %d on %d cores: they wait for one another, fewer are faster", threads, usable_cores())
    if not isinstance(checkpoint, Checkpoint):
        if config.quantization != "none":
            raise ConfigError(not_for_foreign("--quantization", checkpoint))
        return _foreign_executor(config, checkpoint, order.wanted_model_len, threads)
    weights = weights_of(config, checkpoint, None, on_host=True)
    reason = _native_declines(config, checkpoint.spec, weights)
    if config.executor == "native" and reason is not None:
        raise ConfigError(f"--executor native cannot serve this: {reason}")
    if reason is None:
        # The library brings its own threads; torch's would fight them for the cores.
        torch.set_num_threads(1)
        if config.kv_cache_dtype not in ("auto", "float16", "float32"):
            raise ConfigError(
                f"--kv-cache-dtype {config.kv_cache_dtype}: the native kernels take float16 and float32, or auto"
            )
        return NativeExecutor(
            checkpoint.spec,
            weights,
            block_size=config.block_size,
            max_model_len=order.wanted_model_len,
            activations=config.activations,
            kv_dtype=_native_kv_dtype(config),
            threads=threads,
            adapters=order.adapters,
            progress=LoadingProgress(order.progress),
        )
    if config.executor == "auto":
        logger.warning("serving with torch operations instead of the native kernels: %s", reason)
    torch.set_num_threads(threads)
    dtype = _torch_dtype(config)
    return TorchExecutor(
        checkpoint.spec,
        weights_of(config, checkpoint, order.progress, on_host=True),
        block_size=config.block_size,
        max_model_len=order.wanted_model_len,
        dtype=dtype,
        device=torch.device("cpu"),
        adapters=order.adapters,
    )


def _foreign_executor(config: EngineConfig, loader: ForeignLoader, max_model_len: int, threads: int) -> ModelExecutor:
    """transformers' modelling code, which runs on torch operations."""
    from aphrodite.runner.transformers_executor import TransformersExecutor

    if config.executor == "native":
        raise ConfigError(f"--executor native cannot serve this: {loader.spec.family} is left to transformers")
    torch.set_num_threads(threads)
    dtype = _torch_dtype(config)
    return TransformersExecutor(
        loader,
        block_size=config.block_size,
        max_model_len=max_model_len,
        dtype=dtype,
        kv_dtype=dtype,
        device=torch.device("cpu"),
    )


def _torch_dtype(config: EngineConfig) -> torch.dtype:
    """Of torch operations on a CPU, which keep the KV cache in it too.

    Raises:
        ConfigError: the KV cache was to be of another type.
    """
    dtype = DTYPES.get(config.dtype, torch.bfloat16)
    if KV_DTYPES.get(config.kv_cache_dtype, dtype) is not dtype:
        raise ConfigError(
            f"--kv-cache-dtype {config.kv_cache_dtype}: torch operations keep the KV cache in their own type,"
            f" {short_name(dtype)}; leave it at auto or choose another --dtype"
        )
    return dtype


def _native_kv_dtype(config: EngineConfig) -> KvDtype:
    """Integers where products have integer activations too, unless a type was asked for."""
    if config.kv_cache_dtype == "float32":
        return "float32"
    if config.kv_cache_dtype == "auto" and config.activations != "float32":
        return "int16"
    return "float16"


def _native_declines(config: EngineConfig, spec: ModelSpec, weights: Mapping[str, RawTensor]) -> str | None:
    if config.executor == "torch":
        return "--executor torch"
    if config.dtype != "auto":
        return f"--dtype {config.dtype} asks for dequantized layers"
    return NativeExecutor.declines(spec, weights, block_size=config.block_size)
