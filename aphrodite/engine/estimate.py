"""What a model will take of the memory, from its headers alone: asked before another model gives way to it.

Imports no torch: the front end asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aphrodite.config import EngineConfig
from aphrodite.errors import UnknownArchitectureError
from aphrodite.loading.checkpoint import open_checkpoint
from aphrodite.loading.inspect import inspect_checkpoint

# The process, its libraries and what a step computes with; on a GPU also the driver's context, kernels and graphs.
HOST_BESIDE = 512 << 20
GPU_BESIDE = 1536 << 20
# Where nobody says how large a KV cache is to be: two conversations of full length, but not more than this share of
# what the weights leave, so that others find room beside it.
CONVERSATIONS = 2
KV_SHARE = 0.25
# Bytes of a weight that is quantized at load, by the setting.
_QUANTIZED = {"int4": 0.625, "int8": 1.0625, "fp8": 1.0, "bitsandbytes": 0.5625}
_KV_BYTES = {"float32": 2.0, "fp8": 0.5}  # beside float16


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that a model takes once it is loaded.

    Attributes:
        beside: what is neither weights nor KV cache.
    """

    weights: int
    kv_cache: int
    beside: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.beside


def estimate_memory(config: EngineConfig, *, budget: int, on_gpu: bool, alone: bool) -> MemoryEstimate:
    """What `config.model`, a path on this machine, takes of a budget in bytes.

    Args:
        alone: no other model is loaded beside it, so that it may take all.

    Raises:
        ModelFormatError: it cannot be opened.
    """
    beside = GPU_BESIDE if on_gpu else HOST_BESIDE
    try:
        facts = inspect_checkpoint(open_checkpoint(config.model or "", load_format=config.load_format))
    except UnknownArchitectureError:  # left to transformers, whose code is not asked here
        weights = _stored_bytes(Path(config.model or ""))
        shared = _share(budget - weights - beside, alone)
        return MemoryEstimate(weights, shared if config.kv_cache_memory is None else config.kv_cache_memory, beside)
    ratio = _QUANTIZED.get(config.quantization)
    weights = facts.weight_bytes if ratio is None else min(facts.weight_bytes, int(facts.parameters * ratio))
    if on_gpu:
        weights = max(0, weights - int(config.cpu_offload_gb * (1 << 30)))
    token = facts.kv_bytes_per_token * _KV_BYTES.get(config.kv_cache_dtype, 1.0)
    length = config.max_model_len or facts.max_position
    if config.kv_cache_memory is not None:
        kv_cache = config.kv_cache_memory
    else:
        wanted = int(token * (length + config.block_size) * CONVERSATIONS)
        kv_cache = min(wanted, _share(budget - weights - beside, alone))
        if config.max_model_len is not None:  # which is a promise
            kv_cache = max(kv_cache, wanted // CONVERSATIONS)
    return MemoryEstimate(weights, kv_cache, beside)


def _share(left: int, alone: bool) -> int:
    return max(0, left if alone else int(left * KV_SHARE))


def _stored_bytes(path: Path) -> int:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
