"""From a configuration to a running engine: open the checkpoint, choose kernels, divide the memory."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from aphrodite import platforms
from aphrodite.config import EngineConfig
from aphrodite.core.scheduler import Scheduler, SchedulerConfig
from aphrodite.engine.build_order import BuildOrder, Built, ProgressCallback, not_for_foreign
from aphrodite.engine.core import EngineCore
from aphrodite.engine.device_builder import build_on_device
from aphrodite.engine.host_builder import build_on_host
from aphrodite.engine.messages import EmbeddingInfo, EngineInfo
from aphrodite.engine.preparation import named_adapters
from aphrodite.engine.room import has_driver
from aphrodite.engine.sampling_defaults import sampling_defaults
from aphrodite.errors import ConfigError
from aphrodite.layers.lora import AdapterRoom
from aphrodite.loading.checkpoint import Checkpoint
from aphrodite.loading.foreign import open_described
from aphrodite.loading.lora import MAX_RANK, Adapter, read_adapter
from aphrodite.loading.pooling import pooling_from_directory, pooling_from_gguf
from aphrodite.runner.executor import Executor
from aphrodite.runner.memory import MemoryPlan
from aphrodite.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from aphrodite.models.foreign import ForeignLoader

logger = logging.getLogger(__name__)

# Where nothing was asked for.
LEAST_RANK = 16
LEAST_ADAPTERS, MOST_ADAPTERS = 4, 8


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
    _check_length(config, checkpoint.spec.max_position)
    order = BuildOrder(config, checkpoint, eos, tokenizer, progress, room)
    built = build_on_device(order) if _serves_on_gpu(config) else build_on_host(order)
    memory, executor = built.memory, built.runner.executor
    scheduler = _scheduler(order, built)
    core = EngineCore(scheduler, built.runner, tokenizer, room=room)
    loaded = [core.adapters.take(number, adapter) for number, adapter in enumerate(adapters)]
    expert_bytes, expert_share = _experts(checkpoint, executor.weight_bytes)
    info = EngineInfo(
        model=checkpoint.name,
        family=checkpoint.spec.family,
        vocab_size=checkpoint.spec.vocab_size,
        max_model_len=memory.max_model_len,
        block_size=config.block_size,
        num_blocks=memory.num_blocks,
        max_num_seqs=built.limits.max_num_seqs,
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


def _scheduler(order: BuildOrder, built: Built) -> Scheduler:
    config, limits = order.config, built.limits
    return Scheduler(
        SchedulerConfig(
            num_blocks=built.memory.num_blocks,
            block_size=config.block_size,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            prompt_tokens_beside_answers=limits.prompt_tokens_beside_answers,
            max_model_len=built.memory.max_model_len,
            enable_prefix_caching=config.enable_prefix_caching,
            policy=config.scheduling_policy,
            eos_token_ids=order.eos_token_ids,
            max_queued_requests=None,  # the front ends refuse, before a request crosses to the engine
            max_loras=0 if order.adapters is None else order.adapters.slots,
        )
    )


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
        raise ConfigError(not_for_foreign("--lora" if named else "--enable-lora", checkpoint))
    limit = config.max_lora_rank or MAX_RANK
    adapters = [read_adapter(path, checkpoint.spec, max_rank=limit) for path in named.values()]
    rank = config.max_lora_rank or max([LEAST_RANK, *(adapter.rank for adapter in adapters)])
    slots = config.max_loras or min(max(len(adapters), LEAST_ADAPTERS), MOST_ADAPTERS)
    return adapters, AdapterRoom(slots, rank)


def _check_length(config: EngineConfig, longest: int) -> None:
    """Warn of a context longer than the model is made for; it is the user's to try."""
    if config.max_model_len is not None and config.max_model_len > longest:
        logger.warning(
            "--max-model-len %d is more than the %d tokens that the model is made for; beyond them it may fail",
            config.max_model_len,
            longest,
        )


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
        raise ConfigError(f"{'--device cuda' if config.device == 'cuda' else '--executor triton'}: {reason}")
    if reason is not None and has_driver():
        logger.warning("serving on the CPU though there is a GPU's driver: %s", reason)
    return reason is None
