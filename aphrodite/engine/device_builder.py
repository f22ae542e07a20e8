"""Building on a GPU: the executor, what its memory is divided into, and kernels made ready."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

import torch

from aphrodite import platforms
from aphrodite.engine.build_order import (
    DTYPES,
    KV_DTYPES,
    BuildOrder,
    Built,
    StepLimits,
    limits_of,
    not_for_foreign,
    weights_of,
)
from aphrodite.errors import ConfigError
from aphrodite.loading.checkpoint import Checkpoint
from aphrodite.quantization.types import QuantType
from aphrodite.runner.executor import DeviceModelExecutor
from aphrodite.runner.memory import (
    GIB,
    MemoryPlan,
    device_budget,
    device_workspace,
    format_bytes,
    plan_memory,
)

if TYPE_CHECKING:
    from aphrodite.models.foreign import ForeignLoader
    from aphrodite.runner.device_runner import DeviceRunner

logger = logging.getLogger(__name__)

DEVICE_DEFAULTS = StepLimits(
    max_num_seqs=256, max_num_batched_tokens=8192, prompt_tokens_beside_answers=None, async_depth=1
)


def build_on_device(order: BuildOrder) -> Built:
    """An executor on the GPU, the memory's division, and the runner of both, its kernels ready.

    Raises:
        AphroditeError: the configuration cannot be served here; the message says why.
    """
    config = order.config
    if config.activations != "int16":
        raise ConfigError(f"--activations {config.activations} is for the native CPU kernels; a GPU has --quantization")
    limits = limits_of(config, DEVICE_DEFAULTS)
    device = torch.device("cuda", torch.cuda.current_device())
    executor, memory = _executor_and_memory(order, limits, device)
    runner = _runner(order, limits, executor, memory, device)
    progress = order.progress
    report = partial(progress, "preparing kernels") if progress is not None else lambda done, total: None
    runner.warm_up(limits.max_num_batched_tokens, report)
    return Built(runner, memory, limits)


def _executor_and_memory(
    order: BuildOrder, limits: StepLimits, device: torch.device
) -> tuple[DeviceModelExecutor, MemoryPlan]:
    """The executor, and how the memory that it left is divided."""
    config = order.config
    free_before, total = platforms.memory(device)
    torch.cuda.empty_cache()
    held_before = torch.cuda.memory_reserved(device)
    try:
        executor = _executor(order, device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(_too_large(order.checkpoint, free_before, total)) from error
    workspace = device_workspace(
        order.checkpoint.spec,
        total=total,
        max_num_seqs=limits.max_num_seqs,
        max_model_len=order.wanted_model_len,
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
    return executor, plan_memory(
        weight_bytes=executor.weight_bytes,
        kv_bytes_per_block=executor.kv_bytes_per_block,
        block_size=config.block_size,
        wanted_model_len=order.wanted_model_len,
        fixed_model_len=config.max_model_len is not None,
        max_num_seqs=limits.max_num_seqs,
        budget=config.kv_cache_memory or budget,
        workspace_bytes=workspace,
    )


def _runner(
    order: BuildOrder, limits: StepLimits, executor: DeviceModelExecutor, memory: MemoryPlan, device: torch.device
) -> DeviceRunner:
    from aphrodite.runner.device_runner import DeviceRunner  # Triton is there only where a GPU is

    try:
        return DeviceRunner(
            executor,
            num_rows=limits.max_num_seqs,
            num_blocks=memory.num_blocks,
            max_model_len=memory.max_model_len,
            eos_token_ids=order.eos_token_ids,
            async_depth=limits.async_depth,
            use_graphs=order.config.enable_graphs,
            tokenizer=order.tokenizer,
        )
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a KV cache of {format_bytes(memory.kv_bytes)} and the tables of {limits.max_num_seqs} sequences do not"
            f" fit the GPU, of which {format_bytes(platforms.memory(device).free)} are free: lower --kv-cache-memory,"
            " --gpu-memory-utilization or --max-num-seqs"
        ) from error


def _executor(order: BuildOrder, device: torch.device) -> DeviceModelExecutor:
    config, checkpoint, max_model_len = order.config, order.checkpoint, order.wanted_model_len
    fp8 = config.quantization == "fp8"
    dtype = DTYPES.get(config.dtype) or (torch.bfloat16 if fp8 else device_dtype(checkpoint))
    if dtype is torch.bfloat16 and not platforms.current().has_bfloat16:
        raise ConfigError(f"{platforms.current().name} has no bfloat16: use --dtype float16 or float32")
    kv_dtype = KV_DTYPES.get(config.kv_cache_dtype, dtype)
    if isinstance(checkpoint, Checkpoint):
        from aphrodite.runner.device_executor import DeviceExecutor

        return DeviceExecutor(
            checkpoint.spec,
            weights_of(config, checkpoint, order.progress, on_host=False),
            block_size=config.block_size,
            max_model_len=max_model_len,
            dtype=dtype,
            kv_dtype=kv_dtype,
            device=device,
            offload_bytes=int(config.cpu_offload_gb * (1 << 30)),
            fp8=fp8,
            adapters=order.adapters,
        )
    from aphrodite.runner.transformers_executor import TransformersExecutor

    if config.quantization != "none" or config.cpu_offload_gb:
        setting = "--quantization" if config.quantization != "none" else "--cpu-offload-gb"
        raise ConfigError(not_for_foreign(setting, checkpoint))
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


def device_dtype(checkpoint: Checkpoint | ForeignLoader) -> torch.dtype:
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
