"""From a configuration to a running engine: open the checkpoint, choose kernels, divide the memory."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import psutil
import torch

from aphrodite.config import EngineConfig
from aphrodite.core.scheduler import Scheduler, SchedulerConfig
from aphrodite.engine.core import EngineCore
from aphrodite.engine.messages import EngineInfo
from aphrodite.errors import ConfigError
from aphrodite.loading.checkpoint import Checkpoint, open_checkpoint
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import RawTensor
from aphrodite.runner.executor import ModelExecutor
from aphrodite.runner.memory import MemoryPlan, plan_memory
from aphrodite.runner.native import NativeExecutor
from aphrodite.runner.runner import Runner
from aphrodite.runner.torch_executor import TorchExecutor
from aphrodite.tokenizer.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

ProgressCallback = Callable[[str, int, int], None]

DEFAULT_BATCHED_TOKENS = 512
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class BuiltEngine(NamedTuple):
    core: EngineCore
    info: EngineInfo
    memory: MemoryPlan


def build_engine(
    config: EngineConfig,
    eos_token_ids: Iterable[int],
    progress: ProgressCallback | None = None,
    *,
    tokenizer: Tokenizer | None = None,
) -> BuiltEngine:
    """Load `config.model` (already resolved to a path) and make everything ready to serve.

    Args:
        eos_token_ids: tokens that end an answer, as the tokenizer knows them; the checkpoint's own are added.
        tokenizer: for samplers whose parameters are texts (DRY's sequence breakers), and for banned phrases.

    Raises:
        AphroditeError: the checkpoint or the configuration cannot be served; the message says why.
    """
    began = time.perf_counter()
    if config.model is None:
        raise ConfigError("no model was named")
    checkpoint = open_checkpoint(config.model, load_format=config.load_format)
    threads = config.threads or psutil.cpu_count(logical=False) or os.cpu_count() or 1
    wanted_model_len = config.max_model_len or checkpoint.spec.max_position
    weights = _ReportingWeights(checkpoint.weights, checkpoint.weight_bytes, progress)
    executor = _build_executor(config, checkpoint, weights, wanted_model_len, threads)
    memory = plan_memory(
        weight_bytes=executor.weight_bytes,
        kv_bytes_per_block=executor.kv_bytes_per_block,
        block_size=config.block_size,
        wanted_model_len=wanted_model_len,
        fixed_model_len=config.max_model_len is not None,
        max_num_seqs=config.max_num_seqs,
        available=psutil.virtual_memory().available,
        kv_cache_memory=config.kv_cache_memory,
    )
    eos = frozenset(checkpoint.generation_defaults.eos_token_ids).union(eos_token_ids)
    runner = Runner(
        executor,
        num_rows=config.max_num_seqs,
        num_blocks=memory.num_blocks,
        max_model_len=memory.max_model_len,
        eos_token_ids=eos,
        # On a CPU the host and the kernels share the cores: planning ahead would only cost wasted tokens.
        async_depth=config.async_depth or 0,
        tokenizer=tokenizer,
    )
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=memory.num_blocks,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS,
            max_model_len=memory.max_model_len,
            enable_prefix_caching=config.enable_prefix_caching,
            policy=config.scheduling_policy,
            eos_token_ids=eos,
            max_queued_requests=None,  # the front ends refuse, before a request crosses to the engine
        )
    )
    info = EngineInfo(
        model=checkpoint.name,
        family=checkpoint.spec.family,
        vocab_size=checkpoint.spec.vocab_size,
        max_model_len=memory.max_model_len,
        block_size=config.block_size,
        num_blocks=memory.num_blocks,
        max_num_seqs=config.max_num_seqs,
        eos_token_ids=sorted(eos),
        weight_bytes=executor.weight_bytes,
        kv_bytes_per_block=executor.kv_bytes_per_block,
        memory_plan=memory.lines(),
        kernels=executor.describe(),
        load_seconds=time.perf_counter() - began,
    )
    return BuiltEngine(EngineCore(scheduler, runner, tokenizer), info, memory)


def _build_executor(
    config: EngineConfig,
    checkpoint: Checkpoint,
    weights: Mapping[str, RawTensor],
    max_model_len: int,
    threads: int,
) -> ModelExecutor:
    """The native library where it can run this model, else torch; an explicit choice is never replaced."""
    if config.device == "cuda":
        raise ConfigError("--device cuda: this version serves on CPUs only; leave --device at auto")
    reason = _native_declines(config, checkpoint.spec, weights)
    if config.executor == "native" and reason is not None:
        raise ConfigError(f"--executor native cannot serve this: {reason}")
    if reason is None:
        # The library brings its own threads; torch's would fight them for the cores.
        torch.set_num_threads(1)
        return NativeExecutor(
            checkpoint.spec,
            weights,
            block_size=config.block_size,
            max_model_len=max_model_len,
            activations=config.activations,
            kv_dtype="float32" if config.kv_cache_dtype == "float32" else "float16",
            threads=threads,
        )
    if config.executor == "auto":
        logger.warning("serving with torch operations instead of the native kernels: %s", reason)
    torch.set_num_threads(threads)
    return TorchExecutor(
        checkpoint.spec,
        weights,
        block_size=config.block_size,
        max_model_len=max_model_len,
        dtype=_DTYPES.get(config.dtype, torch.bfloat16),
        device=torch.device("cpu"),
    )


def _native_declines(config: EngineConfig, spec: ModelSpec, weights: Mapping[str, RawTensor]) -> str | None:
    if config.executor == "torch":
        return "--executor torch"
    if config.dtype != "auto":
        return f"--dtype {config.dtype} asks for dequantized layers"
    return NativeExecutor.declines(spec, weights, block_size=config.block_size)


class _ReportingWeights(Mapping[str, RawTensor]):
    """The checkpoint's weights, telling how many bytes have been taken so far."""

    def __init__(self, weights: Mapping[str, RawTensor], total: int, progress: ProgressCallback | None) -> None:
        self._weights = weights
        self._total = total
        self._progress = progress
        self._taken: set[str] = set()
        self._done = 0
        self._reported = 0.0

    def __getitem__(self, name: str) -> RawTensor:
        raw = self._weights[name]
        if self._progress is not None and name not in self._taken:
            self._taken.add(name)
            self._done += raw.nbytes
            now = time.monotonic()
            if now - self._reported > 0.1 or self._done == self._total:
                self._reported = now
                self._progress("loading weights", self._done, self._total)
        return raw

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
