"""What a model will take of the memory, from its headers alone: asked before another model gives way to it.

Imports no torch: the front end asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aphrodite.config import EngineConfig
from aphrodite.errors import UnknownArchitectureError
from aphrodite.loading.checkpoint import Checkpoint, open_checkpoint
from aphrodite.loading.weights import Parameter
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import QuantType

# The process, its libraries and what a step computes with; on a GPU also the driver's context, kernels and graphs.
HOST_BESIDE = 512 << 20
GPU_BESIDE = 1536 << 20
# Where nobody says how large a KV cache is to be: two conversations of full length, but not more than this share of
# what the weights leave, so that others find room beside it.
CONVERSATIONS = 2
KV_SHARE = 0.25
# Bytes of a weight that is quantized at load, by the setting.
_QUANTIZED = {"int4": 0.625, "int8": 1.0625, "fp8": 1.0, "bitsandbytes": 0.5625}
_ITEM_BYTES = {"float32": 4, "fp8": 1}  # of types that --dtype and --kv-cache-dtype name; of all others 2


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
        checkpoint = open_checkpoint(config.model or "", load_format=config.load_format)
    except UnknownArchitectureError:  # left to transformers, whose code is not asked here
        weights = _stored_bytes(Path(config.model or ""))
        shared = _share(budget - weights - beside, alone)
        return MemoryEstimate(weights, shared if config.kv_cache_memory is None else config.kv_cache_memory, beside)
    weights = _held_bytes(checkpoint, config, on_gpu)
    if config.quantization != "none":
        weights = min(weights, int(checkpoint.parameters * _QUANTIZED[config.quantization]))
    if on_gpu:
        weights = max(0, weights - int(config.cpu_offload_gb * (1 << 30)))
    token = _kv_bytes_per_token(checkpoint.spec, config, on_gpu)
    length = config.max_model_len or checkpoint.spec.max_position
    if config.kv_cache_memory is not None:
        kv_cache = config.kv_cache_memory
    else:
        wanted = token * (length + config.block_size) * CONVERSATIONS
        kv_cache = min(wanted, _share(budget - weights - beside, alone))
        if config.max_model_len is not None:  # which is a promise
            kv_cache = max(kv_cache, wanted // CONVERSATIONS)
    return MemoryEstimate(weights, kv_cache, beside)


def _by_torch(config: EngineConfig, on_gpu: bool) -> bool:
    """Whether torch operations on a CPU were asked for, which expand most types."""
    return not on_gpu and (config.executor == "torch" or config.dtype != "auto")


def _held_bytes(checkpoint: Checkpoint, config: EngineConfig, on_gpu: bool) -> int:
    """Bytes of all weights as they are kept: those of the file in the native library; on a GPU, dense ones in the type
    of the computation; by torch operations on a CPU all in that type, but for 4 bits beside bfloat16."""
    item, by_torch = _ITEM_BYTES.get(config.dtype, 2), _by_torch(config, on_gpu)
    total = 0
    for name, parameter in checkpoint.weights.parameters.items():
        dense = parameter.matrix is None and parameter.qtype.block_size == 1
        expanded = by_torch and (config.dtype in ("float32", "float16") or not _has_4_bits(name, parameter))
        total += parameter.count * item if expanded or (dense and on_gpu) else parameter.nbytes
    return total


def _has_4_bits(name: str, parameter: Parameter) -> bool:
    """Whether torch has a product with the weight as it is stored."""
    if name == "embed.weight" or parameter.matrix is None:
        return name != "embed.weight" and parameter.qtype in (QuantType.Q4_0, QuantType.Q4_1)
    return parameter.matrix.method in ("AWQ 4-bit", "GPTQ 4-bit", "W4A16")


def _kv_bytes_per_token(spec: ModelSpec, config: EngineConfig, on_gpu: bool) -> int:
    """Bytes that all layers cache of a token. The native library's integers have scales beside them, two for each head,
    of which latent attention has one."""
    if on_gpu or _by_torch(config, on_gpu):
        kind = config.dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
        return spec.num_layers * spec.kv_dim * _ITEM_BYTES.get(kind, 2)
    integers = config.kv_cache_dtype == "auto" and config.activations != "float32"
    scales = 8 * (spec.num_kv_heads if spec.mla is None else 1) if integers else 0
    return spec.num_layers * (spec.kv_dim * _ITEM_BYTES.get(config.kv_cache_dtype, 2) + scales)


def _share(left: int, alone: bool) -> int:
    return max(0, left if alone else int(left * KV_SHARE))


def _stored_bytes(path: Path) -> int:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
