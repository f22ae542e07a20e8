"""From a configuration to a running engine: open the checkpoint, choose kernels, divide the memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch

from aphrodite import platforms
from aphrodite.config import EngineConfig
from aphrodite.core.scheduler import Scheduler, SchedulerConfig
from aphrodite.cores import computing_threads
from aphrodite.engine.core import EngineCore
from aphrodite.engine.messages import EmbeddingInfo, EngineInfo
from aphrodite.engine.preparation import named_adapters
from aphrodite.engine.room import has_driver
from aphrodite.engine.sampling_defaults import sampling_defaults
from aphrodite.errors import ConfigError
from aphrodite.layers.dense import short_name
from aphrodite.layers.lora import AdapterRoom
from aphrodite.loading.checkpoint import Checkpoint
from aphrodite.loading.foreign import open_described
from aphrodite.loading.lora import MAX_RANK, Adapter, read_adapter
from aphrodite.loading.pooling import pooling_from_directory, pooling_from_gguf
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.at_load import QuantizedWeights
from aphrodite.quantization.types import QuantType, RawTensor
from aphrodite.runner.data_plane import DataPlane
from aphrodite.runner.executor import DeviceModelExecutor, Executor, ModelExecutor
from aphrodite.runner.memory import (
    GIB,
    HOST_SHARE,
    MemoryPlan,
    device_budget,
    device_workspace,
    format_bytes,
    plan_memory,
)
from aphrodite.runner.native import KvDtype, NativeExecutor
from aphrodite.runner.runner import Runner
from aphrodite.runner.torch_executor import TorchExecutor
from aphrodite.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from aphrodite.models.foreign import ForeignLoader

logger = logging.getLogger(__name__)

ProgressCallback = Callable[[str, int, int], None]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KV_DTYPES = {**_DTYPES, "fp8": torch.float8_e4m3fn}


# Where nothing was asked for.
LEAST_RANK = 16
LEAST_ADAPTERS, MOST_ADAPTERS = 4, 8


class StepLimits(NamedTuple):
    """How much a step may hold, and how many steps are planned ahead of the device."""

    max_num_seqs: int
    max_num_batched_tokens: int
    prompt_tokens_beside_answers: int | None
    async_depth: int


# On a CPU the host and the kernels share the cores: planning ahead would only cost wasted tokens. And a step of 512
# tokens may take seconds there, for which answers would stand still; with 128, prompts take a fifth longer.
HOST_DEFAULTS = StepLimits(max_num_seqs=64, max_num_batched_tokens=512, prompt_tokens_beside_answers=128, async_depth=0)
DEVICE_DEFAULTS = StepLimits(
    max_num_seqs=256, max_num_batched_tokens=8192, prompt_tokens_beside_answers=None, async_depth=1
)


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
        tokenizer: for samplers whose parameters are texts (DRY's sequence breakers), grammars, and banned phrases.

    Raises:
        AphroditeError: the checkpoint or the configuration cannot be served; the message says why.
    """
    if config.model is None:
        raise ConfigError("no model was named")
    checkpoint = open_described(config.model, load_format=config.load_format)
    defaults = sampling_defaults(checkpoint.generation_defaults, source=config.generation_config)
    adapters, room = _adapters(config, checkpoint)
    eos = frozenset(checkpoint.generation_defaults.eos_token_ids).union(eos_token_ids)
    eos = frozenset(token for token in eos if token < checkpoint.spec.vocab_size)
    if tokenizer is not None and tokenizer.vocab_size > checkpoint.spec.vocab_size:
        logger.warning(
            "the tokenizer knows %d tokens, the model %d: prompts with others are refused",
            tokenizer.vocab_size,
            checkpoint.spec.vocab_size,
        )
    if _serves_on_gpu(config):
        runner, memory, limits = _build_on_device(config, checkpoint, eos, tokenizer, progress, room)
    else:
        runner, memory, limits = _build_on_host(config, checkpoint, eos, tokenizer, progress, room)
    executor = runner.executor
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=memory.num_blocks,
            block_size=config.block_size,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            prompt_tokens_beside_answers=limits.prompt_tokens_beside_answers,
            max_model_len=memory.max_model_len,
            enable_prefix_caching=config.enable_prefix_caching,
            policy=config.scheduling_policy,
            eos_token_ids=eos,
            max_queued_requests=None,  # the front ends refuse, before a request crosses to the engine
            max_loras=0 if room is None else room.slots,
        )
    )
    core = EngineCore(scheduler, runner, tokenizer, room=room)
    loaded = [core.adapters.take(number, adapter) for number, adapter in enumerate(adapters)]
    expert_bytes, expert_share = _experts(checkpoint, executor.weight_bytes)
    info = EngineInfo(
        model=checkpoint.name,
        family=checkpoint.spec.family,
        vocab_size=checkpoint.spec.vocab_size,
        max_model_len=memory.max_model_len,
        block_size=config.block_size,
        num_blocks=memory.num_blocks,
        max_num_seqs=limits.max_num_seqs,
        eos_token_ids=sorted(eos),
        weight_bytes=executor.weight_bytes,
        expert_bytes=expert_bytes,
        expert_share=expert_share,
        kv_bytes_per_block=executor.kv_bytes_per_block,
        memory_plan=memory.lines(),
        kernels=executor.describe(),
        sampling_defaults=defaults,
        embedding=_embedding(checkpoint, executor),
        adapters=loaded,
        max_loras=scheduler.config.max_loras,
    )
    return BuiltEngine(core, info, memory)


def _experts(checkpoint: Checkpoint | ForeignLoader, weight_bytes: int) -> tuple[int, float]:
    """Bytes of the experts among which tokens choose, and what one token reads of them."""
    if not isinstance(checkpoint, Checkpoint) or checkpoint.spec.moe is None:
        return 0, 1.0
    moe = checkpoint.spec.moe
    stored = checkpoint.weights.parameters
    experts = sum(parameter.nbytes for name, parameter in stored.items() if ".expert_" in name)
    total = sum(parameter.nbytes for parameter in stored.values())
    return weight_bytes * experts // total, moe.top_k / moe.num_experts


def _embedding(checkpoint: Checkpoint | ForeignLoader, executor: Executor) -> EmbeddingInfo:
    """How the checkpoint's embeddings are made, if the executor can."""
    if not isinstance(checkpoint, Checkpoint):
        defaults = pooling_from_directory(checkpoint.checkpoint.path)
    elif checkpoint.gguf is not None:
        defaults = pooling_from_gguf(checkpoint.gguf, checkpoint.path)
    else:
        defaults = pooling_from_directory(checkpoint.path)
    return EmbeddingInfo(
        size=checkpoint.spec.hidden_size,
        pooling=defaults.pooling,
        normalize=defaults.normalize,
        declined=defaults.declined or executor.hidden_declined,
    )


def _adapters(config: EngineConfig, checkpoint: Checkpoint | ForeignLoader) -> tuple[list[Adapter], AdapterRoom | None]:
    """The adapters of the setting `lora`, whose headers fit the model, and the room to make for all that may come."""
    named = named_adapters(config.lora)
    if not named and not config.enable_lora:
        return [], None
    if not isinstance(checkpoint, Checkpoint):
        raise ConfigError(_not_for_foreign("--lora" if named else "--enable-lora", checkpoint))
    limit = config.max_lora_rank or MAX_RANK
    adapters = [read_adapter(path, checkpoint.spec, max_rank=limit) for path in named.values()]
    rank = config.max_lora_rank or max([LEAST_RANK, *(adapter.rank for adapter in adapters)])
    slots = config.max_loras or min(max(len(adapters), LEAST_ADAPTERS), MOST_ADAPTERS)
    return adapters, AdapterRoom(slots, rank)


class _Built(NamedTuple):
    runner: DataPlane
    memory: MemoryPlan
    limits: StepLimits


def _build_on_host(
    config: EngineConfig,
    checkpoint: Checkpoint | ForeignLoader,
    eos_token_ids: frozenset[int],
    tokenizer: Tokenizer | None,
    progress: ProgressCallback | None,
    adapters: AdapterRoom | None,
) -> _Built:
    limits = _limits(config, HOST_DEFAULTS)
    wanted_model_len = config.max_model_len or checkpoint.spec.max_position
    executor = _host_executor(config, checkpoint, wanted_model_len, progress, adapters)
    memory = plan_memory(
        weight_bytes=executor.weight_bytes,
        kv_bytes_per_block=executor.kv_bytes_per_block,
        block_size=config.block_size,
        wanted_model_len=wanted_model_len,
        fixed_model_len=config.max_model_len is not None,
        max_num_seqs=limits.max_num_seqs,
        budget=config.kv_cache_memory or int(psutil.virtual_memory().available * HOST_SHARE),
    )
    runner = Runner(
        executor,
        num_rows=limits.max_num_seqs,
        num_blocks=memory.num_blocks,
        max_model_len=memory.max_model_len,
        eos_token_ids=eos_token_ids,
        async_depth=limits.async_depth,
        tokenizer=tokenizer,
    )
    return _Built(runner, memory, limits)


def _host_executor(
    config: EngineConfig,
    checkpoint: Checkpoint | ForeignLoader,
    max_model_len: int,
    progress: ProgressCallback | None,
    adapters: AdapterRoom | None,
) -> ModelExecutor:
    """The native library where it can run this model, else torch; an explicit choice is never replaced."""
    if config.executor == "triton":
        raise ConfigError("--executor triton runs on GPUs; leave --executor at auto on a CPU")
    if config.cpu_offload_gb:
        raise ConfigError("--cpu-offload-gb is for GPUs; on a CPU all weights are in its memory")
    if config.quantization in ("fp8", "bitsandbytes"):
        raise ConfigError(f"--quantization {config.quantization} is for GPUs; a CPU has int4 and int8")
    threads = config.threads or computing_threads()
    if not isinstance(checkpoint, Checkpoint):
        if config.quantization != "none":
            raise ConfigError(_not_for_foreign("--quantization", checkpoint))
        return _foreign_host_executor(config, checkpoint, max_model_len, threads)
    weights = _weights(config, checkpoint, None, on_host=True)
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
            max_model_len=max_model_len,
            activations=config.activations,
            kv_dtype=_native_kv_dtype(config),
            threads=threads,
            adapters=adapters,
            progress=_LoadingProgress(progress),
        )
    if config.executor == "auto":
        logger.warning("serving with torch operations instead of the native kernels: %s", reason)
    torch.set_num_threads(threads)
    dtype = _torch_dtype(config)
    return TorchExecutor(
        checkpoint.spec,
        _weights(config, checkpoint, progress, on_host=True),
        block_size=config.block_size,
        max_model_len=max_model_len,
        dtype=dtype,
        device=torch.device("cpu"),
        adapters=adapters,
    )


def _foreign_host_executor(
    config: EngineConfig, loader: ForeignLoader, max_model_len: int, threads: int
) -> ModelExecutor:
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
    dtype = _DTYPES.get(config.dtype, torch.bfloat16)
    if _KV_DTYPES.get(config.kv_cache_dtype, dtype) is not dtype:
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


def _serves_on_gpu(config: EngineConfig) -> bool:
    """Whether the model runs on a GPU: where one was asked for, or is there and nobody asked for the CPU.

    Raises:
        ConfigError: a GPU was asked for that cannot be used.
    """
    asked = config.device == "cuda" or config.executor == "triton"
    if config.device == "cpu" or (not asked and config.executor != "auto"):
        return False
    reason = platforms.unusable_reason()
    if reason is not None and asked:
        raise ConfigError(f"--device cuda: {reason}")
    if reason is not None and has_driver():
        logger.warning("serving on the CPU though there is a GPU's driver: %s", reason)
    return reason is None


def _build_on_device(
    config: EngineConfig,
    checkpoint: Checkpoint | ForeignLoader,
    eos_token_ids: frozenset[int],
    tokenizer: Tokenizer | None,
    progress: ProgressCallback | None,
    adapters: AdapterRoom | None,
) -> _Built:
    from aphrodite.runner.device_runner import DeviceRunner  # Triton is there only where a GPU is

    if config.activations != "int16":
        raise ConfigError(f"--activations {config.activations} is for the native CPU kernels; a GPU has --quantization")
    limits = _limits(config, DEVICE_DEFAULTS)
    spec = checkpoint.spec
    wanted_model_len = config.max_model_len or spec.max_position
    device = torch.device("cuda", torch.cuda.current_device())
    free_before, total = platforms.memory(device)
    torch.cuda.empty_cache()
    held_before = torch.cuda.memory_reserved(device)
    try:
        executor = _device_executor(config, checkpoint, wanted_model_len, device, progress, adapters)
    except torch.OutOfMemoryError as error:
        raise ConfigError(_too_large(checkpoint, free_before, total)) from error
    workspace = device_workspace(
        spec,
        total=total,
        max_num_seqs=limits.max_num_seqs,
        max_model_len=wanted_model_len,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        itemsize=executor.dtype.itemsize,
    )
    torch.cuda.empty_cache()
    budget = device_budget(
        usable=int(total * config.gpu_memory_utilization),
        taken=torch.cuda.memory_reserved(device) - held_before,
        free=platforms.memory(device).free,
        workspace_bytes=workspace,
    )
    memory = plan_memory(
        weight_bytes=executor.weight_bytes,
        kv_bytes_per_block=executor.kv_bytes_per_block,
        block_size=config.block_size,
        wanted_model_len=wanted_model_len,
        fixed_model_len=config.max_model_len is not None,
        max_num_seqs=limits.max_num_seqs,
        budget=config.kv_cache_memory or budget,
        workspace_bytes=workspace,
    )
    try:
        runner = DeviceRunner(
            executor,
            num_rows=limits.max_num_seqs,
            num_blocks=memory.num_blocks,
            max_model_len=memory.max_model_len,
            eos_token_ids=eos_token_ids,
            async_depth=limits.async_depth,
            use_graphs=config.enable_graphs,
            tokenizer=tokenizer,
        )
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a KV cache of {format_bytes(memory.kv_bytes)} and the tables of {limits.max_num_seqs} sequences do not"
            f" fit the GPU, of which {format_bytes(platforms.memory(device).free)} are free: lower --kv-cache-memory,"
            " --gpu-memory-utilization or --max-num-seqs"
        ) from error
    report = partial(progress, "preparing kernels") if progress is not None else lambda done, total: None
    runner.warm_up(limits.max_num_batched_tokens, report)
    return _Built(runner, memory, limits)


def _device_executor(
    config: EngineConfig,
    checkpoint: Checkpoint | ForeignLoader,
    max_model_len: int,
    device: torch.device,
    progress: ProgressCallback | None,
    adapters: AdapterRoom | None,
) -> DeviceModelExecutor:
    fp8 = config.quantization == "fp8"
    dtype = _DTYPES.get(config.dtype) or (torch.bfloat16 if fp8 else _device_dtype(checkpoint))
    if dtype is torch.bfloat16 and not platforms.current().has_bfloat16:
        raise ConfigError(f"{platforms.current().name} has no bfloat16: use --dtype float16 or float32")
    kv_dtype = _KV_DTYPES.get(config.kv_cache_dtype, dtype)
    if isinstance(checkpoint, Checkpoint):
        from aphrodite.runner.device_executor import DeviceExecutor

        return DeviceExecutor(
            checkpoint.spec,
            _weights(config, checkpoint, progress, on_host=False),
            block_size=config.block_size,
            max_model_len=max_model_len,
            dtype=dtype,
            kv_dtype=kv_dtype,
            device=device,
            offload_bytes=int(config.cpu_offload_gb * (1 << 30)),
            fp8=fp8,
            adapters=adapters,
        )
    from aphrodite.runner.transformers_executor import TransformersExecutor

    if config.quantization != "none" or config.cpu_offload_gb:
        setting = "--quantization" if config.quantization != "none" else "--cpu-offload-gb"
        raise ConfigError(_not_for_foreign(setting, checkpoint))
    return TransformersExecutor(
        checkpoint, block_size=config.block_size, max_model_len=max_model_len, dtype=dtype, kv_dtype=kv_dtype,
        device=device,
    )  # fmt: skip


def _too_large(checkpoint: Checkpoint | ForeignLoader, free: int, total: int) -> str:
    """What to tell who wants a model whose weights do not fit the GPU."""
    others = total - free
    held = f", for other programs hold {format_bytes(others)}" if others > total // 10 else ""
    stored = (checkpoint if isinstance(checkpoint, Checkpoint) else checkpoint.checkpoint).weight_bytes
    advice = "take a smaller or a quantized file of the model"
    if isinstance(checkpoint, Checkpoint):
        offload = max(1, -(-(stored - free // 2) // GIB))
        advice += f", --quantization int4, or --cpu-offload-gb {offload}, which keeps so much in host memory, slowly"
    return (
        f"the weights do not fit the GPU: {format_bytes(stored)} as they are stored, and {format_bytes(free)} of its"
        f" {format_bytes(total)} were free{held}; {advice}"
    )


def _not_for_foreign(setting: str, loader: ForeignLoader) -> str:
    return f"{setting} is for built-in models; {loader.spec.family} is left to transformers"


def _weights(
    config: EngineConfig, checkpoint: Checkpoint, progress: ProgressCallback | None, *, on_host: bool
) -> _ReportingWeights:
    """The checkpoint's parameters as the executor shall hold them."""
    weights: Mapping[str, RawTensor] = checkpoint.weights
    if config.quantization != "none":
        weights = QuantizedWeights(weights, config.quantization, on_host=on_host)
    return _ReportingWeights(weights, checkpoint.weight_bytes, progress)


def _device_dtype(checkpoint: Checkpoint | ForeignLoader) -> torch.dtype:
    """The checkpoint's own 16-bit type, else bfloat16 where the GPU has it."""
    most = next(iter(checkpoint.tensors_by_type))
    if most is QuantType.F16:
        return torch.float16
    if platforms.current().has_bfloat16:
        return torch.bfloat16
    logger.warning(
        "%s has no bfloat16: computing in float16, which large values of some models overflow; --dtype float32 is safe",
        platforms.current().name,
    )
    return torch.float16


def _limits(config: EngineConfig, defaults: StepLimits) -> StepLimits:
    """What the user chose, or the device's defaults."""
    return StepLimits(
        config.max_num_seqs or defaults.max_num_seqs,
        config.max_num_batched_tokens or defaults.max_num_batched_tokens,
        config.prompt_tokens_beside_answers or defaults.prompt_tokens_beside_answers,
        defaults.async_depth if config.async_depth is None else config.async_depth,
    )


def _native_declines(config: EngineConfig, spec: ModelSpec, weights: Mapping[str, RawTensor]) -> str | None:
    if config.executor == "torch":
        return "--executor torch"
    if config.dtype != "auto":
        return f"--dtype {config.dtype} asks for dequantized layers"
    return NativeExecutor.declines(spec, weights, block_size=config.block_size)


class _LoadingProgress:
    """Tells how much of the weights is loaded, ten times a second at most."""

    def __init__(self, progress: ProgressCallback | None) -> None:
        self._progress = progress
        self._reported = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._progress is not None and (now - self._reported > 0.1 or done == total):
            self._reported = now
            self._progress("loading weights", done, total)


class _ReportingWeights(Mapping[str, RawTensor]):
    """The checkpoint's weights, telling how many bytes have been taken so far."""

    def __init__(self, weights: Mapping[str, RawTensor], total: int, progress: ProgressCallback | None) -> None:
        self._weights = weights
        self._total = total
        self._progress = _LoadingProgress(progress)
        self._taken: set[str] = set()
        self._done = 0

    def __getitem__(self, name: str) -> RawTensor:
        raw = self._weights[name]
        if name not in self._taken:
            self._taken.add(name)
            self._done += raw.nbytes
            self._progress(self._done, self._total)
        return raw

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
